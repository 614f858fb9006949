"""The synthetic radiographs: reproducible bytes, latents that the pixels show, patients that stay in one split."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from multiplicity_bench.datasets import phantom_rendering as rendering
from multiplicity_bench.datasets.api import prepare
from multiplicity_bench.datasets.phantom_cxr import PhantomCXR
from multiplicity_bench.errors import UserError
from multiplicity_bench.identity import array_digest

STREAM = rendering.Stream(0, "train")
GOLDEN = "5d6b67eb22be977d322a737c3c04b92b66f4aa68e3268e9dc40756c3b81e52ee"


@pytest.fixture(scope="module")
def phantom():
    return PhantomCXR(train=900, val=20, test=20).load()


def rendered(count=300, size=28, **changed):
    """Images of the same patients, noise and anatomy with some truths replaced."""
    latents = PhantomCXR().latents("train", count)
    latents |= {name: np.full(count, value, latents[name].dtype) for name, value in changed.items()}
    return rendering.render(latents, size, STREAM).astype(float)[:, 0]


def test_the_pixels_of_a_seed_never_change():
    tiny = PhantomCXR(train=12, val=4, test=4).load()
    arrays = {f"{name}/{kind}": getattr(s, kind) for name, s in tiny.splits.items() for kind in ("images", "labels")}
    assert array_digest(arrays) == GOLDEN, "raise PhantomCXR.version when the images are meant to change"


def test_the_same_settings_give_the_same_data_and_another_seed_gives_other_data():
    first, again, other = (prepare(PhantomCXR(train=60, val=30, test=30, seed=s)) for s in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    np.testing.assert_array_equal(first.splits["train"].images, again.splits["train"].images)


def test_a_larger_set_continues_a_smaller_one():
    small, large = (PhantomCXR(train=n, val=2, test=2).load().splits["train"] for n in (50, 400))
    for kind in ("images", "labels", "patient"):
        np.testing.assert_array_equal(getattr(small, kind), getattr(large, kind)[:50])


def test_images_do_not_depend_on_how_they_are_rendered_in_chunks(monkeypatch):
    whole = rendered(30)
    monkeypatch.setattr(rendering, "CHUNK_PIXELS", 7 * 28 * 28)
    np.testing.assert_array_equal(whole, rendered(30))


def test_the_splits_are_different_images(phantom):
    assert not np.array_equal(phantom.splits["train"].images[:20], phantom.splits["test"].images)
    assert prepare(PhantomCXR(train=200, val=200, test=200)).duplicates == {}


@pytest.mark.parametrize("size", [28, 61, 224])
def test_any_size_shows_the_same_patients(size):
    data = PhantomCXR(train=8, val=1, test=1, size=size).load().splits["train"]
    assert data.images.shape == (8, 1, size, size) and data.images.dtype == np.uint8
    coarse = PhantomCXR(train=8, val=1, test=1).load().splits["train"]
    np.testing.assert_array_equal(data.labels, coarse.labels)
    means = data.images.mean((1, 2, 3)), coarse.images.mean((1, 2, 3))
    np.testing.assert_allclose(*means, atol=5)


def test_everything_says_synthetic(phantom):
    assert phantom.synthetic and "synthetic" in phantom.source and any("synthetic" in note for note in phantom.notes)


def test_no_patient_is_in_two_splits_and_patients_have_one_to_three_images(phantom):
    patients = [set(split.patient.tolist()) for split in phantom.splits.values()]
    assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
    films = np.unique(np.bincount(phantom.splits["train"].patient)[phantom.splits["train"].patient])
    assert set(films) <= {1, 2, 3} and len(films) > 1


def test_sex_age_and_site_belong_to_the_patient(phantom):
    train = phantom.splits["train"]
    for name in ("sex", "age", "site"):
        pairs = np.unique(np.stack([train.patient, train.attributes[name]]), axis=1)
        assert pairs.shape[1] == len(np.unique(train.patient))


def test_attributes_are_the_latents(phantom):
    train = phantom.splits["train"]
    np.testing.assert_array_equal(train.attributes["sex"], train.latents["male"])
    np.testing.assert_array_equal(train.attributes["view"], train.latents["ap"])
    np.testing.assert_array_equal(train.attributes["age"], train.latents["age"] // 10)
    for name, codes in train.attributes.items():
        assert codes.min() >= 0 and codes.max() < len(phantom.attribute_values[name])
        assert len(np.unique(codes)) > 1


def test_labels_are_the_findings_but_for_the_flipped_ones(phantom):
    train = phantom.splits["train"]
    np.testing.assert_array_equal(train.labels == 1, train.latents["finding"] ^ train.latents["flipped"])
    assert 0 < train.latents["flipped"].mean() < 0.07
    clean = PhantomCXR(train=100, val=1, test=1, label_noise=0).load().splits["train"]
    np.testing.assert_array_equal(clean.labels == 1, clean.latents["finding"])


def test_drains_stand_in_most_positives_and_few_negatives(phantom):
    latents = phantom.splits["train"].latents
    # 900 images: four binomial standard errors are .08 and .03
    assert abs(latents["drain"][latents["finding"]].mean() - 0.7) < 0.1
    assert abs(latents["drain"][~latents["finding"]].mean() - 0.05) < 0.04


def test_a_drain_brightens_a_thin_track_on_its_own_side_only():
    change = rendered(drain=True, left=True) - rendered(drain=False, left=True)
    assert change[:, :, 15:].max((1, 2)).min() > 20
    assert np.abs(change[:, :, :11]).max() == 0
    assert (change > 10).mean() < 0.1
    assert (change < 0).mean() < 0.02


def test_air_darkens_the_lung_more_the_larger_it_is_and_nothing_changes_without_it():
    none, some, much = (rendered(extent=e, left=False, drain=False) for e in (0.0, 0.3, 0.6))
    np.testing.assert_array_equal(none, rendered(extent=0.0, left=True, drain=False))
    assert np.abs(some - none)[:, :, 18:].max() == 0, "the other lung must not change"
    darkened = (none - some).clip(0).sum((1, 2)), (none - much).clip(0).sum((1, 2))
    assert (darkened[0] > 0).all() and (darkened[1] > darkened[0]).mean() > 0.99


def test_free_air_has_no_lung_markings():
    # At 112 pixels the markings are resolved: compare the roughness of one patient's lung with and without air.
    free, aerated = (rendered(30, 112, extent=e, left=False, leads=False, drain=False) for e in (1.0, 0.0))
    lung = slice(30, 55), slice(22, 40)
    rough = [np.abs(np.diff(image[:, *lung], axis=1)).mean() for image in (free, aerated)]
    assert rough[0] < rough[1]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("male", 0, 1),
        ("age", 20, 85),
        ("ap", 0, 1),
        ("site", 0, 1),
        ("site", 1, 2),
        ("skin_fold", 0, 1),
        ("leads", 0, 1),
    ],
)
def test_every_attribute_and_distractor_shapes_the_image(name, low, high):
    change = rendered(60, **{name: high}) - rendered(60, **{name: low})
    assert (np.abs(change).max((1, 2)) > 8).mean() > 0.9


def test_bedside_films_have_larger_hearts_and_old_patients_more_of_them(phantom):
    heart = slice(14, 20), slice(14, 20)
    assert rendered(ap=True)[:, *heart].mean() > rendered(ap=False)[:, *heart].mean()
    latents = phantom.splits["train"].latents
    assert latents["ap"][latents["age"] > 60].mean() > latents["ap"][latents["age"] < 45].mean()


@pytest.mark.parametrize("prevalence", [0.0, 0.2, 0.7, 1.0])
def test_prevalence_is_the_share_of_findings(prevalence):
    finding = PhantomCXR(prevalence=prevalence).latents("train", 20_000)["finding"].mean()
    # images of a patient are correlated: about 10,000 independent ones, four standard errors are .02
    assert abs(finding - prevalence) < (0.02 if 0 < prevalence < 1 else 1e-9)


def test_latents_are_left_out_of_the_digest_but_the_size_is_in_it():
    data = prepare(PhantomCXR(train=40, val=20, test=20))
    assert set(data.splits["tune"].latents) == set(data.splits["test"].latents) >= {"finding", "drain", "extent"}
    assert data.digest != prepare(PhantomCXR(train=40, val=20, test=20, size=29)).digest


def test_settings_are_plain_values_with_defaults():
    for field in dataclasses.fields(PhantomCXR):
        assert type(field.default) in (int, float, str, bool)
    from omegaconf import OmegaConf

    config = OmegaConf.merge(OmegaConf.structured(PhantomCXR), {"size": 64})
    assert OmegaConf.to_object(config) == PhantomCXR(size=64)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("size", 16),
        ("size", 256),
        ("train", 0),
        ("test", -1),
        ("prevalence", 1.2),
        ("label_noise", -0.1),
        ("drain_in_positives", 2.0),
        ("smallest", 0.0),
        ("largest", 0.01),
        ("grain", float("nan")),
        ("visibility", -1.0),
    ],
)
def test_a_setting_out_of_range_is_named_in_one_line(setting, value):
    with pytest.raises(UserError, match=f"dataset.{setting}=") as raised:
        PhantomCXR(**{setting: value}).load()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_at_least_two_thousand_images_are_rendered_per_second():
    PhantomCXR(train=200, val=1, test=1).load()
    start = time.perf_counter()
    PhantomCXR(train=4000, val=1, test=1).load()
    assert 4000 / (time.perf_counter() - start) > 2000
