"""The eigenvectors of a curvature as orthogonal coordinates, without a matrix of all pairs of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Eigenbasis:
    """Orthogonal coordinates in which G is diagonal; this one, of a diagonal G, changes nothing.

    values: eigenvalues [coefficient], float64, none negative. A basis may span less than the whole space: what lies
    outside (where G is zero) is then a remainder in the old coordinates.
    """

    values: Tensor

    def to(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return coefficients [member, coefficient] and remainder [member, param] (None: none) of [member, param]."""
        return flat, None

    def back(self, coefficients: Tensor, remainder: Tensor | None = None) -> Tensor:
        """Return the flat vectors [member, param] that `to` gave these coordinates."""
        return coefficients


@dataclass
class KroneckerBasis(Eigenbasis):
    """Leaf by leaf `U_B' X U_A` (or `U' x`): the eigenvectors of Kronecker factors.

    vectors: of each leaf, those of the rows and, for matrices, those of the columns.
    """

    vectors: list[list[Tensor]]

    def to(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the coefficients of all leaves, and no remainder."""
        return self._rotate(flat, transposed=True), None

    def back(self, coefficients: Tensor, remainder: Tensor | None = None) -> Tensor:
        """Return the flat vectors of all leaves."""
        return self._rotate(coefficients, transposed=False)

    def _rotate(self, flat: Tensor, transposed: bool) -> Tensor:
        sizes = [len(u) * (len(v[0]) if v else 1) for u, *v in self.vectors]
        parts = []
        for part, vectors in zip(flat.split(sizes, 1), self.vectors, strict=True):
            u, *v = (leaf.to(flat).T if transposed else leaf.to(flat) for leaf in vectors)
            rows = u @ part.reshape(len(part), len(u), -1)
            parts.append((rows @ v[0].T if v else rows).reshape(len(part), -1))
        return torch.cat(parts, 1)


@dataclass
class SpanBasis(Eigenbasis):
    """Coefficients V' x in the span of the eigenvectors with an eigenvalue above zero, and the remainder x - V V' x."""

    vectors: Tensor

    def to(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the coefficients and what is left."""
        vectors = self.vectors.to(flat)
        coefficients = flat @ vectors
        return coefficients, flat - coefficients @ vectors.T

    def back(self, coefficients: Tensor, remainder: Tensor | None = None) -> Tensor:
        """Return the flat vectors; without remainder, those in the span."""
        found = coefficients @ self.vectors.to(coefficients).T
        return found if remainder is None else found + remainder
