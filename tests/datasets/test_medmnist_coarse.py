"""Coarse labels of the multi-class MedMNIST sets: two superclasses, with the fine labels hidden."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.datasets import medmnist as component
from multiplicity_bench.datasets.api import DATASETS, prepare
from multiplicity_bench.errors import UserError
from multiplicity_bench.identity import plain


def named(name, **settings):
    dataset = DATASETS.get(name)(**settings)
    dataset.name = name
    return dataset


def fake(folder, name, classes, channels):
    """Write a small file in the layout of `name`, every class three times in every split."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(classes), 3)[:, None].astype(np.uint8)
    shape = (len(labels), 28, 28, channels) if channels > 1 else (len(labels), 28, 28)
    parts = {f"{s}_labels": labels for s in ("train", "val", "test")}
    np.savez(
        folder / f"{name}.npz",
        **parts,
        **{f"{s}_images": rng.integers(0, 256, shape, np.uint8) for s in ("train", "val", "test")},
    )


def test_every_multi_class_set_has_two_superclasses_of_its_own_classes():
    info = component.published()
    multiclass = {n for n in info if n in DATASETS.entries() and info[n]["task"] == "multi-class"}
    assert set(component.COARSE) == multiclass
    for name, coarse in component.COARSE.items():
        classes = range(len(info[name]["label"]))
        held = set(coarse.of_positive)
        assert held < set(classes) and len(held) >= 2 and len(set(classes) - held) >= 2
        assert coarse.positive and coarse.negative and coarse.positive != coarse.negative
    label = info["dermamnist"]["label"]
    assert {label[str(c)] for c in component.COARSE["dermamnist"].of_positive} == {
        "actinic keratoses and intraepithelial carcinoma",
        "basal cell carcinoma",
        "melanoma",
    }
    held = {info["bloodmnist"]["label"][str(c)][:20] for c in component.COARSE["bloodmnist"].of_positive}
    assert held == {"basophil", "eosinophil", "neutrophil", "immature granulocyte"}


def test_coarse_labels_are_a_binary_task_whose_fine_labels_stay_hidden_in_every_part(tmp_path):
    fake(tmp_path, "dermamnist", 7, 3)
    coarse, fine = (prepare(named("dermamnist", labels=labels), tmp_path) for labels in ("coarse", "fine"))
    assert (coarse.task, coarse.positive) == ("binary", 1)
    assert coarse.classes == ["benign", "malignant or premalignant"]
    for part in ("train", "tune", "val", "test"):
        split = coarse.splits[part]
        np.testing.assert_array_equal(split.labels, np.isin(split.latents["fine"], (0, 1, 4)))
        assert split.labels.dtype == np.int64 and (len(set(split.latents["fine"])) == 7 or part == "tune")
    np.testing.assert_array_equal(coarse.splits["test"].latents["fine"], fine.splits["test"].labels)
    assert not fine.splits["test"].latents and fine.task == "multiclass" and coarse.digest != fine.digest
    assert any(note.startswith("coarse labels: malignant or premalignant (positive, 1) is") for note in coarse.notes)
    assert any("licence CC BY-NC" in note for note in coarse.notes)


def test_fine_labels_keep_identity_and_digest(tmp_path):
    assert plain(named("dermamnist")) == {"size": 28}
    assert plain(named("dermamnist", labels="coarse")) == {"size": 28, "labels": "coarse"}
    fake(tmp_path, "dermamnist", 7, 3)
    digests = {prepare(named("dermamnist", **s), tmp_path).digest for s in ({}, {"labels": "fine"})}
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["breastmnist", "pneumoniamnist", "chestmnist", "retinamnist"])
def test_other_tasks_have_no_coarse_labels(name, tmp_path):
    with pytest.raises(
        UserError, match=rf"dataset\.labels=coarse: {name} has no coarse labels, only pathmnist"
    ) as error:
        named(name, labels="coarse").load(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).endswith("leave dataset.labels=fine")
    with pytest.raises(UserError, match=r"dataset\.labels=medium: fine or coarse"):
        named("dermamnist", labels="medium").load(tmp_path)
