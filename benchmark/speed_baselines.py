"""What rows of SPEED.md are measured on, what `retrain` does, and the plain PyTorch that both are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.phantom_cxr import PhantomCXR
from ..generators.api import AtOnce, Part, Plan, Problem, Trained
from ..generators.modelset import DiagonalSet, KroneckerSet
from .ensemble import Together
from .networks import MaxPool2, Network
from .toy import toy_problem
from .train import Training, train


def phantom_part(n: int, device: torch.device) -> Part:
    """Return training images of 28 pixels."""
    split = PhantomCXR(train=n, val=50, test=50).load(None).splits["train"]
    return Part(torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device))


def diagonal_set(network: Network, members: int, device: torch.device) -> DiagonalSet:
    """Return a set of random members of a network, near a random base."""
    params, buffers = ({n: leaf.to(device) for n, leaf in leaves.items()} for leaves in network.init(0))
    sd = torch.full((sum(p.numel() for p in params.values()),), 0.01, device=device)
    return DiagonalSet(members, {}, buffers, mean=params, factors={"sd": sd})


def random_images(n: int) -> Tensor:
    """Return made-up images of 28 pixels, uint8 [sample, 1, 28, 28]."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8))


def fresh_problem(spec: dict[str, Any], images: int) -> Problem:
    """Return a problem of two classes with a network at fresh weights, on random images."""
    network = Network(spec, 1, 28, 2)
    base = Trained(*network.init(0))
    return replace(
        toy_problem("mlp"),
        network=network,
        base=base,
        module=lambda: network.module(base.params, base.buffers),
        train=Part(random_images(images), torch.arange(images) % 2),
        task="binary",
        classes=2,
    )


def draw_from(problem: Problem, found: Mapping[str, Tensor], draws: int) -> None:
    """Draw members from the Kronecker factors that `fit_kronecker` found."""
    factors = {n: t for n, t in found.items() if n.startswith(("values", "vectors"))}
    mean, buffers = dict(problem.base.params), dict(problem.base.buffers)
    members = KroneckerSet(draws, {}, buffers, mean=mean, factors=factors, scale=100.0)
    for k in range(draws):
        members.perturbation(k)


class Retraining:
    """The training of several networks as `retrain` does it on this device: at once where that is faster."""

    def __init__(self, network: Network, data: Part, recipe: Training, members: int):
        self.network, self.data, self.recipe = network, data, recipe
        self.plans, self.together = [Plan(seed=k) for k in range(members)], Together(network, data, recipe)
        self.how = self.together.at_once(members) if data.images.is_cuda else AtOnce(1)

    def __call__(self) -> None:
        """Train them."""
        if self.how.members == 1:
            for plan in self.plans:
                train(self.network, self.data, self.recipe, plan.seed)
            return
        for start in range(0, len(self.plans), self.how.members):
            self.together(self.plans[start : start + self.how.members], way=self.how.way)


def plain_trainings(network: Network, data: Part, recipe: Training, members: int) -> None:
    """Train several networks, one plain loop after the other."""
    for _ in range(members):
        plain_training(network, data, recipe)


def plain_training(network: Network, data: Part, recipe: Training) -> None:
    """Train one network by the recipe, as a plain loop would."""
    device = data.images.device
    module = network.module(*network.init(0)).to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=0.0)
    steps = recipe.epochs * -(-len(data) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(data)).to(device).split(recipe.batch_size):
            loss = nn.functional.cross_entropy(module(data.images[rows]), data.labels[rows])
            loss = loss + recipe.prior_precision / (2 * len(data)) * sum(p.square().sum() for p in module.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def plain_prediction(network: Network, members: DiagonalSet, images: Tensor) -> list[Tensor]:
    """Return the logits of every member, drawn and predicted with the usual `vector_to_parameters` loop.

    Of torch's own layers: pooling, too.
    """
    module = network.module(members.mean, members.shared_buffers)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, MaxPool2):
            module.set_submodule(name, nn.MaxPool2d(2))
    mean, logits = torch.cat([leaf.reshape(-1) for leaf in members.mean.values()]), []
    with torch.no_grad():
        for k in range(members.size):
            nn.utils.vector_to_parameters(mean + members.perturbation(k), module.parameters())
            logits.append(torch.cat([module(batch) for batch in images.split(256)]).cpu())
    return logits
