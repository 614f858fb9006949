"""Hidden strata of a dataset: found on train by frozen reference networks, assigned to every part, shared by all.

References are trained by the run's recipe (by plain risk minimisation, whatever the run's objective) from seeds of
their own, so that none is a network whose errors the strata are to explain. Kinds: `clusters` in the penultimate
features of the first reference; `slices` of its errors; slices of the `disagreement` of all references. Samples of the
other parts are assigned by features and label alone: what a network decides on them has no say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import UserError
from ..generators.api import Trained
from ..identity import derive_seed, digest
from ..leaderboard.suite import STRATA
from ..metrics.api import Undefined
from ..metrics.context import decide, softmax
from ..metrics.decisions import disagreement, votes
from ..metrics.slices import Slices, fit_disagreement_slices, fit_slices
from ..metrics.strata import Strata, fit_clusters
from ..metrics.strata_measures import places_of, rediscovery
from . import features
from .features import Embedded
from .networks import Network
from .objectives import case_losses
from .predict import BATCH

if TYPE_CHECKING:
    from .stages import Run

VERSION = 3
REFERENCE_SEEDS = (101, 102, 103, 104, 105)
"""Base seeds of the references: none that a board uses. The first is the one whose features are clustered."""
SLICES = 8
PARTS = ("train", "tune", "val", "test")
PLACED = ("val", "test")


@dataclass(frozen=True)
class Found:
    """Strata of one kind: codes int64 [sample] by part of the data, -1 for none; names of the codes; what was found.

    places: of the cases of val and test, in the order of how firmly their stratum holds them (see `places_of`).
    """

    codes: dict[str, np.ndarray]
    places: dict[str, np.ndarray]
    names: list[str]
    about: dict[str, Any]


def embed(network: Network, trained: Trained, images: Any, batch_size: int = BATCH) -> Embedded:
    """Return the input of the network's last linear layer, and its logits, for uint8 images.

    Raises UserError for a network whose only linear layer sees the pixels themselves.
    """
    if reason := features.without_features(network):
        raise UserError(f"{reason} to find strata in: choose another network")
    return features.embed(network, trained, images, batch_size)


def reference(run: Run, seed: int = REFERENCE_SEEDS[0]) -> Run:
    """Return the run whose base is a reference: same data, network and recipe, objective=erm."""
    options = replace(run.spec.options, base_seed=seed)
    training = replace(run.spec.training, objective="erm", groups="")
    return type(run)(replace(run.spec, options=options, training=training), run.session)


def find(run: Run, kind: str) -> Found:
    """Return the strata of one kind for the run's dataset, network and recipe, found if they are not in the store.

    Raises UserError for an unknown kind, a multi-label task, or a network without features.
    """
    if kind not in STRATA:
        raise UserError(f"there are no strata of kind {kind}: choose {', '.join(STRATA)}")
    if run.data.task == "multilabel":
        raise UserError(f"dataset {run.data.name} is multi-label: strata are of the classes of a single-label task")
    spec = {"references": [reference(run, s).keys["base"] for s in REFERENCE_SEEDS], "kind": kind, "version": VERSION}
    folder = run.store.produce("strata", digest(spec), spec, partial(_find, run, kind))
    with np.load(folder / "codes.npz", allow_pickle=False) as codes:
        about = run.store.about("strata", digest(spec))
        places = {part: codes[f"{part}_places"] for part in PLACED}
        return Found({part: codes[part] for part in PARTS}, places, about.pop("names"), about)


def _find(run: Run, kind: str, work: Path) -> dict[str, Any]:
    seen = {part: _seen(reference(run), part) for part in PARTS}
    labels = {part: run.data.splits[part].labels for part in PARTS}
    fitted: Strata | Slices = _clusters(run, seen["train"]) if kind == "clusters" else _slices(run, seen["train"], kind)
    codes: dict[str, Any] = {part: fitted.assign(seen[part].features, labels[part]) for part in PARTS}
    places = {
        f"{part}_places": places_of(fitted.responsibilities(seen[part].features, labels[part])) for part in PLACED
    }
    np.savez(work / "codes.npz", allow_pickle=False, **codes, **places)
    if isinstance(fitted, Slices):
        return {"names": [f"slice {i}" for i in range(fitted.count)], "gap": fitted.gap.tolist()}
    return {
        "names": fitted.names(run.data.classes),
        "classes": [{"label": c.label, "count": c.count, "found": c.reason} for c in fitted.classes],
        "rediscovered": _rediscovered(run, codes["test"], labels["test"]),
    }


def _seen(run: Run, part: str) -> Embedded:
    return embed(run.network, run.base(), run.part(part).images)


def _clusters(run: Run, train: Embedded) -> Strata:
    labels = torch.from_numpy(run.data.splits["train"].labels)
    losses = case_losses(torch.from_numpy(train.logits), labels).numpy()
    return fit_clusters(train.features, labels.numpy(), derive_seed("strata", "clusters"), losses)


def _slices(run: Run, train: Embedded, kind: str) -> Slices:
    labels, seed = run.data.splits["train"].labels, derive_seed("strata", kind)
    if kind == "slices":
        return fit_slices(train.features, labels, softmax(train.logits), SLICES, seed)
    return fit_disagreement_slices(train.features, labels, _disagreement(run), SLICES, seed)


def _rediscovered(run: Run, codes: np.ndarray, labels: np.ndarray) -> float | None:
    """Return how alike the clusters of the references are on test (see `rediscovery`), None where none cuts a class."""
    found = [codes]
    for seed in REFERENCE_SEEDS[1:]:
        other = reference(run, seed)
        fitted = _clusters(run, _seen(other, "train"))
        found.append(fitted.assign(_seen(other, "test").features, labels))
    try:
        return rediscovery(found, labels)
    except Undefined:
        return None


def _disagreement(run: Run) -> np.ndarray:
    """Return the share of pairs of references that decide differently, float64 [sample], on train."""
    logits = np.stack([_seen(reference(run, seed), "train").logits for seed in REFERENCE_SEEDS])
    return disagreement(votes(decide(softmax(logits)), logits.shape[-1]))
