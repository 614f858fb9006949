"""The numbers of a toy run do not move unless a version says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
WANTED = json.loads((GOLDEN / "toy_run.json").read_text(encoding="utf-8"))
# Between the instruction sets SSE, AVX2 and AVX-512, and between 1 and 2 threads, these scores moved by at most 2e-6
# (float32, a few dozen steps of training, then rounding to float16, which makes 2e-6 of 1e-7); a changed seed, order of
# draws or formula moves them by 1e-3 and more.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("golden") / "toy_run.json"
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # a plug-in's metrics are none of ours
    done = subprocess.run(
        [sys.executable, str(GOLDEN / "toy_run.py"), str(path)], env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_toy_run_has_the_rows_that_were_committed(found):
    assert list(found) == list(WANTED), "rows of tests/golden/toy_run.yaml changed: run make golden"


@pytest.mark.parametrize("row", WANTED)
def test_no_number_moves_without_a_new_version(found, row):
    old, new = WANTED[row], found[row]
    versions = [
        f"{n} {old['versions'].get(n)} -> {v}" for n, v in new["versions"].items() if old["versions"].get(n) != v
    ]
    assert not versions, f"{row}: versions changed ({', '.join(versions)}): run make golden and commit what it writes"
    assert list(new["scores"]) == list(old["scores"]), f"{row}: other scores than before: run make golden"
    moved = [
        f"{k} {old['scores'][k]} -> {v}" for k, v in new["scores"].items() if abs(v - old["scores"][k]) > TOLERANCE
    ]
    assert not moved, (
        f"{row}: numbers moved ({', '.join(moved)}): if they should, bump the version of the component that moved them "
        f"({', '.join(f'{n} {v}' for n, v in new['versions'].items())}) and run make golden"
    )


@pytest.mark.parametrize("row", WANTED)
def test_no_identity_moves_unnoticed(found, row):
    assert found[row]["key"] == WANTED[row]["key"], (
        f"{row}: its run has another identity than before, so that committed records no longer match what the command "
        "line runs: a field, a default or the data changed; if it should, run make golden"
    )


def test_members_differ_where_they_should_and_copies_do_not(found):
    assert all(found["identical"]["scores"][key] == 0 for key in ("vpr", "vpr@3", "score_sd", "capacity"))
    assert all(found[row]["scores"]["score_sd"] > 1e-3 for row in found if row != "identical")
