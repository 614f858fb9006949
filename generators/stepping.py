"""Adaptive steps along geodesics, each member with times and lengths of its own: what the integrators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .geodesic import Solution

SHORTEST = 1e-10
"""A member that needs a shorter step than this share of the way is given up."""

TINY = 1e-300
"""Least error allowed: members that do not move make none."""


@dataclass
class Motion:
    """Position and velocity [member, param], L, speed, time and next step's length [member] of some members."""

    weights: Tensor
    velocity: Tensor
    value: Tensor
    speed: Tensor
    time: Tensor
    step: Tensor

    def length(self) -> Tensor:
        """Return the length of the step to try [member]: the planned one, or what is left where that is no more."""
        left = 1 - self.time
        return torch.where(self.step >= left * (1 - 1e-9), left, self.step)

    def rows(self, index: Tensor) -> Self:
        """Return the motion of some members only."""
        return type(self)(*(leaf[index] for leaf in vars(self).values()))

    def put(self, index: Tensor, other: Self) -> None:
        """Replace the motion of some members."""
        for leaf, new in zip(vars(self).values(), vars(other).values(), strict=True):
            leaf[index] = new


def march(
    solution: Solution,
    state: Motion,
    max_steps: int,
    attempt: Callable[[Tensor, Any, Tensor], tuple[Any, Tensor]],
) -> None:
    """Move `state` to time 1, member by member, and record the path in `solution`.

    attempt: (rows, their state, their initial speed) -> their state after a step, whose `step` is the next one's
    length, and the step's error [member] as a multiple of what is allowed.
    """
    initial = state.speed.clone()
    active = torch.isfinite(state.value) & torch.isfinite(initial)
    while bool(active.any()):
        rows = active.nonzero()[:, 0]
        after, error = attempt(rows, state.rows(rows), initial[rows])
        accepted = error <= 1
        state.step[rows] = after.step
        state.put(rows[accepted], after.rows(accepted))
        solution.steps[rows] += accepted
        solution.rejected[rows] += ~accepted
        off = relative(state.speed[rows] - initial[rows], initial[rows])
        solution.drift[rows] = torch.maximum(solution.drift[rows], off)
        solution.reached |= active & (state.time >= 1 - 1e-12)
        hopeless = (solution.steps + solution.rejected >= max_steps) | (state.step < SHORTEST)
        active &= ~solution.reached & ~hopeless
    solution.weights, solution.velocity, solution.value = state.weights, state.velocity, state.value


def share_of_drift(drift: float, before: Motion, after: Motion, noise: Tensor, initial: Tensor) -> Tensor:
    """Return a step's change of the speed as a multiple of what is allowed [member]; noise: relative, by rounding.

    At time t the speed may be off by drift * t: a step may use its own share and what earlier steps have saved.
    """
    allowed = drift * after.time - relative(before.speed - initial, initial) + noise
    return relative(after.speed - before.speed, initial) / allowed.clamp(min=TINY)


def relative(change: Tensor, initial: Tensor) -> Tensor:
    """Return |change| as a share of the speed `initial` [member]; 0 where nothing moves."""
    return torch.where(initial > 0, (change / initial).abs(), 0.0)
