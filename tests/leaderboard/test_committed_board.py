"""The committed board: regenerated, rescored from its predictions, and made from the data that the suite has now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from multiplicity_bench.leaderboard.cells import settle_all
from multiplicity_bench.leaderboard.check import check, verify
from multiplicity_bench.leaderboard.record import read_all
from multiplicity_bench.leaderboard.riemannian import PAGE, fill
from multiplicity_bench.leaderboard.science import compute, to_text
from multiplicity_bench.leaderboard.suite import board_suites
from multiplicity_bench.metrics.selection import YES

FOLDER = Path(__file__).resolve().parents[2] / "leaderboard"
SUITES = {suite.name: suite for suite in board_suites(FOLDER / "suites")}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """All committed records, their digests verified."""
    return read_all(FOLDER / "records")


def of(suite, records: list[dict]) -> list[dict]:
    """The records that fill the suite's table."""
    return next(t.records for t in settle_all(SUITES.values(), records) if t.suite == suite)


def test_the_committed_board_follows_from_its_records_byte_for_byte():
    assert check(FOLDER)


@pytest.mark.parametrize("name", SUITES)
def test_every_cell_of_a_board_suite_is_filled_from_a_clean_tree(name, records):
    suite = SUITES[name]
    found = {(r["row"], r["identity"]["base_seed"]) for r in of(suite, records)}
    assert found == {(row.label, seed) for row, seed in suite.cells()}
    assert not any(r["provenance"]["dirty"] for r in of(suite, records))
    assert len(suite.base_seeds) >= 5 or suite.single_base
    assert {row.generator for row in suite.rows} >= {"identical", "logit_noise", "temperature"}


@pytest.mark.parametrize("name", ["breastmnist", "phantom"])
def test_geodesics_stand_beside_their_rivals_and_the_retrainings(name):
    wanted = {"retrain", "laplace[structure=full]", "ray_exit", "perturb_sgd", "swag"}
    assert {row.label for row in SUITES[name].rows} >= wanted | {"riemannian_laplace"}


@pytest.mark.parametrize("name", ["breastmnist", "phantom"])
def test_the_papers_metric_stands_on_both_boards(name):
    assert "riemannian_laplace[tau=1]" in {row.label for row in SUITES[name].rows}


def test_every_committed_record_fills_a_cell(records):
    filling = {r["name"] for suite in SUITES.values() for r in of(suite, records)}
    assert {r["name"] for r in records} == filling


def test_the_page_about_geodesics_follows_from_the_records():
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page) == page


def test_every_geodesic_kept_its_bound(records):
    """On the loss that its metric is made of, to the drift of its speed and the rounding of a float32 sum."""
    checked = 0
    for record in records:
        members = record["set"]["diagnostics"].get("members", {})
        for bound, excess, drift in zip(*(members.get(n, []) for n in ("bound", "excess", "drift")), strict=True):
            if bound is not None:
                checked += 1
                assert excess <= bound * (1 + drift) + 1e-3, record["name"]
    assert checked > 1000


@pytest.mark.parametrize("name", SUITES)
def test_committed_predictions_give_the_committed_scores_of_every_row(name, records):
    suite = SUITES[name]
    for row in suite.rows:
        record = next(r for r in of(suite, records) if r["row"] == row.label)
        path = FOLDER / "records" / f"{record['name']}.json"
        assert verify(path, FOLDER / "predictions" / name) == [], row.label


@pytest.mark.parametrize(
    "name", ["breastmnist", *(pytest.param(n, marks=pytest.mark.slow) for n in SUITES if n != "breastmnist")]
)
def test_committed_science_follows_from_the_committed_predictions(name, records):
    """Numbers to one part in ten thousand, for sums are added up in another order on another processor."""
    table = next(t for t in settle_all(SUITES.values(), records) if t.suite.name == name)
    found = json.loads(to_text(compute(table, FOLDER)))
    same(found, json.loads((FOLDER / "science" / f"{name}.json").read_text(encoding="utf-8")), name)


def same(found, committed, where: str) -> None:
    if isinstance(committed, dict):
        assert found.keys() == committed.keys(), where
        for key in committed:
            same(found[key], committed[key], f"{where}.{key}")
    elif isinstance(committed, list):
        assert len(found) == len(committed), where
        for i, pair in enumerate(zip(found, committed)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(committed, float):
        assert found == pytest.approx(committed, rel=1e-4, abs=1e-6), where
    else:
        assert found == committed, where


def test_controls_are_at_their_null_values_in_the_science_and_gain_nothing(records):
    for name in SUITES:
        science = json.loads((FOLDER / "science" / f"{name}.json").read_text(encoding="utf-8"))
        for criterion, rows in science["selection"].items():
            row = rows["identical"]
            assert (row["gain"], row["gain_low"], row["gain_high"]) == (0, 0, 0), criterion
            for control in ("logit_noise", "temperature"):
                assert rows[control].get("verdict") != YES, criterion
        for rows in science["uncertainty"].values():
            assert rows["identical"]["members"] == rows["identical"]["patients"] == 0


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
@pytest.mark.parametrize("name", [n for n, s in SUITES.items() if s.board and s.dataset.name != "phantom_cxr"])
def test_the_real_images_of_the_board_are_the_official_files(name, records, real_data):
    from multiplicity_bench.benchmark.spec import create
    from multiplicity_bench.datasets.api import DATASETS, prepare

    suite = SUITES[name]
    data = prepare(create(DATASETS, {"name": suite.dataset.name, **suite.dataset.settings}), real_data)
    assert {r["identity"]["dataset"]["digest"] for r in of(suite, records)} == {data.digest}


def test_the_hidden_drains_of_the_phantom_are_found_and_served_worse():
    science = json.loads((FOLDER / "science" / "phantom.json").read_text(encoding="utf-8"))
    truths = science["strata"]["clusters"]["truths"]
    found = next(t for t in truths if (t["truth"], t["class"]) == ("drain", "no pneumothorax"))
    assert found["p"] < 0.05 and found["lift"] > 1.5
    assert found["accuracy"] < found["accuracy_rest"] - 0.1
