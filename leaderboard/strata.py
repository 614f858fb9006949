"""Hidden strata on a board: which stratum a set serves worst, which bears its disagreement, and whether strata that
were found show the known ones.

`strata_science` returns plain JSON values, null where a value is undefined; `section` shows them. Strata are found once
per dataset, by a frozen reference, and are the same for all rows; values are over all base seeds of a row together,
with intervals over test patients alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.api import Undefined
from ..metrics.context import Context
from ..metrics.decisions import disagreement
from ..metrics.intervals import Estimate, holm
from ..metrics.strata_measures import (
    AgainstChance,
    Explained,
    WorstStratum,
    explained,
    found,
    worst_stratum,
)
from .over_seeds import json_number
from .suite import Suite
from .text import NONE, end, markdown, number, paragraph

if TYPE_CHECKING:
    from .science import Cells, Evidence

Science = Mapping[str, Any]

KINDS = {
    "clusters": "clusters of the reference network's features within a class",
    "slices": "slices of the reference network's errors",
    "disagreement": "slices of disagreement",
}
"""What strata of a kind are."""

STRATA = """\
Patients (cases) on test, and the accuracy of the base networks there. In brackets: fewer than {least} patients, counted
nowhere below.
"""

WORST = """\
*worst stratum*: the one that the members serve worst on average, of all base seeds; *accuracy*: theirs there; *excess*:
that less what the worst of random strata gives, of the same sizes within each class and made of whole patients; p: as
low an accuracy in random strata. Brackets: 95% intervals over test patients. *same*: share of pairs of members that
serve the same stratum worst; *entropy*: of which one that is, bits; *stable*: share of bootstrapped patients on whom it
is the same stratum. **Bold**: p at most 5% after Holm over the table ({found} of {tests}).
"""

EXPLAINED = """\
*lift*: disagreement of the stratum that bears most, over that of all cases (random strata: after the slash); *explained
share*: of the variance over cases of disagreement, eta² (random strata: after the slash). Brackets: 95% intervals over
test patients. p: as large in random strata; **bold** as above ({found} of {tests} lifts or shares).
"""

TRUTHS = """\
Of the cases of a class, those that have what is known or, where most have it, those that have not. *found as*: the
stratum that says most about it (phi coefficient); *precision*: share of that stratum that belongs to it, beside its
share of the class; *recall*: share of it that is in the stratum; *at 10*: the largest share of it among the ten cases
that a stratum holds most firmly; *ARI*: adjusted Rand index of all strata of the class with it (of merged classes: with
all of them); p: random strata that say as much. *accuracy*: of the base networks, there and in the rest of the class.
"""


def strata_science(
    cells: Cells,
    codes: Mapping[str, np.ndarray],
    names: Mapping[str, Sequence[str]],
    truths: Mapping[str, np.ndarray] | None = None,
    classes: Sequence[str] = (),
    values: Mapping[str, Sequence[str]] | None = None,
    places: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Return what is measured on strata, by their kind; empty without cells, for multi-label tasks, and without codes.

    codes: kind ("clusters", "slices") -> int64 [sample] on test, in the order of the predictions, -1 for none; names:
    kind -> names of the codes; truths: name -> 0 or 1 [sample] on test, -1 unknown, or the classes that were merged;
    classes: names of the classes; values: truth -> names of the merged classes; places: kind -> [sample] on test.

    Of a kind: strata: name, cases, patients, whether it counts, accuracy of the base networks; rows: label -> values;
    truths: one entry per known truth and class that has both kinds of cases.
    """
    first = next((cell for row in cells.values() for cell in row.values()), None)
    if first is None or len(first.on_test) > 1:
        return {}
    (context,) = first.on_test
    seed = first.settings.seed
    bases = _base_accuracy(cells)
    out: dict[str, Any] = {}
    for kind, of_cases in codes.items():
        rows = {label: _row(list(row.values()), of_cases, names[kind], seed) for label, row in cells.items()}
        for p in ("worst_p", "lift_p", "share_p"):
            adjusted = holm([math.nan if row[p] is None else row[p] for row in rows.values()])
            for row, value in zip(rows.values(), adjusted):
                row[f"{p}_adjusted"] = json_number(value)
        out[kind] = {
            "strata": [_stratum(context, of_cases == g, name, bases) for g, name in enumerate(names[kind])],
            "rows": rows,
            "truths": [
                entry
                for name, truth in (truths or {}).items()
                for entry in _truths(
                    context,
                    of_cases,
                    names[kind],
                    _Truth(name, truth, (values or {}).get(name, ()), (places or {}).get(kind)),
                    classes,
                    bases,
                    seed,
                )
            ],
        }
    return out


def _base_accuracy(cells: Cells) -> np.ndarray:
    """Return the share of the base networks that decide a case rightly, [sample]; NaN where the label is missing."""
    by_seed: dict[int, Context] = {}
    for row in cells.values():
        for seed, cell in row.items():
            if seed not in by_seed:
                by_seed[seed] = cell.on_test[0]
    right = [np.where(c.known, c.base_decisions == c.labels, np.nan) for c in by_seed.values()]
    return np.mean(right, axis=0)


def _stratum(context: Context, inside: np.ndarray, name: str, bases: np.ndarray) -> dict[str, Any]:
    labelled = inside & context.known
    patients = len(np.unique(context.bootstrap.index[labelled]))
    accuracy = float(bases[labelled].mean()) if labelled.any() else None
    return {
        "name": name,
        "cases": int(labelled.sum()),
        "patients": patients,
        "counts": patients >= context.min_patients,
        "accuracy": accuracy,
    }


def _row(cells: Sequence[Evidence], codes: np.ndarray, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Return the values of a row over its base seeds; those without enough accepted members are left out."""
    contexts = [cell.on_test[0] for cell in cells]
    some, pairs = ([c for c in contexts if c.size >= least] for least in (1, 2))
    out: dict[str, Any] = {"seeds": len(some), "seeds_of_pairs": len(pairs), "reasons": []}
    try:
        if not some:
            raise Undefined("no member was accepted")
        decisions = np.concatenate([c.decisions for c in some])
        out |= _worst(worst_stratum(some[0], codes, seed=seed, members=decisions), names)
    except Undefined as reason:
        out |= dict.fromkeys(_WORST_FIELDS) | {"reasons": [str(reason)]}
    try:
        if not pairs:
            raise Undefined("no two members were accepted")
        mean = np.mean([disagreement(c.votes) for c in pairs], axis=0)
        out |= _explained(explained(pairs[0], codes, mean, seed=seed), names)
    except Undefined as reason:
        out |= dict.fromkeys(_EXPLAINED_FIELDS)
        out["reasons"] = list(dict.fromkeys([*out["reasons"], str(reason)]))
    return out


_WORST_FIELDS = (
    *("worst", "accuracy", "accuracy_low", "accuracy_high", "excess", "excess_low", "excess_high", "worst_p"),
    *("same", "entropy", "stable", "members_excess"),
)
_EXPLAINED_FIELDS = (
    *("bears", "lift", "lift_low", "lift_high", "lift_expected", "lift_p"),
    *("share", "share_low", "share_high", "share_expected", "share_p"),
)


def _worst(result: WorstStratum, names: Sequence[str]) -> dict[str, Any]:
    return {
        "worst": names[result.accuracy.stratum],
        **_ends("accuracy", result.accuracy.estimate),
        **_ends("excess", result.accuracy.excess),
        "worst_p": result.accuracy.p,
        "same": json_number(result.agreement),
        "entropy": result.entropy,
        "stable": json_number(result.stability),
        "members_excess": float(result.excess.mean()),
    }


def _explained(result: Explained, names: Sequence[str]) -> dict[str, Any]:
    def against(name: str, value: AgainstChance) -> dict[str, Any]:
        return {**_ends(name, value.estimate), f"{name}_expected": value.expected, f"{name}_p": value.p}

    return {"bears": names[result.lift.stratum], **against("lift", result.lift), **against("share", result.share)}


def _ends(name: str, estimate: Estimate) -> dict[str, Any]:
    interval = estimate.interval()
    return {name: estimate.value, f"{name}_low": json_number(interval.low), f"{name}_high": json_number(interval.high)}


@dataclass(frozen=True)
class _Truth:
    """A known truth: name, codes of the cases [sample] (-1 unknown), names of merged classes, places of the cases."""

    name: str
    codes: np.ndarray
    values: Sequence[str]
    places: np.ndarray | None

    def within(self, inside: np.ndarray) -> dict[str, np.ndarray]:
        """Return what some cases, bool [sample], may have, by name: bool [case of these].

        Of a truth that a case has or has not, the rarer side; of merged classes, each that is there.
        """
        codes = self.codes[inside]
        if not self.values:
            has = codes > 0
            return {self.name: has} if has.mean() <= 0.5 else {f"no {self.name}": ~has}
        return {self.values[code]: codes == code for code in np.unique(codes)}


def _truths(
    context: Context,
    codes: np.ndarray,
    names: Sequence[str],
    truth: _Truth,
    classes: Sequence[str],
    bases: np.ndarray,
    seed: int,
) -> Iterable[dict[str, Any]]:
    """Yield how well the strata show a known truth in every class that has cases with and without it."""
    for label in np.unique(context.labels[context.known]):
        inside = (context.labels == label) & (truth.codes >= 0) & (codes >= 0)
        for name, has in truth.within(inside).items() if inside.any() else ():
            if not has.any() or has.all():
                continue
            entry: dict[str, Any] = {
                "truth": name,
                "class": classes[label] if len(classes) else str(label),
                "cases": int(has.sum()),
                "of": len(has),
                "accuracy": float(bases[inside][has].mean()),
                "accuracy_rest": float(bases[inside][~has].mean()),
            }
            parts = truth.codes[inside] if truth.values else None
            places = None if truth.places is None else truth.places[inside]
            try:
                shown = found(has, codes[inside], context.bootstrap.index[inside], places, parts, seed=seed)
                entry |= vars(shown) | {"stratum": names[shown.stratum], "firmest": json_number(shown.firmest)}
                entry["reason"] = ""
            except Undefined as reason:
                entry |= dict.fromkeys(("stratum", "precision", "recall", "lift", "phi", "ari", "firmest", "p"))
                entry["reason"] = str(reason)
            yield entry


def section(suite: Suite, science: Science) -> list[str]:
    """Return the section on hidden strata from the part `strata` of a suite's science; empty if it has none."""
    parts: list[str] = []
    for kind, of_kind in (science.get("strata") or {}).items():
        parts += [
            f"### Hidden strata: {KINDS.get(kind, kind)}\n",
            *_strata(of_kind["strata"], suite.min_patients),
            *_worst_table(suite, of_kind["rows"]),
            *_explained_table(suite, of_kind["rows"]),
            *_reasons(of_kind["rows"]),
            *_truth_table(of_kind["truths"]),
        ]
    return parts


def _strata(strata: Sequence[Science], least: int) -> list[str]:
    lines = [["stratum", "test", "accuracy of the base"]]
    for s in strata:
        size = f"{s['patients']} ({s['cases']})"
        lines.append([s["name"] if s["counts"] else f"({s['name']})", size, number(s["accuracy"], "rate")])
    return [markdown(lines), paragraph(STRATA.format(least=least))]


def _shown(suite: Suite, rows: Mapping[str, Science], field: str) -> list[tuple[str, Science]]:
    """Return (text, values) of the suite's rows that have a field, in the suite's order."""
    texts = [(row.label, f"`{row.label}`" + (" (control)" if row.control else "")) for row in suite.rows]
    return [(text, rows[label]) for label, text in texts if label in rows and rows[label][field] is not None]


def _worst_table(suite: Suite, rows: Mapping[str, Science]) -> list[str]:
    shown = _shown(suite, rows, "worst")
    if not shown:
        return []
    lines = [["generator", "worst stratum", "accuracy", "excess", "p", "same", "entropy", "stable"]]
    for text, row in shown:
        cells = [_interval(row, "accuracy", "rate"), _interval(row, "excess", "difference"), _p(row, "worst_p")]
        rest = [number(row["same"], "rate"), number(row["entropy"], "number"), number(row["stable"], "rate")]
        lines.append([text + _seeds(suite, row["seeds"]), row["worst"], *cells, *rest])
    return ["**Who is served worst**\n", markdown(lines), paragraph(WORST.format(**_counted(shown, ("worst_p",))))]


def _explained_table(suite: Suite, rows: Mapping[str, Science]) -> list[str]:
    shown = _shown(suite, rows, "bears")
    if not shown:
        return []
    lines = [["generator", "bears most", "lift", "p", "explained share", "p"]]
    for text, row in shown:
        cells = []
        for name in ("lift", "share"):
            cells += [f"{_interval(row, name, 'number')} / {number(row[f'{name}_expected'], 'number')}"]
            cells += [_p(row, f"{name}_p")]
        lines.append([text + _seeds(suite, row["seeds_of_pairs"]), row["bears"], *cells])
    counted = _counted(shown, ("lift_p", "share_p"))
    return ["**Who bears the disagreement**\n", markdown(lines), paragraph(EXPLAINED.format(**counted))]


def _truth_table(truths: Sequence[Science]) -> list[str]:
    if not truths:
        return []
    header = ["known stratum", "cases", "accuracy", "rest", "found as", "precision", "share", "recall", "lift"]
    lines = [[*header, "at 10", "ARI", "p"]]
    for t in truths:
        base = [number(t["accuracy"], "rate"), number(t["accuracy_rest"], "rate"), t["stratum"] or NONE]
        how = [number(t["precision"], "rate"), number(t["cases"] / t["of"], "rate"), number(t["recall"], "rate")]
        rest = [
            number(t["lift"], "number"),
            number(t["firmest"], "rate"),
            NONE if t["ari"] is None else end(t["ari"], "number"),
            number(t["p"], "rate"),
        ]
        lines.append([f"{t['truth']} in {t['class']}", str(t["cases"]), *base, *how, *rest])
    reasons = {f"{t['truth']} in {t['class']}": t["reason"] for t in truths if t["reason"]}
    said = [f"Not found, {reason}: {name}." for name, reason in reasons.items()]
    return ["**Are known strata found?**\n", markdown(lines), paragraph(TRUTHS, *said)]


def _reasons(rows: Mapping[str, Science]) -> list[str]:
    """Return a sentence for every reason of undefined values, with the rows that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for label, row in rows.items():
        for reason in row["reasons"]:
            by_reason.setdefault(reason, []).append(f"`{label}`")
    said = [f"Undefined, {reason}: {', '.join(labels)}." for reason, labels in sorted(by_reason.items())]
    return [paragraph(*said)] if said else []


def _interval(row: Science, name: str, unit: str) -> str:
    text = number(row[name], unit)
    if row[f"{name}_low"] is None:
        return text
    return f"{text} [{end(row[f'{name}_low'], unit)},{end(row[f'{name}_high'], unit)}]"


def _p(row: Science, name: str) -> str:
    text = number(row[name], "rate")
    return f"**{text}**" if _holds(row, name) else text


def _holds(row: Science, name: str) -> bool:
    adjusted = row[f"{name}_adjusted"]
    return adjusted is not None and adjusted <= 0.05


def _counted(shown: Sequence[tuple[str, Science]], names: Sequence[str]) -> dict[str, int]:
    tests = [(row, name) for _, row in shown for name in names]
    return {"found": sum(_holds(row, name) for row, name in tests), "tests": len(tests)}


def _seeds(suite: Suite, seeds: int) -> str:
    """Return a mark where not all base seeds have a value: (3)."""
    return "" if seeds == len(suite.base_seeds) else f" ({seeds})"
