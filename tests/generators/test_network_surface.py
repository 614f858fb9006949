"""The loss surface of a network: who advances together, and what happens when memory runs out."""

from __future__ import annotations

import pytest
import torch
from multiplicity_bench.generators import surface as module
from multiplicity_bench.generators.riemannian_laplace import RiemannianLaplace
from multiplicity_bench.generators.surface import Curvature, Gradient, NetworkSurface, Value


@pytest.fixture
def surface(toy) -> NetworkSurface:
    """The surface of all weights of the toy network, members together."""
    problem = toy(members=4)
    return NetworkSurface(problem, list(problem.base.params), problem.train, strategy="vmap")


@pytest.fixture
def rooms(monkeypatch):
    """Return `rooms(n)`: from then on, memory is there for n members at a time; and the sizes that were asked for."""
    asked: list[int] = []

    def limit(most: int) -> list[int]:
        ways = {kind: kind.together for kind in (Value, Gradient, Curvature)}  # before any is patched: they inherit
        for kind, way in ways.items():

            def together(loss, *rows, way=way):
                asked.append(len(rows[0]))
                if len(rows[0]) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return way(loss, *rows)

            monkeypatch.setattr(kind, "together", together)
        return asked

    return limit


def test_out_of_memory_the_members_are_halved_and_stay_as_they_are(surface, rooms):
    weights = surface.origin + 0.01 * torch.randn(7, surface.size, dtype=torch.float64)
    direction = torch.randn_like(weights)
    whole = [surface.value(weights), *surface.gradient(weights), *surface.curvature(weights, direction)]
    asked = rooms(2)
    halves = [surface.value(weights), *surface.gradient(weights), *surface.curvature(weights, direction)]
    assert asked[:7] == [7, 3, 1, 2, 4, 2, 2], "each half is tried whole before it is halved again"
    for one, other in zip(halves, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_single_member_that_does_not_fit_is_an_error(surface, rooms):
    rooms(0)
    with pytest.raises(torch.OutOfMemoryError):
        surface.gradient(surface.origin.expand(2, -1))


@pytest.mark.parametrize("faster", ["loop", "vmap"])
def test_members_advance_in_the_way_that_measured_faster(faster, toy, monkeypatch):
    """The clock is the test's: a gradient of the other way takes ten seconds more."""
    seconds = {"now": 0.0}
    for name, method in (("loop", "one_by_one"), ("vmap", "together")):
        way = getattr(Gradient, method)

        def timed(loss, *rows, way=way, name=name):
            seconds["now"] += 0.0 if name == faster else 10.0
            return way(loss, *rows)

        monkeypatch.setattr(Gradient, method, timed)
    monkeypatch.setattr(module.time, "perf_counter", lambda: seconds["now"])
    problem = toy(members=4)
    found = RiemannianLaplace(prior_precision="3000").generate(problem, 0)
    assert found.diagnostics["strategy"] == faster
    assert bool(problem.checkpoint.load("strategy")["vmap"]) == (faster == "vmap"), "a resumed run goes on likewise"
