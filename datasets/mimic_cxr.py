"""MIMIC-CXR-JPG (Johnson et al., 2019): 377,110 radiographs of 65,379 patients, 14 findings labelled from reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .api import register_dataset
from .findings import BLANK, CHEXPERT_FINDINGS, settle
from .radiographs import (
    Attribute,
    Listing,
    Radiographs,
    Table,
    age_groups,
    attribute_of,
    find_folder,
    finding_cells,
    read_table,
    sex_of,
    without_repeats,
)

FOLDERS = (
    "mimic_cxr",
    "mimic-cxr-jpg",
    "mimic-cxr-jpg-2.0.0",
    "mimic-cxr-jpg-2.1.0",
    "physionet.org/files/mimic-cxr-jpg/2.0.0",
    "physionet.org/files/mimic-cxr-jpg/2.1.0",
)
LABELS, METADATA, SPLIT = (f"mimic-cxr-2.0.0-{kind}.csv" for kind in ("chexpert", "metadata", "split"))
PARTS = {"train": "train", "validate": "val", "test": "test"}
VIEWS = {"PA": "PA", "AP": "AP", "LATERAL": "lateral", "LL": "lateral", "RL": "lateral", "XTABLE LATERAL": "lateral"}


@register_dataset("mimic_cxr")
@dataclass
class MIMICCXR(Radiographs):
    """MIMIC-CXR-JPG: chest radiographs with 14 findings and view; sex and age where MIMIC-IV's patients.csv is there.

    Read from mimic-cxr-2.0.0-chexpert.csv, -metadata.csv and -split.csv, as they are or with .gz, and
    files/p10/p10000032/s50414267/<dicom_id>.jpg, in data_root or its folder mimic_cxr or mimic-cxr-jpg. The splits are
    the official ones (validate is val). patients.csv of MIMIC-IV is looked for in the same folder, in data_root, and in
    their folders hosp; age is that at the study: anchor_age and the years between anchor_year and StudyDate.

    uncertain, blank, target, age_edges, size, crop, intensity, unreadable: as for chexpert; view: frontal (PA or AP),
    lateral, PA, AP or all; val_fraction, split_seed: used only where the split table has no image of validate.

    Counted in `exclusions`: images of studies without labels, or without one for the target, or with No Finding beside
    a finding (target=any); images of the metadata that the split table lacks and the other way round; images of another
    view; repeated rows; unknown sexes, ages and views. Errors: as for chexpert.
    """

    target: str = "any"
    uncertain: str = "ignore"
    blank: str = "zero"
    size: int = 64
    crop: str = "none"
    intensity: str = "stored"
    view: str = "frontal"
    age_edges: tuple[int, ...] = (20, 40, 60, 80)
    val_fraction: float = 0.2
    split_seed: int = 0
    unreadable: str = "refuse"

    name = "mimic_cxr"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "PhysioNet Credentialed Health Data License 1.5.0: credentialed users, no redistribution"
    source: ClassVar[str] = "PhysioNet, MIMIC-CXR-JPG (Johnson et al., arXiv:1901.07042, 2019)"
    notes: ClassVar[tuple[str, ...]] = (
        "labels are extracted from reports by the CheXpert labeller (Johnson et al., 2019)",
        "credentialed data: predictions carry labels and attributes of patients, do not publish them",
    )

    def read(self, data_root: Path | None) -> Listing:
        """Return the images of the metadata that the split table knows, in the order of the metadata."""
        folder = find_folder(data_root, FOLDERS, (LABELS, f"{LABELS}.gz"), "MIMIC-CXR-JPG")
        exclusions: list[str] = []
        patients = _patients_table((folder, data_root or folder), exclusions)
        columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", *(["StudyDate"] if patients else [])]
        table = without_repeats(read_table(_file(folder, METADATA), columns), ["dicom_id"], exclusions)
        part_of = _parts(_file(folder, SPLIT), exclusions)
        known = np.array([image in part_of for image in table["dicom_id"]])
        for count, said in (
            (len(part_of) - int(known.sum()), f"images of {SPLIT} are not in {METADATA}"),
            (int((~known).sum()), f"images of {METADATA} are not in {SPLIT}"),
        ):
            if count:
                exclusions.append(f"{count} {said}: left out")
        table = table.take(np.flatnonzero(known))
        attributes = {"view": attribute_of(table["ViewPosition"], ["PA", "AP", "lateral"], lambda t: VIEWS.get(t, ""))}
        if patients:
            attributes = {**self._demographics(table, patients), **attributes}
        return Listing(
            file=table.file,
            root=folder,
            files=_files(table),
            rows=table.rows,
            findings=CHEXPERT_FINDINGS,
            values=settle(_cells(table, _file(folder, LABELS), exclusions), self.uncertain, self.blank),
            parts=np.array([part_of[image] for image in table["dicom_id"]], object),
            patients=np.array(table["subject_id"], object),
            attributes=attributes,
            exclusions=exclusions,
            notes=[] if patients else ["sex and age are unknown: patients.csv of MIMIC-IV is not there"],
            beside=("Support Devices",),
            views={"frontal": np.isin(attributes["view"].codes, [0, 1])},
        )

    def _demographics(self, table: Table, patients: Table) -> dict[str, Attribute]:
        """Return sex and age at the study of every image; unknown where MIMIC-IV does not know the patient."""
        row_of = {subject: i for i, subject in enumerate(patients["subject_id"])}
        rows = [row_of.get(subject, -1) for subject in table["subject_id"]]
        born = _numbers(patients, "anchor_year") - _numbers(patients, "anchor_age")
        study = _numbers(table, "StudyDate") // 10000
        years = np.where(np.array(rows) < 0, np.nan, study - born[rows])
        texts = np.array(["" if np.isnan(age) else f"{age:.0f}" for age in years], object)
        return {
            "sex": sex_of(["" if row < 0 else patients["gender"][row] for row in rows]),
            "age": age_groups(years, self.age_edges, texts),
        }


def _file(folder: Path, name: str) -> Path:
    """Return the table `name`, which may be compressed."""
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def _patients_table(folders: Sequence[Path], exclusions: list[str]) -> Table | None:
    for place in (place for folder in folders for place in (folder, folder / "hosp")):
        file = _file(place, "patients.csv")
        if file.is_file():
            table = read_table(file, ["subject_id", "gender", "anchor_age", "anchor_year"])
            return without_repeats(table, ["subject_id"], exclusions)
    return None


def _parts(file: Path, exclusions: list[str]) -> dict[str, str]:
    """Return image -> train, val or test."""
    table = without_repeats(read_table(file, ["dicom_id", "split"]), ["dicom_id"], exclusions)
    for i, text in enumerate(table["split"]):
        if text not in PARTS:
            raise UserError(f"{table.cell(i, 'split')}: give {', '.join(PARTS)}")
    return {image: PARTS[text] for image, text in zip(table["dicom_id"], table["split"])}


def _cells(table: Table, file: Path, exclusions: list[str]) -> np.ndarray:
    """Return the cells of every image's study; BLANK in all findings for a study without labels."""
    labels = read_table(file, ["subject_id", "study_id", *CHEXPERT_FINDINGS])
    labels = without_repeats(labels, ["subject_id", "study_id"], exclusions)
    row_of = {study: i for i, study in enumerate(zip(labels["subject_id"], labels["study_id"]))}
    rows = [row_of.get(study, -1) for study in zip(table["subject_id"], table["study_id"])]
    blank = np.full((1, len(CHEXPERT_FINDINGS)), BLANK, np.int8)
    return np.concatenate([finding_cells(labels, CHEXPERT_FINDINGS), blank])[rows]


def _files(table: Table) -> list[str]:
    """Return files/p10/p10000032/s50414267/<dicom_id>.jpg; UserError for an id that is none, such as a path."""
    for column, pattern in (("subject_id", r"\d+"), ("study_id", r"\d+"), ("dicom_id", r"[\w-]+")):
        strange = next((text for text in dict.fromkeys(table[column]) if not re.fullmatch(pattern, text)), None)
        if strange is not None:
            where = table.cell(table[column].index(strange), column)
            raise UserError(f"{where}, which is no id: mend the table, or download it again")
    return [
        f"files/p{subject[:2]}/p{subject}/s{study}/{image}.jpg"
        for subject, study, image in zip(table["subject_id"], table["study_id"], table["dicom_id"])
    ]


def _numbers(table: Table, column: str) -> np.ndarray:
    """Return a column of numbers as float64, NaN for empty cells."""
    texts = table[column]
    try:
        return np.array([float(text or "nan") for text in texts])
    except ValueError:
        strange = next(i for i, text in enumerate(texts) if not re.fullmatch(r"\d*", text))
        raise UserError(f"{table.cell(strange, column)}: give a whole number, or leave it empty") from None
