"""Hidden strata on a board: values from sets made up so that the answers are known, and the section that shows them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from multiplicity_bench.leaderboard.science import Evidence, plain_values, to_text
from multiplicity_bench.leaderboard.strata import section, strata_science
from multiplicity_bench.leaderboard.suite import load_suite
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.decisions import disagreement, votes
from multiplicity_bench.metrics.strata_measures import explained, worst_stratum
from sklearn.metrics import adjusted_rand_score

CASES = 320
PATIENT = np.repeat(np.arange(CASES // 2), 2)
LABELS = np.repeat(np.random.default_rng(0).integers(2, size=CASES // 2), 2)
CODES = 2 * LABELS + np.repeat(np.random.default_rng(1).random(CASES // 2) < 0.5, 2)
DRAIN = np.where(np.random.default_rng(2).random(CASES) < 0.9, CODES % 2, 1 - CODES % 2)
DRAIN[LABELS == 1] ^= 1  # most positives have one
NAMES = {"clusters": ["healthy/0", "healthy/1", "ill/0", "ill/1"]}
SETTINGS = Settings(epsilon=10.0, draws=100)


def cell(row: str, seed: int, task: str = "binary") -> Evidence:
    """Stratum 3 is hard for every network and contested among the members of `laplace`; `identical` are copies."""
    rng = np.random.default_rng([seed, 7])
    margin = np.where(CODES == 3, 0.3, 2.0) + rng.normal(size=CASES) * np.where(CODES == 3, 1.5, 0.4)
    base = np.stack([-margin, margin], axis=1) * np.where(LABELS == 1, 1, -1)[:, None]
    noise = np.random.default_rng([seed, len(row)]).normal(size=(6, CASES, 2)) * (row != "identical")
    logits = (base + noise).astype(np.float32)
    if row == "swag":
        logits[:] = 40 * -base
    if task == "multilabel":
        test = Predictions(logits, base, np.stack([LABELS, 1 - LABELS], axis=1), task, "test", None, PATIENT)
        return Evidence({}, test, test, SETTINGS)
    test = Predictions(logits, base.astype(np.float32), LABELS, task, "test", 1, PATIENT)
    return Evidence({}, test, test, SETTINGS)


@pytest.fixture(scope="module")
def cells():
    return {row: {seed: cell(row, seed) for seed in range(3)} for row in ("identical", "laplace", "swag")}


@pytest.fixture(scope="module")
def science(cells):
    found = strata_science(cells, {"clusters": CODES}, NAMES, {"drain": DRAIN}, ["healthy", "ill"])
    return json.loads(to_text(plain_values({"strata": found})))


@pytest.fixture
def shown(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(
        "title: Toy\ndescription: Made up.\ndataset: {name: phantom_cxr}\nnetwork: {name: smallcnn}\n"
        "base_seeds: [0, 1, 2]\nmembers: 6\npredictions: true\nrows: [identical, laplace, swag]\n",
        encoding="utf-8",
    )
    return load_suite(path)


def test_values_are_those_of_all_base_seeds_together(cells, science):
    row = science["strata"]["clusters"]["rows"]["laplace"]
    contexts = [c.on_test[0] for c in cells["laplace"].values()]
    worst = worst_stratum(contexts[0], CODES, members=np.concatenate([c.decisions for c in contexts]))
    assert (row["worst"], row["bears"], row["seeds"]) == ("ill/1", "ill/1", 3)
    assert row["accuracy"] == pytest.approx(worst.accuracy.estimate.value, abs=1e-5)
    assert row["accuracy"] == pytest.approx(
        np.mean([(c.decisions == LABELS)[:, CODES == 3].mean() for c in contexts]), abs=1e-5
    )
    assert row["excess"] == pytest.approx(worst.accuracy.excess.value, abs=1e-5)
    assert row["excess_low"] < row["excess"] < row["excess_high"] < 0 and row["worst_p_adjusted"] < 0.05
    d = np.mean([disagreement(votes(c.decisions, 2)) for c in contexts], axis=0)
    spread = explained(contexts[0], CODES, d)
    assert row["lift"] == pytest.approx(d[CODES == 3].mean() / d.mean(), abs=1e-5)
    assert row["share"] == pytest.approx(spread.share.estimate.value, abs=1e-5)
    assert row["share_p_adjusted"] < 0.05 and row["share_expected"] < row["share"]


def test_controls_and_rows_without_members_say_what_is_undefined(science):
    rows = science["strata"]["clusters"]["rows"]
    assert rows["identical"]["lift"] is None
    assert rows["identical"]["reasons"] == ["no two members disagree on any case"]
    assert rows["identical"]["worst"] == "ill/1" and rows["identical"]["seeds"] == 3
    assert rows["swag"]["reasons"] == ["no member was accepted", "no two members were accepted"]
    assert rows["swag"]["accuracy"] is None and rows["swag"]["worst_p_adjusted"] is None


def test_known_truths_are_shown_by_the_rarer_side_in_every_class(science):
    truths = {(t["truth"], t["class"]): t for t in science["strata"]["clusters"]["truths"]}
    assert set(truths) == {("drain", "healthy"), ("no drain", "ill")}
    for (_, name), t in truths.items():
        label = ["healthy", "ill"].index(name)
        best = NAMES["clusters"].index(t["stratum"])
        inside, rare = np.equal(LABELS, label), np.equal(DRAIN, 1 - label)
        of_best = np.equal(CODES, best)
        assert t["cases"] == (inside & rare).sum() and t["of"] == inside.sum()
        assert t["precision"] == pytest.approx(rare[of_best].mean(), abs=1e-5) and t["precision"] > 0.75
        assert t["recall"] == pytest.approx(of_best[inside & rare].mean(), abs=1e-5)
        assert t["p"] < 0.01 and t["ari"] > 0.4
    missed = truths["no drain", "ill"]
    assert missed["accuracy"] < missed["accuracy_rest"] - 0.1


def test_merged_classes_are_shown_one_by_one_with_the_index_of_all_and_the_precision_of_the_firmest(cells):
    fine = np.where(np.random.default_rng(3).random(CASES) < 0.85, CODES, 2 * LABELS)
    places = np.argsort(np.argsort(fine != CODES, kind="stable"), kind="stable")  # those rightly placed come first
    values = {"fine": ["cyst", "normal", "mass", "node"]}
    made = strata_science(
        cells, {"clusters": CODES}, NAMES, {"fine": fine}, ["healthy", "ill"], values, {"clusters": places}
    )["clusters"]["truths"]
    assert [(t["truth"], t["class"]) for t in made] == [
        ("cyst", "healthy"), ("normal", "healthy"), ("mass", "ill"), ("node", "ill")
    ]  # fmt: skip
    for t in made:
        inside = np.equal(LABELS, ["healthy", "ill"].index(t["class"]))
        assert t["ari"] == pytest.approx(adjusted_rand_score(fine[inside], CODES[inside]))
        whole, partial = ("precision", "recall") if t["truth"] in ("cyst", "mass") else ("recall", "precision")
        assert t["firmest"] == 1.0 and t[whole] == 1.0 and 0.7 < t[partial] < 1.0
        assert t["cases"] == (fine == values["fine"].index(t["truth"])).sum()


def test_a_class_that_was_not_cut_has_no_found_stratum_and_unknown_truths_are_left_out(cells):
    drain = np.where(np.arange(CASES) < 20, -1, DRAIN)
    codes = np.where(LABELS == 0, 0, CODES)
    (healthy, ill) = strata_science(cells, {"clusters": codes}, NAMES, {"drain": drain})["clusters"]["truths"]
    assert healthy["stratum"] is None and healthy["reason"] == "the class was not cut" and healthy["class"] == "0"
    assert ill["of"] == (LABELS[20:] == 1).sum() and ill["reason"] == ""


def test_there_is_nothing_without_cells_codes_or_a_single_label(cells):
    assert strata_science({}, {"clusters": CODES}, NAMES) == {}
    assert strata_science(cells, {}, {}) == {}
    several = {"laplace": {0: cell("laplace", 0, "multilabel")}}
    assert strata_science(several, {"clusters": CODES}, NAMES) == {}


def test_the_section_shows_every_row_and_says_what_is_missing(shown, science):
    text = "\n".join(section(shown, science))
    assert text.startswith("### Hidden strata: clusters of the reference network's features within a class")
    for part in ("**Who is served worst**", "**Who bears the disagreement**", "**Are known strata found?**"):
        assert part in text
    assert "| `identical` (control) |" in text and "`laplace`" in text and "no drain in ill" in text
    assert "Undefined, no member was accepted: `swag`." in text
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert "at 10" in text
    assert len(table) == 3 and all("nan" not in line.lower() for line in table)
    assert "(2 of 2)" in text and "(2 of 2 lifts or shares)" in text
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("|")))) <= 120
    assert section(shown, {}) == [] and section(shown, {"strata": {}}) == []


def test_a_stratum_with_few_patients_stands_in_brackets(shown, cells):
    codes = CODES.copy()
    codes[:] = np.where((CODES == 3) & (PATIENT > 30), 2, CODES)
    found = strata_science(cells, {"clusters": codes}, NAMES)
    small = found["clusters"]["strata"][3]
    assert small["patients"] < 25 and not small["counts"]
    text = "\n".join(section(shown, {"strata": found}))
    assert "(ill/1)" in text and f"{small['patients']} ({small['cases']})" in text
