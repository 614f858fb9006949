"""Where a record comes from: digest of the package's sources, commit, versions, device. No host names, no paths."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmark", "generators", "metrics", "datasets", "leaderboard")
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "laplace-torch", "curvlinops-for-pytorch", "medmnist")


@functools.cache
def source_digest() -> str:
    """Return the SHA-256 over the package's Python sources."""
    h = hashlib.sha256()
    for path in sorted([*PACKAGE.glob("*.py"), *(p for f in FOLDERS for p in (PACKAGE / f).glob("*.py"))]):
        h.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return h.hexdigest()


@functools.cache
def commit() -> tuple[str, bool]:
    """Return (commit, dirty); dirty when a file that can change numbers differs from it or no repository is there."""
    try:
        here = ["git", "-C", str(PACKAGE)]
        head = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        watched = [
            *FOLDERS,
            ":(glob)*.py",
            "constraints.txt",
            ":!leaderboard/records",
            ":!leaderboard/predictions",
            ":!*.md",
        ]
        state = subprocess.run(
            [*here, "status", "--porcelain", "--", *watched, ":!leaderboard/*.csv"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "", True
    if head.returncode or state.returncode:
        return "", True
    return head.stdout.strip(), bool(state.stdout.strip())


def device_name(device: torch.device) -> str:
    """Return the model of the processor or accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the provenance section of a record."""
    head, dirty = commit()
    return {
        "source_digest": source_digest(),
        "commit": head,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | {n: library_version(n) for n in LIBRARIES},
        "device_name": device_name(device),
    }


def library_version(name: str) -> str:
    """Return the installed version of a distribution, "" where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
