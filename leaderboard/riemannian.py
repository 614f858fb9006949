"""The tables of generators/RIEMANNIAN.md, from the committed records and predictions: `make riemannian` fills them in.

The page's prose is written by hand around them; a table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from ..metrics.context import decide, softmax
from .cells import Record, Table, settle_all
from .check import FOLDER
from .columns import Column, over_seeds, summarise
from .predictions import load_predictions
from .record import read_all
from .render import cell
from .suite import Row, board_suites
from .text import NONE, markdown

PAGE = FOLDER.parent / "generators" / "RIEMANNIAN.md"
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, folder: Path = FOLDER) -> str:
    """Return the page with every table made anew from the records and predictions of a board's folder."""
    suites = board_suites(folder / "suites")
    tables = {t.suite.name: t for t in settle_all(suites, read_all(folder / "records"))}

    def made(match: re.Match[str]) -> str:
        kind, _, suite = match[2].partition("_")
        return f"{match[1]}\n{TABLES[kind](tables[suite], folder)}\n{match[3]}"

    return MARKS.sub(made, page)


def price(table: Table, folder: Path) -> str:
    """Return what a member costs, row by row: work of its solve, failures, and base trainings."""
    work = ["gradients", "values", "steps", "rejected", "drift", "repeated", "failed"]
    lines = [["row", *work, "fixed", "per drawn member", "per accepted member"]]
    for row in table.suite.rows:
        records = list(table.ok(row).values())
        if row.control or not records:
            continue
        cells = [f"`{row.label}`"]
        for name in ("gradients", "values", "steps", "rejected"):
            cells.append(_mean(v for r in records for v in _members(r, name)))
        drifts = [v for r in records for v in _members(r, "drift")]
        cells.append(f"{max(drifts):.1e}" if drifts else NONE)
        repeats = [v > 0 for r in records for v in _members(r, "repeats")]
        cells += [str(sum(repeats)) if repeats else NONE, str(sum(len(r["set"].get("failed", [])) for r in records))]
        costs = ("fixed_cost_bt", "marginal_cost_bt", "cost_per_accepted_bt")
        lines.append([*cells, *(_cell(table, row, f"cost:{name}") for name in costs)])
    return markdown(lines)


def comparison(table: Table, folder: Path) -> str:
    """Return the sets side by side: prior, membership, loss, diversity, and likeness to the retrained set."""
    quality = ["prior precision", "accepted", "loss above base", "accuracy above base"]
    diversity = ["ambiguity@5", "disagreement", "vpr@5", "like retraining: conflict", "like retraining: score sd"]
    lines = [["row", *quality, *diversity]]
    for row in table.suite.rows:
        records = table.ok(row)
        if row.control or not records:
            continue
        priors = [r["set"]["diagnostics"].get("prior_precision") for r in records.values()]
        shown = [f"{np.median(priors):.3g}" if all(p is not None for p in priors) else NONE]
        shown.append(_cell(table, row, "acceptance_rate"))
        for name in ("nll", "accuracy"):
            gains = {
                s: r["scores"][f"{name}.member_mean"]["value"] - r["scores"][f"{name}.base"]["value"]
                for s, r in records.items()
                if r["scores"][f"{name}.member_mean"]["value"] is not None
            }
            shown.append(cell(table.suite, over_seeds(gains, "difference"), "difference"))
        shown += [_cell(table, row, key) for key in ("ambiguity@5", "disagreement", "vpr@5")]
        lines.append([f"`{row.label}`", *shown, *_likeness(table, row, folder)])
    return markdown(lines)


TABLES: dict[str, Callable[[Table, Path], str]] = {"price": price, "comparison": comparison}


def _members(record: Record, name: str) -> list[float]:
    """Return a diagnostic of every member, without those that have none."""
    return [v for v in record["set"]["diagnostics"].get("members", {}).get(name, []) if v is not None]


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{np.mean(values):.1f}" if values else NONE


def _cell(table: Table, row: Row, key: str) -> str:
    column = Column("", key)
    return cell(table.suite, summarise(table, row, column), column.unit)


def _likeness(table: Table, row: Row, folder: Path) -> list[str]:
    """Return Spearman's correlation over test cases, with the retrained set of the same base, of two columns.

    Conflict is the share of accepted members that decide otherwise than the base; score sd that of the first class's
    probability. The row of retraining itself compares its halves, even against odd members: the ceiling, at half size.
    """
    reference = next((r for r in table.suite.rows if r.label == "retrain"), None)
    if reference is None:
        return [NONE, NONE]
    found: list[dict[int, float]] = [{}, {}]
    for seed, record in table.ok(row).items():
        other = table.ok(reference).get(seed)
        if other is None:
            continue
        mine, theirs = _maps(table, record, folder), _maps(table, other, folder)
        pairs = theirs[1:] if row == reference else (mine[0], theirs[0])
        if pairs[0] is None or pairs[1] is None:
            continue
        for i in range(2):
            a, b = pairs[0][i], pairs[1][i]
            if np.ptp(a) > 0 and np.ptp(b) > 0:
                found[i][seed] = float(spearmanr(a, b).statistic)
    return [cell(table.suite, over_seeds(values, "number"), "number") for values in found]


def _maps(table: Table, record: Record, folder: Path) -> tuple:
    path = folder / "predictions" / table.suite.name / str(record["predictions"]["file"])
    return _maps_of(path, record["data"]["task"], record["data"]["positive"], tuple(record["set"]["accepted"]))


@cache
def _maps_of(path: Path, task: str, positive: int | None, accepted: tuple[int, ...]) -> tuple:
    """Return (conflict, score sd) [sample] of all accepted members, of the even and of the odd ones; None for < 2."""
    test = load_predictions(path, task, positive)[1]
    probabilities, base = softmax(test.logits, np.array(accepted, int)), softmax(test.base)

    def maps(some: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if len(some) < 2:
            return None
        return (decide(some) != decide(base)).mean(0), some[..., 0].std(0)

    return maps(probabilities), maps(probabilities[::2]), maps(probabilities[1::2])


def main() -> None:
    """Write the page."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
