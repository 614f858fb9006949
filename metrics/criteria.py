"""Criteria by which a user could choose one of the accepted members: groups, classes, ranking and calibration.

Each gives a value per member and on every bootstrap draw; `selection` asks what choosing by it is worth.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .api import PerMember, Undefined, register_metric
from .context import MIN_PATIENTS, Context
from .group_rates import (
    GroupRates,
    accuracies,
    by_suffix,
    decisions,
    share,
    smallest,
    spread,
    true_positive_rates,
)
from .performance import ECE_BINS, calibration_errors, odds_ranking

_GROUPS = f"an attribute with two groups of {MIN_PATIENTS} patients (default)"


@register_metric(
    "worst_group_accuracy",
    direction="higher",
    level="criterion",
    unit="share of samples",
    citation="Sagawa et al. (ICLR 2020)",
    needs=_GROUPS,
)
def _worst_group_accuracy(context: Context, probabilities: np.ndarray) -> dict[str, PerMember | Undefined]:
    """Accuracy of the group that is served worst, per attribute."""
    return by_suffix(accuracies(context, probabilities), smallest)


@register_metric(
    "accuracy_gap",
    direction="lower",
    level="criterion",
    unit="share of samples",
    citation="Buolamwini, Gebru (FAT* 2018)",
    needs=_GROUPS,
)
def _accuracy_gap(context: Context, probabilities: np.ndarray) -> dict[str, PerMember | Undefined]:
    """Accuracy of the group that is served best minus that of the worst, per attribute."""
    return by_suffix(accuracies(context, probabilities), spread)


@register_metric(
    "tpr_gap",
    direction="lower",
    level="criterion",
    unit="share of positive samples",
    citation="Hardt, Price, Srebro (NeurIPS 2016), equal opportunity",
    needs=f"two classes; an attribute with two groups of {MIN_PATIENTS} positive patients (default)",
)
def _tpr_gap(context: Context, probabilities: np.ndarray) -> dict[str, PerMember | Undefined]:
    """Largest minus smallest true positive rate of the groups (equal opportunity), per attribute."""
    return by_suffix(true_positive_rates(context, probabilities), spread)


@register_metric(
    "worst_class_recall",
    direction="higher",
    level="criterion",
    unit="share of samples",
    citation="standard",
    needs="samples of every class",
)
def _worst_class_recall(context: Context, probabilities: np.ndarray) -> PerMember:
    """Share of the samples of the class that is recognised worst which are decided correctly."""
    right = decisions(context, probabilities) == context.labels
    chosen = [np.flatnonzero(context.labels == c) for c in range(context.classes)]
    for c, samples in enumerate(chosen):
        if not len(samples):
            raise Undefined(f"class {c} has no sample")
    recalls = GroupRates.of(range(context.classes), [share(context, right, samples) for samples in chosen])
    return replace(recalls.reduced(smallest), groups=())


@register_metric(
    "member_calibration_error",
    direction="lower",
    level="criterion",
    unit="probability",
    citation="Guo et al. (ICML 2017)",
    needs=f"{ECE_BINS} bins of equal width, confidence of the decided class, L1",
)
def _member_calibration_error(context: Context, probabilities: np.ndarray) -> PerMember:
    """Expected calibration error of each member (15 bins of equal width, L1)."""
    return PerMember(*calibration_errors(context, probabilities))


@register_metric(
    "member_auroc",
    direction="higher",
    level="criterion",
    unit="probability",
    citation="Hanley, McNeil (Radiology 1982); draws linearised by placements, DeLong et al. (Biometrics 1988)",
    needs="samples of every class",
)
def _member_auroc(context: Context, probabilities: np.ndarray) -> PerMember:
    """Area under the ROC curve of each member (more than two classes: mean over classes of one against the rest)."""
    values, influence = auroc_influence(context, probabilities)
    b = context.bootstrap
    return PerMember(values, values + b.resample(b.by_patient(influence)))


def auroc_influence(context: Context, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every member's AUROC A, [member], and the influence of every sample on it, [member, sample].

    `psi_i = (V_i - A)/n_pos` for a positive, `(V_i - A)/n_neg` for a negative, V_i its placement: the share of the
    other kind that it is ranked rightly against, ties half; more classes: the mean over one against the rest. The value
    on a draw with counts w is `A + sum_i w_i psi_i` up to terms of order 1/n, from one matrix product for all members
    (the exact one takes a pass over the sorted samples per member, class and draw). Raises Undefined when a class is
    missing. Source: DeLong, DeLong, Clarke-Pearson (Biometrics 1988).
    """
    classes = [context.positive] if context.classes == 2 else range(context.classes)
    known = np.flatnonzero(context.known)
    values, influence = np.zeros(len(probabilities)), np.zeros(probabilities.shape[:2])
    for c in classes:
        positive = context.labels[known] == c
        n_pos, n_neg = int(positive.sum()), int((~positive).sum())
        if not n_pos or not n_neg:
            raise Undefined(f"class {c} has {n_pos} samples of {len(known)}")
        size = np.where(positive, n_pos, n_neg) * len(classes)
        for m, p in enumerate(probabilities):
            placed = _placements(odds_ranking(p, c)[known], positive)
            area = placed[positive].mean()
            values[m] += area / len(classes)
            influence[m, known] += (placed - area) / size
    return values, influence


def _placements(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the share of the other kind that each sample is ranked rightly against, ties half, from one sorting."""
    order = np.argsort(scores)
    ranked, kind = scores[order], positive[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of the runs of tied scores
    ends = np.append(starts[1:], len(ranked))
    pos_before = np.concatenate([[0], np.cumsum(kind)])
    pos_below = np.repeat((pos_before[starts] + pos_before[ends]) / 2, ends - starts)
    neg_below = np.repeat((starts + ends) / 2, ends - starts) - pos_below
    n_pos = pos_before[-1]
    out = np.empty(len(scores))
    out[order] = np.where(kind, neg_below / (len(scores) - n_pos), 1.0 - pos_below / n_pos)
    return out
