"""The Fisher metric: geodesics for which a Gaussian target comes out exactly (RLA-F).

Yu, Hartmann, Williams, Girolami, Klami (AISTATS 2024, arXiv 2311.02766) replace the metric of the loss surface by the
Fisher information of the training labels plus the prior precision, `M(w) = sum_i J_i' H_i J_i + a I`. The probabilities
of a categorical are a point 2 sqrt(p) on a sphere, where Fisher-Rao distances are lengths (Amari, Nagaoka 2000, 2.3):

    M = J'J + a I,   J = d psi / dw,   psi(w) = 2 sqrt(N / n) sqrt(p_c(x_i; w)),   images i = 1 .. n, classes c

so that M is inherited from the flat space of (psi(w), sqrt(a) w), as the metric of the loss surface is from (w, tau L).
Geodesics accelerate in that space along normals alone, `J'(J c'' + psi''[c', c']) + a c'' = 0`:

    c'' = -M^-1 J' psi''[c', c'] = -J' (J J' + a I)^-1 psi''[c', c'],   c(0) = w*,   c'(0) = v ~ N(0, M(w*)^-1)

with psi'' by forward over forward differentiation. M(w*) with all training images is the exact full GGN with the prior:
v is a Laplace draw. `sqrt(c'M c')` is conserved, except at the creases of ReLU and max-pooling, to which psi'' is
blind: there the drift says how far a path is from a geodesic, and a smaller tolerance does not help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .api import Part, Problem
from .dormand_prince import Bend, DormandPrince
from .geodesic import Solution, dot
from .jacobian import jacobian
from .modelset import Leaves, unflatten

ENTRIES = 2**21
"""Entries of J above which a right-hand side takes seconds: it is differentiated and its Gram matrix solved in each."""


def fisher_obstacle(problem: Problem, names: list[str], images: int) -> str | None:
    """Return the reason why the Fisher metric is too large for these leaves and so many images, or None."""
    rows = images * problem.classes * (2 if problem.task == "multilabel" else 1)
    size = sum(problem.base.params[n].numel() for n in names)
    if rows * size <= ENTRIES:
        return None
    return f"the Fisher metric has {rows:,} rows of {size:,} weights (limit {ENTRIES:,} entries): use metric=loss"


@dataclass
class EmbeddingMetric:
    """The metric J'J + precision I of an embedding psi: weights [param] -> [row], with J = d psi / dw.

    precision may be 0 only where J has at least as many independent rows as there are weights.
    """

    psi: Callable[[Tensor], Tensor]
    precision: float
    integrator: DormandPrince = field(default_factory=lambda: DormandPrince(rtol=1e-3, atol=0.0))

    def solve(self, start: Tensor, velocity: Tensor) -> Solution:
        """Return where members with `velocity` [member, param] get from `start` [member, param] in unit time.

        Computed in float64, returned in the dtype of `start`. curvatures: accelerations.
        """
        solution = self.integrator.integrate(self, start.double(), velocity.double())
        solution.weights, solution.velocity = solution.weights.to(start), solution.velocity.to(start)
        solution.value = torch.full_like(solution.value, torch.nan)
        return solution

    def matrix(self, weights: Tensor) -> Tensor:
        """Return M [param, param] at weights [param]."""
        rows = self.jacobians(weights[None])[0]
        return rows.T @ rows + self.precision * torch.eye(len(weights)).to(rows)

    def bend(self, weights: Tensor, velocity: Tensor) -> Bend:
        """Return the acceleration, through the smaller of the two Gram matrices."""
        rows, bent = self.jacobians(weights), self.second(weights, velocity)[:, :, None]
        _, count, size = rows.shape
        ridge = self.precision * torch.eye(min(count, size)).to(rows)
        if count < size:
            moved = rows.mT @ torch.linalg.solve(rows @ rows.mT + ridge, bent)
        else:
            moved = torch.linalg.solve(rows.mT @ rows + ridge, rows.mT @ bent)

        def length(vectors: Tensor) -> Tensor:
            across = (rows @ vectors[:, :, None])[:, :, 0]
            return (dot(across, across) + self.precision * dot(vectors, vectors)).sqrt()

        # Rounding is as large in the directions that the metric stretches most.
        most = (rows.square().sum((1, 2)) + self.precision).sqrt() * torch.linalg.vector_norm(velocity, dim=1)
        noise = torch.finfo(rows.dtype).eps * torch.where(most > 0, most / length(velocity), 0.0)
        return Bend(-moved[:, :, 0], length, noise, torch.zeros_like(noise))

    def jacobians(self, weights: Tensor) -> Tensor:
        """Return J [member, row, param] at weights [member, param]."""
        return torch.func.vmap(torch.func.jacrev(self.psi))(weights)

    def second(self, weights: Tensor, velocity: Tensor) -> Tensor:
        """Return psi''[c', c'] [member, row]."""
        return torch.func.vmap(self._second)(weights, velocity)

    def _second(self, weights: Tensor, velocity: Tensor) -> Tensor:
        def slope(w: Tensor) -> Tensor:
            return torch.func.jvp(self.psi, (w,), (velocity,))[1]

        return torch.func.jvp(slope, (weights,), (velocity,))[1]


class FisherMetric(EmbeddingMetric):
    """The Fisher metric of a network's labels on some images, scaled to all training images, and of the prior.

    names: of the leaves that vary, in the order of flat weights; part: the metric's images; precision: of the prior. A
    missing label of a multi-label task (-1) says nothing, and all count 1 / labels, as in the loss.
    """

    def __init__(self, problem: Problem, names: list[str], part: Part, precision: float) -> None:
        self.problem = replace(problem, base=problem.base.in_dtype(torch.float64))
        self.names, self.part = names, part
        self.scale = (len(problem.train) / len(part)) ** 0.5
        super().__init__(self._embed, precision)

    def jacobians(self, weights: Tensor) -> Tensor:
        """Return J [member, row, param], image by image in reverse mode."""
        return torch.stack([self._jacobian(w) for w in weights])

    def second(self, weights: Tensor, velocity: Tensor) -> Tensor:
        """Return psi''[c', c'] [member, row], member by member: vectorised convolutions are slow on a CPU."""
        return torch.stack([self._second(*row) for row in zip(weights, velocity, strict=True)])

    def _jacobian(self, weights: Tensor) -> Tensor:
        params = {**self.problem.base.params, **self._leaves(weights)}
        of_logits = jacobian(self.problem, self.names, self.part.images, params)
        logits = self.problem.logits(params, self.problem.base.buffers, self.part.images)
        of_points = torch.func.vmap(torch.func.jacrev(self._point))(logits, self.part.labels)
        return (self.scale * of_points @ of_logits).flatten(0, 1)

    def _embed(self, weights: Tensor) -> Tensor:
        params = {**self.problem.base.params, **self._leaves(weights)}
        logits = self.problem.network(params, self.problem.base.buffers, self.part.images)
        return self.scale * torch.func.vmap(self._point)(logits, self.part.labels).flatten()

    def _point(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the point [row] of one image's probabilities on its sphere (its spheres, of several labels)."""
        if self.problem.task != "multilabel":
            return 2 * (0.5 * logits.log_softmax(-1)).exp()
        known = ((labels >= 0).to(logits) / labels.shape[-1]).sqrt()
        sides = torch.cat([-logits, logits])
        return 2 * torch.cat([known, known]) * (-0.5 * torch.logaddexp(torch.zeros_like(sides), sides)).exp()

    def _leaves(self, weights: Tensor) -> Leaves:
        return unflatten(weights, {n: self.problem.base.params[n] for n in self.names})
