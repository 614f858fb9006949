"""Penultimate features of every member of a set, and what out-of-distribution detectors make of them and of logits.

The detectors are those of pytorch-ood, fitted for every member on its own features of train. A higher score means
further from the training data. Members without features of their own are a skip with its reason (`skip_reason`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..generators.api import Part, Trained
from ..generators.modelset import Block, ModelSet
from ..metrics.api import Undefined
from ..metrics.views import DETECTORS
from .networks import Network
from .predict import BATCH

NEIGHBOURS = 50
"""The k of the nearest-neighbour detector: the choice of its authors for 10 classes, and the library's default."""
ACCURACY = 0.05
"""Relative error of a Mahalanobis score beyond which it is not given."""
_RIDGE = 1e-6  # that the library adds to the scatter matrix


@dataclass(frozen=True)
class Embedded:
    """Images as a network sees them: features float32 [sample, feature], logits float32 [sample, class]."""

    features: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class DetectorScores:
    """What the detectors say of the images of several views, for every member of a block.

    views: name -> float32 [member, detector, sample], detectors in the order asked for, NaN where undefined;
    reasons: detector -> {index of the member in the block: why its scores are NaN}.
    """

    views: dict[str, np.ndarray]
    reasons: dict[str, dict[int, str]]


def without_features(network: Network) -> str:
    """Return why a network has no penultimate features, "" where it has: its only layer with weights is the last."""
    return _without_features(network, network.module(*network.init(0)))


def skip_reason(network: Network, model_set: ModelSet) -> str:
    """Return why the members of a set have no features of their own, "" where they have."""
    block = model_set.block(0, 1)
    if block.expand_at is not None:
        return "members of the linearised network have no features of their own"
    if block.output is not None:
        return "members that change the outputs of the base have no features of their own"
    return without_features(network)


def embed(network: Network, trained: Trained, images: Any, batch: int = BATCH) -> Embedded:
    """Return the input of the network's last linear layer, and its logits, for uint8 images.

    Raises UserError for a network without such features.
    """
    module = network.module(trained.params, trained.buffers)
    if reason := _without_features(network, module):
        raise UserError(f"{reason}: choose another network")
    last = module.get_submodule(_last_linear(module))
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).cpu()))
    try:
        with torch.no_grad():
            logits = torch.cat([module(part).cpu() for part in images.split(batch)])
    finally:
        handle.remove()
    return Embedded(torch.cat(seen).numpy(), logits.numpy())


def features(network: Network, block: Block, images: Any, batch: int = BATCH) -> Iterator[Embedded]:
    """Yield penultimate features and logits of every member of a block, in order, for uint8 images.

    Members that differ in the last linear layer alone share their features, which one pass over the images makes.
    Raises UserError for a network without features, ValueError for members without features of their own (see
    `skip_reason`).
    """
    if block.expand_at is not None or block.output is not None:
        raise ValueError("these members have no features of their own")
    last = _last_linear(network.module(*block.member(0)))
    if block.buffers or set(block.params) - {f"{last}.weight", f"{last}.bias"}:
        for k in range(block.size):
            yield embed(network, Trained(*block.member(k)), images, batch)
        return
    shared = embed(network, Trained(*block.member(0)), images, batch)
    for k in range(block.size):
        layer = _last_layer(last, Trained(*block.member(k)))
        logits = nn.functional.linear(torch.from_numpy(shared.features), layer.weight, layer.bias)
        yield Embedded(shared.features, logits.numpy())


def detector_scores(
    network: Network,
    block: Block,
    train: Part,
    views: Mapping[str, Any],
    batch: int = BATCH,
    detectors: Sequence[str] = DETECTORS,
) -> DetectorScores:
    """Return the scores of the detectors for every member of a block (a base: `base_block`) on images by view.

    Each member's detectors are fitted once, on its features of `train`; the cost of a member is one pass over train and
    over the images. energy: `-log sum exp(logits)` (Liu et al., NeurIPS 2020); max_logit (Hendrycks et al., ICML 2022);
    mahalanobis: distance to the nearest class mean, shared covariance (Lee et al., NeurIPS 2018; the root of their
    score, which ranks alike and is not beyond half precision); knn: distance to the 50th nearest feature, of unit
    length (Sun et al., ICML 2022); vim: virtual logit of the residual to the principal subspace, of half the features,
    less `log sum exp(logits)` (Wang et al., CVPR 2022).

    A detector that cannot be fitted to a member is NaN with its reason: with several labels per image those that need
    one class; a class without images; fewer images than neighbours; a covariance that the library, which works in
    float32, cannot invert to `ACCURACY`. Raises as `features`.
    """
    last = _last_linear(network.module(*block.member(0)))
    labels = train.labels.cpu()
    values = {v: np.full((block.size, len(detectors), len(i)), np.nan, np.float32) for v, i in views.items()}
    reasons: dict[str, dict[int, str]] = {}
    passes = [features(network, block, images, batch) for images in (train.images, *views.values())]
    for k, (fitted_on, *asked) in enumerate(zip(*passes, strict=True)):
        layer = _last_layer(last, Trained(*block.member(k)))
        for d, name in enumerate(detectors):
            try:
                score = _FIT[name](fitted_on, labels, layer)
            except Undefined as reason:
                reasons.setdefault(name, {})[k] = str(reason)
                continue
            for view, embedded in zip(views, asked, strict=True):
                values[view][k, d] = score(embedded).numpy()
    return DetectorScores(values, reasons)


_Score = Callable[[Embedded], Tensor]


@dataclass(frozen=True)
class _Layer:
    weight: Tensor
    bias: Tensor


def _without_features(network: Network, module: nn.Module) -> str:
    last = _last_linear(module)
    own = {f"{last}.weight", f"{last}.bias"}
    if last and {name for name, _ in module.named_parameters()} - own:
        return ""
    return f"network={network.spec['name']} has no penultimate features"


def _last_linear(module: nn.Module) -> str:
    """Return the name of the last linear layer, "" where there is none."""
    return next((n for n, layer in reversed(list(module.named_modules())) if isinstance(layer, nn.Linear)), "")


def _last_layer(name: str, member: Trained) -> _Layer:
    weight = member.params[f"{name}.weight"].detach().cpu()
    bias = member.params.get(f"{name}.bias")
    return _Layer(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().cpu())


def _energy(train: Embedded, labels: Tensor, layer: _Layer) -> _Score:
    from pytorch_ood.detector import EnergyBased

    _need_one_class(labels)
    return lambda seen: EnergyBased.score(torch.from_numpy(seen.logits))


def _max_logit(train: Embedded, labels: Tensor, layer: _Layer) -> _Score:
    from pytorch_ood.detector import MaxLogit

    return lambda seen: MaxLogit.score(torch.from_numpy(seen.logits))


def _mahalanobis(train: Embedded, labels: Tensor, layer: _Layer) -> _Score:
    from pytorch_ood.detector import Mahalanobis

    _need_one_class(labels)
    known = labels >= 0
    y, z = labels[known], torch.from_numpy(train.features)[known]
    for c in range(len(layer.bias)):
        if not (y == c).any():
            raise Undefined(f"class {c} has no image in train")
    try:
        detector = Mahalanobis(None).fit_features(z, y)
        error = _relative_error(detector.precision.double().numpy(), z.double().numpy(), y.numpy())
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):
        error = np.inf
    if not error <= ACCURACY:
        raise Undefined(f"the covariance of {z.shape[1]} features of {len(z)} images is numerically singular")
    return lambda seen: (2 * detector.predict_features(torch.from_numpy(seen.features))).sqrt()


def _relative_error(precision: np.ndarray, features: np.ndarray, labels: np.ndarray) -> float:
    """Return the largest relative error of any squared distance z'Pz, P [feature, feature] against the exact inverse.

    It is `max |lambda - 1|`, lambda the eigenvalues of L'PL with LL' the scatter matrix. A large condition number is no
    sign of a large error: features of different scales, dead ones among them, are inverted well.
    """
    scatter = _RIDGE * np.eye(features.shape[1])
    for c in np.unique(labels):
        centred = features[labels == c] - features[labels == c].mean(axis=0)
        scatter += centred.T @ centred
    root = np.linalg.cholesky(scatter)
    return float(np.abs(np.linalg.eigvalsh(root.T @ (precision + precision.T) @ root / 2) - 1).max())


def _knn(train: Embedded, labels: Tensor, layer: _Layer) -> _Score:
    from pytorch_ood.detector import KNN

    if len(labels) < NEIGHBOURS:
        raise Undefined(f"train has {len(labels)} images, {NEIGHBOURS} neighbours are needed")
    known = torch.zeros(len(labels), dtype=torch.int64)  # neighbours need no class
    detector = KNN(None, k=NEIGHBOURS).fit_features(torch.from_numpy(train.features), known)
    return lambda seen: detector.predict_features(torch.from_numpy(seen.features))


def _vim(train: Embedded, labels: Tensor, layer: _Layer) -> _Score:
    from pytorch_ood.detector import ViM

    _need_one_class(labels)
    half = train.features.shape[1] // 2
    detector = ViM(None, half, layer.weight, layer.bias).fit_features(torch.from_numpy(train.features), labels)
    return lambda seen: detector.predict_features(torch.from_numpy(seen.features))


def _need_one_class(labels: Tensor) -> None:
    if labels.ndim > 1:
        raise Undefined("defined for one class per image, these have several labels")


_FIT: dict[str, Callable[[Embedded, Tensor, _Layer], _Score]] = {
    "energy": _energy,
    "max_logit": _max_logit,
    "mahalanobis": _mahalanobis,
    "knn": _knn,
    "vim": _vim,
}
