"""The files of a board's science: science/<suite>.json, its pages and figures/, written by `leaderboard build`.

The pages are checked to the byte against the JSON, and the JSON by a digest of the records, predictions and
declarations that it was computed from, and one of groups/<suite>.json (`make groups`). Figures are pictures of the same
JSON; their bytes depend on the version of matplotlib.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..processors import usable_processors
from .cells import Table
from .desiderata_page import render_desiderata
from .exact_page import tables as tables_of_exact
from .group_science import group_inputs, render_groups
from .groups import FILES as GROUPS
from .groups import groups_problem, load_groups
from .science import compute, inputs, to_text
from .science_page import Science, render_science
from .suite import Suite

FILES, FIGURES, EXACT = "science", "figures", "exact.json"
PAGE, GROUPS_PAGE, DESIDERATA_PAGE = "SCIENCE.md", "FAIRNESS.md", "DESIDERATA.md"
"""Of exact.json, too, SCIENCE.md shows the tables; `make exact` computes it, for it needs images and networks."""


def build_science(folder: Path, tables: Iterable[Table], write: Callable[[Path, str], None]) -> None:
    """Compute the science of every table that commits predictions, and write its files, its pages and its figures.

    Suites are computed side by side, in a process each, at most as many as there are cores.
    """
    found = []
    (folder / FILES).mkdir(exist_ok=True)
    told = _told(tables)
    for table, text in zip(told, _texts(told, folder)):
        write(folder / FILES / f"{table.suite.name}.json", text)
        found.append((table.suite, json.loads(text)))  # as whoever reads the file finds it, in its order
    for name, text in _pages(folder, found).items():
        write(folder / name, text)
    if importlib.util.find_spec("matplotlib") is None:
        _say(f"{folder / FIGURES}: left as they are, for matplotlib is not installed")
        return
    from .figures import draw

    drawn = [path for suite, science in found for path in draw(suite, science, folder / FIGURES)]
    for path in set((folder / FIGURES).iterdir()) - set(drawn):
        path.unlink()


def _texts(tables: Sequence[Table], folder: Path) -> Iterable[str]:
    workers = min(len(tables), usable_processors())
    if workers < 2:
        return (_text(table, folder) for table in tables)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_text, tables, repeat(folder)))


def _text(table: Table, folder: Path) -> str:
    return to_text(compute(table, folder, _say))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def science_problems(folder: Path, tables: Iterable[Table]) -> Iterator[str]:
    """Yield what is wrong with the committed science, one line each, naming the file and what to do."""
    found, broken, names = [], False, set()
    tables = _told(tables)
    for table in tables:
        path = folder / FILES / f"{table.suite.name}.json"
        names.add(path.name)
        try:
            science = _read(path)
        except UserError as error:
            broken = True
            yield str(error)
            continue
        try:
            groups = load_groups(folder, table.suite)
        except UserError as error:
            broken = True
            yield str(error)
            continue
        if wrong := groups_problem(table.suite, groups, table.records[0]["identity"]["dataset"]["digest"]):
            broken = True
            yield f"{folder / GROUPS / path.name}: {wrong}: run `make groups`"
            continue
        if science.get("inputs") != inputs(table) or science.get("groups") != group_inputs(table.suite, groups):
            broken = True
            yield f"{path}: was computed from other records, predictions, groups or criteria: run `leaderboard build`"
        found.append((table.suite, science))
    for kind in (FILES, GROUPS):
        for path in sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else ():
            if path.name not in names:
                yield f"{path}: belongs to no board suite that commits predictions: remove it"
    if (folder / EXACT).is_file():
        exact = _read(folder / EXACT)
        suite = next((t for t in tables if t.suite.name == exact["suite"]["name"]), None)
        if suite is None or exact.get("inputs") != inputs(suite):
            yield f"{folder / EXACT}: was computed from other records, predictions or criteria: run `make exact`"
    if broken or not names:
        return
    for name, text in _pages(folder, found).items():
        page = folder / name
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            yield f"{page}: is not what {FILES}/ says: run `leaderboard build`"
        for figure in re.findall(rf"\]\({FIGURES}/([^)]+)\)", text):
            if not (folder / FIGURES / figure).is_file():
                yield f"{folder / FIGURES / figure}: is missing: run `leaderboard build` with matplotlib installed"


def _pages(folder: Path, found: list[tuple[Suite, Science]]) -> dict[str, str]:
    """Return the text of every page by its file's name."""
    return {
        PAGE: render_science(found, _exact(folder)),
        GROUPS_PAGE: render_groups(found),
        DESIDERATA_PAGE: render_desiderata(found),
    }


def _told(tables: Iterable[Table]) -> list[Table]:
    """Return the tables whose science can be told: predictions committed, and something scored."""
    return [t for t in tables if t.suite.board and t.suite.predictions and t.scored]


def _exact(folder: Path) -> str:
    return tables_of_exact(_read(folder / EXACT)) if (folder / EXACT).is_file() else ""


def _read(path: Path) -> Science:
    try:
        science: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: is missing: run `leaderboard build`") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}): run `leaderboard build`") from error
    if not isinstance(science, dict):
        raise UserError(f"{path}: is no JSON object: run `leaderboard build`")
    return science
