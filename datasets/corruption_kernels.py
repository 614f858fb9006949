"""The pixels of the corruptions: one function for each, over a batch of images on their device.

Pixels are grey levels, float32 [sample, channel, height, width], 0 to 255; what a function returns may leave that range
and is rounded and clipped by `corruptions.corrupt`. `level` is the severity's parameter; lengths are in 28ths of the
shorter side (pixels of an image of 28 pixels). Random numbers come from `Draws`. Sums over many pixels are in float64,
which TF32 leaves alone, so that a grey level depends neither on the device nor on the batch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ..identity import derive_seed
from .hashing import scattered

QUANTILES = 4096
"""Levels of the tables that Poisson numbers are read from: the tails beyond 1/8192 are left out."""

# Letters of 3 x 5 pixels, a to z, five digits each: a digit is a row, its bits are pixels, the first one on the left.
GLYPHS = (
    "257556565634443655567464774644345535575572227111525565544447577556555525552656442556365655"
    "3421672222555575555255775552555522271247"
)
BLANK = len(GLYPHS) // 5
SIDES = ("L", "R")
MARKERS = ("AP", "PA", "ICU", "MOB", "SUP")


@dataclass(frozen=True)
class Draws:
    """Random numbers for the images `rows`: functions of (seed, name, stream, row, position), drawn on the CPU.

    More numbers of a stream continue fewer, so that what one severity draws is part of what the next one does.
    """

    seed: int
    name: str
    rows: np.ndarray
    device: torch.device

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """Return numbers strictly between 0 and 1, float32 [sample, *shape]."""
        keys = scattered(derive_seed("corruption", self.seed, self.name, stream), self.rows)[:, None]
        bits = scattered(keys, np.arange(math.prod(shape)))
        whole = torch.from_numpy((bits >> np.uint64(41)).astype(np.int32))  # 23 bits: their half is exact in float32
        return ((whole.float() + 0.5) * 2.0**-23).view(len(self.rows), *shape).to(self.device)

    def normal(self, stream: str, *shape: int) -> Tensor:
        """Return standard normal numbers, float32 [sample, *shape], none beyond 5.2."""
        uniform = self.uniform(stream, *shape)
        return uniform.mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))


Kernel = Callable[[Tensor, float, Draws], Tensor]


def unit(pixels: Tensor) -> float:
    """Return the pixels of a length of 1: of a 28th of the shorter side."""
    return min(pixels.shape[2:]) / 28


def luminance(pixels: Tensor) -> Tensor:
    """Return [sample, 1, height, width]: 0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601), or the one channel."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def pixelate(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Replace the pixels of every cell by their mean; `level` cells along the shorter side."""
    density = level / min(pixels.shape[2:])

    def means(length: int) -> Tensor:
        cell = ((torch.arange(length, dtype=torch.float64) + 0.5) * density).floor()
        same = (cell[:, None] == cell).double()
        return same / same.sum(1, keepdim=True)

    return _along_both(pixels, means)


def jpeg(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Store as JPEG of quality `level` (colour subsampled 4:2:0) and read again, image by image, by Pillow."""
    from PIL import Image

    colour = pixels.shape[1] == 3
    planes = pixels.permute(0, 2, 3, 1) if colour else pixels.flatten(0, 1)
    found = []
    for plane in planes.to("cpu", torch.uint8).numpy():
        file = io.BytesIO()
        Image.fromarray(plane).save(file, "JPEG", quality=int(level))
        found.append(np.asarray(Image.open(file)))
    stored = torch.from_numpy(np.stack(found)).to(pixels)
    return stored.permute(0, 3, 1, 2) if colour else stored.view_as(pixels)


def gaussian_noise(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Add normal noise; standard deviation `level` of the full range."""
    return draws.normal("noise", *pixels.shape[1:]).mul_(255 * level).add_(pixels)


def speckle_noise(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Multiply by 1 + normal noise of standard deviation `level`."""
    return draws.normal("noise", *pixels.shape[1:]).mul_(level).add_(1).mul_(pixels)


def impulse_noise(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Make a share `level` of the numbers black or white, either with probability 1/2."""
    chance = draws.uniform("noise", *pixels.shape[1:])
    pixels = pixels.masked_fill(chance < level / 2, 0)
    return pixels.masked_fill_(chance > 1 - level / 2, 255)


def shot_noise(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Count photons: Poisson numbers of mean `level * x`, x from 0 to 1, divided by `level`."""
    table = poisson_quantiles(torch.arange(256, dtype=torch.float64) * (level / 255)).mul_(255 / level)
    chance = draws.uniform("noise", *pixels.shape[1:])
    place = chance.mul_(QUANTILES).int().add_(pixels.int(), alpha=QUANTILES)
    return table.float().flatten().to(pixels.device)[place]


def poisson_quantiles(means: Tensor) -> Tensor:
    """Return the quantiles (j + 1/2) / QUANTILES of Poisson numbers of the given means [mean]: float64 [mean, j]."""
    largest = float(means.max())
    counts = torch.arange(math.ceil(largest + 6 * math.sqrt(largest) + 6), dtype=torch.float64)
    below = torch.special.gammaincc(counts + 1, means[:, None])  # P(number <= count)
    first = (below * QUANTILES + 0.5).floor().long().clamp_(max=QUANTILES)
    exceeded = torch.zeros(len(means), QUANTILES + 1, dtype=torch.float64)
    exceeded.scatter_add_(1, first, torch.ones_like(below))
    return exceeded.cumsum(1)[:, :QUANTILES]


def gaussian_blur(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Convolve with a Gaussian of standard deviation `level`, cut at 4 of them; the border continues outwards."""
    sigma = level * unit(pixels)
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return _along_both(pixels, partial(_filter, weights=weights / weights.sum()))


def defocus_blur(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Convolve with a disk of radius `level`, antialiased; the border continues outwards."""
    weights = disk(level * unit(pixels))
    reach, (height, width) = len(weights) // 2, pixels.shape[2:]
    pixels = pixels.double()
    row, total = torch.arange(height, device=pixels.device), torch.zeros_like(pixels)
    for down in range(reach + 1):
        rows = pixels[:, :, (row + down).clamp(max=height - 1)]
        if down:
            rows = rows + pixels[:, :, (row - down).clamp(min=0)]
        total += rows @ _filter(width, weights[reach + down]).to(pixels.device).mT
    return total


def disk(radius: float, fine: int = 16) -> Tensor:
    """Return the share of every pixel [row, column] that a disk in the middle covers, over the sum of all: float64."""
    reach = max(0, math.ceil(radius - 0.5))
    axis = (torch.arange((2 * reach + 1) * fine, dtype=torch.float64) + 0.5) / fine - reach - 0.5
    inside = (axis[:, None] ** 2 + axis**2 <= radius**2).double()
    weights = inside.view(2 * reach + 1, fine, 2 * reach + 1, fine).sum((1, 3))
    return weights / weights.sum()


def motion_blur(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Average along a straight line of length `level` in a random direction within 45 degrees of the horizontal."""
    length, angle = level * unit(pixels), (draws.uniform("direction") - 0.5) * (math.pi / 2)
    taps = math.ceil(length) + 1
    x, y = _grid(pixels)
    total = torch.zeros_like(pixels)
    for k in range(taps):
        along = length * ((k + 0.5) / taps - 0.5)
        offset_x, offset_y = along * angle.cos()[:, None, None], along * angle.sin()[:, None, None]
        total += _sample(pixels, x + offset_x, y + offset_y, "border")
    return total / taps


def zoom_blur(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Average over magnifications from 1 to `level`, so many that the border moves by at most a pixel between them."""
    steps = max(4, math.ceil(max(pixels.shape[2:]) * (level - 1) / 2) + 1)
    pixels = pixels.double()
    total = torch.zeros_like(pixels)
    for factor in np.linspace(1, level, steps):
        total += _along_both(pixels, partial(_magnify, factor=factor))
    return total / steps


def brightness(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Multiply by `level`."""
    return pixels * level


def contrast(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Multiply the distance from the image's mean luminance (a whole grey level, as in Pillow) by `level`."""
    mean = rounded(luminance(pixels).double().mean((2, 3), keepdim=True)).float()
    return mean + level * (pixels - mean)


def gamma(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Return 255 (x / 255)^level."""
    return 255 * (pixels / 255) ** level


def saturate(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Multiply the distance from the pixel's luminance by `level`, or as far as no channel has to be clipped."""
    grey = luminance(pixels)
    colour = pixels - grey
    room_up = (255 - grey) / colour.amax(1, keepdim=True).clamp(min=1e-3)
    room_down = grey / (-colour.amin(1, keepdim=True)).clamp(min=1e-3)
    return grey + torch.minimum(room_up, room_down).clamp_(1, level) * colour


def stain_deposit(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Lay `level` dark blots of irregular outline over the image, each 1.2 to 2.2 in radius."""
    number, size = int(level), unit(pixels)
    radius = size * (1.2 + draws.uniform("radius", number))
    x, y = _places(pixels, draws, number, radius)
    turn = 2 * math.pi * draws.uniform("turn", number)[..., None, None]
    stretch = 1 + 0.5 * draws.uniform("stretch", number)[..., None, None]

    def ink(across: Tensor, down: Tensor) -> Tensor:
        u, v = turn.cos() * across + turn.sin() * down, turn.cos() * down - turn.sin() * across
        u = u / stretch
        distance = (u * u + v * v).sqrt() + 1e-6
        three_lobes = (u**3 - 3 * u * v * v) / distance**3
        edge = radius[..., None, None] * (1 + 0.15 * three_lobes)
        return 0.9 * ((edge - distance) / max(1.0, 0.3 * size) + 0.5).clamp(0, 1)

    return pixels * (1 - _blobs(pixels, x, y, 4.5 * size, ink))


def bubble(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Lay `level` pale, see-through disks with a brighter rim over the image, each 0.4 to 2.1 in radius."""
    number, size = int(level), unit(pixels)
    radius = size * (0.375 + 1.75 * draws.uniform("radius", number))
    x, y = _places(pixels, draws, number, radius)

    def veil(across: Tensor, down: Tensor) -> Tensor:
        inner = radius[..., None, None] + 0.5 - (across**2 + down**2).sqrt()
        return 0.51 * (inner + 0.25 * size).clamp(0, 1) - 0.12 * inner.clamp(0, 1)

    return torch.lerp(pixels, torch.full_like(pixels, 255), _blobs(pixels, x, y, 2.4 * size, veil))


def black_corner(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Blacken what is outside a circle of `level` times half the shorter side."""
    x, y = _grid(pixels)
    height, width = pixels.shape[2:]
    distance = ((x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2).sqrt()
    return pixels * (level * min(height, width) / 2 + 0.5 - distance).clamp(0, 1)


def characters(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Write `level` words of 3 to 6 random letters, each in a random colour, anywhere."""
    number, scale, (height, width) = int(level), _letter_scale(pixels), pixels.shape[2:]
    letters = (BLANK * draws.uniform("letters", number, 6)).long()
    lengths = 3 + (4 * draws.uniform("lengths", number)).long()
    codes = torch.where(torch.arange(6, device=pixels.device) < lengths[..., None], letters, BLANK)
    left = 1 + (draws.uniform("left", number) * (width - 1 - 4 * scale * lengths)).long()
    top = 1 + (draws.uniform("top", number) * (height - 1 - 5 * scale)).long()
    colours = 255 * draws.uniform("colours", number, pixels.shape[1])[..., None, None]
    for word in range(number):
        ink = write(pixels, codes[:, word], left[:, word], top[:, word], scale)
        pixels = torch.lerp(pixels, colours[:, word].expand_as(pixels), ink)
    return pixels


def exposure(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Expose by `level` stops too much (darker) or too little (brighter, and grainy).

    The grey level is the logarithm of the dose, a tenth of the range per stop; the variance of the quantum noise, 2 %
    of the range at the right exposure, grows as the dose falls, and the image holds that of the right one already.
    """
    under = (draws.uniform("direction") < 0.5).float()[:, None, None, None]
    grain = 0.02 * math.sqrt(2**level - 1) * draws.normal("grain", *pixels.shape[1:])
    return pixels + 255 * (0.1 * level * (2 * under - 1) + under * grain)


def rotation(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Turn by `level` degrees about the middle, bilinear, in a random direction; black where nothing was seen."""
    turn = (2 * (draws.uniform("direction") < 0.5).float() - 1)[:, None, None] * math.radians(level)
    x, y = _grid(pixels)
    height, width = pixels.shape[2:]
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    source_x, source_y = turn.cos() * x - turn.sin() * y, turn.sin() * x + turn.cos() * y
    return _sample(pixels, source_x + (width - 1) / 2, source_y + (height - 1) / 2, "zeros")


def collimation(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Blacken what shutters cover: on every side from a half of `level` to all of it."""
    inset = (level * unit(pixels) * (0.5 + 0.5 * draws.uniform("shutters", 4)))[..., None, None]
    x, y = _grid(pixels)
    height, width = pixels.shape[2:]
    for side, inwards in enumerate((x, width - 1 - x, y, height - 1 - y)):
        pixels = pixels * (inwards + 1 - inset[:, side]).clamp(0, 1)[:, None]
    return pixels


def text_marker(pixels: Tensor, level: float, draws: Draws) -> Tensor:
    """Burn in `level` white markers: the side letter first, then projections and wards, at the borders."""
    number, scale, (height, width) = int(level), _letter_scale(pixels), pixels.shape[2:]
    side = (len(SIDES) * draws.uniform("side", 1)).long()
    others = len(SIDES) + draws.uniform("texts", len(MARKERS)).argsort(1)
    texts = _codes((*SIDES, *MARKERS)).to(pixels.device)[torch.cat([side, others], 1)[:, :number]]
    place = draws.uniform("places", 5).argsort(1)[:, :number]
    wide = 4 * scale * (texts != BLANK).sum(2) - scale
    margin = max(1, round(unit(pixels)))
    left = torch.where(place % 2 == 0, margin, width - margin - wide)
    rows = torch.tensor([margin, (height - 5 * scale) // 2, height - margin - 5 * scale], device=pixels.device)
    top = rows[torch.tensor([0, 0, 2, 2, 1], device=pixels.device)[place]]
    for marker in range(number):
        ink = write(pixels, texts[:, marker], left[:, marker], top[:, marker], scale)
        pixels = torch.lerp(pixels, torch.full_like(pixels, 245), ink)
    return pixels


def write(pixels: Tensor, codes: Tensor, left: Tensor, top: Tensor, scale: int) -> Tensor:
    """Return where the text `codes` [sample, letter] covers the images, [sample, 1, height, width], 0 or 1.

    left, top: int64 [sample], its first pixel; scale: pixels per pixel of a letter.
    """
    rows = torch.tensor([int(digit) for digit in GLYPHS + "00000"], device=pixels.device).view(-1, 5)
    bits = (rows[..., None] >> torch.tensor([2, 1, 0], device=pixels.device)) & 1
    letters = bits.float().repeat_interleave(scale, 1).repeat_interleave(scale, 2)[codes]
    places = left[:, None] + 4 * scale * torch.arange(codes.shape[1], device=pixels.device)
    return _paste(pixels, top[:, None].expand_as(places), places, letters)


def rounded(pixels: Tensor) -> Tensor:
    """Return the nearest whole numbers; exact halves, and what rounding errors make of them, go up."""
    return torch.floor(pixels + 0.501)


def _letter_scale(pixels: Tensor) -> int:
    """Letters are 6 % of the shorter side high, yet no smaller than the 5 pixels below which nobody can read them."""
    return max(1, round(0.06 * min(pixels.shape[2:]) / 5))


def _codes(words: tuple[str, ...]) -> Tensor:
    longest = max(map(len, words))
    return torch.tensor([[ord(c) - ord("A") if c != " " else BLANK for c in word.ljust(longest)] for word in words])


def _places(pixels: Tensor, draws: Draws, number: int, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres x, y [sample, number] of disks that stay inside the image."""
    height, width = pixels.shape[2:]
    x, y = draws.uniform("x", number), draws.uniform("y", number)
    return radius + x * (width - 2 * radius), radius + y * (height - 2 * radius)


def _blobs(pixels: Tensor, x: Tensor, y: Tensor, reach: float, cover: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return [sample, 1, height, width]: the largest `cover(across, down)` of shapes around x, y [sample, shape].

    Shapes are computed within `reach` pixels of their centres alone.
    """
    far = math.ceil(reach)
    around = torch.arange(-far, far + 1, device=pixels.device)
    left, top = x.floor().long(), y.floor().long()
    across = (left[..., None] + around + 0.5 - x[..., None])[..., None, :]
    down = (top[..., None] + around + 0.5 - y[..., None])[..., :, None]
    return _paste(pixels, top - far, left - far, cover(across, down))


def _paste(pixels: Tensor, top: Tensor, left: Tensor, patches: Tensor) -> Tensor:
    """Return [sample, 1, height, width]: the largest of the patches [sample, patch, row, column] at every pixel.

    Nothing is 0; what lies outside the image is lost.
    """
    height, width = pixels.shape[2:]
    rows = top[..., None] + torch.arange(patches.shape[2], device=pixels.device)
    columns = left[..., None] + torch.arange(patches.shape[3], device=pixels.device)
    inside = ((rows >= 0) & (rows < height))[..., None] & ((columns >= 0) & (columns < width))[..., None, :]
    place = rows.clamp(0, height - 1)[..., None] * width + columns.clamp(0, width - 1)[..., None, :]
    canvas = torch.zeros(len(pixels), height * width, device=pixels.device)
    canvas.scatter_reduce_(1, place.flatten(1), (patches * inside).flatten(1), "amax")
    return canvas.view(len(pixels), 1, height, width)


def _along_both(pixels: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """Apply `matrix(length)`, float64 [to, from], along height and along width: float64."""
    height, width = pixels.shape[2:]
    down, across = (matrix(length).mT.to(pixels.device) for length in (height, width))
    return ((pixels.double() @ across).mT @ down).mT


def _filter(length: int, weights: Tensor) -> Tensor:
    """Return the matrix [to, from] of a convolution with symmetric `weights`; the border continues outwards."""
    to = torch.arange(length)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for offset, weight in enumerate(weights.tolist(), -(len(weights) // 2)):
        matrix[to, (to + offset).clamp(0, length - 1)] += weight
    return matrix


def _magnify(length: int, factor: float) -> Tensor:
    """Return the matrix [to, from] of a linear interpolation that magnifies the middle by `factor` >= 1."""
    middle = (length - 1) / 2
    source = (torch.arange(length, dtype=torch.float64) - middle) / factor + middle
    return (1 - (source[:, None] - torch.arange(length)).abs()).clamp(min=0)


def _grid(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [1, 1, width] and y [1, height, 1] of the pixels, from 0."""
    height, width = pixels.shape[2:]
    along = torch.arange(max(height, width), device=pixels.device, dtype=torch.float32)
    return along[None, None, :width], along[None, :height, None]


def _sample(pixels: Tensor, x: Tensor, y: Tensor, outside: str) -> Tensor:
    """Return the images at x, y [sample, height, width], in pixels from 0, bilinear; outside: border | zeros."""
    height, width = pixels.shape[2:]
    x, y = torch.broadcast_tensors((2 * x + 1) / width - 1, (2 * y + 1) / height - 1)
    return grid_sample(pixels, torch.stack([x, y], -1), padding_mode=outside, align_corners=False)


KERNELS: dict[str, Kernel] = {
    kernel.__name__: kernel
    for kernel in (
        pixelate,
        jpeg,
        gaussian_noise,
        speckle_noise,
        impulse_noise,
        shot_noise,
        gaussian_blur,
        defocus_blur,
        motion_blur,
        zoom_blur,
        brightness,
        contrast,
        gamma,
        saturate,
        stain_deposit,
        bubble,
        black_corner,
        characters,
        exposure,
        rotation,
        collimation,
        text_marker,
    )
}
