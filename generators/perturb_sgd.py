"""Perturb and descend: a draw of a Laplace posterior, then a few steps of SGD by the recipe's objective.

`w_0 = w* + d_k`, then `v <- momentum v + g, w <- w - lr v` with g the gradient of the mean loss over a batch plus the
recipe's `a/(2N) |w|^2`: the descent takes back draws that are wider than those that stay within the tolerance on their
own. On PneumoniaMNIST such members matched geodesics at a similar price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..identity import derive_seed
from .api import Problem, register_generator
from .batchnorm import settle_batchnorm, settled_member
from .dear_members import DearMembers, Made, leaves_of
from .modelset import GaussianSet, ModelSet
from .posterior import FromPosterior, fit_posterior


@register_generator("perturb_sgd")
@dataclass
class PerturbSGD(FromPosterior):
    """Laplace draws followed by a few SGD steps on train, which take them back towards a low loss.

    steps, images, lr, momentum: of the descent (images: per step); structure, subset, batchnorm: as for laplace, with
    BatchNorm in training mode during the descent where its statistics are re-estimated after it; prior_precision,
    target_acceptance, target_epsilon: as for laplace, but tune_acceptance tries members after their descent. The
    default lr is the largest of .001, .002, .004, .008, .016 with which members of all five bases tried (BreastMNIST,
    smallcnn) reach the target acceptance: with .008 the descent itself leaves the set on one base, with .016 on all.
    """

    steps: int = 16
    images: int = 64
    lr: float = 0.004
    momentum: float = 0.9
    structure: str = "diag"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "reestimate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0 or self.images < 2:
            raise UserError("generator: steps must not be negative, images at least 2")
        if not (self.lr > 0 and math.isfinite(self.lr) and 0 <= self.momentum < 1):
            raise UserError("generator: lr must be positive, momentum in [0, 1)")

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Choose the prior precision and carry out the descents; each finished one survives a kill."""
        posterior = fit_posterior(problem, self.structure, self.subset)

        def make(precision: float, members: range) -> list[Made]:
            drawn = posterior.at(precision, seed, problem.members)
            return [self._descend(problem, drawn, k, seed) for k in members]

        def loss(made: Made) -> float:
            if bool(made["failed"]):
                return math.inf
            alone = posterior.stack([leaves_of(made, posterior)])
            return problem.tune_loss(*settled_member(problem, alone, 0, self.batchnorm, seed))

        dear = DearMembers(self, problem, posterior, seed, make, loss, "perturb and descend")
        precision, made = dear.collect()
        found = posterior.stack([leaves_of(one, posterior) for one in made])
        found.failed = [k for k, one in enumerate(made) if bool(one["failed"])]
        found.diagnostics = posterior.diagnostics(precision)
        return settle_batchnorm(problem, found, self.batchnorm, seed)

    def _descend(self, problem: Problem, drawn: GaussianSet, k: int, seed: int) -> Made:
        """Return the leaves of draw k after its descent: the base's, and `failed`, where it left the finite numbers."""
        leaves = {n: leaf.detach().clone().requires_grad_() for n, leaf in drawn.leaves(k).items()}
        buffers = {n: b.clone() for n, b in problem.base.buffers.items()}  # training mode updates them
        optimizer = torch.optim.SGD(leaves.values(), lr=self.lr, momentum=self.momentum)
        generator = torch.Generator().manual_seed(derive_seed(seed, "perturb_sgd", k))
        total = len(problem.train)
        for _ in range(self.steps):
            rows = torch.randperm(total, generator=generator)[: self.images].to(problem.device)
            logits = problem.network(
                {**drawn.shared_params, **leaves},
                buffers,
                problem.train.images[rows],
                train=self.batchnorm == "reestimate",
            )
            squares = torch.stack([leaf.square().sum() for leaf in leaves.values()]).sum()
            loss = problem.loss(logits, problem.train.labels[rows]) + problem.prior_precision / (2 * total) * squares
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        failed = not all(bool(torch.isfinite(leaf).all()) for leaf in leaves.values())
        found = {n: (drawn.mean[n] if failed else leaf).detach() for n, leaf in leaves.items()}
        return found | {"failed": torch.tensor(failed)}
