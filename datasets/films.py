"""Images that are still in files: what a reader of radiographs hands over, and how each file becomes an image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import UserError, suggest

CROPS = ("none", "centre", "pad")
INTENSITIES = ("stored", "minmax", "percentile")
UNREADABLE = ("refuse", "exclude")


@dataclass(frozen=True)
class Rendering:
    """How a file becomes an image: uint8 [1, size, size].

    crop: none (both sides are scaled to `size`, which changes the proportions), centre (the largest square in the
    middle), pad (black borders make it square); intensity: of the grey values, stored (as they are, 16-bit values by
    their stored range), minmax (the darkest pixel 0, the brightest 255), percentile (the 1st and 99th percentile 0 and
    255, clipped), the latter two of the cropped and scaled image without its borders.
    """

    size: int = 64
    crop: str = "none"
    intensity: str = "stored"

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UserError(f"dataset.size={self.size} must be at least 8 pixels")
        for name, allowed in (("crop", CROPS), ("intensity", INTENSITIES)):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise UserError(f"dataset.{name}={value} is not a choice: {suggest(str(value), allowed)}")


@dataclass
class Films:
    """Files that `prepare` decodes, in place of `Split.images`.

    root: the folder that all files are in; files: their paths relative to it, with `/`, one per sample; unreadable:
    whether files that are missing or cannot be decoded are an error (refuse), or left out and counted (exclude).
    `shape` and `dtype` are those of the images that the files will be.
    """

    root: Path
    files: list[str]
    rendering: Rendering = field(default_factory=Rendering)
    unreadable: str = "refuse"

    def __post_init__(self) -> None:
        if self.unreadable not in UNREADABLE:
            raise UserError(
                f"dataset.unreadable={self.unreadable} is not a choice: {suggest(self.unreadable, UNREADABLE)}"
            )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return [sample, 1, size, size]."""
        return len(self), 1, self.rendering.size, self.rendering.size

    @property
    def dtype(self) -> np.dtype:
        """Return uint8."""
        return np.dtype(np.uint8)

    def take(self, rows: np.ndarray) -> Films:
        """Return the files of the samples `rows`, in that order."""
        return replace(self, files=[self.files[i] for i in rows])
