"""A module that fails when it is imported."""

from __future__ import annotations

raise RuntimeError("this plug-in was built for another version\nof everything")


class Explodes:
    """Says what it would do, had it been imported."""
