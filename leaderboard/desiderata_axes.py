"""The axes along which equally good members may differ: what is told of a set along each, from its views and evidence.

An axis is a function of the set on val and on test (one label's contexts) and of k: it yields items (a view, a method,
an attack) and their quantities by name, in the words that the page shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from ..metrics.api import PerMember, Undefined
from ..metrics.calibration import after_temperature, brier_decomposition, epistemic_share, temperature
from ..metrics.context import BASE, MEMBERS, Context
from ..metrics.decisions import ambiguous, disagreement
from ..metrics.explanations import Comparators, explanation_summary
from ..metrics.intervals import CaseMean, Estimate, average
from ..metrics.ood import OODScores, Scored, member_detectors, ood_metrics, ood_views
from ..metrics.ood_set import detector_agreement, gains_over_confidence, set_detectors, unseen_by_confidence
from ..metrics.performance import calibration_errors, errors
from ..metrics.privacy import Resampling, evidence_name, leak_by_k, membership_inference, set_scores
from ..metrics.shift import accuracy_on, rank_correlation, relative_accuracy, variance_ratio
from ..metrics.unlabelled import error_estimates, label_shift
from .over_seeds import model_mean

CLEAN = "clean"
Found = dict[str, Estimate | Undefined | float]
_SALIENCY = "saliency/"
_Value = TypeVar("_Value")


def attempt(compute: Callable[..., _Value], *arguments: Any) -> _Value | Undefined:
    """Return what a function returns, or why it has no value."""
    try:
        return compute(*arguments)
    except Undefined as reason:
        return reason


def mean_of_models(values: PerMember, patients: int) -> Estimate | Undefined:
    """Return the mean over all networks, Undefined without any."""
    return model_mean(values, slice(None), patients) if len(values.values) else Undefined("no member accepted")


def accuracies(val: Context, test: Context, k: int) -> Iterator[tuple[str, Found]]:
    """Yield, of test itself and of every view with labels, how right and how divided the set is there.

    base, members, ensemble: accuracy; balanced_error: one less the mean recall of the classes, members' mean;
    disagreement, ambiguity (at k); relative: members' `A_shift / A_clean`; variance_ratio, rank_correlation: over
    members, of accuracy there and on test itself (D'Amour et al. 2022).
    """
    patients = test.bootstrap.patients
    clean = accuracy_on(test, MEMBERS, "")
    for name in ["", *(n for n, view in test.views.items() if view.known.any())]:
        seen = test.views[name] if name else test
        shifted = accuracy_on(test, MEMBERS, name)
        right = np.where(seen.known, seen.ensemble.argmax(axis=-1) == seen.labels, False) if seen.size else None
        found: Found = {
            "base": mean_of_models(accuracy_on(test, BASE, name), patients),
            "members": mean_of_models(shifted, patients),
            "ensemble": Undefined("no member accepted")
            if right is None
            else test.bootstrap.mean(right.astype(np.float64), seen.known.astype(np.float64)),
            "balanced_error": attempt(_balanced_error, test, seen),
            "disagreement": attempt(_disagreement, test, seen),
            "ambiguity": attempt(_ambiguity, test, seen, k),
        }
        if name:
            found["relative"] = mean_of_models(relative_accuracy(test, MEMBERS, name), patients)
            found["variance_ratio"] = attempt(variance_ratio, clean, shifted, patients)
            found["rank_correlation"] = attempt(rank_correlation, clean, shifted, patients)
        yield name or CLEAN, found


def _balanced_error(test: Context, seen: Context) -> Estimate:
    if not seen.size:
        raise Undefined("no member accepted")
    wrong = errors(seen.probabilities, seen.labels).mean(axis=0)
    found = test.bootstrap.means([CaseMean(wrong, seen.labels == c) for c in range(seen.classes)])
    of_classes = [e for e in found if isinstance(e, Estimate)]
    if len(of_classes) < seen.classes:
        raise Undefined("a class has no sample")
    return average(of_classes)


def _disagreement(test: Context, seen: Context) -> Estimate:
    if seen.size < 2:
        raise Undefined(f"{seen.size} of 2 accepted")
    return test.bootstrap.mean(disagreement(seen.votes))


def _ambiguity(test: Context, seen: Context, k: int) -> Estimate:
    if seen.size < k:
        raise Undefined(f"{seen.size} of {k} accepted")
    return test.bootstrap.mean(ambiguous(seen.flip_counts, seen.size, k))


def outliers(val: Context, test: Context, k: int) -> Iterator[tuple[str, Found]]:
    """Yield, of every view out of distribution, AUROCs of the set's scores and how alike its members' detectors are.

    A score's name: its AUROC; `gain of` it: less that of the ensemble's confidence; `unseen, by` it: among images that
    confidence lets pass. Of members' own detectors: correlation of, flags of: `rank_correlation`, `flag_disagreement`;
    AUPR out of, AUPR in of, false alarms of: members' mean (see `ood_metrics`).
    """
    views = attempt(ood_views, test)
    for name, view in {}.items() if isinstance(views, Undefined) else views.items():
        found: Found = {}
        for words, measure in (
            ("", set_detectors),
            ("gain of ", gains_over_confidence),
            ("unseen, by ", unseen_by_confidence),
        ):
            values = attempt(measure, test, view)
            if not isinstance(values, Undefined):
                found |= {words + score: value for score, value in values.items()}
        for detector, scored in member_detectors(test, view, MEMBERS).items():
            alike = attempt(detector_agreement, scored.inside, scored.outside)
            for words, field in (("correlation of", "rank_correlation"), ("flags of", "flag_disagreement")):
                found[f"{words} {detector}"] = alike if isinstance(alike, Undefined) else getattr(alike, field)
            each = attempt(_of_members, scored)
            for words, field in (("AUPR out of", "aupr_out"), ("AUPR in of", "aupr_in"), ("false alarms of", "fpr95")):
                value = each if isinstance(each, Undefined) else float(np.mean([getattr(m, field) for m in each]))
                found[f"{words} {detector}"] = value
        yield name, found


def _of_members(scored: Scored) -> list[OODScores]:
    if not len(scored.inside):
        raise Undefined("no member accepted")
    return [ood_metrics(inside, outside) for inside, outside in zip(scored.inside, scored.outside, strict=True)]


def calibration(val: Context, test: Context, k: int) -> Iterator[tuple[str, Found]]:
    """Yield what probabilities are worth, of base, members and ensemble: ECE as they are and after a temperature.

    The temperature is fitted on val. reliability, resolution: of the Brier score, members' means; epistemic: share of
    the uncertainty that is about which member is right.
    """
    patients, found = test.bootstrap.patients, dict[str, Estimate | Undefined | float]()
    groups = {"base": (val.base[None], test.base[None])}
    if test.size:
        groups["members"] = val.probabilities, test.probabilities
        groups["ensemble"] = val.ensemble[None], test.ensemble[None]
    for who, (on_val, on_test) in groups.items():
        temperatures = np.array([temperature(p, val.labels) for p in on_val])
        found[f"{who}: ece"] = mean_of_models(PerMember(*calibration_errors(test, on_test)), patients)
        cooled = PerMember(*calibration_errors(test, after_temperature(on_test, temperatures)))
        found[f"{who}: ece after temperature"] = mean_of_models(cooled, patients)
        found[f"{who}: temperature"] = float(np.exp(np.log(temperatures).mean()))
        parts = brier_decomposition(on_test, test.labels)
        found[f"{who}: reliability"] = float(parts.reliability.mean())
        found[f"{who}: resolution"] = float(parts.generalised_resolution.mean())
    share = attempt(epistemic_share, test)
    found["epistemic"] = share if isinstance(share, Undefined) else _case_mean(test, share)
    yield CLEAN, found


def _case_mean(context: Context, values: CaseMean) -> Estimate | Undefined:
    return context.bootstrap.means([values])[0]


def unlabelled(val: Context, test: Context, k: int) -> Iterator[tuple[str, Found]]:
    """Yield, of test and every view with labels, what is said of the members' error without labels, and the truth.

    An estimate's name: its value; `off` with it: how far the estimate is off, members' mean of the absolute value;
    error: the truth; hard, soft: p-values of label shift against val, by the ensemble.
    """
    for name in ["", *(n for n, view in test.views.items() if view.known.any())]:
        found: Found = {}
        for estimator, estimate in error_estimates(val, test, name).items():
            if isinstance(estimate, Undefined):
                found[estimator] = estimate
                continue
            found[estimator], found["error"] = estimate.estimated, estimate.error
            found[f"off {estimator}"] = float(estimate.absolute_error)
        if test.size:
            shift = label_shift(val, test, lambda context: context.ensemble, name)
            found |= {"hard": shift.hard, "soft": shift.soft}
        yield name or CLEAN, found


def saliency(val: Context, test: Context, k: int) -> Iterator[tuple[str, Found]]:
    """Yield, of every method and measure, how alike explanations are: the set's, of chance, of one model, and the share
    of the way from chance to one model."""
    for name in sorted(n for n in test.evidence if n.startswith(_SALIENCY)):
        _, method, measure = name.split("/")
        null, ceiling = (test.evidence[f"saliency_{kind}/{method}/{measure}"].base for kind in ("null", "ceiling"))
        members, beside = test.evidence[name].members, Comparators(null, ceiling)
        summary = attempt(explanation_summary, members, beside, test.bootstrap)
        fields = ("agreement", "null", "ceiling", "share")
        yield (
            f"{method}:{measure}",
            {field: summary if isinstance(summary, Undefined) else getattr(summary, field) for field in fields},
        )


def membership(val: Context, test: Context, k: int) -> Iterator[tuple[str, Found]]:
    """Yield, of every attack, how well it tells training cases: base; one member, k and all of them, and what they add.

    AUC; `tpr` at a false positive rate of 1 % of one member (mean) and of the whole set.
    """
    for attack in ("loss", "lira"):
        names = evidence_name(attack, "in"), evidence_name(attack, "out")
        if not all(name in test.evidence for name in names):
            continue
        inside, outside = (test.evidence[name] for name in names)
        cases = Resampling.beside(test.bootstrap, inside.members.shape[1], test.seed)
        base = membership_inference(inside.base, outside.base, cases)
        found: Found = {"base": base.auc.value, "base: tpr": base.tpr[0.01].value}
        size = len(inside.members)
        if size >= k:
            by_k = leak_by_k(inside.members, outside.members, sorted({1, k, size}), cases, test.seed)
            found |= {"one": by_k[1], "k": by_k[k], "all": by_k[size]}
            found["k less one"] = Estimate(by_k[k].value - by_k[1].value, by_k[k].draws - by_k[1].draws, by_k[k].n)
            whole = membership_inference(set_scores(inside.members), set_scores(outside.members), cases)
            each = [membership_inference(i, o, cases).tpr[0.01].value for i, o in zip(inside.members, outside.members)]
            found |= {"one: tpr": float(np.mean(each)), "all: tpr": whole.tpr[0.01].value}
        yield attack, found


Axis = Callable[[Context, Context, int], Iterator[tuple[str, Found]]]
AXES: dict[str, Axis] = {
    "accuracy": accuracies,
    "outliers": outliers,
    "calibration": calibration,
    "unlabelled": unlabelled,
    "saliency": saliency,
    "membership": membership,
}
