"""Rashomon capacity: the information, in bits, that the choice of a member carries about the class of a case.

`cap_i = max_p sum_m p_m KL(S_mi || sum_m p_m S_mi)` (Hsu, Calmon, NeurIPS 2022), the capacity of the channel whose rows
are the members' distributions. For two classes it is a function of the range's two ends and no independent evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from scipy.special import xlogy

from ..identity import derive_seed
from .api import Undefined, register_metric
from .context import Context, class_scores, decide
from .information import divergences

_SOURCE = "Hsu, Calmon (NeurIPS 2022)"
_BLOCK = 1 << 19
_LN2 = np.log(2.0)
_CERTIFICATE = (1e-6 * _LN2, 1e-3)  # gap between the bounds, in nats and relative, that is promised
_TARGET = (1e-11, 1e-7)  # and the one that is aimed at
_RIDGE = 1e-14  # keeps a system solvable that is singular but for rounding; it bends steps, not bounds


def capacity(probabilities: np.ndarray) -> np.ndarray:
    """Return the Rashomon capacity of each sample in bits: float64 [member, sample, class] -> [sample].

    Two classes: closed form in the smallest and largest score. More: interior-point iteration to the certificate
    `I_U - I_L <= max(1e-6, 1e-3 I_U)` bits, `I_L = sum p_m KL_m`, `I_U = max_m KL_m`; their midpoint is returned, 0 for
    equal rows. Raises ArithmeticError where no certificate is reached, ValueError without members. Source: Hsu, Calmon
    (NeurIPS 2022).
    """
    if not len(probabilities):
        raise ValueError("no members, no capacity")
    if probabilities.shape[-1] == 2:
        low, high = probabilities.min(axis=0), probabilities.max(axis=0)
        rare = decide(-(low + high))  # the rarer class, whose score is the more precise
        return binary_capacity(class_scores(low, rare), class_scores(high, rare))
    out = np.empty(probabilities.shape[1])
    step = max(1, _BLOCK // probabilities[:, 0].size)
    for start in range(0, len(out), step):
        block = slice(start, start + step)
        out[block] = _solve(np.ascontiguousarray(probabilities[:, block].swapaxes(0, 1)))
    return out / _LN2


def binary_capacity(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the capacity in bits of two-class scores with the given smallest a and largest b, of any shape.

    `(a H2(b) - b H2(a))/(b-a) + log2(1 + 2^((H2(a)-H2(b))/(b-a)))`, clipped at 0; where `b-a < .02 min(p, 1-p)`,
    p = (a+b)/2, it cancels and is replaced by the quadratic `(b-a)^2/(8 ln2 p(1-p))`.
    """
    a, b = np.asarray(low, np.float64), np.asarray(high, np.float64)
    width, p = b - a, (a + b) / 2
    narrow = width < 0.02 * np.minimum(p, 1 - p)
    empty = width <= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        quadratic = width**2 / (8 * _LN2 * p * (1 - p))
        h_a, h_b = _binary_entropy(a), _binary_entropy(b)
        slope = (h_a - h_b) / width
        exact = (a * h_b - b * h_a) / width + np.logaddexp2(0.0, slope)
    return np.where(empty, 0.0, np.where(narrow, quadratic, np.maximum(exact, 0.0)))


def _binary_entropy(p: np.ndarray) -> np.ndarray:
    return -(xlogy(p, p) + xlogy(1 - p, 1 - p)) / _LN2


@dataclass
class _Bounds:
    """Bounds of the capacity in nats, low and high [sample], and the weights that prove them [sample, member]."""

    low: np.ndarray
    high: np.ndarray
    weights: np.ndarray

    def open(self, absolute: float, relative: float) -> np.ndarray:
        return np.flatnonzero(self.high - self.low > np.maximum(absolute, relative * self.high))


def _solve(rows: np.ndarray) -> np.ndarray:
    """Return certified capacities in nats of rows [sample, member, class]."""
    bounds = _exchange(rows) if rows.shape[1] > 3 * rows.shape[2] else _interior_point(rows)
    for sample in bounds.open(*_CERTIFICATE):
        patient = _interior_point(rows[[sample]], iterations=1000, step=0.8, centring=0.5)
        if len(patient.open(*_CERTIFICATE)):
            gap = (patient.high[0] - patient.low[0]) / _LN2
            raise ArithmeticError(f"no certified capacity: bounds {gap:.2g} bits apart after 1000 iterations")
        bounds.low[sample], bounds.high[sample] = patient.low[0], patient.high[0]
    return (bounds.low + bounds.high) / 2


def _exchange(rows: np.ndarray, rounds: int = 12, entering: int = 2) -> _Bounds:
    """Solve for the few members that matter: start from each class's highest, let the most distant ones enter.

    An optimum needs no more members than classes; the bounds hold for all members, whose divergences are all computed.
    """
    n, members = rows.shape[:2]
    out = _Bounds(np.zeros(n), np.full(n, np.inf), np.zeros((n, 0)))
    active, chosen = np.arange(n), rows.argmax(axis=1)
    for _ in range(rounds):
        few = np.take_along_axis(rows, chosen[..., None], axis=1)
        bounds = _interior_point(few)
        kl = np.maximum(divergences(rows, _mixture(few, bounds.weights)[:, None]), 0.0)
        out.low[active] = np.maximum(out.low[active], bounds.low)
        out.high[active] = np.minimum(out.high[active], np.maximum(kl.max(axis=1), bounds.low))
        going = out.high[active] - out.low[active] > np.maximum(_TARGET[0], 10 * _TARGET[1] * out.high[active])
        if not going.any():
            break
        far = np.argpartition(kl[going], members - entering, axis=1)[:, -entering:]
        rows, active, chosen = rows[going], active[going], np.concatenate([chosen[going], far], axis=1)
    return out


def _mixture(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return `sum_m p_m S_m`, exact for equal rows: [sample, member, class], [sample, member] -> [sample, class]."""
    return rows[:, 0] + np.einsum("nm,nmc->nc", weights, rows - rows[:, :1])


def _interior_point(rows: np.ndarray, iterations: int = 60, step: float = 0.99, centring: float = 0.1) -> _Bounds:
    """Maximise `I(p)` over the simplex for all samples at once.

    Primal-dual: p > 0 the weights, s > 0 the slacks of `KL_m <= nu`, p_m s_m driven to 0. With X = rows - q, whose rows
    sum to 0, the Newton system is `(X diag(1/q) X' + diag(s/p)) dp = KL + mu/p - nu`, `sum dp = 0`.
    """
    n, members, _ = rows.shape
    out = _Bounds(np.zeros(n), np.full(n, np.inf), np.full((n, members), 1.0 / members))
    active = np.arange(n)
    p = out.weights.copy()
    slack, nu = np.zeros_like(p), np.zeros(n)
    for iteration in range(iterations):
        q = _mixture(rows, p)
        kl = np.maximum(divergences(rows, q[:, None]), 0.0)
        low, high = (p * kl).sum(axis=1), kl.max(axis=1)
        better = high - low < out.high[active] - out.low[active]
        out.low[active[better]], out.high[active[better]] = low[better], high[better]
        out.weights[active[better]] = p[better]
        if iteration == 0:
            slack, nu = 2.0 * high[:, None] - kl, 2.0 * high
        going = out.high[active] - out.low[active] > np.maximum(_TARGET[0], _TARGET[1] * out.high[active])
        going &= (p * slack).sum(axis=1) > 1e-9 * high  # nothing but rounding is left beyond this
        if not going.any():
            break
        rows, p, slack, nu, q, kl, active = (a[going] for a in (rows, p, slack, nu, q, kl, active))
        p, slack, nu = _newton_step(rows, p, slack, nu, q, kl, step, centring)
    return out


def _newton_step(rows, p, slack, nu, q, kl, step, centring):
    """Return the next weights, slacks and multiplier; see `_interior_point`."""
    mu = centring * (p * slack).mean(axis=1, keepdims=True)
    x = (rows - q[:, None]) / np.sqrt(np.where(q > 0, q, 1.0))[:, None]
    right = np.stack([kl + mu / p, np.ones_like(p)], axis=-1)
    solved = _solve_low_rank(x, slack / p, right)
    new_nu = solved[..., 0].sum(axis=1) / solved[..., 1].sum(axis=1)
    dp = solved[..., 0] - new_nu[:, None] * solved[..., 1]
    ds = (mu - slack * dp) / p - slack
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.minimum(
            np.where(dp < 0, -p / dp, np.inf).min(axis=1), np.where(ds < 0, -slack / ds, np.inf).min(axis=1)
        )
    length = np.minimum(1.0, step * room)[:, None]
    p = p + length * dp
    return p / p.sum(axis=1, keepdims=True), slack + length * ds, nu + length[:, 0] * (new_nu - nu)


def _solve_low_rank(x: np.ndarray, diagonal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve `(x x' + diag(d)) z = right` per sample, in the smaller dimension of x [sample, member, class]."""
    members, classes = x.shape[1:]
    transposed = x.swapaxes(1, 2)
    if members <= classes:
        matrix = x @ transposed
        matrix[:, np.arange(members), np.arange(members)] += (
            diagonal + _RIDGE * np.trace(matrix, axis1=1, axis2=2)[:, None]
        )
        return np.linalg.solve(matrix, right)
    scaled = x / diagonal[..., None]
    plain = right / diagonal[..., None]
    inner = transposed @ scaled
    inner[:, np.arange(classes), np.arange(classes)] += 1.0 + _RIDGE * np.trace(inner, axis1=1, axis2=2)[:, None]
    return plain - scaled @ np.linalg.solve(inner, transposed @ plain)


def subsets(members: int, k: int, seed: int, count: int = 50) -> np.ndarray:
    """Return `count` seeded k-subsets of the members, int [subset, k]; all of them when there are no more than that.

    Raises ValueError unless 1 <= k <= K.
    """
    if not 1 <= k <= members:
        raise ValueError(f"no subsets of {k} among {members}")
    if comb(members, k) <= count:
        return np.array(list(combinations(range(members), k)))
    rng = np.random.default_rng(derive_seed(seed, "k-subsets", members, k))
    return np.sort(np.argsort(rng.random((count, members)), axis=1)[:, :k], axis=1)


def _capacities(context: Context, k: int | None) -> np.ndarray:
    """Return the capacities [subset, sample] of the whole set (one row) or of its k-subsets."""

    def make() -> np.ndarray:
        p = context.probabilities
        chosen = [p] if k is None else (p[members] for members in subsets(context.size, k, context.seed))
        try:
            return np.stack([capacity(members) for members in chosen])
        except ArithmeticError as error:
            raise Undefined(str(error)) from error

    return context.once(f"capacities@{k}", make)


@register_metric("capacity", direction="neither", level="set", unit="bits", citation=_SOURCE, at_k=True)
def _capacity(context: Context, k: int | None) -> np.ndarray:
    """Mean Rashomon capacity in bits (two classes: a function of the range's ends)."""
    return _capacities(context, k).mean(axis=0)


@register_metric("capacity_effective", direction="neither", level="set", unit="verdicts", citation=_SOURCE, at_k=True)
def _capacity_effective(context: Context, k: int | None) -> np.ndarray:
    """Mean of 2^capacity: the effective number of verdicts about a case."""
    return (2.0 ** _capacities(context, k)).mean(axis=0)
