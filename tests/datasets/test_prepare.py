"""prepare: tune carved by patient or by class, duplicates, the content digest, and the default folder of data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.datasets import hashing
from multiplicity_bench.datasets.api import (
    DATASETS,
    Data,
    Split,
    age_codes,
    count_duplicates,
    default_data_root,
    prepare,
    resolve_data_root,
)
from multiplicity_bench.errors import UserError


@dataclass
class Given:
    """A dataset component that hands out what a test made."""

    data: Data
    name = "given"
    version = 1

    def load(self, data_root):
        return self.data


def split(count, seed, classes=2, patient=None):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 1, 5, 5), dtype=np.uint8)
    return Split(images, np.arange(count) % classes, np.arange(count), patient, {"sex": np.arange(count) % 2})


def made(counts=(200, 40, 40), classes=2, task="binary", **changed):
    splits = {name: split(n, i, classes) for i, (name, n) in enumerate(zip(("train", "val", "test"), counts))}
    names = [str(c) for c in range(classes)]
    data = Data(
        "given", task, names, splits, positive=1 if task == "binary" else None, attribute_values={"sex": ["F", "M"]}
    )
    return replace(data, **changed)


def refused(data, **settings):
    with pytest.raises(UserError) as raised:
        prepare(Given(data), **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_train_and_tune_are_a_partition_of_train_in_its_order():
    data = prepare(Given(made()))
    train, tune = data.splits["train"].ids, data.splits["tune"].ids
    assert len(tune) == 20 and np.all(np.diff(train) > 0) and np.all(np.diff(tune) > 0)
    assert sorted([*train, *tune]) == list(range(200))
    np.testing.assert_array_equal(data.splits["tune"].images, made().splits["train"].images[tune])


def test_tune_is_fixed_by_its_seed_and_changes_with_it():
    first, again, other = (prepare(Given(made()), tune_seed=s).splits["tune"].ids for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_tune_holds_its_share_of_every_class():
    data = made()
    data.splits["train"].labels = (np.arange(200) % 10 == 0).astype(np.int64)
    assert np.bincount(prepare(Given(data)).splits["tune"].labels).tolist() == [18, 2]


@pytest.mark.parametrize("count", [12, 20, 33])
def test_tune_of_a_small_set_holds_every_class_and_leaves_every_class_in_train(count):
    data = prepare(Given(made((count, 10, 10), classes=5, task="multiclass")))
    for name in ("train", "tune"):
        assert set(data.splits[name].labels) == set(range(5))


def test_a_class_with_a_single_image_stays_in_train():
    data = made(classes=3, task="multiclass")
    data.splits["train"].labels = np.r_[np.arange(199) % 2, 2]
    prepared = prepare(Given(data))
    assert 2 in prepared.splits["train"].labels and 2 not in prepared.splits["tune"].labels


def test_tune_is_drawn_by_patient_and_keeps_both_classes():
    data = made((300, 40, 40))
    for number, part in enumerate(data.splits.values()):
        part.patient = np.arange(len(part)) // 3 + 1000 * number
        part.labels = (part.patient % 4 == 0).astype(np.int64)
    prepared = prepare(Given(data))
    train, tune = prepared.splits["train"], prepared.splits["tune"]
    assert not set(train.patient) & set(tune.patient)
    assert len(tune) % 3 == 0 and 24 <= len(tune) <= 36 and set(tune.labels) == {0, 1}


def test_tune_of_a_multilabel_task_is_a_tenth_of_the_images():
    data = made(task="multilabel")
    for part in data.splits.values():
        part.labels = np.stack([np.arange(len(part)) % 2, np.arange(len(part)) % 3 - 1], 1)
    assert len(prepare(Given(data)).splits["tune"]) == 20


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_share_for_tune_outside_its_range_is_refused(fraction):
    assert "tune_fraction=" in refused(made(), tune_fraction=fraction)


def test_planted_duplicates_are_counted_by_pair_and_tune_counts_as_train():
    data = made()
    for row in range(3):
        data.splits["test"].images[row] = data.splits["train"].images[70 * row]
    data.splits["test"].images[9] = data.splits["val"].images[0]
    assert prepare(Given(data)).duplicates == {"train/test": 3, "val/test": 1}
    assert prepare(Given(made())).duplicates == {}


def test_duplicates_agree_with_a_comparison_of_bytes():
    rng = np.random.default_rng(0)
    parts = {
        n: Split(rng.integers(0, 2, (60, 1, 2, 3), np.uint8), np.zeros(60), np.zeros(60))
        for n in ("train", "val", "test")
    }
    sets = {name: [image.tobytes() for image in part.images] for name, part in parts.items()}
    expected = {
        f"{a}/{b}": sum(image in set(sets[a]) for image in sets[b])
        for a, b in (("train", "val"), ("train", "test"), ("val", "test"))
    }
    assert count_duplicates(parts) == expected


def test_hashes_tell_single_bits_and_swapped_words_apart(monkeypatch):
    images = np.zeros((8 * 49 + 1, 1, 7, 7), np.uint8)
    flat = images.reshape(len(images), -1)
    for bit in range(8 * 49):
        flat[bit, bit // 8] = 1 << bit % 8
    hashes = hashing.hash_images(images)
    assert len(np.unique(hashes)) == len(images)
    monkeypatch.setattr(hashing, "CHUNK_WORDS", 50)
    np.testing.assert_array_equal(hashes, hashing.hash_images(images))


def changes():
    def images(data):
        data.splits["test"].images[0, 0, 0, 0] ^= 1

    def labels(data):
        data.splits["val"].labels[:2] = data.splits["val"].labels[1::-1]

    def attributes(data):
        data.splits["train"].attributes["sex"][0] = -1

    def patients(data):
        for number, part in enumerate(data.splits.values()):
            part.patient = np.arange(len(part)) + 1000 * number

    def positive(data):
        data.positive = 0

    def classes(data):
        data.classes = ["a", "b"]

    def meaning(data):
        data.attribute_values = {"sex": ["M", "F"]}

    return [images, labels, attributes, patients, positive, classes, meaning]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_the_digest_changes_with_all_a_result_can_depend_on(change):
    data = made()
    change(data)
    assert prepare(Given(data)).digest != prepare(Given(made())).digest


def test_the_digest_changes_with_tune_but_not_with_latents_notes_or_place():
    plain = prepare(Given(made())).digest
    assert prepare(Given(made()), tune_seed=1).digest != plain
    data = made(notes=["a note"], location="elsewhere", source="another")
    data.splits["test"].latents["truth"] = np.ones(40)
    assert prepare(Given(data)).digest == plain


def broken(part, **values):
    data = made()
    for name, value in values.items():
        setattr(data.splits[part], name, value)
    return data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (made(task="regression"), "task 'regression' is unknown"),
        (made(positive=None), "declares positive"),
        (made(splits={"train": split(9, 0)}), "splits are train"),
        (broken("val", images=np.zeros((40, 5, 5), np.uint8)), "val_images is uint8 (40, 5, 5)"),
        (broken("val", images=np.zeros((40, 1, 5, 5))), "val_images is float64"),
        (broken("val", images=np.zeros((0, 1, 5, 5), np.uint8)), "val_images is empty"),
        (broken("val", images=np.zeros((40, 1, 6, 5), np.uint8)), "those of train (1, 5, 5)"),
        (broken("val", labels=np.arange(39) % 2), "val_labels is int64 (39,)"),
        (broken("val", labels=np.arange(40) % 2.0), "val_labels is float64"),
        (broken("test", labels=np.arange(40) % 3), "test_labels row 2 is 2: labels run from 0 to 1"),
        (broken("test", labels=np.zeros(40, np.int64)), "test_labels holds a single class"),
        (broken("test", attributes={"sex": np.full(40, 2)}), "test_sex row 0 is 2: codes run from -1 to 1"),
        (broken("test", attributes={"age": np.zeros(40, np.int64)}), "attribute age has no attribute_values"),
        (broken("test", attributes={"sex": np.zeros(4, np.int64)}), "test_sex is int64 (4,)"),
        (broken("test", patient=np.arange(40)), "but not for train, val"),
        (broken("test", ids=np.arange(39)), "ids of test is int64 (39,)"),
        (broken("test", latents={"truth": np.zeros(3)}), "latent truth of test has 3 rows"),
        (made((2, 40, 40)), "train is too small to carve tune out of it"),
    ],
)
def test_a_broken_promise_is_named_with_its_array(data, said):
    assert said in refused(data)


def test_a_patient_in_two_splits_is_refused_with_both_rows():
    data = made()
    for number, part in enumerate(data.splits.values()):
        part.patient = np.arange(len(part)) + 1000 * number
    data.splits["val"].patient[4] = 2030
    assert "val_patient row 4 and test_patient row 30" in refused(data)


def test_ages_become_decades_and_the_impossible_unknown():
    years = np.array([0, 9.9, 10, 89, 90, 120, 121, -1, np.nan])
    assert age_codes(years).tolist() == [0, 0, 1, 8, 9, 9, -1, -1, -1]


def test_the_default_folder_is_the_variable_then_the_shared_one_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MULTIPLICITY_BENCH_DATA", raising=False)
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    monkeypatch.chdir(project / "sub")
    assert default_data_root() == tmp_path / "home" / ".medmnist"
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert resolve_data_root(None) == tmp_path / "shared" / "data"
    monkeypatch.setenv("MULTIPLICITY_BENCH_DATA", str(project))
    assert default_data_root() == project
    monkeypatch.setenv("MULTIPLICITY_BENCH_DATA", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"MULTIPLICITY_BENCH_DATA=.*absent does not exist"):
        default_data_root()
    assert not (tmp_path / "home").exists()


def test_a_named_folder_that_is_missing_is_refused_and_not_created(tmp_path):
    with pytest.raises(UserError, match=r"data_root=.*absent does not exist"):
        prepare(Given(made()), tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    assert resolve_data_root(str(tmp_path)) == tmp_path


def test_every_built_in_dataset_is_listed_with_a_line_and_imports_without_torch():
    import subprocess
    import sys

    entries = DATASETS.entries()
    assert {"phantom_cxr", "npz", "breastmnist", "chestmnist", "organsmnist"} <= set(entries) and len(entries) >= 14
    assert all(entry.summary for entry in entries.values())
    modules = sorted({entry.module for entry in entries.values() if entry.plugin is None})
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix))
