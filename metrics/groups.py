"""Who bears the arbitrariness: is what equally good members disagree on spread evenly over groups of patients?

Per-case quantities of a set (disagreement, ambiguity, width of the range, abstention) are averaged in every group; the
gap between groups is tested by permuting whole patients.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..errors import UserError, suggest
from ..identity import derive_seed
from .abstention import answer_cases
from .api import Undefined
from .context import MIN_PATIENTS, Context
from .decisions import ambiguous, disagreement
from .intervals import CaseMean, Estimate, PatientBootstrap
from .scores import score_range

PERMUTATIONS = 20000
"""Enough for Holm over a hundred tests at 5 %: the least p-value is 1/(1 + PERMUTATIONS)."""

EXCHANGEABLE = 10
"""Patients that a class of sizes holds at least, where a patient's images all have one code (see `burdens`)."""

_BLOCK = 1 << 21  # permuted codes that are held at once
_ROUNDING = 1e-12  # permutations that give the observed gap again count as such

_Name = TypeVar("_Name", bound=Hashable)


def intersect(
    attributes: Mapping[str, np.ndarray], values: Mapping[str, Sequence[str]], spec: str
) -> tuple[np.ndarray, list[str]]:
    """Return codes [sample] and names of the intersections that `spec`, "sex*view", asks for.

    attributes: name -> codes [sample]; values: name -> names of the codes. Codes count through the last attribute
    first; -1 where any part is unknown. Raises UserError when `spec` does not name two or more different attributes,
    ValueError for a code without a name.
    """
    parts = [part.strip() for part in spec.split("*")]
    for part in parts:
        if part not in attributes:
            known = suggest(part, list(attributes)) if attributes else "there is none, remove the intersection"
            raise UserError(f"intersection '{spec}': no attribute '{part}': {known}")
    if len(set(parts)) < max(2, len(parts)):
        raise UserError(f"intersection '{spec}': name two or more different attributes, as in sex*view")
    names, codes = [""], np.zeros(len(attributes[parts[0]]), np.int64)
    for part in parts:
        own = np.asarray(attributes[part])
        if own.size and own.max() >= len(values[part]):
            raise ValueError(f"attribute '{part}' has code {own.max()}, but names for {len(values[part])} only")
        codes = np.where((codes < 0) | (own < 0), -1, codes * len(values[part]) + own)
        names = [f"{before} × {value}" if before else str(value) for before in names for value in values[part]]
    return codes, names


@dataclass(frozen=True)
class GroupSize:
    """How large a group is: its images, its patients, and its patients with a positive and with a negative image (None
    unless the problem has two classes). A patient whose images differ counts in several groups.

    counts: whether it has `Context.min_patients` patients, so that rates over all its cases are shown.
    """

    images: int
    patients: int
    counts: bool
    positive: int | None = None
    negative: int | None = None


def group_sizes(context: Context, codes: np.ndarray) -> dict[int, GroupSize]:
    """Return the size of every group by its code, the unknown's (-1) included."""
    labels = [context.positive, 1 - context.positive] if context.classes == 2 else []
    found = {}
    for code in np.unique(codes):
        mask = codes == code
        of_labels = (_patients(context.bootstrap, mask & (context.labels == label)) for label in labels)
        patients = _patients(context.bootstrap, mask)
        found[int(code)] = GroupSize(int(mask.sum()), patients, patients >= context.min_patients, *of_labels)
    return found


def case_quantities(
    problems: Sequence[Context], k: int, members: int = 10, alpha: float = 0.05
) -> dict[str, CaseMean | Undefined]:
    """Return what the members of a set leave open in every case: name -> cases, mean over the labels of the task.

    disagreement: chance that two members decide differently; ambiguity: chance that some of k decides otherwise than
    the base; range: expected width of the scores of k; abstention: chance that a selective ensemble of `members` does
    not answer at level alpha. problems: one per label. Undefined with the reason "n of k accepted" where members are
    too few.
    """
    per_label = [_case_quantities(context, k, members, alpha) for context in problems]
    return {name: _mean_cases([found[name] for found in per_label]) for name in per_label[0]}


def mean_cases(cases: Sequence[CaseMean]) -> CaseMean:
    """Return the mean per case, over base seeds or labels; a case weighs as much as it does on all of them together."""
    if all(c.weight is None for c in cases):
        return CaseMean(np.mean([c.values for c in cases], axis=0))
    weight = np.stack([_weight(c) for c in cases])
    total = weight.sum(axis=0)
    known = np.where(weight > 0, [c.values for c in cases], 0.0)
    mean = np.divide((known * weight).sum(axis=0), total, out=np.zeros(len(total)), where=total > 0)
    return CaseMean(mean, total / len(cases))


@dataclass(frozen=True)
class Burden:
    """How a per-case quantity is spread over the groups of an attribute that count.

    groups: codes; estimates: of the mean in every group, sharing their draws; p: of a gap as large when groups bear
    alike, limit: the 95 % quantile of the gaps then (see `burdens`).
    """

    groups: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    p: float
    limit: float

    @property
    def most(self) -> int:
        """The group that bears most; the first one of equals."""
        return self.groups[int(np.argmax([e.value for e in self.estimates]))]

    @property
    def least(self) -> int:
        """The group that bears least; the first one of equals."""
        return self.groups[int(np.argmin([e.value for e in self.estimates]))]

    @property
    def gap(self) -> Estimate:
        """What `most` bears more than `least`; the draws hold the two groups fixed, so that they can be below 0."""
        high, low = (self.estimates[self.groups.index(g)] for g in (self.most, self.least))
        return Estimate(high.value - low.value, high.draws - low.draws, high.n + low.n)


def burdens(
    cases: Mapping[_Name, CaseMean],
    codes: np.ndarray,
    bootstrap: PatientBootstrap,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    min_patients: int = MIN_PATIENTS,
) -> dict[_Name, Burden | Undefined]:
    """Return how quantities are spread over the groups of one attribute, and whether by more than chance.

    cases: name -> quantity of every case; codes: [sample], -1 unknown. A group counts with `min_patients` patients;
    cases of others are left out. p = (1 + #{gap* >= gap}) / (1 + permutations), gap the largest less the smallest mean
    of the groups.

    What is permuted, by whole patients, so that a patient's cases stay together: where all cases of a patient have one
    code (sex), the patients' codes, among patients with about as many images (classes of sizes of at least 10
    patients); else (view) the patients' vectors of codes, among patients with equally many. p is uniform if a patient's
    codes are independent of what is found in its cases, given the number of its images. All quantities share the
    permutations.

    Sources: whole-block exchangeability, Winkler et al. (NeuroImage 2015); p, Phipson and Smyth (2010).
    """
    if not cases:
        return {}
    groups = np.unique(codes[codes >= 0])
    counted = [int(g) for g in groups if _patients(bootstrap, codes == g) >= min_patients]
    if len(counted) < 2:
        few = f"{len(counted)} of {len(groups)} groups have {min_patients} patients, two are needed"
        return dict.fromkeys(cases, Undefined(few))
    names = list(cases)
    weight = np.stack([_weight(cases[n]) for n in names])
    values = np.stack([np.where(w > 0, cases[n].values, 0.0) * w for n, w in zip(names, weight)])
    in_groups = [CaseMean(cases[n].values, w * (codes == g)) for n, w in zip(names, weight) for g in counted]
    found = bootstrap.means(in_groups)
    kept = np.isin(codes, counted)
    p, limit = _permutation(values[:, kept], weight[:, kept], codes[kept], bootstrap.index[kept], permutations, seed)
    out: dict[_Name, Burden | Undefined] = {}
    for i, name in enumerate(names):
        means = found[i * len(counted) : (i + 1) * len(counted)]
        small = [g for g, m in zip(counted, means) if isinstance(m, Undefined) or m.n < min_patients]
        if small:
            out[name] = Undefined(f"group {small[0]} has under {min_patients} patients with a value")
        else:
            estimates = tuple(m for m in means if isinstance(m, Estimate))
            out[name] = Burden(tuple(counted), estimates, float(p[i]), float(limit[i]))
    return out


def _weight(case: CaseMean) -> np.ndarray:
    return np.ones(len(case.values)) if case.weight is None else case.weight


def _patients(bootstrap: PatientBootstrap, mask: np.ndarray) -> int:
    return len(np.unique(bootstrap.index[mask]))


def _case_quantities(context: Context, k: int, members: int, alpha: float) -> dict[str, CaseMean | Undefined]:
    size = context.size
    pairs: CaseMean | Undefined = Undefined(f"{size} of 2 accepted")
    if size > 1:
        pairs = CaseMean(disagreement(context.votes))
    answered = answer_cases(context, members, alpha)["coverage"]
    few = Undefined(f"{size} of {k} accepted")
    return {
        "disagreement": pairs,
        "ambiguity": few if size < k else CaseMean(ambiguous(context.flip_counts, size, k)),
        "range": few if size < k else CaseMean(score_range(context.scores, k), context.scored),
        "abstention": answered if isinstance(answered, Undefined) else CaseMean(1.0 - answered.values),
    }


def _mean_cases(cases: Sequence[CaseMean | Undefined]) -> CaseMean | Undefined:
    defined = [c for c in cases if isinstance(c, CaseMean)]
    return mean_cases(defined) if len(defined) == len(cases) else next(c for c in cases if isinstance(c, Undefined))


def _permutation(
    values: np.ndarray, weight: np.ndarray, codes: np.ndarray, patient: np.ndarray, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the p-value of each quantity's gap and the 95 % quantile of the permuted gaps, both [quantity].

    values: times weight, weight: [quantity, sample].
    """
    rng = np.random.default_rng(derive_seed(seed, "permutation of patients", permutations))
    order = np.argsort(patient, kind="stable")
    values, weight, codes = values[:, order], weight[:, order], codes[order]
    starts = np.flatnonzero(np.diff(patient[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(codes)))
    if all((codes[s : s + n] == codes[s]).all() for s, n in zip(starts, sizes)):
        values, weight = (np.add.reduceat(a, starts, axis=1) for a in (values, weight))
        codes, blocks = codes[starts], [rows[:, None] for rows in classes_of_sizes(sizes)]
    else:
        blocks = [starts[sizes == n][:, None] + np.arange(n) for n in np.unique(sizes)]
    weights, of_quantity = np.unique(weight, axis=0, return_inverse=True)  # mostly one: every case counts alike
    sums, of_quantity = np.concatenate([values, weights]).T, len(values) + of_quantity.reshape(-1)
    observed = _gaps(codes[None], codes, sums, of_quantity)[0]
    gaps = [_gaps(permuted, codes, sums, of_quantity) for permuted in permuted_codes(codes, blocks, permutations, rng)]
    null = np.concatenate(gaps)
    beyond = (null >= observed - _ROUNDING).sum(axis=0)
    return (1 + beyond) / (1 + permutations), np.quantile(null, 0.95, axis=0)


def classes_of_sizes(sizes: np.ndarray) -> list[np.ndarray]:
    """Return the patients of every class of sizes: neighbouring sizes, until a class holds 10 of them."""
    classes: list[np.ndarray] = []
    waiting = np.empty(0, np.int64)
    for n in np.unique(sizes):
        waiting = np.concatenate([waiting, np.flatnonzero(sizes == n)])
        if len(waiting) >= EXCHANGEABLE:
            classes.append(waiting)
            waiting = waiting[:0]
    if len(waiting) and classes:
        classes[-1] = np.concatenate([classes[-1], waiting])
    elif len(waiting):
        classes.append(waiting)
    return classes


def permuted_codes(
    codes: np.ndarray, blocks: Sequence[np.ndarray], permutations: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield permuted codes [draw, unit], some draws at a time; blocks: units [patient, image], rows change places."""
    step = max(1, _BLOCK // len(codes))
    for start in range(0, permutations, step):
        draws = min(step, permutations - start)
        out = np.empty((draws, len(codes)), codes.dtype)
        for units in blocks:
            places = rng.permuted(np.broadcast_to(np.arange(len(units)), (draws, len(units))), axis=1)
            out[:, units.reshape(-1)] = codes[units][places].reshape(draws, -1)
        yield out


def _gaps(permuted: np.ndarray, codes: np.ndarray, sums: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the gaps [draw, quantity] of permuted codes [draw, unit].

    sums: of values, then of weights, [unit, column]; weight: the column of each quantity's weights.
    """
    most, least = np.full((2, len(permuted), len(weight)), -math.inf)
    for g in np.unique(codes):
        in_group = (permuted == g).astype(np.float64) @ sums
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = in_group[:, : len(weight)] / in_group[:, weight]
        most, least = np.fmax(most, mean), np.fmax(least, -mean)
    return most + least
