"""The artifact store: whole or not at all, verified when read, one computation per key."""

from __future__ import annotations

import errno
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from multiplicity_bench.benchmark import store as store_module
from multiplicity_bench.benchmark.store import FileCheckpoint, Stopwatch, Store, explain_os_error, write_json

KEY = "ab" * 32


def write_answer(work: Path) -> dict:
    (work / "answer.txt").write_text("42")
    return {"said": "done"}


class Interrupted(Exception):
    """A failure injected into a stage."""


def test_a_finished_artifact_holds_its_files_and_what_was_said_about_it(tmp_path):
    store = Store(tmp_path)
    path = store.produce("set", KEY, {"a": 1}, write_answer)
    assert path == tmp_path / "set" / KEY and sorted(p.name for p in path.iterdir()) == ["answer.txt", "manifest.json"]
    assert (store.about("set", KEY), store.spec("set", KEY)) == ({"said": "done"}, {"a": 1})
    assert store.find("set", KEY) == path


def test_an_artifact_that_is_there_is_not_computed_again(tmp_path):
    Store(tmp_path).produce("set", KEY, {}, write_answer)
    Store(tmp_path).produce("set", KEY, {}, lambda work: pytest.fail("computed again"))


def test_a_failure_inside_leaves_no_artifact_and_its_checkpoints_are_there_the_next_time(tmp_path):
    store, value = Store(tmp_path), {"x": torch.arange(3)}

    def fails(work: Path) -> dict:
        FileCheckpoint(work).save("half way", value)
        (work / "half.txt").write_text("half")
        raise Interrupted

    with pytest.raises(Interrupted):
        store.produce("set", KEY, {}, fails)
    assert store.find("set", KEY) is None and not store.path("set", KEY).exists()
    assert store.spec("set", KEY) is None

    def goes_on(work: Path) -> dict:
        checkpoint = FileCheckpoint(work)
        found = checkpoint.load("half way")
        assert found is not None and torch.equal(found["x"], value["x"])
        return write_answer(work)

    path = store.produce("set", KEY, {}, goes_on)
    assert not (path / store_module.CHECKPOINTS).exists()
    assert not (tmp_path / "set" / f".{KEY}").exists()


@pytest.mark.parametrize("moment", ["checksums", "write_json", "os.replace"])
def test_a_failure_while_an_artifact_is_closed_leaves_none_and_the_next_run_makes_it(tmp_path, monkeypatch, moment):
    def fails(*_arguments, **_options):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(f"multiplicity_bench.benchmark.store.{moment}", fails)
        with pytest.raises(Interrupted):
            Store(tmp_path).produce("set", KEY, {}, write_answer)
    assert Store(tmp_path).find("set", KEY) is None
    assert (Store(tmp_path).produce("set", KEY, {}, write_answer) / "answer.txt").read_text() == "42"


@pytest.mark.parametrize("damage", ["one byte", "truncated", "file missing", "manifest is no JSON", "manifest empty"])
def test_a_corrupted_artifact_is_removed_with_a_message_and_computed_again(tmp_path, damage):
    path = Store(tmp_path).produce("set", KEY, {}, write_answer)
    if damage == "one byte":
        (path / "answer.txt").write_text("43")
    elif damage == "truncated":
        (path / "answer.txt").write_text("4")
    elif damage == "file missing":
        (path / "answer.txt").unlink()
    else:
        (path / "manifest.json").write_text("{" if "JSON" in damage else "")
    messages: list[str] = []
    store = Store(tmp_path, messages.append)
    assert store.find("set", KEY) is None and not path.exists()
    assert len(messages) == 1 and "corrupted" in messages[0] and f"set/{KEY[:12]}" in messages[0]
    assert ("answer.txt" in messages[0]) == (not damage.startswith("manifest"))
    assert (store.produce("set", KEY, {}, write_answer) / "answer.txt").read_text() == "42"
    assert store.find("set", KEY) == path


def test_a_folder_without_manifest_is_no_artifact_and_is_replaced(tmp_path):
    path = tmp_path / "set" / KEY
    path.mkdir(parents=True)
    (path / "answer.txt").write_text("of unknown origin")
    store = Store(tmp_path)
    assert store.find("set", KEY) is None
    assert (store.produce("set", KEY, {}, write_answer) / "answer.txt").read_text() == "42"


@pytest.mark.parametrize("bytes_left", [0, 7, 60])
def test_a_truncated_checkpoint_counts_as_none(tmp_path, bytes_left):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = FileCheckpoint(tmp_path)
    checkpoint.save("epoch", {"w": torch.ones(100)})
    file = next((tmp_path / "checkpoints").iterdir())
    file.write_bytes(file.read_bytes()[:bytes_left])
    assert checkpoint.load("epoch") is None and checkpoint.load("another") is None
    checkpoint.save("epoch", {"w": torch.zeros(2)})
    assert torch.equal(checkpoint.load("epoch")["w"], torch.zeros(2))


def test_a_checkpoint_that_cannot_be_finished_leaves_the_former_one(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = FileCheckpoint(tmp_path)
    checkpoint.save("epoch", {"w": torch.ones(2)})

    def half(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(store_module, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save("epoch", {"w": torch.zeros(2)})
    assert torch.equal(checkpoint.load("epoch")["w"], torch.ones(2))


def test_checkpoints_with_odd_names_do_not_collide(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = FileCheckpoint(tmp_path)
    for i, name in enumerate(["a/b", "a b", "../a", "a"]):
        checkpoint.save(name, {"i": torch.tensor(i)})
    assert [int(checkpoint.load(name)["i"]) for name in ["a/b", "a b", "../a", "a"]] == [0, 1, 2, 3]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def _compete(root: Path, log: Path, start: float) -> None:
    def compute(work: Path) -> dict:
        with log.open("a") as f:
            f.write("computed\n")
        time.sleep(0.5)
        return write_answer(work)

    time.sleep(max(0.0, start - time.time()))
    path = Store(root).produce("set", KEY, {}, compute)
    with log.open("a") as f:
        f.write(f"got {(path / 'answer.txt').read_text()}\n")


def test_of_two_processes_that_want_one_artifact_one_computes_and_both_get_it(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "store", tmp_path / "log", time.time() + 0.3)
    processes = [context.Process(target=_compete, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["computed", "got 42", "got 42"]


def test_a_full_disk_is_one_line_that_says_where_and_what_to_do(tmp_path):
    def full(work: Path) -> dict:
        raise OSError(errno.ENOSPC, "No space left on device", str(work / "weights"))

    with pytest.raises(OSError) as caught:
        Store(tmp_path).produce("set", KEY, {}, full)
    text = str(explain_os_error(caught.value))
    assert "\n" not in text and "No space left on device" in text and "weights" in text and "artifacts_dir" in text
    assert not (tmp_path / "set" / KEY).exists()


def test_a_folder_that_may_not_be_written_is_one_line_naming_it():
    text = str(explain_os_error(PermissionError(errno.EACCES, "Permission denied", "/data/store")))
    assert text.startswith("/data/store: Permission denied: check the path and its permissions") and "\n" not in text


def test_an_error_without_a_file_name_still_gives_a_sentence():
    assert "output folders" in str(explain_os_error(OSError("odd")))


def test_json_that_cannot_be_written_leaves_the_former_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_the_contents_list_finished_and_unfinished_artifacts_with_their_sizes(tmp_path):
    store = Store(tmp_path)
    store.produce("set", KEY, {}, write_answer)
    with pytest.raises(ZeroDivisionError):
        store.produce("base", KEY, {}, lambda work: {"x": 1 / 0})
    rows = store.contents()
    assert [(stage, key) for stage, key, _ in rows] == [("base", f".{KEY}"), ("set", KEY)]
    assert rows[1][2] == sum(f.stat().st_size for f in (tmp_path / "set" / KEY).iterdir())


def test_the_clock_carries_on_what_an_earlier_attempt_booked(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    first = Stopwatch(tmp_path, torch.device("cpu"))
    with pytest.raises(Interrupted), first.marginal():
        time.sleep(0.02)
        raise Interrupted
    second = Stopwatch(tmp_path, torch.device("cpu"))
    assert (first.attempts, second.attempts) == (1, 2)
    assert second.seconds == first.seconds and second.seconds["marginal"] >= 0.02 and second.seconds["fixed"] == 0
    with second.fixed():
        time.sleep(0.01)
    assert second.seconds["fixed"] >= 0.01


def test_a_broken_clock_file_starts_from_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "clock.json").write_text('{"fixed": ')
    clock = Stopwatch(tmp_path, torch.device("cpu"))
    assert clock.seconds == {"fixed": 0.0, "marginal": 0.0} and clock.attempts == 1
