"""Membership inference against closed forms of Gaussian log-odds, brute force over thresholds, and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from multiplicity_bench.metrics import privacy
from multiplicity_bench.metrics.api import METRICS, PerMember, Undefined
from multiplicity_bench.metrics.context import Evidence, Models
from multiplicity_bench.metrics.intervals import PatientBootstrap
from multiplicity_bench.metrics.performance import log_losses
from multiplicity_bench.metrics.privacy import LikelihoodRatio, Resampling, membership_aucs
from scipy.special import log_softmax, ndtr
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

D = 0.8
"""How far the log-odds of a case move, in standard deviations, when a network was trained on it."""


def resampling(members: int, non_members: int, draws: int = 0, seed: int = 0) -> Resampling:
    return Resampling.beside(PatientBootstrap(non_members, None, draws, seed), members, seed)


def simulate(networks: int, cases: int, seed: int, d: float = D):
    """Return log-odds of members and non-members [network, case], and the likelihood ratio of this simulator.

    Cases differ in how hard they are by far more than membership moves them.
    """
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 3, (2, cases))
    inside, outside = hard[:, None] + rng.normal(size=(2, networks, cases))
    ratio_in, ratio_out = (LikelihoodRatio(h + d, h, 1.0, 1.0) for h in hard)
    return ratio_in(inside + d), ratio_out(outside), inside + d, outside


def auc_error(auc: float, n: int) -> float:
    """Return the standard error of an AUC of n members and n non-members (Hanley, McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    return math.sqrt((auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / n**2)


def test_log_odds_are_those_of_the_probabilities_and_stay_apart_where_these_are_one():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (3, 40, 4)), rng.integers(4, size=40)
    p = np.exp(log_softmax(logits, axis=-1))[:, np.arange(40), labels]
    np.testing.assert_allclose(privacy.log_odds(logits, labels), np.log(p / (1 - p)), rtol=1e-9, atol=1e-12)
    confident = np.array([[90.0, 0.0], [120.0, 0.0], [0.0, 4000.0]], np.float32)
    np.testing.assert_array_equal(privacy.log_odds(confident, np.zeros(3, int)), [90.0, 120.0, -4000.0])


def test_the_loss_attack_is_the_cross_entropy_and_the_ratio_that_of_two_normal_densities():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 2, (3, 40, 4)), rng.integers(4, size=40)
    ratio = LikelihoodRatio(rng.normal(size=40), rng.normal(size=40), 0.7, 1.3)
    scores = privacy.attack_scores(logits, labels, ratio)
    assert tuple(scores) == privacy.ATTACKS
    np.testing.assert_allclose(scores["loss"], -log_losses(np.exp(log_softmax(logits, axis=-1)), labels), rtol=1e-12)
    phi = privacy.log_odds(logits, labels)
    by_hand = norm.logpdf(phi, ratio.mean_in, ratio.sd_in) - norm.logpdf(phi, ratio.mean_out, ratio.sd_out)
    np.testing.assert_allclose(scores["lira"], by_hand, rtol=1e-9, atol=1e-9)


def test_shadows_recover_the_gaussians_of_every_case():
    """With m shadows on either side a mean has the error sd/sqrt(m); a pooled sd that of 2000 cases, under 1 %."""
    rng = np.random.default_rng(2)
    cases, m = 2000, 8
    inside = np.argsort(rng.random((2 * m, cases)), axis=0) < m
    hard, gain = rng.normal(0, 3, cases), rng.normal(1, 0.5, cases)
    phi = hard + np.where(inside, gain + 0.6 * rng.normal(size=inside.shape), rng.normal(size=inside.shape))
    ratio = LikelihoodRatio.fit(phi, inside)
    assert ratio.sd_in == pytest.approx(0.6, rel=0.02) and ratio.sd_out == pytest.approx(1.0, rel=0.02)
    for found, truth, sd in ((ratio.mean_in, hard + gain, 0.6), (ratio.mean_out, hard, 1.0)):
        assert np.std(found - truth) == pytest.approx(sd / math.sqrt(m), rel=0.05)


def test_shadows_that_cannot_tell_are_refused_with_the_reason():
    inside = np.array([[True, True], [False, True]])
    with pytest.raises(Undefined, match="case 1 is on one side of all shadows"):
        LikelihoodRatio.fit(np.array([[1.0, 2.0], [3.0, 4.0]]), inside)
    halves = np.array([[True], [True], [False], [False]])
    with pytest.raises(Undefined, match="do not differ"):
        LikelihoodRatio.fit(np.array([[1.0], [1.0], [0.0], [2.0]]), halves)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_attack_on_k_independent_networks_has_its_closed_form(k):
    """`LR = d phi - d^2/2` sums to a normal variable: `AUC = Phi(sqrt(k) d / sqrt(2))`, within 3 standard errors."""
    n, members = 20000, 5
    inside, outside, _, _ = simulate(members, n, seed=3)
    exact = float(ndtr(math.sqrt(k / 2) * D))
    found = privacy.leak_by_k(inside, outside, (k,), resampling(n, n))[k].value
    assert abs(found - exact) < 3 * auc_error(exact, n)


def test_fitted_shadows_find_what_the_closed_form_says_they_can_and_more_than_the_loss():
    """Means of m shadows a side add noise: `LR = (a - b)(phi - (a + b)/2)`, a and b the fitted means.

    With 1000 shadows it is lost in the standard error; the loss compares cases by how hard they are.
    """
    n, shadows = 1500, 1000
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 3, 2 * n)
    seen = np.argsort(rng.random((shadows, 2 * n)), axis=0) < shadows // 2
    ratio = LikelihoodRatio.fit(hard + D * seen + rng.normal(size=seen.shape), seen)
    phi = hard + np.where(np.arange(2 * n) < n, D, 0.0) + rng.normal(size=(1, 2 * n))
    cases, exact = resampling(n, n), float(ndtr(D / math.sqrt(2)))
    lira = ratio(phi)
    assert abs(membership_aucs(lira[:, :n], lira[:, n:], cases).values[0] - exact) < 3 * auc_error(exact, n)
    by_loss = float(ndtr(D / math.sqrt(2 * (1 + 9))))
    assert abs(membership_aucs(phi[:, :n], phi[:, n:], cases).values[0] - by_loss) < 3 * auc_error(by_loss, n)


def test_networks_that_saw_neither_are_at_chance():
    inside, outside, phi_in, phi_out = simulate(4, 2000, seed=5, d=0.0)
    assert not inside.any() and not outside.any()  # the ratio of equal densities
    found = membership_aucs(phi_in, phi_out, resampling(2000, 2000))
    assert (abs(found.values - 0.5) < 3 * auc_error(0.5, 2000)).all()
    assert (membership_aucs(inside, outside, resampling(2000, 2000)).values == 0.5).all()  # all ties


def test_copies_of_one_network_leak_exactly_what_one_does():
    inside, outside, _, _ = simulate(1, 60, seed=6)
    leak = privacy.leak_by_k(np.repeat(inside, 4, 0), np.repeat(outside, 4, 0), range(1, 5), resampling(60, 60, 30))
    assert {e.value for e in leak.values()} == {leak[1].value}
    for e in leak.values():
        np.testing.assert_allclose(e.draws, leak[1].draws, atol=1e-12)


def test_the_leak_at_k_is_the_mean_over_all_subsets():
    inside, outside, _, _ = simulate(4, 50, seed=7)
    leak = privacy.leak_by_k(inside, outside, (2, 4), resampling(50, 50, 40))
    truth = np.r_[np.ones(50), np.zeros(50)]
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    by_hand = [roc_auc_score(truth, np.r_[inside[list(p)].sum(0), outside[list(p)].sum(0)]) for p in pairs]
    assert leak[2].value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert leak[4].value == pytest.approx(roc_auc_score(truth, np.r_[inside.sum(0), outside.sum(0)]), abs=1e-12)
    assert leak[2].n == 100 and leak[2].draws.shape == (40,)
    with pytest.raises(ValueError, match="no subsets of 5 among 4"):
        privacy.leak_by_k(inside, outside, (5,), resampling(50, 50))


def test_auc_and_its_draws_are_those_of_scikit_learn_with_ties():
    """Draws leave out terms of order 1/n, 1/sqrt(n) of a standard deviation: 1/12 with 150 members, twice allowed."""
    rng = np.random.default_rng(8)
    inside, outside = np.round(rng.normal(0.7, 1, (2, 150)), 1), np.round(rng.normal(0, 1, (2, 200)), 1)
    patient = rng.integers(90, size=200)
    cases = Resampling.beside(PatientBootstrap(200, patient, 100, 1), 150, 1)
    found = membership_aucs(inside, outside, cases)
    truth = np.r_[np.ones(150), np.zeros(200)]
    w = np.concatenate([cases.members.counts, cases.non_members.counts[:, cases.non_members.index]], axis=1)
    for m in range(2):
        scores = np.r_[inside[m], outside[m]]
        assert found.values[m] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        exact = np.array([roc_auc_score(truth, scores, sample_weight=v) for v in w])
        assert math.sqrt(np.mean((found.draws[:, m] - exact) ** 2)) < exact.std() / 6


def brute_tpr(members: np.ndarray, non_members: np.ndarray, fpr: float) -> float:
    best = 0.0
    for threshold in [*members, *non_members]:
        if (non_members >= threshold).sum() <= fpr * len(non_members) + 1e-9:
            best = max(best, (members >= threshold).mean())
    return best


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.29])
def test_the_true_positive_rate_is_the_best_of_all_thresholds(decimals, fpr):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inside = np.round(rng.normal(1, 1, 80), decimals)
        outside = np.round(rng.normal(0, 1, 100), decimals)
        assert privacy.tpr_at(inside, outside, fpr) == pytest.approx(brute_tpr(inside, outside, fpr), abs=1e-12)


def test_draws_of_the_true_positive_rate_are_those_of_explicit_resamples():
    rng = np.random.default_rng(9)
    inside, outside = np.round(rng.normal(1, 1, 120), 1), np.round(rng.normal(0, 1, 230), 1)
    outside[::7] = np.nan  # outside the pool
    patient = np.repeat(np.arange(115), 2)
    cases = Resampling.beside(PatientBootstrap(230, patient, 80, 2), 120, 2)
    draws = privacy._tpr_draws(inside, outside, 0.01, cases)
    for draw, w_in, w_out in zip(draws, cases.members.counts, cases.non_members.counts[:, patient]):
        again = np.repeat(outside, w_out)
        assert draw == pytest.approx(privacy.tpr_at(np.repeat(inside, w_in), again[~np.isnan(again)], 0.01), abs=1e-12)


def test_a_rate_that_so_few_non_members_cannot_resolve_is_no_number_with_its_reason():
    inside, outside, _, _ = simulate(1, 156, seed=10)
    found = privacy.membership_inference(inside[0], outside[0], resampling(156, 156, 200))
    assert found.resolution == 1 / 156
    assert math.isnan(found.tpr[0.001].value)
    assert found.tpr[0.001].reason == "156 non-members resolve no false positive rate under 0.0064"
    assert found.tpr[0.01].value == privacy.tpr_at(inside[0], outside[0], 0.01)
    for score in (found.auc, found.tpr[0.01]):
        assert score.n == 312 and score.low < score.value < score.high and not score.reason
    many = simulate(1, 1000, seed=10)
    assert many[0].shape == (1, 1000)
    assert privacy.membership_inference(many[0][0], many[1][0], resampling(1000, 1000)).tpr[0.001].value >= 0


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 data sets: 95 % intervals miss 10 of them, give or take 3.1; 4 standard deviations are allowed."""
    exact, missed = float(ndtr(D / math.sqrt(2))), 0
    for seed in range(200):
        inside, outside, _, _ = simulate(1, 60, seed=100 + seed)
        ends = privacy.membership_inference(inside[0], outside[0], resampling(60, 60, 200, seed)).auc
        missed += not ends.low <= exact <= ends.high
    assert missed <= 22


@pytest.fixture
def attacked(make_context):
    """A context of four networks on 90 cases of 45 patients, 60 of them in the pool, with scores of 60 train cases."""
    inside, outside, _, _ = simulate(5, 60, seed=11)
    scores = np.full((5, 90), np.nan)
    scores[:, np.arange(90) % 3 > 0] = outside
    p = np.full((4, 90, 2), 0.5)
    context = make_context(p, None, np.arange(90) % 2, np.arange(90) // 2, draws=50)
    for name, values in (("in", inside), ("out", scores)):
        context.evidence[f"membership/lira/{name}"] = Evidence(values[1:], values[0])
    return context


def test_the_property_is_the_auc_of_the_attacked_cases_for_base_and_members(attacked):
    property_ = METRICS.get("membership_auc")
    assert (property_.info.level, property_.info.direction) == ("property", "lower")
    found = property_(attacked, Models((-1, 2)))
    assert set(found) == {":lira"}  # the loss was not measured
    truth, asked = np.r_[np.ones(60), np.zeros(60)], np.arange(90) % 3 > 0
    inside, outside = (attacked.evidence[f"membership/lira/{kind}"] for kind in ("in", "out"))
    for j, (a, b) in enumerate(((inside.base, outside.base), (inside.members[2], outside.members[2]))):
        assert found[":lira"].values[j] == pytest.approx(roc_auc_score(truth, np.r_[a, b[asked]]), abs=1e-12)
    assert found[":lira"].draws.shape == (50, 2)


def test_the_draws_of_all_networks_share_their_patients_and_fewer_draws_are_the_first_ones(attacked):
    property_ = METRICS.get("membership_auc")
    all_members, alone = property_(attacked, Models()), property_(attacked, Models((2,)))
    assert isinstance(all_members[":lira"], PerMember)
    np.testing.assert_allclose(alone[":lira"].draws[:, 0], all_members[":lira"].draws[:, 2], atol=1e-12)
    attacked.bootstrap = PatientBootstrap(90, np.arange(90) // 2, 20, 0)
    np.testing.assert_allclose(
        property_(attacked, Models())[":lira"].draws, all_members[":lira"].draws[:20], atol=1e-12
    )


def test_a_part_whose_membership_was_not_measured_has_no_value(attacked):
    attacked.evidence = {"membership/lira/in": attacked.evidence["membership/lira/in"]}
    with pytest.raises(Undefined, match="membership was not measured"):
        METRICS.get("membership_auc")(attacked, Models())


def test_an_attack_without_non_members_is_undefined():
    with pytest.raises(Undefined, match="no non-member"):
        membership_aucs(np.zeros((2, 3)), np.full((2, 4), np.nan), resampling(3, 4))
