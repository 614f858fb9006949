"""Members that are dear to make: what the search tries, what it keeps, and how the time of it is booked.

Made here by a stand-in whose members are two numbers: of each (prior precision, member) the test knows if it is within
the tolerance, so that the whole search can be repeated by counting.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from multiplicity_bench.errors import Diverged
from multiplicity_bench.generators import dear_members
from multiplicity_bench.generators.api import Memory
from multiplicity_bench.generators.dear_members import DRAWS, RESOLUTION, STRIDE, DearMembers
from multiplicity_bench.generators.prior import HIGH, LOW

SECONDS = 2.0
"""What one member takes, on the test's own clock."""


@dataclass
class Booked:
    """A clock that writes down where time is booked."""

    moved: list[float] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)

    @contextmanager
    def _book(self, name):
        self.entered.append(name)
        yield
        self.entered.append(f"end of {name}")

    def fixed(self):
        return self._book("fixed")

    def marginal(self):
        return self._book("marginal")

    def transfer(self, seconds: float) -> None:
        self.moved.append(seconds)


class Interrupted(Exception):
    """Raised in the middle of a run."""


class Interrupting(Memory):
    """A checkpoint that fails right after it saved for the `left`-th time."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def save(self, name, tensors) -> None:
        super().save(name, tensors)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


@dataclass
class Maker:
    """A generator's side of DearMembers: member k is within the tolerance from log10 precision `edge(k)` on."""

    problem: object
    edges: list[float]
    start: float = 2.0
    chunk: int = 1
    prior: str = "tune_acceptance"
    target: float = 0.9
    made: list[tuple[float, range]] = field(default_factory=list)
    asked: list[tuple[float, int]] = field(default_factory=list)
    now: float = 0.0
    posterior = SimpleNamespace(names=["w"])

    def make(self, precision, members):
        self.made.append((precision, members))
        self.now += SECONDS * len(members)
        return [
            {"w": torch.tensor([precision, float(k)], dtype=torch.float64), "about": torch.tensor(k)} for k in members
        ]

    def loss(self, made):
        precision, k = made["w"].tolist()
        self.asked.append((precision, int(k)))
        base = self.problem.tune_loss(self.problem.base.params, self.problem.base.buffers)
        return base + 0.01 if math.log10(precision) >= self.edges[int(k)] - 1e-9 else math.inf

    def collect(self):
        number = None if self.prior == "tune_acceptance" else float(self.prior)
        settings = SimpleNamespace(
            prior_precision=self.prior,
            target_epsilon=0.05,
            target_acceptance=self.target,
            choose=lambda *_, **search: number or 10**self.start,
        )
        return DearMembers(
            settings, self.problem, self.posterior, 3, self.make, self.loss, "members", self.chunk
        ).collect()

    def tries(self) -> dict[float, list[int]]:
        """Return the members whose loss was asked for, by log10 of the precision, in order."""
        found: dict[float, list[int]] = {}
        for precision, k in self.asked:
            found.setdefault(round(math.log10(precision), 6), []).append(k)
        return found


@pytest.fixture
def maker(toy, monkeypatch):
    """Return `maker(edge or edges, members=, **settings)`, with the clock of dear_members the maker's own."""

    def make(edges, members=6, clock=None, checkpoint=None, **settings) -> Maker:
        problem = replace(toy(members=members), clock=clock or Booked(), checkpoint=checkpoint or Memory())
        found = Maker(problem, list(edges) if isinstance(edges, list) else [edges] * 100, **settings)
        monkeypatch.setattr(dear_members.time, "perf_counter", lambda: found.now)
        return found

    return make


def random_edges(seed: int, centre: float = 0.0) -> list[float]:
    """Return an edge for every member, spread over a decade and a half."""
    return (centre + torch.randn(100, generator=torch.Generator().manual_seed(seed)).double()).tolist()


@pytest.mark.parametrize("target", [0.5, 0.9])
@pytest.mark.parametrize("start", [-1.6, 2.0, 4.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_smallest_precision_of_the_grid_at_which_enough_members_are_within(
    seed, start, target, maker
):
    """Counted on all points of the grid of quarter decades around the start."""
    found = maker(random_edges(seed), start=start, target=target)
    precision, made = found.collect()
    needed = math.ceil(target * DRAWS)
    grid = [x for i in range(-40, 41) if LOW <= (x := start + i * RESOLUTION) <= HIGH]
    wanted = next(x for x in grid if sum(x >= edge - 1e-9 for edge in found.edges[:DRAWS]) >= needed)
    assert math.log10(precision) == pytest.approx(wanted)
    assert [one["w"].tolist() for one in made] == [[precision, k] for k in range(6)]
    assert 2 * RESOLUTION == STRIDE, "or the points it tries are others than these"


def test_where_every_prior_precision_is_wide_enough_the_smallest_is_taken(maker):
    found = maker(LOW - 1, start=1.0)
    precision, made = found.collect()
    assert precision == pytest.approx(10**LOW) and all(one["w"][0] == precision for one in made)


def test_members_that_fail_at_every_precision_end_in_one_line(maker):
    found = maker(HIGH + 1)
    with pytest.raises(Diverged, match="no prior precision up to 1e9") as caught:
        found.collect()
    assert "\n" not in str(caught.value) and found.problem.checkpoint.load("member 0") is None


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("members", [1, 6, 20, 45])
def test_members_kept_from_the_search_are_those_made_afresh_and_none_is_made_twice(members, chunk, maker):
    found = maker(random_edges(1), members=members, chunk=chunk)
    precision, made = found.collect()
    afresh = maker(random_edges(1), members=members, chunk=chunk, prior=repr(precision)).collect()[1]
    assert len(made) == members
    for one, other in zip(made, afresh, strict=True):
        assert torch.equal(one["w"], other["w"]) and torch.equal(one["about"], other["about"])
    once = [(precision, k) for precision, chunk in found.made for k in chunk]
    assert len(once) == len(set(once))


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("members", [6, 20, 45])
def test_a_member_is_always_made_together_with_the_same_others(members, chunk, maker):
    found = maker(random_edges(2), members=members, chunk=chunk)
    found.collect()
    afresh = maker(0.0, members=members, chunk=chunk, prior="5")
    afresh.collect()
    together: dict[int, range] = {}
    for _, some in [*found.made, *afresh.made]:
        for k in some:
            assert together.setdefault(k, some) == some
    assert all(some.start % chunk == 0 and len(some) <= chunk for some in together.values())
    assert max(together) < max(members, DRAWS)


@pytest.mark.parametrize("chunk", [1, 16])
def test_an_interrupted_run_ends_with_the_members_of_an_uninterrupted_one(chunk, maker):
    precision, whole = maker(random_edges(4), members=35, chunk=chunk).collect()
    for after in (1, 2, 17, 18, 19, 20, 34, 36):
        checkpoint = Interrupting(after)
        first = maker(random_edges(4), members=35, chunk=chunk, checkpoint=checkpoint)
        with pytest.raises(Interrupted):
            first.collect()
        again = maker(random_edges(4), members=35, chunk=chunk, checkpoint=checkpoint)
        found, made = again.collect()
        assert found == precision
        assert all(torch.equal(one["w"], other["w"]) for one, other in zip(made, whole, strict=True))
        boundaries = {some for _, some in [*first.made, *again.made]}
        assert boundaries <= {range(k, min(k + chunk, 35)) for k in range(0, 35, chunk)}


def test_a_finished_set_is_only_read(maker):
    checkpoint = Memory()
    precision, made = maker(0.3, checkpoint=checkpoint).collect()
    again = maker(0.3, checkpoint=checkpoint)
    found, read = again.collect()
    assert not again.made and not again.asked and not again.problem.clock.moved
    assert found == precision and all(torch.equal(a["w"], b["w"]) for a, b in zip(read, made, strict=True))


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("members", [6, 45])
def test_the_seconds_of_the_members_that_stay_are_moved_from_the_search_to_the_members(members, chunk, maker):
    clock = Booked()
    found = maker(0.0, members=members, chunk=chunk, clock=clock)
    precision, _ = found.collect()
    made_once = {k for p, some in found.made if p == precision for k in some}
    alone = [entry for entry in clock.entered if entry == "marginal"]
    afterwards = sum(len(some) for p, some in found.made[-len(alone) :] if p == precision) if alone else 0
    assert clock.moved == [SECONDS] * (len({k for k in made_once if k < members}) - afterwards)
    # The search is a fixed cost, what it did not make is a cost of the members, and neither holds the other.
    assert clock.entered[:2] == ["fixed", "end of fixed"]
    assert clock.entered[2:] == ["marginal", "end of marginal"] * len(alone)
    assert len(clock.moved) + afterwards == members


def test_a_try_stops_as_soon_as_it_is_decided(maker):
    """Three misses of 20 make 90% impossible, 18 hits make it certain; with half of them, 11 and 10."""
    for target, miss, hit in ((0.9, 3, 18), (0.5, 11, 10)):
        found = maker(0.1, target=target)
        found.collect()
        tries = found.tries()
        assert tries == {x: list(range(hit if x >= 0.1 else miss)) for x in tries}
        assert len(tries) >= 4, "hits and misses"


def test_a_try_makes_no_chunk_that_it_does_not_need(maker):
    found = maker(0.1, chunk=2)
    found.collect()
    for tried in {p for p, _ in found.made}:
        members = [k for p, some in found.made if p == tried for k in some]
        assert members == list(range(18 if math.log10(tried) >= 0.1 else 4))


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_given_number_is_not_searched_for(chunk, maker):
    clock = Booked()
    found = maker(0.1, members=8, chunk=chunk, prior="12.5", clock=clock)
    precision, made = found.collect()
    assert precision == 12.5 and len(made) == 8 and not found.asked and not clock.moved
    assert found.made == [(12.5, range(k, k + chunk)) for k in range(0, 8, chunk)]
    assert clock.entered == ["marginal", "end of marginal"] * len(found.made)


def test_the_leaves_of_what_is_kept_of_a_member_are_those_of_the_posterior(maker):
    (one,) = maker(0.1, members=1, prior="2").collect()[1]
    assert set(dear_members.leaves_of(one, Maker.posterior)) == {"w"} < set(one)
