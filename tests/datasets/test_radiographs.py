"""What the readers of radiographs share: findings and targets, tables, ages, and sizes of groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from multiplicity_bench.datasets.findings import (
    BLANK,
    CHEXPERT_FINDINGS,
    NO_FINDING,
    UNCERTAIN,
    choose_target,
    match_finding,
    settle,
)
from multiplicity_bench.datasets.radiographs import age_groups, ages_of, read_table, without_repeats
from multiplicity_bench.errors import UserError

FINDINGS = ["Edema", "Mass", "Device", NO_FINDING]


def stored(folder, text, name="table.csv"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def ages(folder, *texts, edges=(20, 40, 60, 80)):
    table = read_table(stored(folder, "\n".join(["age,x", *(f"{text}," for text in texts)])), ["age"])
    attribute = ages_of(table, "age", edges)
    return [attribute.names[code] if code >= 0 else None for code in attribute.codes]


def by_hand(edema, mass, none):
    """Any finding against No Finding for three-valued labels, in words."""
    if 1 in (edema, mass):
        return -1 if none == 1 else 1
    return 0 if none == 1 or (edema, mass) == (0, 0) else -1


def test_any_finding_is_what_the_definition_says_for_every_row_there_can_be():
    rows = np.array(list(itertools.product([-1, 0, 1], repeat=4)), np.int8)
    labels = choose_target("any", FINDINGS, rows, beside=("Device",))
    assert labels.values.tolist() == [by_hand(edema, mass, none) for edema, mass, _, none in rows.tolist()]
    assert (labels.task, labels.classes) == ("binary", [NO_FINDING, "any finding"])


def test_any_finding_without_a_column_for_none_is_any_of_the_columns():
    rows = np.array([[0, 0], [1, -1], [0, -1], [-1, -1]], np.int8)
    assert choose_target("any", ["Edema", "Mass"], rows).values.tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("uncertain", ["ignore", "zero", "one"])
@pytest.mark.parametrize("blank", ["zero", "missing"])
def test_uncertain_and_blank_cells_become_what_the_settings_say(uncertain, blank):
    cells = np.array([[1, 0, UNCERTAIN, BLANK], [BLANK] * 4], np.int8)
    u, b = {"ignore": -1, "zero": 0, "one": 1}[uncertain], {"zero": 0, "missing": -1}[blank]
    assert settle(cells, uncertain, blank).tolist() == [[1, 0, u, b], [-1] * 4], "a blank row was not labelled"


def test_targets_choose_columns_in_the_order_they_are_named():
    rows = np.array([[1, 0, -1, 0], [0, 1, 0, 0]], np.int8)
    assert choose_target("MASS", FINDINGS, rows).values.tolist() == [0, 1]
    assert choose_target("no_finding", FINDINGS, rows).classes == ["no No Finding", NO_FINDING]
    both = choose_target("device, Edema", FINDINGS, rows)
    assert (both.task, both.classes, both.values.tolist()) == ("multilabel", ["Device", "Edema"], [[-1, 1], [0, 0]])
    assert choose_target("all", FINDINGS, rows).classes == FINDINGS[:3]
    with pytest.raises(UserError, match="names Mass twice"):
        choose_target("Mass,mass", FINDINGS, rows)


def test_names_of_findings_are_matched_without_case_underscore_and_space():
    assert match_finding(" pleural_effusion ", CHEXPERT_FINDINGS) == "Pleural Effusion"
    assert match_finding("PleuralEffusion", CHEXPERT_FINDINGS) == "Pleural Effusion"
    with pytest.raises(UserError, match="there is no finding 'Pneumotorax': did you mean 'Pneumothorax'"):
        match_finding("Pneumotorax", CHEXPERT_FINDINGS)


def test_ages_are_years_or_dicom_age_strings(tmp_path):
    assert ages(tmp_path, "0", "19", "20", "39.9", "058Y", "80", "120") == [
        "<20",
        "<20",
        "20-39",
        "20-39",
        "40-59",
        "80+",
        "80+",
    ]
    assert ages(tmp_path, "239M", "240M", "1043W", "1044W", "7304D", "7305D") == ["<20", "20-39"] * 3
    assert ages(tmp_path, "411", "121", "-1", "", "NaN", "unknown", "inf") == [None] * 7


@pytest.mark.parametrize("text", ["old", "Y", "5 y o", "1O"])
def test_a_text_that_is_no_age_is_named_with_its_row(tmp_path, text):
    with pytest.raises(UserError, match=rf"table\.csv row 3: age is '{text}'"):
        ages(tmp_path, "50", text)


def test_age_groups_are_those_between_the_edges():
    years = np.arange(0, 120.5, 0.5)
    groups = age_groups(years, [20, 40, 60, 80], years.astype(object))
    assert groups.names == ["<20", "20-39", "40-59", "60-79", "80+"]
    assert groups.codes.tolist() == [int(min(year // 20, 4)) for year in years]


def test_a_table_is_read_as_text_with_its_lines(tmp_path):
    file = stored(tmp_path, 'b,a\n 1 ,"x,\ny"\n\n2,z\n')
    table = read_table(file, ["a"], ["b", "c"])
    assert table.columns == {"a": ["x,\ny", "z"], "b": ["1", "2"]}
    assert table.rows.tolist() == [0, 1] and table.lines.tolist() == [3, 5]


BROKEN = [
    (b"", "has no column a: it has none"),
    (b"a,b\n", "has no rows below its header"),
    (b"a;b\n1;2\n", "has no column a: it has a;b"),
    (b"a,b\n1,2\n1\n", "row 3 has 1 cells, the header 2"),
    (b"a,b\n1,2,3\n", "row 2 has 3 cells, the header 2"),
    (b"a,a\n1,2\n", "has 2 columns a: keep one"),
    ("a,b\nÄ,1\n".encode("latin-1"), "is not UTF-8 (byte 0xc4)"),
    ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 (byte 0xff)"),
    (b"a,b\n" + b"x" * 200_000 + b",2\n", "is no CSV file"),
]


@pytest.mark.parametrize(("content", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_broken_table_is_refused_in_one_line(tmp_path, content, said):
    with pytest.raises(UserError) as raised:
        read_table(stored(tmp_path, content), ["a"])
    assert str(raised.value).startswith(str(tmp_path / "table.csv")) and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_in_place_of_a_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path, ["a"])


def test_empty_cells_beyond_the_header_are_allowed(tmp_path):
    assert read_table(stored(tmp_path, "a,b\n1,2,,\n"), ["a"]).columns == {"a": ["1"]}


def test_repeated_rows_are_left_out_and_counted_and_contradictions_refused(tmp_path):
    table = read_table(stored(tmp_path, "k,v\n1,a\n2,b\n1,a\n1,a\n"), ["k", "v"])
    exclusions: list[str] = []
    kept = without_repeats(table, ["k"], exclusions)
    assert kept.columns == {"k": ["1", "2"], "v": ["a", "b"]} and kept.rows.tolist() == [0, 1]
    assert exclusions == ["table.csv: 2 rows that repeat another row are left out"]
    table = read_table(stored(tmp_path, "k,v\n1,a\n2,b\n1,c\n"), ["k", "v"])
    with pytest.raises(UserError, match="row 4: v is 'c', but 'a' in row 2, for the same k 1"):
        without_repeats(table, ["k"], [])
