"""The Fisher metric, against dense references, closed forms, and a Gaussian target, for which it is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.dormand_prince import DormandPrince
from multiplicity_bench.generators.fisher import ENTRIES, EmbeddingMetric, FisherMetric, fisher_obstacle
from torch import Tensor

from .conftest import flat

TIGHT = DormandPrince(rtol=1e-9, atol=0.0)


@pytest.fixture
def small(untrained):
    """Return `small(task, n=)`: a network of fewer than 40 weights and n random 2 x 2 images."""

    def make(task: str = "binary", n: int = 8):
        problem = untrained("mlp", size=2, classes=2 if task == "binary" else 3, n=n, width=3)
        if task != "multilabel":
            return problem
        labels = torch.randint(-1, 2, (n, 3), generator=torch.Generator().manual_seed(4))
        return replace(problem, task="multilabel", train=Part(problem.train.images, labels))

    return make


def reference(problem, part: Part, precision: float, weights: Tensor) -> Tensor:
    """Return N/n sum_i J_i' (second derivative of the loss in the logits) J_i + a I, from the problem's own loss."""
    base = problem.base.params

    def logits(weights: Tensor, image: Tensor) -> Tensor:
        parts = weights.split([p.numel() for p in base.values()])
        return problem.network({n: w.view_as(base[n]) for n, w in zip(base, parts)}, {}, image[None])[0]

    total = precision * torch.eye(len(weights)).double()
    for image, label in zip(part.images, part.labels):
        z, rows = logits(weights, image), torch.func.jacrev(logits)(weights, image)
        hessian = torch.func.hessian(lambda z, label=label: problem.loss(z[None], label[None]))(z)
        total = total + len(problem.train) / len(part) * rows.T @ hessian @ rows
    return total


def test_with_all_images_the_metric_is_the_full_ggn_and_the_prior(untrained, dense_ggn):
    for problem in (untrained("mlp", width=4), untrained("smallcnn", size=5, classes=2, n=4, width=2, norm="batch")):
        names = list(problem.base.params)
        metric = FisherMetric(problem, names, problem.train, 0.7)
        expected = dense_ggn(problem) + 0.7 * torch.eye(len(flat(problem.base.params))).double()
        torch.testing.assert_close(metric.matrix(flat(problem.base.params)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_on_some_images_the_metric_is_scaled_to_the_whole_loss(small, task):
    problem = small(task)
    part = Part(problem.train.images[:3], problem.train.labels[:3])
    weights = flat(problem.base.params)
    metric = FisherMetric(problem, list(problem.base.params), part, 0.3)
    torch.testing.assert_close(metric.matrix(weights), reference(problem, part, 0.3, weights), rtol=1e-9, atol=1e-12)


def test_saturated_probabilities_leave_everything_finite(small):
    problem = small()
    metric = FisherMetric(problem, list(problem.base.params), problem.train, 1.0)
    weights = 300 * flat(problem.base.params)
    bend = metric.bend(weights[None], torch.ones_like(weights)[None])
    assert bend.acceleration.isfinite().all() and bend.length(bend.acceleration).isfinite().all()


@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("n", [4, 40])
def test_the_acceleration_is_that_of_the_christoffel_symbols(small, task, n):
    """c''_k = -1/2 sum M^-1_kl (d_i M_lj + d_j M_li - d_l M_ij) c'_i c'_j, through either of the Gram matrices."""
    problem = small(task, n)
    weights = flat(problem.base.params)
    velocity = torch.randn(len(weights), generator=torch.Generator().manual_seed(1)).double()
    found = FisherMetric(problem, list(problem.base.params), problem.train, 0.5)
    slopes = torch.func.jacrev(lambda w: reference(problem, problem.train, 0.5, w))(weights)  # [l, j, i]
    lowered = torch.einsum("lji,i,j->l", slopes, velocity, velocity) - 0.5 * torch.einsum(
        "ijl,i,j->l", slopes, velocity, velocity
    )
    expected = -torch.linalg.solve(reference(problem, problem.train, 0.5, weights), lowered)
    acceleration = found.bend(weights[None], velocity[None]).acceleration[0]
    torch.testing.assert_close(acceleration, expected, rtol=1e-7, atol=1e-9)


def test_geodesics_of_a_gaussian_target_are_straight_and_its_draws_its_own(worst_moments):
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    metric = EmbeddingMetric(lambda w: design @ w, 0.5)
    start = torch.randn(4, generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design + 0.5 * torch.eye(4))
    root = torch.linalg.cholesky(covariance)
    velocity = torch.randn(2000, 4, generator=generator, dtype=torch.float64) @ root.T
    found = metric.solve(start.expand_as(velocity), velocity)
    assert found.reached.all() and found.drift.max() < 1e-12
    torch.testing.assert_close(found.weights, start + velocity, rtol=1e-12, atol=1e-12)
    # Of 14 moments of a right sample one exceeds 4 standard errors in 1,100 tries.
    assert max(worst_moments(found.weights, start, covariance)) < 4


def test_the_geodesic_of_a_coin_moves_evenly_in_the_arcsine_of_the_root():
    """M = p (1 - p) for one logit w: the circle of radius 2, angle arcsin sqrt(p)."""
    points = lambda w: 2 * torch.cat([torch.sigmoid(w), torch.sigmoid(-w)]).sqrt()  # noqa: E731
    metric = EmbeddingMetric(points, 0.0, TIGHT)
    start = torch.tensor([[0.0], [2.0], [-3.0]]).double()
    velocity = torch.tensor([[1.5], [-3.0], [5.0]]).double()
    found = metric.solve(start, velocity)
    angle = lambda w: torch.asin(torch.sigmoid(w).sqrt())  # noqa: E731
    turned = 0.5 * velocity * (torch.sigmoid(start) * torch.sigmoid(-start)).sqrt()
    # 1e-9 per step; where p nears 0 or 1 the logit is an ill-conditioned function of the angle, not the other way.
    torch.testing.assert_close(angle(found.weights), angle(start) + turned, rtol=0, atol=1e-7)


def test_the_speed_is_conserved_and_time_can_be_reversed(small):
    problem = small(n=4)
    metric = FisherMetric(problem, list(problem.base.params), problem.train, 0.5)
    metric.integrator = DormandPrince(rtol=1e-6, atol=0.0)
    start = flat(problem.base.params)[None]
    root = torch.linalg.cholesky(torch.linalg.inv(metric.matrix(start[0])))
    velocity = torch.randn(1, start.shape[1], generator=torch.Generator().manual_seed(2)).double() @ root.T
    there = metric.solve(start, velocity)
    assert there.reached.all() and there.drift.max() < 1e-5
    bent = (there.weights - start - velocity).norm() / velocity.norm()
    print("bent", bent, there)
    assert bent > 0.05, "a straight path would prove nothing"
    energy = lambda w, v: v @ metric.matrix(w) @ v  # noqa: E731
    assert abs(energy(there.weights[0], there.velocity[0]) / energy(start[0], velocity[0]) - 1) < 2e-5
    back = metric.solve(there.weights, -there.velocity)
    # Some 30 steps there and back, each off by 1e-6 of a path of a length of sqrt(params), 5.
    torch.testing.assert_close(back.weights, start, rtol=0, atol=1.5e-4)


def test_single_precision_in_gives_single_precision_out_computed_in_double(small):
    problem = small()
    metric = FisherMetric(problem, list(problem.base.params), problem.train, 0.5)
    start = flat(problem.base.params)[None]
    velocity = 0.3 * torch.ones_like(start)
    single, double = metric.solve(start.float(), velocity.float()), metric.solve(start, velocity)
    assert single.weights.dtype == torch.float32 and single.value.isnan().all()
    torch.testing.assert_close(single.weights.double(), double.weights, rtol=0, atol=1e-6)


def test_a_metric_that_is_too_large_is_refused_in_one_line(untrained):
    problem = untrained("mlp", size=3, classes=3, width=4)
    names = list(problem.base.params)
    fitting = ENTRIES // (3 * len(flat(problem.base.params)))
    assert fisher_obstacle(problem, names, fitting) is None
    reason = fisher_obstacle(problem, names, fitting + 1)
    assert reason is not None and "use metric=loss" in reason and "\n" not in reason
    assert fisher_obstacle(replace(problem, task="multilabel"), names, fitting) is not None, "two rows per label"
