"""Out-of-distribution detection against scikit-learn, pytorch-ood, closed forms and explicit resampling."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from multiplicity_bench.metrics.api import METRICS, Undefined
from multiplicity_bench.metrics.context import BASE, MEMBERS, Evidence, Models, softmax
from multiplicity_bench.metrics.ood import entropy, max_softmax, ood_metrics, ood_views, placements
from multiplicity_bench.metrics.ood_set import (
    detector_agreement,
    gains_over_confidence,
    keep_threshold,
    set_detectors,
    set_scores,
    unseen_by_confidence,
)
from scipy.special import ndtr
from scipy.stats import spearmanr
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

AUROC, FPR = METRICS.get("ood_auroc"), METRICS.get("ood_fpr95")


def tied_scores(seed=0, inside=83, outside=60):
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(size=inside), 1), np.round(rng.normal(0.8, 1.2, size=outside), 1)


@pytest.fixture(scope="module")
def make_pair(make_context):
    """Return a function that makes a part of 240 samples of 80 patients, and a view of 150 images out of distribution,
    for five members that know something of it; probabilities are rounded, so that scores tie."""

    def make(draws=150, view_draws=None, classes=3, labels_known=True, **more):
        rng = np.random.default_rng(3)
        labels = rng.integers(classes, size=240)
        logits = rng.normal(size=(5, 240, classes))
        logits[:, np.arange(240), labels] += 3.0
        outside = rng.normal(size=(5, 150, classes)) + 2 * rng.normal(size=(150, classes))
        p_in, p_out = (softmax(np.round(z - z.max(axis=-1, keepdims=True), 1)) for z in (logits, outside))
        patient = np.repeat(np.arange(80), 3)
        part = make_context(p_in, p_in[1], labels if labels_known else np.full(240, -1), patient, draws, 0, **more)
        view = make_context(p_out, p_out[1], np.full(150, -1), None, draws if view_draws is None else view_draws, 1)
        part.views = {"ood-noise": view}
        return part

    return make


@pytest.mark.parametrize("seed", range(4))
def test_tied_scores_are_measured_as_by_scikit_learn_and_by_pytorch_ood(seed):
    from pytorch_ood.metrics import OODMetrics

    inside, outside = tied_scores(seed)
    assert len(np.intersect1d(inside, outside)) > 10
    found = ood_metrics(inside, outside)
    scores, out = np.concatenate([inside, outside]), np.repeat([0, 1], [len(inside), len(outside)])
    fpr, tpr, _ = roc_curve(out, scores, drop_intermediate=False)
    areas = []
    for positive, sign in ((out, 1), (1 - out, -1)):
        precision, recall, _ = precision_recall_curve(positive, sign * scores)
        areas.append(auc(recall, precision))
    sklearn = [roc_auc_score(out, scores), *areas, fpr[np.argmax(tpr >= 0.95)]]
    ours = [found.auroc, found.aupr_out, found.aupr_in, found.fpr95]
    assert ours == pytest.approx(sklearn, abs=1e-12)
    library = OODMetrics().update(torch.from_numpy(scores), torch.from_numpy(-out)).compute()
    assert ours == pytest.approx([library[k] for k in ("AUROC", "AUPR-OUT", "AUPR-IN", "FPR95TPR")], abs=1e-12)


def test_two_normals_have_the_auroc_and_the_false_positive_rate_of_the_closed_form():
    """AUROC = Phi(d / sqrt 2), FPR at 95 % TPR = Phi(1.6449 - d); 40,000 each: standard errors .0014 and .004."""
    rng = np.random.default_rng(0)
    for d in (0.0, 1.0, 2.5):
        found = ood_metrics(rng.normal(size=40_000), rng.normal(d, 1, size=40_000))
        assert found.auroc == pytest.approx(ndtr(d / math.sqrt(2)), abs=0.006)
        assert found.fpr95 == pytest.approx(ndtr(1.6448536 - d), abs=0.015)


def test_out_of_distribution_is_the_positive_kind():
    inside, outside = np.arange(100.0), np.array([50.5] * 19 + [-1.0])
    found = ood_metrics(inside, outside)
    assert found.fpr95 == 0.49  # 19 of 20 are flagged by a threshold that 49 of 100 exceed
    assert found.auroc == pytest.approx(0.95 * 0.51)
    assert ood_metrics(inside, inside + 100).fpr95 == 0.0 and ood_metrics(inside, inside - 100).fpr95 == 1.0


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([np.nan, 1.0], [1.0])])
def test_no_cases_and_scores_that_are_nan_have_no_value(inside, outside):
    with pytest.raises(Undefined, match=r"cases in and|1 scores are NaN"):
        ood_metrics(np.array(inside), np.array(outside))


def test_scores_of_probabilities_are_those_of_pytorch_ood():
    from pytorch_ood.detector import Entropy, MaxSoftmax

    logits = np.random.default_rng(0).normal(size=(50, 4))
    p = softmax(logits)
    assert max_softmax(p) == pytest.approx(1 + MaxSoftmax.score(torch.from_numpy(logits)).numpy(), abs=1e-12)
    assert entropy(p) * math.log(2) == pytest.approx(Entropy.score(torch.from_numpy(logits)).numpy(), abs=1e-5)


def test_confident_cases_are_kept_apart_where_their_probability_is_rounded_to_one():
    p = softmax(np.array([[0.0, -60.0], [0.0, -80.0]]))
    assert p[0, 0] == p[1, 0] == 1.0
    assert max_softmax(p)[0] > max_softmax(p)[1] > 0 and entropy(p)[0] > entropy(p)[1] > 0


def test_two_classes_are_ranked_alike_by_confidence_and_entropy_and_have_but_one_of_them(make_pair):
    context = make_pair(draws=0, classes=2)
    p, q = context.probabilities[0], context.views["ood-noise"].probabilities[0]
    areas = [ood_metrics(f(p), f(q)).auroc for f in (max_softmax, entropy)]
    assert areas[0] == pytest.approx(areas[1], abs=1e-12)
    assert "/ood-noise:entropy" not in AUROC(context, MEMBERS)
    context = make_pair(draws=0, classes=3)
    found = AUROC(context, MEMBERS)
    assert not np.allclose(found["/ood-noise:entropy"].values, found["/ood-noise:max_softmax"].values, atol=1e-3)


def resampled_rows(context, view, draw):
    rows_in = np.repeat(np.arange(240), context.bootstrap.counts[draw][context.bootstrap.index])
    return rows_in, np.repeat(np.arange(150), view.bootstrap.counts[draw])


def test_draws_of_the_auroc_follow_resampling_of_patients_and_of_images(make_pair):
    context = make_pair()
    view = context.views["ood-noise"]
    found = AUROC(context, MEMBERS)["/ood-noise:max_softmax"]
    inside, outside = max_softmax(context.probabilities), max_softmax(view.probabilities)
    exact = np.empty((150, 5))
    for draw in range(150):
        rows_in, rows_out = resampled_rows(context, view, draw)
        exact[draw] = [ood_metrics(a[rows_in], b[rows_out]).auroc for a, b in zip(inside, outside)]
    for m in range(5):
        assert found.values[m] == pytest.approx(ood_metrics(inside[m], outside[m]).auroc, abs=1e-12)
        assert np.corrcoef(found.draws[:, m], exact[:, m])[0, 1] > 0.99  # what is left is of order 1/n
        assert np.std(found.draws[:, m]) == pytest.approx(np.std(exact[:, m]), rel=0.06)
    assert found.draws == pytest.approx(exact, abs=0.012)
    assert np.std(exact) > 0.02


def test_draws_of_the_false_positive_rate_are_exact(make_pair):
    context = make_pair()
    view = context.views["ood-noise"]
    found = FPR(context, Models((2, -1)))["/ood-noise:max_softmax"]
    inside, outside = max_softmax(context.probabilities), max_softmax(view.probabilities)
    for column, member in ((0, 2), (1, 1)):  # the base is member 1
        assert found.values[column] == ood_metrics(inside[member], outside[member]).fpr95
        for draw in range(150):
            rows_in, rows_out = resampled_rows(context, view, draw)
            by_hand = ood_metrics(inside[member][rows_in], outside[member][rows_out]).fpr95
            assert found.draws[draw, column] == pytest.approx(by_hand, abs=1e-12)


def test_a_perfect_detector_flags_nothing_in_distribution_on_any_draw(make_context):
    part = make_context([[[0.99, 0.01]] * 30], draws=20)
    part.views = {"ood-far": make_context([[[0.6, 0.4]] * 30], labels=[-1] * 30, draws=20)}
    found = FPR(part, MEMBERS)["/ood-far:max_softmax"]
    assert found.values.tolist() == [0.0] and not found.draws.any()


def test_a_property_has_every_detector_that_was_measured_on_part_and_view(make_pair):
    context = make_pair(draws=40)
    view = context.views["ood-noise"]
    rng = np.random.default_rng(0)
    scores = {n: Evidence(rng.normal(size=(5, n)), rng.normal(size=n)) for n in (240, 150)}
    context.evidence = {"detector/knn": scores[240], "detector/vim": scores[240], "saliency": scores[240]}
    view.evidence = {"detector/knn": scores[150], "detector/energy": scores[150], "saliency": scores[150]}
    asked = ("members", 4), ("base", slice(None))
    found = AUROC(context, Models((4, -1)))
    assert list(found) == [f"/ood-noise:{d}" for d in ("entropy", "knn", "max_softmax")]
    knn = found["/ood-noise:knn"]
    assert knn.values.shape == (2,) and knn.draws.shape == (40, 2)
    by_hand = [ood_metrics(getattr(scores[240], who)[row], getattr(scores[150], who)[row]).auroc for who, row in asked]
    assert knn.values == pytest.approx(by_hand, abs=1e-12)
    scores[150].members[2, 7] = np.nan
    values = AUROC(context, MEMBERS)["/ood-noise:knn"].values
    assert np.isnan(values).tolist() == [False, False, True, False, False]


def test_views_with_labels_are_in_distribution(make_pair):
    context = make_pair(draws=0)
    severe = make_pair(draws=0, labels_known=False)
    context.views |= {"jpeg-3": make_pair(draws=0), "noise-5": severe}
    assert list(ood_views(context)) == ["ood-noise", "noise-5"]
    assert {suffix.split(":")[0] for suffix in AUROC(context, BASE)} == {"/ood-noise", "/noise-5"}
    unlabelled = make_pair(draws=0, labels_known=False)
    unlabelled.views["jpeg-3"] = severe
    assert list(ood_views(unlabelled)) == ["ood-noise"]
    context.views = {"jpeg-3": make_pair(draws=0)}
    with pytest.raises(Undefined, match="no view out of distribution"):
        AUROC(context, MEMBERS)


def test_a_view_of_the_same_cases_that_is_resampled_with_them_is_paired(make_pair):
    context = make_pair()
    same = make_pair(labels_known=False)
    same.bootstrap = context.bootstrap
    context.views = {"identity-5": same}
    found = AUROC(context, MEMBERS)["/identity-5:max_softmax"]
    assert found.values == pytest.approx(0.5) and found.draws == pytest.approx(0.5, abs=1e-12)


def test_the_first_draws_of_a_view_with_more_are_used(make_pair):
    few, many = AUROC(make_pair(20, 20), MEMBERS), AUROC(make_pair(20, 150), MEMBERS)
    assert many["/ood-noise:entropy"].draws == pytest.approx(few["/ood-noise:entropy"].draws, abs=1e-12)
    with pytest.raises(ValueError, match="a view has 20 draws of 150"):
        AUROC(make_pair(150, 20), MEMBERS)
    with pytest.raises(ValueError, match="a view has 20 draws of 150"):
        FPR(make_pair(150, 20), MEMBERS)


def test_influences_sum_to_nothing_and_a_member_with_nan_leaves_the_others():
    inside, outside = (np.stack([s, s]) for s in tied_scores())
    inside[1, 3] = np.nan
    found = placements(inside, outside)
    assert found.inside.sum() == pytest.approx(0, abs=1e-12) and found.outside.sum() == pytest.approx(0, abs=1e-12)
    assert np.isfinite(found.auroc[0]) and np.isnan(found.auroc[1])


def test_scores_of_a_set_are_ranked_as_scikit_learn_ranks_them(make_pair):
    context = make_pair()
    view = context.views["ood-noise"]
    by_hand = {}
    for name, c in (("in", context), ("out", view)):
        p, mean = c.probabilities, c.probabilities.mean(axis=0)
        h = lambda q: -(q * np.log2(q)).sum(axis=-1)  # noqa: E731
        decided, of_base = p.argmax(axis=-1), c.base.argmax(axis=-1)
        followed = p[:, np.arange(p.shape[1]), of_base]
        by_hand[name] = {
            "ensemble_max_softmax": -mean.max(axis=-1),
            "ensemble_entropy": h(mean),
            "mutual_information": h(mean) - h(p).mean(axis=0),
            "range": np.ptp(followed, axis=0),
            "disagreement": np.mean([decided[a] != decided[b] for a, b in combinations(range(5), 2)], axis=0),
        }
    found, out = set_detectors(context, view), np.repeat([0, 1], [240, 150])
    assert list(found) == list(by_hand["in"])
    for name, estimate in found.items():
        scores = np.round(np.concatenate([by_hand["in"][name], by_hand["out"][name]]), 12)
        assert estimate.value == pytest.approx(roc_auc_score(out, scores), abs=1e-4)  # 3 of 36,000 pairs may tie
        assert estimate.interval().low < estimate.value < estimate.interval().high and estimate.n == 80
    assert entropy(np.array([0.5, 0.5])) == 1.0


def test_the_interval_of_a_gain_is_that_of_paired_draws(make_pair):
    context = make_pair()
    view = context.views["ood-noise"]
    whole, gains = set_detectors(context, view), gains_over_confidence(context, view)
    assert list(gains) == [name for name in whole if name != "ensemble_max_softmax"]
    for name, gain in gains.items():
        base = whole["ensemble_max_softmax"]
        assert gain.value == whole[name].value - base.value
        assert np.array_equal(gain.draws, whole[name].draws - base.draws)
    entropies = gains["ensemble_entropy"]  # nearly the same score: the pair is known far better than either
    assert np.std(entropies.draws) < 0.5 * np.std(whole["ensemble_entropy"].draws)


def test_disagreement_can_detect_what_confidence_cannot(make_context):
    """In distribution all members are unsure; out of it two are sure of one class, two of the other."""
    unsure, torn = np.full((4, 30, 2), [0.45, 0.55]), np.full((4, 20, 2), [0.05, 0.95])
    torn[:2] = [0.8, 0.2]  # mean .425, .575: surer than the others
    context, view = make_context(unsure, draws=30), make_context(torn, labels=[-1] * 20, draws=30, seed=1)
    found = set_detectors(context, view)
    assert found["disagreement"].value == found["range"].value == found["mutual_information"].value == 1.0
    assert found["ensemble_max_softmax"].value == 0.0
    assert set_scores(view)["disagreement"] == pytest.approx(4 / 6)
    assert gains_over_confidence(context, view)["disagreement"].value == 1.0
    assert unseen_by_confidence(context, view)["disagreement"].value == 1.0


def test_what_confidence_lets_pass_is_measured_among_those_images_alone(make_pair):
    context = make_pair()
    view = context.views["ood-noise"]
    inside, outside = set_scores(context), set_scores(view)
    limit = np.sort(inside["ensemble_max_softmax"])[227]  # 228 of 240 are 95 %
    kept_in, kept_out = (s["ensemble_max_softmax"] <= limit for s in (inside, outside))
    assert 228 <= kept_in.sum() < 240 and 0 < kept_out.sum() < 150
    found = unseen_by_confidence(context, view)["mutual_information"]
    a, b = inside["mutual_information"], outside["mutual_information"]
    assert found.value == pytest.approx(ood_metrics(a[kept_in], b[kept_out]).auroc, abs=1e-12)
    exact = np.empty(150)
    for draw in range(150):
        rows_in, rows_out = resampled_rows(context, view, draw)
        exact[draw] = ood_metrics(a[rows_in[kept_in[rows_in]]], b[rows_out[kept_out[rows_out]]]).auroc
    assert np.std(found.draws) == pytest.approx(np.std(exact), rel=0.06)
    assert np.corrcoef(found.draws, exact)[0, 1] > 0.98


def test_where_confidence_detects_everything_nothing_is_left_to_detect(make_context):
    context = make_context(np.full((2, 10, 2), [0.9, 0.1]))
    view = make_context(np.full((2, 10, 2), [0.6, 0.4]), labels=[-1] * 10)
    with pytest.raises(Undefined, match="confidence detects every image"):
        unseen_by_confidence(context, view)
    with pytest.raises(Undefined, match="1 of 2 accepted"):
        set_detectors(make_context(np.full((1, 10, 2), 0.5)), view)


def test_a_threshold_keeps_95_percent_of_the_cases_in_distribution():
    assert keep_threshold(np.arange(20.0)) == 18.0  # 19 of 20 are not above it
    assert keep_threshold(np.arange(21.0)) == 19.0  # 20 of 21: 19 would be 90 %
    assert keep_threshold(np.array([np.arange(100.0), np.arange(100.0)[::-1] * 2])).tolist() == [94.0, 188.0]


def test_equal_members_agree_and_monotone_changes_of_a_score_do_not_count():
    inside, outside = tied_scores()
    scale = np.array([1.0, 3.0, 0.5])[:, None]
    found = detector_agreement(np.exp(inside * scale), np.exp(outside * scale))
    assert found.rank_correlation == pytest.approx(1.0) and found.left_out == 0
    assert found.flag_disagreement == 0 and found.flag_ambiguity == pytest.approx(0, abs=1e-12)
    assert found.flagged == np.mean(outside > keep_threshold(inside))


def test_agreement_of_normal_scores_has_the_closed_form():
    """Four members, correlation rho: Spearman's is 6/pi asin(rho/2). Independent ones that flag with chance .05 differ
    with chance 1 - .95^4 - .05^4, by pairs 2 x .05 x .95; 40,000 images: standard errors .005, .002, .001."""
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.8):
        shared = math.sqrt(rho) * rng.normal(size=80_000)
        scores = shared + math.sqrt(1 - rho) * rng.normal(size=(4, 80_000))
        found = detector_agreement(scores[:, :40_000], scores[:, 40_000:])
        assert found.rank_correlation == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.015)
        assert found.flagged == pytest.approx(0.05, abs=0.004)
        if not rho:
            assert found.flag_ambiguity == pytest.approx(1 - 0.95**4 - 0.05**4, abs=0.012)
            assert found.flag_disagreement == pytest.approx(2 * 0.05 * 0.95, abs=0.006)


def test_agreement_is_the_mean_over_pairs_and_over_all_subsets():
    rng = np.random.default_rng(0)
    inside, scores = np.round(rng.normal(size=(5, 40)), 1), np.round(rng.normal(1.5, 1, size=(5, 30)), 1)
    found = detector_agreement(inside, scores, k=3)
    pairs = list(combinations(range(5), 2))
    assert found.rank_correlation == pytest.approx(np.mean([spearmanr(scores[a], scores[b])[0] for a, b in pairs]))
    flags = scores > np.sort(inside, axis=1)[:, 37:38]  # 38 of 40 are kept
    assert 0.2 < flags.mean() < 0.8
    differ = [np.ptp(flags[list(s)].astype(int), axis=0).mean() for s in combinations(range(5), 3)]
    assert found.flag_ambiguity == pytest.approx(np.mean(differ))
    assert found.flag_disagreement == pytest.approx(np.mean([(flags[a] != flags[b]).mean() for a, b in pairs]))
    assert detector_agreement(inside, scores).flag_ambiguity == pytest.approx(np.ptp(flags.astype(int), axis=0).mean())


def test_members_whose_scores_say_nothing_are_left_out_and_counted():
    rng = np.random.default_rng(0)
    inside, scores = rng.normal(size=(5, 40)), rng.normal(size=(5, 30))
    kept = detector_agreement(inside[[0, 2, 4]], scores[[0, 2, 4]])
    scores[1], inside[3, 0] = 2.0, np.nan
    found = detector_agreement(inside, scores)
    assert found.left_out == 2 and found.rank_correlation == kept.rank_correlation
    assert found.flag_ambiguity == kept.flag_ambiguity
    with pytest.raises(Undefined, match="the scores of 3 of 5 members tell images apart"):
        detector_agreement(inside, scores, k=4)
