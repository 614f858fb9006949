"""CheXpert: both tables in the official layout, uncertain and blank labels, views, and what can be wrong."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from multiplicity_bench.datasets.api import prepare
from multiplicity_bench.datasets.chexpert import CheXpert
from multiplicity_bench.errors import UserError
from PIL import Image

FINDINGS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS]
RELEASE = "CheXpert-v1.0-small"


def cells(**labels):
    """The 14 cells of a row: those named (with _ for a space), the others empty."""
    return [labels.get(name.replace(" ", "_"), "") for name in FINDINGS]


KINDS = {
    "none": cells(No_Finding="1.0", Support_Devices="1.0"),
    "present": cells(Edema="1.0", Pneumonia="-1.0", Fracture="0.0"),
    "uncertain": cells(Edema="-1.0", Fracture="0.0"),
}


def rows(part, patients):
    """A frontal and a lateral image of each patient, whose labels take turns in being none, present and uncertain."""
    made = []
    for patient in patients:
        labels = list(KINDS.values())[patient % 3]
        for number, (view, projection) in enumerate((("frontal", "AP"), ("lateral", ""))):
            path = f"{RELEASE}/{part}/patient{patient:05d}/study1/view{number + 1}_{view}.jpg"
            made.append([path, ("Female", "Male")[patient % 2], 30 + patient, view.capitalize(), projection, *labels])
    return made


def tables():
    return {"train": rows("train", range(1, 25)), "valid": rows("valid", range(60, 72))}


def official(folder, header=HEADER, **changed):
    """The release below `folder`, as it is unpacked."""
    (folder / RELEASE).mkdir(parents=True, exist_ok=True)
    for name, table in (tables() | changed).items():
        with open(folder / RELEASE / f"{name}.csv", "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *table])
    return folder


def read(folder, settings=None, **changed):
    return CheXpert(**(settings or {})).load(official(folder, **changed))


def message(folder, settings=None, **changed):
    with pytest.raises(UserError) as raised:
        read(folder, settings, **changed)
    text = str(raised.value)
    assert "\n" not in text and ": " in text, "one line that says what to do"
    return text


def replaced(table, row, column, text):
    table[row][HEADER.index(column)] = text
    return table


def by_row(data, parts):
    """Row of the table -> label, over some parts."""
    return {
        int(row): int(label) for part in parts for row, label in zip(data.splits[part].ids, data.splits[part].labels)
    }


def test_valid_is_test_and_val_is_carved_out_of_train_by_patient(tmp_path):
    data = read(tmp_path)
    train, val, test = (data.splits[part] for part in ("train", "val", "test"))
    assert all(file.startswith("valid/") for file in test.images.files)
    assert all(file.startswith("train/") for file in train.images.files + val.images.files)
    assert not set(train.patient) & set(val.patient) and len(val) > 0
    assert (data.classes, data.positive) == (["No Finding", "any finding"], 1)
    assert "Irvin" in data.source and "Research Use" in data.licence


def test_valid_can_be_val_and_then_test_is_carved_out_of_train(tmp_path):
    data = read(tmp_path, {"valid": "val"})
    assert all(file.startswith("valid/") for file in data.splits["val"].images.files)
    assert all(file.startswith("train/") for file in data.splits["test"].images.files)
    assert "dataset.valid=tset" in message(tmp_path, {"valid": "tset"})


@pytest.mark.parametrize(("uncertain", "label"), [("ignore", None), ("zero", 0), ("one", 1)])
def test_a_row_of_uncertain_labels_is_what_the_setting_says(tmp_path, uncertain, label):
    data = read(tmp_path, {"uncertain": uncertain})
    labels = by_row(data, ["train", "val"])
    for row, patient in enumerate(range(1, 25)):
        assert labels.get(2 * row) == (0, 1, label)[patient % 3]
    assert any("images without a label for any finding" in line for line in data.exclusions) == (label is None)


@pytest.mark.parametrize("blank", ["zero", "missing"])
def test_a_finding_that_is_not_mentioned_is_absent_or_missing_as_declared(tmp_path, blank):
    labels = by_row(read(tmp_path, {"blank": blank, "target": "edema"}), ["test"])
    for row, patient in enumerate(range(60, 72)):
        expected = (0 if blank == "zero" else None, 1, None)[patient % 3]
        assert labels.get(2 * row) == expected


def test_blank_missing_still_knows_a_study_without_findings(tmp_path):
    labels = by_row(read(tmp_path, {"blank": "missing"}), ["test"])
    assert [labels.get(2 * row) for row in range(3)] == [0, 1, None]


def test_several_findings_are_multilabel_and_minus_one_is_missing(tmp_path):
    data = read(tmp_path, {"target": "Fracture,Edema", "blank": "missing"})
    test = dict(zip(data.splits["test"].ids.tolist(), data.splits["test"].labels.tolist()))
    assert 0 not in test, "neither is known of patient 60"
    assert test[2] == [0, 1] and test[4] == [0, -1]
    assert read(tmp_path, {"target": "all"}).classes[0] == "Enlarged Cardiomediastinum"
    assert len(read(tmp_path, {"target": "all"}).classes) == 13


def test_a_row_without_any_label_is_left_out_and_counted(tmp_path):
    table = rows("valid", range(60, 72))
    table[0][5:] = [""] * 14
    data = read(tmp_path, {"target": "edema", "uncertain": "zero"}, valid=table)
    assert 0 not in data.splits["test"].ids
    assert "1 images without a label for Edema are left out" in data.exclusions


def test_no_finding_beside_a_finding_counts_as_no_label_and_is_counted(tmp_path):
    table = replaced(rows("valid", range(60, 72)), 2, "No Finding", "1.0")
    data = read(tmp_path, {"uncertain": "zero"}, valid=table)
    assert 2 not in data.splits["test"].ids
    assert "1 images without a label for any finding are left out" in data.exclusions


def test_frontal_is_the_default_and_other_views_can_be_chosen(tmp_path):
    assert {file[-11:] for file in read(tmp_path).splits["test"].images.files} == {"frontal.jpg"}
    assert {file[-11:] for file in read(tmp_path, {"view": "lateral"}).splits["test"].images.files} == {"lateral.jpg"}
    both = read(tmp_path, {"view": "all"})
    assert both.attribute_values["view"] == ["PA", "AP", "lateral"]
    assert set(both.splits["test"].attributes["view"]) == {1, 2}


def test_a_decubitus_film_is_frontal_of_an_unknown_view(tmp_path):
    data = read(tmp_path, valid=replaced(rows("valid", range(60, 72)), 2, "AP/PA", "LL"))
    assert data.splits["test"].attributes["view"][data.splits["test"].ids == 2].tolist() == [-1]
    assert any("view is unknown for 1 of" in line and "'LL'" in line for line in data.exclusions)


def test_sex_and_age_belong_to_their_row_and_unknown_ones_are_counted(tmp_path):
    table = replaced(rows("valid", range(60, 72)), 0, "Sex", "Unknown")
    data = read(tmp_path, valid=table)
    test = data.splits["test"]
    sexes = ["F", "M"]
    for row, sex, age in zip(test.ids, test.attributes["sex"], test.attributes["age"]):
        patient = 60 + row // 2
        assert sex == (-1 if row == 0 else sexes.index("FM"[patient % 2]))
        assert data.attribute_values["age"][age] == "80+"
    assert any(line.startswith("sex is unknown for 1 of") and "'Unknown'" in line for line in data.exclusions)


def test_patients_are_the_folders_of_the_paths(tmp_path):
    data = read(tmp_path, {"view": "all"})
    for split in data.splits.values():
        names = [file.split("/")[1] for file in split.images.files]
        assert len(set(zip(names, split.patient))) == len(set(names)) == len(set(split.patient))


def test_a_patient_in_both_tables_is_refused(tmp_path):
    table = tables()["valid"] + rows("valid", [3])
    said = message(tmp_path, {"uncertain": "one"}, valid=table)
    assert "patient patient00003 is in two splits" in said
    assert "train (train/patient00003/study1/view1_frontal.jpg)" in said


@pytest.mark.parametrize("root", [".", RELEASE], ids=["the folder above", "the release"])
def test_the_release_is_found_below_data_root_and_as_data_root(tmp_path, root):
    data = CheXpert().load(official(tmp_path) / root)
    assert str(data.splits["test"].images.root).endswith(RELEASE)
    assert data.splits["test"].images.files[0] == "valid/patient00060/study1/view1_frontal.jpg"


def test_paths_are_kept_where_the_release_lies_beside_the_table(tmp_path):
    official(tmp_path)
    for name in ("train", "valid"):
        (tmp_path / RELEASE / f"{name}.csv").rename(tmp_path / f"{name}.csv")
    data = CheXpert().load(tmp_path)
    assert data.splits["test"].images.files[0] == f"{RELEASE}/valid/patient00060/study1/view1_frontal.jpg"


def test_the_images_are_decoded_by_prepare(tmp_path):
    for i, row in enumerate(tables()["train"] + tables()["valid"]):
        file = official(tmp_path) / row[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 12), 3 * i, np.uint8)).save(file)
    data = prepare(CheXpert(size=8, uncertain="one"), tmp_path)
    test = data.splits["test"]
    np.testing.assert_array_equal(test.images[:].max((1, 2, 3)), 3 * (48 + test.ids))


WRONG = [
    ("valid", 2, "Edema", "2.0", "valid.csv row 4: Edema is '2.0': give 1, 0, -1"),
    ("train", 0, "Frontal/Lateral", "Oblique", "train.csv row 2: Frontal/Lateral is 'Oblique'"),
    ("train", 0, "Path", "../patient00001/a.jpg", "train.csv row 2: Path is '../patient00001/a.jpg', which leaves"),
    ("train", 0, "Path", "train/person1/a.jpg", "names no patient"),
    ("train", 0, "Age", "x", "train.csv row 2: Age is 'x'"),
    ("train", 1, "Path", tables()["train"][0][0], "row 3: Frontal/Lateral is 'Lateral', but 'Frontal' in row 2"),
]


@pytest.mark.parametrize(("name", "row", "column", "text", "said"), WRONG, ids=[w[-1][:45] for w in WRONG])
def test_what_is_wrong_in_a_row_is_said_in_one_line(tmp_path, name, row, column, text, said):
    assert said in message(tmp_path, **{name: replaced(tables()[name], row, column, text)})


def test_a_missing_table_column_and_setting_are_named(tmp_path):
    header = ["Effusion" if name == "Pleural Effusion" else name for name in HEADER]
    assert "train.csv has no column Pleural Effusion: it has Path, Sex" in message(tmp_path, header=header)
    assert "dataset.uncertain=ones is not a choice: did you mean 'one'" in message(tmp_path, {"uncertain": "ones"})
    assert "dataset.blank=no is not a choice" in message(tmp_path, {"blank": "no"})
    (official(tmp_path) / RELEASE / "valid.csv").unlink()
    with pytest.raises(UserError, match=r"valid\.csv does not exist"):
        CheXpert().load(tmp_path)


def test_a_label_that_a_part_knows_of_no_image_is_refused(tmp_path):
    said = message(tmp_path, {"target": "Edema,Pneumothorax", "blank": "missing"})
    assert "Pneumothorax is missing for all images of train: leave it out of dataset.target" in said
    said = message(tmp_path, {"target": "Pneumothorax", "blank": "missing"})
    assert "train.csv: Pneumothorax is missing for all images: choose another dataset.target" in said
