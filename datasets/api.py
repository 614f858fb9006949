"""What a dataset is: four parts of images with labels, attributes and patients, a task, and a content digest.

A dataset component is a plain dataclass (its fields are its settings) with `load(data_root) -> Data`; it delivers
train, val and test, and `prepare` carves `tune` out of train, checks everything and computes the digest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ..errors import UserError
from ..identity import array_digest, derive_seed, digest
from ..registries import DATASETS as DATASETS
from ..registries import register_dataset as register_dataset
from .decoding import Cache, Temporary, decode_films
from .films import Films
from .hashing import hash_images, scattered
from .stored import StoredImages

TASKS = ("binary", "multiclass", "ordinal", "multilabel")
SPLITS = ("train", "val", "test")
RESIDENT_BYTES = 2**29
"""Decoded films that take no more than this are held in memory, and read when asked for beyond."""

AGE_BINS = [*(f"{low}-{low + 9}" for low in range(0, 90, 10)), "90+"]


@dataclass
class Split:
    """One part of a dataset.

    images: uint8 [sample, channel, height, width], in memory or on disk, or the `Films` that `prepare` turns into
    either; labels: int64 [sample], or [sample, label] with -1 = missing for multi-label tasks; ids: int64 [sample], the
    row in the source's own split; patient: int64 codes [sample] or None where the source knows no patients; attributes:
    name -> int64 codes [sample], -1 = unknown; latents: name -> [sample] truths of a synthetic set, never shown to a
    generator.
    """

    images: np.ndarray | StoredImages | Films
    labels: np.ndarray
    ids: np.ndarray
    patient: np.ndarray | None = None
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    latents: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> np.ndarray | StoredImages:
        """Return the images; ValueError where they are films that `prepare` has not decoded."""
        if isinstance(self.images, Films):
            raise ValueError("these images are still in files: prepare() decodes them")
        return self.images

    def take(self, rows: np.ndarray) -> Split:
        """Return the samples `rows` (int indices), in that order."""
        return Split(
            self.images[rows] if isinstance(self.images, np.ndarray) else self.images.take(rows),
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
    task, else None; attribute_values: attribute (or coded latent) -> names of its codes; notes: caveats shown on the
    board;
    exclusions: what was left out and why, a line each, which `prepare` adds to the notes; duplicates: exact duplicate
    images across splits, `"train/test" -> count`, filled by `prepare`;
    digest: SHA-256 of everything a result can depend on, filled by `prepare`; location: the file the data came from,
    for messages alone (a record holds no paths).
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
    exclusions: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    location: str = ""


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


def default_data_root() -> Path:
    """Return the folder of real images where none is named.

    MULTIPLICITY_BENCH_DATA, else shared/data beside the project around the current directory (the nearest folder above
    with a pyproject.toml, else the directory itself), else ~/.medmnist. Raises UserError when the variable names
    nothing that exists.
    """
    named = os.environ.get("MULTIPLICITY_BENCH_DATA")
    if named:
        return _existing(named, "MULTIPLICITY_BENCH_DATA")
    here = Path.cwd()
    project = next((folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()), here)
    shared = project.parent / "shared" / "data"
    return shared if shared.is_dir() else Path.home() / ".medmnist"


def resolve_data_root(value: str | Path | None) -> Path:
    """Return the folder (or, for `npz`, the file) of real images; raise UserError for a named one that is missing."""
    return _existing(value, "data_root") if value else default_data_root()


def _existing(value: str | Path, origin: str) -> Path:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{origin}={value} does not exist: name the folder that holds medmnist/*.npz, or an npz file")
    return path


def prepare(
    dataset: Dataset,
    data_root: str | Path | None = None,
    *,
    tune_fraction: float = 0.1,
    tune_seed: int = 0,
    cache: Cache | None = None,
) -> Data:
    """Load `dataset`, decode its films, check all of it, carve `tune`, count duplicates and compute the digest.

    `tune` is drawn by patient where ids are known, stratified by class unless the task is multi-label. `data_root=None`
    means the default: only then may a dataset be downloaded, and only into ~/.medmnist. cache: where decoded films are
    kept, by default until this process ends. Raises UserError for whatever the data or the settings break.
    """
    if not 0 < tune_fraction < 1:
        raise UserError(f"tune_fraction={tune_fraction}: give a share of train between 0 and 1")
    data = dataset.load(resolve_data_root(data_root) if data_root else None)
    check(data)
    data = _with_images(data, cache)
    data = replace(data, notes=[*data.notes, *data.exclusions])
    train, tune = carve(data.splits["train"], data.task, tune_fraction, tune_seed)
    splits = {"train": train, "tune": tune, "val": data.splits["val"], "test": data.splits["test"]}
    where = data.location or f"dataset {data.name}"
    if len(tune) == 0:
        raise UserError(f"{where}: train is too small to carve tune out of it: give every class at least 2 images")
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{where}: train keeps a single class without tune: add patients of the other class to train")
    data = replace(data, duplicates=count_duplicates(data.splits), splits=splits)
    return replace(data, digest=content_digest(data))


def _with_images(data: Data, cache: Cache | None) -> Data:
    """Return the data with films decoded, without the samples whose film cannot be read."""
    films = {name: split.images for name, split in data.splits.items() if isinstance(split.images, Films)}
    if not films:
        return data
    first = next(iter(films.values()))
    if any(replace(some, files=first.files) != first for some in films.values()):
        raise ValueError("all splits must have films of one root and rendering, and one rule for unreadable ones")
    every = replace(first, files=sorted({file for some in films.values() for file in some.files}))
    decoded = decode_films(every, cache or Temporary())
    row_of = {file: row for row, file in enumerate(every.files)}
    resident = sum(len(some) for some in films.values()) * every.rendering.size**2 <= RESIDENT_BYTES
    splits = dict(data.splits)
    for name, some in films.items():
        readable = np.flatnonzero([file not in decoded.unreadable for file in some.files])
        images = StoredImages(decoded.images, np.array([row_of[file] for file in some.files], np.int64)).take(readable)
        kept = data.splits[name].take(readable)
        splits[name] = replace(kept, images=images[:] if resident else images)
    data = replace(data, splits=splits, exclusions=[*data.exclusions, *decoded.exclusions()])
    check(data)
    return data


def check(data: Data) -> None:
    """Raise UserError, naming file, array and row, unless `data` keeps every promise of Data and Split."""
    where = data.location or f"dataset {data.name}"
    if data.task not in TASKS:
        raise UserError(f"{where}: task '{data.task}' is unknown: one of {', '.join(TASKS)}")
    if data.task == "binary" and (len(data.classes) != 2 or data.positive not in (0, 1)):
        raise UserError(f"{where}: a binary task has 2 classes and declares positive=0 or 1")
    if set(data.splits) != set(SPLITS):
        raise UserError(f"{where}: splits are {', '.join(data.splits)}: they must be {', '.join(SPLITS)}")
    shape = data.splits["train"].images.shape[1:]
    for name, split in data.splits.items():
        _check_images(split.images, shape, f"{where}: {name}_images")
        _check_labels(split, data, f"{where}: {name}_labels")
        _check_codes(split, data, where, name)
    _check_patients(data, where)


def _check_images(images: np.ndarray | StoredImages | Films, shape: tuple[int, ...], where: str) -> None:
    if len(images.shape) != 4 or images.dtype != np.uint8:
        raise UserError(f"{where} is {images.dtype} {images.shape}: give uint8 [sample, channel, height, width]")
    if len(images) == 0:
        raise UserError(f"{where} is empty: every split needs images")
    if images.shape[1:] != shape:
        raise UserError(f"{where} are {images.shape[1:]}, those of train {shape}: bring all to one size")


def _check_labels(split: Split, data: Data, where: str) -> None:
    labels, classes = split.labels, len(data.classes)
    several = data.task == "multilabel"
    shape = (len(split), classes) if several else (len(split),)
    if labels.shape != shape or labels.dtype != np.int64:
        raise UserError(f"{where} is {labels.dtype} {labels.shape}: {data.task} needs int64 {shape}")
    low, high = (-1, 1) if several else (0, classes - 1)
    wrong = (labels < low) | (labels > high)
    if wrong.any():
        row = int(np.argwhere(wrong)[0, 0])
        raise UserError(f"{where} row {row} is {labels[wrong].flat[0]}: labels run from {low} to {high}")
    varied = [len(np.unique(column[column >= 0])) > 1 for column in (labels.T if several else [labels])]
    if not any(varied):
        raise UserError(f"{where} holds a single class: every split needs at least two")


def _check_codes(split: Split, data: Data, where: str, name: str) -> None:
    for attribute, codes in split.attributes.items():
        if attribute not in data.attribute_values:
            raise UserError(f"{where}: attribute {attribute} has no attribute_values: name its codes")
        _check_code_array(codes, len(split), f"{where}: {name}_{attribute}", len(data.attribute_values[attribute]))
    _check_code_array(split.ids, len(split), f"{where}: ids of {name}", None)
    for latent, values in split.latents.items():
        if len(values) != len(split):
            raise UserError(f"{where}: latent {latent} of {name} has {len(values)} rows: give {len(split)}")
    if split.patient is not None:
        _check_code_array(split.patient, len(split), f"{where}: {name}_patient", None)


def _check_code_array(codes: np.ndarray, count: int, where: str, values: int | None) -> None:
    if codes.shape != (count,) or codes.dtype != np.int64:
        raise UserError(f"{where} is {codes.dtype} {codes.shape}: give int64 ({count},)")
    wrong = codes < 0 if values is None else (codes < -1) | (codes >= values)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        bound = "numbers start at 0" if values is None else f"codes run from -1 to {values - 1}"
        raise UserError(f"{where} row {row} is {codes[row]}: {bound}")


def _check_patients(data: Data, where: str) -> None:
    known = {name: split.patient for name, split in data.splits.items() if split.patient is not None}
    if known and len(known) < len(data.splits):
        missing = ", ".join(name for name in data.splits if name not in known)
        raise UserError(f"{where}: patients are known for {', '.join(known)} but not for {missing}: give all or none")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")) if known else ():
        shared = np.flatnonzero(np.isin(known[second], known[first]))
        if len(shared):
            row = int(shared[0])
            twin = int(np.flatnonzero(known[first] == known[second][row])[0])
            raise UserError(
                f"{where}: {first}_patient row {twin} and {second}_patient row {row} are the same patient: "
                "put all images of a patient into one split"
            )


def carve(train: Split, task: str, fraction: float, seed: int, purpose: str = "tune") -> tuple[Split, Split]:
    """Split `train` into (train, `purpose`) by a fixed seed, both in the order of the rows.

    The unit is the patient where known, else the image. Units are drawn class by class (a patient counts for the rarest
    class among its images): about `fraction` of the images of each class, at least one unit and never the last one.
    """
    unit = np.arange(len(train)) if train.patient is None else np.unique(train.patient, return_inverse=True)[1]
    if task == "multilabel":
        stratum = np.zeros(unit.max() + 1, np.int64)
    else:
        frequency = np.bincount(train.labels)
        by_frequency = np.argsort(-frequency, kind="stable")
        rarity = np.empty_like(by_frequency)
        rarity[by_frequency] = np.arange(len(by_frequency))
        stratum = np.full(unit.max() + 1, -1)
        np.maximum.at(stratum, unit, rarity[train.labels])
    images = np.bincount(unit)
    order = np.argsort(scattered(derive_seed(purpose, seed), np.arange(len(images))), kind="stable")
    tuned = np.zeros(len(images), bool)
    for level in np.unique(stratum):
        members = order[stratum[order] == level]
        wanted = fraction * images[members].sum()
        before = np.cumsum(images[members]) - images[members] / 2
        take = min(max(1, int((before <= wanted).sum())), len(members) - 1)
        tuned[members[:take]] = True
    return train.take(np.flatnonzero(~tuned[unit])), train.take(np.flatnonzero(tuned[unit]))


def count_duplicates(splits: dict[str, Split]) -> dict[str, int]:
    """Count the images of a later split that also occur in an earlier one: {"train/test": 3}; pairs with none left out.

    Images are compared by 64-bit hashes: the chance of any false match is about n^2 / 2^64.
    """
    hashes = {name: hash_images(split.pixels) for name, split in splits.items()}
    pairs = (("train", "val"), ("train", "test"), ("val", "test"))
    counts = {f"{a}/{b}": int(np.isin(hashes[b], hashes[a]).sum()) for a, b in pairs}
    return {pair: count for pair, count in counts.items() if count}


def content_digest(data: Data) -> str:
    """Return the SHA-256 of all a result can depend on: images, labels, patients, attributes, and what codes mean."""
    arrays: dict[str, Any] = {}
    for name, split in data.splits.items():
        arrays |= {f"{name}/images": split.pixels, f"{name}/labels": split.labels}
        arrays |= {f"{name}/attribute/{k}": v for k, v in split.attributes.items()}
        if split.patient is not None:
            arrays[f"{name}/patient"] = split.patient
    return digest([array_digest(arrays), data.task, data.classes, data.positive, data.attribute_values])
