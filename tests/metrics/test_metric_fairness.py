"""Gaps between groups against fairlearn and explicit resampling; thresholds; ranges of gaps against their null."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.metrics.api import METRICS, MetricInfo, PerMember, Settings, Undefined
from multiplicity_bench.metrics.context import decide, softmax
from multiplicity_bench.metrics.evaluation import catalogue, evaluate
from multiplicity_bench.metrics.fairness import (
    GAP_OF,
    RATES,
    at_threshold,
    frozen_threshold,
    group_spread,
    mean_spread,
    member_spread,
    patients_needed,
    signed_gap,
)
from multiplicity_bench.metrics.group_rates import GroupRates
from multiplicity_bench.metrics.selection import select
from sklearn.metrics import roc_auc_score

METRICS_OF_GROUPS = {
    "demographic_parity_gap": "lower",
    "fpr_gap": "lower",
    "equalised_odds_max": "lower",
    "equalised_odds_mean": "lower",
    "worst_group_auroc": "higher",
    "auroc_gap": "lower",
    "calibration_gap": "lower",
}


@pytest.fixture(scope="module")
def make_problem(make_context):
    """Return a function that makes images of patients at sites A, B, C (0, 1, 2), some patients at an unknown one."""

    def make(patients=200, classes=2, members=4, draws=70, seed=0, positive=1):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(patients), rng.integers(1, 4, size=patients))
        site = rng.choice([0, 1, 2, -1], size=patients, p=[0.4, 0.3, 0.25, 0.05])[patient]
        labels = rng.integers(-1, classes, size=len(patient))
        logits = rng.normal(size=(members, len(patient), classes)) + 0.4 * site[:, None] * np.arange(classes)
        logits[:, np.arange(len(patient)), np.maximum(labels, 0)] += 1.0
        p = softmax(np.round(logits - logits[..., :1], 1))  # scores tie
        more = {"attributes": {"site": site}, "positive": positive}
        return make_context(p, None, labels, patient, draws, seed, **more)

    return make


def by_hand(name, context, p, rows):
    """Return a gap of one model on some rows, with repetitions, by loops."""
    y, decided, site = (
        context.labels[rows],
        p[rows].argmax(axis=1) == context.positive,
        context.attributes["site"][rows],
    )
    score, truth = p[rows][:, context.positive], y == context.positive

    def gap(of_group):
        values = [of_group(site == g) for g in (0, 1, 2)]
        return max(values) - min(values)

    tpr, fpr = (gap(lambda g, k=kind: decided[g & (y >= 0) & (truth == k)].mean()) for kind in (True, False))
    return {
        "demographic_parity_gap": lambda: gap(lambda g: decided[g].mean()),
        "fpr_gap": lambda: fpr,
        "tpr_gap": lambda: tpr,
        "equalised_odds_max": lambda: max(tpr, fpr),
        "equalised_odds_mean": lambda: (tpr + fpr) / 2,
        "calibration_gap": lambda: gap(lambda g: (score - truth)[g & (y >= 0)].mean()),
    }[name]()


@pytest.mark.parametrize("positive", [0, 1])
def test_rates_and_gaps_are_those_of_fairlearn(make_problem, positive):
    from fairlearn.metrics import (
        MetricFrame,
        demographic_parity_difference,
        equalized_odds_difference,
        false_positive_rate,
        selection_rate,
        true_positive_rate,
    )
    from sklearn.metrics import accuracy_score

    context = make_problem(positive=positive)
    kept = context.known & (context.attributes["site"] >= 0)
    context.labels = np.where(kept, context.labels, -1)
    context.attributes["site"][~kept] = -1  # fairlearn counts every row
    site = {"sensitive_features": context.attributes["site"][kept]}
    functions = {
        "accuracy": accuracy_score,
        "tpr": true_positive_rate,
        "fpr": false_positive_rate,
        "positive_rate": selection_rate,
    }
    for m, decisions in enumerate(decide(context.probabilities)):
        y, d = (np.asarray(a == positive, int)[kept] for a in (context.labels, decisions))
        frame = MetricFrame(metrics=functions, y_true=y, y_pred=d, **site)
        for name in functions:
            rates = RATES[name](context, context.probabilities)["site"]
            assert rates.groups == (0, 1, 2)
            np.testing.assert_allclose(rates.values[:, m], frame.by_group[name].to_numpy(float), atol=1e-12)

        def ours(name, m=m):
            return METRICS.get(name)(context, context.probabilities)["#site"].values[m]

        difference = frame.difference()
        assert ours("demographic_parity_gap") == pytest.approx(demographic_parity_difference(y, d, **site), abs=1e-12)
        assert ours("equalised_odds_max") == pytest.approx(equalized_odds_difference(y, d, **site), abs=1e-12)
        mean = equalized_odds_difference(y, d, agg="mean", **site)
        assert ours("equalised_odds_mean") == pytest.approx(mean, abs=1e-12)
        for gap in ("accuracy_gap", "tpr_gap", "fpr_gap"):
            assert ours(gap) == pytest.approx(difference[GAP_OF[gap]], abs=1e-12)


@pytest.mark.parametrize(
    "name",
    ["demographic_parity_gap", "fpr_gap", "tpr_gap", "equalised_odds_max", "equalised_odds_mean", "calibration_gap"],
)
def test_values_and_draws_equal_a_loop_over_groups_on_resampled_patients(make_problem, name):
    context = make_problem()
    result = METRICS.get(name)(context, context.probabilities)["#site"]
    everybody = np.arange(len(context.labels))
    assert result.draws.shape == (70, 4) and result.groups == (0, 1, 2)
    for m, p in enumerate(context.probabilities):
        assert result.values[m] == pytest.approx(by_hand(name, context, p, everybody), abs=1e-12)
        for draw in (0, 31, 69):
            rows = np.repeat(everybody, context.bootstrap.counts[draw][context.bootstrap.index])
            assert result.draws[draw, m] == pytest.approx(by_hand(name, context, p, rows), abs=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_of_a_group_is_that_of_scikit_learn_on_its_cases(make_problem, classes):
    context = make_problem(300, classes)
    rates = RATES["auroc"](context, context.probabilities)["site"]
    for g, of_group in zip((0, 1, 2), rates.values):
        mask = (context.attributes["site"] == g) & context.known
        for m, p in enumerate(context.probabilities[:, mask]):
            score = p[:, 1] if classes == 2 else p
            assert of_group[m] == pytest.approx(
                roc_auc_score(context.labels[mask], score, multi_class="ovr"), abs=1e-12
            )
    gap, worst = (METRICS.get(n)(context, context.probabilities)["#site"] for n in ("auroc_gap", "worst_group_auroc"))
    np.testing.assert_allclose(gap.values, np.ptp(rates.values, axis=0))
    np.testing.assert_allclose(worst.draws, rates.draws.min(axis=0))


def test_draws_of_a_groups_auroc_follow_those_of_its_resampled_patients(make_problem):
    """Terms of order 1/n are left out: 1/sqrt(n) of a standard deviation, 1/7 with 50 patients; twice is allowed."""
    context = make_problem(250, members=1, draws=60)
    rates, (p,) = RATES["auroc"](context, context.probabilities)["site"], context.probabilities
    for g, of_group in zip((0, 1, 2), rates.draws[:, :, 0]):
        mask = np.flatnonzero((context.attributes["site"] == g) & context.known)
        weights = context.bootstrap.counts[:, context.bootstrap.index[mask]].astype(float)
        exact = np.array([roc_auc_score(context.labels[mask], p[mask, 1], sample_weight=w) for w in weights])
        assert np.sqrt(((of_group - exact) ** 2).mean()) < 2 / 7 * exact.std()


def test_models_that_are_not_the_contexts_own_are_not_mixed_up_with_them(make_problem):
    context = make_problem()
    own = METRICS.get("fpr_gap")(context, context.probabilities)["#site"]
    others = METRICS.get("fpr_gap")(context, context.probabilities[::-1].copy())["#site"]
    again = METRICS.get("fpr_gap")(context, context.probabilities)["#site"]
    np.testing.assert_array_equal(others.draws, own.draws[:, ::-1])
    np.testing.assert_array_equal(again.draws, own.draws)


def test_a_group_needs_25_patients_in_every_denominator_of_its_rate(make_context):
    """Of 30 patients at site 2, 24 have a positive image and 26 a negative one."""
    patient, site = np.repeat(np.arange(100), 2), np.repeat([0, 1, 2], [80, 60, 60])
    labels = np.concatenate([np.tile([0, 1], 90), np.ones(8, int), np.zeros(12, int)])
    p = np.full((1, 200, 2), 0.5)
    context = make_context(p, None, labels, patient, attributes={"a": site})
    p = context.probabilities
    assert RATES["positive_rate"](context, p)["a"].groups == (0, 1, 2)
    assert RATES["fpr"](context, p)["a"].groups == (0, 1, 2)
    for name in ("equalised_odds_max", "auroc_gap"):
        assert METRICS.get(name)(context, p)["#a"].groups == (0, 1)
    context = make_context(p, None, np.where(site == 1, 0, labels), patient, attributes={"a": site})
    few = METRICS.get("equalised_odds_max")(context, p)["#a"]
    assert str(few) == "1 of 3 groups of 'a' have 25 positive patients, two are needed"
    few = METRICS.get("auroc_gap")(context, p)["#a"]
    assert str(few) == "1 of 3 groups of 'a' have 25 negative patients and 25 positive patients, two are needed"


def test_a_declared_number_of_patients_lets_smaller_groups_count(make_context):
    """22 and 31 patients with a negative and a positive image each; then 9 of the 22 without a positive one, and 10 of
    the 31 without a negative one, so that no rate lacks groups but both rates together do."""
    patient, labels, sex = np.repeat(np.arange(53), 2), np.tile([0, 1], 53), np.repeat([0, 1], [44, 62])
    p = softmax(np.random.default_rng(0).normal(size=(3, 106, 2)))

    def values(least, labels=labels, sex=sex):
        context = make_context(p, None, labels, patient, attributes={"sex": sex}, min_patients=least)
        return {name: METRICS.get(name)(context, p)["#sex"] for name in METRICS_OF_GROUPS}

    assert all(isinstance(found, Undefined) and "have 25 " in str(found) for found in values(25).values())
    found = values(20)
    assert all(result.groups == (0, 1) for result in found.values())
    positive = np.stack([(p[:, sex == g].argmax(axis=-1) == 1).mean(axis=1) for g in (0, 1)])
    np.testing.assert_allclose(found["demographic_parity_gap"].values, np.ptp(positive, axis=0), atol=1e-12)
    one_sided = np.select([patient < 9, patient >= 43], [0, 1], labels)
    few = values(20, one_sided)
    assert str(few["equalised_odds_max"]) == "1 of 2 groups of 'sex' have 20 positive patients, two are needed"
    assert few["fpr_gap"].groups == (0, 1)
    site = np.select([patient < 9, patient < 22, patient >= 43], [0, 1, 2], 3)
    several = values(9, one_sided, site)
    assert several["fpr_gap"].groups == (0, 1, 3)
    assert several["equalised_odds_max"].groups == several["auroc_gap"].groups == (1, 3)
    apart = values(10, one_sided, np.select([patient < 9, patient >= 43], [0, 2], 3))
    assert str(apart["fpr_gap"]) == "1 of 3 groups of 'sex' have 10 negative patients, two are needed"
    both = values(9, one_sided, np.select([patient < 9, patient >= 43], [0, 2], 3))["equalised_odds_mean"]
    assert str(both) == "1 groups of 'sex' have 9 positive and 9 negative patients, two are needed"


def test_what_needs_two_classes_says_so_and_accuracy_and_auroc_remain(make_problem):
    context = make_problem(300, 3)
    for name in ("demographic_parity_gap", "fpr_gap", "equalised_odds_mean", "calibration_gap"):
        with pytest.raises(Undefined, match="two classes, not 3"):
            METRICS.get(name)(context, context.probabilities)
    for name in ("accuracy_gap", "auroc_gap", "worst_group_auroc"):
        assert isinstance(METRICS.get(name)(context, context.probabilities)["#site"], PerMember)
    context.attributes = {}
    with pytest.raises(Undefined, match="no attribute of the patients is known"):
        METRICS.get("auroc_gap")(context, context.probabilities)


def test_metrics_of_groups_are_neither_chosen_by_nor_recorded(make_problem, make_predictions):
    for name, direction in METRICS_OF_GROUPS.items():
        info = METRICS.get(name).info
        assert (info.level, info.direction) == ("group", direction)
    assert not METRICS_OF_GROUPS.keys() & catalogue().keys()
    context = make_problem()
    assert {key.split("#")[0] for key in select([context], [context], 2, 1.0)} == {
        name for name, function in METRICS.load_all() if function.info.level == "criterion"
    }
    with pytest.raises(UserError, match="fpr_gap: a metric of groups is computed from the predictions"):
        evaluate(make_predictions("val"), make_predictions("test"), Settings(draws=0), names=["nll", "fpr_gap"])
    with pytest.raises(UserError, match="'fpr_gap' is no criterion: its level is group"):
        select([context], [context], 2, 1.0, names=["fpr_gap"])
    with pytest.raises(ValueError, match="'neither' is none of higher, lower"):
        MetricInfo("x", "neither", "group", "", "")


def balanced_accuracy(score, truth, threshold):
    decided = score > np.reshape(threshold, (-1, 1))
    return (decided[:, truth].mean(axis=1) + (~decided[:, ~truth]).mean(axis=1)) / 2


@pytest.mark.parametrize("positive", [0, 1])
def test_the_frozen_threshold_is_the_midpoint_of_the_best_thresholds_on_val(make_context, positive):
    rng = np.random.default_rng(1)
    for _ in range(20):
        labels = rng.integers(-1, 2, size=40)
        p = softmax(np.round(rng.normal(size=(40, 2)) + 0.5 * np.eye(2)[np.maximum(labels, 0)], 1))
        context = make_context(p[None], None, labels, positive=positive)
        known = labels >= 0
        score, truth = p[known, positive], labels[known] == positive
        grid = np.linspace(0, 1, 20001)[1:-1]
        values = balanced_accuracy(score, truth, grid)
        best = values >= values.max() - 1e-12
        runs = np.split(np.flatnonzero(best), np.flatnonzero(np.diff(np.flatnonzero(best)) > 1) + 1)
        middles = [(grid[run[0]] + grid[run[-1]]) / 2 for run in runs if len(run) == max(map(len, runs))]
        found = frozen_threshold(context)
        assert balanced_accuracy(score, truth, found)[0] == pytest.approx(values.max(), abs=1e-12)
        assert min(abs(found - m) for m in middles) <= 1e-4, "a step of the grid is 5e-5"


def test_separable_scores_are_parted_in_the_middle_and_a_val_of_one_class_has_no_threshold(make_context):
    scores = np.array([0.1, 0.2, 0.6, 0.9])
    p = np.stack([1 - scores, scores], axis=-1)
    assert frozen_threshold(make_context(p[None], None, [0, 0, 1, 1])) == pytest.approx(0.4, abs=1e-12)
    assert frozen_threshold(make_context(p[None], None, [0, 0, 1, 1], positive=0)) == pytest.approx(0.6, abs=1e-12)
    with pytest.raises(Undefined, match="no threshold from 4 positive and 0 negative cases on val"):
        frozen_threshold(make_context(p[None], None, [1, 1, 1, 1]))


@pytest.mark.parametrize("positive", [0, 1])
def test_shifted_probabilities_decide_by_the_threshold_and_rank_alike(positive):
    rng = np.random.default_rng(2)
    p = softmax(3 * rng.normal(size=(5, 200, 2)))
    for threshold in (0.02, 0.3, 0.5, 0.93):
        shifted = at_threshold(p, threshold, positive)
        np.testing.assert_allclose(shifted.sum(axis=-1), 1.0)
        np.testing.assert_array_equal(decide(shifted) == positive, p[..., positive] > threshold)
        np.testing.assert_array_equal(np.argsort(shifted[0, :, 1]), np.argsort(p[0, :, 1]))
    np.testing.assert_allclose(at_threshold(p, 0.5, positive), p, atol=1e-15)


def noisy_set(make_context, rng, members=15, groups=2, patients=150, draws=199, favour=0.0):
    """Make members that err on cases at random, each with the same chances; `favour`: how much more one of them errs
    in group 0, the next one in group 1, and so on."""
    patient = np.repeat(np.arange(patients), 2)
    group = rng.integers(groups, size=patients)[patient]
    chance = rng.beta(1, 3, size=patients)[patient]
    labels = rng.integers(2, size=len(patient))
    worse = favour * (group == np.arange(members)[:, None] % groups)
    wrong = rng.random((members, len(patient))) < chance + worse
    p = np.eye(2)[np.where(wrong, 1 - labels, labels)]
    return make_context(p, None, labels, patient, draws, int(rng.integers(1 << 30)), attributes={"g": group})


@pytest.mark.parametrize(("groups", "k"), [(2, None), (2, 5), (3, None)])
def test_the_range_over_members_that_differ_by_noise_alone_is_beyond_its_null_in_one_of_twenty(make_context, groups, k):
    """Of 300 sets; the binomial sd is 1.3 %. The lower bound would fail for gaps that fold at 0, which never are."""
    rng = np.random.default_rng([groups, k or 0])
    beyond = []
    for _ in range(300):
        context = noisy_set(make_context, rng, groups=groups)
        spread = member_spread(signed_gap(RATES["accuracy"](context, context.probabilities)["g"]), k)
        beyond.append(spread.value > spread.limit())
        assert (spread.p() <= 0.05) == (spread.value > spread.limit()) or abs(spread.p() - 0.05) < 0.006
    assert 0.012 <= np.mean(beyond) <= 0.09


def test_members_that_favour_opposite_groups_are_found_where_their_unsigned_gaps_hide_them(make_context):
    rng = np.random.default_rng(3)
    context = noisy_set(make_context, rng, favour=0.12)
    rates = RATES["accuracy"](context, context.probabilities)["g"]
    assert member_spread(signed_gap(rates)).p() == 1 / 200
    assert member_spread(METRICS.get("accuracy_gap")(context, context.probabilities)["#g"]).p() > 0.05


def test_the_range_and_its_null_are_those_of_loops(make_context):
    context = noisy_set(make_context, np.random.default_rng(4), members=6, groups=3, draws=50)
    gaps = signed_gap(RATES["tpr"](context, context.probabilities)["g"])
    spread = member_spread(gaps)
    assert spread.value == pytest.approx(max(gaps.values) - min(gaps.values), abs=1e-12)
    moved = [[gaps.draws[d, m] - gaps.values[m] for m in range(6)] for d in range(50)]
    np.testing.assert_allclose(spread.null, [max(row) - min(row) for row in moved], atol=1e-12)
    assert spread.p() == (1 + sum(n >= spread.value for n in spread.null)) / 51
    assert member_spread(gaps, 6).value == pytest.approx(spread.value, abs=1e-12)
    pairs = [abs(gaps.values[i] - gaps.values[j]) for i in range(6) for j in range(i)]
    assert member_spread(gaps, 2).value == pytest.approx(np.mean(pairs), abs=1e-12)
    double = mean_spread([spread, spread])
    assert double.value == spread.value and double.limit() == spread.limit()


def test_equal_members_have_a_range_of_zero_and_few_members_none(make_problem):
    context = make_problem()
    context.probabilities = np.repeat(context.probabilities[:1], 7, axis=0)
    for name in ("fpr_gap", "calibration_gap", "auroc_gap"):
        rates = RATES[GAP_OF[name]](context, context.probabilities)["site"]
        for gaps in (METRICS.get(name)(context, context.probabilities)["#site"], signed_gap(rates)):
            spread = member_spread(gaps)
            assert (spread.value, spread.limit(), spread.p()) == (0.0, 0.0, 1.0)
    one = PerMember(gaps.values[:1], gaps.draws[:, :1])
    with pytest.raises(Undefined, match="1 of 2 accepted"):
        member_spread(one)
    with pytest.raises(Undefined, match="7 of 8 accepted"):
        member_spread(gaps, 8)


def test_the_signed_gap_is_between_the_groups_that_are_furthest_apart_on_average():
    values = np.array([[0.5, 0.9], [0.6, 0.7], [0.8, 0.5]])  # means .7, .65, .65
    rates = GroupRates((4, 5, 7), values, np.stack([values + 0.1, values - 0.1], axis=1))
    gap = signed_gap(rates)
    assert gap.groups == (4, 5)
    np.testing.assert_allclose(gap.values, [-0.1, 0.2])
    assert gap.draws.shape == (2, 2)


def test_a_spread_is_undefined_where_draws_are(make_context):
    gaps = PerMember(np.array([0.1, 0.3]), np.array([[0.1, 0.2]] * 18 + [[np.nan, 0.2]] * 2))
    assert np.isnan(member_spread(gaps).limit()) and np.isnan(member_spread(gaps).p())
    assert member_spread(PerMember(gaps.values, gaps.draws[:19][:0])).value == pytest.approx(0.2)


def test_groups_with_one_rate_are_beyond_chance_in_one_of_twenty(make_context):
    """Of 300 models; the binomial sd is 1.3 %, and the bootstrap's variance is n/(n-1) too small in 50 patients."""
    rng = np.random.default_rng(5)
    beyond = []
    for _ in range(300):
        context = noisy_set(make_context, rng, members=1, groups=3)
        spread = group_spread(RATES["accuracy"](context, context.probabilities)["g"])
        beyond.append(spread.value > spread.limit())
    assert 0.012 <= np.mean(beyond) <= 0.1


def test_as_many_patients_as_needed_resolve_a_gap_in_four_of_five_samples():
    """Two groups with rates .8 and .65, one image each; 4000 samples of the needed size have a binomial sd of .6 %.

    The normal quantiles and rounding the number of patients leave one percent.
    """
    rng = np.random.default_rng(6)
    n, rates = 100, np.array([0.8, 0.65])
    sd = np.sqrt((rates * (1 - rates)).sum() / (n / 2))
    needed = patients_needed(n, 1.959964 * sd, sd, 0.15)
    half = round(needed / 2)
    share = rng.binomial(half, rates, size=(4000, 2)) / half
    se = np.sqrt((share * (1 - share)).sum(axis=1) / half)
    assert np.mean(share[:, 0] - share[:, 1] > 1.959964 * se) == pytest.approx(0.8, abs=0.03)
    assert patients_needed(4 * n, 1.959964 * sd / 2, sd / 2, 0.15) == pytest.approx(needed)
    assert np.isnan(patients_needed(n, sd, sd, 0.0))
