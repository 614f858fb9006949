"""Who belongs to the Rashomon set, decided on the validation split: paired differences of the loss to the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import ndtri

from .api import LOSSES, Predictions, Settings, Undefined, register_metric
from .context import Context, decide, over_contexts
from .intervals import PatientBootstrap
from .performance import aurocs, brier_scores, errors, log_losses

_MEANS = {"nll": log_losses, "zero_one": errors, "brier": brier_scores}
_TAIL = 0.05


@dataclass(frozen=True)
class Membership:
    """Validation losses and the paired differences `L(member) - L(base)`.

    base: the base's loss; members: float64 [member]; difference, se: float64 [member]; low, high: ends of the one-sided
    95 % intervals of the difference; patients: of the validation split; failed: bool [member], whose making failed:
    they are in at no epsilon, and their losses are the base's. AUROC and balanced accuracy enter as one minus.
    """

    loss: str
    base: float
    members: np.ndarray
    difference: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray
    patients: int
    failed: np.ndarray

    def accepted(self, epsilon: float) -> np.ndarray:
        """Return which members are in the set, `L(m) <= L(base) + epsilon`: bool [member]."""
        return (self.difference <= epsilon) & ~self.failed

    def certified(self, epsilon: float) -> np.ndarray:
        """Return which members are in with 95 % confidence: the upper end of the difference is at most epsilon."""
        return (self.high <= epsilon) & ~self.failed

    def possible(self, epsilon: float) -> np.ndarray:
        """Return which members cannot be ruled out: the lower end of the difference is at most epsilon."""
        return (self.low <= epsilon) & ~self.failed

    def epsilon_in_se(self, epsilon: float) -> float:
        """Return epsilon in units of the median standard error of the paired difference; NaN when that is 0."""
        made = self.se[~self.failed]
        se = float(np.median(made)) if made.size else 0.0
        return epsilon / se if se > 0 else float("nan")

    def warning(self, epsilon: float) -> str:
        """Return why this validation split cannot resolve epsilon, or ""."""
        if self.loss == "zero_one" and epsilon < 1 / self.patients:
            return f"epsilon {epsilon:g} is under one validation patient (1/{self.patients})"
        units = self.epsilon_in_se(epsilon)
        if self.loss != "zero_one" and units < 2:
            return f"epsilon {epsilon:g} is {units:.1f} standard errors of the paired loss difference on val: under 2"
        return ""

    def failures(self) -> str:
        """Return how many members failed, and which, or ""."""
        who = np.flatnonzero(self.failed)
        named = ", ".join(map(str, who))
        return f"{len(who)} of {len(self.failed)} members failed and count as drawn: {named}" if named else ""


def membership(val: Predictions, settings: Settings) -> Membership:
    """Compare every member's validation loss with the base's.

    Mean losses (nll, zero_one, brier): normal interval with the standard error
    `sqrt(P/(P-1) sum_p (sum_{i in p} (d_i - mean d)/n)^2)` over P patients; auroc, balanced_accuracy: paired bootstrap
    over patients, percentiles. Multi-label: the mean over labels of each label's loss. Raises ValueError for an unknown
    loss, Undefined when the loss has no value on val.
    """
    if settings.loss not in LOSSES:
        raise ValueError(f"unknown loss '{settings.loss}': choose from {', '.join(LOSSES)}")
    everyone = np.arange(len(val.logits))
    resampled = settings.loss not in _MEANS
    draws = max(settings.draws, 200) if resampled else 0
    bootstrap = PatientBootstrap(len(val.base), val.patient, draws, settings.seed)
    failed = np.isin(everyone, val.failed)
    over_labels = partial(over_contexts, predictions=val, members=everyone, bootstrap=bootstrap, seed=settings.seed)
    return (_resampled if resampled else _normal)(over_labels, bootstrap, settings.loss, failed)


@dataclass(frozen=True)
class _Compared:
    """The base's loss and the members' differences from it, [member], with what their errors are estimated from: the
    influence of every sample, [member, sample], or bootstrap draws of the differences, [draw, member]."""

    base: float
    difference: np.ndarray
    spread: np.ndarray


_OverLabels = Callable[[Callable[[Context], _Compared]], Iterable[_Compared]]


def _normal(over_labels: _OverLabels, bootstrap: PatientBootstrap, loss: str, failed: np.ndarray) -> Membership:
    def compare(context: Context) -> _Compared:
        known = context.known
        if not known.any():
            raise Undefined("a label of the validation split is missing everywhere")
        n = known.sum()
        base = np.where(known, _MEANS[loss](context.base, context.labels), 0.0)
        paired = np.where(known, _MEANS[loss](context.probabilities, context.labels) - base, 0.0)
        difference = paired.sum(axis=1) / n
        influence = np.where(known, paired - difference[:, None], 0.0) / n
        return _Compared(base.sum() / n, difference, influence)

    mean = _mean(over_labels(compare))
    influence, patients = bootstrap.by_patient(mean.spread), bootstrap.patients
    with np.errstate(invalid="ignore", divide="ignore"):
        se = np.sqrt(np.float64(patients) / (patients - 1) * (influence**2).sum(axis=1))
    reach = -ndtri(_TAIL) * se
    low, high = mean.difference - reach, mean.difference + reach
    base, difference = float(mean.base), mean.difference
    return Membership(loss, base, base + difference, difference, se, low, high, patients, failed)


def _resampled(over_labels: _OverLabels, bootstrap: PatientBootstrap, loss: str, failed: np.ndarray) -> Membership:
    goodness = {"auroc": aurocs, "balanced_accuracy": _balanced_accuracies}[loss]

    def compare(context: Context) -> _Compared:
        base, base_draws = goodness(context, context.base[None])
        values, draws = goodness(context, context.probabilities)
        return _Compared(1 - base[0], base[0] - values, base_draws - draws)

    mean = _mean(over_labels(compare))
    low, high = np.nanquantile(mean.spread, [_TAIL, 1 - _TAIL], axis=0)
    se = np.nanstd(mean.spread, axis=0)
    base, difference = float(mean.base), mean.difference
    return Membership(loss, base, base + difference, difference, se, low, high, bootstrap.patients, failed)


def _mean(labels: Iterable[_Compared]) -> _Compared:
    """Return the mean over labels, added up as they come: what errors are estimated from is large."""
    count, base, difference, spread = 0, 0.0, np.zeros(()), np.zeros(())
    for label in labels:
        base, difference, spread = base + label.base, difference + label.difference, spread + label.spread
        count += 1
    return _Compared(base / count, difference / count, spread / count)


def _balanced_accuracies(context: Context, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    b = context.bootstrap
    right = (decide(probabilities) == context.labels).astype(np.float64)
    values, draws = 0.0, 0.0
    for c in range(context.classes):
        of_class = (context.labels == c).astype(np.float64)
        if not of_class.any():
            raise Undefined(f"class {c} has no sample on val")
        values = values + (right @ of_class) / of_class.sum() / context.classes
        with np.errstate(invalid="ignore", divide="ignore"):
            sizes = b.resample(b.by_patient(of_class))[:, None]
            draws = draws + b.resample(b.by_patient(right * of_class)) / sizes / context.classes
    return np.asarray(values), np.asarray(draws)


_UNIT = "share of drawn members"
_WANTS = "the validation split"


@register_metric(
    "acceptance_rate", direction="higher", level="membership", unit=_UNIT, citation="this suite", needs=_WANTS
)
def _acceptance(m: Membership, epsilon: float) -> np.ndarray:
    """Share of the drawn members whose validation loss is within epsilon of the base's."""
    return m.accepted(epsilon)


@register_metric(
    "acceptance_rate_certified", direction="higher", level="membership", unit=_UNIT, citation="this suite", needs=_WANTS
)
def _acceptance_certified(m: Membership, epsilon: float) -> np.ndarray:
    """Share of the drawn members that are within epsilon with 95 % confidence."""
    return m.certified(epsilon)


@register_metric(
    "acceptance_rate_possible", direction="higher", level="membership", unit=_UNIT, citation="this suite", needs=_WANTS
)
def _acceptance_possible(m: Membership, epsilon: float) -> np.ndarray:
    """Share of the drawn members that cannot be ruled out with 95 % confidence."""
    return m.possible(epsilon)
