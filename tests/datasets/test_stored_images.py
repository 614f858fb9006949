"""Images on disk take the place of an array: the same values, digest, duplicates and splits, read block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.datasets import api, stored
from multiplicity_bench.datasets.api import Data, Split, check, content_digest, count_duplicates, prepare
from multiplicity_bench.datasets.decoding import decode
from multiplicity_bench.datasets.films import Films, Rendering
from multiplicity_bench.datasets.hashing import hash_images
from multiplicity_bench.datasets.stored import StoredImages
from multiplicity_bench.errors import UserError
from multiplicity_bench.identity import array_digest
from PIL import Image

COUNTS = {"train": 60, "val": 20, "test": 20}


class Watched:
    """An array on disk that notes how many rows are read at once."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.most = 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key) -> np.ndarray:
        found = self.array[key]
        self.most = max(self.most, len(np.atleast_1d(np.arange(len(self.array))[key])))
        return found


@pytest.fixture
def both(tmp_path) -> tuple[np.ndarray, StoredImages]:
    """An array of images, and the same images in a file, where they stand in another order among others."""
    rng = np.random.default_rng(0)
    everything = rng.integers(0, 256, (120, 1, 7, 5), dtype=np.uint8)
    rows = rng.permutation(120)[:90]
    np.save(tmp_path / "images.npy", everything)
    on_disk = np.load(tmp_path / "images.npy", mmap_mode="r", allow_pickle=False)
    return everything[rows], StoredImages(on_disk, rows)


def test_it_describes_itself_as_the_array_does(both):
    array, images = both
    assert images.shape == array.shape and images.dtype == array.dtype and images.ndim == array.ndim
    assert len(images) == len(array) and images.nbytes == array.nbytes


@pytest.mark.parametrize(
    "key",
    [
        3,
        -1,
        slice(None),
        slice(5, 60, 7),
        slice(None, None, -1),
        slice(200, 300),
        np.array([4, 4, 0, 89, -2]),
        np.zeros(0, np.int64),
        np.arange(90) % 3 == 0,
        np.array([[1, 2], [3, 4]]),
    ],
    ids=str,
)
def test_what_is_asked_for_is_what_the_array_gives_and_a_copy(both, key):
    array, images = both
    found = images[key]
    assert type(found) is np.ndarray and found.flags.writeable
    np.testing.assert_array_equal(found, array[key])


@pytest.mark.parametrize("key", [90, np.array([0, 90])])
def test_a_row_that_is_not_there_is_an_error(both, key):
    with pytest.raises(IndexError):
        both[1][key]


def test_rows_that_are_taken_can_be_taken_from_again(both):
    array, images = both
    first, second = np.array([80, 3, 3, 41]), np.array([2, 0])
    np.testing.assert_array_equal(images.take(first).take(second)[:], array[first][second])
    assert len(images.take(np.zeros(0, np.int64))) == 0


@pytest.mark.parametrize("block_bytes", [1, 35 * 7, 2**24])
def test_blocks_in_order_are_the_whole(both, block_bytes, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    blocks = list(both[1].blocks())
    assert len(blocks) == {1: 90, 35 * 7: 13, 2**24: 1}[block_bytes]
    np.testing.assert_array_equal(np.concatenate(blocks), both[0])


def test_digest_and_hashes_are_those_of_the_array(both, monkeypatch):
    array, images = both
    monkeypatch.setattr(stored, "BLOCK_BYTES", 35 * 7)
    assert array_digest({"a": images, "b": array[:2]}) == array_digest({"a": array, "b": array[:2]})
    assert array_digest({"a": images.take(np.arange(89))}) != array_digest({"a": array})
    np.testing.assert_array_equal(hash_images(images), hash_images(array))


def test_the_digest_of_arrays_in_memory_is_what_it_was():
    arrays = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "names": np.array(["a", "b"])}
    assert array_digest(arrays) == "377b90fc66adc97fcbe5abe5c71c0d479f324ccd1d21081d2e771f6618bd0d77"


@dataclass
class Radiographs:
    """A dataset of films; `patients` of two films each; one train film is in test, too."""

    root: Path
    unreadable: str = "refuse"
    patients: bool = True
    name = "radiographs"
    version = 1

    def load(self, data_root: Path | None = None) -> Data:
        rng = np.random.default_rng(1)
        splits, first = {}, 0
        for name, count in COUNTS.items():
            files = [f"{name}/{k:02d}.png" for k in rng.permutation(count)]
            patient = first + np.arange(count) // 2 if self.patients else None
            films = Films(self.root, files, Rendering(16), self.unreadable)
            splits[name] = Split(films, np.arange(count) % 2, np.arange(count), patient, {"sex": np.arange(count) % 2})
            first += count
        about = {"positive": 1, "attribute_values": {"sex": ["F", "M"]}}
        return Data(self.name, "binary", ["no", "yes"], splits, exclusions=["2 rows were left out"], **about)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / name / f"{k:02d}.png")
    (folder / "test" / "07.png").write_bytes((folder / "train" / "11.png").read_bytes())
    return folder


@pytest.fixture
def on_disk(monkeypatch) -> None:
    monkeypatch.setattr(api, "RESIDENT_BYTES", 0)


def in_memory(root: Path, data: Data) -> Data:
    """Return the dataset as a reader would that decodes each film itself, in the order of the rows."""
    splits = {}
    for name, split in data.splits.items():
        assert isinstance(split.images, Films)
        images = np.stack([decode(root / file, split.images.rendering) for file in split.images.files])
        splits[name] = replace(split, images=images)
    return replace(data, splits=splits)


class Given:
    def __init__(self, data: Data):
        self.data = data

    def load(self, data_root):
        return self.data


@pytest.mark.parametrize("patients", [True, False])
def test_prepared_films_are_the_same_dataset_in_memory_on_disk_and_decoded_by_hand(root, patients, monkeypatch):
    dataset = Radiographs(root, patients=patients)
    by_hand = prepare(Given(in_memory(root, dataset.load())))
    resident = prepare(dataset)
    monkeypatch.setattr(api, "RESIDENT_BYTES", 0)
    lazy = prepare(dataset)
    assert by_hand.digest == resident.digest == lazy.digest
    assert by_hand.duplicates == resident.duplicates == lazy.duplicates == {"train/test": 1}
    for name, split in by_hand.splits.items():
        assert isinstance(resident.splits[name].images, np.ndarray)
        assert isinstance(lazy.splits[name].images, StoredImages)
        for found in (resident.splits[name], lazy.splits[name]):
            np.testing.assert_array_equal(found.images[:], split.images)
            np.testing.assert_array_equal(found.ids, split.ids)


def test_nothing_that_prepare_does_reads_more_than_a_block(root, on_disk, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", 5 * 256)
    monkeypatch.setattr("multiplicity_bench.datasets.hashing.CHUNK_WORDS", 5 * 32)
    watched: list[Watched] = []

    def watch(films, cache):
        found = real(films, cache)
        watched.append(Watched(found.images))
        return replace(found, images=watched[0])

    real = api.decode_films
    monkeypatch.setattr(api, "decode_films", watch)
    data = prepare(Radiographs(root))
    check(replace(data, splits={n: s for n, s in data.splits.items() if n != "tune"}))
    assert len(watched) == 1 and watched[0].most == 5
    assert count_duplicates(data.splits) == data.duplicates and content_digest(data) == data.digest


@pytest.mark.parametrize("resident", [True, False])
def test_films_that_cannot_be_read_are_left_out_with_all_that_belongs_to_them(root, resident, monkeypatch, tmp_path):
    if not resident:
        monkeypatch.setattr(api, "RESIDENT_BYTES", 0)
    whole = prepare(Radiographs(root))
    broken = {"train/20.png", "val/03.png", "train/05.png"}
    for name, count in COUNTS.items():
        (tmp_path / name).mkdir()
        for k in range(count):
            if f"{name}/{k:02d}.png" not in broken:
                (tmp_path / name / f"{k:02d}.png").write_bytes((root / name / f"{k:02d}.png").read_bytes())
    (tmp_path / "val" / "03.png").write_bytes(b"nothing to see")
    with pytest.raises(UserError, match=r"2 of 100 films cannot be read, the first is train/05.png"):
        prepare(Radiographs(tmp_path))
    data = prepare(Radiographs(tmp_path, "exclude"))
    assert data.exclusions == [
        "2 rows were left out",
        "3 of 100 films cannot be read and are left out: train/05.png, train/20.png, val/03.png",
    ]
    assert data.notes == data.exclusions
    assert {n: len(s) for n, s in data.splits.items() if n in ("val", "test")} == {"val": 19, "test": 20}
    assert len(data.splits["train"]) + len(data.splits["tune"]) == 58
    expected = {name: split.images for name, split in Radiographs(root).load().splits.items()}
    for name, split in data.splits.items():
        source = "train" if name == "tune" else name
        for k, row in enumerate(split.ids):
            assert expected[source].files[row] not in broken
            np.testing.assert_array_equal(split.images[k], decode(root / expected[source].files[row], Rendering(16)))
            assert split.labels[k] == row % 2 and split.attributes["sex"][k] == row % 2
    assert prepare(Radiographs(root)).digest == whole.digest != data.digest


def test_what_else_is_wrong_with_the_data_is_said_before_films_are_decoded(root, monkeypatch):
    data = Radiographs(root).load()
    data.splits["val"].labels[:] = 0
    monkeypatch.setattr(api, "decode_films", lambda films, cache: pytest.fail("decoded"))
    with pytest.raises(UserError, match="val_labels holds a single class"):
        prepare(Given(data))


def test_a_film_that_several_rows_name_is_decoded_once(root):
    data = Radiographs(root, patients=False).load()
    films = data.splits["test"].images
    films.files = [films.files[k // 2] for k in range(len(films.files))]
    images = prepare(Given(data)).splits["test"].images
    np.testing.assert_array_equal(images[::2], images[1::2])


def test_films_of_two_roots_are_no_dataset(root, tmp_path):
    data = Radiographs(root).load()
    data.splits["val"].images.root = tmp_path
    with pytest.raises(ValueError, match="one root"):
        prepare(Given(data))
