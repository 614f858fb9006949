"""Intervals: bootstrap over patients, Wilson, Clopper-Pearson, t, Holm, and the weights of order statistics.

Test cases are resampled by patient; members never are (37 % of them would drop out of a resample, which biases maxima).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import betaincinv, gammaln, ndtri, stdtrit

from .api import Undefined

_DRAW_BLOCK = 64  # draws that are expanded to float64 at once: bounds memory, not the result


@dataclass(frozen=True)
class Interval:
    """Lower and upper end."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A statistic on the sample and on every bootstrap draw.

    draws: float64 [draw], NaN where a draw leaves it undefined; n: patients behind the value.
    """

    value: float
    draws: np.ndarray
    n: int

    def interval(self, level: float = 0.95) -> Interval:
        """Return the percentile interval of the draws, moved so that their mean is the value.

        The move matters for statistics that resampling biases upward (ECE, discrepancy: repeated cases look like
        structure), whose plain percentiles can leave out the estimate itself; a mean's draws are centred already. What
        cannot be negative is cut at 0. NaN ends when over 5 % of the draws are undefined, or there are none.
        """
        defined = self.draws[np.isfinite(self.draws)]
        if not len(defined) or len(defined) < 0.95 * len(self.draws) or not math.isfinite(self.value):
            return Interval(math.nan, math.nan)
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) + (self.value - defined.mean())
        return Interval(max(float(low), 0.0) if defined.min() >= 0 else float(low), float(high))


@dataclass(frozen=True)
class CaseMean:
    """A mean over cases, `sum_i w_i v_i / sum_i w_i`, whose bootstrap is left to the caller.

    values: [sample]; weight: [sample] or None (all 1); 0 masks a case, whose value is then
    ignored, NaN included.
    """

    values: np.ndarray
    weight: np.ndarray | None = None


class PatientBootstrap:
    """Resampling counts of whole patients, drawn once and shared by every metric of an evaluation.

    patient: codes [sample] (any integers) or None, then every sample is its own patient; counts: uint8 [draw, patient],
    rows multinomial with as many trials as there are patients.
    """

    def __init__(self, samples: int, patient: np.ndarray | None, draws: int, seed: int):
        self.samples = samples
        self.singletons = patient is None
        self.index = np.arange(samples) if patient is None else np.unique(patient, return_inverse=True)[1].reshape(-1)
        if len(self.index) != samples:
            raise ValueError(f"{len(self.index)} patient codes for {samples} samples")
        self.patients = int(self.index.max()) + 1 if samples else 0
        self.draws = draws
        rng = np.random.default_rng(seed)
        self.counts = np.zeros((draws, self.patients), np.uint8)
        for row in self.counts:
            row[:] = np.bincount(rng.integers(self.patients, size=self.patients), minlength=self.patients)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.index, kind="stable")
        return order, np.searchsorted(self.index[order], np.arange(self.patients))

    def of_patients(self) -> PatientBootstrap:
        """Return the same draws for values that are given per patient."""
        patients = copy.copy(self)
        patients.samples, patients.index, patients.singletons = self.patients, np.arange(self.patients), True
        return patients

    def by_patient(self, values: np.ndarray) -> np.ndarray:
        """Return sums over each patient's samples: [..., sample] -> [..., patient]."""
        if self.singletons:
            return values
        order, starts = self._order
        return np.add.reduceat(values[..., order], starts, axis=-1)

    def resample(self, sums: np.ndarray) -> np.ndarray:
        """Return the sum over the patients of every draw: [..., patient] -> float64 [draw, ...]."""
        flat = np.asarray(sums, np.float64).reshape(-1, self.patients)
        out = np.empty((self.draws, len(flat)))
        for start in range(0, self.draws, _DRAW_BLOCK):
            block = slice(start, start + _DRAW_BLOCK)
            np.matmul(self.counts[block].astype(np.float64), flat.T, out=out[block])
        return out.reshape(self.draws, *np.shape(sums)[:-1])

    def sample_counts(self, chosen: np.ndarray, block: slice) -> np.ndarray:
        """Return how often each chosen sample stands in each draw of `block`: float32 [chosen, draw]."""
        return np.ascontiguousarray(self.counts[block][:, self.index[chosen]].T, np.float32)

    def blocks(self) -> list[slice]:
        """Return slices that cover the draws."""
        return [slice(s, min(s + _DRAW_BLOCK, self.draws)) for s in range(0, self.draws, _DRAW_BLOCK)]

    def means(self, cases: Sequence[CaseMean]) -> list[Estimate | Undefined]:
        """Return an Estimate per mean over cases, all from one matrix product; Undefined where no case has weight.

        The unit that is resampled is the patient, the mean is over samples: a ratio of two resampled sums.
        """
        if not cases:
            return []
        weight = [np.ones(self.samples) if c.weight is None else np.asarray(c.weight, np.float64) for c in cases]
        values = np.stack([np.where(w > 0, c.values, 0.0) * w for c, w in zip(cases, weight)])
        bottom = self.by_patient(np.stack(weight))
        draws = np.empty((0, 2, len(cases)))
        if self.draws:
            draws = self.resample(np.stack([self.by_patient(values), bottom]))
        out: list[Estimate | Undefined] = []
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = draws[:, 0] / draws[:, 1]
        for j in range(len(cases)):
            total = weight[j].sum()
            if total == 0:
                out.append(Undefined("no case has what the metric needs"))
            else:
                out.append(Estimate(float(values[j].sum() / total), ratio[:, j], int((bottom[j] > 0).sum())))
        return out

    def mean(self, values: np.ndarray, weight: np.ndarray | None = None) -> Estimate:
        """Return the mean over cases with its draws. Raises Undefined when no case has weight."""
        (out,) = self.means([CaseMean(values, weight)])
        if isinstance(out, Undefined):
            raise out
        return out


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of estimates that share their draws: over labels, or over members."""
    first = estimates[0]
    value = first.value + float(np.mean([e.value - first.value for e in estimates]))
    draws = first.draws + np.mean([e.draws - first.draws for e in estimates], axis=0)
    return Estimate(value, draws, max(e.n for e in estimates))


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a binomial share.

    `(s + z^2/2 -+ z sqrt(s (n - s)/n + z^2/4)) / (n + z^2)`; ends are exactly 0 and 1 at 0 and n successes. Raises
    ValueError without trials. Source: Wilson (JASA 1927).
    """
    _check_binomial(successes, trials)
    z = float(ndtri((1 + level) / 2))
    half = z * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    low, high = ((successes + z * z / 2 + sign * half) / (trials + z * z) for sign in (-1, 1))
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == trials else high)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Return the exact two-sided binomial interval; zero flips among M members: upper end `1 - .025^(1/M)`.

    Raises ValueError without trials. Source: Clopper & Pearson (Biometrika 1934).
    """
    _check_binomial(successes, trials)
    tail = (1 - level) / 2
    low = float(betaincinv(successes, trials - successes + 1, tail)) if successes else 0.0
    return Interval(low, _upper(successes, trials, tail))


def clopper_pearson_upper(successes: int, trials: int, level: float = 0.95) -> float:
    """Return the one-sided exact upper bound; zero flips among M members: `1 - .05^(1/M)`.

    Not the upper end of the two-sided interval. Raises ValueError without trials.
    """
    _check_binomial(successes, trials)
    return _upper(successes, trials, 1 - level)


def _upper(successes: int, trials: int, tail: float) -> float:
    return 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - tail))


def _check_binomial(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials have no interval")


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Return the t interval of a mean over base seeds, `mean -+ t_{B-1} sd / sqrt(B)` with ddof 1.

    Raises ValueError for fewer than two values or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"a t interval needs at least two finite values, got {values.tolist()}")
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean() - half), float(values.mean() + half))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return Holm's adjusted p-values in the given order: `max_{j<=i} min(1, (m - j + 1) p_(j))`; NaN stays NaN.

    NaN values are not counted among the m tests. Source: Holm (Scand. J. Statist. 1979).
    """
    p = np.asarray(p_values, np.float64)
    out = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    out[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(order), 0, -1)))
    return out


def order_statistic_weights(members: int, k: int) -> np.ndarray:
    """Return `C(j-1, k-1)/C(K, k)` for j = 1..K: how often the j-th smallest of K is the maximum of a k-subset.

    float64 [member], sums to 1, zero below k; reversed it gives the minimum. Computed by log-gamma. Raises ValueError
    unless 1 <= k <= K.
    """
    if not 1 <= k <= members:
        raise ValueError(f"no subsets of {k} among {members}")
    j = np.arange(k, members + 1)
    log_weights = _log_choose(j - 1, k - 1) - _log_choose(members, k)
    return np.concatenate([np.zeros(k - 1), np.exp(log_weights)])


def miss_probability(members: int, hits: np.ndarray, k: int) -> np.ndarray:
    """Return `C(K - h, k)/C(K, k)`: the chance that a k-subset holds none of h marked members.

    Exactly 1 for h = 0 and 0 for K - h < k. Raises ValueError unless 1 <= k <= K.
    """
    if not 1 <= k <= members:
        raise ValueError(f"no subsets of {k} among {members}")
    rest = members - np.asarray(hits)
    log_share = _log_choose(np.maximum(rest, k), k) - _log_choose(members, k)
    return np.where(rest < k, 0.0, np.exp(log_share))


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    n = np.asarray(n, np.float64)
    return gammaln(n + 1) - gammaln(k + 1.0) - gammaln(n - k + 1)
