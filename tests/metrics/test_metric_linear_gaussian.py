"""Sampler and metrics together against a case with exact answers: a linear classifier with a Gaussian posterior."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.metrics.context import softmax
from multiplicity_bench.metrics.decisions import ambiguous, conflict, disagreement, votes
from scipy.special import ndtr


def test_linear_gaussian_classifier(make_context):
    """With q(x) = Phi(|t'x| / sqrt(x' Sigma x)): disagreement 2q(1-q), ambiguity 1 - q^m, conflict 1 - q."""
    rng = np.random.default_rng(0)
    members, samples, dim = 4000, 400, 6
    x = rng.normal(size=(samples, dim))
    mean = rng.normal(size=dim)
    root = 0.4 * rng.normal(size=(dim, dim))
    weights = mean + rng.normal(size=(members, dim)) @ root.T
    q = ndtr(np.abs(x @ mean) / np.linalg.norm(x @ root, axis=1))

    def problem(w):
        logits = np.atleast_2d(w) @ x.T
        return softmax(np.stack([np.zeros_like(logits), logits], axis=-1))

    context = make_context(problem(weights), problem(mean)[0])
    # the members are independent draws: a case's conflict has sd .5/sqrt(4000) = .008 at most
    np.testing.assert_allclose(conflict(context.flip_counts, members), 1 - q, atol=0.035)
    assert conflict(context.flip_counts, members).mean() == pytest.approx((1 - q).mean(), abs=0.004)
    counts = votes(context.decisions, 2)
    assert disagreement(counts).mean() == pytest.approx((2 * q * (1 - q)).mean(), abs=0.004)
    for m in (1, 5, 20, 100):
        assert ambiguous(context.flip_counts, members, m).mean() == pytest.approx((1 - q**m).mean(), abs=0.01)
