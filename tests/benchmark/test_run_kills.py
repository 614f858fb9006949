"""Real kills and real races: separate processes, SIGKILL, and the same command again."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

PATIENCE_S = 120.0

# The command line itself, with checkpoints after every epoch, one member per block, and a pause after each checkpoint
# in which a kill can fall. None of this is part of a run's identity.
DRIVER = """
import os, sys, time
from multiplicity_bench.benchmark import cli, predict, store, train
os.chdir(folder)
output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
train.CHECKPOINT_EVERY_S = -1.0
predict.BLOCK_BYTES = 1
save = store.FileCheckpoint.save
def slow_save(self, name, tensors):
    save(self, name, tensors)
    time.sleep(pause)
store.FileCheckpoint.save = slow_save
sys.argv = ["run-benchmark", *argv]
cli.main()
"""


@dataclass
class Running:
    """A command in a process of its own."""

    process: ForkServerProcess
    folder: Path

    def output(self) -> str:
        file = self.folder / "output"
        return file.read_text() if file.is_file() else ""

    def end(self) -> int | None:
        self.process.join(PATIENCE_S)
        return self.process.exitcode


def start(pause: float, argv: list[str], folder: Path) -> Running:
    """Start the command; its process is forked from one that has imported what takes seconds.

    torch._dynamo is among it: torch imports that at the first step of an optimizer.
    """
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "multiplicity_bench.benchmark.stages"])
    process = context.Process(target=exec, args=(DRIVER, {"pause": pause, "argv": argv, "folder": str(folder)}))
    process.start()
    return Running(process, folder)


def kill_when(running: Running, reached: Callable[[], bool]) -> None:
    """Send SIGKILL as soon as `reached()`; fail if the process ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert running.process.is_alive(), f"ended before it could be killed: {running.output()}"
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.005)
    running.process.kill()
    assert running.end() == -signal.SIGKILL


def checkpoints(folder: Path, stage: str) -> int:
    return len(list((folder / "artifacts" / stage).glob(".*/checkpoints/*.safetensors")))


def finished(folder: Path, stage: str) -> bool:
    return any(p.parent.name[0] != "." for p in (folder / "artifacts" / stage).glob("*/manifest.json"))


def the_record(folder: Path) -> dict:
    (path,) = (folder / "records").glob("*.json")
    return json.loads(path.read_text())


def test_three_kills_and_the_same_command_again_give_an_equal_record(
    tmp_path, tiny, make_spec, run_to_end, assert_equal_records
):
    folder, epochs = tmp_path / "killed", "training.epochs=4"
    argv = ["generator=retrain", *tiny(folder, epochs)]

    kill_when(start(0.1, argv, folder), lambda: checkpoints(folder, "base") >= 1)
    assert not finished(folder, "base") and checkpoints(folder, "base") == 1, "killed while the base was trained"

    # The set's folder holds the epochs of the member in training and the whole members: two of each is amid the third.
    kill_when(start(0.1, argv, folder), lambda: checkpoints(folder, "set") >= 4)
    assert finished(folder, "base") and not finished(folder, "set"), "killed while members were retrained"
    base = next((folder / "artifacts" / "base").glob("*/manifest.json"))
    trained = base.stat().st_mtime_ns

    kill_when(start(0.1, argv, folder), lambda: checkpoints(folder, "predictions") >= 2)
    assert finished(folder, "set") and not finished(folder, "predictions"), "killed while predicting"
    assert not list((folder / "records").glob("*")), "no record before the end"

    last = start(0.0, argv, folder)
    assert last.end() == 0, last.output()
    assert base.stat().st_mtime_ns == trained, "the base was trained once more"
    record = the_record(folder)
    assert str(folder / "records" / f"{record['name']}.json") in last.output().splitlines()
    assert record["cost"]["resumed"]
    assert_equal_records(record, run_to_end(make_spec(tmp_path / "whole", epochs)).record)
    left = [p.name for p in (folder / "artifacts").rglob(".*") if not p.name.endswith(".lock")]
    assert left == [], "nothing half-written"


def test_two_identical_commands_at_once_end_in_one_artifact_and_equal_records(
    tmp_path, tiny, retrained, assert_equal_records
):
    argv = ["generator=retrain", *tiny(tmp_path)]
    argvs = [[a.replace("/records", f"/records{i}") for a in argv] for i in range(2)]
    processes = [start(0.02, a, tmp_path) for a in argvs]
    assert [p.end() for p in processes] == [0, 0], processes[0].output()
    assert "another process is computing" in processes[0].output()
    for stage in ("base", "set", "predictions"):
        assert len([p for p in (tmp_path / "artifacts" / stage).iterdir() if p.is_dir()]) == 1
    first, second = (json.loads(next((tmp_path / f"records{i}").glob("*.json")).read_text()) for i in range(2))
    assert_equal_records(first, second)
    assert_equal_records(first, retrained.record)
    assert first["predictions"]["digest"] == second["predictions"]["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["swag", "laplace"])
def test_a_sampled_set_killed_while_predicting_ends_in_an_equal_record(
    generator, tmp_path, tiny, make_spec, run_to_end, assert_equal_records
):
    settings = {"swag": ["generator.epochs=2"], "laplace": ["generator.prior_precision=50"]}[generator]
    folder = tmp_path / "killed"
    argv = [f"generator={generator}", *settings, *tiny(folder)]
    kill_when(start(0.1, argv, folder), lambda: checkpoints(folder, "predictions") >= 2)
    last = start(0.0, argv, folder)
    assert last.end() == 0, last.output()
    whole = run_to_end(make_spec(tmp_path / "whole", f"generator={generator}", *settings))
    assert_equal_records(the_record(folder), whole.record)
