"""Values at k equal brute force over all k-subsets; their invariants."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.metrics.capacity import capacity, subsets
from multiplicity_bench.metrics.decisions import (
    ambiguous,
    conflict_interval,
    disagreement,
    discrepancy,
    selective_ensemble,
    votes,
)
from multiplicity_bench.metrics.intervals import miss_probability, order_statistic_weights
from multiplicity_bench.metrics.scores import (
    delta_ambiguous,
    score_range,
    score_sd,
    score_sd_quantile,
    viable_prediction_range,
)

K = 7


@pytest.fixture(scope="module")
def flips():
    return np.random.default_rng(3).random((K, 40)) < 0.15


@pytest.mark.parametrize("k", range(1, K + 1))
def test_decisions_at_k_equal_brute_force(flips, k):
    chosen = [flips[list(c)] for c in combinations(range(K), k)]
    assert ambiguous(flips.sum(axis=0), K, k).mean() == pytest.approx(np.mean([f.any(axis=0).mean() for f in chosen]))
    assert discrepancy(flips, k) == pytest.approx(np.mean([f.mean(axis=1).max() for f in chosen]))


@pytest.mark.parametrize("k", range(1, K + 1))
def test_range_at_k_equals_brute_force(k):
    scores = np.random.default_rng(4).random((K, 30))
    found = score_range(scores, k)
    truth = np.mean([np.ptp(scores[list(c)], axis=0) for c in combinations(range(K), k)], axis=0)
    np.testing.assert_allclose(found, truth, atol=1e-12)
    if k == K:
        np.testing.assert_allclose(found, score_range(scores), atol=1e-12)


def test_all_members_are_one_subset(flips):
    counts = flips.sum(axis=0)
    np.testing.assert_allclose(ambiguous(counts, K, K), ambiguous(counts, K), atol=1e-12)
    assert discrepancy(flips, K) == pytest.approx(discrepancy(flips))


def test_order_statistic_weights_of_many_members_sum_to_one():
    for members, k in [(1, 1), (5, 5), (1000, 5), (1000, 500)]:
        assert order_statistic_weights(members, k).sum() == pytest.approx(1, rel=1e-9)
    assert miss_probability(1000, np.array([0, 996, 1000]), 5).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [0, 6])
def test_k_outside_the_set_is_refused(k):
    for call in (
        order_statistic_weights,
        lambda m, k: miss_probability(m, np.zeros(1), k),
        lambda m, k: subsets(m, k, 0),
    ):
        with pytest.raises(ValueError, match="no subsets"):
            call(5, k)


def test_discrepancy_never_exceeds_ambiguity(flips):
    for k in (None, *range(1, K + 1)):
        assert discrepancy(flips, k) <= ambiguous(flips.sum(axis=0), K, k).mean() + 1e-12


def test_disagreement_equals_the_loop_over_pairs():
    decisions = np.random.default_rng(5).integers(4, size=(6, 50))
    pairs = [(decisions[a] != decisions[b]) for a, b in combinations(range(6), 2)]
    np.testing.assert_allclose(disagreement(votes(decisions, 4)), np.mean(pairs, axis=0), atol=1e-12)


def test_one_member_has_no_disagreement():
    assert np.isnan(disagreement(np.array([[1, 0]]))).all()


def test_ranges_agree_for_two_classes_whatever_class_is_followed():
    p = np.random.default_rng(6).dirichlet(np.ones(2), size=(5, 20))
    by_class = [viable_prediction_range(p, c) for c in (0, 1)]
    np.testing.assert_allclose(by_class[0], by_class[1], atol=1e-12)


def test_delta_ambiguity_counts_members_that_move_at_least_delta():
    scores = np.array([[0.5, 0.75], [0.25, 0.5]])
    assert delta_ambiguous(scores, np.array([0.5, 0.5]), 0.25).tolist() == [True, True]
    assert delta_ambiguous(scores, np.array([0.5, 0.5]), 0.3).tolist() == [False, False]


def test_score_sd_with_both_denominators():
    scores = np.random.default_rng(7).random((6, 40))
    np.testing.assert_allclose(score_sd(scores), scores.std(axis=0), atol=1e-14)
    assert score_sd_quantile(scores) == pytest.approx(np.quantile(scores.std(axis=0, ddof=1), 0.9))
    assert np.isnan(score_sd(scores[:1], ddof=1)).all()


def test_subsets_are_seeded_distinct_members_and_complete_when_few():
    assert len(subsets(6, 3, 0)) == 20
    many = subsets(30, 5, 0)
    assert many.shape == (50, 5) and all(len(set(row)) == 5 for row in many.tolist())
    np.testing.assert_array_equal(many, subsets(30, 5, 0))
    assert (many != subsets(30, 5, 1)).any()


def test_capacity_at_k_averages_its_subsets(make_context):
    from multiplicity_bench.metrics.api import METRICS

    p = np.random.default_rng(8).dirichlet(np.ones(3), size=(5, 4))
    chosen = [capacity(p[list(c)]) for c in combinations(range(5), 3)]
    context = make_context(p)
    np.testing.assert_allclose(METRICS.get("capacity")(context, 3), np.mean(chosen, axis=0), atol=1e-12)
    effective = METRICS.get("capacity_effective")(context, 3)
    np.testing.assert_allclose(effective, np.mean(2.0 ** np.array(chosen), axis=0), atol=1e-12)


def test_selective_ensemble_abstains_until_the_vote_is_decided():
    counts = np.array([[9, 1, 0], [8, 2, 0], [5, 5, 0], [0, 0, 10]])
    found = selective_ensemble(counts, [0, 0, 0, 1], alpha=0.05)
    assert found.mode.tolist() == [0, -1, -1, 2]
    assert (found.coverage, found.accuracy) == (0.5, 0.5)
    assert found.inconsistency == pytest.approx(disagreement(counts)[[0, 3]].mean())
    nobody = selective_ensemble(counts[2:3], [0])
    assert nobody.coverage == 0 and np.isnan([nobody.accuracy, nobody.inconsistency]).all()


def test_interval_of_a_conflict_is_clopper_pearson():
    ends = conflict_interval(0, 10)
    assert ends.low == 0 and ends.high == pytest.approx(0.3085, abs=1e-4)
