"""Which findings a task asks for: labels of named findings become the labels of a binary or multi-label task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError, suggest

NO_FINDING = "No Finding"
BLANK, UNCERTAIN, ABSENT, PRESENT = -2, -1, 0, 1
CHEXPERT_FINDINGS = [
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    NO_FINDING,
]
UNCERTAIN_AS = {"ignore": -1, "zero": 0, "one": 1}
BLANK_AS = {"missing": -1, "zero": 0}


@dataclass
class Labels:
    """The labels of a task: values int64 [sample], or [sample, label] for a multi-label task; -1 = missing."""

    task: str
    classes: list[str]
    values: np.ndarray


def settle(cells: np.ndarray, uncertain: str, blank: str) -> np.ndarray:
    """Return int8 [sample, finding] of 1, 0 and -1 = missing for cells that are PRESENT, ABSENT, UNCERTAIN or BLANK.

    uncertain: ignore (missing), zero or one: U-Ignore, U-Zeros and U-Ones of Irvin et al. (AAAI 2019); blank: zero or
    missing. A row that is blank in all findings was not labelled: all of it is missing. Raises UserError for a setting
    that is no choice.
    """
    for name, value, known in (("uncertain", uncertain, UNCERTAIN_AS), ("blank", blank, BLANK_AS)):
        if value not in known:
            raise UserError(f"dataset.{name}={value} is not a choice: {suggest(str(value), known)}")
    settled = np.where(cells == UNCERTAIN, UNCERTAIN_AS[uncertain], np.where(cells == BLANK, BLANK_AS[blank], cells))
    settled[(cells == BLANK).all(1)] = -1
    return settled.astype(np.int8)


def choose_target(target: str, findings: list[str], values: np.ndarray, beside: tuple[str, ...] = ()) -> Labels:
    """Return the labels that `target` asks for, out of values int8 [sample, finding] of 1, 0 and -1 = missing.

    any: 1 where a finding is present, 0 where No Finding is, or where every finding is absent; missing where neither
    is known, and where No Finding stands together with a finding. `beside` names findings that do not count for any
    (CheXpert's labeller leaves No Finding positive beside Support Devices). One name: a binary task; several, separated
    by commas: multi-label; all: every finding but No Finding. Raises UserError for an unknown or repeated name.
    """
    if target == "any":
        return Labels("binary", [NO_FINDING, "any finding"], _any(findings, values, beside))
    if target == "all":
        names = [name for name in findings if name != NO_FINDING]
    else:
        names = [match_finding(name, findings) for name in target.split(",")]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice:
        raise UserError(f"dataset.target={target} names {twice} twice: name every finding once")
    columns = values[:, [findings.index(name) for name in names]].astype(np.int64)
    if len(names) == 1:
        return Labels("binary", [f"no {names[0]}", names[0]], columns[:, 0])
    return Labels("multilabel", names, columns)


def _any(findings: list[str], values: np.ndarray, beside: tuple[str, ...]) -> np.ndarray:
    counted = values[:, [i for i, name in enumerate(findings) if name not in (NO_FINDING, *beside)]]
    none = values[:, findings.index(NO_FINDING)] == 1 if NO_FINDING in findings else np.zeros(len(values), bool)
    present = (counted == 1).any(1)
    absent = none | (counted == 0).all(1)
    return np.where(present & none, -1, np.where(present, 1, np.where(absent, 0, -1))).astype(np.int64)


def match_finding(name: str, findings: list[str]) -> str:
    """Return the finding called `name`, without regard to case, `_`, `-` and spaces; UserError with close names."""
    known = {_folded(finding): finding for finding in findings}
    if _folded(name) in known:
        return known[_folded(name)]
    close = suggest(name.strip(), ["any", "all", *findings])
    raise UserError(f"dataset.target: there is no finding '{name.strip()}': {close}")


def _folded(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")
