"""Ray exit: along each draw of a Laplace posterior, the point where the loss on tune leaves the tolerance.

Member k is `w* + s_k d_k`, d_k the deviation of draw k and s_k the length at which the loss on tune first reaches the
base's plus target_epsilon: the march outwards takes steps of a factor of sqrt(2), so that an excursion between two
steps is missed, and the step that crosses is bisected. A rival for geodesics, which bend where a ray goes straight on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .api import Problem, register_generator
from .batchnorm import settle_batchnorm, settled_member
from .modelset import ModelSet
from .posterior import FromPosterior, Posterior, fit_posterior

SHORTEST, FIRST, LONGEST = 2.0**-20, 2.0**-4, 2.0**10
"""Lengths in units of the draw: below the first a ray starts outside, at the last one it is given up."""

FACTOR, PRECISE = 2**0.5, 1e-3


@register_generator("ray_exit")
@dataclass
class RayExit(FromPosterior):
    """Laplace draws prolonged to where the loss on tune leaves the tolerance: the edge of the set, by construction.

    structure, subset, prior_precision, target_acceptance, batchnorm: of the draws, as for laplace (the prior precision
    shapes the directions, for lengths are found anew); target_epsilon: rise of the loss on tune at which a ray ends, in
    nats.
    """

    structure: str = "diag"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "reestimate"

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Find the length of every ray; each one found survives a kill."""
        posterior = fit_posterior(problem, self.structure, self.subset)
        precision = self.choose(problem, posterior, seed)
        drawn = posterior.at(precision, seed, problem.members)
        limit = problem.tune_loss(problem.base.params, problem.base.buffers) + self.target_epsilon
        lengths, members = [], []
        for k in problem.progress(range(problem.members), "ray exit", problem.members):
            deviation = drawn.perturbation(k)
            done = problem.checkpoint.load(f"length {k}")
            if done is None:
                with problem.clock.marginal():
                    length = self._length(problem, posterior, deviation, limit, seed)
                done = {"length": torch.tensor(length, dtype=torch.float64)}
                problem.checkpoint.save(f"length {k}", done)
            lengths.append(float(done["length"]))
            members.append(posterior.moved(lengths[-1] * deviation))
        found = posterior.stack(members)
        found.notes.append("members lie at the edge of the tolerance on tune by construction")
        found.diagnostics = posterior.diagnostics(precision) | {
            "length_min": min(lengths),
            "length_mean": sum(lengths) / len(lengths),
            "length_max": max(lengths),
            "rays_without_exit": sum(length >= LONGEST for length in lengths),
        }
        return settle_batchnorm(problem, found, self.batchnorm, seed)

    def _length(self, problem: Problem, posterior: Posterior, deviation: Tensor, limit: float, seed: int) -> float:
        def inside(length: float) -> bool:
            member = posterior.stack([posterior.moved(length * deviation)])
            return problem.tune_loss(*settled_member(problem, member, 0, self.batchnorm, seed)) <= limit

        return exit_length(inside)


def exit_length(inside: Callable[[float], bool]) -> float:
    """Return the length at which a ray leaves, to a thousandth and from inside; LONGEST where it never does.

    A ray whose very start is outside (re-estimated BatchNorm statistics are not the base's) has length 0.
    """
    within, beyond = 0.0, FIRST
    while inside(beyond):
        if beyond >= LONGEST:
            return LONGEST
        within, beyond = beyond, min(beyond * FACTOR, LONGEST)
    while beyond - within > max(PRECISE * beyond, SHORTEST):
        middle = 0.5 * (within + beyond)
        within, beyond = (middle, beyond) if inside(middle) else (within, middle)
    return within
