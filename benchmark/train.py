"""The one training recipe, for base models and for every generator that trains.

Mini-batch SGD or AdamW with cosine decay on `loss + a/(2N) |w|^2`: the Gaussian prior is an L2 term of the loss, never
decoupled decay, so that the end point is a mode of what a Laplace approximation expands (with the objective `erm`; the
others, early stopping and augmentation end elsewhere, and `gradient_norm` says how far from such a mode).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import Diverged, UserError
from ..generators.api import Checkpoint, Memory, Part, Trained, choices
from ..generators.modelset import under
from ..identity import added_later, derive_seed
from .augment import AUGMENTATIONS, changed, draw_changes
from .early_stopping import BestEpoch
from .networks import Network
from .objectives import OBJECTIVES, ClassBalanced, GroupDRO, MeanLoss, Objective
from .objectives import mean_loss as mean_loss

CHECKPOINT_EVERY_S = 20.0


@dataclass
class Training:
    """Settings of the recipe.

    optimizer: adamw | sgd; lr: peak rate, decayed to 0 by a cosine; momentum: of SGD (and AdamW's beta1);
    prior_precision: a of the L2 term a/(2N) |w|^2; polish: steps of full-batch L-BFGS at the end (0 = none), which
    report the gradient norm; objective: erm | class_balanced | group_dro (see `objectives`); groups: of group_dro, a
    product of attributes, `label`, `strata` and `random`, such as `sex*label` (the attribute x class of Sagawa et al.);
    group_step: eta of its weights. Group DRO needs strong regularisation where a network can fit all samples: compare
    it at a prior_precision and a number of epochs that leave it a training loss. augment: none | shift | shift_flip
    (see `augment`; a mirrored chest film has its heart on the wrong side); patience: epochs without a smaller loss on
    tune after which a training ends with the weights of its best epoch (0 = none); autocast: none | bf16 (the forward
    passes of training, weights and sums stay float32); channels_last: the other order of pixels and channels, which
    some devices and networks compute faster in.
    """

    optimizer: str = "adamw"
    lr: float = 0.003
    batch_size: int = 32
    epochs: int = 30
    momentum: float = 0.9
    prior_precision: float = 1.0
    polish: int = 0
    objective: str = added_later("erm")
    groups: str = added_later("")
    group_step: float = added_later(0.01)
    augment: str = added_later("none")
    patience: int = added_later(0)
    autocast: str = added_later("none")
    channels_last: bool = added_later(False)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        choices(self.optimizer, "training.optimizer", ("adamw", "sgd"))
        for name, low in (("lr", 0), ("batch_size", 0), ("epochs", 0)):
            if getattr(self, name) <= low:
                raise UserError(f"training.{name}={getattr(self, name)} must be positive")
        if min(self.prior_precision, self.polish, self.patience) < 0 or not 0 <= self.momentum < 1:
            raise UserError("training: prior_precision, polish and patience must not be negative, momentum in [0, 1)")
        choices(self.augment, "training.augment", AUGMENTATIONS)
        choices(self.autocast, "training.autocast", ("none", "bf16"))
        choices(self.objective, "training.objective", OBJECTIVES)
        check_groups(self.objective, self.groups, "training")
        if not 0 < self.group_step < math.inf:
            raise UserError(f"training.group_step={self.group_step} must be positive")
        if self.polish and self.objective != "erm":
            raise UserError(f"training.polish={self.polish} descends the mean loss: use it with objective=erm alone")


def check_groups(objective: str, groups: str, where: str) -> None:
    """Raise UserError unless groups are named for group DRO, and for it alone."""
    if objective == "group_dro" and not groups:
        raise UserError(f"{where}.objective=group_dro needs {where}.groups, a product of names such as sex*label")
    if groups and objective != "group_dro":
        raise UserError(f"{where}.groups={groups} is for {where}.objective=group_dro, not {objective}: leave it out")


def bootstrap_rows(patient: Tensor | None, n: int, seed: int) -> Tensor:
    """Return the rows of a bootstrap resample: n of n with replacement, whole patients where these are known."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap"))
    if patient is None:
        return torch.randint(n, (n,), generator=generator)
    order = torch.argsort(patient, stable=True)
    counts = torch.unique_consecutive(patient[order], return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    drawn = torch.randint(len(counts), (len(counts),), generator=generator)
    return torch.cat([order[starts[p] : starts[p] + counts[p]] for p in drawn.tolist()])


def train(
    network: Network,
    data: Part,
    recipe: Training,
    seed: int,
    *,
    tune: Part | None = None,
    init: Trained | None = None,
    init_seed: int | None = None,
    patient: Tensor | None = None,
    grouping: Callable[[str], Tensor] | None = None,
    resample_seed: int | None = None,
    on_step: Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[..., Iterable[Any]] = lambda items, description, total=None: items,
    name: str = "training",
    constant_lr: bool = False,
    **changes: Any,
) -> Trained:
    """Train one network by the recipe; every random choice follows from `seed` (and `init_seed`, `resample_seed`).

    tune: what `recipe.patience` decides by, needed for it alone; patient: of every sample; grouping: gives every
    sample's group for `recipe.groups`, both as for `data` before a resample, which takes them along. Checkpoints hold
    whole epochs, so that a killed training continues to the same weights. Raises Diverged when the loss of an epoch is
    not finite, UserError for groups that the data do not have.
    """
    recipe = replace(recipe, **changes)
    best = patience(recipe, tune)
    checkpoint = checkpoint or Memory()
    device = data.images.device
    groups = _groups(recipe, grouping)
    if resample_seed is not None:
        rows = bootstrap_rows(patient, len(data), resample_seed)
        groups = groups if groups is None else groups[rows]
        data = Part(data.images[rows.to(device)], data.labels[rows.to(device)])
    objective = _objective(recipe, data, groups, network.outputs)
    fresh = seed if init_seed is None else init_seed
    params, buffers = network.init(fresh) if init is None else (dict(init.params), dict(init.buffers))
    params = {n: p.detach().clone().to(device).requires_grad_() for n, p in params.items()}
    buffers = {n: b.detach().clone().to(device) for n, b in buffers.items()}
    optimizer = make_optimizer(recipe, params.values())
    batches = math.ceil(len(data) / recipe.batch_size)
    losses: list[float] = []
    epoch_s: list[float] = []
    first = _restore(checkpoint.load(name), params, buffers, optimizer, objective, losses, best)
    saved = time.monotonic()
    for epoch in progress(range(first, recipe.epochs), name, recipe.epochs):
        if best is not None and best.stopped:
            break
        start = time.perf_counter()
        order = objective.order(seed, epoch).to(device)
        moves = draw_changes(recipe.augment, seed, epoch, len(data), network.size)
        moves = moves if moves is None else moves.to(device)
        total = torch.zeros((), device=device)
        for i, rows in enumerate(order.split(recipe.batch_size)):
            if skipped(len(rows), recipe, len(data)):
                continue
            step = epoch * batches + i
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr if constant_lr else learning_rate(recipe, step, recipe.epochs * batches)
            images = data.images[rows] if moves is None else changed(data.images[rows], moves[rows])
            loss = objective(training_logits(network, recipe, params, buffers, images), data.labels[rows], rows)
            total += loss.detach() * len(rows)
            penalised = loss + l2(params, recipe.prior_precision, len(data))
            optimizer.zero_grad()
            penalised.backward()
            optimizer.step()
            if on_step is not None:
                on_step(step, params, buffers)
        losses.append(float(total) / len(data))  # reads a value of the device: what was queued is done
        epoch_s.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            raise Diverged(
                f"{name}: the loss of epoch {epoch + 1} is not finite (training.lr={recipe.lr:g} too large?)"
            )
        if best is not None:
            best.see(network, Trained(params, buffers))
        # A callback keeps state that no checkpoint of ours holds: such a training starts again from its beginning.
        if on_step is None and time.monotonic() - saved > CHECKPOINT_EVERY_S:
            checkpoint.save(name, _state(params, buffers, optimizer, objective, losses, best))
            saved = time.monotonic()
    if best is not None and best.weights is not None:
        params, buffers = {n: p.requires_grad_() for n, p in best.weights.params.items()}, best.weights.buffers
    if recipe.polish:
        _polish(network, data, recipe, params, buffers)
    weights = {n: p.detach() for n, p in params.items()}
    return Trained(weights, {n: b.detach() for n, b in buffers.items()}, losses, epoch_s)


def patience(recipe: Training, tune: Part | None) -> BestEpoch | None:
    """Return what watches over one training, None where the recipe always takes all of its epochs."""
    if not recipe.patience:
        return None
    if tune is None:
        raise UserError(f"training.patience={recipe.patience}: there is no part tune here to stop early by: use 0")
    return BestEpoch(recipe.patience, tune)


def training_logits(
    network: Network, recipe: Training, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor
) -> Tensor:
    """Return the logits that training sees, in the recipe's numerics: BatchNorm by the batch, moving `buffers`."""
    dtype = next(iter(params.values())).dtype
    if recipe.channels_last:
        # A copy, for a convolution of one channel already counts as laid out either way, and would pass on the other.
        params = {n: p.clone(memory_format=torch.channels_last) if p.ndim == 4 else p for n, p in params.items()}
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.autocast == "bf16"):
        logits = network(params, buffers, images, train=True)
    return logits.to(dtype)


def _groups(recipe: Training, grouping: Callable[[str], Tensor] | None) -> Tensor | None:
    if recipe.objective != "group_dro":
        return None
    if grouping is None:
        raise UserError(f"groups={recipe.groups}: nothing is known about these training samples that could group them")
    return grouping(recipe.groups)


def _objective(recipe: Training, data: Part, groups: Tensor | None, classes: int) -> Objective:
    if groups is not None:
        return GroupDRO(groups.to(data.labels.device), recipe.group_step)
    if recipe.objective == "class_balanced":
        return ClassBalanced(data.labels, classes)
    return MeanLoss(len(data))


def gradient_norm(network: Network, data: Part, recipe: Training, trained: Trained) -> float:
    """Return |gradient| of the mean loss plus L2 term over all data, whatever the objective, BatchNorm in eval mode."""
    params = {n: p.detach().clone().requires_grad_() for n, p in trained.params.items()}
    _full_batch(network, data, recipe, params, trained.buffers)
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params.values() if p.grad is not None))


def _full_batch(
    network: Network, data: Part, recipe: Training, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Tensor:
    """Accumulate the gradient of the mean loss plus L2 term over all data and return its value."""
    value = torch.zeros((), device=data.images.device)
    for images, labels in zip(data.images.split(256), data.labels.split(256), strict=True):
        part = mean_loss(network(params, buffers, images), labels) * (len(images) / len(data))
        part.backward()
        value = value + part.detach()
    prior = l2(params, recipe.prior_precision, len(data))
    if prior.requires_grad:
        prior.backward()
    return value + prior.detach()


def learning_rate(recipe: Training, step: int, steps: int) -> float:
    """Return the rate of a step: the recipe's peak, decayed to 0 by a cosine."""
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def skipped(samples: int, recipe: Training, n: int) -> bool:
    """Return whether a batch is left out: BatchNorm cannot normalise one of a single sample."""
    return samples < 2 <= min(recipe.batch_size, n)


def l2(params: Mapping[str, Tensor], precision: float, n: int) -> Tensor:
    """Return the Gaussian prior as a term of the mean loss, `a/(2N) |w|^2`; of stacked weights, the sum of theirs."""
    return precision / (2 * n) * torch.stack([p.square().sum() for p in params.values()]).sum()


def make_optimizer(recipe: Training, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the recipe's optimiser: element by element, so that stacked weights are as good as apart."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(params, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(params, lr=recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=0.0)


def _polish(
    network: Network, data: Part, recipe: Training, params: dict[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Take `recipe.polish` L-BFGS steps on the mean loss plus L2 term, in place, with BatchNorm in eval mode."""
    lbfgs = torch.optim.LBFGS(params.values(), max_iter=recipe.polish, line_search_fn="strong_wolfe")

    def closure() -> float:
        lbfgs.zero_grad()
        return float(_full_batch(network, data, recipe, params, buffers))

    lbfgs.step(closure)


def state_of(
    params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return weights, buffers and the state of the optimiser, as tensors."""
    state = {f"param/{n}": p for n, p in params.items()} | {f"buffer/{n}": b for n, b in buffers.items()}
    for i, p in enumerate(params.values()):
        for key, value in optimizer.state.get(p, {}).items():
            if value is not None:
                state[f"optimizer/{i}/{key}"] = torch.as_tensor(value)
    return state


def restore_state(
    state: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put what `state_of` returned back in place."""
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(state[f"param/{n}"])
        for n, b in buffers.items():
            b.copy_(state[f"buffer/{n}"])
    leaves = list(params.values())
    for key, value in state.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            leaf = leaves[int(i)]
            value = value.clone()
            optimizer.state[leaf][name] = value.cpu() if name == "step" else value.to(leaf.device)


def _state(
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    losses: list[float],
    best: BestEpoch | None,
) -> dict[str, Tensor]:
    """Return everything that the rest of a training depends on, as tensors."""
    more = {f"objective/{n}": value for n, value in objective.state.items()}
    more |= {} if best is None else {f"best/{n}": value for n, value in best.state().items()}
    return state_of(params, buffers, optimizer) | more | {"losses": torch.tensor(losses, dtype=torch.float64)}


def _restore(
    state: Mapping[str, Tensor] | None,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    losses: list[float],
    best: BestEpoch | None,
) -> int:
    """Put a checkpoint back in place and return the epoch to go on with."""
    if state is None:
        return 0
    restore_state(state, params, buffers, optimizer)
    for n, before in objective.state.items():
        objective.state[n] = state[f"objective/{n}"].to(before.device)
    losses.extend(state["losses"].tolist())
    if best is not None:
        best.restore(under("best/", state))
    return len(losses)
