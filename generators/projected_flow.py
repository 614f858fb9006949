"""Projected flow: straight steps along the surface's tangent, at one gradient per step. A heuristic.

A particle in the space of (w, y) carries its velocity (c', y') through a step of length h and is turned into the
tangent space where it lands, with the normal G = (-tau g, 1) there:

    c+ = c + h c',   (c', y')+ = (c', y') - G (G . (c', y')) / |G|^2, rescaled to the conserved speed

It is RATTLE without the impulse that keeps y on the surface: y is forgotten, and the error is of first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geodesic import Solution, Surface, dot, speed


@dataclass
class ProjectedFlow:
    """Fixed steps with one gradient each; a heuristic, no geodesic.

    It breaks the bound: a step of length h speed along the tangent may rise by more than h speed on the surface, and
    nothing brings it back. The speed is conserved by force, so that the drift is rounding and says nothing about
    the error.

    steps: number of steps in unit time.
    """

    steps: int = 16
    bounded = False

    def solve(self, surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Solution:
        """Return where members with `velocity` [member, param] get from `start` [member, param] in unit time."""
        solution = Solution.begin(start, velocity)
        _, gradient = surface.gradient(start)
        rise = tau * dot(gradient, velocity)
        initial = speed(velocity, gradient, tau)
        rows = torch.isfinite(initial).nonzero()[:, 0]
        for _ in range(self.steps):
            if not len(rows):
                break
            weights = solution.weights[rows] + solution.velocity[rows] / self.steps
            value, gradient = surface.gradient(weights)
            solution.gradients[rows] += 1
            turned = _project(solution.velocity[rows], rise[rows], gradient, tau)
            # Nothing moves: nothing is rescaled.
            scale = torch.where(initial[rows] > 0, initial[rows] / speed(turned, gradient, tau), 1.0)
            turned = scale[:, None].to(turned) * turned
            change = torch.where(initial[rows] > 0, (speed(turned, gradient, tau) / initial[rows] - 1).abs(), 0.0)
            finite = torch.isfinite(dot(turned, turned)) & torch.isfinite(change)
            rows = rows[finite]
            solution.weights[rows], solution.velocity[rows] = weights[finite], turned[finite]
            solution.value[rows] = value[finite]
            rise[rows] = tau * dot(gradient, turned)[finite]
            solution.drift[rows] = torch.maximum(solution.drift[rows], change[finite])
            solution.steps[rows] += 1
        solution.reached[rows] = True
        return solution


def _project(velocity: Tensor, rise: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """Return c' of the ambient velocity (c', y') projected onto the tangent space [member, param]."""
    off = (rise - tau * dot(gradient, velocity)) / (1 + tau**2 * dot(gradient, gradient))
    return velocity + (off * tau)[:, None].to(velocity) * gradient
