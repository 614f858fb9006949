"""Sampler, prediction and metrics together where the truth is known: a linear classifier with a Gaussian posterior.

For two classes the score is s(x) = z_1 - z_0, linear in the weights: its posterior is normal with mean t'x and variance
x' Sigma x. A member agrees with the base with probability q(x) = Phi(|t'x| / sqrt(x' Sigma x)), and so: pairwise
disagreement 2 q (1 - q), ambiguity with m members 1 - q^m, conflict 1 - q.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.predict import predict
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.modelset import DiagonalSet
from multiplicity_bench.metrics.api import Predictions
from multiplicity_bench.metrics.decisions import ambiguous, conflict, disagreement, votes
from multiplicity_bench.metrics.evaluation import evaluate
from scipy.special import ndtr

MEMBERS = 4000


def agreement(drawn: DiagonalSet, images: torch.Tensor) -> np.ndarray:
    """Return q(x) [sample] in float64 from the mean and the sd of weights [2, pixel] and biases [2]."""
    x = images.double().flatten(1) / 127.5 - 1
    weights, bias = (drawn.mean[n].double() for n in ("body.1.weight", "body.1.bias"))
    variance = (drawn.scale * drawn.factors["sd"].double()) ** 2
    of_weights, of_bias = variance[: weights.numel()].view_as(weights).sum(0), variance[weights.numel() :].sum()
    score = x @ (weights[1] - weights[0]) + bias[1] - bias[0]
    return ndtr((score.abs() / (x.square() @ of_weights + of_bias).sqrt()).numpy())


def posterior(toy, bias: bool) -> tuple[DiagonalSet, torch.Tensor, object]:
    """Return a logistic network's diagonal Laplace set, images, and the problem; without bias, the bias is fixed at 0.

    The images are the tune set's, drawn towards grey so that some cases are close and others clear.
    """
    problem = toy("logistic", members=MEMBERS)
    drawn = Laplace(prior_precision="20").generate(problem, 11)
    if not bias:
        drawn.mean["body.1.bias"] = torch.zeros(2)
        drawn.factors["sd"] = torch.cat([drawn.factors["sd"][:-2], torch.zeros(2)])
    images = problem.tune.images.double()
    shrink = torch.linspace(0.1, 1, len(images), dtype=torch.float64).view(-1, 1, 1, 1)
    return drawn, (127.5 + shrink * (images - 127.5)).round().to(torch.uint8), problem


@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "bias fixed at zero"])
def test_metrics_of_diagonal_draws_match_the_closed_forms(bias, toy):
    drawn, images, problem = posterior(toy, bias)
    q = agreement(drawn, images)
    assert 0.05 < (1 - q).mean() < 0.45, "some cases are close and others are clear"
    decisions = predict(problem.network, drawn, images).argmax(-1)
    mean = {**problem.base.params, **drawn.mean}
    base = problem.logits(mean, problem.base.buffers, images).numpy().argmax(-1)
    flips = (decisions != base).sum(0)
    # Independent members: a case's conflict has sd sqrt(q (1 - q) / 4000) <= .008, so 4.5 sd for the worst of 40 cases;
    # a mean over cases has at most the sd of one case, for members are shared by all cases.
    sd = np.sqrt(q * (1 - q) / MEMBERS)
    assert (np.abs(conflict(flips, MEMBERS) - (1 - q)) <= 4.5 * sd + 1e-3).all()
    assert conflict(flips, MEMBERS).mean() == pytest.approx((1 - q).mean(), abs=0.02)
    # the pairwise form is a smooth function of q with slope 2 |1 - 2q| <= 2 against conflict's error
    assert disagreement(votes(decisions, 2)).mean() == pytest.approx((2 * q * (1 - q)).mean(), abs=0.02)
    for m in (1, 5, 20):
        # d(1 - q^m)/dq is m q^(m - 1): the error per case grows with m where q is near 1, but q's own sd shrinks there
        slope = m * q ** (m - 1) * sd
        assert ambiguous(flips, MEMBERS, m).mean() == pytest.approx((1 - q**m).mean(), abs=3 * slope.mean() + 1e-3)


def test_the_registered_metrics_match_the_closed_forms(toy):
    """The same through the registry, as a run scores its predictions: ambiguity@5, conflict and disagreement."""
    drawn, images, problem = posterior(toy, True)
    q = agreement(drawn, images)
    view = Predictions(
        logits=predict(problem.network, drawn, images),
        base=problem.logits({**problem.base.params, **drawn.mean}, problem.base.buffers, images).numpy(),
        labels=problem.tune.labels.numpy(),
        task="binary",
        view="test",
        positive=1,
    )
    scores = evaluate(replace(view, view="val"), view, accept_all()).scores
    assert scores["conflict"].value == pytest.approx((1 - q).mean(), abs=0.02)
    assert scores["disagreement"].value == pytest.approx((2 * q * (1 - q)).mean(), abs=0.02)
    # at most 3 times the mean of 5 q^4 sd, as above
    assert scores["ambiguity@5"].value == pytest.approx((1 - q**5).mean(), abs=0.05)


def accept_all():
    """Return settings whose tolerance accepts every member, without intervals."""
    from multiplicity_bench.metrics.api import Settings

    return Settings(epsilon=100.0, draws=0)
