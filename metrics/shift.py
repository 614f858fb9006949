"""Accuracy under shift: on corrupted views, relative to clean data, and how it goes with clean accuracy over members.

Equally good networks may differ where the training data say nothing (D'Amour et al. 2022). A shifted view holds the
same cases as the part, so that its accuracy is resampled on the part's draws.
"""

from __future__ import annotations

import numpy as np

from .api import PerMember, Undefined, register_metric
from .context import Context, Models
from .group_rates import decisions, share
from .intervals import Estimate
from .views import ATTACKS, OUTLIERS

LEAST_MEMBERS = 20
"""Members that a variance ratio and a rank correlation over members need."""
LEAST_ACCURACY = 1e-3
"""Clean accuracy below which a ratio to it is undefined."""

_DECIMALS = 12  # accuracies that are equal in exact arithmetic are tied


def accuracy_on(context: Context, models: Models, view: str) -> PerMember:
    """Return every model's share of right decisions on a view of the same cases; "" is the part itself.

    Cases without a label are left out. Raises Undefined when none has one, KeyError for a view that is not there.
    """
    if not context.known.any():
        raise Undefined("no case has a label")
    shown = context.views[view] if view else context
    right = decisions(shown, models(shown)) == context.labels
    return share(context, right, np.flatnonzero(context.known))


def corruptions(context: Context) -> list[str]:
    """Return the names of the views that are corruptions, `jpeg-3`."""
    parts = {name: name.partition("-") for name in context.views}
    others = (OUTLIERS, *ATTACKS)
    return [name for name, (operation, _, rest) in parts.items() if rest.isdecimal() and operation not in others]


@register_metric(
    "corrupted_accuracy",
    direction="higher",
    level="property",
    unit="share of samples",
    citation="Hendrycks, Dietterich (ICLR 2019); corruptions of Di Salvo, Doerrich, Ledig (2024)",
    needs="a corrupted view",
)
def _corrupted_accuracy(context: Context, models: Models) -> dict[str, PerMember]:
    """Share of corrupted samples decided correctly, per view, and its mean over all corrupted views."""
    names = corruptions(context)
    if not names:
        raise Undefined("no corrupted view")
    found = {f"/{name}": accuracy_on(context, models, name) for name in names}
    values, draws = ([getattr(f, part) for f in found.values()] for part in ("values", "draws"))
    return {"": PerMember(np.mean(values, axis=0), np.mean(draws, axis=0)), **found}


def relative_accuracy(context: Context, models: Models, view: str) -> PerMember:
    """Return every model's `A_shift / A_clean`, 1 where the view costs nothing; NaN where A_clean is below .001.

    Raises as `accuracy_on`.
    """
    clean, shifted = accuracy_on(context, models, ""), accuracy_on(context, models, view)
    return PerMember(_ratio(shifted.values, clean.values), _ratio(shifted.draws, clean.draws))


def _ratio(shifted: np.ndarray, clean: np.ndarray) -> np.ndarray:
    return np.divide(shifted, clean, out=np.full(clean.shape, np.nan), where=clean >= LEAST_ACCURACY)


def variance_ratio(clean: PerMember, stressed: PerMember, patients: int) -> Estimate:
    """Return `var(stressed) / var(clean)` over members (ddof 0): by how much more they differ under stress.

    clean, stressed: a performance of the same members on the same draws; patients: behind them. Both variances hold
    the noise of the cases, which is larger for an accuracy nearer one half: where noise is all that differs the ratio
    is above 1, too. Raises Undefined for fewer than 20 members, for values that are not finite and when all members
    are equal on clean data. Source: D'Amour et al. (JMLR 2022).
    """
    _check(clean, stressed)
    if _variance(clean.values) == 0:
        raise Undefined("all members have the same clean performance")
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = _variance(stressed.draws) / _variance(clean.draws)
    value = float(_variance(stressed.values) / _variance(clean.values))
    return Estimate(value, np.where(np.isfinite(draws), draws, np.nan), patients)


def rank_correlation(clean: PerMember, stressed: PerMember, patients: int) -> Estimate:
    """Return Spearman's correlation over members of clean and stressed performance, ties at their midranks.

    Near 0, clean performance does not tell who withstands the stress. The noise of the cases draws it towards 0, where
    views resemble each other towards 1 (they share the cases). Arguments and source as for `variance_ratio`. Raises
    Undefined for fewer than 20 members, for values that are not finite and when all members are equal on either side.
    """
    _check(clean, stressed)
    for values, where in ((clean.values, "clean"), (stressed.values, "stressed")):
        if _variance(values) == 0:
            raise Undefined(f"all members have the same {where} performance")
    value = float(_spearman(clean.values[None], stressed.values[None])[0])
    return Estimate(value, _spearman(clean.draws, stressed.draws), patients)


def _check(clean: PerMember, stressed: PerMember) -> None:
    if clean.draws.shape != stressed.draws.shape:
        raise ValueError(f"draws of clean performance are {clean.draws.shape}, of stressed {stressed.draws.shape}")
    members = len(clean.values)
    if members < LEAST_MEMBERS:
        raise Undefined(f"{members} of {LEAST_MEMBERS} members")
    undefined = int((~np.isfinite(clean.values + stressed.values)).sum())
    if undefined:
        raise Undefined(f"{undefined} of {members} members have no value")


def _variance(values: np.ndarray) -> np.ndarray:
    """Return the variance over the last axis; exactly 0 where values are equal."""
    return np.var(np.round(values - values[..., :1], _DECIMALS), axis=-1)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return rank correlations over the last axis, [draw, member] -> [draw]; NaN where either side is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(np.round(values, _DECIMALS), axis=-1) for values in (a, b)]
    a, b = (r - r.mean(axis=-1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
