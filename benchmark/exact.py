"""Three tracks whose truth is known: how much of the exact set does a sampled set show?

`make exact` (`python -m multiplicity_bench.benchmark.exact`) reads the committed records and predictions of suite
`exact` and writes one JSON file, from which `leaderboard.exact_page` makes the part "Against the exact set" of a page:

    suite: {name, epsilon, k}
    inputs                          digest of the suite's records, predictions and declarations
    logistic                        every row of the suite against the exact set of its logistic regression
      bases: {base seed: {base_loss, least_loss, ambiguity, width, active, residual} or {reason}}
                                    losses in nats on val; exact ambiguity and mean width of the exact range on test;
                                    the certificate of `metrics.exact_set.ExactRanges`
      rows: [{row, seeds: {base seed: {accepted, drawn, coverage, coverage_at_k, ambiguous, ambiguous_at_k, outside}}}]
                                    in the suite's order; recall of the exact range and of the exactly ambiguous cases,
                                    by all accepted members and at k; outside: accepted members with a score outside the
                                    exact range; or {reason}. What is undefined is null, its reasons under `reasons`
    plane                           a plane through a network, gridded
      network, dataset, side        what was trained; grid points along a side
      bases: {base seed: {truth: {base_loss, points, inside, pieces, ambiguity, discrepancy, width,
                                  ambiguity_every_second, width_every_second},
                          samplers: {name: {as rows above, without outside}}}}
                                    the last two: of every second grid point, to show what the grid resolves
    linear_gaussian                 draws of a Gaussian posterior of a linear classifier against closed forms
      members
      rows: [{structure, quantity, exact, measured, se}]
                                    se: standard error of `measured`

Numbers have six significant digits.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import label
from scipy.special import ndtr
from torch import Tensor

from ..datasets.api import Data
from ..errors import UserError
from ..generators.api import Part, Problem
from ..generators.modelset import DiagonalSet, DualSet, GaussianSet, Leaves, StackedSet, unflatten
from ..generators.ray_exit import LONGEST, exit_length
from ..identity import derive_seed
from ..leaderboard.cells import Record, Table, settle
from ..leaderboard.cli import FOLDER, Parser, execute
from ..leaderboard.exact_page import tables
from ..leaderboard.predictions import load_predictions
from ..leaderboard.record import read_all
from ..leaderboard.science import inputs, plain_values
from ..leaderboard.science_files import EXACT
from ..leaderboard.suite import Suite, load_suite
from ..metrics.api import Predictions, Settings, Undefined
from ..metrics.context import decide, softmax
from ..metrics.decisions import ambiguous, conflict, disagreement, discrepancy, votes
from ..metrics.exact_set import ExactRanges, loss_rounding_error, recall, rounding_error, viable_ranges, violations
from ..metrics.membership import membership
from ..metrics.performance import log_losses
from ..metrics.scores import score_range
from .networks import Network
from .predict import predict

PLANE_SEEDS, PLANE_SIDE, PLANE_MEMBERS = (0, 1, 2), 33, 50
PLANE_DATASET = {"name": "phantom_cxr", "train": 600, "val": 100, "test": 100}
PLANE_NETWORK = {"name": "smallcnn", "width": 8}
COARSE_SIDE, WIDEST = 13, 64.0
GAUSSIAN_MEMBERS, BATCHES, GAUSSIAN_PRECISION = 4000, 20, "20"
TARGET_ACCEPTANCE = 0.9


def score_gradients(network: Network, params: Mapping[str, Tensor], images: Tensor) -> np.ndarray:
    """Return the gradient of `z_1 - z_0` in all weights, float64 [sample, param]; the features of a linear network.

    Raises UserError unless the network has two logits and they are linear in the weights.
    """
    if network.outputs != 2:
        raise UserError(f"network {network.spec['name']} has {network.outputs} logits: an exact set needs 2")
    double = {n: p.detach().double() for n, p in params.items()}

    def score(leaves: Leaves, image: Tensor) -> Tensor:
        logits = network(leaves, {}, image[None])[0]
        return logits[1] - logits[0]

    each = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))
    rows = []
    for batch in images.split(256):
        rows.append(torch.cat([leaf.flatten(1) for leaf in each(double, batch).values()], dim=1).numpy())
    gradients = np.concatenate(rows)
    flat = torch.cat([p.flatten() for p in double.values()]).numpy()
    logits = network(double, {}, images[:256]).numpy()
    if not np.allclose(gradients[:256] @ flat, logits[:, 1] - logits[:, 0], rtol=1e-8, atol=1e-8):
        raise UserError(f"network {network.spec['name']} is not linear in its weights: an exact set needs logistic")
    return gradients


def logistic_track(table: Table, predictions: Path, data_root: str | None = None) -> dict[str, Any]:
    """Return the track `logistic`, see the module: every row of a suite against the exact set, base seed by base seed.

    predictions: the folder of the suite's predictions files. Raises UserError where the data differ from those that the
    records were made from, or membership is not by cross-entropy.
    """
    suite = table.suite
    if suite.loss != "nll":
        raise UserError(f"suite {suite.name}: membership by {suite.loss}: the exact set is that of cross-entropy (nll)")
    bases: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {row.label: {} for row in suite.rows}
    data: Data | None = None
    for seed in map(str, suite.base_seeds):
        records = {}
        for row in suite.rows:
            cell = table.cells[row.label, int(seed)]
            if cell.state == "ok" and cell.record is not None:
                records[row.label] = cell.record
            else:
                rows[row.label][seed] = {"reason": f"{cell.state}: {cell.reason}" if cell.reason else cell.state}
        if not records:
            continue
        first = next(iter(records.values()))
        data = data or _data(first, data_root)
        views = {name: _views(record, predictions) for name, record in records.items()}
        try:
            ranges, bases[seed] = _exact(first, data, *next(iter(views.values())), suite.settings)
        except Undefined as reason:
            bases[seed] = {"reason": str(reason)}
            for name in records:
                rows[name][seed] = bases[seed]
            continue
        for name, (val, test) in views.items():
            rows[name][seed] = _row(val, test, ranges, suite.settings, bases[seed]["base_loss"])
    return {"bases": bases, "rows": [{"row": name, "seeds": cells} for name, cells in rows.items()]}


def _data(record: Record, data_root: str | None) -> Data:
    from .board import spec_of
    from .stages import Session

    data = Session().data(spec_of(record, data_root=data_root))
    if data.digest != record["identity"]["dataset"]["digest"]:
        raise UserError(f"{record['name']}: the data differ from those it was made from (content digest)")
    return data


def _views(record: Record, folder: Path) -> tuple[Predictions, Predictions]:
    path = folder / str(record["predictions"]["file"])
    return load_predictions(path, record["data"]["task"], record["data"]["positive"])


def _exact(
    record: Record, data: Data, val: Predictions, test: Predictions, settings: Settings
) -> tuple[ExactRanges, dict[str, Any]]:
    identity, images = record["identity"], {s: torch.from_numpy(data.splits[s].images) for s in ("val", "test")}
    spec = {k: v for k, v in identity["network"].items() if k != "version"}
    network = Network(spec, images["val"].shape[1], images["val"].shape[2], len(data.classes))
    params, _ = network.init(0)  # the features of a linear network are the same at all weights
    base_loss = membership(val, settings).base
    features = {split: score_gradients(network, params, split_images) for split, split_images in images.items()}
    ranges = viable_ranges(features["val"], val.labels, features["test"], base_loss + settings.epsilon)
    return ranges, {
        "base_loss": base_loss,
        "least_loss": ranges.minimum,
        "ambiguity": ranges.ambiguous(decide(softmax(test.base))).mean(),
        "width": ranges.width.mean(),
        "active": ranges.active,
        "residual": ranges.residual,
    }


def _row(
    val: Predictions, test: Predictions, ranges: ExactRanges, settings: Settings, base_loss: float
) -> dict[str, Any]:
    who = membership(val, settings)
    accepted = np.flatnonzero(who.accepted(settings.epsilon))
    decisions = decide(softmax(test.base))
    cell = _recalls(test, accepted, len(val.logits), ranges.width, ranges.ambiguous(decisions), settings.k)
    scores, losses = (_differences(view.logits[accepted]) for view in (test, val))
    # another strategy of prediction may move the base's loss, and with it the bound, by a rounding
    loss_error = loss_rounding_error(losses, val.labels) + max(0.0, who.base - base_loss)
    return cell | {"outside": int((violations(scores, ranges, rounding_error(scores), loss_error) > 0).sum())}


def _differences(logits: np.ndarray) -> np.ndarray:
    return logits[..., 1].astype(np.float64) - logits[..., 0]


def _recalls(
    test: Predictions, accepted: np.ndarray, drawn: int, width: np.ndarray, truly_ambiguous: np.ndarray, k: int
) -> dict[str, Any]:
    probabilities = softmax(test.logits, accepted)
    flips = decide(probabilities) != decide(softmax(test.base))
    cell: dict[str, Any] = {"accepted": len(accepted), "drawn": drawn, "reasons": []}
    for suffix, at in (("", None), ("_at_k", k)):
        try:
            found = recall(probabilities[..., 1], flips, width, truly_ambiguous, at)
            cell |= {f"coverage{suffix}": found.coverage, f"ambiguous{suffix}": found.ambiguous}
        except Undefined as reason:
            cell |= {f"coverage{suffix}": None, f"ambiguous{suffix}": None}
            cell["reasons"].append(str(reason))
    return cell


@dataclass
class Plane:
    """The plane `w* + a u + b v` through a network: points are (a, b)."""

    problem: Problem
    u: Leaves
    v: Leaves

    def members(self, points: np.ndarray) -> StackedSet:
        """Return the networks at `points` [point, 2] as a set."""
        a, b = (torch.from_numpy(np.asarray(points)[:, i]) for i in range(2))
        base = self.problem.base
        params = {
            n: (p + a.view(-1, *[1] * p.ndim) * self.u[n] + b.view(-1, *[1] * p.ndim) * self.v[n]).to(p.dtype)
            for n, p in base.params.items()
        }
        return StackedSet(len(points), {}, base.buffers, params=params)

    def logits(self, points: np.ndarray, images: Tensor) -> np.ndarray:
        """Return the logits [point, sample, class] of the networks at `points`."""
        found = predict(self.problem.network, self.members(points), images, strategy="loop")
        assert found is not None  # only a streaming prediction returns nothing
        return found

    def view(self, points: np.ndarray, part: Part, name: str) -> Predictions:
        """Return what the networks at `points` say about images with labels."""
        base = self.logits(np.zeros((1, 2)), part.images)[0]
        return Predictions(self.logits(points, part.images), base, part.labels.numpy(), self.problem.task, name)

    def losses(self, points: np.ndarray, part: Part) -> np.ndarray:
        """Return the mean cross-entropy at `points`, float64 [point]."""
        return log_losses(softmax(self.logits(points, part.images)), part.labels.numpy()).mean(axis=1)

    def exits(self, rays: np.ndarray, part: Part, epsilon: float) -> np.ndarray:
        """Return the length of each ray [ray, 2] at which the loss on `part` first leaves the base's plus epsilon."""
        limit = self.losses(np.zeros((1, 2)), part)[0] + epsilon

        def inside(ray: np.ndarray, length: float) -> bool:
            return bool(self.losses(length * ray[None], part)[0] <= limit)

        return np.array([exit_length(partial(inside, ray)) for ray in rays])


def random_plane(problem: Problem, val: Part, epsilon: float, seed: int) -> Plane:
    """Return a plane of two random orthogonal directions, each so long that at 1 the loss on val leaves the tolerance.

    Every leaf of a direction first gets the norm of the base's leaf (as Li et al., NeurIPS 2018, do filter by filter),
    so that no layer dominates. Raises Undefined where a direction never leaves.
    """
    params = problem.base.params
    generator = torch.Generator().manual_seed(derive_seed("plane", seed))

    def direction() -> Tensor:
        noise = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}
        return torch.cat([(z * params[n].norm() / z.norm()).flatten() for n, z in noise.items()])

    u, v = direction(), direction()
    v = v - (u @ v) / (u @ u) * u
    plane = Plane(problem, unflatten(u, params), unflatten(v, params))
    lengths = plane.exits(np.eye(2), val, epsilon)
    if (lengths >= LONGEST).any():
        raise Undefined("the loss does not leave the tolerance along a direction of the plane")
    return Plane(problem, unflatten(lengths[0] * u, params), unflatten(lengths[1] * v, params))


@dataclass
class Region:
    """The part of a plane that is in the Rashomon set, on a grid.

    inside: bool [a, b]; points: the grid points inside, [point, 2]; test: what their networks say on test.
    """

    inside: np.ndarray
    points: np.ndarray
    test: Predictions


def gridded_region(plane: Plane, val: Part, test: Part, settings: Settings, side: int) -> Region:
    """Evaluate every point of a `side` x `side` grid over a rectangle that contains the region.

    A coarse grid grows until nothing on its border is inside, then shrinks to what is; the fine one grows likewise.
    Raises Undefined where the region reaches further than 64.
    """

    def inside(axes: list[np.ndarray]) -> np.ndarray:
        who = membership(plane.view(_grid(axes), val, "val"), settings)
        return who.accepted(settings.epsilon).reshape(len(axes[0]), len(axes[1]))

    axes = [np.linspace(-1.5, 1.5, COARSE_SIDE)] * 2
    while _on_border(found := inside(axes)):
        axes = _grown(axes)
    for i in range(2):
        hit = axes[i][found.any(axis=1 - i)]
        step = axes[i][1] - axes[i][0]
        axes[i] = np.linspace(hit.min() - step, hit.max() + step, side)
    while _on_border(found := inside(axes)):
        axes = _grown(axes)
    points = _grid(axes)[found.ravel()]
    return Region(found, points, plane.view(points, test, "test"))


def _grid(axes: list[np.ndarray]) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def _on_border(inside: np.ndarray) -> bool:
    return bool(inside[[0, -1]].any() or inside[:, [0, -1]].any())


def _grown(axes: list[np.ndarray]) -> list[np.ndarray]:
    if np.abs(axes).max() > WIDEST:
        raise Undefined(f"the set reaches further than {WIDEST:g} times the tolerance's own length in the plane")
    return [a.mean() + 1.5 * (a - a.mean()) for a in axes]


def plane_samples(plane: Plane, members: int, epsilon: float, seed: int) -> dict[str, np.ndarray]:
    """Return points [member, 2] of samplers that see train and tune alone, as generators do, but only the plane.

    gaussian: N(0, s^2 (J'HJ)^-1), J'HJ the generalised Gauss-Newton matrix of the training loss in (a, b), with the
    largest s at which 90 % of the draws have not left the tolerance on tune; ray_exit: the same draws, each prolonged
    to where it leaves.
    """
    problem = plane.problem
    p = softmax(problem.logits(problem.base.params, problem.base.buffers, problem.train.images).numpy())
    j = _plane_jacobian(plane, problem.train.images)
    weighted = p[..., None] * (j - (p[..., None] * j).sum(axis=1, keepdims=True))
    # in units in which the quadratic leaves the tolerance at 1: the search for exits starts near them
    ggn = np.einsum("ncd,nce->de", j, weighted) / (2 * epsilon * len(j))
    rng = np.random.default_rng(derive_seed("plane samples", seed))
    rays = np.linalg.solve(np.linalg.cholesky(ggn).T, rng.standard_normal((members, 2)).T).T
    lengths = plane.exits(rays, problem.tune, epsilon)
    scale = np.quantile(lengths, 1 - TARGET_ACCEPTANCE, method="lower")
    return {"gaussian": scale * rays, "ray_exit": lengths[:, None] * rays}


def _plane_jacobian(plane: Plane, images: Tensor) -> np.ndarray:
    """Return the derivatives of the logits in a and b at the base, float64 [sample, class, 2]."""
    base = plane.problem.base

    def columns(batch: Tensor) -> Tensor:
        function = partial(plane.problem.network, buffers=base.buffers, images=batch)
        tangents = [{n: leaf.to(base.params[n].dtype) for n, leaf in d.items()} for d in (plane.u, plane.v)]
        return torch.stack([torch.func.jvp(function, (base.params,), (t,))[1] for t in tangents], dim=-1)

    with torch.no_grad():
        return torch.cat([columns(batch) for batch in images.split(256)]).double().numpy()


def plane_truth(
    problem: Problem, val: Part, test: Part, settings: Settings, seed: int, side: int = PLANE_SIDE
) -> dict[str, Any]:
    """Return one base seed of the track `plane`, see the module; `uniform` draws from the gridded set itself."""
    plane = random_plane(problem, val, settings.epsilon, seed)
    region = gridded_region(plane, val, test, settings, side)
    probabilities = softmax(region.test.logits)
    scores, flips = probabilities[..., 1], decide(probabilities) != decide(softmax(region.test.base))
    width, truly = score_range(scores), flips.any(axis=0)
    second = np.zeros_like(region.inside)
    second[::2, ::2] = True
    coarse = second[region.inside]
    truth = {
        "base_loss": float(plane.losses(np.zeros((1, 2)), val)[0]),
        "points": region.inside.size,
        "inside": len(region.points),
        "pieces": _pieces(region.inside),
        "ambiguity": truly.mean(),
        "discrepancy": discrepancy(flips),
        "width": width.mean(),
        "ambiguity_every_second": flips[coarse].any(axis=0).mean(),
        "width_every_second": score_range(scores[coarse]).mean(),
    }
    everyone = np.arange(len(region.points))
    samplers = {"uniform": _recalls(region.test, everyone, len(everyone), width, truly, settings.k)}
    for name, points in plane_samples(plane, problem.members, settings.epsilon, seed).items():
        accepted = np.flatnonzero(membership(plane.view(points, val, "val"), settings).accepted(settings.epsilon))
        drawn = plane.view(points, test, "test")
        samplers[name] = _recalls(drawn, accepted, len(points), width, truly, settings.k)
    return {"truth": truth, "samplers": samplers}


def _pieces(inside: np.ndarray) -> int:
    """Return into how many pieces the region falls (neighbours share a side)."""
    return int(label(inside)[1])


def plane_track(settings: Settings, artifacts: Path) -> dict[str, Any]:
    """Return the track `plane`, see the module; bases are trained by the recipe unless `artifacts` has them."""
    from .stages import Run, Session

    bases, session = {}, Session()
    for seed in PLANE_SEEDS:
        run = Run(_plane_spec(seed, artifacts), session)
        bases[str(seed)] = plane_truth(run.problem(), run.part("val"), run.part("test"), settings, seed)
    return {"dataset": PLANE_DATASET, "network": PLANE_NETWORK, "side": PLANE_SIDE, "bases": bases}


def _plane_spec(seed: int, artifacts: Path) -> Any:
    from ..datasets.api import DATASETS
    from ..generators.api import GENERATORS
    from .networks import NETWORKS
    from .spec import Options, Spec, create, resolve_device
    from .train import Training

    chosen: dict[str, dict[str, Any]] = {
        "dataset": PLANE_DATASET,
        "network": PLANE_NETWORK,
        "generator": {"name": "identical"},
    }
    registries = {"dataset": DATASETS, "network": NETWORKS, "generator": GENERATORS}
    parts = {kind: create(registry, chosen[kind]) for kind, registry in registries.items()}
    names = {kind: component["name"] for kind, component in chosen.items()}
    options = Options(base_seed=seed, members=PLANE_MEMBERS, threads=1, device="cpu", artifacts_dir=str(artifacts))
    return Spec(**parts, training=Training(), options=options, device=resolve_device("cpu"), names=names)


def linear_gaussian_track(members: int = GAUSSIAN_MEMBERS) -> dict[str, Any]:
    """Return the track `linear_gaussian`, see the module: METRICS.md, 10, through generator, prediction and metrics.

    A score linear in the weights is normal: a member agrees with the mean with probability `q = Phi(|t'x| / sqrt(x' S
    x))`, so that pairwise disagreement is 2q(1-q), ambiguity with m members 1 - q^m, conflict 1 - q. Members come in
    batches, whose means give the standard error: every estimator is unbiased in a batch.
    """
    from ..generators.laplace import Laplace
    from .toy import toy_problem

    problem = toy_problem("logistic", members=members)
    images = problem.train.images.double()
    # drawn towards grey, so that some cases are close and others clear
    shrink = torch.linspace(0.1, 1, len(images), dtype=torch.float64).view(-1, 1, 1, 1)
    images = (127.5 + shrink * (images - 127.5)).round().to(torch.uint8)
    rows = []
    for structure in ("diag", "full"):
        drawn = Laplace(structure=structure, prior_precision=GAUSSIAN_PRECISION).generate(problem, 11)
        assert isinstance(drawn, GaussianSet)
        gradients = score_gradients(problem.network, drawn.mean, images)  # type: ignore[arg-type]
        score = gradients @ torch.cat([leaf.double().flatten() for leaf in drawn.mean.values()]).numpy()
        q = ndtr(np.abs(score) / np.sqrt(score_variance(drawn, gradients)))
        decisions = predict(problem.network, drawn, images).argmax(-1)  # type: ignore[union-attr]
        for quantity, exact, measured in _closed_forms(q, decisions, (score > 0).astype(int)):
            values = np.array([measured(batch) for batch in np.array_split(np.arange(members), BATCHES)])
            about = {"structure": structure, "quantity": quantity, "exact": exact, "measured": values.mean()}
            rows.append(about | {"se": values.std(ddof=1) / math.sqrt(BATCHES)})
    return {"members": members, "rows": rows}


def score_variance(drawn: GaussianSet, gradients: np.ndarray) -> np.ndarray:
    """Return the variance of the score over a diagonal or full Gaussian: gradients [sample, param] -> [sample]."""
    if isinstance(drawn, DiagonalSet):
        return gradients**2 @ (drawn.scale * drawn.factors["sd"].double().numpy()) ** 2
    assert isinstance(drawn, DualSet)
    vectors, values = (drawn.factors[n].double().numpy() for n in ("vectors", "values"))
    shrunk = 1 / drawn.scale - 1 / (values + drawn.scale)
    return (gradients**2).sum(axis=1) / drawn.scale - (gradients @ vectors) ** 2 @ shrunk


def _closed_forms(
    q: np.ndarray, decisions: np.ndarray, base: np.ndarray
) -> Iterable[tuple[str, float, Callable[[np.ndarray], float]]]:
    """Yield (quantity, its closed form, its estimate from some members), means over cases."""

    def flips(batch: np.ndarray) -> np.ndarray:
        return (decisions[batch] != base).sum(axis=0)

    def ambiguity(m: int, batch: np.ndarray) -> float:
        return ambiguous(flips(batch), len(batch), m).mean()

    yield "conflict", (1 - q).mean(), lambda batch: conflict(flips(batch), len(batch)).mean()
    yield "disagreement", (2 * q * (1 - q)).mean(), lambda batch: disagreement(votes(decisions[batch], 2)).mean()
    for m in (1, 5, 20):
        yield f"ambiguity@{m}", (1 - q**m).mean(), partial(ambiguity, m)


def compute(suite: Suite, records: Path, predictions: Path, artifacts: Path, data_root: str | None) -> dict[str, Any]:
    """Return the content of the JSON file that the module describes."""
    table = settle(suite, read_all(records))
    return plain_values(
        {
            "suite": {"name": suite.name, "epsilon": suite.epsilon, "k": suite.k},
            "inputs": inputs(table),
            "logistic": logistic_track(table, predictions, data_root),
            "plane": plane_track(suite.settings, artifacts),
            "linear_gaussian": linear_gaussian_track(),
        }
    )


def main(argv: list[str] | None = None) -> int:
    """Write the JSON file, and print the tables."""
    parser = Parser(prog="exact", description="Hold the committed sets of suite exact against the exact set.")
    parser.add_argument("--suite", default="exact", metavar="NAME", help="name or path of the suite")
    parser.add_argument("--records", type=Path, default=FOLDER / "records", metavar="DIR", help="folder of its records")
    parser.add_argument("--predictions", type=Path, metavar="DIR", help="folder of its predictions files")
    parser.add_argument("--artifacts", type=Path, default=Path("outputs/artifacts"), metavar="DIR", help="the store")
    parser.add_argument("--data-root", metavar="DIR", help="as data_root of run-benchmark")
    parser.add_argument("--out", type=Path, default=FOLDER / EXACT, metavar="FILE", help="the JSON file")
    parser.set_defaults(run=_run)
    return execute(parser, argv)


def _run(args: argparse.Namespace) -> int:
    suite = load_suite(args.suite)
    predictions = args.predictions or FOLDER / "predictions" / suite.name
    result = compute(suite, args.records, predictions, args.artifacts, args.data_root)
    args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(tables(result))
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
