"""Agreement of explanation maps against scipy, scikit-image and loops over pairs; the property against resampling."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.metrics import context as context_module
from multiplicity_bench.metrics.api import METRICS, NonFinite, Undefined
from multiplicity_bench.metrics.context import BASE, MEMBERS, Evidence
from multiplicity_bench.metrics.explanations import (
    MEASURES,
    Comparators,
    PairwiseAgreement,
    agreement,
    comparators,
    evidence_name,
    explanation_summary,
    pairwise_agreement,
)
from multiplicity_bench.metrics.intervals import Estimate, PatientBootstrap
from multiplicity_bench.metrics.selection import select
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

NAME = evidence_name("gradient", "spearman")


def make_maps(*shape: int, seed: int = 0, ties: bool = True) -> np.ndarray:
    """Maps of 9 x 13 pixels, rounded so that many pixels tie."""
    maps = np.random.default_rng(seed).exponential(size=(*shape, 9, 13))
    return (np.round(maps, 1) if ties else maps).astype(np.float32)


def by_hand(a: np.ndarray, b: np.ndarray, measure: str) -> float:
    """The agreement of two maps by an independent library, or by sorting pixels one by one."""
    if a.min() == a.max() or b.min() == b.max():
        return np.nan
    if measure == "spearman":
        return spearmanr(a.ravel(), b.ravel()).statistic
    if measure == "top10":
        strongest = [sorted(range(a.size), key=lambda i: (-m.flat[i], i))[: round(a.size / 10)] for m in (a, b)]
        return len(set(strongest[0]) & set(strongest[1])) / round(a.size / 10)
    a, b = ((m - m.min()) / (m.max() - m.min()) for m in (a.astype(np.float64), b.astype(np.float64)))
    return structural_similarity(a, b, data_range=1.0)


@pytest.mark.parametrize("measure", MEASURES)
def test_agreement_is_that_of_an_independent_library_for_every_pair(measure):
    a, b = make_maps(2, 4), make_maps(2, 4, seed=1)
    b[1] = 0.6 * a[1] + 0.4 * b[1]
    expected = [[by_hand(a[i, j], b[i, j], measure) for j in range(4)] for i in range(2)]
    np.testing.assert_allclose(agreement(a, b, measure), expected, atol=1e-10)  # float64 throughout
    np.testing.assert_allclose(agreement(a[:1], b, measure)[0], expected[0], atol=1e-10)
    assert agreement(a[0, 0], b[0, 0], measure).shape == ()


def test_strongest_pixels_tie_in_the_order_of_the_pixels():
    a, b = np.zeros((2, 4, 5))
    a[0, 0], b[0, 0] = 1, 1
    b[3, 4] = 1  # of 20 pixels 2 count: the second of `a`, whose others tie, is the next in order
    assert agreement(a, b, "top10") == pytest.approx(0.5)
    b[3, 4], b[0, 1] = 0, 1
    assert agreement(a, b, "top10") == pytest.approx(1.0)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_map_agrees_fully_with_itself_on_any_scale(measure):
    a = make_maps(3)
    np.testing.assert_allclose(agreement(a, 1e-6 * a.astype(np.float64) - 3, measure), 1.0, atol=1e-7)
    if measure != "ssim":
        np.testing.assert_allclose(agreement(a, np.exp(a), measure), 1.0, atol=1e-12)


def test_independent_maps_agree_at_chance():
    a, b = (make_maps(400, seed=s, ties=False) for s in (3, 4))
    # sd of the mean over 400 pairs of 117 pixels: 1/sqrt(116 * 400) = .0046; of the overlap .3/sqrt(12 * 400) = .0043
    assert agreement(a, b, "spearman").mean() == pytest.approx(0.0, abs=0.019)
    assert agreement(a, b, "top10").mean() == pytest.approx(12 / 117, abs=0.018)


@pytest.mark.parametrize("measure", MEASURES)
def test_all_pairs_at_once_equal_a_loop_over_pairs(measure, monkeypatch):
    rng = np.random.default_rng(5)
    maps, base = make_maps(4, 7), make_maps(7, seed=6)
    decisions, of_base = rng.integers(2, size=(4, 7)), rng.integers(2, size=7)
    decisions[:, 0], of_base[0] = [0, 0, 0, 1], 1  # a member alone with its decision, but for the base
    decisions[:, 1] = 0
    maps[2, 1], maps[3, 3], base[4] = 0.25, 0.0, 1.0
    monkeypatch.setattr(context_module, "_BLOCK", 3 * maps[:, :1].size)
    found = pairwise_agreement(maps, decisions, base, of_base, measure)

    def mean(values):
        values = [v for v in values if not np.isnan(v)]
        return np.mean(values) if values else np.nan

    for i in range(7):
        pairs = 0
        for m in range(4):
            others = [n for n in range(4) if n != m and decisions[n, i] == decisions[m, i]]
            values = [by_hand(maps[m, i], maps[n, i], measure) for n in others]
            pairs += sum(not np.isnan(v) for v, n in zip(values, others) if n > m)
            assert found.members[m, i] == pytest.approx(mean(values), abs=1e-10, nan_ok=True)
        alike = [n for n in range(4) if decisions[n, i] == of_base[i]]
        expected = mean([by_hand(base[i], maps[n, i], measure) for n in alike])
        assert found.base[i] == pytest.approx(expected, abs=1e-10, nan_ok=True)
        assert found.pairs[i] == pairs
    assert found.constant.tolist() == [0, 1, 0, 1, 1, 0, 0]
    assert np.isnan(found.members[3, 0]) and np.isnan(found.members[2, 1]) and found.pairs[1] == 3


@pytest.mark.parametrize("measure", MEASURES)
def test_a_constant_map_has_no_agreement(measure):
    a, b = make_maps(3), make_maps(3, seed=1)
    a[1], b[2] = 0.0, 2.5
    assert np.isnan(agreement(a, b, measure)).tolist() == [False, True, True]


@pytest.mark.parametrize("measure", MEASURES)
def test_one_member_has_nobody_to_agree_with_but_the_base_has(measure):
    maps, base, decided = make_maps(1, 5), make_maps(5, seed=1), np.zeros((1, 5), np.int64)
    found = pairwise_agreement(maps, decided, base, decided[0], measure)
    assert np.isnan(found.members).all() and not found.pairs.any()
    np.testing.assert_allclose(found.base, agreement(base, maps[0], measure), atol=1e-12)


def test_the_null_is_the_mean_over_networks_with_maps_that_vary():
    base, random, noised = make_maps(4), make_maps(5, 4, seed=1), make_maps(4, seed=2)
    random[3, 0], random[:, 2] = 0.0, 0.0
    found = comparators(base, random, noised, "spearman")
    each = np.array([[spearmanr(base[i].ravel(), random[m, i].ravel()).statistic for i in (0, 1, 3)] for m in range(5)
                     if m != 3] )  # fmt: skip
    assert found.null[0] == pytest.approx(each[:, 0].mean(), abs=1e-12) and np.isnan(found.null[2])
    np.testing.assert_allclose(found.ceiling, agreement(base, noised, "spearman"))


def test_mistakes_are_named():
    maps, decided = make_maps(2, 3), np.zeros((2, 3), np.int64)
    with pytest.raises(UserError, match=r"^measure=spearmann is not a choice: did you mean 'spearman'\?$"):
        agreement(maps, maps, "spearmann")
    with pytest.raises(Undefined, match=r"^structural similarity needs maps of 7 x 7 pixels, these have 6 x 13$"):
        agreement(maps[..., :6, :], maps[..., :6, :], "ssim")
    maps[1, 2, 4, 5] = np.nan
    with pytest.raises(NonFinite, match=r"^member 1's maps are not finite: first at \(2, 4, 5\)"):
        pairwise_agreement(maps, decided, maps[0], decided[0], "top10")


@pytest.fixture
def explained(make_context):
    """Return a context of 60 samples of 20 patients, 3 members, with agreement that is undefined for some cases."""
    rng = np.random.default_rng(8)
    members, base = rng.uniform(size=(3, 60)), rng.uniform(size=60)
    members[1, rng.random(60) < 0.3], base[:7] = np.nan, np.nan
    evidence = {NAME: Evidence(members, base), evidence_name("grad_cam", "ssim"): Evidence(members + 1, base - 1)}
    p = np.full((3, 60, 2), 0.5)
    return make_context(p, p[0], None, np.repeat(np.arange(20), 3), 40, evidence=evidence)


def test_the_property_is_the_mean_over_the_defined_cases_of_resampled_patients(explained):
    metric = METRICS.get("saliency_agreement")
    found = metric(explained, MEMBERS)
    assert set(found) == {"/gradient:spearman", "/grad_cam:ssim"}
    own, of_base = found["/gradient:spearman"], metric(explained, BASE)["/gradient:spearman"]
    members, base = explained.evidence[NAME].members, explained.evidence[NAME].base
    np.testing.assert_allclose(own.values, np.nanmean(members, axis=1), atol=1e-12)
    assert of_base.values == pytest.approx(np.nanmean(base), abs=1e-12)
    assert own.draws.shape == (40, 3) and of_base.draws.shape == (40, 1)
    for draw, counts in enumerate(explained.bootstrap.counts):
        rows = np.repeat(np.arange(60), counts[explained.bootstrap.index])
        np.testing.assert_allclose(own.draws[draw], np.nanmean(members[:, rows], axis=1), atol=1e-12)
        assert of_base.draws[draw, 0] == pytest.approx(np.nanmean(base[rows]), abs=1e-12)
    np.testing.assert_allclose(found["/grad_cam:ssim"].values, own.values + 1, atol=1e-12)


def test_without_explanations_the_property_says_so(explained):
    metric = METRICS.get("saliency_agreement")
    explained.evidence[NAME].members[2] = np.nan
    reason = metric(explained, MEMBERS)["/gradient:spearman"]
    assert isinstance(reason, Undefined) and "no case" in str(reason)
    explained.evidence = {"features": explained.evidence[NAME]}
    with pytest.raises(Undefined, match=r"^no explanations$"):
        metric(explained, MEMBERS)


def test_a_user_can_choose_the_member_that_agrees_best(make_context):
    rng = np.random.default_rng(9)
    p = rng.dirichlet((2, 2), size=(4, 50))
    level = np.array([0.2, 0.8, 0.4, 0.6])[:, None]
    views = [
        make_context(p, p[0], rng.integers(2, size=50), None, 30, evidence={
            NAME: Evidence(level + 0.1 * rng.normal(size=(4, 50)), np.full(50, 0.5))})
        for _ in range(2)
    ]  # fmt: skip
    chosen = select([views[0]], [views[1]], 2, 0.05, names=["saliency_agreement"])[
        "saliency_agreement/gradient:spearman"
    ]
    assert chosen.chosen == 1 and chosen.gain.value == pytest.approx(0.3, abs=0.06)  # 4 sd of a mean: .1/sqrt(50)


def test_the_summary_places_the_set_between_null_and_ceiling_on_the_same_cases():
    rng = np.random.default_rng(10)
    null, ceiling = rng.uniform(0.0, 0.2, 80), rng.uniform(0.8, 1.0, 80)
    members = null + 0.25 * (ceiling - null) + np.array([-0.01, 0.0, 0.01])[:, None]
    null[0], ceiling[1], members[:, 2] = np.nan, np.nan, np.nan
    members[0, 3], members[2, 3] = np.nan, np.nan
    counts = np.full(80, 3)
    found = PairwiseAgreement(members, np.zeros(80), counts, counts * 0 + 1)
    bootstrap = PatientBootstrap(80, None, 200, 0)
    summary = explanation_summary(found.members, Comparators(null, ceiling), bootstrap)
    assert (summary.cases, summary.left_out) == (77, 3)
    assert summary.null.value == pytest.approx(null[3:].mean()) and summary.ceiling.n == 77
    assert summary.agreement.value == pytest.approx(members[1, 3:].mean())
    # every case is a quarter of the way, and so is every draw
    assert isinstance(summary.share, Estimate)
    share, own = summary.share.interval(), summary.agreement.interval()
    assert [summary.share.value, share.low, share.high] == pytest.approx([0.25] * 3, abs=1e-12)
    assert own.low < summary.agreement.value < own.high


def test_a_ceiling_that_is_not_above_the_null_leaves_no_share():
    one = np.ones(10)
    found = PairwiseAgreement(np.full((2, 10), 0.5), one, np.ones(10, np.int64), np.zeros(10, np.int64))
    summary = explanation_summary(found.members, Comparators(0.4 * one, 0.4 * one), PatientBootstrap(10, None, 20, 0))
    assert isinstance(summary.share, Undefined) and str(summary.share) == "the ceiling is not above the null"
    assert summary.agreement.value == pytest.approx(0.5)
    with pytest.raises(Undefined, match="no case that two members decide alike"):
        explanation_summary(found.members, Comparators(np.nan * one, one), PatientBootstrap(10, None, 20, 0))
