"""Predictions as they are committed: rounded to float16 without a changed decision, small, and failed members named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from multiplicity_bench.leaderboard.check import LIMIT
from multiplicity_bench.leaderboard.predictions import (
    arrays_predictions,
    load_predictions,
    predictions_arrays,
    save_predictions,
)
from multiplicity_bench.metrics.api import NonFinite, Predictions, Settings
from multiplicity_bench.metrics.context import softmax
from multiplicity_bench.metrics.evaluation import evaluate

LOOSE = Settings(epsilon=100.0, draws=20, k=2)


def views(task: str = "multiclass", classes: int = 3, members: int = 4, samples: int = 60, noise: float = 0.5):
    """Return random predictions on val and test; a large offset, which softmax does not see, on single-label ones."""
    rng = np.random.default_rng(classes)

    def view(name: str) -> Predictions:
        labels = rng.integers(0, 2, (samples, classes)) if task == "multilabel" else rng.integers(0, classes, samples)
        base = 2 * rng.normal(size=(samples, classes)) + (0 if task == "multilabel" else 40)
        logits = base + noise * rng.normal(size=(members, samples, classes))
        return Predictions(logits.astype(np.float32), base.astype(np.float32), labels, task, name)

    return view("val"), view("test")


def rounded(val: Predictions, test: Predictions) -> tuple[Predictions, Predictions]:
    return arrays_predictions(predictions_arrays(val, test), val.task, val.positive)


@pytest.mark.parametrize("classes", [2, 3, 11])
def test_rounding_keeps_decisions_and_three_digits_of_every_distance_to_the_top(classes):
    pair = views(classes=classes)
    for original, half in zip(pair, rounded(*pair)):
        assert half.logits.dtype == half.base.dtype == np.float16
        for exact, found in ((original.logits, half.logits), (original.base, half.base)):
            exact, found = exact.astype(np.float64), found.astype(np.float64)
            np.testing.assert_array_equal(found.argmax(-1), exact.argmax(-1))
            assert (found.max(-1) == 0).all()
            # 11 significant bits, and steps of 6e-8 below 6e-5
            np.testing.assert_allclose(found, exact - exact.max(-1, keepdims=True), rtol=2**-11, atol=3e-8)
            # dp = p (1 - p) dz, and p (1 - p) |z| <= .23 for two classes
            np.testing.assert_allclose(softmax(found), softmax(exact), atol=2 * 0.23 * 2**-11)


def test_multilabel_logits_are_rounded_and_not_shifted():
    pair = views("multilabel")
    for original, half in zip(pair, rounded(*pair)):
        np.testing.assert_array_equal(half.logits, original.logits.astype(np.float16))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_finite_logits_beyond_float16_stay_finite(task):
    val, test = views(task)
    test.logits[1, 2] = [3e38, -3e38, 1e6]
    half = rounded(val, test)[1]
    wanted = [65504, -65504, 65504] if task == "multilabel" else [0, -65504, -65504]
    assert half.logits[1, 2].tolist() == wanted
    assert evaluate(*rounded(val, test), LOOSE).scores["accuracy.member_mean"].value > 0


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_still_named(task, bad):
    val, test = views(task)
    test.logits[3, 17, 1] = bad
    with pytest.raises(NonFinite, match=f"test are not finite: member 3, sample 17 is {bad}"):
        evaluate(*rounded(val, test))
    val.base[5, 0] = bad
    with pytest.raises(NonFinite, match=f"val are not finite: the base, sample 5 is {bad}"):
        evaluate(*rounded(val, test))


@pytest.mark.parametrize(("task", "classes"), [("binary", 2), ("multiclass", 5), ("multilabel", 3)])
def test_rounded_predictions_are_scored_in_double_precision(task, classes):
    half = rounded(*views(task, classes))
    double = [replace(p, logits=p.logits.astype(np.float64), base=p.base.astype(np.float64)) for p in half]
    found, wanted = evaluate(*half, LOOSE), evaluate(*double, LOOSE)
    assert found.scores == wanted.scores
    np.testing.assert_array_equal(found.membership.difference, wanted.membership.difference)


@pytest.mark.parametrize("classes", [2, 11])
def test_copies_of_the_base_stay_exactly_at_the_null(classes):
    scores = evaluate(*rounded(*views(classes=classes, noise=0.0)), replace(LOOSE, epsilon=0.0)).scores
    for name in ("ambiguity", "discrepancy", "conflict", "disagreement", "vpr", "score_sd", "capacity"):
        assert scores[name].value == 0, name
    assert scores["acceptance_rate_certified"].value == 1
    assert scores["nll.base"].value == scores["nll.member_mean"].value == scores["nll.ensemble"].value


def test_rounding_again_changes_nothing():
    once = predictions_arrays(*views())
    again = predictions_arrays(*arrays_predictions(once, "multiclass", None))
    assert once.keys() == again.keys() and all(np.array_equal(once[name], again[name]) for name in once)


def test_a_board_of_sixteen_rows_of_fifty_members_and_five_bases_fits_its_limit(tmp_path):
    val, test = views("binary", 2, members=50, samples=500)  # 1,000 cases in all
    save_predictions(tmp_path / "a.npz", predictions_arrays(val, test))
    assert 16 * 5 * (tmp_path / "a.npz").stat().st_size < LIMIT


def test_failed_members_come_back_from_a_file_and_their_absence_changes_no_file(tmp_path):
    val, test = views()
    assert "failed" not in predictions_arrays(val, test)
    arrays = predictions_arrays(replace(val, failed=(1, 3)), replace(test, failed=(1, 3)))
    assert arrays["failed"].dtype == np.int64
    save_predictions(tmp_path / "a.npz", arrays)
    loaded = load_predictions(tmp_path / "a.npz", "multiclass")
    assert [p.failed for p in loaded] == [(1, 3)] * 2
    assert evaluate(*loaded, LOOSE).accepted.tolist() == [0, 2]
