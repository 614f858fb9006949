"""What curvatures cost: our own against laplace-torch's on resnet18 with BatchNorm, and sets of last layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..generators.api import Problem
from ..generators.modelset import DiagonalSet
from ..generators.native_curvature import diagonal_ggn, fit_kronecker, kronecker_factors
from ..generators.posterior import leaf_names
from .networks import Network
from .predict import choose_strategy, predict
from .speed_baselines import draw_from, fresh_problem
from .timing import CPU, compare

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

    return _per_image("diag_resnet18", lambda: diagonal_ggn(problem, names), DIAGONAL_IMAGES, library, 1)


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

    return _per_image("kfac_resnet18", ours, IMAGES, library, IMAGES)


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

    row = compare("last_layer_1000", CPU, lambda: predict(network, members, images, strategy=strategy), trunk)
    return row | {"text": f"the strategy was {strategy}"}


def kfac_1000_images() -> tuple[str, str]:
    """Return how long KFAC takes on 1,000 images of resnet18, and 10 draws from it, either way."""
    problem = _resnet(FITTED)
    names, told = list(problem.base.params), []
    for approximation in ("reduce", "expand"):
        start = time.perf_counter()
        found = fit_kronecker(problem, names, approximation)
        fitted = time.perf_counter() - start
        draw_from(problem, found, DRAWS)
        told.append(f"{approximation} {fitted:.0f} s, draws {time.perf_counter() - start - fitted:.0f} s")
    return f"KFAC of resnet18 (BatchNorm, 28 pixels) on {FITTED:,} images, and {DRAWS} draws", "; ".join(told)


MEASURES = (diag_resnet18, kfac_resnet18, last_layer_1000)
FIGURES = (kfac_1000_images,)


def _resnet(images: int) -> Problem:
    return fresh_problem({"name": "resnet18", "norm": "batch"}, images)


def _backend(problem: Problem, names: list[str]) -> Any:
    """Return laplace-torch's own curvature of the leaves `names`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace.curvature import CurvlinopsGGN

    module: nn.Module = problem.module()
    for name, leaf in module.named_parameters():
        leaf.requires_grad_(name in names)
    return CurvlinopsGGN(module, "classification")


def _per_image(
    name: str, ours: Callable[[], Any], images: int, library: Callable[[], Any], their_images: int
) -> dict[str, Any]:
    """Return a row of seconds per image, of three runs of both in turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = compare(name, CPU, ours, library, repeats=3)
    own, theirs = row["ours_s"] / images, row["baseline_s"] / their_images
    return row | {"ours_s": own, "baseline_s": theirs, "ratio": theirs / own}
