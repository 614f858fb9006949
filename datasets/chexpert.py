"""CheXpert (Irvin et al., AAAI 2019): 224,316 radiographs of 65,240 patients, 14 observations labelled from reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError, suggest
from .api import register_dataset
from .findings import CHEXPERT_FINDINGS, settle
from .radiographs import (
    Attribute,
    Listing,
    Radiographs,
    Table,
    ages_of,
    attribute_of,
    find_folder,
    finding_cells,
    inside,
    read_table,
    sex_of,
    without_repeats,
)

FOLDERS = (
    "chexpert",
    "CheXpert-v1.0-small",
    "CheXpert-v1.0",
    "chexpert/CheXpert-v1.0-small",
    "chexpert/CheXpert-v1.0",
    "chexpertchestxrays-u20210408",
)
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS)


@register_dataset("chexpert")
@dataclass
class CheXpert(Radiographs):
    """CheXpert: frontal and lateral chest radiographs with 14 observations, sex, age and view.

    Read from train.csv and valid.csv and the images that their column Path names, in data_root or its folder chexpert,
    CheXpert-v1.0-small or CheXpert-v1.0. The labels of train.csv were extracted from reports, those of valid.csv were
    given by three radiologists. valid: test (valid.csv is test, and val is carved out of train.csv by patient), or val
    (valid.csv is val, and test, the share val_fraction, is carved out of train.csv).

    uncertain: what -1 means, ignore (missing), zero or one: U-Ignore, U-Zeros and U-Ones of Irvin et al. (AAAI 2019);
    blank: what an empty cell means, a finding that the report does not mention: zero (absent, as in the counts of Irvin
    et al., Table 1, whose negatives include what is not mentioned), or missing.

    target: any (a finding against No Finding, positive = 1; a device alone is no finding, as in the CheXpert labeller),
    one finding, several separated by commas, or all (13, without No Finding); view: frontal, lateral, PA, AP or all;
    age_edges, val_fraction, split_seed, size, crop, intensity, unreadable: as for nih_chest_xray14.

    Counted in `exclusions`: images without a label for the target, or with No Finding beside a finding (target=any),
    images of another view, repeated rows, unknown sexes, ages and views (decubitus films). Errors: a label other than
    1, 0, -1 and empty, two rows that disagree about an image, a patient in both tables.
    """

    target: str = "any"
    uncertain: str = "ignore"
    blank: str = "zero"
    valid: str = "test"
    size: int = 64
    crop: str = "none"
    intensity: str = "stored"
    view: str = "frontal"
    age_edges: tuple[int, ...] = (20, 40, 60, 80)
    val_fraction: float = 0.2
    split_seed: int = 0
    unreadable: str = "refuse"

    name = "chexpert"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = (
        "Stanford University School of Medicine CheXpert Dataset Research Use Agreement: non-commercial research, no "
        "redistribution"
    )
    source: ClassVar[str] = "Stanford ML Group, CheXpert (Irvin et al., AAAI 2019)"
    notes: ClassVar[tuple[str, ...]] = (
        "labels of train are extracted from reports, those of valid.csv are radiologists' (Irvin et al., AAAI 2019)",
        "research use agreement: predictions carry labels and attributes of patients, do not publish them",
    )

    def read(self, data_root: Path | None) -> Listing:
        """Return the images of train.csv and valid.csv, in the order of the tables."""
        if self.valid not in ("test", "val"):
            raise UserError(f"dataset.valid={self.valid} is not a choice: {suggest(self.valid, ('test', 'val'))}")
        folder = find_folder(data_root, FOLDERS, ("train.csv",), "CheXpert")
        exclusions: list[str] = []
        tables = [
            without_repeats(read_table(folder / name, COLUMNS), ["Path"], exclusions)
            for name in ("train.csv", "valid.csv")
        ]
        files = [path for table in tables for path in _files(folder, inside(table, "Path"))]
        cells = np.concatenate([finding_cells(table, CHEXPERT_FINDINGS) for table in tables])
        position = [text for table in tables for text in table["Frontal/Lateral"]]
        return Listing(
            file=tables[0].file,
            root=folder,
            files=files,
            rows=np.concatenate([table.rows for table in tables]),
            findings=CHEXPERT_FINDINGS,
            values=settle(cells, self.uncertain, self.blank),
            parts=np.repeat(np.array(["train", self.valid], object), [len(table) for table in tables]),
            patients=np.concatenate([_patients(table) for table in tables]),
            attributes={
                "sex": sex_of([text for table in tables for text in table["Sex"]]),
                "age": _joined([ages_of(table, "Age", self.age_edges) for table in tables]),
                "view": attribute_of([text for table in tables for text in _views(table)], ["PA", "AP", "lateral"]),
            },
            exclusions=exclusions,
            beside=("Support Devices",),
            views={"frontal": np.array([text == "Frontal" for text in position])},
            carved=("val",) if self.valid == "test" else ("test",),
        )


def _joined(attributes: Sequence[Attribute]) -> Attribute:
    codes, texts = ([getattr(attribute, name) for attribute in attributes] for name in ("codes", "texts"))
    return Attribute(attributes[0].names, np.concatenate(codes), np.concatenate(texts))


def _views(table: Table) -> list[str]:
    """Return `lateral`, or what the table says of a frontal image: AP, PA, or a decubitus position."""
    column = "Frontal/Lateral"
    for i, text in enumerate(table[column]):
        if text not in ("Frontal", "Lateral"):
            raise UserError(f"{table.cell(i, column)}: give Frontal or Lateral")
    return [
        "lateral" if position == "Lateral" else projection
        for position, projection in zip(table[column], table["AP/PA"])
    ]


def _patients(table: Table) -> np.ndarray:
    """Return the folder `patient00001` that every path names."""
    found = [re.search(r"(?:^|/)(patient\d+)/", path) for path in inside(table, "Path")]
    if None in found:
        raise UserError(f"{table.cell(found.index(None), 'Path')}: the path names no patient (.../patient00001/...)")
    return np.array([match[1] for match in found if match], object)


def _files(folder: Path, paths: list[str]) -> list[str]:
    """Return the paths below `folder`: the name of the release in front is left out where the table lies inside it."""
    releases = {path.split("/")[0] for path in paths}
    inner = {name for name in releases if name.startswith("CheXpert") and not (folder / name).is_dir()}
    return [path.split("/", 1)[1] if path.split("/")[0] in inner and "/" in path else path for path in paths]
