"""Cells of a suite with all that their sets were seen to do: contexts of val and test, views and evidence attached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..identity import derive_seed
from ..metrics.api import Predictions
from ..metrics.context import Context, contexts
from ..metrics.context import Evidence as Measured
from ..metrics.intervals import PatientBootstrap
from .view_files import ViewFile, of_cases

if TYPE_CHECKING:
    from .science import Cells, Evidence


@dataclass(frozen=True)
class Sight:
    """One cell as val and test and all their views saw it: contexts per label, with `views` and `evidence` attached."""

    cell: Evidence
    members: np.ndarray
    val: list[Context]
    test: list[Context]


Sights = dict[str, dict[int, Sight]]


def sights(cells: Cells) -> Sights:
    """Return row -> base seed -> sight, for the cells whose file of views is there."""
    return {
        label: {seed: sight(cell, cell.views) for seed, cell in row.items() if cell.views is not None}
        for label, row in cells.items()
        if any(cell.views is not None for cell in row.values())
    }


def sight(cell: Evidence, file: ViewFile) -> Sight:
    """Return what the accepted members among those that views take were seen to do."""
    members = cell.accepted[cell.accepted < taken(file)]
    val, test = (attached(cell, file, part, members) for part in ("val", "test"))
    return Sight(cell, members, val, test)


def taken(file: ViewFile) -> int:
    """Return how many members of its set a file of views took: the first so many."""
    of_evidence = [len(values) - 1 for named in file.evidence.values() for values in named.values()]
    return max([*(len(p.logits) for p in file.predictions.values()), *of_evidence], default=0)


def attached(cell: Evidence, file: ViewFile, part: str, members: np.ndarray) -> list[Context]:
    """Return what some members were seen to do on the cases of `val` or `test` that views show, a context per label."""
    own: Predictions = getattr(cell, part)
    cases = cell.record.get("views", {}).get("cases") or len(own.base)
    shown = of_cases(own, part, cases)
    found = (replace(cell, val=shown) if part == "val" else replace(cell, test=shown)).problems(part, members)
    for context in found:
        context.evidence |= _evidence(file.evidence.get(part, {}), members)
    seed, draws = cell.settings.seed, cell.settings.draws
    for key, predictions in file.predictions.items():
        of_part, _, name = key.partition("/")
        if of_part != part:
            continue
        bootstrap = found[0].bootstrap  # a shifted view shows the part's own cases
        if predictions.labels.max(initial=-1) < 0 <= found[0].labels.max(initial=-1):  # images that nobody labelled
            own_seed = derive_seed(seed, "view", name) % 2**32
            bootstrap = PatientBootstrap(len(predictions.base), predictions.patient, draws, own_seed)
        for context, view in zip(found, contexts(predictions, members, bootstrap, seed), strict=True):
            view.evidence |= _evidence(file.evidence.get(key, {}), members)
            context.views[name] = view
    return found


def _evidence(arrays: Mapping[str, np.ndarray], members: np.ndarray) -> dict[str, Measured]:
    return {
        name: Measured(
            values[1:][members].astype(np.float64) if len(values) > 1 else values[1:], values[0].astype(float)
        )
        for name, values in arrays.items()
    }
