"""The loss as a surface over weights in which the logits are linear: `f(w) = f0 + J (w - w*)`.

The weights of the last linear layer are such weights: the Jacobian J holds what the rest of the network makes of the
images, once and for all. For other weights this is the *linearised* network, the one that a Laplace approximation with
the GGN is exact for (Immer, Korzepa, Bauer, AISTATS 2021), and its geodesics are the linearised variant of Bergamin,
Moreno-Munoz, Hauberg, Arvanitidis (NeurIPS 2023). Either way the gradients of all members take two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .api import Part, Problem
from .jacobian import jacobian
from .modelset import member_noise
from .posterior import leaf_names
from .surface import LossSurface, NetworkSurface, Value

LIMIT = 2**30
"""Bytes of the largest Jacobian that is held (in the dtype of the base; solves in float64 hold another, twice that)."""

LINEAR = 1e-4
"""Error, relative to the largest logit, that float32 leaves in the logits of weights in which they are linear."""


@dataclass
class LinearSurface(LossSurface):
    """The loss of logits that are linear in the weights; members always run together."""

    strategy: str = "vmap"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expanded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def exact(self) -> bool:
        """Return whether the network itself is linear in the weights, as a normal deviation of sd 1 tells."""
        base = self.problem.base
        weights = self.origin.to(base.params[self.names[0]].dtype)
        weights = weights + member_noise(0, 0, self.size, weights.device, "deviation").to(weights)
        linear = self._logits(weights[None])[0].view(len(self.part), -1)
        found = self.problem.logits({**base.params, **self.leaves(weights)}, base.buffers, self.part.images)
        return bool((found - linear).abs().max() <= LINEAR * linear.abs().max())

    def _over_images(self, what: type[Value], weights: Tensor, *more: Tensor) -> list[Tensor]:
        """Evaluate the loss as a function of the logits, and pull the gradient back: g = J' dL/df."""
        rows = self._expansion(weights.dtype)[1]
        shape, total = (len(self.part), -1), len(self.problem.train)

        def loss(logits: Tensor) -> Tensor:
            return total * self.problem.loss(logits.view(shape), self.part.labels)

        along = [(direction @ rows.T).double() for direction in more]
        found = what.together(loss, self._logits(weights).double(), *along)
        return [f.to(weights.dtype) @ rows if f.ndim == 2 else f for f in found]

    def _logits(self, weights: Tensor) -> Tensor:
        """Return f [member, image x class]."""
        logits, rows = self._expansion(weights.dtype)
        return logits + (weights - self.origin.to(weights.dtype)) @ rows.T

    def _expansion(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return f0 [image x class] and J [image x class, param] at the base."""
        if dtype not in self._expanded:
            problem = replace(self.problem, base=self._in_dtype(dtype))
            logits = problem.logits(problem.base.params, problem.base.buffers, self.part.images)
            rows = jacobian(problem, self.names, self.part.images).flatten(0, 1)
            self._expanded[dtype] = logits.reshape(-1), rows
        return self._expanded[dtype]


def surface_of(problem: Problem, names: list[str], part: Part, *, linearised: bool, prior: float) -> LossSurface:
    """Return the loss surface over the leaves `names`.

    It is linear where that is asked for, and where the network is so: the leaves are those of its last linear layer,
    and a deviation of them confirms that nothing after it bends its outputs.
    """
    linear = LinearSurface(problem, names, part, prior)
    last = set(names) <= set(leaf_names(problem.module(), "diag", "last_layer"))
    if linearised or (last and linear_obstacle(problem, names, len(part)) is None and linear.exact()):
        return linear
    return NetworkSurface(problem, names, part, prior)


def linear_obstacle(problem: Problem, names: list[str], images: int) -> str | None:
    """Return that the Jacobian of that many images is too large to be held, or None."""
    leaves = [problem.base.params[n] for n in names]
    size = sum(leaf.numel() for leaf in leaves)
    needed = images * problem.classes * size * leaves[0].element_size()
    if needed <= LIMIT:
        return None
    return (
        f"the Jacobian of {images:,} images, {problem.classes} logits and {size:,} weights takes "
        f"{needed / 2**30:.1f} GiB (limit {LIMIT / 2**30:g}): use fewer images for the metric or a smaller subset"
    )
