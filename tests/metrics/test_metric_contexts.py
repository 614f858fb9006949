"""Problems that are worked on side by side and in blocks, and what is the same by a faster way."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
from multiplicity_bench.metrics import context as module
from multiplicity_bench.metrics.api import NonFinite, Settings
from multiplicity_bench.metrics.context import check_finite, contexts, over_contexts, sigmoid, softmax, votes
from multiplicity_bench.metrics.evaluation import evaluate
from multiplicity_bench.metrics.information import divergences
from multiplicity_bench.metrics.intervals import PatientBootstrap
from multiplicity_bench.metrics.membership import membership
from multiplicity_bench.metrics.performance import aurocs
from multiplicity_bench.metrics.scores import mutual_information, score_range, score_sd
from scipy.special import rel_entr
from sklearn.metrics import roc_auc_score


@pytest.fixture
def multilabel(make_predictions):
    """Val and test of four labels, some of which are missing, logits in halves."""
    patient = np.arange(150) // 2

    def make(view):
        p = make_predictions(view, samples=150, classes=4, task="multilabel", patient=patient)
        return replace(p, logits=p.logits.astype(np.float16), base=p.base.astype(np.float16))

    return make("val"), make("test")


def scores_of(pair, **settings):
    found = evaluate(*pair, Settings(epsilon=1.0, **settings))
    return {key: str(asdict(score)) for key, score in found.scores.items()}


@pytest.mark.parametrize("draws", [0, 30])
def test_scores_are_the_same_bit_by_bit_on_one_core_and_on_several(multilabel, monkeypatch, draws):
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(module, "usable_processors", lambda cores=cores: cores)
        found.append(scores_of(multilabel, draws=draws))
    assert found[0] == found[1] and len(found[0]) > 40


@pytest.mark.parametrize("loss", ["nll", "auroc"])
def test_membership_is_the_same_bit_by_bit_on_one_core_and_on_several(multilabel, monkeypatch, loss):
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(module, "usable_processors", lambda cores=cores: cores)
        found.append(membership(multilabel[0], Settings(loss=loss)))
    for name in ("base", "difference", "se", "low", "high"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


def threads_of(predictions, monkeypatch, cores):
    monkeypatch.setattr(module, "usable_processors", lambda: cores)
    together = threading.Barrier(cores, timeout=20)

    def work(context):
        if threading.current_thread() is not threading.main_thread():
            together.wait()  # is passed by as many threads only as wait at once
        return threading.get_ident(), context.labels

    bootstrap = PatientBootstrap(len(predictions.base), predictions.patient, 0, 0)
    found = list(over_contexts(work, predictions, np.arange(3), bootstrap, 0))
    for label, (_, labels) in enumerate(found):
        np.testing.assert_array_equal(labels, predictions.labels[:, label])
    return {thread for thread, _ in found}


def test_labels_are_worked_on_at_once_and_come_in_their_order(multilabel, monkeypatch):
    assert len(threads_of(multilabel[1], monkeypatch, 2)) == 2


def test_labels_are_worked_on_one_by_one_where_memory_allows_no_more(multilabel, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 2 * 8 * 3 * 150)
    assert threads_of(multilabel[1], monkeypatch, 2) == {threading.get_ident()}


def test_an_error_in_one_label_is_raised(multilabel, monkeypatch):
    monkeypatch.setattr(module, "usable_processors", lambda: 2)

    def work(context):
        raise ArithmeticError(str(int(context.labels.sum())))

    bootstrap = PatientBootstrap(150, None, 0, 0)
    with pytest.raises(ArithmeticError, match=f"^{multilabel[1].labels[:, 0].sum()}$"):
        list(over_contexts(work, multilabel[1], np.arange(3), bootstrap, 0))


def test_the_sigmoid_is_the_softmax_of_zero_and_the_logit_bit_by_bit():
    z = np.concatenate([np.random.default_rng(0).normal(0, 20, 5000), [0.0, -0.0, 1e-300, 700.0, -745.0, 1e4, -1e4]])
    for logits in (z, z.astype(np.float32), z.astype(np.float16)):
        np.testing.assert_array_equal(sigmoid(logits), softmax(np.stack([np.zeros_like(logits), logits], axis=-1)))


def test_every_class_is_contiguous_in_memory(make_predictions):
    p = make_predictions(classes=3)
    for probabilities in (softmax(p.logits), softmax(p.logits, np.array([2, 0])), sigmoid(p.logits[..., 0])):
        assert all(probabilities[..., c].flags.c_contiguous for c in range(probabilities.shape[-1]))


def test_votes_of_more_members_than_a_byte_counts_are_exact():
    decisions = np.random.default_rng(0).integers(3, size=(700, 20))
    decisions[:, 0] = 2
    found = votes(decisions, 3)
    np.testing.assert_array_equal(found, [[(decisions[:, i] == c).sum() for c in range(3)] for i in range(20)])
    assert found[0].tolist() == [0, 0, 700]


HALVES = {
    "usual": lambda rng: rng.normal(0, 2, (3, 200)),
    "ties": lambda rng: np.round(rng.normal(size=(3, 200))),
    "confident": lambda rng: rng.normal(0, 150, (3, 200)),
    "beyond float64": lambda rng: rng.normal(0, 600, (3, 200)),
    "about zero": lambda rng: rng.integers(-3, 4, (3, 200)) * rng.choice([0.0, 6e-8, 1e-4], (3, 200)),
}


@pytest.mark.parametrize("kind", HALVES)
def test_halves_rank_as_their_odds_do(make_predictions, kind):
    p = make_predictions(members=3, samples=200, classes=2, task="multilabel")
    logits = HALVES[kind](np.random.default_rng(1)).astype(np.float16)
    p = replace(p, logits=np.stack([logits, logits], axis=-1), labels=np.where(p.base > 0.5, 1, p.labels))
    context = next(contexts(p, np.arange(3), PatientBootstrap(200, None, 40, 0), 0))
    assert context.halves is not None
    general = replace(context)  # has none
    for found, wanted in zip(aurocs(context, context.probabilities), aurocs(general, general.probabilities)):
        np.testing.assert_array_equal(found, wanted)
    if kind == "beyond float64":  # whose probabilities of 0 tie
        return
    truth = [roc_auc_score(context.labels[context.known], z[context.known]) for z in logits]
    np.testing.assert_allclose(aurocs(context, context.probabilities)[0], truth, rtol=1e-12)


def test_other_members_in_a_context_are_not_ranked_by_the_halves_of_its_own(multilabel):
    context = next(contexts(multilabel[1], np.arange(8), PatientBootstrap(150, None, 0, 0), 0))
    other = replace(context, probabilities=context.probabilities[::-1])
    (own, _), (turned, _) = aurocs(context, context.probabilities), aurocs(other, other.probabilities)
    np.testing.assert_array_equal(turned, own[::-1])
    assert len(np.unique(own)) == 8
    np.testing.assert_array_equal(aurocs(context, context.probabilities[3:5])[0], own[3:5])


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_aurocs_are_the_same_whichever_class_has_fewer_samples(make_context, share):
    rng = np.random.default_rng(2)
    scores = np.round(rng.random((4, 150)), 1)
    labels = (rng.random(150) < share).astype(np.int64)
    context = make_context(np.stack([1 - scores, scores], -1), labels=labels, draws=20)
    values, draws = aurocs(context, context.probabilities)
    without_draws = aurocs(make_context(context.probabilities, labels=labels), context.probabilities)[0]
    np.testing.assert_array_equal(values, without_draws)
    for m, score in enumerate(scores):
        assert values[m] == pytest.approx(roc_auc_score(labels, score), abs=1e-12)
        rows = np.repeat(np.arange(150), context.bootstrap.counts[7])
        assert draws[7, m] == pytest.approx(roc_auc_score(labels[rows], score[rows]), abs=1e-12)


def test_blocks_of_samples_change_nothing(monkeypatch):
    p = softmax(np.random.default_rng(3).normal(size=(6, 50, 2)))
    whole = [score_range(p[..., 1], 3), score_sd(p[..., 1]), score_sd(p[..., 1], ddof=1), mutual_information(p)]
    monkeypatch.setattr(module, "_BLOCK", 40)
    parts = [score_range(p[..., 1], 3), score_sd(p[..., 1]), score_sd(p[..., 1], ddof=1), mutual_information(p)]
    np.testing.assert_allclose(parts, whole, rtol=1e-13)
    np.testing.assert_allclose(parts[2], np.std(p[..., 1], axis=0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("order", ["samples last", "classes last", "mixed"])
def test_divergences_do_not_depend_on_how_numbers_lie_in_memory(order):
    rng = np.random.default_rng(4)
    p, q = rng.dirichlet([0.2] * 3, (5, 40)), rng.dirichlet([1.0] * 3, (5, 40))
    p[0, 0], q[0, 0], p[1, 1] = [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]

    def classes_first(a):
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -1, 0)), 0, -1)

    laid = {
        "samples last": (classes_first(p), classes_first(q)),
        "classes last": (p, q),
        "mixed": (classes_first(p), q),
    }
    truth = rel_entr(p, q).sum(axis=-1)
    np.testing.assert_allclose(divergences(*laid[order]), truth, rtol=1e-12, atol=1e-15)
    assert divergences(*laid[order])[0, 0] == 0.0 and (truth > 1).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_halves_that_are_not_finite_are_named(multilabel, bad):
    _, test = multilabel
    test.logits[:] = np.finfo(np.float16).max
    check_finite(test)
    test.logits[2, 9, 1] = bad
    with pytest.raises(NonFinite, match=f"member 2, sample 9 is {bad}"):
        check_finite(test)
