"""The Rashomon set of logistic regression, exactly: each test case's viable range of scores, and what a sample misses.

With two classes the score depends on d alone, the difference of the two classes' weights (bias included), and the set
`{d: L_val(d) <= bound}` is convex in it: the ends of a case's range are the maximum and the minimum of x'd over the set
(Watson-Daniels, Parkes, Ustun, AAAI 2023, solve one convex program per case and end).

Where the maximum is attained, `x = mu grad L(d)` and `L(d) = bound`. The search walks on that boundary: from a point of
it along the Newton step of the optimality conditions, then back to the boundary on the ray from the least loss. Every
step raises x'd, for the boundary encloses a convex set there is one maximum, and the last steps converge quadratically.
All cases and both ends go side by side, in coordinates in which the Hessian at the least loss is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .api import Undefined
from .decisions import ambiguous
from .scores import score_range

RESIDUAL = 1e-9
"""Where the search stops: `|x - mu grad L|` over |x|, in the norm of the inverse Hessian: the sine of an angle."""

ACTIVE = 1e-12
"""How well the boundary is met: |L - bound| over bound."""

STEPS, MOVES, HALVINGS = 60, 200, 40
SPANNED = 1e-8
DIRECTIONS = 1e-9
_BLOCK = 1 << 22  # numbers that are worked on at once


@dataclass(frozen=True)
class ExactRanges:
    """The viable range of the second class's score over the whole set, per test case, with its certificate.

    low_logit, high_logit: float64 [sample]; low_multiplier, high_multiplier: [sample], logits by which an end moves out
    per nat of bound (at most, for larger bounds: the ends are concave in it; infinite where the set is one point);
    minimum: the least loss on val, in nats; bound; active: the largest |L - bound| / bound at an end; residual: the
    largest sine of the angle, in the norm of the inverse Hessian, between a case's features and the loss's gradient.
    """

    low_logit: np.ndarray
    high_logit: np.ndarray
    low_multiplier: np.ndarray
    high_multiplier: np.ndarray
    minimum: float
    bound: float
    active: float
    residual: float

    @property
    def low(self) -> np.ndarray:
        """The least probability of the second class, [sample]."""
        return _expit(self.low_logit)

    @property
    def high(self) -> np.ndarray:
        """The largest probability of the second class, [sample]."""
        return _expit(self.high_logit)

    @property
    def width(self) -> np.ndarray:
        """The width of every range, [sample]."""
        return self.high - self.low

    def ambiguous(self, decisions: np.ndarray) -> np.ndarray:
        """Return whether some member of the set decides otherwise than `decisions` [sample] (0 or 1): bool [sample].

        A score of .5 is decided as class 0: ties go to the lowest index.
        """
        return np.where(np.asarray(decisions) == 0, self.high_logit > 0, self.low_logit <= 0)


def viable_ranges(
    features_val: np.ndarray, labels_val: np.ndarray, features_test: np.ndarray, bound: float
) -> ExactRanges:
    """Return the range of every test case's score over `{d: mean_i log(1 + exp(-s_i x_i'd)) <= bound}`.

    features_val, features_test: [sample, feature], with a column of ones for the bias; labels_val: int [sample], 0 or 1
    (s_i = -1 or 1), -1 = missing; bound: nats. Raises Undefined when the set is empty or unbounded (val does not span
    the features of a test case, or separates the classes), or an end is not certified.
    """
    known = np.asarray(labels_val) >= 0
    signs = np.where(np.asarray(labels_val)[known] == 1, 1.0, -1.0)
    val, test = np.asarray(features_val, np.float64)[known], np.asarray(features_test, np.float64)
    if not len(val):
        raise Undefined("no case of val has a label")
    basis = _spanned(val, test)
    signed, wanted = signs[:, None] * (val @ basis), test @ basis
    least, margins = _minimise(signed, basis)
    minimum = float(_losses(margins[None])[0])
    slack = bound - minimum
    if slack < -1e-12 * max(1.0, bound):
        raise Undefined(f"the set is empty: the least loss on val is {minimum:.6g}, above the bound of {bound:.6g}")
    centre = wanted @ least
    if slack <= 1e-14 * max(1.0, bound):
        still = np.full(len(test), np.inf)
        return ExactRanges(centre, centre, still, still, minimum, bound, max(0.0, -slack) / bound, 0.0)
    sigma = _expit(-margins)
    root = np.linalg.cholesky((signed * (sigma * (1 - sigma))[:, None]).T @ signed / len(signed))
    white, directions = np.linalg.solve(root, signed.T).T, np.linalg.solve(root, wanted.T).T
    both = [np.concatenate([directions[b], -directions[b]]) for b in _blocks(white, test)]
    reaches, multipliers, actives, residuals = zip(*(_climb(white, margins, ends, bound) for ends in both))
    reach, multiplier = (np.concatenate([p.reshape(2, -1) for p in ps], axis=1) for ps in (reaches, multipliers))
    active, residual = max(actives), max(residuals)
    if residual > 100 * RESIDUAL or active > 1e-8:
        raise Undefined(f"the ends are not certified: loss off the bound by {active:.1e}, direction by {residual:.1e}")
    low, high = centre - reach[1], centre + reach[0]
    return ExactRanges(low, high, multiplier[1], multiplier[0], minimum, bound, active, residual)


@dataclass(frozen=True)
class Recall:
    """How much of the exact set some members show: see `recall`."""

    coverage: float
    ambiguous: float


def recall(
    scores: np.ndarray, flips: np.ndarray, width: np.ndarray, truly_ambiguous: np.ndarray, k: int | None = None
) -> Recall:
    """Compare accepted members with the exact set, at k by the mean over all k-subsets of the members.

    coverage: mean over cases of the width of the members' range over the exact one, `width` [sample]; ambiguous: share
    of the exactly ambiguous cases, `truly_ambiguous` bool [sample], that some member decides otherwise than the base.
    scores: the members' probability of one class, [member, sample]; flips: bool [member, sample], decided otherwise.
    Raises Undefined for fewer than k members (or none), a set that is one point, or one without ambiguous cases.
    """
    if len(scores) < (k or 1):
        raise Undefined(f"{len(scores)} of {k or 1} accepted")
    wide = width > 0
    if not wide.any():
        raise Undefined("the exact set is one point")
    if not truly_ambiguous.any():
        raise Undefined("no case is ambiguous in the exact set")
    found = score_range(scores, k)[wide] / width[wide]
    seen = ambiguous(flips.sum(axis=0)[truly_ambiguous], len(scores), k)
    return Recall(float(found.mean()), float(seen.mean()))


def violations(
    logits: np.ndarray, ranges: ExactRanges, logit_error: np.ndarray, loss_error: np.ndarray, tolerance: float = 1e-6
) -> np.ndarray:
    """Return how many test cases of each member score outside the exact range: int [member].

    logits: second less first class, [member, sample]; logit_error: how far they may be off, likewise; loss_error:
    [member], how far the members' losses on val may be above what membership was decided on, in nats; tolerance: of the
    score. A member within the bound raised by e has logits beyond an end by at most its multiplier times e.
    """
    out = np.empty(len(logits), np.int64)
    for m, z in enumerate(np.asarray(logits, np.float64)):
        most, fewest = ranges.high_logit + logit_error[m], ranges.low_logit - logit_error[m]
        if loss_error[m] > 0:  # where the set is one point, its multipliers are infinite
            most, fewest = most + loss_error[m] * ranges.high_multiplier, fewest - loss_error[m] * ranges.low_multiplier
        score = _expit(z)
        out[m] = ((score > _expit(most) + tolerance) | (score < _expit(fewest) - tolerance)).sum()
    return out


def rounding_error(logits: np.ndarray) -> np.ndarray:
    """Return the largest error that float16 leaves in logit differences: 2^-11 of their size, 2^-25 near zero."""
    return np.maximum(np.abs(np.asarray(logits, np.float64)) * 2.0**-11, 2.0**-25)


def loss_rounding_error(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the largest error that float16 logits leave in each member's mean loss: float64 [member], nats.

    `mean_i (sigma(-m_i) e_i + e_i^2 / 8)`, m the margins, e the errors of the logits: the loss has slope -sigma(-m) and
    curvature at most 1/4. logits: second less first class, [member, sample]; labels: 0 or 1, -1 = missing.
    """
    known = labels >= 0
    z = np.asarray(logits, np.float64)[:, known]
    error = rounding_error(z)
    return (_expit(np.where(labels[known] == 1, -z, z)) * error + error**2 / 8).mean(axis=1)


def _spanned(val: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return a basis [feature, rank] of what val spans, in which its features are uncorrelated and of mean square 1.

    Raises Undefined where a test case leaves the span.
    """
    _, sizes, rows = np.linalg.svd(val, full_matrices=False)
    kept = sizes > DIRECTIONS * sizes.max()
    basis = rows[kept].T
    outside = np.linalg.norm(test - test @ basis @ basis.T, axis=1) > SPANNED * np.linalg.norm(test, axis=1)
    if outside.any():
        case = int(np.flatnonzero(outside)[0])
        away = test[case] - basis @ (basis.T @ test[case])
        raise Undefined(
            f"the set is unbounded in direction {_named(away)}: val does not span the features of "
            f"{outside.sum()} of {len(test)} test cases"
        )
    return basis / (sizes[kept] / np.sqrt(len(val)))


def _minimise(signed: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of least mean loss and the margins there, by damped Newton.

    Where the classes are separable (by a hyperplane that may touch some cases), every Newton step moves some margin by
    about 1 for ever, though gradient and decrement shrink: the size of the step is what tells.
    """
    weights = np.zeros(signed.shape[1])
    for _ in range(STEPS):
        margins = signed @ weights
        sigma = _expit(-margins)
        hessian = (signed * (sigma * (1 - sigma))[:, None]).T @ signed / len(signed)
        try:
            step = np.linalg.solve(hessian, sigma @ signed / len(signed))
        except np.linalg.LinAlgError:
            break
        if not np.isfinite(step).all():
            break
        size, loss = 1.0, _losses(margins[None])[0]
        while size > 1e-6 and _losses((margins + size * (signed @ step))[None])[0] > loss + 1e-15:
            size /= 2
        weights = weights + size * step
        if np.abs(signed @ step).max() < 1e-9:
            return weights, signed @ weights
    raise Undefined(f"the set is unbounded in direction {_named(basis @ weights)}: it separates the classes of val")


def _climb(
    features: np.ndarray, margins: np.ndarray, directions: np.ndarray, bound: float
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return the maxima of x'e over the set and their multipliers, [direction], and the worst active and residual.

    features: signed, [sample, feature], with the Hessian at e = 0, where the margins are `margins`, the identity.
    """
    size = np.linalg.norm(directions, axis=1)
    slack = bound - float(_losses(margins[None])[0])
    points = _to_boundary(features, margins, directions * (np.sqrt(2 * slack) / size)[:, None], bound)
    multiplier, residual = np.empty(len(points)), np.full(len(points), np.inf)
    going = np.arange(len(points))
    for _ in range(MOVES):
        x, e = directions[going], points[going]
        step, multiplier[going], residual[going] = _newton(features, margins, x, e)
        moving = residual[going] > RESIDUAL
        going, x, e, step = going[moving], x[moving], e[moving], step[moving]
        if not len(going):
            break
        noise = 1e-13 * np.abs((x * e).sum(axis=1)) + 4 * ACTIVE * bound * np.abs(multiplier[going])
        moved, better = _raise(features, margins, x, e, step, bound, noise)
        points[going] = moved
        going = going[better]
        if not len(going):
            break
    active = np.abs(_losses(margins + points @ features.T) - bound).max() / bound
    return (directions * points).sum(axis=1), multiplier, float(active), float(residual.max())


def _newton(
    features: np.ndarray, margins: np.ndarray, x: np.ndarray, e: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps along the boundary [direction, feature], the multipliers and the residuals [direction].

    With g = grad L, H its Hessian, mu = x'H^-1 g / g'H^-1 g and r = x - mu g, the step is H^-1 r times the root of
    g'H^-1 g / x'H^-1 x: Newton's for `x = mu g, L = bound` up to third order, and a way up wherever r is not 0.
    """
    n = len(features)
    sigma = _expit(-(margins + e @ features.T))
    g = -(sigma @ features) / n
    weighted = features.T[None] * (sigma * (1 - sigma) / n)[:, None, :]
    hessian = (weighted.reshape(-1, n) @ features).reshape(len(e), *2 * features.shape[1:])
    solved = np.linalg.solve(hessian, np.stack([x, g], axis=-1))
    xx, xg, gg = ((a * solved[..., i]).sum(axis=1) for a, i in ((x, 0), (x, 1), (g, 1)))
    multiplier = xg / gg
    along = solved[..., 0] - multiplier[:, None] * solved[..., 1]
    rest = ((x - multiplier[:, None] * g) * along).sum(axis=1)
    residual = np.sqrt(np.maximum(rest, 0) / xx)
    # x = mu g also where x'e is least: there the multiplier is negative, and the point is no end of this direction
    return along * np.sqrt(gg / xx)[:, None], multiplier, np.where(multiplier > 0, residual, 1.0)


def _raise(
    features: np.ndarray,
    margins: np.ndarray,
    x: np.ndarray,
    e: np.ndarray,
    step: np.ndarray,
    bound: float,
    noise: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return boundary points with a larger x'e, halving the steps until they are, and which were found.

    noise: [direction], what x'e is uncertain by (the boundary is met to ACTIVE): the last steps gain less than that.
    """
    best, length = e.copy(), np.ones(len(e))
    now, slope = (x * e).sum(axis=1), (x * step).sum(axis=1)
    left = np.arange(len(e))
    for _ in range(HALVINGS):
        trial = _to_boundary(features, margins, e[left] + length[left, None] * step[left], bound)
        fine = (x[left] * trial).sum(axis=1) >= now[left] + 0.1 * length[left] * slope[left] - noise[left]
        best[left[fine]] = trial[fine]
        left = left[~fine]
        if not len(left):
            break
        length[left] /= 2
    better = np.ones(len(e), bool)
    better[left] = False
    return best, better


def _to_boundary(features: np.ndarray, margins: np.ndarray, points: np.ndarray, bound: float) -> np.ndarray:
    """Return where the rays from 0 through `points` [direction, feature] meet the boundary.

    Newton for the length: the loss is convex and rises along a ray, so that from outside it only ever comes closer, and
    from inside the first step leads outside (by a factor of 4 at most).
    """
    along = points @ features.T
    length = np.ones(len(points))
    left = np.arange(len(points))
    for _ in range(STEPS):
        z = margins + length[left, None] * along[left]
        excess = _losses(z) - bound
        far = np.abs(excess) > ACTIVE * bound
        left, z, excess = left[far], z[far], excess[far]
        if not len(left):
            break
        slope = -(_expit(-z) * along[left]).mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = length[left] - excess / slope
        length[left] = np.where(slope > 0, np.clip(wanted, length[left] / 4, length[left] * 4), length[left] * 4)
    return points * length[:, None]


def _blocks(features: np.ndarray, test: np.ndarray) -> Iterator[slice]:
    step = max(1, _BLOCK // (2 * features.size))
    for start in range(0, len(test), step):
        yield slice(start, start + step)


def _losses(margins: np.ndarray) -> np.ndarray:
    """Return the mean of log(1 + exp(-m)) over samples, [..., sample] -> [...]."""
    return (np.log1p(np.exp(-np.abs(margins))) + np.maximum(-margins, 0)).mean(axis=-1)


def _expit(z: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1 + small)


def _named(direction: np.ndarray) -> str:
    """Return the largest parts of a direction in words, "+1.0 feature 3, -0.2 feature 0"."""
    largest = np.argsort(-np.abs(direction), kind="stable")[:3]
    scale = np.abs(direction).max()
    parts = [f"{direction[i] / scale:+.2g} feature {i}" for i in largest if abs(direction[i]) > 0.01 * scale]
    return ", ".join(parts)
