"""Accuracy under attack against loops over resampled patients, and its way through the selection."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import METRICS, PerMember, Undefined
from multiplicity_bench.metrics.context import BASE, MEMBERS, Context, Evidence, Models, softmax
from multiplicity_bench.metrics.selection import Selection, select

PATIENTS = np.repeat(np.arange(40), 3)
ATTACKS = ("pgd-4", "fgsm-2", "square-4", "pgd_transfer-4", "pgd_l2-1")


@pytest.fixture(scope="module")
def make_part(make_context):
    """Return a function that makes a part of 120 samples of 40 patients, 25 of them unlabelled, with views."""

    def make(views=(*ATTACKS, "jpeg-3", "ood-noise", "train"), members=4, draws=60, seed=0) -> Context:
        rng = np.random.default_rng(seed)
        labels = rng.integers(3, size=120)
        labels[rng.permutation(120)[:25]] = -1

        def shown(of, seed) -> Context:
            logits = rng.normal(size=(members + 1, 120, 3))
            return make_context(softmax(logits[1:]), softmax(logits[0]), of, PATIENTS, draws, seed)

        part = shown(labels, seed)
        part.views = {v: shown(np.full(120, -1) if v.startswith("ood") else labels, seed + 99) for v in views}
        return part

    return make


def robust(context: Context, models: Models = MEMBERS) -> dict[str, PerMember]:
    return METRICS.get("robust_accuracy")(context, models)


def test_each_attack_has_a_suffix_and_other_views_have_none(make_part):
    assert list(robust(make_part())) == [f"/{name}" for name in ATTACKS]
    with pytest.raises(Undefined, match="no view of an attack"):
        robust(make_part(views=("jpeg-3", "ood-noise", "train")))


def test_values_and_draws_are_shares_of_the_labelled_cases_of_the_parts_patients(make_part):
    part = make_part()
    found = robust(part)["/pgd-4"]
    assert found.values.shape == (4,) and found.draws.shape == (60, 4)
    right = part.views["pgd-4"].probabilities.argmax(axis=2) == part.labels
    for member in range(4):
        assert found.values[member] == pytest.approx(right[member, part.labels >= 0].mean(), abs=1e-12)
        for draw in range(60):
            rows = np.repeat(np.arange(120), part.bootstrap.counts[draw][PATIENTS])
            rows = rows[part.labels[rows] >= 0]
            assert found.draws[draw, member] == pytest.approx(right[member, rows].mean(), abs=1e-6)  # float32 sums


def test_the_base_stands_in_its_own_row(make_part):
    part = make_part()
    own = (part.views["fgsm-2"].base.argmax(axis=1) == part.labels)[part.labels >= 0].mean()
    assert robust(part, BASE)["/fgsm-2"].values == pytest.approx([own])
    pair = robust(part, Models((2, -1)))["/fgsm-2"]
    np.testing.assert_array_equal(pair.values, [robust(part)["/fgsm-2"].values[2], own])


def test_without_any_label_there_is_no_accuracy(make_part):
    part = make_part()
    part.labels = np.full(120, -1)
    with pytest.raises(Undefined, match="no case has a label"):
        robust(part)


def test_the_member_that_withstands_most_on_val_is_chosen(make_part):
    val, test = make_part(seed=1), make_part(seed=2)
    found = select([val], [test], 2, 0.05, names=["robust_accuracy"])
    assert set(found) == {f"robust_accuracy/{name}" for name in ATTACKS}
    selection = found["robust_accuracy/pgd-4"]
    assert isinstance(selection, Selection)
    assert selection.chosen == robust(val)["/pgd-4"].values.argmax()
    gain = robust(test)["/pgd-4"].values[selection.chosen] - robust(test, BASE)["/pgd-4"].values[0]
    assert selection.gain.value == pytest.approx(gain)


def test_transfer_is_the_mean_of_the_stored_shares_over_the_cases_that_have_one(make_part):
    part = make_part()
    with pytest.raises(Undefined, match="no transfer of attacks"):
        METRICS.get("transfer_accuracy")(part, MEMBERS)
    shares = np.random.default_rng(1).random((5, 120))
    shares[:, part.labels < 0] = np.nan
    shares[3] = np.nan  # a member that was shown no other's images
    part.evidence["transfer/pgd-4"] = Evidence(shares[1:], shares[0])
    found = METRICS.get("transfer_accuracy")(part, Models((-1, 1)))["/pgd-4"]
    known = part.labels >= 0
    assert found.values == pytest.approx([shares[0, known].mean(), shares[2, known].mean()])
    counts = part.bootstrap.counts[0][PATIENTS] * known
    assert found.draws[0, 1] == pytest.approx(np.nansum(counts * shares[2]) / counts.sum(), abs=1e-6)
    assert isinstance(METRICS.get("transfer_accuracy")(part, MEMBERS)["/pgd-4"], Undefined)
