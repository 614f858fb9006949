"""Every entry of the golden vectors, and the values of the literature that the definitions must reproduce."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import METRICS
from multiplicity_bench.metrics.capacity import binary_capacity, capacity
from multiplicity_bench.metrics.context import class_scores, decide
from multiplicity_bench.metrics.decisions import (
    ambiguous,
    conflict,
    disagreement,
    discrepancy,
    fewest_votes,
    kulynych,
    self_consistency,
    votes,
)
from multiplicity_bench.metrics.intervals import clopper_pearson, clopper_pearson_upper
from multiplicity_bench.metrics.performance import errors
from multiplicity_bench.metrics.scores import mutual_information, score_range, score_sd, viable_prediction_range
from multiplicity_bench.metrics.selection import expected_best_of_k

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def small(golden, make_context):
    scores = np.array(golden["scores"])
    assert golden["base"] == 0
    return make_context(scores[1:], scores[0], golden["labels"])


def test_decisions_and_accuracy(golden, small):
    assert small.base_decisions.tolist() == golden["decisions_base"]
    assert small.decisions.tolist() == golden["decisions_members"]
    assert 1 - errors(small.base, small.labels).mean() == golden["accuracy_base"]
    np.testing.assert_allclose(
        1 - errors(small.probabilities, small.labels).mean(axis=1), golden["accuracy_members"], **EXACT
    )


def test_flips_of_the_base(golden, small):
    np.testing.assert_allclose(conflict(small.flip_counts, small.size), golden["conflict_ratio"], **EXACT)
    np.testing.assert_allclose(small.flips.mean(axis=1), golden["discrepancy_per_member"], **EXACT)
    assert ambiguous(small.flip_counts, small.size).mean() == pytest.approx(golden["ambiguity"], abs=1e-12)
    assert discrepancy(small.flips) == pytest.approx(golden["discrepancy"], abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_at_k(golden, small, k):
    assert ambiguous(small.flip_counts, 4, k).mean() == pytest.approx(golden["ambiguity_at_k"][str(k)], abs=1e-12)
    assert discrepancy(small.flips, k) == pytest.approx(golden["discrepancy_at_k"][str(k)], abs=1e-12)
    assert score_range(small.scores, k).mean() == pytest.approx(golden["vpr_true_class_at_k"][str(k)], abs=1e-12)


def test_disagreement_of_pairs(golden, small):
    counts = votes(small.decisions, 3)
    np.testing.assert_allclose(disagreement(counts), golden["disagreement_per_sample"], **EXACT)
    assert disagreement(counts).mean() == pytest.approx(golden["disagreement"], abs=1e-12)
    assert self_consistency(counts).mean() == pytest.approx(golden["self_consistency"], abs=1e-12)


def test_scores(golden, small):
    np.testing.assert_allclose(
        viable_prediction_range(small.probabilities, small.labels), golden["vpr_true_class"], **EXACT
    )
    np.testing.assert_allclose(score_sd(small.scores), golden["score_sd_true_class_ddof0"], **EXACT)
    np.testing.assert_allclose(
        mutual_information(small.probabilities), golden["mutual_information_bits"], rtol=0, atol=1e-10
    )


def test_capacities_lie_within_the_certificate(golden, small):
    bits = capacity(small.probabilities)
    np.testing.assert_allclose(bits, golden["capacity_bits"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(2**bits, golden["capacity_effective"], rtol=1e-6)


def test_binary_capacities(golden):
    for row in golden["capacity_binary"]:
        bits = binary_capacity(row["a"], row["b"])
        assert bits == pytest.approx(row["bits"], abs=1e-12)
        assert bits * np.log(2) == pytest.approx(row["nats"], abs=1e-12)
        assert 2**bits == pytest.approx(row["eff"], abs=1e-9)


def test_values_of_groups(golden, small):
    for name, of_case in (
        ("ambiguity", ambiguous(small.flip_counts, 4)),
        ("conflict", conflict(small.flip_counts, 4)),
    ):
        group = np.array(golden["groups"]["index"])
        found = [small.bootstrap.mean(of_case, group == g).value for g in (0, 1)]
        np.testing.assert_allclose(found, golden["groups"][name], **EXACT)


def test_best_of_k_chosen_on_val(golden):
    case = golden["expected_test_of_val_best_of_k"]
    for k, value in case["value"].items():
        assert expected_best_of_k(case["val"], case["test"], int(k)) == pytest.approx(value, abs=1e-12)
    ranks = [1, 2, 3, 4, 5]
    found = [expected_best_of_k(ranks, ranks, k) for k in ranks]
    np.testing.assert_allclose(found, [3, 4, 4.5, 4.8, 5], **EXACT)


@pytest.mark.parametrize(
    ("rows", "bits"),
    [
        ([(1, 0), (0, 1)], 1.0),
        ([(1, 0), (0.5, 0.5)], np.log2(1.25)),
        ([(0.9, 0.1), (0.1, 0.9)], 0.531004),
        ([(0.8, 0.2), (0.2, 0.8)], 0.278072),
        ([(0.9, 0.1), (0.4, 0.6)], 0.215056),
        ([(0.55, 0.45), (0.45, 0.55)], 0.007226),
        ([(0.5, 0, 0.5), (0, 0.5, 0.5)], 0.5),
        ([(0.5, 0.5, 0), (0, 0.5, 0.5), (0.5, 0, 0.5)], np.log2(3) - 1),
        ([(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)], 0.663034),
        ([(0.3, 0.3, 0.4)] * 7, 0.0),
        (np.eye(2).tolist(), 1.0),
        (np.eye(3).tolist(), np.log2(3)),
        (np.eye(9).tolist(), np.log2(9)),
    ],
)
def test_known_capacities(rows, bits):
    assert capacity(np.array(rows, float)[:, None])[0] == pytest.approx(bits, abs=1e-6)


def test_kulynych_of_ten_members():
    flips = np.arange(1, 6)
    values = kulynych(np.stack([flips, 10 - flips], axis=-1))
    np.testing.assert_allclose(values, [0.4, 0.7111, 0.9333, 1.0667, 1.1111], atol=5e-5)
    with pytest.raises(ValueError, match="two classes"):
        kulynych(np.array([1, 2, 3]))


@pytest.mark.parametrize(("members", "bound"), [(10, 0.259), (20, 0.139), (50, 0.058), (100, 0.030)])
def test_bound_after_no_flip_at_all(members, bound):
    assert clopper_pearson_upper(0, members) == pytest.approx(bound, abs=5e-4)
    assert clopper_pearson_upper(0, members) == pytest.approx(1 - 0.05 ** (1 / members), rel=1e-12)
    assert clopper_pearson(0, members).high == pytest.approx(1 - 0.025 ** (1 / members), rel=1e-12)


def test_two_sided_bound_of_ten_members():
    assert clopper_pearson(0, 10).high == pytest.approx(0.308, abs=5e-4)


@pytest.mark.parametrize(
    ("members", "fewest"),
    [
        (7, (7, 7, None)),
        (9, (8, 8, 9)),
        (10, (9, 9, 10)),
        (15, (12, 12, 13)),
        (20, (15, 15, 17)),
        (50, (32, 33, 35)),
        (100, (59, 61, 64)),
    ],
)
def test_fewest_top_votes(members, fewest):
    assert tuple(fewest_votes(members, alpha) for alpha in (0.1, 0.05, 0.01)) == fewest


def test_five_members_never_predict():
    assert [fewest_votes(m, 0.05) for m in range(1, 6)] == [None] * 5


def test_ties_go_to_the_lowest_class():
    assert decide(np.array([[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [1 / 3] * 3])).tolist() == [2, 0, 0]


def test_generalised_disagreement_equals_the_error_of_calibrated_models(make_context):
    rng = np.random.default_rng(0)
    samples, members = 20000, 40
    p = rng.dirichlet(np.ones(4), size=samples)
    edges = p.cumsum(axis=1)
    labels, *drawn = ((rng.random((samples, 1)) > edges).sum(axis=1).clip(0, 3) for _ in range(members + 1))
    counts = votes(np.array(drawn), 4)
    truth = 1 - (p**2).sum(axis=1).mean()
    error = (np.array(drawn) != labels).mean()
    assert disagreement(counts).mean() == pytest.approx(truth, abs=0.005)  # about 5 standard errors
    assert error == pytest.approx(truth, abs=0.015)


def test_every_metric_declares_itself():
    for name, function in METRICS.load_all():
        info = function.info
        assert info.name == name and info.unit and info.citation and function.__doc__
        assert (info.direction == "neither") == (info.level == "set")


def test_scores_of_chosen_classes():
    p = np.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(class_scores(p, np.array([0, 2, 1, 1])), [[0, 5, 7, 10], [12, 17, 19, 22]])
