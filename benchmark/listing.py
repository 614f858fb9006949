"""What there is to choose from, read from sources without importing torch."""

from __future__ import annotations

from ..registry import Entry, Registry

KINDS = {
    "generator": ("multiplicity_bench.generators", "register_generator", "multiplicity_bench.generators"),
    "dataset": ("multiplicity_bench.datasets", "register_dataset", "multiplicity_bench.datasets"),
    "network": ("multiplicity_bench.benchmark.networks", "register_network", None),
    "metric": ("multiplicity_bench.metrics", "register_metric", "multiplicity_bench.metrics"),
}


def describe(kind: str) -> str:
    """Return one line per component of a kind; names that share a module and a summary share a line."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in Registry[object](kind, *KINDS[kind]).entries().values():
        groups.setdefault((entry.module, entry.summary), []).append(entry)
    lines = []
    for (_, summary), entries in groups.items():
        plugin = f" [plug-in of {entries[0].origin}]" if entries[0].plugin else ""
        lines.append(f"  {', '.join(e.name for e in entries)}: {summary}{plugin}")
    return "\n".join(lines) + "\n"
