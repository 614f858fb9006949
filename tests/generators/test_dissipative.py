"""ForcedMotion with gravity and friction, against scipy's solution of its equation, and as a generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.contract import check_generator
from multiplicity_bench.generators.dissipative import Dissipative, ForcedMotion
from multiplicity_bench.generators.dormand_prince import DormandPrince
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.surface import NetworkSurface
from scipy.integrate import solve_ivp

from .conftest import flat
from .surfaces import Cliff, Counting, Formula

CURVATURE = torch.tensor([9.0, 1.0, 0.2], dtype=torch.float64)
BOWL = Formula(lambda w: 0.5 * (CURVATURE * w * w).sum(1), 3)
START = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
VELOCITY = torch.tensor([1.0, 0.7, -1.5], dtype=torch.float64)
TAU = 0.4


def reference(gravity: float, friction: float, duration: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return position, velocity and the energy that friction took: the particle's equation by scipy at 1e-10."""
    q = CURVATURE.numpy()

    def motion(_: float, state: np.ndarray) -> np.ndarray:
        c, u = state[:3], state[3:6]
        gradient = q * c
        held = TAU * (TAU * u @ (q * u) + gravity) / (1 + TAU**2 * gradient @ gradient)
        return np.concatenate([u, -held * gradient - friction * u, [friction * (u @ u + (TAU * gradient @ u) ** 2)]])

    begin = np.concatenate([START.numpy(), VELOCITY.numpy(), [0.0]])
    end = solve_ivp(motion, (0, duration), begin, method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
    return end[:3], end[3:6], float(end[6])


def energy(c: np.ndarray, u: np.ndarray, gravity: float) -> tuple[float, float]:
    """Return kinetic and potential energy."""
    gradient = CURVATURE.numpy() * c
    return 0.5 * float(u @ u + (TAU * gradient @ u) ** 2), 0.5 * gravity * TAU * float(gradient @ c)


@pytest.mark.parametrize(("gravity", "friction"), [(2.0, 0.0), (0.0, 0.7), (2.0, 0.7)])
def test_the_motion_is_that_of_a_particle_on_the_surface_to_second_order(gravity, friction):
    position, velocity, taken = reference(gravity, friction, 3.0)
    errors = []
    for kicks in (60, 120):
        rest = ForcedMotion(gravity, friction, 3.0, kicks, 1e-8).solve(BOWL, TAU, START, VELOCITY)
        assert rest.reached
        errors.append(np.abs(rest.weights.numpy() - position).max())
    assert errors[1] < 5e-4  # h^2 = 6e-4
    assert 3 < errors[0] / errors[1] < 5.5, "half the step, a quarter of the error"
    kinetic, fallen = energy(position, velocity, gravity)
    before, high = energy(START.numpy(), VELOCITY.numpy(), gravity)
    assert abs(kinetic + fallen + taken - before - high) < 1e-8, "dE/dt = -friction speed^2"
    assert rest.kinetic == pytest.approx(kinetic / before, abs=2e-3)
    assert gravity * TAU * rest.change == pytest.approx(fallen - high, abs=2e-3)
    assert abs(rest.missing) < 1e-3


def test_without_forces_the_motion_is_a_geodesic():
    rest = ForcedMotion(0.0, 0.0, 1.0, 200, 1e-6).solve(BOWL, TAU, START, VELOCITY)
    geodesic = DormandPrince(rtol=1e-10, atol=0.0).solve(BOWL, TAU, START[None], VELOCITY[None])
    torch.testing.assert_close(rest.weights, geodesic.weights[0], rtol=0, atol=1e-4)  # h^2 = 2.5e-5
    assert rest.kinetic == pytest.approx(1, abs=1e-4) and abs(rest.missing) < 1e-4


def test_in_the_long_run_the_particle_rests_at_the_bottom():
    rest = ForcedMotion(3.0, 1.0, 40.0, 800, 0.01).solve(BOWL, TAU, START, VELOCITY)
    assert rest.kinetic < 1e-3 and rest.weights.abs().max() < 0.1
    lowest = -float(BOWL.value(START[None]))
    assert rest.change == pytest.approx(lowest, rel=1e-3)


def test_friction_alone_takes_the_particle_as_far_as_its_velocity():
    rest = ForcedMotion(0.0, 2.0, 10.0, 100, 0.01).solve(BOWL, 0.0, START, VELOCITY)
    # int exp(-2 t) dt = 1/2; the kicks sum it by the midpoint rule, h = .1: (h f)^2 / 24 off.
    torch.testing.assert_close(rest.weights, START + VELOCITY / 2, rtol=0, atol=0.004)


def test_every_gradient_is_counted_and_none_is_taken_twice():
    surface = Counting(BOWL)
    rest = ForcedMotion(2.0, 0.7, 3.0, 30, 0.01).solve(surface, TAU, START, VELOCITY)
    assert (surface.gradients, surface.values) == (rest.gradients + 1, rest.values)


def test_a_particle_that_leaves_the_finite_numbers_is_reported():
    rest = ForcedMotion(0.0, 0.0, 5.0, 20, 0.01).solve(Cliff(BOWL, 3.0), TAU, START, -20 * VELOCITY)
    assert not rest.reached


@pytest.mark.parametrize("settings", [{}, {"structure": "diag", "subset": "body.3", "prior_precision": "30"}], ids=str)
def test_the_generator_keeps_to_the_contract(settings, toy):
    check_generator(Dissipative(**settings), toy(members=4))


def test_without_forces_on_a_flat_surface_members_are_the_laplace_draws(toy):
    problem = toy(members=3)
    still = Dissipative(tau=0.0, gravity=0.0, friction=0.0, duration=1.0, prior_precision="40")
    drawn, plain = still.generate(problem, 6), Laplace(structure="full", prior_precision="40").generate(problem, 6)
    for k in range(3):
        torch.testing.assert_close(
            flat(drawn.leaves(k)), flat(plain.leaves(k)), rtol=0, atol=1e-5
        )  # 16 sums in float32


def test_members_end_lower_on_the_training_objective_than_plain_draws(toy):
    problem = toy(members=8)
    names = list(problem.base.params)
    objective = NetworkSurface(problem, names, problem.train, prior=problem.prior_precision, strategy="loop")
    means = []
    for kind in (Dissipative, Laplace):
        drawn = kind(structure="full", prior_precision="3").generate(problem, 2)
        weights = torch.stack([flat(drawn.block(k, k + 1).member(0)[0]) for k in range(8)])
        means.append(float(objective.value(weights).mean()))
    assert means[0] < means[1] - 1, "in nats, summed over 120 images: more than rounding"


def test_what_became_of_the_energy_is_reported_for_every_member(toy):
    problem = toy(members=3)
    found = Dissipative(prior_precision="10").generate(problem, 1).diagnostics
    assert found["tau"] == 1 / len(problem.train) and found["metric_images"] == len(problem.train)
    told = found["members"]
    assert set(told) == {"gradients", "values", "steps", "rejected", "kinetic", "change", "missing"}
    assert all(len(column) == 3 for column in told.values())
    assert max(told["kinetic"]) < 0.01 and max(abs(m) for m in told["missing"]) < 0.05


def test_members_that_fail_carry_the_bases_weights_and_are_named(toy):
    problem = toy(members=2)
    base = flat(problem.base.params)

    def breaks(params, buffers, images, train=False):
        off = sum(((p - problem.base.params[n]) ** 2).sum() for n, p in params.items())
        return problem.network(params, buffers, images, train) + torch.where(off > 0.1, torch.nan, 0.0)

    found = Dissipative(prior_precision="1").generate(replace(problem, network=breaks), 1)
    assert found.failed == [0, 1] and found.diagnostics["failed"] == 2
    assert torch.equal(flat(found.block(0, 1).member(0)[0]), base)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"friction": -1.0}, "friction"),
        ({"gravity": float("nan")}, "gravity"),
        ({"tau": -1.0}, "tau"),
        ({"duration": 0.0}, "duration"),
        ({"drift": float("inf")}, "drift"),
        ({"kicks": 0}, "kicks"),
        ({"metric_images": 0}, "metric_images"),
    ],
)
def test_a_setting_without_meaning_is_named(settings, named):
    with pytest.raises(UserError, match=named):
        Dissipative(**settings)
