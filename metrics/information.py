"""Divergence of distributions in nats, accurate where they nearly agree."""

from __future__ import annotations

import numpy as np


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return `KL(p || q)` in nats over the last axis, p [..., class] against q broadcast to it.

    Written as `sum_c q_c phi((p_c - q_c)/q_c)`, phi(u) = (1 + u) log(1 + u) - u, which has no cancelling terms of first
    order: exactly 0 for p = q and accurate for close rows. A class with q = 0 counts 0 where p = 0 too, else infinity.
    """
    excess = p - q
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = excess / q
        far = ratio < -0.5  # there 1 + u cancels, while p/q is accurate
        terms = np.log1p(ratio, where=~far, out=np.zeros_like(ratio))
        np.divide(p, q, out=ratio)
        np.log(ratio, where=far & (ratio > 0), out=terms)
        terms *= p
        terms -= excess
    terms[np.isnan(terms)] = 0.0  # p = q = 0
    return terms.sum(axis=-1)
