"""Does a member chosen from the set beat a network trained for the worst group, at equal mean accuracy and equal cost?

The rival is another recipe (group DRO, class balancing), of which some networks were trained, none of them accepted or
rejected. Both sides choose on val by the same criterion and are compared on the same test patients. A criterion is
oriented here so that higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from scipy.special import ndtri, stdtrit

from .api import Metric, PerMember, Undefined
from .context import BASE, MEMBERS, Context, Models
from .cost_curves import SetCost
from .intervals import CaseMean, Estimate, average, holm
from .performance import errors
from .selection import (
    LEVEL,
    POWER,
    Bounds,
    _bounds,
    _changed,
    _criteria,
    _drawn,
    _losses,
    _of,
    _only,
    _oriented,
    _p_above,
    _shared_groups,
    best_of_k_weights,
)

SET = "set better"
RIVAL = "rival better"
TRADE = "a trade"
OPEN = "not resolved"

CRITERIA = ("worst_group_accuracy",)

_DECIMALS = 12  # as in selection: what differs by less is equal in exact arithmetic


@dataclass(frozen=True)
class Choice:
    """The member that the set offers and the networks that its cost buys, for one base seed and one criterion.

    chosen: index of the member; eligible: members that keep the rival's accuracy on val; weights: how often each of
    the rival's networks is the val-best of n, [network]; of_set, of_rival: criterion on test; gain: of_set - of_rival,
    accuracy: the same difference of the mean accuracy, both with paired draws over test patients.
    """

    chosen: int
    eligible: int
    weights: np.ndarray
    of_set: float
    of_rival: float
    gain: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Comparison:
    """Which side is better? Decided by `settle` over all comparisons of a table.

    gain, accuracy: the set's less the rival's on test, means over the base seeds; resolvable: the smallest gain that
    this test resolves with a power of 80 % (before Holm); patients: of the test split; needed: how many of them would
    resolve the gain that was observed, math.inf where what base seeds differ in is in the way, NaN without a standard
    deviation; p: two-sided, of no gain; leader: the words if it is resolved; adjusted: p after Holm; words: the answer.
    """

    gain: Bounds
    accuracy: Bounds
    seeds: int
    resolvable: float
    patients: int
    needed: float
    p: float
    leader: str
    reason: str = ""
    adjusted: float = math.nan
    words: str = OPEN


def affordable(budget: float | None, rival: SetCost) -> int:
    """Return how many networks of the rival a budget buys, at least 1: `floor((budget - fixed) / marginal)`.

    budget: in base trainings, what the set has cost with the base that it needs. Raises Undefined when either cost was
    not measured.
    """
    if budget is None or rival.fixed is None or not rival.marginal:
        raise Undefined("the cost of the set or of the rival was not measured")
    return max(1, math.floor((budget - rival.fixed) / rival.marginal + 1e-9))  # 2.4 / .8 buys three


def with_groups(views: Sequence[Sequence[Context]], groups: str) -> list[list[Context]]:
    """Return problems that have the groups of a rival as one more attribute, named like them (`sex*label`).

    views: problems on val and test, one per label each; all get the same codes. A sample of which a part is unknown is
    in no group. Problems without one of the names stay as they are, as do those of a single name that is an attribute.
    """
    names = groups.split("*")
    known = [all(n == "label" or n in c.attributes for n in names) for view in views for c in view]
    if not all(known) or groups in views[0][0].attributes:
        return [list(view) for view in views]
    parts = [[[_codes(c, name) for name in names] for c in view] for view in views]
    sizes = [1 + max(int(p[i].max()) for view in parts for p in view) for i in range(len(names))]
    return [
        [_changed(c, attributes={**c.attributes, groups: _product(p, sizes)}) for c, p in zip(view, of_view)]
        for view, of_view in zip(views, parts)
    ]


def _codes(context: Context, name: str) -> np.ndarray:
    return context.labels if name == "label" else context.attributes[name]


def _product(parts: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    joint = np.zeros(len(parts[0]), np.int64)
    for codes, size in zip(parts, sizes):
        joint = np.where((joint < 0) | (codes < 0), -1, joint * size + codes)
    return joint


def choose(
    accepted: tuple[Sequence[Context], Sequence[Context]],
    rival: tuple[Sequence[Context], Sequence[Context]],
    n: int,
    k: int,
    tolerance: float = 0.01,
    names: Sequence[str] = CRITERIA,
) -> dict[str, Choice | Undefined]:
    """Choose on val from the accepted members and from n networks of the rival, and compare both on test.

    The rival's side is the expected val-best of n of its networks, exactly: `sum_j w_j x_j` with the weights of
    `best_of_k_weights`; n above their number means all. The set's side is the val-best among the members whose accuracy
    on val is at least the rival's less `tolerance` (equal mean accuracy); where there is none, the most accurate one.
    On both sides ties go to the lower loss on val.

    accepted, rival: the problems on (val, test), one per label, of the accepted members and of all networks of the
    rival. By criterion and suffix; Undefined with the reason where a view leaves the criterion undefined or fewer than
    k members were accepted. Raises ValueError when the two sides are not of the same cases.
    """
    for one, other in zip((*accepted[0], *accepted[1]), (*rival[0], *rival[1]), strict=True):
        if not np.array_equal(one.labels, other.labels) or not _same_draws(one, other):
            raise ValueError("the set and its rival must be compared on the same cases and the same draws")
    out: dict[str, Choice | Undefined] = {}
    for name, criterion in _criteria(names).items():
        ours, theirs = _Side.of(criterion, *accepted), _Side.of(criterion, *rival)
        for suffix in dict.fromkeys([*ours.on_val, *theirs.on_val]):
            try:
                out[name + suffix] = _chosen(criterion, suffix, ours, theirs, n, k, tolerance)
            except Undefined as reason:
                out[name + suffix] = reason
    return out


def _same_draws(one: Context, other: Context) -> bool:
    a, b = one.bootstrap, other.bootstrap
    return np.array_equal(a.index, b.index) and np.array_equal(a.counts, b.counts)


@dataclass(frozen=True)
class _Side:
    """One side's problems on test, and what its members are on val: the criterion by suffix, accuracy and loss."""

    test: list[Context]
    on_val: dict[str, PerMember | Undefined]
    accuracy: np.ndarray
    losses: np.ndarray

    @staticmethod
    def of(criterion: Metric, val: Sequence[Context], test: Sequence[Context]) -> _Side:
        kept = [_shared_groups(criterion, v, t) for v, t in zip(val, test)]
        seen = [_drawn(_only(c, groups), 0) for c, groups in zip(val, kept)]
        if not seen[0].size:
            nothing = _oriented(criterion, seen, "val", BASE)
            return _Side(list(test), nothing, np.empty(0), np.empty(0))
        accuracy = np.array([e.value for e in _accuracies(seen, MEMBERS)])
        on_val = _oriented(criterion, seen, "val", MEMBERS)
        return _Side([_only(c, groups) for c, groups in zip(test, kept)], on_val, accuracy, _losses(seen))

    def ranks(self, values: np.ndarray) -> np.ndarray:
        """Return the place of every member on val, higher is better: by the criterion, then by the lower loss."""
        keys = np.stack([np.round(values, _DECIMALS), -self.losses], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _chosen(criterion: Metric, suffix: str, ours: _Side, theirs: _Side, n: int, k: int, tolerance: float) -> Choice:
    if len(ours.accuracy) < k:
        raise Undefined(f"{len(ours.accuracy)} of {k} accepted")
    if not len(theirs.accuracy):
        raise Undefined("the rival has no network")
    seen, rivals = _defined(suffix, ours.on_val), _defined(suffix, theirs.on_val)
    weights = best_of_k_weights(theirs.ranks(rivals.values), [min(n, len(rivals.values))])[0]
    keeps = np.round(ours.accuracy - (weights @ theirs.accuracy - tolerance), _DECIMALS) >= 0
    eligible = keeps if keeps.any() else ours.accuracy == ours.accuracy.max()
    chosen = int(np.argmax(np.where(eligible, ours.ranks(seen.values), -1)))
    one, some = Models((chosen,)), Models(tuple(np.flatnonzero(weights).tolist()))
    set_side = _defined(suffix, _oriented(criterion, ours.test, "test", one))
    rival_side = _defined(suffix, _oriented(criterion, theirs.test, "test", some))
    w, patients = weights[weights > 0], ours.test[0].bootstrap.patients
    gain = Estimate(
        round(float(set_side.values[0] - w @ rival_side.values), _DECIMALS),
        np.round(set_side.draws[:, 0] - rival_side.draws @ w, _DECIMALS),
        patients,
    )
    return Choice(
        chosen=chosen,
        eligible=int(keeps.sum()),
        weights=weights,
        of_set=float(set_side.values[0]),
        of_rival=float(w @ rival_side.values),
        gain=gain,
        accuracy=_less(_accuracies(ours.test, one)[0], _accuracies(theirs.test, some), w),
    )


def _defined(suffix: str, found: dict[str, PerMember | Undefined]) -> PerMember:
    value = _of(suffix, found)
    if isinstance(value, Undefined):
        raise value
    return value


def _less(one: Estimate, others: Sequence[Estimate], weights: np.ndarray) -> Estimate:
    value = one.value - sum(w * e.value for w, e in zip(weights, others))
    draws = one.draws - sum(w * e.draws for w, e in zip(weights, others))
    return Estimate(round(float(value), _DECIMALS), np.round(draws, _DECIMALS), one.n)


def _accuracies(contexts: Sequence[Context], models: Models) -> list[Estimate]:
    """Return the accuracy of each model, mean over labels."""
    by_label = []
    for c in contexts:
        right = [CaseMean(1.0 - e, c.known) for e in errors(models(c), c.labels)]
        found = c.bootstrap.means(right)
        if isinstance(found[0], Undefined):
            raise found[0]
        by_label.append(cast(list[Estimate], found))
    return [average(model) for model in zip(*by_label)]


def compare(choices: Sequence[Choice], tolerance: float = 0.01) -> Comparison:
    """Return the evidence of one criterion's choices, one per base seed, not yet settled.

    Gain and difference of accuracy are means over base seeds with the standard deviations and t ends of
    `selection.verdict`. The test is of the gain alone, two-sided: equal accuracy is the condition under which both
    sides were chosen on val. A side whose observed accuracy on test is nevertheless more than `tolerance` below the
    other's cannot be called better: its lead is a trade.

    With v the variance over patients and s^2 that between base seeds, of which e is noise of the patients (the variance
    of the draws between base seeds), `needed = P (v + e/B) / ((gain / (t_.975 + z_.8))^2 - (s^2 - e)/B)` for P patients
    now. No counted test case that tells the two sides apart bounds no standard deviation: such a gain has no p.

    Raises ValueError without choices or when they do not have the same number of draws.
    """
    if len({c.gain.draws.shape for c in choices}) != 1:
        raise ValueError("a comparison needs choices, one per base seed, with the same draws over test patients")
    gains = [c.gain for c in choices]
    gain, accuracy = _bounds(gains), _bounds([c.accuracy for c in choices])
    reason = "" if math.isfinite(gain.sd) else "over 5 % of the draws leave it undefined, or there are none"
    if gain.sd == 0:
        reason = "no counted test case tells the two sides apart"
        gain = Bounds(gain.value, math.nan, math.nan, math.nan)
    leader, ahead = (SET, accuracy.value) if gain.value > 0 else (RIVAL, -accuracy.value)
    return Comparison(
        gain=gain,
        accuracy=accuracy,
        seeds=len(choices),
        resolvable=(float(stdtrit(gain.df, LEVEL)) + float(ndtri(POWER))) * gain.sd,
        patients=gains[0].n,
        needed=_needed(gains, gain, gains[0].n),
        p=min(1.0, 2.0 * float(np.min(_p_above(gain, 0.0)))),
        leader=leader if round(ahead + tolerance, _DECIMALS) >= 0 else TRADE,
        reason=reason,
    )


def _needed(gains: Sequence[Estimate], mean: Bounds, patients: int) -> float:
    if not math.isfinite(mean.sd):
        return math.nan
    seeds, draws = len(gains), np.stack([g.draws for g in gains])
    over_patients = float(np.nanvar(draws.mean(axis=0), ddof=1))
    between = float(np.var([g.value for g in gains], ddof=1)) if seeds > 1 else 0.0
    moved = draws - np.nanmean(draws, axis=1, keepdims=True)
    noise = min(between, float(np.nanmean(np.var(moved, axis=0, ddof=1)))) if seeds > 1 else 0.0
    reach = abs(mean.value) / (float(stdtrit(mean.df, LEVEL)) + float(ndtri(POWER)))
    room = reach**2 - (between - noise) / seeds
    return patients * (over_patients + noise / seeds) / room if room > 0 else math.inf


def settle(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of a table with their words, by Holm over all of them at 5 %.

    A comparison without p is not counted and stays unresolved. Source: Holm (Scand. J. Statist. 1979).
    """
    adjusted = holm([c.p for c in comparisons])
    level = 2 * (1 - LEVEL)
    return [
        replace(c, adjusted=float(p), words=c.leader if p <= level else OPEN)  # NaN is not
        for c, p in zip(comparisons, adjusted)
    ]
