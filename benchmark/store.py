"""The artifact store: finished stages by key, written whole or not at all, verified when read.

An artifact is a folder `<root>/<stage>/<key>/` of safetensors, JSON and npy files with a `manifest.json`, written last,
that holds their checksums. It is built in `<root>/<stage>/.<key>/` in the same place and renamed when complete; a kill
leaves that folder, and the same command goes on from the checkpoints in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import UserError
from ..identity import digest

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"


class Store:
    """Artifacts under one folder, shared by every process that names it."""

    def __init__(self, root: Path, log: Callable[[str], None] = lambda text: None):
        self.root, self.log = root, log
        self._verified: set[Path] = set()

    def path(self, stage: str, key: str) -> Path:
        """Return where the artifact of `key` is, or would be."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> Path | None:
        """Return the artifact's folder if it is there and its files match their checksums.

        A corrupted one is removed with a message, to be computed again: it is never used.
        """
        path = self.path(stage, key)
        if path in self._verified and path.is_dir():
            return path
        if not (path / MANIFEST).is_file():
            return None
        wrong = corrupted(path)
        if wrong:
            self.log(f"warning: artifact {stage}/{key[:12]} is corrupted ({wrong}): it is removed and computed again")
            shutil.rmtree(path)
            return None
        self._verified.add(path)
        return path

    def produce(self, stage: str, key: str, spec: Any, compute: Callable[[Path], dict[str, Any]]) -> Path:
        """Return the artifact of `key`, computing it by `compute(folder)` if it is not there.

        `compute` writes files into the folder it is given and returns the manifest's `about`. Of two processes that
        want the same artifact, one computes and the other waits for it.
        """
        found = self.find(stage, key)
        if found is not None:
            return found
        (self.root / stage).mkdir(parents=True, exist_ok=True)
        with self._lock(stage, key):
            found = self.find(stage, key)
            if found is not None:
                return found
            work = self.root / stage / f".{key}"
            (work / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            about = compute(work)
            shutil.rmtree(work / CHECKPOINTS)
            manifest = {"stage": stage, "key": key, "spec": spec, "about": about, "files": checksums(work)}
            write_json(work / MANIFEST, manifest)
            path = self.path(stage, key)
            shutil.rmtree(path, ignore_errors=True)  # only a folder without a manifest can still be there
            os.replace(work, path)
            self._verified.add(path)
        return path

    def about(self, stage: str, key: str) -> dict[str, Any]:
        """Return what `compute` said about a finished artifact."""
        return json.loads((self.path(stage, key) / MANIFEST).read_text(encoding="utf-8"))["about"]

    def spec(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the spec that a finished artifact was made from, None for an unfinished one."""
        try:
            return json.loads((self.path(stage, key) / MANIFEST).read_text(encoding="utf-8"))["spec"]
        except (OSError, ValueError, KeyError):
            return None

    @contextlib.contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        """Hold the artifact's lock, which the system lets go of when a process dies."""
        path = self.root / stage / f".{key}.lock"
        with path.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.log(f"another process is computing {stage}/{key[:12]}: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield  # the lock file stays: removing it would let a third process lock a new one beside a waiting second

    def contents(self) -> list[tuple[str, str, int]]:
        """Return (stage, key, bytes) of every artifact, unfinished ones too (their key starts with a dot)."""
        rows = []
        for stage in sorted(p for p in self.root.glob("*") if p.is_dir()):
            for path in sorted(p for p in stage.iterdir() if p.is_dir()):
                rows.append((stage.name, path.name, sum(f.stat().st_size for f in path.rglob("*") if f.is_file())))
        return rows


class FileCheckpoint:
    """Tensors under a name in an unfinished artifact, loaded to `device`; a broken checkpoint counts as none."""

    def __init__(self, work: Path, device: torch.device | str = "cpu"):
        self.folder, self.device = work / CHECKPOINTS, str(device)

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return what was saved under `name`, or None."""
        path = self._path(name)
        try:
            return load_file(path, device=self.device) if path.is_file() else None
        except (OSError, SafetensorError):
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace what is saved under `name`, whole or not at all."""
        path = self._path(name)
        temporary = path.with_suffix(".tmp")
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, temporary)
        os.replace(temporary, path)

    def once(self, name: str, choose: Callable[[], str]) -> str:
        """Return the word that `choose` returned the first time it was asked for under this name."""
        stored = self.load(name)
        word = bytes(stored["word"].tolist()).decode() if stored else choose()
        if not stored:
            self.save(name, {"word": torch.tensor(list(word.encode()), dtype=torch.uint8)})
        return word

    def _path(self, name: str) -> Path:
        return self.folder / f"{digest(name)[:24]}.safetensors"


class Stopwatch:
    """Books wall time as fixed or marginal; what earlier attempts booked is carried on in the unfinished artifact.

    elsewhere: seconds of work that was found done and counts as fixed; an attempt that is resumed finds it again.
    """

    def __init__(self, work: Path, device: torch.device):
        self.file, self.device = work / CHECKPOINTS / "clock.json", device
        self.seconds = {"fixed": 0.0, "marginal": 0.0}
        self.elsewhere = 0.0
        self.attempts = 1
        if self.file.is_file():
            with contextlib.suppress(ValueError, KeyError):
                before = json.loads(self.file.read_text(encoding="utf-8"))
                self.seconds = {k: float(before[k]) for k in self.seconds}
                self.attempts = int(before["attempts"]) + 1
        self._write()

    def fixed(self) -> contextlib.AbstractContextManager[None]:
        """Book the time inside as the set's fixed cost."""
        return self._book("fixed")

    def marginal(self) -> contextlib.AbstractContextManager[None]:
        """Book the time inside as the cost of drawing members."""
        return self._book("marginal")

    def transfer(self, seconds: float) -> None:
        """Move seconds that were booked as fixed to the cost of drawing members."""
        moved = min(seconds, self.seconds["fixed"])
        self.seconds["fixed"] -= moved
        self.seconds["marginal"] += moved
        self._write()

    @contextlib.contextmanager
    def _book(self, kind: str) -> Iterator[None]:
        synchronise(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.seconds[kind] += time.perf_counter() - start
            self._write()

    def _write(self) -> None:
        write_json(self.file, self.seconds | {"attempts": self.attempts})


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder`."""
    result = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as f:
            result[path.relative_to(folder).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
    return result


def corrupted(folder: Path) -> str:
    """Return what is wrong with an artifact, or "" when all its files match the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    found = checksums(folder)
    return next((f"{name} does not match its checksum" for name in files if found.get(name) != files[name]), "")


def explain_os_error(error: OSError) -> UserError:
    """Return one line for a disk that is full, or a file or folder that cannot be read or written."""
    what = "free space there" if error.errno == errno.ENOSPC else "check the path and its permissions"
    where = error.filename or "the output folders"
    return UserError(f"{where}: {error.strerror or error}: {what}, or name other folders (artifacts_dir, records_dir)")
