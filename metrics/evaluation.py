"""The whole protocol: who is in the set, decided on val; every metric of the set, computed on test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import UserError
from .api import METRICS, Metric, MetricInfo, Predictions, Score, Settings, Undefined
from .context import Context, check_finite, over_contexts
from .decisions import ambiguous
from .intervals import CaseMean, Estimate, PatientBootstrap, average, wilson
from .membership import Membership, membership
from .views import SCORED

_Results = dict[str, list[Estimate | Undefined]]


@dataclass(frozen=True)
class Evaluation:
    """What one model set scored.

    scores: by score key; membership: validation losses and paired differences; accepted: indices of the K members at
    settings.epsilon; epsilon_in_se: epsilon in standard errors of the paired difference; warnings: one line each.
    """

    scores: dict[str, Score]
    membership: Membership
    accepted: np.ndarray
    epsilon_in_se: float
    warnings: tuple[str, ...]


def catalogue(names: Sequence[str] | None = None) -> dict[str, MetricInfo]:
    """Return what the metrics declare, by name, without computing any; by default all that a record can hold.

    What is given by member (`level="criterion"`, "property", "group") is not recorded: it is left out.
    """
    functions = _functions(None) if names is None else {name: METRICS.get(name) for name in names}
    return {name: function.info for name, function in functions.items()}


def evaluate(
    val: Predictions, test: Predictions, settings: Settings | None = None, names: Sequence[str] | None = None
) -> Evaluation:
    """Score a model set: membership on `val`, every metric (or those named) on `test` for the accepted members.

    Raises NonFinite naming member and sample for logits that are not finite, ValueError for shapes that do not fit,
    UserError for an unknown metric or one that no record scores, Undefined when the loss of membership has no value on
    `val`.
    """
    settings = settings or Settings()
    for view in (val, test):
        check_shapes(view)
        check_finite(view)
    if len(val.logits) != len(test.logits):
        raise ValueError(f"{len(val.logits)} members on {val.view}, {len(test.logits)} on {test.view}")
    if val.failed != test.failed:
        raise ValueError(f"failed members are {val.failed} on {val.view}, {test.failed} on {test.view}")
    functions = _functions(names)
    who = membership(val, settings)
    accepted = np.flatnonzero(who.accepted(settings.epsilon))
    scores = {**_acceptance(functions, who, settings), **score_view(test, accepted, settings, names)}
    warnings = tuple(w for w in (who.failures(), who.warning(settings.epsilon)) if w)
    return Evaluation(scores, who, accepted, who.epsilon_in_se(settings.epsilon), warnings)


def score_view(
    predictions: Predictions,
    accepted: np.ndarray,
    settings: Settings,
    names: Sequence[str] | None = None,
    view: str = "",
) -> dict[str, Score]:
    """Return the scores of the accepted members (indices) and of the base on one view.

    view: what keys are marked with, `accuracy.base/view`; "" for the test split itself.
    """
    functions = {n: f for n, f in _functions(names).items() if f.info.level != "membership"}
    bootstrap = PatientBootstrap(len(predictions.base), predictions.patient, settings.draws, settings.seed)
    results: _Results = defaultdict(list)
    drawn = len(predictions.logits)
    several = predictions.task == "multilabel" and "ambiguity" in functions
    any_label = np.zeros((len(accepted), len(predictions.base)), bool)

    def of_problem(context: Context) -> tuple[dict[str, Estimate | Undefined], np.ndarray | None]:
        return _estimates(context, functions, settings.k, drawn), context.flips if several else None

    for found, flips in over_contexts(of_problem, predictions, accepted, bootstrap, settings.seed):
        for key, estimate in found.items():
            results[key].append(estimate)
        if flips is not None:
            any_label |= flips
    if several:
        _add_any_label(results, any_label, bootstrap, settings.k, drawn)
    marked = f"/{view}" if view else ""
    return {
        key.replace("/", marked, 1): _score(functions[_name(key)].info, estimates) for key, estimates in results.items()
    }


def view_scores(views: Mapping[str, Predictions], accepted: np.ndarray, settings: Settings) -> dict[str, Score]:
    """Return the scores of the accepted members (indices; those that views have) on the views of test with labels."""
    found: dict[str, Score] = {}
    for key, predictions in views.items():
        part, _, name = key.partition("/")
        if part == "test" and (predictions.labels >= 0).any():
            check_finite(predictions)
            members = accepted[accepted < len(predictions.logits)]
            found |= score_view(predictions, members, settings, SCORED, name)
    return found


def check_shapes(predictions: Predictions) -> None:
    """Raise ValueError naming the array of `predictions` that does not fit the others."""
    p = predictions
    labels = p.base.shape if p.task == "multilabel" else p.base.shape[:1]
    wanted = {"logits": (len(p.logits), *p.base.shape), "labels": labels}
    found = {"logits": p.logits.shape, "labels": p.labels.shape}
    optional = {"patient": p.patient, **{f"attribute '{k}'": v for k, v in p.attributes.items()}}
    for name, array in optional.items():
        if array is not None:
            wanted[name], found[name] = p.base.shape[:1], array.shape
    for name in wanted:
        if tuple(wanted[name]) != tuple(found[name]):
            raise ValueError(f"{name} on {p.view} has shape {tuple(found[name])}, not {tuple(wanted[name])}")
    if strangers := set(p.failed) - set(range(len(p.logits))):
        raise ValueError(f"failed members on {p.view} are {sorted(strangers)}, not in 0..{len(p.logits) - 1}")
    classes = 2 if p.task == "multilabel" else p.base.shape[-1]
    if p.labels.size and not -1 <= p.labels.min() <= p.labels.max() < classes:
        raise ValueError(f"labels on {p.view} lie in {p.labels.min()}..{p.labels.max()}, not in 0..{classes - 1} or -1")


_UNRECORDED = {
    "criterion": "members are chosen by a criterion, no record scores it",
    "property": "a property of members is computed from stored views, no record scores it",
    "group": "a metric of groups is computed from the predictions, no record scores it",
}


def _functions(names: Sequence[str] | None) -> dict[str, Metric]:
    functions = dict(METRICS.load_all()) if names is None else {name: METRICS.get(name) for name in names}
    if names is not None:
        for level, reason in _UNRECORDED.items():
            if named := [name for name, function in functions.items() if function.info.level == level]:
                raise UserError(f"{', '.join(named)}: {reason}")
    return {name: function for name, function in functions.items() if function.info.level not in _UNRECORDED}


def _acceptance(functions: Mapping[str, Metric], who: Membership, settings: Settings) -> dict[str, Score]:
    scores = {}
    for name, function in functions.items():
        if function.info.level != "membership":
            continue
        shown = {"": settings.epsilon, **{f"#epsilon={e:g}": e for e in settings.epsilons}}
        for suffix, epsilon in shown.items():
            inside, drawn = int(np.sum(function(who, epsilon))), len(who.members)
            ends = wilson(inside, drawn)
            scores[name + suffix] = Score(inside / drawn, ends.low, ends.high, "Wilson", drawn, function.info.version)
    return scores


def _estimates(
    context: Context, functions: Mapping[str, Metric], k: int, drawn: int
) -> dict[str, Estimate | Undefined]:
    """Return every metric of one problem; what is a mean over cases is resampled in one product for all metrics."""
    found = {
        key + suffix: result
        for key, compute in _plan(context, functions, k, drawn)
        for suffix, result in _attempt(compute).items()
    }
    for key, result in found.items():
        if not isinstance(result, (CaseMean, Estimate, Undefined)):
            found[key] = CaseMean(np.asarray(result))
    waiting = [result for result in found.values() if isinstance(result, CaseMean)]
    means = iter(context.bootstrap.means(waiting))
    return {key: next(means) if isinstance(result, CaseMean) else result for key, result in found.items()}


def _plan(
    context: Context, functions: Mapping[str, Metric], k: int, drawn: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield score keys, with "/" where a view goes, and the calls that compute them."""
    size, nobody = context.size, f"0 of {drawn} drawn members accepted"
    for name, f in functions.items():
        least = f.info.min_members
        few = nobody if least == 1 else f"{size} of {least} accepted"
        if f.info.level == "model":
            yield f"{name}.base/", partial(f, context, context.base[None])
            yield f"{name}.member_mean/", _refuse(nobody) if not size else partial(f, context, context.probabilities)
            yield f"{name}.ensemble/", _refuse(nobody) if not size else partial(f, context, context.ensemble[None])
        elif not f.info.at_k:
            yield f"{name}/", _refuse(few) if size < least else partial(f, context)
        else:
            yield f"{name}/", _refuse(few) if size < least else partial(f, context, None)
            wanted = max(k, least)
            yield f"{name}@{k}/", _refuse(f"{size} of {wanted} accepted") if size < wanted else partial(f, context, k)


def _refuse(reason: str) -> Callable[[], Undefined]:
    return partial(Undefined, reason)


def _attempt(compute: Callable[[], Any]) -> Mapping[str, Any]:
    try:
        result = compute()
    except Undefined as reason:
        result = reason
    return result if isinstance(result, Mapping) else {"": result}


def _add_any_label(results: _Results, flips: np.ndarray, bootstrap: PatientBootstrap, k: int, drawn: int) -> None:
    """Add `ambiguity.any_label`: the share of patients of whom some member flips any label of any image.

    flips: whether a member flips any label of an image, bool [member, sample].
    """
    patients, size = bootstrap.of_patients(), len(flips)
    counts = np.zeros(bootstrap.patients, np.int64)
    for of_member in flips:
        counts += bootstrap.by_patient(of_member.astype(np.int32)) > 0
    for key, at in (("ambiguity.any_label/", None), (f"ambiguity.any_label@{k}/", k)):
        if size >= (at or 1):
            results[key].append(patients.mean(ambiguous(counts, size, at)))
        else:
            few = f"{size} of {at} accepted" if at else f"0 of {drawn} drawn members accepted"
            results[key].append(Undefined(few))


def _name(key: str) -> str:
    for mark in "/@.":
        key = key.split(mark)[0]
    return key


def _score(info: MetricInfo, estimates: list[Estimate | Undefined]) -> Score:
    """Return the mean over labels (of one problem: itself) as a Score; NaN with the first label's reason."""
    for label, estimate in enumerate(estimates):
        if isinstance(estimate, Undefined):
            where = f"label {label}: " if len(estimates) > 1 and "accepted" not in str(estimate) else ""
            return Score(float("nan"), version=info.version, reason=f"{where}{estimate}")
    mean = average(estimates)  # type: ignore[arg-type]
    ends = mean.interval()
    made = "bootstrap over patients" if np.isfinite(ends.low) else ""
    if not np.isfinite(mean.value):
        return Score(float("nan"), n=mean.n, version=info.version, reason="the metric gave no finite value")
    return Score(mean.value, ends.low, ends.high, made, mean.n, info.version)
