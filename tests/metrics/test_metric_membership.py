"""Membership of the Rashomon set, decided on the validation split."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from multiplicity_bench.metrics.api import LOSSES, Settings, Undefined
from multiplicity_bench.metrics.context import softmax
from multiplicity_bench.metrics.membership import membership
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, log_loss, roc_auc_score


@pytest.fixture(scope="module")
def val(make_predictions):
    return make_predictions("val", members=12, samples=150, noise=0.6)


def losses(p, y):
    decided = p.argmax(axis=1)
    return {
        "nll": log_loss(y, p),
        "zero_one": (decided != y).mean(),
        "brier": brier_score_loss(y, p[:, 1]),
        "auroc": 1 - roc_auc_score(y, p[:, 1]),
        "balanced_accuracy": 1 - balanced_accuracy_score(y, decided),
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_base_and_members(val, loss):
    found = membership(val, Settings(loss=loss))
    assert found.base == pytest.approx(losses(softmax(val.base), val.labels)[loss], abs=1e-9)
    truth = [losses(softmax(z), val.labels)[loss] for z in val.logits]
    np.testing.assert_allclose(found.members, truth, atol=1e-9)
    np.testing.assert_allclose(found.difference, found.members - found.base, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_whoever_is_in_at_one_tolerance_is_in_at_every_larger_one(val, loss):
    who = membership(val, Settings(loss=loss, draws=200))
    for decide in (who.accepted, who.certified, who.possible):
        inside = [decide(epsilon) for epsilon in np.linspace(-0.1, 1.0, 23)]
        assert all((larger >= smaller).all() for smaller, larger in pairwise(inside))
        assert inside[0].sum() < inside[-1].sum(), "nothing is decided over these tolerances"


@pytest.mark.parametrize("loss", LOSSES)
def test_certified_members_are_accepted_and_accepted_ones_possible(val, loss):
    found = membership(val, Settings(loss=loss))
    for epsilon in (0.0, 0.02, 0.05, 0.1):
        inside = found.accepted(epsilon)
        assert (found.certified(epsilon) <= inside).all() and (inside <= found.possible(epsilon)).all()
        np.testing.assert_array_equal(inside, found.members <= found.base + epsilon + 1e-12)


def test_paired_standard_error_of_independent_samples(val):
    found = membership(val, Settings())
    y = val.labels
    base = -np.log(softmax(val.base)[np.arange(150), y])
    paired = -np.log(softmax(val.logits)[:, np.arange(150), y]) - base
    np.testing.assert_allclose(found.se, paired.std(axis=1, ddof=1) / np.sqrt(150), rtol=1e-9)
    np.testing.assert_allclose(found.high - found.difference, 1.6448536 * found.se, rtol=1e-6)


def test_standard_error_goes_by_patient(make_predictions):
    one = make_predictions("val", members=5, samples=100)
    repeated = make_predictions("val", members=5, samples=100)
    for name in ("logits", "base", "labels"):
        array = getattr(one, name)
        setattr(repeated, name, np.repeat(array, 4, axis=1 if name == "logits" else 0))
    repeated.patient = np.repeat(np.arange(100), 4)
    a, b = (membership(p, Settings()) for p in (one, repeated))
    np.testing.assert_allclose(a.se, b.se, rtol=1e-9)
    assert b.patients == 100


def test_members_equal_to_the_base_are_in_at_any_tolerance(val):
    val = type(val)(np.repeat(val.base[None], 4, axis=0), val.base, val.labels, val.task, "val")
    for loss in LOSSES:
        found = membership(val, Settings(loss=loss))
        assert found.certified(0.0).all() and (found.difference == 0).all()
        assert np.isnan(found.epsilon_in_se(0.05))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_failed_member_is_in_at_no_tolerance(val, loss):
    failing = replace(val, logits=np.concatenate([val.base[None], val.logits]), failed=(0, 3))
    found = membership(failing, Settings(loss=loss, draws=200))
    made = np.isin(np.arange(13), (0, 3), invert=True)
    for epsilon in (1e6, np.inf):
        for inside in (found.accepted(epsilon), found.certified(epsilon), found.possible(epsilon)):
            np.testing.assert_array_equal(inside, made)
    without = membership(replace(failing, logits=failing.logits[made], failed=()), Settings(loss=loss, draws=200))
    assert found.epsilon_in_se(0.1) == without.epsilon_in_se(0.1), "it has no standard error of its own"
    nobody = membership(replace(val, failed=tuple(range(12))), Settings(loss=loss))
    assert not nobody.possible(np.inf).any() and np.isnan(nobody.epsilon_in_se(0.1))


def test_warnings_name_what_the_validation_split_cannot_resolve(val):
    nll = membership(val, Settings())
    assert "standard errors" in nll.warning(1e-4) and nll.warning(10.0) == ""
    assert nll.epsilon_in_se(0.2) == pytest.approx(0.2 / np.median(nll.se))
    errors = membership(val, Settings(loss="zero_one"))
    assert "one validation patient (1/150)" in errors.warning(1 / 151) and errors.warning(1 / 150) == ""


def test_multilabel_loss_is_the_mean_over_labels_of_what_is_known(make_predictions):
    val = make_predictions("val", members=3, samples=80, classes=4, task="multilabel")
    found = membership(val, Settings())
    p = 1 / (1 + np.exp(-val.base.astype(float)))
    each = []
    for label in range(4):
        known = val.labels[:, label] >= 0
        each.append(log_loss(val.labels[known, label], p[known, label]))
    assert found.base == pytest.approx(np.mean(each), abs=1e-9)


def test_bad_losses_and_empty_classes_are_refused(val):
    with pytest.raises(ValueError, match="unknown loss 'mse'"):
        membership(val, Settings(loss="mse"))
    alone = type(val)(val.logits, val.base, np.zeros_like(val.labels), val.task, "val")
    for loss in ("auroc", "balanced_accuracy"):
        with pytest.raises(Undefined, match="class"):
            membership(alone, Settings(loss=loss))
