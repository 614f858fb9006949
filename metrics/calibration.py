"""Does a network know when it is wrong: calibration error, parts of the Brier score, temperature, risk and coverage.

Each is computed for several networks at once, probabilities float64 [model, sample, class]; for the ensemble, hand in
`ensemble[None]`. Samples without a label are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, entr, logsumexp

from .api import PerMember, Undefined, register_metric
from .context import Context, Models, class_scores, decide, softmax
from .intervals import CaseMean
from .performance import ECE_BINS, errors
from .scores import mutual_information

NORMS = ("l1", "l2", "max")

TEMPERATURES = (0.01, 100.0)
"""Least and largest temperature that is fitted."""


def calibration_error(
    context: Context,
    probabilities: np.ndarray,
    bins: int = ECE_BINS,
    norm: str = "l1",
    adaptive: bool = False,
    classwise: bool = False,
) -> PerMember:
    """Return every network's calibration error, and on the bootstrap draws: [model, sample, class] -> PerMember.

    With gap_b = share of right answers - mean confidence in bin b, which holds n_b of n samples: l1 `sum_b n_b/n
    |gap_b|`, l2 `sqrt(sum_b n_b/n gap_b^2)`, max `max_b |gap_b|` over bins that hold a sample; l1 <= l2 <= max. Bins:
    `(j/bins, (j+1)/bins]`, or if `adaptive` of equal mass n/bins: cases of one confidence are shared out evenly where
    an edge falls among them, so that neither masses nor values depend on the order of the cases. `classwise`: the same
    of the probability of each class, whether or not it is decided, mean over the classes (two classes: the positive
    one, of which the other is the mirror image).

    Draws keep the bins of the sample. The estimate is biased upward: a calibrated network with confidences p has about
    `sum_b sqrt(2/pi sum_{i in b} p_i (1 - p_i)) / n` in l1, not 0. Raises ValueError for bins under 1 and an unknown
    norm, Undefined when no sample has a label.

    Sources: Guo et al. (ICML 2017), l1 and max; Kumar, Liang, Ma (NeurIPS 2019), l2; Nguyen, O'Connor (EMNLP 2015),
    bins of equal mass; Kull et al. (NeurIPS 2019), classwise.
    """
    if bins < 1 or norm not in NORMS:
        raise ValueError(f"no calibration error with {bins} bins and norm '{norm}': norms are {', '.join(NORMS)}")
    known = _known(context.labels)
    b = context.bootstrap
    values, draws = np.empty(len(probabilities)), np.empty((b.draws, len(probabilities)))
    for m, p in enumerate(probabilities):
        of_sample, of_draws = [], []
        for score, outcome in _forecasts(p, context, classwise):
            share = np.zeros((bins, b.samples))
            share[:, known] = (_equal_mass if adaptive else _equal_width)(score[known], bins)
            held = share[share.any(axis=1)]
            mass = held.sum(axis=0, keepdims=True) if norm == "l1" else held  # l1 needs the total alone
            sums = b.by_patient(np.concatenate([held * (outcome - score), mass]))
            of_sample.append(_norm(sums.sum(axis=-1), len(held), norm))
            of_draws.append(_norm(b.resample(sums), len(held), norm))
        values[m], draws[:, m] = np.mean(of_sample, axis=0), np.mean(of_draws, axis=0)
    return PerMember(values, draws)


def _known(labels: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise Undefined("no sample has a label")
    return known


def _forecasts(p: np.ndarray, context: Context, classwise: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return forecasts and what happened, [sample] each: of the decided class, or of every class."""
    if not classwise:
        decided = decide(p)
        return [(class_scores(p, decided), (decided == context.labels).astype(np.float64))]
    classes = [context.positive] if context.classes == 2 else range(context.classes)
    return [(p[:, c], (context.labels == c).astype(np.float64)) for c in classes]


def _bin_numbers(scores: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(scores * bins).astype(int) - 1, 0, bins - 1)


def _equal_width(scores: np.ndarray, bins: int) -> np.ndarray:
    """Return how much of each sample is in each bin, [bin, sample]."""
    return (_bin_numbers(scores, bins) == np.arange(bins)[:, None]).astype(np.float64)


def _equal_mass(scores: np.ndarray, bins: int) -> np.ndarray:
    """Return how much of each sample is in each bin, [bin, sample]: rows sum to n/bins, ties are treated alike."""
    _, tied, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    edges = np.linspace(0.0, len(scores), bins + 1)[:, None]
    overlap = np.minimum(edges[1:], ends) - np.maximum(edges[:-1], ends - sizes)
    return (np.maximum(overlap, 0.0) / sizes)[:, tied.reshape(-1)]


def _norm(sums: np.ndarray, bins: int, norm: str) -> np.ndarray:
    """Return the norm of the gaps from sums of the excess in every bin, then of mass: [..., column] -> [...].

    NaN without mass.
    """
    excess, mass = np.abs(sums[..., :bins]), sums[..., bins:]
    with np.errstate(invalid="ignore", divide="ignore"):
        if norm == "l1":
            return excess.sum(axis=-1) / mass.sum(axis=-1)
        gap = np.where(mass > 0, excess / mass, 0.0)
        if norm == "l2":
            return np.sqrt((mass * gap**2).sum(axis=-1) / mass.sum(axis=-1))
        return np.where(mass.sum(axis=-1) > 0, gap.max(axis=-1), np.nan)


@dataclass(frozen=True)
class BrierParts:
    """What the Brier score of each network is made of, float64 [model] each, in squared probability.

    reliability: mean squared distance of forecast and frequency of the bins (0 is best); resolution: variance of the
    frequencies between bins; uncertainty: variance of the outcome, the same for every network; within_variance,
    within_covariance: what forecasts vary within bins, and twice their covariance with the outcome there.
    """

    reliability: np.ndarray
    resolution: np.ndarray
    uncertainty: np.ndarray
    within_variance: np.ndarray
    within_covariance: np.ndarray

    @property
    def brier(self) -> np.ndarray:
        """The Brier score, [model], `reliability - resolution + uncertainty + within_variance - within_covariance`."""
        return self.reliability - self.generalised_resolution + self.uncertainty

    @property
    def generalised_resolution(self) -> np.ndarray:
        """`resolution - within_variance + within_covariance`, [model], which hardly depends on the bins."""
        return self.resolution - self.within_variance + self.within_covariance


def brier_decomposition(probabilities: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS) -> BrierParts:
    """Return the parts of the Brier score: [model, sample, class] and labels [sample], -1 missing.

    With p_bar, y_bar the means of forecast and outcome in bin b of equal width, y_mean that of all: reliability
    `sum_b n_b/n (p_bar - y_bar)^2`, resolution `sum_b n_b/n (y_bar - y_mean)^2`, uncertainty `y_mean (1 - y_mean)`,
    within-bin variance `mean (p - p_bar)^2` and covariance `2 mean (p - p_bar)(y - y_bar)`. Two classes: of one of
    them; more: summed over the classes, each with its own bins, as `brier` is. Raises Undefined without any label.
    Sources: Murphy (J. Appl. Meteorol. 1973); within-bin terms, Stephenson, Coelho, Jolliffe (Wea. Forecasting 2008).
    """
    known = _known(labels)
    classes = probabilities.shape[-1]
    parts = np.zeros((5, len(probabilities)))
    for c in [1] if classes == 2 else range(classes):
        outcome = (labels[known] == c).astype(np.float64)
        for m, p in enumerate(probabilities):
            parts[:, m] += _brier_parts(p[known, c], outcome, bins)
    return BrierParts(*parts)


def _brier_parts(forecast: np.ndarray, outcome: np.ndarray, bins: int) -> list[float]:
    _, index, sizes = np.unique(_bin_numbers(forecast, bins), return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    mean_forecast, frequency = (np.bincount(index, x) / sizes for x in (forecast, outcome))
    share, rate = sizes / len(outcome), outcome.mean()
    apart = forecast - mean_forecast[index]
    return [
        float(share @ (mean_forecast - frequency) ** 2),
        float(share @ (frequency - rate) ** 2),
        float(rate * (1 - rate)),
        float(np.mean(apart**2)),
        float(2.0 * np.mean(apart * (outcome - frequency[index]))),
    ]


def temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that fits one network best, from its probabilities on val [sample, class].

    `argmin_T mean -log softmax(log p / T)_y`, which is that of the logits, for `log p` differs from them by a constant
    per sample. The loss has one minimum (it is convex in 1/T), which is looked for within `TEMPERATURES`: where every
    decision is right, the least of these. Raises Undefined when no sample has a label. Source: Guo et al. (ICML 2017).
    """
    from scipy.optimize import minimize_scalar

    known = _known(labels)
    log_p = _logs(probabilities[known])
    log_p -= class_scores(log_p, labels[known])[:, None]

    def loss(log_t: float) -> float:
        return float(logsumexp(log_p / np.exp(log_t), axis=-1).mean())

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


def after_temperature(probabilities: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Return `softmax(log p / T)`: [..., sample, class], T a number or, per network, [...]; decisions do not change.

    Raises ValueError unless T > 0. Source: Guo et al. (ICML 2017).
    """
    t = np.asarray(temperature, np.float64)
    if not (t > 0).all():
        raise ValueError(f"no temperature {temperature}: it must be above 0")
    return softmax(_logs(probabilities) / t[..., None, None])


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))


def aurc_influence(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every network's area under the risk-coverage curve, [model], and each sample's influence [model, sample].

    With the n samples sorted by falling confidence, `A = 1/n sum_k r_k`, r_k the share of errors among the first k;
    samples of one confidence count as in the mean over their orders. The influence, e_i the error of sample i, is the
    derivative by its weight, `psi_i = (r_i - A + sum_{k >= i} (e_i - r_k)/k)/n`: on a draw with counts w the value is
    `A + sum_i w_i psi_i` up to terms of order 1/n. Raises Undefined when no sample has a label. Source: Geifman,
    El-Yaniv (NeurIPS 2017).
    """
    known = _known(labels)
    values, influence = np.empty(len(probabilities)), np.zeros(probabilities.shape[:2])
    for m, p in enumerate(probabilities[:, known]):
        values[m], influence[m, known] = _risk_coverage(class_scores(p, decide(p)), errors(p, labels[known]))
    return values, influence


def _risk_coverage(confidence: np.ndarray, wrong: np.ndarray) -> tuple[float, np.ndarray]:
    _, tied, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    tied, starts, k = tied.reshape(-1), np.cumsum(sizes) - sizes, np.arange(1, len(wrong) + 1)
    risks = np.cumsum(np.repeat(np.bincount(tied, wrong) / sizes, sizes)) / k
    area = risks.mean()
    later = np.cumsum((1.0 / k)[::-1])[::-1]
    of_place = risks - area - np.cumsum((risks / k)[::-1])[::-1]
    later, of_place = (np.add.reduceat(x, starts) / sizes for x in (later, of_place))
    return float(area), (of_place[tied] + later[tied] * wrong) / len(wrong)


def excess_aurc(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how far the area under the risk-coverage curve is above that of the best order of the cases, [model].

    With e errors among n samples, all of them last: `(e - (n - e)(H_n - H_{n-e}))/n`, H the harmonic numbers. It is 0
    for a confidence that puts every error last. Raises Undefined when no sample has a label. Source: Geifman, Uziel,
    El-Yaniv (ICLR 2019).
    """
    known = _known(labels)
    n, wrong = len(known), errors(probabilities[:, known], labels[known]).sum(axis=1)
    best = (wrong - (n - wrong) * (digamma(n + 1.0) - digamma(n - wrong + 1.0))) / n
    return aurc_influence(probabilities, labels)[0] - best


def epistemic_share(context: Context) -> CaseMean:
    """Return which share of a case's uncertainty is about which member is right: values [sample], in 0..1.

    `I / H`, mutual information over the entropy of the mean probability; NaN where that is 0 (nothing is uncertain).
    Weighted by H, so that the mean is the share of all the uncertainty, `sum_i I_i / sum_i H_i`. Raises Undefined for
    fewer than two members. Source: Depeweg et al. (ICML 2018).
    """
    if context.size < 2:
        raise Undefined(f"{context.size} of 2 accepted")
    entropy = entr(context.ensemble).sum(axis=-1) / np.log(2.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return CaseMean(np.minimum(mutual_information(context.probabilities) / entropy, 1.0), entropy)


def same_cases(context: Context, view: Context) -> bool:
    """Return whether a view shows the cases of the part itself, shifted: as many, with the same labels."""
    return np.array_equal(context.labels, view.labels)


@register_metric(
    "adaptive_calibration_error",
    direction="lower",
    level="property",
    unit="probability",
    citation="Nguyen, O'Connor (EMNLP 2015); Guo et al. (ICML 2017)",
    needs=f"{ECE_BINS} bins of equal mass, confidence of the decided class, L1",
)
def _adaptive_calibration_error(context: Context, models: Models) -> dict[str, PerMember]:
    """Expected calibration error of the decided class's probability, in bins of equal mass; also on shifted views."""
    return _on_views(context, models, lambda p: calibration_error(context, p, adaptive=True))


@register_metric(
    "classwise_calibration_error",
    direction="lower",
    level="property",
    unit="probability",
    citation="Kull et al. (NeurIPS 2019)",
    needs=f"{ECE_BINS} bins of equal width, L1, mean over classes (two: the positive one)",
)
def _classwise_calibration_error(context: Context, models: Models) -> dict[str, PerMember]:
    """Expected calibration error of the probability of every class, mean over classes; also on shifted views."""
    return _on_views(context, models, lambda p: calibration_error(context, p, classwise=True))


@register_metric(
    "aurc",
    direction="lower",
    level="property",
    unit="share of samples",
    citation="Geifman, El-Yaniv (NeurIPS 2017); draws linearised",
    needs="confidence of the decided class",
)
def _aurc(context: Context, models: Models) -> dict[str, PerMember]:
    """Mean error of the most confident cases over all coverages (area under the risk-coverage curve), also on views."""
    b = context.bootstrap

    def areas(probabilities: np.ndarray) -> PerMember:
        values, influence = aurc_influence(probabilities, context.labels)
        return PerMember(values, values + b.resample(b.by_patient(influence)))

    return _on_views(context, models, areas)


def _on_views(context: Context, models: Models, measure: Callable[[np.ndarray], PerMember]) -> dict[str, PerMember]:
    """Return what is measured of the part itself (suffix "") and of every view of its cases ("/name")."""
    views = {f"/{name}": view for name, view in context.views.items() if same_cases(context, view)}
    return {suffix: measure(models(view)) for suffix, view in {"": context, **views}.items()}
