"""The ladder: how much multiplicity survives as the members of a set must satisfy more and more specifications?

Whoever adds one specification after another hopes that the members that satisfy them all agree on the rest; Ganesh
(WACV 2024) finds that multiplicity persists. Specifications are decided on val; what they leave open is measured on
test, always at an equal number of members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .abstention import score_of
from .api import Score, Undefined
from .context import Context
from .decisions import ambiguous, disagreement, votes
from .performance import errors
from .scores import score_range

_ROUNDING = 1e-12  # of a difference of two shares: a member exactly at the margin satisfies it


@dataclass(frozen=True)
class Rung:
    """What the members that satisfy the first specifications leave open on test; NaN with its reason.

    label: the specification that this rung adds to those below it; members: how many satisfy them all; ranges:
    property -> expected max - min over their k-subsets; ambiguity: theirs against the base, at k; disagreement: theirs
    by pairs (it does not grow with their number, two suffice).
    """

    label: str
    members: int
    ranges: Mapping[str, Score]
    ambiguity: Score
    disagreement: Score


def ladder(
    specifications: Mapping[str, np.ndarray], properties: Mapping[str, np.ndarray], test: Context, k: int = 5
) -> list[Rung]:
    """Return a rung per specification: the members that satisfy it and all before it, and what they leave open.

    specifications: label -> bool [member], in their order, decided on val; properties: name -> test value of every
    member, float [member]; test: all members that could be made (not only accepted ones) and the base on test; a
    multi-label task has a ladder per label. Range at k: `sum_{j>=k} (v_(j) + (-v)_(j)) C(j-1, k-1)/C(K, k)`. Under k
    members (disagreement: two): NaN with the reason "n of k members left". Raises ValueError for arrays that are not
    one value per member and for k under 1.
    """
    if k < 1:
        raise ValueError(f"no subsets of {k} members")
    for name, values in {**specifications, **properties}.items():
        if np.shape(values) != (test.size,):
            raise ValueError(f"'{name}' has shape {np.shape(values)}, not one value for each of {test.size} members")
    left = np.ones(test.size, bool)
    rungs = []
    for label, satisfied in specifications.items():
        left = left & np.asarray(satisfied, bool)
        rungs.append(_rung(label, np.flatnonzero(left), properties, test, k))
    return rungs


def specifications(
    val: Context, accepted: np.ndarray, accuracy: float = 0.01, recall: float = 0.02
) -> dict[str, np.ndarray]:
    """Return the usual ladder on val: accepted by the loss, then also as accurate, then also as good in every class.

    accepted: bool [member], whose loss is within epsilon of the base's; then `accuracy >= base's - accuracy`; then
    `min over classes of recall >= base's - recall`, over the classes that val has. val: the same members as `accepted`.
    Raises Undefined when no case of val has a label.
    """
    if not val.known.any():
        raise Undefined("no case of val has a label")
    wrong, base_wrong = errors(val.probabilities, val.labels), errors(val.base, val.labels)
    of_classes = [val.labels == c for c in range(val.classes) if (val.labels == c).any()]

    def gain(masks: list[np.ndarray]) -> np.ndarray:
        """Return by how much each member's least share of right decisions in `masks` exceeds the base's."""
        members = np.max([wrong[:, mask].mean(axis=1) for mask in masks], axis=0)
        return np.max([base_wrong[mask].mean() for mask in masks]) - members

    return {
        "loss within epsilon": np.asarray(accepted, bool),
        f"accuracy within {accuracy:g}": gain([val.known]) >= -accuracy - _ROUNDING,
        f"worst-class recall within {recall:g}": gain(of_classes) >= -recall - _ROUNDING,
    }


def _rung(label: str, left: np.ndarray, properties: Mapping[str, np.ndarray], test: Context, k: int) -> Rung:
    few = Undefined(f"{len(left)} of {k} members left")
    if len(left) < k:
        return Rung(label, len(left), dict.fromkeys(properties, score_of([few])), score_of([few]), _pairs(left, test))
    ranges = {name: _range(np.asarray(values, np.float64)[left], k) for name, values in properties.items()}
    flips = ambiguous(test.flips[left].sum(axis=0), len(left), k)
    return Rung(label, len(left), ranges, score_of([test.bootstrap.mean(flips)]), _pairs(left, test))


def _range(values: np.ndarray, k: int) -> Score:
    undefined = int((~np.isfinite(values)).sum())
    if undefined:
        return Score(float("nan"), reason=f"{undefined} of {len(values)} members have no value")
    return Score(float(score_range(values[:, None], k)[0]), n=len(values))


def _pairs(left: np.ndarray, test: Context) -> Score:
    if len(left) < 2:
        return score_of([Undefined(f"{len(left)} of 2 members left")])
    return score_of([test.bootstrap.mean(disagreement(votes(test.decisions[left], test.classes)))])
