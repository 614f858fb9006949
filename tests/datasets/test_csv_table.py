"""A user's own table of radiographs: columns by name, splits, patients, attributes, and what can be wrong."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.datasets.api import prepare
from multiplicity_bench.datasets.csv_table import CSVTable
from multiplicity_bench.errors import UserError
from PIL import Image

HEADER = ["path", "Edema", "Mass", "patient", "split", "sex", "age", "view", "site", "scanner"]
PARTS = ["train"] * 24 + ["val"] * 12 + ["test"] * 12


def rows():
    """48 images, 2 of each patient."""
    return [
        [
            f"films/{i}.png",
            i % 2,
            int(i % 3 == 0),
            f"P{i // 2}",
            PARTS[i],
            "FM"[i % 2],
            20 + i,
            ["PA", "AP"][i % 2],
            "AB"[i // 2 % 2],
            f"s{i % 3}",
        ]
        for i in range(48)
    ]


def stored(folder, table=None, header=HEADER, name="own.csv"):
    file = folder / name
    opened = gzip.open if name.endswith(".gz") else open
    with opened(file, "wt", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *(rows() if table is None else table)])
    return file


def read(folder, settings=None, table=None, **layout):
    return CSVTable(**({"label_columns": "Edema, Mass"} | (settings or {}))).load(stored(folder, table, **layout))


def message(folder, settings=None, table=None, **layout):
    with pytest.raises(UserError) as raised:
        read(folder, settings, table, **layout)
    text = str(raised.value)
    assert "\n" not in text and ": " in text, "one line that says what to do"
    return text


def replaced(column, cells):
    """The rows with the cells of a column replaced: row -> text."""
    table = rows()
    for row, text in cells.items():
        table[row][HEADER.index(column)] = text
    return table


def without(column):
    place = HEADER.index(column)
    return {
        "header": HEADER[:place] + HEADER[place + 1 :],
        "table": [row[:place] + row[place + 1 :] for row in rows()],
    }


def test_every_row_becomes_an_image_of_its_split(tmp_path):
    data = read(tmp_path)
    assert (data.task, data.classes, data.positive, data.exclusions) == ("binary", ["No Finding", "any finding"], 1, [])
    assert [data.splits[name].ids.tolist() for name in ("train", "val", "test")] == [
        list(range(24)),
        list(range(24, 36)),
        list(range(36, 48)),
    ]
    test = data.splits["test"]
    assert test.images.files == [f"films/{i}.png" for i in range(36, 48)]
    assert test.labels.tolist() == [int(i % 2 or i % 3 == 0) for i in range(36, 48)]
    assert test.patient.tolist() == [i // 2 for i in range(36, 48)]
    assert data.attribute_values == {
        "sex": ["F", "M"],
        "age": ["<20", "20-39", "40-59", "60-79", "80+"],
        "view": ["AP", "PA"],
        "site": ["A", "B"],
    }
    assert test.attributes["site"].tolist() == [i // 2 % 2 for i in range(36, 48)]


def test_columns_go_by_the_names_that_are_declared(tmp_path):
    header = ["file", "Edema", "Mass", "subject", "fold", "Gender", "Years", "Projection", "Hospital", "scanner"]
    names = {"path": "file", "patient": "subject", "split": "fold", "sex": "Gender", "age": "Years"}
    names |= {"view": "Projection", "site": "Hospital", "attribute": "scanner"}
    data = read(
        tmp_path, {f"{name}_column{'s' * (name == 'attribute')}": c for name, c in names.items()}, header=header
    )
    plain = read(tmp_path, {"attribute_columns": "scanner"})
    assert data.attribute_values == plain.attribute_values and data.attribute_values["scanner"] == ["s0", "s1", "s2"]
    for name, split in plain.splits.items():
        for attribute, codes in split.attributes.items():
            np.testing.assert_array_equal(data.splits[name].attributes[attribute], codes)


def test_attributes_that_the_table_lacks_are_not_there_unless_they_are_named(tmp_path):
    assert "site" not in read(tmp_path, **without("site")).attribute_values
    assert "no column Hospital: it has path, Edema," in message(tmp_path, {"site_column": "Hospital"})


def test_a_column_of_texts_names_findings(tmp_path):
    header = ["labels" if name == "Edema" else name for name in HEADER]
    texts = ["normal", "Edema|Mass", "Mass", ""]
    table = replaced("Edema", {i: texts[i % 4] for i in range(48)})
    settings = {"label_columns": "labels", "no_finding": "Normal"}
    data = read(tmp_path, settings, table, header=header)
    assert data.splits["test"].ids.tolist() == [i for i in range(36, 48) if i % 4 != 3]
    assert data.splits["test"].labels[:4].tolist() == [0, 1, 1, 0]
    assert "12 images without a label for any finding are left out" in data.exclusions
    several = read(tmp_path, settings | {"target": "all"}, table, header=header)
    assert several.classes == ["Edema", "Mass"]
    assert several.splits["test"].labels[:3].tolist() == [[0, 0], [1, 1], [0, 1]]
    table[0][1] = "normal|Mass"
    assert "row 2: labels is 'No Finding|Mass': No Finding excludes" in message(
        tmp_path, settings, table, header=header
    )


def test_no_finding_may_be_a_column(tmp_path):
    table = replaced("Mass", {i: int(i % 2 == 0) for i in range(48)})
    data = read(tmp_path, {"no_finding": "Mass", "blank": "missing"}, table)
    assert data.splits["test"].labels.tolist() == [i % 2 for i in range(36, 48)]


def test_uncertain_blank_and_boolean_cells(tmp_path):
    table = replaced("Edema", {0: "-1", 1: "", 2: "True", 3: "1.0", 4: "NaN"})
    train = read(tmp_path, {"target": "Edema"}, table).splits["train"]
    assert train.ids[:3].tolist() == [2, 3, 5] and train.labels[:2].tolist() == [1, 1]
    train = read(tmp_path, {"target": "Edema", "uncertain": "one", "blank": "zero"}, table).splits["train"]
    assert train.labels[:5].tolist() == [1, 0, 1, 1, 0]


def test_names_of_splits_are_read_generously(tmp_path):
    spelled = {"train": "Training", "val": "VALIDATION", "test": "test"}
    data = read(tmp_path, None, replaced("split", {i: spelled[part] for i, part in enumerate(PARTS)}))
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [24, 12, 12]


def test_without_val_it_is_carved_out_of_train_by_patient(tmp_path):
    data = read(tmp_path, None, [row for row in rows() if row[4] != "val"])
    train, val = data.splits["train"], data.splits["val"]
    assert len(train) + len(val) == 24 and 2 <= len(val) <= 8 and not set(train.patient) & set(val.patient)
    assert "no image is left for test" in message(tmp_path, None, [row for row in rows() if row[4] != "test"])


def test_without_a_split_column_test_and_val_are_carved_by_patient(tmp_path):
    data = read(tmp_path, {"split_column": ""}, **without("split"))
    patients = [set(data.splits[name].patient) for name in ("train", "val", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 24
    assert 6 <= len(data.splits["test"]) <= 14 and 4 <= len(data.splits["val"]) <= 12


def test_without_patients_every_image_stands_for_itself(tmp_path):
    data = read(tmp_path, {"patient_column": ""}, **without("patient"))
    assert data.splits["test"].patient is None
    assert "has no column patient" in message(tmp_path, **without("patient"))


def test_images_without_a_patient_id_are_patients_of_their_own_and_counted(tmp_path):
    data = read(tmp_path, None, replaced("patient", {0: "", 40: "", 41: ""}))
    assert len(set(data.splits["test"].patient)) == 7
    assert "3 images without a patient id count as patients of their own" in data.exclusions


def test_a_patient_in_two_splits_is_named_with_its_files(tmp_path):
    said = message(tmp_path, None, replaced("patient", {40: "P3"}))
    assert "patient P3 is in two splits, train (films/6.png) and test (films/40.png)" in said


def test_a_view_is_one_of_the_tables_own(tmp_path):
    assert read(tmp_path, {"view": "AP"}).splits["test"].ids.tolist() == list(range(37, 48, 2))
    assert "dataset.view=LL is not a choice: known: AP, PA, all" in message(tmp_path, {"view": "LL"})
    assert "tells no views: leave view=all" in message(tmp_path, {"view": "AP"}, **without("view"))


def test_unknown_words_are_unknown_values(tmp_path):
    data = read(tmp_path, None, replaced("site", {36: "Unknown", 37: "", 38: "n/a"}))
    assert data.attribute_values["site"] == ["A", "B"]
    assert data.splits["test"].attributes["site"][:3].tolist() == [-1, -1, -1]
    assert "site is unknown for 3 of 48 images ('Unknown', '', 'n/a'): in no group of site" in data.exclusions


def test_an_attribute_with_too_many_values_is_refused(tmp_path):
    many = [[f"{i}.png", i % 2, 0, i, "train", "F", 40, "PA", f"site {i}", "s"] for i in range(120)]
    assert "column site has 122 values, which are no groups" in message(tmp_path, None, [*many, *rows()[24:]])


@pytest.mark.parametrize("path", ["../a.png", "/etc/a.png", "films/../../a.png", "..\\a.png", "C:/a.png", ".."])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, path):
    said = message(tmp_path, None, replaced("path", {5: path}))
    assert f"row 7: path is '{path}', which leaves the data folder" in said


def test_paths_are_brought_to_one_form(tmp_path):
    inside = {0: str(tmp_path / "films/0.png"), 1: "./films//1.png", 2: "films\\2.png", 3: "other/../films/3.png"}
    assert read(tmp_path, None, replaced("path", inside)).splits["train"].images.files[:4] == [
        f"films/{i}.png" for i in range(4)
    ]
    assert "path is ''" in message(tmp_path, None, replaced("path", {5: ""}))


def test_one_image_under_two_spellings_is_one_image(tmp_path):
    twin = [f"./{rows()[9][0]}", *rows()[9][1:]]
    assert "own.csv: 1 rows that repeat another row are left out" in read(tmp_path, None, [*rows(), twin]).exclusions
    twin[1] = 0
    assert "row 50: Edema is '0', but '1' in row 11, for the same path films/9.png" in message(
        tmp_path, None, [*rows(), twin]
    )


@pytest.mark.parametrize("name", ["own.csv", "own.csv.gz"])
def test_the_table_is_found_in_its_folder(tmp_path, name):
    stored(tmp_path, name=name)
    data = CSVTable(label_columns="Edema,Mass").load(tmp_path)
    assert data.location.endswith(name) and data.splits["test"].images.root == tmp_path


def test_a_missing_or_ambiguous_table_says_what_to_name(tmp_path):
    reader = CSVTable(label_columns="Edema,Mass")
    with pytest.raises(UserError, match=r"data_root=FILE\.csv"):
        reader.load(None)
    with pytest.raises(UserError, match=r"holds 0 CSV tables \(none\)"):
        reader.load(tmp_path)
    stored(tmp_path, name="a.csv")
    stored(tmp_path, name="b.csv")
    with pytest.raises(UserError, match=r"holds 2 CSV tables \(a\.csv, b\.csv\)"):
        reader.load(tmp_path)
    with pytest.raises(UserError, match=r"c\.csv does not exist"):
        reader.load(tmp_path / "c.csv")


WRONG = [
    ("Edema", "2", "row 5: Edema is '2': give 1, 0, -1 (uncertain) or an empty cell"),
    ("Edema", "yes", "row 5: Edema is 'yes'"),
    ("split", "holdout", "row 5: split is 'holdout': give train, val or test"),
    ("age", "young", "row 5: age is 'young'"),
]


@pytest.mark.parametrize(("column", "text", "said"), WRONG, ids=[w[-1][:30] for w in WRONG])
def test_what_is_wrong_in_a_row_is_said_in_one_line(tmp_path, column, text, said):
    found = message(tmp_path, None, replaced(column, {3: text}))
    assert said in found and str(tmp_path / "own.csv") in found


def test_a_single_column_of_numbers_and_texts_is_refused_at_the_text(tmp_path):
    said = message(tmp_path, {"label_columns": "Edema"}, replaced("Edema", {3: "yes"}))
    assert "row 5: Edema is 'yes'" in said


def test_labels_must_be_named(tmp_path):
    assert "dataset.label_columns is empty" in message(tmp_path, {"label_columns": " "})
    assert "has no column Effusion: it has path, Edema, Mass" in message(tmp_path, {"label_columns": "Effusion"})


def test_the_images_are_decoded_by_prepare(tmp_path):
    (tmp_path / "films").mkdir()
    for i in range(48):
        Image.fromarray(np.full((9, 9), 5 * i, np.uint8)).save(tmp_path / "films" / f"{i}.png")
    data = prepare(CSVTable(label_columns="Edema,Mass", size=8), Path(stored(tmp_path)))
    for split in data.splits.values():
        np.testing.assert_array_equal(split.images[:].max((1, 2, 3)), 5 * split.ids)
    assert data.digest == prepare(CSVTable(label_columns="Edema,Mass", size=8), tmp_path).digest
