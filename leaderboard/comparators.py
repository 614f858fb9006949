"""The sets of a suite against networks that were trained for the worst group: the numbers, and their section of a page.

A rival is a row with another objective, such as `retrain[groups=sex*label,objective=group_dro]`; every other row is
compared with it. Definitions stand in `metrics.comparators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.api import Undefined
from ..metrics.comparators import (
    CRITERIA,
    OPEN,
    RIVAL,
    SET,
    TRADE,
    Choice,
    Comparison,
    affordable,
    choose,
    compare,
    settle,
    with_groups,
)
from ..metrics.context import Context
from ..metrics.cost_curves import SetCost
from ..metrics.selection import Bounds
from .suite import Suite, _settings_of
from .text import NONE, end, markdown, number, paragraph

if TYPE_CHECKING:
    from .science import Cells, Evidence

NEVER = "never"
MARKS = {SET: "**set**", RIVAL: "rival", TRADE: "trade", OPEN: "?"}

LEGEND = """\
Of the accepted members, the one that is best by a criterion on *val*, among those whose accuracy there is at least the
rival's less {tolerance:g}, against the expected val-best of the rival's networks that the set's cost buys (*networks*:
how many, of those trained): by how much it is better on *test*, mean over base seeds with its 95% interval. **set**:
better, and on test at most {tolerance:g} less accurate; rival: the same the other way round; trade: one is better, but
gave up more accuracy than that; ?: not resolved with this many patients. Holm over all comparisons of the suite.
"""

DETAIL = """\
*accuracy*: the set's mean accuracy on test less the rival's. *kept*: accepted members that keep the rival's accuracy on
val. *resolvable*: the smallest difference that these patients and base seeds resolve with a power of 80%. *patients*:
how many on test would resolve the observed difference with that power; never: what base seeds differ in is in the way.
"""


def rivals(labels: Sequence[str]) -> dict[str, str]:
    """Return the rows that train by another objective, and the groups that each names ("" for none)."""
    settings = {label: _settings_of(label) for label in labels}
    return {label: s.get("groups", "") for label, s in settings.items() if "objective" in s}


def versus(cells: Cells, k: int, margin: float, criteria: Sequence[str] = CRITERIA) -> dict[str, Any]:
    """Return rival -> its networks, how many of them each row buys, and criterion -> row -> how the two compare.

    The groups that a rival names are one more attribute. k: accepted members that a set needs; margin: mean accuracy
    that a side may give up, on val where it is chosen and on test where it wins. The comparisons are settled over all
    rivals, rows and criteria together.
    """
    apart = rivals(list(cells))
    rows = [label for label in cells if label not in apart]
    found: dict[tuple[str, str, str], dict[int, Choice | Undefined]] = {}
    for rival, groups in apart.items():
        for label in rows:
            networks = _networks(cells[label], cells[rival])
            for seed in sorted(cells[label].keys() & cells[rival].keys()):
                one, other = cells[label][seed], cells[rival][seed]
                for name, choice in _choices(one, other, groups, networks, k, margin, criteria).items():
                    found.setdefault((rival, name, label), {})[seed] = choice
    whole = {key: chosen for key, by_seed in found.items() if len(chosen := _defined(by_seed)) == len(by_seed)}
    settled = dict(zip(whole, settle([compare(list(chosen.values()), margin) for chosen in whole.values()])))
    out: dict[str, Any] = {rival: _rival(cells[rival], [cells[r] for r in rows], rows) for rival in apart}
    shown = {(rival, name) for rival, name, _ in settled}
    for (rival, name, label), by_seed in found.items():
        if (rival, name) in shown:
            row = _row(by_seed, settled.get((rival, name, label)))
            out[rival]["criteria"].setdefault(name, {})[label] = row
    return {"tolerance": margin, "rivals": out}


def _rival(rival: Mapping[int, Evidence], others: Sequence[Mapping[int, Evidence]], rows: Sequence[str]) -> Any:
    bought = {label: _networks(seeds, rival) for label, seeds in zip(rows, others)}
    return {
        "drawn": min(len(_made(c)) for c in rival.values()),
        "bought": {label: None if isinstance(n, Undefined) else n for label, n in bought.items()},
        "criteria": {},
    }


def _choices(
    cell: Evidence,
    rival: Evidence,
    groups: str,
    networks: int | Undefined,
    k: int,
    margin: float,
    criteria: Sequence[str],
) -> dict[str, Choice | Undefined]:
    made = _made(rival)
    views: Sequence[Sequence[Context]] = [
        cell.on_val,
        cell.on_test,
        rival.problems("val", made),
        rival.problems("test", made),
    ]
    val, test, rival_val, rival_test = with_groups(views, groups) if groups else views
    n = 1 if isinstance(networks, Undefined) else networks
    found = choose((val, test), (rival_val, rival_test), n, k, margin, criteria)
    return dict.fromkeys(found, networks) if isinstance(networks, Undefined) else found


def _defined(by_seed: Mapping[int, Choice | Undefined]) -> dict[int, Choice]:
    return {seed: choice for seed, choice in by_seed.items() if isinstance(choice, Choice)}


def _made(cell: Evidence) -> np.ndarray:
    """Return the networks that were made, accepted or not: to be near the base is no merit of another recipe."""
    return np.flatnonzero(~cell.membership.failed)


def _networks(seeds: Mapping[int, Evidence], rival: Mapping[int, Evidence]) -> int | Undefined:
    """Return how many of the rival's networks cost as much as the set and the base that it needs."""
    price, drawn = _price(seeds), float(np.mean([len(c.val.logits) for c in seeds.values()]))
    whole = None if price.fixed is None or price.marginal is None else 1.0 + price.fixed + drawn * price.marginal
    try:
        return affordable(whole, _price(rival))
    except Undefined as reason:
        return reason


def _price(seeds: Mapping[int, Evidence]) -> SetCost:
    """Return the mean cost over base seeds, None where it was not measured."""
    cost = [c.record["cost"] for c in seeds.values()]
    fixed, marginal = ([c.get(name) for c in cost] for name in ("fixed_cost_bt", "marginal_cost_bt"))
    return SetCost(
        None if None in fixed else float(np.mean(fixed)), None if None in marginal else float(np.mean(marginal)), None
    )


def _row(by_seed: Mapping[int, Choice | Undefined], settled: Comparison | None) -> dict[str, Any]:
    chosen = _defined(by_seed)
    seeds = {seed: chosen[seed].gain.value if seed in chosen else None for seed in by_seed}
    if settled is None:
        reasons = [str(c) for c in by_seed.values() if isinstance(c, Undefined)]
        return {"gain": None, "seeds": seeds, "reason": reasons[0]}

    def mean(of: Callable[[Choice], float]) -> float:
        return float(np.mean([of(c) for c in chosen.values()]))

    return {
        "of_set": mean(lambda c: c.of_set),
        "of_rival": mean(lambda c: c.of_rival),
        "kept": mean(lambda c: c.eligible),
        **_bounds("gain", settled.gain),
        **_bounds("accuracy", settled.accuracy),
        "resolvable": settled.resolvable,
        "patients": settled.patients,
        "needed": math.ceil(settled.needed) if math.isfinite(settled.needed) else _endless(settled.needed),
        "p": settled.adjusted,
        "verdict": settled.words,
        "reason": settled.reason,
        "seeds": seeds,
    }


def _endless(needed: float) -> str | None:
    return NEVER if math.isinf(needed) else None


def _bounds(name: str, bounds: Bounds) -> dict[str, float]:
    return {name: bounds.value, f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def section(suite: Suite, science: Mapping[str, Any]) -> list[str]:
    """Return the section on the rivals of a suite, as Markdown; nothing where it has none.

    science: what `versus` returned, with JSON's null for what is not finite, under "comparators".
    """
    found = science.get("comparators") or {"rivals": {}}
    compared = {label: rival for label, rival in found["rivals"].items() if rival["criteria"]}
    if not compared:
        return []
    parts = ["### Does a member of the set beat training for the worst group?\n"]
    reasons: dict[str, list[str]] = {}
    for label, rival in compared.items():
        parts += [f"Against `{label}`:\n", _verdicts(suite, rival)]
        for rows in rival["criteria"].values():
            for row, values in rows.items():
                if values["reason"] and row not in (named := reasons.setdefault(values["reason"], [])):
                    named.append(row)
    undefined = [
        f"Undefined, {reason}: {', '.join(f'`{r}`' for r in rows)}." for reason, rows in sorted(reasons.items())
    ]
    parts += [paragraph(LEGEND.format(tolerance=found["tolerance"])), *([paragraph(*undefined)] if undefined else [])]
    parts.append("<details><summary>Every comparison in full</summary>\n")
    for label, rival in compared.items():
        for name, rows in rival["criteria"].items():
            parts += [f"`{name}` against `{label}`:\n", _detail(suite, rows)]
    return [*parts, paragraph(DETAIL), "</details>\n"]


def _verdicts(suite: Suite, rival: Mapping[str, Any]) -> str:
    """Return the table of differences and verdicts, generator by criterion."""
    lines = [["generator", "networks", *(f"`{name}`" for name in rival["criteria"])]]
    for label, text in _labels(suite, {label for rows in rival["criteria"].values() for label in rows}):
        n = rival["bought"][label]
        networks = NONE if n is None else f"{min(n, rival['drawn'])} of {rival['drawn']}"
        found = [rows.get(label) for rows in rival["criteria"].values()]
        cells = [
            NONE if row is None or row["gain"] is None else f"{_interval(row, 'gain')} {MARKS[row['verdict']]}"
            for row in found
        ]
        lines.append([text, networks, *cells])
    return markdown(lines)


def _detail(suite: Suite, rows: Mapping[str, Any]) -> str:
    lines = [["generator", "set", "rival", "difference", "accuracy", "kept", "resolvable", "patients", "verdict"]]
    for label, text in _labels(suite, set(rows)):
        row = rows[label]
        if row["gain"] is None:
            lines.append([text, *[NONE] * (len(lines[0]) - 1)])
            continue
        needed = NONE if row["needed"] is None else str(row["needed"])
        lines.append(
            [
                text,
                *(number(row[name], "rate") for name in ("of_set", "of_rival")),
                *(_interval(row, name) for name in ("gain", "accuracy")),
                f"{row['kept']:.1f}",
                number(row["resolvable"], "rate"),
                f"{needed} (now {row['patients']})",
                row["verdict"],
            ]
        )
    return markdown(lines)


def _labels(suite: Suite, labels: set[str]) -> list[tuple[str, str]]:
    """Return (label, how it is shown) of the suite's rows among `labels`, in the suite's order."""
    return [(r.label, f"`{r.label}`" + (" (control)" if r.control else "")) for r in suite.rows if r.label in labels]


def _interval(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (NONE if row[n] is None else end(row[n], "difference") for n in _ends(name))
    return f"{value} [{low},{high}]"


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"
