"""The board for programs: every score and cost of every row, one line each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from .cells import Record, Table, settle_all, verified
from .columns import COST, UNITS, Column, every_column, ranks, summarise
from .suite import Suite
from .text import exact, states

FIELDS = ["suite", "row", "control", "verified", "state", "key", "value", "low", "high", "interval"]
FIELDS += ["base_seeds", "rank", "reason", "per_seed"]


def render_csv(records: Iterable[Record], suites: Iterable[Suite]) -> str:
    """Return the board as CSV. A row without scores is one line with its state and reason.

    state: as in the overview; interval: how low and high were made; base_seeds: how many are behind the value; reason:
    why the others have none; per_seed: `seed:value`, separated by spaces; verified: no for records of a tree with
    uncommitted changes, which stand after the others of their suite.
    """
    records, suites = list(records), list(suites)
    clean = settle_all(suites, [r for r in records if verified(r)])
    dirty = settle_all(suites, [r for r in records if not verified(r)])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for tables in zip(clean, dirty):
        writer.writerows(_lines(tables[0], "yes"))
        if tables[1].records:
            writer.writerows(_lines(tables[1], "no"))
    return out.getvalue()


def _lines(table: Table, is_verified: str) -> Iterator[list[str]]:
    suite = table.suite
    columns = every_column(suite)
    ranked = {key: ranks(table, c) for key, c in columns.items() if c.better}
    for row in suite.rows:
        cells = table.row_cells(row)
        head = [suite.name, row.label, "yes" if row.control else "no", is_verified, states(c.state for c in cells)]
        records = table.ok(row).values()
        if not records:
            yield [*head, *[""] * 7, _joined(c.reason for c in cells), ""]
        scores = sorted({key for r in records for key in r["scores"]})
        costs = sorted({COST + name for r in records for name in r["cost"] if name in UNITS})
        for key in [*scores, *costs]:
            summary = summarise(table, row, columns.get(key, Column(key, key)))
            yield [
                *head,
                key,
                *(exact(x) for x in (summary.value, summary.low, summary.high)),
                summary.interval,
                str(len(summary.seeds)),
                str(ranked.get(key, {}).get(row.label, "")),
                _joined(summary.reasons.values()),
                " ".join(f"{seed}:{exact(value)}" for seed, value in sorted(summary.seeds.items())),
            ]


def _joined(reasons: Iterable[str]) -> str:
    return " / ".join(sorted({reason for reason in reasons if reason}))
