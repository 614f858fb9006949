"""Intervals: coverage, clustering by patient, and agreement with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.intervals import (
    CaseMean,
    Estimate,
    PatientBootstrap,
    average,
    clopper_pearson,
    holm,
    t_interval,
    wilson,
)
from scipy import stats


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 7), (7, 7), (15, 20), (1, 1)])
def test_binomial_intervals_equal_scipy(successes, trials):
    test = stats.binomtest(successes, trials)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        truth, found = test.proportion_ci(method=method), ours(successes, trials)
        assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=1e-9)


def test_no_trials_no_interval():
    for call in (wilson, clopper_pearson):
        with pytest.raises(ValueError, match="0 trials"):
            call(0, 0)


def test_t_interval_equals_scipy_and_needs_two_seeds():
    x = np.array([0.31, 0.35, 0.30, 0.42, 0.36])
    truth = stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
    found = t_interval(x)
    assert (found.low, found.high) == pytest.approx(truth, abs=1e-12)
    for bad in ([0.3], [], [0.1, np.nan]):
        with pytest.raises(ValueError, match="two finite values"):
            t_interval(bad)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, np.nan, 0.02]), [0.5, np.nan, 0.04])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])
    assert holm([]).shape == (0,)


def test_counts_are_seeded_and_every_draw_has_as_many_patients():
    patient = np.repeat(np.arange(30), 4)
    one, two = (PatientBootstrap(120, patient, 50, 3) for _ in range(2))
    np.testing.assert_array_equal(one.counts, two.counts)
    assert (one.counts.sum(axis=1) == 30).all()
    assert (PatientBootstrap(120, patient, 50, 4).counts != one.counts).any()


def test_samples_of_one_patient_stay_together():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 10)
    values = rng.normal(size=60)[patient] + 0.1 * rng.normal(size=600)
    clustered = PatientBootstrap(600, patient, 1000, 0).mean(values)
    naive = PatientBootstrap(600, None, 1000, 0).mean(values)
    assert clustered.value == pytest.approx(naive.value) == pytest.approx(values.mean())
    assert clustered.n == 60 and naive.n == 600
    ratio = clustered.draws.std() / naive.draws.std()
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)


def test_draws_equal_explicit_resampling_with_patients_of_unequal_size():
    rng = np.random.default_rng(1)
    patient, values, weight = rng.integers(9, size=50), rng.normal(size=50), rng.random(50) < 0.7
    b = PatientBootstrap(50, patient, 20, 0)
    found = b.mean(np.where(weight, values, np.nan), weight)
    codes = np.unique(patient)
    for draw in range(20):
        rows = np.concatenate([np.flatnonzero(patient == c) for c, n in zip(codes, b.counts[draw]) for _ in range(n)])
        rows = rows[weight[rows]]
        assert found.draws[draw] == pytest.approx(values[rows].mean(), abs=1e-12)


def test_constant_values_have_no_interval_width():
    found = PatientBootstrap(97, None, 100, 0).mean(np.ones(97))
    assert found.value == 1.0 and (found.draws == 1.0).all()


def test_coverage_of_the_patient_bootstrap():
    """400 studies of 80 patients with 3 samples each: 95 % nominal, within 4 standard errors of simulation."""
    rng = np.random.default_rng(2)
    patient = np.repeat(np.arange(80), 3)
    hits = 0
    b = PatientBootstrap(240, patient, 400, 0)
    studies = [CaseMean(rng.normal(size=80)[patient] + rng.normal(size=240)) for _ in range(400)]
    for estimate in b.means(studies):
        assert isinstance(estimate, Estimate)
        ends = estimate.interval()
        hits += ends.low <= 0 <= ends.high
    assert hits / 400 == pytest.approx(0.94, abs=0.045)


def test_an_interval_needs_most_draws_to_be_defined():
    draws = np.linspace(0, 1, 100)
    draws[:4] = np.nan
    assert np.isfinite(Estimate(0.5, draws, 10).interval().low)
    draws[:6] = np.nan
    assert np.isnan(Estimate(0.5, draws, 10).interval().low)
    assert np.isnan(Estimate(0.5, np.empty(0), 10).interval().low)


def test_averages_keep_the_pairing_of_draws():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 50))
    found = average([Estimate(1.0, a, 3), Estimate(2.0, b, 5)])
    assert found.value == 1.5 and found.n == 5
    np.testing.assert_allclose(found.draws, (a + b) / 2)
