"""Films become images: each file is decoded and scaled once, in parallel, into one array that is memory-mapped.

PNG and JPEG are read by Pillow, DICOM by pydicom (the extra `dicom`); nothing else is opened. Radiographs shrink five-
to fortyfold, so scaling has to average: over whole blocks of pixels while three times the wanted size is left, then by
Pillow's antialiased bilinear filter. Unlike Lanczos it has no negative lobes, which ring at the edges of burnt-in
letters; unlike a box it weighs pixels evenly where the ratio is no whole number.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from ..errors import UserError
from ..identity import digest, plain
from ..processors import usable_processors
from .films import Films, Rendering

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1
"""Of the decoder: goes up whenever the same file starts to give another image."""

GAP = 3
"""How much larger than the wanted size an image stays when blocks of its pixels are averaged."""

PIXELS = 2**27
"""A file that claims more pixels is no radiograph (the largest detectors have 2^25): it is not decoded."""

AHEAD = 16
"""Films per worker that are decoded or waiting to be written."""

NAMED = 3
"""Films named of those that are left out."""

SAVE_EVERY_S = 5.0
IMAGES = "images.npy"
UNREADABLE = "unreadable.json"


class Cache(Protocol):
    """Where decoded films are kept."""

    def produce(self, spec: dict[str, Any], compute: Callable[[Path, Path], dict[str, Any]]) -> Path:
        """Return the folder of files that `compute(folder, scratch)` wrote for `spec`, calling it where there is none.

        What a killed or failed `compute` left in `folder` and `scratch` is there again at the next call; `scratch` is
        removed at the end. It returns what is worth telling about the result.
        """
        ...

    def progress(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        """Return `items`, shown as they are taken."""
        ...


class Temporary:
    """A cache that lives as long as this process."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="multiplicity-bench-"))
        atexit.register(shutil.rmtree, self._root, ignore_errors=True)

    def produce(self, spec: dict[str, Any], compute: Callable[[Path, Path], dict[str, Any]]) -> Path:
        """Compute into a folder of its own."""
        folder, scratch = self._root / "films", self._root / "scratch"
        folder.mkdir()
        scratch.mkdir()
        compute(folder, scratch)
        return folder

    def progress(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        """Show nothing."""
        return items


@dataclass
class Decoded:
    """Images [film, 1, size, size] of films, memory-mapped, and the films that have none, with the reason."""

    images: np.ndarray
    unreadable: dict[str, str]

    def exclusions(self) -> list[str]:
        """Return a line that says how many films have no image, and names some; none where all have one."""
        files = sorted(self.unreadable)
        names = ", ".join(files[:NAMED]) + (", ..." if len(files) > NAMED else "")
        line = f"{len(files)} of {len(self.images)} films cannot be read and are left out: {names}"
        return [line] if files else []


def decode_films(films: Films, cache: Cache) -> Decoded:
    """Decode `films`, or find them decoded in `cache` by paths, sizes, times of change, rendering and decoder version.

    Raises UserError for a path that leaves the root, and, unless `films` says to exclude them, for files that are
    missing or cannot be decoded.
    """
    found, unreadable = _look_up(films, cache)
    _refuse(films, unreadable)
    spec = {"decoder": VERSION, "rendering": films.rendering, "films": len(films), "files": digest(found)}

    def compute(folder: Path, scratch: Path) -> dict[str, Any]:
        failed = {**unreadable, **_fill(films, set(unreadable), folder / IMAGES, scratch / "done.npy", cache)}
        _refuse(films, failed)
        (folder / UNREADABLE).write_text(json.dumps(failed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return {"unreadable": len(failed)}

    folder = cache.produce(plain(spec), compute)
    unreadable = json.loads((folder / UNREADABLE).read_text(encoding="utf-8"))
    _refuse(films, unreadable)
    return Decoded(np.asarray(np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)), unreadable)


def decode(path: Path, rendering: Rendering) -> np.ndarray:
    """Return the image of a PNG, JPEG or DICOM file, uint8 [1, size, size].

    Colours become their luminance and transparency is ignored. Of DICOM, the rescale slope and intercept are applied
    and MONOCHROME1 is inverted; windows are not applied. What a file breaks is raised as whatever the library raises;
    UserError where pydicom is missing.
    """
    with path.open("rb") as file:
        head = file.read(132)
        file.seek(0)
        is_dicom = head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")
        grey = _read_dicom(file, path) if is_dicom else _read_picture(file, GAP * rendering.size)
    return _render(grey, rendering)


@dataclass
class _Grey:
    """An image in Pillow's mode L or F whose stored values run from `low` to `high`."""

    image: Image.Image
    low: float = 0.0
    high: float = 255.0


def _read_picture(file: BinaryIO, enough: int) -> _Grey:
    from PIL import Image

    with Image.open(file, formats=("PNG", "JPEG")) as image:
        _limit(image.width, image.height)
        image.draft("L", (enough, enough))  # JPEG alone: averages blocks in its own transform, and skips the colours
        image.load()
        if image.mode.startswith("I"):
            return _Grey(Image.fromarray(np.asarray(image).astype(np.float32)), high=65535.0)
        return _Grey(image.copy() if image.mode == "L" else image.convert("L"))


def _read_dicom(file: BinaryIO, path: Path) -> _Grey:
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: DICOM needs pydicom: pip install 'multiplicity-bench[dicom]'") from None
    from PIL import Image

    film = pydicom.dcmread(file)
    _limit(film.Columns, film.Rows)
    if film.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its pixels are {film.PhotometricInterpretation}, not MONOCHROME1 or MONOCHROME2")
    if int(film.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"it holds {film.NumberOfFrames} frames")
    if film.get("ModalityLUTSequence"):
        raise ValueError("its grey values need a modality look-up table")
    slope, intercept = float(film.get("RescaleSlope") or 1), float(film.get("RescaleIntercept") or 0)
    lowest = -(2 ** (film.BitsStored - 1)) if film.PixelRepresentation else 0
    ends = [slope * end + intercept for end in (lowest, lowest + 2**film.BitsStored - 1)]
    if not min(ends) < max(ends) < np.inf:
        raise ValueError(f"rescale slope {slope} and intercept {intercept} give no grey values")
    values = film.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if film.PhotometricInterpretation == "MONOCHROME1":
        values = np.float32(sum(ends)) - values
    return _Grey(Image.fromarray(values), min(ends), max(ends))


def _limit(width: int, height: int) -> None:
    if width * height > PIXELS:
        raise ValueError(f"it claims {width} x {height} pixels, more than any radiograph has")


def _render(grey: _Grey, rendering: Rendering) -> np.ndarray:
    """Return the image [1, size, size]: cropped, scaled, its grey values spread, and padded."""
    from PIL import Image

    size, (width, height) = rendering.size, grey.image.size
    box, wanted = (0, 0, width, height), (size, size)
    if rendering.crop == "centre":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    elif rendering.crop == "pad":
        wide, high = (max(1, round(size * side / max(width, height))) for side in (width, height))
        wanted = (wide, high)
    scaled = grey.image.resize(wanted, Image.Resampling.BILINEAR, box, reducing_gap=GAP)
    values = _spread(np.asarray(scaled), grey, rendering.intensity)
    result = np.zeros((1, size, size), np.uint8)
    top, left = ((size - side) // 2 for side in values.shape)
    result[0, top : top + values.shape[0], left : left + values.shape[1]] = values
    return result


def _spread(values: np.ndarray, grey: _Grey, intensity: str) -> np.ndarray:
    """Return grey values as uint8; an image of a single value has no contrast to spread and becomes black."""
    low, high = grey.low, grey.high
    if intensity == "stored" and values.dtype == np.uint8:
        return values
    if intensity == "minmax":
        low, high = float(values.min()), float(values.max())
    elif intensity == "percentile":
        low, high = (float(q) for q in np.percentile(values, (1, 99)))
    if not low < high:
        return np.zeros(values.shape, np.uint8)
    return np.clip(np.rint((values.astype(np.float64) - low) * 255 / (high - low)), 0, 255).astype(np.uint8)


def _look_up(films: Films, cache: Cache) -> tuple[list[list[Any]], dict[str, str]]:
    """Return [path, size, time of change, mode] of every file, and of those that cannot even be opened, the reason.

    The mode is there for permissions: what could not be read may be readable after they change.
    """
    root = os.path.realpath(films.root)
    folders: dict[str, str] = {}
    found: list[list[Any]] = []
    unreadable: dict[str, str] = {}
    for file in cache.progress(films.files, "looking up films", len(films)):
        if file.startswith("/") or ".." in file.split("/"):
            raise UserError(f"{file} leaves {films.root}: list films by paths inside that folder, relative to it")
        try:
            about = _stat_inside(root, file, folders)
        except (OSError, ValueError) as error:
            unreadable[file] = _reason(error)
            found.append([file])
            continue
        if not stat.S_ISREG(about.st_mode):
            unreadable[file] = "it is no file"
        elif not about.st_size:
            unreadable[file] = "it is empty"
        found.append([file, about.st_size, about.st_mtime_ns, about.st_mode])
    return found, unreadable


def _stat_inside(root: str, file: str, folders: dict[str, str]) -> os.stat_result:
    """Return what the system knows about root/file, and refuse links out of `root`; folders: real paths found so far.

    A folder's links are followed once and not for each of its files: one call to the system per film is left.
    """
    parent, name = os.path.split(file)
    if parent not in folders:
        folders[parent] = os.path.realpath(os.path.join(root, parent))
    path = os.path.join(folders[parent], name)
    about = None
    with contextlib.suppress(FileNotFoundError):
        about = os.lstat(path)
    if about is not None and stat.S_ISLNK(about.st_mode):
        path, about = os.path.realpath(path), None
    if not os.path.join(path, "").startswith(os.path.join(root, "")):
        raise UserError(f"{file} is a link that leaves {root}: name the folder that really holds the films")
    return about or os.stat(path)


def _refuse(films: Films, unreadable: Mapping[str, str]) -> None:
    """Raise UserError for films that cannot be read, unless these are to be left out and others remain."""
    if not unreadable or (films.unreadable == "exclude" and len(unreadable) < len(films)):
        return
    first = next(file for file in films.files if file in unreadable)
    what = "restore or remove them" + ("" if films.unreadable == "exclude" else ", or set dataset.unreadable=exclude")
    raise UserError(
        f"{films.root}: {len(unreadable)} of {len(films)} films cannot be read, "
        f"the first is {first} ({unreadable[first]}): {what}"
    )


def _fill(films: Films, skipped: set[str], path: Path, done_path: Path, cache: Cache) -> dict[str, str]:
    """Write the images of all films to `path` and return why some have none; go on where `done_path` says.

    Rows are written, not mapped: on a full disk a write fails with an error, where a mapped page kills the process.
    """
    done = _load_done(done_path, path, films.shape)
    if done is None:
        np.lib.format.open_memmap(path, mode="w+", dtype=films.dtype, shape=films.shape).flush()
        done = np.zeros(len(films), bool)
    row_bytes = films.rendering.size**2
    start = path.stat().st_size - len(films) * row_bytes
    todo = [row for row in np.flatnonzero(~done).tolist() if films.files[row] not in skipped]
    failed: dict[str, str] = {}
    saved = time.monotonic()
    with path.open("r+b") as file:
        try:
            for row, image in cache.progress(_in_parallel(films, todo), "decoding films", len(todo)):
                if isinstance(image, str):
                    failed[films.files[row]] = image
                    continue
                file.seek(start + row * row_bytes)
                file.write(image.tobytes())
                done[row] = True
                if time.monotonic() - saved > SAVE_EVERY_S:
                    _save_done(done_path, done, file)
                    saved = time.monotonic()
        finally:
            _save_done(done_path, done, file)
    return failed


def _load_done(path: Path, images: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return which films are decoded already, or None where that is not known or the images are not whole."""
    try:
        done = np.load(path, allow_pickle=False)
        whole = np.load(images, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return done if done.shape == shape[:1] and whole.shape == shape else None


def _save_done(path: Path, done: np.ndarray, images: BinaryIO) -> None:
    """Note which films are decoded, once their images are on the disk."""
    images.flush()
    os.fsync(images.fileno())
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, done)
    os.replace(temporary, path)


def _in_parallel(films: Films, rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray | str]]:
    """Yield each row with its image, or with the reason why it has none, in order.

    By threads: Pillow inflates and scales without Python's lock. Processes, which take longer to start and need a
    script that can be imported, were no faster on films of 1024 pixels, and on films of 64 by a quarter.
    """
    from PIL import Image

    workers = usable_processors()
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[int, Future[np.ndarray | str]]] = deque()
    with warnings.catch_warnings():  # here, for warning filters belong to the whole process
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_limit` says it for good
        warnings.filterwarnings("ignore", module="pydicom")
        try:
            for row in rows:
                waiting.append((row, pool.submit(_attempt, films.root / films.files[row], films.rendering)))
                if len(waiting) >= AHEAD * workers:
                    row, future = waiting.popleft()
                    yield row, future.result()
            for row, future in waiting:
                yield row, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt(path: Path, rendering: Rendering) -> np.ndarray | str:
    """Return the image, or why the file has none; a machine that fails is no property of the file and is raised."""
    try:
        return decode(path, rendering)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if error.errno in (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR):
            return _reason(error)
        raise
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    """Return one line without the path, which stands beside it."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is no PNG, JPEG or DICOM file"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
