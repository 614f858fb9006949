"""Controls: sets whose scores show what a metric does not mean. They stand in every table and have no rank.

`identical` must be exactly at every metric's null value; `temperature` raises range and capacity without changing a
single decision; `logit_noise` changes decisions without any other network behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Diverged, UserError
from ..identity import derive_seed
from .api import Generator, Problem, register_generator
from .modelset import ModelSet, OutputSet, StackedSet, member_noise


@register_generator("identical")
@dataclass
class Identical(Generator):
    """Control: copies of the base; every multiplicity metric must be exactly at its null value."""

    control = True

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Return `problem.members` times the base."""
        return StackedSet(problem.members, problem.base.params, problem.base.buffers)


@dataclass
class _Output(Generator):
    """Changes of the base's outputs, sized on tune so that the members' mean loss rises by target_epsilon / 4."""

    target_epsilon: float = 0.05
    control = True

    def __post_init__(self) -> None:
        if self.target_epsilon <= 0:
            raise UserError(f"generator.target_epsilon={self.target_epsilon} must be positive")

    def _set(self, problem: Problem, change: str, seed: int, values: Callable[[float], Tensor]) -> ModelSet:
        """Return the base with its outputs changed by `values(size)` [member], size chosen on tune."""

        def sized(size: float) -> OutputSet:
            return OutputSet(
                size=problem.members,
                shared_params=problem.base.params,
                shared_buffers=problem.base.buffers,
                deployable=False,
                notes=["the outputs of the base are changed: no member is a weight vector (not deployable)"],
                values=values(size),
                change=change,
                seed=seed,
            )

        def rise(size: float) -> float:
            changed = sized(size).change_outputs(logits, problem.tune.images, range(problem.members))
            losses = [float(problem.loss(member, problem.tune.labels)) for member in changed]
            return sum(losses) / len(losses) - base_loss

        with problem.clock.fixed():
            logits = problem.logits(problem.base.params, problem.base.buffers, problem.tune.images)
            base_loss = float(problem.loss(logits, problem.tune.labels))
            size = _size_at(rise, self.target_epsilon / 4)
        control = sized(size)
        control.diagnostics = {"size": size, "tune_loss_rise": rise(size)}
        return control


@register_generator("temperature")
@dataclass
class Temperature(_Output):
    """Control: logits / T_k with log T_k normal; range and capacity without one changed decision."""

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Return the base at `problem.members` temperatures."""
        z = torch.cat([member_noise(seed, k, 1, problem.device) for k in range(problem.members)])
        return self._set(problem, "temperature", seed, lambda size: torch.exp(size * z))


@register_generator("logit_noise")
@dataclass
class LogitNoise(_Output):
    """Control: independent normal noise on the logits of every image; decisions change without another network."""

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Return the base with `problem.members` patterns of noise."""
        seed = derive_seed(seed, "logit noise")
        ones = torch.ones(problem.members, device=problem.device)
        return self._set(problem, "noise", seed, lambda size: size * ones)


def _size_at(rise: Callable[[float], float], target: float) -> float:
    """Return the size at which `rise` reaches `target`, by doubling and bisection (60 evaluations at most).

    Raises Diverged when no size does: a base without errors on tune whose members are all sharpened.
    """
    low, high = 0.0, 1e-3
    while not (reached := rise(high) >= target) and high < 1e3:
        low, high = high, 2 * high
    if not reached:
        raise Diverged(f"no change of the outputs raises the mean loss on tune by {target:g} nats: draw more members")
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rise(middle) < target else (low, middle)
        if math.isclose(low, high, rel_tol=1e-6):
            break
    return high
