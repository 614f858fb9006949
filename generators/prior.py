"""How the prior precision a of a posterior is chosen: a number, marginal likelihood, or by its draws on tune.

The default takes the widest posterior of whose draws a share stays within the tolerance: marginal likelihood gives
weights that lose accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import Diverged, UserError, suggest
from .api import Problem
from .modelset import Leaves

PRIORS = ("tune_acceptance", "tune_loss", "marglik")
TUNE_AT_LEAST = 25
LOW, HIGH = -2.0, 9.0
"""log10 of the smallest and the largest prior precision that is tried."""

RESOLUTION = (HIGH - LOW) / 2**12


def prior_number(text: str) -> float | None:
    """Return the number that `prior_precision` is, None where it names a way to choose it; UserError otherwise."""
    if text in PRIORS:
        return None
    try:
        number = float(text)
    except ValueError:
        raise UserError(
            f"generator.prior_precision={text} is neither a number nor a choice: {suggest(text, PRIORS)}"
        ) from None
    if not (number > 0 and math.isfinite(number)):
        raise UserError(f"generator.prior_precision={text} must be a positive number")
    return number


def choose_prior(
    how: str,
    problem: Problem,
    marglik: float,
    member: Callable[[float, int], tuple[Leaves, Leaves]],
    target_epsilon: float,
    target_acceptance: float,
    resolution: float = RESOLUTION,
    draws: int | None = None,
) -> float:
    """Return the prior precision: a given number, marginal likelihood's, or one chosen on tune.

    resolution: of tune_acceptance, in log10; draws: that it is decided on (None: `tune_draws`).
    `member(precision, k)` returns parameters and buffers of draw k; the draws on tune are the set's own first members,
    so that their noise is the same at every precision tried.
    """
    number = prior_number(how)
    if number is not None:
        return number
    if how == "marglik":
        return marglik
    draws = tune_draws(problem) if draws is None else draws
    if how == "tune_loss":

        def predictive_loss(precision: float) -> float:
            logits = [problem.logits(*member(precision, k), problem.tune.images) for k in range(draws)]
            return _predictive_loss(logits, problem.tune.labels)

        return min((10 ** (LOW + (HIGH - LOW) * i / 22) for i in range(23)), key=predictive_loss)

    def reaches(exponent: float) -> bool:
        loss = lambda k: problem.tune_loss(*member(10**exponent, k))  # noqa: E731
        return reaches_on_tune(problem, loss, draws, target_epsilon, target_acceptance)

    return 10 ** widest(reaches, LOW, HIGH, resolution=resolution)


def tune_draws(problem: Problem) -> int:
    """Return how many draws a prior precision is chosen on."""
    return max(20, min(problem.members, 50))


def reaches_on_tune(
    problem: Problem,
    loss: Callable[[int], float],
    draws: int,
    target_epsilon: float,
    target_acceptance: float,
) -> bool:
    """Return whether a share target_acceptance of members 0 .. draws - 1 is within target_epsilon of the base on tune.

    `loss(k)` is the loss of member k on tune (nan or inf: not within). It is asked for until the decision is certain:
    enough members are in, or too many are out.
    """
    limit = problem.tune_loss(problem.base.params, problem.base.buffers) + target_epsilon
    needed = next(count for count in range(draws + 1) if count / draws >= target_acceptance)
    within = 0
    for k in problem.progress(range(draws), "choosing the prior precision on tune", draws):
        within += loss(k) <= limit
        if within >= needed or within + draws - 1 - k < needed:
            break
    return within >= needed


def widest(
    reaches: Callable[[float], bool],
    low: float,
    high: float,
    *,
    start: float | None = None,
    stride: float = 0.5,
    resolution: float,
) -> float:
    """Return the smallest x in [low, high], to `resolution`, that `reaches` the target: true of all larger x as well.

    Without `start` the whole interval is bisected. Where a try is dear, start near the answer: from there x goes down
    by `stride` until it misses (or up until it reaches), and only that stride is bisected. Raises Diverged when even
    `high` misses.
    """
    x, stride = (high, high - low) if start is None else (min(max(start, low), high), stride)
    if reaches(x):
        reached = x
        while (x := max(reached - stride, low)) < reached and reaches(x):
            reached = x
        if reached == low:
            return low
        missed = x
    else:
        missed = x
        while (x := min(missed + stride, high)) > missed and not reaches(x):
            missed = x
        if missed == high:
            raise Diverged(f"no prior precision up to 1e{high:g} reaches the target acceptance on tune")
        reached = x
    for _ in range(math.ceil(math.log2((reached - missed) / resolution) - 1e-9)):
        middle = 0.5 * (missed + reached)
        missed, reached = (missed, middle) if reaches(middle) else (middle, reached)
    return reached


def _predictive_loss(logits: list[Tensor], labels: Tensor) -> float:
    """Return the cross-entropy of the members' mean probabilities, in nats."""
    mean = torch.stack([member.softmax(-1) for member in logits]).mean(0)
    return float(torch.nn.functional.nll_loss(mean.clamp(min=1e-12).log(), labels))
