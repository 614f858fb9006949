"""The whole protocol: keys, controls, reasons of NaN, multi-label tasks, clusters, plug-ins, memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
from multiplicity_bench.errors import Diverged, UserError
from multiplicity_bench.metrics.api import METRICS, Settings, register_metric
from multiplicity_bench.metrics.capacity import capacity, subsets
from multiplicity_bench.metrics.context import sigmoid
from multiplicity_bench.metrics.evaluation import catalogue, evaluate, score_view
from multiplicity_bench.metrics.intervals import CaseMean
from sklearn.metrics import roc_auc_score

LOOSE = Settings(epsilon=10.0, draws=200)
MODEL = ("accuracy", "balanced_accuracy", "auroc", "nll", "brier", "ece")
AT_K = ("ambiguity", "discrepancy", "vpr", "capacity", "capacity_effective")
ALL_K = (*AT_K, "conflict", "disagreement", "score_sd", "mutual_information")
ACCEPTANCE = ("acceptance_rate", "acceptance_rate_certified", "acceptance_rate_possible")


def replaced(predictions, **fields):
    return dataclasses.replace(predictions, **fields)


@pytest.fixture
def pair(make_predictions):
    return make_predictions("val"), make_predictions("test")


def test_score_keys_are_those_of_the_protocol(pair):
    scores = evaluate(*pair, LOOSE).scores
    wanted = {f"{m}.{of}" for m in MODEL for of in ("base", "member_mean", "ensemble")}
    wanted |= {*ALL_K, *(f"{m}@5" for m in AT_K)}
    wanted |= {a + e for a in ACCEPTANCE for e in ("", "#epsilon=0.02", "#epsilon=0.05", "#epsilon=0.1")}
    assert set(scores) == wanted
    for key, score in scores.items():
        assert np.isfinite([score.value, score.low, score.high]).all(), key
        assert score.n == (8 if key.startswith("acceptance") else 120), key
        assert score.interval == ("Wilson" if key.startswith("acceptance") else "bootstrap over patients"), key
    shifted = score_view(pair[1], np.arange(8), LOOSE, ["ambiguity", "accuracy"], view="noise2")
    assert {"accuracy.base/noise2", "ambiguity/noise2", "ambiguity@5/noise2"} <= set(shifted)


def test_metrics_describe_themselves_without_computing():
    declared = catalogue()
    assert set(declared) >= {*MODEL, *ALL_K, *ACCEPTANCE}
    assert declared["nll"].direction == "lower" and declared["ambiguity"].direction == "neither"
    with pytest.raises(UserError, match="did you mean 'ambiguity'"):
        catalogue(["ambigity"])


def test_membership_is_decided_on_val_and_scores_are_of_test(make_predictions):
    val, test = make_predictions("val", members=20), make_predictions("test", members=20)
    settings = Settings(epsilon=0.05, draws=50)
    found = evaluate(val, test, settings)
    assert 5 <= len(found.accepted) < 20
    assert found.scores["acceptance_rate"].value == len(found.accepted) / 20
    assert found.scores["acceptance_rate"] == found.scores["acceptance_rate#epsilon=0.05"]
    only = evaluate(
        replaced(val, logits=val.logits[found.accepted]), replaced(test, logits=test.logits[found.accepted]), settings
    )
    for key in ("ambiguity", "capacity@5", "auroc.member_mean", "vpr@5"):
        assert only.scores[key] == found.scores[key]
    assert found.membership.accepted(0.05).sum() == len(found.accepted)


def test_failed_members_count_as_drawn_and_are_never_silent(pair):
    val, test = (replaced(p, failed=(3, 6)) for p in pair)
    found = evaluate(val, test, LOOSE)
    assert found.accepted.tolist() == [0, 1, 2, 4, 5, 7]
    for name in ACCEPTANCE:
        assert (found.scores[name].value, found.scores[name].n) == (6 / 8, 8), name
    assert found.warnings[0] == "2 of 8 members failed and count as drawn: 3, 6"
    rest = [0, 1, 2, 4, 5, 7]
    alone = evaluate(*(replaced(p, logits=p.logits[rest]) for p in pair), LOOSE)
    assert all(alone.scores[key] == score for key, score in found.scores.items() if "acceptance" not in key)


def test_failed_members_that_are_not_in_the_set_or_differ_between_views_are_refused(pair):
    val, test = pair
    with pytest.raises(ValueError, match=r"failed members on val are \[-1, 8\], not in 0..7"):
        evaluate(replaced(val, failed=(-1, 2, 8)), test)
    with pytest.raises(ValueError, match=r"failed members are \(1,\) on val, \(\) on test"):
        evaluate(replaced(val, failed=(1,)), test)


@pytest.mark.parametrize("classes", [2, 4, 11])
def test_identical_members_are_exactly_at_the_null(make_predictions, classes):
    def copies(p):
        return replaced(p, logits=np.repeat(p.base[None], 9, axis=0))

    val, test = (copies(make_predictions(v, samples=101, classes=classes)) for v in ("val", "test"))
    found = evaluate(val, test, Settings(epsilon=0.0, epsilons=(0.0,), draws=30))
    for key in (*ALL_K, *(f"{m}@5" for m in AT_K)):
        null = 1.0 if key.startswith("capacity_effective") else 0.0
        score = found.scores[key]
        assert (score.value, score.low, score.high) == (null, null, null), key
    for name in ACCEPTANCE:
        assert found.scores[name].value == 1.0
    for name in MODEL:
        base, mean, ensemble = (found.scores[f"{name}.{of}"].value for of in ("base", "member_mean", "ensemble"))
        assert base == mean == ensemble, name


def test_temperature_widens_scores_without_changing_a_decision(pair):
    heat = np.array([0.5, 0.7, 1.0, 1.5, 2.0, 3.0], np.float32)[:, None, None]
    val, test = (replaced(p, logits=heat * p.base) for p in pair)
    scores = evaluate(val, test, LOOSE).scores
    for key in ("ambiguity", "discrepancy@5", "conflict", "disagreement"):
        assert scores[key].value == 0
    for key in ("vpr", "vpr@5", "capacity", "score_sd", "mutual_information"):
        assert scores[key].value > 0.001


def test_too_few_members_give_reasons_not_numbers(pair):
    val, test = pair
    hopeless = replaced(val, logits=-5 * val.base[None] * np.ones((8, 1, 1), np.float32))
    none = evaluate(hopeless, test, Settings(draws=50)).scores
    for key in (*ALL_K, "accuracy.member_mean", "accuracy.ensemble"):
        assert np.isnan(none[key].value) and none[key].reason, key
    assert none["ambiguity@5"].reason == "0 of 5 accepted"
    assert none["acceptance_rate"].value == 0 and none["acceptance_rate"].low == 0
    assert np.isfinite(none["accuracy.base"].value)
    three = evaluate(replaced(val, logits=val.logits[:3]), replaced(test, logits=test.logits[:3]), LOOSE).scores
    assert three["vpr@5"].reason == "3 of 5 accepted" and np.isfinite(three["vpr"].value)
    one = evaluate(replaced(val, logits=val.logits[:1]), replaced(test, logits=test.logits[:1]), LOOSE).scores
    assert np.isnan(one["disagreement"].value) and one["disagreement"].reason == "1 of 2 accepted"
    assert one["capacity"].value == 0 and one["mutual_information"].value == 0 and one["conflict"].value > 0


def test_a_test_split_without_a_class_has_no_auroc(pair):
    val, test = pair
    scores = evaluate(val, replaced(test, labels=np.zeros_like(test.labels)), LOOSE).scores
    assert np.isnan(scores["auroc.base"].value) and scores["auroc.base"].reason == "class 1 has no sample"
    assert np.isfinite(scores["accuracy.base"].value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_name_member_and_sample(pair, bad):
    val, test = pair
    test.logits[3, 17, 1] = bad
    with pytest.raises(ValueError, match=f"test are not finite: member 3, sample 17 is {bad}") as error:
        evaluate(val, test)
    assert isinstance(error.value, Diverged)
    val.base[5, 0] = bad
    with pytest.raises(ValueError, match="val are not finite: the base, sample 5"):
        evaluate(val, test)


def test_shapes_that_do_not_fit_are_named(pair):
    val, test = pair
    for bad, words in (
        (replaced(test, labels=test.labels[:-1]), "labels on test"),
        (replaced(test, logits=test.logits[:, :-1]), "logits on test"),
        (replaced(test, patient=np.zeros(3, int)), "patient on test"),
        (replaced(test, labels=test.labels + 1), "labels on test lie in 1..2"),
        (replaced(test, logits=test.logits[:-1]), "8 members on val, 7 on test"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(val, bad)


def test_intervals_widen_when_patients_are_clusters(make_predictions):
    val, test = make_predictions("val"), make_predictions("test", samples=60)
    repeated = replaced(
        test,
        logits=np.repeat(test.logits, 6, axis=1),
        base=np.repeat(test.base, 6, axis=0),
        labels=np.repeat(test.labels, 6),
    )
    by_patient = evaluate(val, replaced(repeated, patient=np.repeat(np.arange(60), 6)), LOOSE).scores
    by_sample = evaluate(val, repeated, LOOSE).scores
    once = evaluate(val, test, LOOSE).scores
    for key in ("ambiguity", "nll.base", "auroc.member_mean", "discrepancy", "ece.base"):
        wide, narrow = (s[key].high - s[key].low for s in (by_patient, by_sample))
        assert wide > 1.5 * narrow, key
        assert wide == pytest.approx(once[key].high - once[key].low, rel=1e-6), key
        assert by_patient[key].value == pytest.approx(by_sample[key].value, abs=1e-12)


def test_multilabel_scores_equal_a_loop_over_labels(make_predictions):
    val, test = (
        make_predictions(v, classes=3, task="multilabel", patient=np.arange(120) // 2) for v in ("val", "test")
    )
    scores = evaluate(val, test, LOOSE).scores
    z, base, y = test.logits.astype(float), test.base.astype(float), test.labels
    flips = (z > 0) != (base > 0)
    p = 1 / (1 + np.exp(-z))
    chosen = subsets(8, 5, 0)
    loop = {name: [] for name in ("ambiguity", "discrepancy", "vpr", "auroc.base", "accuracy.base", "capacity@5")}
    for label in range(3):
        known = y[:, label] >= 0
        loop["ambiguity"].append(flips[:, :, label].any(axis=0).mean())
        loop["discrepancy"].append(flips[:, :, label].mean(axis=1).max())
        loop["vpr"].append(np.ptp(p[:, :, label], axis=0).mean())
        loop["auroc.base"].append(roc_auc_score(y[known, label], base[known, label]))
        loop["accuracy.base"].append(((base[known, label] > 0) == y[known, label]).mean())
        both = sigmoid(test.logits[:, :, label])
        loop["capacity@5"].append(np.mean([capacity(both[c]).mean() for c in chosen]))
    for key, values in loop.items():
        assert scores[key].value == pytest.approx(np.mean(values), abs=1e-9), key
    by_patient = flips.any(axis=2).reshape(8, 60, 2).any(axis=2)
    assert scores["ambiguity.any_label"].value == pytest.approx(by_patient.any(axis=0).mean())
    assert scores["ambiguity.any_label"].n == 60
    assert scores["ambiguity.any_label@5"].value < scores["ambiguity.any_label"].value


def test_a_label_without_positives_is_named(make_predictions):
    val, test = (make_predictions(v, classes=3, task="multilabel") for v in ("val", "test"))
    test.labels[:, 1] = np.minimum(test.labels[:, 1], 0)
    score = evaluate(val, test, LOOSE).scores["auroc.base"]
    assert np.isnan(score.value) and score.reason == "label 1: class 1 has no sample"


def test_without_draws_there_are_values_and_no_intervals(pair):
    with_, without = evaluate(*pair, LOOSE).scores, evaluate(*pair, replaced(LOOSE, draws=0)).scores
    for key, score in without.items():
        assert score.value == with_[key].value
        if not key.startswith("acceptance"):
            assert np.isnan(score.low) and score.interval == ""


def test_scores_are_reproducible_and_depend_on_the_seed(pair):
    assert evaluate(*pair, LOOSE).scores == evaluate(*pair, LOOSE).scores
    assert evaluate(*pair, replaced(LOOSE, seed=1)).scores["nll.base"] != evaluate(*pair, LOOSE).scores["nll.base"]


def test_a_metric_of_a_third_party_gets_the_same_interface(pair, monkeypatch):
    for name in ("_objects", "_origins"):
        monkeypatch.setattr(METRICS, name, dict(getattr(METRICS, name)))

    @register_metric("flip_share", direction="neither", level="set", unit="share of members", citation="a test")
    def flip_share(context):
        """Share of members that flip, and the same in one group."""
        values = context.flip_counts / context.size
        return {"": values, "#site=1": CaseMean(values, context.attributes["site"] == 1)}

    val, test = pair
    test = replaced(test, attributes={"site": np.arange(120) % 2})
    scores = evaluate(val, test, LOOSE).scores
    assert scores["flip_share"] == scores["conflict"]
    assert scores["flip_share#site=1"].n == 60
    with pytest.raises(UserError, match="registered twice"):
        register_metric("conflict", direction="neither", level="set", unit="", citation="")(flip_share)
    with pytest.raises(ValueError, match="'up' is none of"):
        register_metric("x", direction="up", level="set", unit="", citation="")


def test_metrics_import_no_torch():
    code = "import sys, multiplicity_bench.metrics.evaluation as e; e.catalogue(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "samples"), [(2, 10_000), (9, 1_000)])
def test_a_thousand_members_stay_under_two_gigabytes_above_the_data(classes, samples):
    """In a process of its own, whose peak memory is read before and after."""
    code = f"""
import resource, numpy as np
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.evaluation import evaluate
rng = np.random.default_rng(0)
labels = rng.integers({classes}, size={samples})
base = rng.standard_normal(({samples}, {classes}), dtype="f4")
logits = base + 0.1 * rng.standard_normal((1000, {samples}, {classes}), dtype="f4")
task = "binary" if {classes} == 2 else "multiclass"
test = Predictions(logits, base, labels, task, "test")
val = Predictions(logits[:, :500], base[:500], labels[:500], task, "val")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
found = evaluate(val, test, Settings(epsilon=10.0, draws=50))
assert len(found.accepted) == 1000
print(peak() - before)
"""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout) < 2.0
    assert time.perf_counter() - start < 120  # 6 s on one free core
