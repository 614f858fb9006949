"""The committed board: regenerated, rescored from its predictions, and made from the data that the suite has now."""

from __future__ import annotations

from pathlib import Path

import pytest
from multiplicity_bench.leaderboard.check import check, verify
from multiplicity_bench.leaderboard.record import read_all
from multiplicity_bench.leaderboard.suite import board_suites

FOLDER = Path(__file__).resolve().parents[2] / "leaderboard"
SUITES = {suite.name: suite for suite in board_suites(FOLDER / "suites")}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """All committed records, their digests verified."""
    return read_all(FOLDER / "records")


def of(suite, records: list[dict]) -> list[dict]:
    return [r for r in records if r["identity"]["dataset"]["name"] == suite.dataset.name]


def test_the_committed_board_follows_from_its_records_byte_for_byte():
    assert check(FOLDER)


@pytest.mark.parametrize("name", ["breastmnist", "phantom"])
def test_every_cell_of_a_board_suite_is_filled_from_a_clean_tree(name, records):
    suite = SUITES[name]
    found = {(r["row"], r["identity"]["base_seed"]) for r in of(suite, records)}
    assert found == {(row.label, seed) for row, seed in suite.cells()}
    assert not any(r["provenance"]["dirty"] for r in of(suite, records))
    assert len(suite.base_seeds) >= 5
    assert {row.generator for row in suite.rows} >= {"identical", "logit_noise", "temperature", "retrain"}


@pytest.mark.parametrize("name", ["breastmnist", "phantom"])
def test_committed_predictions_give_the_committed_scores_of_every_row(name, records):
    suite = SUITES[name]
    for row in suite.rows:
        record = next(r for r in of(suite, records) if r["row"] == row.label)
        path = FOLDER / "records" / f"{record['name']}.json"
        assert verify(path, FOLDER / "predictions" / name) == [], row.label


def test_the_marginal_likelihoods_prior_is_shown_to_leave_the_set_on_real_images(records):
    rows = [r for r in of(SUITES["breastmnist"], records) if r["row"] == "laplace[prior_precision=marglik]"]
    tuned = [r for r in of(SUITES["breastmnist"], records) if r["row"] == "laplace"]
    accepted = [sum(len(r["set"]["accepted"]) for r in some) for some in (rows, tuned)]
    assert accepted[0] < accepted[1]


def test_the_phantom_of_the_board_is_the_phantom_of_this_version(records):
    from multiplicity_bench.benchmark.spec import create
    from multiplicity_bench.datasets.api import DATASETS, prepare

    suite = SUITES["phantom"]
    data = prepare(create(DATASETS, {"name": suite.dataset.name, **suite.dataset.settings}))
    assert {r["identity"]["dataset"]["digest"] for r in of(suite, records)} == {data.digest}


@pytest.mark.real
def test_the_real_images_of_the_board_are_the_official_file(records, real_data):
    from multiplicity_bench.benchmark.spec import create
    from multiplicity_bench.datasets.api import DATASETS, prepare

    suite = SUITES["breastmnist"]
    data = prepare(create(DATASETS, {"name": suite.dataset.name, **suite.dataset.settings}), real_data)
    assert {r["identity"]["dataset"]["digest"] for r in of(suite, records)} == {data.digest}
