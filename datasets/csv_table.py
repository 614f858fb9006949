"""A user's own radiographs: one CSV table with the path of each image, its labels, patient, split and attributes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .api import register_dataset
from .findings import ABSENT, BLANK, NO_FINDING, PRESENT, UNCERTAIN, settle
from .radiographs import (
    UNKNOWN,
    Attribute,
    Listing,
    Radiographs,
    Table,
    ages_of,
    attribute_of,
    cell_code,
    finding_cells,
    inside,
    named_findings,
    read_table,
    sex_of,
    without_repeats,
)

MOST_VALUES = 100  # an attribute stands for groups of patients; with more values it is an identifier or a measurement
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@register_dataset("csv")
@dataclass
class CSVTable(Radiographs):
    """Your own table of images (data_root=FILE.csv or its folder): a row per image with path, labels, patient, split.

    label_columns: separated by commas, either columns of 1, 0, -1 (uncertain) and empty cells, one per finding, or one
    column of texts that name findings, joined by `|`; no_finding: the column or the text that means none. path_column:
    paths, relative to the table's folder; patient_column, split_column (train, val, test): leave a name empty where the
    table has no such column (patient_column= makes every image a patient of its own, split_column= carves test and then
    val out of all). sex_column, age_column (years, or 058Y), view_column and site_column are read where they exist;
    attribute_columns names further ones, separated by commas.

    uncertain (ignore, zero, one), blank (missing, zero): what -1 and an empty cell mean; target: any (a finding against
    none, positive = 1), one finding, several separated by commas, or all; view: all or a value of the view column;
    val_fraction, split_seed: of the parts that are carved out; age_edges, size, crop, intensity, unreadable: as for
    nih_chest_xray14.

    Counted in `exclusions`: images without a label for the target, of another view, or without a patient id (patients
    of their own), repeated rows, unknown values of attributes. Errors: a missing column, a label that is no label, a
    path that leaves the folder, two rows that disagree about an image, a patient in two splits.
    """

    label_columns: str = ""
    no_finding: str = "No Finding"
    path_column: str = "path"
    patient_column: str = "patient"
    split_column: str = "split"
    sex_column: str = "sex"
    age_column: str = "age"
    view_column: str = "view"
    site_column: str = "site"
    attribute_columns: str = ""
    target: str = "any"
    uncertain: str = "ignore"
    blank: str = "missing"
    size: int = 64
    crop: str = "none"
    intensity: str = "stored"
    view: str = "all"
    age_edges: tuple[int, ...] = (20, 40, 60, 80)
    val_fraction: float = 0.2
    split_seed: int = 0
    unreadable: str = "refuse"

    name = "csv"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "the user's own data"
    source: ClassVar[str] = "the user's own table"
    notes: ClassVar[tuple[str, ...]] = ()

    def read(self, data_root: Path | None) -> Listing:
        """Return the images of the table, in its order."""
        file = _table_file(data_root)
        exclusions: list[str] = []
        table = without_repeats(self._table(file), [self.path_column], exclusions)
        findings, values = self._findings(table)
        return Listing(
            file=file,
            root=file.parent,
            files=table[self.path_column],
            rows=table.rows,
            findings=findings,
            values=values,
            parts=self._parts(table),
            patients=self._patients(table, exclusions),
            attributes=self._attributes(table),
            exclusions=exclusions,
            carved=("val",) if self.split_column else ("test", "val"),
        )

    def _table(self, file: Path) -> Table:
        """Read the columns that are named, with the paths made relative to the folder of the table."""
        labels = _names(self.label_columns)
        if not labels:
            raise UserError("dataset.label_columns is empty: name the columns of labels, separated by commas")
        usual = [(f"{name}_column", getattr(self, f"{name}_column")) for name in ("sex", "age", "view", "site")]
        default = {name: getattr(type(self), name) for name, _ in usual}
        needed = [self.path_column, *labels, self.patient_column, self.split_column, *_names(self.attribute_columns)]
        needed += [column for name, column in usual if column != default[name]]
        optional = [column for name, column in usual if column == default[name]]
        table = read_table(file, [name for name in needed if name], optional)
        here = {f"{folder}{os.sep}" for folder in (file.parent, file.parent.absolute())}
        for prefix in here:
            table.columns[self.path_column] = [text.removeprefix(prefix) for text in table[self.path_column]]
        table.columns[self.path_column] = inside(table, self.path_column)
        return table

    def _findings(self, table: Table) -> tuple[list[str], np.ndarray]:
        """Return the names of the findings and int8 [sample, finding] of 1, 0, -1 = missing."""
        columns = _names(self.label_columns)
        codes = {cell_code(text) for text in table[columns[0]]}
        if len(columns) > 1 or codes & {PRESENT, ABSENT, UNCERTAIN}:
            values = settle(finding_cells(table, columns), self.uncertain, self.blank)
            return [self._finding(column) for column in columns], values
        texts = ["|".join(self._finding(name) for name in text.split("|")) for text in table[columns[0]]]
        named = {name for text in texts for name in text.split("|")} - {"", NO_FINDING}
        findings = [*sorted(named), NO_FINDING]
        blank = np.array([cell_code(text) == BLANK for text in texts])
        filled = ["" if unnamed else text for text, unnamed in zip(texts, blank)]
        table = Table(table.file, {columns[0]: [text or NO_FINDING for text in filled]}, table.rows, table.lines)
        values = named_findings(table, columns[0], findings)
        values[blank] = -1
        return findings, values

    def _finding(self, name: str) -> str:
        return NO_FINDING if name.strip().casefold() == self.no_finding.strip().casefold() else name.strip()

    def _parts(self, table: Table) -> np.ndarray:
        if not self.split_column:
            return np.full(len(table), "train", object)
        for i, text in enumerate(table[self.split_column]):
            if text.casefold() not in SPLIT_NAMES:
                raise UserError(f"{table.cell(i, self.split_column)}: give train, val or test")
        return np.array([SPLIT_NAMES[text.casefold()] for text in table[self.split_column]], object)

    def _patients(self, table: Table, exclusions: list[str]) -> np.ndarray | None:
        """Return the ids of the patients; an image without one is a patient of its own."""
        if not self.patient_column:
            return None
        ids = np.array(table[self.patient_column], object)
        nameless = np.flatnonzero(ids == "")
        ids[nameless] = [f"image {table[self.path_column][i]}" for i in nameless]
        if len(nameless):
            exclusions.append(f"{len(nameless)} images without a patient id count as patients of their own")
        return ids

    def _attributes(self, table: Table) -> dict[str, Attribute]:
        found = {}
        if self.sex_column in table.columns:
            found["sex"] = sex_of(table[self.sex_column])
        if self.age_column in table.columns:
            found["age"] = ages_of(table, self.age_column, self.age_edges)
        others = {"view": self.view_column, "site": self.site_column}
        others |= {name: name for name in _names(self.attribute_columns) if name not in found}
        return found | {name: _groups(table, column) for name, column in others.items() if column in table.columns}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _groups(table: Table, column: str) -> Attribute:
    """Return an attribute whose values are the texts of a column, sorted."""
    values = sorted({text for text in table[column] if text.casefold() not in UNKNOWN})
    if len(values) > MOST_VALUES:
        raise UserError(f"{table.file}: column {column} has {len(values)} values, which are no groups: bin them first")
    return attribute_of(table[column], values)


def _table_file(data_root: Path | None) -> Path:
    """Return the table that `data_root` is, or the only one in it."""
    if data_root is None:
        raise UserError("dataset csv reads your own table: name it with data_root=FILE.csv")
    if not data_root.is_dir():
        return data_root
    found = sorted(file for pattern in ("*.csv", "*.csv.gz") for file in data_root.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{data_root} holds {len(found)} CSV tables ({names}): name one with data_root=FILE.csv")
    return found[0]
