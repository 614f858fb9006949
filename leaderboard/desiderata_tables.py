"""Tables of the page on desiderata: a row per set, a column per quantity, the base above, what is undefined below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from ..metrics.views import ATTACKS, OUTLIERS
from .desiderata_axes import CLEAN
from .rows import seeds_mark, shown_rows
from .science_page import ABREAST
from .suite import Suite
from .text import NONE, in_bold, interval, markdown, number, undefined_for

Science = dict[str, Any]
_Part = TypeVar("_Part")
Entry = Mapping[str, Any]
"""A value with its interval, base seeds and reason, or a property of one row (base, members, range, chance)."""

LIMITS = {"rate": (0.0, 1.0), "correlation": (-1.0, 1.0), "ratio": (0.0, math.inf)}
"""Values that a quantity can have: an interval, which is symmetric, is not shown beyond them."""


@dataclass(frozen=True)
class Board:
    """A suite and what its views say. silent: rows without an accepted member among those shown the views."""

    suite: Suite
    found: Science
    k: int
    margin: float
    patients: int | None
    silent: frozenset[str]

    def axis(self, name: str) -> dict[str, Any]:
        """Return the items of an axis in the order of the page: views from corruptions to outliers."""
        items = self.found["axes"].get(name, {})
        return {item: items[item] for item in sorted(items, key=place)}

    def properties(self, name: str) -> dict[str, Any]:
        """Return suffix -> property, for those of a name of which some row has a value."""
        keys = [key for key in self.found["properties"] if parted(key)[0] == name]
        found = {parted(key)[1]: self.found["properties"][key] for key in keys}
        return {s: found[s] for s in sorted(found, key=place) if any_told(found[s])}

    @property
    def ranked(self) -> list[str]:
        """Labels of the rows that are no controls."""
        return [row.label for row in self.suite.rows if not row.control]


@dataclass(frozen=True)
class Column:
    """A column of a table: what each row has, how that is shown, and the base's cell."""

    title: str
    rows: Mapping[str, Entry]
    cell: Callable[[Entry], str]
    base: str = NONE


def parted(key: str) -> tuple[str, str]:
    """Return a property's name and its suffix: `ood_auroc/ood-noise:knn`, `membership_auc:lira`."""
    name, _, suffix = key.replace("/", ":", 1).partition(":")
    return name, suffix


def place(item: str) -> tuple[int, str, int, str]:
    """Return the place of a view, or of a view and what is said of it, on the page; what is no view by its name."""
    view, _, rest = item.partition(":")
    operation, _, size = view.partition("-")
    kind = 0 if view in ("", CLEAN) else 3 if operation == OUTLIERS else 2 if operation in ATTACKS else 1
    return kind, operation, int(size) if size.isdecimal() else 0, f"{size}:{rest}"


def any_told(told: Entry) -> bool:
    """Return whether a property has a value in some row."""
    return any(row["members"]["value"] is not None for row in told["rows"].values())


def silent_rows(desiderata: Science) -> frozenset[str]:
    """Return the rows whose members have no value of any property."""
    of_rows: dict[str, list[bool]] = {}
    for told in desiderata["properties"].values():
        for label, row in told["rows"].items():
            of_rows.setdefault(label, []).append(row["members"]["value"] is None)
    return frozenset(label for label, none in of_rows.items() if all(none))


def tabled(board: Board, columns: Sequence[Column], base: bool = False, abreast: int = ABREAST) -> list[str]:
    """Return tables of a few columns each, and why values are undefined; nothing where no row has an entry."""
    rows = shown_rows(board.suite, {label for column in columns for label in column.rows})
    if not rows:
        return []
    tables = []
    for few in split(columns, abreast):
        lines = [["generator", *(column.title for column in few)]]
        lines += [["base", *(column.base for column in few)]] if base else []
        for label, text in rows:
            lines.append([text, *(c.cell(c.rows[label]) if label in c.rows else NONE for c in few)])
        tables.append(markdown(lines))
    return [*tables, undefined_for(_reasons(board, columns, [label for label, _ in rows]))]


def split(columns: Sequence[_Part], abreast: int) -> list[Sequence[_Part]]:
    """Return the columns in as few parts of at most `abreast` as there can be, of nearly equal length."""
    parts = max(1, math.ceil(len(columns) / abreast))
    ends = [round(i * len(columns) / parts) for i in range(parts + 1)]
    return [columns[i:j] for i, j in pairwise(ends)]


def _reasons(board: Board, columns: Sequence[Column], labels: Iterable[str]) -> list[tuple[str, str]]:
    """Return (reason, row) of undefined values, with the columns that it holds for unless it holds for all."""
    found = []
    for label in labels:
        if label in board.silent:
            continue
        entries = {column.title: _value(column.rows.get(label, {})) for column in columns}
        reasons = {name: value["reason"] for name, value in entries.items() if value and value["value"] is None}
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, own in reasons.items() if own == reason]
            found.append((reason, f"`{label}`" + ("" if len(names) == len(columns) else f" ({', '.join(names)})")))
    return found


def _value(entry: Entry) -> Entry:
    """Return the value that an entry shows first: of a property, the members' mean; of a pair, its first."""
    return entry.get("members") or entry.get("first") or entry


def cell_of(board: Board, unit: str, ends: bool = True) -> Callable[[Entry], str]:
    """Return how the values of a column are shown, with their intervals if `ends`."""
    return lambda row: _shown(board, row, unit, ends)


def _shown(board: Board, row: Entry, unit: str, ends: bool = True) -> str:
    """Return a value, with its interval if `ends`, and how many base seeds have it if not all do."""
    if row["value"] is None:
        return NONE
    least, most = LIMITS.get(unit, (-math.inf, math.inf))
    low, high = (None if v is None or not ends else min(max(v, least), most) for v in (row["low_end"], row["high_end"]))
    return interval(row["value"], low, high, unit) + seeds_mark(board.suite, row["seeds"])


def base_cell(board: Board, rows: Mapping[str, Entry], ends: bool = True, unit: str = "rate") -> str:
    """Return the base's value from the rows with most base seeds, lowest to highest where it is not one of all."""
    known = [rows[label] for label, _ in shown_rows(board.suite, rows) if rows[label]["value"] is not None]
    most = max((row["seeds"] for row in known), default=0)
    full = [row for row in known if row["seeds"] == most]
    if not full:
        return NONE
    if len({number(row["value"], unit) for row in full}) == 1:
        return _shown(board, full[0], unit, ends)
    return from_to([row["value"] for row in full], unit) + seeds_mark(board.suite, most)


def mean_and_range(board: Board, text: str, told: Entry) -> Column:
    """Return the column of a property: the members' mean, their range and what chance gives."""
    base = base_cell(board, {label: row["base"] for label, row in told["rows"].items()})
    return Column(text, told["rows"], lambda row: _mean_and_range_cell(board, row), base)


def range_alone(board: Board, text: str, told: Entry) -> Column:
    """Return the column of a property's range and what chance gives, without the members' mean."""
    return Column(text, told["rows"], lambda row: _range_cell(row) + seeds_mark(board.suite, row["seeds"]))


def _mean_and_range_cell(board: Board, row: Entry) -> str:
    members = row["members"]
    if members["value"] is None:
        return NONE
    of_mean, of_range = (seeds_mark(board.suite, seeds) for seeds in (members["seeds"], row["seeds"]))
    mean = number(members["value"], "rate") + (of_mean if of_mean != of_range else "")
    return f"{mean}, {_range_cell(row)}{of_range}"


def _range_cell(row: Entry) -> str:
    if row["range"] is None:
        return NONE
    chance = "" if row["chance"] is None else f" / {number(row['chance'], 'rate')}"
    return in_bold(number(row["range"], "rate"), above_chance(row)) + chance


def above_chance(row: Entry) -> bool:
    """Return whether the members' range is above what chance gives in 19 of 20 samples."""
    return row["range"] is not None and row["chance"] is not None and row["range"] > row["chance"]


def no_controls(board: Board, rows: Mapping[str, Entry]) -> list[Entry]:
    """Return the values of the rows that are no controls."""
    return [rows[label] for label in board.ranked if label in rows and rows[label]["value"] is not None]


def mean_of_sets(board: Board, rows: Mapping[str, Entry]) -> float | None:
    """Return the mean over the rows that are no controls, None without any value."""
    values = [row["value"] for row in no_controls(board, rows)]
    return sum(values) / len(values) if values else None


def signs(rows: Sequence[Entry]) -> dict[str, int]:
    """Return how many differences of sets that are no controls there are, and how many intervals leave 0 out."""
    known = [row for row in rows if row["low_end"] is not None]
    above, below = sum(row["low_end"] > 0 for row in known), sum(row["high_end"] < 0 for row in known)
    return {"gains": len(known), "above": above, "below": below}


def from_to(values: Sequence[float | None], unit: str = "rate") -> str:
    """Return "0.010 to 0.030", one number where both are shown alike, a dash without any."""
    known = [v for v in values if v is not None]
    if not known:
        return NONE
    low, high = number(min(known), unit), number(max(known), unit)
    return low if low == high else f"{low} to {high}"
