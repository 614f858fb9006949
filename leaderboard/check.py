"""Checks of a board: every record is as its run left it, and the board is what the records say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..metrics.api import Score, Settings
from . import record as records_module
from .cells import Record, is_candidate, settle, settle_all, verified
from .notes import off_null
from .predictions import load_arrays, load_predictions, predictions_digest
from .render import render, render_csv
from .science_files import science_problems
from .suite import Suite, load_suite, suite_names
from .view_files import SUFFIX, load_view_arrays, load_views, views_of

FOLDER = Path(__file__).parent
"""The committed board: `records/`, `predictions/<suite>/`, `suites/`, LEADERBOARD.md and leaderboard.csv; what was
computed from them, `science/<suite>.json`, SCIENCE.md and `figures/`."""

FILED = ("predictions", records_module.VIEWS)
"""Sections of a record that name a file of predictions/<suite>/."""

BOARD, TABLE = "LEADERBOARD.md", "leaderboard.csv"
LIMIT = 10_000_000
"""Bytes of predictions that one suite may commit, and as many of shifted views."""

TOLERANCE = 1e-6


def check(folder: Path = FOLDER) -> str:
    """Check the board in `folder` and return one line on what was checked; UserError has a line for every problem."""
    found = list(problems(folder))
    if found:
        raise UserError("\n".join(found))
    suites = [s.name for s in _suites(folder) if s.board]
    records = len(list((folder / "records").glob("*.json")))
    predictions = len(list((folder / "predictions").glob("*/*.npz")))
    return f"in order: {records} records, {predictions} predictions files, board of {', '.join(suites)}"


def problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the board in `folder`, one line each, naming file and section and what to do."""
    if not (folder / "records").is_dir():
        raise UserError(f"{folder} holds no committed records: run this in a checkout of the repository")
    suites, records, broken = [], [], False
    for name in suite_names(folder / "suites"):
        try:
            suites.append(load_suite(folder / "suites" / f"{name}.yaml"))
        except UserError as error:
            broken = True
            yield str(error)
    for path in sorted((folder / "records").iterdir()):
        try:
            records.append(_record(path))
        except UserError as error:
            broken = True
            yield str(error)
    board = [suite for suite in suites if suite.board]
    for r in records:
        where = folder / "records" / f"{r['name']}.json"
        if not any(is_candidate(suite, r) for suite in board):
            yield f"{where}: is in no row and base seed of a board suite: add its row to the suite, or remove it"
        if r["identity"]["generator"]["name"] == "identical" and verified(r) and (off := off_null(r)):
            yield f"{where}: section 'scores': the control is not at its null values ({', '.join(off)}): find out why"
    yield from _predictions(folder, board, records)
    if not broken:  # a board of fewer records would differ for no reason of its own
        yield from _differs(folder / BOARD, render(records, board))
        yield from _differs(folder / TABLE, render_csv(records, board))
        yield from science_problems(folder, settle_all(board, filter(verified, records)))


def predictions_of(record_path: Path, predictions_folder: Path) -> tuple[Record, Path]:
    """Return a record and the path of its predictions, looked for in `predictions_folder` and below.

    Raises UserError for a record whose run was not ok, that names no predictions, or whose file is not there.
    """
    record = records_module.read(record_path)
    if record["status"] != "ok":
        why = f" ({record['reason']})" if record["reason"] else ""
        raise UserError(f"{record_path}: its run is {record['status']}, without predictions{why}: run its cell again")
    file = record["predictions"].get("file")
    if not file:
        raise UserError(f"{record_path}: has no predictions to verify it by, or to show: run its cell in a suite")
    found = sorted(predictions_folder.rglob(file))
    if not found:
        raise UserError(f"{record_path}: its predictions {file} are not in {predictions_folder}: name their folder")
    return record, found[0]


def verify(record_path: Path, predictions_folder: Path) -> list[str]:
    """Score the predictions of a record again, and return the differences from what it says, one line each.

    The file is looked for in `predictions_folder` and below. Values and intervals agree to 1e-6; only metrics the
    record's protocol names are computed. Raises UserError if there are no predictions, or they cannot be read.
    """
    from ..metrics.evaluation import catalogue, evaluate, view_scores

    record, file = predictions_of(record_path, predictions_folder)
    differences = []
    if predictions_digest(load_arrays(file)) != record["predictions"]["digest"]:
        differences.append(f"{file}: is not the file that the record was made from (digest differs)")
    protocol, data = record["protocol"], record["data"]
    versions = {name: info.version for name, info in catalogue(sorted(protocol["metrics"])).items()}
    for name, version in sorted(protocol["metrics"].items()):
        if versions[name] != version:
            differences.append(f"{name}: recorded with version {version} of the metric, this is {versions[name]}")
    declared = {key: value for key, value in protocol.items() if key not in ("metrics", "predictions")}
    settings = Settings(**declared | {"epsilons": tuple(protocol["epsilons"])})
    try:
        val, test = load_predictions(file, data["task"], data.get("positive"))
        evaluation = evaluate(val, test, settings, names=sorted(protocol["metrics"]))
    except ValueError as error:
        raise UserError(f"{file}: cannot be scored ({error}): restore it") from error
    computed = dict(evaluation.scores)
    if record.get(records_module.VIEWS):
        views = views_of(record, file)
        if views is None:
            differences.append(f"{file.name}: the file of its views is not beside it")
        elif predictions_digest(load_view_arrays(views)) != record[records_module.VIEWS]["digest"]:
            differences.append(f"{views}: is not the file that the record was made from (digest differs)")
        else:
            shown = load_views(views, {"val": val, "test": test}).predictions
            computed |= view_scores(shown, evaluation.accepted, settings)
    accepted = [int(m) for m in evaluation.accepted]
    if accepted != record["set"]["accepted"]:
        differences.append(f"set.accepted: recorded {record['set']['accepted']}, from the predictions {accepted}")
    return differences + list(_score_differences(record["scores"], computed))


def _score_differences(recorded: dict[str, dict[str, Any]], computed: dict[str, Score]) -> Iterator[str]:
    for key in sorted(recorded.keys() | computed.keys()):
        if key not in computed:
            yield f"{key}: recorded, but not computed from the predictions"
        elif key not in recorded:
            yield f"{key}: computed from the predictions, but not recorded"
        else:
            for part in ("value", "low", "high"):
                old, new = recorded[key][part], getattr(computed[key], part)
                if (old is None) != (not math.isfinite(new)) or (old is not None and not abs(old - new) <= TOLERANCE):
                    yield f"{key}: {part} recorded {_shown(old)}, from the predictions {_shown(new)}"


def _shown(value: float | None) -> str:
    return "nothing" if value is None or not math.isfinite(value) else f"{value:.9g}"


def _suites(folder: Path) -> list[Suite]:
    return [load_suite(folder / "suites" / f"{name}.yaml") for name in suite_names(folder / "suites")]


def _record(path: Path) -> Record:
    if path.suffix != ".json" or not path.is_file():
        raise UserError(f"{path}: is no record, and this folder holds nothing but records: remove it")
    return records_module.read(path)


def _predictions(folder: Path, board: list[Suite], records: list[Record]) -> Iterator[str]:
    root = folder / "predictions"
    committing = [suite for suite in board if suite.predictions]
    by_file = {r[section]["file"]: (r, section) for r in records for section in FILED if _file(r, section)}
    present = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else []
    for path in present:
        record, section = by_file.get(path.name, (None, ""))
        if path.parent not in [root / suite.name for suite in committing] or record is None:
            yield f"{path}: belongs to no record of a board suite that commits predictions: remove it"
            continue
        try:
            read = load_arrays if section == "predictions" else load_view_arrays
            if predictions_digest(read(path)) != record[section]["digest"]:
                yield f"{path}: is not what record {record['name']} was made from, section '{section}': restore it"
        except UserError as error:
            yield str(error)
    names = {path.name for path in present}
    for suite in committing:
        seen = suite.views or suite.evidence
        filling = {r["name"] for r in settle(suite, records).records} if seen else set()
        for record in (r for r in records if r["status"] == "ok" and is_candidate(suite, r)):
            for section in FILED[: 2 if record["name"] in filling else 1]:
                file = _file(record, section)
                if file is None:
                    yield f"{record['name']}: names no {section}, which suite {suite.name} commits: run the suite again"
                elif file not in names:
                    yield f"{root / suite.name / file}: is missing, record {record['name']} names it: restore it"
        own = [path for path in present if path.parent == root / suite.name]
        for section, is_own in (("predictions", False), ("views", True)):
            size = sum(path.stat().st_size for path in own if path.name.endswith(SUFFIX) == is_own)
            if size > LIMIT:
                yield f"{root / suite.name}: holds {size / 1e6:.1f} MB of {section}, over {LIMIT / 1e6:.0f}"


def _file(record: Record, section: str) -> str | None:
    return record.get(section, {}).get("file")


def _differs(path: Path, text: str) -> Iterator[str]:
    try:
        found = path.read_bytes()
    except OSError:
        yield f"{path}: is missing: run `leaderboard build`"
        return
    if found != text.encode():
        lines, wanted = found.decode("utf-8", "replace").split("\n"), text.split("\n")
        pairs = zip([*lines, None], [*wanted, None])
        line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), 1)
        yield f"{path}: line {line} is not what the records say: run `leaderboard build`, or restore the records"
