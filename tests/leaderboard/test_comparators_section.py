"""Rivals of a suite: rows with another objective, how every set compares with their networks, and the section."""

from __future__ import annotations

import json

import numpy as np
import pytest
from multiplicity_bench.leaderboard.comparators import rivals, section, versus
from multiplicity_bench.leaderboard.record import seal
from multiplicity_bench.leaderboard.science import Evidence, plain_values
from multiplicity_bench.leaderboard.suite import Suite, load_suite
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.comparators import OPEN, RIVAL, SET

DRO = "retrain[groups=sex*label,objective=group_dro]"
BALANCED = "retrain[objective=class_balanced]"
OWN, SEX = "worst_group_accuracy#sex*label", "worst_group_accuracy#sex"
K, SEEDS, MARGIN = 3, range(3), 0.05
SIZES = {"val": 240, "test": 480}
LABELS = {view: np.arange(n) // 2 % 2 for view, n in SIZES.items()}
SEXES = {view: np.arange(n) % 2 for view, n in SIZES.items()}
SUITE = """\
title: Toy board
dataset: {name: toy}
network: {name: smallcnn}
base_seeds: [0, 1, 2]
members: 6
k: 3
rows:
  - identical
  - laplace
  - retrain: {objective: group_dro, groups: "sex*label"}
  - retrain: {objective: class_balanced}
  - swag
"""


def network(view: str, hard: float, *seed: int) -> np.ndarray:
    """Logits of a network that errs on 15 of 100, and on the share `hard` of women with the finding."""
    rng = np.random.default_rng([len(view), *seed])
    rare = (SEXES[view] == 0) & (LABELS[view] == 1)
    rest = 0.15 + (0.15 - hard) * rare.mean() / (1 - rare.mean())  # the mean accuracy is the same for all
    wrong = rng.random(SIZES[view]) < np.where(rare, hard, rest)
    logits = np.zeros((SIZES[view], 2))
    logits[np.arange(SIZES[view]), LABELS[view] ^ wrong] = 2.0 + 0.01 * rng.random(SIZES[view])
    return logits


HARD = {"identical": 0.5, "laplace": 0.5, DRO: 0.15, BALANCED: 0.5, "swag": 0.5}


def cell(row: str, seed: int, cost: tuple[float | None, float] = (0.0, 1.0)) -> Evidence:
    def on(view: str) -> Predictions:
        base = network(view, 0.5, seed)
        members = [base if row == "identical" else network(view, HARD[row], seed, len(row), m) for m in range(6)]
        if row == "swag":  # far away: nothing is accepted
            members = [-5 * base] * 6
        both = (np.stack(members).astype(np.float32), base.astype(np.float32))
        return Predictions(*both, LABELS[view], "binary", view, 1, attributes={"sex": SEXES[view]})

    record = {"cost": {"fixed_cost_bt": cost[0], "marginal_cost_bt": cost[1]}}
    return Evidence(record, on("val"), on("test"), Settings(epsilon=0.2, k=K, draws=300))


COSTS = {"identical": (0.0, 0.0), "laplace": (1.2, 0.05), DRO: (0.0, 1.1), BALANCED: (0.0, 1.0), "swag": (9.0, 0.1)}


@pytest.fixture(scope="module")
def cells() -> dict[str, dict[int, Evidence]]:
    return {row: {seed: cell(row, seed, cost) for seed in SEEDS} for row, cost in COSTS.items()}


@pytest.fixture(scope="module")
def found(cells) -> dict:
    return json.loads(json.dumps(plain_values({"comparators": versus(cells, K, MARGIN)})))


@pytest.fixture
def suite(tmp_path) -> Suite:
    (path := tmp_path / "toy.yaml").write_text(SUITE, encoding="utf-8")
    return load_suite(path)


def test_rows_with_another_objective_are_rivals_by_their_label(suite):
    assert rivals([row.label for row in suite.rows]) == {DRO: "sex*label", BALANCED: ""}


def test_a_product_of_groups_names_a_row_and_leaves_the_name_of_its_record_a_file_name(suite, make_record):
    row = suite.row(DRO)
    assert row.settings == {"objective": "group_dro", "groups": "sex*label"} and not row.control
    record = make_record(row.label, 0)
    assert record["row"] == DRO and "sex*label" in json.dumps(record["identity"])
    assert not set(seal(record)["name"]) & set('*/\\?"<>| ')


def test_every_other_row_is_compared_with_every_rival(found):
    compared = found["comparators"]["rivals"]
    assert set(compared) == {DRO, BALANCED}
    assert set(compared[DRO]["criteria"]) == {OWN, SEX} and set(compared[BALANCED]["criteria"]) == {SEX}
    for rival in compared.values():
        assert all(set(rows) == {"identical", "laplace", "swag"} for rows in rival["criteria"].values())


def test_a_sets_cost_with_its_base_buys_networks_of_the_rival(found):
    compared = found["comparators"]["rivals"]
    # 1 + 0; 1 + 1.2 + 6 x .05; 1 + 9 + 6 x .1 base trainings, at 1.1 and 1 each; six were trained
    assert compared[DRO]["bought"] == {"identical": 1, "laplace": 2, "swag": 9} and compared[DRO]["drawn"] == 6
    assert compared[BALANCED]["bought"] == {"identical": 1, "laplace": 2, "swag": 10}


def worst(logits: np.ndarray, view: str) -> float:
    right = logits.argmax(-1) == LABELS[view]
    return min(right[(SEXES[view] == s) & (LABELS[view] == y)].mean() for s in (0, 1) for y in (0, 1))


def test_the_difference_is_that_of_the_val_best_of_both_sides(cells, found):
    """The base stands for all copies of it, against a network of the rival drawn at random."""
    row = found["comparators"]["rivals"][DRO]["criteria"][OWN]["identical"]
    gains = [
        worst(cells["identical"][seed].test.base, "test")
        - np.mean([worst(m, "test") for m in cells[DRO][seed].test.logits])
        for seed in SEEDS
    ]
    assert list(row["seeds"].values()) == pytest.approx(gains, abs=1e-5)
    assert row["gain"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert row["of_set"] - row["of_rival"] == pytest.approx(row["gain"], abs=1e-5)


def test_the_better_side_wins_and_equal_ones_stay_open(cells, found):
    """Half of the women with the finding are missed by the sets and by class balancing, 15 of 100 by group DRO."""
    compared = found["comparators"]["rivals"]
    assert [compared[DRO]["criteria"][OWN][row]["verdict"] for row in ("identical", "laplace")] == [RIVAL, RIVAL]
    assert compared[BALANCED]["criteria"][SEX]["laplace"]["verdict"] == OPEN
    swapped = {{"laplace": DRO, DRO: "laplace"}.get(row, row): seeds for row, seeds in cells.items()}
    again = versus({row: swapped[row] for row in (DRO, "laplace")}, K, MARGIN)["rivals"][DRO]["criteria"][OWN]
    assert again["laplace"]["verdict"] == SET


def test_a_difference_that_was_resolved_needs_no_more_patients(found):
    criteria = found["comparators"]["rivals"][DRO]["criteria"]
    row = criteria[OWN]["laplace"]
    assert row["gain"] < -row["resolvable"] and 0 < row["needed"] < row["patients"] == 480


def test_what_was_not_accepted_or_measured_has_a_reason_and_no_numbers(cells, found):
    row = found["comparators"]["rivals"][DRO]["criteria"][OWN]["swag"]
    assert row == {"gain": None, "reason": "0 of 3 accepted", "seeds": dict.fromkeys("012")}
    unmeasured = {seed: cell("laplace", seed, (None, 0.1)) for seed in SEEDS}
    some = {"laplace": unmeasured, "identical": cells["identical"], DRO: cells[DRO]}
    told = versus(some, K, MARGIN)["rivals"][DRO]
    assert told["bought"]["laplace"] is None
    assert told["criteria"][OWN]["laplace"]["reason"] == "the cost of the set or of the rival was not measured"


def test_all_comparisons_are_settled_together(cells):
    """Beside the other rival's comparisons the same evidence counts less."""
    alone = versus({row: cells[row] for row in ("laplace", DRO)}, K, MARGIN)["rivals"][DRO]["criteria"][SEX]["laplace"]
    beside = versus(cells, K, MARGIN)["rivals"][DRO]["criteria"][SEX]["laplace"]
    assert alone["gain"] == beside["gain"] and alone["p"] < beside["p"]


def test_the_section_shows_every_row_beside_each_rival(suite, found):
    text = "\n".join(section(suite, found))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    assert set(lines) == {"`identical` (control)", "`laplace`", "`swag`"}
    assert f"Against `{DRO}`" in text and f"Against `{BALANCED}`" in text
    row = found["comparators"]["rivals"][DRO]["criteria"][OWN]["laplace"]
    first = next(line for line in text.splitlines() if line.startswith("| `laplace`"))
    assert "2 of 6" in first and f"{row['gain']:+.3f}" in first and "rival" in first
    assert "Undefined, 0 of 3 accepted: `swag`." in text
    assert f"{row['needed']} (now 480)" in text and "on test at most 0.05 less accurate" in " ".join(text.split())
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "`", "Against")))


def test_a_suite_without_rivals_has_no_section(suite, cells):
    assert section(suite, {}) == []
    alone = {"laplace": cells["laplace"]}
    assert versus(alone, K, MARGIN) == {"tolerance": MARGIN, "rivals": {}}
    assert section(suite, {"comparators": versus(alone, K, MARGIN)}) == []
    nothing = versus({"swag": cells["swag"], DRO: cells[DRO]}, K, MARGIN)
    assert section(suite, {"comparators": nothing}) == []
