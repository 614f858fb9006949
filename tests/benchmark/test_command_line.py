"""`run-benchmark`: what it prints, how it ends, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import cli
from multiplicity_bench.generators.api import GENERATORS
from multiplicity_bench.leaderboard import record as records
from multiplicity_bench.leaderboard.check import verify

HELP_S = 2.0


def in_a_shell(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    code = (
        "import sys\nfrom multiplicity_bench.benchmark.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    return done, time.perf_counter() - start


@pytest.mark.parametrize("argument", ["--help", "list=true"])
def test_help_and_listing_answer_at_once_without_torch_and_leave_nothing(argument, tmp_path):
    attempts = [in_a_shell(argument, cwd=tmp_path) for _ in range(2)]  # the second with warm file caches
    done, seconds = min(attempts, key=lambda attempt: attempt[1])
    assert done.returncode == 0 and done.stderr.strip() == "False", "torch was imported"
    assert seconds < HELP_S
    assert all(f"  {name}" in done.stdout or f", {name}" in done.stdout for name in GENERATORS.names())
    assert list(tmp_path.iterdir()) == []


def test_the_listing_names_everything_there_is(run_benchmark):
    from multiplicity_bench.benchmark.networks import NETWORKS
    from multiplicity_bench.datasets.api import DATASETS
    from multiplicity_bench.leaderboard.suite import suite_names
    from multiplicity_bench.metrics.api import METRICS

    for spelling in ("list=true", "list=True"):
        answer = run_benchmark(spelling)
        text = "\n".join(answer.out)
        for name in (*GENERATORS.names(), *DATASETS.names(), *NETWORKS.names(), *METRICS.names(), *suite_names()):
            assert name in text
        assert answer.code == 0


def test_the_help_names_every_option(run_benchmark):
    from dataclasses import fields

    from multiplicity_bench.benchmark.spec import Options

    text = "\n".join(run_benchmark("--help").out)
    unsaid = {"draws", "seed"}  # settings of the bootstrap, which suites declare
    assert [f.name for f in fields(Options) if f.name not in text and f.name not in unsaid] == []


def test_one_run_prints_its_records_path_and_one_line_of_scores(run_benchmark, tiny, tmp_path):
    answer = run_benchmark("generator=identical", *tiny(tmp_path))
    assert answer.code == 0 and len(answer.out) == 2
    record = records.read(Path(answer.out[0]))
    assert Path(answer.out[0]).parent == tmp_path / "records"
    assert answer.out[1].startswith("identical, base seed 0: accepted 4 of 4 at epsilon 0.05, accuracy 0.")
    assert record["status"] == "ok" and record["identity"]["members"] == 4


def test_the_same_command_twice_in_one_process_gives_one_result(run_benchmark, tiny, tmp_path, assert_equal_records):
    found = []
    for name in ("a", "b"):
        answer = run_benchmark("generator=retrain", *tiny(tmp_path / name))
        found.append(records.read(Path(answer.out[0])))
    assert_equal_records(*found)


def test_a_dry_run_shows_misses_then_hits_and_writes_nothing(run_benchmark, tiny, tmp_path):
    arguments = ["generator=identical", *tiny(tmp_path)]
    before = run_benchmark(*arguments, "dry_run=true")
    assert [line.split()[0::2] for line in before.out[1:]] == [[s, "miss"] for s in ("base", "set", "predictions")]
    assert list(tmp_path.iterdir()) == []
    record = records.read(Path(run_benchmark(*arguments).out[0]))
    there = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    after = run_benchmark(*arguments, "dry_run=true", "epsilon=0.01", "k=3")
    assert [line.split()[2] for line in after.out[1:]] == ["hit"] * 3
    assert after.out[2].split()[1] == record["key"][:12]
    assert [line.split()[1:] for line in run_benchmark(*arguments, "dry_run=true", "training.epochs=3").out[1:]] != [
        line.split()[1:] for line in after.out[1:]
    ]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == there


def test_a_sweep_makes_a_record_for_every_combination(run_benchmark, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run_benchmark("-m", "generator=identical,retrain", "base_seed=0,1", *tiny(tmp_path))
    assert answer.code == 0
    found = [json.loads(p.read_text()) for p in (tmp_path / "records").iterdir()]
    cells = {(r["identity"]["generator"]["name"], r["identity"]["base_seed"]) for r in found}
    assert cells == {(g, s) for g in ("identical", "retrain") for s in (0, 1)} and len(found) == 4


def test_a_diverging_run_ends_with_a_failed_record_and_exit_code_1(run_benchmark, tiny, tmp_path):
    answer = run_benchmark(
        "generator=retrain", *tiny(tmp_path, "training.optimizer=sgd", "training.lr=1e6", "training.epochs=40")
    )
    record = records.read(Path(answer.out[0]))
    assert answer.code == 1 and record["status"] == "failed" and "is not finite" in record["reason"]
    assert len(answer.out) == 2 and "failed" in answer.out[1] and "is not finite" in answer.out[1]


@pytest.mark.parametrize("said", ["unspecified launch failure", "no CUDA-capable device is detected", "unknown error"])
def test_a_gpu_that_disappears_is_one_line_and_no_record_and_the_same_command_goes_on(
    said, run_benchmark, tiny, tmp_path, monkeypatch
):
    from multiplicity_bench.benchmark import stages

    trained, plain = [], stages.train

    def until_it_is_gone(*arguments, name="training", **more):
        if name == "retraining 2" and len(trained) < 3:
            raise torch.AcceleratorError(f"CUDA error: {said}\nCUDA kernel errors might be reported later")
        if name.startswith("retraining"):
            trained.append(name)
        return plain(*arguments, name=name, **more)

    monkeypatch.setattr(stages, "train", until_it_is_gone)
    answer = run_benchmark("generator=retrain", *tiny(tmp_path))
    (line,) = [line for line in answer.err if line.startswith("error: ")]
    assert answer.code == 2 and f"the GPU stopped answering (CUDA error: {said}): what was finished is stored" in line
    assert not list((tmp_path / "records").iterdir()) and trained == ["retraining 0", "retraining 1"]
    trained.append("the device is back")
    answer = run_benchmark("generator=retrain", *tiny(tmp_path))
    assert records.read(Path(answer.out[0]))["status"] == "ok" and trained[3:] == ["retraining 2", "retraining 3"]


def test_an_error_of_a_kernel_of_ours_is_no_lost_gpu():
    from multiplicity_bench.benchmark.devices import is_lost

    assert not is_lost(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert not is_lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_lost(ValueError("unknown error of CUDA"))


def test_a_run_that_cannot_be_is_skipped_with_its_reason_and_exit_code_0(run_benchmark, tiny, tmp_path):
    answer = run_benchmark("generator=laplace", *tiny(tmp_path))
    record = records.read(Path(answer.out[0]))
    assert answer.code == 0 and record["status"] == "skipped"
    assert "skipped" in answer.out[1] and "tune has 8 images" in answer.out[1]


SUITE = """
title: Two rows
dataset: {name: phantom_cxr, train: 80, val: 40, test: 40}
network: {name: mlp, width: 8}
training: {epochs: 2}
base_seeds: [0]
members: 4
k: 2
draws: 20
threads: 1
predictions: true
rows: [identical, retrain: {resample: bootstrap}]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(SUITE)
    return path


def paths(folder: Path) -> list[str]:
    return [f"artifacts_dir={folder}/artifacts", f"records_dir={folder}/records"]


def test_a_suite_file_runs_every_cell_prints_its_table_and_keeps_predictions(run_benchmark, suite, tmp_path):
    answer = run_benchmark(f"suite={suite}", *paths(tmp_path))
    assert answer.code == 0
    table = "\n".join(answer.out)
    assert "identical" in table and "retrain[resample=bootstrap]" in table and "Two rows" in table
    assert answer.out[-1].startswith(f"2 records in {tmp_path}/records; all tables: leaderboard build ")
    written = sorted((tmp_path / "records").iterdir())
    assert len(written) == 2
    assert len(list((tmp_path / "predictions" / "own").iterdir())) == 2
    for path in written:
        assert verify(path, tmp_path / "predictions") == []
    assert next(line for line in answer.err if line.startswith("[")).startswith(
        "[1/2] identical, base seed 0: accepted"
    )


def test_a_generator_beside_a_suite_runs_that_row_in_its_protocol(run_benchmark, suite, tmp_path):
    answer = run_benchmark(f"suite={suite}", "generator=retrain", *paths(tmp_path))
    (path,) = (tmp_path / "records").iterdir()
    record = records.read(path)
    assert answer.code == 0 and record["row"] == "retrain[resample=bootstrap]"
    assert record["identity"]["members"] == 4 and record["protocol"]["k"] == 2


def test_settings_beside_a_suites_generator_are_a_row_of_their_own(run_benchmark, suite, tmp_path):
    own = ("generator=swag", "generator.epochs=2", "members=3", "epsilon=0.2")
    answer = run_benchmark(f"suite={suite}", *own, *paths(tmp_path))
    (path,) = (tmp_path / "records").iterdir()
    record = records.read(path)
    assert answer.code == 0 and record["row"] == "swag[epochs=2]" and "swag[epochs=2]" in "\n".join(answer.out)
    assert record["identity"]["members"] == 3 and record["protocol"]["epsilon"] == 0.2


def test_a_dry_run_of_a_suite_shows_every_cell_and_writes_nothing(run_benchmark, suite, tmp_path):
    answer = run_benchmark(f"suite={suite}", "dry_run=true", *paths(tmp_path))
    assert answer.code == 0 and sum("miss" in line for line in answer.out) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.yaml"]


def test_a_suite_goes_on_after_a_cell_that_failed_and_ends_with_exit_code_1(run_benchmark, suite, tmp_path):
    suite.write_text(SUITE.replace("retrain: {resample: bootstrap}", "swag: {lr: 1.0e+8, epochs: 4}, retrain"))
    answer = run_benchmark(f"suite={suite}", *paths(tmp_path))
    found = {r["row"]: r["status"] for r in records.read_all(tmp_path / "records")}
    assert answer.code == 1
    assert found == {"identical": "ok", "swag[epochs=4,lr=100000000]": "failed", "retrain": "ok"}
    assert any("failed" in line and "is not finite" in line for line in answer.out)


# What is wrong -> (arguments, what the line must say). The tiny run's own arguments stand before.
MISTAKES = {
    "unknown generator": (["generator=idential"], "unknown generator 'idential': did you mean 'identical'"),
    "unknown generator in a sweep": (["-m", "generator=identical,swagg"], "unknown generator 'swagg'"),
    "unknown dataset": (["dataset=brestmnist"], "unknown dataset 'brestmnist': did you mean 'breastmnist'"),
    "unknown network": (["network=smalcnn"], "unknown network 'smalcnn': did you mean 'smallcnn'"),
    "unknown suite": (["suite=quickstrat"], "unknown suite 'quickstrat': did you mean 'quickstart'"),
    "suite file missing": (["suite=./none.yaml"], "none.yaml: the suite file cannot be read"),
    "row not in the suite": (["suite=quickstart", "generator=retrian"], "'retrian': did you mean 'retrain'"),
    "setting without its generator": (["suite=quickstart", "generator.lr=1"], "generator"),
    "generator taken away": (["generator=null"], "leave it out for the default"),
    "mistyped option": (["epsilonn=1"], "there is no option 'epsilonn': did you mean 'epsilon'"),
    "unknown option": (["colour=blue"], "there is no option 'colour'"),
    "option added by force": (["+colour=blue"], "there is no option 'colour'"),
    "option taken away": (["~dataset"], "leave it out for the default"),
    "dataset taken away": (["dataset=null"], "leave it out for the default"),
    "flag": (["--epsilon=3"], "unrecognized arguments: --epsilon=3"),
    "no value": (["epsilon"], "epsilon"),
    "unknown setting of training": (["training.epoch=3"], "did you mean 'training.epochs'"),
    "unknown setting of a generator": (["generator.resampel=bootstrap"], "no option 'generator.resampel'"),
    "unknown setting of a dataset": (["dataset.sizes=3"], "no option 'dataset.sizes'"),
    "unknown setting of a network": (["network.widht=3"], "no option 'network.widht'"),
    "no members": (["members=0"], "members=0 must be at least 1"),
    "negative epsilon": (["epsilon=-1"], "epsilon=-1 must be a finite number of at least 0"),
    "epsilon is NaN": (["epsilon=nan"], "epsilon=nan must be a finite number"),
    "epsilon is infinite": (["epsilon=inf"], "epsilon=inf must be a finite number"),
    "negative among epsilons": (["epsilons=[0.1,-2]"], "epsilon=-2 must be"),
    "epsilons is no list": (["epsilons=3"], "cannot set epsilons=3"),
    "k is zero": (["k=0"], "k=0 must be at least 1"),
    "no draws": (["draws=0"], "draws=0 must be at least 1"),
    "negative seed of the draws": (["seed=-1"], "seed=-1 must be at least 0"),
    "negative base seed": (["base_seed=-1"], "base_seed=-1 must be at least 0"),
    "negative resample seed": (["resample_seed=-1"], "resample_seed=-1 must be at least 0"),
    "members is a word": (["members=many"], "cannot set members=many"),
    "members is a fraction": (["members=2.5"], "cannot set members=2.5"),
    "epochs is a fraction": (["training.epochs=1.5"], "cannot set training.epochs=1.5"),
    "dry_run is no truth value": (["dry_run=maybe"], "cannot set dry_run=maybe"),
    "setting of a generator is a word": (["generator=swag", "generator.epochs=ten"], "cannot set generator.epochs=ten"),
    "choice of a generator": (["generator=retrain", "generator.resample=jackknife"], "resample=jackknife"),
    "unknown loss": (["loss=nlll"], "loss=nlll is not a choice: did you mean 'nll'"),
    "unknown device": (["device=gpu"], "device=gpu is not a choice: did you mean 'cpu'"),
    "CUDA absent": (["device=cuda"], "device=cuda: torch sees no CUDA device here"),
    "unknown optimizer": (["training.optimizer=adam"], "did you mean 'adamw'"),
    "rate is zero": (["training.lr=0"], "training.lr=0.0 must be positive"),
    "rate is NaN": (["training.lr=nan"], "nan cannot be part of an identity"),
    "width is zero": (["network.width=0"], "network.width=0 must be at least 1"),
    "dataset out of range": (["dataset.size=2"], "dataset.size=2"),
    "data_root missing": (["data_root=/no/such/folder"], "/no/such/folder does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(mistake, run_benchmark, tiny, tmp_path, monkeypatch):
    arguments, says = MISTAKES[mistake]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    chosen = any(a.startswith(("generator=", "suite=")) for a in arguments)
    if "suite" in arguments[0]:
        answer = run_benchmark(*arguments, *paths(tmp_path))
    else:
        flags = [a for a in arguments if a == "-m"]  # argparse wants it first
        settings = tiny(tmp_path, *(a for a in arguments if a != "-m"))
        answer = run_benchmark(*flags, *([] if chosen else ["generator=identical"]), *settings)
    assert answer.code == 2 and answer.out == [] and len(answer.err) == 1, answer
    assert answer.err[0].startswith("error: ") and says in answer.err[0]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("option", ["records_dir", "artifacts_dir"])
def test_a_folder_that_cannot_be_made_is_one_line_naming_it(option, run_benchmark, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    answer = run_benchmark("generator=identical", *tiny(tmp_path, f"{option}={tmp_path}/file/inside"))
    assert answer.code == 2 and len(answer.err) == 1 and answer.out == []
    assert f"{tmp_path}/file/inside" in answer.err[0] and "Not a directory" in answer.err[0] and option in answer.err[0]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]


@pytest.mark.parametrize("stage", ["weights", "record"])
def test_a_full_disk_is_one_line_and_exit_code_2(stage, run_benchmark, tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{tmp_path}/somewhere")

    monkeypatch.setattr(
        f"multiplicity_bench.benchmark.stages.{'save_file' if stage == 'weights' else 'records.write'}", full
    )
    answer = run_benchmark("generator=identical", *tiny(tmp_path))
    assert answer.code == 2 and len(answer.err) == 1 and "No space left on device: free space there" in answer.err[0]
    assert not (tmp_path / "records").exists() or list((tmp_path / "records").iterdir()) == []


def test_an_interrupt_is_one_line_and_exit_code_130(run_benchmark, tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("multiplicity_bench.benchmark.stages.evaluate", interrupted)
    answer = run_benchmark("generator=identical", *tiny(tmp_path))
    assert (answer.code, answer.err) == (130, ["interrupted: the same command goes on from here"])


def test_a_failure_of_ours_is_not_hidden_as_a_users_mistake(tiny, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by a test")

    monkeypatch.setattr("multiplicity_bench.benchmark.stages.evaluate", broken)
    monkeypatch.setattr(sys, "argv", ["run-benchmark", "generator=identical", *tiny(tmp_path)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError, match="by a test"):  # Python ends with a traceback and exit code 1
        cli.main()


def own_file(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 60), ("val", 20), ("test", 20)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 2
    np.savez(path, **(arrays | changes))
    return path


OWN = ["generator=identical", "dataset=npz", "network=mlp", "network.width=4", "training.epochs=1", "members=2"]


def test_a_users_own_file_gives_a_record_without_its_path(run_benchmark, tmp_path):
    file = own_file(tmp_path / "own.npz")
    answer = run_benchmark(*OWN, f"data_root={file}", *paths(tmp_path), "draws=5")
    record = Path(answer.out[0]).read_text()
    assert answer.code == 0 and str(tmp_path) not in record and "own.npz" not in record


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"test_labels": np.arange(19) % 2}, "test_labels"),
        ({"val_labels": np.zeros(20, int)}, "val_labels"),
        ({"train_images": np.zeros((60, 28, 28), np.float32)}, "train_images"),
        ({"test_images": np.zeros((20, 14, 14), np.uint8)}, "test_images"),
    ],
    ids=["lengths", "one class", "float images", "sizes"],
)
def test_a_broken_file_is_one_line_naming_file_and_array(changes, says, run_benchmark, tmp_path):
    file = own_file(tmp_path / "own.npz", **changes)
    answer = run_benchmark(*OWN, f"data_root={file}", *paths(tmp_path))
    assert answer.code == 2 and len(answer.err) == 1 and str(file) in answer.err[0] and says in answer.err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["own.npz"]


def test_an_own_file_without_its_path_says_how_to_name_it(run_benchmark, tmp_path):
    answer = run_benchmark(*OWN, *paths(tmp_path))
    assert answer.code == 2 and len(answer.err) == 1 and "data_root=FILE.npz" in answer.err[0]
