"""What a set's networks said of shifted views, and what else was measured of them, as one npz beside the predictions.

Arrays are float16 with the base as their first row: `val/jpeg-3` [member + 1, sample, class] holds logits, and
`test:saliency/gradient/spearman` or `test/ood-noise:detector/knn` evidence of a part or view. Numbers are rounded to 7
binary digits, by at most 0.8 % of themselves: no sign changes, and files are two fifths smaller. Single-label logits
are kept as in a predictions file, of two classes only their difference (second less first). Labels, patients and
attributes stand in the predictions file: a view shows the same cases (some of them: `shown_cases` of their number), or
none that have any.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..metrics.api import Predictions
from ..metrics.views import OUTLIERS, shown_cases
from .predictions import PRECISION, load_arrays, predictions_digest, rounded, save_predictions

SUFFIX = ".views.npz"
DIGITS = 7


@dataclass(frozen=True)
class ViewFile:
    """Predictions by view (`val/jpeg-3`), and evidence by part or view and name, float16 with the base first."""

    predictions: dict[str, Predictions] = field(default_factory=dict)
    evidence: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def view_arrays(
    logits: Mapping[str, np.ndarray], evidence: Mapping[str, Mapping[str, np.ndarray]], task: str
) -> dict[str, np.ndarray]:
    """Return the arrays of a file; numbers beyond float16 become its largest.

    logits: [member + 1, sample, class] by view; evidence: by part or view and name; the base first in both.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, rows in logits.items():
        if task != "multilabel" and rows.shape[-1] == 2:
            arrays[name] = _clipped(rows[..., 1:].astype(np.float64) - rows[..., :1])
        else:
            arrays[name] = _clipped(np.stack([rounded(row, task) for row in rows]))
    for where, named in evidence.items():
        arrays |= {f"{where}:{name}": _clipped(values) for name, values in named.items()}
    return arrays


def save_views(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write the arrays of a file, whole or not at all, and return their digest, which is of the arrays as they are.

    All of them in one stream: apart, a hundred small ones took a third more room.
    """
    index = [[name, list(arrays[name].shape)] for name in sorted(arrays)]
    flat = [np.asarray(arrays[name], PRECISION).ravel(order="F") for name in sorted(arrays)]
    packed = {
        "index": np.frombuffer(json.dumps(index).encode(), np.uint8),
        "values": np.concatenate([np.zeros(0, PRECISION), *flat]),
    }
    save_predictions(path, packed, zipfile.ZIP_BZIP2)
    return predictions_digest(arrays)


def load_view_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that `save_views` wrote; UserError if it is absent or broken."""
    packed = load_arrays(path)
    try:
        index, values, start = json.loads(bytes(packed["index"])), packed["values"], 0
        arrays = {}
        for name, shape in index:
            stop = start + int(np.prod(shape))
            arrays[name] = np.ascontiguousarray(values[start:stop].reshape(shape, order="F"))
            start = stop
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no file of views ({error}): restore it") from error
    return arrays


def arrays_views(arrays: Mapping[str, np.ndarray], parts: Mapping[str, Predictions]) -> ViewFile:
    """Return what a file holds; parts: the predictions on val and test that it stands beside."""
    found = ViewFile()
    for key, values in arrays.items():
        where, _, name = key.partition(":")
        if name:
            found.evidence.setdefault(where, {})[name] = values
        else:
            found.predictions[key] = _shown(key, values, parts[key.partition("/")[0]])
    return found


def load_views(path: Path, parts: Mapping[str, Predictions]) -> ViewFile:
    """Read a file that `view_arrays` made; UserError if it is absent, broken, or not of these predictions."""
    try:
        return arrays_views(load_view_arrays(path), parts)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is no file of views ({error}): restore it") from error


def views_of(record: Mapping[str, Any], predictions: Path) -> Path | None:
    """Return the file of a record's views, beside that of its predictions; None where there is none."""
    file = record.get("views", {}).get("file")
    path = predictions.with_name(file) if file else None
    return path if path is not None and path.is_file() else None


def of_cases(predictions: Predictions, part: str, count: int) -> Predictions:
    """Return the predictions on a part, on the cases that views show of it: so many."""
    total = len(predictions.base)
    return predictions if count >= total else predictions.take(shown_cases(part, total, count))


def _shown(key: str, values: np.ndarray, part: Predictions) -> Predictions:
    if part.task != "multilabel" and values.shape[-1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=-1)
    members = len(values) - 1
    own = replace(
        of_cases(part, key.partition("/")[0], values.shape[1]),
        logits=values[1:],
        base=values[0],
        view=key,
        ids=None,
        failed=tuple(m for m in part.failed if m < members),
    )
    if not key.partition("/")[2].startswith(f"{OUTLIERS}-"):
        return own
    labels = np.full((values.shape[1], *part.labels.shape[1:]), -1, np.int64)
    return replace(own, labels=labels, patient=None, attributes={})


def _clipped(values: np.ndarray) -> np.ndarray:
    """Return values to `DIGITS` binary digits, those beyond float16 as its largest number; NaN stays."""
    largest = float(np.finfo(PRECISION).max)
    mantissa, exponent = np.frexp(np.clip(np.asarray(values, np.float64), -largest, largest))
    return np.clip(np.ldexp(np.round(mantissa * 2**DIGITS), exponent - DIGITS), -largest, largest).astype(PRECISION)
