"""What is computed of views and evidence: values against their definitions, and what is missing by name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from multiplicity_bench.leaderboard import science
from multiplicity_bench.leaderboard.desiderata import desiderata, headline
from multiplicity_bench.leaderboard.science import Both, Evidence, plain_values, selections
from multiplicity_bench.leaderboard.sights import sight, sights
from multiplicity_bench.leaderboard.view_files import ViewFile
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.decisions import disagreement, votes
from multiplicity_bench.metrics.views import shown_cases
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

SETTINGS = Settings(epsilon=10.0, k=2, draws=60)
CASES, MEMBERS, TAKEN = 60, 6, 4
PATIENT = np.arange(CASES) // 2


def part(view: str, seed: int, spread: float) -> Predictions:
    """A part of 60 cases: members scatter about a base that is mostly right."""
    cases = np.random.default_rng([7, len(view)])
    labels = cases.integers(0, 2, CASES)
    margin = np.where(labels == 1, 1.0, -1.0) + cases.normal(size=CASES)
    noise = np.random.default_rng([seed, len(view)]).normal(size=(MEMBERS, CASES)) * spread
    base = np.stack([-margin, margin], axis=1) / 2
    logits = np.stack([-margin - noise, margin + noise], axis=2) / 2
    return Predictions(logits, base, labels, "binary", view, 1, PATIENT, np.arange(CASES), failed=(5,))


def shifted(own: Predictions, name: str, seed: int, by: float) -> Predictions:
    """The first members on a view on which every network is `by` less sure of the truth, each differently."""
    rng = np.random.default_rng([seed, len(name)])
    toward = np.where(own.labels == 1, -1.0, 1.0) * by
    change = np.stack([-toward, toward], axis=1) * (1 + 0.5 * rng.random((TAKEN, 1, 1)))
    failed = tuple(m for m in own.failed if m < TAKEN)
    return replace(own, logits=own.logits[:TAKEN] + change, base=own.base + change[0], view=name, failed=failed)


def cell(seed: int, spread: float = 0.6) -> Evidence:
    val, test = part("val", seed, spread), part("test", seed, spread)
    views, evidence = {}, {}
    for own in (val, test):
        for name, by in (("jpeg-2", 0.2), ("jpeg-4", 0.5), ("pgd-2", 0.6)):
            views[f"{own.view}/{name}"] = shifted(own, f"{own.view}/{name}", seed, by)
        rng = np.random.default_rng([seed, 3])
        outside = rng.normal(size=(TAKEN, 30, 2)) * 0.3
        views[f"{own.view}/ood-noise"] = replace(
            own, logits=outside, base=outside[0], labels=np.full(30, -1), patient=None, view=f"{own.view}/ood-noise",
            failed=(),
        )  # fmt: skip
        evidence[own.view] = {"detector/knn": rng.normal(size=(TAKEN + 1, CASES))}
        evidence[f"{own.view}/ood-noise"] = {"detector/knn": rng.normal(1.5, 1, size=(TAKEN + 1, 30))}
    evidence["test"]["transfer/pgd-2"] = rng.random((TAKEN + 1, CASES))
    record = {"views": {"notes": ["noise is noise"]}}
    return Evidence(record, val, test, SETTINGS, 25, ViewFile(views, evidence))


@pytest.fixture(scope="module")
def cells():
    found = {row: {seed: cell(seed, spread) for seed in (0, 1)} for row, spread in (("swag", 0.6), ("identical", 0.0))}
    found["retrain"] = {0: replace(cell(0), views=None)}
    return found


@pytest.fixture(scope="module")
def found(cells):
    def choose(seen, names, wanted):
        both = {label: {seed: Both(s.val, s.test) for seed, s in row.items()} for label, row in seen.items()}
        return selections(both, 2, 10.0, 0.01, names, wanted)

    return json.loads(science.to_text(plain_values(desiderata(sights(cells), 2, choose))))


def test_where_views_show_some_cases_everything_is_of_these(cells):
    whole = cells["swag"][0]
    rows = {name: shown_cases(name, CASES, 25) for name in ("val", "test")}
    seen = ViewFile(
        {n: p.take(rows[n.partition("/")[0]]) for n, p in whole.views.predictions.items() if "noise" not in n},
        {"test": {n: values[:, rows["test"]] for n, values in whole.views.evidence["test"].items()}},
    )
    some = sight(replace(whole, record={"views": {"cases": 25}}), seen)
    (test,), (all_of_it,) = some.test, sight(whole, whole.views).test
    assert np.array_equal(some.members, sight(whole, whole.views).members), "accepted by the whole of val"
    assert np.array_equal(test.probabilities, all_of_it.probabilities[:, rows["test"]])
    assert np.array_equal(test.labels, all_of_it.labels[rows["test"]])
    assert test.bootstrap.patients == len(np.unique(PATIENT[rows["test"]])) < all_of_it.bootstrap.patients
    assert test.views["jpeg-2"].probabilities.shape == test.probabilities.shape
    assert test.evidence["detector/knn"].members.shape == (len(some.members), 25)


def test_views_are_of_the_accepted_members_that_they_take_and_share_the_parts_patients(cells):
    seen = sight(cells["swag"][0], cells["swag"][0].views)
    (test,) = seen.test
    assert seen.members.tolist() == [0, 1, 2, 3] and test.size == 4
    assert test.views["pgd-2"].size == 4 and test.evidence["detector/knn"].members.shape == (4, CASES)
    np.testing.assert_array_equal(test.views["pgd-2"].bootstrap.counts, test.bootstrap.counts)
    outside = test.views["ood-noise"]
    assert outside.bootstrap.patients == 30 and not outside.known.any()
    assert "retrain" not in sights(cells), "a cell without a file of views is not told of"


def test_accuracies_of_a_view_are_those_of_its_predictions_over_base_seeds(cells, found):
    told = found["axes"]["accuracy"]["jpeg-4"]
    shown = [c.views.predictions["test/jpeg-4"] for c in cells["swag"].values()]
    decided = [p.logits.argmax(axis=-1) for p in shown]
    right = [np.mean(d == p.labels) for d, p in zip(decided, shown)]
    assert told["members"]["swag"]["value"] == pytest.approx(np.mean(right), abs=1e-6)
    balanced = [np.mean([balanced_accuracy_score(p.labels, m) for m in d]) for d, p in zip(decided, shown)]
    assert told["balanced_error"]["swag"]["value"] == pytest.approx(1 - np.mean(balanced), abs=1e-6)
    pairs = np.mean([disagreement(votes(d, 2)).mean() for d in decided])
    assert told["disagreement"]["swag"]["value"] == pytest.approx(pairs, abs=1e-6)
    assert told["disagreement"]["identical"]["value"] > 0, "the views, not the networks, were made to differ"
    assert found["axes"]["accuracy"]["clean"]["disagreement"]["identical"]["value"] == 0
    low, high = (told["members"]["swag"][end] for end in ("low_end", "high_end"))
    assert low < told["members"]["swag"]["value"] < high and told["members"]["swag"]["seeds"] == 2
    assert told["variance_ratio"]["swag"] == {
        "value": None, "low_end": None, "high_end": None, "seeds": 0, "reason": "4 of 20 members"
    }  # fmt: skip


def test_properties_hold_the_base_the_members_and_a_range_beside_chance(cells, found):
    told = found["properties"]["corrupted_accuracy"]
    assert told["direction"] == "higher"
    row = told["rows"]["swag"]
    by_view = [
        [(c.views.predictions[f"test/jpeg-{s}"].logits.argmax(-1) == c.test.labels).mean(axis=1) for s in (2, 4)]
        for c in cells["swag"].values()
    ]
    of_members = [np.mean(views, axis=0) for views in by_view]
    assert row["members"]["value"] == pytest.approx(np.mean(of_members), abs=1e-6)
    pairs = [np.mean([abs(v[i] - v[j]) for i in range(4) for j in range(i)]) for v in of_members]
    assert row["range"] == pytest.approx(np.mean(pairs), abs=1e-6), "at k = 2 the mean difference of two members"
    assert row["chance"] > 0 and 0 < row["p"] <= 1 and row["seeds"] == 2
    detector = found["properties"]["ood_auroc/ood-noise:knn"]["rows"]["swag"]
    inside, outside = (
        [c.views.evidence[where]["detector/knn"] for c in cells["swag"].values()]
        for where in ("test", "test/ood-noise")
    )
    truth = np.repeat([0, 1], [CASES, 30])
    areas = [[roc_auc_score(truth, [*i, *o]) for i, o in zip(a[1:], b[1:])] for a, b in zip(inside, outside)]
    assert detector["members"]["value"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert set(found["properties"]) >= {"robust_accuracy/pgd-2", "transfer_accuracy/pgd-2", "aurc/jpeg-2"}


def test_verdicts_and_rungs_are_of_the_headlines_alone(found):
    assert set(found["verdicts"]) == {
        "corrupted_accuracy", "robust_accuracy/pgd-2", "ood_auroc/ood-noise:max_softmax", "adaptive_calibration_error",
    }  # fmt: skip
    assert all(headline(key) for key in found["verdicts"])
    assert found["verdicts"]["corrupted_accuracy"]["swag"]["verdict"]
    assert found["ladder"]["rungs"][:2] == ["drawn", "loss within epsilon"]
    assert found["ladder"]["rows"]["swag"]["members"][0] == 4.0
    ranges = found["ladder"]["rows"]["swag"]["corrupted_accuracy"]
    assert ranges[0] == pytest.approx(found["properties"]["corrupted_accuracy"]["rows"]["swag"]["range"], abs=1e-6)


def test_errors_without_labels_stand_beside_the_truth(cells, found):
    told = found["axes"]["unlabelled"]["pgd-2"]
    wrong = [np.mean(p.logits.argmax(-1) != p.labels) for c in cells["swag"].values()
             for p in [c.views.predictions["test/pgd-2"]]]  # fmt: skip
    assert told["error"]["swag"]["value"] == pytest.approx(np.mean(wrong), abs=1e-6)
    assert told["gde"]["swag"]["value"] == found["axes"]["accuracy"]["pgd-2"]["disagreement"]["swag"]["value"]


def test_there_is_nothing_without_views():
    assert desiderata({}, 2, lambda *_: {}) == {}
