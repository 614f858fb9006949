"""Surfaces for tests of integrators: formulas, a smooth convolutional network, and others that watch or break one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.geodesic import Surface
from torch import Tensor


@dataclass
class Formula:
    """The graph of a smooth function from weights [member, param] to [member], differentiated automatically."""

    function: Callable[[Tensor], Tensor]
    size: int

    def value(self, weights: Tensor) -> Tensor:
        return self.function(weights).double()

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient, _ = self._differentiate(weights)
        return value.detach(), gradient.detach()

    def curvature(self, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, leaf = self._differentiate(weights)
        (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        return value.detach(), gradient.detach(), (product.double() * direction.double()).sum(1)

    def _differentiate(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = weights.detach().requires_grad_()
        value = self.function(leaf) + 0 * (leaf**2).sum(1)  # constants and lines are functions, too
        (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        return value.double(), gradient, leaf


def smooth_cnn(part: Part, filters: int = 2, classes: int = 2) -> Formula:
    """Return the summed loss of two 3 x 3 convolutions with tanh and a linear layer, without a crease anywhere."""
    images, labels = part.images.double() / 127.5 - 1, part.labels
    shapes = [(filters, 1, 3, 3), (filters, filters, 3, 3), (classes, filters)]
    sizes = [int(torch.tensor(shape).prod()) for shape in shapes]

    def loss(flat: Tensor) -> Tensor:
        first, second, last = (w.view(shape) for w, shape in zip(flat.split(sizes), shapes, strict=True))
        hidden = torch.tanh(torch.nn.functional.conv2d(images.to(flat), first, padding=1))
        hidden = torch.tanh(torch.nn.functional.conv2d(hidden, second, padding=1))
        logits = hidden.mean((2, 3)) @ last.T
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    return Formula(torch.vmap(loss), sum(sizes))


@dataclass
class Counting:
    """Another surface, with a count of the rows it was evaluated for and the dtypes of their weights."""

    surface: Surface
    gradients: int = 0
    curvatures: int = 0
    values: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def size(self) -> int:
        return self.surface.size

    def value(self, weights: Tensor) -> Tensor:
        self.values += len(weights)
        self.dtypes.add(weights.dtype)
        return self.surface.value(weights)

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        self.gradients += len(weights)
        self.dtypes.add(weights.dtype)
        return self.surface.gradient(weights)

    def curvature(self, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.curvatures += len(weights)
        self.dtypes |= {weights.dtype, direction.dtype}
        return self.surface.curvature(weights, direction)


@dataclass
class Cliff:
    """Another surface that is not a number beyond a distance from the origin."""

    surface: Surface
    radius: float

    @property
    def size(self) -> int:
        return self.surface.size

    def _break(self, weights: Tensor, *found: Tensor) -> list[Tensor]:
        beyond = torch.linalg.vector_norm(weights, dim=1) > self.radius
        return [torch.where(beyond if f.ndim == 1 else beyond[:, None], torch.nan, f) for f in found]

    def value(self, weights: Tensor) -> Tensor:
        return self._break(weights, self.surface.value(weights))[0]

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self._break(weights, *self.surface.gradient(weights))
        return value, gradient

    def curvature(self, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, curved = self._break(weights, *self.surface.curvature(weights, direction))
        return value, gradient, curved
