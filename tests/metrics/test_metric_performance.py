"""Performance of single models against scikit-learn, weighted forms against explicit resampling."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import METRICS, Undefined
from multiplicity_bench.metrics.context import softmax
from multiplicity_bench.metrics.intervals import CaseMean, Estimate
from multiplicity_bench.metrics.performance import aurocs, brier_scores, calibration_errors, log_losses
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, log_loss, roc_auc_score


def problem(make_context, classes, samples=90, members=4, draws=0, patient=None, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    logits = rng.normal(size=(members, samples, classes))
    logits[:, np.arange(samples), labels] += 1.0
    logits -= logits[..., :1]
    logits = np.round(logits, 1)  # so that scores tie, two classes' in whatever way they are ranked
    return make_context(softmax(logits), None, labels, patient, draws, seed)


def value(result, context):
    if isinstance(result, CaseMean):
        (result,) = context.bootstrap.means([result])
    assert isinstance(result, Estimate)
    return result.value


def l1_calibration(p, y, weight, bins=15):
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    total = 0.0
    for j in range(bins):
        here = (confidence > j / bins) & (confidence <= (j + 1) / bins)
        total += abs((weight * (right - confidence))[here].sum())
    return total / weight.sum()


@pytest.mark.parametrize("classes", [2, 5])
def test_values_equal_scikit_learn(make_context, classes):
    context = problem(make_context, classes)
    p, y = context.probabilities[0], context.labels
    scores = p[:, 1] if classes == 2 else p
    brier = brier_score_loss(y, scores) if classes == 2 else ((p - np.eye(classes)[y]) ** 2).sum(axis=1).mean()
    truth = {
        "accuracy": (p.argmax(axis=1) == y).mean(),
        "balanced_accuracy": balanced_accuracy_score(y, p.argmax(axis=1)),
        "auroc": roc_auc_score(y, scores, multi_class="ovr"),
        "nll": log_loss(y, p),
        "brier": brier,
        "ece": l1_calibration(p, y, np.ones(len(y))),
    }
    for name, wanted in truth.items():
        assert value(METRICS.get(name)(context, p[None]), context) == pytest.approx(wanted, abs=1e-12), name


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "auroc", "nll", "brier", "ece"])
def test_several_models_give_the_mean_of_their_values(make_context, name):
    context = problem(make_context, 3)
    f = METRICS.get(name)
    each = [value(f(context, p[None]), context) for p in context.probabilities]
    assert value(f(context, context.probabilities), context) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_draws_equal_explicit_resampling_of_patients(make_context, classes):
    patient = np.random.default_rng(1).integers(40, size=90) * 7
    context = problem(make_context, classes, draws=100, patient=patient)
    b, y = context.bootstrap, context.labels
    _, areas = aurocs(context, context.probabilities)
    _, calibration = calibration_errors(context, context.probabilities)
    balanced = METRICS.get("balanced_accuracy")(context, context.probabilities[:1])
    (nll,) = b.means([CaseMean(log_losses(context.probabilities[0], y))])
    for draw in (0, 63, 64, 99):
        rows = np.repeat(np.arange(90), b.counts[draw][b.index])
        for m in (0, 3):
            p = context.probabilities[m][rows]
            scores = p[:, 1] if classes == 2 else p
            assert areas[draw, m] == pytest.approx(roc_auc_score(y[rows], scores, multi_class="ovr"), abs=1e-6)
            assert calibration[draw, m] == pytest.approx(l1_calibration(p, y[rows], np.ones(len(rows))), abs=1e-9)
        p = context.probabilities[0][rows]
        assert balanced.draws[draw] == pytest.approx(balanced_accuracy_score(y[rows], p.argmax(axis=1)), abs=1e-9)
        assert nll.draws[draw] == pytest.approx(log_loss(y[rows], p, labels=range(classes)), abs=1e-9)


def test_samples_without_a_label_are_left_out(make_context):
    whole = problem(make_context, 2)
    keep = np.random.default_rng(0).random(90) < 0.7
    part = make_context(whole.probabilities[:, keep], None, whole.labels[keep])
    masked = make_context(whole.probabilities, None, np.where(keep, whole.labels, -1))
    for name in ("accuracy", "balanced_accuracy", "auroc", "nll", "brier", "ece"):
        f = METRICS.get(name)
        assert value(f(masked, masked.probabilities), masked) == pytest.approx(
            value(f(part, part.probabilities), part), abs=1e-12
        ), name


@pytest.mark.parametrize("name", ["auroc", "balanced_accuracy"])
def test_a_class_without_samples_is_undefined_with_its_name(make_context, name):
    context = problem(make_context, 3)
    context.labels = np.minimum(context.labels, 1)
    with pytest.raises(Undefined, match="class 2 has no sample"):
        METRICS.get(name)(context, context.probabilities)


def test_log_loss_of_an_impossible_class_stays_finite():
    loss = log_losses(np.array([[1.0, 0.0]]), np.array([1]))
    assert 708 < loss[0] < 709


def test_confident_scores_that_round_to_one_are_still_ranked(make_context):
    logits = np.array([40.0, 45.0, 50.0, 55.0])
    p = softmax(np.stack([np.zeros(4), logits], axis=-1))
    context = make_context(p[None], None, [0, 0, 1, 1])
    assert len(np.unique(p[:, 1])) == 1
    assert aurocs(context, p[None])[0][0] == 1.0


def test_brier_of_more_classes_sums_over_them():
    p = np.array([[0.2, 0.3, 0.5]])
    assert brier_scores(p, np.array([2]))[0] == pytest.approx(0.04 + 0.09 + 0.25)
