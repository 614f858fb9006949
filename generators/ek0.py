"""EK0: geodesics by a Gaussian filter, one evaluation of c' H c' per step and an error bar at the end.

Every weight is a priori a three times integrated Wiener process (c, c', c'', c'''), and a step conditions it on the
equation: c'' at the new time is the acceleration found at the predicted mean. The Jacobian of the equation is taken for
zero (*order 0*), so that all weights of a member share one 4 x 4 covariance P (Schober, Sarkka, Hennig 2019; Bosch,
Hennig, Tronarp 2021; second-order equations: Bosch, Tronarp, Hennig 2022). In Nordsieck's coordinates,
z_i = h^i c^(i) / i! for a step of length h, nothing but the mean depends on h (the preconditioning of Kramer, Hennig
2024):

    predict  z_i = sum_j binom(j, i) z_j,   P = A P A' + kappa Q,   A_ij = binom(j, i),
             Q_ij = 1 / ((7 - i - j) (3 - i)! (3 - j)! i! j!)
    correct  z = z + K r,   r = h^2/2 (acceleration at the prediction) - z_2,   K = P_:2 / P_22

*Calibration.* The diffusion kappa is the step's own: the residual's mean square over the weights / Q_22.
*Start.* c'' is the equation's, c''' a difference of accelerations a short way along the path, for one evaluation; both
count as known, P = 0 (a large variance of c''' instead would charge the first residual to the diffusion).
*Error of a step.* The sd that the step's own diffusion leaves to the velocity (to the position it leaves less), summed
over the weights as the surface measures lengths; the reasons are those of `dormand_prince`.
*Drift.* The speed where a step ends needs a gradient there: one for each step whose error is small enough.
Creases of the loss are passed as `dormand_prince` does, blindly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import comb, factorial, inf, sqrt

import torch
from torch import Tensor

from .dormand_prince import Accelerated, LossMetric, acceleration, rounding
from .geodesic import Solution, Surface, dot, speed
from .stepping import TINY, march, share_of_drift

ORDER = 3
"""How often the Wiener process is integrated: the state is c and so many derivatives."""

TRANSITION = [[float(comb(j, i)) for j in range(ORDER + 1)] for i in range(ORDER + 1)]
FACTORIALS = [float(factorial(i)) for i in range(ORDER + 1)]
NOISE = [
    [
        1 / ((2 * ORDER + 1 - i - j) * factorial(ORDER - i) * factorial(ORDER - j) * factorial(i) * factorial(j))
        for j in range(ORDER + 1)
    ]
    for i in range(ORDER + 1)
]
"""A, i! and Q of the module's formulas."""

UNKNOWN = sqrt((NOISE[1][1] - NOISE[1][2] ** 2 / NOISE[2][2]) / NOISE[2][2]) / 2
"""Sd of the velocity after the correction of a step, as a multiple of h |residual acceleration|, from kappa Q alone."""

SAFETY, SHRINK, GROW = 0.8, 0.2, 2.0

PATIENCE = 2
"""Steps tried in vain, one after the other, before c'' is evaluated anew. It belongs to the prediction of the last
step, not to its correction, and over a much shorter step that difference would pass for a huge c'''."""


@dataclass
class EK0:
    """Probabilistic filter of order 0, one step size per member.

    rtol, atol: a step's error is at most atol + rtol speed(0); drift: largest relative change of the speed over the
    whole path: at time t it may be off by drift * t; first_step, max_step: lengths of steps; max_steps: tried steps
    after which a member is given up. With tolerances of inf and first_step >= max_step all steps are max_step long.
    """

    rtol: float = 1e-3
    atol: float = 1e-6
    drift: float = inf
    first_step: float = 1.0
    max_step: float = 1.0
    max_steps: int = 2000
    bounded = True

    def solve(self, surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Solution:
        """Return where members with `velocity` [member, param] get from `start` [member, param] in unit time."""
        solution = Solution.begin(start, velocity)
        solution.curvatures += 2
        state = _begin(surface, tau, start, velocity, min(self.first_step, self.max_step))
        misses = torch.zeros_like(solution.steps)

        def attempt(rows: Tensor, before: Belief, initial: Tensor) -> tuple[Belief, Tensor]:
            stale = (misses[rows] == PATIENCE).nonzero()[:, 0]
            if len(stale):
                before.put(stale, _refresh(surface, tau, before.rows(stale)))
                state.put(rows[stale], before.rows(stale))
                solution.curvatures[rows[stale]] += 2
            after, error = self._step(surface, tau, before, initial)
            solution.curvatures[rows] += 1
            good = (error <= 1).nonzero()[:, 0]
            if len(good):
                solution.gradients[rows[good]] += 1
                share = self._look(surface, tau, before.rows(good), after, good, initial[good])
                error[good] = torch.maximum(error[good], share).nan_to_num(nan=inf)
            misses[rows] = torch.where(error <= 1, 0, misses[rows] + 1)
            growth = (SAFETY * error ** (-1 / ORDER)).clamp(SHRINK, GROW)
            after.step = ((after.time - before.time) * growth).clamp(max=self.max_step)
            return after, error

        march(solution, state, self.max_steps, attempt)
        sd = state.covariance[:, 0, 0].clamp(min=0).sqrt()
        solution.sd = torch.where(solution.reached, sd, torch.nan)
        return solution

    def _step(self, surface: Surface, tau: float, s: Belief, initial: Tensor) -> tuple[Belief, Tensor]:
        """Return the belief after one step, but for L and speed, and its error as a multiple of what is allowed."""
        h = s.length()
        column = h[:, None].to(s.weights)
        bend = s.acceleration + column * s.jerk
        velocity = s.velocity + column * (s.acceleration + column / 2 * s.jerk)
        weights = s.weights + column * (s.velocity + column / 2 * (s.acceleration + column / 3 * s.jerk))
        _, gradient, curved = surface.curvature(weights, velocity)
        found = acceleration(gradient, curved, tau)
        residual = found - bend
        covariance, gain = _condition(s.covariance, h, dot(residual, residual) / surface.size)
        gain = gain[:, :, None].to(column)
        after = Belief(
            weights=weights + gain[:, 0] * residual,
            velocity=velocity + gain[:, 1] * residual,
            acceleration=found,
            jerk=s.jerk + gain[:, 3] * residual,
            covariance=covariance,
            value=s.value.clone(),
            speed=s.speed.clone(),
            time=s.time + h,
            step=h,
        )
        error = UNKNOWN * h * speed(residual, gradient, tau) / (self.atol + self.rtol * initial).clamp(min=TINY)
        return after, error.nan_to_num(nan=inf)

    def _look(
        self, surface: Surface, tau: float, before: Belief, after: Belief, rows: Tensor, initial: Tensor
    ) -> Tensor:
        """Measure L and the speed where a step brought some rows, and return their share of the drift allowed."""
        after.value[rows], gradient = surface.gradient(after.weights[rows])
        after.speed[rows] = speed(after.velocity[rows], gradient, tau)
        return share_of_drift(self.drift, before, after.rows(rows), rounding(gradient, tau), initial)


@dataclass
class Belief(Accelerated):
    """Mean of c and its derivatives, and their covariance [member, 4, 4], which all weights of a member share."""

    jerk: Tensor
    covariance: Tensor


def _begin(surface: Surface, tau: float, start: Tensor, velocity: Tensor, step: float) -> Belief:
    """Return the belief at time 0, for two evaluations of c' H c'."""
    motion = Accelerated.begin(LossMetric(surface, tau), start, velocity, step)
    jerk = _jerk(surface, tau, motion)
    return Belief(**vars(motion), jerk=jerk, covariance=motion.speed.new_zeros(len(start), ORDER + 1, ORDER + 1))


def _refresh(surface: Surface, tau: float, s: Belief) -> Belief:
    """Return the belief with c'' and c''' known again, for two evaluations of c' H c'."""
    _, gradient, curved = surface.curvature(s.weights, s.velocity)
    motion = replace(s, acceleration=acceleration(gradient, curved, tau), covariance=s.covariance.clone())
    motion.covariance[:, 2:] = motion.covariance[:, :, 2:] = 0
    motion.jerk = _jerk(surface, tau, motion)
    return motion


def _jerk(surface: Surface, tau: float, s: Accelerated) -> Tensor:
    # Rounding and the path's own bend weigh alike in a difference over the root of the dtype's precision.
    short = torch.finfo(s.weights.dtype).eps ** 0.5
    ahead = s.weights + short * (s.velocity + short / 2 * s.acceleration)
    _, gradient, curved = surface.curvature(ahead, s.velocity + short * s.acceleration)
    return (acceleration(gradient, curved, tau) - s.acceleration) / short


def _condition(covariance: Tensor, h: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return P after a step of length h and the gains of c to its third derivative on the acceleration's residual.

    covariance: P of the derivatives [member, 4, 4]; residual: mean square over the weights [member].
    """
    order = torch.arange(ORDER + 1, device=h.device)
    scale = h[:, None] ** order / h.new_tensor(FACTORIALS)
    transition, noise = h.new_tensor(TRANSITION), h.new_tensor(NOISE)
    diffusion = scale[:, 2] ** 2 * residual / noise[2, 2]
    predicted = transition @ (covariance * scale[:, :, None] * scale[:, None]) @ transition.T
    predicted = predicted + diffusion[:, None, None] * noise
    variance = predicted[:, 2, 2, None]
    # Without a residual, now or before, there is nothing to correct.
    gain = torch.where(variance > 0, predicted[:, :, 2] / variance, 0.0)
    # Joseph's form, (I - K H) P (I - K H)': no rounding makes it indefinite.
    keep = torch.eye(ORDER + 1, dtype=h.dtype, device=h.device) - gain[:, :, None] * (order == 2)
    corrected = keep @ predicted @ keep.mT / scale[:, :, None] / scale[:, None]
    return corrected, gain * scale[:, 2, None] / scale
