"""SWAG: a Gaussian fitted to the iterates of constant-rate SGD from the base (Maddox et al., NeurIPS 2019).

`w = mean + sqrt(scale) (diag^(1/2) z1 + D z2 / sqrt(K - 1))`, scale = 1/2: diag is the iterates' variance, D
their last K deviations from the running mean. Covariance: scale (diag + D D' / (K - 1)).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ..identity import derive_seed
from .api import Generator, Problem, choices, register_generator
from .batchnorm import POLICIES, settle_batchnorm
from .modelset import LowRankSet, ModelSet, unflatten


@register_generator("swag")
@dataclass
class SWAG(Generator):
    """Gaussian fitted to the iterates of constant-rate SGD from the base (SWAG).

    lr, momentum, epochs: of that SGD; per_epoch: iterates collected per epoch; rank: K, columns of D; scale: 1/2 is the
    paper's; batchnorm: keep | reestimate.
    """

    lr: float = 0.01
    momentum: float = 0.9
    epochs: int = 20
    per_epoch: int = 2
    rank: int = 20
    scale: float = 0.5
    batchnorm: str = "reestimate"

    def __post_init__(self) -> None:
        choices(self.batchnorm, "generator.batchnorm", POLICIES)
        if self.epochs * self.per_epoch < 2 or self.rank < 2:
            raise UserError("generator: SWAG needs rank >= 2 and at least 2 iterates (epochs x per_epoch)")
        if self.lr <= 0 or self.scale <= 0:
            raise UserError("generator: lr and scale must be positive")

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Collect the iterates and return draws from their Gaussian."""
        done = problem.checkpoint.load("moments")
        if done is None:
            with problem.clock.fixed():
                done = self._collect(problem, seed).factors()
            problem.checkpoint.save("moments", done)
        mean, shapes = done["mean"], problem.base.params
        drawn = LowRankSet(
            size=problem.members,
            shared_params={},
            shared_buffers=dict(problem.base.buffers),
            mean=unflatten(mean, shapes),
            factors={"sd": done["sd"], "D": done["D"]},
            seed=derive_seed(seed, "swag"),
            scale=self.scale,
        )
        moved = mean - torch.cat([p.reshape(-1) for p in shapes.values()])
        drawn.diagnostics = {
            "iterates": int(done["count"]),
            "sd_mean": float(done["sd"].mean()),
            "distance_of_mean_from_base": float(moved.norm()),
        }
        return settle_batchnorm(problem, drawn, self.batchnorm, seed)

    def _collect(self, problem: Problem, seed: int) -> Moments:
        moments = Moments(self.rank)
        batches, last = divmod(len(problem.train), problem.batch_size)
        # The recipe leaves out a last batch of one image, so updates are counted here.
        steps = max(1, (batches + (last > 1 or batches == 0)) // self.per_epoch)
        updates = itertools.count(1)

        def on_step(step: int, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
            if next(updates) % steps == 0:
                moments.add(torch.cat([p.detach().reshape(-1) for p in params.values()]))

        problem.fit(
            derive_seed(seed, "iterates"),
            init=problem.base,
            name="SWAG iterates",
            on_step=on_step,
            optimizer="sgd",
            lr=self.lr,
            momentum=self.momentum,
            epochs=self.epochs,
            polish=0,
            patience=0,
            constant_lr=True,
        )
        return moments


@dataclass
class Moments:
    """Running mean, variance and last `rank` deviations of flat weight vectors [param], in float64 where it cancels."""

    rank: int
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    deviations: list[Tensor] = field(default_factory=list)

    def add(self, weights: Tensor) -> None:
        """Take one more iterate into account (Welford's update: no cancellation of large squares)."""
        weights = weights.double()
        if self.count == 0:
            self.mean, self.squares = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count += 1
        before = weights - self.mean
        self.mean = self.mean + before / self.count
        deviation = weights - self.mean
        self.squares = self.squares + before * deviation
        self.deviations = [*self.deviations, deviation][-self.rank :]

    def factors(self) -> dict[str, Tensor]:
        """Return mean [param], sd [param] (ddof 0), D [param, rank] in float32, and the number of iterates."""
        return {
            "mean": self.mean.float(),
            "sd": (self.squares / self.count).sqrt().float(),
            "D": torch.stack(self.deviations, 1).float(),
            "count": torch.tensor(self.count),
        }
