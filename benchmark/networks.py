"""Networks by name, each usable as a pure function of (parameters, buffers, images).

Images come as uint8 and are normalised inside the function, to [-1, 1]: x / 127.5 - 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UserError
from ..identity import added_later, derive_seed
from ..registries import NETWORKS, register_network


class Normalised(nn.Module):
    """A network that takes uint8 images."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [sample, class] of images [sample, channel, height, width]."""
        dtype = next(self.body.parameters()).dtype
        return self.body(images.to(dtype) / 127.5 - 1)


class Network:
    """A network of fixed architecture as a pure function; it holds no weights that a result depends on.

    spec: {"name", fields...}; channels, size: of the images; outputs: number of logits.
    """

    def __init__(self, spec: Mapping[str, Any], channels: int, size: int, outputs: int):
        self.spec = dict(spec)
        self.channels, self.size, self.outputs = channels, size, outputs
        settings = {k: v for k, v in self.spec.items() if k not in ("name", "version")}
        self._build: Callable[..., nn.Module] = NETWORKS.get(self.spec["name"])(**settings).build
        self._module = self._fresh(0)

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Normalised(self._build(self.channels, self.size, self.outputs)).eval()

    def init(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return fresh parameters and buffers drawn by `seed`, without touching the global generator."""
        module = self._fresh(derive_seed(seed, "init"))
        params = {n: p.detach().clone() for n, p in module.named_parameters()}
        return params, {n: b.detach().clone() for n, b in module.named_buffers()}

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, train: bool = False
    ) -> Tensor:
        """Return logits [sample, class]; with `train`, BatchNorm uses the batch and updates `buffers` in place."""
        self._module.train(train)
        return functional_call(self._module, ({**params}, {**buffers}), (images,))

    def module(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
        """Return a module of its own in eval mode, holding copies of these weights."""
        module = copy.deepcopy(self._module).eval()
        module.to(device=next(iter(params.values())).device, dtype=next(iter(params.values())).dtype)
        module.load_state_dict({**params, **buffers})
        return module

    def describe(self) -> dict[str, Any]:
        """Return the JSON from which `restore` makes this network again."""
        return {"spec": self.spec, "channels": self.channels, "size": self.size, "outputs": self.outputs}

    @staticmethod
    def restore(about: Mapping[str, Any]) -> Network:
        """Make the network that `describe` described."""
        return Network(about["spec"], about["channels"], about["size"], about["outputs"])


def _at_least(value: int, name: str, low: int) -> None:
    if value < low:
        raise UserError(f"network.{name}={value} must be at least {low}")


def _norm(kind: str, channels: int, groups: int = 4) -> nn.Module:
    if kind == "group":
        if channels % min(groups, channels):
            raise UserError(
                f"GroupNorm cannot cut {channels} channels into {groups} groups: network.width must be a multiple of 4"
            )
        return nn.GroupNorm(min(groups, channels), channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    raise UserError(f"network.norm={kind} is not a choice: group or batch")


@register_network("logistic")
@dataclass
class Logistic:
    """Multinomial logistic regression on the pixels: a convex loss, for checks against exact sets.

    pool: side of the squares of pixels whose means are the features; 1 is the pixels themselves.
    """

    pool: int = 1
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _at_least(self.pool, "pool", 1)

    def build(self, channels: int, size: int, outputs: int) -> nn.Module:
        """Return means over squares where asked for, flatten, and one linear layer."""
        if size % self.pool:
            raise UserError(f"network.pool={self.pool} does not divide images of {size} pixels: use a divisor")
        means = [nn.AvgPool2d(self.pool)] if self.pool > 1 else []
        return nn.Sequential(*means, nn.Flatten(), nn.Linear(channels * (size // self.pool) ** 2, outputs))


@register_network("mlp")
@dataclass
class MLP:
    """Fully connected network with tanh units: smooth, without normalisation layers."""

    width: int = 32
    depth: int = 2
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _at_least(self.width, "width", 1)
        _at_least(self.depth, "depth", 0)

    def build(self, channels: int, size: int, outputs: int) -> nn.Module:
        """Return `depth` hidden layers of `width` units."""
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = channels * size * size
        for _ in range(self.depth):
            layers += [nn.Linear(inputs, self.width), nn.Tanh()]
            inputs = self.width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class MaxPool2(nn.MaxPool2d):
    """Max-pooling by 2 x 2.

    Without gradients, on a CPU, by maxima of rows and then of columns: the same numbers, ten times as fast as torch's
    kernel, which takes half of a small network's time.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the largest number of every square; an odd last row or column is left out."""
        if torch.is_grad_enabled() or x.is_cuda:
            return super().forward(x)
        x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


@register_network("smallcnn")
@dataclass
class SmallCNN:
    """Three convolutions with GroupNorm, one linear layer; about 24,000 weights, for up to 64 pixels."""

    width: int = 16
    norm: str = "group"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _at_least(self.width, "width", 1)

    def build(self, channels: int, size: int, outputs: int) -> nn.Module:
        """Return conv(w) - conv(2w) - conv(4w), each normalised; halved twice by max-pooling."""
        w = self.width
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate([(channels, w), (w, 2 * w), (2 * w, 4 * w)]):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), _norm(self.norm, b), nn.ReLU()]
            layers += [MaxPool2()] if i < 2 else [nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * w, outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, outputs, 32)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, outputs, 32)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(norm, outputs, 32))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(f(x) + shortcut(x))."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


@register_network("resnet18")
@dataclass
class ResNet18:
    """ResNet-18 in the variant for 28 pixels that MedMNIST uses: 3x3 stem, no max-pooling; 11 million weights.

    stride: of the stem; 2 for images of 64 pixels and more, which costs a quarter.
    """

    norm: str = "group"
    stride: int = added_later(1)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _at_least(self.stride, "stride", 1)

    def build(self, channels: int, size: int, outputs: int) -> nn.Module:
        """Return stem, eight basic blocks of 64, 128, 256, 512 channels, global average, one linear layer."""
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, self.stride, 1, bias=False)]
        layers += [_norm(self.norm, 64, 32), nn.ReLU()]
        inputs = 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [BasicBlock(inputs, width, stride, self.norm), BasicBlock(width, width, 1, self.norm)]
            inputs = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs))


@register_network("resnet50")
@dataclass
class ResNet50:
    """Torchvision's ResNet-50 (BatchNorm, fresh weights), for images of 64 pixels and more."""

    version: ClassVar[int] = 1

    def build(self, channels: int, size: int, outputs: int) -> nn.Module:
        """Return the network with a first convolution for `channels` and `outputs` logits."""
        from torchvision.models import resnet50

        net = resnet50(weights=None, num_classes=outputs)
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        return net


@register_network("densenet121")
@dataclass
class DenseNet121:
    """Torchvision's DenseNet-121 (BatchNorm, fresh weights), the usual network of chest X-ray studies."""

    version: ClassVar[int] = 1

    def build(self, channels: int, size: int, outputs: int) -> nn.Module:
        """Return the network with a first convolution for `channels` and `outputs` logits."""
        from torchvision.models import densenet121

        if size < 32:
            raise UserError(f"network=densenet121 needs images of at least 32 pixels, these have {size}: use resnet18")
        net = densenet121(weights=None, num_classes=outputs)
        net.features.conv0 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        return net
