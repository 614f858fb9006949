"""The multiplicity sheet and the case card: the record's own figures, hand-counted cases, and what cannot be shown."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard import cli
from multiplicity_bench.leaderboard.predictions import (
    arrays_predictions,
    load_predictions,
    predictions_arrays,
    save_predictions,
)
from multiplicity_bench.leaderboard.record import read, read_all, write
from multiplicity_bench.leaderboard.sheet import case_card, sheet
from multiplicity_bench.leaderboard.text import end, number
from multiplicity_bench.metrics.abstention import abstention
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.context import contexts, softmax
from multiplicity_bench.metrics.evaluation import catalogue, evaluate
from multiplicity_bench.metrics.intervals import PatientBootstrap
from scipy.stats import binomtest

FOLDER = Path(__file__).resolve().parents[2] / "leaderboard"
LOOSE = Settings(epsilon=10.0, draws=50)


def views(task: str = "binary", members: int = 24, seed: int = 0) -> tuple[Predictions, Predictions]:
    """Return predictions of 150 cases of 75 patients: 40 of sex 0, 30 of sex 1, 3 of sex 2 and 2 unknown."""
    rng = np.random.default_rng(seed)

    def view(name: str) -> Predictions:
        shape = (150, 2)
        labels = rng.integers(0, 2, shape if task == "multilabel" else 150)
        base = 1.5 * rng.normal(size=shape)
        base[:, 1] += 1.5 * (labels[:, 1] if task == "multilabel" else labels)
        logits = base + 0.6 * rng.normal(size=(members, *shape))
        labels[7] = -1
        sex = np.repeat([0, 1, 2, -1], [80, 60, 6, 4])
        patient, ids = 100 + np.arange(150) // 2, 1000 + np.arange(150)
        return Predictions(logits, base, labels, task, name, 1, patient, ids, {"sex": sex})

    return arrays_predictions(predictions_arrays(view("val"), view("test")), task, 1)


@pytest.fixture
def keep(tmp_path, make_record):
    """Return keep(val, test, settings, change=None): the path of a record that was scored from them, and the folder."""

    def make(val, test, settings=LOOSE, change=None):
        arrays = predictions_arrays(val, test)
        evaluation = evaluate(val, test, settings)
        drawn = len(test.logits)

        def fill(record):
            record["identity"]["members"] = drawn
            record["protocol"] = asdict(settings) | {"metrics": {n: i.version for n, i in catalogue().items()}}
            record["scores"] = {key: asdict(score) for key, score in evaluation.scores.items()}
            record["set"] |= {"accepted": evaluation.accepted.tolist(), "drawn": drawn, "epsilon_in_se": 3.0}
            record["data"]["task"] = test.task
            digest = save_predictions(tmp_path / "predictions" / "toy" / "swag.npz", arrays)
            record["predictions"] = {"file": "swag.npz", "digest": digest}
            if change:
                change(record)

        return write(make_record("swag", 0, fill), tmp_path / "records"), tmp_path / "predictions"

    return make


@pytest.fixture
def kept(keep):
    return keep(*views())


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def line(text: str, start: str) -> str:
    """Return the one line of a table, or the one item of a list, that starts so."""
    (found,) = [x for x in text.replace("\n  ", " ").split("\n") if x.lstrip("|- ").startswith(start)]
    return found


def shown(score: dict) -> str:
    """A recorded score as it stands on a sheet."""
    if score["value"] is None:
        return "–"
    ends = "" if score["low"] is None else f" [{end(score['low'], '')}, {end(score['high'], '')}]"
    return number(score["value"], "") + ends


def assert_shows_the_scores_of(text: str, record: dict) -> None:
    scores, k = record["scores"], record["protocol"]["k"]
    lines = {
        "loss (nll, nats) ": [scores[f"nll.{who}"] for who in ("base", "member_mean", "ensemble")],
        "accuracy ": [scores[f"accuracy.{who}"] for who in ("base", "member_mean", "ensemble")],
        "accepted ": [scores["acceptance_rate"]],
        "certified": [scores["acceptance_rate_certified"]],
        "possible": [scores["acceptance_rate_possible"]],
        "ambiguity: ": [scores["ambiguity"]],
        f"ambiguity@{k}: ": [scores[f"ambiguity@{k}"]],
        "disagreement: ": [scores["disagreement"]],
    }
    tables = "\n".join(x for x in text.split("\n") if x.startswith("|"))
    # "accuracy" also stands in "accuracy where it answers", a row that is of no recorded score
    tables = tables.replace("accuracy where it answers", "where it answers")
    for start, wanted in lines.items():
        cells = [cell.strip() for cell in line(tables, start).strip("|").split("|")]
        assert cells[-len(wanted) :] == [shown(score) for score in wanted], start


def test_a_sheet_shows_the_scores_of_the_record_and_where_they_come_from(kept):
    text, record = sheet(*kept), read(kept[0])
    assert_shows_the_scores_of(text, record)
    assert text.startswith("# Multiplicity sheet: `swag`\n")
    for title, value in {
        "identity key": record["key"],
        "predictions": record["predictions"]["digest"],
        "data": record["identity"]["dataset"]["digest"],
        "commit": record["provenance"]["commit"],
        "members drawn": "24",
        "epsilon": "10 above the base's loss, 3.0 standard errors of the paired loss difference on val",
        "base seed": "0",
    }.items():
        assert line(text, f"{title}: ") == f"- {title}: {value}"
    assert "24 of 24" in line(text, "accepted ")
    assert "It is about one trained network, base seed 0" in text and "over the test cases alone" in text
    assert "Epsilon is under" not in text and "synthetic: no patient was imaged" in text


def test_numbers_of_groups_are_counted_by_hand_and_small_groups_left_out(kept):
    text, record = sheet(*kept), read(kept[0])
    test = load_predictions(kept[1] / "toy" / "swag.npz", "binary", 1)[1]
    base, members = softmax(test.base), softmax(test.logits)
    flipped = (members.argmax(-1) != base.argmax(-1)).any(axis=0)
    right = [p.argmax(-1) == test.labels for p in (base, members.mean(axis=0))]
    for code, patients in ((0, 40), (1, 30)):
        group = test.attributes["sex"] == code
        known = group & (test.labels >= 0)
        cells = [cell.strip().split(" [")[0] for cell in line(text, f"sex={code}").strip("|").split("|")]
        wanted = [f"sex={code}", patients, flipped[group].mean(), *(r[known].mean() for r in right)]
        assert cells[:2] == [str(w) for w in wanted[:2]] and cells[2:5] == [number(w, "") for w in wanted[2:]]
        assert 0 < wanted[2] < 1
    assert "sex=2 " not in "".join(x for x in text.split("\n") if x.startswith("|"))
    assert "- Left out, under 25 patients: sex=2 (3)." in text
    assert "- In no group, cases whose attribute is unknown: sex (4)." in text
    # all cases together are what the record says, by the same formulas
    assert number(flipped.mean(), "") == number(record["scores"]["ambiguity"]["value"], "")


def test_abstention_on_a_sheet_is_that_of_the_accepted_members(keep):
    val, test = views(members=30)
    path, folder = keep(val, test, Settings(epsilon=0.06, draws=50))
    record = read(path)
    accepted = record["set"]["accepted"]
    assert 20 <= len(accepted) < 30
    scores = abstention(contexts(test, np.array(accepted), PatientBootstrap(150, test.patient, 50, 0), 0)).scores
    text = sheet(path, folder)
    for start, name in {
        "coverage: ": "coverage",
        "cases referred per 100": "referred",
        "accuracy where it answers": "accuracy",
        "two such ensembles": "inconsistency",
    }.items():
        assert line(text, start).strip("|").split("|")[-1].strip() == shown(asdict(scores[name])), name
    assert "(9 of 10 votes" in text.replace("\n", " ")


def test_a_tolerance_that_val_cannot_resolve_is_warned_of_once(keep):
    note = "epsilon 10 is 1.4 standard errors of the paired loss difference on val: under 2"

    def unresolved(record):
        record["set"] |= {"epsilon_in_se": 1.4, "notes": [note, "two members failed"], "failed": [3, 5]}

    text = sheet(*keep(*views(), change=unresolved))
    assert "1.4 standard errors" in line(text, "epsilon: ") and "**Epsilon is under 2 standard errors**" in text
    assert note not in text and "- two members failed." in text
    assert line(text, "members drawn: ").endswith("24, 2 of them failed")


def test_a_set_without_members_has_a_sheet_of_dashes_with_the_reason_and_no_card(keep, capsys):
    val, test = views()
    path, folder = keep(val, test, Settings(epsilon=-5.0, draws=20))
    text, record = sheet(path, folder), read(path)
    assert record["set"]["accepted"] == [] and "0 of 24" in line(text, "accepted ")
    assert_shows_the_scores_of(text, record)
    # performance, multiplicity, groups
    assert " ".join(text.split()).count("Undefined (0 of 24 drawn members accepted): ") == 3
    assert "Undefined (0 of 10 accepted): " in text and not re.search(r"\bnan\b", text)
    assert line(text, "coverage: ").strip("|").split("|")[-1].strip() == "–"
    code, out, err = run(capsys, "case", path, 1003)
    assert (code, out) == (2, "") and "none of its 24 members was accepted" in err


def test_a_task_without_attributes_and_patients_says_so(keep):
    bare = [replace(p, attributes={}, patient=None, ids=None) for p in views()]
    text = sheet(*keep(*bare))
    assert "nothing is known about groups" in text
    assert line(text, "patients: ").endswith("not known, every case counts as one")


def test_the_sheet_is_printed_or_written_whole(kept, capsys, tmp_path):
    path, folder = kept
    code, printed, _ = run(capsys, "sheet", path)  # predictions are found beside the records
    assert code == 0 and printed == sheet(path, folder)
    out = tmp_path / "sheet.md"
    assert run(capsys, "sheet", path, "--predictions", folder / "toy", "--out", out) == (0, f"{out}\n", "")
    assert out.read_text(encoding="utf-8") == printed
    absent = tmp_path / "nowhere" / "sheet.md"
    code, _, err = run(capsys, "sheet", path, "--out", absent)
    assert code == 2 and "cannot be written" in err and err.count("\n") == 1
    assert not absent.parent.exists() and not list(tmp_path.glob(".*"))


def test_a_card_says_what_the_members_decide_on_one_case(kept, capsys):
    path, folder = kept
    test = load_predictions(folder / "toy" / "swag.npz", "binary", 1)[1]
    base, members = softmax(test.base), softmax(test.logits)
    flips = (members.argmax(-1) != base.argmax(-1)[None]).sum(axis=0)
    names = ["malignant", "normal, benign"]
    assert {0, 1} <= set(flips) and flips.max() > 6
    for case in (int(np.flatnonzero(flips == 0)[0]), int(np.flatnonzero(flips == 1)[0]), int(flips.argmax()), 7):
        code, text, _ = run(capsys, "case", path, 1000 + case)
        decided = int(base[case].argmax())
        exact = binomtest(int(flips[case]), 24).proportion_ci(0.95, method="exact")
        scores = members[:, case, decided]
        assert code == 0
        label = "unknown" if case == 7 else names[test.labels[case]]
        assert line(text, "label: ") == f"- label: {label}"
        wanted = f"- the base decides: {names[decided]}, with probability {number(base[case, decided], '')}"
        assert line(text, "the base") == wanted
        assert line(text, "probability of").endswith(
            f"{number(scores.min(), '')} to {number(scores.max(), '')}, range {number(np.ptp(scores), '')}"
        )
        share = f"{number(flips[case] / 24, '')} [{end(exact.low, '')}, {end(exact.high, '')}]"
        assert line(text, "conflict: ") == f"- conflict: {flips[case]} of 24 members, {share}"
        votes = {decided: 24 - flips[case], 1 - decided: flips[case]}
        top = sorted((c for c in votes if votes[c]), key=lambda c: -votes[c])
        assert line(text, "votes: ") == "- votes: " + ", ".join(f"{names[c]} {votes[c]}" for c in top)
        answers = binomtest(int(max(votes.values())), 24).pvalue <= 0.05
        verdict = f"answers {names[top[0]]}" if answers else "abstains, refer this case"
        assert line(text, "selective ensemble: ") == f"- selective ensemble: {verdict}"
        assert f"id {1000 + case}, index {case} in test, patient {100 + case // 2} (2 images)" in text
        assert f"sex {test.attributes['sex'][case]}" in text


def test_a_patient_has_a_block_for_every_image(kept):
    text = case_card(*kept, "patient=103")
    blocks = [x for x in text.split("\n") if x.startswith("## ")]
    assert blocks == [f"## Image: id {1000 + i}, index {i} in test, patient 103 (2 images)" for i in (6, 7)]
    assert text.count("- votes: ") == 2
    assert "sex unknown" in case_card(*kept, "1149")


@pytest.mark.parametrize(
    ("absent", "case", "blocks", "forms"),
    [
        ((), "1005", 1, "give the id of a case (1000 to 1149), or patient=CODE (100 to 174)"),
        (("ids",), "105", 2, "give the code of a patient (100 to 174), or patient=CODE (100 to 174)"),
        (("patient",), "1005", 1, "give the id of a case (1000 to 1149)"),
        (("ids", "patient"), "5", 1, "give the index of a case in test (0 to 149)"),
    ],
)
def test_a_case_is_named_by_id_else_patient_else_index_and_others_are_refused(
    keep, capsys, absent, case, blocks, forms
):
    path, folder = keep(*(replace(p, **dict.fromkeys(absent)) for p in views()))
    assert case_card(path, folder, case).count("## Image") == blocks
    for unknown in ("99999999999999999999", "5.0", "patient=9", "member=5", "--", ""):
        with pytest.raises(UserError) as error:
            case_card(path, folder, unknown)
        assert str(error.value) == f"{unknown}: no such case: {forms}"
    code, out, err = run(capsys, "case", path, "999999")
    assert (code, out) == (2, "") and err == f"999999: no such case: {forms}\n"


def test_few_members_can_decide_no_vote(keep):
    path, folder = keep(*views(members=5))
    assert "abstains, 5 members are too few to decide any vote" in case_card(path, folder, "1000")


def test_every_label_of_a_multilabel_task_has_its_own_lines_on_a_card(keep):
    val, test = views("multilabel")
    path, folder = keep(val, test)
    text, record = sheet(path, folder), read(path)
    assert_shows_the_scores_of(text, record)
    assert shown(record["scores"]["ambiguity.any_label"]) in line(text, "patients with some label")
    card = case_card(path, folder, "1003")
    assert [x for x in card.split("\n") if x.startswith("### ")] == ["### malignant", "### normal, benign"]
    said = [x for x in card.split("\n") if x.startswith("- the base decides: ")]
    p = 1 / (1 + np.exp(-test.base[3].astype(float)))
    assert said == [
        f"- the base decides: {'present' if q > 0.5 else 'absent'}, with probability {number(max(q, 1 - q), '')}"
        for q in p
    ]


def test_what_cannot_be_shown_is_one_line(kept, keep, make_record, capsys, tmp_path):
    path, folder = kept
    bare = write(make_record("retrain", 0), tmp_path / "records")

    def skip(record):
        record |= {"status": "skipped", "reason": "needs a norm layer", "scores": {}}

    skipped = write(make_record("laplace", 0, skip), tmp_path / "records")
    for argument, said in (
        (bare, "has no predictions"),
        (skipped, "its run is skipped, without predictions (needs a norm layer)"),
        (tmp_path / "none.json", "no record"),
    ):
        for command in (["sheet", argument], ["case", argument, 1003]):
            code, out, err = run(capsys, *command)
            assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    code, _, err = run(capsys, "sheet", path, "--predictions", tmp_path / "records")
    assert code == 2 and "its predictions swag.npz are not in" in err
    save_predictions(folder / "toy" / "swag.npz", predictions_arrays(*views(seed=1)))
    code, _, err = run(capsys, "case", path, 1003)
    assert code == 2 and "digest differs" in err and err.count("\n") == 1


def test_a_change_of_the_predictions_that_was_not_recorded_is_never_shown(kept):
    path, folder = kept
    record = json.loads(path.read_text())
    record["scores"]["ambiguity"]["value"] = 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="was edited after the run"):
        sheet(path, folder)


@pytest.mark.parametrize("suite", ["phantom", "breastmnist"])
def test_committed_records_have_sheets_and_cards(suite, capsys):
    chosen = {}
    records = {r["predictions"]["file"]: r for r in read_all(FOLDER / "records")}
    for file in sorted(p.name for p in (FOLDER / "predictions" / suite).iterdir() if p.name in records):
        record = records[file]
        chosen.setdefault(bool(record["set"]["accepted"]), record)
    for some, record in chosen.items():
        code, text, _ = run(capsys, "sheet", record["name"])
        assert code == 0
        assert_shows_the_scores_of(text, record)
        code, card, err = run(capsys, "case", record["name"], 0)
        assert (code, bool(card)) == ((0, True) if some else (2, False)), err
    assert True in chosen
