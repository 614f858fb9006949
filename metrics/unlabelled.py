"""What can be said of a shifted view without its labels: the members' error there, and whether the labels shifted.

Estimates of the error: the members' disagreement (GDE), the share of cases under a threshold that is fixed on val
(ATC), one minus the mean confidence. The view's labels serve only to hold the estimates against the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from ..identity import derive_seed
from .api import Undefined
from .calibration import same_cases
from .context import Context, decide, member_mean
from .decisions import disagreement
from .groups import classes_of_sizes, permuted_codes
from .intervals import CaseMean, Estimate, PatientBootstrap
from .performance import errors

PERMUTATIONS = 2000

_ROUNDING = 1e-9  # relative: permutations that give the observed statistic again count as such
_SINGULAR = 1e-9  # smallest singular value of a matrix of shares, below which it counts as singular


@dataclass(frozen=True)
class Threshold:
    """A threshold of every network's score: what is below counts as an error, of what is equal a fraction.

    score: [model], infinite where every case is an error; tied: [model], in 0..1.
    """

    score: np.ndarray
    tied: np.ndarray

    def errors(self, scores: np.ndarray) -> np.ndarray:
        """Return how much of each case counts as an error, [model, sample], in 0..1."""
        limit, tied = self.score[:, None], self.tied[:, None]
        return np.where(scores == limit, tied, (scores < limit).astype(np.float64))


@dataclass(frozen=True)
class ErrorEstimate:
    """An error that was estimated without labels beside the true one, means over the members.

    estimated, error: with the same draws over patients; error is Undefined where no case has a label; members: absolute
    error of the estimate of every member's own error, [member] (NaN without labels).
    """

    estimated: Estimate
    error: Estimate | Undefined
    members: np.ndarray

    @property
    def excess(self) -> Estimate | Undefined:
        """The estimated less the true error, with paired draws over patients."""
        if isinstance(self.error, Undefined):
            return self.error
        draws = self.estimated.draws - self.error.draws
        return Estimate(self.estimated.value - self.error.value, draws, self.error.n)

    @property
    def absolute_error(self) -> float:
        """Distance of the estimated from the true error; NaN where no case has a label."""
        return float("nan") if isinstance(self.excess, Undefined) else abs(self.excess.value)


def confidence(probabilities: np.ndarray) -> np.ndarray:
    """Return the probability of the decided class, [..., sample, class] -> [..., sample]."""
    return probabilities.max(axis=-1)


def negative_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return `sum_c p_c log p_c` in nats, [..., sample, class] -> [..., sample]."""
    return -entr(probabilities).sum(axis=-1)


def atc_threshold(scores: np.ndarray, wrong: np.ndarray) -> Threshold:
    """Return the threshold below which the share of cases equals the error: both [model, sample], on labelled cases.

    With e errors, the (e + 1)-th smallest score; of the cases tied with it the fraction that is lacking counts as well,
    so that the share is exact. Source: Garg et al. (ICLR 2022).
    """
    count = wrong.sum(axis=1).astype(int)
    ranked = np.sort(scores, axis=1)
    padded = np.concatenate([ranked, np.full((len(ranked), 1), np.inf)], axis=1)
    limit = padded[np.arange(len(ranked)), count]
    below = (scores < limit[:, None]).sum(axis=1)
    equal = (scores == limit[:, None]).sum(axis=1)
    return Threshold(limit, (count - below) / np.maximum(equal, 1))


def error_estimates(val: Context, part: Context, view: str = "") -> dict[str, ErrorEstimate | Undefined]:
    """Return estimates of the members' error on a view of `part` ("": on the part itself), made without its labels.

    `gde`: mean disagreement of pairs of members, which is the mean error where the set is calibrated as a whole;
    `atc_confidence`, `atc_entropy`: share of the cases below the threshold of every member's confidence, or negative
    entropy, that is fixed on val (two classes: the first only, for both order the cases alike); `confidence`: one minus
    the mean confidence. Each for the cases with a label, or for all when none has one. Intervals: bootstrap over the
    patients of the view, the thresholds held. Raises Undefined when there is no such view.

    Sources: Jiang et al. (ICLR 2022), GDE; Garg et al. (ICLR 2022), ATC; Hendrycks, Gimpel (ICLR 2017), confidence.
    """
    seen, bootstrap = _shown(part, view)
    scores = {"atc_confidence": confidence} | ({"atc_entropy": negative_entropy} if seen.classes > 2 else {})
    out: dict[str, ErrorEstimate | Undefined] = dict.fromkeys(
        ("gde", *scores, "confidence"), Undefined(f"{seen.size} of {2 if seen.size else 1} accepted")
    )
    if seen.size > 1:
        pairs = disagreement(seen.votes)
        out["gde"] = _beside_the_truth(pairs[None], seen, bootstrap)
    if seen.size:
        out |= {name: _below_threshold(val, seen, bootstrap, score) for name, score in scores.items()}
        out["confidence"] = _beside_the_truth(1.0 - confidence(seen.probabilities), seen, bootstrap)
    return out


def _shown(part: Context, view: str) -> tuple[Context, PatientBootstrap]:
    if view and view not in part.views:
        raise Undefined(f"no '{view}' view")
    seen = part.views[view] if view else part
    return seen, part.bootstrap if same_cases(part, seen) else seen.bootstrap


def _below_threshold(
    val: Context, seen: Context, bootstrap: PatientBootstrap, score: Callable[[np.ndarray], np.ndarray]
) -> ErrorEstimate | Undefined:
    if not val.known.any():
        return Undefined("val: no sample has a label")
    labelled = val.probabilities[:, val.known]
    threshold = atc_threshold(score(labelled), errors(labelled, val.labels[val.known]))
    return _beside_the_truth(threshold.errors(score(seen.probabilities)), seen, bootstrap)


def _beside_the_truth(cases: np.ndarray, seen: Context, bootstrap: PatientBootstrap) -> ErrorEstimate:
    """cases: [member, sample], or [1, sample] if all members share the estimate."""
    estimate = member_mean(cases)
    if not seen.known.any():
        missing = Undefined("no case has a label")
        return ErrorEstimate(bootstrap.mean(estimate), missing, np.full(seen.size, np.nan))
    wrong = errors(seen.probabilities, seen.labels)
    estimated, error = bootstrap.means([CaseMean(v, seen.known) for v in (estimate, member_mean(wrong))])
    assert isinstance(estimated, Estimate)
    off = np.abs((cases - wrong)[:, seen.known].mean(axis=1))
    return ErrorEstimate(estimated, error, off)


@dataclass(frozen=True)
class LabelShift:
    """Do the classes have other shares on a view than on val, as one network sees it?

    hard: p-value of a chi-square test of the decisions; soft: p-value of Kolmogorov-Smirnov tests of the probabilities,
    Bonferroni over the classes; both by permutation of patients. weights: share of each class on the view over that on
    val, by the network's confusion on val, with draws over the patients of both; Undefined where that cannot be
    inverted; true: the ratio itself, [class], NaN where the view has no labels or val none of the class.
    """

    hard: float
    soft: float
    weights: tuple[Estimate, ...] | Undefined
    true: np.ndarray


def label_shift(
    val: Context,
    part: Context,
    network: Callable[[Context], np.ndarray],
    view: str = "",
    permutations: int = PERMUTATIONS,
) -> LabelShift:
    """Test whether the outputs of a network are distributed on a view of `part` ("": on the part itself) as on val.

    network: what gives its probabilities [sample, class] in a context: `lambda c: c.base`, `lambda c: c.ensemble`. The
    part must be of other patients than val. p = (1 + #{T* >= T}) / (1 + permutations), which patients are val's being
    permuted, among those with about as many images. The probabilities of two classes mirror each other, so that one is
    tested. A small p tells of a label shift only where `p(x | y)` did not change: corruptions change it.

    Weights: `w = C^-1 mu`, C_ij the share of val with decision i and label j, mu_i that of the view with decision i;
    not cut at 0: below it there are few cases, or it is no mere label shift; `sum_j p_j w_j = 1`, p the shares on val.

    Raises Undefined when there is no such view. Sources: Lipton, Wang, Smola (ICML 2018); Rabanser, Günnemann, Lipton
    (NeurIPS 2019).
    """
    seen, bootstrap = _shown(part, view)
    of_val, of_view = network(val), network(seen)
    patient = np.concatenate([val.bootstrap.index, val.bootstrap.patients + bootstrap.index])
    codes = (np.arange(val.bootstrap.patients + bootstrap.patients) >= val.bootstrap.patients).astype(np.int8)
    outputs = np.concatenate([of_val, of_view])
    tests: list[_Statistic] = [_chi_square(decide(outputs), patient)]
    classes = [val.positive] if val.classes == 2 else range(val.classes)
    tests += [_kolmogorov_smirnov(outputs[:, c], patient) for c in classes]
    hard, *soft = _permutation_p(tests, codes, np.bincount(patient), permutations, val.seed)
    weights = _weights(val, decide(of_val), decide(of_view), bootstrap)
    return LabelShift(hard, min(1.0, len(soft) * min(soft)), weights, _true_weights(val, seen))


_Statistic = Callable[[np.ndarray], np.ndarray]  # who is of the view, [draw, patient] of 0 and 1 -> [draw]


def _chi_square(decisions: np.ndarray, patient: np.ndarray) -> _Statistic:
    """Return the statistic of homogeneity `sum (O - E)^2 / E` of the decisions on val and view."""
    _, chosen = np.unique(decisions, return_inverse=True)
    counts = np.zeros((patient.max() + 1, chosen.max() + 1))
    np.add.at(counts, (patient, chosen.reshape(-1)), 1.0)
    total = counts.sum(axis=0)

    def statistic(codes: np.ndarray) -> np.ndarray:
        on_view = codes.astype(np.float64) @ counts
        size = on_view.sum(axis=1)
        rest = total.sum() - size
        away = on_view - size[:, None] * (total / total.sum())
        return (away**2 / total).sum(axis=1) * (total.sum() / size + total.sum() / rest)

    return statistic


def _kolmogorov_smirnov(scores: np.ndarray, patient: np.ndarray) -> _Statistic:
    """Return the largest distance of the empirical distribution functions of a score on val and on the view."""
    order = np.argsort(scores)
    ranked, patients = scores[order], patient[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))

    def statistic(codes: np.ndarray) -> np.ndarray:
        below = np.cumsum(codes[:, patients], axis=1, dtype=np.int32)
        size = below[:, -1:]
        below = below[:, ends]
        return np.abs(below / size - (ends + 1 - below) / (len(scores) - size)).max(axis=1)

    return statistic


def _permutation_p(
    tests: list[_Statistic], codes: np.ndarray, sizes: np.ndarray, permutations: int, seed: int
) -> list[float]:
    """Return every test's p; codes: [patient], 1 for those of the view; sizes: images of each patient."""
    rng = np.random.default_rng(derive_seed(seed, "label shift", permutations))
    observed = [test(codes[None])[0] * (1 - _ROUNDING) for test in tests]
    beyond = np.zeros(len(tests))
    blocks = [rows[:, None] for rows in classes_of_sizes(sizes)]
    for permuted in permuted_codes(codes, blocks, permutations, rng):
        beyond += [(test(permuted) >= t).sum() for test, t in zip(tests, observed)]
    return ((1 + beyond) / (1 + permutations)).tolist()


def _weights(
    val: Context, of_val: np.ndarray, of_view: np.ndarray, bootstrap: PatientBootstrap
) -> tuple[Estimate, ...] | Undefined:
    """Return the weights of the classes from the decisions on val and on the view."""
    classes = np.arange(val.classes)
    joint = (of_val == classes[:, None, None]) & (val.labels == classes[:, None])  # [decision, label, sample]
    confusion = val.bootstrap.by_patient(joint.astype(np.float64))
    chosen = bootstrap.by_patient((of_view == classes[:, None]).astype(np.float64))
    value = _solved(confusion.sum(axis=-1), chosen.sum(axis=-1))
    if not np.isfinite(value).all():
        return Undefined("the confusion of the network on val cannot be inverted: a class is never decided or missing")
    draws = min(val.bootstrap.draws, bootstrap.draws)
    resampled = _solved(val.bootstrap.resample(confusion)[:draws], bootstrap.resample(chosen)[:draws])
    return tuple(Estimate(float(v), d, bootstrap.patients) for v, d in zip(value, resampled.T))


def _solved(confusion: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return `C^-1 mu` of counts, [..., decision, label] and [..., decision] -> [..., label]; NaN where singular."""
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = confusion / confusion.sum(axis=(-2, -1), keepdims=True)
        shares = chosen / chosen.sum(axis=-1, keepdims=True)
    matrix = np.where(np.isfinite(matrix), matrix, 0.0)
    singular = np.linalg.svd(matrix, compute_uv=False)[..., -1] < _SINGULAR
    matrix = np.where(singular[..., None, None], np.eye(matrix.shape[-1]), matrix)
    return np.where(singular[..., None], np.nan, np.linalg.solve(matrix, shares[..., None])[..., 0])


def _true_weights(val: Context, view: Context) -> np.ndarray:
    on_val, on_view = (np.bincount(c.labels[c.known], minlength=c.classes) for c in (val, view))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(on_val > 0, (on_view / on_view.sum()) / (on_val / on_val.sum()), np.nan)
