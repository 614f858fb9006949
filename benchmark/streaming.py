"""Images between disk, memory and device: decoded once, resident on the device where they fit, streamed to it else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..datasets.stored import StoredImages
from ..identity import digest
from .progress import progress
from .store import CHECKPOINTS, Store

RESIDENT_SHARE = 0.3
"""Share of the free memory (of the device; of the machine on a CPU) that the images of one part may take for good."""

KEPT_BYTES = 2**28
"""Streamed images that take no more than this stay on the device until others are asked for."""

_ATEN = torch.ops.aten
_DETACH, _SELECT, _INDEX = _ATEN.detach.default, _ATEN.select.int, _ATEN.index.Tensor
_SLICE, _SPLIT = _ATEN.slice.Tensor, _ATEN.split.Tensor


class FilmStore:
    """The cache that `prepare` keeps decoded films in: artifacts of the stage `images`, by the dataset's name."""

    def __init__(self, store: Store, dataset: str):
        self._store, self._dataset = store, dataset

    def produce(self, spec: dict[str, Any], compute: Callable[[Path, Path], dict[str, Any]]) -> Path:
        """Return the artifact's folder, computed if it is not in the store."""
        whole = {"dataset": self._dataset, **spec}
        return self._store.produce("images", digest(whole), whole, lambda work: compute(work, work / CHECKPOINTS))

    def progress(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        """Show a bar, or lines."""
        return progress(items, description, total)


def on_device(images: np.ndarray | StoredImages, device: torch.device) -> Tensor:
    """Return the images as a tensor on the device: a resident one if they fit comfortably, else StreamedImages."""
    if isinstance(images, np.ndarray) and device.type == "cpu":
        return torch.from_numpy(images)
    if images.nbytes > RESIDENT_SHARE * _free_memory(device):
        whole_name = torch.empty(0, device=device).device  # `cuda` is called `cuda:0` by all that is there
        return StreamedImages(Host(images, whole_name), np.arange(len(images)))
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).to(device)
    whole, filled = torch.empty(images.shape, dtype=torch.uint8, device=device), 0
    for block in images.blocks():
        whole[filled : filled + len(block)] = torch.from_numpy(block)
        filled += len(block)
    return whole


@dataclass
class Host:
    """Images on the host that a device reads, and those that it read last: they are often used more than once."""

    images: np.ndarray | StoredImages
    device: torch.device
    rows: np.ndarray | None = None
    kept: Tensor | None = None

    def fetch(self, rows: np.ndarray) -> Tensor:
        """Return the images `rows` on the device."""
        found = torch.from_numpy(self.images[rows])
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found

    def load(self, rows: np.ndarray) -> Tensor:
        """Return the images of a chunk on the device, where they stay until another chunk is used."""
        if self.kept is None or self.rows is not rows:
            self.rows = self.kept = None  # before the next chunk needs its place
            found = self.fetch(rows)
            if found.nbytes > KEPT_BYTES:
                return found
            self.rows, self.kept = rows, found
        return self.kept


class StreamedImages(Tensor):
    """Images that stay on the host, as a tensor on the device: only those that are asked for are moved there.

    The whole, a slice and the chunks of `split` read nothing until something is computed from them; indices
    (`images[rows]`, `images[3]`) give ordinary tensors. Whatever is computed is what resident images would give. On
    CUDA, copies go through pinned memory and overlap with what the device has queued.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _host: Host
    _rows: np.ndarray

    @staticmethod
    def __new__(cls, host: Host, rows: np.ndarray) -> StreamedImages:
        shape = (len(rows), *host.images.shape[1:])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint8, device=host.device)
        made._host, made._rows = host, rows
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StreamedImages({tuple(self.shape)}, device='{self.device}')"

    def numpy(self, **_: Any) -> np.ndarray:
        """Return the images as an array; a tensor on the CPU becomes one without any operation."""
        return self._host.load(self._rows).numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Move the images that an operation needs, then carry it out on ordinary tensors."""
        kwargs = kwargs or {}
        if isinstance(args[0], StreamedImages) and not kwargs:
            found = args[0]._rows_only(func, *args[1:])
            if found is not None:
                return found
        args, kwargs = tree_map_only(StreamedImages, lambda images: images._host.load(images._rows), (args, kwargs))
        return func(*args, **kwargs)

    def _rows_only(self, func: Any, *args: Any) -> Any:
        """Return the result of an operation that chooses rows, None of any other."""
        if func is _DETACH:
            return StreamedImages(self._host, self._rows)
        if func is _SLICE and (not args or args[0] == 0):
            return StreamedImages(self._host, self._rows[slice(*args[1:])])
        if func is _SPLIT and args[1:] in ((), (0,)):
            starts = range(0, len(self), args[0])
            return [StreamedImages(self._host, self._rows[start : start + args[0]]) for start in starts]
        if func is _SELECT and args[0] == 0:
            return self._host.fetch(self._rows[args[1]])
        if func is _INDEX and len(args[0]) == 1:
            return self._host.fetch(self._rows[args[0][0].cpu().numpy()])
        return None


def _free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device, or on this machine for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free
