"""Shadow networks: who sees what, and attacks on networks that memorised random labels or saw nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import shadows
from multiplicity_bench.benchmark.predict import base_block, predict_block
from multiplicity_bench.benchmark.shadows import Shadows, draw_halves, draw_pool
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.benchmark.train import train
from multiplicity_bench.datasets.api import Split
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Part
from multiplicity_bench.metrics.intervals import PatientBootstrap
from multiplicity_bench.metrics.privacy import ATTACKS, Resampling, evidence_name, leak_by_k, membership_aucs

MEMORISE = (
    "dataset.train=150",
    "dataset.val=110",
    "dataset.test=110",
    "network.width=32",
    "training.epochs=80",
    "training.batch_size=256",
    "training.prior_precision=0.01",
    "training.lr=0.004",
)


@pytest.fixture
def run(make_spec, tmp_path) -> Run:
    return Run(make_spec(tmp_path), Session())


def split(n: int, patient: np.ndarray | None = None, ids: np.ndarray | None = None) -> Split:
    return Split(np.zeros((n, 1, 2, 2), np.uint8), np.zeros(n, np.int64), np.arange(n) if ids is None else ids, patient)


@pytest.mark.parametrize("cases", [10, 312])
def test_every_case_is_in_half_of_the_shadows_and_every_shadow_has_half_of_the_cases(cases):
    inside = draw_halves(cases)
    assert inside.shape == (shadows.SHADOWS, cases)
    assert (inside.sum(axis=0) == shadows.SHADOWS // 2).all() and (inside.sum(axis=1) == cases // 2).all()
    assert (inside[::2] ^ inside[1::2]).all()
    assert len(np.unique(inside, axis=0)) == shadows.SHADOWS
    assert np.array_equal(draw_halves(cases), inside)


def test_shadows_are_drawn_from_train_and_test_alike():
    """The share of training cases in a half of 2000 has the standard deviation 1/(2 sqrt(2000)) = .011; 4 allowed."""
    inside = draw_halves(2000)
    assert (abs(inside[:, :1000].mean(axis=1) - 0.5) < 0.045).all()


def test_the_pool_has_one_image_of_a_patient_and_as_many_of_either_part():
    train_rows, test_rows = draw_pool(split(90, np.arange(90) // 3), split(100, np.arange(100) // 2))
    assert len(train_rows) == len(test_rows) == 30
    assert len(np.unique(train_rows // 3)) == 30 and len(np.unique(test_rows // 2)) == 30
    assert len(np.unique(train_rows % 3)) == 3  # not always a patient's first
    again = draw_pool(split(90, np.arange(90) // 3), split(100, np.arange(100) // 2))
    assert np.array_equal(again[0], train_rows) and np.array_equal(again[1], test_rows)


def test_an_image_that_a_resampled_train_part_repeats_is_drawn_once():
    ids = np.repeat(np.arange(20), 3)
    train_rows, test_rows = draw_pool(split(60, ids=ids), split(50))
    assert len(train_rows) == len(test_rows) == 20 and len(np.unique(ids[train_rows])) == 20


def test_shadows_are_stored_and_shared_by_base_seeds_and_generators(run, make_spec, tmp_path, monkeypatch):
    found = shadows.shadows(run)
    n = len(found.train_rows)
    assert found.logits.shape == (shadows.SHADOWS, 2 * n, 2) and found.logits.dtype == np.float32
    assert found.inside.shape == (shadows.SHADOWS, 2 * n) and np.isfinite(found.logits).all()
    monkeypatch.setattr(shadows, "train", None)  # nothing is trained again
    other = Run(make_spec(tmp_path, "base_seed=3", "generator=identical"), run.session)
    again = shadows.shadows(other)
    assert all(np.array_equal(getattr(again, name), getattr(found, name)) for name in vars(found))


def test_shadows_that_were_killed_go_on_to_the_same_ones(make_spec, tmp_path, monkeypatch):
    whole = shadows.shadows(Run(make_spec(tmp_path / "whole"), Session()))
    broken, trained = Run(make_spec(tmp_path / "broken"), Session()), []

    def killed_at_the_sixth(*args, **more):
        trained.append(more["name"])
        if len(trained) == 6:
            raise KeyboardInterrupt
        return train(*args, **more)

    monkeypatch.setattr(shadows, "train", killed_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        shadows.shadows(broken)
    found = shadows.shadows(broken)
    names = [f"training shadow {s}" for s in range(shadows.SHADOWS)]
    assert trained == [*names[:6], *names[5:]]  # the sixth twice, none else
    assert np.array_equal(found.logits, whole.logits)


def test_no_shadow_sees_a_training_case_outside_the_pool_nor_which_half_a_label_came_from(make_spec, tmp_path):
    """Other labels of the rest of train change nothing; a label of the pool changes the shadows that hold it alone."""
    found = [shadows.shadows(Run(make_spec(tmp_path / "as is"), Session()))]
    rest = np.setdiff1d(np.arange(72), found[0].train_rows)
    assert len(rest)
    for name, rows in (("rest", rest), ("pool", found[0].train_rows[:1])):
        other = Run(make_spec(tmp_path / name), Session())
        other.data.splits["train"].labels[rows] = 1 - other.data.splits["train"].labels[rows]
        found.append(shadows.shadows(other))
    as_is, others_changed, one_changed = found
    assert np.array_equal(as_is.logits, others_changed.logits)
    changed = (as_is.logits != one_changed.logits).any(axis=(1, 2))
    assert np.array_equal(changed, as_is.inside[:, 0])


def test_group_dro_trains_shadows_over_groups_of_the_pool(make_spec, tmp_path):
    groups = ("training.objective=group_dro", "training.groups=sex*label")
    found = shadows.shadows(Run(make_spec(tmp_path, *groups), Session()))
    assert np.isfinite(found.logits).all()


def test_a_multi_label_task_is_refused_in_one_line(run):
    run.data = replace(run.data, task="multilabel")
    with pytest.raises(UserError, match=r"dataset phantom_cxr is multi-label: membership is inferred from"):
        shadows.shadows(run)


def test_scores_go_to_the_test_cases_that_they_are_of():
    rng = np.random.default_rng(0)
    found = Shadows(np.array([1, 4]), np.array([0, 3]), draw_halves(4), rng.normal(size=(16, 4, 2)).astype(np.float32))
    logits = rng.normal(size=(3, 4, 2))
    evidence = shadows.membership_evidence(found, logits, np.array([0, 1, 1, 0]), 5)
    assert set(evidence) == {evidence_name(a, kind) for a in ATTACKS for kind in ("in", "out")}
    inside, outside = evidence["membership/loss/in"], evidence["membership/loss/out"]
    assert inside.shape == (3, 2) and outside.shape == (3, 5)
    assert np.isnan(outside[:, [1, 2, 4]]).all()
    p = torch.softmax(torch.from_numpy(logits), -1).numpy()
    np.testing.assert_allclose(inside, np.log(p[:, [0, 1], [0, 1]]), rtol=1e-9)
    np.testing.assert_allclose(outside[:, [0, 3]], np.log(p[:, [2, 3], [1, 0]]), rtol=1e-9)


def attacked(run: Run, data: Part, networks: int = 2) -> dict[str, np.ndarray]:
    """Return what the attacks make of networks that were trained on `data`."""
    found = shadows.shadows(run)
    pool = shadows.pool_of(run, found.train_rows, found.test_rows)
    victims = [train(run.network, data, run.spec.training, seed) for seed in range(networks)]
    logits = np.concatenate([predict_block(run.network, base_block(v), pool.images).numpy() for v in victims])
    return shadows.membership_evidence(found, logits, pool.labels.numpy(), len(run.data.splits["test"]))


def test_members_of_networks_that_memorise_are_found_and_those_of_networks_that_saw_neither_are_not(
    make_spec, tmp_path
):
    """Labels are random: all that a network can fit is its noise. Those that saw neither are trained on val.

    At chance an AUC of n against n has the standard error `sqrt((2n + 1) / (12 n^2))`, .056 for the 54 patients here.
    """
    run = Run(make_spec(tmp_path, *MEMORISE), Session())
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        labels = run.data.splits[part].labels
        labels[:] = rng.integers(2, size=len(labels))
    for part, seen in (("train", True), ("val", False)):
        evidence = attacked(run, run.part(part))
        for attack in ATTACKS:
            inside, outside = (evidence[evidence_name(attack, kind)] for kind in ("in", "out"))
            n = inside.shape[1]
            error = math.sqrt((2 * n + 1) / (12 * n**2))
            cases = Resampling.beside(PatientBootstrap(outside.shape[1], None, 0, 0), n, 0)
            aucs = membership_aucs(inside, outside, cases).values
            of_set = leak_by_k(inside, outside, (2,), cases)[2].value
            if seen:
                assert aucs.min() > 0.5 + 5 * error and of_set > 0.5 + 5 * error
            else:
                assert (abs(aucs - 0.5) < 3 * error).all() and abs(of_set - 0.5) < 3 * error
