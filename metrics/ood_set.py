"""Out-of-distribution detection by a set of equally good networks: does their disagreement detect what doubt does not?

A set's scores are one number per image, from the probabilities of all members. How far detectors of single members
agree on an image is told by `detector_agreement`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from .api import Undefined
from .context import Context
from .decisions import disagreement, votes
from .intervals import Estimate, miss_probability
from .ood import TPR, Placements, entropy, max_softmax, placements
from .scores import mutual_information, viable_prediction_range

CONFIDENCE = "ensemble_max_softmax"


def set_scores(context: Context) -> dict[str, np.ndarray]:
    """Return the set's scores of every image of a part or view, [sample] each, higher = further out.

    `ensemble_max_softmax`, `ensemble_entropy` (of two classes it ranks as the former, and is left out): of the mean of
    the members' probabilities; `mutual_information` (BALD): the entropy less the members' own; `range`: viable
    prediction range of the positive class (more than two classes: of the class that the base decides, for such images
    have no true one); `disagreement`: share of pairs of members that decide differently. Raises Undefined for fewer
    than two members.
    """
    if context.size < 2:
        raise Undefined(f"{context.size} of 2 accepted")
    followed = context.positive if context.classes == 2 else context.base_decisions
    return {
        CONFIDENCE: max_softmax(context.ensemble),
        **({"ensemble_entropy": entropy(context.ensemble)} if context.classes > 2 else {}),
        "mutual_information": mutual_information(context.probabilities),
        "range": viable_prediction_range(context.probabilities, followed),
        "disagreement": disagreement(context.votes),
    }


def set_detectors(context: Context, view: Context) -> dict[str, Estimate]:
    """Return the AUROC of every score of the set: the part's cases against the images of a view out of distribution.

    Draws are those of the part's bootstrap, shared by all scores. Raises Undefined for fewer than two members.
    """
    inside, outside = set_scores(context), set_scores(view)
    return {name: _estimate(context, view, _placed(inside[name], outside[name])) for name in inside}


def gains_over_confidence(context: Context, view: Context) -> dict[str, Estimate]:
    """Return the AUROC of every other score of the set less that of the ensemble's confidence, with paired draws."""
    found = set_detectors(context, view)
    base = found.pop(CONFIDENCE)
    return {name: Estimate(e.value - base.value, e.draws - base.draws, e.n) for name, e in found.items()}


def unseen_by_confidence(context: Context, view: Context) -> dict[str, Estimate]:
    """Return the AUROC of every other score of the set among the images that the ensemble's confidence lets pass.

    Those are, of either kind, the ones no further out by confidence than 95 % of the part's cases; 0.5: the score knows
    nothing about them that counts. The threshold is held fixed in the draws. Raises Undefined where no image out of
    distribution passes.
    """
    inside, outside = set_scores(context), set_scores(view)
    threshold = keep_threshold(inside[CONFIDENCE])
    passed_in, passed_out = inside.pop(CONFIDENCE) <= threshold, outside[CONFIDENCE] <= threshold
    if not passed_out.any():
        raise Undefined("confidence detects every image out of distribution")
    found = {}
    for name in inside:
        among = _placed(inside[name][passed_in], outside[name][passed_out])
        whole = Placements(among.auroc, np.zeros((1, len(passed_in))), np.zeros((1, len(passed_out))))
        whole.inside[:, passed_in], whole.outside[:, passed_out] = among.inside, among.outside
        found[name] = _estimate(context, view, whole)
    return found


def keep_threshold(in_scores: np.ndarray) -> np.ndarray:
    """Return the lowest score that is not exceeded by 95 % of the cases in distribution, [..., sample] -> [...]."""
    cases = in_scores.shape[-1]
    last = np.searchsorted(np.arange(1, cases + 1) / cases, TPR)
    return np.sort(in_scores, axis=-1)[..., last]


@dataclass(frozen=True)
class DetectorAgreement:
    """How alike the members' detectors are on the same images.

    rank_correlation: Spearman's, mean over pairs of members; an image is flagged by a member when its score is above
    those of 95 % of the cases in distribution: flagged: mean share over members; flag_disagreement: share of pairs of
    members of which one flags the image and one does not, flag_ambiguity: the chance that not all of k members decide
    alike, both mean over images; left_out: members whose scores are NaN or the same for every image.
    """

    rank_correlation: float
    flagged: float
    flag_disagreement: float
    flag_ambiguity: float
    left_out: int


def detector_agreement(in_scores: np.ndarray, scores: np.ndarray, k: int | None = None) -> DetectorAgreement:
    """Compare the scores that equally good members give the same images, [member, sample], higher = further out.

    in_scores: the members' scores of the cases in distribution, [member, sample], for their thresholds; k: number of
    members whose flags are compared, over all k-subsets, by default all. Raises Undefined with fewer than two members,
    or fewer than k, whose scores tell images apart.
    """
    usable = ~(np.isnan(scores).any(axis=1) | np.isnan(in_scores).any(axis=1)) & (np.ptp(scores, axis=1) > 0)
    members = int(usable.sum())
    if members < max(2, k or 0):
        raise Undefined(f"the scores of {members} of {len(scores)} members tell images apart")
    scores, in_scores = scores[usable], in_scores[usable]
    correlations = np.corrcoef(rankdata(scores, axis=1))
    flags = scores > keep_threshold(in_scores)[:, None]
    counts = flags.sum(axis=0)
    alike = sum(miss_probability(members, hits, k or members) for hits in (counts, members - counts))
    return DetectorAgreement(
        rank_correlation=float(correlations[np.triu_indices(members, 1)].mean()),
        flagged=float(flags.mean()),
        flag_disagreement=float(disagreement(votes(flags, 2)).mean()),
        flag_ambiguity=float(1.0 - np.mean(alike)),
        left_out=len(usable) - members,
    )


def _placed(in_scores: np.ndarray, out_scores: np.ndarray) -> Placements:
    return placements(in_scores[None], out_scores[None])


def _estimate(context: Context, view: Context, placed: Placements) -> Estimate:
    found = placed.resampled(context, view)
    return Estimate(float(found.values[0]), found.draws[:, 0], context.bootstrap.patients)
