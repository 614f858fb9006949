"""Membership inference: can whoever has the released networks tell whose images they were trained on?

Threat model. The attacker holds candidate cases with their true labels, half of them training cases of the released
networks and half never seen by them, and must rank the former before the latter. Of each released network he reads the
logits of the candidates, no weights and no gradients. `loss` needs nothing else: a case that is fitted well is taken
for a member (Yeom, Giacomelli, Fredrikson, Jha, CSF 2018). `lira` also knows architecture and recipe: it trains shadow
networks on random halves of the candidates, whichever part they come from, and asks whether a case's log-odds look like
those of the shadows that saw it or of those that did not (Carlini et al., S&P 2022). Neither is told which candidates
are members; that is read for the evaluation alone.

A released set is attacked by the sum over its networks of the log likelihood ratios, and by the mean loss. The sum is
the best statistic where networks are independent given who was a member; members made around one base are not, and then
it is an attack like any other: what it finds is leaked, a better one may find more. Likewise a difference between
members and non-members that has other causes (an official test part of another kind) is counted as a leak.

Scores are float64 [network, case], higher where a case looks more like a member; NaN: the case was not attacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..identity import derive_seed
from .api import PerMember, Score, Undefined, register_metric
from .capacity import subsets
from .context import Context, Models, member_mean
from .intervals import Estimate, PatientBootstrap

ATTACKS = ("loss", "lira")
FPRS = (0.001, 0.01)
"""False positive rates at which the true positive rate is reported; few cases cannot resolve the first."""

_INTERVAL = "bootstrap over patients"


def log_odds(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log-odds of the true class, `phi = log(p_y / (1 - p_y)) = z_y - log sum_{c != y} exp(z_c)`.

    [..., case, class], int [case] -> float64 [..., case]; from the logits, so that confident cases stay apart. Source:
    Carlini et al. (S&P 2022), who find it closer to a Gaussian than the loss.
    """
    z = logits.astype(np.float64)
    true = np.arange(z.shape[-1]) == labels[:, None]
    others = np.where(true, -np.inf, z)
    top = others.max(axis=-1)
    return z[..., true] - top - np.log(np.exp(others - top[..., None]).sum(axis=-1))


@dataclass(frozen=True)
class LikelihoodRatio:
    """Gaussians of the log-odds of every case over shadow networks that saw it, and over those that did not.

    mean_in, mean_out: float64 [case]; sd_in, sd_out: of all cases together, for a variance per case wants many more
    shadows than a few (Carlini et al., S&P 2022).
    """

    mean_in: np.ndarray
    mean_out: np.ndarray
    sd_in: float
    sd_out: float

    @staticmethod
    def fit(phi: np.ndarray, inside: np.ndarray) -> LikelihoodRatio:
        """Return the Gaussians of log-odds [shadow, case], inside: bool [shadow, case], who saw which.

        Variances are about the mean of each case and unbiased (ddof 1), pooled over cases. Raises Undefined where a
        case was seen by none or by all, and where the shadows do not differ.
        """
        mean_in, sd_in = _pooled(phi, inside)
        mean_out, sd_out = _pooled(phi, ~inside)
        return LikelihoodRatio(mean_in, mean_out, sd_in, sd_out)

    def __call__(self, phi: np.ndarray) -> np.ndarray:
        """Return `log N(phi; mean_in, sd_in^2) - log N(phi; mean_out, sd_out^2)` in nats, [..., case]."""
        z_in, z_out = (phi - self.mean_in) / self.sd_in, (phi - self.mean_out) / self.sd_out
        return 0.5 * (z_out**2 - z_in**2) + math.log(self.sd_out / self.sd_in)


def attack_scores(logits: np.ndarray, labels: np.ndarray, ratio: LikelihoodRatio) -> dict[str, np.ndarray]:
    """Return what each attack makes of networks' logits [network, case, class]: float64 [network, case] by attack.

    loss: `log p_y`, the negative cross-entropy; lira: the log likelihood ratio (its online form).
    """
    phi = log_odds(logits, labels)
    return {"loss": -np.logaddexp(0.0, -phi), "lira": ratio(phi)}


def set_scores(scores: np.ndarray) -> np.ndarray:
    """Return the statistic of a released set, [network, case] -> [case]: the mean, which ranks as the sum does."""
    return member_mean(scores)


@dataclass(frozen=True)
class Resampling:
    """Draws of the patients behind the members and, independently, of those behind the non-members."""

    members: PatientBootstrap
    non_members: PatientBootstrap

    @staticmethod
    def beside(non_members: PatientBootstrap, members: int, seed: int) -> Resampling:
        """Return as many draws of `members` independent patients beside those of the non-members."""
        own = PatientBootstrap(members, None, non_members.draws, derive_seed(seed, "membership inference"))
        return Resampling(own, non_members)


def membership_aucs(members: np.ndarray, non_members: np.ndarray, cases: Resampling) -> PerMember:
    """Return every network's AUC, `P(score of a member > that of a non-member)`, ties half, and its draws.

    members, non_members: scores [network, case]. A draw with counts w has `A + sum_i w_i psi_i` up to terms of order
    1/n, `psi_i = (V_i - A) / n` over the n cases of i's kind, V_i its placement (see `criteria.auroc_influence`).
    Raises Undefined where no member or no non-member was attacked. Source: DeLong et al. (Biometrics 1988).
    """
    asked_in, asked_out = _asked(members), _asked(non_members)
    inside, outside = members[:, asked_in], non_members[:, asked_out]
    placed_in, placed_out = _won(inside, outside), 1.0 - _won(outside, inside)
    values = placed_in.mean(axis=1)
    draws = np.tile(values, (cases.members.draws, 1))
    for placed, asked, b in ((placed_in, asked_in, cases.members), (placed_out, asked_out, cases.non_members)):
        influence = np.zeros((len(values), b.samples))
        influence[:, asked] = (placed - values[:, None]) / len(asked)
        draws += b.resample(b.by_patient(influence))
    return PerMember(values, draws)


@dataclass(frozen=True)
class MembershipInference:
    """How well an attack tells members from non-members.

    auc: the area under the ROC curve; tpr: by false positive rate, the largest true positive rate at no more than that;
    intervals by bootstrap of the patients of both; resolution: the least rate that the non-members can resolve, 1/n.
    """

    auc: Score
    tpr: Mapping[float, Score]
    resolution: float


def membership_inference(members: np.ndarray, non_members: np.ndarray, cases: Resampling) -> MembershipInference:
    """Return how well scores [case] of one network, or of a set (`set_scores`), tell members from non-members.

    A true positive rate at a false positive rate under 1/n, n the non-members, is NaN with that reason. Raises
    Undefined where no member or no non-member was attacked. Source: Carlini et al. (S&P 2022).
    """
    asked_in, asked_out = _asked(members[None]), _asked(non_members[None])
    n = sum(_patients(b, asked) for b, asked in ((cases.members, asked_in), (cases.non_members, asked_out)))
    found = membership_aucs(members[None], non_members[None], cases)
    resolution = 1 / len(asked_out)
    tpr = {}
    for fpr in FPRS:
        if _allowed(fpr, len(asked_out)) < 1:
            reason = f"{len(asked_out)} non-members resolve no false positive rate under {resolution:.2g}"
            tpr[fpr] = Score(math.nan, n=n, reason=reason)
        else:
            value = tpr_at(members[asked_in], non_members[asked_out], fpr)
            tpr[fpr] = _score(Estimate(value, _tpr_draws(members, non_members, fpr, cases), n))
    auc = _score(Estimate(float(found.values[0]), found.draws[:, 0], n))
    return MembershipInference(auc, tpr, resolution)


def tpr_at(members: np.ndarray, non_members: np.ndarray, fpr: float) -> float:
    """Return the largest true positive rate of a threshold whose false positive rate is at most `fpr`.

    A case is taken for a member above the threshold, which is the (m + 1)-th largest score of a non-member, m the false
    positives allowed: of tied scores all are above or none. members, non_members: scores [case].
    """
    allowed = math.floor(_allowed(fpr, len(non_members)))
    return float(np.mean(members > np.sort(non_members)[::-1][allowed]))


def leak_by_k(
    members: np.ndarray, non_members: np.ndarray, ks: Iterable[int], cases: Resampling, seed: int = 0
) -> dict[int, Estimate]:
    """Return by k the AUC of the attack on k released networks: the mean over 50 seeded k-subsets (or all, if fewer).

    members, non_members: scores [network, case] of one attack; a subset is attacked as in `set_scores`. All k share
    their draws: the leak that k networks add to that of one has the draws `out[k].draws - out[1].draws`. Raises as
    `membership_aucs`, ValueError unless 1 <= k <= K.
    """
    n = _patients(cases.members, _asked(members)) + _patients(cases.non_members, _asked(non_members))
    out = {}
    for k in ks:
        chosen = subsets(len(members), k, seed)
        inside, outside = (np.stack([set_scores(s[rows]) for rows in chosen]) for s in (members, non_members))
        found = membership_aucs(inside, outside, cases)
        out[k] = Estimate(float(member_mean(found.values)), member_mean(found.draws.T), n)
    return out


def evidence_name(attack: str, kind: str) -> str:
    """Return under which name a context holds scores, [member, case]: of its own cases `out`, of train cases `in`."""
    return f"membership/{attack}/{kind}"


@register_metric(
    "membership_auc",
    direction="lower",
    level="property",
    unit="probability",
    citation="Yeom et al. (CSF 2018), loss; Carlini et al. (S&P 2022), likelihood ratio",
    needs="scores of training cases and of the part's own, which no network saw",
)
def _membership_auc(context: Context, models: Models) -> dict[str, PerMember | Undefined]:
    """How well each network's answers tell training cases from others (AUC; 0.5: not at all), per attack."""
    found: dict[str, PerMember | Undefined] = {}
    for attack in ATTACKS:
        names = evidence_name(attack, "in"), evidence_name(attack, "out")
        if not all(name in context.evidence for name in names):
            continue
        inside, outside = (models.evidence(context, name) for name in names)
        cases = Resampling.beside(context.bootstrap, inside.shape[1], context.seed)
        found[f":{attack}"] = membership_aucs(inside, outside, cases)
    if not found:
        raise Undefined("membership was not measured on these cases")
    return found


def _pooled(phi: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean of the chosen shadows' values per case, and their standard deviation about it."""
    counts = chosen.sum(axis=0)
    if not counts.all():
        raise Undefined(f"case {int(np.argmin(counts))} is on one side of all shadows")
    mean = np.where(chosen, phi, 0.0).sum(axis=0) / counts
    squares = np.where(chosen, (phi - mean) ** 2, 0.0).sum()
    if not squares > 0:
        raise Undefined("the shadows that saw a case, or those that did not, do not differ")
    return mean, math.sqrt(squares / (counts - 1).sum())


def _asked(scores: np.ndarray) -> np.ndarray:
    """Return which cases were attacked, int [case]."""
    asked = np.flatnonzero(~np.isnan(scores).any(axis=0))
    if not len(asked):
        raise Undefined("no member, or no non-member, was attacked")
    return asked


def _patients(bootstrap: PatientBootstrap, asked: np.ndarray) -> int:
    return len(np.unique(bootstrap.index[asked]))


def _won(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of the others that each score exceeds, ties half: [network, case], [network, other case]."""
    pairs = zip(scores, np.sort(others, axis=1))
    return np.stack([r.searchsorted(s, "left") + r.searchsorted(s, "right") for s, r in pairs]) / (2 * others.shape[1])


def _allowed(fpr: float, non_members: Any) -> Any:
    """Return how many false positives the rate allows; .29 of 100 are 29, their product in floating point is less."""
    return np.round(fpr * non_members, 9)


def _tpr_draws(members: np.ndarray, non_members: np.ndarray, fpr: float, cases: Resampling) -> np.ndarray:
    """Return `tpr_at` on every draw [draw], with the threshold of its own that each draw has."""
    descending = [(order := _asked(s[None]))[np.argsort(-s[order], kind="stable")] for s in (members, non_members)]
    inside, outside = members[descending[0]], non_members[descending[1]]
    draws = np.full(cases.members.draws, np.nan)
    for block in cases.members.blocks():
        w_in = cases.members.sample_counts(descending[0], block).astype(np.float64)
        w_out = cases.non_members.sample_counts(descending[1], block).astype(np.float64)
        false = np.cumsum(w_out, axis=0)
        threshold = outside[np.argmax(false > _allowed(fpr, false[-1]), axis=0)]
        true = (w_in * (inside[:, None] > threshold)).sum(axis=0)
        total = np.where(false[-1] > 0, w_in.sum(axis=0), 0.0)
        np.divide(true, total, out=draws[block], where=total > 0)
    return draws


def _score(estimate: Estimate) -> Score:
    ends = estimate.interval()
    return Score(estimate.value, ends.low, ends.high, _INTERVAL if len(estimate.draws) else "", estimate.n)
