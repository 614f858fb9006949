"""Shared fixtures; the repository root leaves sys.path, so that a bare `import datasets` never finds our folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images, named by MULTIPLICITY_BENCH_DATA (default ../shared/data); skips where it is absent."""
    root = Path(os.environ.get("MULTIPLICITY_BENCH_DATA", ROOT.parent / "shared" / "data"))
    if not (root / "medmnist" / "breastmnist.npz").is_file():
        pytest.skip(f"no real images at {root}: set MULTIPLICITY_BENCH_DATA")
    return root
