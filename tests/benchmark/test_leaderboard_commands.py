"""`leaderboard export`, `verify` and `clean` on the results of real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.board import compare, spec_of
from multiplicity_bench.benchmark.load import load_model_set
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.generators.modelset import ModelSet
from multiplicity_bench.leaderboard import record as records
from multiplicity_bench.leaderboard.predictions import load_arrays, save_predictions
from safetensors.torch import load_file


def test_export_writes_exactly_the_members_weights(leaderboard, retrained, tmp_path):
    out = tmp_path / "deploy" / "member.safetensors"
    answer = leaderboard(
        "export", str(retrained.path), "member=2", "--out", str(out), "--artifacts", str(retrained.artifacts)
    )
    assert (answer.code, answer.out, answer.err) == (0, [str(out)], [])
    weights, loaded = load_file(out), load_model_set(retrained.path, retrained.artifacts)
    module = loaded.network.module(*loaded.network.init(0))
    module.load_state_dict(weights)
    images = torch.randint(0, 256, (7, 1, 28, 28)).to(torch.uint8)
    with torch.no_grad():
        np.testing.assert_allclose(module(images).numpy(), loaded.predict(images)[2], atol=1e-5)
    stored = ModelSet.load(retrained.artifacts / "set" / retrained.record["key"])
    assert all(torch.equal(weights[n], leaf[2]) for n, leaf in stored.params.items())  # type: ignore[attr-defined]
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_export_names_its_file_after_record_and_member(leaderboard, retrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = leaderboard("export", str(retrained.path), "member=0", "--artifacts", str(retrained.artifacts))
    assert answer.out == [f"{retrained.record['name']}-member0.safetensors"] == [p.name for p in tmp_path.iterdir()]


@pytest.mark.parametrize(
    "member, says", [("member=4", "members 0 to 3"), ("member=-1", "member=N"), ("2nd", "member=N")]
)
def test_export_of_a_member_that_is_not_there_is_one_line(member, says, leaderboard, retrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = leaderboard("export", str(retrained.path), member, "--artifacts", str(retrained.artifacts))
    assert answer.code == 2 and len(answer.err) == 1 and says in answer.err[0] and answer.out == []
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_set_whose_members_are_no_weight_vectors(leaderboard, noisy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = leaderboard("export", str(noisy.path), "member=0", "--artifacts", str(noisy.artifacts))
    assert answer.code == 2 and len(answer.err) == 1 and "no weight vectors (not deployable)" in answer.err[0]
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_place_that_cannot_be_written_is_one_line(leaderboard, retrained, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "member.safetensors")
    answer = leaderboard(
        "export", str(retrained.path), "member=0", "--out", out, "--artifacts", str(retrained.artifacts)
    )
    assert answer.code == 2 and len(answer.err) == 1 and str(tmp_path / "file") in answer.err[0]


@pytest.fixture
def copied(retrained, tmp_path: Path):
    """The finished run's record and predictions, to be edited."""
    for name in ("records", "predictions"):
        shutil.copytree(retrained.folder / name, tmp_path / name)
    return tmp_path / "records" / retrained.path.name


def test_verify_finds_every_score_in_the_predictions(leaderboard, copied):
    answer = leaderboard("verify", str(copied))
    assert answer.code == 0 and answer.out == [f"{copied.stem}: every score follows from the predictions"]


def test_verify_fails_when_the_predictions_were_edited(leaderboard, copied, tmp_path):
    file = next((tmp_path / "predictions" / "tiny").iterdir())
    arrays = load_arrays(file)
    arrays["test_logits"] = arrays["test_logits"][:, ::-1].copy()
    save_predictions(file, arrays)
    answer = leaderboard("verify", str(copied))
    assert answer.code == 2 and "digest differs" in answer.err[0]
    assert any("accuracy.member_mean: value recorded" in line for line in answer.err)


def test_verify_fails_when_the_record_was_edited(leaderboard, copied):
    record = json.loads(copied.read_text())
    record["scores"]["ambiguity"]["value"] = 0.0
    copied.write_text(json.dumps(record))
    answer = leaderboard("verify", str(copied))
    assert answer.code == 2 and len(answer.err) == 1 and "section 'scores' was edited" in answer.err[0]


def test_verify_rerun_reproduces_the_record_from_its_identity_alone(leaderboard, copied, tmp_path):
    answer = leaderboard("verify", str(copied), "--rerun")
    scores = len(json.loads(copied.read_text())["scores"])
    assert answer.code == 0 and answer.out == [f"{copied.stem}: run again, {scores} scores agree to 1e-06"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions", "records"], "the rerun leaves nothing"


def test_verify_rerun_tells_scores_that_a_forger_sealed_again(leaderboard, copied):
    record = json.loads(copied.read_text())
    record["scores"]["accuracy.base"]["value"] = 0.99
    records.write(records.seal(record), copied.parent)
    answer = leaderboard("verify", str(copied), "--rerun")
    assert answer.code == 2 and len(answer.err) == 1
    assert "1 scores differ when run again: accuracy.base 0.99 ->" in answer.err[0]


def test_a_record_holds_all_that_its_run_depends_on(retrained, make_spec):
    spec = spec_of(retrained.record, artifacts_dir=str(retrained.artifacts))
    run = Run(spec, Session())
    assert run.keys["set"] == retrained.record["key"] and run.keys == Run(make_spec(retrained.folder), Session()).keys
    assert spec.settings == make_spec(retrained.folder).settings


def test_scores_of_equal_predictions_compare_to_a_millionth_and_a_missing_one_differs():
    def record(digest="equal", **values):
        scores = {key: {"value": value} for key, value in values.items()}
        return {"scores": scores, "predictions": {"digest": digest}}

    assert compare(record(a=0.5, b=None), record(a=0.5 + 9e-7, b=None)) == []
    assert compare(record(a=0.5), record(a=0.500002)) == ["a 0.5 -> 0.500002"]
    assert compare(record(a=0.5, b=None), record(b=1.0)) == ["a 0.5 -> None", "b None -> 1.0"]
    assert compare(record(a=0.5), record("other", a=0.50009)) == []
    assert compare(record(a=0.5), record("other", a=0.50011)) == ["a 0.5 -> 0.50011"]


def test_verify_rerun_refuses_a_record_of_predictions_in_another_precision(leaderboard, copied):
    record = json.loads(copied.read_text())
    del record["protocol"]["predictions"]
    records.write(records.seal(record), copied.parent)
    assert leaderboard("verify", str(copied)).code == 0
    answer = leaderboard("verify", str(copied), "--rerun")
    assert answer.code == 2 and len(answer.err) == 1 and "are not of predictions in float16" in answer.err[0]


@pytest.fixture
def store_of_two(make_spec, tmp_path, run_to_end):
    """Two runs over one base; the record of the second is gone, and an unfinished artifact is left."""
    kept = run_to_end(make_spec(tmp_path, "generator=identical"))
    dropped = run_to_end(make_spec(tmp_path))
    dropped.path.unlink()
    other = run_to_end(make_spec(tmp_path, "generator=identical", "base_seed=9"))
    other.path.unlink()
    (tmp_path / "artifacts" / "set" / f".{'e' * 64}" / "checkpoints").mkdir(parents=True)
    return kept, dropped, other


def folders(root: Path) -> set[str]:
    return {f"{p.parent.name}/{p.name}" for p in (root / "artifacts").glob("*/*") if p.is_dir()}


def test_clean_shows_everything_and_touches_nothing_unless_told_to(leaderboard, store_of_two, tmp_path):
    before = folders(tmp_path)
    answer = leaderboard("clean", "--artifacts", f"{tmp_path}/artifacts", "--records", f"{tmp_path}/records")
    assert answer.code == 0 and folders(tmp_path) == before
    assert len(answer.out) == len(before) + 1 and sum(line.endswith(" not needed") for line in answer.out) == 6
    assert answer.out[-1].endswith("can be removed: leaderboard clean --remove")


def test_clean_removes_only_what_no_record_needs(leaderboard, store_of_two, tmp_path, make_spec):
    kept = store_of_two[0]
    answer = leaderboard(
        "clean", "--remove", "--artifacts", f"{tmp_path}/artifacts", "--records", f"{tmp_path}/records"
    )
    run = Run(make_spec(tmp_path, "generator=identical"), Session())
    assert answer.code == 0
    assert folders(tmp_path) == {f"{stage}/{key}" for stage, key in run.keys.items()}
    assert [there for _, _, there in run.plan()] == [True] * 3 and records.read(kept.path) == kept.record
    assert load_model_set(kept.path, tmp_path / "artifacts").model_set.size == 4


def test_clean_removes_nothing_when_the_folder_of_records_is_mistyped(leaderboard, store_of_two, tmp_path):
    before = folders(tmp_path)
    answer = leaderboard(
        "clean", "--remove", "--artifacts", f"{tmp_path}/artifacts", "--records", f"{tmp_path}/recrods"
    )
    assert answer.code == 2 and len(answer.err) == 1 and "recrods" in answer.err[0] and folders(tmp_path) == before


@pytest.mark.parametrize("argv", [("verify", "no-such-record"), ("export", "none.json", "member=0"), ("publish",), ()])
def test_a_mistake_is_one_line_and_exit_code_2(leaderboard, argv):
    answer = leaderboard(*argv)
    assert answer.code == 2 and len(answer.err) == 1 and answer.out == []
