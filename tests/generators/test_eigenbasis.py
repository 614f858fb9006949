"""The eigenbasis of a posterior: an orthogonal change of coordinates in which the curvature is diagonal."""

from __future__ import annotations

import pytest
import torch
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.posterior import STRUCTURES, fit_posterior

NETWORKS = {
    "mlp": {"network": "mlp", "width": 4, "depth": 2},
    "cnn": {"network": "smallcnn", "width": 2, "norm": "batch", "size": 4},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_coordinates_come_back_as_the_weights_they_were(structure, network, untrained):
    posterior = fit_posterior(untrained(**NETWORKS[network]), structure, "all")
    basis = posterior.eigenbasis()
    size = posterior.diagnostics(1.0)["weights_varied"]
    flat = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficients, remainder = basis.to(flat)
    assert coefficients.shape == (3, len(basis.values))
    assert (remainder is None) == (structure != "full") and basis.values.dtype == torch.float64
    torch.testing.assert_close(basis.back(coefficients, remainder), flat, rtol=0, atol=1e-5)  # float32 eigenvectors
    squares = coefficients.square().sum(1) + (0 if remainder is None else remainder.square().sum(1))
    torch.testing.assert_close(squares, flat.square().sum(1), rtol=1e-5, atol=0)
    assert basis.to(flat.float())[0].dtype == torch.float32


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_curvature_is_diagonal_in_its_eigenbasis(structure, network, untrained):
    """The precision G + a I of the draws, rebuilt from the eigenvalues, inverts the covariance of the posterior."""
    posterior = fit_posterior(untrained(**NETWORKS[network]), structure, "all")
    basis = posterior.eigenbasis()
    eye = torch.eye(posterior.diagnostics(1.0)["weights_varied"], dtype=torch.float64)
    coefficients, _ = basis.to(eye)
    assert float(basis.values.min()) >= 0
    curvature = coefficients * basis.values @ coefficients.T
    drawn = posterior.at(0.7, 0, 1)
    drawn.noise = _unit_vectors(drawn)
    root = torch.stack([drawn.perturbation(k) for k in range(len(eye))], 1).double()
    torch.testing.assert_close(root @ (curvature + 0.7 * eye) @ root.T, eye, rtol=0, atol=2e-4)


def _unit_vectors(drawn):
    """Return noise whose member k is the k-th unit vector over all leaves, also where it is drawn leaf by leaf."""
    starts = torch.tensor([0, *(leaf.numel() for leaf in drawn.mean.values())]).cumsum(0)

    def noise(member: int, size: int, stream: str = "") -> torch.Tensor:
        unit = torch.eye(int(starts[-1]))[member]
        return unit if stream == "" else unit[int(starts[int(stream)]) :][:size]

    return noise


def test_the_full_basis_is_the_dense_ggn(untrained, dense_ggn):
    problem = untrained(**NETWORKS["mlp"])
    basis = fit_posterior(problem, "full", "all").eigenbasis()
    ggn = dense_ggn(problem)
    coefficients, remainder = basis.to(torch.eye(len(ggn), dtype=torch.float64))
    found = coefficients * basis.values @ coefficients.T
    torch.testing.assert_close(found, ggn, rtol=0, atol=1e-5 * float(ggn.max()))
    assert float((ggn @ remainder).abs().max()) < 1e-4 * float(ggn.max()), "what is left has no curvature"


def test_a_posterior_moves_and_stacks_the_leaves_that_vary_alone(untrained):
    problem = untrained(**NETWORKS["cnn"])
    posterior = fit_posterior(problem, "diag", "body.13+body.4")
    drawn = Laplace(subset="body.13+body.4", prior_precision="3", batchnorm="keep").generate(problem, 2)
    deviations = [posterior.at(3.0, 2, 4).perturbation(k) for k in range(4)]
    found = posterior.stack([posterior.moved(deviation) for deviation in deviations])
    assert set(found.params) == {"body.4.weight", "body.13.weight", "body.13.bias"}
    for k in range(4):
        for leaves, wanted in zip(found.block(k, k + 1).member(0), drawn.block(k, k + 1).member(0)):
            assert set(leaves) == set(wanted)
            assert all(torch.allclose(leaf, wanted[n], atol=1e-6) for n, leaf in leaves.items())
