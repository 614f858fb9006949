"""What curvatures cost: our own against laplace-torch's on resnet18 with BatchNorm, and sets of last layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..generators.api import Part, Problem, Trained
from ..generators.modelset import DiagonalSet, KroneckerSet
from ..generators.native_curvature import diagonal_ggn, fit_kronecker, kronecker_factors
from ..generators.posterior import leaf_names
from .networks import Network
from .predict import choose_strategy, predict
from .timing import as_row, timed
from .toy import toy_problem

IMAGES = 64
"""Images on which Kronecker factors are timed, of both: what does not grow with images counts less per image."""

DIAGONAL_IMAGES = 16
"""Images on which our own diagonal is timed."""

FITTED, DRAWS = 1000, 10


def diag_resnet18() -> dict[str, Any]:
    """Time the exact diagonal of resnet18 (BatchNorm, 28 pixels, 2 classes), per image, against laplace-torch's.

    Ours on 16 images, laplace-torch's on a single one: its Jacobians are all held at once, and per image it takes
    longer with more of them. Both three times in turn, after a warm-up.
    """
    problem = _resnet(DIAGONAL_IMAGES)
    names, train = list(problem.base.params), problem.train

    def library() -> None:
        _backend(problem, names).diag(train.images[:1], train.labels[:1])

    own, theirs = _side_by_side(lambda: diagonal_ggn(problem, names), library)
    return as_row("diag_resnet18", [t / DIAGONAL_IMAGES for t in own], theirs)


def kfac_resnet18() -> dict[str, Any]:
    """Time the Kronecker factors of resnet18 (as above; kfac_approx=expand), per image, against laplace-torch's.

    Both on 64 images, three times in turn after a warm-up; ours with the norm layers, laplace-torch's without them, for
    it has none. The eigenvectors of the factors, which depend on no number of images, are left out of both.
    """
    problem = _resnet(IMAGES)
    names, covered = list(problem.base.params), leaf_names(problem.module(), "kron", "all")

    def ours() -> None:
        for factors in kronecker_factors(problem, names, "expand").values():
            factors.matrices()

    def library() -> None:
        _backend(problem, covered).kron(problem.train.images, problem.train.labels, N=IMAGES)

    own, theirs = _side_by_side(ours, library)
    return as_row("kfac_resnet18", [t / IMAGES for t in own], [t / IMAGES for t in theirs])


def last_layer_1000() -> dict[str, Any]:
    """Time 1,000 members of resnet18 that differ in the last layer, on 64 images, against two passes of its trunk.

    The strategy is chosen beforehand, as a run chooses it once for all of its images.
    """
    network, problem = Network({"name": "resnet18", "norm": "batch"}, 1, 28, 2), _resnet(64)
    names = leaf_names(problem.module(), "diag", "last_layer")
    mean = {n: problem.base.params[n] for n in names}
    shared = {n: p for n, p in problem.base.params.items() if n not in names}
    sd = torch.full((sum(p.numel() for p in mean.values()),), 0.01)
    members = DiagonalSet(1000, shared, dict(problem.base.buffers), mean=mean, factors={"sd": sd})
    module, images = problem.module(), problem.train.images
    strategy = choose_strategy(network, members, images)

    def trunk() -> None:
        with torch.no_grad():
            for _ in range(2):
                module(images)

    pairs = [(timed(lambda: predict(network, members, images, strategy=strategy)), timed(trunk)) for _ in range(6)][1:]
    row = as_row("last_layer_1000", [own for own, _ in pairs], [passes for _, passes in pairs])
    return row | {"text": f"the strategy was {strategy}"}


def kfac_1000_images() -> tuple[str, str]:
    """Return how long KFAC takes on 1,000 images of resnet18, and 10 draws from it, either way."""
    problem = _resnet(FITTED)
    names, told = list(problem.base.params), []
    mean, buffers = dict(problem.base.params), dict(problem.base.buffers)
    for approximation in ("reduce", "expand"):
        start = time.perf_counter()
        found = fit_kronecker(problem, names, approximation)
        fitted = time.perf_counter() - start
        factors = {n: t for n, t in found.items() if n.startswith(("values", "vectors"))}
        members = KroneckerSet(DRAWS, {}, buffers, mean=mean, factors=factors, scale=100.0)
        for k in range(DRAWS):
            members.perturbation(k)
        told.append(f"{approximation} {fitted:.0f} s, draws {time.perf_counter() - start - fitted:.0f} s")
    return f"KFAC of resnet18 (BatchNorm, 28 pixels) on {FITTED:,} images, and {DRAWS} draws", "; ".join(told)


MEASURES = (diag_resnet18, kfac_resnet18, last_layer_1000)
FIGURES = (kfac_1000_images,)


def _resnet(images: int) -> Problem:
    """Return a problem with resnet18 at fresh weights on random images."""
    network = Network({"name": "resnet18", "norm": "batch"}, 1, 28, 2)
    base, generator = Trained(*network.init(0)), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return replace(
        toy_problem("mlp"),
        network=network,
        base=base,
        module=lambda: network.module(base.params, base.buffers),
        train=Part(pixels, torch.arange(images) % 2),
        task="binary",
        classes=2,
    )


def _backend(problem: Problem, names: list[str]) -> Any:
    """Return laplace-torch's own curvature of the leaves `names`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace.curvature import CurvlinopsGGN

    module: nn.Module = problem.module()
    for name, leaf in module.named_parameters():
        leaf.requires_grad_(name in names)
    return CurvlinopsGGN(module, "classification")


def _side_by_side(ours: Callable[[], Any], library: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Return the seconds of three runs of both in turn, after a warm-up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [(timed(ours), timed(library)) for _ in range(4)][1:]
    return [own for own, _ in pairs], [theirs for _, theirs in pairs]
