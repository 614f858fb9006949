"""Peak memory of a stretch of work, on a CUDA device or of this process."""

from __future__ import annotations

from pathlib import Path

import torch


class PeakMemory:
    """The most memory used above what was held at the start: on the device, or resident on a CPU.

    at_least: what work that was done before, and is used again, took when it was done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.at_least = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)
            return
        self.reset = True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the process's high-water mark
        except OSError:
            self.reset = False
        self.held = _status_bytes("VmRSS")

    def peak(self) -> int | None:
        """Return the bytes so far, or None where this system cannot tell."""
        if self.device.type == "cuda":
            return max(self.at_least, torch.cuda.max_memory_allocated(self.device) - self.held)
        peak = _status_bytes("VmHWM")
        if not self.reset or not peak:
            return None
        return max(self.at_least, peak - self.held)


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration, ValueError):
        return 0
