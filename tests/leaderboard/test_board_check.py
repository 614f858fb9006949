"""The checked board: whatever is altered by hand is found and named; predictions give back the scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard import cli
from multiplicity_bench.leaderboard.cells import settle_all
from multiplicity_bench.leaderboard.check import check, problems, verify
from multiplicity_bench.leaderboard.groups import Groups, to_text
from multiplicity_bench.leaderboard.predictions import (
    arrays_predictions,
    load_predictions,
    predictions_arrays,
    predictions_digest,
    save_predictions,
)
from multiplicity_bench.leaderboard.record import SECTIONS, seal, write
from multiplicity_bench.leaderboard.render import render, render_csv
from multiplicity_bench.leaderboard.science_files import build_science
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.evaluation import catalogue, evaluate


@pytest.fixture
def board(tmp_path, suite, made_board):
    """A complete board of three records with predictions, in a folder of its own."""
    shutil.copytree(made_board(tmp_path, suite), tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def made_board(tmp_path_factory, make_records):
    """Return `made_board(folder, suite)`: the folder with the board of the suite, which is made once."""
    made = tmp_path_factory.mktemp("board")

    def make(folder: Path, suite) -> Path:
        if not (made / "SCIENCE.md").exists():
            shutil.copytree(folder / "suites", made / "suites")
            for record in make_records(suite):
                if record["row"] in ("identical", "swag", "retrain") and record["identity"]["base_seed"] == 0:
                    arrays = predictions_arrays(*toy_predictions(1 if record["row"] == "swag" else 2))
                    path = made / "predictions" / "toy" / f"{record['name']}.npz"
                    record["predictions"] = {"file": path.name, "digest": save_predictions(path, arrays)}
                    write(seal(record), made / "records")
            build(made, suite)
        return made

    return make


def build(folder, suite):
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    (folder / "LEADERBOARD.md").write_text(render(records, [suite]), encoding="utf-8")
    (folder / "leaderboard.csv").write_text(render_csv(records, [suite]), encoding="utf-8")
    build_science(folder, settle_all([suite], records), Path.write_text)


def grouped(folder: Path, name: str) -> None:
    """Write the groups of a suite's cases, of data that are not the board's."""
    (folder / "groups").mkdir()
    made = Groups(suite=name, dataset="0" * 64, declared={"strata": [], "truths": []})
    (folder / "groups" / f"{name}.json").write_text(to_text(made), encoding="utf-8")


def toy_predictions(seed: int) -> tuple[Predictions, Predictions]:
    """Return random members of the same cases whatever the seed, rounded as a run rounds what it scores."""

    def view(name: str, n: int) -> Predictions:
        cases, rng = np.random.default_rng(n), np.random.default_rng([seed, n])
        base = cases.normal(size=(n, 2)).astype(np.float32)
        labels = (base[:, 1] + cases.normal(size=n) > base[:, 0]).astype(np.int64)
        patient, sex = cases.integers(0, n // 2, n), cases.integers(0, 2, n)
        logits = (base + 0.3 * rng.normal(size=(6, n, 2))).astype(np.float32)
        return Predictions(logits, base, labels, "binary", name, 1, patient, np.arange(n), {"sex": sex})

    return arrays_predictions(predictions_arrays(view("val", 30), view("test", 40)), "binary", 1)


def one_record(folder, name: str):
    return next((folder / "records").glob(f"*-{name}-*.json"))


def test_an_untouched_board_is_in_order(board):
    assert check(board) == "in order: 3 records, 3 predictions files, board of toy"


@pytest.mark.parametrize("section", [*SECTIONS, "protocol"])
def test_an_edit_is_found_and_named_by_record_and_section(board, section):
    path = one_record(board, "swag")
    record = json.loads(path.read_text())
    edits = {
        "identity": lambda r: r["identity"].update(base_seed=1),
        "scores": lambda r: r["scores"]["vpr@5"].update(value=0.5),
        "protocol": lambda r: r["protocol"].update(epsilon=0.06),
        "set": lambda r: r["set"]["accepted"].append(19),
        "data": lambda r: r["data"].update(licence="none"),
        "cost": lambda r: r["cost"].update(fixed_cost_s=0.1),
        "provenance": lambda r: r["provenance"].update(dirty=True),
        "predictions": lambda r: r["predictions"].update(digest="0" * 64),
    }
    edits[section](record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        check(board)
    named = "scores" if section == "protocol" else section
    assert str(path) in str(error.value) and f"section '{named}'" in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("row", "swag[rank=3]"), ("status", "failed"), ("reason", "because")])
def test_an_edited_row_status_or_reason_is_found(board, field, value):
    path = one_record(board, "swag")
    record = json.loads(path.read_text())
    record[field] = value
    path.write_text(json.dumps(record))
    assert f"{path}: section 'outcome' was edited" in next(problems(board))


def test_an_edited_board_is_found_and_its_line_named(board):
    path = board / "LEADERBOARD.md"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[11] += " "
    path.write_text("\n".join(lines), encoding="utf-8")
    (problem,) = problems(board)
    assert problem.startswith(f"{path}: line 12 is not what the records say")
    path.unlink()
    (board / "leaderboard.csv").write_text("")
    first, second = problems(board)
    assert "LEADERBOARD.md: is missing" in first and "leaderboard.csv: line 1" in second


def test_a_removed_or_renamed_record_is_found(board):
    path = one_record(board, "swag")
    path.rename(path.with_stem(path.stem + "-copy"))
    assert "key or file name does not follow" in next(problems(board))
    path.with_stem(path.stem + "-copy").unlink()
    found = list(problems(board))
    assert any("belongs to no record" in problem for problem in found)
    assert any("LEADERBOARD.md: line" in problem for problem in found)


@pytest.mark.parametrize("name", ["notes.txt", "broken.json", ".half.tmp"])
def test_the_folder_of_records_holds_nothing_else(board, name):
    (board / "records" / name).write_text("{")
    (problem,) = problems(board)
    assert name in problem


def test_a_record_of_no_cell_and_an_invalid_suite_are_found(board, make_record):
    write(make_record("swag[rank=3]", 0), board / "records")
    assert "is in no row and base seed of a board suite" in next(problems(board))
    (board / "suites" / "other.yaml").write_text("title: 1\n")
    assert any("other.yaml: key 'dataset' is missing" in problem for problem in problems(board))


def test_altered_missing_and_foreign_predictions_are_found(board):
    (path,) = (board / "predictions" / "toy").glob("*-swag-*.npz")
    val, test = load_predictions(path, "binary", 1)
    test.logits[0, 0, 0] -= 1
    save_predictions(path, predictions_arrays(val, test))
    (problem,) = problems(board)
    assert "section 'predictions'" in problem and path.stem in problem
    path.write_bytes(path.read_bytes()[:1000])
    assert "is no predictions file" in next(problems(board))
    path.unlink()
    assert "is missing" in next(problems(board))


def test_a_control_off_its_null_values_fails_the_check(board, suite, make_record):
    one_record(board, "identical").unlink()
    for path in (board / "predictions" / "toy").glob("*-identical-*"):
        path.unlink()
    record = make_record("identical", 0, lambda r: r["scores"]["ambiguity"].update(value=1e-12))
    write(record, board / "records")
    build(board, suite)
    assert any("the control is not at its null values (ambiguity = 1e-12)" in problem for problem in problems(board))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "science" / "toy.json").unlink(), "science/toy.json: is missing: run `leaderboard build`"),
        (lambda f: (f / "science" / "toy.json").write_text("{"), "science/toy.json: is no JSON"),
        (lambda f: edit(f / "science" / "toy.json", '"k": 5', '"k": 6'), "SCIENCE.md: is not what science/ says"),
        (lambda f: edit(f / "science" / "toy.json", '"inputs": "', '"inputs": "0'), "was computed from other records"),
        (lambda f: edit(f / "SCIENCE.md", "What", "Whatever"), "SCIENCE.md: is not what science/ says"),
        (lambda f: (f / "SCIENCE.md").unlink(), "SCIENCE.md: is not what science/ says"),
        (lambda f: (f / "figures" / "toy-cost.png").unlink(), "figures/toy-cost.png: is missing"),
        (lambda f: (f / "science" / "old.json").write_text("{}"), "science/old.json: belongs to no board suite"),
        (lambda f: edit(f / "science" / "toy.json", '"groups": "', '"groups": "0'), "was computed from other records"),
        (lambda f: edit(f / "FAIRNESS.md", "Who", "Whoever"), "FAIRNESS.md: is not what science/ says"),
        (lambda f: edit(f / "DESIDERATA.md", "What", "Whatever"), "DESIDERATA.md: is not what science/ says"),
        (lambda f: grouped(f, "old"), "groups/old.json: belongs to no board suite"),
        (lambda f: grouped(f, "toy"), "groups/toy.json: was made from other data: run `make groups`"),
    ],
)
def test_science_that_is_not_of_these_records_is_found_and_named(board, spoil, said):
    pytest.importorskip("matplotlib")
    spoil(board)
    (problem,) = problems(board)
    assert said in problem


def test_views_that_a_suite_declares_are_asked_of_every_record_of_its_table(board):
    edit(board / "suites" / "toy.yaml", "predictions: true", "predictions: true\nviews: [jpeg-3]")
    found = list(problems(board))
    assert len(found) == 3 and all("names no views, which suite toy commits" in problem for problem in found)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_folder_without_records_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no committed records"):
        check(tmp_path)


def test_predictions_come_back_as_they_were_and_equal_arrays_give_equal_bytes(tmp_path):
    val, test = toy_predictions(0)
    digest = save_predictions(tmp_path / "a.npz", predictions_arrays(val, test))
    loaded = load_predictions(tmp_path / "a.npz", "binary", 1)
    for one, other in zip((val, test), loaded):
        for name, value in vars(one).items():
            if name == "attributes":
                assert value.keys() == other.attributes.keys()
                value, found = value["sex"], other.attributes["sex"]
            else:
                found = getattr(other, name)
            np.testing.assert_array_equal(value, found)
    assert predictions_digest(predictions_arrays(*loaded)) == digest
    save_predictions(tmp_path / "b.npz", predictions_arrays(*loaded))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_pickled_objects_are_refused_and_absent_arrays_named(tmp_path):
    np.savez(tmp_path / "pickled.npz", val_logits=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="is no predictions file"):
        load_predictions(tmp_path / "pickled.npz", "binary")
    np.savez(tmp_path / "partial.npz", val_logits=np.zeros(3))
    with pytest.raises(UserError, match="no array 'val_base'"):
        load_predictions(tmp_path / "partial.npz", "binary")


@pytest.fixture
def scored(tmp_path, make_record):
    """A record whose scores are those of its predictions, and the folder of both."""
    val, test = toy_predictions(5)
    settings = Settings(epsilon=0.2, k=2, draws=50)
    evaluation = evaluate(val, test, settings)

    def change(record):
        record["protocol"] = asdict(settings) | {"metrics": {n: i.version for n, i in catalogue().items()}}
        record["scores"] = {key: asdict(score) for key, score in evaluation.scores.items()}
        record["set"] |= {"accepted": evaluation.accepted.tolist(), "drawn": 6}
        record["predictions"] = {"file": "swag.npz", "digest": predictions_digest(predictions_arrays(val, test))}

    path = write(make_record("swag", 0, change), tmp_path / "records")
    save_predictions(tmp_path / "predictions" / "toy" / "swag.npz", predictions_arrays(val, test))
    return path, tmp_path / "predictions"


def test_predictions_give_back_the_scores_of_their_record(scored):
    assert verify(*scored) == []


def test_an_altered_prediction_is_found_with_the_scores_it_moves(scored):
    record, folder = scored
    val, test = load_predictions(folder / "toy" / "swag.npz", "binary", 1)
    test.logits[:, 0] = test.logits[:, 0, ::-1]
    save_predictions(folder / "toy" / "swag.npz", predictions_arrays(val, test))
    differences = verify(record, folder)
    assert "digest differs" in differences[0]
    assert any(d.startswith("accuracy.member_mean: value recorded 0.") for d in differences)
    assert not any(d.startswith("accuracy.base") for d in differences)


def test_an_altered_score_that_was_sealed_again_is_found(scored, tmp_path):
    path, folder = scored
    record = json.loads(path.read_text())
    record["scores"]["vpr@2"]["value"] += 1e-5
    write(seal(record), tmp_path / "records")
    (difference,) = verify(path, folder)
    assert difference.startswith("vpr@2: value recorded")


def test_verify_says_when_there_is_nothing_to_verify_by(scored, tmp_path, make_record):
    path, folder = scored
    with pytest.raises(UserError, match=r"its predictions swag.npz are not in"):
        verify(path, tmp_path / "records")
    bare = write(make_record("retrain", 0), tmp_path / "records")
    with pytest.raises(UserError, match="has no predictions to verify it by"):
        verify(bare, folder)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_build_writes_board_and_csv_or_prints(board, suite_path, capsys, tmp_path):
    arguments = ["build", "--records", str(board / "records"), "--suite", str(suite_path)]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out == (board / "LEADERBOARD.md").read_text(encoding="utf-8")
    code, out, _ = run(capsys, *arguments, "--out", str(tmp_path / "mine.md"))
    assert code == 0 and out.startswith(f"{tmp_path / 'mine.md'} and mine.csv: 3 records, suites toy")
    assert (tmp_path / "mine.md").read_bytes() == (board / "LEADERBOARD.md").read_bytes()
    assert (tmp_path / "mine.csv").read_bytes() == (board / "leaderboard.csv").read_bytes()


def test_verify_runs_from_the_command_line(scored, capsys):
    path, _ = scored
    code, out, err = run(capsys, "verify", str(path))
    assert (code, err) == (0, "") and out == f"{path.stem}: every score follows from the predictions\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["build", "--records", "{tmp}/nowhere"], "no such folder of records"),
        (["build", "--records", "{tmp}/suites"], "holds no records"),
        (["build", "--records", "{tmp}/records", "--suite", "brestmnist"], "did you mean 'breastmnist'"),
        (["build", "--records", "{tmp}/records", "--suite", "{toy}", "--out", "{tmp}/no/x.md"], "cannot be written"),
        (["verify", "nothing"], "no record 'nothing'"),
        (["buidl"], "invalid choice: 'buidl'"),
        (["build", "--record"], "--record"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_with_exit_code_2(board, suite_path, capsys, argv, part):
    code, out, err = run(capsys, *[a.format(tmp=board, toy=suite_path) for a in argv])
    assert (code, out) == (2, "")
    assert part in err and err.count("\n") == 1
