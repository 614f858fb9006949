"""Multiplicity of scores: how far apart are the probabilities that equally good models give a case?

`scores` are float64 [member, sample], the probability of one class per sample.
"""

from __future__ import annotations

import numpy as np

from .api import register_metric
from .context import Context, class_scores, member_mean, sample_blocks
from .information import divergences
from .intervals import CaseMean, order_statistic_weights

_RANGE = "Watson-Daniels, Parkes, Ustun (AAAI 2023)"
_SPREAD = "Long et al. (NeurIPS 2023)"


def score_range(scores: np.ndarray, k: int | None = None) -> np.ndarray:
    """Return per sample the viable prediction range `max_m S - min_m S`, at k its mean over all k-subsets.

    scores: [member, sample] -> [sample]; exactly 0 when the members are equal. Raises ValueError for k outside 1..K.
    Source: Watson-Daniels, Parkes, Ustun (AAAI 2023).
    """
    if k is None:
        return scores.max(axis=0) - scores.min(axis=0)
    weights = order_statistic_weights(len(scores), k)
    out = np.empty(scores.shape[1])
    for block in sample_blocks(scores):
        moved = scores[:, block] - scores[0, block]  # about the first member, so that equal members give exactly 0
        out[block] = np.sort(np.ascontiguousarray(moved.T), axis=-1) @ (weights - weights[::-1])
    return out


def viable_prediction_range(probabilities: np.ndarray, classes: np.ndarray | int, k: int | None = None) -> np.ndarray:
    """Return the range of the probability of chosen classes: [member, sample, class] -> [sample].

    classes: the true class [sample] (the default of the suite), the positive class (an int), or the class that the base
    predicts [sample]; for two classes all three are equal. Source: Watson-Daniels, Parkes, Ustun (AAAI 2023).
    """
    chosen = np.broadcast_to(classes, probabilities.shape[1:2])
    return score_range(class_scores(probabilities, chosen), k)


def delta_ambiguous(scores: np.ndarray, base: np.ndarray, delta: float) -> np.ndarray:
    """Return per sample whether some member's score is at least `delta` from the base's: bool [sample].

    `1[exists m: |S_m - S_0| >= delta]`; its mean is the (epsilon, delta)-ambiguity. scores: [member, sample]; base:
    [sample]. Source: Watson-Daniels, Parkes, Ustun (AAAI 2023).
    """
    return (np.abs(scores - base) >= delta).any(axis=0)


def score_sd(scores: np.ndarray, ddof: int = 0) -> np.ndarray:
    """Return per sample the standard deviation over members, taken about the first one: [member, sample] -> [sample].

    NaN for K <= ddof. Long et al. (NeurIPS 2023) use ddof 1.
    """
    if len(scores) <= ddof:
        return np.full(scores.shape[1], np.nan)
    out = np.empty(scores.shape[1])
    for block in sample_blocks(scores):
        out[block] = np.std(scores[:, block] - scores[0, block], axis=0, ddof=ddof)
    return out


def score_sd_quantile(scores: np.ndarray, level: float = 0.9) -> float:
    """Return the quantile over samples of the standard deviation with ddof 1. Source: Long et al. (NeurIPS 2023)."""
    return float(np.quantile(score_sd(scores, ddof=1), level))


def mutual_information(probabilities: np.ndarray) -> np.ndarray:
    """Return per sample `H(mean_m S) - mean_m H(S)` in bits: [member, sample, class] -> [sample].

    Computed as `mean_m KL(S_m || mean S)`, which is the same, does not cancel, and is exactly 0 for equal members.
    Source: Houlsby et al. (2011), "BALD".
    """
    out = np.empty(probabilities.shape[1])
    for block in sample_blocks(probabilities):
        members = probabilities[:, block]
        out[block] = divergences(members, member_mean(members)).mean(axis=0)
    return out / np.log(2.0)


@register_metric("vpr", direction="neither", level="set", unit="probability", citation=_RANGE, at_k=True)
def _vpr(context: Context, k: int | None) -> CaseMean:
    """Mean width of the members' range of the true class's probability (viable prediction range)."""
    return CaseMean(score_range(context.scores, k), context.scored)


@register_metric("score_sd", direction="neither", level="set", unit="probability", citation=_SPREAD)
def _score_sd(context: Context) -> CaseMean:
    """Mean standard deviation over the members of the true class's probability (ddof 0)."""
    return CaseMean(score_sd(context.scores), context.scored)


@register_metric("mutual_information", direction="neither", level="set", unit="bits", citation="Houlsby et al. (2011)")
def _mutual_information(context: Context) -> CaseMean:
    """Mean information, in bits, that the decision of which member speaks carries about the class (BALD)."""
    return CaseMean(mutual_information(context.probabilities))
