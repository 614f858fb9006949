"""The ladder: every rung equals brute force over the members that are left, at equal k."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.ladder import ladder, specifications
from sklearn.metrics import accuracy_score, recall_score

MEMBERS, SAMPLES, K = 9, 30, 3


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def test_view(make_context, rng):
    return make_context(
        rng.dirichlet(np.ones(3), size=(MEMBERS, SAMPLES)),
        base=rng.dirichlet(np.ones(3), size=SAMPLES),
        labels=rng.integers(3, size=SAMPLES),
        draws=50,
    )


@pytest.fixture
def steps():
    return {
        "loss": np.array([1, 1, 1, 1, 1, 1, 1, 1, 0], bool),
        "accuracy": np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], bool),
        "recall": np.array([1, 0, 1, 1, 1, 0, 1, 1, 1], bool),
    }


LEFT = ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 3, 4, 5, 7], [0, 3, 4, 7])


def test_every_rung_is_brute_force_over_the_members_left(test_view, steps, rng):
    properties = {"gap": rng.random(MEMBERS), "loss": rng.random(MEMBERS)}
    rungs = ladder(steps, properties, test_view, K)
    assert [rung.label for rung in rungs] == list(steps)
    for rung, left in zip(rungs, LEFT, strict=True):
        assert rung.members == len(left)
        chosen = [list(c) for c in combinations(left, K)]
        for name, values in properties.items():
            truth = np.mean([values[c].max() - values[c].min() for c in chosen])
            assert rung.ranges[name].value == pytest.approx(truth, abs=1e-12)
        flips = test_view.decisions != test_view.base_decisions
        assert rung.ambiguity.value == pytest.approx(np.mean([flips[c].any(axis=0).mean() for c in chosen]), abs=1e-12)
        pairs = [(test_view.decisions[a] != test_view.decisions[b]).mean() for a, b in combinations(left, 2)]
        assert rung.disagreement.value == pytest.approx(np.mean(pairs), abs=1e-12)
        assert rung.ambiguity.low < rung.ambiguity.value < rung.ambiguity.high


def test_the_order_of_members_does_not_matter(test_view, make_context, steps, rng):
    gap, order = rng.random(MEMBERS), rng.permutation(MEMBERS)
    shuffled = make_context(test_view.probabilities[order], base=test_view.base, labels=test_view.labels)
    one = ladder(steps, {"gap": gap}, test_view, K)
    other = ladder({name: satisfied[order] for name, satisfied in steps.items()}, {"gap": gap[order]}, shuffled, K)
    for a, b in zip(one, other, strict=True):
        assert a.members == b.members
        for x, y in ((a.ranges["gap"], b.ranges["gap"]), (a.ambiguity, b.ambiguity), (a.disagreement, b.disagreement)):
            assert x.value == pytest.approx(y.value, abs=1e-12)


def test_fewer_members_alone_do_not_shrink_what_is_left(test_view, rng):
    """The mean over all specifications that keep five members is what all members have: k is equal."""
    gap = rng.random(MEMBERS)
    (everyone,) = ladder({"drawn": np.ones(MEMBERS, bool)}, {"gap": gap}, test_view, K)
    five = []
    for left in combinations(range(MEMBERS), 5):
        keep = np.isin(np.arange(MEMBERS), left)
        five += ladder({"five": keep}, {"gap": gap}, test_view, K)
    for value in (
        lambda rung: rung.ranges["gap"].value,
        lambda rung: rung.ambiguity.value,
        lambda rung: rung.disagreement.value,
    ):
        assert np.mean([value(rung) for rung in five]) == pytest.approx(value(everyone), abs=1e-12)


def test_a_rung_with_too_few_members_says_how_many(test_view, steps):
    values = {"gap": np.arange(MEMBERS, dtype=float)}
    steps |= {"two": np.isin(np.arange(MEMBERS), [3, 7]), "one": np.isin(np.arange(MEMBERS), [3])}
    *_, two, one = ladder(steps, values, test_view, K)
    for rung, n in ((two, 2), (one, 1)):
        assert rung.members == n
        for score in (rung.ranges["gap"], rung.ambiguity):
            assert np.isnan(score.value) and score.reason == f"{n} of {K} members left"
    different = (test_view.decisions[3] != test_view.decisions[7]).mean()
    assert two.disagreement.value == pytest.approx(different, abs=1e-12)
    assert np.isnan(one.disagreement.value) and one.disagreement.reason == "1 of 2 members left"


def test_copies_of_the_base_leave_exactly_nothing_open(make_context, steps, rng):
    base = rng.dirichlet(np.ones(3), size=SAMPLES)
    copies = make_context(np.repeat(base[None], MEMBERS, axis=0), base=base)
    for rung in ladder(steps, {"loss": np.full(MEMBERS, 0.1)}, copies, K):
        assert (rung.ranges["loss"].value, rung.ambiguity.value, rung.disagreement.value) == (0, 0, 0)


def test_a_property_that_a_member_left_lacks_is_undefined_and_one_that_left_does_not_matter(test_view, steps):
    gap = np.arange(MEMBERS, dtype=float)
    gap[[1, 8]] = np.nan
    first, second, third = ladder(steps, {"gap": gap}, test_view, K)
    assert np.isnan(first.ranges["gap"].value) and first.ranges["gap"].reason == "1 of 8 members have no value"
    assert np.isnan(second.ranges["gap"].value)
    assert third.ranges["gap"].value == pytest.approx(np.mean([np.ptp(c) for c in combinations((0, 3, 4, 7), K)]))


def test_arrays_of_another_length_and_no_subsets_are_refused(test_view, steps):
    with pytest.raises(ValueError, match=r"'gap' has shape \(8,\)"):
        ladder(steps, {"gap": np.zeros(8)}, test_view, K)
    with pytest.raises(ValueError, match="'loss' has shape"):
        ladder({"loss": np.ones(3, bool)}, {}, test_view, K)
    with pytest.raises(ValueError, match="no subsets of 0"):
        ladder(steps, {}, test_view, 0)


def test_the_usual_specifications_follow_from_accuracy_and_worst_class_recall(make_context, rng):
    labels = rng.integers(3, size=200)
    noisy = np.eye(3)[labels] + 1.5 * rng.random((40, 200, 3))
    base = noisy[0]
    labels = np.where(rng.random(200) < 0.1, -1, labels)
    accepted = rng.random(40) < 0.5
    found = specifications(make_context(noisy, base=base, labels=labels), accepted, accuracy=0.02, recall=0.03)
    loss, accuracy, recall = found.values()
    assert list(found) == ["loss within epsilon", "accuracy within 0.02", "worst-class recall within 0.03"]
    np.testing.assert_array_equal(loss, accepted)
    known = labels >= 0
    decided = noisy.argmax(-1)[:, known]

    def worst(decisions):
        return recall_score(labels[known], decisions, average=None).min()

    base_decided = base.argmax(-1)[known]
    least = accuracy_score(labels[known], base_decided) - 0.02
    np.testing.assert_array_equal(accuracy, [accuracy_score(labels[known], d) >= least for d in decided])
    np.testing.assert_array_equal(recall, [worst(d) >= worst(base_decided) - 0.03 for d in decided])
    assert 0 < accuracy.sum() < 40 and 0 < recall.sum() < 40


def test_a_member_exactly_at_the_margin_satisfies_it(make_context):
    labels = np.zeros(100, np.int64)

    def right(n):
        return np.eye(2)[(np.arange(100) >= n).astype(int)]

    for n in range(1, 101):  # .01 is no binary fraction: each difference of two shares is rounded otherwise
        val = make_context(np.stack([right(n - 1), right(n - 2)]) if n > 1 else right(0)[None], right(n), labels)
        met = specifications(val, np.ones(val.size, bool), accuracy=0.01)["accuracy within 0.01"]
        assert met.tolist() == [True, False][: val.size]


def test_specifications_without_a_label_are_undefined(make_context, rng):
    val = make_context(rng.dirichlet(np.ones(2), size=(4, 5)), labels=np.full(5, -1))
    with pytest.raises(Undefined, match="no case of val has a label"):
        specifications(val, np.ones(4, bool))
