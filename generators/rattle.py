"""RATTLE on the loss surface: geodesics from gradients alone (Andersen 1983; Hairer, Lubich, Wanner 2006, VII.1.4).

A geodesic is the free motion of a particle that is held on the surface y = tau L(w) in the space of (w, y). One step of
length h from (w, y) with velocity (u, nu), along the normal G = (-tau g, 1):

    w+ = w + h u + m tau g,  y+ = y + h nu - m,  m such that y+ = tau L(w+)       (the impulse that keeps it on)
    u  = (w+ - w) / h,  nu = (y+ - y) / h,  then projected onto the tangent space at w+

Second order, reversible, no second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .geodesic import Solution, Surface, dot
from .stepping import TINY, Motion, march, relative

SAFETY, SHRINK, GROW, FAIL = 0.85, 0.2, 2.0, 0.3
TRIALS = 5
"""Trials of the impulse; a step that needs more is too long."""

IMPULSE = 0.5
"""Largest impulse of half a step as a share of the speed: beyond it a step turns too far for its error to be seen."""

SHARE = 0.03
"""Shortest step, as a share of the time, whose error must be in proportion. At the bottom of a narrow valley the first
bends are short and steep; asking more of them would end in steps so short that rounding decides."""


@dataclass
class Rattle:
    """Adaptive RATTLE, one step size per member.

    drift: aim for the largest relative change of the speed over the path: a step of length h may change it by
    drift * h; first_step, max_step: lengths of steps; max_steps: tried steps after which a member is given up. The
    drift says nothing about a surface that bends gently: an end point is second order in the step.
    """

    drift: float = 0.01
    first_step: float = 0.5
    max_step: float = 1.0
    max_steps: int = 2000
    bounded = True

    def solve(self, surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Solution:
        """Return where members with `velocity` [member, param] get from `start` [member, param] in unit time."""
        solution = Solution.begin(start, velocity)
        state = _State.begin(surface, tau, start, velocity, min(self.first_step, self.max_step))

        def attempt(rows: Tensor, before: _State, initial: Tensor) -> tuple[_State, Tensor]:
            after, landed, solved = self._step(surface, tau, before)
            solution.gradients[rows] += landed.gradients
            solution.values[rows] += landed.values
            length = after.time - before.time
            error = relative(after.speed - before.speed, before.speed) / (self.drift * length.clamp(min=SHARE))
            growth = (SAFETY * error.clamp(min=TINY).rsqrt()).clamp(SHRINK, GROW)
            after.step = (length * torch.where(solved, growth, FAIL)).clamp(max=self.max_step)
            error = torch.where(solved, error, inf)
            state.smooth[rows] = False  # where the step is taken, what came after it says otherwise
            return after, error

        march(solution, state, self.max_steps, attempt)
        return solution

    def _step(self, surface: Surface, tau: float, s: _State) -> tuple[_State, _Landed, Tensor]:
        """Return the state after a step, how its impulse was found, and whether it was [member]."""
        h = s.length()
        path = s.speed * h
        tolerance = 0.5 * self.drift * path
        drifted = s.weights + _column(h, s) * s.velocity
        landed = _land(surface, tau, s, drifted, h * s.rise, 0.5 * h**2 * s.pull / s.steep(tau), tolerance)
        push = landed.impulse / h
        moved = s.velocity + _column(push * tau, s) * s.gradient
        normal = 1 + tau**2 * dot(landed.gradient, landed.gradient)
        off = (s.rise - push - tau * dot(landed.gradient, moved)) / normal
        # (u, nu) - G (G . (u, nu)) / |G|^2, G = (-tau g, 1)
        tangent = moved + _column(off * tau, s) * landed.gradient
        rise = tau * dot(landed.gradient, tangent)
        solved = landed.solved & (landed.impulse.abs() * s.steep(tau).sqrt() <= IMPULSE * path)
        solved &= (1 + tau**2 * dot(landed.gradient, s.gradient) > 0) & torch.isfinite(dot(tangent, tangent))
        pull = 2 * landed.impulse / h**2 * s.steep(tau)
        after = _State(
            weights=landed.weights,
            velocity=tangent,
            value=landed.value,
            speed=(dot(tangent, tangent) + rise**2).sqrt(),
            time=s.time + h,
            step=h,
            rise=rise,
            gradient=landed.gradient,
            pull=pull,
            smooth=landed.values == 0,
        )
        return after, landed, solved


@dataclass
class _State(Motion):
    """rise: y' [member]; gradient: g [member, param]; pull: minus the normal acceleration times |G|^2, from the last
    impulse [member]; smooth: whether the one before predicted it [member]."""

    rise: Tensor
    gradient: Tensor
    pull: Tensor
    smooth: Tensor

    @staticmethod
    def begin(surface: Surface, tau: float, start: Tensor, velocity: Tensor, step: float) -> _State:
        """Return the state at time 0, for the gradient at the start."""
        value, gradient = surface.gradient(start)
        rise = tau * dot(gradient, velocity)
        zeros = torch.zeros_like(rise)
        return _State(
            weights=start.clone(),
            velocity=velocity.clone(),
            value=value,
            speed=(dot(velocity, velocity) + rise**2).sqrt(),
            time=zeros.clone(),
            step=torch.full_like(rise, step),
            rise=rise,
            gradient=gradient,
            pull=zeros,
            smooth=zeros == 0,
        )

    def steep(self, tau: float) -> Tensor:
        """Return |G|^2 = 1 + tau^2 |g|^2 [member]."""
        return 1 + tau**2 * dot(self.gradient, self.gradient)


@dataclass
class _Landed:
    """Where the impulse brought some members, and the work [member] of finding it."""

    weights: Tensor
    value: Tensor
    gradient: Tensor
    impulse: Tensor
    solved: Tensor
    gradients: Tensor
    values: Tensor


def _land(
    surface: Surface, tau: float, s: _State, drifted: Tensor, rise: Tensor, impulse: Tensor, tolerance: Tensor
) -> _Landed:
    """Find m with `tau (L(drifted + m tau g) - L) - rise + m = 0`, each [member].

    Moving m by d moves the point by `d tau |g| |G|` on the surface, and not at all where the start is stationary: that,
    not what is missed, must be within the tolerance. Where the last impulse was predicted well the first trial is made
    with its gradient, which the step needs in the end; elsewhere trials take values alone, a third of the price, and
    the secant rule.
    """
    count = torch.zeros_like(impulse, dtype=torch.int64)
    landed = _Landed(
        s.weights.clone(), s.value.clone(), s.gradient.clone(), impulse.clone(), count < 0, count.clone(), count
    )
    slope = s.steep(tau)
    reach = (slope * (slope - 1)).clamp(min=0).sqrt()

    def miss(rows: Tensor, value: Tensor) -> Tensor:
        return tau * (value - s.value[rows]) - rise[rows] + landed.impulse[rows]

    def trial(rows: Tensor) -> Tensor:
        return drifted[rows] + _column(landed.impulse[rows] * tau, s) * s.gradient[rows]

    def correct(rows: Tensor, missed: Tensor) -> Tensor:
        """Correct the impulses, and return whose trial point was as good as the corrected one."""
        change = missed / slope[rows]
        landed.impulse[rows] -= change
        return (change.abs() * reach[rows] <= tolerance[rows]) | (missed.abs() <= _rounding(s, tau)[rows])

    def with_gradient(rows: Tensor) -> None:
        point = trial(rows)
        value, gradient = surface.gradient(point)
        landed.weights[rows], landed.value[rows], landed.gradient[rows] = point, value, gradient
        landed.gradients[rows] += 1
        exact = 1 + tau**2 * dot(gradient, s.gradient[rows])
        slope[rows] = torch.where(exact > 0, exact, slope[rows])
        landed.solved[rows] = correct(rows, miss(rows, value))

    if len(rows := s.smooth.nonzero()[:, 0]):
        with_gradient(rows)
    found = landed.solved.clone()
    last = torch.full_like(impulse, torch.nan), torch.full_like(impulse, torch.nan)
    for _ in range(TRIALS):
        rows = (~found & torch.isfinite(landed.impulse)).nonzero()[:, 0]
        if not len(rows):
            break
        here, missed = landed.impulse[rows].clone(), miss(rows, surface.value(trial(rows)))
        landed.values[rows] += 1
        secant = (missed - last[1][rows]) / (here - last[0][rows])
        usable = (secant > 0.05 * slope[rows]) & (secant < 20 * slope[rows])  # also false for the first trial's NaN
        slope[rows] = torch.where(usable, secant, slope[rows])
        last[0][rows], last[1][rows] = here, missed
        found[rows] = correct(rows, missed)
    if len(rows := (found & ~landed.solved).nonzero()[:, 0]):
        with_gradient(rows)
    landed.solved &= torch.isfinite(landed.value)
    return landed


def _column(values: Tensor, s: _State) -> Tensor:
    """Return [member] as a column in the dtype of the weights."""
    return values[:, None].to(s.weights.dtype)


def _rounding(s: _State, tau: float) -> Tensor:
    """Return the rounding error of tau (L(w+) - L(w)) [member], below which the impulse cannot be found."""
    return 0.5 * torch.finfo(s.weights.dtype).eps * tau * (1 + s.value.abs())
