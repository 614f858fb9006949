"""Fidelity to retraining: is a generator's set like independent retrainings of the same base recipe, at equal k?

Two `Context`s on the same test cases are compared: the accepted members of a generator, and the accepted retrainings
(the reference). `fidelity` is a generator's row of the table, `ceiling` the row of two halves of the retrainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..identity import derive_seed
from .api import Undefined
from .capacity import subsets as k_subsets
from .context import Context, member_mean, sample_blocks
from .decisions import ambiguous
from .intervals import miss_probability

QUANTITIES = (
    "ambiguous_recall",
    "ambiguous_precision",
    "conflict_spearman",
    "range_iou",
    "hit_rate",
    "energy_distance",
    "energy_distance_relative",
)
CHANCE = "energy_distance_relative_q95"
_NO_FLIPS = "no case is ambiguous among the {}"


@dataclass(frozen=True)
class Fidelity:
    """How alike two sets are.

    values: by name (`QUANTITIES`; a ceiling has `CHANCE` too), NaN where undefined; reasons: of those that are NaN.
    """

    values: dict[str, float]
    reasons: dict[str, str]


def fidelity(members: Context, reference: Context, k: int, subsets: int = 50, seed: int = 0) -> Fidelity:
    """Compare a generator's accepted members with accepted retrainings of the same base recipe on the same cases.

    A, R: cases that some member of a k-subset of the members, of the reference, decides otherwise than the base.

    - `ambiguous_recall`: `E|A and R| / E|R|`; `ambiguous_precision`: `E|A and R| / E|A|`; ratios of expectations, exact
      over all pairs of k-subsets;
    - `conflict_spearman`: rank correlation over cases of the conflict `k_i / K` among all accepted;
    - `range_iou`: `interval_overlap` of the score ranges, mean over cases and over all pairs of `subsets` seeded
      k-subsets of either set (of all k-subsets when there are no more);
    - `hit_rate`: `hit_rates`, mean over cases;
    - `energy_distance`: in probability; `energy_distance_relative`: over the mean distance of two retrainings.

    Range and hit rate follow the score of the true class and leave out cases without a label. Fewer than k accepted in
    either set: all NaN, with the reason. Raises ValueError for sets on different cases and for k < 1.
    """
    if members.base.shape != reference.base.shape or not np.array_equal(members.labels, reference.labels):
        raise ValueError(f"the cases differ: {members.base.shape} and {reference.base.shape}, or their labels")
    if members.size < k:
        return _undefined(f"{members.size} of {k} accepted")
    if reference.size < k:
        return _undefined(f"{reference.size} of {k} retrainings accepted")
    hit, wanted = (ambiguous(c.flip_counts, c.size, k) for c in (members, reference))
    chosen = [k_subsets(c.size, k, seed, subsets) for c in (members, reference)]

    @cache
    def energy() -> float:
        within = [_pair_distances(c) for c in (members, reference)]
        return energy_distance(distances(members.probabilities, reference.probabilities), *within)

    return _collect(
        {
            "ambiguous_recall": lambda: _ratio(hit @ wanted, wanted.sum(), _NO_FLIPS.format("retrainings")),
            "ambiguous_precision": lambda: _ratio(hit @ wanted, hit.sum(), _NO_FLIPS.format("members")),
            "conflict_spearman": lambda: spearman(members.flip_counts, reference.flip_counts),
            "range_iou": lambda: _case_mean(members, _mean_overlap(members.scores, reference.scores, *chosen)),
            "hit_rate": lambda: _case_mean(members, hit_rates(members.scores, reference.scores, k)),
            "energy_distance": energy,
            "energy_distance_relative": lambda: energy() / _spread(reference),
        }
    )


def ceiling(reference: Context, k: int, splits: int = 50, seed: int = 0) -> Fidelity:
    """Compare two random disjoint halves of the retrainings: what a generator would reach were it retraining itself.

    Recall and precision (equal by symmetry) are exact over all disjoint pairs of k-subsets:
    `P(both hit) = 1 - 2 C(K-h, k)/C(K, k) + C(K-h, 2k)/C(K, 2k)`. The hit rate is exact over each retraining and all
    k-subsets of the others; without ties it is `(k-1)/(k+1)` whatever the scores. The rest are means over `splits`
    seeded halves, the range over one k-subset of each. The energy distance is 0 but for the choice of the splits; what
    chance alone can make of it, in sets of that size, is `energy_distance_relative_q95`, the .95-quantile over the
    splits. The conflict of a half is coarser than that of a whole set, whose rank correlation can therefore be higher.

    Fewer than 2k retrainings: all NaN, with the reason. Raises ValueError for k < 1.
    """
    size = reference.size
    if size < 2 * k:
        return _undefined(f"{size} of {2 * k} retrainings accepted: fewer than 2k = {2 * k}", (*QUANTITIES, CHANCE))
    miss, miss_both = (miss_probability(size, reference.flip_counts, n) for n in (k, 2 * k))
    rng = np.random.default_rng(derive_seed(seed, "halves", size))
    order = np.argsort(rng.random((splits, size)), axis=1)
    first, second = order[:, : size // 2], order[:, size // 2 : 2 * (size // 2)]

    def recall() -> float:
        return _ratio((1 - 2 * miss + miss_both).sum(), (1 - miss).sum(), _NO_FLIPS.format("retrainings"))

    def range_iou() -> float:
        ends = [_ends(reference.scores, half[:, :k]) for half in (first, second)]
        return _case_mean(reference, interval_overlap(*ends[0], *ends[1]).mean(axis=0))

    @cache
    def energies() -> np.ndarray:
        d = _pair_distances(reference)
        return np.array(
            [energy_distance(d[np.ix_(a, b)], d[np.ix_(a, a)], d[np.ix_(b, b)]) for a, b in zip(first, second)]
        )

    return _collect(
        {
            "ambiguous_recall": recall,
            "ambiguous_precision": recall,
            "conflict_spearman": lambda: _split_spearman(reference.flips, first, second),
            "range_iou": range_iou,
            "hit_rate": lambda: _case_mean(reference, hit_rates(reference.scores, None, k)),
            "energy_distance": lambda: float(energies().mean()),
            "energy_distance_relative": lambda: float(energies().mean()) / _spread(reference),
            CHANCE: lambda: float(np.quantile(energies(), 0.95)) / _spread(reference),
        }
    )


def over_labels(labels: Sequence[Fidelity]) -> Fidelity:
    """Return the mean over the labels of a multi-label task (of one problem: itself).

    A quantity that one label leaves undefined is NaN: the mean over the others would compare different labels from row
    to row. Its reason names the first such label, unless all labels share it. Raises ValueError without labels.
    """
    if not labels:
        raise ValueError("no labels to average over")
    values, reasons = {}, {}
    for name in labels[0].values:
        values[name] = float(np.mean([label.values[name] for label in labels]))
        given = {i: label.reasons[name] for i, label in enumerate(labels) if name in label.reasons}
        if given:
            where, reason = next(iter(given.items()))
            shared = len(given) == len(labels) and len(set(given.values())) == 1
            reasons[name] = reason if shared else f"label {where}: {reason}"
    return Fidelity(values, reasons)


def spearman(counts: np.ndarray, reference: np.ndarray) -> float:
    """Return Spearman's rank correlation of two integer arrays [sample], ties at their midranks.

    Raises Undefined when one is constant.
    """
    for values, whose in ((counts, "members"), (reference, "retrainings")):
        if np.ptp(values) == 0:
            raise Undefined(f"every case has the same conflict among the {whose}")
    a, b = (r - r.mean() for r in (_midranks(counts), _midranks(reference)))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def interval_overlap(low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray) -> np.ndarray:
    """Return the length of the intersection over that of the union of intervals [low, high], elementwise.

    The union of disjoint intervals is as long as both together. Two intervals that are points have 0/0: 1 for the same
    point, else 0; one point and an interval that is none have 0.
    """
    shared = np.minimum(high, other_high) - np.maximum(low, other_low)
    touching = shared == 0
    np.maximum(shared, 0.0, out=shared)
    union = (high - low) + (other_high - other_low) - shared
    return np.divide(shared, union, out=touching.astype(np.float64), where=union > 0)


def hit_rates(scores: np.ndarray, fresh: np.ndarray | None, k: int) -> np.ndarray:
    """Return per case the chance that a fresh score lies in the range of a k-subset of the members, ties inside.

    `1 - C(a, k)/C(K, k) - C(b, k)/C(K, k)`, a and b the members strictly below and above it; mean over the fresh ones,
    exact over all k-subsets; `(k-1)/(k+1)` in expectation when fresh and members are exchangeable. scores: [member,
    sample]; fresh: [retraining, sample], or None: each member against the K - 1 others. Returns [sample]. Raises
    ValueError unless k is in 1..K (1..K - 1).
    """
    pool = len(scores) if fresh is not None else len(scores) - 1
    outside = miss_probability(pool, pool - np.arange(pool + 1), k)
    fresh = scores if fresh is None else fresh
    out = np.empty(scores.shape[1])
    for block in sample_blocks(scores):
        s, f = scores[:, block].T, fresh[:, block].T
        out[block] = 1.0 - (outside[_below(s, f)] + outside[_below(-s, -f)]).mean(axis=1)
    return out


def distances(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return Euclidean distances between prediction vectors over all cases, over sqrt(samples): [member, other].

    members, others: probabilities [member, sample, class]. From Gram products about the others' mean, so that close
    vectors do not cancel: exact to about 1e-8 of the distances to that mean, exactly 0 within a set of equal members.
    """
    squares, samples = np.zeros((len(members), len(others))), members.shape[1]
    for block in sample_blocks(members):
        centre = member_mean(others[:, block])
        x = (members[:, block] - centre).reshape(len(members), -1)
        y = (others[:, block] - centre).reshape(len(others), -1)
        norms = [np.einsum("mp,mp->m", z, z) for z in (x, y)]
        squares += norms[0][:, None] + norms[1] - 2.0 * (x @ y.T)
    return np.sqrt(np.maximum(squares, 0.0) / samples)


def energy_distance(across: np.ndarray, within: np.ndarray, within_other: np.ndarray) -> float:
    """Return the energy distance of two sets, `2 E d(x, y) - E d(x, x') - E d(y, y')`, from their `distances`.

    The means are over pairs of different members, which makes it unbiased: 0 in expectation for exchangeable sets, and
    below 0 about as often as above. In probability. Raises Undefined for a set of one member. Source: Szekely, Rizzo
    (2004; J. Statist. Plann. Inference 2013).
    """
    return float(2.0 * across.mean() - _mean_of_pairs(within) - _mean_of_pairs(within_other))


def _collect(parts: Mapping[str, Callable[[], float]]) -> Fidelity:
    values, reasons = {}, {}
    for name, compute in parts.items():
        try:
            values[name] = compute()
        except Undefined as reason:
            values[name], reasons[name] = math.nan, str(reason)
    return Fidelity(values, reasons)


def _undefined(reason: str, names: Sequence[str] = QUANTITIES) -> Fidelity:
    return Fidelity(dict.fromkeys(names, math.nan), dict.fromkeys(names, reason))


def _ratio(top: float, bottom: float, reason: str) -> float:
    if not bottom > 0:
        raise Undefined(reason)
    return float(top / bottom)


def _case_mean(context: Context, values: np.ndarray) -> float:
    if context.scored is None:
        return float(values.mean())
    return _ratio(context.scored @ values, context.scored.sum(), "no case has a label")


def _midranks(counts: np.ndarray) -> np.ndarray:
    tied = np.bincount(counts)
    return (np.cumsum(tied) - (tied - 1) / 2)[counts]


def _split_spearman(flips: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean rank correlation of conflict between halves, int [split, member] each."""
    halves = np.zeros((2 * len(first), len(flips)), np.float32)
    np.put_along_axis(halves, np.concatenate([first, second]), 1.0, axis=1)
    counts = (halves @ flips.astype(np.float32)).astype(np.int64).reshape(2, len(first), -1)  # float32 counts exactly
    constant = int((np.ptp(counts, axis=2) == 0).any(axis=0).sum())
    if constant:
        raise Undefined(f"every case has the same conflict within a half in {constant} of {len(first)} splits")
    return float(np.mean([spearman(a, b) for a, b in zip(*counts)]))


def _ends(scores: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest score of chosen members, int [subset, k]: [subset, sample] each."""
    return np.stack([scores[c].min(axis=0) for c in chosen]), np.stack([scores[c].max(axis=0) for c in chosen])


def _mean_overlap(scores: np.ndarray, reference: np.ndarray, chosen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the mean overlap over all pairs of the chosen subsets of either set, [sample]."""
    low, high = _ends(reference, wanted)
    total = np.zeros(scores.shape[1])
    for own_low, own_high in zip(*_ends(scores, chosen)):
        total += interval_overlap(own_low, own_high, low, high).mean(axis=0)
    return total / len(chosen)


def _below(scores: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return how many scores [sample, member] lie strictly below each of fresh [sample, retraining], these sorted."""
    order = np.argsort(np.concatenate([fresh, scores], axis=1), axis=1, kind="stable")  # of equal ones, fresh first
    member = order >= fresh.shape[1]
    return np.cumsum(member, axis=1)[~member].reshape(fresh.shape)


def _pair_distances(context: Context) -> np.ndarray:
    return context.once("pair distances", lambda: distances(context.probabilities, context.probabilities))


def _mean_of_pairs(within: np.ndarray) -> float:
    size = len(within)
    if size < 2:
        raise Undefined("1 member has no distance within its set")
    return float((within.sum() - np.trace(within)) / (size * (size - 1)))


def _spread(reference: Context) -> float:
    """Return the mean distance between two retrainings. Raises Undefined when they do not differ."""
    spread = _mean_of_pairs(_pair_distances(reference))
    if not spread > 0:
        raise Undefined("the retrainings do not differ")
    return spread
