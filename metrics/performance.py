"""How good is one model: accuracy, balanced accuracy, AUROC, negative log-likelihood, Brier score, calibration error.

Each is computed for several models at once, probabilities float64 [member, sample, class], and recorded for the base,
as the mean over the members, and for the ensemble (the mean probability). Samples without a label are left out.
"""

from __future__ import annotations

import numpy as np

from .api import Undefined, register_metric
from .context import Context, class_scores, decide, member_mean
from .intervals import CaseMean, Estimate, average

ECE_BINS = 15


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `-log p(y)` in nats per sample, [..., sample, class] -> [..., sample]; at most 708 (the least float64)."""
    return -np.log(np.maximum(class_scores(probabilities, labels), np.finfo(np.float64).tiny))


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


@register_metric("accuracy", direction="higher", level="model", unit="share of samples", citation="standard")
def _accuracy(context: Context, probabilities: np.ndarray) -> CaseMean:
    """Share of samples decided correctly."""
    return CaseMean(1.0 - member_mean(errors(probabilities, context.labels)), context.known)


@register_metric("nll", direction="lower", level="model", unit="nats", citation="standard")
def _nll(context: Context, probabilities: np.ndarray) -> CaseMean:
    """Mean negative log-likelihood of the true class."""
    return CaseMean(member_mean(log_losses(probabilities, context.labels)), context.known)


@register_metric("brier", direction="lower", level="model", unit="squared probability", citation="Brier (1950)")
def _brier(context: Context, probabilities: np.ndarray) -> CaseMean:
    """Mean squared error of the probabilities (two classes: of the positive one; more: summed over classes)."""
    return CaseMean(member_mean(brier_scores(probabilities, context.labels)), context.known)


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
    right = 1.0 - member_mean(errors(probabilities, context.labels))
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
        parts.append(_auroc_of_class(context, [odds_ranking(p, c) for p in probabilities], c))
    return np.mean([v for v, _ in parts], axis=0), np.mean([d for _, d in parts], axis=0)


def odds_ranking(probabilities: np.ndarray, c: int) -> np.ndarray:
    """Return what ranks the samples by class c, [sample]: its probability; of two classes its odds, which keep
    confident scores apart. probabilities: [sample, class]."""
    if probabilities.shape[-1] > 2:
        return probabilities[:, c]
    return probabilities[:, c] / np.maximum(probabilities[:, 1 - c], np.finfo(np.float64).tiny)


def _auroc_of_class(context: Context, scores: list[np.ndarray], c: int) -> tuple[np.ndarray, np.ndarray]:
    b = context.bootstrap
    pos = np.flatnonzero(context.labels == c)
    neg = np.flatnonzero(context.known & (context.labels != c))
    if not len(pos) or not len(neg):
        raise Undefined(f"class {c} has {len(pos)} samples of {len(pos) + len(neg)}")
    ranks = []
    values = np.empty(len(scores))
    for m, s in enumerate(scores):
        order, winners = np.argsort(s[neg]), np.argsort(s[pos])
        ranked, sought = s[neg][order], s[pos][winners]  # sorted look-ups are the faster ones
        below, upto = (np.searchsorted(ranked, sought, side) for side in ("left", "right"))
        values[m] = (below.sum() + upto.sum()) / (2.0 * len(pos) * len(neg))
        upto = below if np.array_equal(below, upto) else upto  # without ties one look-up serves both
        if b.draws:
            ranks.append((winners, order, below, upto))
    draws = np.empty((b.draws, len(scores)))
    for block in b.blocks():
        w_pos, w_neg = b.sample_counts(pos, block), b.sample_counts(neg, block)
        with np.errstate(invalid="ignore", divide="ignore"):
            pairs = 2.0 * w_pos.sum(axis=0, dtype=np.float64) * w_neg.sum(axis=0, dtype=np.float64)
            for m, rank in enumerate(ranks):
                draws[block, m] = _weighted_wins(w_pos, w_neg, *rank) / pairs
    return values, draws


def _weighted_wins(
    w_pos: np.ndarray,
    w_neg: np.ndarray,
    winners: np.ndarray,
    order: np.ndarray,
    below: np.ndarray,
    upto: np.ndarray,
) -> np.ndarray:
    """Return twice the weighted number of won pairs of each draw: weights [sample, draw] -> [draw]."""
    running = np.zeros((len(order) + 1, w_neg.shape[1]), np.float32)  # sums of counts: exact below 2^24
    np.cumsum(w_neg[order], axis=0, out=running[1:])
    wins = running.take(below, axis=0)
    wins += wins if below is upto else running.take(upto, axis=0)
    return np.einsum("nd,nd->d", w_pos[winners], wins, dtype=np.float64)


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
    for m, p in enumerate(probabilities):
        confidence = _top(p)
        excess = np.where(context.known, (decide(p) == context.labels) - confidence, 0.0)
        bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
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
