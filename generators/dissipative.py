"""Dissipative motion on the loss surface: thrown from the base, pulled down, slowed until it rests near the bottom.

A particle starts at the base with a velocity drawn from a Laplace posterior and moves on the surface y = tau L(w) under
gravity along y and friction, g = dL/dw:

    c'' = -tau g (tau c' H c' + gravity) / (1 + tau^2 |g|^2) - friction c',   c(0) = w*,   c'(0) = v

Without forces this is a geodesic. With them the energy `E = speed^2 / 2 + gravity tau L` only falls,
`dE/dt = -friction speed^2`, and after a time of some 1 / friction the particle has gone as far as a geodesic does in a
unit of time and lies lower. L is the objective whose minima are meant: the loss as it is, with the prior of the
training, `a/2 |w|^2`.

Ours, after DiMS (Jacobsen, Jakobsen, Gegenfurtner, Arvanitidis, "Don't Stop Me Yet: Sampling Loss Minima via
Dissipative Riemannian Mechanics", arXiv 2605.15459): from the idea in its abstract and first principles. The paper's
equations and settings were not at hand, hence the other name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..identity import derive_seed
from .api import Problem, register_generator
from .batchnorm import settle_batchnorm, settled_member
from .dear_members import DearMembers, Made, leaves_of, plain_number
from .geodesic import Surface, dot, speed
from .modelset import ModelSet
from .posterior import FromPosterior, fit_posterior
from .rattle import Rattle
from .surface import NetworkSurface, metric_part


@register_generator("dissipative")
@dataclass
class Dissipative(FromPosterior):
    """Laplace velocities, then motion on the loss surface with gravity and friction (after DiMS).

    tau: of the surface y = tau L (null: 1/N); metric_images: of the surface (all where there are fewer); gravity,
    friction, duration: of the motion; kicks: of either, with free motion in between; drift: aimed at, of the speed in
    the free motion; structure, subset, prior_precision, target_acceptance, target_epsilon, batchnorm: as for laplace,
    the prior precision of the velocities being tuned on the members themselves. After the default
    duration friction has left exp(-8) of the kinetic energy of a particle that nothing pulls. More gravity takes it
    lower, and needs more kicks.
    """

    tau: float | None = None
    metric_images: int = 128
    gravity: float = 0.5
    friction: float = 1.0
    duration: float = 4.0
    kicks: int = 16
    drift: float = 0.01
    structure: str = "full"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        forces = {"gravity": self.gravity, "friction": self.friction, "tau": self.tau or 0.0}
        for name, value in forces.items():
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"generator.{name}={value} must be a finite number of at least 0")
        for name, value in {"duration": self.duration, "drift": self.drift}.items():
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"generator.{name}={value} must be a positive number")
        if self.metric_images < 1 or self.kicks < 1:
            raise UserError("generator: metric_images and kicks must be at least 1")

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Choose the prior precision of the velocities and let the particles go; finished ones survive a kill."""
        posterior = fit_posterior(problem, self.structure, self.subset)
        tau = 1 / len(problem.train) if self.tau is None else float(self.tau)
        images = metric_part(problem, self.metric_images, derive_seed(seed, "metric images"))
        surface = NetworkSurface(problem, posterior.names, images, prior=problem.prior_precision, strategy="loop")
        start = surface.origin.to(problem.base.params[posterior.names[0]].dtype)
        with problem.clock.fixed():
            surface.remember(start)
        motion = ForcedMotion(self.gravity, self.friction, self.duration, self.kicks, self.drift)

        def make(precision: float, members: range) -> list[Made]:
            drawn = posterior.at(precision, seed, problem.members)
            return [one(drawn.perturbation(k).to(start)) for k in members]

        def one(velocity: Tensor) -> Made:
            rest = motion.solve(surface, tau, start, velocity)
            number = lambda x: torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)  # noqa: E731
            about = {n: number(value) for n, value in vars(rest).items() if n != "weights"}
            leaves = surface.leaves(rest.weights if rest.reached else start)
            return {n: leaf.detach().clone() for n, leaf in leaves.items()} | about

        def loss(made: Made) -> float:
            if not bool(made["reached"]):
                return math.inf
            alone = posterior.stack([leaves_of(made, posterior)])
            return problem.tune_loss(*settled_member(problem, alone, 0, self.batchnorm, seed))

        dear = DearMembers(self, problem, posterior, seed, make, loss, "motion with friction")
        precision, made = dear.collect()
        found = posterior.stack([leaves_of(one, posterior) for one in made])
        found.failed = [k for k, one in enumerate(made) if not bool(one["reached"])]
        found.diagnostics = posterior.diagnostics(precision) | {
            "tau": tau,
            "metric_images": len(images),
            "failed": len(found.failed),
            "members": {n: [plain_number(one[n]) for one in made] for n in (*COUNTS, *ENERGIES)},
        }
        return settle_batchnorm(problem, found, self.batchnorm, seed)


COUNTS = "gradients", "values", "steps", "rejected"
ENERGIES = "kinetic", "change", "missing"
"""What is reported of each member; see `Rest`."""


@dataclass
class Rest:
    """Where a particle is in the end, and what became of its energy.

    weights: [param]; reached: whether the motion came to its end with finite numbers; kinetic: kinetic energy left, and
    missing: what the energy balance misses, both as shares of the kinetic energy at the start; change: of L; gradients,
    values, steps, rejected: work of the free motion, the gradient at the start aside.
    """

    weights: Tensor
    reached: bool
    kinetic: float
    missing: float
    change: float
    gradients: int
    values: int
    steps: int
    rejected: int


@dataclass
class ForcedMotion:
    """Motion of one particle on a surface with gravity and friction, by splitting: kicks, and free motion by RATTLE.

    Half a kick, free motion over h = duration / kicks, half a kick. Friction makes exp(-friction h) u of a velocity u,
    gravity `u - h gravity tau g / (1 + tau^2 |g|^2)`; friction comes first and last. Second order in h, and stable
    where the oscillation at the bottom of a valley, `sqrt(gravity tau q)` with a curvature q of L, stays below 2 / h.
    """

    gravity: float
    friction: float
    duration: float
    kicks: int
    drift: float

    def solve(self, surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Rest:
        """Return where a particle with `velocity` [param] comes to from `start` [param]."""
        h, seen = self.duration / self.kicks, _LastGradient(surface)
        kept = math.exp(-0.5 * self.friction * h)
        free = Rattle(drift=self.drift, first_step=1.0)
        w, u = start[None], velocity[None]
        value, gradient = seen.gradient(w)
        before, lost, first = float(speed(u, gradient, tau)) ** 2, 0.0, float(value)
        work, reached = dict.fromkeys(COUNTS, 0), math.isfinite(before)
        for _ in range(self.kicks if reached else 0):
            lost += (1 - kept**2) * float(speed(u, gradient, tau)) ** 2
            u = self._pulled(kept * u, gradient, tau, h / 2)
            found = free.solve(seen, tau, w, h * u)
            work = {n: count + int(getattr(found, n)) for n, count in work.items()}
            if not bool(found.reached):
                reached = False
                break
            w = found.weights
            value, gradient = seen.gradient(w)
            u = self._pulled(found.velocity / h, gradient, tau, h / 2)
            lost += (1 - kept**2) * float(speed(u, gradient, tau)) ** 2
            u = kept * u
        after, change = float(speed(u, gradient, tau)) ** 2, float(value) - first
        missing = after + lost - before + 2 * self.gravity * tau * change
        scale = max(before, 1e-300)
        return Rest(w[0], reached and math.isfinite(after), after / scale, missing / scale, change, **work)

    def _pulled(self, velocity: Tensor, gradient: Tensor, tau: float, h: float) -> Tensor:
        """Return the velocity [1, param] after gravity has pulled for a time h, along the surface."""
        fall = h * self.gravity * tau / (1 + tau**2 * dot(gradient, gradient))
        return velocity - fall[:, None].to(velocity) * gradient


class _LastGradient:
    """A surface that knows the gradient that it gave last: free motion begins where the last one ended."""

    def __init__(self, surface: Surface) -> None:
        self.surface, self.size = surface, surface.size
        self.value, self.curvature = surface.value, surface.curvature
        self.at: Tensor | None = None

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return L [member] and its gradient [member, param]."""
        if self.at is None or not torch.equal(self.at, weights):
            self.at, self.found = weights.clone(), self.surface.gradient(weights)
        return self.found[0].clone(), self.found[1].clone()
