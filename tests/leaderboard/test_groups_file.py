"""groups/<suite>.json: what is written is read again, and what does not belong is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard import group_science
from multiplicity_bench.leaderboard.groups import Groups, Stratification, groups_problem, load_groups, to_text
from multiplicity_bench.leaderboard.science import Evidence
from multiplicity_bench.leaderboard.suite import Suite
from multiplicity_bench.metrics.api import Predictions, Settings

VIEWS = {"val": 6, "test": 8}


def groups(suite: Suite) -> Groups:
    codes = {view: np.arange(n) % 3 - 1 for view, n in VIEWS.items()}
    return Groups(
        suite=suite.name,
        dataset="d" * 64,
        declared={"strata": ["clusters"], "truths": ["drain"]},
        attributes={"sex": ["F", "M"]},
        strata={"clusters": Stratification(["no", "yes"], codes, codes, {"rediscovered": 0.5})},
        truths={"drain": {view: (c > 0).astype(np.int64) for view, c in codes.items()}},
        references=[101],
    )


@pytest.fixture
def declaring(suite: Suite) -> Suite:
    return replace(suite, strata=("clusters",), truths=("drain",))


def test_a_groups_file_is_read_as_it_was_written(tmp_path: Path, declaring: Suite):
    (tmp_path / "groups").mkdir()
    written = groups(declaring)
    (tmp_path / "groups" / "toy.json").write_text(to_text(written), encoding="utf-8")
    read = load_groups(tmp_path, declaring)
    assert read is not None and to_text(read) == to_text(written)
    assert read.strata["clusters"].codes["test"].tolist() == [-1, 0, 1, -1, 0, 1, -1, 0]
    assert groups_problem(declaring, read, "d" * 64) == ""


def test_a_suite_without_a_groups_file_has_none(tmp_path: Path, suite: Suite):
    assert load_groups(tmp_path, suite) is None
    assert groups_problem(suite, None, "d" * 64) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"strata": {}, "truths": {}, "more": 1}', '{"strata": 3}'])
def test_a_broken_groups_file_is_told_in_one_line(tmp_path: Path, declaring: Suite, text: str):
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "toy.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"toy.json: is no file of groups .*run `make groups`") as error:
        load_groups(tmp_path, declaring)
    assert "\n" not in str(error.value)


def test_groups_that_do_not_belong_to_the_suite_are_a_problem(declaring: Suite):
    made = groups(declaring)
    assert groups_problem(declaring, None, "d" * 64) == "is missing"
    assert groups_problem(declaring, made, "e" * 64) == "was made from other data"
    assert groups_problem(replace(declaring, truths=()), made, "d" * 64) == "is not what the suite declares"


def evidence(cases: dict[str, int]) -> Evidence:
    def on(view: str) -> Predictions:
        n = cases[view]
        logits = np.zeros((2, n, 2), np.float32)
        return Predictions(logits, logits[0], np.arange(n) % 2, "binary", view, 1)

    return Evidence({}, on("val"), on("test"), Settings())


def test_hidden_clusters_become_an_attribute_of_every_cell(declaring: Suite):
    cells = {"retrain": {0: evidence(VIEWS), 1: evidence(VIEWS)}}
    made = groups(declaring)
    group_science.attach(cells, made)
    for cell in cells["retrain"].values():
        assert cell.test.attributes["strata"].tolist() == made.strata["clusters"].codes["test"].tolist()
        assert cell.on_val[0].attributes["strata"].tolist() == made.strata["clusters"].codes["val"].tolist()


def test_clusters_of_other_cases_are_refused(declaring: Suite):
    with pytest.raises(UserError, match=r"groups/toy.json has 8 cases of test, the predictions 9: run `make groups`"):
        group_science.attach({"retrain": {0: evidence(VIEWS | {"test": 9})}}, groups(declaring))


def test_what_the_group_part_of_the_science_depends_on_changes_its_digest(declaring: Suite):
    made = groups(declaring)
    digests = {
        group_science.group_inputs(declaring, made),
        group_science.group_inputs(declaring, None),
        group_science.group_inputs(declaring, replace(made, attributes={"sex": ["M", "F"]})),
        group_science.group_inputs(replace(declaring, intersections=("sex*view",)), made),
    }
    assert len(digests) == 4
