"""Second moments of the patches that a convolution sees, from spectra: the input factor of KFAC without patches.

For a convolution of stride 1, an entry `A[(c, u), (c', u')] = sum_p x_c(p + u) x_c'(p + u')`, over images and positions
p, depends on the offsets u and u' by their difference alone, but for what positions outside of the output would see:

    A = R - rows - columns + corners,   R[(c, u), (c', u')] = sum_q x_c(q) x_c'(q + u' - u)   over all places q,

rows (columns): the same sum over positions above and below (left and right of) the output, a correlation along one
axis; corners: over those that are both. A correlation is the transform of products at single frequencies, summed over
images alone (Wiener-Khinchin). With zeros up to a period of P x Q places that is about `P Q` multiplications per image
and pair of channels; patches take `kernel^4` times the number of positions. Rounding is that of a sum of products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

SPECTRUM = 2**26
"""Numbers that the sums of one layer may take over all frequencies (256 MiB in float32)."""

CACHED = 2**16
"""Numbers of transformed images that a CPU works on at once: more of them leave its cache."""

LAUNCHED = 2**24
"""The same on other devices, where many small products take longer than few large ones."""


def spectrum_pays(layer: nn.Conv2d, height: int, width: int) -> bool:
    """Return whether `PatchMoments` takes less than half the multiplications of patches, told by shapes alone."""
    assert not isinstance(layer.padding, str)
    if layer.stride != (1, 1) or layer.dilation != (1, 1) or layer.groups > 1:
        return False
    (above, beside), (tall, wide) = layer.padding, layer.kernel_size
    outputs = (height + 2 * above - tall + 1) * (width + 2 * beside - wide + 1)
    terms, entries = _terms(layer, height, width), layer.weight[0].numel() ** 2
    numbers, transforms = sum(t.numbers for t in terms), sum(t.transform for t in terms)
    return numbers <= SPECTRUM and 2 * (2 * numbers + transforms) < entries * outputs


class PatchMoments:
    """`A = sum a a'` over images and positions, a the patches that a convolution of stride 1 sees; zeros as padding."""

    def __init__(self, layer: nn.Conv2d, inputs: Tensor):
        """Start at zero, for images like `inputs` [sample, channel, height, width]."""
        self.channels, self.kernel = layer.in_channels, layer.kernel_size
        self._terms = _terms(layer, *inputs.shape[2:])
        self._correlations = [_Correlations(term, inputs) for term in self._terms]

    def add(self, inputs: Tensor) -> None:
        """Add images [sample, channel, height, width]."""
        for term, correlations in zip(self._terms, self._correlations, strict=True):
            correlations.add(term.places(inputs))

    def matrix(self) -> Tensor:
        """Return A [input, input], its rows in the order of `layer.weight[0]`."""
        (tall, wide), c = self.kernel, self.channels
        sums = [self._values(i) for i in range(len(self._terms))]
        found = sums[0].new_empty(c, tall * wide, c, tall * wide)
        entries = sums[0].new_empty(tall, wide, c, c)
        for u, v in product(range(tall), range(wide)):
            entries.zero_()
            for term, values in zip(self._terms, sums, strict=True):
                for row, column in product(_partners(term.rows, u, tall), _partners(term.columns, v, wide)):
                    block = values[row.shift, column.shift, :, row.i, column.i, :, row.j, column.j]
                    entries[row.v, column.v].add_(block, alpha=term.sign)
            found[:, u * wide + v] = entries.flatten(0, 1).permute(1, 2, 0)
        return found.view(c * tall * wide, -1)

    def _values(self, i: int) -> Tensor:
        """Return the sums of a term, [row shift, column shift, channel, row, column, channel, row, column]."""
        term, values = self._terms[i], self._correlations[i].values()
        lengths = [1 if window is None else window.length for window in (term.rows, term.columns)]
        shifts = [1 if term.rows is not None else 2 * self.kernel[0] - 1, -1]
        return values.reshape(*shifts, *(self.channels, *lengths) * 2)


@dataclass(frozen=True)
class _Window:
    """What a position outside of the output sees along one axis: places from `place`, at offsets from `offset` on."""

    place: int
    offset: int
    length: int


@dataclass(frozen=True)
class _Partner:
    """An offset v beside a given u along one axis, and where their sum stands: at a shift, or at i, j of a window."""

    v: int
    shift: int = 0
    i: int = 0
    j: int = 0


@dataclass(frozen=True)
class _Term:
    """One of the sums that make A: over all positions along an axis, or at one that is outside (a window).

    size, reach: places and largest shift along the axes of the correlation; channels: of the images, times windows.
    """

    rows: _Window | None
    columns: _Window | None
    size: tuple[int, int]
    reach: tuple[int, int]
    channels: int

    @property
    def sign(self) -> int:
        """1 or -1, by inclusion and exclusion."""
        return -1 if (self.rows is None) != (self.columns is None) else 1

    @property
    def periods(self) -> tuple[int, int]:
        """Places along both axes with as many zeros as keep shifts from coming around."""
        return self.size[0] + self.reach[0], self.size[1] + self.reach[1]

    @property
    def half(self) -> int:
        """Frequencies along the first axis; the others are conjugates of these."""
        return self.periods[0] // 2 + 1

    @property
    def numbers(self) -> int:
        """Pairs of channels at all frequencies; each takes two multiplications per image."""
        return self.half * self.periods[1] * self.channels**2

    @property
    def transform(self) -> int:
        """Multiplications for the transform of one image."""
        return 2 * self.channels * self.half * self.size[1] * (self.size[0] + 2 * self.periods[1])

    def places(self, inputs: Tensor) -> Tensor:
        """Return images as [place, place, sample, channel], places within windows as channels."""
        along: list[int] = []
        within: list[int] = []
        for axis, window in ((2, self.rows), (3, self.columns)):
            if window is not None:
                inputs = inputs.narrow(axis, window.place, window.length)
            (along if window is None else within).append(axis)
        return inputs.permute(*along, 0, 1, *within).reshape(*self.size, len(inputs), self.channels)


class _Correlations:
    """`sum_q x(q) x(q + shift)'` over images, [shift, shift, channel, channel], for shifts up to a reach.

    With `A - iB = sum_q x(q) exp(-i w q)` the spectrum is `(A A' + B B') + i (B A' - A B')`, of which `spectrum` holds
    real less imaginary part, `(A - B) A' + (A + B) B'`: the one is symmetric and the other is not, which parts them.
    """

    def __init__(self, term: _Term, like: Tensor):
        self._term = term
        self.spectrum = like.new_zeros(term.half, term.periods[1], term.channels, term.channels)
        cos, sin = _waves(term.half, term.periods[0], range(term.size[0]))
        self._first = torch.stack([cos, sin], 1).flatten(0, 1).to(like)
        cos, sin = _waves(term.periods[1], term.periods[1], range(term.size[1]))
        self._second = torch.stack([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 1).flatten(0, 1).to(like)

    def add(self, places: Tensor) -> None:
        """Add images [place, place, sample, channel]."""
        _, width, samples, channels = places.shape
        waves = (self._first @ places.flatten(1)).view(self._term.half, 2 * width, samples * channels)
        numbers = CACHED if places.device.type == "cpu" else LAUNCHED
        size = max(1, numbers // (len(self._second) * samples * channels))
        for some, spectrum in zip(waves.split(size), self.spectrum.split(size), strict=True):
            right = torch.bmm(self._second.expand(len(some), -1, -1), some).view(-1, 2, samples, channels)
            cos, sin = right.unbind(1)
            left = torch.stack([cos - sin, cos + sin], 1)
            spectrum.flatten(0, 1).baddbmm_(left.flatten(1, 2).mT, right.flatten(1, 2))

    def values(self) -> Tensor:
        """Return the correlations of what was added."""
        (period, other), half, reach = self._term.periods, self._term.half, self._term.reach
        cos, sin = _waves(half, period, range(-reach[0], reach[0] + 1))
        cos_other, sin_other = _waves(other, other, range(-reach[1], reach[1] + 1))
        alone = torch.tensor([f == 0 or 2 * f == period for f in range(half)])
        weight = torch.where(alone, 1.0, 2.0).double()[:, None] / (2 * period * other)
        wave = torch.einsum("fd,ge->defg", weight * (cos + sin), cos_other)
        wave += torch.einsum("fd,ge->defg", weight * (cos - sin), sin_other)
        found = wave.flatten(2).flatten(0, 1).to(self.spectrum) @ self.spectrum.flatten(2).flatten(0, 1)
        found = found.unflatten(1, self.spectrum.shape[2:])
        for i in range(len(found) // 2 + 1):  # pair by pair, which takes no memory of that size
            both = found[i] + found[-1 - i].mT
            found[i], found[-1 - i] = both, both.mT
        return found.unflatten(0, wave.shape[:2])


def _terms(layer: nn.Conv2d, height: int, width: int) -> list[_Term]:
    """Return the sums that make A for images of one size: the one over all positions first."""
    assert not isinstance(layer.padding, str)
    sizes, kernel = (height, width), layer.kernel_size
    rows, columns = (_outside(*axis) for axis in zip(sizes, kernel, layer.padding, strict=True))
    found = []
    for windows in product([None, *rows], [None, *columns]):
        along = [axis for axis in (0, 1) if windows[axis] is None]
        size = [sizes[axis] for axis in along] + [1] * (2 - len(along))
        reach = [kernel[axis] - 1 for axis in along] + [0] * (2 - len(along))
        channels = layer.in_channels * math.prod(window.length for window in windows if window is not None)
        found.append(_Term(*windows, (size[0], size[1]), (reach[0], reach[1]), channels))
    return found


def _outside(size: int, kernel: int, padding: int) -> list[_Window]:
    """Return what positions along an axis see of the image that are none of the convolution's."""
    outputs = size + 2 * padding - kernel + 1
    positions = [p for p in range(padding - kernel + 1, size + padding) if not 0 <= p < outputs]
    found = []
    for p in positions:
        first, last = max(0, p - padding), min(size, p - padding + kernel)
        found.append(_Window(first, first - p + padding, last - first))
    return found


def _partners(window: _Window | None, u: int, kernel: int) -> list[_Partner]:
    if window is None:
        return [_Partner(v, shift=v - u + kernel - 1) for v in range(kernel)]
    i = u - window.offset
    return [_Partner(window.offset + j, i=i, j=j) for j in range(window.length)] if 0 <= i < window.length else []


def _waves(frequencies: int, period: int, places: range) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [frequency, place] of a period, in float64."""
    turns = torch.outer(torch.arange(frequencies), torch.tensor(list(places))) % period
    angles = turns.double() * (2 * math.pi / period)
    return angles.cos(), angles.sin()
