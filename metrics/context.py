"""One binary or multi-class problem on one view: what every metric is computed from, each array made once, on demand.

A multi-label task is one such problem per label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .api import MIN_PATIENTS as MIN_PATIENTS
from .api import NonFinite, Predictions, Undefined
from .intervals import PatientBootstrap

_BLOCK = 1 << 21  # numbers that are worked on at once


@dataclass(frozen=True)
class Evidence:
    """What was measured of every network beside its predictions: members [member, ...] (accepted ones), base [...]."""

    members: np.ndarray
    base: np.ndarray


@dataclass(frozen=True)
class Models:
    """Which networks of a set are asked about: rows are indices of accepted members, -1 the base; None: all members."""

    rows: tuple[int, ...] | None = None

    def __call__(self, context: Context) -> np.ndarray:
        """Return their probabilities in a context, float64 [model, sample, class]."""
        return self._pick(context.probabilities, context.base)

    def evidence(self, context: Context, name: str) -> np.ndarray:
        """Return what is stored of them under a name, [model, ...]; Undefined where nothing is."""
        if name not in context.evidence:
            raise Undefined(f"{name} was not measured")
        return self._pick(context.evidence[name].members, context.evidence[name].base)

    def _pick(self, members: np.ndarray, base: np.ndarray) -> np.ndarray:
        if self.rows is None:
            return members
        return np.stack([base if row < 0 else members[row] for row in self.rows])


MEMBERS, BASE = Models(), Models((-1,))


@dataclass
class Context:
    """The accepted members, the base and the labels of one problem.

    probabilities: float64 [member, sample, class] of the K accepted members; base: float64 [sample, class];
    labels: int64 [sample], -1 = missing; positive: the positive class of a two-class problem; attributes: codes
    [sample], -1 unknown; seed: for the k-subsets; min_patients: that a group needs in the denominator of its rate;
    views: the same members on shifted views of the part, by name; evidence: what else was stored, by name.
    """

    probabilities: np.ndarray
    base: np.ndarray
    labels: np.ndarray
    bootstrap: PatientBootstrap
    positive: int = 1
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0
    min_patients: int = MIN_PATIENTS
    views: dict[str, Context] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    _made: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what `make` returned the first time it was asked for under this key: metrics share what is costly."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def size(self) -> int:
        """K, the number of accepted members."""
        return len(self.probabilities)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.base.shape[-1]

    @cached_property
    def known(self) -> np.ndarray:
        """Which samples have a label, bool [sample]."""
        return self.labels >= 0

    @cached_property
    def decisions(self) -> np.ndarray:
        """The members' classes [member, sample]: argmax, ties to the lowest index."""
        return decide(self.probabilities)

    @cached_property
    def base_decisions(self) -> np.ndarray:
        """The base's classes [sample]."""
        return decide(self.base)

    @cached_property
    def flips(self) -> np.ndarray:
        """Whether a member decides otherwise than the base, bool [member, sample]."""
        return self.decisions != self.base_decisions

    @cached_property
    def flip_counts(self) -> np.ndarray:
        """How many members decide otherwise than the base, [sample]."""
        return self.flips.sum(axis=0)

    @cached_property
    def ensemble(self) -> np.ndarray:
        """The mean of the members' probabilities [sample, class], exact when all members agree."""
        return member_mean(self.probabilities)

    @cached_property
    def scored_class(self) -> np.ndarray:
        """The class whose score is followed [sample]: the true one; of two classes the positive one (same spread)."""
        if self.classes == 2:
            return np.full(len(self.labels), self.positive)
        return self.labels

    @cached_property
    def scores(self) -> np.ndarray:
        """The members' scores of `scored_class` [member, sample]; arbitrary where the label is missing."""
        return class_scores(self.probabilities, self.scored_class)

    @cached_property
    def scored(self) -> np.ndarray | None:
        """Weights of the samples whose `scored_class` is known; None when that is all."""
        return None if (self.scored_class >= 0).all() else (self.scored_class >= 0).astype(np.float64)


def contexts(
    predictions: Predictions,
    members: np.ndarray,
    bootstrap: PatientBootstrap,
    seed: int,
    min_patients: int = MIN_PATIENTS,
) -> Iterator[Context]:
    """Yield the problem of `predictions` for the chosen members; one two-class problem per label if multi-label."""
    p = predictions
    if p.task != "multilabel":
        positive = 1 if p.positive is None else p.positive
        chosen, base = softmax(p.logits, members), softmax(p.base)
        yield Context(chosen, base, p.labels, bootstrap, positive, p.attributes, seed, min_patients)
        return
    for label in range(p.base.shape[-1]):
        chosen, base = sigmoid(p.logits[..., label], members), sigmoid(p.base[..., label])
        yield Context(chosen, base, p.labels[:, label], bootstrap, 1, p.attributes, seed, min_patients)


def softmax(logits: np.ndarray, members: np.ndarray | None = None) -> np.ndarray:
    """Return float64 probabilities of logits [..., class], of the chosen members only when given."""
    if members is None:
        return _softmax(logits)
    out = np.empty((len(members), *logits.shape[1:]))
    step = max(1, _BLOCK // max(1, logits[0].size))
    for start in range(0, len(members), step):
        out[start : start + step] = _softmax(logits[members[start : start + step]])
    return out


def sigmoid(logits: np.ndarray, members: np.ndarray | None = None) -> np.ndarray:
    """Return float64 probabilities [..., 2] of the absence and presence of a label from its logits [...]."""
    if members is None:
        return _softmax(np.stack([np.zeros_like(logits), logits], axis=-1))
    out = np.empty((len(members), *logits.shape[1:], 2))
    step = max(1, _BLOCK // max(1, 2 * logits[0].size))
    for start in range(0, len(members), step):
        out[start : start + step] = sigmoid(logits[members[start : start + step]])
    return out


def _softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64)
    top = z[..., 0].copy()
    for c in range(1, z.shape[-1]):  # reductions over a short last axis are slow in numpy
        np.maximum(top, z[..., c], out=top)
    z -= top[..., None]
    np.exp(z, out=z)
    total = z[..., 0].copy()
    for c in range(1, z.shape[-1]):
        total += z[..., c]
    z /= total[..., None]
    return z


def decide(probabilities: np.ndarray) -> np.ndarray:
    """Return the class of largest probability, [..., class] -> int [...]; ties go to the lowest index."""
    best = probabilities[..., 0].copy()
    out = np.zeros(best.shape, np.int16)
    for c in range(1, probabilities.shape[-1]):
        higher = probabilities[..., c] > best
        out[higher] = c
        np.maximum(best, probabilities[..., c], out=best)
    return out


def class_scores(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the probability of one class per sample, [..., sample, class] and [sample] -> [..., sample]."""
    if len(classes) and (classes == classes[0]).all():
        return np.ascontiguousarray(probabilities[..., max(int(classes[0]), 0)])
    return probabilities[..., np.arange(len(classes)), np.maximum(classes, 0)]


def member_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis, taken about the first member: equal members give exactly their value."""
    first = values[0]
    return first + sum(_deviations(values), start=np.zeros_like(first)) / len(values)


def _deviations(values: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK // max(1, values[0].size))
    for start in range(0, len(values), step):
        yield (values[start : start + step] - values[0]).sum(axis=0)


def sample_blocks(probabilities: np.ndarray) -> Iterator[slice]:
    """Yield slices of samples of [member, sample, ...] that keep temporaries small."""
    samples = probabilities.shape[1]
    step = max(1, _BLOCK // max(1, probabilities[:, :1].size))
    for start in range(0, samples, step):
        yield slice(start, start + step)


def check_finite(predictions: Predictions) -> None:
    """Raise NonFinite naming member and sample of the first logit that is NaN or infinite."""
    p = predictions
    for member, logits in enumerate((p.base, *p.logits)):
        if not np.isfinite(logits).all():
            sample = int(np.argwhere(~np.isfinite(logits))[0][0])
            who = f"member {member - 1}" if member else "the base"
            value = logits[sample][~np.isfinite(logits[sample])][0]
            raise NonFinite(f"logits on {p.view} are not finite: {who}, sample {sample} is {value}")
