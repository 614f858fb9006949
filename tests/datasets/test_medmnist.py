"""The MedMNIST sets: the official file, files made in their layout, and what happens when there is none."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from multiplicity_bench.datasets import medmnist as component
from multiplicity_bench.datasets.api import DATASETS, prepare
from multiplicity_bench.datasets.medmnist import MedMNIST, download
from multiplicity_bench.errors import UserError

NAMES = [name for name, entry in DATASETS.entries().items() if entry.module.endswith(".medmnist")]


def named(name, **settings):
    dataset = DATASETS.get(name)(**settings)
    dataset.name = name
    return dataset


def fake(folder, name, labels, channels=1, size=28):
    """Write a small file in the layout of `name`; labels: [sample, column] for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (size, size) if channels == 1 else (size, size, channels)
    content = {}
    for split in ("train", "val", "test"):
        content[f"{split}_images"] = rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
        content[f"{split}_labels"] = labels.astype(np.uint8)
    np.savez(folder / f"{name}.npz", **content)
    return content


@pytest.mark.real
def test_breastmnist_is_read_as_it_is_published(real_data):
    data = prepare(named("breastmnist"), real_data)
    assert [len(data.splits[s]) for s in ("train", "tune", "val", "test")] == [491, 55, 78, 156]
    assert (data.task, data.classes, data.positive) == ("binary", ["malignant", "normal, benign"], 1)
    assert data.splits["test"].images.shape == (156, 1, 28, 28)
    assert data.licence == "CC BY 4.0" and not data.synthetic
    assert not any("official" in note for note in data.notes) and any("positive" in note for note in data.notes)
    assert set(data.splits["tune"].labels) == {0, 1}
    with np.load(real_data / "medmnist" / "breastmnist.npz") as official:
        np.testing.assert_array_equal(data.splits["val"].images[:, 0], official["val_images"])
        np.testing.assert_array_equal(data.splits["val"].labels, official["val_labels"][:, 0])


@pytest.mark.real
def test_the_inner_folder_gives_the_same_data(real_data):
    outer, inner = (prepare(named("breastmnist"), root) for root in (real_data, real_data / "medmnist"))
    assert outer.digest == inner.digest


def test_all_twelve_sets_are_registered_with_a_known_task():
    info = component.published()
    assert len(NAMES) == 12 and set(NAMES) <= set(info)
    assert {component.TASK_OF[info[name]["task"]] for name in NAMES} == {
        "binary",
        "multiclass",
        "ordinal",
        "multilabel",
    }
    binary = {name for name in NAMES if component.TASK_OF[info[name]["task"]] == "binary"}
    assert binary == set(component.POSITIVE)


def test_chestmnist_is_multilabel_and_a_file_of_ones_own_is_noted(tmp_path):
    labels = np.random.default_rng(1).integers(0, 2, (30, 14))
    content = fake(tmp_path / "medmnist", "chestmnist", labels)
    data = prepare(named("chestmnist"), tmp_path)
    assert (data.task, len(data.classes), data.positive) == ("multilabel", 14, None)
    np.testing.assert_array_equal(data.splits["test"].labels, content["test_labels"])
    assert any("not the official file" in note for note in data.notes)
    assert any("not the official counts: 30/30/30, official 78468/11219/22433" in note for note in data.notes)


def test_dermamnist_is_in_colour_and_carries_its_caveats(tmp_path):
    content = fake(tmp_path, "dermamnist", np.arange(30)[:, None] % 7, channels=3)
    data = prepare(named("dermamnist"), tmp_path)
    assert (data.task, len(data.classes)) == ("multiclass", 7)
    np.testing.assert_array_equal(data.splits["test"].images[4, 2], content["test_images"][4, :, :, 2])
    assert any("CC BY-NC" in note for note in data.notes) and any("leakage" in note for note in data.notes)


def test_retinamnist_is_ordinal_and_larger_sizes_are_files_of_their_own(tmp_path):
    fake(tmp_path, "retinamnist_64", np.arange(30)[:, None] % 5, channels=3, size=64)
    data = prepare(named("retinamnist", size=64), tmp_path)
    assert data.task == "ordinal" and data.splits["test"].images.shape == (30, 3, 64, 64)


def test_an_official_size_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"dataset.size=32: .*28, 64, 128, 224"):
        prepare(named("breastmnist", size=32), tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    fake(tmp_path, "breastmnist", np.arange(30)[:, None] % 2)
    file = tmp_path / "breastmnist.npz"
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"breastmnist.npz is not a complete npz file"):
        prepare(named("breastmnist"), tmp_path)


def test_a_named_folder_without_the_file_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(component, "download", lambda *_: pytest.fail("downloaded for an explicit data_root"))
    with pytest.raises(UserError, match=r"pathmnist_64.npz is neither in .* nor in .*medmnist: put it there") as raised:
        prepare(named("pathmnist", size=64), tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv("MULTIPLICITY_BENCH_DATA", str(tmp_path))
    with pytest.raises(UserError, match="put it there"):
        prepare(named("pathmnist"))
    (tmp_path / "file.npz").touch()
    with pytest.raises(UserError, match="is a file: for pathmnist name the folder"):
        prepare(named("pathmnist"), tmp_path / "file.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file.npz"]


def test_without_a_named_folder_the_file_is_fetched_into_home_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MULTIPLICITY_BENCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    fetched = []

    def fetch(url, file, md5):
        fetched.append((url, md5))
        fake(file.parent, file.stem, np.arange(30)[:, None] % 2)
        return file

    monkeypatch.setattr(component, "download", fetch)
    digests = {prepare(named("breastmnist")).digest for _ in range(2)}
    assert len(digests) == 1
    assert fetched == [
        ("https://zenodo.org/records/10519652/files/breastmnist.npz?download=1", "750601b1f35ba3300ea97c75c52ff8f6")
    ]
    assert (tmp_path / "home" / ".medmnist" / "breastmnist.npz").is_file()


def test_a_download_appears_only_when_its_checksum_is_right(tmp_path):
    source = tmp_path / "source.npz"
    source.write_bytes(b"x" * 3_000_000)
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    target = tmp_path / "new" / "set.npz"
    with pytest.raises(UserError, match=r"set.npz arrived damaged"):
        download(source.as_uri(), target, "0" * 32)
    assert list(target.parent.iterdir()) == []
    assert download(source.as_uri(), target, md5).read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_offline_the_sentence_names_file_folder_and_what_to_do(tmp_path):
    target = tmp_path / "set.npz"
    with pytest.raises(UserError) as raised:
        download((tmp_path / "absent").as_uri(), target, "0" * 32)
    text = str(raised.value)
    assert "\n" not in text and "set.npz" in text and str(tmp_path) in text and "data_root=FOLDER" in text
    assert list(tmp_path.iterdir()) == []


def test_one_class_serves_all_names():
    assert all(DATASETS.get(name) is MedMNIST for name in NAMES)
