"""The exact full GGN by the dual: with the rows B of `G = B' B`, B B' has the same eigenvalues and can be far smaller.

One eigendecomposition of the smaller of B B' and G gives all eigenvectors of G with an eigenvalue above zero (Dangel,
Tatzel, Hennig, TMLR 2022); draws and evidence then follow in closed form.
"""

from __future__ import annotations

import torch
from scipy.optimize import brentq
from torch import Tensor

from .api import Problem
from .jacobian import root_rows, rows_per_image
from .prior import HIGH, LOW

FULL_LIMIT = 2**30
"""Bytes of the eigenvectors of the full GGN (float32) beyond which it is not fitted."""

NULL = 1e-12
"""Share of the largest eigenvalue below which one is rounding: Jacobians are float32, eigenvalues their squares."""


def fit_full(problem: Problem, names: list[str]) -> dict[str, Tensor]:
    """Return the exact GGN on train as `values` [rank] float64 and `vectors` [param, rank], and what follows from them.

    Eigenvectors q of B B' with eigenvalue l give those of G = B' B: `v = B' q / sqrt(l)`.
    """
    weights = flat_weights(problem, names)
    size, total = len(weights), rows_per_image(problem) * len(problem.train)
    if total >= size:
        gram = torch.zeros(size, size, dtype=torch.float64, device=problem.device)
        for rows in root_rows(problem, names, problem.train):
            rows = rows.double()
            gram += rows.T @ rows
        values, vectors = _above_zero(gram)
        vectors = vectors.to(weights)
    else:
        root, filled = weights.new_empty(total, size), 0
        for rows in root_rows(problem, names, problem.train):
            root[filled : filled + len(rows)] = rows
            filled += len(rows)
        columns = root.split(4096, 1)  # in float64 the whole would take three times the memory
        gram = torch.zeros(total, total, dtype=torch.float64, device=problem.device)
        for some in columns:
            gram += some.double() @ some.double().T
        values, mixed = _above_zero(gram)
        mixed /= values.sqrt()
        vectors = torch.cat([(some.double().T @ mixed).to(weights) for some in columns])
    return {
        "values": values,
        "vectors": vectors,
        **told_by(values, weights),
    }


def told_by(values: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return what the eigenvalues of G (zeros may be left out) and flat weights w* tell of every curvature.

    diagonal_mean: of G; marglik: the prior precision that maximises the evidence.
    """
    precision = evidence_precision(values, float(weights.double().square().sum()))
    return {"diagonal_mean": values.sum() / len(weights), "marglik": torch.tensor(precision, dtype=torch.float64)}


def flat_weights(problem: Problem, names: list[str]) -> Tensor:
    """Return the base's leaves `names` as one vector [param]."""
    return torch.cat([problem.base.params[n].detach().reshape(-1) for n in names])


def evidence_precision(values: Tensor, squared_norm: float) -> float:
    """Return the prior precision a that maximises the Laplace evidence, within the range that is ever tried.

    `log Z = 1/2 sum log(a / (l + a)) - 1/2 a |w*|^2` over the eigenvalues l of G is stationary where
    `a |w*|^2 = sum l / (l + a)` (MacKay 1992, eq. 4.22); the difference falls with a, so that this is the one maximum.
    """

    def slope(exponent: float) -> float:
        a = 10**exponent
        return float((values / (values + a)).sum()) - a * squared_norm

    if slope(LOW) <= 0 or slope(HIGH) >= 0:
        return 10.0 ** (LOW if slope(LOW) <= 0 else HIGH)
    return 10 ** brentq(slope, LOW, HIGH, xtol=1e-12)


def _above_zero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues above rounding of a positive semi-definite matrix, and their eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > NULL * values[-1]
    return values[kept], vectors[:, kept]
