"""Selection on validation: what does the best of k, chosen without the test set, score on the test set?"""

from __future__ import annotations

import numpy as np

from .intervals import order_statistic_weights


def expected_best_of_k(val: np.ndarray, test: np.ndarray, k: int) -> float:
    """Return the expected test value of the validation-best of k members drawn without replacement (higher is better).

    Members sorted by val from worst to best, T_(j) their test values: `sum_{j>=k} T_(j) C(j-1, k-1)/C(K, k)`; members
    tied on val share the mean of their test values. val, test: [member]. Raises ValueError for k outside 1..K.
    """
    val, test = np.asarray(val, np.float64), np.asarray(test, np.float64)
    tied = np.unique(val, return_inverse=True)[1].reshape(-1)
    shared = (np.bincount(tied, test) / np.bincount(tied))[tied]
    return float(shared[np.argsort(val, kind="stable")] @ order_statistic_weights(len(val), k))
