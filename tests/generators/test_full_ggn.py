"""The exact full GGN, its Jacobians and its sampler against dense algebra in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark.train import mean_loss
from multiplicity_bench.generators import full_ggn, jacobian
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.contract import check_generator, check_refusal
from multiplicity_bench.generators.full_ggn import evidence_precision
from multiplicity_bench.generators.jacobian import hessian_root
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.modelset import DualSet
from multiplicity_bench.generators.posterior import fit_posterior
from scipy.optimize import minimize_scalar

PRECISION = 2.5
# More weights than rows (the dual) and fewer (G itself), for every kind of task.
PROBLEMS = {
    "binary, dual": {"network": "mlp", "width": 4, "depth": 2, "classes": 2},
    "binary, few weights": {"network": "logistic", "n": 60, "classes": 2},
    "three classes, dual": {"network": "smallcnn", "width": 2, "norm": "batch", "size": 4},
    "three classes, few weights": {"network": "logistic", "n": 60},
    "labels, dual": {"network": "smallcnn", "width": 2, "norm": "group", "size": 4, "labels": True},
    "labels, few weights": {"network": "logistic", "n": 60, "labels": True},
}


class Probe(DualSet):
    """A set whose member k has the k-th unit vector as noise: its perturbations are the sampler's matrix."""

    def noise(self, member: int, size: int, stream: str = "") -> torch.Tensor:
        return torch.eye(size)[member]


def sampler(drawn: DualSet) -> torch.Tensor:
    """Return the matrix S [param, param] of `perturbation = S z` in float64."""
    probe = Probe(**vars(drawn))
    return torch.stack([probe.perturbation(k) for k in range(len(drawn.factors["vectors"]))], 1).double()


@pytest.fixture
def problems(untrained, with_labels):
    """Return `problems(name)`."""

    def make(name: str):
        settings = dict(PROBLEMS[name])
        labels = settings.pop("labels", False)
        problem = untrained(**settings)
        return with_labels(problem) if labels else problem

    return make


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_squared_root_is_the_hessian_of_the_loss(task):
    generator = torch.Generator().manual_seed(0)
    classes = 2 if task == "binary" else 5
    logits = 3 * torch.randn(40, classes, generator=generator, dtype=torch.float64)
    logits[:5, 1] += 18  # saturated: 1 - p is 1e-8
    labels = torch.arange(40) % classes
    if task == "multilabel":
        labels = torch.randint(-1, 2, (40, classes), generator=generator)
    root = hessian_root(logits, labels, task)
    assert root.shape == (40, classes, classes - (task != "multilabel"))
    for z, label, found in zip(logits, labels, root @ root.mT):
        hessian = torch.func.hessian(lambda z, label=label: mean_loss(z[None], label[None]))(z)
        torch.testing.assert_close(found, hessian, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(
    ("network", "settings", "leaves"),
    [
        ("mlp", {"width": 4}, None),
        ("smallcnn", {"width": 2, "norm": "group", "size": 5}, None),
        ("smallcnn", {"width": 2, "norm": "batch", "size": 5}, None),
        ("resnet18", {"size": 4, "n": 2, "norm": "batch"}, ["body.0.weight", "body.3.norm1.bias", "body.13.weight"]),
    ],
    ids=["mlp", "groupnorm", "batchnorm", "resnet18"],
)
def test_jacobians_equal_those_of_single_images_in_float64(network, settings, leaves, untrained, monkeypatch):
    problem = untrained(network, **settings)
    names = leaves or list(problem.base.params)
    moved = {n: p + 0.01 for n, p in problem.base.params.items()}
    monkeypatch.setattr(jacobian, "IMAGES", 5)  # images come in unequal chunks
    for given in (None, moved):
        found = jacobian.jacobian(problem, names, problem.train.images, given)
        assert found.dtype == torch.float32
        params = {n: p.double() for n, p in (given or problem.base.params).items()}
        buffers = {n: b.double() if b.is_floating_point() else b for n, b in problem.base.buffers.items()}

        def logits(varied, image, params=params, buffers=buffers):
            return problem.network({**params, **varied}, buffers, image[None])[0]

        for image, rows in zip(problem.train.images, found, strict=True):
            exact = torch.func.jacrev(logits)({n: params[n] for n in names}, image)
            exact = torch.cat([exact[n].flatten(1) for n in names], 1)
            # float32 sums of up to thousands of terms
            torch.testing.assert_close(rows.double(), exact, rtol=0, atol=2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("name", PROBLEMS)
def test_full_draws_have_the_dense_inverse_as_covariance(name, problems, dense_ggn):
    problem = problems(name)
    drawn = Laplace(structure="full", prior_precision=str(PRECISION)).generate(problem, 0)
    ggn = dense_ggn(problem)
    few = name.endswith("few weights")
    assert (len(ggn) <= len(problem.train) * jacobian.rows_per_image(problem)) == few, "both ways are taken"
    assert float(ggn.diagonal().max()) > 0.1, "the data speak louder than rounding"
    root = sampler(drawn)
    covariance = torch.linalg.inv(ggn + PRECISION * torch.eye(len(ggn)))
    torch.testing.assert_close(root @ root.T, covariance, rtol=0, atol=2e-6)  # float32, entries up to 1 / 2.5
    torch.testing.assert_close(root, root.T, rtol=0, atol=2e-6)
    vectors, values = drawn.factors["vectors"].double(), drawn.factors["values"]
    torch.testing.assert_close(vectors * values @ vectors.T, ggn, rtol=0, atol=1e-5 * float(ggn.max()))
    if few:  # 9 pixels and a bias, times the rank of H
        rank = 10 * jacobian.rows_per_image(problem)
        assert len(values) == rank, "null eigenvalues are left out"


def test_full_draws_have_that_covariance_as_random_draws_too(problems, draws, worst_moments, dense_ggn):
    problem = replace(problems("binary, dual"), members=5000)
    drawn = Laplace(structure="full", prior_precision="0.3").generate(problem, 0)
    covariance = torch.linalg.inv(dense_ggn(problem) + 0.3 * torch.eye(drawn.diagnostics["weights_varied"]))
    base = torch.cat([p.double().reshape(-1) for p in problem.base.params.values()])
    of_mean, of_covariance = worst_moments(draws(drawn), base, covariance)
    # the largest of 2,485 nearly normal z-values exceeds 5 with probability 1.4e-3; the seed is fixed
    assert of_mean < 5 and of_covariance < 5


def test_a_direction_a_million_times_stiffer_than_the_prior_is_shrunk_as_it_should():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(400, 3, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([1e6, 1e3, 1.0], dtype=torch.float64)
    drawn = DualSet(
        size=1,
        shared_params={},
        shared_buffers={},
        mean={"w": torch.zeros(400)},
        factors={"vectors": vectors.float(), "values": values},
        scale=1.0,
    )
    root = sampler(drawn)
    variance = (vectors.T @ root @ root.T @ vectors).diagonal()
    # In float32 noise of size 1 cancels to 1e-3, with an error of some 1e-6.
    torch.testing.assert_close(variance, 1 / (values + 1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["binary, dual", "three classes, few weights", "labels, dual"])
def test_marglik_maximises_the_dense_evidence(name, problems, dense_ggn):
    problem = problems(name)
    ggn = dense_ggn(problem)
    squared = sum(float(p.double().square().sum()) for p in problem.base.params.values())

    def evidence(exponent: float) -> float:
        a = 10**exponent
        precision = ggn + a * torch.eye(len(ggn))
        return 0.5 * float(len(ggn) * math.log(a) - torch.linalg.slogdet(precision).logabsdet - a * squared)

    best = 10 ** minimize_scalar(lambda x: -evidence(x), bounds=(-2, 6), method="bounded", options={"xatol": 1e-7}).x
    found = fit_posterior(problem, "full", "all").marglik
    # Float32 Jacobians move the place of a flat maximum (by up to 6e-4, by processor) and hardly its height.
    assert found == pytest.approx(best, rel=2e-3)
    assert evidence(math.log10(found)) == pytest.approx(evidence(math.log10(best)), abs=1e-4)
    drawn = Laplace(structure="full", prior_precision="marglik").generate(problem, 0)
    assert drawn.diagnostics["prior_precision"] == drawn.scale == found
    assert drawn.diagnostics["curvature_mean"] == pytest.approx(float(ggn.diagonal().mean()), rel=1e-5)


@pytest.mark.parametrize(("squared", "end"), [(0.0, 1e9), (1e9, 1e-2)])
def test_an_evidence_without_maximum_gives_the_end_of_the_range(squared, end):
    assert evidence_precision(torch.ones(3, dtype=torch.float64), squared) == pytest.approx(end)


def test_two_ways_to_the_full_ggn_agree(untrained):
    """For one and the same network: 24 images give more rows than weights, 6 of them repeated fewer."""
    problem = untrained("logistic", n=24)
    few = Part(problem.train.images[:6], problem.train.labels[:6])
    repeated = Part(few.images.repeat(4, 1, 1, 1), few.labels.repeat(4))
    dual, primal = (
        fit_posterior(replace(problem, train=train, part=lambda name, spec, compute: compute()), "full", "all")
        for train in (few, repeated)
    )
    assert len(primal.curvature["vectors"]) == 30 <= 2 * 24 and 2 * 6 < 30
    assert len(dual.curvature["values"]) == len(primal.curvature["values"]) == 12
    torch.testing.assert_close(4 * dual.curvature["values"], primal.curvature["values"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_multi_label_problems_keep_to_the_contract(structure, problems):
    assert check_generator(Laplace(structure=structure, prior_precision="30"), problems("labels, dual")) is not None


def test_a_missing_label_contributes_nothing(problems):
    """Images of which no label is known change nothing but the number N, which the sum does not see."""
    problem = problems("labels, dual")
    unknown = Part(problem.tune.images, torch.full_like(problem.tune.labels, -1))
    more = Part(torch.cat([problem.train.images, unknown.images]), torch.cat([problem.train.labels, unknown.labels]))
    alone = lambda name, spec, compute: compute()  # noqa: E731
    few, many = (
        fit_posterior(replace(problem, train=train, part=alone), "full", "all") for train in (problem.train, more)
    )
    torch.testing.assert_close(few.curvature["values"], many.curvature["values"], rtol=1e-5, atol=1e-7)


def test_a_full_ggn_that_is_too_large_is_a_skip_that_names_the_alternatives(toy, monkeypatch):
    problem = toy("smallcnn", norm="batch", classes=3)
    weights = sum(p.numel() for p in problem.base.params.values())
    rank = 2 * len(problem.train)
    monkeypatch.setattr("multiplicity_bench.generators.posterior.FULL_LIMIT", 4 * rank * weights - 1)
    reason = check_refusal(Laplace(structure="full"), problem)
    assert f"{rank:,} eigenvectors of {weights:,} weights" in reason
    assert "use a smaller subset, structure=kron or structure=lowrank" in reason and "\n" not in reason
    assert Laplace(structure="full", subset="last_layer").supports(problem) is None
    monkeypatch.setattr("multiplicity_bench.generators.posterior.FULL_LIMIT", 4 * rank * weights)
    assert Laplace(structure="full").supports(problem) is None
    assert full_ggn.FULL_LIMIT == 2**30
