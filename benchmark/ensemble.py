"""Several networks trained at once by the one recipe: stacked weights, one step for all.

The steps are those that `train` takes for one network after the other, equal to rounding: every member has weights,
BatchNorm statistics, optimiser state, order of samples, augmentation, bootstrap resample and early stop of its own, and
shares nothing but time. There are two ways to the gradients: `vmap`, whose stacked convolutions are grouped ones, fast
or slow depending on the device, and `each`, one member's pass after the other's. On a GPU either is captured in a CUDA
graph, as launching the kernels of a small network takes longer than they run. `way_of_training` measures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Diverged
from ..generators.api import WAYS, AtOnce, Checkpoint, Memory, Part, Plan, Trained
from ..generators.modelset import Leaves, under
from .augment import changed, draw_changes
from .cuda_graphs import Captured
from .devices import first_line, is_lost
from .early_stopping import BestEpoch
from .networks import Network
from .objectives import MeanLoss
from .progress import log
from .train import (
    CHECKPOINT_EVERY_S,
    Training,
    bootstrap_rows,
    l2,
    learning_rate,
    make_optimizer,
    mean_loss,
    patience,
    restore_state,
    skipped,
    state_of,
    train,
    training_logits,
)

AT_ONCE = 32
"""Networks that are trained at once, where that is faster."""

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]
"""(images, labels) [member, sample, ...] -> losses [member] and, leaf by leaf, gradients [member, ...]."""


@dataclass
class Together:
    """The recipe for several networks at once, as a generator sees it."""

    network: Network
    data: Part
    recipe: Training
    tune: Part | None = None
    patient: Tensor | None = None
    checkpoint: Checkpoint | None = None
    progress: Callable[..., Iterable[Any]] = lambda items, description, total=None: items

    def at_once(self, members: int) -> AtOnce:
        """Return how many of `members` networks to train at once, and in which way: see `way_of_training`."""
        return way_of_training(self.network, self.data, self.recipe, members)

    def __call__(self, plans: Sequence[Plan], *, way: str = "vmap", name: str = "training") -> list[Trained | Diverged]:
        """Train a network for each plan."""
        return train_together(
            self.network,
            self.data,
            self.recipe,
            plans,
            way=way,
            tune=self.tune,
            patient=self.patient,
            checkpoint=self.checkpoint,
            progress=self.progress,
            name=name,
        )


def trains_together(recipe: Training) -> bool:
    """Return whether the recipe has a stacked form: plain risk minimisation by steps on batches."""
    return recipe.objective == "erm" and not recipe.polish


def train_together(
    network: Network,
    data: Part,
    recipe: Training,
    plans: Sequence[Plan],
    *,
    way: str = "vmap",
    tune: Part | None = None,
    patient: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[..., Iterable[Any]] = lambda items, description, total=None: items,
    name: str = "training",
) -> list[Trained | Diverged]:
    """Train a network for each plan, in one loop; a member whose loss stops being finite is Diverged, the others go on.

    Members that have stopped early or diverged leave the stack once half of it has. Checkpoints hold whole epochs of
    all members, so that a killed training continues to the same weights. `epoch_s` of a member are its share.
    """
    checkpoint = checkpoint or Memory()
    stack = Stack(network, recipe, plans, data, way)
    courses = [Course(patience(recipe, tune)) for _ in plans]
    epoch_s: list[float] = []
    own = _rows(plans, patient, len(data))
    first, saved = _resume(checkpoint.load(name), stack, courses), time.monotonic()
    for epoch in progress(range(first, recipe.epochs), name, recipe.epochs):
        if not stack.members:
            break
        start = time.perf_counter()
        told = _epoch(stack, data, plans, own, epoch)
        for row, k in enumerate(stack.members):
            courses[k].see(told[row], network, stack.member(row))
        epoch_s.append((time.perf_counter() - start) / len(stack.members))
        going = [row for row, k in enumerate(stack.members) if not courses[k].ended]
        if 2 * len(going) <= len(stack.members):
            stack.keep(going)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            checkpoint.save(name, _state(stack, courses))
            saved = time.monotonic()
    return [_trained(f"{name}, member {k}", recipe, course, stack, k, epoch_s) for k, course in enumerate(courses)]


def way_of_training(network: Network, data: Part, recipe: Training, members: int) -> AtOnce:
    """Return how many networks to train at once on this device, and how: one by one where that is the fastest.

    Timed on four batches: the second epoch of every way. Where memory does not suffice, half as many are tried; a way
    that this device or network does not allow is left out, and said.
    """
    few = Part(data.images[: 4 * recipe.batch_size], data.labels[: 4 * recipe.batch_size])
    short = replace(recipe, epochs=2, patience=0)
    seconds = {AtOnce(1): train(network, few, short, 0).epoch_s[-1]}
    for way in WAYS:
        count = min(members, AT_ONCE)
        while count > 1:
            try:
                (first, *_) = train_together(network, few, short, [Plan(seed=k) for k in range(count)], way=way)
                if not isinstance(first, Diverged):
                    seconds[AtOnce(count, way)] = first.epoch_s[-1]
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                count //= 2
            except RuntimeError as error:
                if is_lost(error):
                    raise
                log(f"training at once by {way} is not possible here: {first_line(error)}")
                break
    return min(seconds, key=seconds.__getitem__)


class Stack:
    """The networks that are still trained: leaves and statistics [member, ...], and one optimiser for all.

    members: the plan of every row.
    """

    def __init__(self, network: Network, recipe: Training, plans: Sequence[Plan], data: Part, way: str):
        self.network, self.recipe, self.way, self.samples = network, recipe, way, len(data)
        self.members = list(range(len(plans)))
        params, self.buffers = _stacked(network, plans, data.images.device)
        self._begin(params)

    def _begin(self, params: Leaves) -> None:
        self.params = {n: p.detach().requires_grad_() for n, p in params.items()}
        self.optimizer = make_optimizer(self.recipe, self.params.values())
        way = {"vmap": _by_vmap, "each": _by_each}[self.way]
        # No method of this object: a graph that holds it would keep a device's memory until the next collection.
        self.gradients: Gradients = partial(way, self.network, self.recipe, self.samples, self.params, self.buffers)
        self.whole_batch: Gradients = self.gradients
        if next(iter(self.params.values())).is_cuda:
            self.whole_batch = Captured(self.gradients, moved=self.buffers.values())

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the members."""
        state = state_of(self.params, self.buffers, self.optimizer)
        chosen = {
            n: t[rows] if t.ndim else t for n, t in state.items()
        }  # the optimiser's count of steps is one for all
        self.members = [self.members[row] for row in rows]
        self.buffers = under("buffer/", chosen)
        self._begin(under("param/", chosen))
        restore_state(chosen, self.params, self.buffers, self.optimizer)

    def step(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """Take one step on every member's own batch and return the losses before it, [member]."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        whole = images.shape[1] == self.recipe.batch_size
        losses, gradients = (self.whole_batch if whole else self.gradients)(images, labels)
        for leaf, gradient in zip(self.params.values(), gradients, strict=True):
            leaf.grad = gradient
        self.optimizer.step()
        return losses

    def member(self, row: int) -> Trained:
        """Return the weights of one row, as views."""
        params, buffers = ({n: leaf[row].detach() for n, leaf in o.items()} for o in (self.params, self.buffers))
        return Trained(params, buffers)


def _by_vmap(
    network: Network, recipe: Training, samples: int, params: Leaves, buffers: Leaves, images: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    recipe = replace(recipe, channels_last=False)  # stacked weights have no such layout

    def one(params: Leaves, buffers: Leaves, images: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(training_logits(network, recipe, params, buffers, images), labels)

    losses = torch.func.vmap(one, randomness="different")(params, buffers, images, labels)
    penalised = losses.sum() + l2(params, recipe.prior_precision, samples)
    return losses.detach(), list(torch.autograd.grad(penalised, list(params.values())))


def _by_each(
    network: Network, recipe: Training, samples: int, params: Leaves, buffers: Leaves, images: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    losses, gradients = [], []
    for row in range(len(images)):
        own = {n: p[row].detach().requires_grad_() for n, p in params.items()}
        logits = training_logits(network, recipe, own, {n: b[row] for n, b in buffers.items()}, images[row])
        loss = mean_loss(logits, labels[row])
        losses.append(loss.detach())
        penalised = loss + l2(own, recipe.prior_precision, samples)
        gradients.append(torch.autograd.grad(penalised, list(own.values())))
    return torch.stack(losses), [torch.stack(leaf) for leaf in zip(*gradients, strict=True)]


@dataclass
class Course:
    """How one member's training goes: its losses so far, and its best epoch where it may stop early."""

    best: BestEpoch | None
    losses: tuple[float, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing that follows counts: the member has stopped early, or diverged."""
        diverged = bool(self.losses) and not math.isfinite(self.losses[-1])
        return diverged or (self.best is not None and self.best.stopped)

    def see(self, loss: float, network: Network, now: Trained) -> None:
        """Take the end of an epoch into account."""
        if self.ended:
            return
        self.losses += (loss,)
        if self.best is not None and math.isfinite(loss):
            self.best.see(network, now)


def _epoch(stack: Stack, data: Part, plans: Sequence[Plan], own: Tensor | None, epoch: int) -> list[float]:
    """Train every member for an epoch and return its losses, summed in float32 as `train` does."""
    recipe, network, n = stack.recipe, stack.network, len(data)
    device, seeds = data.images.device, [plans[k].seed for k in stack.members]
    places = torch.stack([MeanLoss(n).order(seed, epoch) for seed in seeds])
    rows = (places if own is None else own[stack.members].gather(1, places)).to(device)
    drawn = [draw_changes(recipe.augment, seed, epoch, n, network.size) for seed in seeds]
    moved = [changes[order] for changes, order in zip(drawn, places, strict=True) if changes is not None]
    moves = torch.stack(moved).to(device).split(recipe.batch_size, dim=1) if moved else None
    total = torch.zeros(len(seeds), device=device)
    batches = math.ceil(n / recipe.batch_size)
    for i, batch in enumerate(rows.split(recipe.batch_size, dim=1)):
        if skipped(batch.shape[1], recipe, n):
            continue
        flat = batch.flatten()
        images = data.images[flat]
        if moves is not None:
            images = changed(images, moves[i].flatten(0, 1))
        images, labels = images.unflatten(0, batch.shape), data.labels[flat].unflatten(0, batch.shape)
        rate = learning_rate(recipe, epoch * batches + i, recipe.epochs * batches)
        total += stack.step(images, labels, rate) * batch.shape[1]
    return (total / n).double().tolist()


def _stacked(network: Network, plans: Sequence[Plan], device: torch.device) -> tuple[Leaves, Leaves]:
    starts = [
        network.init(plan.seed if plan.init_seed is None else plan.init_seed)
        if plan.init is None
        else (plan.init.params, plan.init.buffers)
        for plan in plans
    ]
    params, buffers = (
        {n: torch.stack([start[i][n].detach() for start in starts]).to(device) for n in starts[0][i]} for i in (0, 1)
    )
    return params, buffers


def _rows(plans: Sequence[Plan], patient: Tensor | None, n: int) -> Tensor | None:
    """Return the rows of every member's training data [member, sample], None where all have all."""
    if all(plan.resample_seed is None for plan in plans):
        return None
    whole = torch.arange(n)
    return torch.stack(
        [whole if p.resample_seed is None else bootstrap_rows(patient, n, p.resample_seed) for p in plans]
    )


def _state(stack: Stack, courses: Sequence[Course]) -> dict[str, Tensor]:
    """Return everything that the rest of the training depends on, as tensors."""
    state = state_of(stack.params, stack.buffers, stack.optimizer) | {"members": torch.tensor(stack.members)}
    for k, course in enumerate(courses):
        state[f"losses/{k}"] = torch.tensor(course.losses, dtype=torch.float64)
        if course.best is not None:
            state |= {f"best/{k}/{n}": t for n, t in course.best.state().items()}
    return state


def _resume(state: dict[str, Tensor] | None, stack: Stack, courses: Sequence[Course]) -> int:
    """Put a checkpoint back in place and return the epoch to go on with."""
    if state is None:
        return 0
    stack.keep(state["members"].tolist())
    restore_state(state, stack.params, stack.buffers, stack.optimizer)
    for k, course in enumerate(courses):
        course.losses = tuple(state[f"losses/{k}"].tolist())
        if course.best is not None:
            course.best.restore(under(f"best/{k}/", state))
    return max(len(course.losses) for course in courses)


def _trained(
    name: str, recipe: Training, course: Course, stack: Stack, member: int, epoch_s: list[float]
) -> Trained | Diverged:
    losses = list(course.losses)
    if not math.isfinite(losses[-1]):
        return Diverged(f"{name}: the loss of epoch {len(losses)} is not finite (training.lr={recipe.lr:g} too large?)")
    if course.best is not None and course.best.weights is not None:
        return replace(course.best.weights, losses=losses, epoch_s=epoch_s)
    now = stack.member(stack.members.index(member))
    params, buffers = ({n: leaf.clone() for n, leaf in own.items()} for own in (now.params, now.buffers))
    return Trained(params, buffers, losses, epoch_s)
