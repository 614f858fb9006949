"""The exact set of logistic regression against scipy, closed forms, dense scans and its own definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.exact_set import (
    loss_rounding_error,
    recall,
    rounding_error,
    viable_ranges,
    violations,
)
from scipy.optimize import brentq, minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression


def problem(n=80, features=3, tests=12, seed=0, strength=1.0, noise=0.0):
    """Return features with a bias column, labels from a logistic model, and test features."""
    rng = np.random.default_rng(seed)
    x = np.c_[rng.normal(size=(n + tests, features)), np.ones(n + tests)]
    d = strength * rng.normal(size=features + 1)
    y = (rng.random(n) < expit(x[:n] @ d)).astype(int) ^ (rng.random(n) < noise)
    return x[:n], y, x[n:]


def loss(x, y, d):
    """Return the mean cross-entropy in nats."""
    return np.logaddexp(0, -np.where(y == 1, 1, -1) * (x @ d)).mean()


def minimiser(x, y):
    """Return the weights of least loss by an independent way."""
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, y)
    return fitted.coef_[0]


def slope(x, y, d):
    """Return the gradient of `loss`."""
    s = np.where(y == 1, 1, -1)
    return -(expit(-s * (x @ d)) * s) @ x / len(x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epsilon", [0.002, 0.05, 0.3])
def test_ranges_are_those_of_an_independent_solver(seed, epsilon):
    x, y, test = problem(seed=seed, strength=1 + seed)
    start = minimiser(x, y)
    bound = loss(x, y, start) + epsilon
    found = viable_ranges(x, y, test, bound)
    assert found.active < 1e-8 and found.residual < 1e-7
    for i in range(4):
        for sign, end in ((1, found.low_logit[i]), (-1, found.high_logit[i])):
            solved = minimize(
                lambda d, i=i, sign=sign: sign * (test[i] @ d),
                start,
                jac=lambda d, i=i, sign=sign: sign * test[i],
                constraints={"type": "ineq", "fun": lambda d: bound - loss(x, y, d), "jac": lambda d: -slope(x, y, d)},
                method="SLSQP",
                options={"ftol": 1e-13, "maxiter": 500},
            )
            # SLSQP meets the constraint to about 1e-10, which moves an end by that times its multiplier (< 100)
            assert end == pytest.approx(test[i] @ solved.x, abs=1e-6)


def test_with_a_bias_alone_the_ends_are_the_roots_of_the_binary_entropy():
    y = np.array([1] * 7 + [0] * 13)
    bound = -(0.35 * np.log(0.35) + 0.65 * np.log(0.65)) + 0.05
    excess = lambda p: -(0.35 * np.log(p) + 0.65 * np.log1p(-p)) - bound  # noqa: E731
    found = viable_ranges(np.ones((20, 1)), y, np.ones((2, 1)), bound)
    np.testing.assert_allclose(found.low, brentq(excess, 1e-6, 0.35, xtol=1e-14), rtol=1e-9)
    np.testing.assert_allclose(found.high, brentq(excess, 0.35, 1 - 1e-6, xtol=1e-14), rtol=1e-9)


def test_in_two_dimensions_a_scan_of_all_angles_finds_no_more_and_nearly_as_much():
    x, y, test = problem(features=1, strength=3)
    centre = minimiser(x, y)
    bound = loss(x, y, centre) + 0.1
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ends = [centre + r * brentq(lambda t, r=r: loss(x, y, centre + t * r) - bound, 0, 1e3, xtol=1e-13) for r in rays]
    scores = np.array(ends) @ test.T
    found = viable_ranges(x, y, test, bound)
    low, high = found.low_logit, found.high_logit
    assert (scores <= high + 1e-9).all() and (scores >= low - 1e-9).all()
    # between two rays 0.003 apart, the boundary's maximum is missed by about the square of that
    np.testing.assert_allclose(scores.max(0), high, rtol=1e-3)
    np.testing.assert_allclose(scores.min(0), low, rtol=1e-3)


def test_ranges_grow_with_epsilon_and_shrink_to_a_point_at_the_least_loss():
    x, y, test = problem()
    best = minimiser(x, y)
    least = loss(x, y, best)
    found = [viable_ranges(x, y, test, least + epsilon) for epsilon in (1e-8, 0.01, 0.05, 0.2)]
    for narrow, wide in pairwise(found):
        assert (narrow.low > wide.low).all() and (narrow.high < wide.high).all()
    # the set's radius is sqrt(2 epsilon) in the norm of the Hessian: 1e-4 times a factor of about 10
    assert found[0].width.max() < 1e-3
    exactly = viable_ranges(x, y, test, found[0].minimum)
    np.testing.assert_allclose(exactly.low, expit(test @ best), atol=1e-6)
    np.testing.assert_array_equal(exactly.low, exactly.high)


def test_small_sets_are_ellipsoids():
    """`x'd = x'd* -+ sqrt(2 epsilon x'H^-1 x)` to first order."""
    x, y, test = problem(n=200)
    best = minimiser(x, y)
    p = expit(x @ best)
    hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x)
    reach = np.sqrt(2e-6 * np.einsum("ij,jk,ik->i", test, np.linalg.inv(hessian), test))
    found = viable_ranges(x, y, test, viable_ranges(x, y, test, 1.0).minimum + 1e-6)
    np.testing.assert_allclose((found.high_logit - found.low_logit) / 2, reach, rtol=1e-4)


@pytest.mark.parametrize("features, epsilon", [(17, 0.05), (17, 1.0), (40, 0.05)])
def test_hard_sets_are_certified(features, epsilon):
    """Confident models and noisy labels: Hessians whose weights span many orders of magnitude."""
    x, y, test = problem(n=400, features=features, tests=30, strength=8, noise=0.05)
    least = viable_ranges(x, y, test, 5.0).minimum
    found = viable_ranges(x, y, test, least + epsilon)
    assert found.active < 1e-8 and found.residual < 1e-7
    assert (found.low < found.high).all()


def test_a_scaled_or_repeated_feature_changes_nothing():
    x, y, test = problem()
    more = lambda a: np.c_[a * [1e3, 1e-3, 1, 1], a[:, :1] + a[:, 1:2]]  # noqa: E731
    plain, changed = viable_ranges(x, y, test, 0.7), viable_ranges(more(x), y, more(test), 0.7)
    np.testing.assert_allclose(changed.low, plain.low, rtol=1e-6)
    np.testing.assert_allclose(changed.high, plain.high, rtol=1e-6)


def test_samples_without_a_label_are_left_out():
    x, y, test = problem()
    masked = np.where(np.arange(len(y)) < 20, -1, y)
    found, without = viable_ranges(x, masked, test, 0.7), viable_ranges(x[20:], y[20:], test, 0.7)
    np.testing.assert_array_equal(found.low, without.low)


def test_sets_without_an_end_say_why():
    x, y, test = problem()
    with pytest.raises(Undefined, match=r"unbounded in direction .*feature 0.*separates the classes"):
        viable_ranges(x, (x[:, 0] > 0).astype(int), test, 0.7)
    touching = np.where(np.arange(len(x))[:, None] < 10, [0, 0, 0, 1.0], x)  # separable but for these ten
    labels = np.where(np.arange(len(x)) < 10, np.arange(len(x)) % 2, x[:, 0] > 0).astype(int)
    with pytest.raises(Undefined, match="separates the classes"):
        viable_ranges(touching * [1, 0, 0, 1], labels, touching * [1, 0, 0, 1], 0.7)
    with pytest.raises(Undefined, match=r"unbounded in direction [+-]1 feature 1: val does not span .* 12 of 12"):
        viable_ranges(x * [1, 0, 1, 1], y, test, 0.7)
    with pytest.raises(Undefined, match="no case of val has a label"):
        viable_ranges(x, np.full(len(y), -1), test, 0.7)
    with pytest.raises(Undefined, match="the set is empty: the least loss on val is"):
        viable_ranges(x, y, test, 0.01)


def test_a_case_is_ambiguous_if_its_range_holds_the_other_decision():
    x, y, test = problem(tests=40)
    best = minimiser(x, y)
    found = viable_ranges(x, y, test, loss(x, y, best) + 0.02)
    crosses = (found.low <= 0.5) & (found.high > 0.5)
    assert 0.1 < crosses.mean() < 0.9
    np.testing.assert_array_equal(found.ambiguous(test @ best > 0), crosses)
    # a tie is decided as class 0, which is another decision for class 1 alone
    tie = replace(found, low_logit=np.zeros(40), high_logit=np.zeros(40))
    assert tie.ambiguous(np.ones(40)).all() and not tie.ambiguous(np.zeros(40)).any()


def test_recall_at_k_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(3)
    scores = rng.random((7, 20))
    flips, width, truly = rng.random((7, 20)) < 0.2, rng.uniform(1, 2, 20), rng.random(20) < 0.6
    width[0] = 0  # a range of one point has no share that is covered
    subsets = [list(s) for s in combinations(range(7), 3)]
    covered = [(np.ptp(scores[s], axis=0)[1:] / width[1:]).mean() for s in subsets]
    seen = [flips[s].any(axis=0)[truly].mean() for s in subsets]
    found = recall(scores, flips, width, truly, 3)
    assert found.coverage == pytest.approx(np.mean(covered), abs=1e-12)
    assert found.ambiguous == pytest.approx(np.mean(seen), abs=1e-12)
    everyone = recall(scores, flips, width, truly)
    assert everyone.coverage == pytest.approx((np.ptp(scores, axis=0)[1:] / width[1:]).mean())
    assert everyone.ambiguous == pytest.approx(flips.any(axis=0)[truly].mean())


def test_recall_is_undefined_with_a_reason():
    scores, flips, width, truly = np.zeros((2, 4)), np.zeros((2, 4), bool), np.ones(4), np.ones(4, bool)
    for arguments, reason in (
        ((scores, flips, width, truly, 5), "2 of 5 accepted"),
        ((scores[:0], flips[:0], width, truly), "0 of 1 accepted"),
        ((scores, flips, 0 * width, truly), "one point"),
        ((scores, flips, width, ~truly), "no case is ambiguous"),
    ):
        with pytest.raises(Undefined, match=reason):
            recall(*arguments)


def test_members_of_the_set_violate_no_range_and_others_do():
    x, y, test = problem(n=60)
    centre = minimiser(x, y)
    bound = loss(x, y, centre) + 0.05
    found = viable_ranges(x, y, test, bound)
    rng = np.random.default_rng(0)
    members = centre + 0.8 * rng.normal(size=(400, 4))
    losses = np.array([loss(x, y, d) for d in members])
    inside = losses <= bound
    assert 0.05 < inside.mean() < 0.95
    nothing = np.zeros((len(members), 1))
    assert (violations(members[inside] @ test.T, found, nothing, np.zeros(inside.sum()), 1e-9) == 0).all()
    far = losses > bound + 0.5
    assert (violations(members[far] @ test.T, found, nothing, np.zeros(far.sum())) > 0).mean() > 0.5
    # a bound raised by e moves an end by at most its multiplier times e, and for small e by just that
    for excess in (1e-6, 1e-3, 0.5):
        wider = viable_ranges(x, y, test, bound + excess)
        for end, other, multiplier in (
            (found.high_logit, wider.high_logit, found.high_multiplier),
            (-found.low_logit, -wider.low_logit, found.low_multiplier),
        ):
            assert (other - end <= multiplier * excess * (1 + 1e-6) + 1e-9).all()
            if excess == 1e-3:
                np.testing.assert_allclose((other - end) / excess, multiplier, rtol=0.05)
    excess = np.maximum(losses - bound, 0)
    assert (violations(members @ test.T, found, nothing, excess, 1e-9) == 0).all()


def test_errors_of_rounding_bound_what_float16_does():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(50, 300)) * 10.0 ** rng.integers(-6, 2, size=(50, 300))
    y = rng.integers(-1, 2, size=300)
    rounded = z.astype(np.float16).astype(np.float64)
    error = np.abs(rounded - z)
    assert (error <= rounding_error(rounded) * (1 + 2**-10)).all()
    assert error.max() > 0.1 * rounding_error(rounded).max()
    known, signs = y >= 0, np.where(y == 1, 1, -1)[None]
    losses = [np.logaddexp(0, -signs * a)[:, known].mean(axis=1) for a in (z, rounded)]
    assert (np.abs(losses[0] - losses[1]) <= loss_rounding_error(rounded, y)).all()
