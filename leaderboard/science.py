"""What the sets of a suite are worth, computed from its committed records and predictions alone.

`compute` returns plain numbers, stored as science/<suite>.json and shown by `science_page` and `figures`: null where a
value is undefined. Values by base seed are kept, so that intervals and ranks are made where they are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..identity import digest
from ..metrics import cost_curves, uncertainty
from ..metrics.abstention import abstention
from ..metrics.api import METRICS, Predictions, Settings, Undefined
from ..metrics.context import MIN_PATIENTS, Context, contexts, sigmoid, softmax
from ..metrics.decisions import fewest_votes
from ..metrics.fidelity import QUANTITIES, Fidelity, ceiling, fidelity, over_labels
from ..metrics.intervals import PatientBootstrap
from ..metrics.ladder import ladder, specifications
from ..metrics.membership import Membership, membership
from ..metrics.selection import Selection, select, settle, verdict
from ..metrics.variance import decompose
from . import desiderata
from .cells import Record, Table
from .comparators import rivals
from .group_science import attach, group_inputs, of_groups
from .groups import load_groups
from .predictions import load_predictions
from .render import REFERENCE
from .sights import sights
from .view_files import ViewFile, load_views, views_of

VERSION = 1
RESAMPLED = "retrain[resample=bootstrap]"
"""The row that trains on bootstrap resamples of the data: the outermost level of the variance decomposition."""
KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
"""Numbers of members at which curves are stored, besides all members."""
ABSTAINING = 10
DIGITS = 6


@dataclass
class Evidence:
    """What one cell of a suite says: its record, and its predictions on val and test, made into contexts on demand.

    min_patients: that a group needs to count, as the suite declares; views: what was committed beside val and test.
    """

    record: Record
    val: Predictions
    test: Predictions
    settings: Settings
    min_patients: int = MIN_PATIENTS
    views: ViewFile | None = None

    @cached_property
    def membership(self) -> Membership:
        """The validation losses of all drawn members."""
        return membership(self.val, self.settings)

    @cached_property
    def accepted(self) -> np.ndarray:
        """Indices of the accepted members."""
        return np.flatnonzero(self.membership.accepted(self.settings.epsilon))

    def problems(self, view: str, members: np.ndarray) -> list[Context]:
        """Return one context per label of the task for the members (indices) on `val` or `test`."""
        predictions: Predictions = getattr(self, view)
        s = self.settings
        bootstrap = PatientBootstrap(len(predictions.base), predictions.patient, s.draws, s.seed)
        return list(contexts(predictions, members, bootstrap, s.seed, self.min_patients))

    @cached_property
    def on_val(self) -> list[Context]:
        """The accepted members on val."""
        return self.problems("val", self.accepted)

    @cached_property
    def on_test(self) -> list[Context]:
        """The accepted members on test."""
        return self.problems("test", self.accepted)


Cells = dict[str, dict[int, Evidence]]


def evidence(table: Table, folder: Path) -> Cells:
    """Return row label -> base seed -> evidence for the scored cells of a table whose predictions are committed."""
    cells: Cells = {}
    for row in table.suite.rows:
        for seed, record in sorted(table.ok(row).items()):
            if (file := record["predictions"].get("file")) is None:
                continue
            path = folder / "predictions" / table.suite.name / file
            val, test = load_predictions(path, record["data"]["task"], record["data"]["positive"])
            views = views_of(record, path)
            shown = load_views(views, {"val": val, "test": test}) if views else None
            own = Evidence(record, val, test, table.suite.settings, table.suite.min_patients, shown)
            cells.setdefault(row.label, {})[seed] = own
    return cells


def inputs(table: Table) -> str:
    """Return a digest of all that the science of a table depends on: its records, predictions and declarations."""
    suite = table.suite
    used = {r["name"]: [r["digests"]["cost"], r["predictions"]["digest"]] for r in table.records}
    declared = [[row.label for row in suite.rows], list(suite.base_seeds), suite.k, suite.epsilon, suite.margin]
    versions = {name: f.info.version for name, f in METRICS.load_all() if f.info.level == "criterion"}
    told: dict[str, Any] = {
        "records": used,
        "suite": [*declared, suite.draws, suite.seed],
        "science": [VERSION, versions],
    }
    if seen := {r["name"]: r["views"]["digest"] for r in table.records if r.get("views")}:
        told["views"] = [seen, desiderata.version()]
    if suite.min_patients != MIN_PATIENTS:  # what was computed before a suite could declare it stays valid
        told["min_patients"] = suite.min_patients
    return digest(told)


def compute(table: Table, folder: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Return the science of a suite as plain JSON values, floats to six digits, null where undefined.

    progress: told of each part before it is computed.
    """
    suite = table.suite
    apart = {REFERENCE, *(row.label for row in suite.rows if row.control), *rivals([row.label for row in suite.rows])}
    groups = load_groups(folder, suite)
    about = {"suite": suite.name, "inputs": inputs(table), "k": suite.k, "margin": suite.margin}
    about["groups"] = group_inputs(suite, groups)
    cells = evidence(table, folder)
    if groups:
        attach(cells, groups)

    def say(text: str) -> None:
        progress(f"{suite.name}: {text}")

    told = parts(cells, suite.k, suite.epsilon, suite.margin, apart, say)
    say("shifted views")
    told["desiderata"] = desiderata.desiderata(
        sights(cells),
        suite.k,
        lambda seen, names, wanted: selections(
            {label: {s: Both(x.val, x.test) for s, x in row.items()} for label, row in seen.items()},
            suite.k,
            suite.epsilon,
            suite.margin,
            names,
            wanted,
        ),
    )
    return plain_values(about | told | of_groups(cells, suite, groups, say))


def parts(
    cells: Cells,
    k: int,
    epsilon: float,
    margin: float,
    apart: set[str],
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return every part of the science of some cells; apart: rows that are on no Pareto front (see `costs`)."""
    found: dict[str, Any] = {}
    progress("selection")
    found["selection"] = selections(cells, k, epsilon, margin)
    progress("fidelity")
    found["fidelity"], found["fidelity_reasons"] = likeness(cells, k)
    found["variance"] = variances(cells)
    progress("cost and uncertainty")
    found["cost"] = costs(cells, k, found["fidelity"], apart)
    found["uncertainty"], found["noise"] = uncertainties(cells, k), noise(cells)
    progress("ladder and abstention")
    found["ladder"], found["abstention"] = ladders(cells, k), abstentions(cells)
    return found


def to_text(science: Mapping[str, Any]) -> str:
    """Return the file's text: sorted keys, and a line for what holds no further lists or mappings, so that a change is
    a change of lines."""
    return _lines(science, "") + "\n"


def _lines(value: Any, margin: str) -> str:
    inner = margin + " "
    if isinstance(value, Mapping) and any(isinstance(v, (Mapping, list)) for v in value.values()):
        entries = (f"{inner}{json.dumps(k, ensure_ascii=False)}: {_lines(v, inner)}" for k, v in sorted(value.items()))
        return "{\n" + ",\n".join(entries) + f"\n{margin}}}"
    if isinstance(value, list) and any(isinstance(v, (Mapping, list)) for v in value):
        return "[\n" + ",\n".join(f"{inner}{_lines(v, inner)}" for v in value) + f"\n{margin}]"
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Both:
    """The members that are chosen from, one context per label, on val and on test."""

    on_val: Sequence[Context]
    on_test: Sequence[Context]


def selections(
    cells: Mapping[str, Mapping[int, Evidence | Both]],
    k: int,
    epsilon: float,
    margin: float,
    names: Sequence[str] | None = None,
    wanted: Callable[[str], bool] = lambda key: True,
) -> dict[str, Any]:
    """Return criterion -> row -> what the validation-best member is worth, with the verdicts of the whole table.

    names: criteria and properties (default: the criteria); wanted: which of their keys are in the table.
    """
    found: dict[str, dict[str, dict[int, Selection | Undefined]]] = {}
    for label, seeds in cells.items():
        for seed, cell in seeds.items():
            for name, result in select(cell.on_val, cell.on_test, k, epsilon, margin, names).items():
                if not wanted(name):
                    continue
                found.setdefault(name, {}).setdefault(label, {})[seed] = result
    keys, verdicts = [], []
    for name, rows in found.items():
        for label, by_seed in rows.items():
            chosen = [s for s in by_seed.values() if isinstance(s, Selection)]
            if len(chosen) == len(by_seed):
                keys.append((name, label))
                verdicts.append(verdict(chosen, margin))
    settled = dict(zip(keys, settle(verdicts)))
    out: dict[str, Any] = {}
    for name, rows in found.items():
        if not any((name, label) in settled for label in rows):
            continue
        out[name] = {label: _selection(by_seed, settled.get((name, label)), k) for label, by_seed in rows.items()}
    return out


def _selection(by_seed: Mapping[int, Selection | Undefined], settled: Any, k: int) -> dict[str, Any]:
    chosen = {seed: s for seed, s in by_seed.items() if isinstance(s, Selection)}
    reasons = {seed: str(s) for seed, s in by_seed.items() if isinstance(s, Undefined)}
    seeds = {seed: chosen[seed].gain.value if seed in chosen else None for seed in by_seed}
    if settled is None:
        return {"gain": None, "seeds": seeds, "reason": next(iter(reasons.values()), ""), "curve": {"k": []}}
    some = list(chosen.values())
    most = min(len(s.gains.ks) for s in some)
    ks = [j for j in KS if j < most] + [most]

    def mean(value: Callable[[Selection], float]) -> float:
        return float(np.mean([value(s) for s in some]))

    def curve(name: str) -> list[float]:
        return np.mean([getattr(s.gains, name)[np.array(ks) - 1] for s in some], axis=0).tolist()

    return {
        "gain_val": mean(lambda s: s.gain_val),
        **_bounds("gain", settled.gain),
        **_bounds("loss", settled.loss),
        "curse": mean(lambda s: s.gains.winners_curse[k - 1]),
        "oracle_gap": mean(lambda s: s.gains.oracle_gap[k - 1]),
        "violation": mean(lambda s: s.violation.chance[k - 1]),
        "excess": mean(lambda s: s.violation.excess[k - 1]),
        "stability": mean(lambda s: s.stability),
        "reselected": mean(lambda s: s.reselected_gain),
        "resolvable": settled.resolvable,
        "p": settled.adjusted,
        "verdict": settled.words,
        "reason": settled.reason,
        "seeds": seeds,
        "curve": {"k": ks, **{name: curve(name) for name in ("val", "test", "oracle", "low", "high")}},
    }


def _bounds(name: str, bounds: Any) -> dict[str, float]:
    return {name: bounds.value, f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def likeness(cells: Cells, k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return row -> quantity -> value by base seed against the retraining set, and reason -> rows without a value.

    The row of retraining itself compares its two halves: the ceiling.
    """
    found: dict[str, Any] = {}
    reasons: dict[str, list[str]] = {}
    reference = cells.get(REFERENCE, {})
    for label, seeds in cells.items() if reference else ():
        values: dict[str, dict[int, float]] = {}
        for seed in seeds.keys() & reference.keys():
            result = _like(seeds[seed].on_test, reference[seed].on_test, k, label == REFERENCE)
            for name, value in result.values.items():
                values.setdefault(name, {})[seed] = value
            for name in QUANTITIES:
                if (reason := result.reasons.get(name)) and label not in (rows := reasons.setdefault(reason, [])):
                    rows.append(label)
        found[label] = {name: dict(sorted(v.items())) for name, v in values.items()}
    return found, reasons


def _like(members: Sequence[Context], reference: Sequence[Context], k: int, halves: bool) -> Fidelity:
    if halves:
        return over_labels([ceiling(r, k) for r in reference])
    return over_labels([fidelity(m, r, k) for m, r in zip(members, reference)])


def variances(cells: Cells) -> dict[str, Any]:
    """Return row -> components of the variance of the score, mean over labels; rows without an accepted set are left
    out, and all where there is no retraining."""
    if REFERENCE not in cells:
        return {}
    retrained, resampled = (_pooled(cells.get(label, {})) for label in (REFERENCE, RESAMPLED))
    out = {}
    for label, seeds in cells.items():
        if label in (REFERENCE, RESAMPLED):
            continue
        sets = [_scores(c.on_test) for c in seeds.values() if len(c.accepted) > 1]
        if not sets or retrained is None:
            continue
        parts = []
        for i in range(len(retrained)):
            found = decompose([s[i] for s in sets], retrained[i], resampled[i] if resampled else None)
            parts.append(
                {
                    "posterior": found.posterior.value,
                    "bases": found.seed_between_bases.value,
                    "retraining": found.seed.value,
                    "data": found.data.value,
                    "covered": found.covered.value,
                    "covered_se": found.covered.se,
                }
            )
        out[label] = {name: float(np.mean([p[name] for p in parts])) for name in parts[0]}
    return out


def _scores(problems: Sequence[Context]) -> list[np.ndarray]:
    """Return the scores [member, sample] of every label, over the samples whose class is known."""
    return [c.scores if c.scored is None else c.scores[:, c.scored > 0] for c in problems]


def _pooled(seeds: Mapping[int, Evidence]) -> list[np.ndarray] | None:
    """Return the scores of all drawn members of all base seeds, by label: retrainings are independent of the base.

    All that were made, accepted or not: acceptance against one base would cut the spread of retraining.
    """
    if not seeds:
        return None
    made = [_scores(c.problems("test", np.flatnonzero(~c.membership.failed))) for c in seeds.values()]
    return [np.concatenate(label) for label in zip(*made)]


def costs(cells: Cells, k: int, like: Mapping[str, Any], apart: set[str]) -> dict[str, Any]:
    """Return row -> price, break-even with retraining, place on the front, and multiplicity at k against cost.

    apart: rows that are on no front: the reference, which has its own likeness only, and the controls.
    """
    priced = {label: _price(seeds) for label, seeds in cells.items()}
    out: dict[str, Any] = {}
    for label, seeds in cells.items():
        price = priced[label]
        curves = [_curves(c.on_test) for c in seeds.values() if len(c.accepted)]
        most = min(map(len, (c["ambiguity"] for c in curves)), default=0) if len(curves) == len(seeds) else 0
        ks = [j for j in KS if j < most] + ([most] if most else [])
        curve = {n: np.mean([c[n][np.array(ks) - 1] for c in curves], axis=0).tolist() if ks else [] for n in CURVES}
        out[label] = {
            "fixed": price.fixed,
            "marginal": price.marginal,
            "acceptance": price.acceptance,
            "cost_at_k": float(price.total(k)),
            "break_even": _even(price, priced.get(REFERENCE), False),
            "break_even_with_base": _even(price, priced.get(REFERENCE), True),
            "front": False,
            "curve": {"k": ks, "cost": [float(price.total(j)) for j in ks], **curve},
        }
    near = {r: _mean(like[r]["conflict_spearman"]) for r in out if r in like and r not in apart}
    rows = list(near)
    for i in cost_curves.pareto_front([out[r]["cost_at_k"] for r in rows], [near[r] for r in rows]):
        out[rows[i]]["front"] = True
    return out


CURVES = ("ambiguity", "discrepancy", "vpr", "disagreement")


def _price(seeds: Mapping[int, Evidence]) -> cost_curves.SetCost:
    """Return the mean cost over base seeds; acceptance is that of all draws together."""
    cost = [c.record["cost"] for c in seeds.values()]
    fixed, marginal = ([c.get(name) for c in cost] for name in ("fixed_cost_bt", "marginal_cost_bt"))
    drawn = sum(len(c.val.logits) for c in seeds.values())
    return cost_curves.SetCost(
        None if None in fixed else float(np.mean(fixed)),
        None if None in marginal else float(np.mean(marginal)),
        sum(len(c.accepted) for c in seeds.values()) / drawn,
    )


def _even(price: cost_curves.SetCost, retraining: cost_curves.SetCost | None, with_base: bool) -> int | str | None:
    """Return the least k at which a set is cheaper than retraining, "never", or None where it is not known."""
    if retraining is None:
        return None
    try:
        even = cost_curves.break_even(price, retraining, with_base)
    except Undefined:
        return None
    return "never" if even is None else even


def _curves(problems: Sequence[Context]) -> dict[str, np.ndarray]:
    found = [cost_curves.multiplicity_curves(c) for c in problems]
    return {name: np.mean([f[name] for f in found], axis=0) for name in CURVES}


def uncertainties(cells: Cells, k: int) -> dict[str, Any]:
    """Return metric -> row -> its value at k and the standard deviation from patients, members and base seeds."""
    out: dict[str, Any] = {name: {} for name in uncertainty.AT_K}
    for label, seeds in cells.items():
        try:
            patients = [_over_labels(c, lambda p: uncertainty.over_patients(p, k)) for c in seeds.values()]
            members = [_over_labels(c, lambda p: uncertainty.over_subsets(p, k)) for c in seeds.values()]
        except Undefined:
            continue
        for name in uncertainty.AT_K:
            key = name if name == "disagreement" else f"{name}@{k}"
            values = [c.record["scores"][key]["value"] for c in seeds.values()]
            found = uncertainty.sources([p[name] for p in patients], [m[name] for m in members], values)
            out[name][label] = {"value": float(np.mean(values)), **vars(found)}
    return out


def _over_labels(cell: Evidence, of: Callable[[Context], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found = [of(problem) for problem in cell.on_test]
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}


def noise(cells: Cells) -> dict[str, Any] | None:
    """Return how far a base network's predictions are apart between the rows it was evaluated beside: the worst seed.

    Rows predict in blocks of other sizes and by other strategies, and each evaluates the base anew.
    """
    seeds = sorted({seed for row in cells.values() for seed in row})
    found = []
    for seed in seeds:
        views = {label: row[seed].test for label, row in cells.items() if seed in row}
        if len(views) > 1:
            task = next(iter(views.values())).task
            probabilities = sigmoid if task == "multilabel" else softmax
            found.append(uncertainty.noise_floor({n: v.base for n, v in views.items()}, probabilities))
    if not found:
        return None
    return {
        "evaluations": len(cells),
        "probability": max(f.probability for f in found),
        "decisions": max(f.decisions for f in found),
        "cases": found[0].cases,
    }


def ladders(cells: Cells, k: int) -> dict[str, Any] | None:
    """Return the rungs, and row -> members left and what they leave open on test at each, mean over base seeds.

    A measure is null at a rung where some base seed has too few members left. Multi-label tasks have none: a
    specification per label is not one of the task.
    """
    rows: dict[str, Any] = {}
    rungs: list[str] = []
    measures: list[str] = []
    for label, seeds in cells.items():
        climbed = [found for c in seeds.values() if (found := _ladder(c, k)) is not None]
        if not climbed or len(climbed) < len(seeds):
            continue
        rungs = [rung["label"] for rung in climbed[0]]
        measures = [name for name in climbed[0][0] if name not in ("label", "members")]
        rows[label] = {
            name: [float(np.mean([c[i][name] for c in climbed])) for i in range(len(rungs))]
            for name in ("members", *measures)
        }
    return {"rungs": rungs, "measures": measures, "rows": rows} if rows else None


def _ladder(cell: Evidence, k: int) -> list[dict[str, Any]] | None:
    made = np.flatnonzero(~cell.membership.failed)
    if cell.val.task == "multilabel" or not len(made):
        return None
    (val,), (test,) = cell.problems("val", made), cell.problems("test", made)
    inside = np.isin(made, cell.accepted)
    properties = {}
    for name in ("worst_class_recall", "member_calibration_error"):
        try:
            properties[name] = METRICS.get(name)(test, test.probabilities).values
        except Undefined:
            continue
    steps = {"drawn": np.ones(len(made), bool), **specifications(val, inside)}
    return [
        {
            "label": rung.label,
            "members": rung.members,
            f"ambiguity@{k}": rung.ambiguity.value,
            "disagreement": rung.disagreement.value,
            **{f"range of {name}": score.value for name, score in rung.ranges.items()},
        }
        for rung in ladder(steps, properties, test, k)
    ]


def abstentions(cells: Cells, members: int = ABSTAINING) -> dict[str, Any]:
    """Return row -> what selective ensembles of the set do, by base seed, and the groups they are shown for."""
    rows: dict[str, Any] = {}
    reasons: dict[str, list[str]] = {}
    groups: dict[str, None] = {}
    for label, seeds in cells.items():
        row: dict[str, Any] = {"base_accuracy": {}, "groups": {}}
        for seed, cell in seeds.items():
            found = abstention(cell.on_test, members)
            for name, score in found.scores.items():
                row.setdefault(name, {})[seed] = score.value
                if score.reason and label not in (named := reasons.setdefault(score.reason, [])):
                    named.append(label)
            row["base_accuracy"][seed] = cell.record["scores"]["accuracy.base"]["value"]
            for group, scores in found.groups.items():
                groups.setdefault(group)
                row["groups"].setdefault(group, {})[seed] = scores["referred"].value
        rows[label] = row
    votes = fewest_votes(members, 0.05)
    return {"members": members, "votes": votes, "groups": list(groups), "reasons": reasons, "rows": rows}


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values()))) if values else math.nan


def plain_values(value: Any) -> Any:
    """Return JSON values: text keys, floats to six significant digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(entry) for entry in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
