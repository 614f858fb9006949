"""Images in a memory-mapped file: read when they are asked for, never all at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 2**24


class StoredImages:
    """Some rows of an array of images [film, channel, height, width], in an order of their own: uint8 [sample, ...].

    It takes the place of an ndarray in a `Split`: `images[k]`, `images[start:stop]` and `images[rows]` read those
    images alone; `take(rows)` reads nothing.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray | None = None):
        self._array = array
        self._rows = np.arange(len(array)) if rows is None else np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return [sample, channel, height, width]."""
        return (len(self._rows), *self._array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the pixels."""
        return self._array.dtype

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return self._array.ndim

    @property
    def nbytes(self) -> int:
        """Return the bytes that all images would take in memory."""
        return len(self._rows) * self._array[:1].nbytes

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        """Return a copy of one image, or of those that a slice, an array of indices or a mask names."""
        return np.require(np.asarray(self._array[self._rows[key]]), requirements="W")

    def take(self, rows: np.ndarray) -> StoredImages:
        """Return the images `rows` (int indices), in that order, without reading them."""
        return StoredImages(self._array, self._rows[rows])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all images in order, 16 MB at a time."""
        step = max(1, BLOCK_BYTES // max(1, self._array[:1].nbytes))
        for start in range(0, len(self), step):
            yield self[start : start + step]
