"""A member of the set against another recipe: choices against loops, error rates, power, patients that would do."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.comparators import (
    OPEN,
    RIVAL,
    SET,
    TRADE,
    Choice,
    affordable,
    choose,
    compare,
    settle,
    with_groups,
)
from multiplicity_bench.metrics.context import Context, softmax
from multiplicity_bench.metrics.cost_curves import SetCost
from multiplicity_bench.metrics.intervals import Estimate
from scipy import stats

WORST = "worst_group_accuracy#sex"
K = 4


@pytest.fixture(scope="module")
def make_sides(make_context):
    """Return a function that makes two sets of networks on the same val and test cases, two samples a patient."""

    def make(members=(K, 5), draws=80, noise=1.5, patients=(130, 150), seed=0):
        sides: list[list[list[Context]]] = [[], []]
        for view, n in enumerate(patients):
            rng = np.random.default_rng([seed, view])
            labels, patient = rng.integers(-1, 2, size=2 * n), np.repeat(np.arange(n), 2)
            base = rng.normal(size=(2 * n, 2))
            base[np.arange(2 * n), np.maximum(labels, 0)] += 1.0
            groups = {"sex": rng.integers(-1, 2, size=n)[patient], "site": np.arange(n)[patient] % 2}
            for side, size in zip(sides, members):
                p = softmax(base + noise * rng.normal(size=(size, 2 * n, 2)))
                side.append([make_context(p, softmax(base), labels, patient, draws, 0, attributes=groups)])
        return tuple(sides[0]), tuple(sides[1])

    return make


def worst(context: Context, p: np.ndarray, rows: np.ndarray) -> float:
    y, sex, right = context.labels[rows], context.attributes["sex"][rows], p[rows].argmax(1) == context.labels[rows]
    return min(right[(y >= 0) & (sex == g)].mean() for g in (0, 1))


def accuracy(context: Context, p: np.ndarray, rows: np.ndarray) -> float:
    known = context.labels[rows] >= 0
    return float((p[rows].argmax(1) == context.labels[rows])[known].mean())


def loss(context: Context, p: np.ndarray) -> float:
    known = np.flatnonzero(context.labels >= 0)
    return float(-np.log(p[known, context.labels[known]]).mean())


def everything(context: Context) -> np.ndarray:
    return np.arange(len(context.labels))


def place(context: Context, p: np.ndarray) -> tuple[float, float]:
    """Return what a network is ranked by on val."""
    return round(worst(context, p, everything(context)), 9), -loss(context, p)


def by_hand(ours, theirs, n: int, tolerance: float):
    """Return the chosen member, and the chance of each of the rival's networks, by loops over subsets."""
    (val,), (other,) = ours[0], theirs[0]
    subsets = list(combinations(range(other.size), n))
    chances = np.zeros(other.size)
    for subset in subsets:
        chances[max(subset, key=lambda j: place(other, other.probabilities[j]))] += 1 / len(subsets)
    of = [accuracy(other, p, everything(other)) for p in other.probabilities]
    needed = chances @ np.array(of) - tolerance
    mine = [accuracy(val, p, everything(val)) for p in val.probabilities]
    kept = [m for m in range(val.size) if mine[m] >= needed - 1e-12] or [
        m for m in range(val.size) if mine[m] == max(mine)
    ]
    return max(kept, key=lambda m: place(val, val.probabilities[m])), chances


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_both_choices_and_their_difference_are_those_of_loops_over_members_and_subsets(make_sides, n, seed):
    ours, theirs = make_sides(seed=seed)
    found = choose(ours, theirs, n, K, tolerance=0.02)[WORST]
    chosen, chances = by_hand(ours, theirs, n, 0.02)
    assert found.chosen == chosen
    np.testing.assert_allclose(found.weights, chances, atol=1e-12)
    (test,), (other,) = ours[1], theirs[1]
    for draw in (None, 0, 7, 79):
        counts = 1 if draw is None else test.bootstrap.counts[draw][test.bootstrap.index]
        rows = np.repeat(everything(test), counts)
        for of, measure in ((found.gain, worst), (found.accuracy, accuracy)):
            rival = chances @ [measure(other, p, rows) for p in other.probabilities]
            by_loops = measure(test, test.probabilities[chosen], rows) - rival
            assert (of.value if draw is None else of.draws[draw]) == pytest.approx(by_loops, abs=1e-6)
    assert found.gain.value == pytest.approx(found.of_set - found.of_rival, abs=1e-12) and found.gain.n == 150


def test_more_networks_than_there_are_means_all(make_sides):
    ours, theirs = make_sides()
    assert (choose(ours, theirs, 99, K)[WORST].weights == choose(ours, theirs, 5, K)[WORST].weights).all()
    assert sorted(choose(ours, theirs, 99, K)[WORST].weights) == [0, 0, 0, 0, 1]


def certain(context: Context, wrong: list[set[int]]) -> Context:
    """Return the problem with members that err on the given samples alone."""
    decided = np.stack([[(y < 0) ^ (y == 1) ^ (i in w) for i, y in enumerate(context.labels)] for w in wrong])
    p = np.where(decided, 0.9, 0.1)
    return replace(context, probabilities=np.stack([1 - p, p], -1))


def test_a_member_that_gives_up_more_accuracy_than_the_rival_is_not_chosen(make_sides):
    ours, theirs = make_sides(members=(K, 1))
    (val,), sex = ours[0], ours[0][0].attributes["sex"]
    known = [np.flatnonzero((val.labels >= 0) & (sex == g)) for g in (0, 1, -1)]
    few, many, unknown = (set(g.tolist()) for g in known)
    first, n = sorted(few)[:6], sum(map(len, known))
    spread = certain(val, [{*sorted(unknown)[:12]}, {*first[:6]}, {*first[:5]}, {*first, *sorted(many)[:9]}])
    rival = certain(val, [{*first[:3], *sorted(many)[:3]}])
    found = {
        t: choose(([spread], ours[1]), ([rival], theirs[1]), 1, K, tolerance=t)[WORST] for t in (0.0, 6.5 / n, -5.5 / n)
    }
    # errors of 12 (of patients whose sex is unknown), 6, 5, 15 against the rival's 6
    assert (found[0.0].chosen, found[0.0].eligible) == (2, 2)
    assert (found[6.5 / n].chosen, found[6.5 / n].eligible) == (0, 3), "no known group of the first errs"
    assert (found[-5.5 / n].chosen, found[-5.5 / n].eligible) == (2, 0), "none keeps it: the most accurate"


@pytest.mark.parametrize(
    ("budget", "rival", "networks"),
    [(21.0, (0.0, 1.05), 20), (2.4, (0.0, 0.8), 3), (1.3, (0.0, 1.05), 1), (0.2, (0.0, 1.0), 1), (5.0, (1.5, 1.0), 3)],
)
def test_a_budget_buys_as_many_networks_as_it_pays_for_and_at_least_one(budget, rival, networks):
    assert affordable(budget, SetCost(*rival, None)) == networks


@pytest.mark.parametrize(
    ("budget", "rival"), [(None, (0.0, 1.0)), (3.0, (None, 1.0)), (3.0, (0.0, None)), (3.0, (0, 0))]
)
def test_a_cost_that_was_not_measured_buys_nothing(budget, rival):
    with pytest.raises(Undefined, match="not measured"):
        affordable(budget, SetCost(*rival, None))


def test_the_groups_of_a_rival_are_one_more_attribute_with_the_same_codes_on_all_views(make_sides):
    ours, theirs = make_sides()
    views = with_groups([*ours, *theirs], "sex*label")
    for view in views:
        (context,) = view
        codes, sex, labels = context.attributes["sex*label"], context.attributes["sex"], context.labels
        assert ((codes < 0) == ((sex < 0) | (labels < 0))).all()
        inside = codes >= 0
        assert (codes[inside] == 2 * sex[inside] + labels[inside]).all()
    assert set(ours[0][0].attributes) == {"sex", "site"}, "what was given stays as it is"
    for unknown in ("random", "strata*label", "site"):
        assert all(set(c.attributes) == {"sex", "site"} for view in with_groups(ours, unknown) for c in view)


def test_the_worst_of_a_rivals_own_groups_is_a_criterion(make_sides):
    views = with_groups([*(sides := make_sides(patients=(200, 220)))[0], *sides[1]], "site*label")
    found = choose((views[0], views[1]), (views[2], views[3]), 2, K)
    assert set(found) == {WORST, "worst_group_accuracy#site", "worst_group_accuracy#site*label"}
    chosen, (test,) = found["worst_group_accuracy#site*label"], views[1]
    right = test.decisions[chosen.chosen] == test.labels
    rates = [right[(test.attributes["site"] == s) & (test.labels == y)].mean() for s in (0, 1) for y in (0, 1)]
    assert chosen.of_set == pytest.approx(min(rates), abs=1e-6)


def test_several_labels_are_chosen_by_and_compared_in_their_mean(make_sides):
    one, other = make_sides(seed=2), make_sides(seed=3)
    ours, theirs = (tuple([*a, *b] for a, b in zip(one[side], other[side])) for side in (0, 1))
    found = choose(ours, theirs, 9, K, math.inf)[WORST]
    chosen = []
    for val, _ in (ours, theirs):
        on_val = [[place(c, p) for p in c.probabilities] for c in val]
        means = [tuple(np.mean(labels, axis=0)) for labels in zip(*on_val)]
        chosen.append(max(range(len(means)), key=lambda m: means[m]))
    assert found.chosen == chosen[0] and found.weights[chosen[1]] == 1
    for value, measure in ((found.gain.value, worst), (found.accuracy.value, accuracy)):
        ours_, theirs_ = (
            np.mean([measure(c, c.probabilities[m], everything(c)) for c in side[1]])
            for side, m in zip((ours, theirs), chosen)
        )
        assert value == pytest.approx(ours_ - theirs_, abs=1e-6)


def test_what_cannot_be_compared_has_a_reason(make_sides):
    ours, theirs = make_sides()
    assert str(choose(ours, theirs, 1, K + 1)[WORST]) == "4 of 5 accepted"
    nobody = [[replace(c, probabilities=c.probabilities[:0]) for c in view] for view in ours]
    assert str(choose(nobody, theirs, 1, K)[WORST]) == "0 of 4 accepted"
    assert str(choose(ours, nobody, 1, K)[WORST]) == "the rival has no network"
    few, others = make_sides(patients=(40, 90))
    assert "have 25 patients" in str(choose(few, others, 1, K)[WORST])


def test_two_sides_of_other_cases_or_draws_are_refused(make_sides):
    ours, _ = make_sides()
    for other in (make_sides(seed=1)[1], make_sides(draws=81)[1]):
        with pytest.raises(ValueError, match="the same cases"):
            choose(ours, other, 1, K)


def made_up(gains, accuracies, rng, draws=400, sd=(0.02, 0.005), shared=None) -> list[Choice]:
    """Return choices with these values, whose draws share the noise of the patients."""
    shared = rng.normal(size=(2, draws)) if shared is None else shared
    return [
        Choice(
            0, 1, np.ones(1), g, 0.0, Estimate(g, g + sd[0] * shared[0], 100), Estimate(a, a + sd[1] * shared[1], 100)
        )
        for g, a in zip(gains, accuracies)
    ]


def test_exchanging_the_sides_mirrors_the_comparison(make_sides):
    pairs = [make_sides(members=(K, K), seed=seed) for seed in range(3)]
    one, other = ([choose(*sides[::way], 9, K, math.inf)[WORST] for sides in pairs] for way in (1, -1))
    first, second = compare(one, 0.02), compare(other, 0.02)
    assert first.gain.value == pytest.approx(-second.gain.value) and first.gain.low == pytest.approx(-second.gain.high)
    assert first.accuracy.value == pytest.approx(-second.accuracy.value)
    assert first.accuracy.low == pytest.approx(-second.accuracy.high)
    assert first.p == pytest.approx(second.p) and {first.leader, second.leader} == {SET, RIVAL}
    assert first.needed == pytest.approx(second.needed) and first.resolvable == pytest.approx(second.resolvable)


def test_the_accuracy_of_a_comparison_is_the_sets_less_the_rivals():
    found = compare(made_up([0.1], [0.02], np.random.default_rng(0)))
    assert found.accuracy.value == 0.02 and found.accuracy.low < 0.02 < found.accuracy.high
    assert found.gain.value == 0.1


@pytest.mark.parametrize(
    ("gain", "difference", "words"),
    [
        (0.15, 0.0, SET),
        (0.15, -0.02, SET),
        (0.15, -0.021, TRADE),
        (0.15, 0.1, SET),
        (-0.15, 0.02, RIVAL),
        (-0.15, 0.021, TRADE),
        (-0.15, -0.1, RIVAL),
        (0.01, 0.1, OPEN),
        (-0.01, 0.1, OPEN),
        (0.0, -0.1, OPEN),
    ],
)
def test_a_better_worst_group_that_was_bought_with_accuracy_is_a_trade(gain, difference, words):
    choices = made_up([gain], [difference], np.random.default_rng(1))
    assert settle([compare(choices, tolerance=0.02)])[0].words == words


def test_equal_sides_are_told_apart_in_one_case_of_twenty():
    """Noise of patients (shared by base seeds) and of base seeds."""
    rng, wrong = np.random.default_rng(2), {SET: 0, RIVAL: 0, OPEN: 0}
    for _ in range(1000):
        patients, seeds = 0.02 * rng.normal(), 0.02 * rng.normal(size=4)
        choices = made_up(patients + seeds, np.zeros(4), rng, sd=(0.02, 1e-4))
        wrong[settle([compare(choices, 0.02)])[0].words] += 1
    # 5 % in all if exact (binomial sd .7 %); the ends err on the wide side, so only the upper side is bounded
    assert wrong[SET] + wrong[RIVAL] <= 1000 * (0.05 + 3 * 0.007)
    assert min(wrong[SET], wrong[RIVAL]) > 0, "an interval that never errs is too wide"


def test_a_gain_that_is_resolvable_is_found_four_times_of_five():
    rng, found = np.random.default_rng(3), 0
    resolvable = compare(made_up([0.0], [0.0], rng, draws=4000)).resolvable
    assert resolvable == pytest.approx(2.8016 * 0.02, rel=0.03)  # z_.975 + z_.8; the draws' sd is off by 1.1 %
    for _ in range(1000):
        choices = made_up([resolvable + 0.02 * rng.normal()], [0.0], rng, sd=(0.02, 1e-4))
        found += settle([compare(choices, 0.02)])[0].words == SET
    assert found / 1000 == pytest.approx(0.8, abs=0.05)  # binomial sd 1.3 %; the draws' sd moves it by as much


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_patients_needed_for_the_resolvable_gain_are_those_there_are(seeds):
    rng = np.random.default_rng(4)
    values = 0.005 * rng.normal(size=seeds)
    resolvable = compare(made_up(values, np.zeros(seeds), rng, shared=(noise := rng.normal(size=(2, 400))))).resolvable
    moved = compare(made_up(values - values.mean() + resolvable, np.zeros(seeds), rng, shared=noise))
    assert moved.needed == pytest.approx(moved.patients, rel=1e-6)


def test_a_quarter_of_the_gain_needs_sixteen_times_the_patients_as_long_as_base_seeds_agree():
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(2, 400))
    whole, quarter = (compare(made_up([g] * 3, [0.0] * 3, rng, shared=noise)).needed for g in (0.08, 0.02))
    assert quarter == pytest.approx(16 * whole, rel=1e-6)


def test_no_number_of_patients_helps_against_base_seeds_that_differ():
    rng = np.random.default_rng(6)
    assert compare(made_up([0.1, -0.1, 0.05], [0.0] * 3, rng)).needed == math.inf
    assert compare(made_up([0.0], [0.0], rng)).needed == math.inf


def test_the_noise_that_patients_add_to_each_base_seed_shrinks_with_more_of_them():
    """Base seeds that differ by noise of the patients alone, each by its own."""
    rng = np.random.default_rng(7)
    noise = 0.02 * rng.normal(size=(200, 5)) + 0.05
    draws = 0.02 * rng.normal(size=(5, 2000))
    needed = []
    for values in noise:
        choices = [
            replace(made_up([v], [0.0], rng, 2000)[0], gain=Estimate(v, v + d, 100)) for v, d in zip(values, draws)
        ]
        needed.append(compare(choices).needed)
    # v + e/B is between .0004/5 (all noise of patients found in the draws) and twice that (counted twice, as it is in
    # the ends of the interval), against (.05/2.9)^2: 27 to 54 of 100 patients
    assert 25 < np.median(needed) < 60


def test_p_and_ends_are_those_of_the_t_distribution():
    rng = np.random.default_rng(10)
    choices = made_up([0.02, 0.05, 0.06], [0.0] * 3, rng, draws=3000)
    found = compare(choices)
    over_patients, between = np.var(np.mean([c.gain.draws for c in choices], axis=0), ddof=1), 0.0013 / 3 / 3
    variance = over_patients + np.var([0.02, 0.05, 0.06], ddof=1) / 3
    assert np.var([0.02, 0.05, 0.06], ddof=1) / 3 == pytest.approx(between)
    t = stats.t(2 * (variance / between) ** 2)  # Welch-Satterthwaite, the draws counting as exact
    assert found.p == pytest.approx(2 * t.sf(found.gain.value / math.sqrt(variance)))
    assert found.gain.low == pytest.approx(found.gain.value - t.ppf(0.975) * math.sqrt(variance))
    assert found.resolvable == pytest.approx((t.ppf(0.975) + stats.norm.ppf(0.8)) * math.sqrt(variance))


def test_choices_with_other_numbers_of_draws_are_refused():
    rng = np.random.default_rng(0)
    for choices in ([], [*made_up([0.0], [0.0], rng, 10), *made_up([0.0], [0.0], rng, 20)]):
        with pytest.raises(ValueError, match="one per base seed"):
            compare(choices)


def test_undefined_draws_leave_a_comparison_open_with_a_reason():
    rng = np.random.default_rng(8)
    (choice,) = made_up([0.2], [0.0], rng)
    draws = np.where(np.arange(400) < 40, np.nan, choice.gain.draws)
    broken = settle([compare([replace(choice, gain=replace(choice.gain, draws=draws))])])[0]
    assert broken.words == OPEN and math.isnan(broken.needed) and "5 %" in broken.reason
    same = settle([compare([replace(choice, gain=replace(choice.gain, draws=np.full(400, 0.2)))])])[0]
    assert same.words == OPEN and same.reason == "no counted test case tells the two sides apart"


def test_a_set_beside_itself_is_not_told_apart(make_sides):
    ours, _ = make_sides()
    found = settle([compare([choose(ours, ours, K, K)[WORST]])])[0]
    assert (found.gain.value, found.accuracy.value, found.words) == (0, 0, OPEN)
    assert found.reason == "no counted test case tells the two sides apart"


def test_a_table_of_many_comparisons_asks_more_of_each():
    rng = np.random.default_rng(9)
    one = compare(made_up([0.055], [0.0], rng, draws=2000))
    assert one.p < 0.05 < 20 * one.p
    assert settle([one])[0].words == SET and settle([one])[0].adjusted == pytest.approx(one.p)
    rest = [compare(made_up([0.0], [0.0], rng)) for _ in range(19)]
    assert settle([one, *rest])[0].words == OPEN
