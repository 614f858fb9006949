"""Accuracy under corruption, and stressed against clean performance, against scipy, loops and normal simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from multiplicity_bench.metrics.api import METRICS, PerMember, Undefined
from multiplicity_bench.metrics.context import BASE, MEMBERS, Context, Models, softmax
from multiplicity_bench.metrics.shift import (
    accuracy_on,
    corruptions,
    rank_correlation,
    relative_accuracy,
    variance_ratio,
)
from scipy.stats import spearmanr

PATIENTS = np.repeat(np.arange(30), 4)


@pytest.fixture(scope="module")
def make_part(make_context):
    """Return a function that makes a part of 120 samples of 30 patients with views of itself, one label missing."""

    def make(views=("jpeg-3", "pgd-4"), members=4, draws=50, signal=1.0, seed=0) -> Context:
        rng = np.random.default_rng(seed)
        labels = rng.integers(2, size=120)
        labels[5] = -1
        skill = rng.uniform(0, 2 * signal, members + 1)

        def shown(loss, seed) -> Context:
            logits = rng.normal(size=(members + 1, 120, 2))
            logits[:, np.arange(120), np.maximum(labels, 0)] += loss * skill[:, None]
            return make_context(softmax(logits[1:]), softmax(logits[0]), labels, PATIENTS, draws, seed)

        part = shown(1.0, seed)
        part.views = {view: shown(0.5, seed + 99) for view in views}
        return part

    return make


def rows_of(context: Context, draw: int) -> np.ndarray:
    """Return the labelled cases of a draw, with repetitions."""
    rows = np.repeat(np.arange(120), context.bootstrap.counts[draw][PATIENTS])
    return rows[context.labels[rows] >= 0]


def shares(context: Context, shown: Context, rows: np.ndarray) -> np.ndarray:
    return (shown.probabilities[:, rows].argmax(axis=2) == context.labels[rows]).mean(axis=1)


def corrupted(context: Context, models: Models = MEMBERS) -> dict[str, PerMember]:
    return METRICS.get("corrupted_accuracy")(context, models)


def test_corruptions_are_told_from_attacks_outliers_and_other_views(make_part):
    views = (
        "jpeg-3",
        "pgd-4",
        "gaussian_noise-5",
        "ood-3",
        "ood-noise",
        "train",
        "pgd_transfer-2",
        "square-8",
        "jpeg-1",
    )
    part = make_part(views)
    assert corruptions(part) == ["jpeg-3", "gaussian_noise-5", "jpeg-1"]
    assert list(corrupted(part)) == ["", "/jpeg-3", "/gaussian_noise-5", "/jpeg-1"]
    with pytest.raises(Undefined, match="no corrupted view"):
        corrupted(make_part(("pgd-4", "ood-noise")))


def test_corrupted_accuracy_counts_the_labelled_cases_of_the_parts_patients(make_part):
    part = make_part(("jpeg-3", "blur-2"))
    found = corrupted(part)
    of_views = []
    for name in ("jpeg-3", "blur-2"):
        shown = part.views[name]
        np.testing.assert_allclose(found[f"/{name}"].values, shares(part, shown, np.flatnonzero(part.labels >= 0)))
        of_views.append([shares(part, shown, rows_of(part, draw)) for draw in range(50)])
        np.testing.assert_allclose(found[f"/{name}"].draws, of_views[-1], atol=1e-6)  # sums in float32
    np.testing.assert_allclose(found[""].values, (found["/jpeg-3"].values + found["/blur-2"].values) / 2)
    np.testing.assert_allclose(found[""].draws, np.mean(of_views, axis=0), atol=1e-6)
    base = (part.views["jpeg-3"].base.argmax(axis=1) == part.labels)[part.labels >= 0].mean()
    assert corrupted(part, BASE)["/jpeg-3"].values == pytest.approx([base])


def test_relative_accuracy_is_the_ratio_on_the_same_cases(make_part):
    part = make_part()
    found = relative_accuracy(part, MEMBERS, "jpeg-3")
    everybody = np.flatnonzero(part.labels >= 0)
    wanted = shares(part, part.views["jpeg-3"], everybody) / shares(part, part, everybody)
    np.testing.assert_allclose(found.values, wanted)
    for draw in range(50):
        rows = rows_of(part, draw)
        wanted = shares(part, part.views["jpeg-3"], rows) / shares(part, part, rows)
        np.testing.assert_allclose(found.draws[draw], wanted, atol=1e-5)
    part.views["same"] = part
    assert (relative_accuracy(part, MEMBERS, "same").values == 1).all()


def test_a_ratio_to_no_clean_accuracy_is_undefined(make_part):
    part = make_part()
    never = np.where(part.labels == 0, 1.0, 0.0)
    part.probabilities[1] = np.stack([1 - never, never], axis=1)
    found = relative_accuracy(part, MEMBERS, "jpeg-3")
    assert np.isnan(found.values).tolist() == [False, True, False, False]
    assert np.isnan(found.draws[:, 1]).all()


def test_of_normal_performances_the_ratio_and_the_correlation_are_known():
    """Spearman's correlation of a bivariate normal is `6/pi asin(rho/2)`.

    20,000 members: standard errors are under .008 (correlation) and 4 sqrt(4 (1 - rho^2) / 20,000) = .045 (ratio).
    """
    rho, rng = 0.6, np.random.default_rng(0)
    clean, other = rng.normal(size=(2, 20_000))
    stressed = 2 * (rho * clean + math.sqrt(1 - rho**2) * other)
    nothing = np.empty((0, 20_000))
    pair = PerMember(0.8 + 0.01 * clean, nothing), PerMember(0.5 + 0.01 * stressed, nothing)
    assert rank_correlation(*pair, 100).value == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.03)
    assert variance_ratio(*pair, 100).value == pytest.approx(4, abs=0.18)


def test_both_equal_scipy_and_numpy_on_the_sample_and_on_resampled_patients(make_part):
    part = make_part(members=30)
    clean, stressed = (accuracy_on(part, MEMBERS, view) for view in ("", "jpeg-3"))
    assert len(np.unique(clean.values)) < 30  # ties
    correlation, ratio = rank_correlation(clean, stressed, 30), variance_ratio(clean, stressed, 30)
    assert (correlation.n, ratio.n) == (30, 30)
    for draw in (None, *range(50)):
        rows = np.flatnonzero(part.labels >= 0) if draw is None else rows_of(part, draw)
        pair = shares(part, part, rows), shares(part, part.views["jpeg-3"], rows)
        found = (correlation.value, ratio.value)
        if draw is not None:
            found = (correlation.draws[draw], ratio.draws[draw])
        assert found[0] == pytest.approx(spearmanr(*pair).statistic, abs=1e-9)
        assert found[1] == pytest.approx(pair[1].var() / pair[0].var(), rel=1e-5)  # draws are sums in float32
    ends = correlation.interval()
    assert ends.low < correlation.value < ends.high and ends.low > 0  # skill shows on both


def test_exact_cases():
    values, nothing = np.arange(20) / 20, np.empty((0, 20))
    up, down, wide = (PerMember(v, nothing) for v in (values, -values, 3 * values))
    assert rank_correlation(up, wide, 1).value == pytest.approx(1)
    assert rank_correlation(up, down, 1).value == pytest.approx(-1)
    assert variance_ratio(up, wide, 1).value == pytest.approx(9)
    assert variance_ratio(up, PerMember(np.full(20, 0.1), nothing), 1).value == 0


def test_draws_that_tell_nobody_apart_are_undefined():
    values = np.arange(20) / 20
    draws = np.stack([values, np.full(20, 0.3)])
    pair = PerMember(values, draws), PerMember(values, draws[::-1])
    assert np.isnan(rank_correlation(*pair, 1).draws).all()
    assert np.isnan(variance_ratio(*pair, 1).draws).tolist() == [False, True]


@pytest.mark.parametrize("measure", [variance_ratio, rank_correlation])
def test_too_few_or_equal_or_undefined_members_have_no_value(measure):
    def of(values, draws=0) -> PerMember:
        return PerMember(np.asarray(values, np.float64), np.empty((draws, len(values))))

    different = np.arange(20) / 20
    with pytest.raises(Undefined, match="19 of 20 members"):
        measure(of(different[1:]), of(different[1:]), 1)
    with pytest.raises(Undefined, match="all members have the same clean performance"):
        measure(of(np.full(20, 0.7)), of(different), 1)
    with pytest.raises(Undefined, match="1 of 20 members have no value"):
        measure(of(different), of([math.nan, *different[1:]]), 1)
    with pytest.raises(ValueError, match="draws"):
        measure(of(different), of(different, 3), 1)
    if measure is rank_correlation:
        with pytest.raises(Undefined, match="same stressed performance"):
            measure(of(different), of(np.full(20, 0.7)), 1)
