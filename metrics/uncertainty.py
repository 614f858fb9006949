"""What moves a number of the board: other patients, other members, another base network, another way of adding up.

Members are drawn again as k-subsets without replacement, never by bootstrap (37 % would drop out of a resample, which
biases maxima).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .api import Undefined
from .capacity import subsets as k_subsets
from .context import Context, decide
from .decisions import ambiguous, disagreement, votes
from .scores import score_range

AT_K = ("ambiguity", "disagreement", "vpr")
"""Metrics of a set of k members whose sources of uncertainty are told apart."""


def over_subsets(context: Context, k: int, subsets: int = 50) -> dict[str, np.ndarray]:
    """Return each metric of `AT_K` on seeded k-subsets of the members, [subset].

    Their mean estimates the value at k, their standard deviation says how far k other members would move it. Raises
    Undefined where fewer than k members are there.
    """
    _need(context, k)
    weight = context.scored
    found: dict[str, list[float]] = {name: [] for name in AT_K}
    for chosen in k_subsets(context.size, k, context.seed, subsets):
        found["ambiguity"].append(float(context.flips[chosen].any(axis=0).mean()))
        counts = votes(context.decisions[chosen], context.classes)
        found["disagreement"].append(float(disagreement(counts).mean()))
        found["vpr"].append(float(np.average(score_range(context.scores[chosen]), weights=weight)))
    return {name: np.array(values) for name, values in found.items()}


def over_patients(context: Context, k: int) -> dict[str, np.ndarray]:
    """Return each metric of `AT_K`, exact at k, on the bootstrap draws of the patients, [draw].

    Raises Undefined where fewer than k members are there.
    """
    _need(context, k)
    b = context.bootstrap
    return {
        "ambiguity": b.mean(ambiguous(context.flip_counts, context.size, k)).draws,
        "disagreement": b.mean(disagreement(context.votes)).draws,
        "vpr": b.mean(score_range(context.scores, k), context.scored).draws,
    }


def _need(context: Context, k: int) -> None:
    if context.size < k:
        raise Undefined(f"{context.size} of {k} accepted")


@dataclass(frozen=True)
class Sources:
    """Standard deviations of one number from one source each, in the number's own unit; NaN where there is none.

    patients: of the mean over base seeds, under the bootstrap over patients that all base seeds share; members: of one
    base seed's value, under other k members (root mean square over base seeds); bases: of the per-seed values, ddof 1.
    """

    patients: float
    members: float
    bases: float


def sources(draws: Sequence[np.ndarray], subsets: Sequence[np.ndarray], values: Sequence[float]) -> Sources:
    """Return the sources of uncertainty of one number from its draws [draw], subsets [subset] and value per base seed.

    Draws of different base seeds belong to the same resampled patients and are averaged draw by draw.
    """
    patients = float(np.std(np.mean(draws, axis=0))) if len(draws) and len(draws[0]) else float("nan")
    several = len(subsets) > 0 and min(map(len, subsets)) > 1  # k of k members have no other subset
    members = float(np.sqrt(np.mean([np.var(s, ddof=1) for s in subsets]))) if several else float("nan")
    bases = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return Sources(patients, members, bases)


@dataclass(frozen=True)
class Noise:
    """How far one and the same network is from itself when it is evaluated twice: largest change of a probability,
    and the number of decisions that changed, of how many."""

    probability: float
    decisions: int
    cases: int


def noise_floor(evaluations: Mapping[str, np.ndarray], probabilities: Callable[[np.ndarray], np.ndarray]) -> Noise:
    """Return the numerical-noise floor from logits [sample, class] of one network, evaluated in several ways.

    evaluations: by what tells the ways apart (block size, strategy, TF32), the first being what the others are held
    against; probabilities: from logits. Raises ValueError for fewer than two.
    """
    if len(evaluations) < 2:
        raise ValueError("noise shows between two evaluations")
    first, *others = (probabilities(logits) for logits in evaluations.values())
    changed = [int((decide(p) != decide(first)).sum()) for p in others]
    return Noise(max(float(np.abs(p - first).max()) for p in others), max(changed), len(first))
