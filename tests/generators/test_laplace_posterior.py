"""The Laplace posterior against dense algebra in float64 and against laplace-torch's own objects."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.posterior import STRUCTURES, fit_curvature, leaf_names
from torch.utils.data import DataLoader, TensorDataset

PRECISION = 2.5
NETWORKS = {
    "mlp": {"network": "mlp", "width": 4, "depth": 2, "n": 60},  # more than two batches of laplace-torch's fit
    "groupnorm": {"network": "smallcnn", "width": 2, "norm": "group", "size": 4},
    "batchnorm": {"network": "smallcnn", "width": 2, "norm": "batch", "size": 4},
    "logistic": {"network": "logistic", "n": 60},
}


def fitted_by_library(problem, structure, subset="all", frozen=()):
    """Return laplace-torch's own object, fitted on train as its documentation shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace as LaplaceTorch

        module = problem.module()
        for name, leaf in module.named_parameters():
            leaf.requires_grad_(name not in frozen)
        la = LaplaceTorch(module, "classification", subset_of_weights=subset, hessian_structure=structure)
        la.fit(DataLoader(TensorDataset(problem.train.images, problem.train.labels), batch_size=128))
    return la


def dense_precision(drawn) -> torch.Tensor:
    """Return a KroneckerSet's precision `U (l_B x l_A + a) U'` [param, param], blocks of its leaves, in float64."""
    blocks = []
    for i in range(len(drawn.mean)):
        factors = [
            (drawn.factors[f"values.{i}.{j}"].double(), drawn.factors[f"vectors.{i}.{j}"].double())
            for j in (0, 1)
            if f"values.{i}.{j}" in drawn.factors
        ]
        values, vectors = factors[0]
        for other_values, other_vectors in factors[1:]:
            values, vectors = torch.kron(values, other_values), torch.kron(vectors, other_vectors)
        blocks.append(vectors @ torch.diag(values + drawn.scale) @ vectors.T)
    return torch.block_diag(*blocks)


def blocks_of(matrix: torch.Tensor, problem, names) -> torch.Tensor:
    """Return the matrix without what lies outside the blocks of single leaves."""
    sizes = [problem.base.params[n].numel() for n in names]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return matrix * (owner[:, None] == owner[None, :])


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_the_diagonal_is_that_of_the_dense_ggn(settings, untrained, dense_ggn):
    problem = untrained(**settings)
    drawn = Laplace(prior_precision=str(PRECISION)).generate(problem, 0)
    ggn = dense_ggn(problem)
    assert float(ggn.diagonal().max()) > 0.1, "the data speak louder than rounding"
    # float32 sums of a few dozen terms: relative errors of 1e-6 to 1e-5, more where Jacobians nearly cancel
    torch.testing.assert_close(
        drawn.factors["sd"].double() ** -2, ggn.diagonal() + PRECISION, rtol=2e-5, atol=2e-5 * float(ggn.max())
    )


@pytest.mark.parametrize("name", ["groupnorm", "batchnorm"])
def test_the_diagonal_covers_norm_layers_and_kfac_leaves_them_at_the_base(name, untrained):
    problem = untrained(**NETWORKS[name])
    norm = [f"body.{layer}.{leaf}" for layer in (1, 5, 9) for leaf in ("weight", "bias")]
    assert set(norm) <= set(leaf_names(problem.module(), "diag", "all"))
    diag = Laplace(prior_precision="3").generate(problem, 0)
    kron = Laplace(structure="kron", prior_precision="3").generate(problem, 0)
    assert set(diag.mean) == set(problem.base.params) and diag.notes == []
    assert set(kron.mean) == set(problem.base.params) - set(norm)
    count = sum(problem.base.params[n].numel() for n in norm)
    assert kron.notes == [f"KFAC covers no normalisation layers: their {count} weights stay at the base's"]
    for n in norm:
        assert all(torch.equal(kron.member(k)[0][n], problem.base.params[n]) for k in range(kron.size))
    last = Laplace(structure="kron", subset="last_layer", prior_precision="3").generate(problem, 0)
    assert last.notes == [] and list(last.mean) == ["body.13.weight", "body.13.bias"]


def test_a_logistic_posterior_is_the_inverse_of_the_exact_hessian(untrained):
    """For a linear network the GGN is the Hessian of the loss: Bayesian logistic regression."""
    problem = untrained("logistic", n=40)
    params = {n: p.double() for n, p in problem.base.params.items()}
    vector = torch.cat([p.reshape(-1) for p in params.values()])

    def negative_log_posterior(vector):
        parts = vector.split([p.numel() for p in params.values()])
        leaves = {n: part.view_as(p) for (n, p), part in zip(params.items(), parts)}
        logits = problem.network(leaves, {}, problem.train.images)
        loss = torch.nn.functional.cross_entropy(logits, problem.train.labels, reduction="sum")
        return loss + 0.5 * PRECISION * vector.square().sum()

    hessian = torch.func.hessian(negative_log_posterior)(vector)
    drawn = Laplace(prior_precision=str(PRECISION)).generate(problem, 0)
    torch.testing.assert_close(drawn.factors["sd"].double() ** -2, hessian.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("copies", [1, 30])
def test_kfac_is_exact_for_one_linear_layer_and_one_image(copies, untrained, dense_ggn):
    """A sum over copies of one image factorises as well: `N H x x'`. KFAC drops the weight-bias block by design."""
    problem = untrained("logistic")
    images, labels = problem.train.images[:1].repeat(copies, 1, 1, 1), problem.train.labels[:1].repeat(copies)
    problem = replace(problem, train=Part(images, labels))
    drawn = Laplace(structure="kron", prior_precision=str(PRECISION)).generate(problem, 0)
    exact = blocks_of(dense_ggn(problem), problem, list(drawn.mean))
    exact = exact + PRECISION * torch.eye(len(exact))
    # float32 eigenvectors: errors of 1e-6 of the largest entry
    torch.testing.assert_close(dense_precision(drawn), exact, rtol=0, atol=5e-6 * float(exact.max()))


def test_kfacs_bias_block_is_exact_for_any_data(untrained, dense_ggn):
    """The bias block of a linear layer is sum_i H_i, whatever the images: a wrong factor N would show."""
    problem = untrained("logistic", n=200)  # two batches of the fit
    drawn = Laplace(structure="kron", prior_precision=str(PRECISION)).generate(problem, 0)
    block = dense_ggn(problem, ["body.1.bias"])
    found = dense_precision(drawn)[-3:, -3:] - PRECISION * torch.eye(3)
    torch.testing.assert_close(found, block, rtol=1e-5, atol=1e-5 * float(block.max()))


def test_kron_draws_have_the_dense_inverse_as_covariance(untrained, draws, worst_moments, dense_ggn):
    """Draws damped by (l_B l_A + a)^(-1/2) in the eigenbasis against (H x xx' + a)^-1, inverted densely in float64."""
    problem = untrained("logistic", members=20_000)
    problem = replace(problem, train=Part(problem.train.images[:1], problem.train.labels[:1]))
    drawn = Laplace(structure="kron", prior_precision="0.3").generate(problem, 0)
    precision = blocks_of(dense_ggn(problem), problem, list(drawn.mean)) + 0.3 * torch.eye(30)
    base = torch.cat([p.double().reshape(-1) for p in problem.base.params.values()])
    of_mean, of_covariance = worst_moments(draws(drawn), base, torch.linalg.inv(precision))
    # the largest of 465 nearly normal z-values exceeds 5 with probability 3e-4; the seed is fixed
    assert of_mean < 5 and of_covariance < 5
    # damping the two factors apart, as (l_B + sqrt a)(l_A + sqrt a), would be another covariance
    values = [drawn.factors[f"values.0.{j}"].double() for j in (0, 1)]
    apart = torch.outer(values[0] + 0.3**0.5, values[1] + 0.3**0.5)
    assert float(((torch.outer(*values) + 0.3) / apart).min()) < 0.7


@pytest.mark.parametrize("name", ["mlp", "groupnorm"])
def test_kron_precision_equals_the_librarys(name, untrained):
    problem = untrained(**NETWORKS[name])
    drawn = Laplace(structure="kron", prior_precision=str(PRECISION)).generate(problem, 0)
    library = fitted_by_library(problem, "kron", frozen=set(problem.base.params) - set(drawn.mean))
    library.prior_precision = PRECISION
    found, wanted = dense_precision(drawn), library.posterior_precision.to_matrix(exponent=1).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.max()))


def test_kron_draws_have_the_librarys_covariance(untrained, draws, worst_moments):
    problem = untrained("mlp", width=3, depth=1, classes=2, n=20, members=20_000)
    drawn = Laplace(structure="kron", prior_precision=str(PRECISION)).generate(problem, 0)
    library = fitted_by_library(problem, "kron")
    library.prior_precision = PRECISION
    covariance = library.posterior_precision.to_matrix(exponent=-1).double().detach()
    base = torch.cat([p.double().reshape(-1) for p in problem.base.params.values()])
    theirs = library.sample(20_000, generator=torch.Generator().manual_seed(0)).double().detach()
    for found in (draws(drawn), theirs):  # both samplers pass the same check: the largest of 741 z-values
        of_mean, of_covariance = worst_moments(found, base, covariance)
        assert of_mean < 5 and of_covariance < 5


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_last_layer_equals_the_librarys_last_layer_laplace(structure, toy):
    problem = toy("smallcnn", norm="batch", classes=3)
    drawn = Laplace(structure=structure, subset="last_layer", prior_precision=str(PRECISION)).generate(problem, 0)
    library = fitted_by_library(problem, structure, "last_layer")
    library.prior_precision = PRECISION
    assert library.n_params == sum(leaf.numel() for leaf in drawn.mean.values()) == 99
    if structure == "diag":
        found, wanted = drawn.factors["sd"].double() ** -2, library.posterior_precision.double()
    else:
        found, wanted = dense_precision(drawn), library.posterior_precision.to_matrix(exponent=1).double()
    # two float32 sums over 120 images in another order
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5 * float(wanted.max()))
    assert set(drawn.shared_params) == set(problem.base.params) - set(drawn.mean)


def test_diagonal_draws_have_mean_and_covariance_of_the_posterior(untrained, draws, worst_moments):
    problem = untrained("logistic", members=20_000)
    drawn = Laplace(prior_precision="0.5").generate(problem, 3)
    base = torch.cat([p.double().reshape(-1) for p in problem.base.params.values()])
    covariance = torch.diag(drawn.factors["sd"].double() ** 2)
    of_mean, of_covariance = worst_moments(draws(drawn), base, covariance)
    assert of_mean < 5 and of_covariance < 5  # as above: the largest of 465


@pytest.mark.parametrize("subset", ["body.4", "body.0+body.13", "body.1+body.4"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_chosen_layers_have_the_posterior_of_their_own_block(structure, subset, untrained, dense_ggn):
    """What the rest of the network does enters through the Jacobians of the chosen leaves alone."""
    problem = untrained(**NETWORKS["groupnorm"])
    names = [n for n in problem.base.params if n.rpartition(".")[0] in subset.split("+")]
    covered = [n for n in names if structure != "kron" or not n.startswith("body.1.")]
    drawn = Laplace(structure=structure, subset=subset, prior_precision=str(PRECISION)).generate(problem, 0)
    assert list(drawn.mean) == covered and set(drawn.shared_params) == set(problem.base.params) - set(covered)
    assert (drawn.notes == []) == (covered == names)
    block = dense_ggn(problem, covered)
    tolerance = 2e-5 * float(block.max())
    if structure == "diag":
        torch.testing.assert_close(
            drawn.factors["sd"].double() ** -2, block.diagonal() + PRECISION, rtol=2e-5, atol=tolerance
        )
    elif structure == "full":
        vectors = drawn.factors["vectors"].double()
        torch.testing.assert_close(vectors * drawn.factors["values"] @ vectors.T, block, rtol=0, atol=tolerance)
    else:
        library = fitted_by_library(problem, "kron", frozen=set(problem.base.params) - set(covered))
        library.prior_precision = PRECISION
        wanted = library.posterior_precision.to_matrix(exponent=1).double()
        torch.testing.assert_close(dense_precision(drawn), wanted, rtol=0, atol=1e-5 * float(wanted.max()))


def test_a_layer_that_holds_layers_stands_for_them_all(untrained):
    module = untrained("resnet18", size=4, n=2).module()
    block = leaf_names(module, "diag", "body.5")
    assert len(block) == 9 and all(n.startswith("body.5.") for n in block)
    assert leaf_names(module, "kron", "body.5") == [n for n in block if "conv" in n or n.endswith("shortcut.0.weight")]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_huge_prior_precision_gives_the_base(structure, subset, toy):
    problem = toy("smallcnn", norm="batch", classes=3)
    settings = {"structure": structure, "subset": subset, "batchnorm": "keep"}
    drawn = Laplace(prior_precision="1e14", **settings).generate(problem, 0)
    for k in range(drawn.size):
        params, buffers = drawn.member(k)
        for name, leaf in params.items():
            torch.testing.assert_close(leaf, problem.base.params[name], rtol=0, atol=1e-6)  # sd 1e-7, 4 sd at most
        assert all(torch.equal(buffers[n], b) for n, b in problem.base.buffers.items())


def test_the_noise_of_a_member_is_the_same_at_every_prior_precision(untrained, draws):
    problem = untrained("logistic")
    base = torch.cat([p.double().reshape(-1) for p in problem.base.params.values()])
    whitened = []
    for precision in ("1", "400"):
        drawn = Laplace(prior_precision=precision).generate(problem, 5)
        whitened.append((draws(drawn) - base) / drawn.factors["sd"].double())
    torch.testing.assert_close(*whitened, rtol=0, atol=1e-3)  # float32 weights near 1 minus the base, over sd .05


def test_fitting_the_curvature_needs_no_global_noise_and_leaves_the_network_alone(untrained):
    problem = untrained("mlp", width=4)
    names, state = list(problem.base.params), torch.get_rng_state()
    before = {n: p.clone() for n, p in problem.base.params.items()}
    first = fit_curvature(problem, "kron", names)
    torch.manual_seed(99)
    second = fit_curvature(problem, "kron", names)
    torch.set_rng_state(state)
    assert all(torch.allclose(t, second[n], rtol=1e-4, atol=1e-5) for n, t in first.items() if "values" in n)
    assert all(torch.equal(p, before[n]) for n, p in problem.base.params.items())
