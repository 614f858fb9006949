"""What a metric sees and returns: predictions of a model set on one view of the data, and scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Predictions:
    """Logits of a model set and of its base on one view (`val`, `test`, or a shifted view).

    logits: float32 [member, sample, class] ([member, sample, label] if multi-label); base: float32 [sample, class],
    evaluated in the same call and strategy; labels: int64 [sample] or [sample, label] with -1 = missing;
    task: binary | multiclass | ordinal | multilabel; positive: index of the positive class of a binary task;
    patient: int64 codes [sample] or None (then every sample is its own patient); attributes: int64 codes, -1 unknown.
    """

    logits: np.ndarray
    base: np.ndarray
    labels: np.ndarray
    task: str
    view: str
    positive: int | None = None
    patient: np.ndarray | None = None
    ids: np.ndarray | None = None
    attributes: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What a suite declares beforehand about scoring; it belongs to the digest of the scores, not to a run's identity.

    epsilon: tolerance of membership in nats (additive, on val); epsilons: the tolerances at which acceptance is shown;
    k: the common number of members at which set metrics are compared; loss: nll | zero_one | auroc |
    balanced_accuracy | brier; draws: bootstrap draws over patients; seed: their seed.
    """

    epsilon: float = 0.05
    epsilons: tuple[float, ...] = (0.02, 0.05, 0.1)
    k: int = 5
    loss: str = "nll"
    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A value with its interval; NaN always comes with a reason, and is `null` in a record.

    interval: how low and high were made ("bootstrap over patients", "Wilson", "" for none); n: the number of units
    (patients, members) behind the value; version: that of the metric.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")
    interval: str = ""
    n: int = 0
    version: int = 1
    reason: str = ""
