"""A user's own images: one npz file in the MedMNIST layout, with optional patient ids and attributes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .api import AGE_BINS, SPLITS, TASKS, Data, Split, age_codes, register_dataset
from .layout import check_length, image_array, label_array, read_arrays

MOST_VALUES = 100  # an attribute stands for groups of patients; with more values it is an identifier or a measurement


@register_dataset("npz")
@dataclass
class Npz:
    """Your own npz file (data_root=FILE) in the MedMNIST layout, with optional patient ids and attributes.

    `<split>_images` are uint8 [sample, height, width] or [sample, height, width, 3], `<split>_labels` whole numbers
    [sample], [sample, 1], or [sample, label] for a multi-label task (-1 or NaN: missing). `<split>_patient` holds
    patient ids; every further array per sample, such as `<split>_sex`, is an attribute. Numeric `<split>_age` is in
    years and is grouped by decade. Empty strings, NaN and negative numbers are missing values.

    task: auto (2 classes: binary, more: multiclass, several label columns: multilabel), or binary, multiclass, ordinal,
    multilabel; positive: the positive class of a binary task; class_names: their names in order, separated by commas.
    """

    task: str = "auto"
    positive: int = 1
    class_names: str = ""

    name = "npz"
    version: ClassVar[int] = 1

    def load(self, data_root: Path | None = None) -> Data:
        """Read the file `data_root`; raise UserError, naming array and row, for whatever is wrong in it."""
        if data_root is None:
            raise UserError("dataset npz reads your own file: name it with data_root=FILE.npz")
        if self.task not in ("auto", *TASKS):
            raise UserError(f"dataset.task={self.task}: one of auto, {', '.join(TASKS)}")
        file = Path(data_root)
        arrays = read_arrays(file)
        images = {split: image_array(arrays, split, file) for split in SPLITS}
        counts = {split: len(images[split]) for split in SPLITS}
        for split, count in counts.items():
            if count == 0:
                raise UserError(f"{file}: {split}_images is empty: every split needs images")
        labels = {split: label_array(arrays, split, counts[split], file) for split in SPLITS}
        task = self._task(labels, file)
        classes = self._classes(labels, task, file)
        task = task or ("binary" if len(classes) == 2 else "multiclass")
        if task == "binary" and self.positive not in (0, 1):
            raise UserError(f"dataset.positive={self.positive}: a binary task has the classes 0 and 1")
        extra, notes = _extra_arrays(arrays, counts, file)
        patients, lonely = _patients(extra.pop("patient", {}))
        attributes, values = _attributes(extra, counts, file, notes)
        return Data(
            name="npz",
            task=task,
            classes=classes,
            splits={
                s: Split(images[s], labels[s], np.arange(counts[s]), patients.get(s), attributes[s]) for s in SPLITS
            },
            positive=self.positive if task == "binary" else None,
            attribute_values=values,
            licence="the user's own data",
            source="the user's own npz file",
            notes=notes + lonely,
            location=str(file),
        )

    def _task(self, labels: dict[str, np.ndarray], file: Path) -> str:
        """Return the declared task, `multilabel` for several label columns, or "" where the classes decide."""
        columns = {split: y.shape[1] if y.ndim == 2 else 1 for split, y in labels.items()}
        odd = next((split for split in SPLITS if columns[split] != columns["train"]), None)
        if odd:
            raise UserError(
                f"{file}: {odd}_labels has {columns[odd]} columns, train_labels {columns['train']}: "
                "give every split the same labels"
            )
        if (columns["train"] > 1) != (self.task == "multilabel") and self.task != "auto":
            raise UserError(
                f"{file}: train_labels has {columns['train']} columns, which is no {self.task} task: "
                "leave dataset.task=auto or change the labels"
            )
        return "multilabel" if columns["train"] > 1 else "" if self.task == "auto" else self.task

    def _classes(self, labels: dict[str, np.ndarray], task: str, file: Path) -> list[str]:
        """Return the names of the classes: those declared, else the numbers 0 to the highest that train holds."""
        names = [name.strip() for name in self.class_names.split(",")] if self.class_names else []
        if task == "multilabel":
            count = labels["train"].shape[1]
        elif task == "binary":
            count = 2
        else:
            count = len(names) or _count_classes(labels["train"], file)
        if names and len(names) != max(count, 2):
            raise UserError(
                f"dataset.class_names names {len(names)} classes instead of {max(count, 2)}: name each once"
            )
        return names or [str(c) for c in range(count)]


def _count_classes(train: np.ndarray, file: Path) -> int:
    """Return the number of classes in train; raise UserError unless they are numbered 0, 1, 2, ... without gaps."""
    present = np.unique(train[train >= 0])
    if len(present) < 2:
        raise UserError(f"{file}: train_labels holds a single class: every split needs at least two")
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        gap = int(gaps[0])
        row = int(np.flatnonzero(train == present[gap])[0])
        raise UserError(
            f"{file}: train_labels row {row} is {present[gap]}, but no image of train has label {gap}: "
            "number the classes from 0 without gaps, or declare them with dataset.class_names=a,b,c"
        )
    return len(present)


def _extra_arrays(
    arrays: dict[str, np.ndarray], counts: dict[str, int], file: Path
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return name -> split -> values [sample] of all arrays but images and labels, and notes on what was left out."""
    extra: dict[str, dict[str, np.ndarray]] = {}
    notes = []
    for key, array in arrays.items():
        split, _, name = key.partition("_")
        if split not in SPLITS or name in ("images", "labels", ""):
            continue
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            notes.append(f"{key} is left out: shape {array.shape} is not one value per image")
            continue
        check_length(len(array), counts[split], key, split, file)
        if array.dtype.kind not in "biufUS":
            raise UserError(f"{file}: {key} is {array.dtype}: store numbers or strings")
        extra.setdefault(name, {})[split] = array
    return extra, notes


def _patients(ids: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Code patient ids across splits; an image without one counts as a patient of its own."""
    coded, values = _codes(ids)
    unused, missing = len(values), 0
    for codes in coded.values():
        nameless = np.flatnonzero(codes < 0)
        codes[nameless] = unused + np.arange(len(nameless))
        unused += len(nameless)
        missing += len(nameless)
    notes = [f"{missing} images without a patient id count as patients of their own"] if missing else []
    return coded, notes


def _attributes(
    extra: dict[str, dict[str, np.ndarray]], counts: dict[str, int], file: Path, notes: list[str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[str]]]:
    """Return split -> attribute -> codes, and attribute -> names of the codes; -1 where a split has no such array."""
    attributes: dict[str, dict[str, np.ndarray]] = {split: {} for split in SPLITS}
    names: dict[str, list[str]] = {}
    for name, parts in sorted(extra.items()):
        years = {split: _numbers(array) for split, array in parts.items()} if name == "age" else {}
        if years and all(y is not None for y in years.values()):
            coded = {split: age_codes(y) for split, y in years.items() if y is not None}
            names[name] = AGE_BINS
        else:
            coded, names[name] = _codes(parts)
        if len(names[name]) > MOST_VALUES:
            notes.append(f"attribute {name} is left out: {len(names.pop(name))} values are no groups, bin them first")
            continue
        for split in SPLITS:
            attributes[split][name] = coded.get(split, np.full(counts[split], -1))
        absent = [split for split in SPLITS if split not in coded]
        if absent:
            notes.append(f"attribute {name} is unknown in {', '.join(absent)}: {file.name} has no such array")
    return attributes, names


def _codes(parts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Code values by their sorted order over all splits: split -> int64 [sample] with -1 = missing, and their names."""
    if not parts:
        return {}, []
    arrays = {split: _texts_or_numbers(array) for split, array in parts.items()}
    if any(a.dtype.kind == "U" for a in arrays.values()):
        arrays = {s: a if a.dtype.kind == "U" else np.where(a >= 0, a.astype(str), "") for s, a in arrays.items()}
    known = {split: a != "" if a.dtype.kind == "U" else (a >= 0) & np.isfinite(a) for split, a in arrays.items()}
    values = np.unique(np.concatenate([a[known[split]] for split, a in arrays.items()]))
    codes = {s: np.where(known[s], np.searchsorted(values, a), -1).astype(np.int64) for s, a in arrays.items()}
    return codes, [str(int(v)) if v.dtype.kind == "f" and v == int(v) else str(v) for v in values]


def _texts_or_numbers(array: np.ndarray) -> np.ndarray:
    """Return stripped strings with "" for missing, or numbers as they are (missing: NaN, infinite, negative)."""
    if array.dtype.kind in "US":
        text = np.char.strip(
            array.astype(str) if array.dtype.kind == "U" else np.char.decode(array, "utf-8", "replace")
        )
        return np.where(np.isin(np.char.lower(text), ("nan", "none")), "", text)
    return array


def _numbers(array: np.ndarray) -> np.ndarray | None:
    """Return ages as float64 with NaN for missing; None where they are texts, such as bins of the user's own."""
    values = _texts_or_numbers(array)
    if values.dtype.kind != "U":
        return values.astype(np.float64)
    try:
        return np.where(values == "", "nan", values).astype(np.float64)
    except ValueError:
        return None
