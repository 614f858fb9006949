"""A small factory of sealed synthetic records, and a suite for them."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
from multiplicity_bench.leaderboard.record import seal
from multiplicity_bench.leaderboard.suite import Suite, load_suite

SUITE = """\
title: Toy board
description: Records made up by a test.
dataset: {name: toy, size: 28}
network: {name: smallcnn}
training: {epochs: 20}
base_seeds: [0, 1, 2, 3, 4]
members: 20
predictions: true
board: true
rows:
  - identical
  - logit_noise
  - temperature
  - retrain
  - laplace
  - laplace: {prior_precision: marglik}
  - laplace: {structure: kron}
  - swag
"""
LEVELS = {
    "identical": (1.0, 0.400, 0.0),
    "logit_noise": (1.0, 0.410, 0.04),
    "temperature": (1.0, 0.412, 0.03),
    "retrain": (0.8, 0.420, 0.10),
    "laplace": (0.9, 0.405, 0.07),
    "laplace[prior_precision=marglik]": (0.0, 0.690, 0.30),
    "laplace[structure=kron]": (0.9, 0.404, 0.06),
    "swag": (0.95, 0.380, 0.05),
}
"""Row -> acceptance rate, loss of the members, level of the multiplicity scores."""

KEYS_AT_ZERO = ("ambiguity", "discrepancy", "vpr", "capacity", "conflict", "disagreement", "score_sd")


@pytest.fixture
def suite_path(tmp_path: Path) -> Path:
    path = tmp_path / "suites" / "toy.yaml"
    path.parent.mkdir()
    path.write_text(SUITE, encoding="utf-8")
    return path


@pytest.fixture
def suite(suite_path: Path) -> Suite:
    return load_suite(suite_path)


@pytest.fixture
def make_record():
    """Return make(row, base_seed, change=None): a sealed record; `change` edits it before it is sealed."""
    return _make_record


@pytest.fixture(scope="session")
def make_records():
    """Return make(suite, change=None): a record for every cell of a suite; `change` edits each before it is sealed."""
    return lambda suite, change=None: [_make_record(row.label, seed, change) for row, seed in suite.cells()]


def _make_record(row: str, base_seed: int, change=None) -> dict:
    record = _ok(row, base_seed)
    if change is not None:
        change(record)
    return seal(record)


def _ok(row: str, base_seed: int) -> dict:
    name, _, settings = row.partition("[")
    fields = dict(pair.split("=") for pair in settings.rstrip("]").split(",") if pair)
    noise = random.Random(f"{row} {base_seed}")
    drawn = 20
    rate, loss, level = LEVELS.get(row, (0.9, 0.4, 0.05))
    members = round(drawn * rate - (noise.randrange(3) if 0 < rate < 1 else 0))
    base_loss = 0.40 + 0.01 * base_seed
    shift = 0 if name == "identical" else noise.gauss(0, 0.003)
    return {
        "row": row,
        "status": "ok",
        "reason": "",
        "identity": {
            "dataset": {"name": "toy", "version": 1, "size": 28, "digest": "d" * 64},
            "network": {"name": "smallcnn", "version": 1},
            "training": {"version": 1, "epochs": 20, "lr": 0.1, "optimizer": "sgd"},
            "base_seed": base_seed,
            "resample_seed": 0,
            "generator": {"name": name, "version": 1, **fields},
            "generator_seed": 0,
            "members": drawn,
            "numerics": {"device": "cpu", "dtype": "float32", "tf32": False, "autocast": False},
        },
        "protocol": {
            "epsilon": 0.05,
            "epsilons": [0.02, 0.05, 0.1],
            "k": 5,
            "loss": "nll",
            "draws": 1000,
            "seed": 0,
            "metrics": {"accuracy": 1, "nll": 1, "vpr": 1},
        },
        "scores": _scores(members, drawn, base_loss, base_loss - 0.4 + loss + shift, level * (1 + 10 * shift)),
        "set": {
            "drawn": drawn,
            "accepted": list(range(members)),
            "deployable": name not in ("logit_noise", "temperature"),
            "batchnorm": None,
            "notes": ["the norm layers' affine parameters were frozen"] if fields.get("structure") == "kron" else [],
            "diagnostics": {},
            "epsilon_in_se": 1.6 + 0.5 * base_seed,
        },
        "data": {
            "task": "binary",
            "classes": ["malignant", "normal, benign"],
            "positive": 1,
            "synthetic": True,
            "licence": "CC BY 4.0",
            "source": "a factory",
            "notes": ["no patient is real"],
            "sizes": {"train": 491, "tune": 55, "val": 78, "test": 156},
            "patients": None,
            "duplicates": {"train/test": 2, "train/val": 0},
        },
        "cost": {
            "fixed_cost_s": 1.5,
            "marginal_cost_s": 0.25,
            "cost_per_accepted_s": (1.5 + drawn * 0.25) / members if members else None,
            "fixed_cost_bt": 0.3,
            "marginal_cost_bt": 0.05 + 0.001 * base_seed,
            "cost_per_accepted_bt": (0.3 + drawn * (0.05 + 0.001 * base_seed)) / members if members else None,
            "cost_per_accepted_with_base_bt": (1.3 + drawn * 0.05) / members if members else None,
            "base_training_s": 5.0,
            "peak_memory_bytes": 300 * 2**20,
            "bytes_per_member": 94152,
            "resumed": False,
            "hardware": "x86_64, 2 cores",
            "threads": 2,
        },
        "provenance": {
            "source_digest": "a" * 64,
            "commit": "c" * 40,
            "dirty": False,
            "versions": {"torch": "2.15.0"},
            "device_name": "x86_64",
        },
        "predictions": {"file": None, "digest": None},
    }


def _scores(accepted: int, drawn: int, base: float, loss: float, level: float) -> dict:
    def score(value: float, interval: str = "bootstrap over patients", half: float = 0.02) -> dict:
        ends = {"low": max(value - half, 0), "high": value + half} if interval else {"low": None, "high": None}
        return {"value": value, **ends, "interval": interval, "n": 156, "version": 1, "reason": ""}

    scores = {}
    for metric, at_base, of_members in (
        ("accuracy", 1.25 - base, 1.25 - loss),
        ("balanced_accuracy", 1.2 - base, 1.2 - loss),
        ("auroc", 1.3 - base, 1.3 - loss),
        ("nll", base, loss),
        ("brier", base / 2, loss / 2),
        ("ece", base / 5, loss / 5),
    ):
        scores[f"{metric}.base"] = score(at_base)
        scores[f"{metric}.member_mean"] = score(of_members)
        scores[f"{metric}.ensemble"] = score(of_members * 0.99)
    for bound, factor in (("", 1.0), ("_certified", 0.7), ("_possible", 1.0)):
        for epsilon, share in (("", 1.0), ("#epsilon=0.02", 0.8), ("#epsilon=0.05", 1.0), ("#epsilon=0.1", 1.0)):
            at_base = 1 if level == 0 else factor * share
            scores[f"acceptance_rate{bound}{epsilon}"] = score(accepted / drawn * at_base, "Wilson")
    for name in KEYS_AT_ZERO:
        scores[name] = score(level, "")
        if name in ("ambiguity", "discrepancy", "vpr", "capacity"):
            scores[f"{name}@5"] = score(level * 0.8)
    for key in ("capacity_effective", "capacity_effective@5"):
        scores[key] = score(1 + level)
    scores["mutual_information"] = score(level / 4)
    if accepted == 0:
        for key in scores:
            if not key.startswith("acceptance_rate") and not key.endswith(".base"):
                scores[key] = {
                    **scores[key],
                    "value": None,
                    "low": None,
                    "high": None,
                    "reason": "no member was accepted",
                }
    return copy.deepcopy(scores)
