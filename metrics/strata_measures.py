"""What is measured on hidden strata: who is served worst, who bears the disagreement, and is a known truth found.

Codes int64 [sample], -1 for none, were found without the cases that they are measured on (`strata`, `slices`). A
stratum counts with enough patients among its labelled cases; others are left out. The worst of several strata is
worse than the whole by chance alone, so every extreme is held against random strata: of the same sizes within each
class, and made of whole patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..identity import derive_seed
from .api import Undefined
from .context import MIN_PATIENTS, Context
from .decisions import disagreement
from .intervals import CaseMean, Estimate, PatientBootstrap

PERMUTATIONS = 1000
EXCHANGEABLE = 10
"""Patients with equally many cases of a class that only change places among themselves; fewer join the others."""
_ROUNDING = 1e-9  # a permutation that gives the observed value again counts as such


@dataclass(frozen=True)
class AgainstChance:
    """An extreme over strata, beside what random strata give.

    estimate: the value and its bootstrap draws; stratum: where it is attained (-1: over all strata); expected: the mean
    over random strata; p: the share of them that is as extreme.
    """

    estimate: Estimate
    stratum: int
    expected: float
    p: float

    @property
    def excess(self) -> Estimate:
        """The value less what random strata give."""
        e = self.estimate
        return Estimate(e.value - self.expected, e.draws - self.expected, e.n)


def counted_strata(
    codes: np.ndarray, labels: np.ndarray, bootstrap: PatientBootstrap, min_patients: int = MIN_PATIENTS
) -> list[int]:
    """Return the strata with `min_patients` patients among their labelled cases.

    Raises Undefined unless two have.
    """
    known = (codes >= 0) & (labels >= 0)
    strata = np.unique(codes[known])
    found = [int(g) for g in strata if len(np.unique(bootstrap.index[known & (codes == g)])) >= min_patients]
    if len(found) < 2:
        raise Undefined(f"{len(found)} of {len(strata)} strata have {min_patients} patients, two are needed")
    return found


def random_strata(
    codes: np.ndarray, labels: np.ndarray, patient: np.ndarray, draws: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield `draws` codes [sample] with the same number of cases of each stratum in each class, by whole patients.

    The codes of a patient's cases of one class change places with those of a patient who has as many of them; where
    fewer than 10 patients have, the codes of all such patients are laid end to end on their cases in random order.
    Cases without a code or a label keep what they have.
    """
    rng = np.random.default_rng(derive_seed(seed, "random strata", draws))
    rows = np.flatnonzero((codes >= 0) & (labels >= 0))
    block = np.unique(np.stack([labels[rows], patient[rows]]), axis=1, return_inverse=True)[1].reshape(-1)
    size = np.bincount(block)[block]
    blocks_of_size = np.unique(np.stack([labels[rows], size]), axis=1, return_inverse=True, return_counts=True)
    rare = blocks_of_size[2][blocks_of_size[1].reshape(-1)] < EXCHANGEABLE * size
    pool = np.unique(np.stack([labels[rows], np.where(rare, 0, size)]), axis=1, return_inverse=True)[1].reshape(-1)
    source = codes[rows][np.lexsort((block, pool))]
    for _ in range(draws):
        out = codes.copy()
        out[rows[np.argsort(pool + rng.random(len(rows))[block], kind="stable")]] = source
        yield out


@dataclass(frozen=True)
class WorstStratum:
    """The stratum that is served worst by the members of a set.

    accuracy: of the members' mean, `min_g mean_{i in g} mean_m 1[D_mi = y_i]`, against chance; worst: int [member], the
    stratum that each member serves worst (the first of equals); excess: [member], its accuracy there less what random
    strata give that member; entropy: of `worst` over members, bits; agreement: share of pairs of members with the same
    one, NaN for one member; stability: share of bootstrap draws in which the set's worst stratum is the same.
    """

    accuracy: AgainstChance
    worst: np.ndarray
    excess: np.ndarray
    entropy: float
    agreement: float
    stability: float


def worst_stratum(
    context: Context, codes: np.ndarray, draws: int = PERMUTATIONS, seed: int = 0, members: np.ndarray | None = None
) -> WorstStratum:
    """Return the stratum that the members serve worst, and how sure that is.

    codes: [sample] as in the context; members: decisions int [member, sample], those of the context's members unless
    given, such as those of several base seeds together. Raises Undefined without a member or two strata that count.
    Sources: Oakden-Rayner et al. (CHIL 2020); Sohoni et al. (NeurIPS 2020).
    """
    decisions = context.decisions if members is None else members
    if not len(decisions):
        raise Undefined("no member was accepted")
    strata = counted_strata(codes, context.labels, context.bootstrap, context.min_patients)
    codes = _only(codes, strata, context.labels)
    right = (decisions == context.labels).astype(np.float32)  # sums of counts: exact below 2^24
    mean = right.mean(axis=0, dtype=np.float64)
    by_member = _means(right, codes, strata)
    random = random_strata(codes, context.labels, context.bootstrap.index, draws, seed)
    by_chance = [(means.mean(axis=0).min(), means.min(axis=1)) for means in (_means(right, c, strata) for c in random)]
    null, of_members = np.array([set_ for set_, _ in by_chance]), np.stack([each for _, each in by_chance])
    estimates = _bootstrap(context.bootstrap, mean, codes, strata)
    values, of_draws = np.array([e.value for e in estimates]), np.stack([e.draws for e in estimates])
    first = int(values.argmin())
    worst = by_member.argmin(axis=1)
    counts = np.bincount(worst, minlength=len(strata))
    shares = counts[counts > 0] / len(worst)
    estimate = Estimate(float(values[first]), of_draws.min(axis=0), estimates[first].n)
    return WorstStratum(
        AgainstChance(estimate, strata[first], float(null.mean()), _share(null <= values[first] + _ROUNDING)),
        np.array(strata)[worst],
        by_member.min(axis=1) - of_members.mean(axis=0),
        float(-(shares * np.log2(shares)).sum() + 0.0),
        float(1.0 - disagreement(counts)),
        float((of_draws.argmin(axis=0) == first).mean()) if of_draws.size else float("nan"),
    )


@dataclass(frozen=True)
class Explained:
    """How the disagreement of members is spread over strata.

    lift: `max_g d_g / d`, d the mean disagreement of all cases that count, d_g of a stratum's; share: explained share
    `eta^2 = sum_g n_g (d_g - d)^2 / sum_i (d_i - d)^2`; both against chance.
    """

    lift: AgainstChance
    share: AgainstChance


def explained(
    context: Context, codes: np.ndarray, disagreements: np.ndarray, draws: int = PERMUTATIONS, seed: int = 0
) -> Explained:
    """Return how the disagreement of cases, [sample], is spread over the strata that count.

    Such as `decisions.disagreement`, or its mean over base seeds. Raises Undefined where it is NaN (one member), where
    no members disagree, where all cases have the same, and without two strata that count. p: random strata, see
    `random_strata`.
    """
    if np.isnan(disagreements).any():
        raise Undefined("disagreement needs two members")
    labels, bootstrap = context.labels, context.bootstrap
    strata = counted_strata(codes, labels, bootstrap, context.min_patients)
    codes = _only(codes, strata, labels)
    inside = codes >= 0
    d = disagreements[inside]
    mean, spread = d.mean(), ((d - d.mean()) ** 2).sum()
    if not d.any():
        raise Undefined("no two members disagree on any case")
    if spread <= _ROUNDING * len(d) * mean**2:
        raise Undefined("all cases have the same disagreement")
    estimates = _bootstrap(bootstrap, disagreements, codes, strata)
    values = np.array([e.value for e in estimates])
    sizes = np.array([(codes == g).sum() for g in strata])
    random = random_strata(codes, labels, bootstrap.index, draws, seed)
    by_chance = np.concatenate([_means(disagreements[None], c, strata) for c in random])
    lifts = by_chance.max(axis=1) / mean
    shares = (sizes * (by_chance - mean) ** 2).sum(axis=1) / spread
    lift, share = float(values.max() / mean), float((sizes * (values - mean) ** 2).sum() / spread)
    lift_draws, share_draws = _resampled(bootstrap, disagreements, codes, strata)
    first, patients = int(values.argmax()), len(np.unique(bootstrap.index[inside]))
    return Explained(
        AgainstChance(
            Estimate(lift, lift_draws, estimates[first].n),
            strata[first],
            float(lifts.mean()),
            _share(lifts >= lift - _ROUNDING),
        ),
        AgainstChance(
            Estimate(share, share_draws, patients), -1, float(shares.mean()), _share(shares >= share - _ROUNDING)
        ),
    )


@dataclass(frozen=True)
class Found:
    """How well the strata that were found show a known one.

    stratum: the one that says most about it (largest phi coefficient); precision: share of that stratum that belongs to
    the truth, recall: share of the truth that is in it, lift: precision over the share of the truth among all cases;
    ari: adjusted Rand index of all strata with the truth; firmest: precision at 10 (see `precision_at`), NaN where no
    stratum has 10 cases or their places are not known; p: share of random strata whose largest phi is as large.
    """

    stratum: int
    precision: float
    recall: float
    lift: float
    phi: float
    ari: float
    firmest: float
    p: float


def found(
    truth: np.ndarray,
    codes: np.ndarray,
    patient: np.ndarray,
    places: np.ndarray | None = None,
    parts: np.ndarray | None = None,
    draws: int = PERMUTATIONS,
    seed: int = 0,
) -> Found:
    """Return how well strata show a known stratum of one class.

    truth: bool [sample]; codes: int [sample], -1 left out; patient: codes [sample]; places: see `places_of`; parts: int
    [sample], the partition that the truth is one part of and the index is taken with, by default the truth and the
    rest. All of one class. Raises Undefined where the truth holds all or none of the cases, or they have one code.
    Source of the index: Hubert and Arabie (J. Classification 1985).
    """
    from sklearn.metrics import adjusted_rand_score

    known = codes >= 0
    parts = (truth if parts is None else parts)[known]
    places = None if places is None else places[known]
    truth, codes, patient = truth[known].astype(bool), codes[known], patient[known]
    if not truth.any() or truth.all():
        raise Undefined(f"{int(truth.sum())} of {len(truth)} cases belong to it")
    strata = np.unique(codes)
    if len(strata) < 2:
        raise Undefined("the class was not cut")
    phi = _phi(truth, codes, strata)
    random = random_strata(codes, np.zeros_like(codes), patient, draws, seed)
    null = np.array([_phi(truth, c, strata).max() for c in random])
    best = int(phi.argmax())
    inside = codes == strata[best]
    precision, recall = float(truth[inside].mean()), float(inside[truth].mean())
    return Found(
        int(strata[best]),
        precision,
        recall,
        precision / float(truth.mean()),
        float(phi[best]),
        float(adjusted_rand_score(parts, codes)),
        _firmest(truth, codes, places),
        _share(null >= phi[best] - _ROUNDING),
    )


def places_of(responsibilities: np.ndarray) -> np.ndarray:
    """Return each case's place in the order of how firmly its own stratum holds it, the firmest first, int [sample].

    By the sum of the other strata's posterior probabilities, which is exact where that of its own has rounded to 1;
    ties by the order of the cases. responsibilities: [sample, stratum].
    """
    rows = np.arange(len(responsibilities))
    others = responsibilities.copy()
    others[rows, responsibilities.argmax(axis=1)] = 0.0
    places = np.empty(len(rows), np.int64)
    places[np.argsort(others.sum(axis=1), kind="stable")] = rows
    return places


def precision_at(truth: np.ndarray, codes: np.ndarray, places: np.ndarray, k: int = 10) -> float:
    """Return the largest share of a known stratum among the k cases that a found one holds most firmly.

    `max_s mean_{i of the k firmest of s} truth_i`, over the strata of k cases and more. truth: bool [sample]; codes: of
    the strata [sample], -1 left out; places: see `places_of`, smaller is firmer. Raises Undefined where no stratum has
    k cases. Source: Eyuboglu et al. (ICLR 2022), precision at 10.
    """
    order = np.argsort(places, kind="stable")
    firmest = [order[codes[order] == s][:k] for s in np.unique(codes[codes >= 0])]
    shares = [float(truth[cases].mean()) for cases in firmest if len(cases) == k]
    if not shares:
        raise Undefined(f"no stratum has {k} cases")
    return max(shares)


def _firmest(truth: np.ndarray, codes: np.ndarray, places: np.ndarray | None) -> float:
    try:
        return float("nan") if places is None else precision_at(truth, codes, places)
    except Undefined:
        return float("nan")


def rediscovery(findings: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """Return how alike strata are that were found from different networks: the mean adjusted Rand index of all pairs.

    findings: codes [sample] of the same cases, -1 left out of a pair; labels: [sample]. The index is taken within every
    class, where chance gives 0, and averaged by the number of cases, over the classes that one of the two cuts; over
    all classes at once strata would agree by respecting them. Raises Undefined when no pair cuts a class.
    """
    from sklearn.metrics import adjusted_rand_score

    pairs = []
    for a, b in combinations(findings, 2):
        indices, weight = [], []
        for label in np.unique(labels[labels >= 0]):
            inside = (labels == label) & (a >= 0) & (b >= 0)
            if len(np.unique(a[inside])) > 1 or len(np.unique(b[inside])) > 1:
                indices.append(adjusted_rand_score(a[inside], b[inside]))
                weight.append(inside.sum())
        if indices:
            pairs.append(np.average(indices, weights=weight))
    if not pairs:
        raise Undefined(f"none of {len(findings)} networks cuts a class")
    return float(np.mean(pairs))


def _only(codes: np.ndarray, strata: Sequence[int], labels: np.ndarray) -> np.ndarray:
    return np.where(np.isin(codes, strata) & (labels >= 0), codes, -1)


def _means(values: np.ndarray, codes: np.ndarray, strata: Sequence[int]) -> np.ndarray:
    """Return the means over strata, [row, sample] -> float64 [row, stratum]."""
    inside = (codes[:, None] == strata).astype(values.dtype)
    return (values @ inside).astype(np.float64) / inside.sum(axis=0, dtype=np.float64)


def _bootstrap(
    bootstrap: PatientBootstrap, values: np.ndarray, codes: np.ndarray, strata: Sequence[int]
) -> list[Estimate]:
    return [e for e in bootstrap.means([CaseMean(values, codes == g) for g in strata]) if isinstance(e, Estimate)]


def _resampled(
    bootstrap: PatientBootstrap, values: np.ndarray, codes: np.ndarray, strata: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return lift and explained share on every bootstrap draw, both [draw]."""
    inside = np.stack([codes == g for g in strata]).astype(np.float64)
    sums = np.concatenate([inside, inside * values, (codes >= 0)[None] * values[None] ** 2])
    drawn = bootstrap.resample(bootstrap.by_patient(sums))
    n, total, squares = drawn[:, : len(strata)], drawn[:, len(strata) : -1], drawn[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        correction = total.sum(axis=1) ** 2 / n.sum(axis=1)
        lift = (total / n).max(axis=1) * n.sum(axis=1) / total.sum(axis=1)
        return lift, ((total**2 / n).sum(axis=1) - correction) / (squares - correction)


def _phi(truth: np.ndarray, codes: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Return the phi coefficient of the truth with being in each stratum, [stratum]."""
    inside = codes[:, None] == strata
    share, base = inside.mean(axis=0), truth.mean()
    both = (inside & truth[:, None]).mean(axis=0)
    return (both - share * base) / np.sqrt(share * (1 - share) * base * (1 - base))


def _share(as_extreme: np.ndarray) -> float:
    """Return `(1 + #{as extreme}) / (1 + draws)` (Phipson and Smyth, 2010)."""
    return float(1 + as_extreme.sum()) / (1 + len(as_extreme))
