"""Integrators of geodesics: against exact curves, against scipy, against each other, and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import inf, sqrt

import numpy as np
import pytest
import torch
from multiplicity_bench.generators.dormand_prince import DormandPrince
from multiplicity_bench.generators.ek0 import EK0
from multiplicity_bench.generators.geodesic import Integrator, Surface, speed
from multiplicity_bench.generators.projected_flow import ProjectedFlow
from multiplicity_bench.generators.rattle import Rattle
from multiplicity_bench.generators.surface import NetworkSurface, tilted
from scipy.integrate import quad, solve_ivp
from scipy.stats import spearmanr
from torch import Tensor

from .surfaces import Cliff, Counting, Formula, smooth_cnn


@dataclass
class Case:
    """An integrator under test.

    precise: settings whose end points are off by less than `error` of the path's length on all gentle surfaces here
    (measured: a tenth to a half of it); fixed: n equal steps; order: of the end point's error in 1/n; finest: the n
    from which halving shows the order; loose: settings for use, controlled by the drift; work: least and most
    evaluations of n steps.
    """

    name: str
    precise: Integrator
    error: float
    fixed: Callable[[int], Integrator]
    order: float
    finest: int
    loose: Integrator
    work: Callable[[int], dict[str, tuple[int, int]]]

    @property
    def by_curvature(self) -> bool:
        """Whether it goes by c' H c', and not by gradients alone."""
        return self.work(1)["curvatures"][1] > 0


CASES = [
    Case(
        "dormand_prince",
        precise=DormandPrince(rtol=1e-8, atol=0.0),
        error=1e-7,
        fixed=lambda n: DormandPrince(inf, inf, max_step=1 / n),
        order=5,
        finest=16,
        loose=DormandPrince(rtol=1e-3, atol=0.0, drift=0.01),
        work=lambda n: {"gradients": (0, 0), "curvatures": (6 * n + 1, 6 * n + 1)},
    ),
    Case(
        "ek0",
        precise=EK0(rtol=1e-5, atol=0.0),
        error=1e-4,
        fixed=lambda n: EK0(inf, inf, max_step=1 / n),
        order=3,
        finest=32,
        loose=EK0(rtol=1e-2, atol=0.0, drift=0.01),
        work=lambda n: {"gradients": (n, n), "curvatures": (n + 2, n + 2)},
    ),
    Case(
        "rattle",
        precise=Rattle(drift=1e-4, max_step=1 / 64),
        error=1e-3,
        # How exactly the impulse is solved is a share of the drift: it has to fall as the step's own error does.
        fixed=lambda n: Rattle(drift=0.01 / n**2, first_step=1.0, max_step=1 / n),
        order=2,
        finest=16,
        loose=Rattle(drift=0.01),
        # A step whose impulse was not foreseen takes a second gradient, or values.
        work=lambda n: {"gradients": (n, 2 * n), "curvatures": (0, 0)},
    ),
    Case(
        "projected_flow",
        precise=ProjectedFlow(steps=128),
        error=2e-2,
        fixed=ProjectedFlow,
        order=1,
        finest=64,
        loose=ProjectedFlow(),
        work=lambda n: {"gradients": (n, n), "curvatures": (0, 0)},
    ),
]

every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
bounded = pytest.mark.parametrize("case", [c for c in CASES if c.loose.bounded], ids=lambda c: c.name)
adaptive = pytest.mark.parametrize("case", [c for c in CASES if hasattr(c.loose, "max_step")], ids=lambda c: c.name)

WAVES = Formula(lambda w: (torch.sin(2 * w) + 0.3 * w**2).sum(1), 1)
BOWL = Formula(lambda w: 0.5 * (w**2 * torch.arange(1, 6, dtype=w.dtype)).sum(1), 5)
CONSTANT = Formula(lambda w: torch.full_like(w[:, 0], 3.0), 5)
LINEAR = Formula(lambda w: w @ torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0], dtype=w.dtype), 5)


def directions(members: int, size: int, length: float = 1.0, seed: int = 0) -> Tensor:
    """Return velocities [member, param] of one length in random directions."""
    drawn = torch.randn(members, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return length * drawn / drawn.norm(dim=1, keepdim=True)


@pytest.fixture(scope="session")
def mlp(toy) -> Callable[..., NetworkSurface]:
    """Return `mlp(tilt)`: the loss of a small trained network with tanh units over 30 images, 178 weights."""
    problem = toy("mlp", n=40, width=4)

    def make(tilt: bool = False) -> NetworkSurface:
        surface = NetworkSurface(problem, list(problem.base.params), problem.train, strategy="vmap")
        return tilted(surface) if tilt else surface

    return make


@pytest.fixture(scope="session")
def networks(toy, mlp) -> dict[str, tuple[Surface, Tensor]]:
    """Return smooth losses of networks and a point on each."""
    cnn = smooth_cnn(toy("mlp", n=40, width=4).train)
    somewhere = 0.7 * torch.randn(cnn.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = mlp()
    return {"mlp": (plain, plain.origin), "smooth_cnn": (cnn, somewhere)}


@pytest.fixture(scope="session")
def scipys(networks) -> Callable[[str], tuple[Surface, Tensor, Tensor, Tensor]]:
    """Return `scipys(network)`: surface, start, velocity and scipy's end points [member, param]."""

    @cache
    def solve(network: str) -> tuple[Surface, Tensor, Tensor, Tensor]:
        surface, origin = networks[network]
        start, velocity = origin.expand(2, -1), directions(2, surface.size)
        return surface, start, velocity, by_scipy(surface, 1.0, start, velocity)

    return solve


def by_scipy(surface: Surface, tau: float, start: Tensor, velocity: Tensor) -> Tensor:
    """Return the end points [member, param] by DOP853, one member after the other, in numpy's own arithmetic."""
    size = surface.size

    def right_hand_side(t: float, state: np.ndarray) -> np.ndarray:
        c, v = (torch.from_numpy(part.copy())[None] for part in (state[:size], state[size:]))
        _, gradient, curved = surface.curvature(c, v)
        g = gradient[0].numpy()
        return np.concatenate([v[0].numpy(), -(tau**2) * g * float(curved) / (1 + tau**2 * g @ g)])

    ends = []
    for c, v in zip(start.numpy(), velocity.numpy(), strict=True):
        scale = 1e-13 * float(np.linalg.norm(v))
        done = solve_ivp(right_hand_side, (0, 1), np.concatenate([c, v]), method="DOP853", rtol=1e-12, atol=scale)
        assert done.success
        ends.append(torch.from_numpy(done.y[:size, -1]))
    return torch.stack(ends)


def distances(found: Tensor, wanted: Tensor) -> Tensor:
    """Return distances [member] between weights [member, param]."""
    return (found - wanted).norm(dim=1)


@every
def test_in_one_dimension_the_arc_length_is_the_speed(case):
    """Any curve in one dimension is a geodesic; only how fast it is run through can be wrong."""
    start = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None]
    velocity = torch.tensor([1.0, -2.0, 3.0, -0.5, 0.1, -3.0], dtype=torch.float64)[:, None]
    tau = 0.7
    found = case.precise.solve(WAVES, tau, start, velocity)
    assert found.reached.all()
    initial = speed(velocity, WAVES.gradient(start)[1], tau)
    for a, b, v, s in zip(start[:, 0], found.weights[:, 0], velocity[:, 0], initial, strict=True):
        slope = lambda w: sqrt(1 + (tau * (2 * np.cos(2 * w) + 0.6 * w)) ** 2)  # noqa: E731
        length, _ = quad(slope, float(a), float(b), epsabs=1e-12, epsrel=1e-12, limit=200)
        assert length * np.sign(float(v)) == pytest.approx(float(s), rel=case.error)


@every
def test_on_a_cylinder_the_arc_is_linear_in_time_and_the_rest_moves_straight(case):
    """L = k c_1^2 / 2 unrolls into a plane: s(x) = (x sqrt(1 + K^2 x^2) + asinh(K x) / K) / 2 with K = tau k."""
    stiffness, tau = 3.0, 0.5
    surface = Formula(lambda w: 0.5 * stiffness * w[:, 0] ** 2, 4)
    start = torch.tensor([[0.0, 1, 2, 3], [-0.8, 0, 0, 0], [0.5, -1, 0, 1]], dtype=torch.float64)
    velocity = torch.tensor([[1.0, 1, -1, 0], [1.5, 2, 0, 0.3], [1.0, 0, 0, 0]], dtype=torch.float64)
    found = case.precise.solve(surface, tau, start, velocity)
    k = tau * stiffness
    arc = lambda x: (x * (1 + (k * x) ** 2).sqrt() + (k * x).asinh() / k) / 2  # noqa: E731
    wanted = arc(start[:, 0]) + velocity[:, 0] * (1 + (k * start[:, 0]) ** 2).sqrt()
    torch.testing.assert_close(arc(found.weights[:, 0]), wanted, rtol=0, atol=3 * case.error)
    # The projected flow rescales all coordinates alike, which the straight ones pay for.
    straight = 1e-12 if case.loose.bounded else case.error
    torch.testing.assert_close(found.weights[:, 1:], (start + velocity)[:, 1:], rtol=0, atol=straight)


@every
@pytest.mark.parametrize("surface", [CONSTANT, LINEAR], ids=["constant", "linear"])
def test_on_a_plane_members_move_straight(case, surface):
    start, velocity = directions(4, 5, seed=1), directions(4, 5, 2.0)
    found = case.loose.solve(surface, 1.5, start, velocity)
    assert found.reached.all()
    torch.testing.assert_close(found.weights, start + velocity, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.velocity, velocity, rtol=0, atol=1e-12)


@every
def test_without_a_temperature_members_move_straight(case):
    start, velocity = directions(4, 5, seed=1), directions(4, 5, 2.0)
    found = case.loose.solve(BOWL, 0.0, start, velocity)
    torch.testing.assert_close(found.weights, start + velocity, rtol=0, atol=1e-12)


@every
def test_a_member_without_velocity_stays_and_does_not_drift(case):
    start = directions(2, 5, seed=1)
    velocity = directions(2, 5) * torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found = case.loose.solve(BOWL, 1.0, start, velocity)
    assert found.reached.all() and torch.equal(found.weights[0], start[0])
    assert float(found.drift[0]) == 0 and not torch.equal(found.weights[1], start[1])


@every
@pytest.mark.parametrize("network", ["mlp", "smooth_cnn"])
def test_end_points_are_scipys(case, network, scipys):
    surface, start, velocity, wanted = scipys(network)
    assert (distances(start + velocity, wanted) > 0.01).any(), "nothing bends: a straight line would pass"
    found = case.precise.solve(surface, 1.0, start, velocity)
    lengths = speed(velocity, surface.gradient(start)[1], 1.0)
    assert (distances(found.weights, wanted) < case.error * lengths).all()


@bounded
@pytest.mark.parametrize("network", ["mlp", "smooth_cnn"])
def test_halving_the_step_shows_the_order(case, network, scipys):
    """Observed over two halvings: Dormand-Prince 5.0-5.3, EK0 2.8-2.9, RATTLE 2.0."""
    surface, start, velocity, wanted = scipys(network)
    steps = [case.finest // 4, case.finest // 2, case.finest]
    errors = [
        float(distances(case.fixed(n).solve(surface, 1.0, start, velocity).weights, wanted).norm()) for n in steps
    ]
    assert errors[2] > 1e-13, "rounding decides: take fewer steps"
    assert np.log2(errors[0] / errors[2]) / 2 == pytest.approx(case.order, abs=0.4)


@every
def test_on_a_network_with_creases_end_points_are_scipys_as_long_as_none_is_crossed(case, toy):
    """ReLU and max-pooling crease the loss; the ways are so short, and the images so few, that they meet no crease."""
    problem = toy("smallcnn", n=8)
    surface = NetworkSurface(problem, list(problem.base.params), problem.train, strategy="loop")
    start, velocity = surface.origin.expand(2, -1), directions(2, surface.size, 1e-3)
    assert (DormandPrince().solve(surface, 1.0, start, velocity).drift < 1e-9).all()
    wanted = by_scipy(surface, 1.0, start, velocity)
    bend = distances(start + velocity, wanted)
    found = case.precise.solve(surface, 1.0, start, velocity)
    # The bends are 1e-8, the rounding of all weights together 1e-15.
    assert (distances(found.weights, wanted) < case.error * bend + 1e-14).all()


@every
def test_across_many_small_creases_only_gradients_show_the_way(case):
    """A parabola of straight pieces is a cylinder for whoever looks at gradients, and flat for c' H c'.

    Integrators that go by c' H c' move straight on, and their drift tells.
    """
    stiffness, width = 2.0, 0.001
    pieces = width * torch.arange(3000, dtype=torch.float64)
    surface = Formula(lambda w: stiffness * width * (w[:, :1] - pieces).relu().sum(1), 2)
    start = torch.tensor([[width / 2, 0.0]], dtype=torch.float64)
    velocity = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    integrator = replace(case.loose, drift=inf) if case.by_curvature else case.loose
    found = integrator.solve(surface, 1.0, start, velocity)
    assert found.reached.all()
    if case.by_curvature:
        torch.testing.assert_close(found.weights, start + velocity, rtol=0, atol=1e-12)
        assert float(found.drift) > 1
    else:
        end = float(found.weights[0, 0])
        arc = (end * sqrt(1 + (stiffness * end) ** 2) + np.arcsinh(stiffness * end) / stiffness) / 2
        assert arc == pytest.approx(2.0, rel=0.05)
        assert float(found.drift) < 0.01


@every
def test_the_speed_is_conserved_and_the_drift_says_to_what(case, mlp):
    """Measured here at the end; the drift is the largest change on the way, and so no less."""
    surface = mlp()
    start, velocity = surface.origin.expand(8, -1), directions(8, surface.size, 3.0)
    for integrator in (case.precise, case.loose):
        found = integrator.solve(surface, 1.0, start, velocity)
        initial = speed(velocity, surface.gradient(start)[1], 1.0)
        change = (speed(found.velocity, surface.gradient(found.weights)[1], 1.0) / initial - 1).abs()
        assert found.reached.all()
        assert (change <= found.drift + 1e-12).all()
        assert (found.drift <= 0.01).all()
        if not integrator.bounded:  # rescaled in every step
            assert (found.drift < 1e-12).all()


@adaptive
def test_a_tighter_drift_is_kept_too(case, mlp):
    surface = mlp(tilt=True)
    start, velocity = surface.origin.expand(8, -1), directions(8, surface.size, 10.0)
    found = [replace(case.loose, drift=d).solve(surface, 1.0, start, velocity) for d in (0.03, 1e-3)]
    assert all(f.reached.all() for f in found)
    assert (found[1].drift <= 1e-3).all() and (found[0].drift <= 0.03).all()
    assert (found[1].steps.sum() > found[0].steps.sum()).all()


@every
def test_a_geodesic_run_backwards_returns_to_its_start(case, networks):
    surface, origin = networks["smooth_cnn"]
    start, velocity = origin.expand(4, -1), directions(4, surface.size, 2.0)
    there = case.precise.solve(surface, 1.0, start, velocity)
    back = case.precise.solve(surface, 1.0, there.weights, -there.velocity)
    lengths = speed(velocity, surface.gradient(start)[1], 1.0)
    assert (distances(back.weights, start) < 2 * case.error * lengths).all()
    assert (distances(back.velocity, -velocity) < 20 * case.error * lengths).all()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize("name", ["bowl", "softplus"])
def test_ek0s_standard_deviation_is_the_size_of_its_errors(name, tolerance):
    """The median of (error / sd)^2 is 0.46 for a standard normal; measured: 0.3 to 1.

    At much tighter tolerances the sd is too large by design: errors fall as h^3, the sd of as many independent steps
    as h^2.5.
    """
    generator = torch.Generator().manual_seed(0)
    mix, shift = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 8), (8,)))
    softplus = Formula(lambda w: torch.nn.functional.softplus(w @ mix + shift).sum(1), 5)
    surface = {"bowl": BOWL, "softplus": softplus}[name]
    start, velocity = directions(100, 5, 1.0, seed=1), directions(100, 5, 3.0)
    exact = DormandPrince(rtol=1e-10, atol=0.0).solve(surface, 1.0, start, velocity)
    found = EK0(rtol=tolerance, atol=0.0).solve(surface, 1.0, start, velocity)
    error = found.weights - exact.weights
    assert 0.2 < float((error / found.sd[:, None]).square().median()) < 5
    assert spearmanr(error.norm(dim=1), found.sd).statistic > 0.5, "the sd does not know the members with large errors"


@every
def test_only_ek0_has_a_standard_deviation_and_none_for_members_that_did_not_arrive(case):
    start, velocity = directions(2, 5, seed=1), directions(2, 5)
    found = case.loose.solve(BOWL, 1.0, start, velocity)
    assert (torch.isfinite(found.sd) == (case.name == "ek0")).all()
    if case.name == "ek0":
        assert torch.isnan(EK0(max_step=0.1, max_steps=3).solve(BOWL, 1.0, start, velocity).sd).all()


@every
def test_members_solved_together_are_members_solved_alone(case, mlp):
    """Members of different speeds take different steps and leave at different times."""
    surface = mlp(tilt=True)
    lengths = torch.tensor([[0.1], [1.0], [3.0], [6.0]], dtype=torch.float64)
    start, velocity = surface.origin.expand(4, -1), lengths * directions(4, surface.size)
    together = case.loose.solve(surface, 1.0, start, velocity)
    if hasattr(case.loose, "max_step"):
        assert len(set(together.steps.tolist())) > 2, "all members took the same steps: nothing was tested"
    for k in range(4):
        alone = case.loose.solve(surface, 1.0, start[k : k + 1], velocity[k : k + 1])
        for count in ("gradients", "curvatures", "values", "steps", "rejected"):
            assert int(getattr(alone, count)) == int(getattr(together, count)[k]), count
        # A sum over a batch of another size is rounded differently, 1e-16; the equation amplifies it a little.
        torch.testing.assert_close(alone.weights[0], together.weights[k], rtol=0, atol=1e-10)


@every
@pytest.mark.parametrize("n", [4, 10])
def test_fixed_steps_cost_what_they_should(case, n, mlp):
    surface = mlp()
    start, velocity = surface.origin.expand(3, -1), directions(3, surface.size, 0.1)
    found = case.fixed(n).solve(surface, 1.0, start, velocity)
    assert found.reached.all() and found.steps.tolist() == [n] * 3 and found.rejected.tolist() == [0] * 3
    for count, (least, most) in case.work(n).items():
        assert all(least <= k <= most for k in getattr(found, count).tolist()), count


@every
def test_counts_are_the_rows_that_the_surface_was_evaluated_for(case, mlp):
    """But for the gradient at the start, which members share; curvatures there are along each one's velocity."""
    surface = Counting(mlp(tilt=True))
    lengths = torch.tensor([[0.1], [1.0], [6.0]], dtype=torch.float64)
    start, velocity = surface.surface.origin.expand(3, -1), lengths * directions(3, surface.size)
    found = case.loose.solve(surface, 1.0, start, velocity)
    shared = 0 if case.by_curvature else 3
    assert surface.gradients == int(found.gradients.sum()) + shared
    assert surface.curvatures == int(found.curvatures.sum())
    assert surface.values == int(found.values.sum())


@every
def test_the_loss_of_the_end_point_is_known_without_another_evaluation(case, mlp):
    surface = mlp()
    start, velocity = surface.origin.expand(3, -1), directions(3, surface.size, 2.0)
    found = case.loose.solve(surface, 1.0, start, velocity)
    torch.testing.assert_close(found.value, surface.value(found.weights), rtol=1e-12, atol=0)


@every
def test_single_precision_stays_single_and_agrees_with_double(case, mlp):
    surface = Counting(mlp(tilt=True))
    start, velocity = surface.surface.origin.expand(4, -1), directions(4, surface.size, 3.0)
    double = case.loose.solve(surface, 1.0, start, velocity)
    surface.dtypes.clear()
    single = case.loose.solve(surface, 1.0, start.float(), velocity.float())
    assert surface.dtypes == {torch.float32}
    assert single.weights.dtype == single.velocity.dtype == torch.float32
    assert single.reached.all() and (single.drift <= 0.01).all()
    # Steps differ where a rounded error decides; what both are wrong by is far below the drift of 1 %.
    assert (distances(single.weights.double(), double.weights) < 0.01 * velocity.norm(dim=1)).all()


@every
def test_members_that_leave_the_finite_numbers_are_not_reached_and_disturb_no_other(case):
    """On a plane the way is straight: who gets beyond the radius is known. The last one starts there."""
    surface = Cliff(LINEAR, radius=1.0)
    start = torch.zeros(5, 5, dtype=torch.float64)
    start[4, 0] = 2.0
    lengths = torch.tensor([[0.5], [1.5], [0.95], [30.0], [0.1]], dtype=torch.float64)
    velocity = lengths * directions(5, 5)
    found = case.loose.solve(surface, 1.0, start, velocity)
    assert found.reached.tolist() == [True, False, True, False, False]
    assert torch.isfinite(found.weights).all() and torch.isfinite(found.drift).all()
    assert (found.weights[:4].norm(dim=1) <= 1).all(), "stopped at the last point that was finite"
    alone = case.loose.solve(LINEAR, 1.0, start[[0, 2]], velocity[[0, 2]])
    torch.testing.assert_close(found.weights[[0, 2]], alone.weights, rtol=0, atol=1e-14)


@adaptive
def test_a_member_that_runs_out_of_steps_is_not_reached(case):
    start, velocity = directions(2, 5, seed=1), directions(2, 5)
    short = replace(case.loose, first_step=0.1, max_step=0.1, max_steps=5)
    found = short.solve(BOWL, 1.0, start, velocity)
    assert not found.reached.any() and (found.steps + found.rejected).tolist() == [5, 5]
    assert (distances(found.weights, start) > 0).all()
    assert replace(short, max_steps=100).solve(BOWL, 1.0, start, velocity).reached.all()


@bounded
@pytest.mark.parametrize("tilt", [False, True], ids=["plain", "tilted"])
def test_no_member_rises_above_the_bound(case, tilt, mlp):
    """L(c(1)) - L(c(0)) <= speed(0) / tau (1 + drift), for tau = 1 and 1 / N, at any length of step."""
    surface = mlp(tilt)
    start, velocity = surface.origin.expand(150, -1), torch.cat([directions(50, surface.size, k) for k in (1, 3, 10)])
    value, gradient = surface.gradient(start)
    for tau in (1.0, 1 / len(surface.part)):
        bound = speed(velocity, gradient, tau) / tau
        found = case.loose.solve(surface, tau, start, velocity)
        rise = surface.value(found.weights) - value
        assert found.reached.all()
        assert (rise <= bound * (1 + found.drift) + 1e-9).all()
        if tau == 1:
            straight = surface.value(start + velocity) - value
            assert (straight > 2 * bound).any(), "straight lines keep the bound as well: nothing was tested"


@pytest.fixture(scope="session")
def far_members(mlp) -> tuple[Surface, Tensor, Tensor, Tensor]:
    """Return a surface, start and large velocities of 100 members, and precise end points [member, param]."""
    surface = mlp()
    start, velocity = surface.origin.expand(100, -1), directions(100, surface.size, 15.0)
    tight = DormandPrince(rtol=1e-6, atol=0.0).solve(surface, 1.0, start, velocity)
    assert tight.reached.all()
    return surface, start, velocity, tight.weights


@bounded
def test_for_large_velocities_loose_and_tight_end_points_are_alike_as_sets(case, far_members):
    """Single members differ; as sets, loose and tight differ by a small part of what straight lines differ by."""
    surface, start, velocity, tight = far_members
    loose = case.loose.solve(surface, 1.0, start, velocity)
    assert loose.reached.all()
    assert energy_distance(loose.weights, tight) < 0.1 * energy_distance(start + velocity, tight)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 2 E|A - B| - E|A - A'| - E|B - B'| of two sets [member, param]."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
