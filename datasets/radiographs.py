"""What the readers of radiographs share: tables of text read row by row, and the way from a list of images to Data."""

from __future__ import annotations

import csv
import gzip
import posixpath
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError, suggest
from .api import SPLITS, Data, Split, carve, default_data_root
from .films import Films, Rendering
from .findings import ABSENT, BLANK, NO_FINDING, PRESENT, UNCERTAIN, Labels, choose_target

UNKNOWN = frozenset({"", "u", "unknown", "na", "n/a", "nan", "none", "null"})
BLANKS = frozenset({"", "na", "n/a", "nan", "null"})
BOOLEANS = {"true": PRESENT, "false": ABSENT}
SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
AGE_UNITS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
OLDEST = 120


@dataclass
class Table:
    """Some columns of a CSV file, as text without surrounding spaces.

    columns: name -> texts [row]; rows: their place among all rows of the file, from 0; lines: their lines in the file,
    which messages call rows, as a spreadsheet does (the header is row 1).
    """

    file: Path
    columns: dict[str, list[str]]
    rows: np.ndarray
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[str]:
        return self.columns[column]

    def cell(self, i: int, column: str) -> str:
        """Return the words that name a cell in a message."""
        return f"{self.file} row {self.lines[i]}: {column} is '{self.columns[column][i]}'"

    def take(self, keep: Sequence[int] | np.ndarray) -> Table:
        """Return the rows `keep`, in that order."""
        columns = {name: [cells[i] for i in keep] for name, cells in self.columns.items()}
        return Table(self.file, columns, self.rows[keep], self.lines[keep])


def read_table(file: Path, needed: Sequence[str | tuple[str, ...]], optional: Sequence[str] = ()) -> Table:
    """Read columns of a CSV file (UTF-8, with or without a byte order mark; gzip if it is named .gz).

    A tuple in `needed` lists the names that a column goes by; it is returned under the first. Raises UserError for a
    file that is missing, damaged, empty or not UTF-8, for a column that is missing or there twice, and for a row with
    more or fewer cells than the header.
    """
    try:
        opened = gzip.open if file.name.endswith(".gz") else open
        with opened(file, "rt", encoding="utf-8-sig", newline="") as stream:
            return _read_rows(file, csv.reader(stream), needed, optional)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: put it there, or name its folder with data_root=FOLDER") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.object[error.start]:#x}): save it as UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{file} is no CSV file ({error}): save it as comma-separated UTF-8 text") from None
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or "damaged or incomplete"
        raise UserError(f"{file} cannot be read ({reason}): check it, or download it again") from None


def _read_rows(file: Path, reader: Any, needed: Sequence[str | tuple[str, ...]], optional: Sequence[str]) -> Table:
    header = [name.strip() for name in next(reader, [])]
    places = _places(file, header, needed, optional)
    columns: dict[str, list[str]] = {name: [] for name in places}
    appends = [(columns[name].append, place) for name, place in places.items()]
    lines = []
    for row in reader:
        if len(row) != len(header):
            if not any(cell.strip() for cell in row):
                continue
            if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
                raise UserError(
                    f"{file} row {reader.line_num} has {len(row)} cells, the header {len(header)}: "
                    "mend the row (a comma inside a cell needs quotes)"
                )
        lines.append(reader.line_num)
        for append, place in appends:
            append(sys.intern(row[place].strip()))
    if not lines:
        raise UserError(f"{file} has no rows below its header: give it one row per image")
    return Table(file, columns, np.arange(len(lines)), np.array(lines))


def _places(
    file: Path, header: list[str], needed: Sequence[str | tuple[str, ...]], optional: Sequence[str]
) -> dict[str, int]:
    """Return name -> place in the header; UserError for a needed column that is missing and one that is there twice."""
    asked = [(name, True) for name in needed] + [((name,), False) for name in optional]
    places = {}
    for name, must in asked:
        names = (name,) if isinstance(name, str) else name
        found = [place for place, text in enumerate(header) if text in names]
        if len(found) > 1:
            raise UserError(f"{file} has {len(found)} columns {' or '.join(names)}: keep one of them")
        if found:
            places[names[0]] = found[0]
        elif must:
            has = ", ".join(text for text in header if text) or "none"
            raise UserError(f"{file} has no column {' or '.join(names)}: it has {has}")
    return places


def without_repeats(table: Table, key: Sequence[str], exclusions: list[str]) -> Table:
    """Return the table with every `key` once; rows that repeat another in all columns read are left out and counted.

    Raises UserError where two rows have the same key and differ otherwise.
    """
    keys = list(zip(*(table[name] for name in key)))
    first: dict[tuple[str, ...], int] = {}
    keep = [i for i, k in enumerate(keys) if first.setdefault(k, i) == i]
    if len(keep) == len(keys):
        return table
    for i, k in enumerate(keys):
        for name, cells in table.columns.items():
            if cells[i] != cells[first[k]]:
                raise UserError(
                    f"{table.cell(i, name)}, but '{cells[first[k]]}' in row {table.lines[first[k]]}, for the same "
                    f"{'/'.join(key)} {'/'.join(k)}: keep the right row"
                )
    exclusions.append(f"{table.file.name}: {len(keys) - len(keep)} rows that repeat another row are left out")
    return table.take(keep)


def inside(table: Table, column: str) -> list[str]:
    """Return the paths of a column, normalised, with `/`; UserError for one that is empty or leaves the data folder."""
    paths = []
    for i, text in enumerate(table[column]):
        path = posixpath.normpath(text.replace("\\", "/"))
        if not text or path == "." or "\0" in text:
            raise UserError(f"{table.cell(i, column)}: give the path of an image")
        if path.startswith(("/", "../")) or path == ".." or path[1:2] == ":":
            raise UserError(f"{table.cell(i, column)}, which leaves the data folder: give a path inside it")
        paths.append(path)
    return paths


def patient_ids(table: Table, column: str) -> np.ndarray:
    """Return the patient of every row, as text; UserError for a row without one."""
    if "" in table[column]:
        raise UserError(f"{table.cell(table[column].index(''), column)}: every image needs the id of its patient")
    return np.array(table[column], object)


def finding_cells(table: Table, findings: Sequence[str]) -> np.ndarray:
    """Return int8 [row, finding] of PRESENT, ABSENT, UNCERTAIN and BLANK for columns of 1, 0, -1 and empty cells."""
    cells = np.empty((len(table), len(findings)), np.int8)
    for k, finding in enumerate(findings):
        coded = {text: cell_code(text) for text in set(table[finding])}
        if None in coded.values():
            strange = next(i for i, text in enumerate(table[finding]) if coded[text] is None)
            raise UserError(f"{table.cell(strange, finding)}: give 1, 0, -1 (uncertain) or an empty cell")
        cells[:, k] = np.array([coded[text] for text in table[finding]], np.int8)
    return cells


def cell_code(text: str) -> int | None:
    """Return PRESENT, ABSENT, UNCERTAIN or BLANK for the text of a cell, None where it is none of them."""
    if text.casefold() in BLANKS:
        return BLANK
    if text.casefold() in BOOLEANS:
        return BOOLEANS[text.casefold()]
    try:
        return {1.0: PRESENT, 0.0: ABSENT, -1.0: UNCERTAIN}.get(float(text))
    except ValueError:
        return None


def named_findings(table: Table, column: str, findings: Sequence[str]) -> np.ndarray:
    """Return int8 [row, finding] of 1 and 0 for cells that name findings, joined by `|`.

    Raises UserError for a name that is none of `findings` and for No Finding together with a finding.
    """
    place = {name: i for i, name in enumerate(findings)}
    coded: dict[str, np.ndarray] = {}
    for i, text in enumerate(table[column]):
        if text in coded:
            continue
        named = {name.strip() for name in text.split("|")}
        strange = min(named - set(place), default=None)
        if strange is not None:
            raise UserError(f"{table.cell(i, column)}: no finding is called '{strange}', {suggest(strange, place)}")
        if NO_FINDING in named and len(named) > 1:
            raise UserError(f"{table.cell(i, column)}: {NO_FINDING} excludes findings: keep one or the other")
        coded[text] = np.array([name in named for name in findings], np.int8)
    return np.array([coded[text] for text in table[column]], np.int8).reshape(len(table), len(findings))


@dataclass
class Attribute:
    """An attribute of images: names of its codes, codes int64 [sample] (-1 = unknown), and the texts they came from."""

    names: list[str]
    codes: np.ndarray
    texts: np.ndarray


def attribute_of(texts: Sequence[str], names: Sequence[str], meaning: Callable[[str], str] = str) -> Attribute:
    """Code texts by the place of `meaning(text)` in `names`; -1 where it is none of them."""
    place = {name: code for code, name in enumerate(names)}
    codes = {text: place.get(meaning(text), -1) for text in set(texts)}
    return Attribute(list(names), np.array([codes[text] for text in texts], np.int64), np.array(texts, object))


def sex_of(texts: Sequence[str]) -> Attribute:
    """Return the sexes F and M, written so or as Female and Male; everything else is unknown."""
    return attribute_of(texts, ["F", "M"], lambda text: SEXES.get(text.casefold(), ""))


def ages_of(table: Table, column: str, edges: Sequence[int]) -> Attribute:
    """Return the age groups of a column of ages, which are in years, or DICOM age strings (058Y, 006M, 014D).

    Ages above 120 and below 0 are unknown, and so are empty cells; UserError for a text that is no age.
    """
    texts = table[column]
    years = {}
    for text in dict.fromkeys(texts):
        unit = AGE_UNITS.get(text[-1:].upper())
        try:
            years[text] = float(text[:-1]) * unit if unit else float("nan" if text.casefold() in UNKNOWN else text)
        except ValueError:
            where = table.cell(texts.index(text), column)
            raise UserError(f"{where}: give an age in years such as 58 or 058Y, or leave it empty") from None
    return age_groups(np.array([years[text] for text in texts]), edges, np.array(texts, object))


def age_groups(years: np.ndarray, edges: Sequence[int], texts: np.ndarray) -> Attribute:
    """Group ages in years at `edges`: with 20, 40, 60, 80 into <20, 20-39, 40-59, 60-79, 80+; -1 outside 0..120."""
    edges = list(edges)
    if not edges or any(low >= high for low, high in zip([0, *edges], [*edges, OLDEST])):
        raise UserError(f"dataset.age_edges={edges}: give rising ages between 0 and {OLDEST}, such as [20,40,60,80]")
    between = [f"{low}-{high - 1}" for low, high in pairwise(edges)]
    known = (years >= 0) & (years <= OLDEST)
    codes = np.where(known, np.digitize(np.where(known, years, 0), edges), -1)
    return Attribute([f"<{edges[0]}", *between, f"{edges[-1]}+"], codes.astype(np.int64), texts)


@dataclass
class Listing:
    """What a reader found: one entry per image, in the order of its table.

    file: the table, for messages; root, files: see Films; rows: of the images in the table, from 0; findings: names of
    the columns of values, int8 [sample, finding] of 1, 0, -1 = missing; parts: train, val or test [sample]; patients:
    ids as text [sample], or None where they are not known; beside: the findings that do not count for target=any;
    views: views to select by beside the values of the attribute view, as masks [sample]; carved: the parts that are
    carved out of train, in that order, where no image is in them.
    """

    file: Path
    root: Path
    files: list[str]
    rows: np.ndarray
    findings: list[str]
    values: np.ndarray
    parts: np.ndarray
    patients: np.ndarray | None
    attributes: dict[str, Attribute]
    exclusions: list[str]
    notes: list[str] = field(default_factory=list)
    beside: tuple[str, ...] = ()
    views: dict[str, np.ndarray] = field(default_factory=dict)
    carved: tuple[str, ...] = ("val",)

    def __len__(self) -> int:
        return len(self.files)


class Radiographs:
    """Base of the datasets of radiographs: the fields that they share, and the way from a listing to Data.

    Each declares these fields with defaults of its own; a patient's images are never merged: each has its own labels.
    target: any (a finding against No Finding, positive = 1), one finding, several separated by commas, or all; names
    are matched without case, `_` and spaces; size, crop, intensity: see Rendering; view: all, or a view of the dataset;
    age_edges: the lower ends of all age groups but the first; val_fraction: the share of the official training part
    that becomes val, by patient, where the source has no val; split_seed: of that draw; unreadable: refuse, or
    exclude to leave out and count images that cannot be decoded.
    """

    target: str
    size: int
    crop: str
    intensity: str
    view: str
    age_edges: tuple[int, ...]
    val_fraction: float
    split_seed: int
    unreadable: str

    name: str
    licence: ClassVar[str]
    source: ClassVar[str]
    notes: ClassVar[tuple[str, ...]]

    def load(self, data_root: Path | None = None) -> Data:
        """Read the tables below `data_root` (None: the default); the images are left to `prepare`.

        Raises UserError, naming file, row and value, for whatever is wrong in them; what is left out is counted in
        `exclusions`.
        """
        if not 0 < self.val_fraction < 1:
            raise UserError(f"dataset.val_fraction={self.val_fraction}: give a share between 0 and 1")
        rendering = Rendering(self.size, self.crop, self.intensity)
        listing = self.read(data_root)
        _check_patients(listing)
        patients = _patient_codes(listing)
        labels = choose_target(self.target, listing.findings, listing.values, listing.beside)
        keep = _labelled(listing, labels, _in_view(listing, self.view))
        parts = {}
        for part in SPLITS:
            rows = np.flatnonzero(keep & (listing.parts == part))
            parts[part] = Split(
                Films(listing.root, [listing.files[i] for i in rows], rendering, self.unreadable),
                labels.values[rows],
                listing.rows[rows],
                None if patients is None else patients[rows],
                {name: attribute.codes[rows] for name, attribute in listing.attributes.items()},
            )
        for part in listing.carved:
            if len(parts[part]) == 0 and len(parts["train"]):
                parts["train"], parts[part] = carve(
                    parts["train"], labels.task, self.val_fraction, self.split_seed, part
                )
        _check_parts(listing, labels, parts)
        _count_unknown(listing, keep)
        return Data(
            name=self.name,
            task=labels.task,
            classes=labels.classes,
            splits=parts,
            positive=1 if labels.task == "binary" else None,
            attribute_values={name: attribute.names for name, attribute in listing.attributes.items()},
            licence=self.licence,
            source=self.source,
            notes=[*self.notes, *listing.notes],
            exclusions=listing.exclusions,
            location=str(listing.file),
        )

    def read(self, data_root: Path | None) -> Listing:
        """Return what the tables below `data_root` list."""
        raise NotImplementedError


def find_folder(data_root: Path | None, names: Sequence[str], tables: Sequence[str], what: str) -> Path:
    """Return `data_root` (None: the default) or the first of the folders `names` in it that holds one of `tables`."""
    root = data_root or default_data_root()
    if root.is_file():
        raise UserError(f"data_root={root} is a file: for {what} name the folder that holds {tables[0]}")
    for folder in (root, *(root / name for name in names)):
        if any((folder / table).is_file() for table in tables):
            return folder
    raise UserError(
        f"{what} is neither in {root} nor in {' or '.join(names)} there: no folder holds {' or '.join(tables)} "
        "(name it with data_root=FOLDER)"
    )


def _patient_codes(listing: Listing) -> np.ndarray | None:
    """Number patients by their first appearance in the table."""
    if listing.patients is None:
        return None
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in listing.patients], np.int64)


def _check_patients(listing: Listing) -> None:
    if listing.patients is None:
        return
    first: dict[str, int] = {}
    for i, patient in enumerate(listing.patients):
        j = first.setdefault(patient, i)
        if listing.parts[i] != listing.parts[j]:
            both = " and ".join(f"{listing.parts[k]} ({listing.files[k]})" for k in (j, i))
            raise UserError(
                f"{listing.file}: patient {patient} is in two splits, {both}: "
                "put all images of a patient into one split"
            )


def _in_view(listing: Listing, view: str) -> np.ndarray:
    """Return which images have the view that is asked for, and count the others."""
    if view == "all":
        return np.ones(len(listing), bool)
    if "view" not in listing.attributes:
        raise UserError(f"dataset.view={view}: {listing.file} tells no views: leave view=all")
    attribute = listing.attributes["view"]
    masks = {name: attribute.codes == code for code, name in enumerate(attribute.names)} | listing.views
    keep = next((mask for name, mask in masks.items() if name.casefold() == view.casefold()), None)
    if keep is None:
        raise UserError(f"dataset.view={view} is not a choice: {suggest(view, ['all', *masks])}")
    unknown = int((~keep & (attribute.codes < 0)).sum())
    if not keep.all():
        listing.exclusions.append(
            f"view={view}: {int((~keep).sum())} images of another view are left out"
            + (f", {unknown} of them of an unknown one" if unknown else "")
        )
    return keep


def _labelled(listing: Listing, labels: Labels, seen: np.ndarray) -> np.ndarray:
    """Return which of the images `seen` have a label, and count the others."""
    known = seen & (labels.values >= 0 if labels.task == "binary" else (labels.values >= 0).any(1))
    missing = int(seen.sum()) - int(known.sum())
    what = labels.classes[1] if labels.task == "binary" else "any of the target's findings"
    if missing and not known.any():
        raise UserError(f"{listing.file}: {what} is missing for all images: choose another dataset.target")
    if missing:
        listing.exclusions.append(f"{missing} images without a label for {what} are left out")
    return known


def _check_parts(listing: Listing, labels: Labels, parts: dict[str, Split]) -> None:
    """Raise UserError for a part without images and for a label that a part knows of no image."""
    for part, split in parts.items():
        if len(split) == 0:
            said = "; ".join(listing.exclusions) or "nothing was left out"
            raise UserError(f"{listing.file}: no image is left for {part}: every split needs some ({said})")
        if labels.task == "multilabel":
            missing = np.flatnonzero((split.labels < 0).all(0))
            if len(missing):
                label = labels.classes[missing[0]]
                raise UserError(
                    f"{listing.file}: {label} is missing for all images of {part}: leave it out of dataset.target"
                )


def _count_unknown(listing: Listing, keep: np.ndarray) -> None:
    for name, attribute in listing.attributes.items():
        texts = Counter(attribute.texts[keep & (attribute.codes < 0)])
        if texts:
            shown = ", ".join(f"'{text}'" for text, _ in texts.most_common(3)) + (", ..." if len(texts) > 3 else "")
            listing.exclusions.append(
                f"{name} is unknown for {texts.total()} of {int(keep.sum())} images ({shown}): in no group of {name}"
            )
