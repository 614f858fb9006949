"""Progress of long stages: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

PLAIN_EVERY_S = 15.0


def log(text: str) -> None:
    """Print a line to stderr without breaking a bar."""
    tqdm.write(text, file=sys.stderr)


def progress(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yield `items`, showing rate and time left; without a terminal, a line every 15 seconds and nothing sooner."""
    if sys.stderr.isatty():
        yield from tqdm(items, description, total, leave=False, file=sys.stderr, dynamic_ncols=True, smoothing=0.1)
        return
    start = said = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= PLAIN_EVERY_S:
            said, rate = now, i / (now - start)
            left = f", {(total - i) / rate:.0f} s left" if total else ""
            log(f"{description}: {i}{f'/{total}' if total else ''}, {rate:.2g}/s{left}")
