"""Images that are still in files: what a reader of radiographs hands over, and how each file becomes an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError, suggest

CROPS = ("none", "centre", "pad")
INTENSITIES = ("stored", "minmax", "percentile")


@dataclass(frozen=True)
class Rendering:
    """How a file becomes an image: uint8 [1, size, size].

    crop: none (both sides are scaled to `size`, which changes the proportions), centre (the largest square in the
    middle), pad (black borders make it square); intensity: of the grey values, stored (as they are, 16-bit values by
    their stored range), minmax (the darkest pixel 0, the brightest 255), percentile (the 1st and 99th percentile 0 and
    255, clipped).
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

    root: the folder that all files are in; files: their paths relative to it, with `/`, one per sample.
    """

    root: Path
    files: list[str]
    rendering: Rendering = field(default_factory=Rendering)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Sequence[int] | np.ndarray) -> Films:
        """Return the files of the samples `rows`, in that order."""
        return Films(self.root, [self.files[i] for i in rows], self.rendering)
