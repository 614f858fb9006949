"""Values of several base seeds as one, with an interval over test patients and base seeds together, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ..metrics.api import PerMember
from ..metrics.intervals import Estimate, average
from ..metrics.selection import LEVEL
from ..metrics.uncertainty import sources


def over_seeds(estimates: Mapping[int, Estimate], least: float = 0.0, most: float = 1.0) -> dict[str, Any]:
    """Return the mean over base seeds, its interval over test patients and base seeds together, and every seed's value.

    `sd^2 = var(draws of the mean) + s^2/B`, s the standard deviation between base seeds; t with `(B - 1) (sd^2 B /
    s^2)^2` degrees of freedom, as in `selection.verdict`. least, most: no value is below, or above.
    """
    values = {seed: e.value for seed, e in estimates.items()}
    if not estimates:
        return {"value": None, "low_end": None, "high_end": None, "seeds": values}
    mean = average(list(estimates.values()))
    out = {"value": mean.value, "low_end": None, "high_end": None, "seeds": values}
    kept = np.isfinite(mean.draws)
    if not kept.any() or kept.mean() < 0.95:
        return out
    found = sources([e.draws[kept] for e in estimates.values()], [], list(values.values()))
    between = found.bases**2 / len(values) if len(values) > 1 else 0.0
    variance = found.patients**2 + between
    df = (len(values) - 1) * (variance / between) ** 2 if between > 0 else math.inf
    reach = float(stdtrit(df, LEVEL)) * math.sqrt(variance)
    return out | {"low_end": max(mean.value - reach, least), "high_end": min(mean.value + reach, most)}


def model_mean(values: PerMember, models: slice, patients: int) -> Estimate:
    """Return the mean over some models, about the first one, so that equal models have exactly its value."""
    of_models, draws = values.values[models], values.draws[:, models]
    value = of_models[0] + np.mean(of_models - of_models[0])
    return Estimate(float(value), draws[:, 0] + np.mean(draws - draws[:, :1], axis=1), patients)


def json_number(value: float) -> float | None:
    """Return a number as JSON says it, null for what is not finite."""
    return float(value) if math.isfinite(value) else None
