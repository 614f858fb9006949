"""One binary or multi-class problem on one view: what every metric is computed from, each array made once, on demand.

A multi-label task is one such problem per label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from ..processors import usable_processors
from .api import MIN_PATIENTS as MIN_PATIENTS
from .api import NonFinite, Predictions, Undefined
from .intervals import PatientBootstrap

_BLOCK = 1 << 16  # numbers that are worked on at once: half a MiB stays in a cache beside what is made of it
_AT_ONCE = 3 << 30  # bytes that the probabilities of the labels which are worked on at once may take

_T = TypeVar("_T")


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
    views: the same members on shifted views of the part, by name; evidence: what else was stored, by name; halves: the
    members' logits [member, sample] of a label whose predictions are stored as float16.
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
    halves: np.ndarray | None = field(default=None, init=False, repr=False)  # so `replace` with other members drops it
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
        return self.size - class_scores(self.votes, self.base_decisions)

    @cached_property
    def votes(self) -> np.ndarray:
        """How many members choose each class, [sample, class]."""
        return votes(self.decisions, self.classes)

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
    yield from map(partial(_context, predictions, members, bootstrap, seed, min_patients), _labels(predictions))


def over_contexts(
    work: Callable[[Context], _T], predictions: Predictions, members: np.ndarray, bootstrap: PatientBootstrap, seed: int
) -> Iterator[_T]:
    """Yield `work(context)` of each of the `contexts`, in their order.

    Labels are worked on at the same time, one to a processor and as many as memory allows: numpy lets threads run side
    by side. What is yielded does not depend on how many they are.
    """

    def of_label(label: int | None) -> _T:
        return work(_context(predictions, members, bootstrap, seed, MIN_PATIENTS, label))

    labels = _labels(predictions)
    size = 2 * 8 * max(1, len(members) * len(predictions.base))
    workers = min(len(labels), usable_processors(), max(1, _AT_ONCE // size))
    if workers < 2:
        yield from map(of_label, labels)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(of_label, labels)


def _labels(predictions: Predictions) -> list[int | None]:
    """Return which labels are a problem of their own; None: all classes are one problem."""
    return list(range(predictions.base.shape[-1])) if predictions.task == "multilabel" else [None]


def _context(
    p: Predictions, members: np.ndarray, bootstrap: PatientBootstrap, seed: int, min_patients: int, label: int | None
) -> Context:
    if label is None:
        positive = 1 if p.positive is None else p.positive
        chosen, base = softmax(p.logits, members), softmax(p.base)
        return Context(chosen, base, p.labels, bootstrap, positive, p.attributes, seed, min_patients)
    logits = p.logits[..., label][members]
    chosen, base = sigmoid(logits), sigmoid(p.base[..., label])
    context = Context(chosen, base, p.labels[:, label], bootstrap, 1, p.attributes, seed, min_patients)
    if logits.dtype == np.float16:
        context.halves = logits
    return context


def softmax(logits: np.ndarray, members: np.ndarray | None = None) -> np.ndarray:
    """Return float64 probabilities of logits [..., class], of the chosen members only when given.

    In memory one class stands after the other: what is asked of a class reads that class alone.
    """
    if members is None:
        return _softmax(logits)
    out = _class_by_class((len(members), *logits.shape[1:]))
    step = max(1, _BLOCK // max(1, logits[0].size))
    for start in range(0, len(members), step):
        out[start : start + step] = _softmax(logits[members[start : start + step]])
    return out


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return float64 probabilities [..., 2] of the absence and presence of a label from its logits [...].

    Laid out in memory as those of `softmax`, and equal to those of the logits (0, logit).
    """
    out = _class_by_class((*logits.shape, 2))
    step = max(1, _BLOCK // max(1, logits[:1].size))
    for start in range(0, len(logits), step):
        block = slice(start, start + step)
        z = logits[block].astype(np.float64)
        present = z >= 0
        small = np.exp(-np.abs(z, out=z))
        large = 1.0 / (1.0 + small)
        small /= 1.0 + small
        out[block, ..., 0], out[block, ..., 1] = np.where(present, small, large), np.where(present, large, small)
    return out


def _class_by_class(shape: tuple[int, ...]) -> np.ndarray:
    """Return room for numbers [..., class], the classes of which are contiguous each."""
    return np.moveaxis(np.empty((shape[-1], *shape[:-1])), 0, -1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    z = _class_by_class(logits.shape)
    z[...] = logits
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
    if probabilities.shape[-1] == 2:
        return (probabilities[..., 1] > probabilities[..., 0]).astype(np.int16)
    best = probabilities[..., 0].copy()
    out = np.zeros(best.shape, np.int16)
    for c in range(1, probabilities.shape[-1]):
        higher = probabilities[..., c] > best
        out[higher] = c
        np.maximum(best, probabilities[..., c], out=best)
    return out


def votes(decisions: np.ndarray, classes: int) -> np.ndarray:
    """Return how many members choose each class: [member, sample] -> int [sample, class]."""
    out = np.zeros((*decisions.shape[1:], classes), np.int64)
    most = np.iinfo(np.uint8).max  # so many ones can be added up in bytes, which is the fastest way
    for start in range(0, len(decisions), most):
        for c in range(classes):
            chosen = decisions[start : start + most] == c
            out[..., c] += chosen.view(np.uint8).sum(axis=0, dtype=np.uint8)
    return out


def class_scores(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the value of one class per sample, [..., sample, class] and [sample] -> [..., sample]; it may be a view.

    Where a class is missing (-1), that of class 0.
    """
    if len(classes) and (classes == classes[0]).all():
        return values[..., max(int(classes[0]), 0)]
    if values.shape[-1] == 2:
        return np.where(classes > 0, values[..., 1], values[..., 0])
    return values[..., np.arange(len(classes)), np.maximum(classes, 0)]


def member_mean(values: np.ndarray, of: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Return the mean over the first axis, taken about the first member: equal members give exactly their value.

    of: what is taken of the values, some members at a time, before the mean; default: the values themselves.
    """
    of = of or np.asarray
    first = of(values[:1])[0]
    total = np.zeros_like(first)
    step = max(1, _BLOCK // max(1, values[0].size))
    for start in range(0, len(values), step):
        total += (of(values[start : start + step]) - first).sum(axis=0)
    return first + total / len(values)


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
        if not _all_finite(logits):
            sample = int(np.argwhere(~np.isfinite(logits))[0][0])
            who = f"member {member - 1}" if member else "the base"
            value = logits[sample][~np.isfinite(logits[sample])][0]
            raise NonFinite(f"logits on {p.view} are not finite: {who}, sample {sample} is {value}")


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    exponents = values.view(np.uint16) & 0x7C00  # numpy looks at halves one by one
    return not (exponents == 0x7C00).any()
