"""What a run's networks say of shifted views of val and test, and what else is measured of them.

Every view, and every kind of evidence, is an artifact of its own: asking for one more computes that one alone. They
take the first members of the set (`view_members`), and may show some of the cases only (`view_cases`), for an attack
costs a member tens of predictions. Images of a view depend on the data and on `view_cases` alone, never on a seed of
the run, so that all sets of a dataset are seen by the same ones (attacks: made for each network, from the same
starts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..generators.modelset import Block, ModelSet
from ..identity import derive_seed, digest
from ..metrics.api import Predictions
from ..metrics.views import DETECTORS, View, shown_cases
from .evidence import MEASURE, Judged, Measured, asked_of
from .predict import all_logits, base_block, block_size
from .progress import progress
from .store import FileCheckpoint

if TYPE_CHECKING:
    from .attacks import Attack
    from .stages import Run

VERSION = 1
BATCH = 256
MEMBERS = 8
"""Members that are attacked together: each has changed images of its own."""


@dataclass(frozen=True)
class Seen:
    """What a set's networks say: logits float32 [member + 1, sample, class], the base first; notes on the images."""

    logits: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shifted:
    """All that a run saw beside val and test themselves.

    logits: float32 [member + 1, sample, class] by view, the base first; seconds: by view or kind of evidence, when it
    was computed.
    """

    members: int
    logits: dict[str, np.ndarray]
    evidence: dict[str, dict[str, np.ndarray]]
    notes: tuple[str, ...]
    seconds: dict[str, float]


def check_views(run: Run) -> None:
    """Raise UserError for a view that the run's dataset cannot have, before anything is computed."""
    from ..datasets.corruptions import cannot
    from ..datasets.outliers import check_outliers

    channels, size = run.data.splits["test"].images.shape[1:3]
    for view in run.spec.views:
        reason = ""
        if view.kind == "corruption":
            reason = cannot(view.operation, run.data.name, channels, size)
        elif view.kind == "outliers":
            reason = check_outliers(view.source, run.data.name)
        if reason:
            raise UserError(f"view {view.name}: {reason}: leave it out")


def shifted(
    run: Run, model_set: ModelSet, parts: Mapping[str, Predictions], accepted: np.ndarray, strategy: str
) -> Shifted:
    """Return the logits on the views and the evidence that the run asks for, computed where they are not stored.

    parts: the set's predictions in float32 by part, made in `strategy`; accepted: indices of the accepted members.
    """
    few = model_set.first(run.spec.options.view_members)
    if count := run.spec.options.view_cases:
        parts = {name: part.take(shown_cases(name, len(part.base), count)) for name, part in parts.items()}
    judged = Judged(few, parts, accepted[accepted < few.size], strategy)
    logits: dict[str, np.ndarray] = {}
    evidence: dict[str, dict[str, np.ndarray]] = {}
    notes: list[str] = []
    seconds: dict[str, float] = {}
    for view in run.spec.views:
        seen = _view(run, few, view, strategy)
        logits[str(view)] = seen.logits
        notes += [note for note in seen.notes if note not in notes]
        seconds[str(view)] = _about(run, few, view.__dict__)["seconds"]
    for kind in run.spec.options.evidence:
        found = _evidence(run, judged, kind)
        for where, arrays in found.arrays.items():  # that of all detectors is one
            evidence.setdefault(where, {}).update(arrays)
        notes += [note for note in found.notes if note not in notes]
        seconds["detectors" if kind in DETECTORS else kind] = _about(run, few, asked_of(run, judged, kind))["seconds"]
    return Shifted(few.size, logits, evidence, tuple(notes), seconds)


def _identity(run: Run, few: ModelSet, asked: dict[str, Any]) -> dict[str, Any]:
    identity = {"set": run.keys["set"], "members": few.size, "version": VERSION, "asked": asked}
    cases = run.spec.options.view_cases
    return identity | {"cases": cases} if cases else identity


def _about(run: Run, few: ModelSet, asked: dict[str, Any]) -> dict[str, Any]:
    return run.store.about("view", digest(_identity(run, few, asked)))


def _produce(run: Run, few: ModelSet, asked: dict[str, Any], compute: Callable[[Path], list[str]]) -> Path:
    """Return the artifact of a view or of evidence; `compute` writes its arrays and returns its notes."""

    def timed(work: Path) -> dict[str, Any]:
        start = time.perf_counter()
        notes = compute(work)
        return {"notes": notes, "seconds": time.perf_counter() - start}

    whole = _identity(run, few, asked)
    return run.store.produce("view", digest(whole), whole, timed)


def _view(run: Run, few: ModelSet, view: View, strategy: str) -> Seen:
    def compute(work: Path) -> list[str]:
        logits, notes = _logits(run, few, view, strategy, work)
        np.save(work / "logits.npy", logits, allow_pickle=False)
        return notes

    folder = _produce(run, few, view.__dict__, compute)
    notes = tuple(_about(run, few, view.__dict__)["notes"])
    return Seen(np.load(folder / "logits.npy", allow_pickle=False), notes)


def _logits(run: Run, few: ModelSet, view: View, strategy: str, work: Path) -> tuple[np.ndarray, list[str]]:
    if view.kind == "attack":
        return _attacked(run, few, view, strategy, FileCheckpoint(work)), []
    images, notes = view_images(run, view)
    return all_logits(run.network, run.base(), few, images, strategy), notes


def view_images(run: Run, view: View) -> tuple[Tensor, list[str]]:
    """Return the images of a view that do not depend on a network, uint8 [sample, ...] on the device, and notes."""
    from ..datasets.corruptions import corrupt
    from ..datasets.outliers import outliers

    own = run.shown(view.part).images
    if view.kind == "outliers":
        found = outliers(
            view.source,
            len(own),
            own.shape[1],
            own.shape[2],
            derive_seed("outliers", view.source, view.part),
            run.spec.options.data_root,
            view.part,
        )
        return found.images.to(run.device), [f"{view.name}: {found.note}"] if found.note else []
    seed = derive_seed("corruption", view.part)
    blocks = [
        corrupt(block + 0, view.operation, view.number, seed, first=BATCH * i)  # + 0: streamed images become ordinary
        for i, block in enumerate(own.split(BATCH))
    ]
    return torch.cat(blocks), []


def attack_of(view: View, pixels: int) -> Attack:
    """Return the attack that a view's name means, for images of so many numbers."""
    from .attacks import Attack

    radius = view.number / 255
    if view.operation == "pgd_l2":
        return Attack("pgd", norm="l2", radius=radius * pixels**0.5)
    return Attack(view.operation.removesuffix("_transfer"), norm="linf", radius=radius)


def attacked_images(run: Run, block: Block, view: View, strategy: str) -> Tensor:
    """Return a part's images as an attack changes them for each member of a block, float32 [member, sample, ...]."""
    from .attacks import attack

    part = run.shown(view.part)
    chosen, seed = attack_of(view, part.images[:1].numel()), derive_seed("attack", view.part)
    blocks = zip(part.images.split(BATCH), part.labels.split(BATCH))
    found = [
        attack(run.network, block, images + 0, labels, chosen, seed, strategy, first=BATCH * i)  # + 0: not streamed
        for i, (images, labels) in enumerate(blocks)
    ]
    return torch.cat(found, dim=1)


def _attacked(run: Run, few: ModelSet, view: View, strategy: str, checkpoint: FileCheckpoint) -> np.ndarray:
    """Return every network's logits on images that were changed for itself; of a transfer attack, for the base."""
    from .attacks import choose_attack_strategy, predict_each

    base = base_block(run.base())
    if view.operation.endswith("_transfer"):
        return all_logits(run.network, run.base(), few, attacked_images(run, base, view, "loop")[0], strategy)
    images = run.shown(view.part).images
    chosen = checkpoint.once("strategy", lambda: choose_attack_strategy(run.network, few, images))

    def own_logits(block: Block) -> np.ndarray:
        images = attacked_images(run, block, view, chosen)
        return predict_each(run.network, block, images, chosen).float().cpu().numpy()

    rows, size = [own_logits(base)], min(block_size(few), MEMBERS)
    for start in progress(range(0, few.size, size), f"attacking, {view}"):
        kept = checkpoint.load(f"attacked {start}")
        if kept is None:
            kept = {"logits": torch.from_numpy(own_logits(few.block(start, min(start + size, few.size))))}
            checkpoint.save(f"attacked {start}", kept)
        rows.append(kept["logits"].numpy())
    return np.concatenate(rows)


def _evidence(run: Run, judged: Judged, kind: str) -> Measured:
    def compute(work: Path) -> list[str]:
        measured = MEASURE[kind](run, judged)
        arrays = {f"{where}:{name}": a for where, named in measured.arrays.items() for name, a in named.items()}
        np.savez(work / "evidence.npz", allow_pickle=False, **arrays)
        return list(measured.notes)

    asked = asked_of(run, judged, kind)
    folder = _produce(run, judged.few, asked, compute)
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / "evidence.npz", allow_pickle=False) as stored:
        for key in stored.files:
            where, _, name = key.partition(":")
            found.setdefault(where, {})[name] = stored[key]
    return Measured(found, tuple(_about(run, judged.few, asked)["notes"]))
