"""Fixed formats of numbers, lists and tables: no locale, no clock, the same bytes everywhere."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"


def number(value: float | None, unit: str) -> str:
    """Return three decimals (signed for differences), or KiB, MiB, GiB for bytes; a dash for no value.

    0.000 is zero; what is merely small reads <0.001, for no generator is free and only a control is exact.
    """
    if value is None:
        return NONE
    text = end(value, unit)
    return "<0.001" if value > 0 and text == "0.000" else text


def end(value: float, unit: str) -> str:
    """Return an end of an interval, in the format of its value."""
    if unit == "bytes":
        return _bytes(value)
    text = f"{value:+.3f}" if unit == "difference" else f"{value:.3f}"
    return text.lstrip("+-") if float(text) == 0 else text


def interval(value: float, low: float | None, high: float | None, unit: str) -> str:
    """Return `value [low,high]`, or the value alone where an end is not known."""
    text = number(value, unit)
    return text if low is None or high is None else f"{text} [{end(low, unit)},{end(high, unit)}]"


def in_bold(text: str, holds: bool) -> str:
    """Return text with its first word in bold where something holds of it."""
    value, space, rest = text.partition(" ")
    return f"**{value}**{space}{rest}" if holds else text


def unstarred(text: str) -> str:
    """Return text that names intersections, without the asterisk that would set it in italics."""
    return text.replace("*", " × ")


def exact(value: float | None) -> str:
    """Return nine significant digits, for files that are read by programs."""
    return "" if value is None else f"{value:.9g}"


def spans(numbers: Iterable[int]) -> str:
    """Return "0–2, 5" for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def on_seeds(seeds: Iterable[int]) -> str:
    """Return "base seed 3" or "base seeds 0–2, 5"."""
    seeds = list(seeds)
    return f"base seed{'s' * (len(seeds) != 1)} {spans(seeds)}"


def sentence(text: str) -> str:
    """Return `text` with a full stop."""
    return text if text.endswith((".", "!", "?")) else text + "."


def plain_text(value: Any) -> str:
    """Return a setting or count as words: yes, no, none, numbers without trailing zeros, "train 400, val 50"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain_text(v)}" for k, v in in_order(value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(plain_text(v) for v in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_order(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return items by key, the parts of a dataset in their own order."""
    order = {part: i for i, part in enumerate(("train", "tune", "val", "test"))}
    return sorted(parts.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def paragraph(*texts: str) -> str:
    """Return texts as one paragraph in lines of at most 120 characters."""
    return _filled(" ".join(texts), "") + "\n"


def undefined_for(reasons: Iterable[tuple[str, str]]) -> str:
    """Return a paragraph of what is undefined, for whom and why, from (reason, whom); "" if all is defined."""
    whose: dict[str, dict[str, None]] = {}
    for reason, who in reasons:
        if reason:
            whose.setdefault(reason, {})[who] = None
    if not whose:
        return ""
    return paragraph(
        *(unstarred(f"Undefined, {reason}: {'; '.join(names)}.") for reason, names in sorted(whose.items()))
    )


def bullet(text: str) -> str:
    """Return `text` as one item of a list, in lines of at most 120 characters."""
    return _filled(text, "- ") + "\n"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first line its header, whose columns are aligned as plain text too."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]

    def join(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    texts = [join([c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]) for line in lines]
    rule = join(["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)])
    return "".join([texts[0], rule, *texts[1:]])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a table for the terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    return "\n".join(texts) + "\n"


def _bytes(value: float) -> str:
    for name in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or name == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {name}" if name == "B" else f"{value:.1f} {name}"


def states(of_cells: Iterable[str]) -> str:
    """Return "5" if all five cells are ok, "missing" if none and all are so, else "3 of 5, 1 skipped, 1 missing"."""
    counts = Counter(of_cells)
    total, ok = counts.total(), counts["ok"]
    holes = [(state, counts[state]) for state in ("skipped", "failed", "stale", "missing") if counts[state]]
    if not holes:
        return str(total)
    if not ok and len(holes) == 1:
        return holes[0][0]
    return ", ".join([f"{ok} of {total}", *(f"{n} {state}" for state, n in holes)])


def _filled(text: str, mark: str) -> str:
    lines = textwrap.TextWrapper(120, mark, " " * len(mark), break_long_words=False, break_on_hyphens=False)
    return lines.fill(" ".join(text.split()))
