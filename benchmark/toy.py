"""A toy problem that every generator finishes in seconds: for contract tests of built-in and third-party generators."""

from __future__ import annotations

from typing import Any

import torch

from ..generators.api import Memory, Part, Problem, Trained
from .networks import Network
from .objectives import Grouping
from .train import Training, mean_loss, train


def toy_problem(
    network: str = "mlp", members: int = 6, n: int = 160, classes: int = 2, seed: int = 0, **settings: Any
) -> Problem:
    """Return a problem of `n` noisy 6 x 6 images in `classes` classes, with a base trained on it in about a second.

    `settings` are the network's (`norm="batch"`).
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.rand(classes, 1, 6, 6, generator=generator) * 120 + 60
    images = (centres[labels] + 70 * torch.randn(n, 1, 6, 6, generator=generator)).clamp(0, 255).to(torch.uint8)
    cut = n * 3 // 4
    data, tune = Part(images[:cut], labels[:cut]), Part(images[cut:], labels[cut:])
    function = Network(
        {"name": network, **({"width": 8} if network in ("mlp", "smallcnn") else {}), **settings}, 1, 6, classes
    )
    return problem_of(function, data, tune, Training(epochs=8, lr=0.01), members, seed)


def problem_of(network: Network, data: Part, tune: Part, recipe: Training, members: int, seed: int = 0) -> Problem:
    """Return a single-label problem on these images, with a base that the recipe trains on `data`."""
    grouping = Grouping(data.labels.cpu().numpy())

    def fit(seed: int, **arguments: Any) -> Trained:
        return train(
            network,
            data,
            recipe,
            seed,
            tune=tune,
            grouping=grouping.codes,
            **{"checkpoint": problem.checkpoint, **arguments},
        )

    problem = Problem(
        network=network,
        base=Trained(*network.init(seed)),
        module=lambda: network.module(problem.base.params, problem.base.buffers),
        train=data,
        tune=tune,
        task="binary" if network.outputs == 2 else "multiclass",
        classes=network.outputs,
        loss=mean_loss,
        prior_precision=recipe.prior_precision,
        batch_size=recipe.batch_size,
        fit=fit,
        groups=grouping.codes,
        members=members,
        base_seed=seed,
        device=data.images.device,
    )
    problem.base = fit(seed)
    problem.checkpoint = Memory()
    return problem
