"""A record: the one JSON file in which a run ends, sealed by one digest per section."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..identity import digest, plain

SCHEMA = 1
SECTIONS = ("identity", "scores", "set", "data", "cost", "provenance", "predictions")
"""Sections with a digest of their own; `scores` covers `protocol` and `scores`, for epsilon and k define the scores."""
VIEWS = "views"
"""A section that a record has if its run was asked for shifted views or other evidence."""


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """Return `record` with `schema`, `key`, `name` and `digests` computed from its sections.

    A record has: row (name on the board), status ok | skipped | failed, reason ("" if ok), identity, protocol, scores,
    set, data, cost, provenance, predictions, and views if it was asked for some. NaN becomes null; a null score must
    carry a reason.
    """
    record = _without_nan(record)
    for key, score in record["scores"].items():
        if score["value"] is None and not score.get("reason"):
            raise ValueError(f"score {key} is NaN without a reason")
    identity = record["identity"]
    key = digest(identity)
    parts = (identity["dataset"]["name"], identity["network"]["name"], identity["generator"]["name"])
    record |= {"schema": SCHEMA, "key": key, "name": f"{'-'.join(parts)}-b{identity['base_seed']}-{key[:12]}"}
    record["digests"] = digests(record)
    return record


def digests(record: dict[str, Any]) -> dict[str, str]:
    """Return the digest of every section of `record`; `outcome` covers what stands outside them."""
    covered = {"scores": ("protocol", "scores"), "outcome": ("row", "status", "reason")}
    return {
        section: digest({s: record[s] for s in covered[section]} if section in covered else record[section])
        for section in (*SECTIONS, "outcome", *([VIEWS] if VIEWS in record else []))
    }


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write a sealed record as `<name>.json` into `folder`, whole or not at all, and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read(path: Path) -> dict[str, Any]:
    """Read a record and verify its key, name and digests; UserError names the record and the section that differ."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}): restore it or run its cell again") from error
    absent = [
        s for s in (*SECTIONS, "protocol", "key", "name", "digests", "row", "status", "reason") if s not in record
    ]
    if absent:
        raise UserError(f"{path}: is no record of this suite, it lacks {', '.join(absent)}: remove it")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{path}: has schema {record.get('schema')}, this version reads {SCHEMA}: run its cell again")
    for section, value in digests(record).items():
        if record["digests"].get(section) != value:
            raise UserError(f"{path}: section '{section}' was edited after the run: restore it or run its cell again")
    if record["key"] != digest(record["identity"]) or path.stem != record["name"]:
        raise UserError(f"{path}: key or file name does not follow from its identity: restore it or run its cell again")
    return record


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Read and verify every record of a folder, by name. UserError if there is no such folder, or no record in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of records: check the path")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"{folder}: holds no records: run a suite with records_dir={folder} first")
    return [read(path) for path in paths]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return plain(value)
