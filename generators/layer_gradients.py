"""What a network's layers add to the generalised Gauss-Newton matrix: their inputs, and gradients of their outputs.

`G = sum_i sum_r B_ir' B_ir`, the rows `B_ir = c_ir' J_i` of image i pulled back from cotangents c in its logits. One
forward and one backward pass per row give the rows of a whole batch, layer by layer: that of a weight is the sum over
positions of the outer product of the output's gradient and the input, that of a norm layer the sum of gradients times
normalised inputs. Cotangents are the columns of the exact root of the loss's Hessian (`jacobian.hessian_root`), or,
drawn, gradients of the loss at labels from the network's own predictions, whose covariance is that Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm, one_hot, unfold

from ..identity import derive_seed
from .api import Problem
from .jacobian import hessian_root, rows_per_image

WEIGHTED = (nn.Linear, nn.Conv2d)
NORMALISING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)

NUMBERS = 2**26
"""Numbers that the gradients of a batch's layers may take (256 MiB in float32)."""

IMAGES = 64


@dataclass
class Seen:
    """One layer in one batch. inputs: [sample, ...]; gradients: of its outputs, [row, sample, ...]."""

    inputs: Tensor
    gradients: Tensor

    def split(self, size: int) -> Iterator[Seen]:
        """Yield the batch, `size` images at a time."""
        for inputs, gradients in zip(self.inputs.split(size), self.gradients.split(size, dim=1), strict=True):
            yield Seen(inputs, gradients)


def layers_of(module: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Return the layers that hold the leaves `names`, in the network's order."""
    return {layer: module.get_submodule(layer) for layer in dict.fromkeys(n.rpartition(".")[0] for n in names)}


def layers_obstacle(problem: Problem, names: list[str]) -> str | None:
    """Return the reason why rows cannot be taken layer by layer, or None."""
    module = problem.module()
    layers = layers_of(module, names)
    for name, layer in layers.items():
        if not isinstance(layer, WEIGHTED + NORMALISING):
            return f"gradients are taken of linear, 2D convolution and norm layers, not of {name}"
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            return f"gradients are taken of convolutions that pad with a number of zeros, not of {name}"
    with _Tap(layers) as tap, torch.no_grad():
        module(problem.train.images[:1])
    odd = next((name for name in layers if tap.calls.get(name, 0) != 1), None)
    return None if odd is None else f"layer {odd} is used {tap.calls.get(odd, 0)} times in a forward pass, not once"


def seen_batches(problem: Problem, names: list[str], draws: int = 0) -> Iterator[dict[str, Seen]]:
    """Yield what the layers of the leaves `names` saw of train, batch after batch.

    draws: 0 for exact rows, else so many drawn labels per image, the same in every process.
    """
    module = problem.module().requires_grad_(False)
    layers = layers_of(module, names)
    rows = draws or rows_per_image(problem)
    with _Tap(layers) as tap:
        tap.probe(module, problem.train.images[:1])
        size = max(1, min(IMAGES, NUMBERS // (rows * sum(output.numel() for output in tap.outputs.values()))))
        batches = list(zip(problem.train.images.split(size), problem.train.labels.split(size), strict=True))
        for number, (images, labels) in enumerate(problem.progress(batches, "fitting the curvature", len(batches))):
            tap.clear()
            with torch.enable_grad():
                logits = module(images + 0)  # + 0: of streamed images an ordinary tensor
            with torch.no_grad():
                if draws:
                    cotangents = _drawn(logits, labels, problem.task, draws, derive_seed("curvature", number))
                else:
                    cotangents = hessian_root(logits, labels, problem.task)
            yield tap.pull_back(logits, cotangents.to(logits))


def leaf_rows(layer: nn.Module, leaf: str, seen: Seen) -> Tensor:
    """Return the rows of one leaf (`weight` or `bias`) of a layer, [sample, row, *leaf]."""
    if leaf == "bias":
        return _over_positions(layer, seen.gradients).transpose(0, 1)
    if isinstance(layer, nn.Conv2d):
        patches = input_patches(layer, seen.inputs).unflatten(1, (layer.groups, -1))
        gradients = seen.gradients.flatten(3).unflatten(2, (layer.groups, -1))
        found = torch.einsum("rngop,ngkp->nrgok", gradients, patches)
        return found.reshape(*found.shape[:2], *layer.weight.shape)
    if isinstance(layer, nn.Linear):
        rows, samples = seen.gradients.shape[:2]
        gradients = seen.gradients.reshape(rows, samples, -1, layer.out_features)
        return torch.einsum("rnpo,npi->nroi", gradients, seen.inputs.reshape(samples, -1, layer.in_features))
    return _over_positions(layer, seen.gradients * _normalised(layer, seen.inputs)).transpose(0, 1)


def input_patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what a convolution's weights see at every position, [sample, channel * height * width, position]."""
    assert not isinstance(layer.padding, str)  # see `layers_obstacle`
    return unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)


@dataclass
class _Tap:
    """Hooks that keep inputs and outputs of some layers while it is entered.

    changed: layers whose outputs the network changes in place, so that what is kept has to be a copy.
    """

    layers: dict[str, nn.Module]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    _versions: dict[str, int] = field(default_factory=dict)
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> _Tap:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def probe(self, module: nn.Module, images: Tensor) -> None:
        """Find out how large outputs are, and which of them are changed in place."""
        with torch.no_grad():
            module(images)
        self.changed = {n for n, output in self.outputs.items() if output._version != self._versions[n]}

    def clear(self) -> None:
        """Forget the last batch."""
        self.inputs, self.outputs, self.calls = {}, {}, {}

    def pull_back(self, logits: Tensor, cotangents: Tensor) -> dict[str, Seen]:
        """Return inputs and gradients of the outputs for cotangents [sample, class, row] in the logits."""
        names, last = list(self.outputs), cotangents.shape[-1] - 1
        outputs = [self.outputs[n] for n in names]
        found = [
            torch.autograd.grad(logits, outputs, cotangents[..., row], retain_graph=row < last, allow_unused=True)
            for row in range(last + 1)
        ]
        return {
            name: Seen(
                self.inputs[name],
                _stacked([torch.zeros_like(outputs[i]) if of[i] is None else of[i] for of in found]).detach(),
            )
            for i, name in enumerate(names)
        }

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.inputs[name] = inputs[0].detach()
            if not torch.is_grad_enabled():
                self.outputs[name], self._versions[name] = output, output._version
                return output
            if not output.requires_grad:  # no weight before this layer asks for a gradient
                output = output.requires_grad_()
            self.outputs[name] = output
            return output.clone() if name in self.changed else output

        return hook


def _drawn(logits: Tensor, labels: Tensor, task: str, draws: int, seed: int) -> Tensor:
    """Return gradients of the loss at drawn labels over sqrt(draws), [sample, class, draw].

    Their covariance is the Hessian of the loss: `E (p - y)(p - y)' = diag(p) - p p'` (Kunstner, Balles, Hennig 2019).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = logits.detach().double()
    if task == "multilabel":
        uniform = torch.rand(*logits.shape, draws, generator=generator, dtype=torch.float64).to(logits.device)
        p = torch.sigmoid(logits)[..., None]
        known = ((labels >= 0) / labels.shape[1]).sqrt()[..., None]
        return (p - (uniform < p).double()) * known / draws**0.5
    p = logits.softmax(-1)
    chosen = torch.multinomial(p.cpu(), draws, replacement=True, generator=generator).to(logits.device)
    return (p[:, None] - one_hot(chosen, p.shape[-1])).mT / draws**0.5


def _stacked(rows: list[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _over_positions(layer: nn.Module, values: Tensor) -> Tensor:
    """Return the sum over positions of [row, sample, ...]: of channels first, or of features last."""
    if isinstance(layer, nn.Linear):
        return values.reshape(*values.shape[:2], -1, layer.out_features).sum(2)
    if isinstance(layer, nn.LayerNorm):
        return values.reshape(*values.shape[:2], -1, *layer.normalized_shape).sum(2)
    return values.reshape(*values.shape[:3], -1).sum(3)


def _normalised(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the inputs as a norm layer in eval mode has them before its weights."""
    if isinstance(layer, nn.LayerNorm):
        return layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return group_norm(inputs, layer.num_groups, eps=layer.eps)
    assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    return nn.functional.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)
