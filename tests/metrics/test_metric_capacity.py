"""Capacity against Blahut-Arimoto, a general solver, its closed forms and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.capacity import binary_capacity, capacity
from multiplicity_bench.metrics.context import softmax
from multiplicity_bench.metrics.information import divergences
from multiplicity_bench.metrics.scores import mutual_information
from scipy.optimize import minimize
from scipy.special import rel_entr


def blahut_arimoto(rows: np.ndarray, steps: int = 20000) -> float:
    p = np.full(len(rows), 1 / len(rows))
    for _ in range(steps):
        kl = rel_entr(rows, p @ rows).sum(axis=1)
        p = p * np.exp(kl)
        p /= p.sum()
    return float(p @ rel_entr(rows, p @ rows).sum(axis=1) / np.log(2))


def spread(members, samples, classes, scale=2.0, noise=0.7, seed=0):
    rng = np.random.default_rng(seed)
    centre = scale * rng.normal(size=(1, samples, classes))
    return softmax(centre + noise * rng.normal(size=(members, samples, classes)))


@pytest.mark.parametrize(("members", "classes"), [(2, 3), (4, 3), (6, 7), (25, 4), (60, 9)])
def test_agrees_with_blahut_arimoto(members, classes):
    p = spread(members, 6, classes)
    truth = [blahut_arimoto(p[:, i]) for i in range(6)]
    np.testing.assert_allclose(capacity(p), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("noise", [0.5, 0.025])
def test_agrees_with_a_general_solver_on_the_dual(noise):
    """Narrow sets too: noise 0.025 of the logits is a score sd of about 0.005."""
    p = spread(8, 5, 3, noise=noise, seed=1)
    for i, bits in enumerate(capacity(p)):
        rows = p[:, i]

        def slack(z, rows=rows):
            return z[3] - rel_entr(rows, np.maximum(z[:3], 1e-12)).sum(axis=1)

        start = np.append(rows.mean(axis=0), 2.0)
        ends = [(1e-9, 1)] * 3 + [(0, None)]
        rules = [{"type": "ineq", "fun": slack}, {"type": "eq", "fun": lambda z: z[:3].sum() - 1}]
        found = minimize(lambda z: z[3], start, bounds=ends, constraints=rules, options={"ftol": 1e-12, "maxiter": 500})
        assert bits == pytest.approx(found.fun / np.log(2), rel=1e-3)


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.1, 1.0, 8.0])
@pytest.mark.parametrize(("members", "classes"), [(5, 3), (5, 9), (30, 3), (30, 9)])
def test_is_certified_from_nearly_equal_to_nearly_one_hot_rows(members, classes, noise):
    p = spread(members, 60, classes, scale=max(1.0, 4 * noise), noise=noise, seed=2)
    bits = capacity(p)  # raises where the bounds do not meet
    assert (bits >= mutual_information(p) - 1e-6).all()
    assert (bits <= np.log2(min(members, classes)) + 1e-6).all()


def test_narrow_sets_follow_the_quadratic_form():
    """For rows q +- d the capacity tends to sum_c d_c^2 / (2 ln2 q_c): where rules on iteration counts give 15-30 %."""
    q, d = np.array([0.5, 0.3, 0.2]), 2e-3 * np.array([1.0, -0.4, -0.6])
    bits = capacity(np.stack([q - d, q + d])[:, None])[0]
    assert bits == pytest.approx((d**2 / q).sum() / (2 * np.log(2)), rel=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_invariants(classes):
    p = spread(6, 40, classes, seed=3)
    bits = capacity(p)
    tight = {"rtol": 1e-5, "atol": 1e-8}
    np.testing.assert_allclose(capacity(np.concatenate([p, p, p[:2]])), bits, **tight)
    np.testing.assert_allclose(capacity(p[::-1, ::-1])[::-1], bits, **tight)
    np.testing.assert_allclose(capacity(p[..., ::-1]), bits, **tight)
    mixed = np.einsum("nm,msc->nsc", np.random.default_rng(0).dirichlet(np.ones(6), size=4), p)
    np.testing.assert_allclose(capacity(np.concatenate([p, mixed])), bits, **tight)
    assert (capacity(p) >= capacity(p[:-1]) * (1 - 1e-5)).all()
    assert (bits <= np.log2(min(6, classes)) + 1e-9).all()
    assert (bits >= mutual_information(p) * (1 - 1e-6)).all()
    np.testing.assert_array_equal(capacity(p[:1]), 0)


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_equal_members_give_exactly_zero(classes):
    p = np.repeat(spread(1, 333, classes), 9, axis=0)
    np.testing.assert_array_equal(capacity(p), 0)
    np.testing.assert_array_equal(mutual_information(p), 0)


def test_classes_that_nobody_gives_any_probability_do_not_count():
    p = spread(5, 30, 3, seed=4)
    padded = np.concatenate([p, np.zeros((5, 30, 2))], axis=-1)
    np.testing.assert_allclose(capacity(padded), capacity(p), rtol=1e-6)


def test_two_classes_equal_the_general_solver():
    p = spread(7, 200, 2, scale=4, seed=5)
    padded = np.concatenate([p, np.zeros((7, 200, 1))], axis=-1)
    np.testing.assert_allclose(capacity(p), capacity(padded), rtol=2e-3, atol=1e-9)


def test_two_classes_depend_on_the_ends_alone_and_cross_the_cut_smoothly():
    p = np.array([0.3, 1e-3, 1e-6])
    cut = 0.02 * p
    below, above = (binary_capacity(p - w / 2, p + w / 2) for w in (cut * (1 - 1e-9), cut * (1 + 1e-9)))
    np.testing.assert_allclose(below, above, rtol=1e-3)
    assert binary_capacity(0.2, 0.2) == 0 and binary_capacity(0.0, 0.0) == 0 and binary_capacity(1.0, 1.0) == 0


def test_two_classes_keep_the_precision_of_confident_scores():
    logits = np.array([-40.0, -39.0])
    p = softmax(np.stack([np.zeros(2), logits], axis=-1))[:, None]
    mirrored = p[..., ::-1]
    assert capacity(p)[0] > 0
    assert capacity(p)[0] == pytest.approx(capacity(mirrored)[0], rel=1e-12)


def test_no_members_no_capacity():
    with pytest.raises(ValueError, match="no members"):
        capacity(np.zeros((0, 4, 3)))


def test_divergence_is_accurate_near_and_far():
    p = np.array([[1e-17, 1 - 1e-17], [0.5, 0.5], [1.0, 0.0], [0.3, 0.7]])
    q = np.array([[0.4, 0.6], [0.5, 0.5], [0.5, 0.5], [0.3 + 1e-6, 0.7 - 1e-6]])
    found = divergences(p, q)
    np.testing.assert_allclose(found[:3], rel_entr(p, q).sum(axis=1)[:3], rtol=1e-12)
    assert found[1] == 0
    assert found[3] == pytest.approx(1e-12 / (2 * 0.3 * 0.7), rel=1e-4)
    assert divergences(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == np.inf
