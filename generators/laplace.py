"""Laplace approximation around the base: weights drawn from N(w*, (G + a I)^-1), G the generalised Gauss-Newton matrix.

The curvatures, laplace-torch's (Daxberger et al., NeurIPS 2021) and our own, are those of `posterior`. The prior
precision a decides everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import UserError
from ..identity import added_later
from .api import Problem, register_generator
from .batchnorm import settle_batchnorm
from .ggn_products import GGN, draw
from .modelset import ModelSet, StackedSet, unflatten
from .posterior import STRUCTURES, FromPosterior, Options, fit_posterior, leaf_names
from .prior import prior_number


@register_generator("laplace")
@dataclass
class Laplace(FromPosterior):
    """Gaussian around the base: weights drawn from a Laplace approximation (diagonal, KFAC, or the exact full GGN).

    structure: diag | kron | full | lowrank (the eigenvectors of the `rank` largest eigenvalues) | matrix_free (exact
    draws by conjugate gradients, for networks too large for full; prior_precision must be a number); subset: all |
    last_layer | names of layers joined by "+"; prior_precision: tune_acceptance (the widest posterior of whose draws
    target_acceptance stay within target_epsilon of the base's loss on tune), tune_loss (the best predictive loss on
    tune), marglik (marginal likelihood), or a number; batchnorm: keep | reestimate; engine: auto | laplace_torch |
    native; kfac_approx: expand | reduce; mc_samples: labels drawn per image instead of the exact curvature (0: exact).
    """

    structure: str = "diag"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "reestimate"
    engine: str = added_later("auto")
    kfac_approx: str = added_later("expand")
    mc_samples: int = added_later(0)
    rank: int = added_later(50)
    structures: ClassVar[tuple[str, ...]] = (*STRUCTURES, "lowrank", "matrix_free")

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = self.fitting
        if self.engine == "laplace_torch" and fitting.engines(self.structure) == ("native",):
            raise UserError(f"generator.engine=laplace_torch has no structure={self.structure}: use engine=native")
        if self.structure == "matrix_free" and prior_number(self.prior_precision) is None:
            raise UserError(
                f"generator.prior_precision={self.prior_precision} with structure=matrix_free, of which every "
                "draw costs passes over train: give a number, such as the one that structure=lowrank finds"
            )

    @property
    def fitting(self) -> Options:
        """Return how the curvature is fitted."""
        return Options(self.engine, self.kfac_approx, self.mc_samples, self.rank)

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Fit the curvature, choose the prior precision, and return the Gaussian's draws."""
        if self.structure == "matrix_free":
            return settle_batchnorm(problem, self._matrix_free(problem, seed), self.batchnorm, seed)
        posterior = fit_posterior(problem, self.structure, self.subset, self.fitting)
        precision = self.choose(problem, posterior, seed)
        drawn = posterior.at(precision, seed, problem.members)
        drawn.diagnostics = posterior.diagnostics(precision)
        drawn.notes = list(posterior.notes)
        return settle_batchnorm(problem, drawn, self.batchnorm, seed)

    def _matrix_free(self, problem: Problem, seed: int) -> StackedSet:
        """Return draws by conjugate gradients; finished ones survive a kill."""
        names = leaf_names(problem.module(), self.structure, self.subset, "native")
        varied = {n: problem.base.params[n] for n in names}
        with problem.clock.fixed():
            ggn = GGN(problem, names)
        members, iterations = [], []
        for k in problem.progress(range(problem.members), "conjugate gradients", problem.members):
            done = problem.checkpoint.load(f"member {k}")
            if done is None:
                with problem.clock.marginal():
                    drawn = draw(ggn, float(self.prior_precision), seed, k)
                done = {"deviation": drawn.deviation, "iterations": torch.tensor(drawn.iterations)}
                problem.checkpoint.save(f"member {k}", done)
            moved = unflatten(done["deviation"].to(problem.device), varied)
            members.append({n: leaf + moved[n] for n, leaf in varied.items()})
            iterations.append(int(done["iterations"]))
        return StackedSet(
            size=len(members),
            shared_params={n: p for n, p in problem.base.params.items() if n not in varied},
            shared_buffers=dict(problem.base.buffers),
            params={n: torch.stack([leaves[n] for leaves in members]) for n in names},
            diagnostics={
                "prior_precision": float(self.prior_precision),
                "iterations": sum(iterations) / len(iterations),
                "weights_varied": ggn.size,
            },
        )
