"""Selection: closed forms against all subsets, the choice against loops, error rates and power of the verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.metrics.api import METRICS, PerMember, Undefined, register_metric
from multiplicity_bench.metrics.context import Context, contexts, softmax
from multiplicity_bench.metrics.intervals import Estimate, PatientBootstrap
from multiplicity_bench.metrics.selection import (
    MEMBER_DRAWS,
    NO,
    OPEN,
    YES,
    Selection,
    Verdict,
    best_of_k_weights,
    curves,
    expected_best_of_k,
    select,
    settle,
    verdict,
    violation,
)
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss

K = 6
RECALL = "worst_class_recall"
NOTHING = curves(np.zeros(1), np.zeros(1), [1])
KEPT = violation(np.zeros(1), np.zeros(1), [1], 0.0)


def all_choices(val, k):
    """Yield per k-subset the members that are best on val: one of them is chosen at random."""
    for subset in combinations(range(len(val)), k):
        best = max(val[m] for m in subset)
        yield [m for m in subset if val[m] == best]


@pytest.mark.parametrize(("k", "expected"), enumerate([3.0, 4.0, 4.5, 4.8, 5.0], start=1))
def test_expected_best_of_one_to_five(k, expected):
    values = np.array([4.0, 1.0, 5.0, 3.0, 2.0])
    assert expected_best_of_k(values, values, k) == pytest.approx(expected, abs=1e-12)
    assert curves(values, values, [k]).test[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_curves_and_violations_equal_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(0)
    val, test, losses = rng.normal(size=K), rng.normal(size=K), rng.normal(scale=0.1, size=K)
    if ties:
        val, test = np.array([1.0, 2.0, 2.0, 0.0, 1.0, 2.0]), np.array([3.0, 1.0, 1.0, 3.0, 0.0, 2.0])
    ks = range(1, K + 1)
    found, broken = curves(val, test, ks), violation(val, losses, ks, 0.02)
    for i, k in enumerate(ks):
        chosen = list(all_choices(val, k))
        assert found.val[i] == pytest.approx(np.mean([val[c].mean() for c in chosen]), abs=1e-12)
        assert found.test[i] == pytest.approx(np.mean([test[c].mean() for c in chosen]), abs=1e-12)
        oracle = np.mean([test[list(c)].max() for c in combinations(range(K), k)])
        assert found.oracle[i] == pytest.approx(oracle, abs=1e-12)
        assert found.winners_curse[i] == pytest.approx(found.val[i] - found.test[i], abs=1e-12)
        assert found.oracle_gap[i] == pytest.approx(oracle - found.test[i], abs=1e-12)
        assert broken.chance[i] == pytest.approx(np.mean([(losses[c] > 0.02).mean() for c in chosen]), abs=1e-12)
        excess = np.mean([np.maximum(losses[c] - 0.02, 0).mean() for c in chosen])
        assert broken.excess[i] == pytest.approx(excess, abs=1e-12)
    assert np.isnan([found.low, found.high]).all()


def test_gaps_that_differ_in_their_last_bit_are_tied():
    val = -np.array([0.9 - 0.8, 0.8 - 0.7, 0.5])
    assert val[0] != val[1]
    np.testing.assert_allclose(best_of_k_weights(val, [3]), [[0.5, 0.5, 0.0]], atol=1e-12)


def test_the_band_is_the_interval_of_the_curve_on_every_draw():
    rng = np.random.default_rng(1)
    val, test = rng.normal(size=K), rng.normal(size=K)
    draws = test + rng.normal(size=(80, K))
    found = curves(val, test, [1, 3, K], draws)
    for i, k in enumerate((1, 3, K)):
        each = np.array([expected_best_of_k(val, d, k) for d in draws])
        ends = Estimate(expected_best_of_k(val, test, k), each, 0).interval()
        assert (found.low[i], found.high[i]) == pytest.approx((ends.low, ends.high), abs=1e-12)


@pytest.mark.parametrize("k", [0, K + 1])
def test_k_outside_the_set_is_refused(k):
    with pytest.raises(ValueError, match=f"no subsets of {k} among {K}"):
        curves(np.zeros(K), np.zeros(K), [k])


def test_the_best_of_a_hundred_gains_on_test_what_its_truth_allows():
    """True sd .01, noise .03: `sqrt(.001) E max` = +.079 on val, of it a tenth (.0001/.001) on test.

    The best of 100 normals has mean 2.508 and sd .43; means of 4,000: standard errors .0002 and .0005, four allowed.
    """
    rng = np.random.default_rng(2)
    truth, (noise_val, noise_test) = rng.normal(0, 0.01, (4000, 100)), rng.normal(0, 0.03, (2, 4000, 100))
    pairs = [(t + a, t + b) for t, a, b in zip(truth, noise_val, noise_test)]
    best = np.mean([(expected_best_of_k(v, v, 100), expected_best_of_k(v, t, 100)) for v, t in pairs], axis=0)
    assert best == pytest.approx([2.508 * math.sqrt(0.001), 2.508 * math.sqrt(0.001) / 10], abs=0.002)
    assert best[0] == pytest.approx(0.0793, abs=0.0008)


@pytest.fixture(scope="module")
def make_views(make_context):
    """Return a function that makes the problems on val and test: base, members with noise, three samples a patient."""

    def make(members=K, classes=3, draws=120, noise=0.5, patients=(70, 90), seed=0, label=0):
        views = []
        for view, n in enumerate(patients):
            rng = np.random.default_rng([seed, view, label])
            labels = rng.integers(-1, classes, size=3 * n)
            base = rng.normal(size=(3 * n, classes))
            base[np.arange(3 * n), np.maximum(labels, 0)] += 1.0
            p = softmax(base + noise * rng.normal(size=(members, 3 * n, classes)))
            patient = np.repeat(np.arange(n), 3)
            sex = np.arange(n)[patient] % 2
            views.append(make_context(p, softmax(base), labels, patient, draws, 0, attributes={"sex": sex}))
        return views

    return make


def resampled(context, draw):
    return np.repeat(np.arange(len(context.labels)), context.bootstrap.counts[draw][context.bootstrap.index])


def recall(context, p, rows=slice(None)):
    y, decided = context.labels[rows], p[rows].argmax(axis=1)
    return min(np.mean(decided[y == c] == c) for c in range(context.classes))


def loss(context, p, rows=slice(None)):
    known = context.labels[rows] >= 0
    return log_loss(context.labels[rows][known], p[rows][known], labels=range(context.classes))


def test_a_selection_equals_a_loop_over_members_and_draws(make_views):
    val, test = make_views()
    found = select([val], [test], 3, epsilon=0.03, margin=0.01, names=[RECALL])[RECALL]
    on_val, on_test = (np.array([recall(c, p) for p in c.probabilities]) for c in (val, test))
    base_val, base_test = (recall(c, c.base) for c in (val, test))
    assert found.chosen == on_val.argmax() and np.sum(on_val == on_val.max()) == 1
    best = found.chosen
    assert found.gain_val == pytest.approx(on_val[best] - base_val, abs=1e-12)
    assert found.gain.value == pytest.approx(on_test[best] - base_test, abs=1e-12)
    losses = np.array([loss(test, p) for p in test.probabilities]) - loss(test, test.base)
    assert found.loss.value == pytest.approx(losses[best], abs=1e-12) and found.loss.n == found.gain.n <= 90
    for draw in (0, 64, 119):
        rows = resampled(test, draw)
        assert found.gain.draws[draw] == pytest.approx(
            recall(test, test.probabilities[best], rows) - recall(test, test.base, rows), abs=1e-9
        )
        assert found.loss.draws[draw] == pytest.approx(
            loss(test, test.probabilities[best], rows) - loss(test, test.base, rows), abs=1e-9
        )
    ks = np.arange(1, K + 1)
    wanted = curves(on_val, on_test, ks)
    for name in ("ks", "val", "test", "oracle"):
        np.testing.assert_allclose(getattr(found.curves, name), getattr(wanted, name), atol=1e-12)
    np.testing.assert_allclose(found.gains.val, wanted.val - base_val, atol=1e-12)
    np.testing.assert_allclose(found.gains.test, wanted.test - base_test, atol=1e-12)
    assert (found.gains.low < found.gains.test).all() and (found.gains.test < found.gains.high).all()
    for made, tolerance in ((found.violation, 0.03), (found.cost, 0.01)):
        np.testing.assert_allclose(made.chance, violation(on_val, losses, ks, tolerance).chance, atol=1e-12)
        np.testing.assert_allclose(made.excess, violation(on_val, losses, ks, tolerance).excess, atol=1e-12)


def test_reselection_is_a_loop_over_val_draws_with_ties_to_the_lower_loss(make_views):
    val, test = make_views(noise=0.1)
    found = select([val], [test], 3, 0.05, names=[RECALL])[RECALL]
    by_loss = np.argsort([loss(val, p) for p in val.probabilities])
    again = []
    for draw in range(120):
        values = np.array([recall(val, p, resampled(val, draw)) for p in val.probabilities]).round(9)
        again.append(next(m for m in by_loss if values[m] == values.max()))
    assert found.stability == pytest.approx(np.mean(np.array(again) == found.chosen))
    gains = np.array([recall(test, p) for p in test.probabilities]) - recall(test, test.base)
    assert found.reselected_gain == pytest.approx(gains[again].mean(), abs=1e-12)


def test_criteria_where_lower_is_better_choose_the_lowest(make_views):
    val, test = make_views()
    name = "member_calibration_error"
    found = select([val], [test], 3, 0.05, names=[name])[name]
    of = METRICS.get(name)
    on_val, on_test = (of(c, np.concatenate([c.base[None], c.probabilities])).values for c in (val, test))
    assert found.chosen == on_val[1:].argmin()
    assert found.gain_val == pytest.approx(on_val[0] - on_val[1:].min(), abs=1e-12)
    assert found.gain.value == pytest.approx(on_test[0] - on_test[1 + found.chosen], abs=1e-12)
    assert (np.diff(found.curves.val) >= 0).all() and found.curves.oracle[-1] == pytest.approx(-on_test[1:].min())


def test_members_get_the_first_200_draws_and_the_choice_all(make_views):
    val, test = make_views(draws=260)
    found = select([val], [test], 3, 0.05, names=[RECALL])[RECALL]
    first = [replace(c, bootstrap=PatientBootstrap(210 + 60 * i, c.bootstrap.index, MEMBER_DRAWS, 0))
             for i, c in enumerate((val, test))]  # fmt: skip
    few = select(first[:1], first[1:], 3, 0.05, names=[RECALL])[RECALL]
    assert len(found.gain.draws) == 260 and len(few.gain.draws) == 200
    np.testing.assert_array_equal(found.gain.draws[:200], few.gain.draws)
    assert (found.stability, found.reselected_gain) == (few.stability, few.reselected_gain)
    np.testing.assert_array_equal(found.gains.low, few.gains.low)


def test_order_of_members_and_cases_does_not_matter(make_views):
    val, test = make_views()
    rng = np.random.default_rng(3)
    members = rng.permutation(K)

    def moved(context):
        cases = rng.permutation(len(context.labels))
        bootstrap = PatientBootstrap(len(cases), context.bootstrap.index[cases], 120, 0)
        attributes = {name: codes[cases] for name, codes in context.attributes.items()}
        probabilities = context.probabilities[members][:, cases]
        return Context(probabilities, context.base[cases], context.labels[cases], bootstrap, attributes=attributes)

    before, after = select([val], [test], 3, 0.05), select([moved(val)], [moved(test)], 3, 0.05)
    assert set(before) == set(after) and sum(isinstance(s, Selection) for s in before.values()) == 5
    for key, one in before.items():
        other = after[key]
        if isinstance(one, Undefined):
            assert str(one) == str(other)
            continue
        assert members[other.chosen] == one.chosen, key
        for a, b in ((one.gain, other.gain), (one.loss, other.loss)):
            assert b.value == pytest.approx(a.value, abs=1e-12)
            np.testing.assert_allclose(b.draws, a.draws, atol=1e-11)
        assert (one.stability, one.gain_val) == pytest.approx((other.stability, other.gain_val), abs=1e-12)
        for a, b in ((one.curves, other.curves), (one.gains, other.gains)):
            for name in ("val", "test", "oracle", "low", "high"):
                np.testing.assert_allclose(getattr(b, name), getattr(a, name), atol=1e-11)


def test_several_labels_are_averaged(make_views):
    pairs = [make_views(classes=2, label=label) for label in range(3)]
    val, test = zip(*pairs)
    found = select(val, test, 3, 0.05, names=[RECALL])[RECALL]
    on_val, on_test = (np.mean([[recall(c, p) for p in c.probabilities] for c in v], axis=0) for v in (val, test))
    best = found.chosen
    assert best == on_val.argmax()
    base = np.mean([recall(c, c.base) for c in test])
    assert found.gain.value == pytest.approx(on_test[best] - base, abs=1e-12)
    paired = [loss(c, c.probabilities[best]) - loss(c, c.base) for c in test]
    assert found.loss.value == pytest.approx(np.mean(paired), abs=1e-12)
    draw = [[recall(c, p, resampled(c, 7)) for p in (c.base, c.probabilities[best])] for c in test]
    assert found.gain.draws[7] == pytest.approx(np.diff(np.mean(draw, axis=0))[0], abs=1e-9)
    test[1].labels = np.minimum(test[1].labels, 0)
    reason = select(val, test, 3, 0.05, names=[RECALL])[RECALL]
    assert isinstance(reason, Undefined) and str(reason) == "test, label 1: class 1 has no sample"


def test_a_multilabel_set_comes_as_one_context_per_label(make_predictions):
    views = [make_predictions(v, classes=3, task="multilabel") for v in ("val", "test")]
    val, test = ([*contexts(p, np.arange(8), PatientBootstrap(120, None, 50, 0), 0)] for p in views)
    found = select(val, test, 5, 0.05)
    assert isinstance(found["member_auroc"], Selection) and found["member_auroc"].gain.n <= 120
    for name in ("tpr_gap", "accuracy_gap", "worst_group_accuracy"):
        assert str(found[name]) == "val, label 0: no attribute of the patients is known"


def test_a_group_counts_only_where_both_views_have_enough_patients(make_views):
    """Site 2 is large on test alone: it is the worst there, and must not be reported."""
    val, test = make_views(patients=(80, 90))
    val.attributes = {"site": np.repeat([0, 1, 2], [30 * 3, 30 * 3, 20 * 3])}
    test.attributes = {"site": np.repeat([0, 1, 2], 30 * 3)}
    test.labels[180:] = np.where(test.labels[180:] >= 0, (test.base[180:].argmax(axis=1) + 1) % 3, -1)
    found = select([val], [test], 3, 0.05, names=["worst_group_accuracy"])["worst_group_accuracy#site"]

    def worst(context, p):
        rows = [(context.attributes["site"] == g) & (context.labels >= 0) for g in (0, 1)]
        return min(accuracy_score(context.labels[r], p[r].argmax(axis=1)) for r in rows)

    np.testing.assert_allclose(found.curves.oracle[-1], max(worst(test, p) for p in test.probabilities), atol=1e-12)
    assert found.gain.value == pytest.approx(
        worst(test, test.probabilities[found.chosen]) - worst(test, test.base), abs=1e-12
    )
    assert test.attributes["site"].max() == 2
    val.attributes = {"site": np.where(val.attributes["site"] == 1, 2, val.attributes["site"])}
    val.attributes["site"][-5 * 3 :] = 1
    test.attributes = {"site": np.where(test.attributes["site"] == 2, 1, test.attributes["site"])}
    reason = select([val], [test], 3, 0.05, names=["accuracy_gap"])["accuracy_gap#site"]
    assert str(reason).startswith("val: 1 of 1 groups of 'site' have 25 patients")


def test_too_few_members_and_wrong_names_are_named(make_views):
    val, test = make_views(members=2)
    few = select([val], [test], 3, 0.05)
    assert {str(few[key]) for key in (RECALL, "worst_group_accuracy#sex", "member_auroc")} == {"2 of 3 accepted"}
    nobody = [replace(c, probabilities=c.probabilities[:0]) for c in (val, test)]
    assert str(select(nobody[:1], nobody[1:], 3, 0.05)[RECALL]) == "0 of 3 accepted"
    with pytest.raises(ValueError, match=r"\[2\] members by label on val, \[0\] on test"):
        select([val], nobody[1:], 3, 0.05)
    with pytest.raises(UserError, match="'nll' is no criterion: its level is model"):
        select([val], [test], 1, 0.05, names=["nll"])
    unknown = replace(val, labels=np.full_like(val.labels, -1))
    with pytest.raises(Undefined, match="missing everywhere"):
        select([unknown], [test], 1, 0.05)


def test_a_criterion_of_a_third_party_is_selected_by(make_views, monkeypatch):
    dict(METRICS.load_all())  # what is first imported under the patch would be lost with it
    for name in ("_objects", "_origins"):
        monkeypatch.setattr(METRICS, name, dict(getattr(METRICS, name)))

    @register_metric("doubt", direction="lower", level="criterion", unit="probability", citation="a test")
    def doubt(context, probabilities):
        """Mean probability of the last class, and a sibling without a value."""
        values = probabilities[..., -1].mean(axis=1)
        draws = np.repeat(values[None], context.bootstrap.draws, axis=0)
        return {"#last": PerMember(values, draws), "#other": Undefined("never known")}

    val, test = make_views()
    found = select([val], [test], 3, 0.05)
    assert found["doubt#last"].chosen == val.probabilities[..., -1].mean(axis=1).argmin()
    assert found["doubt#last"].stability == 1.0
    assert str(found["doubt#other"]) == "val: never known"
    test.probabilities[2, 0] = np.nan
    assert (
        str(select([val], [test], 3, 0.05, names=["doubt"])["doubt#last"]) == "test: no finite value for model 2 of 6"
    )

    @register_metric("shapeless", direction="lower", level="criterion", unit="", citation="a test")
    def shapeless(context, probabilities):
        """One number, whatever is asked."""
        return PerMember(np.zeros(1), np.zeros((context.bootstrap.draws, 1)))

    with pytest.raises(ValueError, match="criterion 'shapeless': values"):
        select([val], [test], 3, 0.05, names=["shapeless"])


def selection(gain, gain_draws, loss_value, loss_draws):
    """Return a selection of which only what a verdict reads is there."""
    made = Estimate(gain, gain_draws, 1), Estimate(loss_value, loss_draws, 1)
    return Selection(0, gain, *made, math.nan, math.nan, NOTHING, NOTHING, KEPT, KEPT)


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_verdict_is_the_joint_interval_of_draws_and_base_seeds(seeds):
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 0.01, 500)
    each = [(g, g + shared + rng.normal(0, 0.004, 500), 0.5 * g, 0.3 * shared + 0.5 * g) for g in 0.03 + shared[:seeds]]
    found = verdict([selection(*e) for e in each], margin=0.02)
    laws = []
    for bounds, value, draws in ((found.gain, 0, 1), (found.loss, 2, 3)):
        values = [e[value] for e in each]
        between = np.var(values, ddof=1) / seeds if seeds > 1 else 0.0
        within = np.var(np.mean([e[draws] for e in each], axis=0), ddof=1)
        sd = math.sqrt(within + between)
        # Welch-Satterthwaite of two variances, one of them from infinitely many values
        law = stats.t((within + between) ** 2 / (within**2 / np.inf + between**2 / 4)) if seeds > 1 else stats.norm()
        laws.append(law)
        wanted = [np.mean(values), sd, np.mean(values) - law.ppf(0.975) * sd, np.mean(values) + law.ppf(0.975) * sd]
        assert [bounds.value, bounds.sd, bounds.low, bounds.high] == pytest.approx(wanted, rel=1e-9)
    law, of_loss = laws
    up, over = law.sf(found.gain.value / found.gain.sd), of_loss.sf((found.loss.value - 0.02) / found.loss.sd)
    assert found.p_yes == pytest.approx(max(up, 1 - over), rel=1e-6)
    assert found.p_no == pytest.approx(min(1, 2 * min(1 - up, over)), rel=1e-6)
    assert found.resolvable == pytest.approx((law.ppf(0.975) + stats.norm.ppf(0.8)) * found.gain.sd, rel=1e-9)
    assert found.interval == ("test cases only" if seeds == 1 else "t over base seeds and test cases")
    (alone,) = settle([found])
    assert (alone.words == YES) == (found.gain.low > 0 and found.loss.high <= 0.02)


def test_words_follow_from_gain_and_loss():
    noise = np.random.default_rng(5).normal(0, 0.01, 1000)
    for gain, cost, words in (
        (0.05, 0.0, YES),
        (0.05, 0.06, NO),  # dearer than the margin
        (-0.05, 0.0, NO),
        (0.01, 0.0, OPEN),
        (0.05, 0.02, OPEN),  # the loss may be on either side
    ):
        (found,) = settle([verdict([selection(gain, gain + noise, cost, cost + 0.5 * noise)], margin=0.02)])
        assert found.words == words, (gain, cost)
    assert (YES, NO) == ("better at no cost: yes", "better at no cost: no")
    assert OPEN == "not resolved with this many patients"


def test_holm_runs_over_all_verdicts_of_a_table():
    """By hand at .025: .006 < .025/4, .008 < .025/3, .02 > .025/2: the rest stays open, NaN is not counted."""
    bounds = verdict([selection(0.0, np.zeros(3), 0.0, np.zeros(3))]).gain
    p = [(0.02, 1.0), (0.006, 1.0), (math.nan, math.nan), (1.0, 0.008), (0.021, 0.9)]
    found = settle([Verdict(bounds, bounds, 1, "", 0.0, yes, no) for yes, no in p])
    assert [v.words for v in found] == [OPEN, YES, OPEN, NO, OPEN]
    assert [v.adjusted for v in found] == pytest.approx([0.04, 0.024, math.nan, 0.024, 0.04], nan_ok=True)
    assert settle([]) == []


def test_copies_of_the_base_are_no_better_whatever_the_criterion(make_views):
    tables = []
    for seed in range(3):
        val, test = make_views(classes=2, patients=(120, 130), seed=seed)
        copies = [replace(c, probabilities=np.repeat(c.base[None], K, axis=0)) for c in (val, test)]
        tables.append(select(copies[:1], copies[1:], 3, 0.0))
    assert len(tables[0]) == 6 and all(isinstance(s, Selection) for t in tables for s in t.values())
    for table in tables:
        for key, found in table.items():
            assert (found.chosen, found.gain_val, found.gain.value, found.loss.value) == (0, 0, 0, 0), key
            assert (found.stability, found.reselected_gain) == (1.0, 0.0)
            assert not found.violation.chance.any() and not found.cost.excess.any()
            np.testing.assert_allclose(found.gains.oracle_gap, 0, atol=1e-12)
    for seeds in (1, 3):
        for found in settle([verdict([t[key] for t in tables[:seeds]]) for key in tables[0]]):
            assert (found.words, found.gain.sd, found.gain.low, found.gain.high) == (NO, 0, 0, 0)
            assert (found.p_no, found.p_yes, found.resolvable, found.reason) == (0, 1, 0, "")


def test_a_member_that_decides_every_test_case_as_the_base_is_not_resolved(make_views):
    """Temperature moves no decision: no case tells the two apart, and a standard error of 0 would be pretence."""
    val, test = make_views()
    warm = [replace(c, probabilities=np.repeat(softmax(0.8 * np.log(c.base))[None], K, axis=0)) for c in (val, test)]
    made = select(warm[:1], warm[1:], 3, 0.05, names=[RECALL])[RECALL]
    found = verdict([made], margin=10.0)
    assert found.gain.value == 0 and np.isnan([found.gain.sd, found.resolvable, found.p_yes]).all()
    assert found.reason == "no counted test case tells the chosen member from the base"
    dear = verdict([made], margin=-10.0)
    assert [v.words for v in settle([found, dear])] == [OPEN, NO], "what costs too much is not free, whatever it gains"


def test_without_draws_there_are_values_and_no_verdict(make_views):
    val, test = make_views(draws=0)
    made = select([val], [test], 3, 0.05, names=[RECALL])[RECALL]
    assert np.isfinite([made.gain.value, made.loss.value, *made.curves.test]).all()
    assert np.isnan([made.stability, made.reselected_gain, *made.curves.low]).all()
    (found,) = settle([verdict([made])])
    assert found.words == OPEN and "draws" in found.reason
    holes = selection(0.1, np.where(np.arange(100) < 6, np.nan, 0.1), 0.0, np.zeros(100))
    assert "over 5 % of the draws" in verdict([holes]).reason


def test_a_verdict_needs_selections_on_the_same_draws():
    for wrong in ([], [selection(0, np.zeros(n), 0, np.zeros(n)) for n in (3, 4)]):
        with pytest.raises(ValueError, match="same draws"):
            verdict(wrong)


class Trial:
    """Chosen members of some base seeds on the same 100 test cases: does each decide a case better or worse?

    A third of the cases, the same for all seeds, are decided otherwise than by the base: with chance .9 in a direction
    that the case gives to all seeds, else in one of the seed's own. Directions are even: the true gain is `effect`,
    give or take what each base seed adds of its own (sd `spread`).
    """

    def __init__(self, seeds, seed=0, spread=0.0):
        self.spread = spread
        self.shape = seeds, 100
        self.rng = np.random.default_rng([seed, seeds])
        self.weights = PatientBootstrap(100, None, 150, seed).counts.T / 100

    def selections(self, effect=0.0):
        own, shared = self.rng.choice([-1.0, 1.0], self.shape), self.rng.choice([-1.0, 1.0], 100)
        differs, common = self.rng.random(100) < 1 / 3, self.rng.random(self.shape) < 0.9
        gains = differs * np.where(common, shared, own) + effect
        gains = gains + self.rng.normal(0, self.spread, (self.shape[0], 1))
        losses = self.rng.normal(0, 0.01, self.shape)  # far from the margin: the gain alone decides, as is hardest
        parts = zip(gains.mean(axis=1), gains @ self.weights, losses.mean(axis=1), losses @ self.weights)
        return [selection(*p) for p in parts]

    def verdict(self, effect=0.0):
        return settle([verdict(self.selections(effect), margin=0.1)])[0]


@pytest.mark.parametrize(("seeds", "spread", "expected"), [(1, 0.0, 0.025), (5, 0.0, 0.025), (5, 0.3, 0.025)])
def test_under_the_null_yes_comes_up_in_at_most_one_table_of_twenty(seeds, spread, expected):
    """Members that differ from the base by noise alone, whether or not the base seeds differ beyond it.

    Four binomial standard errors of 1,500 trials are .016 about .025.
    """
    trial = Trial(seeds, spread=spread)
    rate = np.mean([trial.verdict().words == YES for _ in range(1500)])
    assert rate <= 0.05
    assert rate == pytest.approx(expected, abs=0.016)


def test_members_that_are_the_base_with_other_noise_gain_on_val_and_not_on_test():
    """From contexts to verdicts: the choice profits from val alone, and rarely looks better at no cost.

    250 tables; at a rate of .05 more than 24 yes have a chance under .001.
    """
    rng = np.random.default_rng(6)
    made = []
    for _ in range(250):
        views = []
        for _ in ("val", "test"):
            labels = rng.integers(2, size=80)
            p = softmax(np.eye(2)[labels] + rng.normal(size=(9, 80, 2)))
            views.append(Context(p[1:], p[0], labels, PatientBootstrap(80, None, 100, 0)))
        made.append(select(views[:1], views[1:], 5, 10.0, margin=10.0, names=[RECALL])[RECALL])
    gains = np.array([[m.gain_val, m.gain.value] for m in made])
    error = gains.std(axis=0) / math.sqrt(250)
    assert gains[:, 0].mean() > 10 * error[0] and abs(gains[:, 1].mean()) < 4 * error[1]
    assert sum(settle([verdict([m], margin=10.0)])[0].words == YES for m in made) <= 24


def test_base_seeds_alone_would_forget_that_they_share_the_test_cases():
    """The trap that the null above holds: t over the five gains finds an effect in far more than one of twenty."""
    trial = Trial(5)
    gains = np.array([[s.gain.value for s in trial.selections()] for _ in range(400)])
    low = gains.mean(axis=1) - stats.t.ppf(0.975, 4) * gains.std(axis=1, ddof=1) / math.sqrt(5)
    assert np.mean(low > 0) > 0.2


@pytest.mark.parametrize("seeds", [1, 5])
def test_power_at_the_effect_of_the_power_line_is_what_it_says(seeds):
    """Five seeds: their own part of the cases' noise, (1/3 - .27)/5 = .013 beside .283, is counted twice: .81 for .80.

    Four binomial standard errors of 1,000 trials are .05.
    """
    trial = Trial(seeds, seed=1)
    effect = np.mean([trial.verdict().resolvable for _ in range(200)])
    rate = np.mean([trial.verdict(effect).words == YES for _ in range(1000)])
    assert rate == pytest.approx(0.8, abs=0.05)
    assert np.mean([trial.verdict(effect / 2).words == YES for _ in range(300)]) < 0.5


def test_a_table_of_nulls_rarely_says_yes_at_all():
    """Twenty criteria without effect: Holm keeps any yes to 2.5 % of the tables; 200 tables, three standard errors."""
    trial = Trial(1, seed=2)
    tables = [settle([verdict(trial.selections(), margin=0.1) for _ in range(20)]) for _ in range(200)]
    some = np.mean([any(v.words == YES for v in table) for table in tables])
    assert some <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 200)
    alone = np.mean([any(v.p_yes <= 0.025 for v in table) for table in tables])
    assert alone > 0.2, "without Holm 1 - .975^20 = .40"
