"""Members that are dear to make: the prior precision is tuned on the members themselves, and those of the choice stay.

The search starts at the prior precision that suits plain draws, goes down half a decade at a time until too few members
stay within the tolerance on tune, and stops at a quarter of a decade: a try costs up to as many members as a set has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .api import Problem
from .modelset import Leaves
from .posterior import FromPosterior, Posterior
from .prior import HIGH, LOW, reaches_on_tune, widest

STRIDE, RESOLUTION = 0.5, 0.25
"""Steps of the search in log10 of the prior precision."""

DRAWS = 20
"""Members on which the acceptance of a prior precision is decided."""

Made = dict[str, torch.Tensor]
"""What is kept of a member: its leaves, and whatever its maker wants to say about it."""


@dataclass
class DearMembers:
    """How one generator makes members, and how the search for its prior precision sees them.

    make: (precision, members) -> what is kept of each, in order; chunk: how many are made at once: member k is always
    made together with the same others; loss: the loss on tune of what was made, inf for a failure; name: for progress.
    """

    settings: FromPosterior
    problem: Problem
    posterior: Posterior
    seed: int
    make: Callable[[float, range], list[Made]]
    loss: Callable[[Made], float]
    name: str
    chunk: int = 1

    def collect(self) -> tuple[float, list[Made]]:
        """Return the prior precision and all members; finished ones survive a kill."""
        problem = self.problem
        precision = self._precision()
        made: list[Made] = []
        chunks = self._chunks(problem.members)
        for chunk in problem.progress(chunks, self.name, len(chunks)):
            stored = [one for k in chunk if (one := problem.checkpoint.load(f"member {k}")) is not None]
            if len(stored) < len(chunk):
                with problem.clock.marginal():
                    stored = self.make(precision, chunk)
                for k, one in zip(chunk, stored, strict=True):
                    problem.checkpoint.save(f"member {k}", one)
            made += stored
        return precision, made[: problem.members]

    def _chunks(self, count: int) -> list[range]:
        """Return the chunks that hold the first `count` members; the last is cut at the most that is ever made."""
        most = max(self.problem.members, DRAWS)
        starts = range(0, count, self.chunk)
        return [range(start, min(start + self.chunk, most)) for start in starts]

    def _precision(self) -> float:
        if self.settings.prior_precision != "tune_acceptance":
            return self.settings.choose(self.problem, self.posterior, self.seed)
        done = self.problem.checkpoint.load("tuned prior")
        if done is not None:
            return float(done["precision"])
        kept: dict[int, tuple[Made, float]] = {}

        def reaches(exponent: float) -> bool:
            nonlocal kept
            tried = _Tried(self, 10**exponent)
            reached = reaches_on_tune(
                self.problem,
                tried.loss,
                DRAWS,
                self.settings.target_epsilon,
                self.settings.target_acceptance,
            )
            kept = tried.made if reached else kept
            return reached

        rough = {"resolution": RESOLUTION, "draws": DRAWS}  # no finer than what follows
        start = math.log10(self.settings.choose(self.problem, self.posterior, self.seed, **rough))
        with self.problem.clock.fixed():
            precision = 10 ** widest(reaches, LOW, HIGH, start=start, stride=STRIDE, resolution=RESOLUTION)
        for k, (made, seconds) in kept.items():
            if k < self.problem.members:
                self.problem.clock.transfer(seconds)
            self.problem.checkpoint.save(f"member {k}", made)
        self.problem.checkpoint.save("tuned prior", {"precision": torch.tensor(precision, dtype=torch.float64)})
        return precision


class _Tried:
    """Members made at one prior precision, chunk by chunk as the search asks for them."""

    def __init__(self, dear: DearMembers, precision: float):
        self.dear, self.precision = dear, precision
        self.made: dict[int, tuple[Made, float]] = {}

    def loss(self, k: int) -> float:
        """Return the loss on tune of member k."""
        if k not in self.made:
            first = k - k % self.dear.chunk
            chunk = next(c for c in self.dear._chunks(k + 1) if c.start == first)
            start = time.perf_counter()
            made = self.dear.make(self.precision, chunk)
            seconds = (time.perf_counter() - start) / len(chunk)
            self.made |= {i: (one, seconds) for i, one in zip(chunk, made, strict=True)}
        return self.dear.loss(self.made[k][0])


def plain_number(value: torch.Tensor) -> float | int | None:
    """Return a number as a record holds it: None where it is not finite."""
    number = value.item()
    return number if math.isfinite(number) else None


def leaves_of(made: Made, posterior: Posterior) -> Leaves:
    """Return the leaves among what was kept of a member."""
    return {n: made[n] for n in posterior.names}
