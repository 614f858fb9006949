"""Sweeps by launchers: the records of plain runs, one line for what cannot run, and a lost worker is no lost sweep."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from multiplicity_bench.benchmark import launchers
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.errors import UserError

PRESETS = sorted((Path(launchers.__file__).parent / "conf" / "hydra" / "launcher").glob("*.yaml"))
PATIENCE_S = 240.0  # processes of their own import torch, which takes seconds, and many on a busy machine
GENERATORS = ("identical", "retrain")
SWEEP = ("-m", f"generator={','.join(GENERATORS)}")
LONG = ("training.epochs=200",)
"""Members that take much longer than to find a process and kill it."""


@pytest.fixture(scope="module")
def plain(make_spec, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Records by generator of runs in this process, without a sweep."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: Run(make_spec(folder, f"generator={name}"), Session()).record()[0] for name in GENERATORS}


@pytest.fixture(scope="module")
def long_runs(make_spec, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The same of runs that take long enough to be killed."""
    folder = tmp_path_factory.mktemp("long")
    return {name: Run(make_spec(folder, f"generator={name}", *LONG), Session()).record()[0] for name in GENERATORS}


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail, rather than hang, when a launcher waits for ever."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"the launcher has not ended after {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(PATIENCE_S))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def joblib_stops() -> Iterator[None]:
    """End joblib's processes, which it keeps for the next call."""
    yield
    external = pytest.importorskip("joblib.externals.loky", reason="needs the extra joblib")
    external.get_reusable_executor().shutdown(wait=True, kill_workers=True)


def needs(launcher: str) -> None:
    """Skip a test whose launcher is not installed."""
    extra, module = launchers.NEEDS[launcher] or ("", "hydra")
    pytest.importorskip(module, reason=f"needs the extra {extra}")
    if launcher == "submitit_slurm":
        running = shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0
        if not running:
            pytest.skip("no Slurm runs on this host: make test-slurm starts one")
    if launcher == "ray" and (reason := ray_does_not_start()):
        pytest.skip(f"Ray does not start on this host: {reason}")


@functools.cache
def ray_does_not_start() -> str:
    """Return the last line that Ray says where it cannot start at all, as in a container without shared memory."""
    start = "import ray; ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20); ray.shutdown()"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    try:
        subprocess.run(
            [sys.executable, "-c", start], check=True, capture_output=True, text=True, timeout=120, env=environment
        )
    except subprocess.TimeoutExpired:
        return "not within 120 s"
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or ["no reason given"])[-1]
    return ""


def children() -> dict[int, str]:
    """Return the command lines of the processes that descend from this one, by process id."""
    found, waiting = {}, [os.getpid()]
    while waiting:
        for listed in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                pids = [int(pid) for pid in listed.read_text().split()]
                found |= {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids}
            except OSError:  # it has just ended
                continue
            waiting += pids
    return found


def kill_workers(folder: Path, key: str, mark: str) -> tuple[threading.Thread, list[int]]:
    """Kill the processes whose command line has `mark` once the set of `key` is half done; the list says which."""
    killed: list[int] = []
    half_done = f"artifacts/set/.{key}/checkpoints/*.safetensors"

    def kill() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not list(folder.glob(half_done)):
            time.sleep(0.005)
        killed.extend(pid for pid, line in children().items() if mark in line)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    return watcher, killed


def records_in(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    return {record["identity"]["generator"]["name"]: record for record in found}


def unmarked(folder: Path) -> bool:
    """Return whether no marker is left in the folders of results."""
    return not [p for option in ("artifacts", "records") for p in (folder / option).glob(".*")]


@pytest.mark.parametrize("launcher", ["basic", "submitit_local", "submitit_slurm", "ray"])
def test_a_launched_sweep_gives_the_records_of_plain_runs(
    launcher, plain, run_benchmark, tiny, tmp_path, monkeypatch, assert_equal_records, in_time
):
    needs(launcher)
    monkeypatch.chdir(tmp_path)
    workers = [] if launcher == "basic" else ["hydra.launcher.workers=2"]
    before = set(children())
    answer = run_benchmark(*SWEEP, *tiny(tmp_path), f"hydra/launcher={launcher}", *workers)
    assert answer.code == 0, answer
    found = records_in(tmp_path)
    assert found.keys() == plain.keys()
    for name, record in found.items():
        assert_equal_records(record, plain[name])
        assert str(tmp_path / "records" / f"{record['name']}.json") in answer.out
    assert len(answer.out) == 4, "a path and a line of scores of each job"
    assert unmarked(tmp_path)
    assert set(children()) <= before, "processes are left behind"


def test_joblib_goes_on_where_a_killed_worker_stopped_with_the_records_of_plain_runs(
    long_runs, run_benchmark, tiny, tmp_path, monkeypatch, assert_equal_records, in_time, joblib_stops
):
    needs("joblib")
    monkeypatch.chdir(tmp_path)
    command = (*SWEEP, *tiny(tmp_path, *LONG), "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    watcher, killed = kill_workers(tmp_path, long_runs["retrain"]["key"], "LokyProcess")
    answer = run_benchmark(*command)
    watcher.join()
    assert killed and answer.code == 1 and answer.out == []
    assert [line for line in answer.err if line.startswith("error: ")] == [
        "error: a worker was lost (killed, or out of memory), and the jobs beside it ended: "
        "the same command goes on from here"
    ]
    assert "retrain" not in records_in(tmp_path) and unmarked(tmp_path)
    (base,) = (tmp_path / "artifacts" / "base").glob("*/manifest.json")
    trained = base.stat().st_mtime_ns

    answer = run_benchmark(*command)
    assert answer.code == 0, answer
    found = records_in(tmp_path)
    assert found.keys() == long_runs.keys() and found["retrain"]["cost"]["resumed"]
    assert base.stat().st_mtime_ns == trained, "the base was trained once more"
    for name, record in found.items():
        assert_equal_records(record, long_runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("launcher, retries", [("submitit_local", None), ("ray", 0), ("ray", 3)])
def test_a_killed_worker_takes_no_other_job_with_it(
    launcher, retries, long_runs, run_benchmark, tiny, tmp_path, monkeypatch, assert_equal_records, in_time
):
    needs(launcher)
    monkeypatch.chdir(tmp_path)
    mark = "submitit.core._submit" if launcher == "submitit_local" else "ray::_call"
    settings = [] if retries is None else [f"hydra.launcher.max_retries={retries}"]
    watcher, killed = kill_workers(tmp_path, long_runs["retrain"]["key"], mark)
    one_by_one = ("-m", "generator=retrain,identical", *tiny(tmp_path, *LONG), f"hydra/launcher={launcher}")
    answer = run_benchmark(*one_by_one, "hydra.launcher.workers=1", *settings)
    watcher.join()
    lost = [line for line in answer.err if line.startswith("error: ")]
    found = records_in(tmp_path)
    assert killed and found.keys() == ({"identical"} if not retries else long_runs.keys())
    if retries:
        assert answer.code == 0 and lost == [] and found["retrain"]["cost"]["resumed"]
    else:
        assert answer.code == 1 and len(lost) == 1
        assert lost[0].startswith("error: job 0 (generator=retrain ") and "lost its worker" in lost[0]
    for name, record in found.items():
        assert_equal_records(record, long_runs[name])


@pytest.fixture
def launched(run_benchmark, tiny, tmp_path, monkeypatch) -> Callable[..., Any]:
    """launched(*arguments): a tiny sweep by joblib whose jobs run in this process, one by one."""
    needs("joblib")
    monkeypatch.chdir(tmp_path)
    by_joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    return lambda *arguments: run_benchmark("-m", *tiny(tmp_path, *arguments), *by_joblib)


def test_the_exit_code_is_that_of_the_worst_job_and_the_others_are_done(launched, tmp_path):
    diverging = ("training.optimizer=sgd", "training.epochs=40", "training.lr=1e6,1e-3")
    answer = launched("generator=retrain", *diverging)
    assert answer.code == 1 and "failed" in answer.out[1] and "accepted" in answer.out[3]

    answer = launched("generator=identical", "members=0,4", "epsilon=0.05")
    assert answer.code == 2 and len(answer.out) == 2 and "accepted 4 of 4" in answer.out[1]
    assert answer.err == ["error: members=0 must be at least 1"]


def test_a_failure_of_ours_in_a_job_shows_its_traceback_and_ends_with_exit_code_1(launched, monkeypatch):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by a test")

    monkeypatch.setattr("multiplicity_bench.benchmark.stages.evaluate", broken)
    answer = launched("generator=identical")
    assert answer.code == 1 and answer.err[0] == "error: Traceback (most recent call last):"
    assert answer.err[-1] == "ZeroDivisionError: by a test" or answer.err[-2] == "ZeroDivisionError: by a test"


@pytest.mark.parametrize("option", ["artifacts_dir", "records_dir"])
def test_a_folder_that_another_host_sees_differently_is_one_line_and_exit_code_2(
    option, launched, tmp_path, monkeypatch
):
    marked, folder = launchers._marked, tmp_path / option.removesuffix("_dir")

    def elsewhere(path: Path, name: str) -> Any:
        return marked(tmp_path / "elsewhere" if path == folder else path, name)

    monkeypatch.setattr(launchers, "_marked", elsewhere)
    answer = launched("generator=identical", "base_seed=0,1")
    assert answer.code == 2 and answer.out == [] and len(answer.err) == 1
    assert answer.err[0].startswith(f"error: {option}={folder} on ") and "that all hosts share" in answer.err[0]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [] and not (tmp_path / "elsewhere").exists()


def test_a_job_takes_its_share_of_the_processors_and_what_the_user_says(launched, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "usable_processors", lambda: 3)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        "multiplicity_bench.benchmark.stages.check_views", lambda run: seen.append(torch.get_num_threads())
    )
    try:
        assert launched("generator=identical", "threads=0").code == 0
        assert launched("generator=identical", "threads=2").code == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 2]
    assert os.environ.keys().isdisjoint({launchers.TOKEN, launchers.THREADS})


@pytest.mark.parametrize(
    "launcher, settings, jobs, threads",
    [
        ("joblib", {"n_jobs": -1}, 8, 1),
        ("joblib", {"n_jobs": -1}, 2, 4),
        ("joblib", {"n_jobs": -2}, 20, 1),
        ("joblib", {"n_jobs": 3}, 20, 2),
        ("joblib", {"n_jobs": 16}, 20, 1),
        ("submitit_local", {"workers": None}, 20, 1),
        ("submitit_local", {"workers": 2}, 20, 4),
        ("submitit_slurm", {"cpus_per_task": 6}, 20, 6),
        ("ray", {"num_cpus": 2}, 20, 2),
    ],
)
def test_threads_of_a_job(launcher, settings, jobs, threads, monkeypatch):
    monkeypatch.setattr(launchers, "usable_processors", lambda: 8)
    assert launchers.threads_of_a_job(launcher, settings, jobs) == threads


def test_there_are_settings_for_every_launcher_and_they_are_told_in_the_help(run_benchmark):
    assert [path.stem for path in PRESETS] == sorted(launchers.NEEDS.keys() - {"basic"})
    for path in PRESETS:
        assert "_target_" in yaml.safe_load(path.read_text(encoding="utf-8"))
    text = "\n".join(run_benchmark("--help").out)
    assert all(name in text for name in launchers.NEEDS)


# What is wrong -> (arguments, what the line must say).
MISTAKES = {
    "unknown launcher": (["-m", "hydra/launcher=joblub"], "unknown launcher 'joblub': did you mean 'joblib'?"),
    "launcher without a sweep": (
        ["hydra/launcher=joblib"],
        "hydra/launcher=joblib launches the jobs of a sweep: add -m",
    ),
    "unknown setting": (
        ["-m", "hydra/launcher=ray", "hydra.launcher.num_gpu=1"],
        "no option 'hydra.launcher.num_gpu': did you mean 'hydra.launcher.num_gpus'",
    ),
    "no jobs at once": (["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "n_jobs=0 launches nothing"),
    "workers is a word": (["-m", "hydra/launcher=ray", "hydra.launcher.workers=all"], "workers=all must be a number"),
    "negative GPUs": (["-m", "hydra/launcher=ray", "hydra.launcher.num_gpus=-1"], "num_gpus=-1 must be a number of at"),
    "GPUs of this host": (
        ["-m", "hydra/launcher=submitit_local", "hydra.launcher.gpus_per_node=1"],
        "gpus_per_node=1: no node has more than 0",
    ),
    "GPUs of Slurm": (
        ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=9"],
        "gpus_per_node=9: no node has more than 8",
    ),
    "CUDA without GPUs of Slurm": (
        ["-m", "hydra/launcher=submitit_slurm", "device=cuda"],
        "device=cuda: the job is given no GPU that it does not ask for: add hydra.launcher.gpus_per_node=1",
    ),
    "CUDA without GPUs of Ray": (["-m", "hydra/launcher=ray", "device=cuda"], "add hydra.launcher.num_gpus=1"),
    "GPUs of Ray": (
        ["-m", "hydra/launcher=ray", "device=cuda", "hydra.launcher.num_gpus=1"],
        "hydra.launcher.num_gpus=1: no node of Ray has that (nodes: 2 CPU, 0 GPU)",
    ),
    "processors of Ray": (
        ["-m", "hydra/launcher=ray", "hydra.launcher.num_cpus=3"],
        "hydra.launcher.num_cpus=3 hydra.launcher.num_gpus=0: no node of Ray has that",
    ),
    "Ray is not there": (
        ["-m", "hydra/launcher=ray", "hydra.launcher.address=auto"],
        "hydra.launcher.address=auto: Ray cannot be joined there (no cluster)",
    ),
    "nothing is there": (
        ["-m", "hydra/launcher=ray", "hydra.launcher.address=localhost:1"],
        "hydra.launcher.address=localhost:1: Ray cannot be joined there ([Errno 111] Connection refused)",
    ),
}


class FakeRay(types.ModuleType):
    """A Ray of one node with two processors and no GPU, which must not be given any job."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.open = False

    def init(self, address: str, **_: Any) -> None:
        if address != "local":
            raise ConnectionError("no cluster\nand more lines")
        self.open = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 9.0, "GPU": 9.0}}]

    def shutdown(self) -> None:
        self.open = False


def fake_slurm(folder: Path, sinfo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put commands named as Slurm's before all others."""
    folder.mkdir()
    for name, does in (("sbatch", "exit 1"), ("srun", "exit 1"), ("sinfo", sinfo)):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_launched(mistake, run_benchmark, tiny, tmp_path, monkeypatch):
    arguments, says = MISTAKES[mistake]
    ray = FakeRay()
    fake_slurm(tmp_path / "bin", "echo '(null)\ngpu:2(S:0)\ngpu:a100:8(S:0-1),shard:4'", monkeypatch)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(launchers, "_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path / "bin")
    flags = [a for a in arguments if a == "-m"]
    settings = [a for a in arguments if a != "-m"]
    if "hydra/launcher=joblib" in settings and flags:
        needs("joblib")
    answer = run_benchmark(*flags, "generator=identical", *tiny(tmp_path / "out", *settings))
    assert answer.code == 2 and answer.out == [] and len(answer.err) == 1, answer
    assert answer.err[0].startswith("error: ") and says in answer.err[0]
    assert not ray.open and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sinfo", "says"),
    [
        ("", "needs Slurm (sbatch, srun, sinfo)"),
        (
            "echo 'slurm_load_partitions: Unable to contact' >&2; exit 1",
            "Slurm does not answer (slurm_load_partitions: Unable to contact)",
        ),
    ],
    ids=["no commands", "no answer"],
)
def test_a_slurm_that_is_not_there_is_one_line(sinfo, says, run_benchmark, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "_installed", lambda module: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    if sinfo:
        fake_slurm(tmp_path / "bin", sinfo, monkeypatch)
    answer = run_benchmark("-m", "generator=identical", *tiny(tmp_path / "out"), "hydra/launcher=submitit_slurm")
    assert answer.code == 2 and len(answer.err) == 1 and says in answer.err[0]


@pytest.mark.parametrize("launcher", [path.stem for path in PRESETS])
def test_a_launcher_that_is_not_installed_names_its_extra(launcher, monkeypatch):
    extra, module = launchers.NEEDS[launcher]
    find = importlib.util.find_spec

    def hidden(name: str, package: str | None = None) -> Any:
        if name.startswith("hydra_plugins."):
            raise ModuleNotFoundError(name="hydra_plugins")
        return None if name == module else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(UserError) as told:
        launchers.check_arguments(["-m", f"hydra/launcher={launcher}"])
    assert str(told.value) == (
        f'hydra/launcher={launcher} needs the extra {extra}: pip install "multiplicity-bench[{extra}]"'
    )


def test_a_job_without_its_folder_says_so(monkeypatch):
    job = launchers.Job(launchers.RayLauncher(), [], 0, folder="/no/such/folder", state={})
    outcome = job().return_value
    assert outcome.code == 2 and "/no/such/folder on " in outcome.errors[0] and "all hosts share" in outcome.errors[0]
