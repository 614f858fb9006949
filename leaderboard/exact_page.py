"""The part "Against the exact set" of SCIENCE.md: tables of exact.json, whose schema `benchmark.exact` describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..metrics.intervals import t_interval
from .text import NONE, end, markdown, number, paragraph

RECALL = """\
*range covered*: width of the range of the accepted members' scores over that of the exact one, mean over cases.
*ambiguous found*: share of the exactly ambiguous cases that some accepted member decides otherwise than the base.
*@{k}*: expected for {k} of them. *outside*: accepted members with a score outside the exact range, which a rounding
error aside cannot be: the check that both ways agree.
"""


def tables(result: Mapping[str, Any]) -> str:
    """Return the Markdown tables of the three tracks, with what stands above each."""
    return "\n".join([_logistic_table(result), _plane_table(result), _gaussian_table(result["linear_gaussian"])])


def _logistic_table(result: Mapping[str, Any]) -> str:
    k, track = result["suite"]["k"], result["logistic"]
    found = [base for base in track["bases"].values() if "reason" not in base]
    reasons = sorted({base["reason"] for base in track["bases"].values() if "reason" in base})
    truth = {name: _mean([base[name] for base in found]) for name in ("ambiguity", "width", "base_loss", "least_loss")}
    text = paragraph(
        f"Logistic regression, {len(found)} base seeds: the set is convex, and each test case's range of scores exact.",
        f"Exactly ambiguous: {truth['ambiguity']} of the cases; mean width of the exact range: {truth['width']};",
        f"loss on val: base {truth['base_loss']}, least {truth['least_loss']} nats.",
        *(f"Undefined on some: {reason}." for reason in reasons),
    )
    outside = ["outside the exact range"]
    lines = [["row", *_recall_header(k), *outside]]
    for row in track["rows"]:
        cells = [cell for cell in row["seeds"].values() if "reason" not in cell]
        lines.append(
            [f"`{row['row']}`", *_recall_cells(cells), str(sum(c["outside"] for c in cells)) if cells else NONE]
        )
    return text + "\n" + markdown(lines) + "\n" + paragraph(RECALL.format(k=k))


def _plane_table(result: Mapping[str, Any]) -> str:
    k, track = result["suite"]["k"], result["plane"]
    truths = [base["truth"] for base in track["bases"].values()]
    mean = {name: _mean([truth[name] for truth in truths]) for name in truths[0]}
    text = paragraph(
        f"A random plane through a network ({track['network']['name']}), {len(truths)} base seeds, {track['side']} x",
        f"{track['side']} grid points: in the set {', '.join(str(t['inside']) for t in truths)} points, in",
        f"{', '.join(str(t['pieces']) for t in truths)} piece(s). Over the plane's part of the set: ambiguity",
        f"{mean['ambiguity']}, discrepancy {mean['discrepancy']}, mean width {mean['width']}; with every second grid",
        f"point along each side: ambiguity {mean['ambiguity_every_second']}, width {mean['width_every_second']}.",
    )
    lines = [["sampler in the plane", *_recall_header(k)]]
    for name in next(iter(track["bases"].values()))["samplers"]:
        lines.append([f"`{name}`", *_recall_cells([base["samplers"][name] for base in track["bases"].values()])])
    return text + "\n" + markdown(lines)


def _gaussian_table(track: Mapping[str, Any]) -> str:
    text = paragraph(
        f"A linear classifier with a Gaussian posterior, {track['members']} draws through generator, prediction and",
        "metrics, against the closed forms; brackets: measured, plus and minus two standard errors.",
    )
    lines = [["posterior", "quantity", "closed form", "measured"]]
    for row in track["rows"]:
        reach = [end(row["measured"] + sign * 2 * row["se"], "share") for sign in (-1, 1)]
        shown = f"{number(row['measured'], 'share')} [{reach[0]},{reach[1]}]"
        lines.append([row["structure"], row["quantity"], number(row["exact"], "share"), shown])
    return text + "\n" + markdown(lines)


RECALLS = ("coverage_at_k", "coverage", "ambiguous_at_k", "ambiguous")


def _recall_header(k: int) -> list[str]:
    return ["accepted", f"range covered@{k}", "range covered, all", f"ambiguous found@{k}", "ambiguous found, all"]


def _recall_cells(cells: list[Mapping[str, Any]]) -> list[str]:
    if not cells:
        return [NONE] * (1 + len(RECALLS))
    accepted = f"{sum(c['accepted'] for c in cells)} of {sum(c['drawn'] for c in cells)}"
    return [accepted, *(_mean([c[name] for c in cells if c[name] is not None], len(cells), 1.0) for name in RECALLS)]


def _mean(values: list[float], of: int | None = None, most: float = math.inf) -> str:
    """Return `mean [low,high]`, the 95 % t interval over base seeds within 0 and `most`; (n): only n have a value."""
    if not values:
        return NONE
    text = number(float(np.mean(values)), "share")
    if len(values) > 1:
        interval = t_interval(values)
        text += f" [{end(max(interval.low, 0.0), 'share')},{end(min(interval.high, most), 'share')}]"
    return text + (f" ({len(values)})" if of is not None and len(values) < of else "")
