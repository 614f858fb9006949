"""A factory of synthetic predictions, and the golden reference vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Predictions
from multiplicity_bench.metrics.context import Context
from multiplicity_bench.metrics.intervals import PatientBootstrap


@pytest.fixture(scope="session")
def golden() -> dict:
    """The reference values: brute force on a base, 4 members, 6 samples and 3 classes."""
    path = Path(__file__).resolve().parent.parent / "golden" / "reference_vectors.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def make_predictions():
    """Return a function that makes noisy members around a base that knows something about the labels."""

    def make(view="test", members=8, samples=120, classes=2, noise=0.5, seed=0, task=None, patient=None):
        rng = np.random.default_rng([seed, len(view)])
        task = task or ("binary" if classes == 2 else "multiclass")
        if task == "multilabel":
            labels = rng.integers(-1, 2, size=(samples, classes))
            base = rng.normal(size=(samples, classes)) + 1.5 * labels
        else:
            labels = rng.integers(classes, size=samples)
            base = rng.normal(size=(samples, classes))
            base[np.arange(samples), labels] += 1.5
        logits = base + noise * rng.normal(size=(members, samples, classes))
        return Predictions(logits.astype(np.float32), base.astype(np.float32), labels, task, view, patient=patient)

    return make


@pytest.fixture(scope="session")
def make_context():
    """Return a function that makes a Context from probabilities of members and base."""

    def make(probabilities, base=None, labels=None, patient=None, draws=0, seed=0, **more):
        probabilities = np.asarray(probabilities, np.float64)
        base = probabilities[0] if base is None else np.asarray(base, np.float64)
        labels = np.zeros(len(base), np.int64) if labels is None else np.asarray(labels)
        bootstrap = PatientBootstrap(len(base), patient, draws, seed)
        return Context(probabilities, base, labels, bootstrap, seed=seed, **more)

    return make
