"""How costs grow with members, images and weights, how much of a device is used, and which layouts pay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..generators.api import Part, Problem
from ..generators.native_curvature import diagonal_ggn, fit_kronecker
from .networks import Network
from .predict import choose_strategy, predict
from .speed_baselines import (
    Retraining,
    diagonal_set,
    draw_from,
    fresh_problem,
    phantom_part,
    plain_prediction,
    plain_training,
    plain_trainings,
    random_images,
)
from .timing import CPU, compare, timed
from .train import Training, l2, make_optimizer, mean_loss, train, training_logits

Row = dict[str, Any]

MEMBERS = (1, 4, 16, 64, 256)
IMAGES = (1_000, 10_000, 100_000)
CNN_WIDTHS = (12, 32, 104, 332)
"""Of smallcnn, for about 1e4, 1e5, 1e6 and 1e7 weights."""

MLP_WIDTHS = (12, 110, 680, 2800)
"""Of an MLP on 28 pixels, for about as many."""

DRAWS = 10


def training_by_members(device: torch.device) -> list[Row]:
    """Time the training of smallcnn on 64 images (an epoch) against as many plain loops, by number of members."""
    network, data, recipe = Network({"name": "smallcnn"}, 1, 28, 2), phantom_part(64, device), Training(epochs=1)
    rows = []
    for n in MEMBERS:
        plain = partial(plain_trainings, network, data, recipe, n)
        row = compare("training_by_members", device, Retraining(network, data, recipe, n), plain)
        rows.append(_grown(row, "members", n))
    return rows


def training_by_weights(device: torch.device) -> list[Row]:
    """Time the training of one smallcnn on 32 images (an epoch of one step) against a plain loop, by its weights."""
    data, recipe, rows = phantom_part(32, device), Training(epochs=1), []
    for width in CNN_WIDTHS:
        network = Network({"name": "smallcnn", "width": width}, 1, 28, 2)
        ours, plain = partial(train, network, data, recipe, 0), partial(plain_training, network, data, recipe)
        rows.append(_grown(compare("training_by_weights", device, ours, plain), "weights", weights_of(network)))
    return rows


def prediction_by_members(device: torch.device) -> list[Row]:
    """Time the prediction of sampled members of smallcnn on 100 images against the usual loop, by their number."""
    network, images = Network({"name": "smallcnn"}, 1, 28, 2), phantom_part(100, device).images
    return [_prediction("prediction_by_members", network, n, images, "members", n) for n in MEMBERS]


def prediction_by_images(device: torch.device) -> list[Row]:
    """Time the prediction of two members of a smallcnn of width 4 against the usual loop, by the number of images."""
    network, rows = Network({"name": "smallcnn", "width": 4}, 1, 28, 2), []
    for n in IMAGES:
        images = random_images(n).to(device)
        rows.append(_prediction("prediction_by_images", network, 2, images, "images", n))
    return rows


def prediction_by_weights(device: torch.device) -> list[Row]:
    """Time the prediction of four members of smallcnn on 32 images against the usual loop, by their weights."""
    images, rows = phantom_part(32, device).images, []
    for width in CNN_WIDTHS:
        network = Network({"name": "smallcnn", "width": width}, 1, 28, 2)
        rows.append(_prediction("prediction_by_weights", network, 4, images, "weights", weights_of(network)))
    return rows


def diagonal_by_images() -> list[Row]:
    """Time the exact diagonal of an MLP (26,000 weights) against laplace-torch's, by the number of images."""
    rows = []
    for n in IMAGES:
        problem = fresh_problem({"name": "mlp", "width": 32}, n)
        ours = partial(diagonal_ggn, problem, list(problem.base.params))
        rows.append(_grown(compare("diagonal_by_images", CPU, ours, _library_fit(problem, "diag", 0)), "images", n))
    return rows


def kfac_by_weights() -> list[Row]:
    """Time Kronecker factors of an MLP on 64 images, their eigenvectors and 10 draws against laplace-torch's."""
    rows = []
    for width in MLP_WIDTHS:
        problem = fresh_problem({"name": "mlp", "width": width}, 64)
        row = compare("kfac_by_weights", CPU, partial(_fit_and_draw, problem), _library_fit(problem, "kron", DRAWS))
        rows.append(_grown(row, "weights", sum(p.numel() for p in problem.base.params.values())))
    return rows


MEASURES = (
    training_by_members,
    training_by_weights,
    prediction_by_members,
    prediction_by_images,
    prediction_by_weights,
)
ON_CPU = (diagonal_by_images, kfac_by_weights)


def share_of_peak() -> tuple[str, str]:
    """Return how fast work is beside a product of square matrices in float32 (timed in turn), as a device's peak."""
    from torch.utils.flop_counter import FlopCounterMode

    told = []
    for device in _devices():
        side, data = 8192 if device.type == "cuda" else 2048, phantom_part(64, device)
        matrix, product = torch.rand(side, side, device=device), torch.empty(side, side, device=device)
        multiply = partial(torch.mm, matrix, matrix, out=product)
        for name, norm in (("smallcnn", "group"), ("resnet18", "batch")):
            network = Network({"name": name, "norm": norm}, 1, 28, 2)
            members = diagonal_set(network, 2, device)
            works: dict[str, Callable[[], Any]] = {
                "training": partial(train, network, data, Training(epochs=1), 0),
                "prediction": partial(predict, network, members, data.images, strategy="loop"),
            }
            for what, work in works.items():
                with FlopCounterMode(display=False) as counted:
                    work()
                row = compare("", device, work, multiply)
                share = counted.get_total_flops() / row["ours_s"] / (2 * side**3 / row["baseline_s"])
                peak = 2 * side**3 / row["baseline_s"] / 1e9
                told.append(f"{device.type}, {what} of {name}: {share:.0%} of {peak:,.0f} GFLOP/s")
    return "share of the measured peak (a product of square matrices in float32)", "; ".join(told)


def layouts() -> tuple[str, str]:
    """Return how many times faster a step of training is with channels_last, and compiled by torch.compile."""
    told = []
    for device in _devices():
        for name, norm in (("smallcnn", "group"), ("smallcnn", "batch"), ("resnet18", "batch")):
            network, data = Network({"name": name, "norm": norm}, 1, 28, 2), phantom_part(32, device)
            plain, turned = _step(network, data), _step(network, data, channels_last=True)
            compiled = _step(network, data, compiled=True)
            first = timed(compiled, device)
            ratios = [compare("", device, way, plain)["ratio"] for way in (turned, compiled)]
            told.append(
                f"{device.type}, {name} ({norm}): {ratios[0]:.2f}, {ratios[1]:.2f} after {first:.0f} s of compiling"
            )
    return "a step of training with channels_last, and by torch.compile, times as fast as without", "; ".join(told)


FIGURES = (share_of_peak, layouts)


def weights_of(network: Network) -> int:
    """Return the number of a network's weights."""
    return sum(p.numel() for p in network.init(0)[0].values())


def _grown(row: Row, by: str, size: int) -> Row:
    return row | {"by": by, "size": size}


def _prediction(name: str, network: Network, members: int, images: torch.Tensor, by: str, size: int) -> Row:
    drawn = diagonal_set(network, members, images.device)
    strategy = choose_strategy(network, drawn, images)
    ours = partial(predict, network, drawn, images, strategy=strategy)
    return _grown(compare(name, images.device, ours, partial(plain_prediction, network, drawn, images)), by, size)


def _fit_and_draw(problem: Problem) -> None:
    draw_from(problem, fit_kronecker(problem, list(problem.base.params)), DRAWS)


def _library_fit(problem: Problem, structure: str, draws: int) -> Callable[[], Any]:
    """Return laplace-torch's fit, in batches of 128 images, and its draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace
        from torch.utils.data import DataLoader, TensorDataset

    batches = DataLoader(TensorDataset(problem.train.images, problem.train.labels), batch_size=128)

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Laplace(problem.module(), "classification", subset_of_weights="all", hessian_structure=structure)
            found.fit(batches)
            if draws:
                found.sample(draws)

    return fit


def _step(network: Network, data: Part, *, channels_last: bool = False, compiled: bool = False) -> Callable[[], Any]:
    """Return one step of training on all of `data`."""
    recipe, device = Training(channels_last=channels_last), data.images.device
    params, buffers = ({n: t.to(device) for n, t in leaves.items()} for leaves in network.init(0))
    params = {n: p.requires_grad_() for n, p in params.items()}
    optimizer = make_optimizer(recipe, params.values())

    def loss() -> torch.Tensor:
        logits = training_logits(network, recipe, params, buffers, data.images)
        return mean_loss(logits, data.labels) + l2(params, recipe.prior_precision, len(data))

    function = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad()
        function().backward()
        optimizer.step()

    return step


def _devices() -> list[torch.device]:
    return [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
