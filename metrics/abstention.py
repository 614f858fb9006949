"""Abstention: what a selective ensemble of m members answers, how often it refers a case, and whom it refers.

A selective ensemble predicts the mode of its members where the vote is decided (`decisions.selective_ensemble`), else
it abstains: the case is referred. All values are means over the m-subsets of the accepted members, so that sets of
different size are compared at an equal number of members. Source: Black, Leino, Fredrikson (ICLR 2022).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from ..identity import derive_seed
from .api import Score, Undefined
from .capacity import subsets
from .context import MIN_PATIENTS, Context
from .decisions import fewest_votes, selective_ensemble, votes
from .intervals import CaseMean, Estimate, PatientBootstrap, average


@dataclass(frozen=True)
class Groups:
    """The groups of patients that attributes define, by name ("sex=1": attribute and code).

    masks: bool [sample]; patients: of each group; small: patients of each group under `Context.min_patients`, which is
    left out; unknown: cases left out of an attribute's groups because their code is -1.
    """

    masks: Mapping[str, np.ndarray]
    patients: Mapping[str, int]
    small: Mapping[str, int]
    unknown: Mapping[str, int]


@dataclass(frozen=True)
class Abstention:
    """What selective ensembles of `members` members do at level `alpha`.

    scores: of all cases, NaN with its reason where undefined: `coverage`, the share of cases that are answered;
    `referred`, cases per 100 that are not; `accuracy` of the answers; `inconsistency`, the chance that ensembles of
    disjoint members both answer a case and answer differently. groups: the same scores of each of `who`'s groups.
    """

    members: int
    alpha: float
    scores: Mapping[str, Score]
    groups: Mapping[str, Mapping[str, Score]]
    who: Groups


def abstention(problems: Iterable[Context], members: int = 10, alpha: float = 0.05) -> Abstention:
    """Score the selective ensembles of `members` members, over all cases and in every group of patients.

    problems: the one problem of a task, or one per label, over which scores are averaged. Intervals: bootstrap over
    patients. K < members: NaN with the reason "K of members accepted"; inconsistency needs twice as many. Raises
    ValueError for no problem, members under 1 or alpha outside (0, 1).
    """
    problems = list(problems)
    if not problems:
        raise ValueError("no problem to score")
    cases = [answer_cases(context, members, alpha) for context in problems]
    who = groups(problems[0])
    scores = group_scores(problems[0].bootstrap, cases, who.masks, problems[0].min_patients)
    return Abstention(members, alpha, scores[""], {name: scores[name] for name in who.masks}, who)


def answer_cases(context: Context, members: int = 10, alpha: float = 0.05) -> dict[str, CaseMean | Undefined]:
    """Return the cases of one problem whose means are `coverage`, `referred`, `accuracy` and `inconsistency`.

    coverage: per case the share of m-subsets that answer; accuracy: right answers among all answers of all m-subsets
    to labelled cases, a ratio of two sums; inconsistency: per case the chance that two disjoint m-subsets both answer,
    and differently. Two classes: exact, for the votes of a random m-subset are hypergeometric in those of all members.
    More: the mean over 50 seeded m-subsets (all, if no more), each with one disjoint from it. Raises ValueError for
    members under 1 or alpha outside (0, 1).
    """
    if members < 1 or not 0 < alpha < 1:
        raise ValueError(f"no selective ensemble of {members} members at alpha {alpha:g}")
    size = context.size
    if size < members:
        few = Undefined(f"{size} of {members} accepted")
        return dict.fromkeys(("coverage", "referred", "accuracy", "inconsistency"), few)
    answers = _exact(context, members, alpha) if context.classes == 2 else _sampled(context, members, alpha)
    asked = answers.given * context.known
    share = np.divide(answers.right, answers.given, out=np.zeros(len(asked)), where=answers.given > 0)
    return {
        "coverage": CaseMean(answers.given),
        "referred": CaseMean(100.0 * (1.0 - answers.given)),
        "accuracy": CaseMean(share, asked) if asked.any() else Undefined("no case with a label is answered"),
        "inconsistency": Undefined(f"{size} of {2 * members} accepted")
        if answers.differing is None
        else CaseMean(answers.differing),
    }


def groups(context: Context) -> Groups:
    """Return the groups that the attributes of `context` define; those too small, and code -1, are left out."""
    masks: dict[str, np.ndarray] = {}
    patients: dict[str, int] = {}
    small: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for attribute, codes in sorted(context.attributes.items()):
        for code in np.unique(codes[codes >= 0]):
            name, mask = f"{attribute}={code}", codes == code
            count = int((context.bootstrap.by_patient(mask.astype(np.int64)) > 0).sum())
            if count < context.min_patients:
                small[name] = count
            else:
                masks[name], patients[name] = mask, count
        if missing := int((codes < 0).sum()):
            unknown[attribute] = missing
    return Groups(masks, patients, small, unknown)


def group_scores(
    bootstrap: PatientBootstrap,
    problems: Sequence[Mapping[str, CaseMean | Undefined]],
    masks: Mapping[str, np.ndarray],
    min_patients: int = MIN_PATIENTS,
) -> dict[str, dict[str, Score]]:
    """Return the mean of every kind of cases, averaged over problems: group -> name -> Score, "" for all cases.

    problems: name -> cases; masks: group -> bool [sample]. NaN with its reason for what is undefined, and in a group
    where under `min_patients` patients have weight.
    """
    found: dict[tuple[str, str], list[Estimate | Undefined]] = defaultdict(list)
    for cases in problems:
        asked = {
            (group, name): case if isinstance(case, Undefined) else _within(case, mask)
            for group, mask in {"": None, **masks}.items()
            for name, case in cases.items()
        }
        means = iter(bootstrap.means([case for case in asked.values() if isinstance(case, CaseMean)]))
        for (group, name), case in asked.items():
            mean = next(means) if isinstance(case, CaseMean) else case
            if group and isinstance(mean, Estimate) and mean.n < min_patients:
                mean = Undefined(f"{mean.n} of {min_patients} patients")
            found[group, name].append(mean)
    scores: dict[str, dict[str, Score]] = {group: {} for group in ("", *masks)}
    for (group, name), estimates in found.items():
        scores[group][name] = score_of(estimates)
    return scores


def score_of(estimates: Sequence[Estimate | Undefined]) -> Score:
    """Return the average of estimates (one per label) as a Score; NaN with the first reason if one is undefined."""
    defined = [estimate for estimate in estimates if isinstance(estimate, Estimate)]
    if len(defined) < len(estimates):
        reason = next(str(estimate) for estimate in estimates if isinstance(estimate, Undefined))
        return Score(float("nan"), reason=reason)
    mean = average(defined)
    ends = mean.interval()
    made = "bootstrap over patients" if np.isfinite(ends.low) else ""
    return Score(mean.value, ends.low, ends.high, made, mean.n)


@dataclass(frozen=True)
class _Answers:
    """Per case the chance of an answer, of a right one, and (None: too few members) of two that differ."""

    given: np.ndarray
    right: np.ndarray
    differing: np.ndarray | None


def _exact(context: Context, members: int, alpha: float) -> _Answers:
    """Return the chances of two classes, from tables over the number of members that choose class 1."""
    size, least = context.size, fewest_votes(members, alpha)
    ones = context.votes[:, 1]
    answer, differ = np.zeros(size + 1), np.zeros(size + 1)
    if least is not None:
        drawn = _hypergeometric(size, members)
        answer = np.minimum(drawn[:, least:].sum(axis=1), 1.0)
        if size >= 2 * members:
            # The second ensemble is drawn from what the first leaves: n - a ones among K - m members.
            says_zero = _hypergeometric(size - members, members)[:, : members - least + 1].sum(axis=1)
            for a in range(least, members + 1):
                left = np.clip(np.arange(size + 1) - a, 0, size - members)
                differ += 2.0 * drawn[:, a] * says_zero[left]
    one, zero = answer[ones], answer[size - ones]
    right = np.select([context.labels == 1, context.labels == 0], [one, zero], 0.0)
    return _Answers(one + zero, right, differ[ones] if size >= 2 * members else None)


def _hypergeometric(size: int, drawn: int) -> np.ndarray:
    """Return the chance of a marked ones among `drawn` of `size` of which n are marked: [n, a], n = 0..size."""
    n, a = np.arange(size + 1)[:, None], np.arange(drawn + 1)
    rest, others = size - n, drawn - a
    can = (a <= n) & (others <= rest)
    log_ways = _log_choose(np.maximum(n, a), a) + _log_choose(np.maximum(rest, others), others)
    return np.where(can, np.exp(log_ways - _log_choose(size, drawn)), 0.0)


def _log_choose(n: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
    return gammaln(np.add(n, 1.0)) - gammaln(np.add(k, 1.0)) - gammaln(np.subtract(n, k) + 1.0)


def _sampled(context: Context, members: int, alpha: float) -> _Answers:
    """Return the shares of 50 seeded m-subsets, each with an m-subset of the other members where there is one."""
    size, n = context.size, len(context.labels)
    paired = size >= 2 * members
    rng = np.random.default_rng(derive_seed(context.seed, "abstention", size, members))
    given, right, differing = np.zeros(n), np.zeros(n), np.zeros(n)
    chosen = subsets(size, members, context.seed)
    for subset in chosen:
        mode = _modes(context, subset, alpha)
        given += mode >= 0
        right += (mode >= 0) & (mode == context.labels)
        if paired:
            rest = np.setdiff1d(np.arange(size), subset)
            other = _modes(context, rng.choice(rest, members, replace=False), alpha)
            differing += (mode >= 0) & (other >= 0) & (mode != other)
    count = len(chosen)
    return _Answers(given / count, right / count, differing / count if paired else None)


def _modes(context: Context, subset: np.ndarray, alpha: float) -> np.ndarray:
    return selective_ensemble(votes(context.decisions[subset], context.classes), context.labels, alpha).mode


def _within(case: CaseMean, mask: np.ndarray | None) -> CaseMean:
    if mask is None:
        return case
    return CaseMean(case.values, mask.astype(np.float64) if case.weight is None else case.weight * mask)
