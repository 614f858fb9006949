"""Groups of a suite's cases that its predictions do not hold: names of attribute values, hidden strata, known truths.

`make groups` writes groups/<suite>.json for every board suite that commits predictions:

    suite, dataset                  its name; the content digest of its data
    declared                        what the suite declares: {strata: [...], truths: [...]}
    attributes                      {name: [name of value 0, ...]}
    strata                          {kind: {names: [...], val: codes, test: codes, places: {val, test}, about: {...}}}
    truths                          {name: {val: codes, test: codes}}: 0 or 1, or the classes that were merged
    references                      base seeds of the frozen networks that strata were found by

Codes are text, one number per case in the order of the predictions, -1 for none: `"0 1 -1 2"`; so are places, a case's
in the order of how firmly its stratum holds it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .suite import Suite

FILES = "groups"


@dataclass(frozen=True)
class Stratification:
    """Strata of one kind: names of the codes, codes and places int64 [sample] by view, and what the search said."""

    names: list[str]
    codes: dict[str, np.ndarray]
    places: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Groups:
    """What groups/<suite>.json says; the module's docstring documents it."""

    suite: str
    dataset: str
    declared: dict[str, list[str]]
    attributes: dict[str, list[str]] = field(default_factory=dict)
    strata: dict[str, Stratification] = field(default_factory=dict)
    truths: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    references: list[int] = field(default_factory=list)


def declared(suite: Suite) -> dict[str, list[str]]:
    """Return what a suite asks of its groups file."""
    return {"strata": list(suite.strata), "truths": list(suite.truths)}


def to_text(groups: Groups) -> str:
    """Return the file's text: sorted keys, a line per array of codes."""
    strata = {
        kind: {
            "names": s.names,
            "about": s.about,
            "places": {view: _line(places) for view, places in s.places.items()},
            **{view: _line(codes) for view, codes in s.codes.items()},
        }
        for kind, s in groups.strata.items()
    }
    truths = {name: {view: _line(codes) for view, codes in views.items()} for name, views in groups.truths.items()}
    content = {**vars(groups), "strata": strata, "truths": truths}
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def load_groups(folder: Path, suite: Suite) -> Groups | None:
    """Return what groups/<suite>.json in `folder` says, None where there is none; UserError for a broken file."""
    path = folder / FILES / f"{suite.name}.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        strata = {
            kind: Stratification(
                list(s["names"]),
                {view: _codes(s[view]) for view in ("val", "test")},
                {view: _codes(s["places"][view]) for view in ("val", "test")},
                s["about"],
            )
            for kind, s in content.pop("strata").items()
        }
        truths = {n: {view: _codes(t[view]) for view in ("val", "test")} for n, t in content.pop("truths").items()}
        return Groups(strata=strata, truths=truths, **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no file of groups ({error}): run `make groups`") from error


def groups_problem(suite: Suite, groups: Groups | None, dataset: str) -> str:
    """Return what is wrong with the groups of a suite, "" if nothing is; dataset: content digest of its records."""
    if groups is None:
        return "is missing" if suite.strata or suite.truths else ""
    if groups.dataset != dataset:
        return "was made from other data"
    return "" if groups.declared == declared(suite) else "is not what the suite declares"


def _line(codes: np.ndarray) -> str:
    return " ".join(str(int(code)) for code in codes)


def _codes(line: str) -> np.ndarray:
    return np.array(line.split(), np.int64)
