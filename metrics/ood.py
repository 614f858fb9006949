"""Out-of-distribution detection: does a network tell images that it was not trained for from those that it was?

A detector's score is higher for what is further from the training data, and out of distribution is the positive kind.
In distribution are all cases of a part; out of distribution those of a view without labels (`ood_views`). Arrays:
in_scores [sample], out_scores [sample], of several models [model, sample] each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from .api import PerMember, Undefined, register_metric
from .context import Context, Models, decide

TPR = 0.95
"""True positive rate at which a false positive rate is given."""
EVIDENCE = "detector/"
"""Name of the scores of a detector that needs more than probabilities, followed by the detector's."""


@dataclass(frozen=True)
class OODScores:
    """How well scores tell out of distribution (out) from in distribution (in).

    auroc: `P(out > in) + P(out = in)/2`; aupr_out, aupr_in: area under the precision-recall curve, by trapezoids, with
    out, with in as the positive kind; fpr95: share of in that is flagged at the highest threshold which flags at least
    95 % of out (out positive: lower is better). Tied scores are flagged together.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr95: float


def ood_metrics(in_scores: np.ndarray, out_scores: np.ndarray) -> OODScores:
    """Return the usual measures of one detector: [sample] in and out of distribution, higher = further out.

    Raises Undefined without cases of either kind or for a score that is NaN. Source: Hendrycks, Gimpel (ICLR 2017).
    """
    _need_scores(in_scores, out_scores)
    flagged = _flagged(out_scores, in_scores)
    rates = np.concatenate([[[0.0, 0.0]], flagged / [len(out_scores), len(in_scores)]])
    return OODScores(
        auroc=float(np.trapezoid(rates[:, 0], rates[:, 1])),
        aupr_out=_aupr(flagged),
        aupr_in=_aupr(_flagged(-in_scores, -out_scores)),
        fpr95=float(rates[np.argmax(rates[:, 0] >= TPR), 1]),
    )


def max_softmax(probabilities: np.ndarray) -> np.ndarray:
    """Return `1 - max_c p_c`, [..., class] -> [...]: the doubt of the decided class (Hendrycks, Gimpel, ICLR 2017).

    Summed over the other classes, which keeps confident cases apart. Of two classes it ranks as the entropy does.
    """
    decided = decide(probabilities)
    total = np.zeros(decided.shape)
    for c in range(probabilities.shape[-1]):
        total += np.where(decided == c, 0.0, probabilities[..., c])
    return total


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy of the probabilities in bits, [..., class] -> [...]."""
    total = np.zeros(probabilities.shape[:-1])
    for c in range(probabilities.shape[-1]):
        total += entr(probabilities[..., c])
    return total / np.log(2.0)


def ood_views(context: Context) -> dict[str, Context]:
    """Return the views that show what is out of distribution: no image of theirs has a label, though the part's have.

    Those named `ood-...` do also where the label of the problem is missing throughout the part. Raises Undefined where
    there are none.
    """
    found = {
        name: view
        for name, view in context.views.items()
        if not view.known.any() and (context.known.any() or name.startswith("ood-"))
    }
    if not found:
        raise Undefined("no view out of distribution")
    return found


@dataclass(frozen=True)
class Scored:
    """Scores of one detector, in and out of distribution: [model, sample] each."""

    inside: np.ndarray
    outside: np.ndarray


def member_detectors(context: Context, view: Context, models: Models) -> dict[str, Scored]:
    """Return the scores of some networks by detector: of their probabilities, and those stored as evidence of both.

    Of two classes, entropy ranks as max_softmax does: it is left out.
    """
    inside, outside = models(context), models(view)
    own = (max_softmax,) if context.classes == 2 else (max_softmax, entropy)
    found = {f.__name__: Scored(f(inside), f(outside)) for f in own}
    for name in context.evidence.keys() & view.evidence.keys():
        if name.startswith(EVIDENCE):
            scores = Scored(models.evidence(context, name), models.evidence(view, name))
            found[name.removeprefix(EVIDENCE)] = scores
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Placements:
    """AUROC of every model, [model], and the influence of every case on it: inside, outside [model, sample]."""

    auroc: np.ndarray
    inside: np.ndarray
    outside: np.ndarray

    def resampled(self, context: Context, view: Context) -> PerMember:
        """Return the AUROCs on the draws of the part's bootstrap, `A + sum_i w_i psi_i + sum_j w_j psi_j`.

        Images out of distribution are resampled by as many draws of the view's own bootstrap. Raises ValueError where
        it has fewer.
        """
        draws = self.auroc + _resampled(context, self.inside, context) + _resampled(view, self.outside, context)
        return PerMember(self.auroc, draws)


def placements(in_scores: np.ndarray, out_scores: np.ndarray) -> Placements:
    """Return how well every model's scores tell out of distribution from in: [model, sample] each.

    `psi = (V - A)/n`, V the share of the other kind that a case is ranked rightly against, ties half, n the number of
    its own kind. NaN for a model with a score that is NaN. Raises Undefined without cases of either kind. Source:
    DeLong, DeLong, Clarke-Pearson (Biometrics 1988).
    """
    n_in, n_out = in_scores.shape[1], out_scores.shape[1]
    if not n_in or not n_out:
        raise Undefined(f"{n_in} cases in and {n_out} out of distribution")
    auroc = np.full(len(in_scores), np.nan)
    inside, outside = np.zeros(in_scores.shape), np.zeros(out_scores.shape)
    for m, (low, high) in enumerate(zip(in_scores, out_scores, strict=True)):
        if np.isnan(low).any() or np.isnan(high).any():
            continue
        placed_out, placed_in = _share_below(low, high), 1.0 - _share_below(high, low)
        auroc[m] = placed_out.mean()
        outside[m] = (placed_out - auroc[m]) / n_out
        inside[m] = (placed_in - auroc[m]) / n_in
    return Placements(auroc, inside, outside)


@register_metric(
    "ood_auroc",
    direction="higher",
    level="property",
    unit="probability",
    citation="Hendrycks, Gimpel (ICLR 2017); draws linearised by placements, DeLong et al. (Biometrics 1988)",
    needs="a view out of distribution; detectors other than max_softmax and entropy: their scores",
)
def _ood_auroc(context: Context, models: Models) -> dict[str, PerMember]:
    """Area under the ROC curve of each network's detectors, out of distribution positive, per view and detector."""
    return {
        f"/{name}:{detector}": placements(scored.inside, scored.outside).resampled(context, view)
        for name, view in ood_views(context).items()
        for detector, scored in member_detectors(context, view, models).items()
    }


@register_metric(
    "ood_fpr95",
    direction="lower",
    level="property",
    unit="share of samples",
    citation="Hendrycks, Gimpel (ICLR 2017); Liang, Li, Srikant (ICLR 2018)",
    needs="a view out of distribution; out of distribution is positive",
)
def _ood_fpr95(context: Context, models: Models) -> dict[str, PerMember]:
    """Share of the part's cases that each network's confidence flags with 95 % of those out of distribution."""
    own = max_softmax(models(context))
    return {
        f"/{name}:max_softmax": _false_positive_rates(context, view, own, max_softmax(models(view)))
        for name, view in ood_views(context).items()
    }


def _need_scores(in_scores: np.ndarray, out_scores: np.ndarray) -> None:
    if not len(in_scores) or not len(out_scores):
        raise Undefined(f"{len(in_scores)} cases in and {len(out_scores)} out of distribution")
    if undefined := int(np.isnan(in_scores).sum() + np.isnan(out_scores).sum()):
        raise Undefined(f"{undefined} scores are NaN")


def _flagged(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return how many positives and negatives every score, from the highest on, flags: [threshold, 2]."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    return np.stack([len(s) - np.searchsorted(np.sort(s), thresholds) for s in (positive, negative)], axis=-1)


def _aupr(flagged: np.ndarray) -> float:
    precision = flagged[:, 0] / flagged.sum(axis=1)
    recall = flagged[:, 0] / flagged[-1, 0]
    return float(np.trapezoid([1.0, *precision], [0.0, *recall]))


def _share_below(scores: np.ndarray, sought: np.ndarray) -> np.ndarray:
    """Return the share of `scores` that each of `sought` exceeds, ties half."""
    ranked = np.sort(scores)
    below, upto = (np.searchsorted(ranked, sought, side) for side in ("left", "right"))
    return (below + upto) / (2.0 * len(ranked))


def _resampled(cases: Context, influence: np.ndarray, context: Context) -> np.ndarray:
    """Return the sums over the resampled cases, [model, sample] -> [draw, model], on as many draws as the part has."""
    _need_draws(context, cases)
    return cases.bootstrap.resample(cases.bootstrap.by_patient(influence))[: context.bootstrap.draws]


def _need_draws(context: Context, view: Context) -> None:
    if view.bootstrap.draws < context.bootstrap.draws:
        raise ValueError(f"a view has {view.bootstrap.draws} draws of {context.bootstrap.draws}")


def _false_positive_rates(context: Context, view: Context, inside: np.ndarray, outside: np.ndarray) -> PerMember:
    """Return every model's false positive rate at 95 % true positives, [model, sample] each, and on every draw."""
    _need_draws(context, view)
    values = np.array([ood_metrics(low, high).fpr95 for low, high in zip(inside, outside, strict=True)])
    draws = np.empty((context.bootstrap.draws, len(values)))
    for block in context.bootstrap.blocks():
        w_in = context.bootstrap.sample_counts(np.arange(inside.shape[1]), block)
        w_out = view.bootstrap.sample_counts(np.arange(outside.shape[1]), block)
        for m, (low, high) in enumerate(zip(inside, outside, strict=True)):
            draws[block, m] = _weighted_fpr(low, high, w_in, w_out)
    return PerMember(values, draws)


def _weighted_fpr(low: np.ndarray, high: np.ndarray, w_in: np.ndarray, w_out: np.ndarray) -> np.ndarray:
    """Return the false positive rate of each draw: scores [sample] in and out, weights [sample, draw] -> [draw]."""
    order_in, order_out = np.argsort(-low), np.argsort(-high)
    caught = np.cumsum(w_out[order_out], axis=0, dtype=np.float64)
    reached = np.argmax(caught / caught[-1] >= TPR, axis=0)
    flagged = np.cumsum(w_in[order_in], axis=0, dtype=np.float64)
    upto = np.searchsorted(-low[order_in], -high[order_out], side="right")[reached]
    return np.where(upto > 0, np.take_along_axis(flagged, np.maximum(upto - 1, 0)[None], axis=0)[0], 0) / flagged[-1]
