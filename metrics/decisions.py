"""Multiplicity of decisions: do equally good models decide alike?

Arrays: decisions int [member, sample], base int [sample], flips bool [member, sample] (`decisions != base`). K members;
the base is not one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

from .api import register_metric
from .context import Context
from .context import votes as votes
from .intervals import CaseMean, Estimate, Interval, clopper_pearson, miss_probability, order_statistic_weights

_MARX = "Marx, Calmon, Ustun (ICML 2020)"


def ambiguous(flip_counts: np.ndarray, members: int, k: int | None = None) -> np.ndarray:
    """Return per sample the chance that some member decides otherwise than the base.

    All members: `1[k_i > 0]`; at k: `1 - C(K - k_i, k)/C(K, k)`, the mean over all k-subsets. flip_counts: [sample];
    the mean over samples is ambiguity. Raises ValueError for k outside 1..K. Source: Marx, Calmon, Ustun (ICML 2020).
    """
    if k is None:
        return (flip_counts > 0).astype(np.float64)
    return 1.0 - miss_probability(members, flip_counts, k)


def expected_maximum(values: np.ndarray, k: int | None = None) -> np.ndarray:
    """Return the maximum over members, or its mean over all k-subsets: [..., member] -> [...].

    `sum_{j>=k} v_(j) C(j-1, k-1)/C(K, k)`, v ascending. Raises ValueError for k outside 1..K.
    """
    if k is None:
        return values.max(axis=-1)
    return np.sort(values, axis=-1) @ order_statistic_weights(values.shape[-1], k)


def discrepancy(flips: np.ndarray, k: int | None = None) -> float:
    """Return the largest share of samples that one member flips; at k its mean over all k-subsets of the members.

    `max_m mean_i 1[D_mi != D_0i]`, never above ambiguity. flips: bool [member, sample]. Source: Marx, Calmon, Ustun
    (ICML 2020).
    """
    return float(expected_maximum(flips.mean(axis=1), k))


def conflict(flip_counts: np.ndarray, members: int) -> np.ndarray:
    """Return per sample the share of members that decide otherwise than the base, `k_i / K`: [sample] -> [sample]."""
    return np.asarray(flip_counts) / members


def conflict_interval(flips: int, members: int) -> Interval:
    """Return the two-sided Clopper-Pearson interval of one sample's conflict, over members drawn at random."""
    return clopper_pearson(int(flips), members)


def disagreement(counts: np.ndarray) -> np.ndarray:
    """Return per sample the chance that two different members disagree, `K/(K-1) (1 - sum_c f_ic^2)`.

    counts: votes [..., class] with sum K; f = votes / K. NaN for K = 1. O(K N C), no loop over pairs.
    """
    counts = np.asarray(counts, np.float64)
    members = counts.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        same = (counts * (counts - 1)).sum(axis=-1)
        return np.where(members > 1, 1.0 - same / (members * (members - 1)), np.nan)


def self_consistency(counts: np.ndarray) -> np.ndarray:
    """Return per sample the chance that two different members agree, `1 - disagreement`: votes [..., class] -> [...].

    Source: Cooper et al. (AAAI 2024).
    """
    return 1.0 - disagreement(counts)


def kulynych(counts: np.ndarray) -> np.ndarray:
    """Return Kulynych's disagreement of two classes, `4 K/(K-1) p (1-p)`: votes [..., 2] -> [...]; may exceed 1.

    Twice the pairwise disagreement. Raises ValueError for more than two classes. Source: Kulynych et al. (FAccT 2023).
    """
    if np.shape(counts)[-1] != 2:
        raise ValueError(f"defined for two classes, not {np.shape(counts)[-1]}")
    return 2.0 * disagreement(counts)


def pairwise_inconsistency(counts: np.ndarray, answered: np.ndarray) -> float:
    """Return the mean pairwise disagreement over the samples that are answered; NaN when none is."""
    return float(disagreement(counts)[answered].mean()) if answered.any() else float("nan")


@dataclass(frozen=True)
class Selective:
    """A selective ensemble: mode [sample] (-1 = abstains) and coverage, accuracy and residual inconsistency.

    accuracy and inconsistency are over the answered samples, NaN when there are none.
    """

    mode: np.ndarray
    coverage: float
    accuracy: float
    inconsistency: float


def fewest_votes(members: int, alpha: float) -> int | None:
    """Return the least number of top votes at which the ensemble predicts, None if it never does.

    All other votes go to one runner-up; two-sided binomial test of the two, `p = min(1, 2 P(X <= K - top))`.
    """
    top = np.arange(members // 2 + 1, members + 1)
    enough = top[_vote_p(top, members - top) <= alpha]
    return int(enough[0]) if len(enough) else None


def selective_ensemble(counts: np.ndarray, labels: Sequence[int] | np.ndarray, alpha: float = 0.05) -> Selective:
    """Predict the mode where the vote is decided, else abstain.

    The mode is predicted iff the two-sided binomial test of its votes against the runner-up's has p <= alpha. counts:
    votes [sample, class]; labels: [sample]. Inconsistency: pairwise disagreement of the members where it predicts.
    Source: Black, Leino, Fredrikson (ICLR 2022).
    """
    ranked = np.sort(counts, axis=-1)
    answered = _vote_p(ranked[..., -1], ranked[..., -2]) <= alpha
    mode = np.where(answered, np.argmax(counts, axis=-1), -1)
    right = (mode == np.asarray(labels))[answered]
    accuracy = float(right.mean()) if len(right) else float("nan")
    return Selective(mode, float(answered.mean()), accuracy, pairwise_inconsistency(counts, answered))


def _vote_p(top: np.ndarray, runner_up: np.ndarray) -> np.ndarray:
    total = np.asarray(top + runner_up, np.float64)
    return np.minimum(1.0, 2.0 * bdtr(np.asarray(runner_up, np.float64), total.astype(np.int64), 0.5))


@register_metric("ambiguity", direction="neither", level="set", unit="share of samples", citation=_MARX, at_k=True)
def _ambiguity(context: Context, k: int | None) -> np.ndarray:
    """Share of samples for which some member decides otherwise than the base."""
    return ambiguous(context.flip_counts, context.size, k)


@register_metric("discrepancy", direction="neither", level="set", unit="share of samples", citation=_MARX, at_k=True)
def _discrepancy(context: Context, k: int | None) -> Estimate:
    """Largest share of samples on which one member decides otherwise than the base."""
    draws = context.once("flip_draws", lambda: _flip_draws(context))
    return Estimate(discrepancy(context.flips, k), expected_maximum(draws, k), context.bootstrap.patients)


def _flip_draws(context: Context) -> np.ndarray:
    """Return the share of samples that each member flips in each draw, [draw, member]."""
    b = context.bootstrap
    if not b.draws:
        return np.empty((0, context.size))
    chunks = np.array_split(context.flips, -(-context.size // 64))
    flips = np.concatenate([b.resample(b.by_patient(f.astype(np.float64))) for f in chunks], axis=1)
    return flips / b.resample(b.by_patient(np.ones(b.samples)))[:, None]


@register_metric("conflict", direction="neither", level="set", unit="share of members", citation=_MARX)
def _conflict(context: Context) -> np.ndarray:
    """Mean share of the members that decide otherwise than the base."""
    return conflict(context.flip_counts, context.size)


@register_metric(
    "disagreement",
    direction="neither",
    level="set",
    unit="share of pairs of members",
    citation="Jiang et al. (ICLR 2022); one minus the self-consistency of Cooper et al. (AAAI 2024)",
    min_members=2,
)
def _disagreement(context: Context) -> CaseMean:
    """Mean share of pairs of members that decide differently."""
    return CaseMean(disagreement(context.votes))
