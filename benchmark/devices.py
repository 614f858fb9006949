"""Errors of devices, and those that stop answering while they are used."""

from __future__ import annotations

from ..errors import UserError

_LOST = (
    "busy or unavailable",
    "context is destroyed",
    "device not ready",
    "driver shutting down",
    "fallen off the bus",
    "gpu is lost",
    "no cuda-capable device",
    "system not yet initialized",
    "uncorrectable ecc",
    "unknown error",
    "unspecified launch failure",
)
"""What CUDA says, in lower case, of a device that is gone; other errors of CUDA's are mistakes in code."""


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that the GPU is gone, with all that this process had on it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda" in text and any(said in text for said in _LOST)


def explain_lost(error: BaseException) -> UserError:
    """Return one line on what is lost and what to do."""
    return UserError(
        f"the GPU stopped answering ({first_line(error)}): what was finished is stored; run the same command again "
        "once nvidia-smi shows the device, or on another one (CUDA_VISIBLE_DEVICES)"
    )


def first_line(error: BaseException) -> str:
    """Return what an error of torch's says before it lists what else might be known."""
    return str(error).partition("\n")[0]
