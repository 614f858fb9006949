"""Explanations of a block's members: input gradient, integrated gradients and Grad-CAM, one map per member and image.

What is explained is the margin of one class per image, the one that the base decides, so that all members answer the
same question: of two classes its logit minus the other's, of more its logit, of several labels the logit of the label
that the base finds most probable. What the maps are worth is seen beside two comparators: networks of fresh weights
(the null) and the base on images with rounding noise (the ceiling); see `metrics/explanations.py`.

Sets that act on the outputs (`Block.output`: temperature scales a map, logit noise adds a constant to the margin) are
explained by the network before `output`, for every member alike. Members of a linearised set are explained by the
function that they are, `f(w*) + J (w - w*)`, whose derivative by the image is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..generators.api import choices
from ..generators.modelset import Block, Leaves, StackedSet, stack
from ..identity import derive_seed
from ..metrics.api import Undefined
from ..metrics.context import decide
from .networks import Network
from .predict import BATCH, STRATEGIES, predict_block

METHODS = ("gradient", "integrated_gradients", "grad_cam")
STEPS = 16
"""Points of the path from black to the image at which integrated gradients take the gradient."""
RANDOM_NETWORKS = 5


@dataclass(frozen=True)
class Completeness:
    """What integrated gradients owe to their finite number of steps, in logits: float64 [member, sample].

    error: sum of the map minus `change`; change: margin of the image minus margin of the black image.
    """

    error: np.ndarray
    change: np.ndarray

    @property
    def share(self) -> float:
        """`sum |error| / sum |change|`; NaN where no margin changes."""
        change = float(np.abs(self.change).sum())
        return float(np.abs(self.error).sum()) / change if change else float("nan")


def explained_classes(base_logits: np.ndarray) -> np.ndarray:
    """Return the class whose margin is explained, logits [sample, class] of the base -> int64 [sample].

    The one of largest probability, ties to the lowest index; of several labels the most probable one.
    """
    return decide(base_logits).astype(np.int64)


def explained_decisions(logits: np.ndarray, classes: np.ndarray, multilabel: bool = False) -> np.ndarray:
    """Return what is decided of the explained class, logits [..., sample, class] -> int [..., sample].

    The decided class; of several labels whether the explained one is decided present. Explanations of two networks are
    compared where these are equal.
    """
    if multilabel:
        return (logits[..., np.arange(len(classes)), classes] > 0).astype(np.int16)
    return decide(logits)


def unsupported(network: Network, block: Block, method: str) -> str | None:
    """Return the reason why a method has no map of these members, or None."""
    if method != "grad_cam":
        return None
    if block.expand_at is not None:
        return "no Grad-CAM of a linearised network: its layers have no activations of their own"
    if not _convolutions(network.module(*block.member(0))):
        return f"no Grad-CAM: network={network.spec['name']} has no convolution"
    return None


def explain(
    network: Network,
    block: Block,
    images: Tensor,
    classes: np.ndarray | Tensor,
    method: str,
    *,
    multilabel: bool = False,
    strategy: str = "loop",
    batch: int = BATCH,
) -> np.ndarray:
    """Return the maps that are compared, float32 [member, sample, height, width]: the magnitudes of `attribute`.

    A pixel that speaks strongly against the class matters as much as one that speaks for it, so gradient and integrated
    gradients enter by absolute value; Grad-CAM keeps what speaks for the class and has no sign. Arguments and errors:
    see `attribute`.
    """
    return np.abs(
        attribute(network, block, images, classes, method, multilabel=multilabel, strategy=strategy, batch=batch)
    )


def attribute(
    network: Network,
    block: Block,
    images: Tensor,
    classes: np.ndarray | Tensor,
    method: str,
    *,
    multilabel: bool = False,
    strategy: str = "loop",
    batch: int = BATCH,
) -> np.ndarray:
    """Return attribution maps, float32 [member, sample, height, width], with their sign, summed over channels.

    images: uint8 [sample, channel, height, width]; classes: int64 [sample], whose margin m is explained.

    gradient: `dm/dx`, logits per grey level (Simonyan et al. 2014). integrated_gradients: `x mean_k dm/dx(a_k x)`,
    `a_k = (k - 1/2)/16`, k = 1..16, from the black image by the midpoint rule, logits (Sundararajan et al. 2017).
    grad_cam: `relu(sum_c w_c A_c)`, A the output of the last convolution, w_c the mean of `dm/dA_c` over its pixels,
    bilinearly upsampled (Selvaraju et al. 2017); in a DenseNet that layer holds the last 32 channels only.

    Nothing is differentiated by a parameter. Out of memory halves the batch and goes on. Raises UserError for an
    unknown method or strategy, Undefined with the reason of `unsupported`.
    """
    choices(method, "method", METHODS)
    choices(strategy, "strategy", STRATEGIES)
    if reason := unsupported(network, block, method):
        raise Undefined(reason)
    own = block.size if block.params or block.buffers else 1
    parts = [block] if strategy == "vmap" and own > 1 else [_only(block, k) for k in range(own)]
    maps = {"gradient": _gradient, "integrated_gradients": _integrated, "grad_cam": _grad_cam}[method]
    pixels = images.to(next(iter({**block.shared_params, **block.params}.values())).dtype)
    wanted = torch.as_tensor(classes, device=images.device)

    def of_batch(x: Tensor, chosen: Tensor) -> Tensor:
        margin = partial(margins, classes=chosen, multilabel=multilabel)
        found = torch.cat([maps(network, part, x.expand(part.size, *x.shape), margin) for part in parts])
        return found.expand(block.size, *found.shape[1:]).float().cpu()

    try:
        with torch.no_grad():
            batches = [of_batch(*pair) for pair in zip(pixels.split(batch), wanted.split(batch))]
        return torch.cat(batches, dim=1).numpy()
    except torch.OutOfMemoryError:
        if batch <= 1:
            raise
        torch.cuda.empty_cache()
        smaller = batch // 2
        return attribute(
            network, block, images, classes, method, multilabel=multilabel, strategy=strategy, batch=smaller
        )


def completeness(
    network: Network,
    block: Block,
    images: Tensor,
    classes: np.ndarray | Tensor,
    attributions: np.ndarray,
    multilabel: bool = False,
) -> Completeness:
    """Return how far integrated gradients are from summing to what the margin changes by from black to the image.

    attributions: of `attribute`, with their sign [member, sample, height, width]. Source: Sundararajan et al. (ICML
    2017), Proposition 1.
    """
    before = replace(block, output=None)
    wanted = torch.as_tensor(classes, device=images.device)
    black = torch.zeros_like(images[:1])
    of_image, of_black = (predict_block(network, before, part).double() for part in (images, black))
    change = margins(of_image, wanted, multilabel) - margins(of_black.expand_as(of_image), wanted, multilabel)
    total = attributions.sum(axis=(2, 3), dtype=np.float64)
    return Completeness(total - change.cpu().numpy(), change.cpu().numpy())


def margins(logits: Tensor, classes: Tensor, multilabel: bool = False) -> Tensor:
    """Return the margin of one class per sample, logits [..., sample, class] -> [..., sample].

    Two classes: its logit minus the other's; more classes, or several labels: its logit.
    """

    def of(chosen: Tensor) -> Tensor:
        index = chosen.unsqueeze(-1).expand(*logits.shape[:-1], 1)
        return logits.gather(-1, index).squeeze(-1)

    return of(classes) if multilabel or logits.shape[-1] != 2 else of(classes) - of(1 - classes)


def random_networks(network: Network) -> StackedSet:
    """Return five networks of the same architecture with fresh weights, from seeds that no training uses.

    What their maps share with those of a trained network is due to the image and the architecture alone. Source:
    Adebayo et al. (NeurIPS 2018), model parameter randomisation.
    """
    return stack([network.init(derive_seed("explanations", "random weights", i)) for i in range(RANDOM_NETWORKS)])


def rounding_noise(images: Tensor) -> Tensor:
    """Return uint8 images with every value moved by -1, 0 or 1 grey level, evenly drawn by a fixed seed, within 0..255.

    A change that no reader could see: what one network's explanation makes of it bounds what two can be asked for.
    """
    generator = torch.Generator().manual_seed(derive_seed("explanations", "rounding noise"))
    moves = torch.randint(-1, 2, images.shape, generator=generator, dtype=torch.int16)
    return (images.to(torch.int16) + moves.to(images.device)).clamp(0, 255).to(torch.uint8)


Margin = Callable[[Tensor], Tensor]


def _only(block: Block, index: int) -> Block:
    """Return one member as a block; where all leaves are shared, all members are that one."""
    params, buffers = ({n: leaf[index : index + 1] for n, leaf in own.items()} for own in (block.params, block.buffers))
    return replace(block, start=block.start + index, size=1, params=params, buffers=buffers)


def _apply(block: Block, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `function(params, buffers, *inputs)` of every member, inputs and result with a member axis."""
    if block.size > 1:
        return torch.func.vmap(function)(block.params, block.buffers, *inputs)
    params, buffers = ({n: leaf[0] for n, leaf in own.items()} for own in (block.params, block.buffers))
    return function(params, buffers, *(x[0] for x in inputs))[None]


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the derivative of the sum of `function(x)`, which holds that of every sample: eval mode mixes none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]


def _input_slope(network: Network, block: Block, images: Tensor, margin: Margin) -> Tensor:
    return _slope(lambda x: margin(_apply(block, partial(block.logits, network), x)), images)


def _gradient(network: Network, block: Block, images: Tensor, margin: Margin) -> Tensor:
    return _input_slope(network, block, images, margin).sum(dim=2)


def _integrated(network: Network, block: Block, images: Tensor, margin: Margin) -> Tensor:
    total = torch.zeros_like(images)
    for k in range(STEPS):
        total += _input_slope(network, block, images * ((k + 0.5) / STEPS), margin)
    return (images * total / STEPS).sum(dim=2)


def _grad_cam(network: Network, block: Block, images: Tensor, margin: Margin) -> Tensor:
    tapped = _Tapped(network.module(*block.member(0)), block)
    activations = _apply(block, tapped.activations, images)
    slope = _slope(lambda a: margin(_apply(block, tapped.logits, images, a)), activations)
    maps = torch.relu((slope.mean(dim=(3, 4), keepdim=True) * activations).sum(dim=2))
    size = images.shape[-2], images.shape[-1]
    return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class _Tapped:
    """A network whose last convolution's output can be read, or given."""

    def __init__(self, module: nn.Module, block: Block):
        self._module, self._block = module, block
        self._given: Tensor | None = None
        self._seen = torch.empty(0)
        _convolutions(module)[-1].register_forward_hook(self._tap)

    def activations(self, params: Leaves, buffers: Leaves, images: Tensor) -> Tensor:
        """Return the output of the last convolution [sample, channel, height, width]."""
        self._given = None
        self._block.logits(self._call, params, buffers, images)
        return self._seen

    def logits(self, params: Leaves, buffers: Leaves, images: Tensor, activations: Tensor) -> Tensor:
        """Return the logits [sample, class] as if the last convolution had put out `activations`."""
        self._given = activations
        return self._block.logits(self._call, params, buffers, images)

    def _call(self, params: Leaves, buffers: Leaves, images: Tensor) -> Tensor:
        return functional_call(self._module, (params, buffers), (images,))

    def _tap(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._seen = output if self._given is None else self._given
        return self._seen


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
