"""How the rows of a suite are named on its pages, and how a number from fewer than all its base seeds is marked."""

from __future__ import annotations

from collections.abc import Container

from .suite import Suite


def shown_rows(suite: Suite, labels: Container[str]) -> list[tuple[str, str]]:
    """Return (label, how it is shown) of the suite's rows that are among `labels`, in the suite's order."""
    shown = [(r.label, f"`{r.label}`" + (" (control)" if r.control else "")) for r in suite.rows]
    return [(label, text) for label, text in shown if label in labels]


def seeds_mark(suite: Suite, seeds: int) -> str:
    """Return " (3)" where only three of the suite's base seeds have a value, "" where all have, or none."""
    return f" ({seeds})" if 0 < seeds < len(suite.base_seeds) else ""
