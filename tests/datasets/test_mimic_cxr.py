"""MIMIC-CXR-JPG: its tables joined by image, study and patient, and what can be wrong with them."""

from __future__ import annotations

import csv
import gzip

import numpy as np
import pytest
from multiplicity_bench.datasets.api import prepare
from multiplicity_bench.datasets.mimic_cxr import MIMICCXR
from multiplicity_bench.errors import UserError
from PIL import Image

FINDINGS = [
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
]
PARTS = {"train": 24, "validate": 8, "test": 8}


def subject(i):
    return 10000032 + i


def part(i):
    return "train" if i < 24 else "validate" if i < 32 else "test"


def cells(i):
    """No Finding for even patients, else Edema, absent consolidation and uncertain pneumonia."""
    named = {"No Finding": "1.0"} if i % 2 == 0 else {"Edema": "1.0", "Consolidation": "0.0", "Pneumonia": "-1.0"}
    return [named.get(name, "") for name in FINDINGS]


def tables():
    """40 patients with a study each, of a frontal and a lateral image; ages are 10 years above those at the anchor."""
    patients, labels, metadata, split = [], [], [], []
    for i in range(40):
        study = 50000000 + i
        patients.append([subject(i), "FM"[i // 2 % 2], 30 + i, 2150, "2014 - 2016"])
        labels.append([subject(i), study, *cells(i)])
        for number, view in enumerate(("PA" if i % 3 else "AP", "LATERAL")):
            image = f"{i:08x}-{number}a"
            metadata.append([image, subject(i), study, "CHEST", view, 9, 9, "21600807", "213014.5"])
            split.append([image, study, subject(i), part(i)])
    return {"patients": patients, "chexpert": labels, "metadata": metadata, "split": split}


HEADERS = {
    "patients": ["subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group"],
    "chexpert": ["subject_id", "study_id", *FINDINGS],
    "metadata": [
        "dicom_id",
        "subject_id",
        "study_id",
        "PerformedProcedureStepDescription",
        "ViewPosition",
        "Rows",
        "Columns",
        "StudyDate",
        "StudyTime",
    ],
    "split": ["dicom_id", "study_id", "subject_id", "split"],
}


def official(folder, compressed=False, **changed):
    for name, table in (tables() | changed).items():
        file = folder / (f"mimic-cxr-2.0.0-{name}.csv" if name != "patients" else "patients.csv")
        for old in (file, file.with_name(f"{file.name}.gz")):
            old.unlink(missing_ok=True)
        if table is None:
            continue
        opened = gzip.open if compressed else open
        with opened(f"{file}.gz" if compressed else file, "wt", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([HEADERS[name], *table])
    return folder


def read(folder, settings=None, **changed):
    return MIMICCXR(**(settings or {})).load(official(folder, **changed))


def message(folder, settings=None, **changed):
    with pytest.raises(UserError) as raised:
        read(folder, settings, **changed)
    text = str(raised.value)
    assert "\n" not in text and ": " in text, "one line that says what to do"
    return text


def edited(name, row, column, text):
    table = tables()[name]
    table[row][HEADERS[name].index(column)] = text
    return {name: table}


def test_the_splits_are_the_official_ones(tmp_path):
    data = read(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 24, "val": 8, "test": 8}
    assert data.splits["test"].ids.tolist() == list(range(64, 80, 2)), "rows of the metadata, frontal ones"
    assert "Johnson" in data.source and "PhysioNet" in data.licence


def test_every_image_has_the_path_label_patient_and_attributes_of_its_study(tmp_path):
    data = read(tmp_path, {"view": "all"})
    patients = {}
    for split in data.splits.values():
        for k, row in enumerate(split.ids):
            i, number = divmod(int(row), 2)
            folder = f"files/p10/p{subject(i)}/s{50000000 + i}"
            assert split.images.files[k] == f"{folder}/{i:08x}-{number}a.jpg"
            assert split.labels[k] == i % 2
            assert patients.setdefault(split.patient[k], i) == i
            said = {name: data.attribute_values[name][codes[k]] for name, codes in split.attributes.items()}
            age = 40 + i
            group = "40-59" if age < 60 else "60-79"
            view = "lateral" if number else "PA" if i % 3 else "AP"
            assert said == {"sex": "FM"[i // 2 % 2], "age": group, "view": view}
    assert len(patients) == 40


def test_compressed_tables_give_the_same(tmp_path):
    plain = read(tmp_path)
    packed = read(tmp_path, compressed=True)
    assert packed.location.endswith(".csv.gz")
    for name, split in plain.splits.items():
        np.testing.assert_array_equal(packed.splits[name].ids, split.ids)
        np.testing.assert_array_equal(packed.splits[name].attributes["age"], split.attributes["age"])


def test_without_patients_the_view_alone_is_known_and_that_is_noted(tmp_path):
    data = read(tmp_path, patients=None)
    assert list(data.attribute_values) == ["view"]
    assert any("patients.csv of MIMIC-IV is not there" in note for note in data.notes)


@pytest.mark.parametrize("place", ["hosp", "mimic_cxr/hosp", "mimic_cxr"])
def test_patients_are_found_beside_the_tables_and_in_hosp(tmp_path, place):
    (tmp_path / "mimic_cxr" / "hosp").mkdir(parents=True)
    (tmp_path / "hosp").mkdir()
    official(tmp_path / "mimic_cxr")
    (tmp_path / "mimic_cxr" / "patients.csv").rename(tmp_path / place / "patients.csv")
    assert list(MIMICCXR().load(tmp_path).attribute_values) == ["sex", "age", "view"]


def test_a_patient_that_mimic_iv_does_not_know_has_no_sex_and_age(tmp_path):
    data = read(tmp_path, patients=tables()["patients"][:-1])
    assert [int(data.splits["test"].attributes[name][-1]) for name in ("sex", "age")] == [-1, -1]
    assert any(line.startswith("sex is unknown for 1 of 40 images") for line in data.exclusions)


def test_age_is_that_at_the_study(tmp_path):
    data = read(tmp_path, **edited("metadata", 78, "StudyDate", "21950101"))
    assert data.attribute_values["age"][data.splits["test"].attributes["age"][-1]] == "80+", "69 + 45"
    assert "StudyDate is 'May'" in message(tmp_path, **edited("metadata", 78, "StudyDate", "May"))
    assert "anchor_age is 'old'" in message(tmp_path, **edited("patients", 0, "anchor_age", "old"))


def test_views_are_chosen_and_projections_of_no_group_are_unknown(tmp_path):
    assert {f[-6] for f in read(tmp_path, {"view": "lateral"}).splits["test"].images.files} == {"1"}
    data = read(tmp_path, {"view": "all"}, **edited("metadata", 78, "ViewPosition", "LAO"))
    assert data.splits["test"].attributes["view"][-2] == -1
    assert 78 not in read(tmp_path, **edited("metadata", 78, "ViewPosition", "LAO")).splits["test"].ids


def test_studies_without_labels_are_left_out_and_counted(tmp_path):
    data = read(tmp_path, chexpert=tables()["chexpert"][1:])
    assert 0 not in data.splits["train"].ids
    assert data.exclusions == [
        "view=frontal: 40 images of another view are left out",
        "1 images without a label for any finding are left out",
    ], "every image that is left out is counted once"
    blank = edited("chexpert", 0, "No Finding", "")
    assert 0 not in read(tmp_path, {"target": "Edema"}, **blank).splits["train"].ids, "nothing is known of this study"


def test_uncertain_labels_follow_the_setting(tmp_path):
    for uncertain, counts in (("ignore", 0), ("zero", 4), ("one", 4)):
        settings = {"target": "Pneumonia,Edema", "uncertain": uncertain}
        labels = read(tmp_path, settings).splits["test"].labels
        assert labels[1, 0] == {"ignore": -1, "zero": 0, "one": 1}[uncertain]
        assert (labels[1::2, 0] >= 0).sum() == counts


def test_images_that_one_table_lacks_are_counted(tmp_path):
    data = read(tmp_path, metadata=tables()["metadata"][1:], split=tables()["split"][:-3])
    assert "1 images of mimic-cxr-2.0.0-split.csv are not in mimic-cxr-2.0.0-metadata.csv: left out" in data.exclusions
    assert "3 images of mimic-cxr-2.0.0-metadata.csv are not in mimic-cxr-2.0.0-split.csv: left out" in data.exclusions


def test_val_is_carved_out_of_train_where_no_image_is_of_validate(tmp_path):
    split = [row for row in tables()["split"] if row[-1] != "validate"]
    data = read(tmp_path, split=split)
    assert 2 <= len(data.splits["val"]) <= 8 and len(data.splits["train"]) + len(data.splits["val"]) == 24
    assert not set(data.splits["val"].patient) & set(data.splits["train"].patient)


def test_the_images_are_decoded_by_prepare(tmp_path):
    official(tmp_path)
    for i in range(40):
        file = tmp_path / f"files/p10/p{subject(i)}/s{50000000 + i}/{i:08x}-0a.jpg"
        file.parent.mkdir(parents=True)
        Image.fromarray(np.full((12, 9), 6 * i, np.uint8)).save(file)
    test = prepare(MIMICCXR(size=8), tmp_path).splits["test"]
    np.testing.assert_array_equal(test.images[:].max((1, 2, 3)), 3 * test.ids)


WRONG = [
    ("split", 0, "split", "train2", "split.csv row 2: split is 'train2': give train, validate, test"),
    ("metadata", 2, "subject_id", "../x", "metadata.csv row 4: subject_id is '../x', which is no id"),
    ("metadata", 2, "study_id", "", "metadata.csv row 4: study_id is '', which is no id"),
    ("chexpert", 1, "Edema", "3", "chexpert.csv row 3: Edema is '3'"),
    ("split", 1, "split", "test", f"patient {subject(0)} is in two splits, train (files/p10/"),
]


@pytest.mark.parametrize(("name", "row", "column", "text", "said"), WRONG, ids=[w[-1][:40] for w in WRONG])
def test_what_is_wrong_in_a_row_is_said_in_one_line(tmp_path, name, row, column, text, said):
    assert said in message(tmp_path, **edited(name, row, column, text))


def test_contradicting_rows_of_a_study_or_an_image_are_refused(tmp_path):
    labels = [*tables()["chexpert"], [subject(1), 50000001, *cells(0)]]
    assert "for the same subject_id/study_id 10000033/50000001" in message(tmp_path, chexpert=labels)
    split = [*tables()["split"], [*tables()["split"][0][:-1], "test"]]
    assert "row 82: split is 'test', but 'train' in row 2" in message(tmp_path, split=split)


def test_missing_tables_and_columns_are_named(tmp_path):
    assert "mimic-cxr-2.0.0-split.csv.gz does not exist" in message(tmp_path, split=None)
    with pytest.raises(UserError, match="MIMIC-CXR-JPG is neither in"):
        MIMICCXR().load(tmp_path / "files")
    official(tmp_path)
    file = tmp_path / "mimic-cxr-2.0.0-metadata.csv"
    file.write_text(file.read_text().replace("ViewPosition", "View"))
    with pytest.raises(UserError, match=r"metadata\.csv has no column ViewPosition: it has dicom_id"):
        MIMICCXR().load(tmp_path)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    official(tmp_path, compressed=True)
    file = tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"metadata\.csv\.gz cannot be read \(damaged or incomplete\)"):
        MIMICCXR().load(tmp_path)
    file.write_bytes(b"dicom_id,subject_id")
    with pytest.raises(UserError, match=r"metadata\.csv\.gz cannot be read \(damaged or incomplete\)"):
        MIMICCXR().load(tmp_path)
