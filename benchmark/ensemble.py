"""Several networks trained at once by the one recipe: stacked weights, one pass for all.

The steps are those that `train` takes for one network after the other, equal to rounding: every member has weights,
BatchNorm statistics, optimiser state, order of samples and bootstrap resample of its own, and shares nothing but time.
Convolutions of stacked weights are grouped ones, whose speed depends on the device: `members_at_once` measures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import Diverged
from ..generators.api import Checkpoint, Memory, Part, Plan, Trained
from ..generators.modelset import Leaves
from .networks import Network
from .objectives import MeanLoss
from .train import (
    CHECKPOINT_EVERY_S,
    Training,
    bootstrap_rows,
    l2,
    learning_rate,
    make_optimizer,
    mean_loss,
    restore_state,
    skipped,
    state_of,
)

AT_ONCE = 32
"""Networks that are trained at once, where that is faster."""


@dataclass
class Together:
    """The recipe for several networks at once, as a generator sees it."""

    network: Network
    data: Part
    recipe: Training
    patient: Tensor | None = None
    checkpoint: Checkpoint | None = None
    progress: Callable[..., Iterable[Any]] = lambda items, description, total=None: items

    def at_once(self, members: int) -> int:
        """Return how many of `members` networks to train at once: see `members_at_once`."""
        return members_at_once(self.network, self.data, self.recipe, members)

    def __call__(self, plans: Sequence[Plan], *, name: str = "training") -> list[Trained | Diverged]:
        """Train a network for each plan."""
        return train_together(
            self.network,
            self.data,
            self.recipe,
            plans,
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
    patient: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[..., Iterable[Any]] = lambda items, description, total=None: items,
    name: str = "training",
) -> list[Trained | Diverged]:
    """Train a network for each plan, in one loop; a member whose loss stops being finite is Diverged, the others go on.

    Checkpoints hold whole epochs of all members, so that a killed training continues to the same weights. `epoch_s` of
    a member are its share.
    """
    checkpoint = checkpoint or Memory()
    device, members, n = data.images.device, len(plans), len(data)
    params, buffers = _stacked(network, plans, device)
    optimizer = make_optimizer(recipe, params.values())
    own = _rows(plans, patient, n)
    batches = math.ceil(n / recipe.batch_size)
    losses: list[list[float]] = []
    epoch_s: list[float] = []
    order, saved = MeanLoss(n), time.monotonic()
    first = _resume(checkpoint, name, params, buffers, optimizer, losses)
    for epoch in progress(range(first, recipe.epochs), name, recipe.epochs):
        start = time.perf_counter()
        orders = torch.stack([order.order(plan.seed, epoch) for plan in plans])
        rows = (orders if own is None else own.gather(1, orders)).to(device)
        total = torch.zeros(members, device=device)
        for i, batch in enumerate(rows.split(recipe.batch_size, dim=1)):
            if skipped(batch.shape[1], recipe, n):
                continue
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch * batches + i, recipe.epochs * batches)
            loss = _losses(network, params, buffers, data, batch)
            total += loss.detach() * batch.shape[1]
            optimizer.zero_grad()
            (loss.sum() + l2(params, recipe.prior_precision, n)).backward()
            optimizer.step()
        losses.append((total / n).double().tolist())
        epoch_s.append((time.perf_counter() - start) / members)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            told = torch.tensor(losses, dtype=torch.float64)
            checkpoint.save(name, state_of(params, buffers, optimizer) | {"losses": told})
            saved = time.monotonic()
    return [_member(name, recipe, params, buffers, losses, epoch_s, k) for k in range(members)]


def members_at_once(network: Network, data: Part, recipe: Training, members: int) -> int:
    """Return how many networks to train at once on this device: `AT_ONCE`, or 1 where one by one is faster.

    Timed on four batches: the second epoch of each way. One by one where memory does not suffice.
    """
    count = min(members, AT_ONCE)
    few = Part(data.images[: 4 * recipe.batch_size], data.labels[: 4 * recipe.batch_size])
    short = replace(recipe, epochs=2)
    try:
        (together, *_) = train_together(network, few, short, [Plan(seed=k) for k in range(count)])
        (alone,) = train_together(network, few, short, [Plan(seed=0)])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return 1
    if isinstance(together, Diverged) or isinstance(alone, Diverged):
        return 1
    return count if together.epoch_s[-1] < alone.epoch_s[-1] else 1


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
    return {n: p.requires_grad_() for n, p in params.items()}, buffers


def _rows(plans: Sequence[Plan], patient: Tensor | None, n: int) -> Tensor | None:
    """Return the rows of every member's training data [member, sample], None where all have all."""
    if all(plan.resample_seed is None for plan in plans):
        return None
    whole = torch.arange(n)
    return torch.stack(
        [whole if p.resample_seed is None else bootstrap_rows(patient, n, p.resample_seed) for p in plans]
    )


def _losses(network: Network, params: Leaves, buffers: Leaves, data: Part, rows: Tensor) -> Tensor:
    """Return the mean loss of every member on its own batch [member]; BatchNorm statistics move with it."""

    def one(params: Leaves, buffers: Leaves, images: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(network(params, buffers, images, train=True), labels)

    flat = rows.flatten()
    images, labels = data.images[flat].unflatten(0, rows.shape), data.labels[flat].unflatten(0, rows.shape)
    return torch.func.vmap(one, randomness="different")(params, buffers, images, labels)


def _resume(
    checkpoint: Checkpoint,
    name: str,
    params: Leaves,
    buffers: Leaves,
    optimizer: torch.optim.Optimizer,
    losses: list[list[float]],
) -> int:
    """Put a checkpoint back in place and return the epoch to go on with."""
    state = checkpoint.load(name)
    if state is None:
        return 0
    restore_state(state, params, buffers, optimizer)
    losses.extend(state["losses"].tolist())
    return len(losses)


def _member(
    name: str,
    recipe: Training,
    params: Leaves,
    buffers: Leaves,
    losses: list[list[float]],
    epoch_s: list[float],
    k: int,
) -> Trained | Diverged:
    own = [epoch[k] for epoch in losses]
    bad = next((i for i, loss in enumerate(own) if not math.isfinite(loss)), None)
    if bad is not None:
        return Diverged(
            f"{name}, member {k}: the loss of epoch {bad + 1} is not finite (training.lr={recipe.lr:g} too large?)"
        )
    weights, statistics = ({n: leaf[k].detach().clone() for n, leaf in own.items()} for own in (params, buffers))
    return Trained(weights, statistics, own, epoch_s)
