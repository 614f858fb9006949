"""Diagonal and Kronecker-factored curvatures of our own, for what laplace-torch cannot fit or fits slowly.

They cover BatchNorm and GroupNorm (affine parameters included), cross-entropy and multi-label loss, at a few forward
and backward passes over train. *diag*: `sum_i sum_r B_ir^2` over the rows of `G = B' B`, exact or drawn, in memory that
does not grow with classes times weights. *kron*: KFAC for layers that share weights over R positions (Eschenhagen,
Immer, Turner, Schneider, Hennig, NeurIPS 2023): with inputs a and gradients g of the outputs, over N images

    expand   G_l = 1 / (N R) (sum a a') (x) (sum g g'),   sums over images and positions (Grosse, Martens 2016)
    reduce   G_l = 1 / N (sum a_ a_') (x) (sum g_ g_'),   a_ the mean and g_ the sum over positions

The sum of a a' of a convolution of stride 1 comes from spectra of its inputs, without patches (`patch_moments`).
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
from .patch_moments import PatchMoments, spectrum_pays

KFAC_APPROXIMATIONS = ("expand", "reduce")
FACTOR_LIMIT = 10_000
"""Rows of a Kronecker factor above which its eigenvectors take too long."""

BLOCK = 256
"""Rows of a symmetric matrix that are added up together, up to its diagonal."""

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
            own.add(batch[name.rpartition(".")[0]])
    return factors


@dataclass
class Factors:
    """Second moments over train for one leaf: of gradients (of rows, for a norm layer), and of inputs for a matrix.

    inputs: with `expand`, what their second moment is made of, spectra where that takes fewer multiplications.
    vectors: with `reduce`, the mean inputs themselves, which may be fewer than a second moment has rows.
    """

    layer: nn.Module
    leaf: str
    approximation: str
    gradients: Tensor | None = None
    inputs: PatchMoments | _DirectMoments | None = None
    vectors: list[Tensor] = field(default_factory=list)
    positions: int = 1

    def add(self, seen: Seen) -> None:
        """Add a batch."""
        matrix = self.leaf == "weight" and isinstance(self.layer, WEIGHTED)
        for piece in _pieces(self.layer, seen, seen.gradients[0, 0].numel()):
            self._add_gradients(piece)
            if matrix and self.approximation == "reduce":
                self.vectors.append(_patches(self.layer, piece.inputs).mean(2))
        if matrix and self.approximation == "expand":
            self.positions = self._by_position(seen.gradients).shape[2]
            if self.inputs is None:
                self.inputs = _moments_of(self.layer, seen.inputs)
            self.inputs.add(seen.inputs)

    def matrices(self) -> list[Tensor]:
        """Return the second moments summed over images: of gradients and, of a matrix with `expand`, of inputs.

        That of gradients is the sum over positions, that of inputs the mean.
        """
        assert self.gradients is not None
        return [self.gradients] + ([] if self.inputs is None else [self.inputs.matrix().div_(self.positions)])

    def eigenpairs(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Return eigenvalues and eigenvectors of the outputs' factor and, for a matrix, of the inputs'."""
        outputs, *inputs = self.matrices()
        if self.vectors:
            return [_eigenpairs(outputs), _thin_eigenpairs(torch.cat(self.vectors) / images**0.5)]
        return [_eigenpairs(outputs), *(_eigenpairs(matrix.div_(images)) for matrix in inputs)]

    def _add_gradients(self, seen: Seen) -> None:
        if isinstance(self.layer, WEIGHTED):
            rows = self._by_position(seen.gradients)
            rows = (rows.sum(2) if self.approximation == "reduce" else rows).flatten(0, -2)
        else:
            rows = leaf_rows(self.layer, self.leaf, seen).flatten(0, 1)
        self.gradients = rows.T @ rows if self.gradients is None else self.gradients.addmm_(rows.T, rows)

    def _by_position(self, gradients: Tensor) -> Tensor:
        """Return gradients as [row, sample, position, output]."""
        if isinstance(self.layer, nn.Conv2d):
            return gradients.flatten(3).transpose(2, 3)
        return gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])


class _DirectMoments:
    """`sum a a'` over images and positions, a what a layer's weights see; blocks above the diagonal are left out."""

    def __init__(self, layer: nn.Module, inputs: Tensor):
        self.layer, one = layer, _patches(layer, inputs[:1])
        self.images = max(1, PIECE // one.numel())
        self.lower = one.new_zeros(one.shape[1], one.shape[1])

    def add(self, inputs: Tensor) -> None:
        """Add inputs [sample, ...]."""
        for some in inputs.split(self.images):
            vectors = _patches(self.layer, some).transpose(0, 1).flatten(1)
            for start in range(0, len(vectors), BLOCK):
                own, end = vectors[start : start + BLOCK], start + BLOCK
                self.lower[start:end, :end].addmm_(own, vectors[:end].T)

    def matrix(self) -> Tensor:
        """Return what was added [input, input]."""
        return self.lower.tril() + self.lower.tril(-1).T


def _moments_of(layer: nn.Module, inputs: Tensor) -> PatchMoments | _DirectMoments:
    """Return the empty second moments of a layer's inputs, to which inputs of this shape can be added."""
    if isinstance(layer, nn.Conv2d) and spectrum_pays(layer, *inputs.shape[2:]):
        return PatchMoments(layer, inputs)
    return _DirectMoments(layer, inputs)


def _patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the weights of a layer see at every position, [sample, input, position]."""
    if isinstance(layer, nn.Conv2d):
        return input_patches(layer, inputs)
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
