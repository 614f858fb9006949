"""What a dataset is: four parts of images with labels, attributes and patients, a task, and a content digest.

A dataset component is a plain dataclass (its fields are its settings) with `load(data_root) -> Data`; it delivers
train, val and test, and `prepare` carves `tune` out of train, checks everything and computes the digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from ..registry import Registry

DATASETS: Registry[type[Dataset]] = Registry(
    "dataset", "multiplicity_bench.datasets", "register_dataset", "multiplicity_bench.datasets"
)
register_dataset = DATASETS.register

TASKS = ("binary", "multiclass", "ordinal", "multilabel")
AGE_BINS = [*(f"{low}-{low + 9}" for low in range(0, 90, 10)), "90+"]


@dataclass
class Split:
    """One part of a dataset.

    images: uint8 [sample, channel, height, width]; labels: int64 [sample], or [sample, label] with -1 = missing for
    multi-label tasks; ids: int64 [sample], the row in the source's own split; patient: int64 codes [sample] or None
    where the source knows no patients; attributes: name -> int64 codes [sample], -1 = unknown; latents: name ->
    [sample] truths of a synthetic set, never shown to a generator.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    patient: np.ndarray | None = None
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    latents: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """Return the samples `rows` (int indices), in that order."""
        return Split(
            self.images[rows],
            self.labels[rows],
            self.ids[rows],
            None if self.patient is None else self.patient[rows],
            {k: v[rows] for k, v in self.attributes.items()},
            {k: v[rows] for k, v in self.latents.items()},
        )


@dataclass
class Data:
    """A loaded dataset: the splits and what every reader of a table must know about them.

    classes: names of the classes (of the labels, if multi-label); positive: index of the positive class of a binary
    task, else None; attribute_values: attribute -> names of its codes; notes: caveats shown on the board;
    duplicates: exact duplicate images across splits, `"train/test" -> count`, filled by `prepare`;
    digest: SHA-256 of everything a result can depend on, filled by `prepare`.
    """

    name: str
    task: str
    classes: list[str]
    splits: dict[str, Split]
    positive: int | None = None
    attribute_values: dict[str, list[str]] = field(default_factory=dict)
    synthetic: bool = False
    licence: str = ""
    source: str = ""
    notes: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    digest: str = ""


class Dataset(Protocol):
    """A dataset component: a plain dataclass of settings, registered by `@register_dataset(name, ...)`.

    `name` is set on the instance by whoever creates it (one class may serve several names); `version` goes up whenever
    the same settings start to give other data.
    """

    name: str
    version: ClassVar[int]

    def load(self, data_root: Path | None) -> Data:
        """Return the data with splits `train`, `val`, `test`; raise UserError for missing or malformed files."""
        ...


def age_codes(years: np.ndarray) -> np.ndarray:
    """Return the decade of each age as a code into AGE_BINS; -1 for NaN, negative ages and ages above 120."""
    known = (years >= 0) & (years <= 120)
    return np.where(known, np.minimum(np.where(known, years, 0) // 10, len(AGE_BINS) - 1), -1).astype(np.int64)
