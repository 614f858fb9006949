"""NIH ChestX-ray14: the official layouts, old and new, and one line for everything that can be wrong with them."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest
from multiplicity_bench.datasets.api import prepare
from multiplicity_bench.datasets.nih_chest_xray14 import FINDINGS, NIHChestXray14
from multiplicity_bench.errors import UserError
from PIL import Image

HEADER = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",
    "Height]",
    "OriginalImagePixelSpacing[x",
    "y]",
]
LABELS = ["No Finding", "Effusion", "Mass|Pleural_Thickening"]


def rows():
    """30 patients with 2 images each; patients 20 to 29 are the official test part."""
    made = []
    for patient in range(1, 31):
        for follow_up in range(2):
            name = f"{patient:08d}_{follow_up:03d}.png"
            label = LABELS[(patient + follow_up) % 3]
            view = "AP" if follow_up else "PA"
            made.append([name, label, follow_up, patient, 20 + patient, "FM"[patient % 2], view, 9, 9, 0.1, 0.1])
    return made


def official(folder, table=None, header=HEADER, name="Data_Entry_2017_v2020.csv", train=None, test=None, ending=""):
    table = rows() if table is None else table
    names = [row[0] for row in rows()]
    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    with open(folder / name, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator=ending + "\n").writerows([header, *table])
    (folder / "train_val_list.txt").write_text("\n".join(names[:40] if train is None else train))
    (folder / "test_list.txt").write_text("\n".join(names[40:] if test is None else test) + "\n")
    return folder


def changed(row, **cells):
    """The rows with some cells of one row changed: finding, patient, age, gender, view."""
    table = rows()
    for name, place in (("name", 0), ("finding", 1), ("patient", 3), ("age", 4), ("gender", 5), ("view", 6)):
        if name in cells:
            table[row][place] = cells[name]
    return table


def read(folder, table=None, **settings):
    return NIHChestXray14(**settings).load(official(folder, table))


def message(folder, table=None, settings=None, **layout):
    with pytest.raises(UserError) as raised:
        NIHChestXray14(**(settings or {})).load(official(folder, table, **layout))
    text = str(raised.value)
    assert "\n" not in text and ": " in text, "one line that says what to do"
    return text


def test_the_official_test_list_is_test_and_val_is_carved_out_of_train_val_by_patient(tmp_path):
    data = read(tmp_path)
    assert data.splits["test"].ids.tolist() == list(range(40, 60))
    train, val = data.splits["train"], data.splits["val"]
    assert sorted([*train.ids, *val.ids]) == list(range(40))
    assert np.all(np.diff(train.ids) > 0) and np.all(np.diff(val.ids) > 0), "in the order of the table"
    assert not set(train.patient) & set(val.patient)
    assert 4 <= len(val) <= 14, "a fifth of 40, drawn by patient and class"
    other = read(tmp_path, split_seed=1).splits["val"]
    assert not np.array_equal(other.ids, val.ids)
    np.testing.assert_array_equal(read(tmp_path).splits["val"].ids, val.ids)


def test_every_image_keeps_its_own_label_file_patient_and_attributes(tmp_path):
    data = read(tmp_path)
    assert (data.task, data.classes, data.positive) == ("binary", ["No Finding", "any finding"], 1)
    for split in data.splits.values():
        for i, row in enumerate(split.ids):
            name, label, _, patient, age, gender, view, *_ = rows()[row]
            assert split.images.files[i] == f"images/{name}"
            assert split.labels[i] == (label != "No Finding")
            assert split.patient[i] == patient - 1
            said = {k: data.attribute_values[k][codes[i]] for k, codes in split.attributes.items()}
            assert said == {"sex": gender, "age": "20-39" if age < 40 else "40-59", "view": view}
    assert data.exclusions == [] and "CVPR 2017" in data.licence + data.source


@pytest.mark.parametrize("ending", ["", "\r", ","], ids=["2020", "windows", "2017: a comma ends every line"])
def test_the_old_and_the_new_table_give_the_same(tmp_path, ending):
    old = [[*row[:4], f"{row[4]:03d}Y", *row[5:]] for row in rows()]
    new = NIHChestXray14().load(official(tmp_path / "new"))
    found = NIHChestXray14().load(official(tmp_path / "old", old, name="Data_Entry_2017.csv", ending=ending))
    for part, split in new.splits.items():
        np.testing.assert_array_equal(found.splits[part].ids, split.ids)
        np.testing.assert_array_equal(found.splits[part].attributes["age"], split.attributes["age"])


def test_the_table_of_2020_is_read_where_both_are_there_and_sex_may_be_its_header(tmp_path):
    official(tmp_path, name="Data_Entry_2017.csv", header=["wrong"] * len(HEADER))
    header = ["Patient Sex" if name == "Patient Gender" else name for name in HEADER]
    data = NIHChestXray14().load(official(tmp_path, header=header))
    assert data.location.endswith("_v2020.csv") and set(data.splits["test"].attributes["sex"]) == {0, 1}


@pytest.mark.parametrize("folder", ["nih_chest_xray14", "nih_chest_xray14_sample"])
def test_a_folder_of_its_name_is_found(tmp_path, folder):
    official(tmp_path / folder)
    assert NIHChestXray14().load(tmp_path).location.startswith(str(tmp_path / folder))


def test_images_are_found_in_the_official_twelve_folders(tmp_path):
    official(tmp_path)
    (tmp_path / "images").rmdir()
    for number in range(12):
        (tmp_path / f"images_{number + 1:03d}" / "images").mkdir(parents=True)
    for i, row in enumerate(rows()[:-1]):
        (tmp_path / f"images_{i % 12 + 1:03d}" / "images" / row[0]).touch()
    split = NIHChestXray14().load(tmp_path).splits["test"]
    assert split.images.files[:-1] == [f"images_{i % 12 + 1:03d}/images/{rows()[i][0]}" for i in split.ids[:-1]]
    assert split.images.files[-1] == f"images/{rows()[-1][0]}", "missing: left to the decoder, which names it"
    (tmp_path / "images_007" / "images" / rows()[0][0]).touch()
    with pytest.raises(UserError, match=r"00000001_000.png is in .*images_001/images and in .*images_007/images"):
        NIHChestXray14().load(tmp_path)


def test_the_images_are_decoded_by_prepare(tmp_path):
    official(tmp_path)
    for i, row in enumerate(rows()):
        Image.fromarray(np.full((16, 16), 4 * i, np.uint8)).save(tmp_path / "images" / row[0])
    data = prepare(NIHChestXray14(size=8), tmp_path)
    assert sum(map(len, data.splits.values())) == 60
    for split in data.splits.values():
        assert split.images.shape == (len(split), 1, 8, 8)
        np.testing.assert_array_equal(split.images[:].max((1, 2, 3)), 4 * split.ids)
    (tmp_path / "images" / rows()[5][0]).unlink()
    with pytest.raises(UserError, match=r"00000003_001\.png"):
        prepare(NIHChestXray14(size=8), tmp_path)
    data = prepare(NIHChestXray14(size=8, unreadable="exclude"), tmp_path)
    assert sum(map(len, data.splits.values())) == 59 and data.exclusions


def test_one_finding_is_binary_and_named_without_case_underscore_and_space(tmp_path):
    data = read(tmp_path, target="pleural thickening")
    assert (data.task, data.classes) == ("binary", ["no Pleural_Thickening", "Pleural_Thickening"])
    assert data.splits["test"].labels.tolist() == [int("Thick" in row[1]) for row in rows()[40:]]


def test_several_findings_are_multilabel_in_the_order_they_are_named(tmp_path):
    data = read(tmp_path, target="Mass, effusion")
    assert (data.task, data.classes, data.positive) == ("multilabel", ["Mass", "Effusion"], None)
    assert data.splits["test"].labels.tolist() == [[int("Mass" in r[1]), int("Eff" in r[1])] for r in rows()[40:]]
    assert read(tmp_path, target="all").classes == FINDINGS


def test_a_view_is_selected_and_the_others_are_counted(tmp_path):
    data = read(tmp_path, changed(3, view="XX"), view="pa")
    assert all(not set(split.ids % 2) - {0} for split in data.splits.values())
    assert data.exclusions == ["view=pa: 30 images of another view are left out, 1 of them of an unknown one"]
    assert len(read(tmp_path, view="frontal").splits["test"]) == 20
    assert "did you mean 'PA'" in message(tmp_path, settings={"view": "PAA"})


def test_an_unknown_age_gender_and_view_is_coded_minus_one_and_counted(tmp_path):
    table = changed(45, age=411, gender="U", view="")
    table[46][4], table[47][4] = "058Y", "006M"
    data = read(tmp_path, table)
    test = data.splits["test"]
    assert [int(test.attributes[name][5]) for name in ("sex", "age", "view")] == [-1, -1, -1]
    assert [data.attribute_values["age"][code] for code in test.attributes["age"][6:8]] == ["40-59", "<20"]
    assert data.exclusions == [
        "sex is unknown for 1 of 60 images ('U'): in no group of sex",
        "age is unknown for 1 of 60 images ('411'): in no group of age",
        "view is unknown for 1 of 60 images (''): in no group of view",
    ]
    assert (test.attributes["sex"] == -1).sum() == 1


def test_age_groups_begin_at_the_declared_ages(tmp_path):
    data = read(tmp_path, age_edges=[25, 50])
    assert data.attribute_values["age"] == ["<25", "25-49", "50+"]
    assert data.splits["test"].attributes["age"].tolist() == [1 if row[4] < 50 else 2 for row in rows()[40:]]
    for edges in ([], [40, 20], [0, 20], [20, 130]):
        assert "dataset.age_edges=" in message(tmp_path, settings={"age_edges": edges})


def test_repeated_rows_are_counted_and_contradicting_ones_refused(tmp_path):
    data = read(tmp_path, [*rows(), rows()[7], rows()[50]])
    assert data.exclusions == ["Data_Entry_2017_v2020.csv: 2 rows that repeat another row are left out"]
    assert data.splits["test"].ids.tolist() == list(range(40, 60))
    twin = changed(7, finding="Hernia")[7]
    said = message(tmp_path, [*rows(), twin])
    assert "row 62: Finding Labels is 'Hernia', but 'Mass|Pleural_Thickening' in row 9" in said


def test_lists_and_table_that_differ_are_counted(tmp_path):
    names = [row[0] for row in rows()]
    official(tmp_path, train=[*names[2:40], "09999999_000.png"])
    data = NIHChestXray14().load(tmp_path)
    assert data.exclusions == [
        "1 images of train_val_list.txt and test_list.txt are not in Data_Entry_2017_v2020.csv: left out",
        "2 images of Data_Entry_2017_v2020.csv are neither in train_val_list.txt nor in test_list.txt: left out",
    ]
    assert sum(map(len, data.splits.values())) == 58


def test_a_part_of_the_set_is_called_one(tmp_path):
    assert "a part of the set: 60 of 112,120 images, 30 of 30,805 patients" in read(tmp_path).notes


ROWS = [
    (changed(4, finding="No Finding|Mass"), "row 6: Finding Labels is 'No Finding|Mass'"),
    (changed(4, finding="Efusion"), "row 6: Finding Labels is 'Efusion': no finding is called 'Efusion', did you mean"),
    (changed(4, finding=""), "row 6: Finding Labels is ''"),
    (changed(4, age="old"), "row 6: Patient Age is 'old'"),
    (changed(4, patient=""), "row 6: Patient ID is ''"),
    (changed(4, patient=30), "patient 30 is in two splits, train (images/00000003_000.png) and test (images/00000030_"),
    ([], "has no rows below its header"),
    ([*rows(), ["a.png", "Mass"]], "row 62 has 2 cells, the header 11"),
]


@pytest.mark.parametrize(("table", "said"), ROWS, ids=[said[:40] for _, said in ROWS])
def test_what_is_wrong_in_a_row_is_said_in_one_line_with_the_file(tmp_path, table, said):
    text = message(tmp_path, table)
    assert said in text and str(tmp_path / "Data_Entry_2017_v2020.csv") in text


def test_an_image_whose_path_leaves_the_folder_is_refused(tmp_path):
    for path in ("../secret.png", "/etc/passwd", "..\\secret.png", "C:\\secret.png"):
        names = [path, *(row[0] for row in rows()[1:40])]
        assert "leaves the data folder" in message(tmp_path, changed(0, name=path), train=names)


def test_an_image_in_both_lists_is_refused(tmp_path):
    names = [row[0] for row in rows()]
    assert "test_list.txt row 1: 00000020_001.png is in train_val_list.txt too" in message(tmp_path, test=names[39:])


def test_missing_columns_files_and_folders_are_named(tmp_path):
    said = message(tmp_path, header=[name.replace("Patient ID", "Patient") for name in HEADER])
    assert "has no column Patient ID: it has Image Index, Finding Labels, Follow-up #, Patient," in said
    assert "has 2 columns Patient ID" in message(tmp_path, header=[*HEADER[:2], "Patient ID", *HEADER[3:]])
    (official(tmp_path) / "test_list.txt").unlink()
    with pytest.raises(UserError, match=r"test_list.txt does not exist"):
        NIHChestXray14().load(tmp_path)
    (official(tmp_path) / "images").rmdir()
    with pytest.raises(UserError, match="has neither a folder images nor images_001"):
        NIHChestXray14().load(tmp_path)
    with pytest.raises(UserError, match=r"neither in .* nor in nih_chest_xray14 or .*Data_Entry_2017_v2020.csv"):
        NIHChestXray14().load(tmp_path / "images_001")
    with pytest.raises(UserError, match="is a file"):
        NIHChestXray14().load(tmp_path / "test_list.txt")


def test_a_table_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    official(tmp_path)
    file = tmp_path / "Data_Entry_2017_v2020.csv"
    content = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content)
    assert len(NIHChestXray14().load(tmp_path).splits["test"]) == 20
    file.write_bytes(content.replace(b"Effusion", b"\xc9panchement"))
    with pytest.raises(UserError, match=r"v2020.csv is not UTF-8 \(byte 0xc9\)"):
        NIHChestXray14().load(tmp_path)


def test_wrong_settings_are_named(tmp_path):
    for settings, said in (
        ({"target": "Efusion"}, "there is no finding 'Efusion': did you mean 'Effusion'"),
        ({"target": "Mass,mass"}, "names Mass twice"),
        ({"target": ""}, "there is no finding ''"),
        ({"val_fraction": 1.0}, "dataset.val_fraction=1.0"),
        ({"crop": "center"}, "did you mean 'centre'"),
        ({"unreadable": "skip"}, "dataset.unreadable=skip"),
    ):
        assert said in message(tmp_path, settings=settings)


def test_an_official_part_without_images_is_refused_with_what_was_left_out(tmp_path):
    said = message(tmp_path, test=[])
    assert "no image is left for test" in said and "(20 images of Data_Entry_2017_v2020.csv are neither" in said


@pytest.mark.real
def test_the_real_sample_has_its_published_counts(real_data):
    data = prepare(NIHChestXray14(), real_data)
    train, tune, val, test = (data.splits[name] for name in ("train", "tune", "val", "test"))
    assert (len(train) + len(tune) + len(val), len(test)) == (734, 266)
    patients = [set(split.patient) for split in (train, tune, val, test)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 264 and len(patients[3]) == 53
    codes = {name: np.concatenate([s.attributes[name] for s in data.splits.values()]) for name in ("sex", "view")}
    assert Counter(codes["sex"].tolist()) == {0: 509, 1: 491} and data.attribute_values["sex"] == ["F", "M"]
    assert Counter(codes["view"].tolist()) == {0: 637, 1: 363} and data.attribute_values["view"] == ["PA", "AP"]
    assert sum(int((split.labels == 0).sum()) for split in data.splits.values()) == 499
    assert test.images.shape == (266, 1, 64, 64) and data.exclusions == []
    assert "a part of the set: 1,000 of 112,120 images, 264 of 30,805 patients" in data.notes
