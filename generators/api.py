"""What a generator is, what it may see, and what it returns.

A generator is a plain dataclass of hyper-parameters, registered by `@register_generator("name")`, with
`generate(problem, seed) -> ModelSet`. It sees train, tune and the base network, never val or test: membership of the
Rashomon set and every selection are decided on val, results are reported on test, and no generator can touch either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import Diverged, UserError, suggest
from ..registries import GENERATORS as GENERATORS
from ..registries import register_generator as register_generator
from .modelset import ModelSet

Params = dict[str, Tensor]
"""Leaves of a network by name."""


class NetworkFunction(Protocol):
    """A network as a pure function of parameters, buffers and uint8 images [sample, channel, height, width].

    Normalisation is part of the function. With `train=True` BatchNorm normalises by the batch and updates the passed
    buffers in place; otherwise nothing passed is changed.
    """

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, train: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True)
class Part:
    """Images (uint8 [sample, channel, height, width]) and labels of one part of the data, on the problem's device.

    Images that the device has no room for are a tensor all the same, which moves there the rows that are used.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Trained:
    """Weights at the end of one training by the recipe.

    losses: of the epochs (the objective without its L2 term, by default the mean over samples, nats); epoch_s: seconds
    of the epochs that this process trained.
    """

    params: Params
    buffers: Params
    losses: list[float] = field(default_factory=list)
    epoch_s: list[float] = field(default_factory=list)

    def in_dtype(self, dtype: torch.dtype) -> Trained:
        """Return the weights in another dtype of floating-point numbers."""
        cast = lambda leaves: {n: t.to(dtype) if t.is_floating_point() else t for n, t in leaves.items()}  # noqa: E731
        return Trained(cast(self.params), cast(self.buffers))


@dataclass(frozen=True)
class Plan:
    """One training: see the arguments of `Fit` by these names."""

    seed: int
    init_seed: int | None = None
    resample_seed: int | None = None
    init: Trained | None = None


WAYS = ("vmap", "each")
"""Ways to the gradients of several networks: one pass over stacked weights, or one pass for each."""


@dataclass(frozen=True)
class AtOnce:
    """How many networks to train at once (1: one by one, by `Fit`), and which of `WAYS`."""

    members: int
    way: str = WAYS[0]


class FitTogether(Protocol):
    """The one training recipe for several networks at once, equal to `Fit` for each to rounding."""

    def at_once(self, members: int) -> AtOnce:
        """Return how many of `members` networks to train at once, and in which way: what is fastest here."""
        ...

    def __call__(self, plans: Sequence[Plan], *, way: str = "vmap", name: str = "training") -> list[Trained | Diverged]:
        """Train a network for each plan; one whose loss stops being finite is Diverged, the others go on."""
        ...


class Fit(Protocol):
    """The one training recipe, shared by the base model and by every generator that trains."""

    def __call__(
        self,
        seed: int,
        *,
        init: Trained | None = None,
        init_seed: int | None = None,
        resample_seed: int | None = None,
        name: str = "training",
        **changes: Any,
    ) -> Trained:
        """Train on `train` from fresh weights drawn by `seed` (or from `init`), in the order that `seed` gives.

        `init_seed` draws the fresh weights instead of `seed`, which then decides the order alone.
        `resample_seed` trains on a bootstrap resample (by patient where the data know patients) instead; `changes`
        replace fields of the recipe (`epochs=5`; `objective="group_dro", groups="sex*label"`); `on_step(step, params,
        buffers)` among them is called after each update. Raises Diverged when the loss stops being finite, UserError
        for groups that the data do not have (see `Problem.groups`).
        """
        ...


class Checkpoint(Protocol):
    """Tensors that survive a kill: what `save` stored under a name, `load` returns when the command runs again."""

    def load(self, name: str) -> dict[str, Tensor] | None: ...

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...


class Clock(Protocol):
    """Books wall time (device synchronised): `fixed` once per set, `marginal` per drawn member.

    `transfer` moves seconds from fixed to marginal: work of a search whose draws turned out to be members.
    """

    def fixed(self) -> AbstractContextManager[None]: ...

    def marginal(self) -> AbstractContextManager[None]: ...

    def transfer(self, seconds: float) -> None: ...


class Memory:
    """A checkpoint that lives in this process only."""

    def __init__(self) -> None:
        self._stored: dict[str, dict[str, Tensor]] = {}

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return what was stored under `name`, or None."""
        return self._stored.get(name)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a copy of `tensors` under `name`."""
        self._stored[name] = {k: v.detach().clone() for k, v in tensors.items()}


class NoClock:
    """A clock that books nothing."""

    def fixed(self) -> AbstractContextManager[None]:
        """Time nothing."""
        return nullcontext()

    def marginal(self) -> AbstractContextManager[None]:
        """Time nothing."""
        return nullcontext()

    def transfer(self, seconds: float) -> None:
        """Move nothing."""


def _silent(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    return items


def no_groups(groups: str) -> Tensor:
    """Raise UserError: the data know nothing that samples could be grouped by."""
    raise UserError(f"groups={groups}: the data know nothing that samples could be grouped by")


@dataclass
class Problem:
    """Everything a generator may see.

    network: the network as a pure function; base: the weights w* it starts from; module: makes a fresh nn.Module in
    eval mode holding w*, for libraries that need one; train, tune: the data; task: binary | multiclass | ordinal |
    multilabel; classes: the number of outputs; loss: (logits, labels) -> mean over samples, nats;
    prior_precision: a of the training loss `loss + a/(2N) |w|^2`; batch_size: of the recipe; fit: the training recipe;
    fit_together: the same for several networks at once, None where it has no such form;
    groups: the group of every training sample, int64, for a product of names such as `sex*label`, or UserError;
    members: how many to draw; base_seed: `fit(base_seed)` trains the base again;
    part: `part(name, spec, compute)` returns compute()'s tensors, computed once per base and shared by all generators
    (its seconds are booked as fixed cost whether or not it was found); checkpoint, clock, progress: see there.
    """

    network: NetworkFunction
    base: Trained
    module: Callable[[], nn.Module]
    train: Part
    tune: Part
    task: str
    classes: int
    loss: Callable[[Tensor, Tensor], Tensor]
    prior_precision: float
    batch_size: int
    fit: Fit
    members: int
    base_seed: int
    fit_together: FitTogether | None = None
    groups: Callable[[str], Tensor] = no_groups
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    part: Callable[[str, Any, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = lambda name, spec, compute: (
        compute()
    )
    checkpoint: Checkpoint = field(default_factory=Memory)
    clock: Clock = field(default_factory=NoClock)
    progress: Callable[..., Iterable[Any]] = _silent

    def logits(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return logits [sample, class] without gradients, in batches."""
        with torch.no_grad():
            return torch.cat([self.network(params, buffers, batch) for batch in images.split(256)])

    def tune_loss(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> float:
        """Return the loss on tune in nats (mean over samples)."""
        return float(self.loss(self.logits(params, buffers, self.tune.images), self.tune.labels))


class Generator:
    """Base of all generators: a plain dataclass (not frozen, or every command-line override fails).

    `version` goes up whenever the same settings start to give other members; `control` marks rows that show what a
    metric does not mean.
    """

    version: ClassVar[int] = 1
    control: ClassVar[bool] = False

    def supports(self, problem: Problem) -> str | None:
        """Return the reason why this generator cannot run on `problem`, or None: a skip is a normal outcome."""
        return None

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Return a set of `problem.members` members; member k depends on (problem, settings, seed, k) alone."""
        raise NotImplementedError


def choices(value: Any, name: str, allowed: Iterator[Any] | Iterable[Any]) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{name}={value} is not a choice: {suggest(str(value), [str(a) for a in allowed])}")
