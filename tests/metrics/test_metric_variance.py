"""The variance decomposition recovers a three-level model whose variances are known, with honest standard errors."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from multiplicity_bench.metrics.variance import Component, decompose, jackknife_error

DATA, SEED, POSTERIOR = 0.004, 0.010, 0.006


def three_levels(rng, samples, sizes=(8, 8, 8), retrained=12, resampled=14, data=DATA):
    """Sets of scores: a case's truth, plus effects of the data, of the seed, and of the posterior draw."""
    truth = rng.uniform(0.3, 0.7, size=samples)

    def effect(variance, *shape):
        return math.sqrt(variance) * rng.normal(size=(*shape, samples))

    bases = [truth + effect(SEED) + effect(POSTERIOR, k) for k in sizes]
    return bases, truth + effect(SEED, retrained), truth + effect(data, resampled) + effect(SEED, resampled)


def test_a_three_level_model_is_recovered():
    """Cases are independent; of a normal sample's variance the variance is 2 v^2 / (n - 1), over the 4,000 cases."""
    samples = 4000
    found = decompose(*three_levels(np.random.default_rng(0), samples, sizes=(5, 10, 20)))

    def error(variance, degrees):
        return variance * math.sqrt(2 / degrees / samples)

    assert found.posterior.value == pytest.approx(POSTERIOR, abs=4 * error(POSTERIOR, 12))
    assert found.seed.value == pytest.approx(SEED, abs=4 * error(SEED, 11))
    assert found.data.value == pytest.approx(DATA, abs=4 * math.hypot(error(SEED + DATA, 13), error(SEED, 11)))
    assert found.seed_between_bases.value == pytest.approx(SEED, abs=4 * error(SEED + POSTERIOR / 5, 2))
    assert found.covered.value == pytest.approx(POSTERIOR / SEED, abs=0.02)
    total = DATA + SEED + POSTERIOR
    for name, part in (("data", DATA), ("seed", SEED), ("posterior", POSTERIOR)):
        assert found.shares[name] == pytest.approx(part / total, abs=0.02)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-12)


def test_components_are_the_variances_with_ddof_1():
    bases, retrained, resampled = three_levels(np.random.default_rng(1), 7, sizes=(3, 5, 4))
    found = decompose(bases, retrained, resampled)
    within = [b.var(axis=0, ddof=1).mean() for b in bases]
    means = np.stack([b.mean(axis=0) for b in bases])
    assert found.posterior.value == pytest.approx(np.mean(within), rel=1e-10)
    assert found.seed.value == pytest.approx(retrained.var(axis=0, ddof=1).mean(), rel=1e-10)
    between = means.var(axis=0, ddof=1).mean() - np.mean([w / len(b) for w, b in zip(within, bases)])
    assert found.seed_between_bases.value == pytest.approx(between, rel=1e-10)
    data = resampled.var(axis=0, ddof=1).mean() - retrained.var(axis=0, ddof=1).mean()
    assert found.data.value == pytest.approx(data, rel=1e-10)
    assert found.covered.value == pytest.approx(found.posterior.value / found.seed.value, rel=1e-12)


def test_the_data_component_is_unbiased_and_keeps_its_sign():
    rng = np.random.default_rng(2)
    for truth in (0.0, DATA):
        runs = [decompose(*three_levels(rng, 3, retrained=5, resampled=5, data=truth)) for _ in range(1500)]
        values = np.array([r.data.value for r in runs])
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / math.sqrt(len(runs)))
        if truth == 0.0:
            assert 0.4 < (values < 0).mean() < 0.6
            below = next(r for r in runs if r.data.value < 0)
            assert below.shares["data"] == 0 and sum(below.shares.values()) == pytest.approx(1)


def test_the_second_estimate_of_the_seed_component_is_unbiased_in_sets_of_unequal_size():
    rng = np.random.default_rng(3)
    values = [decompose(*three_levels(rng, 12, sizes=(2, 3, 9))).seed_between_bases.value for _ in range(1500)]
    tolerance = 4 * np.std(values) / math.sqrt(1500)
    assert np.mean(values) == pytest.approx(SEED, abs=tolerance)
    assert tolerance < POSTERIOR * ((1 / 2 + 1 / 3 + 1 / 9) / 3 - 3 / 14)  # correcting by the mean size would show


def test_standard_errors_equal_the_explicit_jackknife():
    bases, retrained, resampled = three_levels(np.random.default_rng(4), 6, sizes=(3, 5, 4, 6))
    found = decompose(bases, retrained, resampled)

    def left_out(sets, value):
        return np.array([value([s for i, s in enumerate(sets) if i != out]) for out in range(len(sets))])

    def variance(scores):
        return np.var(scores, axis=0, ddof=1).mean()

    def between(sets):
        noise = np.mean([variance(s) / len(s) for s in sets])
        return variance([s.mean(axis=0) for s in sets]) - noise

    errors = {c: jackknife_error(left_out(c_sets, variance)) for c, c_sets in (("seed", retrained), ("all", resampled))}
    assert found.seed.se == pytest.approx(errors["seed"], rel=1e-9)
    assert found.data.se == pytest.approx(math.hypot(*errors.values()), rel=1e-9)
    over_bases = left_out(bases, lambda sets: np.mean([variance(s) for s in sets]))
    assert found.posterior.se == pytest.approx(jackknife_error(over_bases), rel=1e-9)
    assert found.seed_between_bases.se == pytest.approx(jackknife_error(left_out(bases, between)), rel=1e-9)
    one = decompose(bases[3:], retrained, None)
    assert one.posterior.se == pytest.approx(jackknife_error(left_out(bases[3], variance)), rel=1e-9)
    relative = math.hypot(one.posterior.se / one.posterior.value, one.seed.se / one.seed.value)
    assert one.covered.se == pytest.approx(one.covered.value * relative, rel=1e-9)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(5).normal(size=9)
    left_out = np.array([np.delete(values, i).mean() for i in range(9)])
    assert jackknife_error(left_out) == pytest.approx(values.std(ddof=1) / 3, rel=1e-12)


def test_standard_errors_are_as_large_as_the_scatter_of_the_estimates():
    """Ratio of the root mean squared error to the scatter over 400 runs: itself uncertain by about 5 %."""
    rng = np.random.default_rng(6)
    runs = [decompose(*three_levels(rng, 20, sizes=(6,) * 8, retrained=20, resampled=20)) for _ in range(400)]
    for name in ("data", "seed", "posterior", "seed_between_bases", "covered"):
        parts = [getattr(r, name) for r in runs]
        told = math.sqrt(np.mean([c.se**2 for c in parts]))
        assert told / np.std([c.value for c in parts]) == pytest.approx(1, abs=0.2), name


def test_the_order_of_members_bases_and_cases_does_not_matter():
    rng = np.random.default_rng(7)
    bases, retrained, resampled = three_levels(rng, 30)
    case = rng.permutation(30)
    moved = [b[rng.permutation(len(b))][:, case] for b in bases[::-1]]
    again = decompose(moved, retrained[::-1, case], resampled[rng.permutation(len(resampled))][:, case])
    found = decompose(bases, retrained, resampled)
    for f in fields(found):
        a, b = getattr(found, f.name), getattr(again, f.name)
        if isinstance(a, Component):
            a, b = {"value": a.value, "se": a.se}, {"value": b.value, "se": b.se}
        assert b == pytest.approx(a, rel=1e-9), f.name


def test_equal_members_have_exactly_no_variance():
    rng = np.random.default_rng(8)
    scores = rng.random(50)
    found = decompose([np.tile(scores, (7, 1))] * 3, scores + 0.1 * rng.normal(size=(6, 50)), None)
    assert (found.posterior.value, found.posterior.se, found.covered.value) == (0.0, 0.0, 0.0)
    assert found.seed_between_bases.value == 0.0


def test_what_is_undefined_is_nan_with_its_reason():
    bases, retrained, resampled = three_levels(np.random.default_rng(9), 10)
    none = decompose(bases, retrained, None)
    assert math.isnan(none.data.value) and none.data.reason == "no retrainings on resampled data"
    assert set(none.shares) == {"data", "seed", "posterior"} and all(map(math.isnan, none.shares.values()))
    assert none.covered.value > 0 and not none.covered.reason
    one = decompose([bases[0][:1], bases[1]], retrained[:1], resampled)
    assert one.posterior.reason == one.seed_between_bases.reason == "1 of 2 members accepted"
    assert one.seed.reason == one.data.reason == "1 of 2 retrainings accepted"
    assert math.isnan(one.covered.value) and one.covered.reason == "1 of 2 members accepted"
    assert decompose(bases, retrained, resampled[:1]).data.reason == "1 of 2 resampled retrainings accepted"
    assert decompose(bases[:1], retrained, None).seed_between_bases.reason == "1 of 2 bases"
    assert decompose([], retrained, None).posterior.reason == "no set of a generator"
    assert decompose(bases, np.tile(retrained[0], (4, 1)), None).covered.reason == "the retrainings do not differ"
    two = decompose(bases[:2], retrained[:2], None)
    assert two.seed.value > 0 and math.isnan(two.seed.se) and math.isnan(two.seed_between_bases.se)


def test_sets_on_different_cases_are_refused():
    bases, retrained, resampled = three_levels(np.random.default_rng(10), 10)
    with pytest.raises(ValueError, match=r"scores of \[9, 10\] samples"):
        decompose(bases, retrained[:, :9], resampled)
    with pytest.raises(ValueError, match=r"scores of \[0\] samples"):
        decompose([], retrained[:, :0], None)
