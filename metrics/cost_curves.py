"""Cost curves: what does a set of k accepted members cost, what multiplicity does it show, and is it the cheapest?

Costs are in trainings of the base. A speed-up says nothing alone: it stands beside the fidelity at that cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .api import Undefined
from .context import Context
from .decisions import disagreement
from .intervals import miss_probability, order_statistic_weights


@dataclass(frozen=True)
class SetCost:
    """What a generator's set costs, in base trainings.

    fixed: of the fit; marginal: of each member drawn; acceptance: share of the drawn members that are accepted. None
    or NaN: not measured.
    """

    fixed: float | None
    marginal: float | None
    acceptance: float | None

    def total(self, k: np.ndarray | int, with_base: bool = False) -> np.ndarray:
        """Return the cost of a set of k accepted members, `fixed + marginal k / acceptance` (+ 1 with the base).

        float64, of the shape of k. NaN where a part was not measured or nothing was accepted: how many draws it would
        take is then unknown. Raises ValueError for k under 1.
        """
        if np.min(k) < 1:
            raise ValueError(f"a set has at least one member, not {np.min(k)}")
        return self._at_none(with_base) + self._each() * np.asarray(k, np.float64)

    def _at_none(self, with_base: bool) -> float:
        return (math.nan if self.fixed is None else self.fixed) + with_base

    def _each(self) -> float:
        return self.marginal / self.acceptance if self.acceptance and self.marginal is not None else math.nan


def break_even(generator: SetCost, retrain: SetCost, with_base: bool = False) -> int | None:
    """Return the least k at which k accepted members of a generator cost less than k accepted retrainings.

    1: at once (if its member is the dearer one, then for a small set only); None: at no k. with_base charges the
    generator, which cannot start without it, for the base's own training; retrainings need none. Raises Undefined when
    either cost has no value (see `SetCost.total`).
    """
    head = generator._at_none(with_base) - retrain._at_none(False)
    saved = retrain._each() - generator._each()
    if not math.isfinite(head) or not math.isfinite(saved):
        who = "retraining" if math.isnan(float(retrain.total(1))) else "the generator"
        raise Undefined(f"the cost of {who} was not measured, or it has no accepted member")
    if head < saved:
        return 1
    if saved <= 0:
        return None
    return math.floor(head / saved) + 1


def multiplicity_curves(context: Context) -> dict[str, np.ndarray]:
    """Return ambiguity, discrepancy, vpr and disagreement at k = 1..K, each float64 [k], exact means over k-subsets.

    ambiguity and discrepancy: their closed forms, at all k from one histogram of flips and one sort; vpr: that of the
    mean over cases of the sorted scores, for it is linear in them; disagreement is the same at every k >= 2 and NaN at
    1. vpr is NaN when there is no label of more than two classes. A multi-label task has curves per label. Raises
    Undefined without members.
    """
    size = context.size
    if not size:
        raise Undefined("no member was accepted")
    ks = range(1, size + 1)
    weights = np.stack([order_statistic_weights(size, k) for k in ks])
    cases = np.bincount(context.flip_counts, minlength=size + 1)
    missed = np.stack([miss_probability(size, np.arange(size + 1), k) for k in ks])
    pairs = float(disagreement(context.votes).mean())
    return {
        "ambiguity": (1.0 - missed) @ cases / cases.sum(),
        "discrepancy": weights @ np.sort(context.flips.mean(axis=1)),
        "vpr": _ranges(context, weights),
        "disagreement": np.where(np.arange(size) == 0, np.nan, pairs),
    }


def pareto_front(
    cost: Sequence[float | None] | np.ndarray, fidelity: Sequence[float | None] | np.ndarray
) -> np.ndarray:
    """Return the rows that no other dominates, int, ascending: none is as cheap and as faithful, and better in one.

    cost: lower is better; fidelity: higher is better; both [row]. Equal rows stay together. A row without a value (None
    or NaN) is not on the front and dominates none. Raises ValueError for lengths that differ.
    """
    c, f = np.asarray(cost, np.float64), np.asarray(fidelity, np.float64)
    if c.shape != f.shape or c.ndim != 1:
        raise ValueError(f"cost and fidelity have shapes {c.shape} and {f.shape}, not one value per row")
    as_good = (c[:, None] <= c) & (f[:, None] >= f)  # false for NaN
    better = (c[:, None] < c) | (f[:, None] > f)
    return np.flatnonzero(~np.isnan(c) & ~np.isnan(f) & ~(as_good & better).any(axis=0))


def _ranges(context: Context, weights: np.ndarray) -> np.ndarray:
    """Return the mean range at every k: the expected maximum less the expected minimum of the mean sorted scores."""
    scored = np.ones(len(context.labels), bool) if context.scored is None else context.scored > 0
    if not scored.any():
        return np.full(context.size, np.nan)
    moved = np.sort(context.scores[:, scored] - context.scores[0, scored], axis=0)  # equal members: exactly 0
    ordered = moved.mean(axis=1)
    return (weights - weights[:, ::-1]) @ ordered
