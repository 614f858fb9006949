"""The full GGN without a matrix: products `G v` over train, its largest eigenvalues, and draws by conjugate gradients.

`G v = sum_i J_i' H_i J_i v` by a forward-mode and a reverse-mode derivative per batch (Schraudolph 2002). *lowrank*:
the eigenpairs of largest eigenvalue, by implicitly restarted Lanczos (ARPACK). *matrix_free*: an exact draw of
N(0, (G + a I)^-1) solves `(G + a I) s = sum_i J_i' R_i e_i + sqrt(a) z` with e, z standard normal: the right-hand side
has covariance G + a I (perturb, then optimise: Papandreou, Yuille 2010; Antoran et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import Diverged
from ..identity import derive_seed
from .api import Problem
from .full_ggn import flat_weights, told_by
from .jacobian import hessian_root
from .modelset import Leaves, member_noise, unflatten

IMAGES = 128
TOLERANCE = 1e-2
"""Relative residual of a draw: at 1e-1 the variance of draws is 13 % too small."""

ITERATIONS = 2000


@dataclass
class GGN:
    """G on train in the leaves `names`, as a map of flat vectors [param] in the order of the leaves.

    roots: of the Hessian of every batch's loss in its logits, made once.
    """

    problem: Problem
    names: list[str]
    roots: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        base = self.problem.base
        for images, labels in self._batches():
            logits = self.problem.logits(base.params, base.buffers, images)
            self.roots.append(hessian_root(logits, labels, self.problem.task).to(logits))

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(leaf.numel() for leaf in self._varied().values())

    def __call__(self, vector: Tensor) -> Tensor:
        """Return `G v` [param]."""
        total = torch.zeros_like(vector)
        for (images, _), root in zip(self._batches(), self.roots, strict=True):
            logits = self._logits(images)
            moved = torch.func.jvp(logits, (self._varied(),), (unflatten(vector, self._varied()),))[1]
            curved = root @ (root.mT @ moved[:, :, None])
            total += self._pulled_back(images, curved[:, :, 0])
        return total

    def root_times(self, noise: list[Tensor]) -> Tensor:
        """Return `sum_i J_i' R_i e_i` [param] for e by batch, [sample, row]."""
        total = torch.zeros(self.size, device=self.problem.device)
        for (images, _), root, e in zip(self._batches(), self.roots, noise, strict=True):
            total += self._pulled_back(images, (root @ e[:, :, None])[:, :, 0])
        return total

    def _pulled_back(self, images: Tensor, cotangents: Tensor) -> Tensor:
        pull = torch.func.vjp(self._logits(images), self._varied())[1]
        (found,) = pull(cotangents)
        return torch.cat([found[n].reshape(-1) for n in self.names]).detach()

    def _logits(self, images: Tensor) -> Callable[[Leaves], Tensor]:
        base = self.problem.base
        return lambda leaves: self.problem.network({**base.params, **leaves}, base.buffers, images)

    def _varied(self) -> Leaves:
        return {n: self.problem.base.params[n].detach() for n in self.names}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        train = self.problem.train
        yield from zip(train.images.split(IMAGES), train.labels.split(IMAGES), strict=True)


def fit_lowrank(problem: Problem, names: list[str], rank: int) -> dict[str, Tensor]:
    """Return the largest eigenvalues of G as `values` [rank] float64, largest last, and `vectors` [param, rank]."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    ggn = GGN(problem, names)
    weights = flat_weights(problem, names)

    def product(vector: np.ndarray) -> np.ndarray:
        return ggn(torch.from_numpy(vector.reshape(-1)).to(weights)).double().cpu().numpy()

    operator = LinearOperator((ggn.size, ggn.size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(derive_seed("curvature", "lanczos")).standard_normal(ggn.size)
    values, vectors = eigsh(operator, k=rank, which="LA", v0=start, tol=1e-4)
    values = torch.from_numpy(values).clamp(min=0)
    return {
        "values": values.to(weights.device),
        "vectors": torch.from_numpy(np.ascontiguousarray(vectors)).to(weights),
        **told_by(values, weights),
    }


@dataclass
class Drawn:
    """A draw: its deviation [param] from the mean, and the iterations of conjugate gradients that it took."""

    deviation: Tensor
    iterations: int


def draw(ggn: GGN, precision: float, seed: int, member: int, tolerance: float = TOLERANCE) -> Drawn:
    """Return a draw of N(0, (G + precision I)^-1), which depends on (seed, member) alone."""
    device = ggn.problem.device
    noise = [
        member_noise(seed, member, root.shape[0] * root.shape[2], device, f"rows {i}").view(len(root), -1)
        for i, root in enumerate(ggn.roots)
    ]
    target = ggn.root_times(noise) + precision**0.5 * member_noise(seed, member, ggn.size, device)
    return conjugate_gradients(ggn, precision, target, tolerance)


def conjugate_gradients(ggn: GGN, precision: float, target: Tensor, tolerance: float) -> Drawn:
    """Solve `(G + precision I) s = target` to a relative residual; Diverged where rounding keeps it from that."""
    solution, residual = torch.zeros_like(target), target.clone()
    direction, squared = residual.clone(), float(residual.double().square().sum())
    limit = tolerance**2 * squared
    for iteration in range(ITERATIONS):
        if squared <= limit:
            return Drawn(solution, iteration)
        curved = ggn(direction) + precision * direction
        step = squared / float(direction.double() @ curved.double())
        solution += step * direction
        residual -= step * curved
        before, squared = squared, float(residual.double().square().sum())
        direction = residual + squared / before * direction
    raise Diverged(f"conjugate gradients did not reach a residual of {tolerance:g} in {ITERATIONS} iterations")
