"""Selective ensembles at an equal number of members: exact against all subsets, groups, reasons, null values."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.metrics.abstention import abstention, answer_cases, groups
from multiplicity_bench.metrics.decisions import fewest_votes, selective_ensemble, votes
from scipy.stats import hypergeom

SCORES = ("coverage", "referred", "accuracy", "inconsistency")


def one_hot(decisions: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[decisions]


@pytest.fixture
def random_context(make_context):
    """Return a function that makes members who mostly agree, with some labels missing."""

    def make(members, samples=40, classes=2, seed=0, **more):
        rng = np.random.default_rng(seed)
        often = rng.integers(classes, size=samples)
        rate = rng.random(samples) * 0.9 + 0.1
        decisions = np.where(
            rng.random((members, samples)) < rate, often, rng.integers(classes, size=(members, samples))
        )
        labels = np.where(rng.random(samples) < 0.8, often, rng.integers(-1, classes, size=samples))
        return make_context(one_hot(decisions, classes), labels=labels, **more)

    return make


def brute_force(context, members: int, alpha: float) -> dict[str, float]:
    """The four scores by enumerating every m-subset and every pair of disjoint ones."""
    everyone = range(context.size)
    modes = {
        s: selective_ensemble(votes(context.decisions[list(s)], context.classes), context.labels, alpha).mode
        for s in combinations(everyone, members)
    }
    answered = np.array([m >= 0 for m in modes.values()])
    right = np.array([(m >= 0) & (m == context.labels) for m in modes.values()])
    labelled = answered & (context.labels >= 0)
    pairs = [(a, b) for a in modes for b in modes if not set(a) & set(b)]
    differ = [((modes[a] >= 0) & (modes[b] >= 0) & (modes[a] != modes[b])).mean() for a, b in pairs]
    return {
        "coverage": answered.mean(),
        "referred": 100 * (1 - answered.mean()),
        "accuracy": right.sum() / labelled.sum() if labelled.any() else np.nan,
        "inconsistency": np.mean(differ) if pairs else np.nan,
    }


@pytest.mark.parametrize(("members", "alpha", "least"), [(4, 0.7, 3), (3, 0.3, 3), (1, 0.999, None), (4, 0.05, None)])
def test_two_classes_are_the_mean_over_all_subsets_and_all_disjoint_pairs(random_context, members, alpha, least):
    assert fewest_votes(members, alpha) == least
    context = random_context(9)
    found, truth = abstention([context], members, alpha).scores, brute_force(context, members, alpha)
    for name in SCORES:
        assert found[name].value == pytest.approx(truth[name], abs=1e-12, nan_ok=True), name
    if least is not None:
        assert 0 < truth["coverage"] < 1 and truth["inconsistency"] > 0  # the cases tell right from wrong formulas


def test_more_classes_are_the_mean_over_all_subsets_where_they_are_few(random_context):
    context = random_context(6, classes=4, samples=60)
    found, truth = abstention([context], 4, 0.7).scores, brute_force(context, 4, 0.7)
    for name in ("coverage", "referred", "accuracy"):
        assert found[name].value == pytest.approx(truth[name], abs=1e-12)
    halves, truth = abstention([context], 3, 0.3).scores, brute_force(context, 3, 0.3)
    for name in SCORES:  # of six members, a half leaves one other half
        assert halves[name].value == pytest.approx(truth[name], abs=1e-12)
    assert 0 < truth["inconsistency"] < truth["coverage"] < 1


def test_sampled_subsets_agree_with_the_exact_chances(random_context, make_context):
    two = random_context(24, samples=200)
    three = make_context(one_hot(two.decisions, 3), labels=two.labels)
    exact, sampled = (abstention([c], 10, 0.2).scores for c in (two, three))
    rng = np.random.default_rng(1)
    spread = {"coverage": [], "accuracy": [], "inconsistency": []}
    for _ in range(300):  # what one pair of subsets gives, to know how far the mean of 50 may be off
        order = rng.permutation(24)
        a, b = (
            selective_ensemble(votes(two.decisions[o], 2), two.labels, 0.2).mode for o in (order[:10], order[10:20])
        )
        spread["coverage"].append((a >= 0).mean())
        spread["accuracy"].append((a == two.labels)[(a >= 0) & (two.labels >= 0)].mean())
        spread["inconsistency"].append(((a >= 0) & (b >= 0) & (a != b)).mean())
    for name, values in spread.items():
        assert abs(sampled[name].value - exact[name].value) < 4 * np.std(values) / np.sqrt(50), name
        assert abs(np.mean(values) - exact[name].value) < 4 * np.std(values) / np.sqrt(300), name


def test_chances_of_two_hundred_members_are_hypergeometric(make_context):
    ones = np.arange(201)
    decisions = (np.arange(200)[:, None] < ones).astype(int)
    coverage = answer_cases(make_context(one_hot(decisions, 2)), 10, 0.05)["coverage"].values
    wanted = hypergeom.sf(8, 200, ones, 10) + hypergeom.sf(8, 200, 200 - ones, 10)
    np.testing.assert_allclose(coverage, wanted, rtol=1e-9)
    assert coverage[0] == coverage[200] == 1


@pytest.mark.parametrize("classes", [2, 5])
def test_identical_members_answer_everything_and_never_differ(random_context, make_context, classes):
    context = random_context(1, classes=classes)
    copies = make_context(np.repeat(context.probabilities, 30, axis=0), labels=context.labels)
    scores = abstention([copies]).scores
    assert [scores[n].value for n in ("coverage", "referred", "inconsistency")] == [1, 0, 0]
    known = context.labels >= 0
    assert scores["accuracy"].value == pytest.approx((context.decisions[0] == context.labels)[known].mean(), abs=1e-12)


@pytest.mark.parametrize(("size", "classes"), [(0, 2), (9, 2), (9, 3)])
def test_too_few_members_are_nan_with_their_number(random_context, make_context, size, classes):
    context = random_context(12, classes=classes)
    context = make_context(context.probabilities[:size], base=context.base, labels=context.labels)
    for score in abstention([context]).scores.values():
        assert np.isnan(score.value) and score.reason == f"{size} of 10 accepted"


def test_inconsistency_needs_twice_as_many_members(random_context):
    for classes in (2, 3):
        scores = abstention([random_context(19, classes=classes)], 10, 0.3).scores
        assert np.isfinite([scores[n].value for n in ("coverage", "referred", "accuracy")]).all()
        assert np.isnan(scores["inconsistency"].value) and scores["inconsistency"].reason == "19 of 20 accepted"


def test_five_members_never_answer(random_context):
    scores = abstention([random_context(30)], members=5, alpha=0.05).scores
    assert (scores["coverage"].value, scores["referred"].value, scores["inconsistency"].value) == (0, 100, 0)
    assert np.isnan(scores["accuracy"].value) and scores["accuracy"].reason == "no case with a label is answered"


def test_cases_without_a_label_are_answered_but_not_judged(random_context):
    for classes in (2, 3):
        context = random_context(20, classes=classes)
        known = context.labels >= 0
        assert 0 < known.sum() < len(known)
        judged = replace(
            context,
            probabilities=context.probabilities[:, known],
            base=context.base[known],
            labels=context.labels[known],
        )
        scores, of_known = abstention([context]).scores, answer_cases(judged)["accuracy"]
        assert scores["accuracy"].value == pytest.approx(np.average(of_known.values, weights=of_known.weight))
        nobody = replace(context, labels=np.full(len(known), -1))
        again = abstention([nobody]).scores
        assert again["coverage"] == scores["coverage"] and again["inconsistency"] == scores["inconsistency"]
        assert np.isnan(again["accuracy"].value)


def test_the_order_of_members_and_cases_does_not_matter(random_context):
    context = random_context(21)
    rng = np.random.default_rng(0)
    cases = rng.permutation(len(context.labels))
    shuffled = replace(
        context,
        probabilities=context.probabilities[rng.permutation(21)][:, cases],
        base=context.base[cases],
        labels=context.labels[cases],
    )
    for name, score in abstention([shuffled]).scores.items():
        assert score.value == pytest.approx(abstention([context]).scores[name].value, abs=1e-12)


@pytest.fixture
def grouped(random_context, make_context):
    """150 cases of 75 patients, two images each: sex 0 has 40 patients, 1 has 25, 2 has 5, and 5 are unknown."""
    context = random_context(20, samples=150, seed=3)
    patient = np.repeat(np.arange(75), 2)
    sex = np.repeat([0, 1, 2, -1], [80, 50, 10, 10])
    return make_context(
        context.probabilities, labels=context.labels, patient=patient, draws=200, attributes={"sex": sex}
    )


def test_groups_are_counted_by_patient_and_the_left_out_are_told(grouped):
    who = groups(grouped)
    assert (who.patients, who.small, who.unknown) == ({"sex=0": 40, "sex=1": 25}, {"sex=2": 5}, {"sex": 10})
    assert [int(mask.sum()) for mask in who.masks.values()] == [80, 50]


def test_a_group_scores_what_its_cases_alone_score(grouped, make_context):
    found = abstention([grouped])
    assert found.groups.keys() == {"sex=0", "sex=1"}
    for name, mask in found.who.masks.items():
        alone = make_context(
            grouped.probabilities[:, mask],
            base=grouped.base[mask],
            labels=grouped.labels[mask],
            patient=grouped.bootstrap.index[mask],
        )
        for key, score in abstention([alone]).scores.items():
            assert found.groups[name][key].value == pytest.approx(score.value, abs=1e-12)
            assert found.groups[name][key].n == score.n


def test_a_group_without_enough_labelled_patients_has_no_accuracy(grouped):
    labels = np.where(np.arange(150) < 4, -1, 1)  # two patients of sex 0 lose their labels, of sex 1 none
    labels[80:84] = -1  # and now two of sex 1, which leaves 23
    found = abstention([replace(grouped, labels=labels)]).groups
    assert np.isfinite(found["sex=0"]["accuracy"].value)
    assert np.isnan(found["sex=1"]["accuracy"].value) and found["sex=1"]["accuracy"].reason == "23 of 25 patients"
    assert np.isfinite(found["sex=1"]["coverage"].value)


def test_the_declared_number_of_patients_decides_which_groups_are_shown(grouped):
    for least, shown in ((5, {"sex=0", "sex=1", "sex=2"}), (6, {"sex=0", "sex=1"}), (26, {"sex=0"})):
        found = abstention([replace(grouped, min_patients=least)])
        assert found.groups.keys() == found.who.patients.keys() == shown
        assert found.who.patients.keys() | found.who.small.keys() == {"sex=0", "sex=1", "sex=2"}
    labels = np.where((np.arange(150) >= 80) & (np.arange(150) < 84), -1, 1)  # of two of the 25 patients of sex 1
    few, enough = (
        abstention([replace(grouped, labels=labels, min_patients=least)]).groups["sex=1"]["accuracy"]
        for least in (24, 23)
    )
    assert few.reason == "23 of 24 patients" and np.isnan(few.value)
    assert enough.n == 23 and np.isfinite(enough.value)


def test_intervals_resample_patients(grouped):
    scores = abstention([grouped]).scores
    cases = answer_cases(grouped)
    for name in SCORES:
        ends = grouped.bootstrap.mean(cases[name].values, cases[name].weight).interval()
        assert (scores[name].low, scores[name].high) == pytest.approx((ends.low, ends.high), abs=1e-12)
        assert scores[name].interval == "bootstrap over patients" and scores[name].low < scores[name].high
    assert scores["coverage"].n == 75


def test_labels_of_a_task_are_averaged_and_an_undefined_one_is_told(random_context, make_context):
    one, other = random_context(20, seed=1), random_context(20, seed=2)
    both = abstention([one, other]).scores
    for name in SCORES:
        each = [abstention([c]).scores[name].value for c in (one, other)]
        assert both[name].value == pytest.approx(np.mean(each), abs=1e-12)
    unlabelled = replace(other, labels=np.full(40, -1))
    assert abstention([one, unlabelled]).scores["accuracy"].reason == "no case with a label is answered"


@pytest.mark.parametrize(("members", "alpha"), [(0, 0.05), (10, 0.0), (10, 1.0)])
def test_senseless_ensembles_are_refused(random_context, members, alpha):
    with pytest.raises(ValueError, match="no selective ensemble"):
        abstention([random_context(20)], members, alpha)
    with pytest.raises(ValueError, match="no problem"):
        abstention([])
