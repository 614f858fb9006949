"""NIH ChestX-ray14 (Wang et al., CVPR 2017): 112,120 frontal radiographs of 30,805 patients, 14 text-mined findings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .api import register_dataset
from .findings import NO_FINDING
from .radiographs import (
    Listing,
    Radiographs,
    ages_of,
    attribute_of,
    find_folder,
    inside,
    named_findings,
    patient_ids,
    read_table,
    sex_of,
    without_repeats,
)

FINDINGS = [
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
]
FOLDERS = ("nih_chest_xray14", "nih_chest_xray14_sample")
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
IMAGES, PATIENTS = 112_120, 30_805  # of the whole set
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
COLUMNS = (
    "Image Index",
    "Finding Labels",
    "Patient ID",
    "Patient Age",
    ("Patient Gender", "Patient Sex"),
    "View Position",
)


@register_dataset("nih_chest_xray14")
@dataclass
class NIHChestXray14(Radiographs):
    """NIH ChestX-ray14: frontal chest radiographs with 14 text-mined findings, sex, age and view.

    Read from the official files: images/ (or images_001/images to images_012/images), Data_Entry_2017_v2020.csv (else
    Data_Entry_2017.csv), train_val_list.txt and test_list.txt, in data_root or its folder nih_chest_xray14 or
    nih_chest_xray14_sample. test is the official one; val is carved out of train_val by patient.

    target: any (a finding against No Finding, positive = 1), one of the 14 findings (or No Finding), several separated
    by commas, or all; view: all, PA or AP; age_edges: where age groups begin (default as in Seyyed-Kalantari et al.,
    Nature Medicine 2021); val_fraction, split_seed: of the draw of val; size, crop, intensity: of an image; unreadable:
    refuse, or exclude to leave out and count images that cannot be decoded.

    Counted in `exclusions`: images of the table that are in neither list and the other way round, repeated rows, images
    of another view, and unknown values: an age above 120 (the table has some of 411), a gender other than F and M.
    Errors: an unknown finding, No Finding together with a finding, an image in both lists, two rows that disagree about
    an image, a patient in both parts.
    """

    target: str = "any"
    size: int = 64
    crop: str = "none"
    intensity: str = "stored"
    view: str = "all"
    age_edges: tuple[int, ...] = (20, 40, 60, 80)
    val_fraction: float = 0.2
    split_seed: int = 0
    unreadable: str = "refuse"

    name = "nih_chest_xray14"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = (
        "use unrestricted; acknowledge the NIH Clinical Center, link https://nihcc.app.box.com/v/ChestXray-NIHCC, "
        "cite Wang et al. (CVPR 2017)"
    )
    source: ClassVar[str] = "NIH Clinical Center, ChestX-ray14 (Wang et al., CVPR 2017)"
    notes: ClassVar[tuple[str, ...]] = (
        "labels are text-mined from reports, not read from the images (Wang et al., CVPR 2017)",
    )

    def read(self, data_root: Path | None) -> Listing:
        """Return the images of the table that are in one of the two lists, in the order of the table."""
        folder = find_folder(data_root, FOLDERS, TABLES, "NIH ChestX-ray14")
        exclusions: list[str] = []
        file = next(folder / name for name in TABLES if (folder / name).is_file())
        table = without_repeats(read_table(file, COLUMNS), ["Image Index"], exclusions)
        part_of = _parts(folder)
        listed = np.array([name in part_of for name in table["Image Index"]])
        absent = len(part_of) - int(listed.sum())
        if absent:
            exclusions.append(f"{absent} images of {' and '.join(LISTS.values())} are not in {file.name}: left out")
        if not listed.all():
            lists = " nor in ".join(LISTS.values())
            exclusions.append(f"{int((~listed).sum())} images of {file.name} are neither in {lists}: left out")
        table = table.take(np.flatnonzero(listed))
        patients = patient_ids(table, "Patient ID")
        return Listing(
            file=file,
            root=folder,
            files=_files(folder, inside(table, "Image Index")),
            rows=table.rows,
            findings=[*FINDINGS, NO_FINDING],
            values=named_findings(table, "Finding Labels", [*FINDINGS, NO_FINDING]),
            parts=np.array([part_of[name] for name in table["Image Index"]], object),
            patients=patients,
            attributes={
                "sex": sex_of(table["Patient Gender"]),
                "age": ages_of(table, "Patient Age", self.age_edges),
                "view": attribute_of(table["View Position"], ["PA", "AP"], str.upper),
            },
            exclusions=exclusions,
            notes=[] if len(table) == IMAGES else [_part_of_the_set(len(table), len(set(patients)))],
            views={"frontal": np.ones(len(table), bool)},
        )


def _part_of_the_set(images: int, patients: int) -> str:
    return f"a part of the set: {images:,} of {IMAGES:,} images, {patients:,} of {PATIENTS:,} patients"


def _parts(folder: Path) -> dict[str, str]:
    """Return image -> train or test, as the two lists say."""
    part_of: dict[str, str] = {}
    for part, name in LISTS.items():
        try:
            lines = (folder / name).read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError:
            raise UserError(f"{folder / name} does not exist: put the official list beside the table") from None
        except UnicodeDecodeError:
            raise UserError(f"{folder / name} is not UTF-8: save it as text, one image per line") from None
        for number, line in enumerate(lines, 1):
            image = line.strip()
            if image and part_of.setdefault(image, part) != part:
                raise UserError(f"{folder / name} row {number}: {image} is in {LISTS['train']} too: keep one of them")
    return part_of


def _files(folder: Path, names: list[str]) -> list[str]:
    """Return each image's path below `folder`: in images/, or in the official twelve folders, which are listed once.

    An image that is in none of them is named in images/, where the decoder reports it missing.
    """
    if (folder / "images").is_dir():
        return [f"images/{name}" for name in names]
    parts = [p / "images" if (p / "images").is_dir() else p for p in sorted(folder.glob("images_*")) if p.is_dir()]
    if not parts:
        raise UserError(f"{folder} has neither a folder images nor images_001, images_002, ...: put the images there")
    place: dict[str, str] = {}
    for part in parts:
        below = part.relative_to(folder).as_posix()
        for name in os.listdir(part):
            if place.setdefault(name, below) != below:
                raise UserError(f"{name} is in {folder / place[name]} and in {part}: keep one of them")
    return [f"{place.get(name, 'images')}/{name}" for name in names]
