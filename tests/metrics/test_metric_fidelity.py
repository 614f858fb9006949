"""Fidelity equals brute force over pairs of subsets, and its expectations where two sets are exchangeable."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from multiplicity_bench.metrics.fidelity import (
    CHANCE,
    QUANTITIES,
    Fidelity,
    ceiling,
    distances,
    energy_distance,
    fidelity,
    hit_rates,
    interval_overlap,
    over_labels,
    spearman,
)
from scipy.spatial.distance import cdist, pdist
from scipy.stats import spearmanr

BASE = np.array([0.55, 0.45])


@pytest.fixture(scope="module")
def binary(make_context):
    """Return a function that makes a Context from scores of class 1, [member, sample], around a base that says .45."""

    def make(scores, **more):
        scores = np.asarray(scores, np.float64)
        base = np.broadcast_to(BASE, (scores.shape[1], 2))
        return make_context(np.stack([1 - scores, scores], axis=-1), base, **more)

    return make


@pytest.fixture(scope="module")
def pair(binary):
    """A generator's set of 5 and 6 retrainings on 40 cases, scores on a grid, so that ties and points occur."""
    rng = np.random.default_rng(1)
    centre = rng.uniform(0.1, 0.7, size=40)
    noise = rng.choice([0.0, 0.1, 0.3], size=40)
    scores = np.clip(np.round(centre + noise * rng.normal(size=(11, 40)), 1), 0, 1)
    return binary(scores[:5]), binary(scores[5:])


def chosen_sets(context, k):
    return [list(c) for c in combinations(range(context.size), k)]


def overlap(a, b):
    """The overlap of two intervals, spelled out."""
    if a[0] == a[1] or b[0] == b[1]:
        return float(a == b)
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_recall_and_precision_are_ratios_of_means_over_all_pairs_of_subsets(pair, k):
    sets = [[c.flips[s].any(axis=0) for s in chosen_sets(c, k)] for c in pair]
    both = np.mean([(a & r).sum() for a, r in product(*sets)])
    found = fidelity(*pair, k).values
    assert 0 < both < np.mean([r.sum() for r in sets[1]])
    assert found["ambiguous_recall"] == pytest.approx(both / np.mean([r.sum() for r in sets[1]]), rel=1e-12)
    assert found["ambiguous_precision"] == pytest.approx(both / np.mean([a.sum() for a in sets[0]]), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_hit_rate_is_the_mean_over_all_subsets_and_retrainings(pair, k):
    members, reference = (c.scores for c in pair)
    chosen = [members[s] for s in chosen_sets(pair[0], k)]
    truth = np.mean([(s.min(axis=0) <= reference) & (reference <= s.max(axis=0)) for s in chosen], axis=(0, 1))
    assert 0 < truth.mean() < 1
    np.testing.assert_allclose(hit_rates(members, reference, k), truth, atol=1e-12)
    assert fidelity(*pair, k).values["hit_rate"] == pytest.approx(truth.mean(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_overlap_of_ranges_is_the_mean_over_all_pairs_of_few_subsets(pair, k):
    ends = [[(c.scores[s].min(axis=0), c.scores[s].max(axis=0)) for s in chosen_sets(c, k)] for c in pair]
    truth = np.mean(
        [
            overlap((a[0][i], a[1][i]), (b[0][i], b[1][i]))
            for a, b in product(*ends)
            for i in range(pair[0].base.shape[0])
        ]
    )
    assert fidelity(*pair, k).values["range_iou"] == pytest.approx(truth, rel=1e-12)


def test_overlap_of_ranges_from_drawn_subsets_is_within_its_sampling_error(binary):
    rng = np.random.default_rng(2)
    scores = [rng.beta(2, 4, size=(9, 3)) for _ in range(2)]
    low, high = (
        np.stack([f(s[list(c)], axis=0) for s in scores for c in combinations(range(9), 4)]) for f in (np.min, np.max)
    )
    low, high = low.reshape(2, -1, 3), high.reshape(2, -1, 3)
    every = interval_overlap(low[0][:, None], high[0][:, None], low[1], high[1]).mean(axis=-1)
    assert every.shape == (126, 126)
    found = fidelity(binary(scores[0]), binary(scores[1]), 4, seed=3).values["range_iou"]
    # two-sample U-statistic of 50 subsets each: its variance is at most (var of row means + of column means + var) / 50
    error = np.sqrt((every.mean(axis=0).var() + every.mean(axis=1).var()) / 50 + every.var() / 2500)
    assert found == pytest.approx(every.mean(), abs=4 * error)
    assert found != pytest.approx(every.mean(), abs=1e-9)
    more = fidelity(binary(scores[0]), binary(scores[1]), 4, subsets=126).values["range_iou"]
    assert more == pytest.approx(every.mean(), rel=1e-12)


def test_overlap_of_intervals_and_points():
    cases = [  # interval, interval, overlap
        ((0.0, 1.0), (0.0, 1.0), 1.0),
        ((0.0, 1.0), (0.5, 1.5), 1 / 3),
        ((0.0, 4.0), (1.0, 2.0), 0.25),
        ((0.0, 1.0), (1.0, 2.0), 0.0),
        ((0.0, 1.0), (3.0, 4.0), 0.0),
        ((0.0, 1.0), (0.5, 0.5), 0.0),
        ((0.5, 0.5), (0.5, 0.5), 1.0),
        ((0.5, 0.5), (0.6, 0.6), 0.0),
    ]
    a, b, truth = (np.array(column) for column in zip(*cases))
    np.testing.assert_allclose(interval_overlap(*a.T, *b.T), truth, atol=1e-15)
    np.testing.assert_allclose(interval_overlap(*b.T, *a.T), truth, atol=1e-15)


def test_rank_correlation_is_that_of_scipy(pair):
    counts = [c.flip_counts for c in pair]
    assert fidelity(*pair, 2).values["conflict_spearman"] == pytest.approx(spearmanr(*counts).statistic, rel=1e-12)
    rng = np.random.default_rng(4)
    for top in (1, 3, 1000):
        a, b = rng.integers(0, top + 1, size=(2, 200))
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_energy_distance_equals_the_loop_over_pairs():
    rng = np.random.default_rng(5)
    x, y = (rng.dirichlet(np.ones(3), size=(n, 7)) for n in (4, 6))

    def d(a, b):
        return np.sqrt(((a - b) ** 2).sum() / 7)

    truth = 2 * np.mean([d(a, b) for a in x for b in y])
    truth -= np.mean([d(a, b) for a, b in combinations(x, 2)]) + np.mean([d(a, b) for a, b in combinations(y, 2)])
    found = energy_distance(distances(x, y), distances(x, x), distances(y, y))
    assert found == pytest.approx(truth, rel=1e-10)


def test_distances_equal_those_of_scipy_in_blocks_and_at_close_quarters():
    rng = np.random.default_rng(6)
    x, y = (0.3 + 1e-6 * rng.normal(size=(n, 9000, 2)) for n in (140, 3))  # two blocks of samples
    flat = [z.reshape(len(z), -1) for z in (x, y)]
    np.testing.assert_allclose(distances(x, y), cdist(*flat) / np.sqrt(9000), rtol=1e-7)
    within = distances(y, y)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(within, pdist(flat[1]) / np.sqrt(9000), rtol=1e-7)


def test_equal_members_have_no_distance():
    x = np.broadcast_to(np.random.default_rng(7).dirichlet(np.ones(3), size=50), (6, 50, 3))
    assert (distances(x, x) == 0).all()


def test_energy_distance_of_exchangeable_sets_is_zero_in_the_mean(binary):
    rng = np.random.default_rng(8)
    found, narrow = [], []
    for _ in range(400):
        x, y = rng.beta(2, 5, size=(4, 3)), rng.beta(2, 5, size=(5, 3))
        found.append(fidelity(binary(x), binary(y), 2).values["energy_distance"])
        narrow.append(fidelity(binary(0.3 + 0.3 * (x - 0.3)), binary(y), 2).values["energy_distance"])
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert 0.3 < np.mean(np.array(found) < 0) < 0.7
    assert np.mean(narrow) > 8 * np.std(narrow) / 20


def test_energy_distance_is_read_against_the_distance_of_two_retrainings(pair):
    values = fidelity(*pair, 2).values
    p = pair[1].probabilities.reshape(6, -1)
    assert values["energy_distance_relative"] == pytest.approx(
        values["energy_distance"] / (pdist(p).mean() / np.sqrt(40)), rel=1e-9
    )


@pytest.mark.parametrize("k", [2, 5])
def test_exchangeable_sets_hit_at_the_expected_rate(k):
    rng = np.random.default_rng(9)
    members, fresh = rng.beta(2, 5, size=(8, 20_000)), rng.beta(2, 5, size=(6, 20_000))
    rates = hit_rates(members, fresh, k)  # the cases are independent
    assert rates.mean() == pytest.approx((k - 1) / (k + 1), abs=4 * rates.std() / np.sqrt(20_000))
    narrow = 0.3 + 0.5 * (members - 0.3)
    assert hit_rates(narrow, fresh, k).mean() < (k - 1) / (k + 1) - 0.1


def test_exchangeable_sets_reach_the_ceiling(binary):
    """Cases are independent, so that one large pair of sets stands for the expectation."""
    rng = np.random.default_rng(10)
    centre, width = rng.uniform(0.1, 0.6, size=20_000), rng.uniform(0.01, 0.2, size=20_000)
    members, reference = (np.clip(centre + width * rng.normal(size=(n, 20_000)), 0, 1) for n in (12, 24))
    found = fidelity(binary(members), binary(reference), 5).values
    top = ceiling(binary(reference), 5).values
    # standard errors of means over 20,000 independent cases are under .5/sqrt(20000) = .0035, of ratios twice that
    for name in ("ambiguous_recall", "ambiguous_precision"):
        assert found[name] == pytest.approx(top[name], abs=0.02)
    assert found["ambiguous_recall"] == pytest.approx(found["ambiguous_precision"], abs=0.02)
    assert found["range_iou"] == pytest.approx(top["range_iou"], abs=0.015)
    assert found["conflict_spearman"] >= top["conflict_spearman"] - 0.01
    cheap = fidelity(binary(centre + 0.3 * (members - centre)), binary(reference), 5).values
    for name in ("ambiguous_recall", "range_iou", "hit_rate"):
        assert cheap[name] < top[name] - 0.1
    assert cheap["energy_distance_relative"] > 5 * top[CHANCE]
    assert found["energy_distance_relative"] < 2 * top[CHANCE]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_recall_of_the_ceiling_is_that_of_all_disjoint_pairs(pair, k):
    context = pair[1]
    pairs = [(a, b) for a, b in product(chosen_sets(context, k), repeat=2) if not set(a) & set(b)]
    flips = context.flips
    both = np.mean([(flips[a].any(axis=0) & flips[b].any(axis=0)).sum() for a, b in pairs])
    one = np.mean([flips[b].any(axis=0).sum() for _, b in pairs])
    found = ceiling(context, k).values
    assert found["ambiguous_recall"] == found["ambiguous_precision"] == pytest.approx(both / one, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hit_rate_of_the_ceiling_holds_each_retraining_out(pair, k, binary):
    scores = pair[1].scores
    hits = []
    for out in range(6):
        for s in combinations([m for m in range(6) if m != out], k):
            chosen = scores[list(s)]
            hits.append((chosen.min(axis=0) <= scores[out]) & (scores[out] <= chosen.max(axis=0)))
    assert ceiling(pair[1], k).values["hit_rate"] == pytest.approx(np.mean(hits), rel=1e-12)
    without_ties = binary(np.random.default_rng(11).random((6, 40)))
    assert ceiling(without_ties, k).values["hit_rate"] == pytest.approx((k - 1) / (k + 1), abs=1e-12)


def test_the_rest_of_the_ceiling_is_the_mean_over_halves(binary):
    """Four retrainings, k = 2: six ordered pairs of halves, each the whole of a k-subset."""
    rng = np.random.default_rng(12)
    context = binary(np.clip(rng.uniform(0.1, 0.7, size=30) + 0.2 * rng.normal(size=(4, 30)), 0, 1))
    s, p = context.scores, context.probabilities.reshape(4, -1)
    rows = []
    for a in chosen_sets(context, 2):
        b = [m for m in range(4) if m not in a]
        iou = np.mean([overlap((s[a, i].min(), s[a, i].max()), (s[b, i].min(), s[b, i].max())) for i in range(30)])
        rho = spearmanr(context.flips[a].sum(axis=0), context.flips[b].sum(axis=0)).statistic
        energy = 2 * cdist(p[a], p[b]).mean() - pdist(p[a])[0] - pdist(p[b])[0]
        rows.append((iou, rho, energy / pdist(p).mean()))
    truth = np.array(rows)
    found = ceiling(context, 2, splits=2000).values
    names = ("range_iou", "conflict_spearman", "energy_distance_relative")
    for name, mean, sd in zip(names, truth.mean(axis=0), truth.std(axis=0)):
        assert sd > 1e-3
        assert found[name] == pytest.approx(mean, abs=4 * sd / np.sqrt(2000))
    assert found[CHANCE] == pytest.approx(truth[:, 2].max(), rel=1e-9)  # a third of the splits reach it
    assert abs(truth[:, 2].mean()) < 1e-12
    spread = pdist(p).mean() / np.sqrt(30)
    assert found["energy_distance"] != 0
    assert found["energy_distance"] == pytest.approx(found["energy_distance_relative"] * spread, rel=1e-9)


def test_the_order_of_members_and_cases_does_not_matter(pair):
    rng = np.random.default_rng(13)
    case = rng.permutation(40)
    moved = [
        replace(c, probabilities=c.probabilities[rng.permutation(c.size)][:, case], base=c.base[case]) for c in pair
    ]
    for name, value in fidelity(*pair, 2).values.items():
        assert fidelity(*moved, 2).values[name] == pytest.approx(value, rel=1e-9), name
    for name in ("ambiguous_recall", "hit_rate"):
        assert ceiling(moved[1], 2).values[name] == pytest.approx(ceiling(pair[1], 2).values[name], rel=1e-12)


def test_copies_of_the_base_recall_nothing(pair, binary):
    found = fidelity(binary(np.full((5, 40), 0.45)), pair[1], 3)
    assert found.values["ambiguous_recall"] == 0.0
    assert np.isnan(found.values["ambiguous_precision"])
    assert found.reasons["ambiguous_precision"] == "no case is ambiguous among the members"
    assert found.reasons["conflict_spearman"] == "every case has the same conflict among the members"
    assert set(found.reasons) == {"ambiguous_precision", "conflict_spearman"}
    assert found.values["range_iou"] == 0.0  # no range of the retrainings is the point .45
    assert found.values["energy_distance_relative"] > 0.3


def test_the_retrainings_themselves_score_full_marks_where_their_subsets_are_whole(pair):
    same = fidelity(pair[1], pair[1], 6).values
    for name in ("ambiguous_recall", "ambiguous_precision", "conflict_spearman", "range_iou", "hit_rate"):
        assert same[name] == pytest.approx(1.0, abs=1e-12)
    assert same["energy_distance"] < 0  # every member meets itself: the two sets are not independent


def test_retrainings_that_do_not_differ_are_undefined_not_perfect(binary):
    copies = binary(np.full((6, 8), 0.45))
    wide = binary(np.random.default_rng(14).random((5, 8)))
    found = fidelity(wide, copies, 3)
    assert found.reasons["ambiguous_recall"] == "no case is ambiguous among the retrainings"
    assert found.reasons["energy_distance_relative"] == "the retrainings do not differ"
    assert found.values["ambiguous_precision"] == 0.0
    top = ceiling(copies, 3)
    assert top.reasons["conflict_spearman"] == "every case has the same conflict within a half in 50 of 50 splits"
    assert (top.values["range_iou"], top.values["hit_rate"], top.values["energy_distance"]) == (1.0, 1.0, 0.0)


def test_too_few_members_are_nan_with_the_numbers(pair):
    members, reference = pair
    found = fidelity(members, reference, 6)
    assert np.isnan(list(found.values.values())).all() and set(found.values) == set(QUANTITIES)
    assert set(found.reasons.values()) == {"5 of 6 accepted"} and set(found.reasons) == set(QUANTITIES)
    assert set(fidelity(reference, members, 6).reasons.values()) == {"5 of 6 retrainings accepted"}
    top = ceiling(reference, 4)
    assert set(top.reasons) == {*QUANTITIES, CHANCE} and np.isnan(list(top.values.values())).all()
    assert set(top.reasons.values()) == {"6 of 8 retrainings accepted: fewer than 2k = 8"}
    assert not ceiling(reference, 3).reasons


def test_one_member_has_no_energy_distance_but_the_rest(binary):
    one, many = (binary(np.random.default_rng(15).random((n, 30))) for n in (1, 6))
    found = fidelity(one, many, 1)
    assert set(found.reasons) == {"energy_distance", "energy_distance_relative"}
    assert found.reasons["energy_distance"] == "1 member has no distance within its set"


def test_k_below_one_is_refused(pair):
    with pytest.raises(ValueError, match="no subsets of 0"):
        fidelity(*pair, 0)
    with pytest.raises(ValueError, match="no subsets of 0"):
        ceiling(pair[1], 0)


def test_sets_on_different_cases_are_refused(pair, binary):
    with pytest.raises(ValueError, match="the cases differ"):
        fidelity(pair[0], binary(np.full((6, 39), 0.2)), 2)
    with pytest.raises(ValueError, match="the cases differ"):
        fidelity(pair[0], binary(pair[1].scores, labels=np.ones(40, np.int64)), 2)


def test_cases_without_a_label_count_in_decisions_and_not_in_scores(make_context):
    rng = np.random.default_rng(16)
    base = rng.dirichlet(np.ones(3), size=50)
    labels = rng.integers(-1, 3, size=50)
    p = [rng.dirichlet(np.ones(3), size=(n, 50)) for n in (5, 6)]
    known = labels >= 0
    masked = [make_context(q, base, labels) for q in p]
    kept = [make_context(q[:, known], base[known], labels[known]) for q in p]
    for name in ("range_iou", "hit_rate"):
        assert fidelity(*masked, 2).values[name] == pytest.approx(fidelity(*kept, 2).values[name], rel=1e-12)
        assert ceiling(masked[1], 2).values[name] == pytest.approx(ceiling(kept[1], 2).values[name], rel=1e-12)
    assert fidelity(*masked, 2).values["ambiguous_recall"] != fidelity(*kept, 2).values["ambiguous_recall"]
    nobody = [make_context(q, base, np.full(50, -1)) for q in p]
    assert fidelity(*nobody, 2).reasons == dict.fromkeys(("range_iou", "hit_rate"), "no case has a label")


def test_the_mean_over_labels_is_undefined_where_one_label_is():
    a = Fidelity({"x": 0.25, "y": np.nan, "z": np.nan}, {"y": "nothing flips", "z": "3 of 5 accepted"})
    b = Fidelity({"x": 0.75, "y": 0.5, "z": np.nan}, {"z": "3 of 5 accepted"})
    mean = over_labels([b, a])
    assert mean.values["x"] == 0.5 and np.isnan([mean.values["y"], mean.values["z"]]).all()
    assert mean.reasons == {"y": "label 1: nothing flips", "z": "3 of 5 accepted"}
    assert over_labels([a]).reasons == a.reasons
    with pytest.raises(ValueError, match="no labels"):
        over_labels([])


def test_values_depend_on_the_seed_alone(binary):
    x, y = np.random.default_rng(17).random((2, 12, 20))
    once, again, other = (fidelity(binary(x), binary(y), 5, seed=s).values for s in (0, 0, 1))
    assert once == again
    assert {name for name in QUANTITIES if once[name] != other[name]} == {"range_iou"}
    assert ceiling(binary(y), 5, seed=0).values == ceiling(binary(y), 5, seed=0).values
    assert ceiling(binary(y), 5, seed=0).values["range_iou"] != ceiling(binary(y), 5, seed=1).values["range_iou"]
