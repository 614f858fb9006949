"""A module that needs a library which is not installed."""

from __future__ import annotations

import a_library_that_nobody_has  # noqa: F401


def needs_library(context):
    """Would need a library."""
