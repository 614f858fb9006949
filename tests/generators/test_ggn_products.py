"""Products with the full GGN, its largest eigenvalues and matrix-free draws, against dense algebra in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.errors import Diverged, UserError
from multiplicity_bench.generators import ggn_products
from multiplicity_bench.generators.api import Memory
from multiplicity_bench.generators.contract import check_generator
from multiplicity_bench.generators.ggn_products import GGN, draw, fit_lowrank
from multiplicity_bench.generators.jacobian import hessian_root, jacobian
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.modelset import member_noise
from multiplicity_bench.generators.posterior import Options, fit_posterior, posterior_obstacle

PRECISION = 2.5
NETWORKS = {
    "mlp": {"network": "mlp", "width": 4, "depth": 2},
    "batchnorm": {"network": "smallcnn", "width": 4, "norm": "batch", "size": 6},
}


@pytest.fixture(params=["binary", "multiclass", "multilabel"])
def problem(request, untrained, with_labels):
    task = request.param
    found = untrained(**NETWORKS["mlp" if task == "binary" else "batchnorm"], classes=2 if task == "binary" else 3)
    return with_labels(found) if task == "multilabel" else found


def test_a_product_is_that_with_the_dense_ggn(problem, dense_ggn, monkeypatch):
    monkeypatch.setattr(ggn_products, "IMAGES", 5)
    names = list(problem.base.params)
    ggn, exact = GGN(problem, names), dense_ggn(problem)
    vectors = torch.randn(3, ggn.size, generator=torch.Generator().manual_seed(0))
    for vector in vectors:
        wanted = exact @ vector.double()
        torch.testing.assert_close(ggn(vector).double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_largest_eigenvalues_are_those_of_the_dense_ggn(problem, dense_ggn):
    names = list(problem.base.params)
    found, exact = fit_lowrank(problem, names, 5), dense_ggn(problem)
    values = torch.linalg.eigvalsh(exact)
    torch.testing.assert_close(found["values"], values[-5:], rtol=1e-4, atol=1e-6 * float(values[-1]))
    v = found["vectors"].double()
    torch.testing.assert_close(v.T @ v, torch.eye(5).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(exact @ v, v * found["values"], rtol=0, atol=2e-4 * float(values[-1]))


def test_a_draw_solves_the_perturbed_system(problem, dense_ggn, monkeypatch):
    """Of covariance `(G + a)^-1 (G + a) (G + a)^-1`: given e and z, all there is to check is linear algebra."""
    monkeypatch.setattr(ggn_products, "IMAGES", 7)
    names = list(problem.base.params)
    ggn, exact = GGN(problem, names), dense_ggn(problem)
    found = draw(ggn, PRECISION, 3, 1, tolerance=1e-6)
    rows = [
        member_noise(3, 1, len(root) * root.shape[2], torch.device("cpu"), f"rows {i}").view(len(root), -1)
        for i, root in enumerate(ggn.roots)
    ]
    logits = problem.logits(problem.base.params, problem.base.buffers, problem.train.images)
    roots = hessian_root(logits, problem.train.labels, problem.task)
    pulled = torch.einsum(
        "ncp,ncr,nr->p", jacobian(problem, names, problem.train.images).double(), roots, torch.cat(rows).double()
    )
    z = member_noise(3, 1, ggn.size, torch.device("cpu"))
    target = pulled + PRECISION**0.5 * z.double()
    wanted = torch.linalg.solve(exact + PRECISION * torch.eye(ggn.size), target)
    torch.testing.assert_close(found.deviation.double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    default = draw(ggn, PRECISION, 3, 1)
    assert default.iterations < found.iterations
    error = (default.deviation - found.deviation).norm() / found.deviation.norm()
    assert float(error) < 0.05, "a relative residual of 1e-2"


def test_a_system_that_does_not_converge_is_said(problem, monkeypatch):
    monkeypatch.setattr(ggn_products, "ITERATIONS", 1)
    with pytest.raises(Diverged, match="in 1 iterations"):
        draw(GGN(problem, list(problem.base.params)), 1e-3, 0, 0)


@pytest.mark.parametrize(
    "settings",
    [{"structure": "lowrank", "rank": 4}, {"structure": "matrix_free", "prior_precision": "50"}],
    ids=["lowrank", "matrix_free"],
)
def test_sets_from_products_keep_the_contract(settings, toy):
    check_generator(Laplace(**settings), toy("mlp"))


def test_the_low_rank_posterior_of_full_rank_is_the_full_one(untrained):
    """14 images of 3 classes give 28 rows at most: eigenvalue number 29 and those after it are 0."""
    problem = untrained(**NETWORKS["mlp"], n=14)
    own = fit_posterior(problem, "lowrank", "all", Options(rank=30)).at(PRECISION, 7, 2)
    full = fit_posterior(problem, "full", "all").at(PRECISION, 7, 2)
    for k in range(2):
        torch.testing.assert_close(own.perturbation(k), full.perturbation(k), rtol=1e-3, atol=1e-4)


def test_matrix_free_members_that_are_there_are_not_solved_for_again(untrained, monkeypatch):
    problem = replace(untrained(**NETWORKS["mlp"], members=3), checkpoint=Memory())
    generator = Laplace(structure="matrix_free", prior_precision="5")
    first = generator.generate(problem, 0)
    assert first.diagnostics["iterations"] > 1
    monkeypatch.setattr("multiplicity_bench.generators.laplace.draw", None)
    again = generator.generate(problem, 0)
    assert all(torch.equal(again.params[n], first.params[n]) for n in first.params)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"structure": "matrix_free"}, "give a number"),
        ({"structure": "lowrank", "engine": "laplace_torch"}, "has no structure=lowrank"),
        ({"structure": "kron", "kfac_approx": "reduced"}, "reduce"),
        ({"structure": "kron", "kfac_approx": "reduce", "engine": "laplace_torch"}, "use native"),
        ({"engine": "nativ"}, "native"),
        ({"rank": 0}, "rank at least 1"),
        ({"structure": "low_rank"}, "lowrank"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(settings, said):
    with pytest.raises(UserError) as error:
        Laplace(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_rank_that_is_no_lower_than_the_weights_is_a_reason(untrained):
    problem = untrained("logistic")
    reason = posterior_obstacle(problem, "lowrank", "all", Options(rank=30))
    assert reason == "rank=30 is not below the 30 weights that vary: use structure=full"
