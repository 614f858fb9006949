"""Error-aware slices: a mixture over embedding, label and prediction, or over embedding, label and disagreement.

Where `strata` looks for groups in what a network sees, a slice is also alike in what the network does: a cluster of
false positives, or of cases on which equally good members contradict each other. Fitted on one split; on another, cases
are assigned by embedding and label alone, so that what is then measured on a slice did not make it.

Source: Domino (Eyuboglu, Varma, Saab, Delbrouck, Lee-Messer, Dunnmon, Zou, Ré, ICLR 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

COMPONENTS = 128
"""Principal components that the embedding is reduced to, as in Domino."""
WEIGHT = 10.0
"""Exponent of label and prediction in the likelihood, as in Domino's experiments."""
RESTARTS, STEPS, TOLERANCE = 5, 200, 1e-5
"""EM runs from this many starts, for at most this many steps, until the mean log-likelihood grows by less."""
FLOOR = 1e-6
"""Smallest variance, as a share of the embedding's mean variance."""
_TINY = 1e-300  # a probability of 0 has this logarithm, so that 0 log 0 is 0


@dataclass(frozen=True)
class Mixture:
    """The parameters of the slices: weights [slice], means and variances [slice, component], label and outcome
    probabilities [slice, class]."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    labels: np.ndarray
    outcomes: np.ndarray


@dataclass(frozen=True)
class Slices:
    """Fitted slices, the one of largest `gap` first.

    gap: [slice], how wrong the predictions are in the slice, `max_c (outcome_c - label_c)`, or its mean disagreement;
    history: mean log-likelihood after every step of the best start; centre, axes: of the principal components.
    """

    mixture: Mixture
    gap: np.ndarray
    history: list[float]
    centre: np.ndarray
    axes: np.ndarray
    label_weight: float
    outcome_weight: float

    @property
    def count(self) -> int:
        """The number of slices."""
        return len(self.gap)

    def responsibilities(
        self, features: np.ndarray, labels: np.ndarray, outcomes: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the posterior probability of every slice, float64 [sample, slice].

        features: [sample, feature]; labels: int [sample], -1 = missing (then it says nothing); outcomes: what the fit
        was aware of, [sample, outcome]: probabilities, or `agreement(disagreement)`. Without them the posterior is that
        given embedding and label alone.
        """
        points = (np.asarray(features, np.float64) - self.centre) @ self.axes
        truth = one_hot(labels, self.mixture.labels.shape[1])
        weight = 0.0 if outcomes is None else self.outcome_weight
        given = np.zeros((len(points), self.mixture.outcomes.shape[1])) if outcomes is None else outcomes
        joint = log_joint(self.mixture, points, truth, given, self.label_weight, weight)
        return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))

    def assign(self, features: np.ndarray, labels: np.ndarray, outcomes: np.ndarray | None = None) -> np.ndarray:
        """Return the code of the most probable slice of every sample, int64 [sample]; see `responsibilities`."""
        return self.responsibilities(features, labels, outcomes).argmax(axis=1)


def fit_slices(
    features: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    slices: int,
    seed: int,
    label_weight: float = WEIGHT,
    outcome_weight: float = WEIGHT,
) -> Slices:
    """Fit slices of a network's errors by EM.

    Maximises `mean_i log sum_s pi_s N(z_i | mu_s, diag v_s) p_s(y_i)^gamma prod_c q_s(c)^(gamma' f_ic)`, z the
    principal components of features [sample, feature], y labels int [sample] (-1 = missing, no factor), f
    probabilities [sample, class] (one-hot decisions will do). A soft prediction counts as that much of every class,
    `sum_c f_c log q_s(c)`, where Domino takes `log sum_c f_c q_s(c)`: only so does every step raise the likelihood.
    Starts put the slices into the cells of the confusion matrix in turn, the commonest first, as Domino does, here
    around random cases of the cell. Raises ValueError for fewer cases than slices.
    """
    classes = probabilities.shape[1]
    slices_found = _fit(features, labels, probabilities, classes, slices, seed, label_weight, outcome_weight)
    mixture = slices_found.mixture
    return _ordered(slices_found, (mixture.outcomes - mixture.labels).max(axis=1))


def fit_disagreement_slices(
    features: np.ndarray,
    labels: np.ndarray,
    disagreement: np.ndarray,
    slices: int,
    seed: int,
    label_weight: float = WEIGHT,
    outcome_weight: float = WEIGHT,
) -> Slices:
    """Fit slices of the disagreement of a set's members: as `fit_slices`, with the disagreement in place of errors.

    disagreement: [sample] in [0, 1], such as the share of pairs of members that decide differently; it counts as that
    much of a contradiction.
    """
    classes = int(labels.max()) + 1
    outcomes = agreement(disagreement)
    found = _fit(features, labels, outcomes, classes, slices, seed, label_weight, outcome_weight)
    return _ordered(found, found.mixture.outcomes[:, 1])


def agreement(disagreement: np.ndarray) -> np.ndarray:
    """Return disagreement [sample] as outcomes [sample, 2]: agreement and contradiction."""
    d = np.asarray(disagreement, np.float64)
    return np.stack([1 - d, d], axis=1)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return float64 [sample, class]; a row of zeros for a missing label (-1)."""
    return (np.asarray(labels)[:, None] == np.arange(classes)).astype(np.float64)


def log_joint(
    mixture: Mixture,
    points: np.ndarray,
    truth: np.ndarray,
    outcomes: np.ndarray,
    label_weight: float,
    outcome_weight: float,
) -> np.ndarray:
    """Return `log pi_s + log N(z | mu_s, v_s) + gamma log p_s(y) + gamma' sum_c f_c log q_s(c)`: [sample, slice]."""
    m = mixture
    precisions = 1 / m.variances
    squares = points**2 @ precisions.T - 2 * points @ (m.means * precisions).T + (m.means**2 * precisions).sum(axis=1)
    gaussian = -0.5 * (squares + np.log(2 * np.pi * m.variances).sum(axis=1))
    of_label = truth @ np.log(np.maximum(m.labels, _TINY)).T
    of_outcome = outcomes @ np.log(np.maximum(m.outcomes, _TINY)).T
    log_weights = np.log(np.maximum(m.weights, _TINY))
    return log_weights + gaussian + label_weight * of_label + outcome_weight * of_outcome


def maximise(
    responsibilities: np.ndarray, points: np.ndarray, truth: np.ndarray, outcomes: np.ndarray, floor: float
) -> Mixture:
    """Return the parameters that maximise the expected log-likelihood under the responsibilities [sample, slice].

    Weighted means, variances (at least `floor`) and class frequencies: the weights of label and outcome cancel.
    """
    mass = np.maximum(responsibilities.sum(axis=0), 10 * np.finfo(np.float64).eps)
    means = responsibilities.T @ points / mass[:, None]
    variances = responsibilities.T @ points**2 / mass[:, None] - means**2
    return Mixture(
        mass / mass.sum(),
        means,
        np.maximum(variances, floor),
        _frequencies(responsibilities.T @ truth),
        _frequencies(responsibilities.T @ outcomes),
    )


def _frequencies(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True)
    return np.where(total > 0, counts / np.where(total > 0, total, 1), 1 / counts.shape[1])


def expectation_maximisation(
    start: np.ndarray,
    points: np.ndarray,
    truth: np.ndarray,
    outcomes: np.ndarray,
    label_weight: float,
    outcome_weight: float,
) -> tuple[Mixture, list[float]]:
    """Return the parameters that EM reaches from responsibilities `start` [sample, slice], and the mean log-likelihood
    after every step, which never falls."""
    floor = FLOOR * float(points.var(axis=0).mean()) or FLOOR
    mixture = maximise(start, points, truth, outcomes, floor)
    history: list[float] = []
    for _ in range(STEPS):
        joint = log_joint(mixture, points, truth, outcomes, label_weight, outcome_weight)
        total = logsumexp(joint, axis=1, keepdims=True)
        history.append(float(total.mean()))
        if len(history) > 1 and history[-1] - history[-2] < TOLERANCE:
            break
        mixture = maximise(np.exp(joint - total), points, truth, outcomes, floor)
    return mixture, history


def _fit(
    features: np.ndarray,
    labels: np.ndarray,
    outcomes: np.ndarray,
    classes: int,
    slices: int,
    seed: int,
    label_weight: float,
    outcome_weight: float,
) -> Slices:
    if len(features) < slices:
        raise ValueError(f"{len(features)} cases cannot be cut into {slices} slices")
    features, outcomes = np.asarray(features, np.float64), np.asarray(outcomes, np.float64)
    centre = features.mean(axis=0)
    axes = np.linalg.svd(features - centre, full_matrices=False)[2][:COMPONENTS].T
    points, truth = (features - centre) @ axes, one_hot(labels, classes)
    cells = labels * outcomes.shape[1] + outcomes.argmax(axis=1)
    best: tuple[Mixture, list[float]] | None = None
    for restart in range(RESTARTS):
        start = _start(points, cells, slices, np.random.default_rng([seed, restart]))
        found = expectation_maximisation(start, points, truth, outcomes, label_weight, outcome_weight)
        if best is None or found[1][-1] > best[1][-1]:
            best = found
    assert best is not None
    return Slices(best[0], np.zeros(slices), best[1], centre, axes, label_weight, outcome_weight)


def _start(points: np.ndarray, cells: np.ndarray, slices: int, rng: np.random.Generator) -> np.ndarray:
    """Return hard responsibilities [sample, slice]: the nearest centre, of the sample's own cell if it has any."""
    values, counts = np.unique(cells, return_counts=True)
    by_size = values[np.argsort(-counts, kind="stable")]
    homes = by_size[np.arange(slices) % len(by_size)]
    centres = np.stack([points[rng.choice(np.flatnonzero(cells == home))] for home in homes])
    distances = (centres**2).sum(axis=1) - 2 * points @ centres.T
    elsewhere = cells[:, None] != homes
    distances = np.where(elsewhere & ~elsewhere.all(axis=1, keepdims=True), np.inf, distances)
    return np.eye(slices)[distances.argmin(axis=1)]


def _ordered(found: Slices, gap: np.ndarray) -> Slices:
    order = np.argsort(-gap, kind="stable")
    m = found.mixture
    mixture = Mixture(m.weights[order], m.means[order], m.variances[order], m.labels[order], m.outcomes[order])
    return Slices(
        mixture, gap[order], found.history, found.centre, found.axes, found.label_weight, found.outcome_weight
    )
