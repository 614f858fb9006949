"""Diagonal and Kronecker-factored curvatures of our own, for what laplace-torch cannot fit or fits slowly.

They cover BatchNorm and GroupNorm (affine parameters included), cross-entropy and multi-label loss, at a few forward
and backward passes over train. *diag*: `sum_i sum_r B_ir^2` over the rows of `G = B' B`, exact or drawn, in memory that
does not grow with classes times weights. *kron*: KFAC for layers that share weights over R positions (Eschenhagen,
Immer, Turner, Schneider, Hennig, NeurIPS 2023): with inputs a and gradients g of the outputs, over N images

    expand   G_l = 1 / (N R) (sum a a') (x) (sum g g'),   sums over images and positions (Grosse, Martens 2016)
    reduce   G_l = 1 / N (sum a_ a_') (x) (sum g_ g_'),   a_ the mean and g_ the sum over positions

Biases have the block of g (or g_) alone. Of norm layers the blocks of `weight` and of `bias` are exact: they are no
larger than the number of channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .api import Problem
from .full_ggn import NULL, flat_weights, told_by
from .layer_gradients import WEIGHTED, Seen, input_patches, layers_obstacle, layers_of, leaf_rows, seen_batches

KFAC_APPROXIMATIONS = ("expand", "reduce")
FACTOR_LIMIT = 10_000
"""Rows of a Kronecker factor above which its eigenvectors take too long."""

PIECE = 2**21
"""Numbers (patches and rows of some images) that are worked on at once: more of them leave the cache of a CPU."""


def native_obstacle(problem: Problem, structure: str, names: list[str], approximation: str) -> str | None:
    """Return the reason why a curvature cannot be fitted here, or None."""
    if reason := layers_obstacle(problem, names):
        return reason
    for name, layer in layers_of(problem.module(), names).items():
        if structure != "kron" or not isinstance(layer, WEIGHTED):
            continue
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            return f"KFAC covers no grouped convolution such as {name}: use structure=diag"
        rows = layer.weight[0].numel()
        if rows > FACTOR_LIMIT and (approximation == "expand" or len(problem.train) > FACTOR_LIMIT):
            return f"the factor of {name} has {rows:,} rows (limit {FACTOR_LIMIT:,}): use kfac_approx=reduce or diag"
    return None


def fit_diagonal(problem: Problem, names: list[str], draws: int = 0) -> dict[str, Tensor]:
    """Return `diagonal` [param] of G on train, and what follows from it; draws: as for `diagonal_ggn`."""
    diagonal = diagonal_ggn(problem, names, draws)
    return {"diagonal": diagonal, **told_by(diagonal.double(), flat_weights(problem, names))}


def diagonal_ggn(problem: Problem, names: list[str], draws: int = 0) -> Tensor:
    """Return the diagonal of G on train [param].

    draws: 0 for the exact one, else drawn labels per image (unbiased).
    """
    layers = layers_of(problem.module(), names)
    total = {n: torch.zeros_like(problem.base.params[n]) for n in names}
    for batch in seen_batches(problem, names, draws):
        for name in names:
            layer, _, leaf = name.rpartition(".")
            for seen in _pieces(layers[layer], batch[layer], total[name].numel()):
                total[name] += leaf_rows(layers[layer], leaf, seen).flatten(0, 1).square_().sum(0)
    return torch.cat([leaf.reshape(-1) for leaf in total.values()])


def fit_kronecker(
    problem: Problem, names: list[str], approximation: str = "expand", draws: int = 0
) -> dict[str, Tensor]:
    """Return `values.i.j` and `vectors.i.j` of the leaves, as `KroneckerSet` has them, and what follows from them.

    Of a factor that has fewer images than rows, the eigenvectors with an eigenvalue above zero are kept alone.
    """
    factors = kronecker_factors(problem, names, approximation, draws)
    found: dict[str, Tensor] = {}
    spectrum = []
    for i, own in enumerate(problem.progress(list(factors.values()), "eigenvectors of the factors", len(factors))):
        pairs = own.eigenpairs(len(problem.train))
        for j, (values, vectors) in enumerate(pairs):
            found[f"values.{i}.{j}"], found[f"vectors.{i}.{j}"] = values, vectors
        values = [values.double() for values, _ in pairs]
        spectrum.append(torch.outer(*values).reshape(-1) if len(values) == 2 else values[0])
    return {**found, **told_by(torch.cat(spectrum), flat_weights(problem, names))}


def kronecker_factors(
    problem: Problem, names: list[str], approximation: str = "expand", draws: int = 0
) -> dict[str, Factors]:
    """Return the sums over train of which the factors of every leaf are made."""
    layers = layers_of(problem.module(), names)
    factors = {n: Factors(layers[n.rpartition(".")[0]], n.rpartition(".")[2], approximation) for n in names}
    for batch in seen_batches(problem, names, draws):
        for name, own in factors.items():
            seen = batch[name.rpartition(".")[0]]
            for piece in _pieces(own.layer, seen, seen.gradients[0, 0].numel()):
                own.add(piece)
    return factors


@dataclass
class Factors:
    """Second moments over train for one leaf: of gradients (of rows, for a norm layer), and of inputs for a matrix.

    vectors: with `reduce`, the mean inputs themselves, which may be fewer than a second moment has rows.
    """

    layer: nn.Module
    leaf: str
    approximation: str
    gradients: Tensor | None = None
    inputs: Tensor | None = None
    vectors: list[Tensor] = field(default_factory=list)
    positions: int = 1

    def add(self, seen: Seen) -> None:
        """Add some images."""
        if not isinstance(self.layer, WEIGHTED):
            self._add_gradients(leaf_rows(self.layer, self.leaf, seen).flatten(0, 1))
            return
        gradients = self._by_position(seen.gradients)
        self._add_gradients((gradients.sum(2) if self.approximation == "reduce" else gradients).flatten(0, -2))
        if self.leaf == "bias":
            return
        inputs = self._patches(seen.inputs)
        self.positions = inputs.shape[-1]
        if self.approximation == "reduce":
            self.vectors.append(inputs.mean(2))
            return
        flat = inputs.transpose(0, 1).flatten(1)
        self.inputs = flat @ flat.T if self.inputs is None else self.inputs.addmm_(flat, flat.T)

    def eigenpairs(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Return eigenvalues and eigenvectors of the outputs' factor and, for a matrix, of the inputs'."""
        assert self.gradients is not None
        outputs = _eigenpairs(self.gradients)
        if self.leaf == "bias" or not isinstance(self.layer, WEIGHTED):
            return [outputs]
        if self.approximation == "reduce":
            return [outputs, _thin_eigenpairs(torch.cat(self.vectors) / images**0.5)]
        assert self.inputs is not None
        return [outputs, _eigenpairs(self.inputs / (images * self.positions))]

    def _add_gradients(self, rows: Tensor) -> None:
        self.gradients = rows.T @ rows if self.gradients is None else self.gradients.addmm_(rows.T, rows)

    def _by_position(self, gradients: Tensor) -> Tensor:
        """Return gradients as [row, sample, position, output]."""
        if isinstance(self.layer, nn.Conv2d):
            return gradients.flatten(3).transpose(2, 3)
        return gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])

    def _patches(self, inputs: Tensor) -> Tensor:
        """Return inputs as [sample, input, position]."""
        if isinstance(self.layer, nn.Conv2d):
            return input_patches(self.layer, inputs)
        return inputs.reshape(len(inputs), -1, inputs.shape[-1]).transpose(1, 2)


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors


def _thin_eigenpairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of `rows' rows`; where there are fewer rows than columns, those above rounding alone."""
    if len(rows) >= rows.shape[1]:
        return _eigenpairs(rows.T @ rows)
    values, mixed = torch.linalg.eigh(rows.double() @ rows.double().T)
    kept = values > NULL * values[-1]
    values, mixed = values[kept], mixed[:, kept]
    return values.to(rows), (rows.double().T @ (mixed / values.sqrt())).to(rows)


def _pieces(layer: nn.Module, seen: Seen, row: int) -> Iterator[Seen]:
    """Yield a batch in pieces of which patches and rows, of so many numbers each, can be held at once."""
    inputs = seen.inputs[0].numel()
    if isinstance(layer, nn.Conv2d):
        inputs = layer.weight[0].numel() * seen.gradients[0, 0, 0].numel()
    yield from seen.split(max(1, PIECE // (inputs + len(seen.gradients) * row)))
