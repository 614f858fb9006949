"""Reading npz files in the MedMNIST layout: `<split>_images`, `<split>_labels`, and optional arrays per sample."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..errors import UserError
from .api import SPLITS


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of `file`; nothing in it is executed.

    Raises UserError for a file that is missing, no npz, truncated, or that holds pickled objects.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist: name an npz file in the MedMNIST layout")
    if file.is_dir():
        raise UserError(f"{file} is a folder: name an npz file in the MedMNIST layout")
    name = ""
    try:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise UserError(f"{file} holds a single array: save named arrays with numpy.savez")
        arrays = {}
        with stored:
            for name in stored.files:
                arrays[name] = stored[name]
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    except PermissionError:
        raise UserError(f"{file} cannot be read: check its permissions") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError):
        raise UserError(f"{file} is not a complete npz file: copy or download it again") from None
    except ValueError:
        what = f": array {name} holds Python objects or is damaged" if name else " is no npz file of plain arrays"
        raise UserError(f"{file}{what}: save numbers or fixed-width strings with numpy.savez") from None


def image_array(arrays: dict[str, np.ndarray], split: str, file: Path) -> np.ndarray:
    """Return `<split>_images` as uint8 [sample, channel, height, width]; raise UserError for anything else."""
    name = f"{split}_images"
    if name not in arrays:
        raise UserError(f"{file} has no array {name}: the layout is {{{','.join(SPLITS)}}}_images and _labels")
    images = arrays[name]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise UserError(
            f"{file}: {name} has shape {images.shape}: give [sample, height, width] or [sample, height, width, 1 or 3]"
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        row = int(np.flatnonzero(~np.isfinite(images.reshape(len(images), -1)).all(1))[0])
        raise UserError(f"{file}: {name} row {row} holds NaN or infinity: give uint8 images, 0 to 255")
    if images.dtype != np.uint8:
        raise UserError(f"{file}: {name} is {images.dtype}: scale the images to 0..255 and store them as uint8")
    if images.ndim == 3:
        return images[:, None]
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


def label_array(arrays: dict[str, np.ndarray], split: str, count: int, file: Path) -> np.ndarray:
    """Return `<split>_labels` as int64 [sample], or [sample, label] with -1 = missing where there are several columns.

    Raises UserError for a wrong shape or length and for labels that are no whole numbers.
    """
    name = f"{split}_labels"
    if name not in arrays:
        raise UserError(f"{file} has no array {name}: the layout is {{{','.join(SPLITS)}}}_images and _labels")
    labels = arrays[name]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or 0 in labels.shape[1:]:
        raise UserError(f"{file}: {name} has shape {labels.shape}: give [sample], [sample, 1] or [sample, label]")
    check_length(len(labels), count, name, split, file)
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{file}: {name} is {labels.dtype}: number the classes 0, 1, 2, ...")
    if labels.dtype.kind == "f":
        missing = np.isnan(labels) & (labels.ndim == 2)
        labels = np.where(missing, -1, labels)
        bad = ~(np.isfinite(labels) & (labels == np.floor(labels)))
        if bad.any():
            row = int(np.argwhere(bad)[0, 0])
            value = labels[bad].flat[0]
            raise UserError(f"{file}: {name} row {row} is {value}: labels are whole numbers 0, 1, 2, ...")
    return labels.astype(np.int64)


def check_length(length: int, count: int, name: str, split: str, file: Path) -> None:
    """Raise UserError unless an array per sample is as long as the split has images."""
    if length != count:
        raise UserError(f"{file}: {name} has {length} rows but {split}_images has {count}: make them equally long")
