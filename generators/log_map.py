"""The logarithmic map of a quadratic loss: the velocity with which a geodesic of its surface ends at a Laplace draw.

A geodesic with a Laplace draw d as its *velocity* ends short of d, most of all where the loss is steep: such members
are too narrow a sample, even for a Gaussian target and endless data. Yu, Hartmann, Williams, Girolami, Klami (AISTATS
2024, arXiv 2311.02766, RLA-BLog) start with v = Log(d) instead: the geodesic c(0) = 0, c'(0) = v on the surface
y = tau L of the quadratic model L(c) = c'Qc/2 ends at c(1) = d. They find v with a solver of boundary value problems.

Here it is the maximum of a concave function of one function of time. Free motion on the surface is

    c'' = -tau^2 k(t) Q c,   l'' = k(t),   l = c'Qc/2                      (l: the loss; k: how the surface holds)

so that along an eigenvector c_i = d_i s(t; q) / s(1; q), with s'' = -tau^2 k q s, s(0) = 0, s'(0) = 1 the one solution
for its eigenvalue q, and v_i = d_i / s(1; q). For a given k the two equations minimise
`1/2 int |c'|^2 + tau^2 l'^2 + tau^2 k (2 l - c'Qc) dt`, as long as s(t; q) > 0 for 0 < t <= 1 and all q. The minimum is

    tau^2 D(k) + constant,   D(k) = 1/2 int k t sum_i q_i d_i (d_i - c_i) dt
                                    - 1/2 int int k(t) min(t, u) (1 - max(t, u)) k(u) dt du,

concave in k, and stationary where l = c'Qc/2. A shortest path stays in the orthant of d (its mirror image would be as
short), and that is s > 0: D has a maximum, which Newton's method finds from anywhere, and the path is *the* shortest.

The path is made a polyline (D is then that of the polyline's energy, and as concave), and most of many eigenvalues are
lumped. Deferred correction removes both errors: `v <- v - dLog (Exp(v) - d)`, with the polyline's derivative dLog.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dormand_prince import DormandPrince
from .eigenbasis import Eigenbasis
from .geodesic import dot

CHORDS = 64
CORRECTIONS, ACCURACY = 6, 1e-6
NEWTON, HALVINGS, CONVERGED = 60, 40, 1e-13

FLOORS = 1.0, 1e-2, 1e-4, 1e-6, 1e-8
"""What keeps s(1; q) above zero is the component of d along the stiffest eigenvector: where that is next to nothing,
D is maximised for larger ones first, down to these shares of the loss. They only lead the way."""

TOP, BELOW, DECADES = 128, 128, 8
"""Eigenvalues that stand for all, where there are many: the largest, and a geometric sequence below them."""

MEMBERS, COEFFICIENTS = 256, 2**17
"""Most members, and most coefficients of members, treated at once."""


def log_map(basis: Eigenbasis, deviation: Tensor, tau: float, extra: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return v = Log(d) [member, param] for deviations d [member, param], and by how much Exp(v) misses d [member].

    Q is the basis's curvature, plus `extra` in every direction (the prior, where it is in the metric). The miss is
    |Exp(v) - d| / |d|, or the same in the norm sqrt(x'Qx), which is what the loss sees, whichever is larger; Exp is a
    tight integration that has nothing in common with the way to v. A member whose miss is not small has no usable v;
    none was met among draws from N(0, (Q + a)^-1) with tau <= 1 and eigenvalues up to 1e5. Where d is *exactly* zero
    along a stiff eigenvector and the shortest paths go around on either side, the geodesic that is found is a longer
    one, if any. All in float64; v has the dtype of d.
    """
    goal, remainder = basis.to(deviation.double())
    values = basis.values.to(goal) + extra
    if remainder is not None:  # one more direction, whose eigenvalue is `extra`
        goal = torch.cat([goal, torch.linalg.vector_norm(remainder, dim=1, keepdim=True)], 1)
        values = torch.cat([values, values.new_tensor([extra])])
    if tau * values.amax() == 0:
        return deviation.clone(), goal.new_zeros(len(goal))
    some = max(1, min(MEMBERS, COEFFICIENTS // len(values)))
    velocity, missed = (torch.cat(p) for p in zip(*(_log(values, g, tau) for g in goal.split(some)), strict=True))
    if remainder is not None:
        remainder = remainder * torch.where(goal > 0, velocity / goal, 1.0)[:, -1:]
        velocity = velocity[:, :-1]
    return basis.back(velocity, remainder).to(deviation.dtype), missed


def _log(values: Tensor, goal: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return v [member, value] for d = goal [member, value] where Q = diag(values), and the miss [member]."""
    exact = DormandPrince(rtol=1e-9, atol=0.0, max_steps=20000)
    nodes, share = _nodes(values)
    path = _Polyline(_times(values, goal, tau), nodes, tau)
    pull = path.maximise(goal.square() @ share)
    velocity, derivative = path.log(pull, goal, values, share)
    best, least = velocity, goal.new_full((len(goal),), torch.inf)
    for _ in range(1 + CORRECTIONS):
        end = exact.solve(_Quadratic(values), tau, torch.zeros_like(goal), velocity)
        missed = torch.where(end.reached, _miss(values, end.weights, goal), torch.inf)
        best = torch.where((missed < least)[:, None], velocity, best)
        least = torch.minimum(least, missed)
        if bool((least <= ACCURACY).all()):
            break
        velocity = velocity - derivative(end.weights - goal)
    return best, least


def _miss(values: Tensor, found: Tensor, goal: Tensor) -> Tensor:
    """Return the larger of the relative errors [member] in |x| and in sqrt(x'Qx)."""
    squares = lambda x: torch.stack([dot(x, x), dot(x, values * x)])  # noqa: E731
    error, size = squares(found - goal), squares(goal)
    return torch.where(size > 0, error / size, error).sqrt().amax(0)


def _nodes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [node] that stand for all, and each one's shares in two of them [value, node].

    A function of the eigenvalue is thereby interpolated linearly.
    """
    known = values.unique()
    nodes = [values.new_zeros(1), known[-TOP:]]
    if len(known) > TOP:
        nodes.append(known[-TOP] * 10 ** torch.linspace(-DECADES, 0, BELOW).to(values))
    at = torch.cat(nodes).unique()
    right = torch.searchsorted(at, values).clamp(min=1)
    weight = (values - at[right - 1]) / (at[right] - at[right - 1])
    share = values.new_zeros(len(values), len(at))
    share.scatter_(1, right[:, None], weight[:, None]).scatter_(1, right[:, None] - 1, 1 - weight[:, None])
    return at, share


def _times(values: Tensor, goal: Tensor, tau: float) -> Tensor:
    """Return the times of the corners [member, chord + 1], which grow in proportion away from either end.

    Near the bottom of the valley a path bends within a time of (1 + tau^2 |Q c|^2) / (tau |Q v|): at its start, and
    where d is low again at its end. No path is longer than the parabola above the straight line, which bounds |v|.
    """
    length = (dot(goal, goal) + (tau * 0.5 * dot(goal, values * goal)) ** 2).sqrt()
    slope = tau * torch.linalg.vector_norm(values * goal, dim=1)
    bends = torch.stack([torch.ones_like(slope), 1 + slope**2], 1) / (1 + tau * values.amax() * length)[:, None]
    shortest = 2 * bends.clamp(max=1)[:, :, None]
    grid = torch.linspace(0, 1, CHORDS // 2 + 1).to(goal)
    halves = 0.5 * shortest * torch.sinh(grid * torch.asinh(1 / shortest))
    return torch.cat([halves[:, 0, :-1], 1 - halves[:, 1].flip(1)], 1)


class _Polyline:
    """D of polylines with corners at `times` [member, chord + 1], for eigenvalues `nodes`; pulls k [member, inner].

    step: the time of each chord; mass: that of each inner corner; green: the kernel of -d^2/dt^2 between inner corners.
    Weights [member, node] are the d_i^2 of all eigenvectors, summed over those that a node stands for.
    """

    def __init__(self, times: Tensor, nodes: Tensor, tau: float) -> None:
        self.nodes, self.tau = nodes, tau
        self.step, self.inner = times.diff(dim=1), times[:, 1:-1]
        self.mass = 0.5 * (self.step[:, 1:] + self.step[:, :-1])
        row, column = self.inner[:, :, None], self.inner[:, None]
        self.green = torch.minimum(row, column) * (1 - torch.maximum(row, column))

    def shape(self, pull: Tensor, values: Tensor, backwards: bool = False) -> Tensor:
        """Return s [member, chord + 1, value]; backwards, the solution with s(1) = 0, s'(1) = -1."""
        step, force = self.step, self.tau**2 * self.mass * pull
        if backwards:
            step, force = step.flip(1), force.flip(1)
        slope = values.new_ones(len(pull), len(values))
        points = [torch.zeros_like(slope), step[:, :1] * slope]
        for m in range(1, step.shape[1]):
            slope = slope - force[:, m - 1, None] * values * points[-1]
            points.append(points[-1] + step[:, m, None] * slope)
        return torch.stack(points[::-1] if backwards else points, 1)

    def value(self, pull: Tensor, weight: Tensor) -> Tensor:
        """Return D [member]; -inf outside of its domain."""
        shape, load = self.shape(pull, self.nodes), self.mass * pull
        short = _times_vector(1 - shape[:, 1:-1] / shape[:, -1:], weight * self.nodes)
        found = 0.5 * dot(load * self.inner, short) - 0.5 * dot(load, _times_vector(self.green, load))
        return torch.where((shape[:, 1:] > 0).all(2).all(1), found, -torch.inf)

    def gradient(self, pull: Tensor, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return dD/dk [member, inner] and the inverse of -d^2D/dk^2."""
        shape, back = (self.shape(pull, self.nodes, backwards)[:, 1:] for backwards in (False, True))
        end, inner, back = shape[:, -1:], shape[:, :-1], back[:, :-1]
        squares = (inner / end) ** 2
        loss = 0.5 * (weight @ self.nodes)[:, None] * self.inner - _times_vector(self.green, self.mass * pull)
        above = self.mass * (loss - 0.5 * _times_vector(squares, weight * self.nodes))
        upper = (squares * (weight * self.nodes**2)[:, None] @ (inner * back / end).mT).triu()
        hessian = self.green + self.tau**2 * (upper + upper.triu(1).mT)
        scale = hessian.diagonal(dim1=1, dim2=2).rsqrt()
        scaled, scale = hessian * scale[:, :, None] * scale[:, None], scale / self.mass
        return above, lambda x: scale * torch.linalg.solve(scaled, (scale * x)[:, :, None])[:, :, 0]

    def maximise(self, weight: Tensor) -> Tensor:
        """Return the k [member, inner] where D is largest, by Newton's method with step lengths of its own."""
        pull = torch.zeros_like(self.mass)
        loss = weight @ self.nodes / self.nodes[-1]
        for floor in [f for f in FLOORS if bool((weight[:, -1] < f * loss).any())] + [0.0]:
            raised = weight.clone()
            raised[:, -1] = torch.maximum(weight[:, -1], floor * loss)
            for _ in range(NEWTON):
                before = self.value(pull, raised)
                gradient, solve = self.gradient(pull, raised)
                step = solve(gradient)
                rise, length = dot(step, gradient), torch.ones_like(before)
                for _ in range(HALVINGS):
                    better = self.value(pull + length[:, None] * step, raised) >= before + 0.1 * length * rise
                    better |= rise <= CONVERGED * before.abs()
                    if bool(better.all()):
                        break
                    length = torch.where(better, length, 0.5 * length)
                pull = pull + length[:, None] * step
                if bool((rise <= (0.01 if floor else CONVERGED) * before.abs()).all()):
                    break
        return pull

    def log(
        self, pull: Tensor, goal: Tensor, values: Tensor, share: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return v [member, value] at the maximum for d = goal, and its derivative by d."""
        shape, back = (self.shape(pull, values, backwards)[:, 1:] for backwards in (False, True))
        end, inner, product = shape[:, -1], shape[:, :-1], shape[:, :-1] * back[:, :-1]
        squares = (inner / end[:, None]) ** 2
        solve = self.gradient(pull, goal.square() @ share)[1]

        def derivative(change: Tensor) -> Tensor:
            along = values * goal * change
            changed = solve(self.mass * (self.inner * along.sum(1, keepdim=True) - _times_vector(squares, along)))
            bent = -(self.tau**2) * values * _times_vector(product.mT, self.mass * changed)
            return (change - goal / end * bent) / end

        return goal / end, derivative


def _times_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrix [member, row, column] times vector [member, column]."""
    return (matrix @ vector[:, :, None])[:, :, 0]


@dataclass
class _Quadratic:
    """The surface L(c) = 1/2 sum_i q_i c_i^2."""

    values: Tensor

    def __post_init__(self) -> None:
        self.size = len(self.values)

    def value(self, weights: Tensor) -> Tensor:
        return 0.5 * dot(weights, self.values * weights)

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(weights), self.values * weights

    def curvature(self, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.gradient(weights), dot(direction, self.values * direction)
