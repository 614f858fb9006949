"""64-bit hashes of numbers and of images, vectorised; the same on every platform and with every version of numpy."""

from __future__ import annotations

import numpy as np

from .stored import StoredImages

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CHUNK_WORDS = 500_000


def scramble(x: np.ndarray) -> np.ndarray:
    """Return a bijective scramble of uint64 (the finaliser of splitmix64: Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def scattered(key: int | np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return 64 random bits for every index: element `index` of the splitmix64 sequence that starts at `key`."""
    return scramble(np.asarray(key, np.uint64) + (index.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def hash_images(images: np.ndarray | StoredImages) -> np.ndarray:
    """Return a hash of every image, uint64 [sample]: the sum of its 8-byte words, each scrambled with its position."""
    size = int(np.prod(images.shape[1:]))
    words = -(-size // 8)
    positions = np.arange(1, words + 1, dtype=np.uint64) * GOLDEN
    hashes = np.empty(len(images), np.uint64)
    step = max(1, CHUNK_WORDS // words)
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        padded = np.zeros((len(chunk), words * 8), np.uint8)
        padded[:, :size] = chunk.reshape(len(chunk), -1)
        hashes[start : start + step] = scramble(padded.view("<u8") ^ positions).sum(1, dtype=np.uint64)
    return hashes
