"""The error without labels: exact cases of each estimate. Label shift: level, power, scipy, weights that are known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.context import softmax
from multiplicity_bench.metrics.decisions import disagreement, votes
from multiplicity_bench.metrics.performance import errors
from multiplicity_bench.metrics.unlabelled import (
    ErrorEstimate,
    atc_threshold,
    confidence,
    error_estimates,
    label_shift,
    negative_entropy,
)
from scipy.stats import chi2_contingency, ks_2samp, kstest


def one_hot(decisions, classes):
    return np.eye(classes)[decisions]


@pytest.fixture(scope="module")
def make_problem(make_context):
    """Return a function that makes 300 samples of 150 patients, decided by noisy members, with a harder view."""

    def make(classes=3, members=4, draws=50, seed=0, gain=1.5):
        rng = np.random.default_rng(seed)
        labels = rng.integers(classes, size=300)
        logits = rng.normal(size=(2, members, 300, classes))
        logits[0, :, np.arange(300), labels] += gain
        logits[1, :, np.arange(300), labels] += 0.5 * gain
        clean, shifted = softmax(np.round(logits, 1))
        patient = np.repeat(np.arange(150), 2)
        context = make_context(clean, None, labels, patient, draws, seed)
        noise = make_context(shifted[:, :70], None, np.full(70, -1), None, draws, seed + 2)
        context.views = {"jpeg-3": make_context(shifted, None, labels, patient, 7, seed + 1), "ood-noise": noise}
        return context

    return make


def test_disagreement_is_the_error_where_labels_and_decisions_come_from_the_same_distribution(make_context):
    """`1 - sum_c p_c^2` each; 4 standard deviations allowed. The excess is held against its own draws."""
    p = np.array([0.6, 0.3, 0.1])
    rng = np.random.default_rng(3)
    labels, decisions = rng.choice(3, 20000, p=p), rng.choice(3, (6, 20000), p=p)
    context = make_context(one_hot(decisions, 3), None, labels, draws=200)
    found = error_estimates(context, context)["gde"]
    for estimate in (found.estimated, found.error):
        assert estimate.value == pytest.approx(1 - (p**2).sum(), abs=4 * estimate.draws.std())
        assert estimate.draws.std() < 0.004
    assert abs(found.excess.value) < 4 * found.excess.draws.std() < 0.016
    assert found.absolute_error == abs(found.excess.value)


def test_disagreement_is_exactly_the_error_where_every_pattern_stands_once(make_context):
    """Two members and the label run through all triples of (0, 0, 1, 2), in which class 0 has half the mass."""
    faces = np.array([0, 0, 1, 2])
    first, second, labels = (a.reshape(-1) for a in np.meshgrid(faces, faces, faces))
    context = make_context(one_hot(np.stack([first, second]), 3), None, labels)
    found = error_estimates(context, context)["gde"]
    assert found.estimated.value == found.error.value == 1 - (0.25 + 2 / 16)
    np.testing.assert_allclose(found.members, 0.0, atol=1e-15)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_threshold_gives_exactly_the_error_on_val_itself_for_every_member(make_problem, classes):
    context = make_problem(classes)
    context.probabilities = np.round(context.probabilities, 1)  # about ten cases to a threshold
    context.labels = np.where(np.arange(300) % 7, context.labels, -1)
    found = error_estimates(context, context)
    assert list(found) == ["gde", "atc_confidence", *(["atc_entropy"] if classes > 2 else []), "confidence"]
    for name in set(found) - {"gde", "confidence"}:
        np.testing.assert_allclose(found[name].members, 0.0, atol=1e-14)
        assert found[name].estimated.value == pytest.approx(found[name].error.value, abs=1e-14)


def test_the_threshold_is_an_order_statistic_and_ties_count_by_the_fraction_that_is_lacking():
    scores = np.array([[0.9, 0.5, 0.7, 0.6], [0.8, 0.6, 0.6, 0.6], [0.9, 0.5, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    wrong = np.array([[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    threshold = atc_threshold(scores, wrong)
    np.testing.assert_array_equal(threshold.score, [0.7, 0.6, 0.5, np.inf])
    np.testing.assert_allclose(threshold.tied, [0, 1 / 3, 0, 0])
    elsewhere = np.tile([0.55, 0.6, 0.7, 0.95], (4, 1))
    counted = [[1, 1, 0, 0], [1, 1 / 3, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_allclose(threshold.errors(elsewhere), counted)


def test_the_threshold_is_exact_on_any_view_where_errors_are_the_cases_of_low_confidence(make_context):
    """Errors are the cases below .7; the view has more of them. Confidence on average is off by 9 % there."""
    rng = np.random.default_rng(0)

    def problem(low, seed):
        top = np.where(
            rng.random((3, 4000)) < low, rng.uniform(0.5, 0.699, (3, 4000)), rng.uniform(0.701, 1, (3, 4000))
        )
        top[1:] = top[0]
        p = np.stack([top, 1 - top], axis=-1)
        return make_context(p, None, (top[0] < 0.7).astype(int), draws=20, seed=seed)

    val, test = problem(0.1, 0), problem(0.1, 1)
    test.views = {"fog-5": problem(0.6, 1)}
    found = error_estimates(val, test, "fog-5")
    assert found["atc_confidence"].error.value == pytest.approx(0.6, abs=0.03)
    assert found["atc_confidence"].absolute_error == pytest.approx(0.0, abs=5e-4)  # a case in the gap of .699 to .701
    assert found["confidence"].absolute_error > 0.05


def test_the_mean_confidence_of_a_calibrated_network_gives_its_error_and_of_an_overconfident_one_too_little(
    make_context,
):
    rng = np.random.default_rng(5)
    logits = rng.normal(scale=2, size=(20000, 3))
    p = softmax(logits)
    labels = (rng.random((20000, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=2)
    context = make_context(np.stack([p, softmax(3 * logits)]), None, labels, draws=200)
    found = error_estimates(context, context)["confidence"]
    se = np.sqrt((confidence(p) * (1 - confidence(p))).mean() / 20000)
    assert found.members[0] < 4 * se
    assert found.members[1] > 0.05
    assert found.excess.value == pytest.approx(-found.members[1] / 2, abs=4 * se)


def test_the_entropy_orders_two_classes_as_the_confidence_does():
    p = softmax(np.random.default_rng(0).normal(scale=2, size=(500, 2)))
    assert (
        negative_entropy(p)[np.argsort(confidence(p))][1:] >= negative_entropy(p)[np.argsort(confidence(p))][:-1]
    ).all()
    assert negative_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).tolist() == [0.0, -np.log(2)]


def test_estimates_on_a_view_are_means_over_members_and_draws_those_of_the_part(make_problem):
    val, test = make_problem(seed=0), make_problem(seed=9)
    view = test.views["jpeg-3"]
    found = error_estimates(val, test, "jpeg-3")
    wrong = errors(view.probabilities, view.labels)
    patients = test.bootstrap.counts.astype(float)
    of_members = {
        "gde": np.tile(disagreement(votes(view.decisions, 3)), (4, 1)),
        "confidence": 1 - view.probabilities.max(axis=-1),
    }
    for name, cases in of_members.items():
        result = found[name]
        assert result.estimated.value == pytest.approx(cases.mean(), abs=1e-12)
        assert result.error.value == pytest.approx(wrong.mean(), abs=1e-12)
        np.testing.assert_allclose(result.members, np.abs((cases - wrong).mean(axis=1)), atol=1e-12)
        gap = (cases - wrong).mean(axis=0).reshape(150, 2).sum(axis=1)
        np.testing.assert_allclose(result.excess.draws, patients @ gap / 300, atol=1e-12)
        assert result.estimated.n == 150
    for m in range(4):
        sure = np.sort(val.probabilities[m].max(axis=1))
        share = (view.probabilities[m].max(axis=1) < sure[int(errors(val.probabilities[m], val.labels).sum())]).mean()
        estimate = share - wrong[m].mean()
        assert found["atc_confidence"].members[m] == pytest.approx(abs(estimate), abs=0.01)  # ties
    on_part = error_estimates(val, test)
    assert on_part["gde"].error.value < found["gde"].error.value - 0.1


def test_where_no_case_has_a_label_the_estimate_stands_alone(make_problem):
    test = make_problem()
    found = error_estimates(make_problem(seed=1), test, "ood-noise")
    for name, result in found.items():
        assert isinstance(result, ErrorEstimate), name
        assert 0 < result.estimated.value < 1 and result.estimated.draws.shape == (50,)
        assert isinstance(result.error, Undefined) and isinstance(result.excess, Undefined)
        assert np.isnan(result.absolute_error) and np.isnan(result.members).all()


def test_what_is_missing_is_named(make_problem):
    val, test = make_problem(), make_problem(members=1)
    with pytest.raises(Undefined, match="no 'fog-5' view"):
        error_estimates(val, test, "fog-5")
    found = error_estimates(make_problem(members=1), test)
    assert str(found["gde"]) == "1 of 2 accepted" and isinstance(found["atc_entropy"], ErrorEstimate)
    val = make_problem(members=1)
    val.labels = np.full(300, -1)
    assert str(error_estimates(val, test)["atc_confidence"]) == "val: no sample has a label"
    none = make_problem()
    none.probabilities = none.probabilities[:0]
    assert {str(f) for f in error_estimates(none, none).values()} == {"0 of 1 accepted"}


def clustered(make_context, rng, patients, share, base=(0.5, 0.5), strength=2.0):
    """Return a problem whose patients have 1 to 5 images each and outputs that depend on the patient."""
    sizes = rng.integers(1, 6, patients)
    patient = np.repeat(np.arange(patients), sizes)
    labels = rng.choice(2, size=patients, p=share)[patient]
    effect = rng.normal(scale=1.5, size=patients)[patient] + rng.normal(scale=0.5, size=len(patient))
    margin = strength * (labels - 0.5) + effect
    return make_context(softmax(np.stack([0 * margin, margin], axis=-1))[None], None, labels, patient)


def shift_between(val, part, permutations, view=""):
    return label_shift(val, part, lambda context: context.base, view, permutations)


def test_p_values_are_uniform_without_a_shift_where_patients_have_several_images(make_context):
    """250 pairs of parts. A uniform p fails the test of uniformity in 1 % of seeds; counts of decisions tie, which
    makes their p a little larger. A test by image rejects far too often.
    """
    rng = np.random.default_rng(13)
    hard, soft, by_image = [], [], []
    for _ in range(250):
        val, view = (clustered(make_context, rng, 60, (0.5, 0.5)) for _ in range(2))
        found = shift_between(val, view, 99)
        hard.append(found.hard)
        soft.append(found.soft)
        by_image.append(ks_2samp(val.base[:, 1], view.base[:, 1]).pvalue)
    assert kstest(soft, "uniform").pvalue > 0.01
    for level in (0.05, 0.25, 0.5):
        reach = 3 * np.sqrt(level * (1 - level) / 250)
        assert level - 0.05 - reach < np.mean(np.array(hard) <= level) < level + reach
    assert np.mean(np.array(by_image) <= 0.05) > 0.15


def test_a_shift_of_the_labels_is_seen(make_context):
    rng = np.random.default_rng(2)
    found = [
        shift_between(clustered(make_context, rng, 100, (0.5, 0.5)), clustered(make_context, rng, 100, (0.1, 0.9)), 199)
        for _ in range(10)
    ]
    assert np.mean([f.hard <= 0.05 for f in found]) >= 0.9 and np.mean([f.soft <= 0.05 for f in found]) >= 0.9


def test_with_one_image_per_patient_the_tests_are_those_of_scipy(make_context):
    """2,000 permutations: a p of .1 has a standard error of .007, four allowed, which the limit distributions keep."""
    rng = np.random.default_rng(4)
    val = make_context(softmax(rng.normal(size=(400, 4)))[None], None, rng.integers(4, size=400))
    view = make_context(softmax(rng.normal(size=(300, 4)) + 0.35 * np.eye(4)[0])[None], None, rng.integers(4, size=300))
    found = shift_between(val, view, 2000)
    table = np.stack([np.bincount(c.base_decisions, minlength=4) for c in (val, view)])
    assert 0.01 < found.hard < 0.5
    assert found.hard == pytest.approx(chi2_contingency(table).pvalue, abs=0.03)
    by_class = [ks_2samp(val.base[:, c], view.base[:, c]).pvalue for c in range(4)]
    assert 0.001 < min(by_class) < 0.1
    assert found.soft == pytest.approx(4 * min(by_class), abs=0.04)


def test_the_same_outputs_on_both_sides_are_no_shift_and_a_repetition_gives_the_same_p(make_context):
    rng = np.random.default_rng(0)
    p = softmax(rng.normal(size=(1, 90, 3)))
    val, view = (make_context(p, None, rng.integers(3, size=90)) for _ in range(2))
    found = shift_between(val, view, 99)
    assert found.hard == 1.0 and found.soft == 1.0
    constant = [make_context(np.full((1, n, 2), [0.3, 0.7]), None, np.zeros(n, int)) for n in (40, 25)]
    found = shift_between(*constant, 99)
    assert found.hard == 1.0 and found.soft == 1.0  # all cases tie
    other = make_context(p[:, :60], None, rng.integers(3, size=60))
    assert shift_between(val, other, 99).hard == shift_between(val, other, 99).hard


def test_a_view_is_tested_by_its_own_outputs_and_the_patients_of_its_part(make_problem):
    val, test = make_problem(seed=0), make_problem(seed=9)
    found = label_shift(val, test, lambda context: context.ensemble, "jpeg-3", 199)
    assert found.weights[0].draws.shape == (50,) and found.weights[0].n == 150  # the view's own bootstrap has 7 draws
    assert found.soft < 0.05 < label_shift(val, test, lambda context: context.ensemble, permutations=199).soft
    noise = label_shift(val, test, lambda context: context.ensemble, "ood-noise", 199)
    assert noise.weights[0].n == 70 and np.isnan(noise.true).all()
    with pytest.raises(Undefined, match="no 'fog-5' view"):
        shift_between(val, test, 9, "fog-5")


def test_weights_are_exact_where_the_view_repeats_the_cases_of_val_by_class(make_context):
    """Class c stands 1 + c times as often as on val, with the same outputs: `p(x | y)` is the same."""
    rng = np.random.default_rng(8)
    labels = rng.integers(3, size=200)
    logits = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[labels]
    again = np.repeat(np.arange(200), 1 + labels)
    val = make_context(softmax(logits)[None], None, labels, draws=30)
    view = make_context(softmax(logits[again])[None], None, labels[again], draws=30, seed=1)
    found = shift_between(val, view, 9)
    assert len(found.weights) == 3 and found.weights[0].draws.shape == (30,)
    share = np.bincount(labels) / 200
    np.testing.assert_allclose(found.true, np.array([1, 2, 3]) / (share @ [1, 2, 3]), rtol=1e-12)
    np.testing.assert_allclose([w.value for w in found.weights], found.true, rtol=1e-9)


def test_draws_of_the_weights_are_those_of_resampled_patients(make_context):
    rng = np.random.default_rng(6)
    val = clustered(make_context, rng, 80, (0.5, 0.5))
    view = clustered(make_context, rng, 90, (0.3, 0.7))
    contexts = [
        make_context(c.probabilities, None, c.labels, c.bootstrap.index, 20, seed) for seed, c in enumerate((val, view))
    ]
    found = shift_between(*contexts, 9)
    for draw in range(20):
        rows = [
            np.repeat(np.arange(c.bootstrap.samples), c.bootstrap.counts[draw][c.bootstrap.index]) for c in contexts
        ]
        on_val, on_view = (c.base_decisions[r] for c, r in zip(contexts, rows))
        labels = contexts[0].labels[rows[0]]
        confusion = [[((on_val == i) & (labels == j)).mean() for j in range(2)] for i in range(2)]
        expected = np.linalg.solve(confusion, [(on_view == i).mean() for i in range(2)])
        np.testing.assert_allclose([w.draws[draw] for w in found.weights], expected, rtol=1e-9)


def test_weights_of_new_cases_recover_the_shift(make_context):
    """Shares (.5, .3, .2) become (.2, .3, .5); the standard deviation of the draws, 4 of them allowed, is below .1."""
    rng = np.random.default_rng(9)

    def problem(share, seed):
        labels = rng.choice(3, size=5000, p=share)
        logits = rng.normal(size=(5000, 3)) + 2.0 * np.eye(3)[labels]
        return make_context(softmax(logits)[None], None, labels, draws=100, seed=seed)

    found = shift_between(problem([0.5, 0.3, 0.2], 0), problem([0.2, 0.3, 0.5], 1), 19)
    assert found.hard == 1 / 20 and found.soft == pytest.approx(3 / 20)
    for weight, truth in zip(found.weights, [0.4, 1.0, 2.5]):
        assert weight.draws.std() < 0.1
        assert weight.value == pytest.approx(truth, abs=4 * weight.draws.std())


def test_a_class_that_is_never_decided_leaves_the_weights_undefined_and_an_unlabelled_view_the_truth(make_context):
    labels = np.array([0, 1, 2] * 20)
    val = make_context(one_hot(np.where(labels == 2, 1, labels), 3)[None], None, labels)
    view = make_context(one_hot(labels, 3)[None], None, np.full(60, -1))
    found = shift_between(val, view, 9)
    assert isinstance(found.weights, Undefined) and "cannot be inverted" in str(found.weights)
    assert np.isnan(found.true).all() and found.hard < 0.2
    rare = make_context(one_hot(labels, 3)[None], None, np.where(labels == 2, -1, labels))
    assert np.isnan(shift_between(rare, val, 9).true[2]) and not np.isnan(shift_between(rare, val, 9).true[:2]).any()


def test_a_larger_shift_never_has_a_larger_p(make_context):
    rng = np.random.default_rng(1)
    val = make_context(softmax(rng.normal(size=(150, 2)))[None])
    margins = rng.normal(size=(150, 2))
    parts = [make_context(softmax(margins + shift * np.eye(2)[0])[None]) for shift in (0.0, 0.3, 0.6, 1.2)]
    p = [shift_between(val, part, 199).soft for part in parts]
    assert all(large <= small for small, large in pairwise(p)) and p[-1] == 1 / 200
