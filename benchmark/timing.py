"""Seconds, and rows of speed.json made of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .provenance import LIBRARIES, device_name, library_version
from .store import synchronise

CPU = torch.device("cpu")
REPEATS = 5


def timed(work: Callable[[], Any], device: torch.device = CPU) -> float:
    """Return the seconds that `work` takes, everything on the device included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def as_row(name: str, ours: list[float], baseline: list[float], device: torch.device = CPU) -> dict[str, Any]:
    """Return a row of speed.json from seconds: medians, their ratio, and the spread of ours."""
    a, b = statistics.median(ours), statistics.median(baseline)
    return {
        "name": name,
        "device": device.type,
        "device_name": device_name(device),
        "ratio": b / a,
        "ours_s": a,
        "baseline_s": b,
        "spread": (max(ours) - min(ours)) / a,
        "versions": {library: library_version(library) for library in LIBRARIES},
    }


def compare(
    name: str,
    device: torch.device,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    repeats: int | None = None,
) -> dict[str, Any]:
    """Time two ways to do the same work, alternately after a warm-up, and return a row of speed.json."""
    seconds: dict[Callable[[], Any], list[float]] = {ours: [], baseline: []}
    for repeat in range((repeats or REPEATS) + 1):
        for way, times in seconds.items():
            took = timed(way, device)
            if repeat:
                times.append(took)
    return as_row(name, seconds[ours], seconds[baseline], device)
