"""The multiplicity sheet of a record, one page for whoever deploys a member of its set, and the card of one case.

Scores are those of the record. What it does not hold (groups, abstention, single cases) is computed from the
predictions that it was scored from, with its accepted members and its bootstrap. Multiplicity sheets: after Ganesh
(WACV 2024).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..metrics.abstention import Abstention, abstention, group_scores
from ..metrics.api import Predictions, Undefined
from ..metrics.context import MIN_PATIENTS, Context, class_scores, contexts
from ..metrics.decisions import ambiguous, conflict_interval, fewest_votes, selective_ensemble, votes
from ..metrics.intervals import CaseMean, PatientBootstrap
from ..metrics.performance import errors
from ..metrics.scores import score_range
from .cells import Record, verified
from .check import predictions_of
from .predictions import load_arrays, load_predictions, predictions_digest
from .text import NONE, bullet, end, markdown, number, paragraph, plain_text, sentence

ALPHA = 0.05
"""Level of the test by which a selective ensemble answers."""

FEW_ERRORS = 2
"""Standard errors of the paired loss difference under which an epsilon is not resolved."""

_ABSENT = {"value": None, "reason": "the record has no such score"}


def sheet(record_path: Path, predictions_folder: Path) -> str:
    """Return the multiplicity sheet of a record as Markdown.

    Raises UserError for a record whose run was not ok, or without its predictions in `predictions_folder` or below.
    """
    record, test = _read(record_path, predictions_folder)
    protocol = record["protocol"]
    bootstrap = PatientBootstrap(len(test.base), test.patient, protocol["draws"], protocol["seed"])
    problems = list(contexts(test, np.array(record["set"]["accepted"], np.int64), bootstrap, protocol["seed"]))
    refer = abstention(problems, alpha=ALPHA)
    parts = (
        _head(record),
        _trained(record),
        _set(record),
        _performance(record),
        _multiplicity(record),
        _groups(problems, refer, len(test.logits)),
        _abstention(refer),
        _digests(record),
        _limits(record),
    )
    return "\n".join(block for part in parts for block in part)


def case_card(record_path: Path, predictions_folder: Path, case: str) -> str:
    """Return the card of one test case, or of all images of one patient, as Markdown.

    case: the id of the case where the predictions have ids, else the code of its patient, else its index in test;
    `patient=CODE` means all images of a patient in any case. Raises UserError as `sheet` does, for a case that is not
    there, and for a set without accepted members.
    """
    record, test = _read(record_path, predictions_folder)
    accepted = np.array(record["set"]["accepted"], np.int64)
    if not len(accepted):
        raise UserError(f"{record_path}: none of its {record['set']['drawn']} members was accepted: it has no card")
    chosen = _find(test, case)
    part = _only(test, chosen)
    problems = list(contexts(part, accepted, PatientBootstrap(len(chosen), None, 0, 0), 0))
    blocks = [
        f"# Case card: {case}\n",
        paragraph(
            f"What the {len(accepted)} accepted members of `{record['row']}` decide: {_names(record)}, base seed "
            f"{record['identity']['base_seed']}, record {record['name']}."
        ),
    ]
    for position, index in enumerate(chosen):
        blocks.append(f"## {_case_title(test, int(index))}\n")
        if part.attributes:
            codes = (f"{name} {_code(of_cases[position])}" for name, of_cases in part.attributes.items())
            blocks.append(paragraph(f"Groups, by their codes: {', '.join(codes)}."))
        for label, context in enumerate(problems):
            if test.task == "multilabel":
                blocks.append(f"### {record['data']['classes'][label]}\n")
            blocks.append(_listed(_case_lines(context, position, _classes(record))))
    blocks.append(
        paragraph(
            "Conflict: the share of the members that decide otherwise than the base, with its exact two-sided 95% "
            "interval (Clopper-Pearson) over members drawn at random. Selective ensemble: the votes of all "
            f"{len(accepted)} accepted members, tested at alpha {ALPHA:g}."
        )
    )
    return "\n".join(blocks)


def _read(record_path: Path, predictions_folder: Path) -> tuple[Record, Predictions]:
    """Return a record and its predictions on test, which are those that it was scored from."""
    record, file = predictions_of(record_path, predictions_folder)
    if predictions_digest(load_arrays(file)) != record["predictions"]["digest"]:
        raise UserError(f"{file}: is not the file that {record_path} was made from (digest differs): restore it")
    return record, load_predictions(file, record["data"]["task"], record["data"].get("positive"))[1]


def _head(record: Record) -> Iterator[str]:
    yield f"# Multiplicity sheet: `{record['row']}`\n"
    yield paragraph(
        f"{_names(record)}, base seed {record['identity']['base_seed']}. How far do networks that are as good as the "
        "one that was trained decide otherwise? Scores are of the test cases; who belongs to the set was decided on "
        f"val. In brackets: 95% intervals. {NONE} is a value that is not defined; the reason stands below its table."
    )


def _trained(record: Record) -> Iterator[str]:
    identity, data = record["identity"], record["data"]
    positive, patients = data.get("positive"), data.get("patients")
    yield "## What was trained\n"
    yield _listed(
        {
            "dataset": _component(identity["dataset"]),
            "cases": plain_text(data["sizes"]),
            "patients": plain_text(patients) if patients else "not known, every case counts as one",
            "task": data["task"] + ("" if positive is None else f", positive class: {data['classes'][positive]}"),
            "labels" if data["task"] == "multilabel" else "classes": "; ".join(data["classes"]),
            "network": _component(identity["network"]),
            "recipe": _settings(identity["training"]),
            "generator": _component(identity["generator"]),
            "base seed": str(identity["base_seed"]),
            "a member is one weight vector": plain_text(record["set"].get("deployable")),
            "source and licence of the data": "; ".join(filter(None, (data.get("source"), data.get("licence")))),
            "said of the data": "; ".join(data.get("notes") or ["nothing"]),
        }.items()
    )


def _set(record: Record) -> Iterator[str]:
    protocol, found, scores = record["protocol"], record["set"], record["scores"]
    units, failed = found.get("epsilon_in_se"), found.get("failed") or []
    kinds = {
        "accepted": "acceptance_rate",
        "certified, with 95% confidence": "acceptance_rate_certified",
        "possible, not ruled out": "acceptance_rate_possible",
    }
    shown = {title: scores.get(key, _ABSENT) for title, key in kinds.items()}
    in_errors = "" if units is None else f", {units:.1f} standard errors of the paired loss difference on val"
    yield "## The set\n"
    yield _listed(
        {
            "members drawn": f"{found['drawn']}" + (f", {len(failed)} of them failed" if failed else ""),
            "loss that decides": f"{protocol['loss']} on val",
            "epsilon": f"{protocol['epsilon']:g} above the base's loss{in_errors}",
        }.items()
    )
    yield markdown(
        [
            ["", "members", "share of the drawn"],
            *([title, _count(score, found["drawn"]), _shown(score)] for title, score in shown.items()),
        ]
    )
    unresolved = units is not None and units < FEW_ERRORS and protocol["loss"] != "zero_one"
    said = [n for n in found.get("notes") or [] if not (unresolved and "standard errors of the paired loss" in n)]
    if unresolved:
        said.insert(
            0,
            f"**Epsilon is under {FEW_ERRORS} standard errors**: this validation split is too small to tell who is "
            "within it, so that membership is partly chance",
        )
    yield from _notes([*said, *_reasons(shown)])


def _performance(record: Record) -> Iterator[str]:
    scores = record["scores"]
    whose = {"base": "base", "mean member": "member_mean", "ensemble": "ensemble"}
    rows = {
        title: {who: scores.get(f"{name}.{suffix}", _ABSENT) for who, suffix in whose.items()}
        for title, name in (("loss (nll, nats)", "nll"), ("accuracy", "accuracy"))
    }
    yield "## How good\n"
    yield markdown(
        [
            ["", *whose],
            *([title, *map(_shown, row.values())] for title, row in rows.items()),
        ]
    )
    yield from _notes(
        _reasons({f"{title} of {who}": score for title, row in rows.items() for who, score in row.items()})
    )


def _multiplicity(record: Record) -> Iterator[str]:
    scores, k = record["scores"], record["protocol"]["k"]
    rows = {
        "ambiguity: some member decides otherwise than the base": "ambiguity",
        f"ambiguity@{k}: some member of {k} does": f"ambiguity@{k}",
        "disagreement: two members decide differently": "disagreement",
    }
    if "ambiguity.any_label" in scores:
        rows["patients with some label of some image flipped"] = "ambiguity.any_label"
    shown = {title: scores.get(key, _ABSENT) for title, key in rows.items()}
    yield "## How much they disagree\n"
    yield markdown([["share of cases", "value"], *([title, _shown(score)] for title, score in shown.items())])
    yield from _notes(_reasons(shown))


def _groups(problems: list[Context], refer: Abstention, drawn: int) -> Iterator[str]:
    who = refer.who
    yield "## Groups\n"
    if not problems[0].attributes:
        yield paragraph("The predictions name no attributes of patients: nothing is known about groups.")
        return
    scores = group_scores(problems[0].bootstrap, [_group_cases(context, drawn) for context in problems], who.masks)
    columns = {
        "ambiguity": "ambiguity",
        "accuracy.base": "accuracy, base",
        "accuracy.ensemble": "accuracy, ensemble",
        "referred": "referred per 100",
    }
    shown = {
        group: {n: asdict(score) for n, score in {**scores[group], **refer.groups[group]}.items() if n in columns}
        for group in who.masks
    }
    if shown:
        yield markdown(
            [
                ["group", "patients", *columns.values()],
                *(
                    [group, str(who.patients[group]), *(_shown(row[n]) for n in columns)]
                    for group, row in shown.items()
                ),
            ]
        )
    said = ["A group is named by an attribute and its code in the dataset"]
    if who.small:
        few = ", ".join(f"{group} ({count})" for group, count in who.small.items())
        said.append(f"Left out, under {MIN_PATIENTS} patients: {few}")
    if who.unknown:
        cases = ", ".join(f"{attribute} ({count})" for attribute, count in who.unknown.items())
        said.append(f"In no group, cases whose attribute is unknown: {cases}")
    undefined = _reasons({f"{columns[n]}, {group}": s for group, row in shown.items() for n, s in row.items()})
    yield from _notes([*said, *undefined])


def _group_cases(context: Context, drawn: int) -> dict[str, CaseMean | Undefined]:
    """Return the cases of ambiguity and accuracy, as the metrics of these names take them."""
    right = {"accuracy.base": CaseMean(1.0 - errors(context.base, context.labels), context.known)}
    if not context.size:
        nobody = Undefined(f"0 of {drawn} drawn members accepted")
        return {"ambiguity": nobody, **right, "accuracy.ensemble": nobody}
    right["accuracy.ensemble"] = CaseMean(1.0 - errors(context.ensemble, context.labels), context.known)
    return {"ambiguity": CaseMean(ambiguous(context.flip_counts, context.size)), **right}


def _abstention(refer: Abstention) -> Iterator[str]:
    titles = {
        "coverage": "coverage: share of cases that it answers",
        "referred": "cases referred per 100",
        "accuracy": "accuracy where it answers",
        "inconsistency": "two such ensembles answer one case differently",
    }
    least = fewest_votes(refer.members, refer.alpha)
    shown = {title: asdict(refer.scores[name]) for name, title in titles.items()}
    yield "## Abstention\n"
    yield paragraph(
        f"A selective ensemble of {refer.members} accepted members answers with the class that most of them choose "
        f"where the vote is decided at alpha {refer.alpha:g} ({least} of {refer.members} votes, if one other class "
        "has the rest), else it refers the case. Means over its possible members."
    )
    yield markdown([["", "value"], *([title, _shown(score)] for title, score in shown.items())])
    yield from _notes(_reasons(shown))


def _digests(record: Record) -> Iterator[str]:
    provenance = record["provenance"]
    yield "## Where this comes from\n"
    yield _listed(
        {
            "record": record["name"],
            "identity key": record["key"],
            "predictions": record["predictions"]["digest"],
            "data": record["identity"]["dataset"].get("digest") or NONE,
            "commit": (provenance.get("commit") or NONE) + ("" if verified(record) else ", with uncommitted changes"),
        }.items()
    )


def _limits(record: Record) -> Iterator[str]:
    drawn = any(score["interval"] == "bootstrap over patients" for score in record["scores"].values())
    intervals = (
        "Intervals of scores are over the test cases alone" if drawn else "No interval over the test cases is known"
    )
    said = [
        f"It is about one trained network, base seed {record['identity']['base_seed']}: another training of the same "
        "recipe has another set, and how many members are accepted is partly the luck of this one",
        f"{intervals}: none covers other base seeds, other members or other sites",
        "Ambiguity grows with the number of members: compare sets at an equal number only",
        "A case on which all members agree is not thereby right, nor would every good network agree on it",
        "More ambiguity is neither good nor bad",
    ]
    yield "## What this sheet does not say\n"
    yield from _notes(
        [*said, *(["The images are synthetic: no patient was imaged"] if record["data"].get("synthetic") else [])]
    )


def _find(test: Predictions, case: str) -> np.ndarray:
    """Return the indices in test that `case` means."""
    ways = {
        "the id of a case": test.ids,
        "the code of a patient": test.patient,
        "the index of a case in test": np.arange(len(test.base)),
    }
    form, plain = next((form, codes) for form, codes in ways.items() if codes is not None)
    forms = [f"{form} ({plain.min()} to {plain.max()})"]
    if test.patient is not None:
        forms.append(f"patient=CODE ({test.patient.min()} to {test.patient.max()})")
    kind, _, text = case.rpartition("=")
    codes = {"": plain, "patient": test.patient}.get(kind)
    if codes is not None and re.fullmatch(r"-?\d+", text):
        found = np.flatnonzero(codes == int(text))
        if len(found):
            return found
    raise UserError(f"{case}: no such case: give {', or '.join(forms)}")


def _only(test: Predictions, chosen: np.ndarray) -> Predictions:
    attributes = {name: codes[chosen] for name, codes in sorted(test.attributes.items())}
    return replace(
        test,
        logits=test.logits[:, chosen],
        base=test.base[chosen],
        labels=test.labels[chosen],
        patient=None,
        ids=None,
        attributes=attributes,
    )


def _case_title(test: Predictions, index: int) -> str:
    parts = [] if test.ids is None else [f"id {test.ids[index]}"]
    parts.append(f"index {index} in test")
    if test.patient is not None:
        images = int((test.patient == test.patient[index]).sum())
        parts.append(f"patient {test.patient[index]} ({images} image{'s' * (images != 1)})")
    return "Image: " + ", ".join(parts)


def _case_lines(context: Context, i: int, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what a card says of one case of one problem: title and text."""
    base, flips, label = int(context.base_decisions[i]), int(context.flip_counts[i]), int(context.labels[i])
    scores = class_scores(context.probabilities[:, i : i + 1], np.array([base]))
    counts = votes(context.decisions[:, i : i + 1], context.classes)
    mode = int(selective_ensemble(counts, context.labels[i : i + 1], ALPHA).mode[0])
    ends = conflict_interval(flips, context.size)
    share = number(flips / context.size, "")
    low, high, width = (number(float(v), "") for v in (scores.min(), scores.max(), score_range(scores)[0]))
    top = [c for c in np.argsort(-counts[0], kind="stable") if counts[0, c]]
    yield "label", names[label] if label >= 0 else "unknown"
    yield "the base decides", f"{names[base]}, with probability {number(float(context.base[i, base]), '')}"
    yield f"probability of {names[base]} over the members", f"{low} to {high}, range {width}"
    yield "votes", ", ".join(f"{names[c]} {counts[0, c]}" for c in top)
    yield "conflict", f"{flips} of {context.size} members, {share} [{end(ends.low, '')}, {end(ends.high, '')}]"
    yield "selective ensemble", f"answers {names[mode]}" if mode >= 0 else _abstains(context.size)


def _abstains(members: int) -> str:
    if fewest_votes(members, ALPHA) is None:
        return f"abstains, {members} members are too few to decide any vote"
    return "abstains, refer this case"


def _code(code: int) -> str:
    return str(code) if code >= 0 else "unknown"


def _classes(record: Record) -> list[str]:
    """Return the names of the classes of each problem."""
    return ["absent", "present"] if record["data"]["task"] == "multilabel" else record["data"]["classes"]


def _names(record: Record) -> str:
    identity = record["identity"]
    return f"{identity['network']['name']} on {identity['dataset']['name']}"


def _component(identity: Mapping[str, Any]) -> str:
    settings = _settings({key: value for key, value in identity.items() if key not in ("name", "digest")})
    return identity["name"] + (f" ({settings})" if settings else "")


def _settings(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {plain_text(value)}" for key, value in sorted(identity.items()) if key != "version")


def _shown(score: Mapping[str, Any]) -> str:
    """Return a value with its interval, a dash if undefined."""
    if not _defined(score):
        return NONE
    low, high = score.get("low"), score.get("high")
    if low is None or high is None or not np.isfinite([low, high]).all():
        return number(score["value"], "")
    return f"{number(score['value'], '')} [{end(low, '')}, {end(high, '')}]"


def _count(score: Mapping[str, Any], drawn: int) -> str:
    return f"{round(score['value'] * drawn)} of {drawn}" if _defined(score) else NONE


def _defined(score: Mapping[str, Any]) -> bool:
    return score["value"] is not None and bool(np.isfinite(score["value"]))


def _reasons(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for every reason why scores of a table are undefined, naming them."""
    by_reason: dict[str, list[str]] = {}
    for title, score in scores.items():
        if not _defined(score):
            by_reason.setdefault(score["reason"], []).append(title.split(":")[0])
    lines = []
    for reason, titles in by_reason.items():
        more = f" and {len(titles) - 4} more" if len(titles) > 4 else ""
        lines.append(f"Undefined ({reason}): {'; '.join(titles[:4])}{more}")
    return lines


def _listed(items: Iterable[tuple[str, str]]) -> str:
    return "".join(bullet(f"{title}: {text}") for title, text in items)


def _notes(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield "".join(bullet(sentence(line)) for line in lines)
