"""Riemannian Laplace: the bound, the starts, what the members are, and what happens to a geodesic that fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from multiplicity_bench.errors import Diverged, UserError
from multiplicity_bench.generators import riemannian_laplace as module
from multiplicity_bench.generators.api import Memory, Part, Problem
from multiplicity_bench.generators.contract import check_refusal, member_logits
from multiplicity_bench.generators.geodesic import Solution
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.modelset import LinearisedSet
from multiplicity_bench.generators.posterior import fit_posterior
from multiplicity_bench.generators.riemannian_laplace import INTEGRATORS, RiemannianLaplace, _Walk
from multiplicity_bench.identity import derive_seed
from torch import Tensor, nn

SEED = 3


@pytest.fixture(scope="session")
def problem(toy) -> Callable[..., Problem]:
    """Return `problem(members, strategy)`: the toy with 120 training images, members advancing as they are told to."""

    def make(members: int = 6, strategy: str = "vmap", **settings) -> Problem:
        found = toy(members=members, **settings)
        found.checkpoint.save("strategy", {"vmap": torch.tensor(strategy == "vmap")})
        return found

    return make


def flat(leaves: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in leaves.values()])


@dataclass
class Reference:
    """The loss that the metric is made of, in float64 and by autograd: the network function, summed over the images.

    names: of the leaves that vary; seed, images: of the subset (None: all).
    """

    problem: Problem
    names: list[str]
    images: int | None = None
    seed: int = SEED
    prior: float = 0.0
    linearised: bool = False
    tilt: Tensor | None = None

    def __post_init__(self) -> None:
        train = self.problem.train
        order = torch.Generator().manual_seed(derive_seed(self.seed, "metric images"))
        rows = torch.randperm(len(train), generator=order)[: self.images or len(train)].sort().values
        self.part = Part(train.images[rows], train.labels[rows])
        base = self.problem.base
        self.params = {n: p.double() for n, p in base.params.items()}
        self.buffers = {n: b.double() if b.is_floating_point() else b for n, b in base.buffers.items()}
        self.base = flat({n: self.params[n] for n in self.names})
        if self.linearised:
            self.jacobian = torch.func.jacrev(self.network)(self.base)

    def network(self, weights: Tensor) -> Tensor:
        parts = weights.split([self.params[n].numel() for n in self.names])
        own = {n: part.view_as(self.params[n]) for n, part in zip(self.names, parts, strict=True)}
        return self.problem.network({**self.params, **own}, self.buffers, self.part.images)

    def logits(self, weights: Tensor) -> Tensor:
        """Return what the network, or its expansion at the base, says about the images [sample, class]."""
        if self.linearised:
            return self.network(self.base) + self.jacobian @ (weights - self.base)
        return self.network(weights)

    def plain(self, weights: Tensor) -> Tensor:
        """Return N/n times the summed loss, without a tilt."""
        labels, functional, logits = self.part.labels, torch.nn.functional, self.logits(weights)
        if labels.ndim == 1:
            loss = functional.cross_entropy(logits, labels, reduction="sum")
        else:
            each = functional.softplus(logits) - labels * logits
            loss = torch.where(labels >= 0, each, 0.0).sum() / labels.shape[1]
        return loss * len(self.problem.train) / len(labels) + 0.5 * self.prior * weights @ weights

    def slope(self, weights: Tensor) -> Tensor:
        """Return the gradient [param], without a tilt."""
        return torch.func.grad(self.plain)(weights)

    def tilted(self) -> Reference:
        self.tilt = self.slope(self.base)
        return self

    def values(self, weights: Tensor) -> Tensor:
        """Return L~ [member]."""
        found = torch.func.vmap(self.plain)(weights)
        return found if self.tilt is None else found - (weights - self.base) @ self.tilt


def velocities(problem: Problem, generator: RiemannianLaplace) -> Tensor:
    """Return the Laplace draws [member, param] with the generator's settings, as deviations from the base."""
    plain = Laplace(generator.structure, generator.subset, generator.prior_precision, batchnorm="keep")
    drawn = plain.generate(replace(problem, checkpoint=Memory()), SEED)
    return torch.stack([drawn.perturbation(k).double() for k in range(problem.members)])


def bounds(velocity: Tensor, gradient: Tensor, tau: float) -> Tensor:
    return (velocity.square().sum(1) + (tau * velocity @ gradient) ** 2).sqrt() / tau


BOUNDED = [
    ({}, 200),
    ({"tau": 1.0}, 200),
    ({"start": "plain"}, 200),
    ({"tau": 1.0, "start": "plain"}, 200),
    ({"tau": 1.0, "metric_images": "50"}, 200),
    ({"tau": 1.0, "metric_images": "50", "start": "plain"}, 200),
    ({"tau": 1.0, "prior_in_metric": True}, 40),
    ({"tau": 1.0, "linearised": True}, 40),
    ({"tau": 1.0, "subset": "last_layer", "prior_precision": "3"}, 40),
    ({"tau": 1.0, "structure": "diag", "integrator": "dormand_prince"}, 40),
    ({"tau": 1.0, "structure": "kron", "integrator": "ek0"}, 40),
]


@pytest.mark.filterwarnings("ignore:start=plain")
@pytest.mark.parametrize(("settings", "members"), BOUNDED, ids=str)
def test_no_member_rises_above_the_start_by_more_than_its_bound(settings, members, problem, draws):
    """Recomputed with another loss, in float64, on exactly the metric's images; and so are the diagnostics."""
    toy = problem(members)
    generator = RiemannianLaplace(**{"prior_precision": "30"} | settings)
    found = generator.generate(toy, SEED)
    reference = Reference(
        toy,
        list(found.params),
        images=int(generator.metric_images) if generator.metric_images.isdecimal() else None,
        prior=toy.prior_precision if generator.prior_in_metric else 0.0,
        linearised=generator.linearised,
    )
    tau = generator.tau or 1 / len(toy.train)
    steep = reference.slope(reference.base)
    assert found.diagnostics["tau"] == tau and found.diagnostics["metric_images"] == len(reference.part)
    assert found.diagnostics["gradient_norm"] == pytest.approx(float(steep.norm()), rel=1e-5)
    if generator.start == "tilted":
        reference.tilted()
        assert found.diagnostics["tilt_norm"] == pytest.approx(float(steep.norm()), rel=1e-5)
    initial = torch.zeros_like(steep) if generator.start == "tilted" else steep
    excess = reference.values(draws(found)) - reference.values(reference.base[None])
    bound = bounds(velocities(toy, generator), initial, tau)
    recorded = {n: torch.tensor(found.diagnostics["members"][n]).double() for n in ("bound", "excess")}
    assert found.failed == [] and (excess <= bound).all() and (recorded["excess"] <= recorded["bound"]).all()
    torch.testing.assert_close(recorded["bound"], bound, rtol=1e-5, atol=0)
    # A float32 network says its logits to 1e-6, of which 120 images are summed.
    torch.testing.assert_close(recorded["excess"], excess, rtol=1e-5, atol=2e-4)
    if tau == 1:
        straight = reference.base + velocities(toy, generator)
        beyond = reference.values(straight) - reference.values(reference.base[None]) > bound
        assert beyond.any() or generator.structure != "full", "the bound is none that any draw keeps"
        assert float((excess / bound).max()) > 0.1, "nor one that nothing comes near"


def test_the_projected_flow_breaks_the_bound_and_so_claims_none(problem, draws):
    toy = problem(40)
    generator = RiemannianLaplace(tau=100.0, integrator="projected_flow", prior_precision="30")
    found = generator.generate(toy, SEED)
    assert found.diagnostics["members"]["bound"] == [None] * 40
    assert any("projected flow" in note and "no bound" in note for note in found.notes)
    reference = Reference(toy, list(found.params)).tilted()
    excess = reference.values(draws(found)) - reference.values(reference.base[None])
    recorded = torch.tensor(found.diagnostics["members"]["excess"]).double()
    torch.testing.assert_close(recorded, excess, rtol=1e-5, atol=2e-4)
    bound = bounds(velocities(toy, generator), torch.zeros_like(reference.base), 100.0)
    assert (excess > bound).any(), "if it kept the bound here, it could say so"


def walk(toy: Problem, **settings) -> _Walk:
    generator = RiemannianLaplace(**settings)
    return _Walk(generator, toy, fit_posterior(toy, generator.structure, generator.subset), SEED)


@pytest.mark.parametrize(
    "settings", [{}, {"metric_images": "50"}, {"linearised": True}, {"prior_in_metric": True}], ids=str
)
def test_the_tilt_makes_the_base_stationary(settings, problem):
    """The walk's own float32 surface and, with its tilt taken from an independent gradient, the one in float64."""
    found = walk(problem(), **settings)
    steep = found.gradient_norm
    assert steep > 1 and float(found.surface.gradient(found.start[None])[1].norm()) <= 1e-6 * steep
    wide = found.surface.gradient(found.start.double()[None])[1]
    assert float(wide.norm()) <= 2e-6 * steep, "the tilt is a float32 gradient"
    images = int(settings["metric_images"]) if "metric_images" in settings else None
    prior = found.problem.prior_precision if found.surface.prior else 0.0
    reference = Reference(found.problem, found.surface.names, images, prior=prior)
    torch.testing.assert_close(found.surface.tilt, reference.slope(reference.base), rtol=0, atol=2e-6 * steep)


def test_a_steep_plain_start_warns_and_notes_its_slope_and_a_flat_one_does_not(problem):
    with pytest.warns(UserWarning, match=r"start=plain: the base is no mode.*\|g\| = 26\.") as caught:
        found = RiemannianLaplace(tau=1.0, start="plain", prior_precision="30").generate(problem(2), SEED)
    assert len(caught) == 1 and str(caught[0].message) in found.notes
    assert found.diagnostics["tilt_norm"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({"tau": 1.0}, {"start": "plain"}, {"tau": 1.0, "start": "polished"}):
            assert RiemannianLaplace(prior_precision="30", **settings).generate(problem(2), SEED).notes == []


def test_a_polished_start_lowers_the_recipes_objective_and_reports_its_own_gradient(problem, draws):
    """With next to no velocity a member is its start."""
    toy = problem(2)
    generator = RiemannianLaplace(tau=1.0, start="polished", prior_precision="1e14", metric_images="50")
    found = generator.generate(toy, SEED)
    start = draws(found)[0]
    objective = Reference(toy, list(found.params), prior=toy.prior_precision)
    assert float(objective.plain(start)) < float(objective.plain(objective.base)) - 1
    assert float(objective.slope(start).norm()) < 0.05 * float(objective.slope(objective.base).norm())
    metric = Reference(toy, list(found.params), images=50)
    assert found.diagnostics["gradient_norm"] == pytest.approx(float(metric.slope(start).norm()), rel=1e-3)
    assert found.diagnostics["tilt_norm"] == 0


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_without_a_temperature_members_are_the_laplace_draws(structure, integrator, problem, draws):
    toy = problem(3)
    generator = RiemannianLaplace(tau=0.0, structure=structure, integrator=integrator, prior_precision="40")
    found = generator.generate(toy, SEED)
    plain = Laplace(structure=structure, prior_precision="40", batchnorm="keep").generate(toy, SEED)
    # 16 steps of float32 at most, for weights of order 1
    torch.testing.assert_close(draws(found), draws(plain), rtol=0, atol=2e-6)
    assert found.failed == [] and found.diagnostics["members"]["bound"] == [None] * 3


def test_a_huge_prior_precision_gives_the_base(problem, draws):
    toy = problem(3)
    found = RiemannianLaplace(tau=1.0, prior_precision="1e14").generate(toy, SEED)
    torch.testing.assert_close(draws(found), flat(toy.base.params).expand(3, -1), rtol=0, atol=1e-6)


@dataclass
class Straight:
    """An integrator that moves straight on and shows what it was given."""

    seen: list[tuple[float, Tensor, Tensor]]
    bounded = True

    def solve(self, surface, tau, start, velocity) -> Solution:
        self.seen.append((tau, start, velocity))
        solution = Solution.begin(start, velocity)
        solution.reached[:], solution.weights = True, start + velocity
        return solution


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer", "body.1", "body.1+body.3"])
def test_velocities_are_the_posteriors_draws_and_the_rest_of_the_network_stays(subset, structure, problem, monkeypatch):
    seen: list = []
    monkeypatch.setitem(INTEGRATORS, "rattle", lambda drift: Straight(seen))
    toy = problem(3)
    plain = Laplace(structure, subset, "40", batchnorm="keep").generate(toy, SEED)
    found = RiemannianLaplace(structure=structure, subset=subset, prior_precision="40").generate(toy, SEED)
    ((tau, start, velocity),) = seen
    assert tau == 1 / 120 and torch.equal(start[0].double(), flat(plain.mean))
    assert all(torch.equal(velocity[k], plain.perturbation(k)) for k in range(3))
    assert list(found.params) == list(plain.mean)
    for k in range(3):
        params, _ = found.member(k)
        for n, leaf in params.items():
            assert torch.equal(leaf, toy.base.params[n]) != (n in plain.mean)
    # Straight leaves the value unknown: it is taken on the surface.
    assert all(math.isfinite(e) for e in found.diagnostics["members"]["excess"])


def test_the_rashomon_radius_bounds_every_member_by_the_tolerance(problem, draws):
    toy, epsilon = problem(20), 1e-3
    settings = {"tau": 1.0, "prior_precision": "300", "target_epsilon": epsilon}
    found = RiemannianLaplace(radius="rashomon", **settings).generate(toy, SEED)
    allowed = 120 * epsilon
    assert max(found.diagnostics["members"]["bound"]) <= allowed * (1 + 1e-6)
    assert found.diagnostics["shortened"] == 20
    reference = Reference(toy, list(found.params)).tilted()
    excess = reference.values(draws(found)) - reference.values(reference.base[None])
    assert (excess <= allowed).all()
    free = RiemannianLaplace(**settings).generate(problem(20), SEED)
    assert min(free.diagnostics["members"]["bound"]) > allowed and free.diagnostics["shortened"] == 0


def test_only_members_beyond_the_rashomon_radius_are_shortened_and_keep_their_direction(problem, monkeypatch):
    seen: list = []
    monkeypatch.setitem(INTEGRATORS, "rattle", lambda drift: Straight(seen))
    settings = {"tau": 1.0, "prior_precision": "300"}
    allowed = float(velocities(problem(16), RiemannianLaplace(**settings)).norm(dim=1).quantile(0.43))
    settings["target_epsilon"] = allowed / 120
    found = RiemannianLaplace(radius="rashomon", **settings).generate(problem(16), SEED)
    RiemannianLaplace(**settings).generate(problem(16), SEED)
    (_, _, shortened), (_, _, free) = seen
    lengths = free.double().norm(dim=1)
    beyond = lengths > allowed
    assert 0 < int(beyond.sum()) < 16 and found.diagnostics["shortened"] == int(beyond.sum())
    assert torch.equal(shortened[~beyond], free[~beyond])
    wanted = free.double() * (allowed / lengths).clamp(max=1)[:, None]
    torch.testing.assert_close(shortened.double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_metrics_images_are_fixed_by_the_seed(problem):
    toy = problem(2)
    settings = {"tau": 1.0, "prior_precision": "30", "metric_images": "20"}
    norms = {}
    for seed in (SEED, SEED + 1):
        found = RiemannianLaplace(**settings).generate(replace(toy, checkpoint=Memory()), seed)
        reference = Reference(toy, list(found.params), images=20, seed=seed)
        norms[seed] = float(reference.slope(reference.base).norm())
        assert found.diagnostics["gradient_norm"] == pytest.approx(norms[seed], rel=1e-5)
        again = RiemannianLaplace(**settings).generate(replace(toy, checkpoint=Memory()), seed)
        assert again.diagnostics["gradient_norm"] == found.diagnostics["gradient_norm"]
    assert abs(norms[SEED] / norms[SEED + 1] - 1) > 0.01


def test_auto_takes_all_images_up_to_128(problem, monkeypatch):
    toy = problem(2)
    assert RiemannianLaplace().images(toy) == RiemannianLaplace(metric_images="all").images(toy) == 120
    monkeypatch.setattr(module, "IMAGES", 70)
    assert RiemannianLaplace().images(toy) == 70
    assert RiemannianLaplace(metric_images="all").images(toy) == 120
    assert RiemannianLaplace(metric_images="7").images(toy) == 7


INVALID = [
    ({"metric_images": "0"}, "generator.metric_images=0"),
    ({"metric_images": "-4"}, "generator.metric_images=-4"),
    ({"metric_images": "2.5"}, "generator.metric_images=2.5"),
    ({"metric_images": "abc"}, "generator.metric_images=abc"),
    ({"tau": -1.0}, "generator.tau=-1.0"),
    ({"tau": math.nan}, "generator.tau=nan"),
    ({"tau": math.inf}, "generator.tau=inf"),
    ({"drift": 0.0}, "generator.drift=0.0"),
    ({"drift": -0.1}, "generator.drift=-0.1"),
    ({"drift": math.nan}, "generator.drift=nan"),
    ({"integrator": "ratle"}, "did you mean 'rattle'"),
    ({"start": "tilt"}, "did you mean 'tilted'"),
    ({"radius": "rashomn"}, "did you mean 'rashomon'"),
    ({"structure": "krno"}, "did you mean 'kron'"),
    ({"linearised": True, "batchnorm": "reestimate"}, "generator.batchnorm=keep"),
]


@pytest.mark.parametrize(("settings", "message"), INVALID, ids=str)
def test_an_invalid_setting_is_one_line_that_names_it(settings, message):
    with pytest.raises(UserError) as caught:
        RiemannianLaplace(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_more_metric_images_than_there_are_is_one_line(problem):
    assert RiemannianLaplace(metric_images="120").supports(problem()) is None
    with pytest.raises(UserError, match=r"generator.metric_images=121: train has 120 images") as caught:
        RiemannianLaplace(metric_images="121").supports(problem())
    assert "\n" not in str(caught.value)


def test_a_tune_set_that_is_too_small_is_a_skip_unless_the_prior_is_given(problem):
    toy = problem()
    few = replace(toy, tune=Part(toy.tune.images[:24], toy.tune.labels[:24]))
    assert "tune has 24 images" in check_refusal(RiemannianLaplace(), few)
    assert RiemannianLaplace(prior_precision="10").supports(few) is None


class AlwaysDropping(nn.Module):
    """A network whose dropout stays active in eval mode (MC dropout)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), layer, nn.Linear(8, 2))

    def train(self, mode: bool = True) -> AlwaysDropping:
        super().train(mode)
        self.body[2].train(True)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images.to(self.body[1].weight) / 127.5 - 1)


class Hidden(nn.Module):
    """Dropout of a kind that no one can tell by its class."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def with_dropout(toy: Problem, layer: nn.Module) -> Problem:
    torch_module = AlwaysDropping(layer).eval()
    base = replace(toy.base, params={n: p.detach().clone() for n, p in torch_module.named_parameters()}, buffers={})

    def network(params, buffers, images, train=False):
        return torch.func.functional_call(torch_module, dict(params), (images,))

    return replace(toy, network=network, base=base, module=lambda: torch_module, part=lambda n, s, compute: compute())


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.AlphaDropout(0.3)], ids=["Dropout", "AlphaDropout"])
def test_a_dropout_that_stays_active_is_a_skip_that_names_the_layer(layer, problem):
    with torch.random.fork_rng():
        active, off = (with_dropout(problem(), kind) for kind in (layer, nn.Dropout(0.0)))
        reason = check_refusal(RiemannianLaplace(), active)
        assert "layer body.2" in reason and "eval mode" in reason and "\n" not in reason
        assert RiemannianLaplace().supports(off) is None


def test_a_loss_that_changes_from_call_to_call_is_one_line(problem):
    with torch.random.fork_rng():
        toy = with_dropout(problem(), Hidden())
        assert RiemannianLaplace().supports(toy) is None
        with pytest.raises(UserError, match="changes from call to call") as caught:
            RiemannianLaplace(structure="kron", prior_precision="30").generate(toy, SEED)
    assert "\n" not in str(caught.value)


@dataclass
class Broken:
    """An integrator whose members break, in the way `how`, where their velocities are long, in some dtypes."""

    inner: object
    how: str
    dtypes: tuple[torch.dtype, ...]
    longer: float = 0.0
    bounded = True

    def solve(self, surface, tau, start, velocity) -> Solution:
        solution = self.inner.solve(surface, tau, start, velocity)
        rows = velocity.double().norm(dim=1) > self.longer
        if start.dtype in self.dtypes:
            if self.how == "not reached":
                solution.reached[rows] = False
            elif self.how == "drift":
                solution.drift[rows] = 0.031  # beyond three times the one aimed for
            else:
                solution.weights[rows] = torch.nan
        return solution


FLOAT32, BOTH = (torch.float32,), (torch.float32, torch.float64)
WAYS = ["not reached", "drift", "not finite"]


@pytest.fixture
def breaking(monkeypatch):
    """Return `breaking(name, ...)`: break one of the integrators from here on."""

    inner = dict(INTEGRATORS)

    def make(name, how, dtypes, longer=0.0):
        monkeypatch.setitem(INTEGRATORS, name, lambda drift: Broken(inner[name](drift), how, dtypes, longer))

    return make


@pytest.mark.parametrize("how", WAYS)
def test_a_geodesic_that_is_not_safe_is_repeated_in_float64_and_then_by_another_integrator(
    how, problem, draws, breaking
):
    settings = {"tau": 1.0, "prior_precision": "300"}
    generator = RiemannianLaplace(**settings)
    longer = float(velocities(problem(), generator).norm(dim=1).median())
    long = (velocities(problem(), generator).norm(dim=1) > longer).tolist()
    whole = generator.generate(problem(), SEED)
    other = RiemannianLaplace(integrator="dormand_prince", **settings).generate(problem(), SEED)
    assert whole.diagnostics["members"]["repeats"] == [0] * 6
    for dtypes, repeats, wanted in ((FLOAT32, 1, whole), (BOTH, 2, other)):
        breaking("rattle", how, dtypes, longer)
        found = generator.generate(problem(), SEED)
        assert found.failed == [] and found.diagnostics["failed"] == 0
        record = found.diagnostics["members"]
        assert record["repeats"] == [repeats if one else 0 for one in long]
        # Two ways to solve one geodesic agree to the drift; in another dtype steps are as long.
        error = (draws(found) - draws(wanted)).norm(dim=1) / velocities(problem(), generator).norm(dim=1)
        assert float(error[torch.tensor(long)].max()) < 0.01
        assert torch.equal(draws(found)[~torch.tensor(long)], draws(whole)[~torch.tensor(long)])
        assert max(record["drift"]) <= 0.03
        for k, one in enumerate(long):
            work = [record["gradients"][k], whole.diagnostics["members"]["gradients"][k]]
            assert work[0] > 1.5 * work[1] if one else work[0] == work[1], "the work of every attempt is counted"
            assert math.isfinite(record["excess"][k])


@pytest.mark.parametrize("how", WAYS)
def test_a_member_that_fails_for_good_has_the_bases_weights_and_is_never_within_the_tolerance(
    how, problem, draws, breaking
):
    settings = {"tau": 1.0, "prior_precision": "300"}
    generator = RiemannianLaplace(**settings)
    longer = float(velocities(problem(), generator).norm(dim=1).median())
    long = [k for k, v in enumerate(velocities(problem(), generator).norm(dim=1)) if v > longer]
    for name in ("rattle", "dormand_prince"):
        breaking(name, how, BOTH, longer)
    toy = problem()
    found = generator.generate(toy, SEED)
    assert found.failed == long and found.diagnostics["failed"] == len(long) == 3
    made = [toy.checkpoint.load(f"member {k}") for k in range(6)]
    base = flat(toy.base.params)
    attempt = walk(toy, **settings)
    for k in range(6):
        assert torch.equal(draws(found)[k], base) == (k in long)
        assert math.isinf(attempt.loss_on_tune(made[k])) == (k in long)
    assert [found.diagnostics["members"]["excess"][k] for k in long] == [0.0] * 3


def test_a_prior_precision_under_which_members_fail_is_not_chosen(problem, breaking, monkeypatch):
    generator = RiemannianLaplace(tau=1.0)
    for name in ("rattle", "dormand_prince"):
        breaking(name, "not reached", BOTH, longer=0.3)
    found = generator.generate(problem(20), SEED)
    assert len(found.failed) <= 2, "at least 18 of 20 are within the tolerance, and these arrived"
    for name in ("rattle", "dormand_prince"):
        monkeypatch.setitem(INTEGRATORS, name, lambda drift: Broken(Straight([]), "not reached", BOTH))
    with pytest.raises(Diverged, match="no prior precision up to 1e9"):
        generator.generate(problem(20), SEED)


@pytest.mark.parametrize("settings", [{"tau": 1.0}, {"tau": 1.0, "integrator": "dormand_prince"}, {}], ids=str)
def test_members_that_advance_together_are_those_that_advance_alone(settings, problem, draws):
    generator = RiemannianLaplace(prior_precision="3000", **settings)
    together, alone = (generator.generate(problem(6, strategy), SEED) for strategy in ("vmap", "loop"))
    assert (together.diagnostics["strategy"], alone.diagnostics["strategy"]) == ("vmap", "loop")
    torch.testing.assert_close(draws(together), draws(alone), rtol=0, atol=1e-4)


def test_all_integrators_give_the_same_member(problem, draws):
    """Against a solution of drift 1e-6. They aim at a drift of 0.01; the projected flow at nothing.

    Observed: rattle 0.014, projected flow and EK0 0.005, Dormand-Prince 0.0005.
    """
    settings = {"tau": 1.0, "prior_precision": "3000"}
    exact = RiemannianLaplace(integrator="dormand_prince", drift=1e-6, **settings).generate(problem(), SEED)
    lengths = (draws(exact) - flat(problem().base.params)).norm(dim=1)
    bend = draws(exact) - flat(problem().base.params) - velocities(problem(), RiemannianLaplace(**settings))
    assert float((bend.norm(dim=1) / lengths).max()) > 0.05, "nothing bends: a straight line would pass"
    for integrator, error in (("rattle", 0.03), ("dormand_prince", 5e-3), ("ek0", 0.01), ("projected_flow", 0.02)):
        found = RiemannianLaplace(integrator=integrator, **settings).generate(problem(), SEED)
        assert float(((draws(found) - draws(exact)).norm(dim=1) / lengths).max()) < error, integrator


def test_linearised_members_say_what_the_expansion_says_and_are_judged_by_it(problem, draws):
    toy = problem(20)
    generator = RiemannianLaplace(tau=1.0, linearised=True, prior_precision="3")
    found = generator.generate(toy, SEED)
    assert isinstance(found, LinearisedSet) and not found.deployable
    assert any("not deployable" in note for note in found.notes)
    with pytest.raises(UserError, match="no weight vectors"):
        found.member(0)
    on_tune = replace(toy, train=toy.tune)
    expansion = Reference(on_tune, list(found.params), linearised=True)
    weights = draws(found)
    said = torch.stack([expansion.logits(w) for w in weights])
    torch.testing.assert_close(member_logits(found, toy, vmap=True).double(), said, rtol=1e-4, atol=1e-4)
    bent = torch.stack([expansion.network(w) for w in weights])
    assert float((bent - said).abs().max()) > 0.1, "the network itself says something else"
    attempt = walk(toy, **vars(generator))
    for k in range(20):
        made = toy.checkpoint.load(f"member {k}")
        wanted = float(torch.nn.functional.cross_entropy(said[k], toy.tune.labels))
        assert attempt.loss_on_tune(made) == pytest.approx(wanted, abs=1e-5)


def test_the_prior_precision_of_linearised_members_is_tuned_on_what_they_say(problem, draws):
    toy = problem(20)
    found = RiemannianLaplace(linearised=True).generate(toy, SEED)
    limit = toy.tune_loss(toy.base.params, toy.base.buffers) + 0.05
    losses = [float(toy.loss(logits, toy.tune.labels)) for logits in member_logits(found, toy, vmap=True)]
    assert sum(loss <= limit for loss in losses) >= 18


def test_the_prior_precision_is_tuned_on_the_members_themselves(problem):
    """Half a decade wider misses the target, unless nothing is wider."""
    toy, generator = problem(20), RiemannianLaplace(tau=1.0)
    found = generator.generate(toy, SEED)
    limit = toy.tune_loss(toy.base.params, toy.base.buffers) + 0.05
    within = lambda s: sum(toy.tune_loss(*s.member(k)) <= limit for k in range(20) if k not in s.failed)  # noqa: E731
    precision = found.diagnostics["prior_precision"]
    assert within(found) >= 18
    wider = replace(generator, prior_precision=str(precision / 10**0.25)).generate(problem(20), SEED)
    assert within(wider) < 18 or precision <= 0.0101


def test_multi_label_members_are_geodesics_of_the_labels_loss(problem, draws):
    toy = problem(6, classes=3)
    labels = torch.nn.functional.one_hot(toy.train.labels, 3)
    labels[::7, 1] = -1
    tune = Part(toy.tune.images, torch.nn.functional.one_hot(toy.tune.labels, 3))
    several = replace(
        toy, task="multilabel", train=Part(toy.train.images, labels), tune=tune, part=lambda n, s, compute: compute()
    )
    for settings in ({}, {"prior_precision": "30"}, {"structure": "kron", "prior_precision": "30"}):
        several.checkpoint = problem().checkpoint
        generator = RiemannianLaplace(tau=1.0, **settings)
        assert generator.supports(several) is None
        found = generator.generate(several, SEED)
        reference = Reference(several, list(found.params)).tilted()
        excess = reference.values(draws(found)) - reference.values(reference.base[None])
        recorded = {n: torch.tensor(found.diagnostics["members"][n]).double() for n in ("bound", "excess")}
        torch.testing.assert_close(recorded["excess"], excess, rtol=1e-5, atol=2e-4)
        assert found.failed == [] and (excess <= recorded["bound"]).all()


@pytest.mark.filterwarnings("ignore:start=plain")
@pytest.mark.parametrize("start", ["tilted", "plain"])
def test_the_prior_in_the_metric_holds_members_back(start, problem, draws):
    """In every member's case: |w|^2 curves the surface in all directions, and not only where the data do."""
    toy = problem(20)
    settings = {"tau": 1.0, "start": start, "prior_precision": "10"}
    lengths = []
    for inside in (False, True):
        found = RiemannianLaplace(prior_in_metric=inside, **settings).generate(problem(20), SEED)
        lengths.append((draws(found) - flat(toy.base.params)).norm(dim=1))
    far, near = lengths
    assert (near < far).all() and float(near.mean()) < 0.95 * float(far.mean())


def test_log_map_velocities_lead_to_the_draws_where_the_loss_is_its_quadratic_model(problem, draws):
    """Next to the base it is, with linearised logits: members are then the Laplace draws, at any temperature."""
    toy = problem(4)
    settings = {"tau": 1.0, "prior_precision": "1e5", "linearised": True}
    settings |= {"integrator": "dormand_prince", "drift": 1e-4}  # the two differ by less than rattle's default error
    mapped = RiemannianLaplace(log_map=True, **settings).generate(toy, SEED)
    plain = RiemannianLaplace(**settings).generate(problem(4), SEED)
    wanted = velocities(toy, RiemannianLaplace(**settings))
    base, lengths = flat(toy.base.params), wanted.norm(dim=1)
    assert float(((draws(plain) - base - wanted).norm(dim=1) / lengths).min()) > 3 * float(
        ((draws(mapped) - base - wanted).norm(dim=1) / lengths).max()
    )
    assert max(mapped.diagnostics["members"]["log_map_miss"]) < 1e-4
    assert "log_map_miss" not in plain.diagnostics["members"]


def test_a_member_whose_logarithmic_map_is_missed_has_failed(problem, draws, monkeypatch):
    monkeypatch.setattr(module, "log_map", lambda basis, v, *_: (v, 0.02 * (torch.arange(len(v)) == 1).double()))
    toy = problem(3)
    found = RiemannianLaplace(log_map=True, prior_precision="30").generate(toy, SEED)
    assert found.failed == [1] and torch.equal(draws(found)[1], flat(toy.base.params))
