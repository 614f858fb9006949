"""Surfaces whose logits are linear in the weights: the network's own on its last layer, linearised elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.generators import linear_surface
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.linear_surface import LinearSurface, linear_obstacle, surface_of
from multiplicity_bench.generators.posterior import leaf_names
from multiplicity_bench.generators.surface import NetworkSurface, metric_part, tilted

# Both ways sum the same terms in float64, in another order: a few hundred of them lose two of 16 digits.
EXACT = {"rtol": 1e-11, "atol": 1e-11}

TASKS = {
    "two classes": ("mlp", 2, {"width": 6}),
    "three classes": ("smallcnn", 3, {"width": 4, "norm": "batch"}),
    "three labels": ("smallcnn", 3, {"width": 4}),
}


@pytest.fixture(params=TASKS)
def problem(request, untrained):
    network, classes, settings = TASKS[request.param]
    found = untrained(network, size=6, classes=classes, **settings)
    return with_labels(found) if request.param == "three labels" else found


def with_labels(problem):
    """Return the problem with multi-label targets, a fifth of them missing; one image has none at all."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (len(problem.train), problem.classes), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -1
    labels[1] = -1
    return replace(problem, task="multilabel", train=Part(problem.train.images, labels))


def last_layer(problem) -> list[str]:
    return leaf_names(problem.module(), "diag", "last_layer")


def points(surface, members: int = 3, scale: float = 0.5):
    """Return weights around the base and directions, float64 [member, param]."""
    generator = torch.Generator().manual_seed(1)
    weights, direction = torch.randn(2, members, surface.size, generator=generator, dtype=torch.float64)
    return surface.origin + scale * weights, direction


def close(found, wanted):
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, **EXACT)


@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_on_the_last_layer_the_linear_surface_is_the_networks(prior, problem):
    part = metric_part(problem, 7, seed=0)  # fewer than the 12 training images, to which the sum is scaled
    linear, network = (kind(problem, last_layer(problem), part, prior) for kind in (LinearSurface, NetworkSurface))
    weights, direction = points(linear)
    assert linear.size == network.size and torch.equal(linear.origin, network.origin)
    for _ in range(2):
        close([linear.value(weights)], [network.value(weights)])
        close(linear.gradient(weights), network.gradient(weights))
        close(linear.curvature(weights, direction), network.curvature(weights, direction))
        tilted(linear)
        network.tilt = linear.tilt


def test_the_linearised_surfaces_derivatives_are_those_of_the_expansion(problem):
    """Reference: J by reverse mode, leaf by leaf, and automatic differentiation of the loss in the weights."""
    names, prior = list(problem.base.params), 0.3
    surface = LinearSurface(problem, names, problem.train, prior)
    params = {n: p.double() for n, p in problem.base.params.items()}
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in problem.base.buffers.items()}
    logits = lambda leaves: problem.network(leaves, buffers, problem.train.images)  # noqa: E731
    blocks = torch.func.jacrev(logits)(params)
    jacobian, start = torch.cat([blocks[n].flatten(2) for n in names], 2), logits(params)

    def loss(w):
        expanded = start + jacobian @ (w - surface.origin)
        return len(problem.train) * problem.loss(expanded, problem.train.labels) + 0.5 * prior * w @ w

    weights, direction = points(surface, 2, scale=0.1)
    value, gradient, curved = surface.curvature(weights, direction)
    assert value.shape == curved.shape == (2,) and gradient.shape == weights.shape
    for i, (w, d) in enumerate(zip(weights, direction)):
        along = torch.func.jvp(torch.func.grad(loss), (w,), (d,))[1] @ d
        close([value[i], gradient[i], curved[i]], [loss(w), torch.func.grad(loss)(w), along])
    close(surface.gradient(weights), (value, gradient))
    close([surface.value(weights)], [value])


def test_the_tilt_makes_the_base_stationary_and_takes_a_plane_from_the_loss(problem):
    surface = LinearSurface(problem, last_layer(problem), problem.train)
    base, (weights, _) = surface.origin.float().expand(4, -1), points(surface)
    plain, slope = surface.gradient(base[:1])
    untilted = surface.value(weights)
    value, gradient = tilted(surface).gradient(base)
    assert float(slope.norm()) > 0.1
    # One member and four take different matrix products, which round differently in float32.
    assert float(gradient.norm(dim=1).max()) < 1e-6 * float(slope.norm())
    torch.testing.assert_close(value, plain.expand(4))
    plane = (weights - surface.origin) @ slope[0].double()
    torch.testing.assert_close(surface.value(weights), untilted - plane, **EXACT)


def test_weights_are_answered_in_their_own_dtype_and_values_in_float64(problem):
    surface = LinearSurface(problem, last_layer(problem), problem.train)
    weights, direction = points(surface)
    wide = surface.curvature(weights, direction)
    narrow = surface.curvature(weights.float(), direction.float())
    assert [t.dtype for t in wide] == [torch.float64] * 3
    assert [t.dtype for t in narrow] == [torch.float64, torch.float32, torch.float64]
    for found, wanted in zip(narrow, wide):
        # float32 carries 6e-8 per operation, in a network of four layers and two products
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def counted(problem):
    """Return the problem with a network that counts its passes, and the count."""
    calls = []

    def network(*arguments, **options):
        calls.append(1)
        return problem.network(*arguments, **options)

    return replace(problem, network=network), calls


def test_the_network_runs_once_and_not_for_every_gradient(problem):
    watched, calls = counted(problem)
    surface = surface_of(watched, last_layer(problem), problem.train, linearised=False, prior=0.0)
    before = len(calls)
    for scale in (0.1, 0.2):
        weights, direction = points(surface, 5, scale)
        surface.gradient(weights.float())
        surface.curvature(weights.float(), direction.float())
    assert 0 < before == len(calls)


def test_no_jacobian_is_computed_for_weights_that_go_through_the_network(problem):
    watched, calls = counted(problem)
    surface_of(watched, list(problem.base.params), problem.train, linearised=False, prior=0.0)
    assert not calls


def test_a_surface_is_linear_where_the_network_is_or_where_that_is_asked_for(problem):
    def kind(names, linearised=False):
        surface = surface_of(problem, names, problem.train, linearised=linearised, prior=0.5)
        assert surface.prior == 0.5 and surface.names == names and surface.part is problem.train
        return type(surface)

    every, last = list(problem.base.params), last_layer(problem)
    assert kind(last) is LinearSurface
    assert kind(last[:1]) is LinearSurface
    assert kind(every) is NetworkSurface
    assert kind(every[:1]) is NetworkSurface
    assert kind(every, linearised=True) is LinearSurface


def test_all_weights_of_a_logistic_regression_make_a_linear_surface(untrained):
    problem = untrained("logistic")
    surface = surface_of(problem, list(problem.base.params), problem.train, linearised=False, prior=0.0)
    assert isinstance(surface, LinearSurface)


def test_a_network_that_bends_its_outputs_after_the_last_layer_keeps_its_own_surface(untrained):
    problem = untrained("mlp", width=6)
    bent = replace(problem, network=lambda *a, **o: 30 * torch.tanh(problem.network(*a, **o) / 30))
    surface = surface_of(bent, last_layer(problem), problem.train, linearised=False, prior=0.0)
    assert isinstance(surface, NetworkSurface)


def test_a_jacobian_beyond_the_limit_is_refused_and_never_computed(problem, monkeypatch):
    names, images = last_layer(problem), len(problem.train)
    size = sum(problem.base.params[n].numel() for n in names)
    needed = 4 * images * problem.classes * size
    monkeypatch.setattr(linear_surface, "LIMIT", needed)
    assert linear_obstacle(problem, names, images) is None
    monkeypatch.setattr(linear_surface, "LIMIT", needed - 1)
    reason = linear_obstacle(problem, names, images)
    assert reason is not None and f"{images} images" in reason and "smaller subset" in reason and "\n" not in reason
    watched, calls = counted(problem)
    surface = surface_of(watched, names, problem.train, linearised=False, prior=0.0)
    assert isinstance(surface, NetworkSurface) and not calls
