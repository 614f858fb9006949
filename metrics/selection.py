"""Selection on validation: what does a member, chosen without the test set, gain on the test set, and at what cost?

Values of a criterion are oriented here so that higher is better. K members, the base is not one of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from ..errors import UserError
from .api import METRICS, Metric, PerMember, Undefined
from .context import BASE, MEMBERS, Context, Models
from .intervals import Estimate, average, holm, order_statistic_weights
from .performance import log_losses

YES = "better at no cost: yes"
NO = "better at no cost: no"
OPEN = "not resolved with this many patients"

LEVEL = 0.975  # of each one-sided end
POWER = 0.8
MEMBER_DRAWS = 200
"""Draws for which every member's criterion is computed (bands, re-selection); the chosen member has all of them."""

_DECIMALS = 12  # what differs by less is equal in exact arithmetic: a gap of .9 - .8 and one of .8 - .7


@dataclass(frozen=True)
class Curves:
    """Expected values of the best of k members, at every k of `ks`: float64 [k], higher is better.

    val, test: of the validation-best on val and on test; oracle: of the test-best on test; low, high: 95 % band of
    `test` over test patients, NaN without draws.
    """

    ks: np.ndarray
    val: np.ndarray
    test: np.ndarray
    oracle: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def winners_curse(self) -> np.ndarray:
        """`EBK_val(k) - EBK_test(k)`, [k]."""
        return self.val - self.test

    @property
    def oracle_gap(self) -> np.ndarray:
        """What knowing the test values would add, `oracle(k) - EBK_test(k)`, [k]; never negative."""
        return self.oracle - self.test


@dataclass(frozen=True)
class Violation:
    """How the validation-best of k keeps a tolerance of the loss on test, at every k: float64 [k].

    chance: that its test loss exceeds the base's by more than `tolerance`; excess: mean of `max(0, loss - base's -
    tolerance)`, nats.
    """

    tolerance: float
    chance: np.ndarray
    excess: np.ndarray


@dataclass(frozen=True)
class Selection:
    """What choosing the validation-best of all K members by one criterion once gives.

    chosen: its index; gain_val: its criterion minus the base's on val; gain: the same on test, loss: its negative
    log-likelihood minus the base's on test, nats, both with paired draws over test patients; stability: how often the
    choice falls on it again on bootstrapped val patients, reselected_gain: mean test gain of those choices, both NaN
    without draws; curves: the criterion, gains: the criterion minus the base's, at k = 1..K; violation: of the set's
    epsilon, cost: of the verdict's margin.
    """

    chosen: int
    gain_val: float
    gain: Estimate
    loss: Estimate
    stability: float
    reselected_gain: float
    curves: Curves
    gains: Curves
    violation: Violation
    cost: Violation


@dataclass(frozen=True)
class Bounds:
    """A value, its standard deviation, its lower and upper one-sided 97.5 % ends, and the degrees of freedom of the sd;
    NaN where draws give none."""

    value: float
    sd: float
    low: float
    high: float
    df: float = math.inf


@dataclass(frozen=True)
class Verdict:
    """Is the chosen member better at no cost? Decided by `settle` over all verdicts of a table.

    gain, loss: means over the base seeds; seeds: their number; interval: how the ends were made; resolvable: the
    smallest gain that this test resolves with a power of 80 %; p_yes, p_no: evidence for each answer, NaN where the
    draws give no standard deviation; reason: why they do not; adjusted: the smaller p after Holm; words: the answer.
    """

    gain: Bounds
    loss: Bounds
    seeds: int
    interval: str
    resolvable: float
    p_yes: float
    p_no: float
    reason: str = ""
    adjusted: float = math.nan
    words: str = OPEN


def best_of_k_weights(values: np.ndarray, ks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return how often each member is the best of a k-subset of the members, [k, member]; rows sum to 1.

    Sorted from worst to best, `C(j-1, k-1)/C(K, k)`; tied members share their weight evenly. values: [member]. Raises
    ValueError for k outside 1..K.
    """
    values = np.asarray(values, np.float64)
    tied = np.unique(np.round(values, _DECIMALS), return_inverse=True)[1].reshape(-1)
    sizes, order = np.bincount(tied), np.sort(tied)
    weights = np.stack([np.bincount(order, order_statistic_weights(len(values), int(k))) for k in ks])
    return (weights / sizes)[:, tied]


def expected_best_of_k(val: np.ndarray, test: np.ndarray, k: int) -> float:
    """Return the expected test value of the validation-best of k members drawn without replacement (higher is better).

    Members sorted by val from worst to best, T_(j) their test values: `sum_{j>=k} T_(j) C(j-1, k-1)/C(K, k)`; members
    tied on val share the mean of their test values. val, test: [member]. Raises ValueError for k outside 1..K.
    """
    return float(best_of_k_weights(val, [k])[0] @ np.asarray(test, np.float64))


def curves(
    val: np.ndarray, test: np.ndarray, ks: Sequence[int] | np.ndarray, draws: np.ndarray | None = None
) -> Curves:
    """Return the expected values of the best of k on both views, the oracle's, and a band over test patients.

    val, test: [member], higher is better; draws: test values on bootstrap draws [draw, member]. The band holds the
    members and the choice on val fixed. Raises ValueError for k outside 1..K.
    """
    val, test = np.asarray(val, np.float64), np.asarray(test, np.float64)
    weights = best_of_k_weights(val, ks)
    on_test, resampled = weights @ test, (np.empty((0, len(test))) if draws is None else draws) @ weights.T
    band = [Estimate(float(v), d, 0).interval() for v, d in zip(on_test, resampled.T)]
    low, high = np.array([e.low for e in band]), np.array([e.high for e in band])
    return Curves(np.asarray(ks), weights @ val, on_test, best_of_k_weights(test, ks) @ test, low, high)


def violation(val: np.ndarray, losses: np.ndarray, ks: Sequence[int] | np.ndarray, tolerance: float) -> Violation:
    """Return how often, over k-subsets, the validation-best has a test loss above the base's by more than a tolerance.

    val: the criterion [member], higher is better; losses: test loss minus the base's [member], nats.
    """
    weights = best_of_k_weights(val, ks)
    excess = np.asarray(losses, np.float64) - tolerance
    return Violation(tolerance, weights @ (excess > 0).astype(np.float64), weights @ np.maximum(excess, 0.0))


def select(
    val: Sequence[Context],
    test: Sequence[Context],
    k: int,
    epsilon: float,
    margin: float = 0.01,
    names: Sequence[str] | None = None,
) -> dict[str, Selection | Undefined]:
    """Choose the validation-best member by every criterion (or those named) and see what it gives on test.

    val, test: one problem per label (one unless multi-label, values are means over labels) of the same accepted members
    on both views. A group counts if it is large enough on both. Ties on val go to the lower validation loss. Every
    member is resampled on the first 200 draws only (bands, stability), the chosen one and the base on all. epsilon,
    margin: tolerances of the loss, nats. By criterion and suffix of its key; Undefined with the reason where a view
    leaves it undefined or there are fewer than k members.

    Raises ValueError when the views do not hold the same members and labels, UserError for a name that is no criterion,
    Undefined when a label is missing everywhere.
    """
    if len(val) != len(test) or any(v.size != t.size for v, t in zip(val, test)):
        raise ValueError(f"{[v.size for v in val]} members by label on val, {[t.size for t in test]} on test")
    few_val, few_test = ([_drawn(c, MEMBER_DRAWS) for c in view] for view in (val, test))
    task = _Task(few_val, few_test, test, _losses(val), _losses(test), k, epsilon, margin)
    out: dict[str, Selection | Undefined] = {}
    for name, criterion in _criteria(names).items():
        found = _select_by(criterion, _on_shared_groups(criterion, task))
        out |= {name + suffix: selection for suffix, selection in found.items()}
    return out


def verdict(selections: Sequence[Selection], margin: float = 0.01) -> Verdict:
    """Return the evidence on "better at no cost" of one criterion's selections, one per base seed, not yet settled.

    Gain and loss difference are means over the B base seeds. All share the test patients, so their draws are averaged
    draw by draw: `sd^2 = var(draws of the mean) + s^2/B`, s the standard deviation between base seeds (ddof 1). Ends by
    t with `(B - 1) (sd^2 B / s^2)^2` degrees of freedom (Welch-Satterthwaite, the many draws counting as exact): B - 1
    where base seeds differ most, more where the patients, who are many, decide. s holds some noise of the cases, too,
    which is thereby counted twice: the ends err on the wide side. One base seed: normal ends from the draws alone,
    "test cases only". Source: Satterthwaite (Biometrics Bulletin 1946).

    Yes needs both gain > 0 and loss <= margin: p is the larger of the two one-sided ones (intersection-union, Berger
    1982). No needs gain <= 0 or loss > margin: p is twice the smaller of the two. Power: `resolvable = (t_.975 + z_.8)
    sd(gain)`. A gain of exactly 0 on every draw is a certain no only when the loss is 0 as well, thus the choice is the
    base (the control `identical`); else no counted test case tells the two apart, which bounds no standard deviation,
    and the loss alone can say no.

    Raises ValueError without selections or when they do not have the same number of draws.
    """
    if len({s.gain.draws.shape for s in selections}) != 1:
        raise ValueError("a verdict needs selections, one per base seed, with the same draws over test patients")
    seeds = len(selections)
    gain, loss = _bounds([s.gain for s in selections]), _bounds([s.loss for s in selections])
    reason = "" if math.isfinite(gain.sd + loss.sd) else "over 5 % of the draws leave it undefined, or there are none"
    if gain.sd == 0 < loss.sd:
        reason = "no counted test case tells the chosen member from the base"
        gain = Bounds(gain.value, math.nan, math.nan, math.nan)
    better, worse = _p_above(gain, 0.0)
    dearer, cheap = _p_above(loss, margin)
    p_yes, p_no = float(np.maximum(better, cheap)), float(np.minimum(1.0, 2.0 * np.fmin(worse, dearer)))
    interval = "t over base seeds and test cases" if seeds > 1 else "test cases only"
    resolvable = (_quantile(LEVEL, gain.df) + float(ndtri(POWER))) * gain.sd
    return Verdict(gain, loss, seeds, interval, resolvable, p_yes, p_no, reason)


def settle(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts of a table with their words, by Holm over all of them.

    Of a verdict's two claims exactly one is false; the one with the smaller p is tested, at 2.5 %. A verdict without p
    is not counted and stays unresolved. Source: Holm (Scand. J. Statist. 1979).
    """
    adjusted = holm([float(np.fmin(v.p_yes, v.p_no)) for v in verdicts])
    return [replace(v, adjusted=float(p), words=_words(v, p)) for v, p in zip(verdicts, adjusted)]


def _words(v: Verdict, adjusted: float) -> str:
    if not adjusted <= 1 - LEVEL:  # NaN too
        return OPEN
    return YES if v.p_yes < v.p_no else NO


def _bounds(estimates: list[Estimate]) -> Bounds:
    mean, seeds = average(estimates), len(estimates)
    defined = mean.draws[np.isfinite(mean.draws)]
    if len(defined) < max(2, 0.95 * len(mean.draws)):
        return Bounds(mean.value, math.nan, math.nan, math.nan)
    between = float(np.var([e.value - mean.value for e in estimates], ddof=1) / seeds) if seeds > 1 else 0.0
    variance = float(np.var(defined, ddof=1)) + between
    df = (seeds - 1) * (variance / between) ** 2 if between > 0 else math.inf
    sd = math.sqrt(variance)
    reach = _quantile(LEVEL, df) * sd
    return Bounds(mean.value, sd, mean.value - reach, mean.value + reach, df)


def _p_above(bounds: Bounds, threshold: float) -> tuple[float, float]:
    """Return the one-sided p-values of "above the threshold" and of "not above it"; NaN without an sd."""
    excess = bounds.value - threshold
    if bounds.sd == 0:
        return (0.0, 1.0) if excess > 0 else (1.0, 0.0)
    z = excess / bounds.sd
    below, above = (float(stdtr(bounds.df, x)) for x in (-z, z))
    return below, above


def _quantile(level: float, df: float) -> float:
    return float(stdtrit(df, level))


@dataclass(frozen=True)
class _Task:
    """What a criterion is asked about; losses: every member's minus the base's [member].

    val, test: with the draws that all members get; reported: test with all draws.
    """

    val: Sequence[Context]
    test: Sequence[Context]
    reported: Sequence[Context]
    val_losses: np.ndarray
    test_losses: np.ndarray
    k: int
    epsilon: float
    margin: float


_Found = dict[str, PerMember | Undefined]


def _criteria(names: Sequence[str] | None) -> dict[str, Metric]:
    if names is None:
        return {name: function for name, function in METRICS.load_all() if function.info.level == "criterion"}
    found = {name: METRICS.get(name) for name in names}
    for name, function in found.items():
        if function.info.level not in ("criterion", "property"):
            raise UserError(f"metric '{name}' is no criterion: its level is {function.info.level}")
    return found


def _losses(contexts: Sequence[Context]) -> np.ndarray:
    per_label = []
    for c in contexts:
        if not c.known.any():
            raise Undefined("a label is missing everywhere")
        paired = log_losses(c.probabilities, c.labels) - log_losses(c.base, c.labels)
        per_label.append(paired[:, c.known].mean(axis=1))
    return np.mean(per_label, axis=0)


def _on_shared_groups(criterion: Metric, task: _Task) -> _Task:
    """Mark those groups as unknown that the criterion counts on one view only."""
    kept = [_shared_groups(criterion, v, t) for v, t in zip(task.val, task.test)]
    val, test, reported = (
        [_only(c, groups) for c, groups in zip(view, kept)] for view in (task.val, task.test, task.reported)
    )
    return replace(task, val=val, test=test, reported=reported)


def _shared_groups(criterion: Metric, val: Context, test: Context) -> dict[str, set[int]]:
    """Return the groups that both views count, by attribute, where the views differ."""
    of_val, of_test = (
        {
            s.removeprefix("#"): set(f.groups)
            for s, f in _by_suffix(criterion, c, BASE).items()
            if isinstance(f, PerMember)
        }
        for c in (_drawn(val, 0), _drawn(test, 0))
    )
    return {
        name: of_val[name] & of_test[name] for name in of_val.keys() & of_test.keys() if of_val[name] != of_test[name]
    }


def _only(context: Context, kept: Mapping[str, set[int]]) -> Context:
    if not kept:
        return context
    codes = {name: context.attributes[name] for name in kept}
    masked = {name: np.where(np.isin(c, list(kept[name])), c, -1) for name, c in codes.items()}
    return _changed(context, attributes={**context.attributes, **masked})


def _drawn(context: Context, draws: int) -> Context:
    """Return the context with its first draws only."""
    first = copy.copy(context.bootstrap)
    first.counts = first.counts[:draws]
    first.draws = len(first.counts)
    return _changed(context, bootstrap=first)


def _changed(context: Context, **fields: Any) -> Context:
    other = copy.copy(context)  # unlike a new one it keeps the decisions, which are made once
    other._made = {}
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _select_by(criterion: Metric, task: _Task) -> dict[str, Selection | Undefined]:
    of_base = _oriented(criterion, [_drawn(c, 0) for c in task.val], "val", BASE)
    size = task.val[0].size
    if size < task.k:
        return {suffix: Undefined(f"{size} of {task.k} accepted") for suffix in of_base}
    on_val = _oriented(criterion, task.val, "val", MEMBERS)
    on_test = _oriented(criterion, task.test, "test", MEMBERS)
    out: dict[str, Selection | Undefined] = {}
    for suffix in dict.fromkeys([*on_val, *on_test]):
        base, seen, reported = (_of(suffix, found) for found in (of_base, on_val, on_test))
        if isinstance(seen, Undefined):
            out[suffix] = seen
        elif isinstance(base, Undefined):
            out[suffix] = base
        elif isinstance(reported, Undefined):
            out[suffix] = reported
        else:
            out[suffix] = _selection(criterion, suffix, task, float(base.values[0]), seen, reported)
    return out


def _selection(
    criterion: Metric, suffix: str, task: _Task, base: float, val: PerMember, test: PerMember
) -> Selection | Undefined:
    order = np.argsort(task.val_losses, kind="stable")  # among ties the first stands for the lowest loss
    chosen = int(order[np.argmax(np.round(val.values[order], _DECIMALS))])
    pair = _of(suffix, _oriented(criterion, task.reported, "test", Models((-1, chosen))))
    if isinstance(pair, Undefined):
        return pair
    loss = average([_paired_loss(c, chosen) for c in task.reported])
    gain_draws = np.round(pair.draws[:, 1] - pair.draws[:, 0], _DECIMALS)
    gain = Estimate(round(float(pair.values[1] - pair.values[0]), _DECIMALS), gain_draws, loss.n)
    again = _choices(val.draws, order)
    ks = np.arange(1, len(order) + 1)
    paired = test.draws - pair.draws[: len(test.draws), :1]
    return Selection(
        chosen=chosen,
        gain_val=float(val.values[chosen]) - base,
        gain=gain,
        loss=loss,
        stability=float(np.mean(again == chosen)) if len(again) else math.nan,
        reselected_gain=float(np.mean(test.values[again] - pair.values[0])) if len(again) else math.nan,
        curves=curves(val.values, test.values, ks, test.draws),
        gains=curves(val.values - base, test.values - pair.values[0], ks, paired),
        violation=violation(val.values, task.test_losses, ks, task.epsilon),
        cost=violation(val.values, task.test_losses, ks, task.margin),
    )


def _choices(draws: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the member chosen in every draw that gives each of them a value."""
    defined = draws[np.isfinite(draws).all(axis=1)]
    return order[np.argmax(np.round(defined[:, order], _DECIMALS), axis=1)]


def _paired_loss(context: Context, member: int) -> Estimate:
    of_base, of_member = log_losses(Models((-1, member))(context), context.labels)
    return context.bootstrap.mean(of_member - of_base, context.known)


def _oriented(criterion: Metric, contexts: Sequence[Context], view: str, models: Models) -> _Found:
    """Return the criterion of some models by suffix, mean over labels, higher is better."""
    per_label = []
    for label, context in enumerate(contexts):
        where = f"{view}, label {label}" if len(contexts) > 1 else view
        found = _by_suffix(criterion, context, models)
        per_label.append({s: Undefined(f"{where}: {f}") if isinstance(f, Undefined) else f for s, f in found.items()})
    sign = 1.0 if criterion.info.direction == "higher" else -1.0
    suffixes = dict.fromkeys(suffix for found in per_label for suffix in found)
    return {suffix: _mean([_of(suffix, found) for found in per_label], sign) for suffix in suffixes}


def _of(suffix: str, found: _Found) -> PerMember | Undefined:
    """Return what was found under a suffix, else the reason why the whole criterion has no value."""
    whole = found.get("")
    missing = whole if isinstance(whole, Undefined) else Undefined("not given on both views and for every label")
    return found.get(suffix, missing)


def _mean(labels: list[PerMember | Undefined], sign: float) -> PerMember | Undefined:
    values, draws = [], []
    for f in labels:
        if isinstance(f, Undefined):
            return f
        values.append(f.values)
        draws.append(f.draws)
    return PerMember(sign * np.mean(values, axis=0), sign * np.mean(draws, axis=0))


def _by_suffix(criterion: Metric, context: Context, models: Models) -> _Found:
    whole = criterion.info.level == "property"
    probabilities = models(context)
    try:
        result = criterion(context, models) if whole else criterion(context, probabilities)
    except Undefined as reason:
        return {"": reason}
    found: _Found = dict(result) if isinstance(result, Mapping) else {"": result}
    count = len(probabilities)
    wanted = (count,), (context.bootstrap.draws, count)
    for suffix, f in found.items():
        if isinstance(f, Undefined):
            continue
        if (f.values.shape, f.draws.shape) != wanted:
            name = criterion.info.name
            raise ValueError(f"criterion '{name}': values {f.values.shape} and draws {f.draws.shape}, not {wanted}")
        if len(bad := np.flatnonzero(~np.isfinite(f.values))):
            found[suffix] = Undefined(f"no finite value for model {bad[0]} of {count}")
    return found
