"""Laplace approximation around the base: weights drawn from N(w*, (G + a I)^-1), G the generalised Gauss-Newton matrix.

The curvatures, laplace-torch's (Daxberger et al., NeurIPS 2021) and the exact one, are those of `posterior`. The prior
precision a decides everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from .api import Problem, register_generator
from .batchnorm import settle_batchnorm
from .modelset import ModelSet
from .posterior import FromPosterior, fit_posterior


@register_generator("laplace")
@dataclass
class Laplace(FromPosterior):
    """Gaussian around the base: weights drawn from a Laplace approximation (diagonal, KFAC, or the exact full GGN).

    structure: diag | kron | full; subset: all | last_layer | names of layers joined by "+"; prior_precision:
    tune_acceptance (the widest posterior of whose draws target_acceptance stay within target_epsilon of the base's loss
    on tune), tune_loss (the best predictive loss on tune), marglik (marginal likelihood), or a number; batchnorm:
    keep | reestimate.
    """

    structure: str = "diag"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "reestimate"

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Fit the curvature, choose the prior precision, and return the Gaussian's draws."""
        posterior = fit_posterior(problem, self.structure, self.subset)
        precision = self.choose(problem, posterior, seed)
        drawn = posterior.at(precision, seed, problem.members)
        drawn.diagnostics = posterior.diagnostics(precision)
        drawn.notes = list(posterior.notes)
        return settle_batchnorm(problem, drawn, self.batchnorm, seed)
