"""One component of each kind, as a package of somebody else's would add them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from multiplicity_bench.datasets.api import Data, Split
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Generator, Problem
from multiplicity_bench.generators.modelset import ModelSet, StackedSet
from multiplicity_bench.identity import derive_seed
from multiplicity_bench.metrics.api import register_metric


@dataclass
class Jitter(Generator):
    """White noise of one size on every weight of the base."""

    scale: float = 0.01

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"generator.scale={self.scale} must not be negative")

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Return `problem.members` jittered copies of the base."""

        def noisy(name: str, leaf: torch.Tensor, member: int) -> torch.Tensor:
            random = torch.Generator().manual_seed(derive_seed(seed, name, member))
            return leaf + self.scale * torch.randn(leaf.shape, generator=random).to(leaf)

        members = range(problem.members)
        stacked = {n: torch.stack([noisy(n, leaf, k) for k in members]) for n, leaf in problem.base.params.items()}
        return StackedSet(problem.members, {}, problem.base.buffers, params=stacked)


@register_metric("flip_share", direction="neither", level="set", unit="share of members", citation="this file")
def flip_share(context):
    """Share of the members that decide another class than the base, mean over cases."""
    return context.flip_counts / context.size


@dataclass
class Ramps:
    """Noisy ramps of grey that rise to the left or to the right."""

    n: int = 120
    seed: int = 0

    name = "ramps"
    version: ClassVar[int] = 1

    def load(self, data_root: Path | None = None) -> Data:
        """Draw three splits of `n` images of 8 x 8 pixels; `data_root` is not used."""
        splits = {name: self._draw(i) for i, name in enumerate(("train", "val", "test"))}
        return Data(self.name, "binary", ["left", "right"], splits, positive=1, synthetic=True, licence="MIT")

    def _draw(self, number: int) -> Split:
        random = np.random.default_rng([self.seed, number])
        labels = np.arange(self.n) % 2
        ramp = np.where(labels == 1, 1, -1)[:, None, None, None] * np.linspace(-30, 30, 8)
        images = 128 + ramp + random.normal(0, 60, (self.n, 1, 8, 8))
        return Split(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64), np.arange(self.n))


tilted = 0.5
"""No generator at all, though an entry point says so."""
