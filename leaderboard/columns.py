"""Columns of the board: which score or cost each shows, its summary over base seeds, and the ranks of its rows.

A value is the mean over base seeds with the 95% t interval of the per-seed values (B - 1 degrees of freedom), kept
within the bounds of its unit; with a single seed it is that record's own value and interval, which sees test cases
only. An acceptance of 0 or 1 on every base seed, of which t would be certain, has Wilson's interval over all draws. A
rank is 1 + the number of rows that are significantly better: paired t test over the base seeds two rows share, 95%,
Holm over all pairs of the column. Controls are neither ranked nor competitors. A row that accepted fewer than k members
on any base seed is ranked in no column but acceptance, which is where it loses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from scipy.special import stdtr

from ..metrics.intervals import holm, t_interval, wilson
from .cells import Record, Table, machine_of
from .suite import Row, Suite
from .text import on_seeds

INFINITE = math.inf
BOUNDS = {
    "rate": (0.0, 1.0),
    "squared": (0.0, 2.0),
    "amount": (0.0, INFINITE),
    "bytes": (0.0, INFINITE),
    "verdicts": (1.0, INFINITE),
    "difference": (-1.0, 1.0),
    "number": (-INFINITE, INFINITE),
}
UNITS = {
    **dict.fromkeys(("accuracy", "balanced_accuracy", "auroc", "ece", "ambiguity", "discrepancy"), "rate"),
    **dict.fromkeys(("conflict", "disagreement", "vpr", "score_sd"), "rate"),
    **dict.fromkeys(("acceptance_rate", "acceptance_rate_certified", "acceptance_rate_possible"), "rate"),
    **dict.fromkeys(("nll", "capacity", "mutual_information"), "amount"),
    **dict.fromkeys(("fixed_cost_s", "marginal_cost_s", "cost_per_accepted_s", "base_training_s"), "amount"),
    **dict.fromkeys(("fixed_cost_bt", "marginal_cost_bt", "cost_per_accepted_bt"), "amount"),
    "cost_per_accepted_with_base_bt": "amount",
    "peak_memory_bytes": "bytes",
    "bytes_per_member": "bytes",
    "brier": "squared",
    "capacity_effective": "verdicts",
}
"""Kind of number by name of score or cost: its format and the bounds of its interval. Others are plain numbers."""

COST = "cost:"
ACCEPTANCE = "acceptance_rate"


@dataclass(frozen=True)
class Column:
    """One column: `key` is a score key or `cost:NAME`; `better` is higher or lower where rows are ranked, else ""."""

    title: str
    key: str
    meaning: str = ""
    better: str = ""

    @property
    def unit(self) -> str:
        """The kind of number, a key of BOUNDS."""
        return UNITS.get(score_name(self.key), "number")


@dataclass(frozen=True)
class Summary:
    """A value over base seeds: mean, interval and how it was made, each seed's value, reasons of the absent."""

    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    seeds: Mapping[int, float] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)


def score_name(key: str) -> str:
    """Return the name of the metric or cost in a key: ambiguity for `ambiguity@5/rotated#sex=F`."""
    return re.split(r"[.@/#]", key.removeprefix(COST))[0]


def overview(suite: Suite) -> list[Column]:
    """Return the columns of a suite's overview: membership, loss, accuracy, multiplicity, cost."""
    k = suite.k
    return [
        Column("accepted", ACCEPTANCE, "share of the drawn members that are in the set", "higher"),
        Column("loss", "nll.member_mean", "mean cross-entropy of an accepted member, nats", "lower"),
        Column("accuracy", "accuracy.member_mean", "mean accuracy of an accepted member"),
        Column(
            f"ambiguity@{k}",
            f"ambiguity@{k}",
            f"share of cases on which one of {k} members and the base differ",
        ),
        Column("disagreement", "disagreement", "share of cases on which two members differ"),
        Column(f"vpr@{k}", f"vpr@{k}", f"viable prediction range: mean spread of {k} members' probabilities"),
        Column(f"capacity@{k}", f"capacity@{k}", f"Rashomon capacity of {k} members, bits"),
        Column("cost", "cost:cost_per_accepted_bt", "price of an accepted member in base trainings", "lower"),
    ]


def discrimination(suite: Suite) -> list[Column]:
    """Return the columns of scores of decisions and rankings."""
    return [
        Column("accuracy", "accuracy.member_mean"),
        Column("accuracy, ensemble", "accuracy.ensemble"),
        Column("balanced accuracy", "balanced_accuracy.member_mean"),
        Column("balanced accuracy, ensemble", "balanced_accuracy.ensemble"),
        Column("AUROC", "auroc.member_mean"),
        Column("AUROC, ensemble", "auroc.ensemble"),
    ]


def calibration(suite: Suite) -> list[Column]:
    """Return the columns of proper scores and calibration."""
    return [
        Column("loss", "nll.member_mean", "", "lower"),
        Column("loss, ensemble", "nll.ensemble", "", "lower"),
        Column("Brier", "brier.member_mean"),
        Column("Brier, ensemble", "brier.ensemble"),
        Column("ECE", "ece.member_mean", "", "lower"),
        Column("ECE, ensemble", "ece.ensemble", "", "lower"),
    ]


def membership(suite: Suite) -> list[Column]:
    """Return the columns of acceptance by tolerance."""
    return [Column(f"eps {e:g}", f"{ACCEPTANCE}#epsilon={e:g}") for e in suite.epsilons]


def certainty(suite: Suite) -> list[Column]:
    """Return the columns of certified and possible acceptance by tolerance."""
    return [
        Column(f"{bound}, eps {e:g}", f"{ACCEPTANCE}_{bound}#epsilon={e:g}")
        for bound in ("certified", "possible")
        for e in suite.epsilons
    ]


def multiplicity(suite: Suite) -> list[Column]:
    """Return the columns of disagreement of decisions and scores."""
    k = suite.k
    return [
        Column(f"ambiguity@{k}", f"ambiguity@{k}"),
        Column(f"discrepancy@{k}", f"discrepancy@{k}"),
        Column("conflict", "conflict"),
        Column("disagreement", "disagreement"),
        Column(f"vpr@{k}", f"vpr@{k}"),
        Column("score sd", "score_sd"),
        Column(f"capacity@{k}", f"capacity@{k}"),
        Column(f"effective verdicts@{k}", f"capacity_effective@{k}"),
        Column("mutual information", "mutual_information"),
    ]


def cost_in_trainings(suite: Suite) -> list[Column]:
    """Return the columns of cost relative to one training of the base."""
    return [
        Column("fixed", "cost:fixed_cost_bt"),
        Column("per drawn member", "cost:marginal_cost_bt"),
        Column("per accepted member", "cost:cost_per_accepted_bt", "", "lower"),
        Column("with the base itself", "cost:cost_per_accepted_with_base_bt"),
    ]


def cost_in_seconds(suite: Suite) -> list[Column]:
    """Return the columns of cost in seconds and bytes."""
    return [
        Column("fixed, s", "cost:fixed_cost_s"),
        Column("per drawn member, s", "cost:marginal_cost_s"),
        Column("per accepted member, s", "cost:cost_per_accepted_s"),
        Column("one base training, s", "cost:base_training_s"),
        Column("peak memory", "cost:peak_memory_bytes"),
        Column("bytes per member", "cost:bytes_per_member"),
    ]


def every_column(suite: Suite) -> dict[str, Column]:
    """Return key -> column for all that a table shows."""
    parts = (
        overview,
        discrimination,
        calibration,
        membership,
        certainty,
        multiplicity,
        cost_in_trainings,
        cost_in_seconds,
    )
    return {column.key: column for part in parts for column in part(suite)}


def accepted(record: Record) -> int:
    """Return K, the number of members in the set."""
    return len(record["set"]["accepted"])


def per_seed(table: Table, row: Row, column: Column) -> tuple[dict[int, float], dict[int, str]]:
    """Return the value of each base seed that has one, and the reason of each scored base seed that has none."""
    values, reasons = {}, {}
    for seed, record in table.ok(row).items():
        value, reason = _value(table, record, column)
        if value is None:
            reasons[seed] = reason
        else:
            values[seed] = value
    return values, reasons


def summarise(table: Table, row: Row, column: Column) -> Summary:
    """Return what stands in the table for `row` and `column`."""
    values, reasons = per_seed(table, row, column)
    if len(values) == 1:
        ((seed, value),) = values.items()
        score = table.ok(row)[seed]["scores"].get(column.key, {})
        return Summary(value, score.get("low"), score.get("high"), score.get("interval", ""), values, reasons)
    summary = over_seeds(values, column.unit, reasons)
    if score_name(column.key).startswith(ACCEPTANCE) and summary.value in (0.0, 1.0):
        drawn = sum(r["set"]["drawn"] for r in table.ok(row).values())
        ends = wilson(round(summary.value * drawn), drawn)
        return replace(summary, low=ends.low, high=ends.high, interval=f"Wilson over {drawn} draws")
    return summary


def over_seeds(values: Mapping[int, float], unit: str, reasons: Mapping[int, str] | None = None) -> Summary:
    """Return mean and t interval of per-seed values, the interval within the bounds of `unit`."""
    reasons = reasons or {}
    if not values:
        return Summary(None, reasons=reasons)
    numbers = np.array([values[seed] for seed in sorted(values)])
    # About the first value, so that equal values have exactly themselves as their mean.
    mean = float(numbers[0] + np.mean(numbers - numbers[0]))
    if len(numbers) == 1:
        return Summary(mean, seeds=values, reasons=reasons)
    interval = t_interval(numbers)
    least, most = BOUNDS[unit]
    return Summary(mean, max(interval.low, least), min(interval.high, most), "t over base seeds", values, reasons)


def ranks(table: Table, column: Column, level: float = 0.05) -> dict[str, int]:
    """Return row label -> rank for the rows that `column` ranks; ties share a rank."""
    eligible = {row.label: values for row in table.suite.rows if (values := _ranked_values(table, row, column))}
    return rank(eligible, column.better, level)


def rank(eligible: Mapping[str, Mapping[int, float]], better: str, level: float = 0.05) -> dict[str, int]:
    """Return label -> rank, 1 + the number of labels that are significantly better, from each one's per-seed values.

    better: higher | lower. Paired t test over the base seeds that two share, Holm over all pairs.
    """
    pairs = [
        (a, b, seeds)
        for a, b in combinations(eligible, 2)
        if len(seeds := sorted(eligible[a].keys() & eligible[b].keys())) >= 2
    ]
    worse = dict.fromkeys(eligible, 0)
    differences = [np.array([eligible[a][s] - eligible[b][s] for s in seeds]) for a, b, seeds in pairs]
    adjusted = holm([paired_p(d) for d in differences])
    for (a, b, _), difference, p in zip(pairs, differences, adjusted):
        if p <= level:
            a_is_better = (np.mean(difference) > 0) == (better == "higher")
            worse[b if a_is_better else a] += 1
    return {label: 1 + worse[label] for label in eligible}


def unranked(table: Table, column: Column, row: Row) -> str:
    """Return why `row` has no rank in `column`, "" if it has one."""
    records = table.ok(row)
    if row.control:
        return "a control"
    if len(records) < 2:
        return "fewer than two base seeds"
    short = [seed for seed, r in records.items() if accepted(r) < table.suite.k]
    if short and column.key != ACCEPTANCE:
        return f"fewer than k = {table.suite.k} members accepted on {on_seeds(short)}"
    if len(per_seed(table, row, column)[0]) < 2:
        return "fewer than two base seeds with a value"
    return ""


def paired_p(difference: np.ndarray) -> float:
    """Return the two-sided p of a paired t test from per-seed differences; equal differences are 0 apart or certain."""
    if np.ptp(difference) == 0:
        return 1.0 if difference[0] == 0 else 0.0
    t = np.mean(difference) / (np.std(difference, ddof=1) / math.sqrt(len(difference)))
    return float(2 * stdtr(len(difference) - 1, -abs(t)))


def _ranked_values(table: Table, row: Row, column: Column) -> dict[int, float]:
    return {} if unranked(table, column, row) else per_seed(table, row, column)[0]


def _value(table: Table, record: Record, column: Column) -> tuple[float | None, str]:
    if column.key.startswith(COST):
        name = column.key.removeprefix(COST)
        if machine_of(record) != table.machine:
            return None, "run on other hardware than most of the table"
        value = record["cost"].get(name)
        return value, "" if value is not None else f"{name} was not measured" if accepted(
            record
        ) else "no member accepted"
    score = record["scores"].get(column.key)
    if score is None:
        return None, "the record has no such score"
    return score["value"], score.get("reason", "")
