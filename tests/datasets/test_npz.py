"""A user's own npz file: what is read from it, and one line for everything that can be wrong with it."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.datasets.api import AGE_BINS, prepare
from multiplicity_bench.datasets.npz import Npz
from multiplicity_bench.errors import UserError

COUNTS = {"train": 40, "val": 20, "test": 20}


def arrays(**changed):
    """A sound file's arrays with some replaced; None removes one."""
    rng = np.random.default_rng(0)
    found = {}
    for split, count in COUNTS.items():
        found[f"{split}_images"] = rng.integers(0, 256, (count, 12, 10), dtype=np.uint8)
        found[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    return {k: v for k, v in (found | changed).items() if v is not None}


def stored(folder, content=None, **changed):
    file = folder / "own.npz"
    np.savez(file, **(content or arrays(**changed)))
    return file


def read(folder, settings=None, **changed):
    return prepare(Npz(**(settings or {})), stored(folder, **changed))


def message(folder, settings=None, file=None, **changed):
    with pytest.raises(UserError) as raised:
        prepare(Npz(**(settings or {})), file or stored(folder, **changed))
    text = str(raised.value)
    assert "\n" not in text and ": " in text, "one line that says what to do"
    return text


def test_a_plain_file_is_a_binary_task_with_images_in_channel_order(tmp_path):
    data = read(tmp_path)
    assert (data.task, data.positive, data.classes) == ("binary", 1, ["0", "1"])
    assert data.splits["test"].images.shape == (20, 1, 12, 10)
    assert data.splits["test"].labels.shape == (20,) and data.splits["test"].labels.dtype == np.int64
    assert [len(data.splits[s]) for s in ("train", "tune", "val", "test")] == [36, 4, 20, 20]
    np.testing.assert_array_equal(data.splits["test"].images[:, 0], arrays()["test_images"])


def test_colour_images_keep_their_pixels(tmp_path):
    colour = {
        f"{s}_images": np.random.default_rng(1).integers(0, 256, (n, 8, 9, 3), np.uint8) for s, n in COUNTS.items()
    }
    images = read(tmp_path, **colour).splits["val"].images
    assert images.shape == (20, 3, 8, 9)
    np.testing.assert_array_equal(images[3, 1], colour["val_images"][3, :, :, 1])


def test_more_classes_are_multiclass_and_can_be_declared_ordinal_with_names(tmp_path):
    labels = {f"{s}_labels": np.arange(n) % 3 for s, n in COUNTS.items()}
    data = read(tmp_path, **labels)
    assert (data.task, data.positive, len(data.classes)) == ("multiclass", None, 3)
    data = read(tmp_path, {"task": "ordinal", "class_names": "none, mild, severe"}, **labels)
    assert (data.task, data.classes) == ("ordinal", ["none", "mild", "severe"])


def test_several_label_columns_are_multilabel_with_missing_labels(tmp_path):
    labels = {
        f"{s}_labels": np.stack([np.arange(n) % 2, np.arange(n) % 3 == 0], 1).astype(float) for s, n in COUNTS.items()
    }
    labels["test_labels"][5, 1] = np.nan
    data = read(tmp_path, **labels)
    assert (data.task, len(data.classes)) == ("multilabel", 2)
    assert data.splits["test"].labels[5].tolist() == [1, -1]


def test_the_positive_class_is_the_users_choice(tmp_path):
    assert read(tmp_path, {"positive": 0}).positive == 0
    assert "dataset.positive=2" in message(tmp_path, {"positive": 2})


def test_attributes_are_coded_alike_in_all_splits(tmp_path):
    sex = {
        "train_sex": np.array(["M", "F"] * 19 + ["", " "]),
        "val_sex": np.array(["F"] * 20),
        "test_sex": np.array(["X", "M"] * 10),
    }
    data = read(tmp_path, **sex)
    assert data.attribute_values["sex"] == ["F", "M", "X"]
    assert data.splits["val"].attributes["sex"].tolist() == [0] * 20
    assert data.splits["test"].attributes["sex"].tolist() == [2, 1] * 10
    both = np.concatenate([data.splits["train"].attributes["sex"], data.splits["tune"].attributes["sex"]])
    assert np.bincount(both + 1).tolist() == [2, 19, 19]


def test_numeric_attributes_keep_their_values_as_names_and_negatives_are_missing(tmp_path):
    site = {f"{s}_site": np.resize([10, 2, -1, np.nan, np.inf], n) for s, n in COUNTS.items()}
    data = read(tmp_path, **site)
    assert data.attribute_values["site"] == ["2", "10"]
    assert data.splits["test"].attributes["site"][:5].tolist() == [1, 0, -1, -1, -1]


@pytest.mark.parametrize("kind", [float, "U5"])
def test_ages_in_years_are_grouped_by_decade(tmp_path, kind):
    age = {f"{s}_age": np.resize([0.0, 39.9, 40, 107, 411, -1, np.nan], n).astype(kind) for s, n in COUNTS.items()}
    data = read(tmp_path, **age)
    assert data.attribute_values["age"] == AGE_BINS
    assert data.splits["test"].attributes["age"][:7].tolist() == [0, 3, 4, 9, -1, -1, -1]


def test_bytes_are_read_as_text_even_where_they_are_no_utf8(tmp_path):
    sex = {f"{s}_sex": np.resize([b"F", b"M\xff"], n) for s, n in COUNTS.items()}
    assert read(tmp_path, **sex).attribute_values["sex"] == ["F", "M\ufffd"]


def test_ages_binned_by_the_user_are_kept(tmp_path):
    age = {f"{s}_age": np.resize(["young", "old"], n) for s, n in COUNTS.items()}
    assert read(tmp_path, **age).attribute_values["age"] == ["old", "young"]


def test_an_attribute_absent_from_a_split_is_unknown_there_and_noted(tmp_path):
    data = read(tmp_path, test_sex=np.resize(["F", "M"], 20))
    assert set(data.splits["val"].attributes["sex"].tolist()) == {-1}
    assert any("sex is unknown in train, val" in note for note in data.notes)


def test_identifiers_and_masks_are_left_out_with_a_note(tmp_path):
    big = {f"{s}_images": np.zeros((60, 4, 4), np.uint8) for s in COUNTS}
    big |= {f"{s}_labels": np.arange(60) % 2 for s in COUNTS}
    big |= {f"{s}_study": np.arange(60) + 60 * i for i, s in enumerate(COUNTS)}
    data = read(tmp_path, train_masks=np.zeros((60, 4, 4)), **big)
    assert "study" not in data.attribute_values and "study" not in data.splits["test"].attributes
    assert len([note for note in data.notes if "left out" in note]) == 2


def test_patient_ids_are_coded_and_tune_is_carved_by_patient(tmp_path):
    ids = {f"{s}_patient": np.array([f"{s}-{i // 4}" for i in range(n)]) for s, n in COUNTS.items()}
    data = read(tmp_path, **ids)
    assert not set(data.splits["train"].patient) & set(data.splits["tune"].patient)
    assert len(set(data.splits["test"].patient)) == 5


def test_long_numeric_patient_ids_are_not_rounded_together(tmp_path):
    ids = {f"{s}_patient": 10**17 + np.arange(n) + 100 * i for i, (s, n) in enumerate(COUNTS.items())}
    assert len(set(read(tmp_path, **ids).splits["test"].patient)) == 20


def test_images_without_a_patient_id_are_patients_of_their_own(tmp_path):
    ids = {f"{s}_patient": np.array([f"{s}{i}" if i > 4 else "" for i in range(n)]) for s, n in COUNTS.items()}
    data = read(tmp_path, **ids)
    assert len(set(data.splits["test"].patient)) == 20
    assert any("15 images without a patient id" in note for note in data.notes)


def test_a_patient_in_two_splits_is_named_by_its_rows(tmp_path):
    ids = {f"{s}_patient": np.arange(n) + 100 * i for i, (s, n) in enumerate(COUNTS.items())}
    ids["test_patient"][7] = 12
    assert "train_patient row 12 and test_patient row 7 are the same patient" in message(tmp_path, **ids)


def test_patients_known_for_some_splits_only_are_refused(tmp_path):
    assert "patients are known for train but not for val, test" in message(tmp_path, train_patient=np.arange(40))


def test_a_missing_file_and_a_missing_data_root_say_what_to_name(tmp_path):
    assert "does not exist" in message(tmp_path, file=tmp_path / "absent.npz")
    with pytest.raises(UserError, match="data_root=FILE"):
        prepare(Npz())
    assert "is a folder" in message(tmp_path, file=tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    file = stored(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert str(file) in message(tmp_path, file=file)


def test_a_damaged_array_is_refused(tmp_path):
    file = stored(tmp_path)
    content = bytearray(file.read_bytes())
    content[3000] ^= 255
    file.write_bytes(content)
    assert str(file) in message(tmp_path, file=file)


def test_pickled_objects_are_refused_and_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    trapped = np.array([Trap()] * 40, dtype=object)
    assert "train_labels holds Python objects" in message(tmp_path, train_labels=trapped)
    file = tmp_path / "array.npz"
    with open(file, "wb") as stream:
        np.save(stream, trapped)
    assert str(file) in message(tmp_path, file=file)
    assert not (tmp_path / "executed").exists()


def test_a_single_array_is_no_npz(tmp_path):
    file = tmp_path / "single.npz"
    with open(file, "wb") as stream:
        np.save(stream, np.zeros(3))
    assert "holds a single array" in message(tmp_path, file=file)


def nan_images():
    images = np.zeros((20, 12, 10), np.float32)
    images[13, 2, 2] = np.nan
    return images


SINGLE = np.zeros(20, np.uint8)
WRONG = [
    ({"val_images": None}, "has no array val_images"),
    ({"test_labels": None}, "has no array test_labels"),
    ({"val_images": np.zeros((20, 120), np.uint8)}, "val_images has shape (20, 120)"),
    ({"val_images": np.zeros((20, 1, 12, 10), np.uint8)}, "val_images has shape (20, 1, 12, 10)"),
    ({"val_images": np.zeros((20, 9, 9), np.uint8)}, "val_images are (1, 9, 9), those of train (1, 12, 10)"),
    ({"val_images": nan_images()}, "val_images row 13 holds NaN"),
    ({"val_images": np.zeros((20, 12, 10), np.float32)}, "val_images is float32"),
    ({"val_images": np.zeros((20, 12, 10), np.int64)}, "val_images is int64"),
    ({"val_images": np.zeros((0, 12, 10), np.uint8), "val_labels": np.zeros(0, int)}, "val_images is empty"),
    ({"val_labels": np.zeros((20, 2, 2))}, "val_labels has shape (20, 2, 2)"),
    ({"val_labels": np.zeros((20, 2))}, "val_labels has 2 columns, train_labels 1"),
    ({"val_labels": np.arange(19) % 2}, "val_labels has 19 rows but val_images has 20"),
    ({"val_labels": np.array(["a", "b"] * 10)}, "val_labels is <U1"),
    ({"val_labels": np.array([0, 1] * 9 + [0.5, 1])}, "val_labels row 18 is 0.5"),
    ({"val_labels": np.array([0, np.nan] * 10)}, "val_labels row 1 is nan"),
    ({"val_labels": np.array([0, 1] * 9 + [0, 2])}, "val_labels row 19 is 2"),
    ({"val_labels": np.array([0, 1] * 9 + [-1, 1])}, "val_labels row 18 is -1"),
    ({"val_labels": SINGLE}, "val_labels holds a single class"),
    ({"train_labels": np.ones(40, int)}, "train_labels holds a single class"),
    ({"train_labels": np.array([0, 1] * 19 + [0, 255])}, "train_labels row 39 is 255"),
    ({"val_sex": np.array(["F"] * 19)}, "val_sex has 19 rows"),
    ({"val_sex": np.zeros(20, complex)}, "val_sex is complex128"),
]


@pytest.mark.parametrize(("changed", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_said_in_one_line_with_file_and_array(tmp_path, changed, said):
    text = message(tmp_path, **changed)
    assert said in text and str(tmp_path / "own.npz") in text


def test_wrong_settings_are_named(tmp_path):
    assert "dataset.task=binaryy" in message(tmp_path, {"task": "binaryy"})
    assert "which is no multilabel task" in message(tmp_path, {"task": "multilabel"})
    assert "dataset.class_names names 3 classes instead of 2" in message(
        tmp_path, {"task": "binary", "class_names": "a,b,c"}
    )
