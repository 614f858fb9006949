"""Predictions as files: logits, labels, patients and attributes of val and test in one npz, with a content digest.

Arrays are named `val_logits`, `val_base`, `val_labels`, `val_patient`, `val_ids`, `val_attribute_NAME`, and `test_...`
likewise; patient, ids and attributes are there only if known. Equal arrays give equal bytes (one zlib, fixed dates), so
that version control sees no change where there is none. Task and positive class stand in the record.
"""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..identity import array_digest
from ..metrics.api import Predictions

ATTRIBUTE = "attribute_"
VIEWS = ("val", "test")


def predictions_arrays(val: Predictions, test: Predictions) -> dict[str, np.ndarray]:
    """Return the arrays of a file: logits as float32 [member, sample, class], codes as int64."""
    arrays: dict[str, np.ndarray] = {}
    for view, p in zip(VIEWS, (val, test)):
        arrays[f"{view}_logits"] = np.asarray(p.logits, np.float32)
        arrays[f"{view}_base"] = np.asarray(p.base, np.float32)
        codes = {"labels": p.labels, "patient": p.patient, "ids": p.ids}
        codes |= {ATTRIBUTE + name: values for name, values in p.attributes.items()}
        arrays |= {f"{view}_{name}": np.asarray(c, np.int64) for name, c in codes.items() if c is not None}
    return arrays


def arrays_predictions(
    arrays: Mapping[str, np.ndarray], task: str, positive: int | None
) -> tuple[Predictions, Predictions]:
    """Return the predictions on val and test. Raises KeyError naming an array that is absent."""
    val, test = (_view(view, arrays, task, positive) for view in VIEWS)
    return val, test


def predictions_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the arrays of a predictions file."""
    return array_digest(arrays)


def save_predictions(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write `arrays` (see `predictions_arrays`) to `path`, whole or not at all, and return their digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f, zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(arrays):
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(arrays[name]), allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content.getvalue())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return predictions_digest(arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a predictions file; UserError if it is absent, truncated, or holds pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise UserError(f"{path}: predictions cannot be read ({error.strerror or error}): restore the file") from error
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is no predictions file ({reason}): restore it") from error


def load_predictions(path: Path, task: str, positive: int | None = None) -> tuple[Predictions, Predictions]:
    """Return the predictions on val and test of a file; `task` and `positive` stand in the record's data section."""
    arrays = load_arrays(path)
    try:
        return arrays_predictions(arrays, task, positive)
    except KeyError as error:
        raise UserError(f"{path}: is no predictions file, it has no array {error}: restore it") from error


def _view(view: str, arrays: Mapping[str, np.ndarray], task: str, positive: int | None) -> Predictions:
    prefix = f"{view}_{ATTRIBUTE}"
    return Predictions(
        logits=arrays[f"{view}_logits"],
        base=arrays[f"{view}_base"],
        labels=arrays[f"{view}_labels"],
        task=task,
        view=view,
        positive=positive,
        patient=arrays.get(f"{view}_patient"),
        ids=arrays.get(f"{view}_ids"),
        attributes={name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)},
    )
