"""Laplace posteriors N(w*, (G + a I)^-1) around the base, for every generator that starts from their draws.

`G = sum_i J_i' H_i J_i` is the generalised Gauss-Newton matrix of the training loss (the sum over samples), J_i the
Jacobian of the logits and H_i the loss's Hessian in them. *diag* and *kron*, the exact diagonal, or Kronecker factors
(KFAC; Ritter, Botev, Barber, ICLR 2018) damped in the eigenbasis, are fitted by laplace-torch (Daxberger et al.,
NeurIPS 2021) where it can, else by our own `native_curvature`. *full* is the exact G, by the dual; *lowrank* its
leading eigenvectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError, suggest
from ..identity import plain
from .api import Generator, Problem, choices
from .batchnorm import POLICIES, settled_member
from .eigenbasis import Eigenbasis, KroneckerBasis, SpanBasis
from .full_ggn import FULL_LIMIT, fit_full
from .ggn_products import fit_lowrank
from .jacobian import rows_per_image
from .modelset import DiagonalSet, DualSet, GaussianSet, KroneckerSet, Leaves, StackedSet, unflatten
from .native_curvature import KFAC_APPROXIMATIONS, fit_diagonal, fit_kronecker, native_obstacle
from .prior import TUNE_AT_LEAST, choose_prior, prior_number

STRUCTURES = ("diag", "kron", "full")
ENGINES = ("auto", "native", "laplace_torch")
VERSION = 1
"""Of the fitted curvatures, which all generators share."""

JACOBIAN_LIMIT = 4_000_000
"""Entries of one image's Jacobian (classes x weights) above which laplace-torch's exact diagonal takes too long."""

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._NormBase,
)
KFAC_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Options:
    """How a curvature is fitted.

    engine: laplace_torch | native | auto, the first of these that supports the network; kfac_approx: expand | reduce
    (native; see `native_curvature`); mc_samples: labels drawn per image (native), 0 for the exact curvature; rank: of
    structure=lowrank.
    """

    engine: str = "auto"
    kfac_approx: str = "expand"
    mc_samples: int = 0
    rank: int = 50

    def __post_init__(self) -> None:
        choices(self.engine, "generator.engine", ENGINES)
        choices(self.kfac_approx, "generator.kfac_approx", KFAC_APPROXIMATIONS)
        if self.mc_samples < 0 or self.rank < 1:
            raise UserError("generator: mc_samples must be at least 0 and rank at least 1")
        if self.engine == "laplace_torch" and self.only_native:
            raise UserError("generator.engine=laplace_torch has neither kfac_approx=reduce nor mc_samples: use native")

    @property
    def only_native(self) -> bool:
        """Whether the native engine alone can do what is asked for."""
        return self.kfac_approx != "expand" or self.mc_samples > 0

    def engines(self, structure: str) -> tuple[str, ...]:
        """Return the engines that may fit a structure, the preferred one first."""
        if structure not in ("diag", "kron") or self.only_native:
            return ("native",)
        return ("laplace_torch", "native") if self.engine == "auto" else (self.engine,)


class FromPosterior(Generator):
    """Base of the generators that start from draws of a Laplace posterior: the fields that they share, checked.

    Each declares these fields with defaults of its own. subset: all | last_layer | layers of the network joined by "+";
    prior_precision: see `choose_prior`; target_acceptance, target_epsilon: of the choice on tune.
    """

    structure: str
    subset: str
    prior_precision: str
    target_acceptance: float
    target_epsilon: float
    batchnorm: str
    structures: ClassVar[tuple[str, ...]] = STRUCTURES

    @property
    def fitting(self) -> Options:
        """Return how the curvature is fitted."""
        return Options()

    def __post_init__(self) -> None:
        choices(self.structure, "generator.structure", self.structures)
        choices(self.batchnorm, "generator.batchnorm", POLICIES)
        self.subset = "+".join(sorted(set(self.subset.split("+"))))  # the order of layers means nothing
        number = prior_number(self.prior_precision)
        if number is not None:  # "10" and "10.0" are one setting
            self.prior_precision = str(plain(number))
        if not 0 < self.target_acceptance <= 1 or self.target_epsilon <= 0:
            raise UserError("generator: target_acceptance must be in (0, 1] and target_epsilon positive")

    def supports(self, problem: Problem) -> str | None:
        """Return why the posterior cannot be fitted, or that tune is too small to choose the prior on."""
        reason = posterior_obstacle(problem, self.structure, self.subset, self.fitting)
        if reason is None and self.prior_precision.startswith("tune") and len(problem.tune) < TUNE_AT_LEAST:
            return f"tune has {len(problem.tune)} images, choosing the prior precision on it needs {TUNE_AT_LEAST}"
        return reason

    def choose(self, problem: Problem, posterior: Posterior, seed: int, **search: Any) -> float:
        """Return the prior precision; where it is chosen on tune, by the posterior's own draws, it survives a kill.

        search: resolution and draws of `choose_prior`.
        """

        def member(precision: float, k: int) -> tuple[Leaves, Leaves]:
            drawn = posterior.at(precision, seed, problem.members)
            return settled_member(problem, drawn, k, self.batchnorm, seed)

        tuned = self.prior_precision.startswith("tune")
        done = problem.checkpoint.load("prior") if tuned else None
        if done is not None:
            return float(done["precision"])
        with problem.clock.fixed():
            precision = choose_prior(
                self.prior_precision,
                problem,
                posterior.marglik,
                member,
                self.target_epsilon,
                self.target_acceptance,
                **search,
            )
        if tuned:
            problem.checkpoint.save("prior", {"precision": torch.tensor(precision, dtype=torch.float64)})
        return precision


def posterior_obstacle(problem: Problem, structure: str, subset: str, options: Options = Options()) -> str | None:
    """Return the reason why a posterior cannot be fitted here, or None; UserError for a layer that is not there."""
    return _plan(problem, structure, subset, options).obstacle


@dataclass(frozen=True)
class _Plan:
    """Which engine fits which leaves; obstacle: why none can."""

    engine: str
    names: list[str]
    obstacle: str | None


def _plan(problem: Problem, structure: str, subset: str, options: Options) -> _Plan:
    """Return the first engine that can fit the structure, else the last one's obstacle."""
    module = problem.module()
    for engine in options.engines(structure):
        names = leaf_names(module, structure, subset, engine)
        if not names:
            reason: str | None = f"the network has no layer that structure={structure}, subset={subset} covers"
        elif engine == "laplace_torch":
            reason = _library_obstacle(problem, structure, names)
        elif structure in ("diag", "kron"):
            reason = native_obstacle(problem, structure, names, options.kfac_approx)
        else:
            reason = _spectral_obstacle(problem, structure, names, options)
        plan = _Plan(engine, names, reason)
        if reason is None:
            break
    return plan


def _library_obstacle(problem: Problem, structure: str, names: list[str]) -> str | None:
    """Return the reason why laplace-torch cannot fit these leaves."""
    if problem.task == "multilabel":
        return f"laplace-torch has no multi-label likelihood for structure={structure}: use engine=native"
    foreign = foreign_leaves(problem.module(), names) if structure == "kron" else []
    if foreign:
        return f"KFAC covers linear and 2D convolution layers, not {foreign[0]}: use structure=diag"
    size = sum(problem.base.params[n].numel() for n in names)
    if structure == "diag" and problem.classes * size > JACOBIAN_LIMIT:
        return (
            f"laplace-torch's exact diagonal holds {problem.classes * size:,} Jacobian entries per image "
            f"(limit {JACOBIAN_LIMIT:,}): use engine=native"
        )
    return None


def _spectral_obstacle(problem: Problem, structure: str, names: list[str], options: Options) -> str | None:
    """Return the reason why eigenvectors of the full GGN cannot be had."""
    size = sum(problem.base.params[n].numel() for n in names)
    if structure == "lowrank" and options.rank >= size:
        return f"rank={options.rank} is not below the {size} weights that vary: use structure=full"
    rank = options.rank if structure == "lowrank" else min(rows_per_image(problem) * len(problem.train), size)
    if structure == "matrix_free" or 4 * rank * size <= FULL_LIMIT:
        return None
    return (
        f"the full GGN has {rank:,} eigenvectors of {size:,} weights, {4 * rank * size / 2**30:.1f} GiB "
        f"(limit {FULL_LIMIT / 2**30:g}): use a smaller subset, structure=kron or structure=lowrank"
    )


def fit_posterior(problem: Problem, structure: str, subset: str, options: Options = Options()) -> Posterior:
    """Fit the curvature on train, once per base for all generators, and return the posterior.

    Raises UserError for a layer that is not there.
    """
    plan = _plan(problem, structure, subset, options)
    names = plan.names
    spec: dict[str, Any] = {"structure": structure, "subset": subset, "version": VERSION}

    def fit() -> dict[str, Tensor]:
        if structure == "full":
            return fit_full(problem, names)
        if structure == "lowrank":
            return fit_lowrank(problem, names, options.rank)
        if plan.engine == "laplace_torch":
            return fit_curvature(problem, structure, names)
        if structure == "diag":
            return fit_diagonal(problem, names, options.mc_samples)
        return fit_kronecker(problem, names, options.kfac_approx, options.mc_samples)

    if structure == "lowrank":
        spec["rank"] = options.rank
    elif structure != "full" and plan.engine == "native":
        spec |= {"engine": "native", "mc_samples": options.mc_samples}
        spec |= {"kfac_approx": options.kfac_approx} if structure == "kron" else {}
    curvature = problem.part("curvature", spec, fit)
    left = [n for n in leaf_names(problem.module(), "diag", subset) if n not in names]
    count = sum(problem.base.params[n].numel() for n in left)
    return Posterior(
        names=names,
        marglik=float(curvature["marglik"]),
        curvature_mean=float(curvature["diagonal_mean"]),
        notes=[f"KFAC covers no normalisation layers: their {count} weights stay at the base's"] if left else [],
        problem=problem,
        structure=structure,
        engine=plan.engine,
        curvature=curvature,
    )


@dataclass
class Posterior:
    """A fitted curvature G with the base as mean: a Gaussian for every prior precision a.

    names: of the leaves that vary, in the network's order, which is that of flat weights; marglik: the prior precision
    that marginal likelihood picks; curvature_mean: mean of G's diagonal; notes: caveats for the board.
    """

    names: list[str]
    marglik: float
    curvature_mean: float
    notes: list[str]
    problem: Problem
    structure: str
    engine: str
    curvature: dict[str, Tensor]

    def at(self, precision: float, seed: int, members: int) -> GaussianSet:
        """Return the set of `members` draws from N(w*, (G + precision I)^-1)."""
        common: dict[str, Any] = {
            "size": members,
            "mean": {n: self.problem.base.params[n] for n in self.names},
            "shared_params": self._fixed(),
            "shared_buffers": dict(self.problem.base.buffers),
            "seed": seed,
        }
        if self.structure == "diag":
            sd = (self.curvature["diagonal"].clamp(min=0) + precision).rsqrt()
            return DiagonalSet(factors={"sd": sd}, **common)
        factors = {n: t for n, t in self.curvature.items() if n.startswith(("values", "vectors"))}
        return (KroneckerSet if self.structure == "kron" else DualSet)(factors=factors, scale=precision, **common)

    def moved(self, deviation: Tensor) -> Leaves:
        """Return the leaves `names` at the base plus a flat deviation [param]."""
        base = {n: self.problem.base.params[n] for n in self.names}
        return {n: base[n] + part for n, part in unflatten(deviation, base).items()}

    def stack(self, members: Sequence[Leaves]) -> StackedSet:
        """Return the set of members given by their leaves `names`; all else is the base's."""
        return StackedSet(
            size=len(members),
            shared_params=self._fixed(),
            shared_buffers=dict(self.problem.base.buffers),
            notes=list(self.notes),
            params={n: torch.stack([leaves[n] for leaves in members]) for n in self.names},
        )

    def eigenbasis(self) -> Eigenbasis:
        """Return the eigenvectors of G as an orthogonal change of coordinates."""
        if self.structure == "diag":
            return Eigenbasis(self.curvature["diagonal"].clamp(min=0).double())
        if self.structure in ("full", "lowrank"):
            return SpanBasis(self.curvature["values"], self.curvature["vectors"])
        leaves = [self.problem.base.params[n] for n in self.names]
        of = lambda what, i: [  # noqa: E731
            self.curvature[f"{what}.{i}.{j}"] for j in (0, 1) if f"{what}.{i}.{j}" in self.curvature
        ]
        values = [torch.outer(*v).reshape(-1) if len(v := of("values", i)) == 2 else v[0] for i in range(len(leaves))]
        return KroneckerBasis(torch.cat(values).double(), [of("vectors", i) for i in range(len(leaves))])

    def diagnostics(self, precision: float) -> dict[str, Any]:
        """Return what the record says about the posterior at this prior precision."""
        return {
            "engine": self.engine,
            "prior_precision": precision,
            "prior_precision_marglik": self.marglik,
            "curvature_mean": self.curvature_mean,
            "weights_varied": sum(self.problem.base.params[n].numel() for n in self.names),
        }

    def _fixed(self) -> Leaves:
        return {n: p for n, p in self.problem.base.params.items() if n not in self.names}


def leaf_names(module: nn.Module, structure: str, subset: str, engine: str = "laplace_torch") -> list[str]:
    """Return the names of the parameters that vary, in the network's order; UserError for a layer that is not there.

    last_layer: the last linear layer. laplace-torch's KFAC has no form for normalisation layers, so that with it their
    affine parameters stay fixed.
    """
    layers = {n.rpartition(".")[0] for n, _ in module.named_parameters()}
    if subset == "last_layer":
        chosen = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1:]
    elif subset == "all":
        chosen = sorted(layers)
    else:
        chosen = subset.split("+")
        known = {name for name, _ in module.named_modules()}
        for name in chosen:
            if not name or name not in known:
                hint = suggest(name, layers | {"all", "last_layer"})
                raise UserError(f"generator.subset={subset}: the network has no layer '{name}': {hint}")
    without_norms = structure == "kron" and engine == "laplace_torch"
    fixed = {name for name, layer in module.named_modules() if without_norms and isinstance(layer, NORMS)}
    return [
        n
        for n, _ in module.named_parameters()
        if (layer := n.rpartition(".")[0]) not in fixed
        and any(layer == name or layer.startswith(f"{name}.") for name in chosen)
    ]


def foreign_leaves(module: nn.Module, names: list[str]) -> list[str]:
    """Return those of `names` that belong to layers for which laplace-torch has no Kronecker factors."""
    covered = {
        f"{name}.{leaf}"
        for name, layer in module.named_modules()
        if isinstance(layer, KFAC_LAYERS)
        for leaf, _ in layer.named_parameters(recurse=False)
    }
    return [n for n in names if n not in covered]


def fit_curvature(problem: Problem, structure: str, names: list[str]) -> dict[str, Tensor]:
    """Fit laplace-torch's GGN on train and return it with the prior precision that marginal likelihood picks.

    diag: `diagonal` [param]; kron: `values.i.j`, `vectors.i.j`, eigenvalues and eigenvectors of leaf i (the product of
    the eigenvalues holds the sum over samples).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace as LaplaceTorch
        from torch.utils.data import DataLoader, TensorDataset

        class Watched(DataLoader):
            def __iter__(self) -> Any:
                return iter(problem.progress(super().__iter__(), "fitting the curvature", len(self)))

        module = problem.module()
        for name, leaf in module.named_parameters():
            leaf.requires_grad_(name in names)
        batch = 25 if structure == "diag" else 128  # the exact diagonal holds a batch's Jacobians: 1 GB here
        loader = Watched(TensorDataset(problem.train.images, problem.train.labels), batch_size=batch)
        with torch.random.fork_rng(devices=[]):
            fitted: Any = LaplaceTorch(module, "classification", subset_of_weights="all", hessian_structure=structure)
            fitted.fit(loader)
            fitted.optimize_prior_precision(method="marglik")
        result: dict[str, Tensor] = {"marglik": fitted.prior_precision.detach().reshape(-1)[0].clone()}
        if structure == "diag":
            result["diagonal"] = fitted.H.detach().clone()
            result["diagonal_mean"] = result["diagonal"].mean()
        else:
            for i, (values, vectors) in enumerate(zip(fitted.H.eigenvalues, fitted.H.eigenvectors, strict=True)):
                for j, (value, vector) in enumerate(zip(values, vectors, strict=True)):
                    result[f"values.{i}.{j}"] = value.detach().clamp(min=0).clone()
                    result[f"vectors.{i}.{j}"] = vector.detach().clone()
            result["diagonal_mean"] = fitted.H.diag().detach().mean()
    return result
