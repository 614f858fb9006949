"""What scoring costs: all point values of a large multi-label set, beside a plain loop with scikit-learn, and draws."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..metrics.api import Predictions, Settings
from ..metrics.evaluation import catalogue, evaluate
from .memory import PeakMemory
from .timing import CPU, as_row, compare, timed

MEMBERS, CASES, LABELS = 1000, 22_000, 14
VAL = 2000
"""Cases of val, in which membership is decided."""

FEW, PAIRED = 3, 10
"""Members whose scores the loop is timed on, and those whose pairs it compares."""

DRAWN, DRAWS = 100, 200
"""Members and draws of the intervals."""


def metrics_1000x22000() -> dict[str, Any]:
    """Time all point values of 1,000 members on 22,000 cases of 14 labels (2,000 on val) against a plain loop.

    The loop takes a subset of the scores: per member and label AUROC, average precision, log-loss and Brier score of
    scikit-learn, per pair of members the disagreement on every label. It is timed on 3 members and on the 45 pairs of
    10, and both parts are scaled up, to 1,000 members and to 499,500 pairs. Either is timed twice, ours after a warm-up
    on few members, for it takes long; logits are float16.
    """
    val, test = _set(MEMBERS)
    settings = Settings(epsilon=10.0, draws=0)
    evaluate(_first(val, FEW), _first(test, FEW), settings)
    memory, before = PeakMemory(CPU), time.process_time()
    ours = [timed(lambda: evaluate(val, test, settings)) for _ in range(2)]
    peak, processor = memory.peak(), (time.process_time() - before) / len(ours)
    of_members = [timed(lambda: _scores_by_scikit_learn(test, FEW)) for _ in range(2)]
    of_pairs = [timed(lambda: _disagreement_by_pairs(test, PAIRED)) for _ in range(2)]
    scored = [MEMBERS / FEW * seconds for seconds in of_members]
    compared = [MEMBERS * (MEMBERS - 1) / (PAIRED * (PAIRED - 1)) * seconds for seconds in of_pairs]
    row = as_row("metrics_1000x22000", ours, [sum(parts) for parts in zip(scored, compared)])
    size = "memory not measured" if peak is None else f"{peak / 2**30:.2f} GiB above the predictions"
    values = sum(info.level != "membership" for info in catalogue().values())
    return row | {
        "text": f"{values} metrics in {row['ours_s']:.0f} s ({processor:.0f} s of processor time), {size}; the loop's "
        f"four scores would take {np.mean(scored):.0f} s, its pairs {np.mean(compared):.0f} s"
    }


def intervals_200_draws() -> tuple[str, str]:
    """Return how long the intervals of 100 members take beside their point values."""
    val, test = _set(DRAWN)
    evaluate(_first(val, FEW), _first(test, FEW), Settings(epsilon=10.0, draws=2))
    values, both = (timed(partial(evaluate, val, test, Settings(epsilon=10.0, draws=n))) for n in (0, DRAWS))
    return (
        f"scores of {DRAWN} members on {CASES:,} cases of {LABELS} labels",
        f"{values:.1f} s, with intervals from {DRAWS} draws {both:.0f} s",
    )


def metrics_by_members() -> list[dict[str, Any]]:
    """Time all point values of one label on 1,000 cases against the same loop (every pair), by number of members."""
    return [_by("metrics_by_members", members, 1000, "members", members) for members in (1, 4, 16, 64, 256)]


def metrics_by_images() -> list[dict[str, Any]]:
    """Time all point values of one label and 10 members against the same loop, by number of cases."""
    return [_by("metrics_by_images", 10, cases, "images", cases) for cases in (1_000, 10_000, 100_000)]


MEASURES = (metrics_1000x22000, metrics_by_members, metrics_by_images)
FIGURES = (intervals_200_draws,)


def _by(name: str, members: int, cases: int, by: str, size: int) -> dict[str, Any]:
    val, test = _view("val", members, VAL, 1), _view("test", members, cases, 1)
    settings = Settings(epsilon=10.0, draws=0)

    def loop() -> None:
        _scores_by_scikit_learn(test, members)
        _disagreement_by_pairs(test, members)

    return compare(name, CPU, partial(evaluate, val, test, settings), loop) | {"by": by, "size": size}


def _set(members: int) -> tuple[Predictions, Predictions]:
    """Return made-up predictions on val and test: one label in ten is there, two cases are one patient's."""
    return _view("val", members, VAL, LABELS), _view("test", members, CASES, LABELS)


def _view(name: str, members: int, cases: int, count: int) -> Predictions:
    rng = np.random.default_rng(cases)
    labels = (rng.random((cases, count)) < 0.1).astype(np.int64)
    base = (rng.normal(size=(cases, count)) + 3 * labels - 2).astype(np.float16)
    logits = np.empty((members, cases, count), np.float16)
    for of_member in logits:
        of_member[:] = base + 0.4 * rng.standard_normal((cases, count), np.float32)
    return Predictions(logits, base, labels, "multilabel", name, patient=np.arange(cases) // 2)


def _first(predictions: Predictions, members: int) -> Predictions:
    return replace(predictions, logits=predictions.logits[:members])


def _scores_by_scikit_learn(test: Predictions, members: int) -> np.ndarray:
    """Return four scores [score, member, label] as one would ask for them."""
    from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

    out = np.empty((4, members, test.labels.shape[1]))
    for m in range(members):
        probabilities = 1 / (1 + np.exp(-test.logits[m].astype(np.float64)))
        for label in range(test.labels.shape[1]):
            y, p = test.labels[:, label], probabilities[:, label]
            scores = (f(y, p) for f in (roc_auc_score, average_precision_score, log_loss, brier_score_loss))
            out[:, m, label] = list(scores)
    return out


def _disagreement_by_pairs(test: Predictions, members: int) -> np.ndarray:
    """Return the share of cases that two members decide differently, [pair, label]."""
    decisions = test.logits[:members] > 0
    return np.array([(decisions[a] != decisions[b]).mean(axis=0) for a in range(members) for b in range(a)])
