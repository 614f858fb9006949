"""Tiny runs that the tests of this folder share: 80 synthetic radiographs, a network of 8 hidden units, two epochs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from multiplicity_bench.benchmark import cli
from multiplicity_bench.benchmark.board import tolerance
from multiplicity_bench.benchmark.spec import Spec, build_spec, register_config
from multiplicity_bench.benchmark.stages import Run, Session

TINY = (
    "dataset.train=80",
    "dataset.val=40",
    "dataset.test=40",
    "network=mlp",
    "network.width=8",
    "training.epochs=2",
    "members=4",
    "draws=20",
    "k=2",
    "device=cpu",
    "threads=1",
)


@dataclass
class Answer:
    """What a command did: its exit code and the lines it printed."""

    code: int
    out: list[str]
    err: list[str]


Command = Callable[..., Answer]
MakeSpec = Callable[..., Spec]


@pytest.fixture(scope="session")
def make_spec() -> MakeSpec:
    """make_spec(folder, *overrides): the tiny run, composed as the command line composes it, results under `folder`."""
    register_config()

    def make(folder: Path, *overrides: str) -> Spec:
        GlobalHydra.instance().clear()
        paths = (f"artifacts_dir={folder}/artifacts", f"records_dir={folder}/records")
        named = {o.partition("=")[0] for o in overrides}
        defaults = [o for o in ("generator=retrain", *TINY, *paths) if o.partition("=")[0] not in named]
        with initialize_config_module("multiplicity_bench.benchmark.conf", version_base="1.3"):
            return build_spec(compose("config", overrides=[*defaults, *overrides]))

    return make


@dataclass
class Finished:
    """A run that has ended: its record, where it is, and the folder that holds artifacts and records."""

    record: dict[str, Any]
    path: Path
    folder: Path

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"


def finish(spec: Spec) -> Finished:
    """Carry out a run in this process."""
    record, path = Run(spec, Session()).record("tiny")
    return Finished(record, path, Path(spec.options.records_dir).parent)


@pytest.fixture(scope="session")
def retrained(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished tiny run of `retrain`; read it, never change its files."""
    return finish(make_spec(tmp_path_factory.mktemp("retrained")))


@pytest.fixture(scope="session")
def noisy(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished tiny run of `logit_noise`, whose members are no weight vectors; never change its files."""
    return finish(make_spec(tmp_path_factory.mktemp("noisy"), "generator=logit_noise"))


def called(
    main: Callable[[], Any], argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Answer:
    """Call a command's entry point in this process as a shell would, and leave no global state of Hydra behind."""
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "1"))
    GlobalHydra.instance().clear()
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    return Answer(int(ended.value.code or 0), out.splitlines(), err.splitlines())


@pytest.fixture
def run_benchmark(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """run_benchmark("generator=retrain", ...): the command in this process, with just these arguments."""
    return lambda *argv: called(cli.main, argv, monkeypatch, capfd)


@pytest.fixture
def leaderboard(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """leaderboard("verify", path): the second command in this process."""
    from multiplicity_bench.benchmark import board

    return lambda *argv: called(board.main, argv, monkeypatch, capfd)


def tiny_arguments(folder: Path, *overrides: str) -> list[str]:
    """Return the arguments of the tiny run with results under `folder`."""
    named = {o.partition("=")[0] for o in overrides}
    paths = (f"artifacts_dir={folder}/artifacts", f"records_dir={folder}/records")
    return [*(o for o in (*TINY, *paths) if o.partition("=")[0] not in named), *overrides]


@pytest.fixture
def tiny() -> Callable[..., list[str]]:
    """tiny(folder, *overrides): arguments of the tiny run on the command line."""
    return tiny_arguments


@pytest.fixture
def run_to_end() -> Callable[[Spec], Finished]:
    """run_to_end(spec): carry out a run in this process."""
    return finish


def same_result(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert that two records are equal as two runs of one command are: identity, and scores to board.tolerance."""
    assert a["key"] == b["key"] and a["name"] == b["name"]
    assert a["identity"] == b["identity"] and a["protocol"] == b["protocol"] and a["data"] == b["data"]
    assert (a["status"], a["reason"], a["row"]) == (b["status"], b["reason"], b["row"])
    assert a["set"]["accepted"] == b["set"]["accepted"] and a["scores"].keys() == b["scores"].keys()
    for key, score in a["scores"].items():
        for part in ("value", "low", "high"):
            assert score[part] == pytest.approx(b["scores"][key][part], abs=tolerance(a, b)), f"{key} {part}"


@pytest.fixture
def assert_equal_records() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """assert_equal_records(a, b): two records of one command, equal up to cost and provenance."""
    return same_result
