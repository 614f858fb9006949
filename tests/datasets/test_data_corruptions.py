"""Corruptions: none at severity 0, the same for any batch, and what other libraries and closed forms say they are."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.contact_sheet import CELL, GAP, HEADER, LABEL, contact_sheet
from multiplicity_bench.datasets import corruptions as module
from multiplicity_bench.datasets.api import DATASETS, prepare
from multiplicity_bench.datasets.corruption_kernels import (
    BLANK,
    GLYPHS,
    KERNELS,
    QUANTILES,
    Draws,
    disk,
    luminance,
    poisson_quantiles,
    write,
)
from multiplicity_bench.datasets.corruptions import (
    CORRUPTIONS,
    DECLARED,
    MODALITIES,
    cannot,
    corrupt,
    corruptions_of,
)
from multiplicity_bench.datasets.phantom_cxr import PhantomCXR
from multiplicity_bench.errors import UserError
from PIL import Image, ImageEnhance
from scipy import fft, ndimage, stats
from skimage import exposure, filters, transform

NAMES = list(CORRUPTIONS)
RANDOM = [
    *("gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise", "motion_blur", "stain_deposit", "bubble"),
    *("characters", "exposure", "rotation", "collimation", "text_marker"),
]


def phantoms(count, size=28, channels=1):
    """Radiographs, or the same in the pink and violet of a stained slide: uint8 [sample, channel, size, size]."""
    grey = PhantomCXR(size=size, train=1, val=1, test=count).load().splits["test"].images
    if channels == 1:
        return torch.from_numpy(grey)
    slide = np.concatenate([180 + 0.2 * grey, 60 + 0.6 * grey, 120 + 0.4 * grey], 1)
    return torch.from_numpy(slide.astype(np.uint8))


GREY = phantoms(12)
COLOUR = phantoms(12, channels=3)
LARGE = phantoms(2, 224)


def images_for(name):
    return COLOUR if CORRUPTIONS[name].colour else GREY


def level(name, severity):
    return CORRUPTIONS[name].levels[severity - 1]


def flat(value, channels=1, side=256):
    return torch.full((1, channels, side, side), value, dtype=torch.uint8)


def assert_close(found, expected, largest):
    assert np.abs(found.numpy().astype(float) - np.asarray(expected, float)).max() <= largest


@pytest.mark.parametrize("name", NAMES)
def test_severity_0_is_the_identity_and_nothing_changes_its_input(name):
    images = images_for(name)
    before = images.clone()
    assert torch.equal(corrupt(images, name, 0, 0), before)
    assert corrupt(images, name, 0, 0).data_ptr() != images.data_ptr()
    changed = corrupt(images, name, 5, 0)
    assert torch.equal(images, before)
    assert changed.dtype == torch.uint8 and changed.shape == images.shape and not torch.equal(changed, before)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_in_any_batch_and_the_global_seed_is_left_alone(name, monkeypatch):
    images = images_for(name)
    state = torch.random.get_rng_state()
    whole = corrupt(images, name, 3, 7, first=100)
    assert torch.equal(torch.random.get_rng_state(), state)
    ones = [corrupt(images[i : i + 1], name, 3, 7, first=100 + i) for i in range(len(images))]
    assert torch.equal(torch.cat(ones), whole)
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 5 * images[0].numel())
    assert torch.equal(corrupt(images, name, 3, 7, first=100), whole)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_random_ones_depend_on_seed_and_position(name):
    twice = images_for(name)[:1].expand(8, -1, -1, -1)
    found = corrupt(twice, name, 4, 0)
    other_seed = corrupt(twice, name, 4, 1)
    assert torch.equal(found, other_seed) == (name not in RANDOM)
    assert torch.equal(found[0].expand_as(found), found) == (name not in RANDOM)


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_damage_grows_with_the_severity(name, size):
    channels = 3 if CORRUPTIONS[name].colour else 1
    images = images_for(name) if size == 28 else phantoms(6, size, channels)
    damage = [(corrupt(images, name, s, 3).float() - images.float()).abs().mean() for s in range(6)]
    assert damage[0] == 0 and all(a < b for a, b in pairwise(damage))


@pytest.mark.real
def test_the_mean_damage_of_ultrasound_images_grows_with_the_severity(real_data):
    dataset = DATASETS.get("breastmnist")()
    dataset.name = "breastmnist"
    images = torch.from_numpy(prepare(dataset, real_data).splits["test"].images)
    for name in corruptions_of("breastmnist", 1):
        damage = [(corrupt(images, name, s, 3).float() - images.float()).abs().mean() for s in range(1, 6)]
        assert damage[0] > 0.3 and all(a < b for a, b in pairwise(damage)), name


SCALE_FREE = ("gaussian_blur", "defocus_blur", "zoom_blur", "collimation", "black_corner", "rotation", "brightness_up")


@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_large_image_is_corrupted_as_the_small_one_is(name):
    small = torch.nn.functional.avg_pool2d(LARGE.float(), 8).add(0.5).to(torch.uint8)
    shrunk = torch.nn.functional.avg_pool2d(corrupt(LARGE, name, 5, 0).float(), 8)
    here = corrupt(small, name, 5, 0).float()
    # Interpolation blurs 28 pixels more than 224; lengths that do not grow with the image would differ by nearly all.
    assert (here - shrunk).abs().mean() < 0.25 * (here - small.float()).abs().mean()


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_blur_is_that_of_scikit_image(severity):
    for images, unit in ((GREY[:3], 1), (LARGE[:1], 8)):
        sigma = level("gaussian_blur", severity) * unit
        expected = [filters.gaussian(x.numpy().astype(float), sigma, mode="nearest", truncate=4) for x in images[:, 0]]
        assert_close(corrupt(images, "gaussian_blur", severity, 0)[:, 0], np.stack(expected), 0.51)


@pytest.mark.parametrize("severity", [1, 5])
def test_defocus_blur_is_a_convolution_with_a_disk(severity):
    weights = disk(level("defocus_blur", severity)).numpy()
    expected = [ndimage.convolve(x.numpy().astype(float), weights, mode="nearest") for x in GREY[:, 0]]
    assert_close(corrupt(GREY, "defocus_blur", severity, 0)[:, 0], np.stack(expected), 0.51)


@pytest.mark.parametrize("radius", [0.8, 1.4, 2.2, 6.4, 17.6])
def test_a_disk_has_the_variance_of_a_disk(radius):
    weights = disk(radius)
    offsets = torch.arange(len(weights), dtype=torch.float64) - len(weights) // 2
    variance = (weights.sum(0) * offsets**2).sum()
    # r^2 / 4 along an axis, and 1/12 for whole pixels (Sheppard), which is exact for smooth densities alone.
    assert weights.sum().item() == pytest.approx(1) and weights.mT.equal(weights)
    assert variance.item() == pytest.approx(radius**2 / 4 + 1 / 12, abs=0.05)


def test_motion_blur_spreads_a_dot_along_a_line_of_the_declared_length():
    side = 112
    dots = torch.zeros(40, 1, side, side, dtype=torch.uint8)
    dots[:, :, side // 2, side // 2] = 255
    for severity in (1, 5):
        length = level("motion_blur", severity) * side / 28
        found = corrupt(dots, "motion_blur", severity, 0)[:, 0].double().numpy()
        offset = np.arange(side) - side // 2
        mass = found.sum((1, 2))
        x, y = found.sum(1) @ offset / mass, found.sum(2) @ offset / mass
        xx, yy = found.sum(1) @ offset**2 / mass - x * x, found.sum(2) @ offset**2 / mass - y * y
        xy = np.einsum("nij,i,j->n", found, offset, offset) / mass - x * y
        assert np.abs([x, y]).max() < 0.15
        # L^2/12 along the line, and what interpolation adds: at most 1/4 along each axis.
        along = (xx + yy) / 2 + np.hypot((xx - yy) / 2, xy)
        assert np.all((along > length**2 / 12 - 1) & (along < length**2 / 12 + 0.5 + 0.02 * length**2))
        angle = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))
        assert -46 < angle.min() < -20 and 20 < angle.max() < 46


@pytest.mark.parametrize("severity", [1, 5])
def test_zoom_blur_is_the_mean_of_interpolated_magnifications(severity):
    factors = np.linspace(1, level("zoom_blur", severity), 4 if severity == 1 else 6)
    axes = [(np.arange(28) - 13.5) / z + 13.5 for z in factors]
    x = GREY[0, 0].numpy().astype(float)
    expected = np.mean([ndimage.map_coordinates(x, np.meshgrid(a, a, indexing="ij"), order=1) for a in axes], 0)
    assert_close(corrupt(GREY[:1], "zoom_blur", severity, 0)[0, 0], expected, 0.51)


@pytest.mark.parametrize("name", ["gamma_up", "gamma_down"])
def test_gamma_is_that_of_scikit_image(name):
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for severity in range(1, 6):
        expected = 255 * exposure.adjust_gamma(ramp.numpy() / 255, level(name, severity))
        assert_close(corrupt(ramp, name, severity, 0), expected, 0.51)


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_is_pillows_box_filter_down_and_nearest_up(severity):
    for images in (GREY[:3], LARGE[:1]):
        side, cells = images.shape[-1], int(level("pixelate", severity))
        pictures = [Image.fromarray(x.numpy()) for x in images[:, 0]]
        small = [p.resize((cells, cells), Image.Resampling.BOX) for p in pictures]
        expected = np.stack([np.asarray(p.resize((side, side), Image.Resampling.NEAREST)) for p in small])
        assert_close(corrupt(images, "pixelate", severity, 0)[:, 0], expected, 1)  # Pillow rounds after each direction


LUMINANCE_TABLE = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ]
).reshape(8, 8)


def jpeg_by_definition(image, quality):
    """Quantise the cosine transform of 8 x 8 blocks by the standard's table K.1, scaled as the IJG's library does."""
    side = image.shape[0]
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = np.clip((LUMINANCE_TABLE * scale + 50) // 100, 1, 255)
    padded = np.pad(image.astype(float) - 128, (0, -side % 8), mode="edge")
    for top in range(0, len(padded), 8):
        for left in range(0, len(padded), 8):
            block = np.s_[top : top + 8, left : left + 8]
            padded[block] = fft.idctn(np.round(fft.dctn(padded[block], norm="ortho") / table) * table, norm="ortho")
    return np.clip(np.round(padded[:side, :side] + 128), 0, 255)


@pytest.mark.parametrize("severity", range(1, 6))
def test_jpeg_quantises_the_cosine_transform_of_blocks(severity):
    expected = [jpeg_by_definition(x.numpy(), int(level("jpeg", severity))) for x in GREY[:, 0]]
    off = np.abs(corrupt(GREY, "jpeg", severity, 0)[:, 0].numpy().astype(float) - np.stack(expected))
    # Libraries transform in integers: single grey levels, and a coefficient that lies halfway between two steps now and
    # then. Another quality of the ladder is 3 grey levels and more away on average.
    assert np.mean(off <= 1) > 0.93 and off.mean() < 0.5


def test_jpeg_of_colours_without_colour_is_that_of_grey():
    found = corrupt(GREY.expand(-1, 3, -1, -1), "jpeg", 3, 0)
    assert_close(found, corrupt(GREY, "jpeg", 3, 0).expand(-1, 3, -1, -1), 1)


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness_up", ImageEnhance.Brightness),
        ("brightness_down", ImageEnhance.Brightness),
        ("contrast_up", ImageEnhance.Contrast),
        ("contrast_down", ImageEnhance.Contrast),
    ],
)
@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_brightness_and_contrast_are_those_of_pillow(name, enhancer, images):
    for severity in range(1, 6):
        found = corrupt(images, name, severity, 0)
        for x, y in zip(images, found, strict=True):
            picture = Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())
            expected = np.asarray(enhancer(picture).enhance(level(name, severity)))
            assert_close(y.permute(1, 2, 0).squeeze(-1), expected, 1)  # Pillow truncates


def test_saturate_is_pillows_where_nothing_is_clipped_and_keeps_the_luminance_everywhere():
    rng = torch.Generator().manual_seed(0)
    muted = (128 + 30 * torch.rand(1, 3, 40, 40, generator=rng)).to(torch.uint8)
    vivid = torch.randint(0, 256, (1, 3, 40, 40), generator=rng, dtype=torch.uint8)
    for severity in range(1, 6):
        picture = Image.fromarray(muted[0].permute(1, 2, 0).numpy())
        expected = np.asarray(ImageEnhance.Color(picture).enhance(level("saturate", severity)))
        assert_close(corrupt(muted, "saturate", severity, 0)[0].permute(1, 2, 0), expected, 2)  # of a whole luminance
        found = corrupt(vivid, "saturate", severity, 0)
        assert_close(luminance(found.float()), luminance(vivid.float()), 0.502)  # the channels' rounding
        spread = [(x.amax(1).int() - x.amin(1).int()) for x in (vivid, found)]
        assert (spread[1] >= spread[0] - 1).all() and (spread[1] > spread[0]).float().mean() > 0.5
    grey = GREY[:2].expand(-1, 3, -1, -1).contiguous()
    assert torch.equal(corrupt(grey, "saturate", 5, 0), grey)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_gaussian_and_speckle_noise_have_the_declared_moments(severity):
    # 65,536 draws: the mean is known to s/256, the standard deviation to s/362; rounding adds 1/12 to the variance.
    # 100 and 120 grey levels stay clear of clipping up to s = 30.
    for name, value, scale in (("gaussian_noise", 120, 255), ("speckle_noise", 100, 100)):
        s = level(name, severity) * scale
        if s > 30:
            value, expected = 128, stats.norm(128, s if name == "gaussian_noise" else level(name, severity) * 128)
            found = corrupt(flat(value), name, severity, 0).double().flatten().numpy()
            assert np.mean(found < 64) == pytest.approx(expected.cdf(63.5), abs=4 * 0.5 / 256)
            assert np.mean(found == 255) == pytest.approx(expected.sf(254.5), abs=4 * 0.5 / 256)
        else:
            found = corrupt(flat(value), name, severity, 0).double().flatten().numpy()
            assert found.mean() == pytest.approx(value, abs=4 * s / 256 + 0.01)
            assert found.std() == pytest.approx(math.sqrt(s * s + 1 / 12), abs=4 * s / 362)


def test_noise_is_independent_in_every_pixel_channel_and_image():
    images = flat(128, channels=3).expand(2, -1, -1, -1)
    noise = corrupt(images, "gaussian_noise", 1, 0).double() - 128
    signals = [noise[0, 0], noise[0, 1], noise[1, 0], noise[0, 0].roll(1, 0), noise[0, 0].roll(1, 1)]
    correlation = np.corrcoef(torch.stack(signals).flatten(1).numpy())
    assert np.abs(correlation - np.eye(5)).max() < 5 / 256  # 5 standard errors of 65,536 pairs


def test_impulse_noise_hits_the_declared_share_and_hits_again_what_it_hit_at_a_lower_severity():
    before = None
    for severity in range(1, 6):
        found = corrupt(flat(128), "impulse_noise", severity, 0)
        share, error = level("impulse_noise", severity), 4 * math.sqrt(0.17) / 256
        assert ((found == 0) | (found == 128) | (found == 255)).all()
        assert (found == 0).double().mean().item() == pytest.approx(share / 2, abs=error)
        assert (found == 255).double().mean().item() == pytest.approx(share / 2, abs=error)
        hit = found != 128
        assert before is None or (hit | ~before).all()
        before = hit


@pytest.mark.parametrize("severity", range(1, 6))
def test_shot_noise_has_the_moments_of_counted_photons(severity):
    photons = level("shot_noise", severity)
    for value in (20, 90):
        found = corrupt(flat(value), "shot_noise", severity, 0).double()
        grey = 255 / photons
        mean, variance = value, grey**2 * value / 255 * photons
        clipped = stats.poisson.sf(photons, value / 255 * photons)
        if clipped < 1e-4:
            assert found.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance) / 256 + 0.5 * (grey < 2))
            # 4 standard errors of a variance (kurtosis of Poisson numbers included), rounding, and the tails left out.
            kurtosis = 3 + 1 / (value / 255 * photons)
            error = 4 * math.sqrt(kurtosis - 1) / 256 + 0.01
            assert found.var().item() == pytest.approx(variance + 1 / 12, rel=error)
    black = corrupt(flat(0), "shot_noise", severity, 0)
    assert (black == 0).all()


def test_poisson_quantiles_are_those_of_scipy():
    means = np.array([0.02, 0.7, 5.0, 33.3, 60.0])
    expected = stats.poisson.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, means[:, None])
    np.testing.assert_array_equal(poisson_quantiles(torch.from_numpy(means)).numpy(), expected)


@pytest.mark.parametrize("severity", [1, 5])
def test_rotation_is_that_of_scikit_image_in_either_direction(severity):
    degrees, found = level("rotation", severity), corrupt(GREY, "rotation", severity, 0)[:, 0]
    directions = set()
    for x, y in zip(GREY[:, 0].numpy().astype(float), found, strict=True):
        turned = [transform.rotate(x, sign * degrees, order=1, mode="constant") for sign in (-1, 1)]
        inside = np.s_[4:-4, 4:-4]  # the libraries fade out differently at the border
        off = [np.abs(t[inside] - y.numpy()[inside]).max() for t in turned]
        assert min(off) < 0.6 < 5 < max(off)
        directions.add(int(np.argmin(off)))
    assert directions == {0, 1}


def test_exposure_shifts_the_logarithm_and_only_underexposure_is_grainy():
    images = flat(128, side=64).expand(20, -1, -1, -1)
    for severity in (1, 4):
        stops = level("exposure", severity)
        found = corrupt(images, "exposure", severity, 0).double()
        means, spreads = found.mean((1, 2, 3)), found.std((1, 2, 3))
        over = means < 128
        assert 3 <= over.sum() <= 17
        assert (means[over] - (128 - 25.5 * stops)).abs().max() < 0.51
        assert (means[~over] - (128 + 25.5 * stops)).abs().max() < 1
        grain = 255 * 0.02 * math.sqrt(2**stops - 1)
        assert (spreads[over] == 0).all() and spreads[~over].mean().item() == pytest.approx(grain, rel=0.05)


def test_black_corners_leave_a_disk():
    for side in (28, 100):
        for severity in (3, 5):
            radius = level("black_corner", severity) * side / 2
            left = corrupt(flat(200, side=side), "black_corner", severity, 0).double().sum() / 200
            assert left.item() == pytest.approx(math.pi * radius**2, rel=0.01)


def test_shutters_close_further_with_the_severity_and_never_beyond_the_declared_width():
    images = flat(200, side=56).expand(10, -1, -1, -1)
    before = images
    for severity in range(1, 6):
        found = corrupt(images, "collimation", severity, 0)
        widest = 2 * level("collimation", severity)
        whole, closed = math.ceil(widest), math.floor(widest / 2)
        assert (found[:, :, whole:-whole, whole:-whole] == 200).all()
        assert (found[:, :, :closed] == 0).all() and (found[:, :, :, -closed:] == 0).all()
        assert (found <= before).all()
        before = found


@pytest.mark.parametrize("name", ["stain_deposit", "bubble"])
@pytest.mark.parametrize("side", [28, 112])
def test_blots_and_bubbles_are_dark_and_bright_more_with_the_severity_and_cover_a_minor_part(name, side):
    images = flat(150, channels=3, side=side).expand(30, -1, -1, -1)
    before = images.int()
    for severity in range(1, 6):
        found = corrupt(images, name, severity, 0).int()
        worse = found - before
        assert (worse <= 0).all() if name == "stain_deposit" else (worse >= 0).all()
        before = found
    covered = (before != 150).double().mean((1, 2, 3))
    assert covered.mean() > 0.02 and covered.max() < 0.5
    if name == "stain_deposit":
        assert before.min() == 15  # a tenth
    else:  # 39 % white inside, 51 % on the rim, which is a quarter of a pixel wide in the small images
        assert 150 + 0.39 * 105 < before.max() <= round(150 + 0.51 * 105)


def test_letters_are_written_as_they_are_drawn_and_lost_outside_the_image():
    canvas = torch.zeros(1, 1, 10, 20)
    codes = torch.tensor([[ord("l") - ord("a"), BLANK, ord("t") - ord("a")]])
    found = write(canvas, codes, torch.tensor([1]), torch.tensor([2]), 1)[0, 0]
    l, t = ["#..", "#..", "#..", "#..", "###"], ["###", ".#.", ".#.", ".#.", ".#."]
    expected = torch.zeros(10, 20)
    for row in range(5):
        for column in range(3):
            expected[2 + row, 1 + column] = l[row][column] == "#"
            expected[2 + row, 9 + column] = t[row][column] == "#"
    assert torch.equal(found, expected)
    twice = write(torch.zeros(1, 1, 20, 40), codes, torch.tensor([2]), torch.tensor([4]), 2)[0, 0]
    assert torch.equal(twice, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))
    outside = write(canvas, codes, torch.tensor([18]), torch.tensor([-2]), 1)[0, 0]
    assert torch.equal(outside[:3, 18:20], torch.tensor([[1.0, 0], [1, 0], [1, 1]])) and outside.sum() == 4


def test_every_letter_has_a_shape_of_its_own():
    letters = [GLYPHS[i : i + 5] for i in range(0, len(GLYPHS), 5)]
    assert len(letters) == len(set(letters)) == BLANK == 26 and set(GLYPHS) <= set("01234567")


@pytest.mark.parametrize(
    ("name", "side", "height"), [("characters", 28, 5), ("text_marker", 28, 5), ("text_marker", 224, 15)]
)
def test_text_is_whole_and_high_enough_to_be_read(name, side, height):
    images = flat(0, side=side).expand(60, -1, -1, -1)
    found = corrupt(images, name, 1, 0)[:, 0]
    rows, columns = (found > 0).any(2), (found > 0).any(1)
    assert (rows.sum(1) == height).all()
    if name == "text_marker":  # a single side letter
        assert (columns.sum(1) == 3 * height // 5).all() and (found.amax((1, 2)) == 245).all()
    else:  # 3 to 6 letters of at least one pixel's width
        assert ((columns.sum(1) >= 3) & (columns.sum(1) <= 18)).all()
    assert not rows[:, 0].any() and not rows[:, -1].any() and not columns[:, 0].any() and not columns[:, -1].any()


def test_more_markers_keep_those_that_are_there_and_never_overlap():
    images = flat(0, side=28).expand(40, -1, -1, -1)
    before = images
    counts = []
    for severity in range(1, 6):
        found = corrupt(images, "text_marker", severity, 0)
        assert (found >= before).all()
        counts.append((found > 0).sum((1, 2, 3)))
        before = found
    # Five texts of 3 x 5 cells light at least 5 pixels each; an overlap would hide some.
    assert all((b - a >= 10).all() for a, b in pairwise(counts))


def test_draws_of_a_stream_continue_and_streams_are_independent():
    draws = Draws(0, "bubble", np.arange(2000), torch.device("cpu"))
    few, many = draws.uniform("x", 2), draws.uniform("x", 10)
    assert torch.equal(many[:, :2], few) and not torch.equal(draws.uniform("y", 2), few)
    assert many.min() > 0 and many.max() < 1
    assert stats.kstest(many.flatten().numpy(), "uniform").pvalue > 0.001
    assert stats.kstest(draws.normal("x", 10).flatten().numpy(), "norm").pvalue > 0.001


def test_every_corruption_has_a_kernel_and_every_kernel_a_corruption():
    assert {c.kernel for c in CORRUPTIONS.values()} == set(KERNELS)
    assert all(name == c.name and len(set(c.levels)) == 5 and c.summary for name, c in CORRUPTIONS.items())


def test_every_dataset_in_the_tree_has_its_list():
    known = {name for name, entry in DATASETS.entries().items() if entry.plugin is None}
    assert known - {"npz"} == set(DECLARED) == set(MODALITIES)
    published = {
        **{"pathmnist": 11, "bloodmnist": 11, "dermamnist": 15, "retinamnist": 8, "tissuemnist": 8, "octmnist": 6},
        **{"breastmnist": 7, "chestmnist": 13, "pneumoniamnist": 13, "organamnist": 13, "organcmnist": 13},
        "organsmnist": 13,
    }
    assert {name: len(DECLARED[name]) for name in published} == published
    for name in DECLARED:
        channels = 3 if name in ("pathmnist", "bloodmnist", "dermamnist", "retinamnist") else 1
        assert corruptions_of(name, channels) == list(DECLARED[name])
        assert all(cannot(c, name, channels, 28) == "" for c in DECLARED[name])
    radiographs = {"exposure", "rotation", "collimation", "text_marker"}
    assert radiographs <= set(corruptions_of("phantom_cxr", 1))


def test_a_dataset_that_nothing_is_declared_for_gets_what_suits_every_image():
    grey, colour = corruptions_of("npz", 1), corruptions_of("npz", 3)
    assert set(colour) - set(grey) == {"saturate"} and not {"exposure", "bubble", "stain_deposit"} & set(colour)


@pytest.mark.parametrize(
    ("name", "dataset", "channels", "size", "reason"),
    [
        ("saturate", "breastmnist", 1, 28, "needs colours"),
        ("stain_deposit", "tissuemnist", 1, 28, "needs colours"),
        ("stain_deposit", "dermamnist", 3, 28, "is for microscopy, and the images of dermamnist are dermatoscopy"),
        ("bubble", "breastmnist", 1, 28, "is for microscopy"),
        ("exposure", "octmnist", 1, 28, "is for radiographs"),
        ("characters", "dermamnist", 3, 16, "needs at least 28 pixels"),
        ("bubble", "npz", 1, 28, ""),
        ("rotation", "octmnist", 1, 28, ""),
    ],
)
def test_it_is_said_what_a_dataset_cannot_have(name, dataset, channels, size, reason):
    found = cannot(name, dataset, channels, size)
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian_noise", 1, "did you mean 'gaussian_noise'"),
        ("jpeg", 6, "give 0 (none) to 5"),
        ("jpeg", -1, "give 0 (none) to 5"),
        ("saturate", 1, "needs colours"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(name, severity, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        corrupt(GREY, name, severity, 0)
    assert message in str(caught.value)


def test_images_of_another_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        corrupt(GREY.float(), "jpeg", 1, 0)


def test_a_contact_sheet_shows_every_severity_of_every_row():
    names = ["brightness_down", "gamma_up"]
    sheet = np.asarray(contact_sheet(GREY.numpy(), names))
    cell = CELL + GAP
    assert sheet.shape == (HEADER + 2 * cell, LABEL + 6 * cell, 3)
    for row, name in enumerate(names):
        for severity in range(6):
            top, left = HEADER + row * cell, LABEL + severity * cell
            shown = sheet[top : top + CELL : 4, left : left + CELL : 4, 0]
            np.testing.assert_array_equal(shown, corrupt(GREY[row : row + 1], name, severity, 0, first=row)[0, 0])
        assert sheet[HEADER + row * cell : HEADER + (row + 1) * cell, :LABEL].min() < 50  # its name, antialiased


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_devices_agree_but_for_single_grey_levels(name):
    images = images_for(name)
    on_gpu = corrupt(images.cuda(), name, 4, 0)
    assert on_gpu.is_cuda
    off = (on_gpu.cpu().int() - corrupt(images, name, 4, 0).int()).abs()
    # A count of photons is a whole step of the ladder; elsewhere a rounding error moves one grey level.
    assert (off > 0).float().mean() < 1e-3 and (name == "shot_noise" or off.max() <= 1)
