"""Dormand-Prince 5(4): geodesics as a first-order equation in (c, c'), the reference among the integrators.

Seven stages of which the last is the next step's first, so that a step takes six evaluations of c' H c' (Dormand,
Prince 1980; Hairer, Norsett, Wanner 1993, II.5). The last stage also holds L and the gradient at the new point, so that
the speed, and with it the drift, cost nothing.

*The norm of an error.* A mean over the weights hides a few stiff directions among many lazy ones, and so does the
largest weight when a stiff direction is spread over all of them: either sees 1/sqrt(params) of it. Errors are measured
here as the surface measures lengths, `|e|_M = sqrt(|e|^2 + tau^2 (g . e)^2)`: nothing is averaged, and the gradient,
the direction in which the equation is stiff, counts by its slope. The speed is conserved in the same norm, so the
tolerance is relative to it: `max(|e_c|_M, |e_c'|_M) <= atol + rtol speed(0)` in every step.

*Creases.* Where ReLU or max-pooling crease the loss, the gradient jumps and c' H c' is blind to it: members pass
straight on where a geodesic is refracted, at any tolerance. The speed then drifts, and a finite `drift` ends in steps
too short to go on with: on such networks take an integrator that goes by gradients alone (`rattle`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from .geodesic import Solution, Surface, dot, speed
from .stepping import TINY, Motion, march, share_of_drift

STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Weights of the earlier stages in stages 2 to 7; the last row is the solution of order 5."""

ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Order 5 minus order 4."""

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0


@dataclass
class Bend:
    """What a metric says about members at some weights with some velocity.

    acceleration: c'' of a geodesic [member, param]; length: vectors [member, param] -> their lengths [member] in the
    metric there; noise: relative rounding error of the velocity's length [member]; value: L [member], where there is
    one, else 0.
    """

    acceleration: Tensor
    length: Callable[[Tensor], Tensor]
    noise: Tensor
    value: Tensor


class Metric(Protocol):
    """A metric whose geodesics can be integrated."""

    def bend(self, weights: Tensor, velocity: Tensor) -> Bend:
        """Return what is needed of the metric at `weights` [member, param] for `velocity` [member, param]."""
        ...


@dataclass
class LossMetric:
    """The metric I + tau^2 g g' of the surface y = tau L."""

    surface: Surface
    tau: float

    def bend(self, weights: Tensor, velocity: Tensor) -> Bend:
        """Return the acceleration by one evaluation of c' H c'."""
        value, gradient, curved = self.surface.curvature(weights, velocity)
        return Bend(
            acceleration(gradient, curved, self.tau),
            lambda vectors: speed(vectors, gradient, self.tau),
            rounding(gradient, self.tau),
            value,
        )


@dataclass
class DormandPrince:
    """Adaptive Dormand-Prince 5(4), one step size per member.

    rtol, atol: tolerances of one step (see the module); drift: largest relative change of the speed over the whole
    path: at time t it may be off by drift * t; first_step, max_step: lengths of steps; max_steps: tried steps after
    which a member is given up. With tolerances of inf and first_step >= max_step all steps are max_step long.
    """

    rtol: float = 1e-6
    atol: float = 1e-6
    drift: float = inf
    first_step: float = 1.0
    max_step: float = 1.0
    max_steps: int = 1000
    bounded = True

    def solve(self, surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Solution:
        """Return where members with `velocity` [member, param] get from `start` [member, param] in unit time."""
        return self.integrate(LossMetric(surface, tau), start, velocity)

    def integrate(self, metric: Metric, start: Tensor, velocity: Tensor) -> Solution:
        """Return the same for any metric; curvatures: how often it was asked for an acceleration."""
        solution = Solution.begin(start, velocity)
        solution.curvatures += 1

        def attempt(rows: Tensor, before: Accelerated, initial: Tensor) -> tuple[Accelerated, Tensor]:
            solution.curvatures[rows] += len(STAGES)
            return self._step(metric, before, initial)

        state = Accelerated.begin(metric, start, velocity, min(self.first_step, self.max_step))
        march(solution, state, self.max_steps, attempt)
        return solution

    def _step(self, metric: Metric, s: Accelerated, initial: Tensor) -> tuple[Accelerated, Tensor]:
        """Return the state after one step, and its error as a multiple of what is allowed [member]."""
        h = s.length()
        column = h[:, None].to(s.weights)
        slopes, forces = [s.velocity], [s.acceleration]
        for row in STAGES:
            weights = s.weights + column * combine(row, slopes)
            velocity = s.velocity + column * combine(row, forces)
            bend = metric.bend(weights, velocity)
            slopes.append(velocity)
            forces.append(bend.acceleration)
        after = Accelerated(weights, velocity, bend.value, bend.length(velocity), s.time + h, h, bend.acceleration)
        errors = (bend.length(column * combine(ERROR, e)) for e in (slopes, forces))
        error = torch.maximum(*errors) / (self.atol + self.rtol * initial).clamp(min=TINY)
        share = share_of_drift(self.drift, s, after, bend.noise, initial)
        error = torch.maximum(error, share).nan_to_num(nan=inf)
        after.step = (h * (SAFETY * error**-0.2).clamp(SHRINK, GROW)).clamp(max=self.max_step)
        return after, error


@dataclass
class Accelerated(Motion):
    """A motion that knows its acceleration [member, param]."""

    acceleration: Tensor

    @staticmethod
    def begin(metric: Metric, start: Tensor, velocity: Tensor, step: float) -> Accelerated:
        """Return the motion at time 0, for one acceleration."""
        bend = metric.bend(start, velocity)
        initial = bend.length(velocity)
        # What has no finite acceleration has no speed to go on with either.
        initial = torch.where(torch.isfinite(bend.acceleration).all(1), initial, torch.nan)
        time, length = torch.zeros_like(initial), torch.full_like(initial, step)
        return Accelerated(start.clone(), velocity.clone(), bend.value, initial, time, length, bend.acceleration)


def rounding(gradient: Tensor, tau: float) -> Tensor:
    """Return to how much the speed of rounded weights is known [member], however short the step: g . c' is rounded."""
    return torch.finfo(gradient.dtype).eps * (1 + tau**2 * dot(gradient, gradient)).sqrt()


def acceleration(gradient: Tensor, curved: Tensor, tau: float) -> Tensor:
    """Return c'' = -tau^2 g (c' H c') / (1 + tau^2 |g|^2) [member, param] for c' H c' [member]."""
    pull = -(tau**2) * curved / (1 + tau**2 * dot(gradient, gradient))
    return pull[:, None].to(gradient.dtype) * gradient


def combine(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    """Return the sum of `terms` [member, param] with `weights`."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total.add_(term, alpha=weight)
    return total
