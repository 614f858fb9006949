"""Criteria of selection against scikit-learn, their draws against explicit resampling of patients."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.metrics.api import METRICS, MetricInfo, PerMember, Settings, Undefined
from multiplicity_bench.metrics.context import contexts, softmax
from multiplicity_bench.metrics.criteria import auroc_influence
from multiplicity_bench.metrics.evaluation import catalogue, evaluate
from multiplicity_bench.metrics.intervals import PatientBootstrap
from multiplicity_bench.metrics.performance import aurocs
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

CRITERIA = {
    "worst_group_accuracy": "higher",
    "accuracy_gap": "lower",
    "tpr_gap": "lower",
    "worst_class_recall": "higher",
    "member_calibration_error": "lower",
    "member_auroc": "higher",
}
SITES = {"worst_group_accuracy#site": (0, 1, 3), "accuracy_gap#site": (0, 1, 3), "tpr_gap#site": (0, 1)}


@pytest.fixture(scope="module")
def make_problem(make_context):
    """Return a function that makes 600 samples of 200 patients at four sites, some of them and some labels unknown.

    Site 2 has 16 patients with 48 samples; site 3 has 40 patients, but at most every other sample is positive.
    """

    def make(classes=2, members=5, draws=70, seed=0):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(200), 3)
        site = np.repeat([0, 1, 2, 3, -1], [60, 60, 16, 40, 24])[patient]
        labels = rng.integers(-1, classes, size=600)
        few = (site == 3) & (patient >= 150)  # sites in order: 40 patients from 136 on, positives in the first 14
        labels[few] = np.minimum(labels[few], 0)
        logits = rng.normal(size=(members, 600, classes))
        logits[:, np.arange(600), np.maximum(labels, 0)] += 0.7
        logits = np.round(logits - logits[..., :1], 1)  # scores tie
        return make_context(softmax(logits), None, labels, patient, draws, seed, attributes={"site": site})

    return make


def by_hand(name, context, p, rows):
    """Return a criterion of one model on some rows, with repetitions, by loops and scikit-learn."""
    y, decided, site = context.labels[rows], p[rows].argmax(axis=1), context.attributes["site"][rows]
    known = y >= 0
    if name == "worst_class_recall":
        return recall_score(y[known], decided[known], average=None).min()
    if name == "member_calibration_error":
        top, right = p[rows].max(axis=1)[known], (decided == y)[known]
        bins = np.ceil(top * 15)
        return sum(abs((right - top)[bins == b].sum()) for b in range(16)) / known.sum()
    if name == "tpr_gap#site":
        rates = [recall_score(y[known & (site == g)], decided[known & (site == g)]) for g in SITES[name]]
    else:
        rates = [accuracy_score(y[known & (site == g)], decided[known & (site == g)]) for g in SITES[name]]
    return min(rates) if name.startswith("worst") else max(rates) - min(rates)


def found(name, context):
    result = METRICS.get(name.split("#")[0])(context, context.probabilities)
    return result["#site"] if "#" in name else result


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((n, 2) for n in (*SITES, "worst_class_recall", "member_calibration_error")), ("worst_class_recall", 4)],
)
def test_values_and_draws_equal_a_loop_over_groups_on_resampled_patients(make_problem, name, classes):
    context = make_problem(classes)
    result, everybody = found(name, context), np.arange(600)
    assert isinstance(result, PerMember) and result.draws.shape == (70, 5)
    for m, p in enumerate(context.probabilities):
        assert result.values[m] == pytest.approx(by_hand(name, context, p, everybody), abs=1e-12)
        for draw in (0, 63, 64, 69):
            rows = np.repeat(everybody, context.bootstrap.counts[draw][context.bootstrap.index])
            assert result.draws[draw, m] == pytest.approx(by_hand(name, context, p, rows), abs=1e-9)


@pytest.mark.parametrize("name", SITES)
def test_groups_under_25_patients_in_the_denominator_are_left_out(make_problem, name):
    context = make_problem()
    assert found(name, context).groups == SITES[name]
    site, counted = context.attributes["site"], context.labels == 1 if name.startswith("tpr") else context.labels >= 0
    for g in range(4):
        patients = len(np.unique(context.bootstrap.index[counted & (site == g)]))
        assert (patients >= 25) == (g in SITES[name])
    assert (counted & (site == 2)).sum() >= (15 if name.startswith("tpr") else 30)


def test_samples_do_not_stand_for_patients(make_problem):
    context = make_problem()
    context.attributes = {"site": np.where(context.attributes["site"] == 2, 1, 0)}
    result = found("worst_group_accuracy#site", context)
    assert isinstance(result, Undefined)
    assert str(result) == "1 of 2 groups of 'site' have 25 patients, two are needed"


def test_a_declared_number_of_patients_lets_smaller_groups_count(make_context):
    """53 patients with two images each: 22 women, 31 men, labels in turn, so that every patient has both."""
    patient, labels = np.repeat(np.arange(53), 2), np.tile([0, 1], 53)
    sex = np.repeat([0, 1], [44, 62])
    p = softmax(np.random.default_rng(0).normal(size=(3, 106, 2)))
    names = {"worst_group_accuracy#sex": "patients", "accuracy_gap#sex": "patients", "tpr_gap#sex": "positive patients"}

    def values(**more):
        context = make_context(p, None, labels, patient, attributes={"sex": sex}, **more)
        return {name: METRICS.get(name.split("#")[0])(context, p)["#sex"] for name in names}

    for who, more in ((25, {}), (23, {"min_patients": 23})):
        for name, found in values(**more).items():
            assert str(found) == f"1 of 2 groups of 'sex' have {who} {names[name]}, two are needed"
    right = p.argmax(axis=-1) == labels
    of_all, of_positives = (
        np.stack([right[:, c & (sex == g)].mean(axis=1) for g in (0, 1)]) for c in (True, labels == 1)
    )
    for least in (20, 22):
        found = values(min_patients=least)
        assert all(result.groups == (0, 1) for result in found.values())
        np.testing.assert_allclose(found["worst_group_accuracy#sex"].values, of_all.min(axis=0), atol=1e-12)
        np.testing.assert_allclose(found["accuracy_gap#sex"].values, np.ptp(of_all, axis=0), atol=1e-12)
        np.testing.assert_allclose(found["tpr_gap#sex"].values, np.ptp(of_positives, axis=0), atol=1e-12)


def test_contexts_of_predictions_hold_the_declared_number(make_predictions):
    for predictions in (make_predictions(), make_predictions(classes=3, task="multilabel")):
        bootstrap = PatientBootstrap(120, None, 0, 0)
        assert {c.min_patients for c in contexts(predictions, np.arange(2), bootstrap, 0)} == {25}
        assert {c.min_patients for c in contexts(predictions, np.arange(2), bootstrap, 0, 20)} == {20}


def test_what_has_no_value_says_why(make_problem):
    context = make_problem(3)
    with pytest.raises(Undefined, match="two classes, not 3"):
        found("tpr_gap", context)
    binary = make_problem()
    binary.labels = np.where(binary.attributes["site"] == 0, binary.labels, np.minimum(binary.labels, 0))
    few = found("tpr_gap#site", binary)
    assert str(few) == "1 of 4 groups of 'site' have 25 positive patients, two are needed"
    context.attributes = {}
    for name in ("worst_group_accuracy", "accuracy_gap"):
        with pytest.raises(Undefined, match="no attribute of the patients is known"):
            METRICS.get(name)(context, context.probabilities)
    context.labels = np.minimum(context.labels, 1)
    for name in ("worst_class_recall", "member_auroc"):
        with pytest.raises(Undefined, match="class 2 has"):
            METRICS.get(name)(context, context.probabilities)


def test_a_draw_without_a_class_has_no_recall_and_hides_no_other(make_context):
    p = np.array([[[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]])
    context = make_context(p, None, [0, 0, 0, 1], draws=50)
    result = found("worst_class_recall", context)
    assert result.values[0] == 1.0
    np.testing.assert_array_equal(
        np.isnan(result.draws[:, 0]), (context.bootstrap.counts[:, 3] == 0) | (context.bootstrap.counts[:, 3] == 4)
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_auroc_and_the_influence_of_a_sample_are_those_of_scikit_learn(make_problem, classes):
    """The influence is the derivative in the sample's weight; terms of second order are h = 1e-6 of it."""
    context = make_problem(classes, members=2)
    values, influence = auroc_influence(context, context.probabilities)
    known, h = np.flatnonzero(context.known), 1e-6
    assert (influence[:, ~context.known] == 0).all()

    def area(m, weight):
        scores = context.probabilities[m, known]
        scores = scores[:, 1] if classes == 2 else scores
        return roc_auc_score(context.labels[known], scores, multi_class="ovr", sample_weight=weight)

    for m in range(2):
        assert values[m] == pytest.approx(area(m, None), abs=1e-12)
        for i in range(0, len(known), 60):
            weight = np.ones(len(known))
            weight[i] += h
            assert (area(m, weight) - values[m]) / h == pytest.approx(influence[m, known[i]], abs=1e-7)


def test_draws_of_auroc_follow_the_exact_ones(make_problem):
    """The terms left out are of order 1/n: 1/sqrt(n) of a standard deviation, 1/14 with 200 patients, twice allowed.

    They are uncorrelated with the linear ones, which leaves (1/7)^2 / 2 = 1 % to the sd, and as much to its own error.
    """
    context = make_problem(draws=300)
    linear = METRICS.get("member_auroc")(context, context.probabilities)
    exact_values, exact = aurocs(context, context.probabilities)
    np.testing.assert_allclose(linear.values, exact_values, atol=1e-12)
    sd = exact.std(axis=0)
    assert (np.sqrt(((linear.draws - exact) ** 2).mean(axis=0)) < sd / 7).all()
    np.testing.assert_allclose(linear.draws.std(axis=0), sd, rtol=0.02)


@pytest.mark.parametrize("name", [*SITES, "worst_class_recall", "member_calibration_error", "member_auroc"])
def test_order_of_members_and_cases_does_not_matter_and_no_draws_give_no_draws(make_problem, name):
    context, none = make_problem(), make_problem(draws=0)
    result, bare = found(name, context), found(name, none)
    assert bare.draws.shape == (0, 5)
    np.testing.assert_array_equal(bare.values, result.values)
    rng = np.random.default_rng(1)
    members, cases = rng.permutation(5), rng.permutation(600)
    other = make_problem()
    other.probabilities = context.probabilities[members][:, cases]
    other.labels, other.attributes = context.labels[cases], {"site": context.attributes["site"][cases]}
    other.bootstrap.index = context.bootstrap.index[cases]
    moved = found(name, other)
    np.testing.assert_allclose(moved.values, result.values[members], atol=1e-12)
    np.testing.assert_allclose(moved.draws, result.draws[:, members], atol=1e-12)


def test_criteria_are_listed_and_described_but_stand_in_no_record(make_predictions):
    for name, direction in CRITERIA.items():
        assert (METRICS.get(name).info.level, METRICS.get(name).info.direction) == ("criterion", direction)
    assert catalogue(["member_auroc"])["member_auroc"].unit == "probability"
    declared = catalogue()
    assert set(CRITERIA) <= {n for n, _ in METRICS.load_all()} and not set(CRITERIA) & set(declared)
    assert {info.level for info in declared.values()} == {"model", "set", "membership"}
    val, test = make_predictions("val"), make_predictions("test")
    scores = evaluate(val, test, Settings(epsilon=10.0, draws=0)).scores
    assert not [key for key in scores if key.split(".")[0] in CRITERIA]
    with pytest.raises(UserError, match="member_auroc: members are chosen by a criterion"):
        evaluate(val, test, names=["nll", "member_auroc"])


def test_a_criterion_has_a_better_direction():
    with pytest.raises(ValueError, match="'neither' is none of higher, lower"):
        MetricInfo("x", "neither", "criterion", "", "")
