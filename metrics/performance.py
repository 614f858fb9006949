"""How good is one model: accuracy, balanced accuracy, AUROC, negative log-likelihood, Brier score, calibration error.

Each is computed for several models at once, probabilities float64 [member, sample, class], and recorded for the base,
as the mean over the members, and for the ensemble (the mean probability). Samples without a label are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np

from .api import Undefined, register_metric
from .context import Context, class_scores, decide, member_mean, sigmoid, votes
from .group_rates import decisions
from .intervals import CaseMean, Estimate, average

ECE_BINS = 15


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `-log p(y)` in nats per sample, [..., sample, class] -> [..., sample]; at most 708 (the least float64)."""
    out = np.maximum(class_scores(probabilities, labels), np.finfo(np.float64).tiny)
    return np.negative(np.log(out, out=out), out=out)


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the squared error per sample, [..., sample, class] -> [..., sample].

    Two classes: `(p_1 - 1[y = 1])^2`, in 0..1; more: summed over the classes, in 0..2, as scikit-learn does by default.
    Source: Brier (1950).
    """
    if probabilities.shape[-1] == 2:
        return (1.0 - class_scores(probabilities, labels)) ** 2
    total = np.zeros(probabilities.shape[:-1])
    for c in range(probabilities.shape[-1]):
        total += (probabilities[..., c] - (labels == c)) ** 2
    return total


def errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return 1 where the decision is wrong, else 0: [..., sample, class] -> float64 [..., sample]."""
    return (decide(probabilities) != labels).astype(np.float64)


def _share_right(context: Context, probabilities: np.ndarray) -> np.ndarray:
    """Return which share of the models decide each sample correctly, [sample]; arbitrary where the label is missing."""
    mine = probabilities is context.probabilities
    counts = context.votes if mine else votes(decide(probabilities), context.classes)
    return class_scores(counts, context.labels) / len(probabilities)


@register_metric("accuracy", direction="higher", level="model", unit="share of samples", citation="standard")
def _accuracy(context: Context, probabilities: np.ndarray) -> CaseMean:
    """Share of samples decided correctly."""
    return CaseMean(_share_right(context, probabilities), context.known)


@register_metric("nll", direction="lower", level="model", unit="nats", citation="standard")
def _nll(context: Context, probabilities: np.ndarray) -> CaseMean:
    """Mean negative log-likelihood of the true class."""
    return CaseMean(member_mean(probabilities, partial(log_losses, labels=context.labels)), context.known)


@register_metric("brier", direction="lower", level="model", unit="squared probability", citation="Brier (1950)")
def _brier(context: Context, probabilities: np.ndarray) -> CaseMean:
    """Mean squared error of the probabilities (two classes: of the positive one; more: summed over classes)."""
    return CaseMean(member_mean(probabilities, partial(brier_scores, labels=context.labels)), context.known)


@register_metric(
    "balanced_accuracy",
    direction="higher",
    level="model",
    unit="share of samples",
    citation="Brodersen et al. (ICPR 2010)",
    needs="samples of every class",
)
def _balanced_accuracy(context: Context, probabilities: np.ndarray) -> Estimate:
    """Mean over the classes of the share of their samples decided correctly."""
    right = _share_right(context, probabilities)
    _need_every_class(context)
    recalls = context.bootstrap.means([CaseMean(right, context.labels == c) for c in range(context.classes)])
    return _of_all_patients(context, average([r for r in recalls if isinstance(r, Estimate)]))


@register_metric(
    "auroc",
    direction="higher",
    level="model",
    unit="probability",
    citation="Hanley, McNeil (Radiology 1982); more classes: mean of one against the rest",
    needs="samples of every class",
)
def _auroc(context: Context, probabilities: np.ndarray) -> Estimate:
    """Area under the ROC curve (more than two classes: mean over classes of one against the rest)."""
    _need_every_class(context)
    values, draws = aurocs(context, probabilities)
    return _of_all_patients(context, Estimate(float(member_mean(values)), member_mean(draws.T), 0))


@register_metric(
    "ece",
    direction="lower",
    level="model",
    unit="probability",
    citation="Guo et al. (ICML 2017)",
    needs=f"{ECE_BINS} bins of equal width, confidence of the decided class, L1",
)
def _ece(context: Context, probabilities: np.ndarray) -> Estimate:
    """Expected calibration error of the decided class's probability (15 bins of equal width, L1)."""
    values, draws = calibration_errors(context, probabilities)
    return _of_all_patients(context, Estimate(float(member_mean(values)), member_mean(draws.T), 0))


def aurocs(context: Context, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every member's AUROC, [member], and on the bootstrap draws, [draw, member].

    `sum_{i pos, j neg} w_i w_j (1[s_i > s_j] + 1[s_i = s_j]/2) / (w_pos w_neg)`, w the counts of a
    draw: by sorting, not over pairs. Two classes: the positive one, ranked by its odds, which keep confident scores
    apart.
    """
    classes = [context.positive] if context.classes == 2 else range(context.classes)
    parts = []
    for c in classes:
        parts.append(_auroc_of_class(context, probabilities, c))
    return np.mean([v for v, _ in parts], axis=0), np.mean([d for _, d in parts], axis=0)


def odds_ranking(probabilities: np.ndarray, c: int) -> np.ndarray:
    """Return what ranks the samples by class c, [sample]: its probability; of two classes its odds, which keep
    confident scores apart. probabilities: [sample, class]."""
    if probabilities.shape[-1] > 2:
        return probabilities[:, c]
    return probabilities[:, c] / np.maximum(probabilities[:, 1 - c], np.finfo(np.float64).tiny)


def _rankings(context: Context, probabilities: np.ndarray, c: int) -> Iterator[np.ndarray]:
    """Yield what ranks the samples by class c, [sample] for every model.

    The odds of a half are one of 65,536 numbers, whose places rank as they do, ties included, and are sorted by radix.
    """
    if context.halves is None or probabilities is not context.probabilities:
        yield from (odds_ranking(p, c) for p in probabilities)
        return
    odds = odds_ranking(sigmoid(np.arange(1 << 16, dtype=np.uint16).view(np.float16)), c)
    places = np.unique(odds, return_inverse=True)[1].astype(np.uint16)
    yield from (places.take(logits.view(np.uint16)) for logits in context.halves)


def _auroc_of_class(context: Context, probabilities: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
    b = context.bootstrap
    pos = np.flatnonzero(context.labels == c)
    neg = np.flatnonzero(context.known & (context.labels != c))
    if not len(pos) or not len(neg):
        raise Undefined(f"class {c} has {len(pos)} samples of {len(pos) + len(neg)}")
    few, many = (pos, neg) if len(pos) <= len(neg) else (neg, pos)
    lower, upper = (few, many) if b.draws else (many, few)  # few rows to add up in draws, else few places to look up
    weights = [(block, b.sample_counts(lower, block), b.sample_counts(upper, block)) for block in b.blocks()]
    values, draws = np.empty(len(probabilities)), np.empty((b.draws, len(probabilities)))
    for m, scores in enumerate(_rankings(context, probabilities, c)):
        losing, winning = scores[lower], scores[upper]
        kind: Literal["stable", "quicksort"] = "stable" if scores.dtype == np.uint16 else "quicksort"  # by radix
        if b.draws:
            order, winners = np.argsort(losing, kind=kind), np.argsort(winning, kind=kind)
            below, upto = _beaten(losing[order], winning[winners])
            for block, w_lower, w_upper in weights:
                draws[block, m] = _weighted_wins(w_lower, w_upper, order, winners, below, upto)
        else:  # numbers alone sort faster than their places
            below, upto = _beaten(np.sort(losing, kind=kind), np.sort(winning, kind=kind))
        values[m] = below.sum() + upto.sum()
    total = 2.0 * len(pos) * len(neg)
    pairs = np.empty((b.draws, 1))
    for block, w_lower, w_upper in weights:
        pairs[block, 0] = 2.0 * w_lower.sum(axis=0, dtype=np.float64) * w_upper.sum(axis=0, dtype=np.float64)
    if upper is neg:
        values, draws = total - values, pairs - draws
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / total, draws / pairs


def _beaten(ranked: np.ndarray, sought: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of `ranked` are below each of `sought`, and how many not above it; both are sorted."""
    below = np.searchsorted(ranked, sought)
    tied = np.flatnonzero(ranked.take(below, mode="clip") == sought)
    if not len(tied):
        return below, below
    upto = below.copy()
    upto[tied] = np.searchsorted(ranked, sought[tied], "right")
    return below, upto


def _weighted_wins(
    w_lower: np.ndarray,
    w_upper: np.ndarray,
    order: np.ndarray,
    winners: np.ndarray,
    below: np.ndarray,
    upto: np.ndarray,
) -> np.ndarray:
    """Return twice the weighted number of won pairs of each draw: weights [sample, draw] -> [draw]."""
    running = np.zeros((len(order) + 1, w_lower.shape[1]), np.float32)  # sums of counts: exact below 2^24
    np.cumsum(w_lower[order], axis=0, out=running[1:])
    wins = running.take(below, axis=0)
    wins += wins if below is upto else running.take(upto, axis=0)
    return np.einsum("nd,nd->d", w_upper[winners], wins, dtype=np.float64)


def calibration_errors(context: Context, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every member's expected calibration error, [member], and on the bootstrap draws, [draw, member].

    `sum_b |sum_{i in b} w_i (right_i - confidence_i)| / sum_i w_i` over 15 bins `(j/15, (j+1)/15]` of the confidence in
    the decided class. Source: Guo et al. (ICML 2017). A resample's value is biased upward, as the estimate itself is.
    """
    b = context.bootstrap
    known = np.flatnonzero(context.known)
    if not len(known):
        raise Undefined("no sample has a label")
    sizes = b.resample(b.by_patient(context.known.astype(np.float64)))
    values = np.empty(len(probabilities))
    draws = np.empty((b.draws, len(probabilities)))
    right = decisions(context, probabilities) == context.labels
    for m, p in enumerate(probabilities):
        confidence = _top(p)
        excess = right[m] - confidence
        excess[~context.known] = 0.0
        bins = np.ceil(confidence * ECE_BINS).astype(np.intp)  # from 1 on
        values[m] = np.abs(np.bincount(bins, excess)).sum() / len(known)
        if b.draws:
            in_bin = np.where(bins == np.unique(bins[known])[:, None], excess, 0.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                draws[:, m] = np.abs(b.resample(b.by_patient(in_bin))).sum(axis=1) / sizes
    return values, draws


def _top(probabilities: np.ndarray) -> np.ndarray:
    top = probabilities[..., 0]
    for c in range(1, probabilities.shape[-1]):
        top = np.maximum(top, probabilities[..., c])
    return top


def _need_every_class(context: Context) -> None:
    for c in range(context.classes):
        if not (context.labels == c).any():
            raise Undefined(f"class {c} has no sample")


def _of_all_patients(context: Context, estimate: Estimate) -> Estimate:
    patients = int((context.bootstrap.by_patient(context.known.astype(np.int64)) > 0).sum())
    return Estimate(estimate.value, estimate.draws, patients)
