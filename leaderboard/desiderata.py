"""What equally good members differ in beside accuracy, from a suite's committed views and evidence.

`desiderata` returns plain JSON values, null where one is undefined; `desiderata_page` shows them. Members are the
accepted ones among those that views take. Values over base seeds are means, with intervals over test patients and base
seeds together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..metrics.api import METRICS, PerMember, Undefined
from ..metrics.context import BASE, MEMBERS, Context, Models
from ..metrics.fairness import Spread, mean_spread, member_spread
from ..metrics.intervals import Estimate, average
from ..metrics.ladder import ladder, specifications
from .desiderata_axes import AXES, Axis, Found, attempt, mean_of_models
from .over_seeds import json_number, over_seeds
from .sights import Sight, Sights, attached, taken

VERSION = 1
VERDICTS = ("corrupted_accuracy", "robust_accuracy", "ood_auroc", "adaptive_calibration_error", "saliency_agreement")
"""Properties by which members are chosen; which of their suffixes, says `headline`."""

Select = Callable[[Sights, Sequence[str], Callable[[str], bool]], dict[str, Any]]
"""Chooses members by the properties named, of whose keys those that the last argument holds for enter the table."""


def desiderata(sights: Sights, k: int, select_by: Select) -> dict[str, Any]:
    """Return what a suite's views and evidence say; empty without any.

    select_by: see `Select`. members: that views take; axes: axis -> item (view, detector, method) -> quantity -> row ->
    value; properties: name -> row -> the base's value, the members' mean, and their range at k beside what chance
    gives; verdicts: property -> row, as in `selection`; ladder: rungs and rows, as in that of `science`.
    """
    cells = [sight for row in sights.values() for sight in row.values()]
    if not cells:
        return {}
    return {
        "members": max(len(s.members) for s in cells),
        "notes": sorted({note for s in cells for note in s.cell.record.get("views", {}).get("notes", [])}),
        "axes": {axis: _axis(sights, of_axis, k) for axis, of_axis in AXES.items()},
        "properties": _properties(sights, k),
        "verdicts": select_by(sights, VERDICTS, headline),
        "ladder": _ladders(sights, k),
    }


def version() -> dict[str, Any]:
    """Return what, beside records and views, `desiderata` depends on."""
    return {
        "version": VERSION,
        "metrics": {n: f.info.version for n, f in METRICS.load_all() if f.info.level == "property"},
    }


def headline(key: str) -> bool:
    """Return whether a property (name and suffix) is one that is chosen by and shown on rungs.

    Of several it is one each, fixed beforehand: the mean over corruptions, every attack, every view out of distribution
    by confidence and by the distance in feature space, calibration of the part itself, agreement of gradients by rank.
    """
    name, _, suffix = key.partition("/")
    if name in ("robust_accuracy", "adaptive_calibration_error", "corrupted_accuracy"):
        return name == "robust_accuracy" or not suffix
    if name == "ood_auroc":
        return suffix.endswith((":max_softmax", ":mahalanobis"))
    return key == "saliency_agreement/gradient:spearman"


def _axis(sights: Sights, of_axis: Axis, k: int) -> dict[str, Any]:
    found: dict[str, dict[str, dict[str, dict[int, Estimate | Undefined | float]]]] = {}
    for label, row in sights.items():
        for seed, sight in row.items():
            for item, quantities in _over_labels(sight, of_axis, k).items():
                for name, value in quantities.items():
                    found.setdefault(item, {}).setdefault(name, {}).setdefault(label, {})[seed] = value
    return {
        item: {name: {label: _over(values) for label, values in rows.items()} for name, rows in quantities.items()}
        for item, quantities in found.items()
    }


def _over_labels(sight: Sight, of_axis: Axis, k: int) -> dict[str, Found]:
    """Return an axis's items, mean over labels; none where a label has no case to tell anything by."""
    try:
        per_label = [dict(of_axis(val, test, k)) for val, test in zip(sight.val, sight.test, strict=True)]
    except Undefined:
        return {}
    return {
        item: {name: _mean([label[item][name] for label in per_label]) for name in quantities}
        for item, quantities in per_label[0].items()
        if all(item in label for label in per_label)
    }


def _mean(labels: Sequence[Estimate | Undefined | float]) -> Estimate | Undefined | float:
    if reason := next((v for v in labels if isinstance(v, Undefined)), None):
        return reason
    estimates = [v for v in labels if isinstance(v, Estimate)]
    return average(estimates) if estimates else float(np.mean([v for v in labels if isinstance(v, float)]))


def _over(by_seed: Mapping[int, Estimate | Undefined | float]) -> dict[str, Any]:
    """Return the mean over the base seeds that have a value, its interval if it has one, and why others have none."""
    estimates = {seed: v for seed, v in by_seed.items() if isinstance(v, Estimate) and np.isfinite(v.value)}
    plain = [v for v in by_seed.values() if isinstance(v, float) and np.isfinite(v)]
    reason = next((str(v) for v in by_seed.values() if isinstance(v, Undefined)), "")
    if not estimates:
        value = json_number(float(np.mean(plain))) if plain else None
        return {"value": value, "low_end": None, "high_end": None, "seeds": len(plain), "reason": reason}
    return over_seeds(estimates, -np.inf, np.inf) | {"seeds": len(estimates), "reason": reason}


def _properties(sights: Sights, k: int) -> dict[str, Any]:
    """Return name and suffix -> row -> the base's value, the members' mean and their range."""
    found: dict[str, dict[str, dict[int, tuple[Any, Any, Any]]]] = {}
    for label, row in sights.items():
        for seed, sight in row.items():
            for key, values in _cell_properties(sight, k).items():
                found.setdefault(key, {}).setdefault(label, {})[seed] = values
    return {
        key: {
            "direction": METRICS.get(_metric(key)).info.direction,
            "rows": {label: _property(by_seed) for label, by_seed in rows.items()},
        }
        for key, rows in sorted(found.items())
    }


def _metric(key: str) -> str:
    return key.replace(":", "/").partition("/")[0]


def _cell_properties(sight: Sight, k: int) -> dict[str, tuple[Any, Any, Any]]:
    patients = sight.test[0].bootstrap.patients
    out = {}
    for name, metric in METRICS.load_all():
        if metric.info.level != "property":
            continue
        base, members = (_of_labels(metric, sight.test, models) for models in (BASE, MEMBERS))
        for suffix, of_base in base.items():
            own = members.get(suffix, Undefined("no member accepted"))
            spread = own if isinstance(own, Undefined) else attempt(member_spread, own, k)
            mean = own if isinstance(own, Undefined) else mean_of_models(own, patients)
            out[name + suffix] = (
                of_base if isinstance(of_base, Undefined) else mean_of_models(of_base, patients),
                mean,
                spread,
            )
    return out


def _of_labels(metric: Any, labels: Sequence[Context], models: Models) -> dict[str, PerMember | Undefined]:
    """Return a property of some networks by suffix, mean over labels; nothing where a label has none of it."""
    if not len(models(labels[0])):
        return {}
    per_label = []
    for context in labels:
        try:
            per_label.append(dict(metric(context, models)))
        except Undefined:
            return {}
    out: dict[str, PerMember | Undefined] = {}
    for suffix in per_label[0]:
        values = [found.get(suffix, Undefined("not for every label")) for found in per_label]
        defined = [v for v in values if isinstance(v, PerMember) and np.isfinite(v.values).all()]
        if len(defined) < len(values):
            reasons = [v for v in values if isinstance(v, Undefined)]
            out[suffix] = reasons[0] if reasons else Undefined("no finite value for some network")
        else:
            out[suffix] = PerMember(np.mean([v.values for v in defined], 0), np.mean([v.draws for v in defined], 0))
    return out


def _property(by_seed: Mapping[int, tuple[Any, Any, Any]]) -> dict[str, Any]:
    base, members = (_over({seed: values[i] for seed, values in by_seed.items()}) for i in (0, 1))
    spreads = [values[2] for values in by_seed.values() if isinstance(values[2], Spread)]
    out: dict[str, Any] = {"base": base, "members": members, "range": None, "chance": None, "p": None}
    out["seeds"] = len(spreads)
    if spreads:
        pooled = mean_spread(spreads)
        out |= {"range": pooled.value, "chance": json_number(pooled.limit()), "p": json_number(pooled.p())}
    return out


def _ladders(sights: Sights, k: int) -> dict[str, Any] | None:
    """Return the rungs, and row -> members left and the ranges of properties among them, mean over base seeds."""
    rows: dict[str, Any] = {}
    rungs: list[str] = []
    for label, row in sights.items():
        climbed = [found for sight in row.values() if (found := _ladder(sight, k)) is not None]
        if not climbed or len(climbed) < len(row):
            continue
        rungs = [rung["label"] for rung in climbed[0]]
        names = [n for n in climbed[0][0] if n != "label" and all(n in rung for c in climbed for rung in c)]
        rows[label] = {
            name: [json_number(float(np.mean([c[i][name] for c in climbed]))) for i in range(len(rungs))]
            for name in names
        }
    return {"rungs": rungs, "rows": rows} if rows else None


def _ladder(sight: Sight, k: int) -> list[dict[str, Any]] | None:
    """Climb with all members that views take, accepted or not: that they are is the first specification."""
    cell = sight.cell
    if cell.val.task == "multilabel" or cell.views is None:
        return None
    made = np.flatnonzero(~cell.membership.failed)
    made = made[made < taken(cell.views)]
    if not len(made):
        return None
    bare = replace(cell, settings=replace(cell.settings, draws=0))  # ranges need no draws
    (val,), (test,) = (attached(bare, cell.views, part, made) for part in ("val", "test"))
    properties: dict[str, np.ndarray] = {}
    for name, metric in METRICS.load_all():
        if metric.info.level == "property" and name in VERDICTS:
            found = _of_labels(metric, [test], MEMBERS)
            properties |= {
                name + s: v.values for s, v in found.items() if isinstance(v, PerMember) and headline(name + s)
            }
    steps = {"drawn": np.ones(len(made), bool), **specifications(val, np.isin(made, cell.accepted))}
    return [
        {"label": rung.label, "members": rung.members, **{name: score.value for name, score in rung.ranges.items()}}
        for rung in ladder(steps, properties, test, k)
    ]
