"""Second moments of patches by spectra against patches themselves, in float64, and what is left to patches."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from multiplicity_bench.generators import patch_moments
from multiplicity_bench.generators.patch_moments import PatchMoments, spectrum_pays
from torch import nn
from torch.nn.functional import unfold

SHAPES = {
    "3x3": ((3, 2, 3, 1, 1), (6, 6)),
    "one channel, not square": ((1, 2, 3, 1, 1), (5, 8)),
    "5x5": ((2, 2, 5, 1, 2), (9, 6)),
    "1x1": ((3, 2, 1), (5, 4)),
    "smaller than the kernel": ((2, 2, 5, 1, 2), (1, 2)),
    "without padding": ((2, 2, 3), (5, 6)),
    "one position": ((2, 2, 4), (4, 4)),
    "more padding than the kernel sees": ((2, 2, 3, 1, 4), (3, 2)),
    "an even kernel": ((2, 2, 4, 1, 1), (6, 5)),
    "not square in all": ((2, 2, (3, 5), 1, (2, 0)), (6, 7)),
    "along one axis": ((2, 2, (1, 3), 1, (0, 1)), (4, 5)),
    "7x7, a little padding": ((1, 2, 7, 1, 1), (6, 5)),
}
"""Convolutions (channels, outputs, kernel, stride, padding) and sizes of images."""


def images(number: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Return images with a mean, as they are behind a ReLU, so that borders of zeros show."""
    generator = torch.Generator().manual_seed(0)
    return 1 + torch.randn(number, channels, *size, generator=generator, dtype=torch.float64)


def by_patches(layer: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    patches = unfold(inputs, layer.kernel_size, 1, layer.padding, 1).transpose(0, 1).flatten(1)
    return patches @ patches.T


@pytest.mark.parametrize(("settings", "size"), SHAPES.values(), ids=SHAPES)
def test_the_moment_is_that_of_patches_however_images_are_cut_into_batches(settings, size, monkeypatch):
    layer = nn.Conv2d(*settings)
    inputs = images(6, layer.in_channels, size)
    wanted = by_patches(layer, inputs)
    for batches, cached in (([6], patch_moments.CACHED), ([1, 3, 2], 1)):
        monkeypatch.setattr(patch_moments, "CACHED", cached)  # 1: frequency by frequency
        moments = PatchMoments(layer, inputs)
        for some in inputs.split(batches):
            moments.add(some)
        found = moments.matrix()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
        torch.testing.assert_close(moments.matrix(), found, rtol=0, atol=0, msg="reading it changes nothing")


def test_of_one_white_image_it_counts_the_positions_that_see_both_places():
    height, width = 4, 6
    moments = PatchMoments(nn.Conv2d(1, 1, 3, padding=1), torch.empty(0, 1, height, width, dtype=torch.float64))
    moments.add(torch.ones(1, 1, height, width, dtype=torch.float64))

    def shared(u: int, v: int, size: int) -> int:
        return sum(0 <= p + u < size and 0 <= p + v < size for p in range(size))

    offsets = list(product((-1, 0, 1), repeat=2))
    counts = [[shared(a, c, height) * shared(b, d, width) for c, d in offsets] for a, b in offsets]
    torch.testing.assert_close(moments.matrix(), torch.tensor(counts).double(), rtol=0, atol=1e-12)


def test_in_float32_it_rounds_no_worse_than_patches_do():
    """Both are within sqrt(6 * 196) roundings of 6e-8 of the largest entry, as sums of that many products are."""
    inputs, layer = images(6, 16, (14, 14)), nn.Conv2d(16, 2, 3, padding=1)
    exact = by_patches(layer, inputs)
    moments = PatchMoments(layer, inputs.float())
    moments.add(inputs.float())
    for found in (moments.matrix(), by_patches(layer, inputs.float())):
        assert found.dtype == torch.float32
        assert float((found - exact).abs().max() / exact.abs().max()) < 6e-8 * (6 * 196) ** 0.5


def test_spectra_are_taken_by_shape_where_they_save_work_and_memory(monkeypatch):
    wide = nn.Conv2d(64, 2, 3, padding=1)
    assert all(spectrum_pays(wide, size, size) for size in (4, 7, 14, 28))
    assert spectrum_pays(nn.Conv2d(16, 2, 5, padding=2), 28, 28)
    assert not spectrum_pays(nn.Conv2d(64, 2, 1), 28, 28), "no two offsets share a sum"
    assert not spectrum_pays(nn.Conv2d(1, 2, 3, padding=1), 28, 28), "the transform costs more than nine numbers do"
    assert not spectrum_pays(nn.Conv2d(64, 2, 3, padding=1), 512, 512), "a gigabyte of frequencies"
    assert not spectrum_pays(nn.Conv2d(64, 2, 3, padding=1, stride=2), 28, 28)
    assert not spectrum_pays(nn.Conv2d(64, 2, 3, padding=2, dilation=2), 28, 28)
    assert not spectrum_pays(nn.Conv2d(64, 2, 3, padding=1, groups=2), 28, 28)
    numbers = (30 // 2 + 1) * 30 + 4 * (30 // 2 + 1) + 4
    monkeypatch.setattr(patch_moments, "SPECTRUM", numbers * 64**2)
    assert spectrum_pays(wide, 28, 28)
    monkeypatch.setattr(patch_moments, "SPECTRUM", numbers * 64**2 - 1)
    assert not spectrum_pays(wide, 28, 28)
