"""What is measured on strata: brute force, random strata as the null, and clustered patients."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.context import Context
from multiplicity_bench.metrics.decisions import disagreement, votes
from multiplicity_bench.metrics.intervals import PatientBootstrap
from multiplicity_bench.metrics.strata_measures import (
    counted_strata,
    explained,
    found,
    places_of,
    precision_at,
    random_strata,
    rediscovery,
    worst_stratum,
)
from scipy.stats import binom, kstest
from sklearn.metrics import adjusted_rand_score, matthews_corrcoef


def context(decisions, labels, patient=None, draws=50):
    decisions = np.asarray(decisions)
    probabilities = np.stack([decisions == 0, decisions == 1], axis=-1).astype(float)
    bootstrap = PatientBootstrap(len(labels), patient, draws, 0)
    return Context(probabilities, probabilities[0], np.asarray(labels), bootstrap)


def clustered(seed, patients=90, strata=3):
    """Labels, patients of 1 to 3 cases, codes that patients share within a class, and a score with patient effects."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, size=patients))
    labels = np.where(rng.random(len(patient)) < 0.8, rng.integers(2, size=patients)[patient], 0)
    codes = labels * strata + rng.integers(strata, size=(2, patients))[labels, patient]
    effect = rng.normal(size=(2, patients))[labels, patient] + 0.3 * rng.normal(size=len(patient))
    return labels, patient, codes, 1 / (1 + np.exp(-2 * effect)), rng


def test_random_strata_keep_sizes_within_classes_and_patients_together():
    labels, patient, codes, _, _ = clustered(0, patients=150)
    codes[5], labels[9] = -1, -1
    for c in random_strata(codes, labels, patient, draws=20, seed=0):
        assert c[5] == -1 and c[9] == codes[9]
        for label in (0, 1):
            inside = (labels == label) & (codes >= 0)
            np.testing.assert_array_equal(np.bincount(c[inside]), np.bincount(codes[inside]))
            size = np.bincount(patient[inside], minlength=150)[patient]
            common = inside & np.isin(size, [n for n in (1, 2, 3) if (size[inside] == n).sum() >= 10 * n])
            for p in np.unique(patient[common]):
                assert len(set(c[common & (patient == p)])) == 1
        assert (c != codes).mean() > 0.4


def test_the_codes_of_a_patient_move_together_even_where_they_differ():
    patient = np.repeat(np.arange(40), 2)
    codes = np.tile([0, 1], 40)
    codes[:4] = 2
    for c in random_strata(codes, np.zeros(80, np.int64), patient, draws=20, seed=0):
        assert {tuple(pair) for pair in c.reshape(-1, 2)} == {(0, 1), (2, 2)}


def test_every_patient_takes_part_however_rare_its_number_of_cases():
    sizes = np.arange(1, 13)
    patient = np.repeat(np.arange(12), sizes)
    codes = (patient % 2).astype(np.int64)
    drawn = np.stack(list(random_strata(codes, np.zeros(len(codes), np.int64), patient, draws=200, seed=0)))
    assert (drawn.mean(axis=0) > 0.2).all() and (drawn.mean(axis=0) < 0.8).all()


def test_the_worst_stratum_is_that_of_brute_force():
    rng = np.random.default_rng(1)
    labels, codes = np.repeat([0, 1], 60), np.repeat([0, 1, 2, 3], 30)
    decisions = np.where(rng.random((7, 120)) < 0.7, labels, 1 - labels)
    result = worst_stratum(context(decisions, labels), codes, draws=30)
    accuracy = np.array([[(decisions[m] == labels)[codes == g].mean() for g in range(4)] for m in range(7)])
    worst = accuracy.argmin(axis=1)
    assert result.accuracy.estimate.value == pytest.approx(accuracy.mean(axis=0).min(), abs=1e-12)
    assert result.accuracy.stratum == accuracy.mean(axis=0).argmin() and result.accuracy.estimate.n == 30
    np.testing.assert_array_equal(result.worst, worst)
    shares = np.bincount(worst)[np.bincount(worst) > 0] / 7
    assert result.entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    assert result.agreement == pytest.approx(np.mean([a == b for a, b in combinations(worst, 2)]))
    random = [
        [[(decisions[m] == labels)[c == g].mean() for g in range(4)] for m in range(7)]
        for c in random_strata(codes, labels, np.arange(120), 30, 0)
    ]
    null = np.mean(random, axis=1).min(axis=1)
    assert result.accuracy.expected == pytest.approx(null.mean(), abs=1e-7)
    assert result.accuracy.p == (1 + (null <= accuracy.mean(axis=0).min() + 1e-9).sum()) / 31
    np.testing.assert_allclose(result.excess, accuracy.min(axis=1) - np.min(random, axis=2).mean(axis=0), atol=1e-6)
    assert 0 < result.stability <= 1


def test_equal_members_agree_on_the_worst_stratum_and_one_member_has_no_pair():
    labels, codes = np.zeros(60, np.int64), np.repeat([0, 1], 30)
    decisions = np.repeat((np.arange(60) < 5)[None], 4, axis=0)
    result = worst_stratum(context(decisions, labels), codes, draws=10)
    assert (result.entropy, result.agreement, result.accuracy.stratum) == (0, 1, 0)
    assert np.isnan(worst_stratum(context(decisions[:1], labels), codes, draws=10).agreement)


def test_lift_and_explained_share_are_those_of_brute_force():
    rng = np.random.default_rng(2)
    labels, patient, codes, d, _ = clustered(3, patients=200, strata=2)
    result = explained(context(rng.integers(2, size=(3, len(labels))), labels, patient, draws=3), codes, d, draws=20)
    means = np.array([d[codes == g].mean() for g in range(4)])

    def of_groups(v, w, c):
        sums, n = (np.array([x[c == g].sum() for g in range(4)]) for x in (v * w, w))
        return sums / n, n, (v * w).sum() / w.sum()

    def lift(v, w, c):
        means, _, mean = of_groups(v, w, c)
        return means.max() / mean

    def share(v, w, c):
        means, n, mean = of_groups(v, w, c)
        return (n * (means - mean) ** 2).sum() / (w * (v - mean) ** 2).sum()

    one = np.ones(len(d))
    assert result.lift.estimate.value == pytest.approx(lift(d, one, codes))
    assert result.share.estimate.value == pytest.approx(share(d, one, codes))
    assert result.lift.stratum == means.argmax() and result.share.estimate.n == 200
    null = list(random_strata(codes, labels, patient, 20, 0))
    assert result.share.expected == pytest.approx(np.mean([share(d, one, c) for c in null]))
    assert result.lift.expected == pytest.approx(np.mean([lift(d, one, c) for c in null]))
    assert result.share.p == (1 + sum(share(d, one, c) >= share(d, one, codes) - 1e-9 for c in null)) / 21
    counts = PatientBootstrap(len(d), patient, 3, 0).counts[:, patient].astype(float)
    np.testing.assert_allclose(result.share.estimate.draws, [share(d, w, codes) for w in counts])
    np.testing.assert_allclose(result.lift.estimate.draws, [lift(d, w, codes) for w in counts])


def test_the_null_correction_is_centred_at_zero_for_random_strata():
    excess, members = [], []
    for seed in range(150):
        labels, patient, codes, score, rng = clustered(seed, patients=160, strata=2)
        errors = rng.random((3, len(labels))) < 0.4 * score
        result = worst_stratum(context(np.where(errors, 1 - labels, labels), labels, patient, draws=1), codes, draws=40)
        excess.append(result.accuracy.excess.value)
        members.append(result.excess.mean())
    for values in (excess, members):
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert np.std(excess) > 0.01


def test_p_is_uniform_on_random_strata_of_clustered_patients_and_would_not_be_by_cases():
    p = {"patients": [], "cases": [], "lift": [], "worst": []}
    for seed in range(200):
        labels, patient, codes, d, _ = clustered(seed, patients=160, strata=2)
        decisions = np.where(d > 0.6, 1 - labels, labels)[None]
        by_patient = context(decisions, labels, patient, draws=1)
        result = explained(by_patient, codes, d, draws=59, seed=seed)
        p["patients"].append(result.share.p)
        p["lift"].append(result.lift.p)
        p["cases"].append(explained(context(decisions, labels, draws=1), codes, d, draws=59, seed=seed).share.p)
        p["worst"].append(worst_stratum(by_patient, codes, draws=59, seed=seed).accuracy.p)
    for name in ("patients", "lift", "worst"):
        jittered = np.array(p[name]) - np.random.default_rng(0).random(200) / 60  # p has steps of 1/60
        if name != "worst":  # accuracies tie, which makes p larger
            assert kstest(jittered, "uniform").pvalue > 0.01
        assert np.mean(np.array(p[name]) <= 0.05) <= binom.ppf(0.995, 200, 0.05) / 200
    assert np.mean(np.array(p["cases"]) <= 0.05) > 0.1


def test_a_stratum_that_is_hard_and_one_that_is_contested_are_seen():
    rng = np.random.default_rng(4)
    labels, codes = np.repeat([0, 1], 150), np.repeat(np.arange(6), 50)
    chance = np.where(codes == 4, 0.5, 0.05)
    problem = context(np.where(rng.random((10, 300)) < chance, 1 - labels, labels), labels, draws=200)
    worst = worst_stratum(problem, codes, draws=99)
    assert worst.accuracy.stratum == 4 and worst.accuracy.p == 0.01 and worst.stability == 1 and worst.entropy == 0
    interval = worst.accuracy.excess.interval()
    assert interval.high < -0.2 and interval.low < worst.accuracy.excess.value < interval.high
    d = disagreement(votes(problem.decisions, 2))
    spread = explained(problem, codes, d, draws=99)
    assert spread.lift.stratum == 4 and spread.lift.p == 0.01 and spread.share.p == 0.01
    assert spread.lift.estimate.value > 2 > spread.lift.expected


def test_a_stratum_counts_with_25_patients_with_a_label():
    labels = np.zeros(100, np.int64)
    labels[:3] = -1
    codes = np.repeat([0, 1, 2, -1], [27, 30, 40, 3])
    assert counted_strata(codes, labels, PatientBootstrap(100, None, 0, 0)) == [1, 2]
    patient = np.where(codes == 2, np.arange(100) // 2, np.arange(100) + 100)
    with pytest.raises(Undefined, match="1 of 3 strata have 25 patients, two are needed"):
        counted_strata(codes, labels, PatientBootstrap(100, patient, 0, 0))


def test_what_is_undefined_says_why():
    labels, codes = np.zeros(60, np.int64), np.repeat([0, 1], 30)
    problem = context(np.zeros((2, 60), np.int64), labels)
    with pytest.raises(Undefined, match="no member was accepted"):
        worst_stratum(problem, codes, members=np.zeros((0, 60), np.int64))
    for values, reason in (
        (np.zeros(60), "no two members disagree"),
        (np.full(60, 0.2), "the same"),
        (None, "two mem"),
    ):
        with pytest.raises(Undefined, match=reason):
            explained(problem, codes, np.full(60, np.nan) if values is None else values)
    with pytest.raises(Undefined, match="60 of 60 cases belong to it"):
        found(np.ones(60, bool), codes, np.arange(60))
    with pytest.raises(Undefined, match="was not cut"):
        found(np.arange(60) < 9, np.zeros(60, np.int64), np.arange(60))
    with pytest.raises(Undefined, match="no stratum has 10 cases"):
        precision_at(np.ones(18, bool), np.arange(18) % 2, np.arange(18))
    with pytest.raises(Undefined, match="none of 2 networks cuts a class"):
        rediscovery([labels, labels], labels)


def test_a_known_stratum_is_found_with_precision_recall_and_lift():
    rng = np.random.default_rng(5)
    truth = np.arange(200) < 50
    codes = np.where(truth, rng.choice(3, p=[0.1, 0.8, 0.1], size=200), rng.choice(3, p=[0.5, 0.1, 0.4], size=200))
    codes[:4] = -1
    result = found(truth, codes, np.arange(200), draws=99)
    kept = codes >= 0
    inside = codes[kept] == 1
    assert result.stratum == 1 and result.p == 0.01
    assert result.precision == pytest.approx(truth[kept][inside].mean())
    assert result.recall == pytest.approx(inside[truth[kept]].mean())
    assert result.lift == pytest.approx(result.precision / truth[kept].mean())
    assert result.phi == pytest.approx(matthews_corrcoef(truth[kept], inside))
    assert result.ari == pytest.approx(adjusted_rand_score(truth[kept], codes[kept]))


def test_precision_at_ten_is_that_of_the_best_stratum():
    truth = np.arange(40) < 12
    sure = np.where(np.arange(40) % 5, np.linspace(1, 0.51, 40), 0.0)
    responsibilities = np.stack([1 - sure, sure], axis=1)
    codes, places = responsibilities.argmax(axis=1), places_of(responsibilities)
    assert codes.sum() == 32 and (codes[::5] == 0).all()
    assert precision_at(truth, codes, places) == pytest.approx(0.9)  # 1-4, 6-9 and 11 belong to it, 12 does not
    codes[codes == 1] = -1
    with pytest.raises(Undefined, match="no stratum has 10 cases"):
        precision_at(truth, codes, places)


def test_places_go_by_what_the_other_strata_are_given_even_where_the_own_share_rounds_to_one():
    responsibilities = np.array([[1 - 1e-30, 1e-30], [1e-20, 1.0], [1.0, 1e-40], [0.4, 0.6]])
    assert (responsibilities[:3].max(axis=1) == 1).all()
    assert places_of(responsibilities).tolist() == [1, 2, 0, 3]


def test_strata_of_different_networks_agree_within_classes_alone():
    rng = np.random.default_rng(6)
    labels = np.repeat([0, 1], [200, 100])
    codes = 3 * labels + rng.integers(3, size=300)
    other = 3 * labels + rng.integers(3, size=300)
    renamed = np.array([2, 0, 1, 5, 3, 4])[codes]
    assert rediscovery([codes, renamed], labels) == 1
    assert abs(rediscovery([codes, other], labels)) < 0.05 < adjusted_rand_score(codes, other)
    assert rediscovery([codes, labels * 3], labels) == 0
    half = np.where(labels == 0, codes, other)
    assert rediscovery([codes, half], labels) == pytest.approx(
        (200 + 100 * adjusted_rand_score(codes[labels == 1], other[labels == 1])) / 300
    )
    assert rediscovery([np.where(labels == 1, -1, codes), half], labels) == 1
