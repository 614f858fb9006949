"""Progress on and off a terminal; what a record says about where it comes from."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from multiplicity_bench.benchmark import progress as progress_module
from multiplicity_bench.benchmark import provenance as provenance_module
from multiplicity_bench.benchmark.progress import log, progress
from multiplicity_bench.benchmark.provenance import commit, device_name, provenance, source_digest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_short_stage_says_nothing(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress(range(5), "training", 5)) == list(range(5)) and sys.stderr.getvalue() == ""


def test_without_a_terminal_a_long_stage_says_rate_and_time_left_every_quarter_minute(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in progress(range(10), "training", 10):
        clock[0] += 5.0
    lines = sys.stderr.getvalue().splitlines()
    assert lines == [
        "training: 3/10, 0.2/s, 35 s left",
        "training: 6/10, 0.2/s, 20 s left",
        "training: 9/10, 0.2/s, 5 s left",
    ]


def test_a_stage_of_unknown_length_shows_count_and_rate(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in progress(iter("abc"), "reading"):
        clock[0] += 16.0
    assert sys.stderr.getvalue().splitlines()[0] == "reading: 1, 0.062/s"


def test_on_a_terminal_a_bar_shows_what_is_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(3), "training", 3)) == [0, 1, 2]
    assert "training" in sys.stderr.getvalue() and "3" in sys.stderr.getvalue()


def test_a_logged_line_goes_to_stderr_alone(capfd):
    log("a line")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "a line\n")


def test_provenance_names_sources_versions_and_device_and_no_path():
    section = provenance(torch.device("cpu"))
    assert set(section) == {"source_digest", "commit", "dirty", "versions", "device_name"}
    assert len(section["source_digest"]) == 64 and torch.__version__.startswith(section["versions"]["torch"])
    assert section["device_name"] and str(provenance_module.PACKAGE) not in str(section)


def test_the_source_digest_changes_with_any_source_and_with_nothing_else(tmp_path, monkeypatch):
    for folder in provenance_module.FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance_module, "PACKAGE", tmp_path)
    compute = source_digest.__wrapped__
    first = compute()
    (tmp_path / "leaderboard" / "LEADERBOARD.md").write_text("table")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("")
    assert compute() == first
    for folder in provenance_module.FOLDERS:
        before = compute()
        (tmp_path / folder / "part.py").write_text("x = 2\n")
        assert compute() != before


def git(folder, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_tree_is_dirty_when_a_source_differs_from_the_commit_and_not_for_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance_module, "PACKAGE", tmp_path)
    compute = commit.__wrapped__
    assert compute() == ("", True), "no repository: nobody can tell"
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "leaderboard" / "records").mkdir(parents=True)
    (tmp_path / "benchmark" / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head, dirty = compute()
    assert len(head) == 40 and not dirty
    (tmp_path / "leaderboard" / "LEADERBOARD.md").write_text("table")
    (tmp_path / "leaderboard" / "records" / "r.json").write_text("{}")
    (tmp_path / "outputs").mkdir()
    assert compute() == (head, False), "results are no sources"
    (tmp_path / "benchmark" / "a.py").write_text("x = 2\n")
    assert compute() == (head, True)


def test_a_machine_without_git_counts_as_dirty(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance_module.subprocess, "run", none)
    assert commit.__wrapped__() == ("", True)


def test_a_processor_is_named_without_the_machine(monkeypatch):
    import socket

    assert device_name(torch.device("cpu")) and socket.gethostname() != device_name(torch.device("cpu"))
