"""Fairness of the members of a set: gaps between groups of patients, and whether members differ in them.

Gaps are metrics of level `group`: of every member, largest less smallest rate of the groups that count (enough
patients in the rate's denominators). A gap of three groups is above 0 by chance alone, and so is a range over fifty
members: both are held against what other patients would have made of them (`Spread`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri

from .api import PerMember, Undefined, register_metric
from .context import MIN_PATIENTS, Context
from .criteria import auroc_influence
from .group_rates import (
    ByAttribute,
    GroupRates,
    Reduce,
    accuracies,
    by_suffix,
    calibration_in_the_large,
    false_positive_rates,
    need_two_classes,
    positive_rates,
    rates_by_group,
    smallest,
    spread,
    true_positive_rates,
)
from .scores import score_range
from .selection import POWER

_DECIMALS = 12  # members that are equal in exact arithmetic differ by less, and have a range of exactly 0
_HARDT = "Hardt, Price, Srebro (NeurIPS 2016)"
_BOTH = f"two classes; an attribute with two groups of {MIN_PATIENTS} positive and as many negative patients (default)"
_Found = dict[str, PerMember | Undefined]


@register_metric(
    "demographic_parity_gap",
    direction="lower",
    level="group",
    unit="share of samples",
    citation="Dwork et al. (ITCS 2012)",
    needs=f"two classes; an attribute with two groups of {MIN_PATIENTS} patients (default)",
)
def _demographic_parity_gap(context: Context, probabilities: np.ndarray) -> _Found:
    """Largest minus smallest share of the groups that is decided positive, per attribute."""
    return by_suffix(positive_rates(context, probabilities), spread)


@register_metric(
    "fpr_gap",
    direction="lower",
    level="group",
    unit="share of negative samples",
    citation="Chouldechova (Big Data 2017)",
    needs=f"two classes; an attribute with two groups of {MIN_PATIENTS} negative patients (default)",
)
def _fpr_gap(context: Context, probabilities: np.ndarray) -> _Found:
    """Largest minus smallest false positive rate of the groups, per attribute."""
    return by_suffix(false_positive_rates(context, probabilities), spread)


@register_metric(
    "equalised_odds_max",
    direction="lower",
    level="group",
    unit="share of samples",
    citation=_HARDT,
    needs=_BOTH,
)
def _equalised_odds_max(context: Context, probabilities: np.ndarray) -> _Found:
    """Larger one of the gaps of true and of false positive rates, per attribute."""
    return _equalised_odds(context, probabilities, lambda gaps: gaps.max(axis=0))


@register_metric(
    "equalised_odds_mean",
    direction="lower",
    level="group",
    unit="share of samples",
    citation=_HARDT,
    needs=_BOTH,
)
def _equalised_odds_mean(context: Context, probabilities: np.ndarray) -> _Found:
    """Mean of the gaps of true and of false positive rates, per attribute."""
    return _equalised_odds(context, probabilities, lambda gaps: gaps.mean(axis=0))


@register_metric(
    "worst_group_auroc",
    direction="higher",
    level="group",
    unit="probability",
    citation="Zhang et al. (CHIL 2022); draws linearised by placements, DeLong et al. (Biometrics 1988)",
    needs=f"an attribute with two groups of {MIN_PATIENTS} patients of every class (default)",
)
def _worst_group_auroc(context: Context, probabilities: np.ndarray) -> _Found:
    """AUROC within the group whose cases are ranked worst, per attribute."""
    return by_suffix(group_aurocs(context, probabilities), smallest)


@register_metric(
    "auroc_gap",
    direction="lower",
    level="group",
    unit="probability",
    citation="Larrazabal et al. (PNAS 2020); draws linearised by placements, DeLong et al. (Biometrics 1988)",
    needs=f"an attribute with two groups of {MIN_PATIENTS} patients of every class (default)",
)
def _auroc_gap(context: Context, probabilities: np.ndarray) -> _Found:
    """AUROC within the group whose cases are ranked best minus that of the worst, per attribute."""
    return by_suffix(group_aurocs(context, probabilities), spread)


@register_metric(
    "calibration_gap",
    direction="lower",
    level="group",
    unit="probability",
    citation="Steyerberg et al. (Epidemiology 2010), calibration in the large",
    needs=f"two classes; an attribute with two groups of {MIN_PATIENTS} patients (default)",
)
def _calibration_gap(context: Context, probabilities: np.ndarray) -> _Found:
    """Largest minus smallest difference of mean score and prevalence in the groups, per attribute."""
    return by_suffix(calibration_in_the_large(context, probabilities), spread)


def group_aurocs(context: Context, probabilities: np.ndarray) -> ByAttribute:
    """Return the AUROC within every group (more than two classes: mean of one against the rest), by attribute.

    A group counts with `min_patients` patients of every class. Draws are linearised (see `criteria.auroc_influence`).
    Raises Undefined without attributes.
    """

    def of_group(mask: np.ndarray) -> PerMember:
        part = replace(context, labels=np.where(mask, context.labels, -1))
        values, influence = auroc_influence(part, probabilities)
        b = context.bootstrap
        return PerMember(values, values + b.resample(b.by_patient(influence)))

    if context.classes == 2:
        words = {1 - context.positive: "negative patients", context.positive: "positive patients"}
    else:
        words = {c: f"patients of class {c}" for c in range(context.classes)}
    needed = {who: context.labels == c for c, who in words.items()}
    return rates_by_group(context, probabilities, "auroc", needed, of_group)


RATES = {
    "accuracy": accuracies,
    "tpr": true_positive_rates,
    "fpr": false_positive_rates,
    "positive_rate": positive_rates,
    "auroc": group_aurocs,
    "calibration": calibration_in_the_large,
}
"""Rates by group, `f(context, probabilities) -> {attribute: GroupRates | Undefined}`, of which gaps are made."""

GAP_OF = {
    "accuracy_gap": "accuracy",
    "demographic_parity_gap": "positive_rate",
    "tpr_gap": "tpr",
    "fpr_gap": "fpr",
    "auroc_gap": "auroc",
    "calibration_gap": "calibration",
}
"""Metric -> the rate whose largest less smallest value it is."""


def frozen_threshold(val: Context) -> float:
    """Return the threshold of the positive probability at which the base's balanced accuracy on val is largest.

    The decision is positive above it. Between two scores that follow each other every threshold decides alike: the
    midpoint of that plateau is returned, of the widest one if several are largest. Raises Undefined unless there are
    two classes with cases of both. Source: Youden (Cancer 1950).
    """
    scores = val.base[val.known, need_two_classes(val).positive]
    positive = val.labels[val.known] == val.positive
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        raise Undefined(f"no threshold from {n_pos} positive and {n_neg} negative cases on val")
    cuts, at = np.unique(scores, return_inverse=True)
    missed, spared = (np.bincount(at.reshape(-1), kind, minlength=len(cuts)).cumsum() for kind in (positive, ~positive))
    youden = np.concatenate([[0.0], spared / n_neg - missed / n_pos])
    edges = np.concatenate([[0.0], cuts, [1.0]])
    best = youden >= youden.max() - 10.0**-_DECIMALS
    widest = int(np.argmax(np.where(best, np.diff(edges), -1.0)))
    return float((edges[widest] + edges[widest + 1]) / 2)


def at_threshold(probabilities: np.ndarray, threshold: float, positive: int) -> np.ndarray:
    """Return probabilities [..., sample, 2] with log-odds less those of the threshold: argmax decides by the threshold.

    Ranks stay as they are; what is said of calibration no longer holds. threshold: of the positive class's
    probability, in (0, 1).
    """
    weight = np.full(2, threshold)
    weight[positive] = 1.0 - threshold
    shifted = probabilities * weight
    return shifted / (shifted[..., :1] + shifted[..., 1:])


@dataclass(frozen=True)
class Spread:
    """A range of rates and the ranges that other patients would give if nothing differed.

    value: observed; null: float64 [draw], the ranges of the draws' deviations from what was observed, NaN where a draw
    leaves one undefined.
    """

    value: float
    null: np.ndarray

    def limit(self, level: float = 0.95) -> float:
        """Return the quantile of the null ranges; NaN when over 5 % of the draws are undefined, or there are none."""
        defined = self._defined()
        return float(np.quantile(defined, level)) if len(defined) else math.nan

    def p(self) -> float:
        """Return `(1 + #{null >= value}) / (1 + draws)`, NaN without draws."""
        defined = self._defined()
        return float((1 + (defined >= self.value).sum()) / (1 + len(defined))) if len(defined) else math.nan

    def _defined(self) -> np.ndarray:
        defined = self.null[np.isfinite(self.null)]
        return defined if len(defined) >= 0.95 * len(self.null) else defined[:0]


def signed_gap(rates: GroupRates) -> PerMember:
    """Return every model's difference between two groups: those whose rates, mean over the models, are furthest apart.

    Highest less lowest, so that a model that favours the other one has a negative value. groups: (high, low).
    """
    mean = rates.values.mean(axis=1)
    high, low = int(np.argmax(mean)), int(np.argmin(mean))
    pair = rates.groups[high], rates.groups[low]
    return PerMember(rates.values[high] - rates.values[low], rates.draws[high] - rates.draws[low], pair)


def member_spread(gaps: PerMember, k: int | None = None) -> Spread:
    """Return the range of a gap over the members, at k its mean over all k-subsets, and its null: `gap*_m - gap_m`.

    The patients are resampled jointly for all members, for they share the cases: the standard deviation of one
    member's gap is no yardstick for the range. The null is that of a gap with a sign (`signed_gap`). A gap that cannot
    be negative folds at 0: its range hides members that favour opposite groups, and where the noise of the members
    exceeds it the test has a level of nearly 0. Raises Undefined for fewer than two, or k, members.
    """
    least = max(2, k or 2)
    if len(gaps.values) < least:
        raise Undefined(f"{len(gaps.values)} of {least} accepted")
    return _spread(gaps.values, gaps.draws, k)


def group_spread(rates: GroupRates) -> Spread:
    """Return the gap of one model between the groups and its null, `rate*_g - rate_g`: all groups have one rate."""
    return _spread(rates.values[:, 0], rates.draws[:, :, 0].T, None)


def mean_spread(spreads: Sequence[Spread]) -> Spread:
    """Return the mean of spreads that share their draws: over labels, over base seeds."""
    return Spread(float(np.mean([s.value for s in spreads])), np.mean([s.null for s in spreads], axis=0))


def patients_needed(patients: int, limit: float, sd: float, gap: float) -> float:
    """Return how many patients would resolve a gap of this size with a power of 80 %.

    `n ((q + z_.8 sd) / gap)^2`: with n' patients, q and sd shrink by `sqrt(n / n')`, and a gap is resolved above the
    95 % quantile q of what chance alone gives; two groups: `n ((z_.975 + z_.8) sd / gap)^2`. patients: n; limit: q;
    sd: of the difference of the two groups. NaN for a gap of 0.
    """
    return patients * ((limit + float(ndtri(POWER)) * sd) / gap) ** 2 if gap else math.nan


def _equalised_odds(context: Context, probabilities: np.ndarray, reduce: Reduce) -> _Found:
    """Reduce the gaps of both rates, over the groups that count for both."""
    rates = true_positive_rates(context, probabilities), false_positive_rates(context, probabilities)
    out: _Found = {}
    for name in rates[0]:
        both = rates[0][name], rates[1][name]
        if reason := next((r for r in both if isinstance(r, Undefined)), None):
            out[f"#{name}"] = reason
            continue
        tpr, fpr = (r for r in both if isinstance(r, GroupRates))
        groups = tuple(g for g in tpr.groups if g in fpr.groups)
        if len(groups) < 2:
            few = f"{context.min_patients} positive and {context.min_patients} negative patients"
            out[f"#{name}"] = Undefined(f"{len(groups)} groups of '{name}' have {few}, two are needed")
            continue
        gaps = [r.only(groups).reduced(spread) for r in (tpr, fpr)]
        out[f"#{name}"] = replace(GroupRates.of((0, 1), gaps).reduced(reduce), groups=groups)
    return out


def _spread(values: np.ndarray, draws: np.ndarray, k: int | None) -> Spread:
    """Return the range of values [item] and of the deviations of draws [draw, item] from them."""
    observed = score_range(values[:, None], k)[0]
    null = score_range((draws - values).T, k)
    return Spread(round(float(observed), _DECIMALS), np.round(null, _DECIMALS))
