"""The logarithmic map of a quadratic loss, against closed forms and the geodesics of the true surface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multiplicity_bench.generators.eigenbasis import Eigenbasis, SpanBasis
from multiplicity_bench.generators.log_map import ACCURACY, log_map
from scipy.integrate import solve_ivp
from torch import Tensor


def exponential(curvature: Tensor, velocity: Tensor, tau: float) -> Tensor:
    """Return the end [param] of the geodesic of y = tau c'Qc/2 from the origin with `velocity`, by scipy at 1e-10."""
    q, v = curvature.numpy(), velocity.numpy()

    def motion(_: float, state: np.ndarray) -> np.ndarray:
        c, speed = np.split(state, 2)
        gradient = q @ c
        return np.concatenate([speed, -(tau**2) * gradient * (speed @ q @ speed) / (1 + tau**2 * gradient @ gradient)])

    start = np.concatenate([np.zeros_like(v), v])
    # Tolerances relative to the smallest coordinate that matters: those along steep axes are small, and the loss's.
    solved = solve_ivp(motion, (0, 1), start, method="DOP853", rtol=1e-10, atol=1e-12)
    return torch.from_numpy(solved.y[: len(v), -1])


def arc(x: Tensor, slope: float) -> Tensor:
    """Return the length of the parabola y = slope x^2 / 2 from 0 to x."""
    return (x * (1 + (slope * x) ** 2).sqrt() + torch.asinh(slope * x) / slope) / 2


def rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize(
    ("size", "flat", "decades", "tau"),
    [(2, 0, 2, 1.0), (5, 2, 4, 0.1), (20, 0, 3, 1 / 500), (20, 0, 3, 1.0), (50, 25, 4, 1 / 500), (50, 25, 4, 1.0)],
)
def test_the_geodesic_of_the_true_loss_ends_at_the_deviation(size, flat, decades, tau):
    generator = torch.Generator().manual_seed(size)
    vectors = rotation(size, generator)[:, flat:]
    values = 10 ** (decades - 5 * torch.rand(size - flat, generator=generator, dtype=torch.float64))
    curvature = vectors * values @ vectors.T
    root = torch.linalg.inv(torch.linalg.cholesky(curvature + torch.eye(size)))
    deviation = torch.randn(3, size, generator=generator, dtype=torch.float64) @ root
    velocity, missed = log_map(SpanBasis(values, vectors), deviation, tau)
    assert missed.max() <= ACCURACY
    for d, v in zip(deviation, velocity, strict=True):
        off = exponential(curvature, v, tau) - d
        # A miss of 1e-6 is what a correction stops at; scipy adds 1e-10 per step, times what steep axes amplify.
        assert off.norm() <= 2e-6 * d.norm()
        assert off @ curvature @ off <= (2e-6) ** 2 * (d @ curvature @ d)


@pytest.mark.parametrize("slope", [1e-3, 1.0, 1e3])
def test_on_a_cylinder_the_steep_part_is_the_length_of_the_parabola_and_the_rest_is_straight(slope):
    deviation = torch.tensor([[0.3, 0.0, 0.0], [0.3, -2.0, 0.7], [-1.7, 0.0, 0.1]], dtype=torch.float64)
    for extent in (1.0, 0.01):
        velocity, missed = log_map(Eigenbasis(torch.tensor([slope / 0.5, 0, 0]).double()), extent * deviation, 0.5)
        expected = extent * deviation
        expected[:, 0] = arc(expected[:, 0], slope)
        assert missed.max() <= ACCURACY
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-12)  # 1e-6 of |d|, the steep part less of it


def test_on_a_paraboloid_of_revolution_only_the_length_changes():
    deviation = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).double()
    velocity, _ = log_map(Eigenbasis(torch.full((30,), 7.0).double()), deviation, 0.3)
    length = deviation.norm(dim=1, keepdim=True)
    torch.testing.assert_close(velocity, deviation * arc(length, 2.1) / length, rtol=3e-6, atol=0)


def test_where_the_surface_is_flat_the_velocity_is_the_deviation():
    values = torch.tensor([1e4, 10.0, 0.0]).double()
    deviation = torch.tensor([[0.02, -0.3, 2.0]])
    assert torch.equal(log_map(Eigenbasis(values), deviation, 0.0)[0], deviation)
    assert torch.equal(log_map(Eigenbasis(0 * values), deviation, 1.0)[0], deviation)
    nearly, _ = log_map(Eigenbasis(values), deviation.double(), 1e-7)
    # v - d is of the order tau^2 Q (d'Qd) d: 1e-14 * 1e4 * 5.
    torch.testing.assert_close(nearly, deviation.double(), rtol=1e-9, atol=0)


def test_a_prior_in_the_metric_adds_to_every_eigenvalue_those_outside_the_basis_too():
    generator = torch.Generator().manual_seed(1)
    vectors, values = rotation(6, generator), torch.tensor([300.0, 20.0]).double()
    deviation = torch.randn(3, 6, generator=generator, dtype=torch.float64) / 5
    found, missed = log_map(SpanBasis(values, vectors[:, :2]), deviation, 0.5, extra=4.0)
    whole = torch.cat([values + 4, torch.full((4,), 4.0).double()])
    expected, _ = log_map(SpanBasis(whole, vectors), deviation, 0.5)
    assert missed.max() <= ACCURACY
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm()))  # either is good to 1e-6


def test_lumped_eigenvalues_cost_no_accuracy():
    generator = torch.Generator().manual_seed(2)
    values = 10 ** (4 - 8 * torch.rand(1000, generator=generator, dtype=torch.float64))
    deviation = torch.randn(2, 1000, generator=generator, dtype=torch.float64) / (values + 10).sqrt()
    assert log_map(Eigenbasis(values), deviation, 0.1)[1].max() <= ACCURACY


def test_next_to_a_plane_of_symmetry_the_path_bends_around_the_steep_axis_on_the_side_of_the_deviation():
    values, tau = torch.tensor([1000.0, 1.0]).double(), 1.0
    sides = torch.tensor([[1e-5, 1.0], [-1e-5, 1.0]]).double()
    velocity, missed = log_map(Eigenbasis(values), sides, tau)
    assert missed.max() <= ACCURACY
    torch.testing.assert_close(velocity[0], velocity[1] * torch.tensor([-1.0, 1.0]).double())
    assert velocity[0, 0] > 0.01, "the path leaves the plane"
    # |v| is the path's length. Within the plane a geodesic is a parabola, here a detour.
    assert velocity.norm(dim=1).max() < arc(torch.ones(()), 1.0)


def test_the_precision_of_the_deviation_is_that_of_the_velocity():
    velocity, missed = log_map(Eigenbasis(torch.tensor([10.0, 1.0])), torch.tensor([[0.3, 0.4]]), 1.0)
    assert velocity.dtype == torch.float32 and missed.dtype == torch.float64
    assert velocity.isfinite().all()


def test_members_have_the_posterior_of_a_gaussian_target_and_plain_draws_one_too_narrow(worst_moments, monkeypatch):
    # An error of a thousandth is nothing beside the sampling error of 2,000 draws.
    for name, value in {"CHORDS": 16, "ACCURACY": 1e-3, "MEMBERS": 2000}.items():
        monkeypatch.setattr(f"multiplicity_bench.generators.log_map.{name}", value)
    values, tau, draws = torch.tensor([100.0, 10.0, 0.5]).double(), 0.5, 2000
    vectors = rotation(3, torch.Generator().manual_seed(3))
    covariance = vectors / (values + 1) @ vectors.T
    noise = torch.randn(draws, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    deviation = noise / (values + 1).sqrt() @ vectors.T
    velocity, missed = log_map(SpanBasis(values, vectors), deviation, tau)
    assert missed.max() <= 1e-3
    corrected, plain = (_runge_kutta(vectors * values @ vectors.T, v, tau) for v in (velocity, deviation))
    # Of 9 moments of a right sample one exceeds 4 standard errors in 1,700 tries.
    assert max(worst_moments(corrected, torch.zeros(3), covariance)) < 4
    assert max(worst_moments(plain, torch.zeros(3), covariance)) > 6
    along = vectors.T @ torch.cov(plain.T) @ vectors
    assert (along.diagonal() * (values + 1))[:2].max() < 0.9


def _runge_kutta(curvature: Tensor, velocity: Tensor, tau: float, steps: int = 400) -> Tensor:
    def bend(c: Tensor, v: Tensor) -> Tensor:
        gradient = c @ curvature
        held = (v * (v @ curvature)).sum(1) / (1 + tau**2 * gradient.square().sum(1))
        return -(tau**2) * gradient * held[:, None]

    c, v, h = torch.zeros_like(velocity), velocity, 1 / steps
    for _ in range(steps):
        k1, l1 = v, bend(c, v)
        k2, l2 = v + h / 2 * l1, bend(c + h / 2 * k1, v + h / 2 * l1)
        k3, l3 = v + h / 2 * l2, bend(c + h / 2 * k2, v + h / 2 * l2)
        k4, l4 = v + h * l3, bend(c + h * k3, v + h * l3)
        c, v = c + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), v + h / 6 * (l1 + 2 * l2 + 2 * l3 + l4)
    return c
