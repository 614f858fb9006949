"""What is measured of a set's networks beside predictions: outlier detectors, explanations, leaks of training data.

Every kind gives arrays by part (`test`) or view (`test/ood-noise`) and name, float [member + 1, sample], the base
first, NaN where undefined: what `metrics.context.Evidence` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..generators.modelset import Block, ModelSet
from ..metrics.api import Predictions, Undefined
from ..metrics.explanations import MEASURES, comparators, evidence_name, pairwise_agreement
from ..metrics.views import DETECTORS, PARTS, View, shown_cases
from .explanations import (
    METHODS,
    explain,
    explained_classes,
    explained_decisions,
    random_networks,
    rounding_noise,
    unsupported,
)
from .features import detector_scores, skip_reason
from .predict import all_logits, base_block, block_size
from .progress import progress

if TYPE_CHECKING:
    from .stages import Run

SALIENCY_CASES = 40
"""Cases of a part that are explained: maps are as large as images, and an explanation costs up to 32 predictions."""
SOURCES = 5
"""Networks whose attacks are shown to all."""
BLOCK = 8


@dataclass(frozen=True)
class Judged:
    """The networks that views take, `few`, as val and test saw them, and who of them is accepted (indices).

    parts: predictions in float32 on the cases that views show, by part, of all members; strategy: that of them.
    """

    few: ModelSet
    parts: Mapping[str, Predictions]
    accepted: np.ndarray
    strategy: str


@dataclass(frozen=True)
class Measured:
    """Evidence by part or view and name, and notes on what could not be measured."""

    arrays: dict[str, dict[str, np.ndarray]]
    notes: tuple[str, ...] = ()


def asked_of(run: Run, judged: Judged, kind: str) -> dict[str, Any]:
    """Return what evidence of a kind depends on beside the set and its number of members."""
    if kind in DETECTORS:
        return {"detectors": _detectors(run), "outliers": [str(v) for v in run.spec.views if v.kind == "outliers"]}
    if kind == "transfer":
        return {"evidence": kind, "views": [str(v) for v in _attacks(run)], "sources": _sources(judged)}
    if kind == "saliency":  # a member is compared with the accepted ones
        return {"evidence": kind, "accepted": [int(m) for m in judged.accepted]}
    return {"evidence": kind}


def _detectors(run: Run) -> list[str]:
    return [name for name in DETECTORS if name in run.spec.options.evidence]


def detectors(run: Run, judged: Judged) -> Measured:
    """Measure detectors of outliers in every network's own features, fitted on train (see `detector_scores`).

    A network's scores are less their mean on val, over their standard deviation there: ranks and thresholds stay, and
    half precision keeps their digits.
    """
    from .views import view_images

    few, asked = judged.few, _detectors(run)
    if reason := skip_reason(run.network, few):
        return Measured({}, (f"no detectors: {reason}",))
    seen = {part: run.shown(part).images for part in PARTS}
    seen |= {str(view): view_images(run, view)[0] for view in run.spec.views if view.kind == "outliers"}
    reasons: dict[str, str] = {}
    rows: dict[str, list[np.ndarray]] = {where: [] for where in seen}
    blocks = [base_block(run.base()), *few.blocks(min(block_size(few), BLOCK))]
    for block in progress(blocks, "detectors of outliers"):
        found = detector_scores(run.network, block, run.part("train"), seen, detectors=asked)
        reasons |= {name: next(iter(of.values())) for name, of in found.reasons.items()}
        for where, values in found.views.items():
            rows[where].append(values)
    scores = {where: np.concatenate(values).astype(np.float64) for where, values in rows.items()}
    middle, spread = scores["val"].mean(axis=-1, keepdims=True), scores["val"].std(axis=-1, keepdims=True)
    spread = np.where(spread > 0, spread, 1.0)
    arrays = {
        where: {f"detector/{name}": ((of - middle) / spread)[:, d] for d, name in enumerate(asked)}
        for where, of in scores.items()
    }
    return Measured(arrays, tuple(f"detector {name}: {reason}" for name, reason in sorted(reasons.items())))


@dataclass(frozen=True)
class _Explained:
    """Maps of the first cases of one part by one method, float32 [..., sample, height, width].

    members: of the accepted ones, None without any; random: of networks of fresh weights; noised: of the base, on
    images with rounding noise.
    """

    members: np.ndarray | None
    base: np.ndarray
    random: np.ndarray
    noised: np.ndarray


def saliency(run: Run, judged: Judged) -> Measured:
    """Measure how alike the explanations of the accepted members are, on the first cases of val and test."""
    arrays: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
    notes: dict[str, None] = {}
    for method in METHODS:
        if reason := unsupported(run.network, judged.few.block(0, 1), method):
            notes[reason] = None
            continue
        for part in PARTS:
            maps = _maps(run, judged, part, method)
            for measure in MEASURES:
                try:
                    constant = _compare(judged, part, maps, method, measure, arrays[part])
                except Undefined as reason:  # images smaller than the window of a measure
                    notes[f"no {measure} of explanations: {reason}"] = None
                    continue
                if constant:
                    notes[f"{method} on {part}: {constant} constant maps, compared with none"] = None
    return Measured(arrays, tuple(notes))


def _maps(run: Run, judged: Judged, part: str, method: str) -> _Explained:
    images = run.shown(part).images[:SALIENCY_CASES] + 0  # + 0: of streamed images an ordinary tensor
    classes = explained_classes(judged.parts[part].base[: len(images)])
    several = run.data.task == "multilabel"

    def explained(blocks: Iterable[Block], shown: Tensor) -> np.ndarray:
        return np.concatenate([explain(run.network, b, shown, classes, method, multilabel=several) for b in blocks])

    random, base = random_networks(run.network), base_block(run.base())
    return _Explained(
        explained(_each(judged.few, judged.accepted), images) if len(judged.accepted) else None,
        explained([base], images)[0],
        explained(random.blocks(random.size), images),
        explained([base], rounding_noise(images))[0],
    )


def _each(few: ModelSet, members: np.ndarray) -> Iterator[Block]:
    for member in members:
        yield few.block(int(member), int(member) + 1)


def _compare(
    judged: Judged, part: str, maps: _Explained, method: str, measure: str, arrays: dict[str, np.ndarray]
) -> int:
    """Add one measure's agreement, its null and its ceiling to the arrays; return the number of constant maps."""
    predictions, cases, accepted = judged.parts[part], len(maps.base), judged.accepted
    beside = comparators(maps.base, maps.random, maps.noised, measure)
    for name, values in (("null", beside.null), ("ceiling", beside.ceiling)):
        arrays[f"saliency_{name}/{method}/{measure}"] = _padded(values[None], predictions)
    rows, constant = np.full((judged.few.size + 1, cases), np.nan), 0
    if maps.members is not None:
        base, members = predictions.base[:cases], predictions.logits[accepted][:, :cases]
        classes, several = explained_classes(base), predictions.task == "multilabel"
        decided, of_base = (explained_decisions(logits, classes, several) for logits in (members, base))
        found = pairwise_agreement(maps.members, decided, maps.base, of_base, measure)
        rows[0], rows[1 + accepted] = found.base, found.members
        constant = int(found.constant.sum())
    arrays[evidence_name(method, measure)] = _padded(rows, predictions)
    return constant


def _padded(values: np.ndarray, part: Predictions) -> np.ndarray:
    """Return values of the first cases [row, case] as values of all cases of a part, NaN for the others."""
    out = np.full((len(values), len(part.base)), np.nan)
    out[:, : values.shape[1]] = values
    return out


def membership(run: Run, judged: Judged) -> Measured:
    """Measure how far every network's answers tell the cases that it was trained on from others (see `shadows`)."""
    from .shadows import membership_evidence, pool_of, shadows

    found = shadows(run)
    seen = pool_of(run, found.train_rows, found.test_rows)
    logits = all_logits(run.network, run.base(), judged.few, seen.images, judged.strategy)
    cases = len(run.part("test"))
    arrays = membership_evidence(found, logits, seen.labels.cpu().numpy(), cases)
    rows = shown_cases("test", cases, run.spec.options.view_cases or cases)
    return Measured({"test": {n: a[:, rows] if n.endswith("/out") else a for n, a in arrays.items()}})


def transfer(run: Run, judged: Judged) -> Measured:
    """Measure how every network decides images of test that were changed for the others.

    The others are `SOURCES` networks, the base and the first accepted members, each attacked as by the run's views; a
    network's own images do not count: what is stored is the share of the others' images that it decides rightly, by
    case. Multi-label tasks have none.
    """
    from .views import attacked_images

    part, few = run.shown("test"), judged.few
    if run.data.task == "multilabel":
        return Measured({}, ("no transfer of attacks: cases with several labels are not simply right or wrong",))
    arrays: dict[str, np.ndarray] = {}
    labels = part.labels.cpu().numpy()
    for view in _attacks(run):
        right = np.zeros((few.size + 1, len(labels)))
        others = np.zeros((few.size + 1, 1))
        for source in progress(_sources(judged), f"transfer of {view.name}"):
            block = base_block(run.base()) if source < 0 else few.block(source, source + 1)
            images = attacked_images(run, block, view, "loop")[0]
            decided = all_logits(run.network, run.base(), few, images, judged.strategy).argmax(axis=-1)
            counts = np.arange(few.size + 1) != source + 1
            right[counts] += decided[counts] == labels
            others[counts] += 1
        with np.errstate(invalid="ignore"):
            arrays[f"transfer/{view.name}"] = np.where(labels >= 0, right / others, np.nan)
    return Measured({"test": arrays})


def _sources(judged: Judged) -> list[int]:
    return [-1, *(int(m) for m in judged.accepted[: SOURCES - 1])]


def _attacks(run: Run) -> list[View]:
    return [v for v in run.spec.views if v.kind == "attack" and v.part == "test" and "transfer" not in v.operation]


MEASURE: dict[str, Callable[[Run, Judged], Measured]] = {
    **dict.fromkeys(DETECTORS, detectors),
    "saliency": saliency,
    "transfer": transfer,
    "membership": membership,
}
