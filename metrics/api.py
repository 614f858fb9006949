"""What a metric sees and returns, and the registry of metrics.

A metric is one decorated function; what it is handed depends on its `level` (see `MetricInfo`). It returns values per
case [sample] (or a `CaseMean`, with weights), whose mean and interval over patients are taken for it, or a finished
`Estimate`, or a dict of these by the suffix of their score keys (`{"#sex=F": ...}`). Raising `Undefined` gives NaN with
that reason. It keeps no state: labels are scored side by side, in threads:

    @register_metric("flip_share", direction="neither", level="set", unit="share of members", citation="this file")
    def flip_share(context):
        \"\"\"Share of the members that decide another class than the base.\"\"\"
        return context.flip_counts / context.size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ..errors import Diverged
from ..registries import METRICS


@dataclass
class Predictions:
    """Logits of a model set and of its base on one view (`val`, `test`, or a shifted view).

    logits: float32 or float16 [member, sample, class] ([member, sample, label] if multi-label); base: likewise
    [sample, class], evaluated in the same call and strategy; labels: int64 [sample] or [sample, label] with -1 =
    missing; task: binary | multiclass | ordinal | multilabel; positive: index of the positive class of a binary task;
    patient: int64 codes [sample] or None (then every sample is its own patient); attributes: int64 codes, -1 unknown;
    failed: indices of members whose making failed: drawn, never accepted.
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
    failed: tuple[int, ...] = ()

    def take(self, rows: np.ndarray) -> Predictions:
        """Return the predictions on some samples, by their indices."""
        return replace(
            self,
            logits=self.logits[:, rows],
            base=self.base[rows],
            labels=self.labels[rows],
            patient=None if self.patient is None else self.patient[rows],
            ids=None if self.ids is None else self.ids[rows],
            attributes={name: codes[rows] for name, codes in self.attributes.items()},
        )


MIN_PATIENTS = 25
"""Patients that a group needs in the denominator of its rate to count, unless another number is declared."""

LOSSES = ("nll", "zero_one", "auroc", "balanced_accuracy", "brier")
"""Losses that may decide membership; AUROC and balanced accuracy enter as one minus."""


@dataclass(frozen=True)
class Settings:
    """What a suite declares beforehand about scoring; it belongs to the digest of the scores, not to a run's identity.

    epsilon: tolerance of membership in nats (additive, on val); epsilons: the tolerances at which acceptance is shown;
    k: the common number of members at which set metrics are compared; loss: nll | zero_one | auroc |
    balanced_accuracy | brier; draws: bootstrap draws over patients (0: no intervals); seed: their seed.
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


@dataclass(frozen=True)
class MetricInfo:
    """What is declared about a metric before anything is computed.

    direction: higher | lower (is better) | neither (no rank); unit: of the value; citation: the source.

    level: what the metric is a property of, which fixes what its function is called with:
    `model`: `f(context, probabilities)` with float64 [member, sample, class], recorded as `.base`, `.member_mean` and
    `.ensemble`; the value is the mean over the members handed in;
    `set`: `f(context)`, the accepted members (`context.probabilities`) and the base (`context.base`);
    with `at_k` `f(context, k)`, `k=None` for all members, recorded with and without `@k`;
    `membership`: `f(membership, epsilon)` returns who is accepted, bool [member], recorded for every tolerance;
    `criterion`: `f(context, probabilities)`, as for `model`, returns a `PerMember`, or a dict of these (or of
    `Undefined`) by suffix: what a user could choose a member by. It has a better direction, is handed to `selection`
    alone and stands in no record;
    `property`: `f(context, models)`, as a criterion, of what is no matter of the part's own predictions alone: it reads
    the networks `models` on shifted views, `models(context.views["jpeg-3"])`, or what else was measured of them,
    `models.evidence(context, "saliency")`. Reported and chosen by where it is asked for by name;
    `group`: the same as `criterion`, by attribute of the patients (suffix `#sex`), but reported, not chosen by: neither
    `selection` nor a record knows it, it is computed from committed predictions.

    needs: what must be there, in words; min_members: the least number of accepted members of a `set` metric.
    """

    name: str
    direction: str
    level: str
    unit: str
    citation: str
    needs: str = ""
    version: int = 1
    at_k: bool = False
    min_members: int = 1

    def __post_init__(self) -> None:
        per_member = self.level in ("criterion", "property", "group")
        directions = ("higher", "lower") if per_member else ("higher", "lower", "neither")
        for value, allowed in ((self.direction, directions), (self.level, LEVELS)):
            if value not in allowed:
                raise ValueError(f"metric '{self.name}': '{value}' is none of {', '.join(allowed)}")


class Metric(Protocol):
    """A registered metric: a function with its declaration."""

    info: MetricInfo

    def __call__(self, *args: Any) -> Any: ...


LEVELS = ("model", "set", "membership", "criterion", "property", "group")


@dataclass(frozen=True)
class PerMember:
    """A criterion, or a metric of level `group`, of every member.

    values: float64 [member]; draws: float64 [draw, member], on the draws of `context.bootstrap`, NaN where a draw
    leaves it undefined; groups: codes of the groups that it is taken over, if any: a choice made on one view and
    reported on another keeps the groups that both have.
    """

    values: np.ndarray
    draws: np.ndarray
    groups: tuple[int, ...] = ()


class Undefined(Exception):
    """A metric has no value here; the message is the reason that stands beside the NaN."""


class NonFinite(Diverged, ValueError):
    """Logits that are not finite; the message names member and sample."""


def register_metric(name: str, *, direction: str, level: str, unit: str, citation: str, **declared: Any) -> Callable:
    """Register the decorated function as metric `name` and attach what it declares as `function.info`.

    `declared`: the other fields of `MetricInfo`. Raises ValueError for an unknown direction or level, UserError when
    the name is taken.
    """
    info = MetricInfo(name, direction, level, unit, citation, **declared)

    def decorate(function: Callable) -> Callable:
        function.info = info  # type: ignore[attr-defined]
        return METRICS.register(name)(function)

    return decorate
