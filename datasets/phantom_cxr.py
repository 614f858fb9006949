"""Synthetic chest radiographs with known truths: pneumothorax, a hidden chest-drain stratum, sex, age, view, site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError
from . import phantom_rendering as rendering
from .api import AGE_BINS, SPLITS, Data, Split, age_codes, register_dataset

NOTES = [
    "synthetic: every image is rendered by a program, no patient was imaged",
    "hidden stratum: a chest drain in most positives and few negatives (Oakden-Rayner et al., CHIL 2020)",
]
SITES = ["A", "B", "C"]


@register_dataset("phantom_cxr")
@dataclass
class PhantomCXR:
    """Synthetic chest radiographs with known truths; nothing to download.

    The binary label says pneumothorax (positive = 1): air between chest wall and a retracted lung, without lung
    markings, bounded by a thin pleural edge. `train` counts the images before tune is carved out of them.

    prevalence: share of true positives; label_noise: probability that a label is flipped; drain_in_positives,
    drain_in_negatives: probability of a chest drain; smallest, largest: extent of the air, from 0 (none) to 1 (nearly
    the whole lung), small ones being commoner; visibility: contrast of the air and of the pleural edge; grain: strength
    of the detector noise.

    Image i of a split depends on (seed, split, i) and the settings alone, so a larger set continues a smaller one, and
    the pixels come from IEEE basic operations only, so they are the same bytes on every machine.
    """

    size: int = 28
    train: int = 600
    val: int = 400
    test: int = 600
    seed: int = 0
    prevalence: float = 0.45
    label_noise: float = 0.03
    drain_in_positives: float = 0.7
    drain_in_negatives: float = 0.05
    smallest: float = 0.12
    largest: float = 0.9
    visibility: float = 1.0
    grain: float = 1.0

    name = "phantom_cxr"
    version: ClassVar[int] = 1

    def load(self, data_root: Path | None = None) -> Data:
        """Render the three splits; `data_root` is not used. Raises UserError for settings out of range."""
        self._check()
        counts = {"train": self.train, "val": self.val, "test": self.test}
        return Data(
            name="phantom_cxr",
            task="binary",
            classes=["no pneumothorax", "pneumothorax"],
            splits={split: self._split(number, split, n) for number, (split, n) in enumerate(counts.items())},
            positive=1,
            attribute_values={"sex": ["F", "M"], "age": AGE_BINS, "view": ["PA", "AP"], "site": SITES},
            synthetic=True,
            licence="MIT",
            source="rendered by multiplicity_bench (synthetic)",
            notes=list(NOTES),
        )

    def latents(self, split: str, count: int) -> dict[str, np.ndarray]:
        """Draw the truths behind the first `count` images of `split`: name -> [sample]."""
        return draw_latents(self, rendering.Stream(self.seed, split), count)

    def _split(self, number: int, split: str, count: int) -> Split:
        stream = rendering.Stream(self.seed, split)
        latents = self.latents(split, count)
        flipped = stream.uniform("label noise", np.arange(count)) < self.label_noise
        return Split(
            images=rendering.render(latents, self.size, stream, self.visibility, self.grain),
            labels=(latents["finding"] ^ flipped).astype(np.int64),
            ids=np.arange(count),
            patient=latents.pop("patient") * len(SPLITS) + number,
            attributes={
                "sex": latents["male"].astype(np.int64),
                "age": age_codes(latents["age"]),
                "view": latents["ap"].astype(np.int64),
                "site": latents["site"],
            },
            latents={**latents, "flipped": flipped},
        )

    def _check(self) -> None:
        if not 28 <= self.size <= 224:
            raise UserError(f"dataset.size={self.size}: phantom_cxr renders 28 to 224 pixels")
        for field in ("train", "val", "test"):
            if getattr(self, field) < 1:
                raise UserError(f"dataset.{field}={getattr(self, field)}: give at least 1 image")
        for field in ("prevalence", "label_noise", "drain_in_positives", "drain_in_negatives"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"dataset.{field}={getattr(self, field)}: give a probability between 0 and 1")
        if not 0 < self.smallest <= self.largest <= 1:
            raise UserError(
                f"dataset.smallest={self.smallest}, dataset.largest={self.largest}: "
                "give extents with 0 < smallest <= largest <= 1"
            )
        for field in ("visibility", "grain"):
            if not getattr(self, field) >= 0:
                raise UserError(f"dataset.{field}={getattr(self, field)}: give a number of at least 0")


def draw_latents(settings: PhantomCXR, stream: rendering.Stream, count: int) -> dict[str, np.ndarray]:
    """Draw patients and their 1 to 3 images; every truth has a random stream of its own, named after it.

    Older patients and site C have more AP (bedside) films, men more pneumothoraces; a patient's films mostly agree on
    the finding; AP films carry the distractors, skin folds and monitoring leads.
    """
    patients = np.arange(count)
    films = 1 + np.floor(3 * stream.uniform("films per patient", patients)).astype(np.int64)
    patient = np.repeat(patients, films)[:count]
    image = np.arange(count)

    def by_patient(name: str) -> np.ndarray:
        return stream.uniform(name, patient)

    def by_image(name: str) -> np.ndarray:
        return stream.uniform(name, image)

    male = by_patient("sex") < 0.53
    age = np.floor(18 + 36 * (by_patient("age") + by_patient("age again")))
    site = (by_patient("site") > 0.45).astype(np.int64) + (by_patient("site") > 0.8)
    ap = by_image("view") < 0.12 + 0.4 * (age - 18) / 72 + 0.25 * (site == 2)
    p = settings.prevalence
    likely = p + np.where(male, 0.19, -0.21) * p * (1 - p)
    shared = by_image("state of its own") < 0.8
    finding = np.where(shared, by_patient("ill"), by_image("ill")) < likely
    share = by_image("extent")
    extent = settings.smallest + (settings.largest - settings.smallest) * share * share
    return {
        "patient": patient,
        "male": male,
        "age": age,
        "site": site,
        "ap": ap,
        "finding": finding,
        "extent": np.where(finding, extent, 0.0),
        "left": by_image("side") < 0.5,
        "drain": by_image("drain") < np.where(finding, settings.drain_in_positives, settings.drain_in_negatives),
        "skin_fold": by_image("skin fold") < np.where(ap, 0.3, 0.04),
        "leads": by_image("leads") < np.where(ap, 0.6, 0.03),
        "habitus": by_patient("habitus"),
        "heart": by_patient("heart"),
        "inspiration": by_image("inspiration"),
        "exposure": by_image("exposure"),
    }
