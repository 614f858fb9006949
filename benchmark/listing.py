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
