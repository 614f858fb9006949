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
        terms = excess / q
        far = np.flatnonzero(terms.ravel(order="K") < -0.5)  # there 1 + u cancels, while p/q is accurate
        np.log1p(terms, out=terms)
        if len(far):
            ratio = np.divide(p, q, out=np.empty_like(terms)).ravel(order="K")[far]
            terms.ravel(order="K")[far] = np.log(np.where(ratio > 0, ratio, 1.0))
        terms *= p
        terms -= excess
    if not np.all(q):
        terms[np.isnan(terms)] = 0.0  # p = q = 0
    return terms.sum(axis=-1)
