"""The two kinds of failure the command line tells apart: the user's mistakes, and what cannot be used here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what to do. The command exits with 2."""


class Unavailable(UserError):
    """A registered component that cannot be used on this machine; the message is the reason."""


class Diverged(Exception):
    """Training or sampling left the finite numbers: recorded as a failed run with this reason, never cached."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'a' or 'b'?`, or the list of known names when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else "nothing is registered"
