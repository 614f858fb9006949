"""The science of a board: from predictions to tables, on sets made up so that the answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.leaderboard import science
from multiplicity_bench.leaderboard.figures import draw
from multiplicity_bench.leaderboard.science import Evidence
from multiplicity_bench.leaderboard.science_page import render_science
from multiplicity_bench.leaderboard.suite import Suite, load_suite
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.selection import NO

K, SEEDS = 5, range(5)
SETTINGS = Settings(epsilon=0.5, k=K, draws=200)
SIZES = {"val": 90, "test": 120}
LABELS = {view: np.random.default_rng(len(view)).integers(2, size=n) for view, n in SIZES.items()}
SEXES = {view: np.arange(n) % 2 for view, n in SIZES.items()}
ROWS = ("identical", "logit_noise", "temperature", "retrain", "laplace", "swag")


def network(view: str, *seed: int) -> np.ndarray:
    """Logits [sample, class] of one network: the truth, and errors of its own."""
    rng = np.random.default_rng([len(view), *seed])
    logits = rng.normal(size=(SIZES[view], 2))
    logits[np.arange(SIZES[view]), LABELS[view]] += 1.5
    return logits


def members_of(row: str, view: str, seed: int, members: int = 12) -> np.ndarray:
    base = network(view, seed)
    noise = np.random.default_rng([seed, len(row), len(view)]).normal(size=(members, *base.shape))
    if row == "identical":
        return np.repeat(base[None], members, 0)
    if row == "temperature":
        return base * np.exp(0.1 * noise[:, :1, :1])
    if row == "retrain":
        return np.stack([network(view, 99, seed, m) for m in range(members)])
    if row == "swag":  # far away: nothing is accepted
        return -9 * base + noise
    return base + (0.4 if row == "laplace" else 0.2) * noise


def cell(row: str, seed: int) -> Evidence:
    def on(view: str) -> Predictions:
        logits, base = members_of(row, view, seed).astype(np.float32), network(view, seed).astype(np.float32)
        return Predictions(logits, base, LABELS[view], "binary", view, 1, attributes={"sex": SEXES[view]})

    found = Evidence({}, on("val"), on("test"), SETTINGS)
    (test,) = found.on_test
    right = float((test.base_decisions == test.labels).mean())
    values = {name: float(np.mean(v)) for name, v in science._over_labels(found, _at_k).items()} if test.size else {}
    scores = {name if name == "disagreement" else f"{name}@{K}": {"value": v} for name, v in values.items()}
    found.record = {
        "scores": {"accuracy.base": {"value": right}} | scores,
        "cost": {
            "fixed_cost_bt": 0.0 if row == "retrain" else 3.0,
            "marginal_cost_bt": 1.0 if row == "retrain" else 0.1,
        },
    }
    return found


def _at_k(context):
    return science.uncertainty.over_patients(context, K)


@pytest.fixture(scope="module")
def cells() -> science.Cells:
    return {row: {seed: cell(row, seed) for seed in SEEDS} for row in ROWS}


@pytest.fixture(scope="module")
def found(cells) -> dict:
    """All parts of the science of the made-up suite, as they are stored."""
    made = science.parts(cells, K, SETTINGS.epsilon, 0.01, {"retrain", "identical", "logit_noise", "temperature"})
    made["abstention"] = science.abstentions(cells, 6)  # the default of 10 needs more members
    about = {"suite": "toy", "k": K, "margin": 0.01}
    return json.loads(science.to_text(science.plain_values(about | made)))


def test_copies_of_the_base_are_at_their_null_values_in_every_part(found):
    for rows in found["selection"].values():
        row = rows["identical"]
        assert (row["gain"], row["gain_low"], row["gain_high"], row["loss"], row["verdict"]) == (0, 0, 0, 0, NO)
        assert set(row["curve"]["test"]) == {0.0}
    assert set(found["fidelity"]["identical"]["ambiguous_recall"].values()) == {0.0}
    assert found["variance"]["identical"]["posterior"] == 0
    for rows in found["uncertainty"].values():
        assert (rows["identical"]["value"], rows["identical"]["patients"], rows["identical"]["members"]) == (0, 0, 0)
    for measure in found["ladder"]["measures"]:
        assert set(found["ladder"]["rows"]["identical"][measure]) == {0.0}
    abstains = found["abstention"]["rows"]["identical"]
    assert set(abstains["coverage"].values()) == {1.0} and set(abstains["inconsistency"].values()) == {0.0}
    assert abstains["accuracy"] == abstains["base_accuracy"]


def test_what_is_chosen_on_val_gains_on_test_what_a_loop_over_members_says(cells, found):
    def worst(logits: np.ndarray, labels: np.ndarray) -> float:
        right = logits.argmax(-1) == labels
        return min(right[labels == c].mean() for c in (0, 1))

    for row in ("laplace", "retrain"):
        gains = []
        for seed in SEEDS:
            c = cells[row][seed]
            on_val = [worst(m, c.val.labels) for m in c.val.logits[c.accepted]]
            losses = c.membership.difference[c.accepted]
            best = max(range(len(on_val)), key=lambda m: (round(on_val[m], 9), -losses[m]))
            gains.append(worst(c.test.logits[c.accepted][best], c.test.labels) - worst(c.test.base, c.test.labels))
        stored = found["selection"]["worst_class_recall"][row]
        assert stored["gain"] == pytest.approx(np.mean(gains), abs=1e-5)
        assert list(stored["seeds"].values()) == pytest.approx(gains, abs=1e-5)


def test_a_set_of_which_nothing_is_accepted_has_reasons_and_no_numbers(found):
    for rows in found["selection"].values():
        assert rows["swag"]["gain"] is None and rows["swag"]["reason"] == "0 of 5 accepted"
    assert "swag" in found["fidelity_reasons"]["0 of 5 accepted"]
    assert "swag" not in found["variance"] and "swag" not in found["uncertainty"]["vpr"]
    assert found["cost"]["swag"]["cost_at_k"] is None and found["cost"]["swag"]["break_even"] is None
    assert found["ladder"]["rows"]["swag"]["members"] == [12, 0, 0, 0]
    assert found["ladder"]["rows"]["swag"]["disagreement"][1:] == [None] * 3


def test_retraining_beside_itself_is_the_ceiling(found):
    """Exchangeable sets: the score of a fresh one is inside the range of k with (k-1)/(k+1); no set is nearer."""
    halves = found["fidelity"]["retrain"]
    assert np.mean(list(halves["hit_rate"].values())) == pytest.approx((K - 1) / (K + 1), abs=1e-6)
    for row in ("laplace", "identical", "logit_noise", "temperature"):
        other = found["fidelity"][row]["energy_distance_relative"]
        assert np.mean(list(other.values())) > np.mean(list(halves["energy_distance_relative"].values())) + 0.1


def test_spread_around_a_base_and_between_trainings_are_those_of_the_networks(cells, found):
    """Between bases and between retrainings the networks differ by the same noise."""
    row = found["variance"]["laplace"]
    within = np.mean([c.on_test[0].scores.var(axis=0, ddof=1).mean() for c in cells["laplace"].values()])
    assert row["posterior"] == pytest.approx(within, rel=1e-4)
    assert row["bases"] == pytest.approx(row["retraining"], rel=0.35), "the variance of five bases is off by a third"
    assert row["data"] is None, "no row trains on resamples"


def test_break_even_is_where_the_bills_cross(cells, found):
    for row in ("laplace", "logit_noise"):
        accepted = sum(len(c.accepted) for c in cells[row].values()) / (12 * len(SEEDS))
        retrained = sum(len(c.accepted) for c in cells["retrain"].values()) / (12 * len(SEEDS))
        for key, base in (("break_even", 0), ("break_even_with_base", 1)):
            cheaper = [k for k in range(1, 200) if base + 3 + 0.1 * k / accepted < k / retrained]
            assert found["cost"][row][key] == cheaper[0]
    assert found["cost"]["laplace"]["front"], "it is the only row that is no control"
    assert not found["cost"]["logit_noise"]["front"]


def test_one_network_that_is_evaluated_alike_has_no_noise_and_otherwise_its_size(cells, found):
    assert found["noise"] == {"cases": 120, "decisions": 0, "evaluations": len(ROWS), "probability": 0.0}
    other = cell("laplace", 0)
    other.test.base[3] = other.test.base[3, ::-1]
    moved = science.noise({"identical": {0: cells["identical"][0]}, "laplace": {0: other}})
    assert moved["decisions"] == 1 and moved["probability"] > 0.01


def test_a_multi_label_task_is_averaged_over_its_labels():
    rng = np.random.default_rng(0)

    def view(name: str, n: int) -> Predictions:
        labels = rng.integers(0, 2, size=(n, 3))
        base = rng.normal(size=(n, 3)) + 2 * labels - 1
        logits = base + 0.3 * rng.normal(size=(8, n, 3))
        return Predictions(logits.astype(np.float32), base.astype(np.float32), labels, "multilabel", name)

    one = Evidence({}, view("val", 80), view("test", 90), SETTINGS)
    chosen = science.selections({"laplace": {0: one}}, K, SETTINGS.epsilon, 0.01)["worst_class_recall"]["laplace"]
    recalls = []
    for label, context in enumerate(one.on_test):
        truth = one.test.labels[:, label]
        recalls.append([min((d == truth)[truth == c].mean() for c in (0, 1)) for d in context.decisions])
    base = [min((c.base_decisions == t)[t == k].mean() for k in (0, 1)) for c, t in zip(one.on_test, one.test.labels.T)]
    assert any(chosen["gain"] == pytest.approx(g, abs=1e-9) for g in np.mean(recalls, axis=0) - np.mean(base))
    assert science.ladders({"laplace": {0: one}}, K) is None


SUITE = """\
title: Toy board
dataset: {name: toy, size: 28}
network: {name: smallcnn}
base_seeds: [0, 1, 2, 3, 4]
members: 12
rows: [identical, logit_noise, temperature, retrain, laplace, swag]
"""


@pytest.fixture
def suite(tmp_path) -> Suite:
    path = tmp_path / "toy.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return load_suite(path)


def test_the_page_says_what_was_found_and_depends_on_no_order(found, suite):
    page = render_science([(suite, found)])
    reversed_order = json.loads(json.dumps(found), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    order = list(found["selection"])
    reversed_order["selection"] = {name: reversed_order["selection"][name] for name in order}
    for rows in ("uncertainty", "ladder", "abstention"):
        reversed_order[rows] = found[rows]
    assert render_science([(suite, reversed_order)]) == page
    row = found["selection"]["worst_class_recall"]["laplace"]
    assert f"{row['gain']:+.3f} [{row['gain_low']:+.3f},{row['gain_high']:+.3f}]" in page
    assert "`retrain`, two halves" in page and "Undefined, 0 of 5 accepted: `swag`." in page
    assert all(len(line) <= 120 or line.startswith(("|", "!")) for line in page.splitlines())


def test_without_a_retraining_row_the_page_has_no_part_that_needs_one(cells, suite):
    alone = {row: seeds for row, seeds in cells.items() if row != "retrain"}
    like, reasons = science.likeness(alone, K)
    assert (like, reasons, science.variances(alone)) == ({}, {}, {})
    costs = science.costs(alone, K, like, set())
    assert costs["laplace"]["break_even"] is None


def test_every_figure_is_drawn_and_the_page_names_no_other(found, suite, tmp_path: Path):
    pytest.importorskip("matplotlib")
    drawn = draw(suite, found, tmp_path / "figures")
    assert {p.name for p in drawn} == {f"toy-{n}.png" for n in ("selection", "fidelity", "cost", "ladder")}
    page = render_science([(suite, found)])
    assert all(f"](figures/{p.name})" in page for p in drawn) and page.count("](figures/") == len(drawn)
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in drawn)
