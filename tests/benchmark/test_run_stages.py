"""A run from images to record: what the record holds, and that a failure anywhere changes nothing in the end."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import predict as predict_module
from multiplicity_bench.benchmark import stages as stages_module
from multiplicity_bench.benchmark import store as store_module
from multiplicity_bench.benchmark.sections import cost_section
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.benchmark.store import Store
from multiplicity_bench.generators.api import Generator, Problem
from multiplicity_bench.generators.modelset import ModelSet, StackedSet
from multiplicity_bench.identity import digest
from multiplicity_bench.leaderboard import record as records
from multiplicity_bench.leaderboard.check import verify
from multiplicity_bench.leaderboard.predictions import load_arrays


class Injected(Exception):
    """A failure of ours, in the middle of a run."""


def test_the_record_is_sealed_readable_and_holds_every_score(retrained):
    assert records.read(retrained.path) == json.loads(retrained.path.read_text()) == retrained.record
    assert retrained.record["status"] == "ok" and retrained.record["reason"] == ""
    scores = retrained.record["scores"]
    for name in ("accuracy", "balanced_accuracy", "auroc", "nll", "brier", "ece"):
        assert {f"{name}.base", f"{name}.member_mean", f"{name}.ensemble"} <= scores.keys()
    for name in ("ambiguity", "discrepancy", "vpr", "capacity"):
        assert {name, f"{name}@2"} <= scores.keys()
    for name in ("acceptance_rate", "acceptance_rate_certified", "acceptance_rate_possible"):
        assert {name, *(f"{name}#epsilon={e}" for e in (0.02, 0.05, 0.1))} <= scores.keys()
    assert {"conflict", "disagreement", "score_sd"} <= scores.keys()
    assert all(score["value"] is not None or score["reason"] for score in scores.values())
    cost = retrained.record["cost"]
    assert cost["marginal_cost_s"] > 0 and cost["bytes_per_member"] == 4 * (784 * 8 + 8 + 72 + 18)
    assert cost["marginal_cost_bt"] == pytest.approx(cost["marginal_cost_s"] / cost["base_training_s"])
    assert not cost["resumed"]


def test_the_records_file_is_named_by_what_was_run(retrained):
    key = retrained.record["key"]
    assert retrained.path.name == f"phantom_cxr-mlp-retrain-b0-{key[:12]}.json"
    assert [p.name for p in retrained.path.parent.iterdir()] == [retrained.path.name], "nothing but records"


def test_membership_in_the_record_is_decided_on_val_by_the_stored_losses(retrained):
    section, protocol = retrained.record["set"], retrained.record["protocol"]
    within = [k for k, loss in enumerate(section["val_loss"]) if loss <= section["val_loss_base"] + protocol["epsilon"]]
    assert section["accepted"] == within and len(section["val_loss"]) == section["drawn"] == 4
    arrays = load_arrays(retrained.folder / "predictions" / "tiny" / retrained.record["predictions"]["file"])
    labels = torch.from_numpy(arrays["val_labels"])
    members = torch.from_numpy(arrays["val_logits"]).double()
    losses = [torch.nn.functional.cross_entropy(member, labels) for member in members]
    assert section["val_loss"] == pytest.approx([float(loss) for loss in losses], abs=1e-6)


def test_the_committed_predictions_give_the_records_scores(retrained, noisy):
    for run in (retrained, noisy):
        assert verify(run.path, run.folder / "predictions") == []


def test_the_members_of_retrain_are_trainings_by_the_base_recipe(retrained, make_spec):
    from multiplicity_bench.benchmark.train import train
    from multiplicity_bench.identity import derive_seed

    run = Run(make_spec(retrained.folder), Session())
    model_set, seed = run.model_set(), derive_seed("generator", "retrain", 0, 0)
    explicit = train(run.network, run.part("train"), run.spec.training, derive_seed(seed, "retrain", 3))
    params, _ = model_set.member(3)
    assert all(torch.equal(params[n], explicit.params[n]) for n in explicit.params)


def test_no_host_name_and_no_path_stands_in_a_record(retrained, noisy):
    for run in (retrained, noisy):
        text = run.path.read_text()
        for secret in (str(run.folder), str(Path.home()), str(stages_module.__file__), os.getcwd()):
            assert secret not in text
        assert socket.gethostname() not in text or len(socket.gethostname()) < 5
        assert not re.search(r'"(/|[A-Z]:\\)', text)


@pytest.mark.parametrize("generator", ["identical", "logit_noise", "temperature", "retrain", "swag"])
def test_every_cheap_generator_ends_in_a_record_that_its_predictions_verify(
    generator, make_spec, tmp_path, retrained, run_to_end
):
    settings = ["generator.epochs=2"] if generator == "swag" else []
    run = run_to_end(make_spec(tmp_path, f"generator={generator}", *settings))
    assert run.record["status"] == "ok" and verify(run.path, tmp_path / "predictions") == []
    assert run.record["identity"]["dataset"] == retrained.record["identity"]["dataset"]
    if generator == "identical":
        nulls = ("ambiguity", "discrepancy", "conflict", "disagreement", "vpr", "capacity", "score_sd")
        assert [run.record["scores"][name]["value"] for name in nulls] == [0] * len(nulls)
        assert run.record["scores"]["acceptance_rate"]["value"] == 1


def test_a_failing_base_training_is_a_failed_record_with_its_reason(make_spec, tmp_path, run_to_end):
    diverging = ("training.optimizer=sgd", "training.lr=1e9", "training.epochs=5")
    run = run_to_end(make_spec(tmp_path, *diverging))
    assert run.record["status"] == "failed" and "is not finite" in run.record["reason"]
    assert run.record["scores"] == {} and records.read(run.path) == run.record
    assert (
        Store(tmp_path / "artifacts").find("base", Run(make_spec(tmp_path, *diverging), Session()).keys["base"]) is None
    )


def test_a_generator_that_cannot_run_is_a_skipped_record_with_its_reason(make_spec, tmp_path, run_to_end):
    run = run_to_end(make_spec(tmp_path, "generator=laplace"))
    assert run.record["status"] == "skipped" and "tune has 8 images" in run.record["reason"]
    assert records.read(run.path) == run.record


def test_a_multi_label_file_is_skipped_by_the_library_for_want_of_a_likelihood_and_not_by_our_own_engine(
    make_spec, tmp_path, run_to_end
):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 80), ("val", 20), ("test", 20)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (n, 3))
    np.savez(tmp_path / "own.npz", **arrays)
    # The tiny run's sizes are the phantom's: an npz has those of its file.
    from multiplicity_bench.benchmark.spec import create
    from multiplicity_bench.datasets.api import DATASETS

    reason = "laplace-torch has no multi-label likelihood for structure=diag: use engine=native"
    for engine, said in (("laplace_torch", ("skipped", reason)), ("auto", ("ok", ""))):
        spec = make_spec(tmp_path, "generator=laplace", f"generator.engine={engine}", "generator.prior_precision=100")
        spec.dataset, spec.names["dataset"] = create(DATASETS, {"name": "npz"}), "npz"
        spec.options.data_root = str(tmp_path / "own.npz")
        run = run_to_end(spec)
        assert (run.record["status"], run.record["reason"]) == said
        assert str(tmp_path) not in run.path.read_text()
    assert run.record["set"]["diagnostics"]["engine"] == "native"
    assert run.record["row"] == "laplace[prior_precision=100]"


# Every boundary at which a run can stop: (what is patched, which call of it fails).
BOUNDARIES = {
    "base: training": ("stages.train", 0),
    "base: weights are saved": ("stages.save_file", 0),
    "base: gradient norm": ("stages.gradient_norm", 0),
    "set: third member": ("stages.train", 3),
    "set: saved": ("ModelSet.save", 0),
    "predictions: strategy": ("stages.choose_strategy", 0),
    "predictions: base on val": ("stages.predict_block", 0),
    "predictions: members on test": ("stages.predict", 1),
    "store: base closed": ("store.os.replace", 0),
    "store: manifest of the set": ("store.checksums", 1),
    "scores": ("stages.evaluate", 0),
    "record: provenance": ("stages.provenance", 0),
    "record: predictions are committed": ("stages.save_predictions", 0),
    "record: written": ("stages.records.write", 0),
}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_that_failed_at_a_boundary_gives_an_equal_record_when_run_again(
    boundary, make_spec, tmp_path, monkeypatch, retrained, run_to_end, assert_equal_records
):
    name, failing = BOUNDARIES[boundary]
    target = "generators.modelset.ModelSet.save" if name == "ModelSet.save" else f"benchmark.{name}"
    owner_name, _, attribute = f"multiplicity_bench.{target}".rpartition(".")
    calls = []

    with monkeypatch.context() as patch:
        original = _resolve(owner_name, attribute)

        def fails(*arguments, **options):
            # Only the renaming of an artifact's own folder counts, not that of a checkpoint or a JSON file.
            if name == "store.os.replace" and not Path(arguments[0]).is_dir():
                return original(*arguments, **options)
            calls.append(0)
            if len(calls) == failing + 1:
                raise Injected(boundary)
            return original(*arguments, **options)

        patch.setattr(f"{owner_name}.{attribute}", fails)
        with pytest.raises(Injected):
            run_to_end(make_spec(tmp_path))
    left = list((tmp_path / "records").glob("*"))
    assert all(records.read(path)["status"] == "failed" for path in left)
    assert not list(tmp_path.rglob("*.tmp"))
    done = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "artifacts").glob("*/*/manifest.json") if p.parent.name[0] != "."
    }
    again = run_to_end(make_spec(tmp_path))
    assert_equal_records(again.record, retrained.record)
    assert again.record["predictions"]["digest"] == retrained.record["predictions"]["digest"]
    assert {p: p.stat().st_mtime_ns for p in done} == done, "a finished stage was computed again"
    assert verify(again.path, tmp_path / "predictions") == []
    assert len(list((tmp_path / "records").iterdir())) == 1


def _resolve(owner: str, attribute: str):
    import importlib

    parts = owner.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return getattr(found, attribute)
    raise AssertionError(owner)


def test_a_failure_of_ours_is_recorded_with_its_frames_and_raised(make_spec, tmp_path, monkeypatch):
    def fails(*_):
        raise Injected("by a test")

    monkeypatch.setattr(stages_module, "evaluate", fails)
    with pytest.raises(Injected):
        Run(make_spec(tmp_path), Session()).record()
    record = records.read(next((tmp_path / "records").iterdir()))
    assert (record["status"], record["reason"]) == ("failed", "Injected: by a test")
    frames = record["set"]["diagnostics"]["traceback"]
    assert frames[-1].endswith("in fails") and not any(frame.startswith("/") for frame in frames)


@dataclass
class Sharing(Generator):
    """A generator that asks for a shared part, and returns copies of the base."""

    which: int = 0
    times: ClassVar[list[int]] = []

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        def shared() -> dict[str, torch.Tensor]:
            self.times.append(self.which)
            time.sleep(0.05)
            return {"x": torch.arange(3.0)}

        assert torch.equal(problem.part("curvature", {"a": 1.0}, shared)["x"], torch.arange(3.0))
        return StackedSet(problem.members, problem.base.params, problem.base.buffers)


@dataclass
class Failing(Generator):
    """A generator that cannot make member 1 and gives it the base's weights."""

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        params = {
            n: leaf + 0.01 * torch.arange(float(problem.members)).sub(1).view(-1, *[1] * leaf.ndim)
            for n, leaf in problem.base.params.items()
        }
        return StackedSet(problem.members, {}, problem.base.buffers, params=params, failed=[1])


def test_a_failed_member_is_named_counted_and_never_accepted(make_spec, tmp_path, run_to_end):
    spec = make_spec(tmp_path, "epsilon=1000")
    spec.generator, spec.names["generator"] = Failing(), "failing"
    run = run_to_end(spec)
    section, scores = run.record["set"], run.record["scores"]
    assert (section["drawn"], section["failed"], section["accepted"]) == (4, [1], [0, 2, 3])
    assert "1 of 4 members failed and count as drawn: 1" in section["notes"]
    assert [loss is None for loss in section["val_loss"]] == [False, True, False, False]
    for name in ("acceptance_rate", "acceptance_rate_certified", "acceptance_rate_possible"):
        assert scores[name]["value"] == 3 / 4
    assert verify(run.path, tmp_path / "predictions") == []


def test_a_part_is_computed_once_for_all_generators_and_each_pays_for_it(make_spec, tmp_path, monkeypatch):
    def run(which: int) -> Run:
        spec = make_spec(tmp_path)
        spec.generator, spec.names["generator"] = Sharing(which), "sharing"
        return Run(spec, Session())

    first = run(0)
    first.base()
    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "save_file", lambda *_: (_ for _ in ()).throw(Injected()))
        with pytest.raises(Injected):
            first.model_set()
    first.model_set()
    assert Sharing.times == [0, 0], "a part whose saving failed is computed again"
    second = run(1)
    second.model_set()
    assert Sharing.times == [0, 0]
    costs = [r.store.about("set", r.keys["set"])["fixed_s"] for r in (first, second)]
    assert min(costs) >= 0.05
    assert len([p for p in (tmp_path / "artifacts" / "part").iterdir() if p.is_dir()]) == 1


def test_a_resumed_set_trains_only_the_members_that_are_missing(make_spec, tmp_path, monkeypatch, run_to_end):
    original, trained = stages_module.train, []

    def counted(*arguments, **options):
        if "name" in options:  # those without a name only time a base training
            trained.append(options["name"])
            if len(trained) == 4:
                raise Injected
        return original(*arguments, **options)

    monkeypatch.setattr(stages_module, "train", counted)
    with pytest.raises(Injected):
        run_to_end(make_spec(tmp_path))
    assert trained == ["training the base", "retraining 0", "retraining 1", "retraining 2"]
    del trained[:]
    trained.extend(["an earlier one"] * 4)
    run = run_to_end(make_spec(tmp_path))
    assert [name for name in trained[4:] if name] == ["retraining 2", "retraining 3"]
    assert run.record["cost"]["resumed"]


def test_a_resumed_prediction_goes_on_after_the_last_whole_block(
    make_spec, tmp_path, monkeypatch, retrained, run_to_end, assert_equal_records
):
    monkeypatch.setattr(predict_module, "BLOCK_BYTES", 1)  # one member per block
    original, saves = store_module.FileCheckpoint.save, []

    def save(self, name, tensors):
        original(self, name, tensors)
        saves.append(name)
        if saves.count("test done") == 2:
            raise Injected

    with monkeypatch.context() as patch:
        patch.setattr(store_module.FileCheckpoint, "save", save)
        with pytest.raises(Injected):
            run_to_end(make_spec(tmp_path))
    predicted = []
    loop = predict_module._loop
    monkeypatch.setattr(predict_module, "_loop", lambda n, b, i: predicted.append(b.start) or loop(n, b, i))
    vmap = predict_module._vmap
    monkeypatch.setattr(predict_module, "_vmap", lambda n, b, i: predicted.append(b.start) or vmap(n, b, i))
    run = run_to_end(make_spec(tmp_path))
    assert predicted == [2, 3], "val was done, and two of four members of test"
    assert_equal_records(run.record, retrained.record)


@pytest.mark.parametrize("damage", ["base", "set", "predictions"])
def test_a_corrupted_artifact_is_computed_again_to_an_equal_record(
    damage, make_spec, tmp_path, capfd, retrained, run_to_end, assert_equal_records
):
    run_to_end(make_spec(tmp_path))
    file = next(p for p in (tmp_path / "artifacts" / damage).glob("*/*") if p.name != "manifest.json")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    capfd.readouterr()
    again = run_to_end(make_spec(tmp_path))
    assert f"artifact {damage}/" in capfd.readouterr().err
    assert_equal_records(again.record, retrained.record)


def test_a_disk_that_fills_up_leaves_no_record_and_the_run_goes_on_later(
    make_spec, tmp_path, monkeypatch, retrained, run_to_end, assert_equal_records
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "save_predictions", full)
        with pytest.raises(OSError, match="No space left"):
            run_to_end(make_spec(tmp_path))
    assert list((tmp_path / "records").iterdir()) == []
    assert_equal_records(run_to_end(make_spec(tmp_path)).record, retrained.record)


def test_a_folder_of_records_that_cannot_be_written_is_told_before_any_work(make_spec, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Run(make_spec(tmp_path, f"records_dir={tmp_path}/file/records"), Session()).record()
    assert not (tmp_path / "artifacts").exists()


def test_a_session_loads_a_dataset_once_and_resamples_train_alone(make_spec, tmp_path):
    session = Session()
    plain, again = (session.data(make_spec(tmp_path)) for _ in range(2))
    assert plain is again
    resampled = session.data(make_spec(tmp_path, "resample_seed=1"))
    assert resampled.digest == plain.digest, "the seed, not the digest, tells resamples apart"
    train = resampled.splits["train"]
    patients, counts = np.unique(train.patient, return_counts=True)
    original = dict(zip(*np.unique(plain.splits["train"].patient, return_counts=True)))
    assert all(counts[i] % original[p] == 0 for i, p in enumerate(patients)), "whole patients"
    for split in ("tune", "val", "test"):
        assert np.array_equal(resampled.splits[split].images, plain.splits[split].images)


def test_what_a_generator_sees_holds_neither_val_nor_test(make_spec, tmp_path):
    run = Run(make_spec(tmp_path), Session())
    problem = run.problem()
    hidden = {image.tobytes() for view in ("val", "test") for image in run.data.splits[view].images}
    seen = [image.numpy().tobytes() for part in (problem.train, problem.tune) for image in part.images]
    assert not hidden & set(seen) and len(problem.train) + len(problem.tune) == 80


def test_costs_in_base_trainings_are_seconds_over_the_seconds_of_one():
    about = {
        "fixed_s": 6.0, "marginal_s": 0.5, "base_training_s": 2.0, "peak_memory_bytes": 1, "bytes_per_member": 2,
        "attempts": 1, "threads": 1, "device_name": "x",
    }  # fmt: skip
    cost = cost_section(about, accepted=4, drawn=8)
    assert (cost["fixed_cost_bt"], cost["marginal_cost_bt"]) == (3.0, 0.25)
    assert cost["cost_per_accepted_s"] == 2.5 and cost["cost_per_accepted_with_base_bt"] == 1.5
    empty = cost_section(about, accepted=0, drawn=8)
    assert empty["cost_per_accepted_s"] is empty["cost_per_accepted_bt"] is None


def test_the_key_of_a_record_is_the_digest_of_its_identity(retrained):
    assert retrained.record["key"] == digest(retrained.record["identity"])
