"""The training loss as a surface over the weights that vary: what geodesics walk on.

`L(w) = N mean loss over the metric's images [+ a/2 |w|^2] [- g0 . (w - w*)]`: the sum over the N training images,
estimated on a fixed subset; the prior only where asked for (it collapses members to the base); and the *tilt*, which
makes the base stationary for the price of one gradient, g0 being the gradient there of all that stands before it.
Networks are evaluated in eval mode: with BatchNorm's running statistics the loss is smooth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .api import Part, Problem, Trained
from .geodesic import dot
from .modelset import Leaves, unflatten

IMAGES = 512
"""Images in one pass of a network."""

Tiltable = TypeVar("Tiltable", bound="LossSurface")


@dataclass
class LossSurface:
    """The loss as a function of some leaves of a network, however its logits depend on them.

    problem: network, loss, and the number N of training images; names: of the leaves that vary, in the order of flat
    weights; part: the metric's images; origin: w* [param] float64; prior: a; tilt: g0 [param] float64 or None;
    strategy: loop | vmap over members ("": chosen by timing at the first call with several members).
    """

    problem: Problem
    names: list[str]
    part: Part
    prior: float = 0.0
    tilt: Tensor | None = None
    strategy: str = ""
    origin: Tensor = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        base = self.problem.base.params
        self.origin = torch.cat([base[n].detach().double().reshape(-1) for n in self.names])
        self.size = len(self.origin)
        self._cast: dict[torch.dtype, Trained] = {}
        self._start: tuple[Tensor, Tensor, Tensor] | None = None

    def remember(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return L [] and g [param] at a point [param] where many geodesics start, and keep them for these."""
        self._start = None
        value, gradient = self.gradient(start[None])
        self._start = start, value, gradient
        return value[0], gradient[0]

    def leaves(self, flat: Tensor) -> Leaves:
        """Return flat weights [param] as the leaves that vary, by name."""
        return unflatten(flat, {n: self.problem.base.params[n] for n in self.names})

    def value(self, weights: Tensor) -> Tensor:
        """Return L [member] at weights [member, param]."""
        with torch.no_grad():
            return self._finish(weights, self._over_images(Value, weights)[0])

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return L [member] and its gradient g [member, param]."""
        if self._start is not None:
            start, value, gradient = self._start
            if start.dtype == weights.dtype and bool((weights == start).all()):
                return value.expand(len(weights)).clone(), gradient.expand_as(weights).clone()
        data, gradient = self._over_images(Gradient, weights)
        return self._finish(weights, data), self._finish_gradient(weights, gradient)

    def curvature(self, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return L [member], g [member, param] and d' H d [member], by differentiating g . d once more."""
        data, gradient, curved = self._over_images(Curvature, weights, direction)
        curved = curved + self.prior * dot(direction, direction)
        return self._finish(weights, data), self._finish_gradient(weights, gradient), curved

    def _finish(self, weights: Tensor, data: Tensor) -> Tensor:
        value = data.double()
        if self.prior:
            value = value + 0.5 * self.prior * dot(weights, weights)
        if self.tilt is not None:
            value = value - (weights.double() - self.origin) @ self.tilt
        return value

    def _finish_gradient(self, weights: Tensor, gradient: Tensor) -> Tensor:
        if self.prior:
            gradient = gradient + self.prior * weights
        return gradient if self.tilt is None else gradient - self.tilt.to(gradient.dtype)

    def _over_images(self, what: type[Value], weights: Tensor, *more: Tensor) -> list[Tensor]:
        """Return `what` of the loss alone, summed over the images: L, g and d' H d, as far as they are asked for."""
        raise NotImplementedError

    def _in_dtype(self, dtype: torch.dtype) -> Trained:
        """Return the base in the dtype of the weights."""
        if dtype not in self._cast:
            self._cast[dtype] = self.problem.base.in_dtype(dtype)
        return self._cast[dtype]


@dataclass
class NetworkSurface(LossSurface):
    """The loss of a network as it is, image by image and member by member."""

    def _over_images(self, what: type[Value], weights: Tensor, *more: Tensor) -> list[Tensor]:
        """Sum `what` over batches of images; members run by the chosen strategy."""
        total: list[Tensor] = []
        count = len(self.part)
        for images, labels in zip(self.part.images.split(IMAGES), self.part.labels.split(IMAGES), strict=True):
            share = len(self.problem.train) * len(images) / count
            found = self._over_members(what, self._loss(images, labels, share, weights.dtype), weights, *more)
            total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
        return total

    def _loss(self, images: Tensor, labels: Tensor, share: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        base = self._in_dtype(dtype)

        def loss(flat: Tensor) -> Tensor:
            logits = self.problem.network({**base.params, **self.leaves(flat)}, base.buffers, images)
            # The sum is taken in float64, where adding many losses and subtracting two of the sums loses nothing more.
            return share * self.problem.loss(logits.double(), labels)

        return loss

    def choose(self, weights: Tensor) -> None:
        """Choose the strategy by timing the gradients of eight members at weights [param]."""
        images, labels = self.part.images[:IMAGES], self.part.labels[:IMAGES]
        self.strategy = self._faster(self._loss(images, labels, 1.0, weights.dtype), weights.expand(8, -1))

    def _over_members(self, what: type[Value], loss: Callable[[Tensor], Tensor], *rows: Tensor) -> list[Tensor]:
        if not self.strategy and len(rows[0]) > 1:
            self.strategy = self._faster(loss, rows[0])
        way = what.together if self.strategy == "vmap" else what.one_by_one
        return _halving(lambda *some: list(way(loss, *some)), *rows)

    def _faster(self, loss: Callable[[Tensor], Tensor], weights: Tensor) -> str:
        """Return the strategy that takes less time for the gradients of up to 8 members."""
        few, seconds = weights[:8], {}
        for name, way in (("loop", Gradient.one_by_one), ("vmap", Gradient.together)):
            with torch.enable_grad():  # the first call may be for values alone
                way(loss, few[:2])
                start = time.perf_counter()
                float(way(loss, few)[0].sum())  # to read a value is to wait for it
            seconds[name] = time.perf_counter() - start
        return min(seconds, key=seconds.__getitem__)


class Value:
    """The loss of members: one by one (autograd), or together (vmap; torch.func is slow for a single member)."""

    @classmethod
    def one_by_one(cls, loss: Callable[[Tensor], Tensor], *rows: Tensor) -> list[Tensor]:
        """Return the columns [member, ...] of `single` over the rows."""
        found = [cls.single(loss, *row) for row in zip(*rows, strict=True)]
        return [torch.stack(column) for column in zip(*found, strict=True)]

    @classmethod
    def together(cls, loss: Callable[[Tensor], Tensor], *rows: Tensor) -> list[Tensor]:
        """Return the columns [member, ...] of `functional`, vectorised over the rows."""
        return list(torch.func.vmap(lambda *row: cls.functional(loss, *row))(*rows))

    @staticmethod
    def single(loss: Callable[[Tensor], Tensor], w: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return (loss(w),)

    functional = single


class Gradient(Value):
    """The loss and its gradient."""

    @staticmethod
    def single(loss: Callable[[Tensor], Tensor], w: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        w = w.detach().requires_grad_()
        value = loss(w)
        return value.detach(), torch.autograd.grad(value, w)[0]

    @staticmethod
    def functional(loss: Callable[[Tensor], Tensor], w: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        gradient, value = torch.func.grad_and_value(loss)(w)
        return value, gradient


class Curvature(Value):
    """The loss, its gradient g and d' H d, the derivative of g . d along d."""

    @staticmethod
    def single(loss: Callable[[Tensor], Tensor], w: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        (d,) = more
        w = w.detach().requires_grad_()
        value = loss(w)
        gradient = torch.autograd.grad(value, w, create_graph=True)[0]
        # Weights beyond which the loss is linear have no second derivative at all.
        product = torch.autograd.grad(gradient @ d, w, allow_unused=True, materialize_grads=True)[0]
        return value.detach(), gradient.detach(), product.double() @ d.double()

    @staticmethod
    def functional(loss: Callable[[Tensor], Tensor], w: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        (d,) = more

        def along(w: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            gradient, value = torch.func.grad_and_value(loss)(w)
            return gradient @ d, (value, gradient)

        product, (value, gradient) = torch.func.grad(along, has_aux=True)(w)
        return value, gradient, product.double() @ d.double()


def _halving(run: Callable[..., list[Tensor]], *rows: Tensor) -> list[Tensor]:
    """Run on all members at once; out of memory, on either half of them."""
    try:
        return run(*rows)
    except torch.OutOfMemoryError:
        half = len(rows[0]) // 2
        if not half:
            raise
    torch.cuda.empty_cache()
    first, second = (_halving(run, *(r[part] for r in rows)) for part in (slice(None, half), slice(half, None)))
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


def metric_part(problem: Problem, images: int, seed: int) -> Part:
    """Return a fixed random subset of the training images (all where there are no more), in their order."""
    if images >= len(problem.train):
        return problem.train
    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(seed))[:images]
    rows = order.sort().values.to(problem.train.images.device)
    return Part(problem.train.images[rows], problem.train.labels[rows])


def tilted(surface: Tiltable) -> Tiltable:
    """Tilt a surface in place, so that its origin is stationary (in float32 to the last bit), and return it."""
    surface.tilt = None
    surface.tilt = surface.gradient(surface.origin[None].float())[1][0].double()
    return surface
