"""What there is to choose from, read from sources without importing torch."""

from __future__ import annotations

from ..registries import BY_KIND
from ..registry import Entry


def describe(kind: str, settings: bool = False) -> str:
    """Return one line per component of a kind (and one with its settings); names that share a summary share a line."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in BY_KIND[kind].entries().values():
        groups.setdefault((entry.module, entry.summary), []).append(entry)
    lines = []
    for (_, summary), entries in groups.items():
        plugin = f" [plug-in of {entries[0].origin}]" if entries[0].plugin else ""
        lines.append(f"  {', '.join(e.name for e in entries)}: {summary}{plugin}")
        if entries[0].settings and settings:
            lines.append(f"      {', '.join(entries[0].settings)}")
    return "\n".join(lines) + "\n"


def describe_views() -> str:
    """Return the names that shifted views and other evidence are made of."""
    from ..datasets.corruptions import CORRUPTIONS
    from ..metrics.views import ATTACKS, EVIDENCE

    lines = [f"  {name}-1 to {name}-5: {c.summary}" for name, c in CORRUPTIONS.items()]
    lines += [f"  {name}-N: an attack, of N grey levels" for name in ATTACKS]
    lines += ["  ood-noise, ood-DATASET: outliers", "evidence", f"  {', '.join(EVIDENCE)}"]
    return "\n".join(lines) + "\n"
