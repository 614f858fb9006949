"""Geodesics of the loss surface: what an integrator is given, and what it returns.

A network's weights w lie on the surface y = tau L(w), L the *sum* of the losses over the metric's images. The metric it
inherits from the space around it is `M(w) = I + tau^2 g g'`, g = dL/dw, and a geodesic is free motion on it (Bergamin,
Moreno-Munoz, Hauberg, Arvanitidis, NeurIPS 2023, eq. 6, with a temperature tau):
`c'' = -tau^2 g (c' H c') / (1 + tau^2 |g|^2)`, c(0) = w*, c'(0) = v.

Two facts check every solve. The speed `sqrt(|c'|^2 + tau^2 (g . c')^2)` is conserved; its largest relative change along
the way is the *drift*. And the surface is nowhere higher than the path is long:
`L(c(1)) - L(c(0)) <= speed(0) / tau`, the *bound*, which holds for the loss that the metric is made of and no other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


class Surface(Protocol):
    """A scalar function L of flat weights, for many members at once, in the dtype of the weights it is given.

    size: the number of weights. Values are float64 [member] whatever the dtype of the weights.
    """

    size: int

    def value(self, weights: Tensor) -> Tensor:
        """Return L [member] at weights [member, param]."""
        ...

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return L [member] and its gradient g [member, param]."""
        ...

    def curvature(self, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return L [member], g [member, param] and d' H d [member] for directions d [member, param]."""
        ...


@dataclass
class Solution:
    """End points of geodesics, one per member, and what they cost.

    weights: c(1) [member, param]; velocity: c'(1) [member, param]; reached: whether the end was reached with finite
    numbers, bool [member]; drift: largest relative change of the speed [member], float64; gradients: evaluations of L
    with its gradient; curvatures: those with c' H c' as well; values: those of L alone; steps: accepted; rejected:
    steps tried in vain (all int64 [member]; the gradient at the start, which members share, is not counted); value: L
    at c(1), where the integrator knows it [member] float64, else NaN; sd: numerical standard deviation of a weight of
    c(1), where the integrator estimates one [member] float64, else NaN.
    """

    weights: Tensor
    velocity: Tensor
    reached: Tensor
    drift: Tensor
    gradients: Tensor
    curvatures: Tensor
    values: Tensor
    steps: Tensor
    rejected: Tensor
    value: Tensor
    sd: Tensor

    @staticmethod
    def begin(start: Tensor, velocity: Tensor) -> Solution:
        """Return the solution at time 0: nothing done, nothing reached."""
        members, device = len(start), start.device
        zeros = torch.zeros(members, dtype=torch.float64, device=device)
        count = torch.zeros(members, dtype=torch.int64, device=device)
        return Solution(
            weights=start.clone(),
            velocity=velocity.clone(),
            reached=torch.zeros(members, dtype=torch.bool, device=device),
            drift=zeros,
            gradients=count.clone(),
            curvatures=count.clone(),
            values=count.clone(),
            steps=count.clone(),
            rejected=count.clone(),
            value=torch.full_like(zeros, torch.nan),
            sd=torch.full_like(zeros, torch.nan),
        )

    def replaced(self, index: Tensor, other: Solution) -> Solution:
        """Return the solution with the members at `index` solved again as `other`, whose work comes on top."""
        merged = {}
        for f in fields(self):
            merged[f.name] = getattr(self, f.name).clone()
            new = getattr(other, f.name).to(merged[f.name].dtype)
            work = f.name in ("gradients", "curvatures", "values", "steps", "rejected")
            merged[f.name][index] = merged[f.name][index] + new if work else new
        return Solution(**merged)


class Integrator(Protocol):
    """Solves geodesics from time 0 to 1, each member with step sizes of its own.

    A member that leaves the finite numbers, or runs out of `max_steps`, stops with `reached` false; nothing is raised.
    bounded: whether the members stay on the surface, so that the bound holds to the drift.
    """

    bounded: bool

    def solve(self, surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Solution:
        """Return where members with `velocity` [member, param] get from `start` [member, param] in unit time."""
        ...


def speed(velocity: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """Return sqrt(|v|^2 + tau^2 (g . v)^2) [member] in float64: the speed on the surface."""
    along = dot(gradient, velocity)
    return (dot(velocity, velocity) + tau**2 * along**2).sqrt()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products [member] of [member, param], summed in float64."""
    return torch.linalg.vecdot(a.double(), b.double())
