"""Outliers: halves that never meet, images in the shape asked for, and words that say what was done to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multiplicity_bench.datasets.hashing import hash_images
from multiplicity_bench.datasets.outliers import check_outliers, outliers
from multiplicity_bench.datasets.phantom_cxr import PhantomCXR
from multiplicity_bench.errors import UserError
from PIL import Image
from scipy import stats


def medmnist(folder, name, channels, size=28, count=60):
    """Write a file in the layout of a MedMNIST set and return its test images, [sample, height, width(, channel)]."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (count, 7, 7, channels), dtype=np.uint8).repeat(size // 7, 1).repeat(size // 7, 2)
    images = smooth[..., 0] if channels == 1 else smooth
    parts = {f"{split}_images": images for split in ("train", "val", "test")}
    parts |= {f"{split}_labels": (np.arange(count) % 2)[:, None].astype(np.uint8) for split in ("train", "val", "test")}
    np.savez(folder / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz"), **parts)
    return images


def of_any(found, references):
    """Return, for each image, its largest difference from the closest of the references."""
    found, references = (np.asarray(a, float).reshape(len(a), -1) for a in (found, references))
    return np.abs(found[:, None] - references[None]).max(2).min(1)


def test_noise_is_uniform_independent_and_its_own_for_every_part_and_seed():
    found = outliers("noise", 50, 3, 28, 4)
    assert found.images.shape == (50, 3, 28, 28) and found.images.dtype == torch.uint8
    assert "uniform noise" in found.note
    values = found.images.flatten().numpy()
    assert stats.chisquare(np.bincount(values, minlength=256)).pvalue > 0.001
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(len(values))
    assert torch.equal(found.images, outliers("noise", 50, 3, 28, 4).images)
    others = [outliers("noise", 50, 3, 28, 5), outliers("noise", 50, 3, 28, 4, part="val")]
    assert all((found.images == other.images).float().mean() < 0.01 for other in others)


def test_the_halves_for_val_and_test_never_meet_whatever_seed_and_count():
    def drawn(part, *counts):
        found = [outliers("phantom_cxr", n, 1, 28, n, part=part).images.numpy() for n in counts]
        return np.concatenate([hash_images(images) for images in found])

    val, test = drawn("val", 9, 80), drawn("test", 13, 90)
    assert len(val) == 89 and len(test) == 103 and not np.isin(val, test).any()


def test_a_patient_is_in_one_half_and_both_halves_are_used():
    split = PhantomCXR(train=1, val=1, test=400).load().splits["test"]
    patient_of = dict(zip(hash_images(split.images), split.patient, strict=True))
    val, test = (
        {patient_of.get(h) for h in hash_images(outliers("phantom_cxr", 100, 1, 28, 0, part=part).images.numpy())}
        for part in ("val", "test")
    )
    assert len(val & set(split.patient)) > 50 and len(test & set(split.patient)) > 50
    assert not val & test - {None}


def test_a_rendered_set_comes_in_the_size_and_number_asked_for():
    found = outliers("phantom_cxr", 700, 1, 28, 0)
    assert len(found.images) == 700 and found.note == "700 test images of phantom_cxr"
    large = outliers("phantom_cxr", 2, 1, 40, 0)
    assert large.images.shape == (2, 1, 40, 40) and "resized" not in large.note


def test_the_seed_draws_which_images_and_in_which_order(tmp_path):
    own = medmnist(tmp_path, "breastmnist", 1)
    first, again, other = (outliers("breastmnist", 10, 1, 28, seed, tmp_path) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert of_any(first.images[:, 0], own).max() == 0
    assert len(set(hash_images(first.images.numpy()))) == 10


def test_grey_is_repeated_and_small_is_enlarged_as_pillow_does_and_both_are_said(tmp_path):
    own = medmnist(tmp_path, "breastmnist", 1)
    found = outliers("breastmnist", 8, 3, 64, 0, tmp_path)
    assert found.images.shape == (8, 3, 64, 64)
    assert torch.equal(found.images[:, 0], found.images[:, 1]) and torch.equal(found.images[:, 0], found.images[:, 2])
    expected = [np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BILINEAR)) for x in own]
    assert of_any(found.images[:, 0], expected).max() <= 1
    assert found.note == (
        "8 test images of breastmnist; resized from 28 x 28 to 64 x 64 pixels (bilinear, antialiased); "
        "grey levels repeated in 3 channels"
    )


def test_colour_becomes_luminance_and_a_file_of_the_right_size_is_preferred(tmp_path):
    medmnist(tmp_path, "bloodmnist", 3)
    own = medmnist(tmp_path, "bloodmnist", 3, 224, count=14)
    found = outliers("bloodmnist", 3, 1, 224, 0, tmp_path)
    assert found.images.shape == (3, 1, 224, 224)
    assert of_any(found.images[:, 0], [np.asarray(Image.fromarray(x).convert("L")) for x in own]).max() <= 1
    assert found.note == "3 test images of bloodmnist; colours reduced to their luminance (ITU-R BT.601)"


def test_large_is_reduced_with_antialiasing(tmp_path):
    own = medmnist(tmp_path, "breastmnist", 1)
    found = outliers("breastmnist", 8, 1, 14, 0, tmp_path)
    expected = [np.asarray(Image.fromarray(x).resize((14, 14), Image.Resampling.BILINEAR)) for x in own]
    assert of_any(found.images[:, 0], expected).max() <= 1


def test_fewer_images_than_asked_for_are_all_there_are_and_this_is_said(tmp_path):
    own = medmnist(tmp_path, "breastmnist", 1)
    val, test = (outliers("breastmnist", 1000, 1, 28, 0, tmp_path, part) for part in ("val", "test"))
    assert len(val.images) + len(test.images) == len(own) and min(len(val.images), len(test.images)) > 15
    assert val.note.startswith(
        f"{len(val.images)} test images of breastmnist, all of its half for val, where 1000 were"
    )


def test_absent_and_unknown_datasets_are_refused_in_one_line(tmp_path):
    for name, message in (
        ("breastmnist", "breastmnist.npz is neither in"),
        ("breastmist", "did you mean 'breastmnist'"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
            outliers(name, 5, 1, 28, 0, tmp_path)
        assert message in str(caught.value)
    medmnist(tmp_path, "bloodmnist", 3)
    with pytest.raises(UserError, match="only 1 and 3 are converted"):
        outliers("bloodmnist", 5, 2, 28, 0, tmp_path)
    with pytest.raises(ValueError, match="val or test"):
        outliers("noise", 5, 1, 28, 0, part="train")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("noise", ""),
        ("phantom_cxr", ""),
        ("breastmnist", "no outliers of breastmnist"),
        ("npz", "settings of its own"),
        ("nois", "did you mean 'noise'"),
    ],
)
def test_it_is_said_which_outliers_a_dataset_cannot_have(name, reason):
    found = check_outliers(name, "breastmnist")
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.real
def test_radiographs_are_decoded_at_the_size_asked_for_and_only_those_taken(real_data):
    if not (real_data / "nih_chest_xray14_sample").is_dir():
        pytest.skip("no sample of NIH ChestX-ray14 among the real images")
    found = outliers("nih_chest_xray14", 6, 3, 28, 0, real_data)
    assert found.images.shape == (6, 3, 28, 28) and "resized" not in found.note
    assert len(set(hash_images(found.images.numpy()))) == 6
    assert 40 < found.images.float().mean() < 200
