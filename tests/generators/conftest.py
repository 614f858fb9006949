"""Toy problems that are trained once, small untrained ones for exact references, and the dense GGN in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.toy import toy_problem
from multiplicity_bench.generators.api import Memory, Part, Problem, Trained
from multiplicity_bench.generators.modelset import ModelSet
from torch import Tensor


@pytest.fixture(scope="session")
def toy() -> Callable[..., Problem]:
    """Return `toy(network, **settings)`: a toy problem with a trained base, its curvature parts computed once."""

    @cache
    def trained(network: str, **settings: Any) -> Problem:
        return _shared_parts(toy_problem(network, **settings))

    def make(network: str = "mlp", members: int = 6, **settings: Any) -> Problem:
        return replace(trained(network, **settings), members=members, checkpoint=Memory())

    return make


@pytest.fixture(scope="session")
def untrained(toy) -> Callable[..., Problem]:
    """Return `untrained(network, size=, classes=, n=, **settings)`: fresh weights and `n` random images, for algebra.

    The curvature is that of any weights; BatchNorm statistics are made unequal to their initial 0 and 1.
    """

    def make(network: str, size: int = 3, classes: int = 3, n: int = 12, members: int = 4, **settings: Any) -> Problem:
        function = Network({"name": network, **settings}, 1, size, classes)
        generator = torch.Generator().manual_seed(5)
        images = torch.randint(0, 256, (2 * n, 1, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(2 * n) % classes
        base = Trained(*function.init(3))
        # Norm layers start at weight 1, bias 0 and statistics 0 and 1: a reference must not pass by that.
        base.params = {
            k: p + 0.1 * torch.randn(p.shape, generator=generator) if p.ndim == 1 else p for k, p in base.params.items()
        }
        base.buffers = {
            k: b + 0.5 * torch.rand(b.shape, generator=generator) if b.is_floating_point() else b
            for k, b in base.buffers.items()
        }
        return _shared_parts(
            replace(
                toy("mlp"),
                network=function,
                base=base,
                module=lambda: function.module(base.params, base.buffers),
                train=Part(images[:n], labels[:n]),
                tune=Part(images[n:], labels[n:]),
                task="binary" if classes == 2 else "multiclass",
                classes=classes,
                members=members,
            )
        )

    return make


@pytest.fixture(scope="session")
def with_labels() -> Callable[[Problem], Problem]:
    """Return `with_labels(problem)`: the same images with three random labels each, a quarter of them missing."""

    def several(problem: Problem) -> Problem:
        random = torch.rand(2 * len(problem.train), 3, generator=torch.Generator().manual_seed(4))
        train, tune = ((random > 0.6).long() - (random < 0.25).long()).split(len(problem.train))
        return replace(
            problem,
            train=Part(problem.train.images, train),
            tune=Part(problem.tune.images, tune),
            task="multilabel",
        )

    return several


def _shared_parts(problem: Problem) -> Problem:
    stored: dict[str, dict[str, Tensor]] = {}

    def part(name: str, spec: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = f"{name} {sorted(spec.items())}"
        if key not in stored:
            stored[key] = compute()
        return stored[key]

    return replace(problem, part=part)


def flat(leaves: dict[str, Tensor]) -> Tensor:
    """Return all leaves as one vector [param] in float64, in their order."""
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in leaves.values()])


@pytest.fixture(scope="session")
def draws() -> Callable[[ModelSet], Tensor]:
    """Return `draws(model_set)`: the varying weights of all members, float64 [member, param]."""
    return lambda model_set: torch.stack([flat(model_set.leaves(k)) for k in range(model_set.size)])


@pytest.fixture(scope="session")
def worst_moments() -> Callable[[Tensor, Tensor, Tensor], tuple[float, float]]:
    """Return `worst_moments(draws, mean, covariance)`: the largest |z| of an empirical mean and of a covariance entry.

    For n Gaussian draws the mean has variance S_ii / n, an entry of the covariance (S_ii S_jj + S_ij^2) / n.
    """

    def compare(found: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
        n, variance = len(found), covariance.diagonal()
        centred = found - mean
        of_mean = (centred.mean(0) / (variance / n).sqrt()).abs().max()
        error = centred.T @ centred / n - covariance
        of_covariance = (error / ((torch.outer(variance, variance) + covariance**2) / n).sqrt()).abs().max()
        return float(of_mean), float(of_covariance)

    return compare


@pytest.fixture(scope="session")
def dense_ggn() -> Callable[..., Tensor]:
    """Return `dense_ggn(problem, names)`: sum_i J_i' H_i J_i over train [param, param] in float64.

    Jacobians and the Hessians H_i of the loss in the logits are explicit (one image at a time): an independent way,
    nothing of laplace-torch.
    """

    def compute(problem: Problem, names: list[str] | None = None) -> Tensor:
        names = list(problem.base.params) if names is None else names
        params = {k: p.double() for k, p in problem.base.params.items()}
        buffers = {k: b.double() if b.is_floating_point() else b for k, b in problem.base.buffers.items()}
        varied = {k: params[k] for k in names}

        def logits(varied: dict[str, Tensor], image: Tensor) -> Tensor:
            return problem.network({**params, **varied}, buffers, image[None])[0]

        total = torch.zeros(())
        for image, label in zip(problem.train.images, problem.train.labels):
            jacobians = torch.func.jacrev(logits)(varied, image)
            jacobian = torch.cat([jacobians[k].reshape(problem.classes, -1) for k in names], 1)
            loss = lambda z, label=label: problem.loss(z[None], label[None])  # noqa: E731
            total = total + jacobian.T @ torch.func.hessian(loss)(logits(varied, image)) @ jacobian
        return total

    return compute
