"""Fairness of a suite's sets, from its committed predictions: gaps between groups of patients, their range over the
members of a set, and who bears the arbitrariness.

`fairness` returns plain JSON values, null where a value is undefined, which `fairness_page` shows. What is undefined
stands with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.api import METRICS, PerMember, Undefined
from ..metrics.context import Context
from ..metrics.fairness import (
    GAP_OF,
    RATES,
    Spread,
    at_threshold,
    frozen_threshold,
    group_spread,
    mean_spread,
    member_spread,
    patients_needed,
    signed_gap,
)
from ..metrics.group_rates import GroupRates
from ..metrics.groups import Burden, burdens, case_quantities, group_sizes, intersect, mean_cases
from ..metrics.intervals import CaseMean, Estimate, holm
from .over_seeds import json_number, model_mean, over_seeds

if TYPE_CHECKING:
    from .science import Cells, Evidence

FROZEN = " (frozen)"
"""Mark of a metric whose decisions are made at the base's threshold on val instead of by argmax."""

OF_DECISIONS = (
    "accuracy_gap",
    "worst_group_accuracy",
    "demographic_parity_gap",
    "tpr_gap",
    "fpr_gap",
    "equalised_odds_max",
    "equalised_odds_mean",
)
"""Criteria and group metrics that change with the threshold, in the order in which they are shown."""

METRIC_ORDER = (*OF_DECISIONS, "auroc_gap", "worst_group_auroc", "calibration_gap")
"""All that are shown; those of plug-ins follow."""

VIEWS = ("val", "test")
ABSTAINING = 10
_Key = tuple[str, str]  # metric and attribute, or row


def fairness(
    cells: Cells, k: int, intersections: Sequence[str], attribute_values: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return the fairness of the sets of a suite; empty if its predictions name no attributes of patients.

    intersections: "sex*view", attributes beside those of the predictions; attribute_values: attribute -> names of its
    codes, which are the codes themselves where no name is given. Values over base seeds are means; their intervals hold
    test patients, the same for all base seeds, and base seeds (t, Satterthwaite's degrees of freedom).

    attributes: name -> names of codes; patients: of test; groups: attribute -> view -> code -> sizes; thresholds: base
    seed -> threshold per label; base: metric -> attribute -> gap; sets: metric -> attribute -> row -> gaps of members
    and ensemble, and the range over members with its null; burdens: quantity -> attribute -> row. Raises UserError for
    an intersection of attributes that are not there.
    """
    first = next((cell for row in cells.values() for cell in row.values()), None)
    if first is None or not (first.test.attributes or intersections):
        return {}
    names = _names(first, attribute_values)
    codes = {view: _with_intersections(getattr(first, view).attributes, names, intersections) for view in VIEWS}
    for spec in intersections:
        names[spec] = intersect(first.test.attributes, names, spec)[1]
    found: dict[str, Any] = {
        "attributes": names,
        "patients": first.on_test[0].bootstrap.patients,
        "groups": {a: {view: _sizes(first, view, codes[view][a]) for view in VIEWS} for a in names},
        "thresholds": _thresholds(cells),
    }
    found["base"], found["sets"] = _all_gaps(cells, codes["test"], k)
    found["burdens"] = _burdens(cells, codes["test"], k)
    return found


def _names(cell: Evidence, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the names of every attribute's codes; a code stands for itself where no name is given."""
    names = {}
    for attribute in sorted(cell.test.attributes):
        most = max(int(getattr(cell, view).attributes[attribute].max(initial=-1)) for view in VIEWS)
        known = [str(name) for name in given.get(attribute, ())]
        names[attribute] = known + [str(code) for code in range(len(known), most + 1)]
    return names


def _with_intersections(
    attributes: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]], intersections: Sequence[str]
) -> dict[str, np.ndarray]:
    own = {attribute: attributes[attribute] for attribute in names}
    return own | {spec: intersect(own, names, spec)[0] for spec in intersections}


def _sizes(cell: Evidence, view: str, codes: np.ndarray) -> dict[int, dict[str, int | bool | None]]:
    context, *others = cell.on_test if view == "test" else cell.on_val
    sizes = group_sizes(context, codes)
    classes = {"positive": None, "negative": None} if others else {}  # one label says nothing of the others
    return {code: {**vars(size), **classes} for code, size in sizes.items()}


def _thresholds(cells: Cells) -> dict[str, Any]:
    seeds: dict[int, list[float]] = {}
    try:
        for seed, cell in sorted(_bases(cells).items()):
            seeds[seed] = [frozen_threshold(context) for context in cell.on_val]
    except Undefined as reason:
        return {"seeds": {}, "reason": str(reason)}
    return {"seeds": seeds, "reason": ""}


def _bases(cells: Cells) -> dict[int, Evidence]:
    """Return the first cell of every base seed: all rows of a seed share its base network."""
    bases: dict[int, Evidence] = {}
    for row in cells.values():
        for seed, cell in row.items():
            bases.setdefault(seed, cell)
    return bases


@dataclass(frozen=True)
class _Gaps:
    """One metric by one attribute in one cell; range: of the signed gap over the members (see `_signed`); rates: of the
    base by group, one per label, if they are asked for and it has any."""

    base: Estimate
    members: Estimate | Undefined
    ensemble: Estimate | Undefined
    range: Spread | Undefined
    range_at_k: Spread | Undefined
    rates: list[GroupRates]


def _all_gaps(cells: Cells, codes: Mapping[str, np.ndarray], k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the gaps of the base, metric -> attribute, and those of the sets, metric -> attribute -> row."""
    bases = _bases(cells)
    of_base: dict[_Key, dict[int, _Gaps | Undefined]] = {}
    sets: dict[str, Any] = {}
    for label, row in cells.items():
        of_row: dict[_Key, dict[int, _Gaps | Undefined]] = {}
        for seed, cell in row.items():
            for key, gaps in _cell_gaps(cell, codes, k, cell is bases[seed]):
                of_row.setdefault(key, {})[seed] = gaps
                if cell is bases[seed]:
                    of_base.setdefault(key, {})[seed] = gaps
        for (metric, attribute), by_seed in of_row.items():
            sets.setdefault(metric, {}).setdefault(attribute, {})[label] = _set(by_seed)
    base: dict[str, Any] = {}
    for (metric, attribute), by_seed in of_base.items():
        base.setdefault(metric, {})[attribute] = _base(metric, by_seed)
    return base, sets


def _cell_gaps(
    cell: Evidence, codes: Mapping[str, np.ndarray], k: int, with_rates: bool
) -> Iterator[tuple[_Key, _Gaps | Undefined]]:
    """Yield every metric by every attribute; with_rates: also the base's rates by group."""
    problems = [_models(context, codes) for context in cell.on_test]
    declared = [n for n, f in METRICS.load_all() if f.info.level == "group" and n not in METRIC_ORDER]
    for name in (*METRIC_ORDER, *declared):
        for attribute, gaps in _of_metric(name, problems, codes).items():
            yield (name, attribute), _split(name, attribute, gaps, problems, k, with_rates)
    try:
        frozen = [_frozen(context, frozen_threshold(val)) for context, val in zip(problems, cell.on_val)]
    except Undefined as reason:
        yield from (((name + FROZEN, attribute), reason) for name in OF_DECISIONS for attribute in codes)
        return
    for name in OF_DECISIONS:
        for attribute, gaps in _of_metric(name, frozen, codes).items():
            yield (name + FROZEN, attribute), _split(name, attribute, gaps, frozen, k, with_rates)


def _models(context: Context, codes: Mapping[str, np.ndarray]) -> Context:
    """Return the context of the base, the ensemble (if there are members) and the members, in this order, as models."""
    own = [context.ensemble[None], context.probabilities] if context.size else []
    return replace(context, probabilities=np.concatenate([context.base[None], *own]), attributes=dict(codes))


def _frozen(context: Context, threshold: float) -> Context:
    return replace(context, probabilities=at_threshold(context.probabilities, threshold, context.positive))


def _of_metric(
    name: str, problems: Sequence[Context], codes: Mapping[str, np.ndarray]
) -> dict[str, PerMember | Undefined]:
    """Return a metric of all models by attribute, mean over labels."""
    metric = METRICS.get(name)
    per_label = []
    for label, context in enumerate(problems):
        try:
            found = metric(context, context.probabilities)
        except Undefined as reason:
            found = {f"#{attribute}": reason for attribute in codes}
        where = f"label {label}: " if len(problems) > 1 else ""
        per_label.append({s: Undefined(f"{where}{f}") if isinstance(f, Undefined) else f for s, f in found.items()})
    return {attribute: _mean([found[f"#{attribute}"] for found in per_label]) for attribute in codes}


def _mean(labels: Sequence[PerMember | Undefined]) -> PerMember | Undefined:
    defined = [f for f in labels if isinstance(f, PerMember)]
    if len(defined) < len(labels):
        return next(f for f in labels if isinstance(f, Undefined))
    return PerMember(np.mean([f.values for f in defined], axis=0), np.mean([f.draws for f in defined], axis=0))


def _split(
    name: str, attribute: str, gaps: PerMember | Undefined, problems: Sequence[Context], k: int, with_rates: bool
) -> _Gaps | Undefined:
    """Return what is kept of the gaps of base, ensemble and members, whose draws would not fit for all rows."""
    if isinstance(gaps, Undefined):
        return gaps
    size = len(gaps.values) - 2
    few = Undefined("no member accepted")
    rates = _rates(GAP_OF[name], attribute, problems) if name in GAP_OF else []
    members = _signed(gaps, [r.of_models(slice(2, None)) for r in rates]) if size > 0 else gaps
    patients = problems[0].bootstrap.patients
    return _Gaps(
        base=model_mean(gaps, slice(0, 1), patients),
        members=model_mean(gaps, slice(2, None), patients) if size > 0 else few,
        ensemble=model_mean(gaps, slice(1, 2), patients) if size > 0 else few,
        range=_range(members, None) if size > 0 else few,
        range_at_k=_range(members, k) if size > 0 else few,
        rates=[r.of_models(slice(0, 1)) for r in rates] if with_rates else [],
    )


def _signed(gaps: PerMember, rates: Sequence[GroupRates]) -> PerMember:
    """Return the members' signed gaps, mean over labels; the gaps themselves if they are no difference of rates."""
    if not rates:
        return PerMember(gaps.values[2:], gaps.draws[:, 2:])
    signed = [signed_gap(r) for r in rates]
    return PerMember(np.mean([s.values for s in signed], axis=0), np.mean([s.draws for s in signed], axis=0))


def _range(members: PerMember, k: int | None) -> Spread | Undefined:
    try:
        return member_spread(members, k)
    except Undefined as reason:
        return reason


def _rates(rate: str, attribute: str, problems: Sequence[Context]) -> list[GroupRates]:
    """Return the rates by group of all models, one per label, of which a gap that is defined was made."""
    found = [RATES[rate](context, context.probabilities)[attribute] for context in problems]
    return [r for r in found if isinstance(r, GroupRates)]


def _base(metric: str, by_seed: Mapping[int, _Gaps | Undefined]) -> dict[str, Any]:
    """Return the base's gap over base seeds: rates of the groups, what chance gives, the patients that it needs."""
    found = {seed: gaps for seed, gaps in by_seed.items() if isinstance(gaps, _Gaps)}
    out = over_seeds({seed: gaps.base for seed, gaps in found.items()}) | {"reason": _reason(by_seed)}
    rates = [r for gaps in found.values() for r in gaps.rates]
    if not rates:
        return out
    groups = [g for g in rates[0].groups if all(g in r.groups for r in rates)]
    least = -1.0 if metric == "calibration_gap" else 0.0
    out["rates"] = {g: _rate({seed: gaps.rates for seed, gaps in found.items()}, g, least) for g in groups}
    spreads = [mean_spread([group_spread(r) for r in gaps.rates]) for gaps in found.values()]
    sds = [float(np.nanstd(np.mean([signed_gap(r).draws for r in gaps.rates], axis=0))) for gaps in found.values()]
    limit, sd = (_root_mean_square(v) for v in ([s.limit() for s in spreads], sds))
    needed = patients_needed(next(iter(found.values())).base.n, limit, sd, out["value"])
    chance = mean_spread(spreads)
    return out | {"chance": json_number(chance.limit()), "p": json_number(chance.p()), "needed": json_number(needed)}


def _rate(rates: Mapping[int, Sequence[GroupRates]], group: int, least: float) -> dict[str, Any]:
    """Return the base's rate in a group, mean over labels and base seeds, with its interval."""
    estimates = {}
    for seed, labels in rates.items():
        own = [r.only([group]) for r in labels]
        draws = np.mean([r.draws[0, :, 0] for r in own], axis=0)
        estimates[seed] = Estimate(float(np.mean([r.values[0, 0] for r in own])), draws, 0)
    return over_seeds(estimates, least) | {"seeds": len(estimates)}


def _root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _set(by_seed: Mapping[int, _Gaps | Undefined]) -> dict[str, Any]:
    """Return the gaps of a row's sets and the range over members, over the base seeds that have them."""
    found = {seed: gaps for seed, gaps in by_seed.items() if isinstance(gaps, _Gaps)}
    out: dict[str, Any] = {}
    for name in ("members", "ensemble"):
        mean = over_seeds({s: e for s, g in found.items() if isinstance(e := getattr(g, name), Estimate)})
        out[name] = mean | {"seeds": len(mean["seeds"])}
    for name in ("range", "range_at_k"):
        spreads = [s for g in found.values() if isinstance(s := getattr(g, name), Spread)]
        out[name] = {"value": None, "null": None, "p": None, "seeds": len(spreads)}
        if spreads:
            pooled = mean_spread(spreads)
            out[name] |= {"value": pooled.value, "null": json_number(pooled.limit()), "p": json_number(pooled.p())}
    reasons = [getattr(g, name) for g in found.values() for name in ("members", "range_at_k")]
    return out | {"reason": _reason(by_seed) or next((str(r) for r in reasons if isinstance(r, Undefined)), "")}


def _reason(by_seed: Mapping[int, _Gaps | Undefined]) -> str:
    return next((str(gaps) for gaps in by_seed.values() if isinstance(gaps, Undefined)), "")


def _burdens(cells: Cells, codes: Mapping[str, np.ndarray], k: int) -> dict[str, Any]:
    """Return quantity -> attribute -> row -> how it is spread over groups, p after Holm over a quantity's table."""
    cases: dict[_Key, CaseMean] = {}
    seeds: dict[_Key, int] = {}
    reasons: dict[_Key, str] = {}
    for label, row in cells.items():
        per_seed = [case_quantities(cell.on_test, k, ABSTAINING) for cell in row.values()]
        for quantity in per_seed[0]:
            of_seeds = [found[quantity] for found in per_seed]
            defined = [c for c in of_seeds if isinstance(c, CaseMean)]
            key = quantity, label
            seeds[key] = len(defined)
            reasons[key] = next((str(c) for c in of_seeds if isinstance(c, Undefined)), "")
            if defined:
                cases[key] = mean_cases(defined)
    first = next(cell for row in cells.values() for cell in row.values())
    bootstrap, seed = first.on_test[0].bootstrap, first.settings.seed
    out: dict[str, Any] = {}
    for attribute, own in codes.items():
        found = burdens(cases, own, bootstrap, seed=seed, min_patients=first.min_patients)
        for key, count in seeds.items():
            quantity, label = key
            burden = found.get(key, Undefined(reasons[key]))
            shown = {"seeds": count, **_burden(burden, bootstrap.patients)}
            shown["reason"] = shown["reason"] or reasons[key]
            out.setdefault(quantity, {}).setdefault(attribute, {})[label] = shown
    for tests in out.values():
        rows = [row for of_attribute in tests.values() for row in of_attribute.values()]
        for row, p in zip(rows, holm([math.nan if row["p"] is None else row["p"] for row in rows])):
            row["adjusted"] = json_number(p)
    return out


def _burden(burden: Burden | Undefined, patients: int) -> dict[str, Any]:
    if isinstance(burden, Undefined):
        empty = dict.fromkeys(("most", "least", "gap", "low_end", "high_end", "chance", "p", "needed"))
        return {"groups": {}, **empty, "reason": str(burden)}
    gap, ends = burden.gap, burden.gap.interval()
    sd = float(gap.draws.std()) if len(gap.draws) else math.nan
    groups = {}
    for code, mean in zip(burden.groups, burden.estimates):
        of_group = mean.interval()
        groups[code] = [mean.value, json_number(of_group.low), json_number(of_group.high)]
    return {
        "groups": groups,
        "most": burden.most,
        "least": burden.least,
        "gap": gap.value,
        "low_end": json_number(ends.low),
        "high_end": json_number(ends.high),
        "chance": burden.limit,
        "p": burden.p,
        "needed": json_number(patients_needed(patients, burden.limit, sd, gap.value)),
        "reason": "",
    }
