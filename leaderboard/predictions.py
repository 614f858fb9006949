"""Predictions as files: logits, labels, patients and attributes of val and test in one npz, with a content digest.

Arrays are named `val_logits`, `val_base`, `val_labels`, `val_patient`, `val_ids`, `val_attribute_NAME`, and `test_...`
likewise; patient, ids and attributes are there only if known, `failed` only if members failed. Equal arrays give equal
bytes (one zlib, fixed dates), so that version control sees no change where there is none. Task and positive class stand
in the record.

A record is scored from these arrays and nothing finer, so that its file gives its scores again. Of the logits of a
single-label task they keep the differences between classes, which is all that softmax sees.
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
PRECISION = "float16"
"""What logits are rounded to before they are scored; stands in a record's protocol, for the scores depend on it."""


def predictions_arrays(val: Predictions, test: Predictions) -> dict[str, np.ndarray]:
    """Return the arrays of a file: logits as float16 [member, sample, class], codes as int64.

    Single-label logits are less the largest of their row: the top class is exactly 0 and the others keep three digits
    of their distance to it, so that rounding changes no decision (but a lead under 3e-8 becomes a tie).
    """
    arrays: dict[str, np.ndarray] = {}
    for view, p in zip(VIEWS, (val, test)):
        logits = arrays[f"{view}_logits"] = np.empty(p.logits.shape, PRECISION)
        for row, member in zip(logits, p.logits):  # one by one: in float64, all members may not fit
            row[:] = rounded(member, p.task)
        arrays[f"{view}_base"] = rounded(p.base, p.task)
        codes = {"labels": p.labels, "patient": p.patient, "ids": p.ids}
        codes |= {ATTRIBUTE + name: values for name, values in p.attributes.items()}
        arrays |= {f"{view}_{name}": np.asarray(c, np.int64) for name, c in codes.items() if c is not None}
    if val.failed:
        arrays["failed"] = np.asarray(val.failed, np.int64)
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


def save_predictions(path: Path, arrays: Mapping[str, np.ndarray], compression: int = zipfile.ZIP_DEFLATED) -> str:
    """Write `arrays` (see `predictions_arrays`) to `path`, whole or not at all, and return their digest.

    compression: deflate, or zipfile.ZIP_BZIP2, which is slower and was 8 % smaller for files of views.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f, zipfile.ZipFile(f, "w", compression, compresslevel=9) as archive:
            for name in sorted(arrays):
                content = io.BytesIO()
                # Members side by side (Fortran order): what they say of one case is alike, which saves a sixth.
                np.lib.format.write_array(content, np.asfortranarray(arrays[name]), allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = compression
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
            return {name: np.ascontiguousarray(archive[name]) for name in archive.files}
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
        failed=tuple(int(member) for member in arrays.get("failed", ())),
    )


def rounded(logits: np.ndarray, task: str) -> np.ndarray:
    """Return logits [sample, class] as float16; those that are not finite stay as they are, for `evaluate` to name."""
    z = np.asarray(logits, np.float64)
    finite = np.isfinite(z)
    if task != "multilabel":  # sigmoid, unlike softmax, changes with a shift
        top = z.max(axis=-1, keepdims=True)
        z = z - np.where(np.isfinite(top), top, 0)
    largest = np.finfo(PRECISION).max
    return np.where(finite, np.clip(z, -largest, largest), z).astype(PRECISION)
