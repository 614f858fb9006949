"""What rows of SPEED.md are measured on, what `retrain` does, and the plain PyTorch that both are held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..datasets.phantom_cxr import PhantomCXR
from ..generators.api import AtOnce, Part, Plan
from ..generators.modelset import DiagonalSet
from .ensemble import Together
from .networks import MaxPool2, Network
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
