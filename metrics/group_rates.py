"""Rates by group of patients: of every model, on the sample and on every bootstrap draw.

Arrays: codes int [sample], -1 = unknown, which is no group. A group counts with `Context.min_patients` patients in
every denominator of its rate; two must count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .api import PerMember, Undefined
from .context import Context, class_scores, decide

_BLOCK = 1 << 19  # numbers that are worked on at once

Reduce = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GroupRates:
    """A rate of every model in every group that counts.

    groups: codes; values: float64 [group, member]; draws: float64 [group, draw, member], NaN where a draw leaves the
    rate undefined.
    """

    groups: tuple[int, ...]
    values: np.ndarray
    draws: np.ndarray

    @staticmethod
    def of(groups: Iterable[int], rates: Sequence[PerMember]) -> GroupRates:
        """Return the rates of the groups, one `PerMember` each, as one."""
        return GroupRates(tuple(groups), np.stack([r.values for r in rates]), np.stack([r.draws for r in rates]))

    def only(self, groups: Sequence[int]) -> GroupRates:
        """Return the rates of some of the groups."""
        kept = [self.groups.index(g) for g in groups]
        return GroupRates(tuple(groups), self.values[kept], self.draws[kept])

    def of_models(self, models: slice) -> GroupRates:
        """Return the rates of some of the models."""
        return GroupRates(self.groups, self.values[:, models], self.draws[:, :, models])

    def reduced(self, reduce: Reduce) -> PerMember:
        """Return one number per model: `reduce` takes the groups, the first axis, away."""
        return PerMember(reduce(self.values), reduce(self.draws), self.groups)


ByAttribute = dict[str, GroupRates | Undefined]


def smallest(rates: np.ndarray) -> np.ndarray:
    """Return the smallest rate of the groups: [group, ...] -> [...]."""
    return rates.min(axis=0)


def spread(rates: np.ndarray) -> np.ndarray:
    """Return the largest less the smallest rate of the groups: [group, ...] -> [...]."""
    return rates.max(axis=0) - rates.min(axis=0)


def by_suffix(rates: ByAttribute, reduce: Reduce) -> dict[str, PerMember | Undefined]:
    """Return the reduced rates by the suffix of their score keys, `#sex`."""
    return {f"#{name}": r if isinstance(r, Undefined) else r.reduced(reduce) for name, r in rates.items()}


def accuracies(context: Context, probabilities: np.ndarray) -> ByAttribute:
    """Return the share of right decisions by attribute. Raises Undefined without attributes."""
    right = decisions(context, probabilities) == context.labels
    return _shares(context, probabilities, "accuracy", right, "patients", context.known)


def true_positive_rates(context: Context, probabilities: np.ndarray) -> ByAttribute:
    """Return the share of positives that are decided positive, by attribute. Raises Undefined unless two classes."""
    positives = need_two_classes(context).labels == context.positive
    decided = decisions(context, probabilities) == context.positive
    return _shares(context, probabilities, "tpr", decided, "positive patients", positives)


def false_positive_rates(context: Context, probabilities: np.ndarray) -> ByAttribute:
    """Return the share of negatives that are decided positive, by attribute. Raises Undefined unless two classes."""
    negatives = need_two_classes(context).labels == 1 - context.positive
    decided = decisions(context, probabilities) == context.positive
    return _shares(context, probabilities, "fpr", decided, "negative patients", negatives)


def positive_rates(context: Context, probabilities: np.ndarray) -> ByAttribute:
    """Return the share decided positive of all cases, labelled or not, by attribute. Raises as the rates above."""
    decided = decisions(context, probabilities) == need_two_classes(context).positive
    return _shares(context, probabilities, "positive rate", decided, "patients", np.ones(len(context.labels), bool))


def calibration_in_the_large(context: Context, probabilities: np.ndarray) -> ByAttribute:
    """Return the mean positive score less the prevalence, above 0 where a group's risk is overstated, by attribute.

    Unlike the expected calibration error it is a mean, which few patients can estimate without bias. Raises Undefined
    unless there are two classes. Source: Steyerberg et al. (Epidemiology 2010), calibration in the large.
    """
    positive = np.full(len(context.labels), need_two_classes(context).positive)
    excess = class_scores(probabilities, positive) - (context.labels == context.positive)
    return _shares(context, probabilities, "calibration", excess, "patients", context.known)


def rates_by_group(
    context: Context,
    probabilities: np.ndarray,
    kind: str,
    needed: Mapping[str, np.ndarray],
    of_group: Callable[[np.ndarray], PerMember],
) -> ByAttribute:
    """Return a rate in every group that counts, by attribute; Undefined where fewer than two count.

    kind: its name, under which the context keeps the rates of its own members; needed: words -> cases, bool [sample],
    of which a group needs `min_patients` patients; of_group: the rate in a group, bool [sample]. Raises Undefined
    without attributes.
    """
    if not context.attributes:
        raise Undefined("no attribute of the patients is known")
    out: ByAttribute = {}
    for name, codes in context.attributes.items():
        found = [int(g) for g in np.unique(codes[codes >= 0])]
        groups = [g for g in found if _counts(context, codes == g, needed.values())]
        if len(groups) < 2:
            few = " and ".join(f"{context.min_patients} {who}" for who in needed)
            out[name] = Undefined(f"{len(groups)} of {len(found)} groups of '{name}' have {few}, two are needed")
            continue
        make = partial(_stacked, of_group, codes, groups)
        own = probabilities is context.probabilities
        made = context.once(f"{kind} by {name}", make) if own else make()
        out[name] = GroupRates(tuple(groups), made[:, 0], made[:, 1:])
    return out


def _stacked(of_group: Callable[[np.ndarray], PerMember], codes: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Return the rates [group, 1 + draw, member], the value before its draws."""
    rates = [of_group(codes == g) for g in groups]
    return np.stack([np.concatenate([r.values[None], r.draws]) for r in rates])


def decisions(context: Context, probabilities: np.ndarray) -> np.ndarray:
    """Return the classes that models decide, [member, sample]; those of the context's own members are made once."""
    return context.decisions if probabilities is context.probabilities else decide(probabilities)


def need_two_classes(context: Context) -> Context:
    """Return `context`; raises Undefined unless it has two classes."""
    if context.classes != 2:
        raise Undefined(f"defined for two classes, not {context.classes}")
    return context


def share(context: Context, values: np.ndarray, chosen: np.ndarray) -> PerMember:
    """Return the mean over the chosen samples (indices) of values [member, sample], bool or float64, and its draws."""
    b = context.bootstrap
    exact: type = np.float32 if values.dtype == bool else np.float64  # sums of counts: exact below 2^24
    patients, unit = np.unique(b.index[chosen], return_inverse=True)
    unit = unit.reshape(-1)  # some versions of numpy give it the shape of what was asked
    order = np.argsort(unit, kind="stable")
    starts = np.searchsorted(unit[order], np.arange(len(patients)))
    sums = np.add.reduceat(values[:, chosen[order]], starts, axis=1, dtype=exact)
    sizes: np.ndarray = np.bincount(unit).astype(exact)
    draws = np.empty((b.draws, len(values)))
    step = max(1, _BLOCK // max(len(patients), len(values)))
    for start in range(0, b.draws, step):
        counts: np.ndarray = b.counts[start : start + step, patients].astype(exact)
        with np.errstate(invalid="ignore"):
            np.divide(counts @ sums.T, (counts @ sizes)[:, None], out=draws[start : start + step], dtype=np.float64)
    return PerMember(values[:, chosen].mean(axis=1, dtype=np.float64), draws)


def _shares(
    context: Context, probabilities: np.ndarray, kind: str, values: np.ndarray, who: str, counted: np.ndarray
) -> ByAttribute:
    def of_group(mask: np.ndarray) -> PerMember:
        return share(context, values, np.flatnonzero(counted & mask))

    return rates_by_group(context, probabilities, kind, {who: counted}, of_group)


def _counts(context: Context, group: np.ndarray, needed: Iterable[np.ndarray]) -> bool:
    index = context.bootstrap.index
    return all(len(np.unique(index[group & cases])) >= context.min_patients for cases in needed)
