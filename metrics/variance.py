"""Where does the variance of a case's score come from: data resample -> seed -> posterior draw?

A draw of a generator around a base that was trained with some seed on some resample of the data varies for three nested
reasons. Three kinds of sets tell them apart: a generator's sets around bases of several seeds, retrainings on the same
data, and retrainings on bootstrap resamples of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .api import Undefined


@dataclass(frozen=True)
class Component:
    """A mean over cases with its standard error; NaN comes with a reason, a lone NaN `se` with too few members."""

    value: float
    se: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class Decomposition:
    """Components of the variance of a score, in squared probability, mean over cases.

    data, seed, posterior: what each level adds; seed_between_bases: a second estimate of `seed`; covered: `posterior /
    seed`, the share of the retraining variance that sets around one base reach; shares: of data, seed and posterior in
    their sum, a negative data component counted as 0 (only here), NaN where a component is.
    """

    data: Component
    seed: Component
    posterior: Component
    seed_between_bases: Component
    covered: Component
    shares: dict[str, float]


def decompose(posterior: Sequence[np.ndarray], retrained: np.ndarray, resampled: np.ndarray | None) -> Decomposition:
    """Split the variance of the score by the law of total variance, with unbiased estimators (ddof 1).

    posterior: per base a generator's scores [member, sample], bases differing in their seed alone; retrained: scores
    [member, sample] of independent retrainings on the same data; resampled: of retrainings on bootstrap resamples, each
    with its own seed, or None. Scores: the probability of one class, of samples whose class is known.

    `posterior = mean_b Var_m S_bm`; `seed = Var retrained`; `data = Var resampled - seed`, unbiased, so it may be below
    0, and taken to have the same seed variance on a resample as on the data; `seed_between_bases = Var_b(mean_m S_bm) -
    mean_b(Var_m S_bm / K_b)`. Standard errors: jackknife over the bases (over the members where there is one base, over
    the retrainings), those of independent sets combined to first order. Undefined components are NaN with a reason: a
    set of one, no resamples, retrainings that do not differ. Raises ValueError for sets on different cases.

    Source: Efron, Stein (Ann. Statist. 1981) for the jackknife.
    """
    samples = {s.shape[1] for s in (*posterior, retrained, *([] if resampled is None else [resampled]))}
    if len(samples) != 1 or samples == {0}:
        raise ValueError(f"the sets have scores of {sorted(samples)} samples")
    seed = _attempt(lambda: _variance(retrained, "retraining"))
    data = _attempt(lambda: _data(resampled, seed))
    within = _attempt(lambda: _posterior(posterior))
    between = _attempt(lambda: _between_bases(posterior))
    covered = _attempt(lambda: _covered(within, seed))
    return Decomposition(data, seed, within, between, covered, _shares(data, seed, within))


def jackknife_error(left_out: np.ndarray) -> float:
    """Return the jackknife standard error, `sqrt((n-1)/n sum_i (v_-i - mean v_-i)^2)`, from the n values without one.

    left_out: [unit]. Source: Efron, Stein (Ann. Statist. 1981).
    """
    n = len(left_out)
    return float(math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


def _squares(scores: np.ndarray) -> np.ndarray:
    """Return every member's squared deviation from the mean over members, mean over cases: [member]."""
    moved = scores - scores[0]  # about the first member, so that equal members give exactly 0
    moved -= moved.mean(axis=0)
    return np.einsum("ms,ms->m", moved, moved) / scores.shape[1]


def _leave_one_out(squares: np.ndarray) -> np.ndarray:
    """Return the variance without each member: its sum of squares falls by `n/(n-1)` times that member's square."""
    n = len(squares)
    return (squares.sum() - squares * n / (n - 1)) / (n - 2)


def _variance(scores: np.ndarray, what: str) -> Component:
    n = len(scores)
    if n < 2:
        raise Undefined(f"{n} of 2 {what}s accepted")
    squares = _squares(scores)
    return Component(float(squares.sum() / (n - 1)), jackknife_error(_leave_one_out(squares)) if n > 2 else math.nan)


def _data(resampled: np.ndarray | None, seed: Component) -> Component:
    if resampled is None:
        raise Undefined("no retrainings on resampled data")
    total = _variance(resampled, "resampled retraining")
    if seed.reason:
        raise Undefined(seed.reason)
    return Component(total.value - seed.value, math.hypot(total.se, seed.se))


def _sets(posterior: Sequence[np.ndarray]) -> list[Component]:
    if not posterior:
        raise Undefined("no set of a generator")
    return [_variance(scores, "member") for scores in posterior]


def _posterior(posterior: Sequence[np.ndarray]) -> Component:
    sets = _sets(posterior)
    if len(sets) == 1:
        return sets[0]
    values = np.array([s.value for s in sets])
    return Component(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)))


def _between_bases(posterior: Sequence[np.ndarray]) -> Component:
    bases = len(posterior)
    if bases < 2:
        raise Undefined(f"{bases} of 2 bases")
    noise = np.array([s.value for s in _sets(posterior)]) / [len(scores) for scores in posterior]
    squares = _squares(np.stack([scores[0] + (scores - scores[0]).mean(axis=0) for scores in posterior]))
    value = float(squares.sum() / (bases - 1) - noise.mean())
    if bases == 2:
        return Component(value)
    return Component(value, jackknife_error(_leave_one_out(squares) - (noise.sum() - noise) / (bases - 1)))


def _covered(within: Component, seed: Component) -> Component:
    if reason := within.reason or seed.reason:
        raise Undefined(reason)
    if not seed.value > 0:
        raise Undefined("the retrainings do not differ")
    ratio = within.value / seed.value
    return Component(ratio, math.hypot(within.se, ratio * seed.se) / seed.value)


def _shares(data: Component, seed: Component, posterior: Component) -> dict[str, float]:
    parts = {"data": max(data.value, 0.0) if not data.reason else math.nan, "seed": seed.value}
    parts["posterior"] = posterior.value
    total = sum(parts.values())
    return {name: part / total if total > 0 else math.nan for name, part in parts.items()}


def _attempt(compute: Callable[[], Component]) -> Component:
    try:
        return compute()
    except Undefined as reason:
        return Component(math.nan, reason=str(reason))
