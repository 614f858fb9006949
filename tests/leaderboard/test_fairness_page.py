"""Fairness of a made-up suite, from predictions to the page: known gaps, controls at their null, what is left out."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard.cells import settle
from multiplicity_bench.leaderboard.fairness import FROZEN, METRIC_ORDER, fairness
from multiplicity_bench.leaderboard.fairness_page import render_fairness
from multiplicity_bench.leaderboard.predictions import predictions_arrays, save_predictions
from multiplicity_bench.leaderboard.science import Cells, Evidence, evidence, plain_values, to_text
from multiplicity_bench.leaderboard.suite import Suite, load_suite, suite_of
from multiplicity_bench.metrics.abstention import abstention
from multiplicity_bench.metrics.api import METRICS, Predictions, Settings, register_metric
from multiplicity_bench.metrics.decisions import disagreement, votes
from multiplicity_bench.metrics.fairness import at_threshold, frozen_threshold
from multiplicity_bench.metrics.group_rates import accuracies, by_suffix, spread

K, SEEDS, PATIENTS = 5, range(5), 120
SETTINGS = Settings(epsilon=0.5, k=K, draws=200)
ROWS = ("identical", "logit_noise", "temperature", "retrain", "laplace", "swag")
NAMES = {"sex": ["F", "M"]}
PATIENT = np.repeat(np.arange(PATIENTS), 2)
LABELS = np.random.default_rng(1).integers(2, size=2 * PATIENTS)
ATTRIBUTES = {
    "sex": PATIENT % 2,
    "view": np.arange(2 * PATIENTS) // 2 % 4 // 2,
    "site": np.select([PATIENT < 50, PATIENT < 95, PATIENT < 110], [0, 1, 2], -1),
}


def logits_of(row: str, view: str, seed: int, members: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return members and base: the base errs on men more often, the members of laplace disagree about them more."""
    rng = np.random.default_rng([len(view), seed])
    base = rng.normal(size=(2 * PATIENTS, 2)) * (1 + ATTRIBUTES["sex"])[:, None]
    base[np.arange(2 * PATIENTS), LABELS] += 1.5
    noise = np.random.default_rng([seed, len(row), len(view)]).normal(size=(members, *base.shape))
    if row == "identical":
        return np.repeat(base[None], members, 0), base
    if row == "temperature":
        return base * np.exp(0.1 * noise[:, :1, :1]), base
    if row == "swag" and seed != 2:  # far away: nothing is accepted
        return np.repeat(-9 * base[None], members, 0), base
    if row == "laplace":
        return base + 0.7 * noise * ATTRIBUTES["sex"][:, None], base
    return base + 0.2 * noise, base


def cell(row: str, seed: int) -> Evidence:
    def on(view: str) -> Predictions:
        members, base = (a.astype(np.float32) for a in logits_of(row, view, seed))
        return Predictions(members, base, LABELS, "binary", view, 1, PATIENT, attributes=dict(ATTRIBUTES))

    return Evidence({}, on("val"), on("test"), SETTINGS)


def as_read(found: dict) -> dict:
    return json.loads(to_text(plain_values(found)))


@pytest.fixture(scope="module")
def cells() -> Cells:
    return {row: {seed: cell(row, seed) for seed in SEEDS} for row in ROWS}


@pytest.fixture(scope="module")
def raw(cells) -> dict:
    return fairness(cells, K, ["sex*view"], NAMES)


@pytest.fixture(scope="module")
def found(raw) -> dict:
    """The fairness of the made-up suite, as it is read from its file."""
    return as_read(raw)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    path = tmp_path_factory.mktemp("suite") / "toy.yaml"
    path.write_text(
        "title: Toy board\ndataset: {name: toy}\nnetwork: {name: smallcnn}\nbase_seeds: [0, 1, 2, 3, 4]\nmembers: 12\n"
        f"rows: [{', '.join(ROWS)}]\n",
        encoding="utf-8",
    )
    return load_suite(path)


def test_values_are_plain_and_undefined_ones_are_null(raw):
    json.dumps(raw, allow_nan=False)
    assert raw["sets"]["accuracy_gap"]["sex"]["swag"]["members"]["seeds"] == 1
    assert raw["burdens"]["disagreement"]["sex"]["swag"]["seeds"] == 1


def test_groups_are_named_and_counted_with_the_small_and_the_unknown(found):
    assert found["attributes"]["sex*view"] == ["F × 0", "F × 1", "M × 0", "M × 1"]
    site = found["groups"]["site"]["test"]
    assert {code: (s["patients"], s["images"], s["counts"]) for code, s in site.items()} == {
        "0": (50, 100, True),
        "1": (45, 90, True),
        "2": (15, 30, False),
        "-1": (10, 20, False),
    }
    both = found["groups"]["sex*view"]["val"]["3"]
    chosen = (ATTRIBUTES["sex"] == 1) & (ATTRIBUTES["view"] == 1)
    assert both["positive"] == len(np.unique(PATIENT[chosen & (LABELS == 1)]))


def test_gaps_of_base_members_and_ensemble_are_those_of_a_loop_over_base_seeds(cells, found):
    sex = ATTRIBUTES["sex"]

    def gap(decisions: np.ndarray) -> float:
        right = decisions == LABELS
        return abs(right[sex == 0].mean() - right[sex == 1].mean())

    for mark in ("", FROZEN):
        base, members, ensemble = [], [], []
        for seed in SEEDS:
            (test,), (val,) = cells["laplace"][seed].on_test, cells["laplace"][seed].on_val
            t = frozen_threshold(val) if mark else 0.5
            assert found["thresholds"]["seeds"][str(seed)] == pytest.approx([frozen_threshold(val)], rel=1e-5)
            of = [at_threshold(p, t, 1).argmax(-1) for p in (test.base, test.ensemble, *test.probabilities)]
            base.append(gap(of[0]))
            ensemble.append(gap(of[1]))
            members.append(np.mean([gap(d) for d in of[2:]]))
        row = found["sets"][f"accuracy_gap{mark}"]["sex"]["laplace"]
        of_base = found["base"][f"accuracy_gap{mark}"]["sex"]
        assert of_base["value"] == pytest.approx(np.mean(base), rel=1e-5)
        assert list(of_base["seeds"].values()) == pytest.approx(base, rel=1e-5)
        assert row["members"]["value"] == pytest.approx(np.mean(members), rel=1e-5)
        assert row["ensemble"]["value"] == pytest.approx(np.mean(ensemble), rel=1e-5)
        for part in (row["members"], row["ensemble"], of_base):
            assert part["low_end"] <= part["value"] <= part["high_end"]
    of_base = found["base"]["accuracy_gap"]["sex"]
    assert of_base["value"] > of_base["chance"] and of_base["p"] < 0.05
    for code in (0, 1):
        rights = [(c.on_test[0].base_decisions == LABELS)[sex == code].mean() for c in cells["laplace"].values()]
        rate = of_base["rates"][str(code)]
        assert rate["value"] == pytest.approx(np.mean(rights), rel=1e-5)
        assert rate["low_end"] < rate["value"] < rate["high_end"] <= 1


def test_the_interval_over_base_seeds_is_wider_than_the_patients_alone_make_it(cells, found):
    """sd^2 = var over draws of the mean + s^2/B; compared with the loop, with normal quantiles as the lower bound."""
    draws, values = [], []
    for seed in SEEDS:
        (test,) = cells["identical"][seed].on_test
        gaps = METRICS.get("accuracy_gap")(test, test.base[None])["#sex"]
        draws.append(gaps.draws[:, 0])
        values.append(gaps.values[0])
    sd = np.sqrt(np.mean(draws, axis=0).var() + np.var(values, ddof=1) / len(values))
    row = found["base"]["accuracy_gap"]["sex"]
    assert row["high_end"] - row["value"] > 1.96 * sd > 1.96 * np.mean(draws, axis=0).std()
    assert row["high_end"] - row["value"] < 2.78 * sd, "t with B - 1 degrees of freedom"


def test_controls_are_at_their_null_and_a_planted_group_bears_the_arbitrariness(cells, found):
    for metric, attributes in found["sets"].items():
        for attribute, rows in attributes.items():
            row, base = rows["identical"], found["base"][metric][attribute]
            if base["value"] is None:
                assert row["reason"] == base["reason"] != ""
                continue
            assert row["members"]["value"] == row["ensemble"]["value"] == base["value"]
            for name in ("range", "range_at_k"):
                assert (row[name]["value"], row[name]["null"], row[name]["p"]) == (0, 0, 1)
    for attributes in found["burdens"].values():
        for rows in attributes.values():
            assert (rows["identical"]["gap"], rows["identical"]["p"]) == (0, 1)
            assert (rows["identical"]["low_end"], rows["identical"]["high_end"]) == (0, 0)
    burden = found["burdens"]["disagreement"]["sex"]["laplace"]
    cases = [c.on_test[0] for c in cells["laplace"].values()]
    each = np.mean([disagreement(votes(c.decisions, 2)) for c in cases], axis=0)
    assert burden["gap"] == pytest.approx(each[ATTRIBUTES["sex"] == 1].mean(), rel=1e-5), "women: nothing"
    assert (burden["most"], burden["least"]) == (1, 0) and burden["adjusted"] < 0.05 and burden["low_end"] > 0
    assert found["burdens"]["disagreement"]["site"]["laplace"]["adjusted"] > 0.05
    assert set(found["burdens"]["disagreement"]["site"]["laplace"]["groups"]) == {"0", "1"}


def test_only_decisions_change_with_the_threshold(found):
    assert {m for m in found["sets"] if m.endswith(FROZEN)} == {m + FROZEN for m in METRIC_ORDER[:7]}
    assert set(METRIC_ORDER) <= set(found["sets"])


def test_a_suite_without_attributes_has_no_fairness_and_cannot_intersect_any():
    def bare(view: str) -> Predictions:
        members, base = (a.astype(np.float32) for a in logits_of("laplace", view, 0))
        return Predictions(members, base, LABELS, "binary", view, 1)

    alone = {"laplace": {0: Evidence({}, bare("val"), bare("test"), SETTINGS)}}
    assert fairness(alone, K, [], {}) == {} and fairness({}, K, ["sex*view"], {}) == {}
    with pytest.raises(UserError, match=r"intersection 'sex\*view': no attribute 'sex'"):
        fairness(alone, K, ["sex*view"], {})


def multi_label(members: int, sites: int = 2) -> Cells:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=(PATIENTS, 3))
    base = rng.normal(size=(PATIENTS, 3)) + 2 * labels - 1
    logits = base + 0.3 * rng.normal(size=(members, PATIENTS, 3))
    views = [
        Predictions(a.astype(np.float32), base.astype(np.float32), labels, "multilabel", v, attributes=s)
        for a, v, s in ((logits, view, {"site": np.arange(PATIENTS) % sites}) for view in ("val", "test"))
    ]
    return {"laplace": {0: Evidence({}, *views, SETTINGS)}}


def test_gaps_of_a_multi_label_task_are_means_over_labels(suite):
    cells = multi_label(8)
    found = as_read(fairness(cells, K, [], {}))
    gaps = []
    for context in cells["laplace"][0].on_test:
        right = context.base_decisions == context.labels
        gaps.append(abs(right[::2].mean() - right[1::2].mean()))
    assert found["base"]["accuracy_gap"]["site"]["value"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert len(found["thresholds"]["seeds"]["0"]) == 3
    assert found["groups"]["site"]["test"]["0"]["positive"] is None
    assert "8 of 10 accepted" in found["burdens"]["abstention"]["site"]["laplace"]["reason"]
    assert "Undefined, 8 of 10 accepted: `laplace`." in render_fairness([(suite, {"k": K, "fairness": found})])


def test_a_suite_of_too_few_patients_says_so_in_place_of_tables(suite):
    found = as_read(fairness(multi_label(12, sites=6), K, [], {}))
    page = " ".join(render_fairness([(suite, {"k": K, "fairness": found})]).split())
    assert "Undefined, label 0: 0 of 6 groups of 'site' have 25 patients, two are needed: accuracy" in page
    assert "Undefined, 0 of 6 groups have 25 patients, two are needed: site." in page
    assert "(site: 0)" in page and "gap in" not in page and "generator" not in page
    needed = "site: 0 of 6 groups have 25 patients; about 150 test patients, mixed as these 120, would make two."
    assert needed in page and "fewer than the 25 test patients that a group needs" in page


def test_a_suite_of_53_patients_that_declares_20_counts_what_25_leaves_out(suite):
    """Sex 22 and 31 patients, view 15 and 38, one scanner; the page of 25 says how many patients would do."""
    patients = np.arange(53)
    attributes = {"sex": patients >= 22, "view": patients >= 15, "scanner": np.zeros(53)}

    def on(view: str) -> Predictions:
        members, base = (a[..., : len(patients), :].astype(np.float32) for a in logits_of("retrain", view, 0))
        codes = {name: a.astype(np.int64) for name, a in attributes.items()}
        return Predictions(members, base, LABELS[:53], "binary", view, 1, patients, attributes=codes)

    said = {}
    for least in (25, 20):
        cells = {"retrain": {0: Evidence({}, on("val"), on("test"), SETTINGS, least)}}
        found = as_read(fairness(cells, K, [], {}))
        declared = replace(suite, min_patients=least)
        page = " ".join(render_fairness([(declared, {"k": K, "fairness": found})]).split())
        referred = abstention(cells["retrain"][0].on_test).groups.keys()
        said[least] = found, page, referred
        assert f"fewer than the {least} test patients that a group needs" in page
        assert f"scanner: 1 of 1 groups has {least} patients. " in page
        assert f"Undefined, 1 of 2 groups of 'view' have {least} patients, two are needed: accuracy" in page
    found, page, referred = said[25]
    assert found["base"]["accuracy_gap"]["sex"]["value"] is None and referred == {"sex=1", "view=1", "scanner=0"}
    assert "sex: 1 of 2 groups has 25 patients; about 61 test patients, mixed as these 53, would make two." in page
    found, page, referred = said[20]
    assert found["base"]["accuracy_gap"]["sex"]["rates"].keys() == {"0", "1"} and "sex=0" in referred
    assert found["burdens"]["disagreement"]["sex"]["retrain"]["groups"].keys() == {"0", "1"}
    assert [found["groups"][a]["test"]["0"]["counts"] for a in ("sex", "view")] == [True, False]
    assert "view: 1 of 2 groups has 20 patients; about 71 test patients, mixed as these 53, would make two." in page
    assert "sex: 1 of 2" not in page and "(sex: 0)" not in page and "(view: 0)" in page


def test_evidence_of_a_table_counts_groups_as_its_suite_declares(make_record, tmp_path):
    arrays = predictions_arrays(cell("retrain", 0).val, cell("retrain", 0).test)

    def with_predictions(record):
        record["predictions"] = {
            "file": "a.npz",
            "digest": save_predictions(tmp_path / "predictions/toy/a.npz", arrays),
        }

    record = make_record("retrain", 0, with_predictions)
    for least in (25, 20):
        table = settle(replace(suite_of([record], "toy", "Toy board"), min_patients=least), [record])
        (found,) = (own for row in evidence(table, tmp_path).values() for own in row.values())
        assert found.min_patients == found.on_val[0].min_patients == found.on_test[0].min_patients == least


def test_a_metric_of_a_plugin_is_computed_and_shown(cells, suite):
    @register_metric("toy_gap", direction="lower", level="group", unit="share", citation="a test")
    def toy_gap(context, probabilities):
        """Half the gap in accuracy."""
        return by_suffix(accuracies(context, probabilities), lambda rates: spread(rates) / 2)

    try:
        found = as_read(fairness({"laplace": cells["laplace"]}, K, [], NAMES))
    finally:
        del METRICS._objects["toy_gap"], METRICS._origins["toy_gap"]
    half = found["base"]["toy_gap"]["sex"]["value"]
    assert half == pytest.approx(found["base"]["accuracy_gap"]["sex"]["value"] / 2, rel=1e-5)
    assert "**toy_gap, members**" in render_fairness([(suite, {"k": K, "fairness": found})])


def test_the_page_says_what_was_found(found, suite):
    page = render_fairness([(suite, {"k": K}), (suite, {"k": K, "fairness": found})])
    assert page.count("## Toy board") == 1, "a suite without fairness is left out"
    assert "| (site: 2)" in page and "site 10 (20) on val and 10 (20) on test." in " ".join(page.split())
    row = found["base"]["accuracy_gap"]["sex"]
    assert f"**{row['value']:.3f}** [{row['low_end']:.3f},{row['high_end']:.3f}] M → F" in page
    burden = found["burdens"]["disagreement"]["sex"]["laplace"]
    assert f"**{burden['gap']:+.3f}** [{burden['low_end']:+.3f},{burden['high_end']:+.3f}] F → M, p <0.001" in page
    assert re.search(r"\| `swag` +\| +0\.\d{3} \[0\.\d{3},0\.\d{3}\] \(1\)", page)
    assert re.search(r"\| `identical` \(control\) +\| +0\.000 / 0\.000 \| ", page)
    low, high = min(found["thresholds"]["seeds"].values())[0], max(found["thresholds"]["seeds"].values())[0]
    assert f"({low:.3f} to {high:.3f})" in " ".join(page.split())


def test_the_page_is_readable_text_of_short_legends_and_depends_on_no_order(found, suite):
    page = render_fairness([(suite, {"k": K, "fairness": found})])
    assert all(len(line) <= 120 or line.startswith("|") for line in page.splitlines())
    assert "\n\n\n" not in page and page.count("<details>") == page.count("</details>") == 3
    assert "nan" not in page and "None" not in page and "sex*view" not in page
    backwards = json.loads(json.dumps(found), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert as_read(backwards) == found
    assert render_fairness([(suite, {"k": K, "fairness": as_read(backwards)})]) == page
    legends = re.findall(r"\|\n\n((?!\*\*|[#<|])[^|]+?)\n\n", page)
    assert len(legends) > 8 and all(1 <= len(re.findall(r"[.!?](?=\s|$)", text)) <= 3 for text in legends)
