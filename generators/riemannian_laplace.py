"""Riemannian Laplace: walk from the base along geodesics of the loss surface to networks of a similar loss.

A velocity v is drawn from a Laplace posterior, and the member is where the geodesic of `M(w) = I + tau^2 g g'` with
c(0) = w*, c'(0) = v is at time 1 (Bergamin, Moreno-Munoz, Hauberg, Arvanitidis, NeurIPS 2023). g is the gradient of the
loss L summed over the training data, here estimated on a fixed subset of the images; tau = 1 is the paper's metric,
tau = 1/N that of the mean loss. By construction `L(member) - L(start) <= sqrt(|v|^2 + tau^2 (g . v)^2) / tau`: a bound
on the loss that the metric is made of, on the images that it saw.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..identity import derive_seed
from .api import Problem, choices, register_generator
from .batchnorm import settle_batchnorm, settled_member
from .dear_members import DearMembers, Made, leaves_of, plain_number
from .dormand_prince import DormandPrince
from .ek0 import EK0
from .fisher import FisherMetric, fisher_obstacle
from .geodesic import Solution, speed
from .linear_surface import linear_obstacle, surface_of
from .log_map import log_map
from .modelset import LinearisedSet, ModelSet, StackedSet
from .posterior import FromPosterior, Posterior, fit_posterior, leaf_names
from .projected_flow import ProjectedFlow
from .rattle import Rattle
from .surface import NetworkSurface, metric_part, tilted

IMAGES = 128
"""Images of the metric where `metric_images` is auto and the training set has more."""

TOGETHER = 16
"""Members that advance together where that is faster."""

UNSAFE = 3.0
"""A solve whose drift exceeds that many times the one aimed for is repeated."""

FINER = 0.25
"""Share of that drift at which the last repetition aims."""

CREASED = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)
"""Layers whose derivatives jump: a second derivative knows nothing of the jumps that its path crosses."""

STEEP = 1.0
"""tau |g| at the start above which the surface is far from flat where a mode is assumed."""


@register_generator("riemannian_laplace")
@dataclass
class RiemannianLaplace(FromPosterior):
    """Geodesics of the loss surface with Laplace velocities (Riemannian Laplace; RATTLE).

    tau: of the metric I + tau^2 g g' (null: 1/N; 1: the paper's); metric_images: auto (128, or all where there are
    fewer) | all | a number; start: tilted (the loss minus its slope at the base, which makes the base stationary) |
    polished (L-BFGS first) | plain; prior_in_metric: the paper's form; radius: posterior | rashomon (shorten velocities
    whose bound exceeds N target_epsilon); integrator: rattle | dormand_prince | ek0 | projected_flow (a heuristic
    without the bound); drift: aimed at, of the speed; metric: loss | fisher (RLA-F: the Fisher information of the
    images plus the prior, for small networks; tau, start, integrator play no part); log_map: velocities by the
    logarithmic map of the quadratic model (RLA-BLog; both Yu et al., AISTATS 2024); linearised: geodesics and
    predictions of the linearised network; structure, subset, prior_precision, target_acceptance, target_epsilon,
    batchnorm: as for laplace, the prior precision being tuned on the members themselves.
    """

    tau: float | None = None
    metric_images: str = "auto"
    start: str = "tilted"
    prior_in_metric: bool = False
    radius: str = "posterior"
    integrator: str = "rattle"
    drift: float = 0.01
    metric: str = "loss"
    log_map: bool = False
    linearised: bool = False
    structure: str = "full"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.metric_images = str(self.metric_images)
        if _whole(self.metric_images):  # "064" and 64 are one setting
            self.metric_images = str(int(self.metric_images))
        choices(self.start, "generator.start", ("tilted", "polished", "plain"))
        choices(self.radius, "generator.radius", ("posterior", "rashomon"))
        choices(self.integrator, "generator.integrator", INTEGRATORS)
        if self.tau is not None and not (self.tau >= 0 and math.isfinite(self.tau)):
            raise UserError(f"generator.tau={self.tau} must be a finite number of at least 0, or null for 1/N")
        if not (self.drift > 0 and math.isfinite(self.drift)):
            raise UserError(f"generator.drift={self.drift} must be a positive number")
        choices(self.metric, "generator.metric", ("loss", "fisher"))
        if self.metric == "fisher" and (self.linearised or self.log_map or self.radius == "rashomon"):
            raise UserError(
                "generator.metric=fisher has no loss surface: it goes without linearised, log_map, rashomon"
            )
        if self.linearised and self.batchnorm != "keep":
            raise UserError("generator.linearised=true expands the network at the base: use generator.batchnorm=keep")
        if self.linearised and self.start == "polished":
            raise UserError("generator.linearised=true expands the network at the base: use start=tilted or plain")
        if self.metric_images not in ("auto", "all") and not _whole(self.metric_images):
            raise UserError(f"generator.metric_images={self.metric_images} must be auto, all or a positive number")

    def supports(self, problem: Problem) -> str | None:
        """Return why no velocities can be drawn here; UserError for more metric images than there are."""
        if _whole(self.metric_images) and int(self.metric_images) > len(problem.train):
            raise UserError(
                f"generator.metric_images={self.metric_images}: train has {len(problem.train)} images: "
                "ask for no more, or for all"
            )
        active = [name for name, layer in problem.module().named_modules() if _active_dropout(layer)]
        if active:
            return f"layer {active[0]} drops units in eval mode: a loss that changes from call to call is no surface"
        reason = super().supports(problem)
        if reason is None and self.linearised:
            names = leaf_names(problem.module(), self.structure, self.subset)
            return linear_obstacle(problem, names, self.images(problem))
        if reason is None and self.metric == "fisher":
            names = leaf_names(problem.module(), self.structure, self.subset)
            return fisher_obstacle(problem, names, self.images(problem))
        return reason

    def images(self, problem: Problem) -> int:
        """Return the number of images of the metric."""
        total = len(problem.train)
        return {"auto": min(IMAGES, total), "all": total}.get(self.metric_images) or int(self.metric_images)

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Fit the posterior, choose its prior precision, and solve the geodesics; finished ones survive a kill."""
        posterior = fit_posterior(problem, self.structure, self.subset)
        walk = _Walk(self, problem, posterior, seed)
        precision, made = DearMembers(
            self, problem, posterior, seed, walk.make, walk.loss_on_tune, "geodesics", walk.chunk
        ).collect()
        found = walk.stack(made)
        found.failed = [k for k, one in enumerate(made) if not bool(one["safe"])]
        found.notes += walk.notes()
        found.diagnostics = posterior.diagnostics(precision) | walk.diagnostics(made)
        return settle_batchnorm(problem, found, self.batchnorm, seed)


class _Walk:
    """The geodesics of one base: surface, start, and the integrators in the order in which they are tried."""

    def __init__(self, settings: RiemannianLaplace, problem: Problem, posterior: Posterior, seed: int):
        self.settings, self.problem, self.posterior, self.seed = settings, problem, posterior, seed
        self.total = len(problem.train)
        self.creased = any(isinstance(layer, CREASED) for layer in problem.module().modules())
        self.tau = 1 / self.total if settings.tau is None else float(settings.tau)
        part = metric_part(problem, settings.images(problem), derive_seed(seed, "metric images"))
        prior = problem.prior_precision if settings.prior_in_metric else 0.0
        with problem.clock.fixed():
            self.surface = surface_of(problem, posterior.names, part, linearised=settings.linearised, prior=prior)
            self._prepare()

    def _prepare(self) -> None:
        origin = self.surface.origin.to(next(iter(self.problem.base.params.values())).dtype)
        self.start = self._polished(origin) if self.settings.start == "polished" else origin
        if self.settings.start == "tilted":
            tilted(self.surface)
        self.value, self.gradient = self.surface.remember(self.start)
        before = self.gradient if self.surface.tilt is None else self.surface.tilt
        self.gradient_norm = float(before.double().norm())
        self.steep = self.settings.start == "plain" and self.tau * self.gradient_norm > STEEP
        if not math.isclose(float(self.value), float(self.surface.value(self.start[None])), rel_tol=1e-6):
            raise UserError("the network's loss changes from call to call in eval mode (a dropout that stays active?)")
        if self.steep:
            warnings.warn(self._how_steep(), stacklevel=2)
        stored = self.problem.checkpoint.load("strategy")
        if stored is not None:
            self.surface.strategy = "vmap" if bool(stored["vmap"]) else "loop"
        elif isinstance(self.surface, NetworkSurface):  # a linear surface's members always go together
            self.surface.choose(self.start)
        self.problem.checkpoint.save("strategy", {"vmap": torch.tensor(self.surface.strategy == "vmap")})
        self.chunk = TOGETHER if self.surface.strategy == "vmap" else 1

    def _how_steep(self) -> str:
        return (
            f"start=plain: the base is no mode of the metric's loss, tau |g| = {self.tau * self.gradient_norm:.3g} "
            f"with |g| = {self.gradient_norm:.3g}: start=tilted makes it one"
        )

    def _polished(self, origin: Tensor) -> Tensor:
        """Return the weights after L-BFGS on the recipe's objective over all training images."""
        problem = self.problem
        objective = NetworkSurface(problem, self.posterior.names, problem.train, problem.prior_precision)
        weights = origin.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=POLISH, line_search_fn="strong_wolfe")

        def closure() -> float:
            value, gradient = objective.gradient(weights.detach()[None])
            weights.grad = gradient[0] / self.total
            return float(value) / self.total

        optimizer.step(closure)
        return weights.detach()

    def make(self, precision: float, members: range) -> list[Made]:
        """Solve the geodesics of some members and return their leaves and diagnostics."""
        drawn = self.posterior.at(precision, self.seed, self.problem.members)
        velocity = torch.stack([drawn.perturbation(k) for k in members]).to(self.start.dtype)
        missed = torch.zeros(len(members), dtype=torch.float64, device=velocity.device)
        if self.settings.log_map:
            velocity, missed = log_map(self.posterior.eigenbasis(), velocity, self.tau, self.surface.prior)
        shortened = torch.ones(len(members), dtype=torch.float64, device=velocity.device)
        if self.settings.radius == "rashomon" and self.tau > 0:
            allowed = self.total * self.settings.target_epsilon * self.tau
            shortened = (allowed / speed(velocity, self.gradient.expand_as(velocity), self.tau)).clamp(max=1)
            velocity = velocity * shortened[:, None].to(velocity)
        start = self.start.expand_as(velocity).contiguous()
        if self.settings.metric == "fisher":
            fisher = FisherMetric(self.problem, self.posterior.names, self.surface.part, precision)
            solution = fisher.solve(start, velocity)
            repeats, safe = torch.zeros_like(solution.steps), self._safe("dormand_prince", solution)
        else:
            solution, repeats, safe = self._solve(start, velocity)
        safe &= missed <= MISSED
        # A member that failed carries the base's weights, counts as drawn and is never accepted.
        weights = torch.where(safe[:, None], solution.weights, start)
        after = torch.where(safe, solution.value, self.value)
        unknown = torch.isnan(after).nonzero()[:, 0]
        if len(unknown):
            after[unknown] = self.surface.value(weights[unknown])
        columns = {
            "speed": speed(velocity, self.gradient.expand_as(velocity), self.tau),
            "excess": after - self.value,
            "drift": solution.drift,
            "gradients": solution.gradients + solution.curvatures,
            "curvatures": solution.curvatures,
            "values": solution.values,
            "steps": solution.steps,
            "rejected": solution.rejected,
            "sd": solution.sd,
            "repeats": repeats,
            "shortened": shortened,
            "log_map_miss": missed,
            "safe": safe,
        }
        rows = []
        for i in range(len(members)):
            leaves = {n: leaf.detach().clone() for n, leaf in self.surface.leaves(weights[i]).items()}
            rows.append(leaves | {name: column[i].detach().cpu().clone() for name, column in columns.items()})
        return rows

    def _solve(self, start: Tensor, velocity: Tensor) -> tuple[Solution, Tensor, Tensor]:
        """Return end points, how often each was repeated (1: in float64, 2: by another integrator), and if it is safe.

        The work of every attempt is counted.
        """
        name, drift = self.settings.integrator, self.settings.drift
        # Second derivatives miss the creases of ReLU and pooling: there gradients alone, and shorter steps, are safer.
        other = "rattle" if self.creased or name != "rattle" else "dormand_prince"
        solution = INTEGRATORS[name](drift).solve(self.surface, self.tau, start, velocity)
        repeats = torch.zeros_like(solution.steps)
        safe = self._safe(name, solution)
        for again, (which, finer) in enumerate(((name, 1.0), (other, FINER)), 1):
            rows = (~safe).nonzero()[:, 0]
            if not len(rows):
                break
            integrator = INTEGRATORS[which](drift * finer)
            repeated = integrator.solve(self.surface, self.tau, start[rows].double(), velocity[rows].double())
            solution = solution.replaced(rows, repeated)
            repeats[rows] = again
            safe[rows] = self._safe(which, repeated)
        return solution, repeats, safe

    def _safe(self, name: str, solution: Solution) -> Tensor:
        """Return which members arrived with finite weights and, where that means something, little drift."""
        finite = torch.isfinite(solution.weights).all(1)
        fine = solution.drift <= UNSAFE * self.settings.drift
        return solution.reached & finite & (fine | (not INTEGRATORS[name](self.settings.drift).bounded))

    def loss_on_tune(self, made: Made) -> float:
        """Return the loss on tune of a member as it will be, inf for one that failed."""
        if not bool(made["safe"]):
            return math.inf
        alone = self.stack([made])
        if self.settings.linearised:
            tune = self.problem.tune
            logits = alone.block(0, 1).member_logits(self.problem.network, 0, tune.images)
            return float(self.problem.loss(logits, tune.labels))
        member = settled_member(self.problem, alone, 0, self.settings.batchnorm, self.seed)
        return self.problem.tune_loss(*member)

    def stack(self, made: list[Made]) -> StackedSet:
        """Return the set of these members."""
        found = self.posterior.stack([leaves_of(one, self.posterior) for one in made])
        if not self.settings.linearised:
            return found
        origin = {n: self.problem.base.params[n] for n in self.posterior.names}
        note = "members are deviations of the linearised network, no weight vectors (not deployable)"
        return LinearisedSet(
            size=found.size,
            shared_params=found.shared_params,
            shared_buffers=found.shared_buffers,
            notes=[*found.notes, note],
            params=found.params,
            origin=origin,
        )

    def notes(self) -> list[str]:
        """Return what the board must say about these geodesics."""
        notes = []
        if self.settings.integrator == "projected_flow":
            notes.append("projected flow: a heuristic, no geodesic; its members keep to no bound")
        second = self.settings.metric == "fisher" or self.settings.integrator in ("dormand_prince", "ek0")
        if second and self.creased:
            notes.append(
                "second derivatives miss the creases of ReLU and max-pooling, so that the "
                "speed is not conserved: rattle takes gradients alone"
            )
        if self.steep:
            notes.append(self._how_steep())
        return notes

    def diagnostics(self, made: list[Made]) -> dict[str, Any]:
        """Return what the record says: per set, and per member in lists."""
        bounded = INTEGRATORS[self.settings.integrator](self.settings.drift).bounded and self.tau > 0
        bounded &= self.settings.metric == "loss"
        column = lambda name: [plain_number(one[name]) for one in made]  # noqa: E731
        listed = {n: column(n) for n in ("gradients", "curvatures", "values", "steps", "rejected", "drift", "repeats")}
        return {
            "tau": self.tau,
            "metric_images": len(self.surface.part),
            "gradient_norm": self.gradient_norm,
            "tilt_norm": 0.0 if self.surface.tilt is None else float(self.surface.tilt.norm()),
            "prior_precision_metric": self.surface.prior,
            "strategy": self.surface.strategy,
            "shortened": sum(float(one["shortened"]) < 1 for one in made),
            "failed": sum(not bool(one["safe"]) for one in made),
            "members": listed
            | {
                "bound": [float(one["speed"]) / self.tau if bounded else None for one in made],
                "excess": column("excess"),
                "numerical_sd": column("sd"),
            }
            | ({"log_map_miss": column("log_map_miss")} if self.settings.log_map else {}),
        }


MISSED = 0.01
"""Relative miss of the logarithmic map beyond which a member counts as failed."""

POLISH = 100
"""L-BFGS steps of start=polished."""

INTEGRATORS: dict[str, Any] = {
    "rattle": lambda drift: Rattle(drift=drift),
    "dormand_prince": lambda drift: DormandPrince(rtol=0.1 * drift, atol=0.0, drift=drift, first_step=0.3),
    "ek0": lambda drift: EK0(rtol=drift, drift=drift),
    "projected_flow": lambda drift: ProjectedFlow(),
}
"""Integrators by name, for a drift that is aimed at."""


def _whole(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _active_dropout(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0
