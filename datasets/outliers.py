"""Images from outside a dataset's distribution: noise, or another dataset's test split, in the shape that is asked for.

`ood-noise` is far from everything; `ood-<dataset>` is near (another MedMNIST set) or far (the phantom) as the two
datasets are. What was done to the images is said in words, for a detector may detect the resizing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError, suggest
from ..identity import derive_seed
from ..registries import DATASETS
from .api import SPLITS, Data, resolve_data_root
from .decoding import Temporary, decode_films
from .films import Films
from .hashing import scattered

if TYPE_CHECKING:
    from torch import Tensor

NOISE = "noise"
OF_THE_USER = ("npz", "csv")
"""Datasets that are nothing without files and settings of their own."""

PARTS = ("val", "test")


@dataclass(frozen=True)
class Outliers:
    """images: uint8 [sample, channel, height, width] on the CPU; note: what they are and what was done to them."""

    images: Tensor
    note: str


def check_outliers(name: str, dataset_name: str) -> str:
    """Return why `name` (`noise` or a dataset) cannot give outliers for the dataset `dataset_name`; "" where it can.

    Whether the files of a dataset are there shows when `outliers` reads them.
    """
    if name == NOISE:
        return ""
    if name == dataset_name:
        return f"images of {name} are no outliers of {name}"
    if name in OF_THE_USER:
        return f"outliers cannot come from dataset {name}, which needs settings of its own"
    if name not in DATASETS.names():
        return f"there are no outliers '{name}': {suggest(name, [NOISE, *DATASETS.names()])}"
    return ""


def outliers(
    name: str,
    count: int,
    channels: int,
    size: int,
    seed: int,
    data_root: str | Path | None = None,
    part: str = "test",
) -> Outliers:
    """Return `count` outliers for `part` (val or test), uint8 [sample, channels, size, size], or all that there are.

    name: `noise` (every number uniform from 0 to 255 and independent), or a registered dataset, whose test split is
    divided by patient, else by image, into two halves, one for each part: whatever the seed and the count, no image is
    in both. The seed draws which images of the half are taken, and their order. A set that can be rendered or read at
    `size` pixels is; other images are resized (bilinear, antialiased), grey ones repeated in every channel, colours
    reduced to their luminance, and `note` says so.

    Raises UserError for an unknown name, a dataset whose files are missing or malformed, and a half without images.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}: outliers are for {' or '.join(PARTS)}")
    if reason := check_outliers(name, ""):
        raise UserError(reason)
    if name == NOISE:
        return _noise((count, channels, size, size), derive_seed("outliers", NOISE, seed, part))
    data = _load(name, count, size, data_root)
    images = _drawn(data, count, seed, part)
    if not len(images):
        raise UserError(f"{data.location or name} has no test images to be outliers for {part}: choose another dataset")
    notes = [f"{len(images)} test images of {name}"]
    if len(images) < count:
        notes[0] += f", all of its half for {part}, where {count} were asked for"
    return _shaped(images, channels, size, notes)


def _noise(shape: tuple[int, ...], key: int) -> Outliers:
    import torch

    numbers = int(np.prod(shape))
    drawn = scattered(key, np.arange(-(-numbers // 8))).astype("<u8").view(np.uint8)[:numbers]
    return Outliers(torch.from_numpy(drawn.reshape(shape)), "uniform noise, independent in every pixel and channel")


def _load(name: str, count: int, size: int, data_root: str | Path | None) -> Data:
    """Load a dataset at `size` pixels, or, where it does not come in that size, as it is by default."""
    component: Any = DATASETS.get(name)
    settings = {f.name for f in fields(component)}
    root = resolve_data_root(data_root) if data_root else None
    chosen = {}
    if settings >= set(SPLITS):  # as many images are rendered as are asked for: half of them, 3 to a patient at most
        chosen = {"train": 1, "val": 1, "test": 2 * count + count // 5 + 60}

    def load(**sized: int) -> Data:
        dataset = component(**chosen, **sized)
        dataset.name = name
        return dataset.load(root)

    if "size" not in settings:
        return load()
    try:
        return load(size=size)
    except UserError:
        return load()


def _drawn(data: Data, count: int, seed: int, part: str) -> np.ndarray:
    """Return at most `count` images of the half of the test split that is for `part`; only they are decoded."""
    split = data.splits["test"]
    unit = split.ids if split.patient is None else split.patient
    half = scattered(derive_seed("halves of outliers", data.name), unit) >> np.uint64(63)
    rows = np.flatnonzero(half == PARTS.index(part))
    order = np.argsort(scattered(derive_seed("outliers", data.name, seed), split.ids[rows]), kind="stable")
    images = split.take(rows[order[:count]]).images
    if isinstance(images, Films):
        files = sorted(set(images.files))
        decoded = decode_films(replace(images, files=files), Temporary()).images
        return decoded[[files.index(file) for file in images.files]]
    return images[:]


def _shaped(images: np.ndarray, channels: int, size: int, notes: list[str]) -> Outliers:
    """Bring images to the channels and the size, and add to `notes` what was done."""
    import torch
    from torch.nn.functional import interpolate

    from .corruption_kernels import luminance, rounded

    pixels = torch.from_numpy(np.array(images))
    height, width = pixels.shape[2:]
    if (height, width) != (size, size):
        resized = interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        pixels = rounded(resized).clamp_(0, 255).to(torch.uint8)
        notes.append(f"resized from {height} x {width} to {size} x {size} pixels (bilinear, antialiased)")
    if pixels.shape[1] == 1 < channels:
        pixels = pixels.expand(-1, channels, -1, -1).contiguous()
        notes.append(f"grey levels repeated in {channels} channels")
    elif pixels.shape[1] == 3 and channels == 1:
        pixels = rounded(luminance(pixels.float())).clamp_(0, 255).to(torch.uint8)
        notes.append("colours reduced to their luminance (ITU-R BT.601)")
    if pixels.shape[1] != channels:
        raise UserError(
            f"outliers have {pixels.shape[1]} channels, and {channels} are needed: only 1 and 3 are converted"
        )
    return Outliers(pixels, "; ".join(notes))
