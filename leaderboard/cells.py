"""Which record fills which cell of a suite's table, so that one table never mixes what cannot be compared.

A record is a candidate for a cell if dataset, network, row and base seed are the cell's. It fills the cell if it also
agrees with what the suite declares and with the table's context: the dataset with its digest, network, recipe,
numerics, protocol and versions of metrics that most records share (ties: the first in sorted order). Any other
candidate makes a cell that nothing fills *stale*; a cell without candidates is *missing*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..identity import canonical_json, plain
from .suite import Component, Row, Suite

Record = dict[str, Any]
CONTEXT = ("dataset", "network", "training", "numerics", "resample_seed")


@dataclass(frozen=True)
class Cell:
    """One row and base seed of a table: ok | skipped | failed with its record, or stale | missing without one."""

    row: Row
    base_seed: int
    state: str
    record: Record | None = None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The cells of a suite by (row label, base seed), what all their records share, and what was left out and why.

    machine: hardware and threads of most records; costs are compared only between records that have it.
    left_out: candidates that fill no cell, with the reason.
    """

    suite: Suite
    cells: Mapping[tuple[str, int], Cell]
    records: list[Record]
    machine: str
    left_out: list[tuple[Record, str]]

    def row_cells(self, row: Row) -> list[Cell]:
        """Return the cells of `row`, one per base seed."""
        return [self.cells[row.label, seed] for seed in self.suite.base_seeds]

    @property
    def scored(self) -> int:
        """The number of cells that hold scores."""
        return sum(cell.state == "ok" for cell in self.cells.values())

    def ok(self, row: Row) -> dict[int, Record]:
        """Return base seed -> record of the cells of `row` that hold scores."""
        return {c.base_seed: c.record for c in self.row_cells(row) if c.state == "ok" and c.record is not None}


def is_candidate(suite: Suite, record: Record) -> bool:
    """Whether `record` is about a cell of `suite`, be it stale or not."""
    identity = record["identity"]
    return (
        identity["dataset"]["name"] == suite.dataset.name
        and identity["network"]["name"] == suite.network.name
        and identity["base_seed"] in suite.base_seeds
        and record["row"] in [row.label for row in suite.rows]
    )


def departure(suite: Suite, record: Record) -> str:
    """Return where `record` departs from what `suite` declares ("members 8, the suite declares 20"), or ""."""
    identity, settings = record["identity"], suite.settings
    declared: list[tuple[str, Any, Any]] = [
        ("members", identity["members"], suite.row(record["row"]).members),
        ("generator_seed", identity["generator_seed"], suite.generator_seed),
        ("device", identity["numerics"]["device"], suite.device),
    ]
    for part, component in (("dataset", suite.dataset), ("network", suite.network)):
        declared += _settings(part, identity[part], component)
    declared += _settings("training", identity["training"], Component("training", suite.training))
    for key in ("epsilon", "epsilons", "k", "loss", "draws", "seed"):
        declared.append((key, record["protocol"].get(key), getattr(settings, key)))
    for name, found, wanted in declared:
        if plain(found) != plain(wanted):
            return f"{name} {_shown(found)}, the suite declares {_shown(wanted)}"
    return ""


def settle(suite: Suite, records: Iterable[Record]) -> Table:
    """Return the table of `suite` filled from `records`, in whatever order they come."""
    candidates = sorted((r for r in records if is_candidate(suite, r)), key=lambda r: r["name"])
    left_out = {r["name"]: reason for r in candidates if (reason := departure(suite, r))}
    agreeing = [r for r in candidates if r["name"] not in left_out]
    scored = [r for r in agreeing if r["status"] == "ok"]
    reference = _most_common([_context(r) for r in scored or agreeing])
    for r in agreeing:
        context = _context(r)
        if reason := _difference(context, {part: reference[part] for part in context if part in reference}):
            left_out[r["name"]] = reason
    for row in suite.rows:
        same = [r for r in agreeing if r["row"] == row.label and r["name"] not in left_out]
        generator = _most_common([_generator(r) for r in same])
        for r in same:
            if reason := _difference(_generator(r), generator):
                left_out[r["name"]] = reason
    kept = [r for r in agreeing if r["name"] not in left_out]
    cells = {(row.label, seed): _cell(row, seed, kept, candidates, left_out) for row, seed in suite.cells()}
    machine = _most_common([machine_of(r) for r in kept if r["status"] == "ok"])
    apart = [(r, left_out[r["name"]]) for r in candidates if r["name"] in left_out]
    return Table(suite, cells, kept, machine or "", apart)


def settle_all(suites: Iterable[Suite], records: Iterable[Record]) -> list[Table]:
    """Return the table of every suite; a record that fills a cell of one suite is not stale in another."""
    suites, records = list(suites), list(records)
    filling = [{r["name"] for r in settle(suite, records).records} for suite in suites]
    everywhere = set().union(*filling)
    return [
        settle(suite, [r for r in records if r["name"] in own or r["name"] not in everywhere])
        for suite, own in zip(suites, filling)
    ]


def verified(record: Record) -> bool:
    """Whether `record` comes from a tree without uncommitted changes."""
    return not record["provenance"].get("dirty")


def machine_of(record: Record) -> str:
    """Return what the costs of `record` depend on: the fingerprint of the hardware and the number of threads."""
    hardware, threads = record["cost"].get("hardware") or "unknown hardware", record["cost"].get("threads")
    return hardware if threads is None or "threads" in hardware else f"{hardware}, {threads} threads"


def _cell(row: Row, seed: int, kept: list[Record], candidates: list[Record], left_out: Mapping[str, str]) -> Cell:
    def here(r: Record) -> bool:
        return r["row"] == row.label and r["identity"]["base_seed"] == seed

    for r in kept:
        if here(r):
            return Cell(row, seed, r["status"], r, r.get("reason", ""))
    stale = [left_out[r["name"]] for r in candidates if here(r)]
    return Cell(row, seed, "stale", None, stale[0]) if stale else Cell(row, seed, "missing")


def _settings(part: str, identity: Mapping[str, Any], component: Component) -> list[tuple[str, Any, Any]]:
    return [(f"{part}.{key}", identity.get(key), wanted) for key, wanted in component.settings.items()]


def _context(record: Record) -> dict[str, Any]:
    context = {part: record["identity"].get(part) for part in CONTEXT}
    if record["status"] != "ok":
        return context
    return context | {"metrics": record["protocol"]["metrics"], "predictions": record["protocol"].get("predictions")}


def _generator(record: Record) -> dict[str, Any]:
    return {"generator": record["identity"]["generator"]}


def _most_common(values: list[Any]) -> Any:
    """Return the value that occurs most often; among equals, the first by its canonical text."""
    texts = {canonical_json(value): value for value in values}
    counts = Counter(canonical_json(value) for value in values)
    return texts[min(counts, key=lambda text: (-counts[text], text))] if counts else None


def _difference(found: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    one, other = _flat(found), _flat(reference)
    different = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if not different:
        return ""
    # A changed digest says less than the setting or version that changed with it.
    key = min(different, key=lambda key: (key.endswith("digest"), key))
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    return f"{key} {_shown(one.get(key))}, the table has {_shown(other.get(key))}{more}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: plain(value)}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    return "nothing" if value is None else canonical_json(value).replace(",", ", ")
