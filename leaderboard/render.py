"""The board as text: a pure function of records and suites, equal to the byte whatever the order of the records."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..identity import row_label
from .cells import Cell, Record, Table, is_candidate, machine_of, settle
from .columns import (
    ACCEPTANCE,
    Column,
    Summary,
    accepted,
    calibration,
    cost_in_seconds,
    cost_in_trainings,
    discrimination,
    membership,
    multiplicity,
    over_seeds,
    overview,
    per_seed,
    ranks,
    summarise,
    unranked,
)
from .suite import Row, Suite

NONE = "–"
REFERENCE = "retrain"
"""The row all others are read against."""

NULLS = {
    "ambiguity": 0.0,
    "discrepancy": 0.0,
    "conflict": 0.0,
    "disagreement": 0.0,
    "vpr": 0.0,
    "score_sd": 0.0,
    "capacity": 0.0,
    "capacity_effective": 1.0,
    "mutual_information": 0.0,
    ACCEPTANCE: 1.0,
}
"""What the control `identical`, copies of the base, must score exactly."""

INTRODUCTION = """\
# Leaderboard

Written by `leaderboard build` from the committed records; do not edit. `leaderboard check` writes it again and compares.

A row is a way to make a *set* of networks out of one trained network. A member counts if its loss on the validation
part is at most epsilon above the base network's; everything else is measured on the test part. **Multiplicity** (how
far equally good networks decide differently) is neither good nor bad, so those columns have no rank; there is no
overall rank either. Read a row against `retrain`, independent trainings by the same recipe, and against the *controls*,
which show what a metric does not mean: `identical` copies the base, `logit_noise` and `temperature` alter its outputs
and are no networks that could be deployed.

A cell is `value [low,high]`, the mean over base seeds with its 95 % t interval, unless a legend says otherwise. A
**rank** is 1 + the number of rows that are significantly better (paired over base seeds, 95 %, Holm within the column);
ties share a rank, controls have none. Cells say `missing` where no record is, and `stale` where a record departs from
the rest of the table; nothing stale enters a number.
"""


def render(records: Iterable[Record], suites: Iterable[Suite]) -> str:
    """Return the board in Markdown: for every suite a header, an overview, a table per axis, and notes."""
    records, suites = list(records), list(suites)
    parts = [INTRODUCTION]
    for suite in suites:
        parts += _suite(suite, records, suites)
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def render_csv(records: Iterable[Record], suites: Iterable[Suite]) -> str:
    """Return every score and cost of every row as CSV, one line each; `per_seed` is `seed:value` separated by spaces.

    Unverified rows (records of a tree with uncommitted changes) are marked; a cell without a value has a reason.
    """
    records = list(records)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for suite in suites:
        for verified in (True, False):
            table = settle(suite, [r for r in records if _verified(r) == verified])
            if verified or table.cells and any(c.state != "missing" for c in table.cells.values()):
                writer.writerows(_csv_rows(table, verified))
    return out.getvalue()


CSV_FIELDS = ("suite row control verified state key value low high interval base_seeds rank reason per_seed").split()


def summary_line(record: Record) -> str:
    """Return the main scores of one record on one line, for the end of a run."""
    head = f"{record['row']}, base seed {record['identity']['base_seed']}: "
    if record["status"] != "ok":
        return f"{head}{record['status']}, {record.get('reason') or 'no reason given'}"
    protocol, scores = record["protocol"], record["scores"]

    def score(key: str) -> str:
        value = scores.get(key, {}).get("value")
        return NONE if value is None else f"{value:.3f}"

    k = protocol["k"]
    drawn = record["set"]["drawn"]
    price = record["cost"].get("cost_per_accepted_bt")
    return head + " · ".join(
        [
            f"accepted {accepted(record)} of {drawn} at epsilon {protocol['epsilon']:g}",
            f"accuracy {score('accuracy.member_mean')} (base {score('accuracy.base')})",
            f"loss {score('nll.member_mean')} (base {score('nll.base')})",
            f"ambiguity@{k} {score(f'ambiguity@{k}')}",
            f"disagreement {score('disagreement')}",
            f"vpr@{k} {score(f'vpr@{k}')}",
            f"capacity@{k} {score(f'capacity@{k}')} bits",
            f"{NONE if price is None else f'{price:.3f}'} base trainings per accepted member",
        ]
    )


def render_terminal(records: Iterable[Record], suite: Suite) -> str:
    """Return a short table of `suite` for the terminal: means without intervals, verified or not."""
    table = settle(suite, records)
    columns = overview(suite)
    lines = [["", "members", *(c.title for c in columns)]]
    for row in suite.rows:
        states = _states(table.row_cells(row), suite)
        values = [_number(summarise(table, row, c).value, c.unit) for c in columns]
        lines.append([row.label, _counts(table, row) or states, *values])
    seeds = "one base seed" if len(suite.base_seeds) == 1 else f"means over {len(suite.base_seeds)} base seeds"
    notes = [
        f"{suite.title}: epsilon {suite.epsilon:g}, k {suite.k}, {seeds}; cost in base trainings per accepted member"
    ]
    notes += [
        f"  {cell.row.label}, base seed {cell.base_seed}: {cell.state}, {cell.reason}" for cell in _unfilled(table)
    ]
    if any(not _verified(r) for r in table.records):
        notes.append("  unverified: the tree had uncommitted changes")
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(c.ljust(w) if i < 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    return "\n".join([*text, "", *notes]) + "\n"


def _suite(suite: Suite, records: list[Record], suites: list[Suite]) -> list[str]:
    table = settle(suite, [r for r in records if _verified(r)])
    unverified = settle(suite, [r for r in records if not _verified(r)])
    others = {r["name"] for s in suites if s != suite for r in settle(s, records).records}
    parts = [f"## {suite.title}\n", f"{suite.description}\n" if suite.description else ""]
    if table.records or not unverified.records:
        parts += [_header(table), "### Overview\n", _overview(table)]
    if any(c.state == "ok" for c in table.cells.values()):
        parts += _performance(table) + _membership(table) + _multiplicity(table) + _cost(table)
    parts += _notes(table, others)
    if unverified.records:
        parts += [
            "### Unverified\n",
            UNVERIFIED,
            _header(unverified),
            _overview(unverified),
            *_notes(unverified, others),
        ]
    return parts


UNVERIFIED = (
    "These records come from a tree with uncommitted changes: nobody can tell which code made them. "
    "They enter no other table.\n"
)


def _header(table: Table) -> str:
    suite = table.suite
    lines: list[tuple[str, str]] = []
    if table.records:
        reference = next((r for r in table.records if r["status"] == "ok"), table.records[0])
        lines += _data_lines(reference) + _recipe_lines(reference)
    lines.append(
        (
            "Protocol",
            f"a member is accepted at {suite.loss} ≤ base + {suite.epsilon:g} on val; sets compared at k = {suite.k}; "
            f"{suite.members} members drawn per row and base seed; base seeds {_spans(suite.base_seeds)} "
            f"({len(suite.base_seeds)}); {suite.draws} bootstrap draws over patients",
        )
    )
    filled = sum(c.state == "ok" for c in table.cells.values())
    lines.append(("Records", f"{filled} of {len(table.cells)} cells; {_sources(table)}"))
    return "".join(f"- **{title}**: {text}\n" for title, text in lines)


def _data_lines(record: Record) -> list[tuple[str, str]]:
    data, identity = record["data"], record["identity"]["dataset"]
    settings = {k: v for k, v in identity.items() if k not in ("name", "version", "digest")}
    kind = "**synthetic** images" if data["synthetic"] else "real images"
    classes = [str(c) for c in data["classes"]]
    named = ", ".join(f"{i} = {c}" for i, c in enumerate(classes[:10])) + (", ..." if len(classes) > 10 else "")
    positive = data.get("positive")
    sizes = ", ".join(f"{part} {n}" for part, n in _in_order(data["sizes"]))
    patients = data.get("patients")
    duplicates = {pair: n for pair, n in sorted((data.get("duplicates") or {}).items()) if n}
    text = [
        f"`{row_label(identity['name'], settings)}`, {kind}, {data['task']} ({named})",
        f"positive class: {positive} = {classes[positive]}" if positive is not None else "",
        sizes,
        "no patient ids, every image counts as a patient" if not patients else f"patients: {_mapping(patients)}",
        "exact duplicates across splits: " + (_mapping(duplicates) if duplicates else "none"),
    ]
    lines = [("Data", "; ".join(t for t in text if t))]
    origin = [f"licence {data['licence']}" if data.get("licence") else "", str(data.get("source") or "")]
    origin += [str(note) for note in data.get("notes") or []]
    return [*lines, ("Source", "; ".join(t.rstrip(".") for t in origin if t))] if any(origin) else lines


def _recipe_lines(record: Record) -> list[tuple[str, str]]:
    identity, numerics = record["identity"], record["identity"]["numerics"]
    network = {k: v for k, v in identity["network"].items() if k not in ("name", "version")}
    training = ", ".join(f"{k} {_plain(v)}" for k, v in sorted(identity["training"].items()))
    switches = ", ".join(f"{name} {'on' if numerics.get(name) else 'off'}" for name in ("tf32", "autocast"))
    return [
        ("Network and recipe", f"`{row_label(identity['network']['name'], network)}`; {training}"),
        ("Run on", f"{numerics['device']}, {numerics['dtype']}, {switches}; {machine_of(record)}"),
    ]


def _sources(table: Table) -> str:
    def distinct(values: Iterable[Any]) -> str:
        texts = sorted({str(v)[:12] for v in values if v})
        return f"`{texts[0]}`" if len(texts) == 1 else f"{len(texts)} different"

    digests = {r["identity"]["dataset"].get("digest") for r in table.records}
    sources = {r["provenance"].get("source_digest") for r in table.records}
    if not table.records:
        return "none yet"
    return f"dataset digest {distinct(digests)}; package source {distinct(sources)}"


def _overview(table: Table) -> str:
    columns = overview(table.suite)
    base = {"nll.member_mean": "nll.base", "accuracy.member_mean": "accuracy.base"}
    text = _table(
        table, columns, base=base, first=("base seeds", lambda row: _states(table.row_cells(row), table.suite))
    )
    legend = "; ".join(f"*{c.title}*: {c.meaning}" for c in columns)
    return f"{text}\n{_sentence(legend)} {_legend(table, columns)}\n"


def _performance(table: Table) -> list[str]:
    parts = ["### Performance\n"]
    for columns in (discrimination(table.suite), calibration(table.suite)):
        base = {c.key: c.key.replace(".member_mean", ".base") for c in columns if c.key.endswith(".member_mean")}
        parts += [_table(table, columns, base=base)]
    legend = "On test. Each score is the mean over accepted members; *ensemble* scores their mean probabilities. "
    legend += "*loss*: cross-entropy in nats; *Brier*: mean squared error of the probabilities over classes; "
    legend += "*ECE*: expected calibration error. "
    return [*parts, legend + _legend(table, columns) + "\n"]


def _membership(table: Table) -> list[str]:
    columns = membership(table.suite)
    reference = next((row for row in table.suite.rows if row.label == REFERENCE), None)
    acceptance = Column("accepted", ACCEPTANCE, "rate")

    def beside(row: Row) -> str:
        mine, theirs = per_seed(table, row, acceptance)[0], per_seed(table, reference, acceptance)[0]
        return _cell(over_seeds({s: theirs[s] for s in mine if s in theirs}, "rate"), "rate", interval=False)

    def difference(row: Row) -> str:
        mine, theirs = per_seed(table, row, acceptance)[0], per_seed(table, reference, acceptance)[0]
        both = {s: mine[s] - theirs[s] for s in mine if s in theirs}
        return _cell(over_seeds(both, "difference"), "difference")

    last: list[tuple[str, Callable[[Row], str]]] = [("eps in s.e.", lambda row: _epsilon_in_se(table, row))]
    if reference is not None:
        last = [(f"`{REFERENCE}`", beside), (f"minus `{REFERENCE}`", difference), *last]
    legend = (
        "Share of drawn members whose loss on val is at most *eps* above the base's. *members*: how many, base seed by "
        "base seed. *certified* and *possible*: with the upper and the lower end of the one-sided 95 % interval of the "
        f"paired loss difference. *`{REFERENCE}`*: its acceptance on the same base seeds. *eps in s.e.*: "
        f"{table.suite.epsilon:g} in standard errors of the paired difference, smallest and largest over base seeds; "
        "below 2 (marked !) the validation part is too small to tell members from non-members. "
    )
    first = ("members", lambda row: _counts(table, row))
    return ["### Membership\n", _table(table, columns, first=first, last=last), legend + _legend(table, columns) + "\n"]


def _multiplicity(table: Table) -> list[str]:
    columns = multiplicity(table.suite)
    legend = (
        "On test, no rank: more is neither good nor bad. Shares of cases, except *vpr* and *score sd* (probability), "
        "*capacity* and *mutual information* (bits) and *effective verdicts* (mean of 2^capacity). For two classes "
        "capacity is a function of the ends of the score range: no evidence beyond *vpr*. "
    )
    return ["### Multiplicity\n", _table(table, columns), legend + _legend(table, columns) + "\n"]


def _cost(table: Table) -> list[str]:
    suite = table.suite
    last: list[tuple[str, Callable[[Row], str]]] = [
        ("a member is", lambda row: _kind(table, row)),
        ("resumed", lambda row: _spans(s for s, r in table.ok(row).items() if r["cost"].get("resumed")) or "no"),
    ]
    legend = (
        f"Measured on {table.machine}; only runs there are compared. First table in trainings of the base network, timed "
        "in the same process: (fixed + drawn × marginal) / accepted, without and with the base itself. *a member is*: "
        "one weight vector (deployable) or not, and its BatchNorm policy. *resumed*: base seeds whose run was "
        "interrupted, so that its times are sums over attempts. "
    )
    return [
        "### Cost\n",
        _table(table, cost_in_trainings(suite)),
        _table(table, cost_in_seconds(suite), last=last, interval=False),
        legend + _legend(table, cost_in_trainings(suite)) + " The second table has means only.\n",
    ]


def _table(
    table: Table,
    columns: Sequence[Column],
    base: Mapping[str, str] | None = None,
    first: tuple[str, Callable[[Row], str]] | None = None,
    last: Sequence[tuple[str, Callable[[Row], str]]] = (),
    interval: bool = True,
) -> str:
    """Return rows x columns in Markdown; `base` maps keys of columns to those of the base network's own line."""
    suite = table.suite
    rank = {c.title: ranks(table, c) for c in columns if c.better and len(suite.base_seeds) > 1}
    header = ["generator", *([first[0]] if first else [])]
    for c in columns:
        header += [c.title, "rank"] if c.title in rank else [c.title]
    lines = [[*header, *(title for title, _ in last)]]
    if base:
        line = ["*base network*", *([""] if first else [])]
        for c in columns:
            cell = _cell(_base(table, base[c.key], c.unit), c.unit, interval) if c.key in base else ""
            line += [cell, ""] if c.title in rank else [cell]
        lines.append(line + [""] * len(last))
    for row in suite.rows:
        cells = table.row_cells(row)
        filled = any(c.state == "ok" for c in cells)
        states = _states(cells, suite)
        line = [f"`{row.label}`" + (" *control*" if row.control else "")]
        line += [first[1](row) or states] if first else []
        for i, c in enumerate(columns):
            summary = summarise(table, row, c)
            text = _cell(summary, c.unit, interval, len(suite.base_seeds)) if filled else "" if first or i else states
            line += [text, str(rank[c.title].get(row.label, NONE if filled else ""))] if c.title in rank else [text]
        lines.append(line + [text(row) if filled else "" for _, text in last])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    """Return a Markdown table whose columns are also aligned as plain text; all but the first to the right."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]

    def join(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    texts = [
        join([c.ljust(w) if i < 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]) for line in lines
    ]
    rule = join(["-" * w if i < 1 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "".join([texts[0], rule, *texts[1:]])


def _cell(summary: Summary, unit: str, interval: bool = True, seeds: int = 0) -> str:
    """Return `value [low,high]`; `*` marks one base seed among several, (3) a mean over three of them."""
    if summary.value is None:
        return NONE
    text = _number(summary.value, unit)
    if interval and summary.low is not None and summary.high is not None:
        text += f" [{_number(summary.low, unit)},{_number(summary.high, unit)}]"
    if seeds > 1 and len(summary.seeds) == 1:
        text += " *"
    elif summary.reasons:
        text += f" ({len(summary.seeds)})"
    return text


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return NONE
    if unit == "bytes":
        return _bytes(value)
    text = f"{value:+.3f}" if unit == "difference" else f"{value:.3f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _bytes(value: float) -> str:
    for name in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or name == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {name}" if name == "B" else f"{value:.1f} {name}"


def _base(table: Table, key: str, unit: str) -> Summary:
    """Summarise a score of the base network, which all rows of one base seed share."""
    values = {}
    for row in table.suite.rows:
        for seed, record in table.ok(row).items():
            value = record["scores"].get(key, {}).get("value")
            if value is not None:
                values.setdefault(seed, (value, record["scores"][key]))
    if len(values) == 1:
        ((seed, (value, score)),) = values.items()
        return Summary(value, score.get("low"), score.get("high"), score.get("interval", ""), {seed: value})
    return over_seeds({seed: value for seed, (value, _) in values.items()}, unit)


def _legend(table: Table, columns: Sequence[Column]) -> str:
    """Return what the brackets of a table are, and what its marks mean, as far as they occur."""
    suite = table.suite
    summaries = [summarise(table, row, c) for row in suite.rows for c in columns]
    single = sorted({s.interval for s in summaries if len(s.seeds) == 1 and s.interval})
    made = f" ({', '.join(single)})" if single else ""
    if len(suite.base_seeds) == 1:
        return f"Brackets: **test cases only**, one base seed{made}; no ranks."
    text = f"Brackets: 95 % t interval over up to {len(suite.base_seeds)} base seeds."
    if any(len(s.seeds) == 1 for s in summaries):
        text += f" `*`: one base seed, test cases only{made}."
    counts = sorted({len(s.seeds) for s in summaries if s.reasons and len(s.seeds) > 1})
    if counts:
        text += f" ({', '.join(map(str, counts))}): mean over that many base seeds, undefined on the others."
    return text


def _states(cells: Sequence[Cell], suite: Suite) -> str:
    """Return "5" where every base seed has scores, else what stands in their place: "3 of 5, 2 skipped"."""
    counts: dict[str, int] = defaultdict(int)
    for cell in cells:
        counts[cell.state] += 1
    total = len(cells)
    if counts["ok"] == total:
        return str(total)
    holes = [(state, counts[state]) for state in ("skipped", "failed", "stale", "missing") if counts[state]]
    if not counts["ok"] and len(holes) == 1:
        return holes[0][0]
    return ", ".join([f"{counts['ok']} of {total}", *(f"{n} {state}" for state, n in holes)])


def _counts(table: Table, row: Row) -> str:
    """Return "18 20 19 of 20": how many members were accepted, base seed by base seed."""
    records = table.ok(row)
    if not records:
        return ""
    counts = [str(accepted(records[s])) if s in records else NONE for s in table.suite.base_seeds]
    drawn = sorted({r["set"]["drawn"] for r in records.values()})
    return f"{' '.join(counts)} of {'/'.join(map(str, drawn))}"


def _epsilon_in_se(table: Table, row: Row) -> str:
    values = [v for r in table.ok(row).values() if (v := r["set"].get("epsilon_in_se")) is not None]
    if not values:
        return NONE
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return (low if low == high else f"{low}–{high}") + (" !" if min(values) < 2 else "")


def _kind(table: Table, row: Row) -> str:
    kinds = {
        ("deployable" if r["set"]["deployable"] else "not deployable")
        + (f", BatchNorm {r['set']['batchnorm']}" if r["set"].get("batchnorm") else "")
        for r in table.ok(row).values()
    }
    return " / ".join(sorted(kinds))


def _notes(table: Table, others: set[str]) -> list[str]:
    lines = [*_control_notes(table), *_hole_notes(table), *_rank_notes(table), *_nan_notes(table)]
    lines += [*_record_notes(table), *_cost_notes(table), *_base_notes(table), *_left_out_notes(table, others)]
    return ["### Notes\n", "".join(f"- {line}\n" for line in lines)] if lines else []


def off_null(record: Record) -> list[str]:
    """Return the scores of a record of `identical` that are not exactly at their null value, "ambiguity@5 = 0.1"."""
    off = []
    for key, score in sorted(record["scores"].items()):
        name = key.split("@")[0].split("/")[0].split("#")[0]
        if name in NULLS and score["value"] is not None and score["value"] != NULLS[name]:
            off.append(f"{key} = {score['value']:.3g}")
    return off


def _control_notes(table: Table) -> list[str]:
    rows = [row for row in table.suite.rows if row.generator == "identical"]
    lines = []
    for row in rows:
        records = table.ok(row)
        broken = {seed: off for seed, record in records.items() if (off := off_null(record))}
        for seed, off in sorted(broken.items()):
            lines.append(
                f"**CONTROL BROKEN**: `{row.label}` is not at its null values on base seed {seed}: {', '.join(off)}. "
                "Trust no number of this table before this is explained."
            )
        if records and not broken:
            lines.append(f"Control: `{row.label}` is exactly at its null values on base seeds {_spans(records)}.")
    if not any(table.ok(row) for row in rows):
        lines.append("**No control**: no scored record of `identical`, nothing vouches for the zeros of this table.")
    return lines


def _unfilled(table: Table) -> list[Cell]:
    return [c for row in table.suite.rows for c in table.row_cells(row) if c.state != "ok" and c.state != "missing"]


def _hole_notes(table: Table) -> list[str]:
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in table.suite.rows:
        for cell in table.row_cells(row):
            if cell.state != "ok":
                groups[row.label, cell.state, cell.reason].append(cell.base_seed)
    return [
        f"`{label}` {state} on base seeds {_spans(seeds)}" + (f": {_sentence(reason)}" if reason else ".")
        for (label, state, reason), seeds in groups.items()
    ]


def _rank_notes(table: Table) -> list[str]:
    if len(table.suite.base_seeds) < 2:
        return []
    columns = {c.key: c for c in (*overview(table.suite), *calibration(table.suite)) if c.better}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in table.suite.rows:
        for column in columns.values():
            reason = unranked(table, column, row)
            if reason and not row.control and table.ok(row):
                groups[row.label, reason].append(column.title)
    return [
        f"`{label}` is unranked in {'every ranked column' if len(titles) == len(columns) else ', '.join(titles)}: {reason}."
        for (label, reason), titles in groups.items()
    ]


def _nan_notes(table: Table) -> list[str]:
    lines = []
    for row in table.suite.rows:
        groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for seed, record in table.ok(row).items():
            for key, score in sorted(record["scores"].items()):
                if score["value"] is None:
                    groups[score["reason"]][key].append(seed)
        for reason, keys in sorted(groups.items()):
            names = sorted(keys)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            seeds = _spans({seed for where in keys.values() for seed in where})
            lines.append(f"`{row.label}`, base seeds {seeds}: {shown} undefined: {_sentence(reason)}")
    return lines


def _record_notes(table: Table) -> list[str]:
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in table.suite.rows:
        for cell in table.row_cells(row):
            for note in cell.record["set"].get("notes") or [] if cell.record else []:
                groups[str(note)][row.label].append(cell.base_seed)
    lines = []
    for note, rows in groups.items():
        everywhere = all(len(seeds) == len(table.suite.base_seeds) for seeds in rows.values())
        where = [f"`{label}`" + ("" if everywhere else f" (base seeds {_spans(s)})") for label, s in rows.items()]
        lines.append(f"{', '.join(where)}: {_sentence(note)}")
    return lines


def _cost_notes(table: Table) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in table.suite.rows:
        for seed, record in table.ok(row).items():
            if machine_of(record) != table.machine:
                groups[machine_of(record), row.label].append(seed)
    return [
        f"`{label}`, base seeds {_spans(seeds)}: run on {machine}; its cost is left out of the comparison."
        for (machine, label), seeds in sorted(groups.items())
    ]


def _base_notes(table: Table) -> list[str]:
    """Flag base seeds whose rows do not report one and the same base network."""
    lines = []
    for seed in table.suite.base_seeds:
        values: dict[str, list[float]] = defaultdict(list)
        for row in table.suite.rows:
            record = table.ok(row).get(seed)
            for key, score in record["scores"].items() if record else ():
                if key.endswith(".base") and score["value"] is not None:
                    values[key].append(score["value"])
        # Rows may predict in other block sizes: logits move by rounding, and a tie may break the other way.
        apart = sorted(key for key, v in values.items() if max(v) - min(v) > 1e-4)
        if apart:
            lines.append(f"**Base differs**: on base seed {seed} the rows disagree about {', '.join(apart)}.")
    return lines


def _left_out_notes(table: Table, others: set[str]) -> list[str]:
    """Name records about a cell that another record fills; those that another table shows are no news."""
    stale = {c.row.label + f"-b{c.base_seed}" for c in table.cells.values() if c.state == "stale"}
    reasons: dict[str, int] = defaultdict(int)
    for record in table.left_out_records:
        cell = f"{record['row']}-b{record['identity']['base_seed']}"
        if record["name"] not in others and cell not in stale:
            reasons[table.left_out[record["name"]]] += 1
    return [f"Left out, {n} older or other record{'s' * (n > 1)}: {reason}." for reason, n in sorted(reasons.items())]


def _csv_rows(table: Table, verified: bool) -> Iterable[list[str]]:
    suite = table.suite
    named = {
        c.key: c
        for columns in (
            overview,
            discrimination,
            calibration,
            membership,
            multiplicity,
            cost_in_trainings,
            cost_in_seconds,
        )
        for c in columns(suite)
    }
    ranked = {key: ranks(table, c) for key, c in named.items() if c.better and len(suite.base_seeds) > 1}
    for row in suite.rows:
        head = [suite.name, row.label, _bool(row.control), _bool(verified), _states(table.row_cells(row), suite)]
        records = table.ok(row)
        scores = sorted({key for record in records.values() for key in record["scores"]})
        costs = sorted({key for record in records.values() for key in record["cost"] if key in COSTS})
        if not records:
            reasons = sorted({c.reason for c in table.row_cells(row) if c.reason})
            yield [*head, *[""] * 7, " / ".join(reasons), ""]
        for key in [*scores, *(f"cost:{name}" for name in costs)]:
            summary = summarise(table, row, named.get(key, Column(key, key, _unit(key))))
            numbers = [_exact(x) for x in (summary.value, summary.low, summary.high)]
            rank = str(ranked.get(key, {}).get(row.label, ""))
            reasons = " / ".join(sorted(set(summary.reasons.values())))
            seeds = " ".join(f"{seed}:{_exact(value)}" for seed, value in sorted(summary.seeds.items()))
            yield [*head, key, *numbers, summary.interval, str(len(summary.seeds)), rank, reasons, seeds]


COSTS = frozenset(
    f"{name}{unit}"
    for name, units in {
        "fixed_cost": ("_s", "_bt"),
        "marginal_cost": ("_s", "_bt"),
        "cost_per_accepted": ("_s", "_bt"),
        "cost_per_accepted_with_base": ("_bt",),
        "base_training": ("_s",),
        "peak_memory": ("_bytes",),
        "bytes_per_member": ("",),
    }.items()
    for unit in units
)


def _unit(key: str) -> str:
    """Return the unit of a score that no table shows; the bounds of its t interval follow from it."""
    name = key.split("@")[0].split("/")[0].split("#")[0].split(".")[0]
    if key.startswith("cost:"):
        return "count"
    return {"nll": "nats", "brier": "squared", "capacity": "bits", "mutual_information": "bits"}.get(
        name, "verdicts" if name == "capacity_effective" else "rate" if name in RATES else "number"
    )


RATES = frozenset(
    "accuracy balanced_accuracy auroc ece ambiguity discrepancy conflict disagreement vpr score_sd "
    "acceptance_rate acceptance_rate_certified acceptance_rate_possible".split()
)


def _verified(record: Record) -> bool:
    return not record["provenance"].get("dirty")


def _in_order(sizes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    order = {part: i for i, part in enumerate(("train", "tune", "val", "test"))}
    return sorted(sizes.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def _mapping(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in _in_order(value))
    return str(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bool(value: bool) -> str:
    return "yes" if value else "no"


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _spans(seeds: Iterable[int]) -> str:
    """Return "0–2, 5" for 0, 1, 2, 5."""
    spans: list[list[int]] = []
    for seed in sorted(seeds):
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
