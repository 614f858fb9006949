"""What a run prints when it ends: one line per record, and a short table per suite."""

from __future__ import annotations

from collections.abc import Iterable

from .cells import Record, settle, verified
from .columns import ACCEPTANCE, accepted, overview, score_name, summarise
from .suite import Suite
from .text import NONE, aligned, number, on_seeds, states


def summary_line(record: Record) -> str:
    """Return the main scores of one record on one line."""
    head = f"{record['row']}, base seed {record['identity']['base_seed']}: "
    if record["status"] != "ok":
        return f"{head}{record['status']}, {record.get('reason') or 'no reason given'}"
    k, scores = record["protocol"]["k"], record["scores"]

    def score(key: str) -> str:
        return number(scores.get(key, {}).get("value"), "number")

    parts = [
        f"accepted {accepted(record)} of {record['set']['drawn']} at epsilon {record['protocol']['epsilon']:g}",
        f"accuracy {score('accuracy.member_mean')} (base {score('accuracy.base')})",
        f"loss {score('nll.member_mean')} (base {score('nll.base')})",
        f"ambiguity@{k} {score(f'ambiguity@{k}')}",
        f"disagreement {score('disagreement')}",
        f"vpr@{k} {score(f'vpr@{k}')}",
        f"capacity@{k} {score(f'capacity@{k}')}",
        f"cost {number(record['cost'].get('cost_per_accepted_bt'), 'number')} base trainings per member",
    ]
    return head + ", ".join(parts)


def views_lines(record: Record) -> list[str]:
    """Return a short table of what a record's set does on shifted views of test; no lines without any."""
    if not record.get("views"):
        return []
    k, scores = record["protocol"]["k"], record["scores"]
    views = [v.partition("/")[2] for v in record["views"]["views"] if v.startswith("test/")]
    columns = {
        "base": "accuracy.base/{}",
        "members": "accuracy.member_mean/{}",
        "ensemble": "accuracy.ensemble/{}",
        f"ambiguity@{k}": f"ambiguity@{k}/{{}}",
        "disagreement": "disagreement/{}",
    }
    lines = [["accuracy on test", *columns]]
    for name in ["", *(v for v in views if f"accuracy.base/{v}" in scores)]:
        keys = [key.format(name).removesuffix("/") for key in columns.values()]
        lines.append([name or "as it is", *(number(scores.get(key, {}).get("value"), "number") for key in keys)])
    notes = [f"{record['views']['members']} members are seen on views", *record["views"]["notes"]]
    return [*aligned(lines).splitlines(), *notes]


def render_terminal(records: Iterable[Record], suite: Suite) -> str:
    """Return a short table of `suite`: means over base seeds without intervals, holes with their reasons."""
    table = settle(suite, records)
    # The counts say what acceptance says; capacity says nothing beyond vpr for two classes, and lines must stay short.
    columns = [c for c in overview(suite) if score_name(c.key) not in (ACCEPTANCE, "capacity")]
    lines = [["", "accepted", *(c.title for c in columns)]]
    for row in suite.rows:
        records_of_row = table.ok(row)
        members = (
            f"{sum(map(accepted, records_of_row.values()))}/{sum(r['set']['drawn'] for r in records_of_row.values())}"
        )
        hole = states(c.state for c in table.row_cells(row))
        values = [number(summarise(table, row, c).value, c.unit) for c in columns]
        lines.append([row.label, members, *values] if records_of_row else [row.label, hole, *[NONE] * len(columns)])
    notes = [
        f"{suite.title}: members accepted at epsilon {suite.epsilon:g} on val, sets compared at k = {suite.k} on test, "
        f"{on_seeds(suite.base_seeds)}; cost in base trainings per member"
    ]
    for row in suite.rows:
        for cell in table.row_cells(row):
            if cell.reason:
                notes.append(f"{row.label}, base seed {cell.base_seed}: {cell.state}, {cell.reason}")
    if unverified := sum(not verified(r) for r in table.records):
        notes.append(f"{unverified} of {len(table.records)} records are unverified: uncommitted changes in the tree")
    return aligned(lines) + "\n" + "\n".join(notes) + "\n"
