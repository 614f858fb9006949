"""Shadow networks for membership inference: the run's recipe on random halves of a pool of train and test cases.

The pool is what the attacker of `metrics.privacy` holds: n training cases of the run's networks and n test cases, which
they never saw, with their labels. Shadows are trained on n cases of it, drawn from both parts alike: nothing about a
shadow depends on which cases the run's networks saw, and no shadow sees another training case. The run's networks train
on more; an attacker who knew the rest of train as well could come closer to them, so that what is found is a lower
bound of the leak.

The pool holds one image of a patient, so that a case is inside or outside a shadow as a whole, members are independent,
and train and test cases differ in nothing but having been seen. (An image whose patient has others in train is leaked
by these too.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.api import Split
from ..errors import UserError
from ..generators.api import Part
from ..identity import derive_seed, digest
from ..metrics.privacy import LikelihoodRatio, attack_scores, evidence_name, log_odds
from .objectives import Grouping
from .predict import base_block, predict_block
from .progress import progress
from .store import FileCheckpoint
from .train import train

if TYPE_CHECKING:
    from .stages import Run

VERSION = 1
SHADOWS = 16
FILE = "shadows.npz"


@dataclass(frozen=True)
class Shadows:
    """What an attacker's networks say of the pool: n cases of train, then n of test.

    train_rows, test_rows: int64 [n], rows of these parts; inside: bool [shadow, 2n], who was trained on which; logits:
    float32 [shadow, 2n, class].
    """

    train_rows: np.ndarray
    test_rows: np.ndarray
    inside: np.ndarray
    logits: np.ndarray


def shadows(run: Run) -> Shadows:
    """Return the shadows of the run's dataset, network and recipe, trained if they are not in the store.

    They are the same for all base seeds and generators. Raises UserError for a multi-label task, where a case has no
    single true class.
    """
    if run.data.task == "multilabel":
        raise UserError(f"dataset {run.data.name} is multi-label: membership is inferred from one true class per image")
    shared = {k: v for k, v in run.spec.base_identity(run.data).items() if k != "base_seed"}
    spec = {**shared, "shadows": SHADOWS, "version": VERSION}
    folder = run.store.produce("shadows", digest(spec), spec, partial(_make, run))
    with np.load(folder / FILE, allow_pickle=False) as stored:
        return Shadows(stored["train_rows"], stored["test_rows"], stored["inside"], stored["logits"])


def pool_of(run: Run, train_rows: np.ndarray, test_rows: np.ndarray) -> Part:
    """Return images and labels of the pool: those rows of train, then those of test."""
    rows = (("train", train_rows), ("test", test_rows))
    parts = [(run.part(name), torch.from_numpy(chosen).to(run.device)) for name, chosen in rows]
    return Part(torch.cat([p.images[r] for p, r in parts]), torch.cat([p.labels[r] for p, r in parts]))


def membership_evidence(
    found: Shadows, logits: np.ndarray, labels: np.ndarray, test_cases: int
) -> dict[str, np.ndarray]:
    """Return what the attacks make of networks, by the names under which a context on test holds it as evidence.

    `membership/<attack>/in`: scores of the n training cases, float64 [network, n]; `membership/<attack>/out`: of the
    test cases, float64 [network, test case], NaN outside the pool. logits: of the networks on the pool [network, 2n,
    class]; labels: of the pool; test_cases: how many there are. Raises Undefined as `LikelihoodRatio.fit`.
    """
    n = len(found.train_rows)
    ratio = LikelihoodRatio.fit(log_odds(found.logits, labels), found.inside)
    out = {}
    for attack, scores in attack_scores(logits, labels, ratio).items():
        outside = np.full((len(scores), test_cases), np.nan)
        outside[:, found.test_rows] = scores[:, n:]
        out[evidence_name(attack, "in")], out[evidence_name(attack, "out")] = scores[:, :n], outside
    return out


def draw_pool(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the pool's rows of train and of test, as many of each, sorted: one image of a patient, patients at random.

    Where patients are unknown every image is one; an image that a resampled train part repeats is drawn once.
    """
    of_train = _one_each(train, derive_seed("shadows", "pool", "train"))
    of_test = _one_each(test, derive_seed("shadows", "pool", "test"))
    n = min(len(of_train), len(of_test))
    return np.sort(of_train[:n]), np.sort(of_test[:n])


def draw_halves(cases: int, count: int = SHADOWS) -> np.ndarray:
    """Return who is trained on which, bool [shadow, case]: halves at random, each followed by its complement.

    Every shadow has half of the cases and every case is in half of the shadows. cases, count: even.
    """
    rng = np.random.default_rng(derive_seed("shadows", "halves"))
    first = np.stack([rng.permutation(cases) < cases // 2 for _ in range(count // 2)])
    return np.stack([first, ~first], axis=1).reshape(count, cases)


def _one_each(split: Split, seed: int) -> np.ndarray:
    """Return one row of every patient, all in random order."""
    shuffled = np.random.default_rng(seed).permutation(len(split))
    unit = (split.ids if split.patient is None else split.patient)[shuffled]
    return shuffled[np.sort(np.unique(unit, return_index=True)[1])]


def _make(run: Run, work: Path) -> dict[str, Any]:
    train_rows, test_rows = draw_pool(run.data.splits["train"], run.data.splits["test"])
    pool, grouping = pool_of(run, train_rows, test_rows), _grouping(run, {"train": train_rows, "test": test_rows})
    inside, checkpoint = draw_halves(len(pool)), FileCheckpoint(work, run.device)
    logits = []
    for s in progress(range(SHADOWS), "training shadows", SHADOWS):
        done = checkpoint.load(f"shadow {s}")
        if done is None:
            done = {"logits": _shadow(run, pool, grouping, torch.from_numpy(np.flatnonzero(inside[s])), s, checkpoint)}
            checkpoint.save(f"shadow {s}", done)
        logits.append(done["logits"].cpu().numpy())
    np.savez(work / FILE, train_rows=train_rows, test_rows=test_rows, inside=inside, logits=np.stack(logits))
    return {"cases": len(pool)}


def _shadow(run: Run, pool: Part, grouping: Grouping, half: Tensor, number: int, checkpoint: FileCheckpoint) -> Tensor:
    """Train one shadow on the rows `half` of the pool and return its logits on the pool, [case, class]."""
    there = half.to(pool.images.device)
    trained = train(
        run.network,
        Part(pool.images[there], pool.labels[there]),
        run.spec.training,
        derive_seed("shadows", number),
        tune=run.part("tune"),
        grouping=lambda groups: grouping.codes(groups)[half],
        checkpoint=checkpoint,
        name=f"training shadow {number}",
    )
    return predict_block(run.network, base_block(trained), pool.images)[0].float()


def _grouping(run: Run, rows: dict[str, np.ndarray]) -> Grouping:
    """Return what the pool, an image a patient, can be grouped by where the recipe's objective asks for groups."""

    def joined(codes: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([codes[part][chosen] for part, chosen in rows.items()])

    def clusters() -> np.ndarray:
        from .strata import find

        return joined(find(run, "clusters").codes)

    splits = {part: run.data.splits[part] for part in rows}
    names = splits["train"].attributes
    return Grouping(
        joined({part: split.labels for part, split in splits.items()}),
        {name: joined({part: split.attributes[name] for part, split in splits.items()}) for name in names},
        strata=clusters,
    )
