"""Figures beside the pages on science, drawn from the same science/<suite>.json (needs matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .desiderata_page import headlines, property_title
from .render import REFERENCE
from .science_page import Science
from .suite import Row, Suite

DPI = 110
COST_METRICS = {"ambiguity": "ambiguity of k members", "vpr": "range of k members' scores"}


def draw(suite: Suite, science: Science, folder: Path) -> list[Path]:
    """Draw every figure of a suite that has data, and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    makers = {"selection": _selection, "fidelity": _fidelity, "cost": _cost, "ladder": _ladder}
    for name, make in (makers | {"properties": _properties}).items():
        figure = make(suite, science)
        if figure is None:
            continue
        path = folder / f"{suite.name}-{name}.png"
        # No date and no version of the library in the file: equal figures are equal files.
        figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        paths.append(path)
    return paths


def _rows(suite: Suite, found: Mapping[str, Any]) -> list[Row]:
    return [row for row in suite.rows if row.label in found]


DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")


def _style(suite: Suite, row: Row) -> dict[str, Any]:
    """Return a colour per row, retraining black, with dashes and markers by turns so that grey prints can be read."""
    import matplotlib

    same = [r.label for r in suite.rows if r.generator == "retrain" and not r.control]
    if row.label in same:
        return {"color": "black", "linestyle": DASHES[same.index(row.label) % 4], "marker": "*"}
    others = [r.label for r in suite.rows if r.generator != "retrain" and not r.control]
    i = others.index(row.label)
    name, size = ("tab10", 10) if len(others) <= 10 else ("tab20", 20)
    return {"color": matplotlib.colormaps[name](i % size), "linestyle": DASHES[i % 4], "marker": "osD^vPX<>"[i % 9]}


def _grid(panels: int, width: float = 4.2, height: float = 3.2):
    from matplotlib.figure import Figure

    columns = 2 if panels in (2, 4) else min(3, panels)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.set_axis_off()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[:panels]


def _legend(figure, suite: Suite, rows: Iterable[Row], markers: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for row in rows:
        style = _style(suite, row)
        style |= {"linestyle": ""} if markers else {"marker": ""}
        handles.append(Line2D([], [], label=row.label, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)


def _selection(suite: Suite, science: Science):
    """Expected gain on test of the validation-best of k, by criterion; dotted: what it promises on val."""
    criteria = science["selection"]
    if not criteria:
        return None
    figure, axes = _grid(len(criteria))
    shown: dict[str, Row] = {}
    for axis, (name, found) in zip(axes, criteria.items()):
        for row in _rows(suite, found):
            curve = found[row.label]["curve"]
            if row.control or not curve["k"]:
                continue
            style = _style(suite, row) | {"marker": ""}
            axis.plot(curve["k"], curve["test"], linewidth=1.3, **style)
            shown[row.label] = row
            if row.label == REFERENCE:
                axis.fill_between(curve["k"], curve["low"], curve["high"], color="black", alpha=0.08, linewidth=0)
                axis.plot(curve["k"], curve["val"], color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=name, xlabel="k, chosen from", xscale="log")
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("gain on test over the base")
    figure.suptitle(
        f"{suite.title}: validation-best of k, on test (band and dotted promise on val: retraining)", fontsize=10
    )
    _legend(figure, suite, [r for r in suite.rows if r.label in shown])
    return figure


def _mean(values: Mapping[str, float | None]) -> float | None:
    known = [v for v in values.values() if v is not None]
    return sum(known) / len(known) if known else None


def _fidelity(suite: Suite, science: Science):
    """Likeness to retraining against the price of a set, with the Pareto front."""
    fidelity, cost = science["fidelity"], science["cost"]
    panels = {"conflict_spearman": "correlation of conflict", "energy_distance_relative": "energy distance (relative)"}
    if not fidelity or not cost:
        return None
    figure, axes = _grid(len(panels), 4.8, 3.6)
    both = [r for r in _rows(suite, fidelity) if r.label in cost and not r.control]
    for axis, (name, title) in zip(axes, panels.items()):
        front = []
        for row in both:
            x, y = cost[row.label]["cost_at_k"], _mean(fidelity[row.label][name])
            if x is None or y is None:
                continue
            style = _style(suite, row) | {"linestyle": ""}
            axis.plot(x, y, **style, markersize=7)
            if name == "conflict_spearman" and cost[row.label]["front"]:
                front.append((x, y))
        if front:
            axis.plot(*zip(*sorted(front)), color="0.5", linewidth=1, zorder=0)
        axis.set(xscale="log", xlabel=f"cost of {science['k']} accepted members, base trainings", ylabel=title)
    figure.suptitle(f"{suite.title}: likeness to retraining (its own row: two halves); grey: the front", fontsize=10)
    _legend(figure, suite, both, markers=True)
    return figure


def _cost(suite: Suite, science: Science):
    """Multiplicity that k members show, against what they cost."""
    cost = science["cost"]
    if not cost:
        return None
    figure, axes = _grid(len(COST_METRICS), 4.8, 3.6)
    rows = [r for r in _rows(suite, cost) if not r.control and cost[r.label]["curve"]["k"]]
    for axis, (name, title) in zip(axes, COST_METRICS.items()):
        for row in rows:
            curve = cost[row.label]["curve"]
            axis.plot(curve["cost"], curve[name], linewidth=1.4, **(_style(suite, row) | {"marker": ""}))
        axis.set(xscale="log", xlabel="cost of k accepted members, base trainings", ylabel=title)
    figure.suptitle(f"{suite.title}: multiplicity found against cost, k = 1 to all accepted", fontsize=10)
    _legend(figure, suite, rows)
    return figure


def _ladder(suite: Suite, science: Science):
    """Range left on test, rung by rung."""
    ladder = science["ladder"]
    if not ladder or not ladder["rows"]:
        return None
    measures = ladder["measures"]
    figure, axes = _grid(len(measures))
    rows = [r for r in _rows(suite, ladder["rows"]) if not r.control and ladder["rows"][r.label][measures[0]][1]]
    steps = range(1, len(ladder["rungs"]) + 1)
    for axis, name in zip(axes, measures):
        for row in rows:
            values = [math.nan if v is None else v for v in ladder["rows"][row.label][name]]
            axis.plot(steps, values, linewidth=1.3, markersize=4, **_style(suite, row))
        axis.set(title=name, xticks=list(steps), ylim=(0, None))
        axis.set_xticklabels([f"({i})" for i in steps])
        axis.title.set_fontsize(9)
    figure.suptitle(f"{suite.title}: what is left as specifications are added, k = {science['k']}", fontsize=10)
    _legend(figure, suite, rows)
    return figure


def _properties(suite: Suite, science: Science):
    """By property and row: the base, the members' mean, and around it their range before that of chance."""
    desiderata = science.get("desiderata") or {}
    names = headlines(desiderata) if desiderata else []
    if not names:
        return None
    properties = {name: desiderata["properties"][name]["rows"] for name in names}
    rows = [row for row in suite.rows if any(row.label in found for found in properties.values())]
    figure, axes = _grid(len(names), 4.2, 1.0 + 0.2 * len(rows))
    for axis, (name, found) in zip(axes, properties.items()):
        axis.set_axisbelow(True)
        axis.use_sticky_edges = False
        for y, row in enumerate(rows):
            if row.label in found:
                _bars(axis, y, found[row.label], "0.6" if row.control else _style(suite, row)["color"])
        axis.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=6)
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(f"{property_title(name)} ({desiderata['properties'][name]['direction']} is better)", fontsize=8)
    figure.suptitle(
        f"{suite.title}: base (tick), members' mean (dot), length of their range at k = {science['k']} (bar) and of "
        "chance's (grey)",
        fontsize=10,
    )
    return figure


def _bars(axis, y: int, row: Mapping[str, Any], color: Any) -> None:
    """Draw one row of one property: both bars are centred on the members' mean, for their lengths are compared."""
    mean = row["members"]["value"]
    if mean is None:
        return
    for name, height, shade in (("chance", 0.8, "0.85"), ("range", 0.35, color)):
        if row[name] is not None:
            axis.barh(y, row[name], height, mean - row[name] / 2, color=shade)
    axis.plot(mean, y, marker="o", markersize=3, color="white", markeredgecolor="black", markeredgewidth=0.6)
    if row["base"]["value"] is not None:
        axis.plot([row["base"]["value"]] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.4)
