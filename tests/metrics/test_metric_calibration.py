"""Calibration error, Brier decomposition, temperature, risk and coverage: closed forms, brute force, scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from multiplicity_bench.metrics.api import METRICS, Undefined
from multiplicity_bench.metrics.calibration import (
    TEMPERATURES,
    _equal_mass,
    after_temperature,
    aurc_influence,
    brier_decomposition,
    calibration_error,
    epistemic_share,
    excess_aurc,
    temperature,
)
from multiplicity_bench.metrics.context import BASE, MEMBERS, softmax
from multiplicity_bench.metrics.performance import brier_scores, calibration_errors
from multiplicity_bench.metrics.selection import Selection, select
from scipy.special import entr
from sklearn.calibration import calibration_curve

PROPERTIES = {
    "adaptive_calibration_error": "probability",
    "classwise_calibration_error": "probability",
    "aurc": "share of samples",
}
VARIANTS = [(a, c) for a in (False, True) for c in (False, True)]


@pytest.fixture(scope="module")
def make_problem(make_context):
    """Return a function that makes 450 samples of 150 patients, some labels missing, with scores that tie."""

    def make(classes=3, members=3, draws=60, seed=0, view="jpeg-3"):
        rng = np.random.default_rng(seed)
        labels = rng.integers(-1, classes, size=450)
        labels[:9] = -1  # three patients without any
        logits = rng.normal(size=(2, members, 450, classes))
        logits[:, :, np.arange(450), np.maximum(labels, 0)] += 1.0
        clean, shifted = softmax(np.round(logits - logits[..., :1], 1))
        patient = np.repeat(np.arange(150), 3)
        context = make_context(clean, None, labels, patient, draws, seed)
        others = make_context(shifted[:, :80], None, np.full(80, -1), None, draws, seed + 2)
        context.views = {view: make_context(shifted, None, labels, patient, draws, seed + 1), "ood-noise": others}
        return context

    return make


def calibrated(rng, confidences, repetitions):
    """Return draws of [repetition, sample, 2] probabilities and whether the first class came true with them."""
    came_true = rng.random((repetitions, len(confidences))) < confidences
    return np.stack([confidences, 1 - confidences], axis=-1), np.where(came_true, 0, 1)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("n", [900, 3600])
def test_the_error_of_a_calibrated_network_goes_to_zero_at_the_known_rate(make_context, adaptive, n):
    """`sum_b sqrt(2/pi V_b)/n` in l1, V_b the variance of the sum in bin b, is the normal limit: it halves with 4 n.

    The limit is off by under 1 % with 60 a bin, and so is the mean of 300 repetitions (sd of one about 20 %: 1.2 %,
    under 4 of which are allowed). In l2 the mean square is `sum_b V_b/n_b / n` whatever the distribution.
    """
    rng, repetitions = np.random.default_rng(n), 300
    confidences = (np.arange(n) + 0.5) / (2 * n) + 0.5
    p, labels = calibrated(rng, confidences, repetitions)
    found = {
        norm: np.array(
            [calibration_error(make_context(p[None], None, y), p[None], 10, norm, adaptive).values[0] for y in labels]
        )
        for norm in ("l1", "l2")
    }
    cut = np.arange(5, 10) / 10 if not adaptive else 0.5 + np.arange(10) / 20
    of_bin = np.searchsorted(cut, confidences) - 1
    variance = np.bincount(of_bin, confidences * (1 - confidences))
    limit = np.sqrt(2 / np.pi * variance).sum() / n
    assert found["l1"].mean() == pytest.approx(limit, rel=0.045)
    squares = found["l2"] ** 2
    exact = (variance / np.bincount(of_bin)).sum() / n
    assert abs(squares.mean() - exact) < 4 * squares.std() / np.sqrt(repetitions)


@pytest.mark.parametrize(("adaptive", "classwise"), VARIANTS)
def test_norms_are_ordered_and_equal_in_one_bin(make_problem, adaptive, classwise):
    context = make_problem(classes=2 if classwise else 4)
    l1, l2, largest = (
        calibration_error(context, context.probabilities, 12, norm, adaptive, classwise) for norm in ("l1", "l2", "max")
    )
    for small, large in ((l1, l2), (l2, largest)):
        assert (small.values < large.values - 1e-3).all() and (small.draws < large.draws).all()
    one = [calibration_error(context, context.probabilities, 1, norm, adaptive, classwise) for norm in ("l1", "l2")]
    np.testing.assert_allclose(one[0].draws, one[1].draws, atol=1e-12)


def test_equal_width_in_l1_is_the_registered_error_and_classwise_that_of_scikit_learn(make_problem):
    context = make_problem(draws=20)
    values, draws = calibration_errors(context, context.probabilities)
    result = calibration_error(context, context.probabilities)
    np.testing.assert_allclose(result.values, values, atol=1e-12)
    np.testing.assert_allclose(result.draws, draws, atol=1e-12)
    untied = softmax(np.random.default_rng(0).normal(size=(3, 450, 3)))  # bins differ in which edge they hold
    classwise = calibration_error(context, untied, classwise=True).values
    for m, p in enumerate(untied[:, context.known]):
        by_class = []
        for c in range(3):
            happened = context.labels[context.known] == c
            frequency, mean = calibration_curve(happened, p[:, c], n_bins=15)
            sizes = np.histogram(p[:, c], np.linspace(0, 1, 16))[0]
            by_class.append(np.abs(frequency - mean) @ sizes[sizes > 0] / len(happened))
        assert classwise[m] == pytest.approx(np.mean(by_class), abs=1e-12)


def test_two_classes_have_one_classwise_error(make_problem):
    context = make_problem(classes=2)
    found = []
    for context.positive in (0, 1):
        found.append(calibration_error(context, context.probabilities, classwise=True))
    np.testing.assert_allclose(found[0].values, found[1].values, atol=1e-12)
    np.testing.assert_allclose(found[0].draws, found[1].draws, atol=1e-12)


@pytest.mark.parametrize("bins", [4, 15, 700])
def test_adaptive_bins_have_equal_masses_with_ties_and_split_no_tie_unevenly(bins):
    scores = np.random.default_rng(0).choice([0.5, 0.6, 0.61, 0.9, 1.0], size=103, p=[0.4, 0.1, 0.2, 0.2, 0.1])
    share = _equal_mass(scores, bins)
    np.testing.assert_allclose(share.sum(axis=1), 103 / bins, rtol=1e-12)
    np.testing.assert_allclose(share.sum(axis=0), 1.0, rtol=1e-12)
    for s in np.unique(scores):
        assert (share[:, scores == s] == share[:, scores == s][:, :1]).all()
    reached = (share * np.arange(bins)[:, None]).sum(axis=0)
    assert (np.diff(reached[np.argsort(scores)]) >= -1e-9).all()


def mean_gaps(confidence, right, bins):
    """Return the adaptive error of cases, each taken as `bins` equal parts, ties by the mean over their parts."""
    _, tied, sizes = np.unique(confidence, return_inverse=True, return_counts=True)
    mean_excess = np.bincount(tied, right - confidence) / sizes
    parts = np.repeat(mean_excess, sizes * bins)
    return np.abs(parts.reshape(bins, -1).sum(axis=1)).sum() / len(parts)


def test_the_adaptive_error_is_that_of_cases_cut_into_equal_parts(make_problem):
    context = make_problem()
    found = calibration_error(context, context.probabilities, adaptive=True).values
    for m, p in enumerate(context.probabilities[:, context.known]):
        right = p.argmax(axis=1) == context.labels[context.known]
        assert found[m] == pytest.approx(mean_gaps(p.max(axis=1), right, 15), abs=1e-12)


def rows_of(context, draw):
    return np.flatnonzero(context.known).repeat(context.bootstrap.counts[draw][context.bootstrap.index[context.known]])


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_draws_are_the_errors_of_resampled_patients(make_problem, norm):
    """Equal width: exactly. Equal mass: with the bins of the sample, whose sd is that of bins made anew.

    With 300 draws an sd has an error of 4 %, their ratio of under 6 %, twice allowed.
    """
    context = make_problem(draws=60 if norm != "l1" else 300)
    p = context.probabilities[:1]
    wide = calibration_error(context, p, norm=norm)
    for draw in range(5):
        rows = rows_of(context, draw)
        confidence, right = p[0, rows].max(axis=1), p[0, rows].argmax(axis=1) == context.labels[rows]
        of_bin = np.ceil(confidence * 15)
        parts = [((of_bin == b).mean(), abs((right - confidence)[of_bin == b].mean())) for b in np.unique(of_bin)]
        by_norm = {
            "l1": sum(share * gap for share, gap in parts),
            "l2": np.sqrt(sum(share * gap**2 for share, gap in parts)),
            "max": max(gap for _, gap in parts),
        }
        assert wide.draws[draw, 0] == pytest.approx(by_norm[norm], abs=1e-12)
    if norm == "l1":
        kept = calibration_error(context, p, adaptive=True).draws[:, 0]
        anew = np.empty(300)
        for draw in range(300):
            rows = rows_of(context, draw)
            right = p[0, rows].argmax(axis=1) == context.labels[rows]
            anew[draw] = mean_gaps(p[0, rows].max(axis=1), right, 15)
        assert kept.std() == pytest.approx(anew.std(), rel=0.12)


def test_what_is_declared_must_make_sense(make_problem):
    context = make_problem()
    for wrong in ({"bins": 0}, {"norm": "l3"}):
        with pytest.raises(ValueError, match="no calibration error with"):
            calibration_error(context, context.probabilities, **wrong)
    with pytest.raises(ValueError, match="must be above 0"):
        after_temperature(context.base, 0.0)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_parts_add_up_to_the_brier_score(make_problem, classes, bins):
    context = make_problem(classes)
    parts = brier_decomposition(context.probabilities, context.labels, bins)
    score = brier_scores(context.probabilities, context.labels)[:, context.known].mean(axis=1)
    np.testing.assert_allclose(parts.brier, score, rtol=0, atol=1e-12)
    assert (parts.reliability >= 0).all() and (parts.resolution >= 0).all() and (parts.within_variance > 0).all()


def test_parts_of_forecasts_that_are_constant_in_their_bins_are_those_of_murphy():
    """Forecast .2 for five cases of which two happen, .9 for five of which four happen."""
    forecast = np.repeat([0.2, 0.9], 5)
    labels = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 0])
    parts = brier_decomposition(np.stack([1 - forecast, forecast], axis=-1)[None], labels)
    assert parts.reliability[0] == pytest.approx((0.2**2 + 0.1**2) / 2)
    assert parts.resolution[0] == pytest.approx(0.2**2)
    assert parts.uncertainty[0] == pytest.approx(0.24)
    assert parts.within_variance[0] == pytest.approx(0) and parts.within_covariance[0] == pytest.approx(0)


def test_the_generalised_resolution_hardly_depends_on_the_bins():
    """Reliability and resolution do: with one bin the latter is 0, and the within-bin terms make up for it."""
    rng = np.random.default_rng(0)
    forecast = rng.random(4000)
    labels = (rng.random(4000) < forecast).astype(int)
    p = np.stack([1 - forecast, forecast], axis=-1)[None]
    one, many = brier_decomposition(p, labels, 1), brier_decomposition(p, labels, 15)
    assert one.resolution[0] == pytest.approx(0, abs=1e-12) and many.resolution[0] > 0.07
    assert one.generalised_resolution[0] == pytest.approx(many.generalised_resolution[0], abs=0.002)
    assert many.generalised_resolution[0] == pytest.approx(1 / 12, abs=0.005)  # variance of a uniform forecast


def fisher_sd(logits, t):
    """Return the standard error of a temperature: `T^2 / sqrt(n E Var_p(z))`, z the logits at temperature 1."""
    p = softmax(logits / t)
    variance = (p * logits**2).sum(axis=1) - (p * logits).sum(axis=1) ** 2
    return t**2 / np.sqrt(variance.sum())


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_applied_is_found_and_a_calibrated_network_left_alone(truth):
    rng = np.random.default_rng(7)
    logits = rng.normal(scale=2.0 * truth, size=(20000, 3))
    p = softmax(logits / truth)
    labels = (rng.random((20000, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=2)
    fitted, se = temperature(softmax(logits), labels), fisher_sd(logits, truth)
    assert se < 0.02 * truth
    assert abs(fitted - truth) < 4 * se
    again = temperature(after_temperature(softmax(logits), fitted), labels)
    assert again == pytest.approx(1.0, abs=1e-5)
    excess = (logits * softmax(logits / fitted)).sum(axis=1) - logits[np.arange(20000), labels]
    assert excess.mean() == pytest.approx(0.0, abs=1e-5)  # the derivative of the loss by 1/T


def test_probabilities_serve_as_well_as_logits_and_missing_labels_are_left_out():
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=5, size=(4, 50, 3))
    t = np.array([0.5, 1.0, 2.0, 30.0])
    np.testing.assert_allclose(
        after_temperature(softmax(logits), t), softmax(logits / t[:, None, None]), rtol=1e-11, atol=1e-15
    )
    np.testing.assert_allclose(after_temperature(softmax(logits[0]), 2.0), softmax(logits[0] / 2), rtol=1e-12)
    labels = rng.integers(3, size=50)
    some = np.where(np.arange(50) < 30, labels, -1)
    assert temperature(softmax(logits[0]), some) == temperature(softmax(logits[0, :30]), labels[:30])


def test_decisions_that_are_all_right_or_worthless_lead_to_the_ends():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    assert temperature(p, np.array([0, 1, 0])) < TEMPERATURES[0] * 1.2  # the loss is flat there
    assert temperature(p, np.array([1, 0, 1])) == pytest.approx(TEMPERATURES[1], rel=1e-3)


def with_confidence(confidence, wrong):
    """Return probabilities [sample, 2] that decide class 0, and labels of which those `wrong` are 1."""
    return np.stack([confidence, 1 - confidence], axis=-1), np.asarray(wrong, int)


def selective_risk_area(confidence, wrong):
    """Return the area under the risk-coverage curve by a loop, the cases in falling confidence."""
    ordered = np.asarray(wrong, float)[np.argsort(-confidence, kind="stable")]
    return np.mean([ordered[: k + 1].mean() for k in range(len(ordered))])


def test_aurc_is_the_mean_of_the_selective_risks_over_coverages_and_over_the_orders_of_ties():
    confidence, wrong = np.array([0.9, 0.8, 0.8, 0.8, 0.6, 0.6]), np.array([0, 1, 0, 0, 1, 0])
    orders = [
        selective_risk_area(confidence[list(o)], wrong[list(o)]) for o in itertools.permutations(range(len(wrong)))
    ]
    p, labels = with_confidence(confidence, wrong)
    assert aurc_influence(p[None], labels)[0][0] == pytest.approx(np.mean(orders), abs=1e-12)
    rng = np.random.default_rng(0)
    confidence, wrong = 0.5 + rng.random(300) / 2, rng.random(300) < 0.3
    p, labels = with_confidence(confidence, wrong)
    assert aurc_influence(p[None], labels)[0][0] == pytest.approx(selective_risk_area(confidence, wrong), abs=1e-12)


@pytest.mark.parametrize("errors", [0, 1, 37, 200])
def test_a_perfect_order_has_the_closed_form_and_no_excess_and_the_opposite_one_the_most(errors):
    """Errors last: `sum_{k > n-e} (k - (n - e))/k / n`, in the limit `r + (1 - r) log(1 - r)`."""
    n = 200
    confidence = np.linspace(0.99, 0.51, n)
    p, labels = with_confidence(confidence, np.arange(n) >= n - errors)
    closed = sum((k - (n - errors)) / k for k in range(n - errors + 1, n + 1)) / n
    assert aurc_influence(p[None], labels)[0][0] == pytest.approx(closed, abs=1e-12)
    assert excess_aurc(p[None], labels)[0] == pytest.approx(0.0, abs=1e-12)
    r = errors / n
    assert closed == pytest.approx(r + (1 - r) * np.log(1 - r) if r < 1 else 1.0, abs=1 / n)
    worst, labels = with_confidence(confidence, np.arange(n) < errors)
    areas = aurc_influence(worst[None], labels)[0][0] - closed
    assert excess_aurc(worst[None], labels)[0] == pytest.approx(areas, abs=1e-12)
    assert areas > 0.1 or errors in (0, 1, n)


def test_the_influences_sum_to_zero_and_unlabelled_cases_have_none(make_problem):
    context = make_problem()
    values, influence = aurc_influence(context.probabilities, context.labels)
    np.testing.assert_allclose(influence.sum(axis=1), 0.0, atol=1e-12)
    assert (influence[:, ~context.known] == 0).all() and values.shape == (3,)


def test_draws_of_aurc_follow_the_brute_force_bootstrap(make_problem):
    """What is left out is of order 1/n: 1/sqrt(n) of a standard deviation, 1/12 with 147 patients, twice allowed.

    The exact draws lie off by a bias of the same order, which the interval takes away.
    """
    context = make_problem(draws=400)
    linear = METRICS.get("aurc")(context, MEMBERS)[""].draws
    exact = np.empty_like(linear)
    for draw in range(400):
        rows = rows_of(context, draw)
        exact[draw] = aurc_influence(context.probabilities[:, rows], context.labels[rows])[0]
    sd = exact.std(axis=0)
    off = linear - exact
    assert (np.abs(off.mean(axis=0)) < sd / 6).all()
    assert (off.std(axis=0) < sd / 6).all()
    np.testing.assert_allclose(linear.std(axis=0), sd, rtol=0.03)


def test_the_epistemic_share_is_all_where_sure_members_disagree_and_none_where_they_agree(make_context):
    first, second = (
        np.array([[1, 0], [0.7, 0.3], [1, 0], [0.9, 0.1]]),
        np.array([[0, 1], [0.7, 0.3], [1, 0], [0.5, 0.5]]),
    )
    share = epistemic_share(make_context(np.stack([first, second])))
    entropy = entr((first + second) / 2).sum(axis=1)
    within = entr(np.stack([first, second])).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(share.values, [1, 0, np.nan, 1 - within[3] / entropy[3]], atol=1e-12)
    np.testing.assert_allclose(share.weight, entropy / np.log(2), atol=1e-12)
    mean = make_context(np.stack([first, second])).bootstrap.mean(share.values, share.weight)
    assert mean.value == pytest.approx(1 - within.sum() / entropy.sum(), abs=1e-12)
    with pytest.raises(Undefined, match="1 of 2 accepted"):
        epistemic_share(make_context(first[None]))


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_are_given_for_the_part_and_for_views_of_its_cases(make_problem, name):
    function = METRICS.get(name)
    assert (function.info.level, function.info.direction, function.info.unit) == ("property", "lower", PROPERTIES[name])
    context = make_problem()
    found = function(context, MEMBERS)
    assert list(found) == ["", "/jpeg-3"]
    shifted = context.views["jpeg-3"]
    alone = function(make_problem(), MEMBERS)
    for suffix, problem in (("", context), ("/jpeg-3", shifted)):
        np.testing.assert_array_equal(found[suffix].draws, alone[suffix].draws)
        bare, problem.bootstrap, problem.views = problem.views, context.bootstrap, {}
        own = function(problem, MEMBERS)[""]
        problem.views = bare
        np.testing.assert_array_equal(own.values, found[suffix].values)
        np.testing.assert_array_equal(own.draws, found[suffix].draws)
    assert found[""].values.shape == (3,) and found[""].draws.shape == (60, 3)
    of_base = function(context, BASE)["/jpeg-3"]
    np.testing.assert_allclose(of_base.values, found["/jpeg-3"].values[:1], atol=1e-12)
    context.labels = np.full(450, -1)
    with pytest.raises(Undefined, match="no sample has a label"):
        function(context, MEMBERS)


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_order_of_cases_and_members_does_not_matter(make_problem, name):
    context, other = make_problem(), make_problem()
    other.views = {}
    rng = np.random.default_rng(1)
    members, cases = rng.permutation(3), rng.permutation(450)
    other.probabilities, other.labels = context.probabilities[members][:, cases], context.labels[cases]
    other.bootstrap.index = context.bootstrap.index[cases]
    result, moved = METRICS.get(name)(context, MEMBERS)[""], METRICS.get(name)(other, MEMBERS)[""]
    np.testing.assert_allclose(moved.values, result.values[members], atol=1e-12)
    np.testing.assert_allclose(moved.draws, result.draws[:, members], atol=1e-12)


def test_members_can_be_chosen_by_each_property_on_each_view(make_problem):
    found = select([make_problem(seed=0)], [make_problem(seed=5)], k=2, epsilon=1.0, names=list(PROPERTIES))
    assert list(found) == [name + suffix for name in PROPERTIES for suffix in ("", "/jpeg-3")]
    assert all(isinstance(selection, Selection) for selection in found.values())
