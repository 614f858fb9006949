"""Geodesics in `make speed`: against scipy member by member, against retraining, and how their cost grows.

All of these run on one thread for either side, so that a busy machine does not decide. The baseline integrator is
scipy's `solve_ivp` (RK45, rtol 1e-6, atol 1e-3) on `c'' = -tau^2 g (c' H c') / (1 + tau^2 |g|^2)`, one member after the
other, whose right-hand side is one gradient and one double-backward product of a plain module over all images at once.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.api import DATASETS, Data, default_data_root, prepare
from ..datasets.phantom_cxr import PhantomCXR
from ..errors import UserError
from ..generators.api import Part, Problem
from ..generators.batchnorm import settled_member
from ..generators.geodesic import Solution, speed
from ..generators.posterior import fit_posterior
from ..generators.rattle import Rattle
from ..generators.riemannian_laplace import IMAGES, TOGETHER, RiemannianLaplace
from ..generators.surface import NetworkSurface, metric_part, tilted
from .networks import Network
from .spec import create
from .stages import warm_up
from .store import CHECKPOINTS, FileCheckpoint, Stopwatch
from .timing import CPU, as_row, timed
from .toy import problem_of
from .train import Training, train

RTOL, ATOL = 1e-6, 1e-3
"""Published tolerances of the baseline."""

DRIFTS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Drifts that ours is tried at, until its error is no more than the baseline's."""

PRECISION = 400.0
"""Prior precision of the velocities for smallcnn."""

GEODESIC = "seconds per member of a geodesic (smallcnn, tau = 1/N, prior precision 400)"


def geodesic_mlp_s100() -> dict[str, Any]:
    """Time 100 geodesics (tau = 1) of an MLP of 356 weights against scipy's RK45 at no smaller an error.

    546 phantom images averaged to 7 x 7 pixels; the generator's 128 of them in the tilted metric; velocities of the
    full Laplace posterior at marginal likelihood's prior precision. Ours is Rattle by vmap, all members together, at
    the loosest drift whose error (distance of the end points from DOP853's in float64 at rtol 1e-10, relative to |v|,
    median over 5 members) is no more than RK45's. RK45 is timed on these 5 members and scaled to 100; 3 times either.
    """
    return _against_scipy("geodesic_mlp_s100", IMAGES)


def geodesic_mlp_s100_all_images() -> dict[str, Any]:
    """Time the same with all 546 images in the metric, where arithmetic and not the interpreter decides."""
    return _against_scipy("geodesic_mlp_s100_all_images", None)


def geodesic_smallcnn_s50() -> dict[str, Any]:
    """Time 50 geodesics (tau = 1) of smallcnn against scipy's RK45, ours at no larger a drift of the speed.

    BreastMNIST (phantom images where the data are absent), the full recipe's base, 128 metric images tilted, velocities
    of the full GGN at a prior precision of 400. Ours is Rattle at the generator's drift, or at the loosest tighter one
    that RK45's does not beat. Three members, alternately: RK45 solves one, ours all three; both are scaled to 50.
    """
    members, few = 50, 3
    with one_thread():
        problem, where = smallcnn_problem(members)
        scene = Scene.of(problem, members, IMAGES, PRECISION)
        plain = scene.baseline(torch.float32)
        theirs: list[float] = []
        seconds: tuple[list[float], list[float]] = [], []
        drift, solution = RiemannianLaplace.drift, scene.solve(RiemannianLaplace.drift, few)
        for v in scene.velocity[:few]:
            seconds[0].append(timed(lambda: scene.solve(drift, few)) * members / few)
            start = time.perf_counter()
            _, path = plain.solve(v, "RK45", RTOL, ATOL)
            seconds[1].append((time.perf_counter() - start) * members)
            theirs.append(scene.drift(path))
        for tighter in (d for d in DRIFTS if d < drift):
            if float(solution.drift.max()) <= max(theirs):
                break
            drift, solution = tighter, scene.solve(tighter, few)
        if drift != RiemannianLaplace.drift:
            seconds[0][:] = [timed(lambda: scene.solve(drift, few)) * members / few for _ in range(2)]
    row = as_row("geodesic_smallcnn_s50", *seconds)
    return row | {
        "text": f"{where}; largest drift of the speed: ours {float(solution.drift.max()):.1e} at {drift:g} "
        f"({_work(solution)} per member, {scene.surface.strategy}), RK45 {max(theirs):.1e} "
        f"({plain.calls / plain.solved:.0f} evaluations of c' H c' per member)"
    }


def geodesic_vs_retraining() -> dict[str, Any]:
    """Time 100 accepted members of riemannian_laplace at its defaults against 10 retrainings by the recipe.

    smallcnn on BreastMNIST (phantom images where the data are absent). Everything is included: the curvature, the
    search for the prior precision, and as many members as it takes for 100 to be within 0.05 of the base on val, scaled
    from one run of 100 members. Two retrainings are timed, one before and one after, and scaled to 10.
    """
    return _against_retraining("geodesic_vs_retraining", RiemannianLaplace(), 100)


def geodesic_vs_retraining_tau1() -> dict[str, Any]:
    """Time the same with the paper's metric, tau = 1; scaled from one run of 20 members, those of the search."""
    return _against_retraining("geodesic_vs_retraining_tau1", RiemannianLaplace(tau=1.0), 20)


def growth_with_members() -> tuple[str, str]:
    """Return the seconds per member of a default geodesic for 1, 10 and 50 members."""
    found = {}
    with one_thread():
        scene = Scene.of(smallcnn_problem(50)[0], 50, IMAGES, PRECISION, tau=None)
        for members in (1, 10, 50):
            found[members] = scene.seconds_per_member(members)
    return f"{GEODESIC} by number of members", _series(found)


def growth_with_weights() -> tuple[str, str]:
    """Return the seconds per member of a default geodesic for three widths of smallcnn, each trained for 5 epochs."""
    found = {}
    with one_thread():
        for width in (8, 16, 32):
            problem = smallcnn_problem(4, width=width, epochs=5)[0]
            scene = Scene.of(problem, 4, IMAGES, PRECISION, tau=None)
            found[scene.surface.size] = scene.seconds_per_member(4)
    return f"{GEODESIC} by number of weights (width 8, 16, 32; bases of 5 epochs; 4 members)", _series(found)


def growth_with_images() -> tuple[str, str]:
    """Return the seconds per member of a default geodesic for three sizes of the metric."""
    found = {}
    with one_thread():
        problem = smallcnn_problem(4)[0]
        for images in (64, 128, len(problem.train)):
            found[images] = Scene.of(problem, 4, images, PRECISION, tau=None).seconds_per_member(4)
    return f"{GEODESIC} by number of metric images (4 members)", _series(found)


def members_per_second_on_gpu() -> tuple[str, str]:
    """Return how many default geodesics per second a GPU makes of smallcnn and resnet18."""
    what = "geodesics at the defaults per second on a GPU (64 members of smallcnn, 8 of resnet18)"
    if not torch.cuda.is_available():
        return what, "not measured"
    device, found = torch.device("cuda"), []
    for name, members in (("smallcnn", 64), ("resnet18", 8)):
        problem = smallcnn_problem(members, name=name, epochs=5, device=device)[0]
        scene = Scene.of(problem, members, IMAGES, PRECISION, tau=None, structure="diag")
        found.append(f"{name} {1 / scene.seconds_per_member(members):.3g}")
    return what, ", ".join(found)


MEASURES = (
    geodesic_mlp_s100,
    geodesic_mlp_s100_all_images,
    geodesic_smallcnn_s50,
    geodesic_vs_retraining,
    geodesic_vs_retraining_tau1,
)
FIGURES = (growth_with_members, growth_with_weights, growth_with_images, members_per_second_on_gpu)


@dataclass
class Scene:
    """A tilted surface, and velocities [member, param] of geodesics that start at its origin."""

    surface: NetworkSurface
    velocity: Tensor
    tau: float

    @staticmethod
    def of(
        problem: Problem,
        members: int,
        images: int | None,
        precision: float | None,
        strategy: str = "",
        tau: float | None = 1.0,
        structure: str = "full",
    ) -> Scene:
        """Draw velocities at a prior precision (None: marginal likelihood's) and warm the surface up.

        images: of the metric (None: all); tau=None: 1/N; strategy: "" times loop and vmap, as the generator does.
        """
        warm_up()
        posterior = fit_posterior(problem, structure, "all")
        drawn = posterior.at(posterior.marglik if precision is None else precision, 0, members)
        velocity = torch.stack([drawn.perturbation(k) for k in range(members)])
        part = metric_part(problem, images or len(problem.train), 0)
        surface = tilted(NetworkSurface(problem, posterior.names, part, strategy=strategy))
        scene = Scene(surface, velocity, 1 / len(problem.train) if tau is None else tau)
        for count in {1, min(8, members)}:
            surface.gradient(scene.start(count))
            surface.value(scene.start(count))
        surface.remember(scene.start(1)[0])
        return scene

    def start(self, members: int) -> Tensor:
        """Return the origin [member, param]."""
        return self.surface.origin.to(self.velocity.dtype).expand(members, -1).contiguous()

    def solve(self, drift: float, members: int) -> Solution:
        """Solve the first geodesics by Rattle, as many together as the generator takes."""
        chunk = TOGETHER if self.surface.strategy == "vmap" else 1
        parts = [
            Rattle(drift=drift).solve(self.surface, self.tau, self.start(len(v)), v)
            for v in self.velocity[:members].split(chunk)
        ]
        return Solution(**{n: torch.cat([getattr(p, n) for p in parts]) for n in vars(parts[0])})

    def seconds_per_member(self, members: int) -> float:
        """Return the seconds per member of so many geodesics at the generator's drift."""
        return timed(lambda: self.solve(RiemannianLaplace.drift, members), self.velocity.device) / members

    def baseline(self, dtype: torch.dtype) -> PlainGeodesic:
        """Return the baseline on the same surface, with networks evaluated in `dtype`."""
        return PlainGeodesic(self.surface, self.tau, dtype)

    def drift(self, path: np.ndarray) -> float:
        """Return the largest relative change of the speed along `path` [2 param, time]."""
        points = torch.from_numpy(path.T.copy()).float()
        weights, velocity = points.split(self.surface.size, dim=1)
        found = [
            speed(v[None], self.surface.gradient(w[None])[1], self.tau) for w, v in zip(weights, velocity, strict=True)
        ]
        speeds = torch.cat(found)
        return float((speeds / speeds[0] - 1).abs().max())


class PlainGeodesic:
    """The geodesic equation in plain PyTorch: a module whose parameters are views of one vector, and scipy."""

    def __init__(self, surface: NetworkSurface, tau: float, dtype: torch.dtype):
        self.tau, self.dtype, self.origin = tau, dtype, surface.origin.cpu().numpy()
        module = surface.problem.module().to(dtype)
        self.parameters = [dict(module.named_parameters())[n] for n in surface.names]
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for leaf, view in zip(self.parameters, self._views(self.flat), strict=True):
            leaf.data = view
        part = surface.part
        self.body, self.labels = cast(nn.Module, module.body), part.labels
        self.images = part.images.to(dtype) / 127.5 - 1
        self.share = len(surface.problem.train) / len(part)
        assert surface.tilt is not None
        self.tilt = surface.tilt.to(dtype)
        self.calls = self.solved = 0

    def _views(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return [part.view_as(p) for part, p in zip(flat.split(sizes), self.parameters, strict=True)]

    def right_hand_side(self, time: float, state: np.ndarray) -> np.ndarray:
        """Return (c', c'') of (c, c') [2 param]."""
        self.calls += 1
        weights, velocity = np.split(state, 2)
        direction = torch.from_numpy(velocity).to(self.dtype)
        self.flat.copy_(torch.from_numpy(weights))
        loss = self.share * nn.functional.cross_entropy(self.body(self.images), self.labels, reduction="sum")
        leaves = torch.autograd.grad(loss, self.parameters, create_graph=True)
        products = torch.autograd.grad(leaves, self.parameters, self._views(direction))
        gradient = torch.cat([g.detach().reshape(-1) for g in leaves]) - self.tilt
        curved = torch.cat([p.reshape(-1) for p in products]) @ direction
        pull = -(self.tau**2) * curved / (1 + self.tau**2 * (gradient @ gradient))
        return np.concatenate([velocity, (pull * gradient).numpy()])

    def solve(self, velocity: Tensor, method: str, rtol: float, atol: float) -> tuple[Tensor, np.ndarray]:
        """Return c(1) [param] float64 and the accepted points (c, c') of the path [2 param, time]."""
        from scipy.integrate import solve_ivp

        state = np.concatenate([self.origin, velocity.double().numpy()])
        found = solve_ivp(self.right_hand_side, (0, 1), state, method=method, rtol=rtol, atol=atol)
        self.solved += 1
        return torch.from_numpy(found.y[: len(self.origin), -1].copy()), found.y


def _against_scipy(name: str, images: int | None) -> dict[str, Any]:
    members, few = 100, 5
    with one_thread():
        scene = Scene.of(_pooled_phantoms({"name": "mlp", "width": 6, "depth": 2}), members, images, None, "vmap")
        velocity, plain, exact = scene.velocity[:few], scene.baseline(torch.float32), scene.baseline(torch.float64)
        reference = torch.stack([exact.solve(v, "DOP853", 1e-10, 1e-10)[0] for v in velocity])

        def error(found: Tensor) -> float:
            miss = (found[:few].double() - reference).norm(dim=1) / velocity.double().norm(dim=1)
            return float(miss.median())

        def ours(drift: float) -> Solution:
            return Rattle(drift=drift).solve(scene.surface, scene.tau, scene.start(members), scene.velocity)

        def baseline() -> Tensor:
            return torch.stack([plain.solve(v, "RK45", RTOL, ATOL)[0] for v in velocity])

        theirs = error(baseline())
        drift = next((d for d in DRIFTS if error(ours(d).weights) <= theirs), DRIFTS[-1])
        solution = ours(drift)
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(3):
            seconds[0].append(timed(lambda: ours(drift)))
            seconds[1].append(timed(baseline) * members / few)
    return as_row(name, *seconds) | {
        "text": f"error of ours {error(solution.weights):.1e} at drift {drift:g} ({_work(solution)} per member), of "
        f"RK45 {theirs:.1e} ({plain.calls / plain.solved:.0f} evaluations of c' H c' per member)"
    }


def _against_retraining(name: str, generator: RiemannianLaplace, members: int) -> dict[str, Any]:
    with one_thread(), tempfile.TemporaryDirectory() as work:
        problem, where = smallcnn_problem(members)
        data = _dataset()[0]
        val = _part(data, "val", CPU)
        warm_up()
        retrain = lambda seed: timed(lambda: train(cast(Network, problem.network), problem.train, Training(), seed))  # noqa: E731
        retrainings = [retrain(1)]
        (Path(work) / CHECKPOINTS).mkdir()
        problem.checkpoint = FileCheckpoint(Path(work), CPU)
        problem.clock = clock = Stopwatch(Path(work), CPU)
        curvature = []

        def part(name: str, spec: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            start = time.perf_counter()
            found = compute()
            curvature.append(time.perf_counter() - start)
            return found

        problem.part = part
        start = time.perf_counter()
        drawn = generator.generate(problem, 0)
        whole = time.perf_counter() - start
        retrainings.append(retrain(2))
        marginal = clock.seconds["marginal"]
        limit = float(problem.loss(problem.logits(problem.base.params, problem.base.buffers, val.images), val.labels))
        accepted = 0
        for k in range(drawn.size):
            logits = problem.logits(*settled_member(problem, drawn, k, "keep", 0), val.images)
            accepted += k not in drawn.failed and float(problem.loss(logits, val.labels)) <= limit + 0.05
    rate = accepted / drawn.size
    fixed = whole - marginal
    needed = fixed + marginal / drawn.size * 100 / max(rate, 1e-9)
    about = drawn.diagnostics
    work_done = [statistics.mean(about["members"][n]) for n in ("gradients", "values")]
    return as_row(name, [needed], [10 * s for s in retrainings]) | {
        "text": f"{where}; {rate:.0%} of {drawn.size} accepted on val, prior precision {about['prior_precision']:.3g}; "
        f"curvature {sum(curvature):.3g} s, search and rest {fixed - sum(curvature):.3g} s, "
        f"{marginal / drawn.size:.3g} s per member ({work_done[0]:.1f} gradients, {work_done[1]:.1f} values, "
        f"{about['strategy']}), {statistics.mean(retrainings):.3g} s per retraining"
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def smallcnn_problem(
    members: int,
    *,
    name: str = "smallcnn",
    width: int | None = None,
    epochs: int | None = None,
    device: torch.device = CPU,
) -> tuple[Problem, str]:
    """Return a problem with a base trained by the recipe, and what its images are."""
    data, where = _dataset()
    spec = {"name": name} | ({} if width is None else {"width": width})
    recipe = Training() if epochs is None else replace(Training(), epochs=epochs)
    return _problem(spec, _part(data, "train", device), _part(data, "tune", device), recipe, members), where


def _dataset() -> tuple[Data, str]:
    with contextlib.suppress(UserError):
        return prepare(create(DATASETS, {"name": "breastmnist"}), default_data_root()), "BreastMNIST"
    return prepare(PhantomCXR(train=546, val=78, test=156)), "phantom images"


def _pooled_phantoms(spec: dict[str, Any]) -> Problem:
    split = PhantomCXR(train=596, val=50, test=50).load(None).splits["train"]
    pooled = nn.functional.avg_pool2d(torch.from_numpy(split.images).float(), 4).round().to(torch.uint8)
    labels = torch.from_numpy(split.labels)
    cut = 546
    return _problem(spec, Part(pooled[:cut], labels[:cut]), Part(pooled[cut:], labels[cut:]), Training(), 100)


def _part(data: Data, split: str, device: torch.device) -> Part:
    found = data.splits[split]
    return Part(torch.from_numpy(found.images).to(device), torch.from_numpy(found.labels).to(device))


def _problem(spec: dict[str, Any], data: Part, tune: Part, recipe: Training, members: int) -> Problem:
    network = Network(spec, data.images.shape[1], data.images.shape[2], 2)
    return problem_of(network, data, tune, recipe, members)


def _work(solution: Solution) -> str:
    gradients, values = (float(n.double().mean()) for n in (solution.gradients, solution.values))
    return f"{gradients:.1f} gradients and {values:.1f} values"


def _series(found: dict[int, float]) -> str:
    return ", ".join(f"{count:,}: {seconds:.3g}" for count, seconds in found.items())
