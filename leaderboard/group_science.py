"""What the sets of a suite mean for groups of patients: fairness, hidden strata, and rivals trained for the worst one.

`of_groups` is the part of a suite's science that FAIRNESS.md shows; `render_groups` is that page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..identity import digest
from ..metrics.api import METRICS
from . import comparators, strata
from .comparators import versus
from .fairness import fairness
from .fairness_page import Science, render_fairness
from .groups import Groups, to_text
from .suite import Suite
from .text import paragraph

if TYPE_CHECKING:
    from .science import Cells

VERSION = 1
STRATA = "strata"
"""Attribute under which hidden clusters are attached: the name by which group DRO asks for them."""


def attach(cells: Cells, groups: Groups) -> None:
    """Add the hidden clusters to the attributes of all cells; UserError where they belong to other cases."""
    if "clusters" not in groups.strata:
        return
    for row in cells.values():
        for cell in row.values():
            for view in ("val", "test"):
                predictions, codes = getattr(cell, view), groups.strata["clusters"].codes[view]
                if len(codes) != len(predictions.base):
                    raise UserError(
                        f"groups/{groups.suite}.json has {len(codes)} cases of {view}, the predictions "
                        f"{len(predictions.base)}: run `make groups`"
                    )
                predictions.attributes[STRATA] = codes


def of_groups(
    cells: Cells, suite: Suite, groups: Groups | None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return the parts `fairness`, `strata` and `comparators`; cells: with the hidden clusters attached."""
    progress("fairness")
    values = dict(groups.attributes) if groups else {}
    if groups and "clusters" in groups.strata:
        values[STRATA] = groups.strata["clusters"].names
    found: dict[str, Any] = {"fairness": fairness(cells, suite.k, suite.intersections, values)}
    progress("strata and rivals")
    if groups and groups.strata:
        codes = {kind: s.codes["test"] for kind, s in groups.strata.items()}
        names = {kind: s.names for kind, s in groups.strata.items()}
        truths = {name: views["test"] for name, views in groups.truths.items()}
        classes = [str(c) for c in next(iter(next(iter(cells.values())).values())).record["data"]["classes"]]
        places = {kind: s.places["test"] for kind, s in groups.strata.items()}
        found["strata"] = strata.strata_science(cells, codes, names, truths, classes, groups.attributes, places)
        found["found"] = {kind: s.about for kind, s in groups.strata.items()}
    found["comparators"] = versus(cells, suite.k, suite.margin)
    return found


def group_inputs(suite: Suite, groups: Groups | None) -> str:
    """Return a digest of all that `of_groups` depends on beside records, predictions and criteria."""
    versions = {name: f.info.version for name, f in METRICS.load_all() if f.info.level == "group"}
    told = to_text(groups) if groups else None
    return digest({"groups": told, "intersections": list(suite.intersections), "metrics": versions, "version": VERSION})


def render_groups(found: Sequence[tuple[Suite, Science]]) -> str:
    """Return FAIRNESS.md for the suites whose science is given."""
    return render_fairness(found, (_search, strata.section, comparators.section))


def _search(suite: Suite, science: Science) -> list[str]:
    """Return what was said when strata were looked for."""
    clusters = (science.get("found") or {}).get("clusters")
    if clusters is None:
        return []
    classes = [f"in class {c['label']}, {c['found']}" for c in clusters["classes"]]
    again = clusters["rediscovered"]
    said = "no network divides a class" if again is None else f"adjusted Rand index {again:.2f}"
    return [
        "### Looking for hidden strata\n",
        paragraph(
            f"Strata were found on train by networks that are on no board. Clusters: {'; '.join(classes)}. How alike "
            f"those are that five networks find: {said} within classes, mean over pairs, on test."
        ),
    ]
