"""Hidden strata: clusters within a class, in the features of a frozen reference network.

They are found once per dataset, on train, and every other split is then assigned to them by features and label; all
generators share them. Per class: rows of features to unit norm, Isomap, a test of whether there is any structure, a
Gaussian mixture, and its components split further where that pays. A class without structure stays one stratum.

The randomly drawn landmarks of a class (all of a small one) stand for it; the others are placed among them. Nothing is
stored: the codes of the samples are what a run keeps.

Sources: GEORGE (Sohoni, Dunnmon, Angus, Gu, Ré, NeurIPS 2020, and their released code); Isomap (Tenenbaum, de Silva,
Langford, Science 2000).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NEIGHBOURS, DIMENSIONS = 10, 5
"""Of Isomap."""
LANDMARKS = 1500
"""Samples of a class that the map and the mixtures are fitted to."""
MOST_CLUSTERS = 10
"""The search for the number of components goes from 2 to this."""
PIECES = 5
"""Pieces that over-clustering cuts a component into."""
SMALLEST, SMALLEST_SHARE = 25, 0.005
"""Landmarks that a stratum needs, and as a share of all landmarks of its class; the larger of the two counts."""
TESTED, REFERENCES = 300, 39
"""Samples that the test of structure looks at, and simulated samples it compares them with."""
LEVEL = 0.05
"""Chance that a class without structure is cut: p is at most this when at most one of the references is as extreme."""

_FLAT = 1e-9  # standard deviation below which unit rows do not vary
_BLOCK = 2000  # samples that are placed at once: bounds memory, not the result


@dataclass
class ClassStrata:
    """The strata of one class.

    count: how many; p: of the test for structure (NaN if there were too few samples to ask); reason: in words, what was
    found; first: the code of its first stratum.
    """

    label: int
    first: int
    p: float
    reason: str
    count: int = 1
    place: Any = field(default=None, repr=False)
    mixture: Any = field(default=None, repr=False)
    pieces: dict[int, Any] = field(default_factory=dict, repr=False)
    merged: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), np.int64), repr=False)

    def responsibilities(self, features: np.ndarray) -> np.ndarray:
        """Return the posterior probability of each stratum of the class: [sample, feature] -> [sample, stratum]."""
        out = np.zeros((len(features), self.count))
        if self.mixture is None:
            out[:] = 1.0
            return out
        for start in range(0, len(features), _BLOCK):
            points = self.place(features[start : start + _BLOCK])
            for component, share in enumerate(self.mixture.predict_proba(points).T):
                parts = self.pieces[component].predict_proba(points) if component in self.pieces else [[1.0]]
                for piece, part in enumerate(np.transpose(parts)):
                    out[start : start + _BLOCK, self.merged[component, piece]] += share * part
        return out


@dataclass
class Strata:
    """The strata of all classes; codes count through the classes in the order of their labels."""

    classes: list[ClassStrata]

    @property
    def count(self) -> int:
        """The number of strata of all classes."""
        return sum(c.count for c in self.classes)

    def names(self, classes: Sequence[str]) -> list[str]:
        """Return the name of every code: that of an undivided class, or "pneumothorax/0", "pneumothorax/1", ...

        Within a class, strata are numbered by size, the largest on train first.
        """
        named = []
        for c in self.classes:
            name = classes[c.label]
            named += [name] if c.count == 1 else [f"{name}/{i}" for i in range(c.count)]
        return named

    def responsibilities(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the posterior probability of every stratum, float64 [sample, stratum], 0 for those of other classes.

        Rows of a label that the strata were not found for, and of a missing one (-1), are 0.
        """
        out = np.zeros((len(labels), self.count))
        for c in self.classes:
            rows = np.flatnonzero(labels == c.label)
            if len(rows):
                out[rows, c.first : c.first + c.count] = c.responsibilities(features[rows])
        return out

    def assign(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the code of the most probable stratum of each sample's own class, int64 [sample]; -1 without one.

        features: [sample, feature] of the same reference network; labels: int [sample], -1 = missing.
        """
        found = self.responsibilities(features, labels)
        return np.where(found.any(axis=1), found.argmax(axis=1), -1).astype(np.int64)


def fit_clusters(
    features: np.ndarray,
    labels: np.ndarray,
    seed: int,
    losses: np.ndarray | None = None,
    clusters: int | None = None,
) -> Strata:
    """Find the strata of every class.

    features: [sample, feature], what the last layer of the reference network is given; labels: int [sample], -1 is left
    out; losses: [sample] of the reference network in nats, for GEORGE's rule on pieces; clusters: number of components
    per class, found by silhouette where it is None.

    Per class: (1) `structure` must have p <= .05, else the class is one stratum; (2) k of 2 to 10 is the one whose
    clusters' silhouettes have the largest mean over clusters (each the mean over its points; ties to the larger k),
    among those whose smallest cluster has 25 landmarks and .5 %; (3) each component is cut into 5 pieces by a mixture
    of its own, and a piece is kept iff the mean silhouette of its points is above 0 and above what it was before, and
    it has 25 landmarks and .5 %, and its mean loss is at least its component's; none is where `structure` of the
    component has p > .05. What is not kept stays together as the rest of the component. GEORGE has no smallest size in
    (2), and in (3) no test but also asks for 25 validation samples.
    """
    found: list[ClassStrata] = []
    features = np.asarray(features)
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        first = found[-1].first + found[-1].count if found else 0
        loss = None if losses is None else losses[rows]
        found.append(_class_strata(int(label), first, features[rows], loss, seed, clusters))
    return Strata(found)


def structure(features: np.ndarray, seed: int) -> float:
    """Return the p-value of "these features are one cloud": [sample, feature] -> p.

    The statistic is what two Gaussian components add to the mean log-likelihood of one, on the five principal
    components (each to unit variance) of at most 300 random rows at unit norm. It is compared with 39 equally large
    samples of one cloud (see `_Cloud`) that went the same way: `p = (1 + #{as large}) / 40`, so that such a cloud has
    p <= .05 with a chance of 5 %. Measured, on 100 times 80 samples of 32 features: normal 2 %, of four factors 2 %,
    rectified 0 %, rectified with one skewed axis 2 %, t with 5 degrees of freedom 7 %; but log-normal of four factors
    60 %, for a cloud more skewed than a gamma counts as more than one. Rejection thus says that there is more than one
    plain cloud, not that it is any particular stratum. Source: McLachlan (Applied Statistics 1987), the bootstrapped
    likelihood ratio.
    """
    rng = np.random.default_rng(seed)
    features = np.asarray(features, np.float64)
    few = min(TESTED, len(features))
    observed = _second_component(features[rng.permutation(len(features))[:few]])
    cloud = _Cloud(features)
    extreme = sum(_second_component(cloud.draw(few, rng)) >= observed for _ in range(REFERENCES))
    return float(1 + extreme) / (1 + REFERENCES)


class _Cloud:
    """One cloud with the mean and covariance of given features (Ledoit and Wolf, J. Multivariate Anal. 2004).

    Gaussian; where no feature is negative, as behind a rectifier, Gaussian in its correlations and gamma-distributed in
    each feature, skewed but with a single mode: `m (1 - 1/(9a) + z/(3 sqrt a))^3`, m the mean, a = m^2/variance, z
    normal (Wilson and Hilferty, PNAS 1931), 0 where that is negative.
    """

    def __init__(self, features: np.ndarray):
        from sklearn.covariance import ledoit_wolf

        covariance = ledoit_wolf(features)[0]
        self.mean, self.sd = features.mean(axis=0), np.sqrt(np.diag(covariance))
        self.rectified = bool((features >= 0).all())
        varied = np.where(self.sd > 0, self.sd, 1.0)
        values, vectors = np.linalg.eigh(covariance / varied / varied[:, None])
        self._spread = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T

    def draw(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        z = rng.normal(size=(samples, len(self.mean))) @ self._spread
        if not self.rectified:
            return self.mean + z * self.sd
        ratio = np.where(self.mean > 0, self.sd / np.where(self.mean > 0, self.mean, 1.0), 0.0)  # 1 / sqrt a
        return self.mean * np.maximum(1 - ratio**2 / 9 + z * ratio / 3, 0) ** 3


def silhouettes(distances: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return every point's silhouette `(b - a) / max(a, b)`: distances [point, point], codes [point] -> [point].

    a: mean distance to the others of its cluster, b: the least mean distance to another cluster; 0 for a cluster of
    one. Source: Rousseeuw (J. Comput. Appl. Math. 1987).
    """
    index = np.unique(codes, return_inverse=True)[1]
    points = np.arange(len(index))
    members = np.bincount(index)
    sums = distances @ np.eye(len(members))[index]
    inside = sums[points, index] / np.maximum(members[index] - 1, 1)
    means = sums / members
    means[points, index] = np.inf
    outside = means.min(axis=1)
    larger = np.maximum(inside, outside)
    return np.where((members[index] > 1) & (larger > 0), (outside - inside) / np.where(larger > 0, larger, 1), 0.0)


def _class_strata(
    label: int, first: int, features: np.ndarray, losses: np.ndarray | None, seed: int, clusters: int | None
) -> ClassStrata:
    n = len(features)
    if n < 2 * SMALLEST:
        return ClassStrata(label, first, np.nan, f"{n} samples are too few to cut")
    p = structure(features, seed)
    if p > LEVEL:
        return ClassStrata(label, first, p, f"no structure (p = {p:.3f})")
    rng = np.random.default_rng([seed, label])
    landmarks = np.sort(rng.permutation(n)[:LANDMARKS])
    place = _Place(features[landmarks])
    points = place.landmarks
    smallest = max(SMALLEST, int(np.ceil(SMALLEST_SHARE * len(points))))
    distances = _distances(points)
    searched = range(2, MOST_CLUSTERS + 1) if clusters is None else [clusters]
    mixture = _best_mixture(points, distances, searched, seed, smallest)
    if mixture is None:
        return ClassStrata(label, first, p, f"no mixture whose components all have {smallest} samples (p = {p:.3f})")
    loss = None if losses is None else losses[landmarks]
    codes = mixture.predict(points)
    pieces, kept = _pieces(points, distances, codes, loss, seed, smallest)
    uniform = [c for c in kept if structure(features[landmarks[codes == c]], seed) > LEVEL]
    pieces, kept = ({c: of[c] for c in of if c not in uniform} for of in (pieces, kept))
    merged, count = _codes(codes, points, pieces, kept)
    reason = f"{mixture.n_components} clusters, {sum(map(len, kept.values()))} pieces kept (p = {p:.3f})"
    return ClassStrata(label, first, p, reason, count, place, mixture, pieces, merged)


def _best_mixture(
    points: np.ndarray, distances: np.ndarray, clusters: Iterable[int], seed: int, smallest: int
) -> Any | None:
    best, best_score = None, -np.inf
    for k in clusters:
        mixture = _mixture(points, k, seed)
        codes = mixture.predict(points)
        if np.bincount(codes, minlength=k).min() < smallest:
            continue
        of_points = silhouettes(distances, codes)
        score = np.mean([of_points[codes == c].mean() for c in range(k)])
        if score >= best_score:
            best, best_score = mixture, score
    return best


def _pieces(
    points: np.ndarray,
    distances: np.ndarray,
    codes: np.ndarray,
    losses: np.ndarray | None,
    seed: int,
    smallest: int,
) -> tuple[dict[int, Any], dict[int, list[int]]]:
    """Return component -> the mixture of its pieces, and component -> the pieces that are kept; see `fit_clusters`."""
    cut: dict[int, Any] = {}
    piece_codes = codes * PIECES
    for component in np.unique(codes):
        inside = codes == component
        if inside.sum() >= 2 * smallest:
            cut[int(component)] = _mixture(points[inside], PIECES, seed)
            piece_codes[inside] += cut[int(component)].predict(points[inside])
    before, after = silhouettes(distances, codes), silhouettes(distances, piece_codes)
    kept: dict[int, list[int]] = {}
    for component in cut:
        for piece in range(PIECES):
            inside = piece_codes == component * PIECES + piece
            if inside.sum() < smallest or not after[inside].mean() > max(before[inside].mean(), 0.0):
                continue
            if losses is None or losses[inside].mean() >= losses[codes == component].mean():
                kept.setdefault(component, []).append(piece)
    return {component: cut[component] for component in kept}, kept


def _codes(
    codes: np.ndarray, points: np.ndarray, pieces: dict[int, Any], kept: dict[int, list[int]]
) -> tuple[np.ndarray, int]:
    """Return the stratum of every component and piece, int [component, piece], and the number of strata.

    By size among the points, the largest first; the rest of a component of which all pieces are kept does not exist.
    """
    own = np.arange(codes.max() + 1)[:, None] * (PIECES + 1) + np.zeros(PIECES, np.int64)
    for component, some in kept.items():
        own[component, some] += 1 + np.array(some)
    of_points = own[codes, 0]
    for component, mixture in pieces.items():
        inside = codes == component
        of_points[inside] = own[component, mixture.predict(points[inside])]
    used = np.unique([own[c, j] for c in range(len(own)) for j in (range(PIECES) if c in pieces else (0,))])
    sizes = (of_points[:, None] == used).sum(axis=0)
    rank = np.empty(len(used), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(used))
    return rank[np.minimum(np.searchsorted(used, own), len(used) - 1)], len(used)


class _Place:
    """The map of a class: unit rows into Isomap's space, in units of the landmarks' standard deviation there."""

    def __init__(self, features: np.ndarray):
        self._isomap = _isomap(_unit(features))
        embedded = self._isomap.embedding_
        self._scale = float(embedded.std()) or 1.0
        self.landmarks = embedded / self._scale

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return self._isomap.transform(_unit(features)) / self._scale


def _isomap(rows: np.ndarray) -> Any:
    """Fit Isomap; parts of the neighbour graph that are apart are joined by their shortest edges."""
    from sklearn.manifold import Isomap

    few = len(rows) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parts that are apart, which well separated strata are
        # The iterative eigensolver would start from the global random generator.
        return Isomap(n_neighbors=min(NEIGHBOURS, few), n_components=min(DIMENSIONS, few), eigen_solver="dense").fit(
            rows
        )


def _mixture(points: np.ndarray, components: int, seed: int) -> Any:
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where fewer distinct points than components are left
        return GaussianMixture(components, n_init=3, random_state=seed % 2**32).fit(points)


def _second_component(features: np.ndarray) -> float:
    """Return what a second Gaussian component adds to the mean log-likelihood of the features, see `structure`."""
    from sklearn.mixture import GaussianMixture

    rows = _unit(features)
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    varied = int((sizes[:DIMENSIONS] > _FLAT * np.sqrt(len(rows))).sum())
    if not varied:
        return 0.0
    points = left[:, :varied] * np.sqrt(len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not every start converges, here or in the references
        two = GaussianMixture(2, reg_covar=1e-3, random_state=0).fit(points).score(points)
    one = -varied / 2 * (np.log(2 * np.pi) + 1)  # components are uncorrelated, with variance 1
    return float(two - one)


def _distances(points: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import pdist, squareform

    return squareform(pdist(points))


def _unit(features: np.ndarray) -> np.ndarray:
    """Return the rows at unit norm, float64; a row of zeros stays one."""
    rows = np.asarray(features, np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1.0)
