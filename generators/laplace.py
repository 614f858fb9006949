"""Laplace approximation around the base: weights drawn from N(w*, (G + a I)^-1), G the generalised Gauss-Newton matrix.

`G = sum_i J_i' H_i J_i`, H = diag(p) - p p'. Fitted by laplace-torch (Daxberger et al., NeurIPS 2021): the exact
diagonal, or Kronecker factors (KFAC; Ritter, Botev, Barber, ICLR 2018) damped in the eigenbasis:
`W = W* + U_B ((U_B' E U_A) . (l_B l_A' N + a)^(-1/2)) U_A'`. The prior precision a decides everything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged, UserError, suggest
from ..identity import plain
from .api import Generator, Problem, choices, register_generator
from .batchnorm import POLICIES, settle_batchnorm, settled_member
from .modelset import DiagonalSet, GaussianSet, KroneckerSet, Leaves, ModelSet

PRIORS = ("tune_acceptance", "tune_loss", "marglik")
JACOBIAN_LIMIT = 4_000_000
"""Entries of one image's Jacobian (classes x weights) above which laplace-torch's exact diagonal takes too long."""

TUNE_AT_LEAST = 25
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._NormBase,
)
KFAC_LAYERS = (nn.Linear, nn.Conv2d)
LOW, HIGH = -2.0, 9.0
"""log10 of the smallest and the largest prior precision that is tried."""


@register_generator("laplace")
@dataclass
class Laplace(Generator):
    """Gaussian around the base: weights drawn from a diagonal or KFAC Laplace approximation (laplace-torch).

    structure: diag | kron; subset: all | last_layer; prior_precision: tune_acceptance (the widest posterior of whose
    draws target_acceptance stay within target_epsilon of the base's loss on tune), tune_loss (the best predictive loss
    on tune), marglik (marginal likelihood), or a number; batchnorm: keep | reestimate.
    """

    structure: str = "diag"
    subset: str = "all"
    prior_precision: str = "tune_acceptance"
    target_acceptance: float = 0.9
    target_epsilon: float = 0.05
    batchnorm: str = "reestimate"

    def __post_init__(self) -> None:
        choices(self.structure, "generator.structure", ("diag", "kron"))
        choices(self.subset, "generator.subset", ("all", "last_layer"))
        choices(self.batchnorm, "generator.batchnorm", POLICIES)
        number = prior_number(self.prior_precision)
        if number is not None:  # "10" and "10.0" are one setting
            self.prior_precision = str(plain(number))
        if not 0 < self.target_acceptance <= 1 or self.target_epsilon <= 0:
            raise UserError("generator: target_acceptance must be in (0, 1] and target_epsilon positive")

    def supports(self, problem: Problem) -> str | None:
        """Return what laplace-torch cannot do here, or that tune is too small to choose the prior on."""
        if problem.task == "multilabel":
            return "laplace-torch has no multi-label likelihood"
        if self.prior_precision.startswith("tune") and len(problem.tune) < TUNE_AT_LEAST:
            return f"tune has {len(problem.tune)} images, choosing the prior precision on it needs {TUNE_AT_LEAST}"
        names = leaf_names(problem.module(), self.structure, self.subset)
        if not names:
            return f"the network has no layer that structure={self.structure}, subset={self.subset} covers"
        foreign = foreign_leaves(problem.module(), names) if self.structure == "kron" else []
        if foreign:
            return f"KFAC covers linear and 2D convolution layers, not {foreign[0]}: use structure=diag"
        entries = problem.classes * sum(problem.base.params[n].numel() for n in names)
        if self.structure == "diag" and entries > JACOBIAN_LIMIT:
            return (
                f"laplace-torch's exact diagonal holds {entries:,} Jacobian entries per image "
                f"(limit {JACOBIAN_LIMIT:,}): use subset=last_layer or structure=kron"
            )
        return None

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Fit the curvature, choose the prior precision, and return the Gaussian's draws."""
        names = leaf_names(problem.module(), self.structure, self.subset)
        curvature = problem.part(
            "curvature",
            {"structure": self.structure, "subset": self.subset, "version": self.version},
            lambda: fit_curvature(problem, self.structure, names),
        )

        def posterior(precision: float) -> GaussianSet:
            return make_posterior(problem, names, curvature, self.structure, precision, seed)

        with problem.clock.fixed():
            precision = choose_prior(
                self.prior_precision,
                problem,
                float(curvature["marglik"]),
                lambda tried, k: settled_member(problem, posterior(tried), k, self.batchnorm, seed),
                self.target_epsilon,
                self.target_acceptance,
            )
        drawn = posterior(precision)
        drawn.diagnostics = {
            "prior_precision": precision,
            "prior_precision_marglik": float(curvature["marglik"]),
            "curvature_mean": float(curvature["diagonal_mean"]),
            "weights_varied": sum(leaf.numel() for leaf in drawn.mean.values()),
        }
        frozen = [n for n in problem.base.params if n not in names]
        if self.subset == "all" and frozen:
            count = sum(problem.base.params[n].numel() for n in frozen)
            drawn.notes = [f"KFAC covers no normalisation layers: their {count} weights stay at the base's"]
        return settle_batchnorm(problem, drawn, self.batchnorm, seed)


def prior_number(text: str) -> float | None:
    """Return the number that `prior_precision` is, None where it names a way to choose it; UserError otherwise."""
    if text in PRIORS:
        return None
    try:
        number = float(text)
    except ValueError:
        raise UserError(
            f"generator.prior_precision={text} is neither a number nor a choice: {suggest(text, PRIORS)}"
        ) from None
    if not (number > 0 and math.isfinite(number)):
        raise UserError(f"generator.prior_precision={text} must be a positive number")
    return number


def leaf_names(module: nn.Module, structure: str, subset: str) -> list[str]:
    """Return the names of the parameters that vary, in the network's order.

    last_layer: the last linear layer. KFAC has no form for normalisation layers, so their affine parameters stay fixed.
    """
    if subset == "last_layer":
        linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        return [n for n, _ in module.named_parameters() if linear and n.rpartition(".")[0] == linear[-1]]
    fixed = {
        f"{name}.{leaf}"
        for name, layer in module.named_modules()
        if structure == "kron" and isinstance(layer, NORMS)
        for leaf, _ in layer.named_parameters(recurse=False)
    }
    return [n for n, _ in module.named_parameters() if n not in fixed]


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


def make_posterior(
    problem: Problem, names: list[str], curvature: dict[str, Tensor], structure: str, precision: float, seed: int
) -> GaussianSet:
    """Return the set drawn from N(w*, (G + precision I)^-1) over the leaves `names`."""
    common = {
        "size": problem.members,
        "mean": {n: problem.base.params[n] for n in names},
        "shared_params": {n: p for n, p in problem.base.params.items() if n not in names},
        "shared_buffers": dict(problem.base.buffers),
        "seed": seed,
    }
    if structure == "diag":
        sd = (curvature["diagonal"].clamp(min=0) + precision).rsqrt()
        return DiagonalSet(factors={"sd": sd}, **common)  # type: ignore[arg-type]
    factors = {n: t for n, t in curvature.items() if n.startswith(("values.", "vectors."))}
    return KroneckerSet(factors=factors, scale=precision, **common)  # type: ignore[arg-type]


def choose_prior(
    how: str,
    problem: Problem,
    marglik: float,
    member: Callable[[float, int], tuple[Leaves, Leaves]],
    target_epsilon: float,
    target_acceptance: float,
) -> float:
    """Return the prior precision: a given number, marginal likelihood's, or one chosen on tune.

    `member(precision, k)` returns parameters and buffers of draw k; the draws on tune are the set's own first members,
    so that their noise is the same at every precision tried.
    """
    number = prior_number(how)
    if number is not None:
        return number
    if how == "marglik":
        return marglik
    draws = max(20, min(problem.members, 50))

    def tune_logits(precision: float) -> list[Tensor]:
        return [problem.logits(*member(precision, k), problem.tune.images) for k in range(draws)]

    if how == "tune_loss":
        grid = [10 ** (LOW + (HIGH - LOW) * i / 22) for i in range(23)]
        return min(grid, key=lambda precision: _predictive_loss(tune_logits(precision), problem.tune.labels))
    limit = problem.tune_loss(problem.base.params, problem.base.buffers) + target_epsilon

    def acceptance(exponent: float) -> float:
        losses = [float(problem.loss(logits, problem.tune.labels)) for logits in tune_logits(10**exponent)]
        return sum(loss <= limit for loss in losses) / draws

    return 10 ** widest(acceptance, target_acceptance, LOW, HIGH)


def widest(acceptance: Callable[[float], float], target: float, low: float, high: float, steps: int = 12) -> float:
    """Return the smallest x in [low, high], to (high - low) / 2^steps, at which `acceptance` reaches `target`.

    Acceptance is taken to rise with x. Raises Diverged when even `high` does not reach the target.
    """
    if acceptance(high) < target:
        raise Diverged(f"no prior precision up to 1e{high:g} reaches an acceptance of {target:g} on tune")
    if acceptance(low) >= target:
        return low
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if acceptance(middle) >= target else (middle, high)
    return high


def _predictive_loss(logits: list[Tensor], labels: Tensor) -> float:
    """Return the cross-entropy of the members' mean probabilities, in nats."""
    mean = torch.stack([member.softmax(-1) for member in logits]).mean(0)
    return float(torch.nn.functional.nll_loss(mean.clamp(min=1e-12).log(), labels))
