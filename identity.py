"""Identities: SHA-256 over canonical JSON, digests of arrays, and seeds derived by hash.

A plain module that datasets, metrics, generators and leaderboard all share without importing each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, Protocol

import numpy as np

from .errors import UserError

_ADDED_LATER = {"identity": "if changed"}


def added_later(default: Any) -> Any:
    """Return a dataclass field for a setting that a component got after results were committed.

    At its default, which must mean what the component did before, it is no part of an identity: nothing that was
    computed without it gets another key.
    """
    return field(default=default, metadata=_ADDED_LATER)


def plain(value: Any) -> Any:
    """Return `value` as JSON's own types; dataclasses become dicts, 1.0 becomes 1 (so that 1 and 1.0 do not differ).

    Fields made by `added_later` are left out at their default. Raises TypeError for what has no canonical form,
    UserError for NaN and infinities, which JSON cannot say.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if not _as_before(f, value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if not math.isfinite(value):
            raise UserError(f"{value} cannot be part of an identity: give a finite number")
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"no canonical form for {type(value).__name__}")


def _as_before(f: Any, value: Any) -> bool:
    """Whether a field was added later and is at its default; a subclass made for Hydra keeps its metadata."""
    return f.metadata.get("identity") == _ADDED_LATER["identity"] and getattr(value, f.name) == f.default


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, no spaces and shortest-round-trip floats: equal specs give equal bytes."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class InBlocks(Protocol):
    """An array that is too large to be held: its blocks, one after the other, are the whole of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def blocks(self) -> Iterator[np.ndarray]: ...


def array_digest(arrays: Mapping[str, np.ndarray | InBlocks]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of `arrays`, in the order of their names.

    The same whether an array is in memory or delivers its blocks.
    """
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        if not isinstance(a, np.ndarray) and hasattr(a, "blocks"):
            h.update(canonical_json([name, a.dtype.str, list(a.shape)]).encode())
            for block in a.blocks():
                h.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            continue
        a = np.asarray(a)
        if a.dtype.kind in "OU":  # strings have no fixed width across platforms: hash their text
            h.update(canonical_json([name, list(a.shape), a.ravel().tolist()]).encode())
            continue
        a = np.ascontiguousarray(a)
        h.update(canonical_json([name, a.dtype.str, list(a.shape)]).encode())
        h.update(a.reshape(-1).view(np.uint8).data)
    return h.hexdigest()


def derive_seed(*parts: Any) -> int:
    """Return a seed in [0, 2^63) that depends on every part: derive_seed(seed, "retrain", member)."""
    return int(digest(list(parts))[:16], 16) >> 1


def row_label(name: str, settings: Mapping[str, Any]) -> str:
    """Return the name of a board row: the component and its non-default fields, `laplace[structure=kron]`."""
    if not settings:
        return name
    return f"{name}[{','.join(f'{k}={_text(v)}' for k, v in sorted(settings.items()))}]"


def _text(value: Any) -> str:
    value = plain(value)
    return value if isinstance(value, str) else canonical_json(value)
