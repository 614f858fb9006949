"""Notes under a table: controls, holes, undefined scores, what records say of themselves, what was left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from .cells import Record, Table, machine_of
from .columns import ACCEPTANCE, calibration, overview, score_name, unranked
from .text import on_seeds, sentence

NULLS = {
    **dict.fromkeys(("ambiguity", "discrepancy", "conflict", "disagreement", "vpr", "score_sd"), 0),
    **dict.fromkeys(("capacity", "mutual_information"), 0),
    **dict.fromkeys(("capacity_effective", ACCEPTANCE), 1),
}
"""What the control `identical`, copies of the base, must score exactly."""

ROUNDING = 1e-4
"""Rows may predict in blocks of other sizes: the logits of one base network move by rounding, its scores by less."""


def notes(table: Table) -> list[str]:
    """Return all notes on `table`, one Markdown line each."""
    parts = (_controls, _bases, _holes, _unranked, _undefined, _said, _machines, _left_out)
    return [line for part in parts for line in part(table)]


def off_null(record: Record) -> list[str]:
    """Return the scores of a record of `identical` that are not exactly their null value: ["ambiguity@5 = 0.1"]."""
    return [
        f"{key} = {score['value']:.3g}"
        for key, score in sorted(record["scores"].items())
        if score_name(key) in NULLS and score["value"] is not None and score["value"] != NULLS[score_name(key)]
    ]


def _controls(table: Table) -> Iterator[str]:
    rows = [row for row in table.suite.rows if row.generator == "identical"]
    for row in rows:
        records = table.ok(row)
        broken = {seed: off for seed, record in records.items() if (off := off_null(record))}
        for seed, off in broken.items():
            yield (
                f"**CONTROL BROKEN**: `{row.label}` is not at its null values on base seed {seed}: {', '.join(off)}. "
                "Trust no number of this table before this is explained."
            )
        if records and not broken:
            yield f"Control: `{row.label}` is exactly at its null values on {on_seeds(records)}."
    if table.scored and not any(table.ok(row) for row in rows):
        yield "**No control**: without a scored record of `identical`, nothing vouches for the zeros of this table."


def _bases(table: Table) -> Iterator[str]:
    """Flag base seeds whose rows do not report one and the same base network."""
    for seed in table.suite.base_seeds:
        values: dict[str, list[float]] = defaultdict(list)
        for row in table.suite.rows:
            record = table.ok(row).get(seed)
            for key, score in record["scores"].items() if record else ():
                if key.endswith(".base") and score["value"] is not None:
                    values[key].append(score["value"])
        if apart := sorted(key for key, v in values.items() if max(v) - min(v) > ROUNDING):
            yield f"**Bases differ**: the rows of base seed {seed} disagree about {', '.join(apart)}."


def _holes(table: Table) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in table.suite.rows:
        for cell in table.row_cells(row):
            if cell.state != "ok":
                groups[row.label, cell.state, cell.reason].append(cell.base_seed)
    for (label, state, reason), seeds in groups.items():
        yield f"`{label}`: {state} on {on_seeds(seeds)}" + (f": {sentence(reason)}" if reason else ".")


def _unranked(table: Table) -> Iterator[str]:
    if len(table.suite.base_seeds) < 2:
        return
    columns = {c.key: c for c in (*overview(table.suite), *calibration(table.suite)) if c.better}
    for row in table.suite.rows:
        if row.control or not table.ok(row):
            continue
        groups: dict[str, list[str]] = defaultdict(list)
        for key, column in columns.items():
            if reason := unranked(table, column, row):
                groups[reason].append(key)
        for reason, keys in groups.items():
            rest = columns.keys() - set(keys)
            where = "in " + ", ".join(f"*{columns[key].title}*" for key in keys)
            if not rest:
                where = "in any column"
            elif rest == {ACCEPTANCE}:
                where = "but by acceptance"
            yield f"`{row.label}`: not ranked {where}: {sentence(reason)}"


def _undefined(table: Table) -> Iterator[str]:
    for row in table.suite.rows:
        groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for seed, record in table.ok(row).items():
            for key, score in sorted(record["scores"].items()):
                if score["value"] is None:
                    groups[score["reason"]][key].append(seed)
        for reason, keys in sorted(groups.items()):
            names = sorted(keys)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            seeds = {seed for where in keys.values() for seed in where}
            yield f"`{row.label}`: {shown} undefined on {on_seeds(seeds)}: {sentence(reason)}"


def _said(table: Table) -> Iterator[str]:
    """What the records note about their sets: equal notes on one line, and notes that differ in their numbers only."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    texts: dict[str, list[str]] = defaultdict(list)
    for row in table.suite.rows:
        for cell in table.row_cells(row):
            for note in (cell.record["set"].get("notes") or []) if cell.record else []:
                alike = re.sub(r"\d+(\.\d+)?", "#", note)
                groups[alike][row.label].append(cell.base_seed)
                texts[alike] += [note] if note not in texts[alike] else []
    everywhere = len(table.suite.base_seeds)
    for alike, rows in groups.items():
        where = [f"`{label}`" + ("" if len(s) == everywhere else f" ({on_seeds(s)})") for label, s in rows.items()]
        first, *others = texts[alike]
        yield f"{', '.join(where)}: " + sentence(
            f"{first} (and {len(others)} alike, with other numbers)" if others else first
        )


def _machines(table: Table) -> Iterator[str]:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in table.suite.rows:
        for seed, record in table.ok(row).items():
            if machine_of(record) != table.machine:
                groups[row.label, machine_of(record)].append(seed)
    for (label, machine), seeds in groups.items():
        yield f"`{label}`: ran on {machine} for {on_seeds(seeds)}; that cost is left out of the comparison."


def _left_out(table: Table) -> Iterator[str]:
    """Records about a cell that another record fills; those that make a stale cell stand among the holes."""
    reasons: dict[str, int] = defaultdict(int)
    for record, reason in table.left_out:
        if table.cells[record["row"], record["identity"]["base_seed"]].state != "stale":
            reasons[reason] += 1
    for reason, n in sorted(reasons.items()):
        yield f"Left out beside the records shown, {n} with {sentence(reason)}"
