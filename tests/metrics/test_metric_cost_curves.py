"""Cost of a set of k, multiplicity at every k, break-even and Pareto front, each against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.cost_curves import SetCost, break_even, multiplicity_curves, pareto_front
from multiplicity_bench.metrics.decisions import ambiguous, discrepancy
from multiplicity_bench.metrics.scores import score_range

NAN = float("nan")


@pytest.mark.parametrize("classes", [2, 3])
def test_every_curve_is_the_mean_over_all_subsets(make_context, classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(-1, classes, size=25)
    context = make_context(
        rng.dirichlet(np.ones(classes), size=(6, 25)), base=rng.dirichlet(np.ones(classes), size=25), labels=labels
    )
    curves = multiplicity_curves(context)
    known = labels >= 0 if classes > 2 else np.ones(25, bool)
    true = np.maximum(labels, 0) if classes > 2 else np.ones(25, int)
    scores = context.probabilities[:, np.arange(25), true][:, known]
    flips = context.decisions != context.base_decisions
    pairs = np.mean([(context.decisions[a] != context.decisions[b]).mean() for a, b in combinations(range(6), 2)])
    assert all(len(curve) == 6 for curve in curves.values())
    for k in range(1, 7):
        chosen = [list(c) for c in combinations(range(6), k)]
        truth = {
            "ambiguity": np.mean([flips[c].any(axis=0).mean() for c in chosen]),
            "discrepancy": np.mean([flips[c].mean(axis=1).max() for c in chosen]),
            "vpr": np.mean([np.ptp(scores[c], axis=0).mean() for c in chosen]),
            "disagreement": pairs if k > 1 else NAN,
        }
        for name, value in truth.items():
            assert curves[name][k - 1] == pytest.approx(value, abs=1e-12, nan_ok=True), (name, k)


def test_curves_pass_through_the_values_at_k_and_at_all(make_context):
    rng = np.random.default_rng(5)
    context = make_context(rng.dirichlet(np.ones(4), size=(60, 80)), labels=rng.integers(4, size=80))
    curves = multiplicity_curves(context)
    for k in (1, 5, 37, 60):
        assert curves["ambiguity"][k - 1] == pytest.approx(ambiguous(context.flip_counts, 60, k).mean(), abs=1e-12)
        assert curves["discrepancy"][k - 1] == pytest.approx(discrepancy(context.flips, k), abs=1e-12)
        assert curves["vpr"][k - 1] == pytest.approx(score_range(context.scores, k).mean(), abs=1e-12)
    for name in ("ambiguity", "discrepancy", "vpr"):
        assert (np.diff(curves[name]) > -1e-12).all(), name


def test_copies_of_the_base_stay_exactly_at_zero(make_context):
    base = np.random.default_rng(0).dirichlet(np.ones(3), size=50)
    curves = multiplicity_curves(make_context(np.repeat(base[None], 12, axis=0), base=base))
    for name, curve in curves.items():
        assert (curve[1:] == 0).all(), name
    assert np.isnan(curves["disagreement"][0])


def test_curves_without_members_or_labels_are_undefined(make_context):
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 6))
    with pytest.raises(Undefined, match="no member was accepted"):
        multiplicity_curves(make_context(p[:0], base=p[0]))
    unlabelled = multiplicity_curves(make_context(p, labels=np.full(6, -1)))
    assert np.isnan(unlabelled["vpr"]).all() and np.isfinite(unlabelled["ambiguity"]).all()


def test_a_set_costs_its_fit_and_the_draws_that_its_members_take():
    cost = SetCost(fixed=2.0, marginal=0.1, acceptance=0.25)
    np.testing.assert_allclose(cost.total(np.array([1, 5, 20])), [2.4, 4.0, 10.0])
    np.testing.assert_allclose(cost.total(np.array([1, 5]), with_base=True), [3.4, 5.0])
    assert cost.total(5) == 4.0
    with pytest.raises(ValueError, match="at least one member"):
        cost.total(np.array([3, 0]))


@pytest.mark.parametrize("unknown", [(None, 1, 1), (1, None, 1), (1, 1, None), (NAN, 1, 1), (1, 1, 0), (1, 1, NAN)])
def test_a_cost_that_was_not_measured_is_nan_and_has_no_break_even(unknown):
    cost, known = SetCost(*unknown), SetCost(0, 1, 0.5)
    assert np.isnan(cost.total(np.arange(1, 4))).all()
    with pytest.raises(Undefined, match="the cost of the generator"):
        break_even(cost, known)
    with pytest.raises(Undefined, match="the cost of retraining"):
        break_even(known, cost)
    with pytest.raises(Undefined, match="the cost of retraining"):
        break_even(cost, cost)


def test_break_even_is_the_first_k_that_is_cheaper():
    rng = np.random.default_rng(9)
    k = np.arange(1, 2001)
    kinds = []
    for _ in range(400):
        generator = SetCost(rng.choice([0, 0.5, 2, 30]) * rng.random(), rng.random() ** 3, rng.uniform(0.05, 1))
        retrain = SetCost(0.1 * rng.random(), rng.uniform(0.5, 1), rng.uniform(0.2, 1))
        for with_base in (False, True):
            cheaper = np.flatnonzero(generator.total(k, with_base) < retrain.total(k))
            found = break_even(generator, retrain, with_base)
            if found is None or found <= k[-1]:
                assert found == (k[cheaper[0]] if len(cheaper) else None)
            else:
                assert not len(cheaper)
            kinds.append("never" if found is None else "at once" if found == 1 else "later")
    assert {kind: kinds.count(kind) > 20 for kind in ("never", "at once", "later")} == {
        "never": True,
        "at once": True,
        "later": True,
    }


def test_break_even_of_round_costs():
    retrain = SetCost(0, 1, 0.5)  # two trainings per accepted member
    assert break_even(SetCost(4, 0, 1), retrain) == 3  # 4 < 2 k; at 2 they cost the same
    assert break_even(SetCost(4, 0, 1), retrain, with_base=True) == 3  # 5 < 2 k
    assert break_even(SetCost(1, 0.5, 1), retrain) == 1
    assert break_even(SetCost(1, 0.5, 0.25), retrain) is None  # 1 + 2 k: always one more
    assert break_even(SetCost(0, 1, 0.5), retrain) is None  # the same cost is not less
    assert break_even(SetCost(0, 1, 0.4), SetCost(3, 1, 0.5)) == 1  # 2.5 k < 3 + 2 k, up to k = 5


def test_the_front_is_what_no_row_dominates():
    rng = np.random.default_rng(2)
    for _ in range(50):
        cost = rng.integers(1, 8, size=20).astype(float)  # whole numbers, so that there are ties
        fidelity = rng.integers(1, 8, size=20).astype(float)
        cost[rng.random(20) < 0.1] = NAN
        fidelity[rng.random(20) < 0.1] = NAN
        truth = [
            i
            for i in range(20)
            if np.isfinite(cost[i] + fidelity[i])
            and not any(
                cost[j] <= cost[i] and fidelity[j] >= fidelity[i] and (cost[j] < cost[i] or fidelity[j] > fidelity[i])
                for j in range(20)
            )
        ]
        assert pareto_front(cost, fidelity).tolist() == truth


def test_the_front_keeps_equal_rows_and_leaves_out_what_has_no_value():
    assert pareto_front([1, 1, 2, 3, None, 0], [0.5, 0.5, 0.4, 0.9, 1.0, NAN]).tolist() == [0, 1, 3]
    assert pareto_front([], []).tolist() == []
    with pytest.raises(ValueError, match="shapes"):
        pareto_front([1, 2], [1])
