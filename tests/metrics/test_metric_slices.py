"""Error-aware slices: EM against scikit-learn and brute force, and planted slices of errors and of disagreement."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.slices import (
    Mixture,
    agreement,
    expectation_maximisation,
    fit_disagreement_slices,
    fit_slices,
    log_joint,
    maximise,
    one_hot,
)
from multiplicity_bench.metrics.strata_measures import places_of, precision_at
from scipy.stats import norm
from sklearn.mixture import GaussianMixture


def data(samples=300, dimensions=6, seed=0):
    rng = np.random.default_rng(seed)
    points, labels = rng.normal(size=(samples, dimensions)), rng.integers(3, size=samples)
    return points, labels, rng.dirichlet([0.5] * 3, size=samples), rng


def with_a_slice(seed, samples=500, share=0.1):
    """Features [sample, 20] of two classes; one corner of class 1 is mostly taken for class 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=samples)
    hard = (labels == 1) & (rng.random(samples) < 2 * share)
    features = rng.normal(size=(samples, 20))
    features[:, 0] += 4 * labels
    features[hard, 1] += 5
    wrong = np.where(hard, rng.random(samples) < 0.8, rng.random(samples) < 0.02)
    return features, labels, hard, one_hot(np.where(wrong, 1 - labels, labels), 2)


def test_the_likelihood_never_falls():
    points, labels, soft, rng = data()
    for weights in ((0, 0), (1, 1), (10, 3), (0.5, 20)):
        start = rng.dirichlet(np.ones(5), size=len(points))
        _, history = expectation_maximisation(start, points, one_hot(labels, 3), soft, *weights)
        assert len(history) > 3 and np.diff(history).min() > -1e-10


def test_without_weights_it_is_scikit_learns_diagonal_gaussian_mixture():
    points, labels, soft, rng = data(seed=1)
    start = rng.dirichlet(np.ones(3), size=len(points))
    truth = one_hot(labels, 3)
    first = maximise(start, points, truth, soft, 1e-9)
    ours, history = expectation_maximisation(start, points, truth, soft, 0.0, 0.0)
    theirs = GaussianMixture(
        3,
        covariance_type="diag",
        tol=0,
        reg_covar=0,
        max_iter=len(history) - 1,
        weights_init=first.weights,
        means_init=first.means,
        precisions_init=1 / first.variances,
    )
    with pytest.warns(Warning, match="converge"):
        theirs.fit(points)
    assert len(history) > 5
    np.testing.assert_allclose(ours.means, theirs.means_, atol=1e-8)
    np.testing.assert_allclose(ours.variances, theirs.covariances_, atol=1e-8)
    np.testing.assert_allclose(ours.weights, theirs.weights_, atol=1e-8)
    assert history[-1] == pytest.approx(theirs.score(points), abs=1e-8)


def test_the_joint_likelihood_is_that_of_a_product_of_densities():
    points, labels, soft, rng = data(samples=7)
    mixture = Mixture(
        rng.dirichlet([1, 1]),
        rng.normal(size=(2, 6)),
        rng.uniform(0.5, 2, size=(2, 6)),
        rng.dirichlet(np.ones(3), size=2),
        rng.dirichlet(np.ones(3), size=2),
    )
    joint = log_joint(mixture, points, one_hot(labels, 3), soft, 2.0, 3.0)
    for i in range(7):
        for s in range(2):
            expected = np.log(mixture.weights[s]) + 2 * np.log(mixture.labels[s, labels[i]])
            expected += norm.logpdf(points[i], mixture.means[s], np.sqrt(mixture.variances[s])).sum()
            expected += 3 * sum(soft[i, c] * np.log(mixture.outcomes[s, c]) for c in range(3))
            assert joint[i, s] == pytest.approx(expected, abs=1e-10)


def test_a_planted_slice_of_errors_comes_first_and_is_found_on_other_cases_without_their_predictions():
    found = fit_slices(*(with_a_slice(0)[i] for i in (0, 1, 3)), slices=6, seed=0)
    features, labels, hard, _ = with_a_slice(1)
    codes = found.assign(features, labels)
    assert found.gap[0] > 0.5 and (np.diff(found.gap) <= 0).all()
    assert hard[codes == 0].mean() > 0.9 and (codes == 0)[hard].mean() > 0.8
    assert precision_at(hard, codes, places_of(found.responsibilities(features, labels))) == 1


def test_predictions_of_the_new_cases_move_the_posterior_and_a_missing_label_says_nothing():
    features, labels, _, decisions = with_a_slice(0)
    found = fit_slices(features, labels, decisions, slices=6, seed=0)
    without, with_them = found.responsibilities(features, labels), found.responsibilities(features, labels, decisions)
    wrong = decisions.argmax(axis=1) != labels
    assert with_them[wrong, 0].mean() > without[wrong, 0].mean()
    np.testing.assert_allclose([without.sum(axis=1), with_them.sum(axis=1)], 1, atol=1e-12)
    blind = found.responsibilities(features, np.full(len(labels), -1))
    m = found.mixture
    points = (features - found.centre) @ found.axes
    joint = m.weights * np.exp(norm.logpdf(points[:, None], m.means, np.sqrt(m.variances)).sum(axis=-1))
    np.testing.assert_allclose(blind, joint / joint.sum(axis=1, keepdims=True), atol=1e-9)


def test_a_planted_slice_of_disagreement_comes_first():
    def draw(seed):
        features, labels, hard, _ = with_a_slice(seed)
        return features, labels, hard, np.random.default_rng(seed).beta(*np.where(hard, [[4], [6]], [[1], [19]]))

    features, labels, _, disagreement = draw(0)
    found = fit_disagreement_slices(features, labels, disagreement, slices=5, seed=0)
    features, labels, hard, disagreement = draw(1)
    codes = found.assign(features, labels)
    assert found.gap[0] == pytest.approx(disagreement[codes == 0].mean(), abs=0.05)
    assert hard[codes == 0].mean() > 0.9 and (codes == 0)[hard].mean() > 0.8
    assert agreement(np.array([0.0, 0.25])).tolist() == [[1, 0], [0.75, 0.25]]


def test_slices_depend_on_the_seed_alone_and_need_as_many_cases():
    features, labels, _, decisions = with_a_slice(2, samples=120)
    first, second = (fit_slices(features, labels, decisions, 4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.mixture.means, second.mixture.means)
    labels[:5] = -1
    codes = fit_slices(features, labels, decisions, 4, seed=3).assign(features, labels)
    assert codes.dtype == np.int64 and codes.min() >= 0
    with pytest.raises(ValueError, match="3 cases cannot be cut into 4 slices"):
        fit_slices(features[:3], labels[:3], decisions[:3], 4, seed=0)
