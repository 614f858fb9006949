"""Members of the linearised network: what they say, how they are stored, and that they cannot be exported."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.load import LoadedSet
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import choose_strategy, predict, predict_block
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Generator, Problem
from multiplicity_bench.generators.contract import check_generator, member_logits
from multiplicity_bench.generators.modelset import LinearisedSet, ModelSet, StackedSet, member_noise

NETWORKS = {
    "mlp": {"name": "mlp", "width": 8},
    "GroupNorm": {"name": "smallcnn", "width": 4},
    "BatchNorm": {"name": "smallcnn", "width": 4, "norm": "batch"},
}


def images(n: int = 10) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def network_of(name: str) -> Network:
    return Network(NETWORKS[name], 1, 8, 3)


def around(params, buffers, size=4, sd=0.1, seed=0, varied=None, kind=LinearisedSet) -> StackedSet:
    """Return a set of members at w* plus noise on the leaves `varied` (all by default)."""
    generator = torch.Generator().manual_seed(seed)
    origin = {n: p for n, p in params.items() if varied is None or n in varied}
    noise = {n: torch.randn((size, *p.shape), generator=generator).to(p) for n, p in origin.items()}
    about = {"origin": origin, "notes": ["linearised"]} if kind is LinearisedSet else {}
    return kind(
        size=size,
        shared_params={n: p for n, p in params.items() if n not in origin},
        shared_buffers=buffers,
        params={n: p + sd * noise[n] for n, p in origin.items()},
        **about,
    )


def weights(network: Network, dtype=torch.float64):
    """Return fresh weights in `dtype`, with BatchNorm statistics away from their initial 0 and 1."""
    cast = lambda leaves: {n: t.to(dtype) if t.is_floating_point() else t for n, t in leaves.items()}  # noqa: E731
    params, buffers = map(cast, network.init(0))
    return params, {n: b + 0.3 if b.is_floating_point() else b for n, b in buffers.items()}


def expanded(network, model_set, batch) -> torch.Tensor:
    """Return f(w*) + J (w - w*) [member, sample, class] with a Jacobian by reverse mode, leaf by leaf."""

    def function(leaves):
        return network({**model_set.shared_params, **leaves}, model_set.shared_buffers, batch)

    jacobian, start = torch.func.jacrev(function)(model_set.origin), function(model_set.origin)
    members = []
    for k in range(model_set.size):
        moved = [
            (jacobian[n].flatten(2) @ (leaf[k] - model_set.origin[n]).reshape(-1))
            for n, leaf in model_set.params.items()
        ]
        members.append(start + sum(moved))
    return torch.stack(members).detach()


@pytest.mark.parametrize("varied", [None, 1], ids=["all leaves", "one leaf"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("name", NETWORKS)
def test_members_say_the_expansion_by_an_explicit_jacobian(name, strategy, varied):
    network = network_of(name)
    params, buffers = weights(network)
    model_set = around(params, buffers, varied=None if varied is None else list(params)[:varied])
    logits = predict_block(network, model_set.block(0, 4), images(), strategy)
    assert logits.shape == (4, 10, 3) and not logits.requires_grad
    # both in float64; sums of at most a few thousand terms
    torch.testing.assert_close(logits, expanded(network, model_set, images()), rtol=1e-10, atol=1e-10)


def test_the_networks_own_logits_differ_in_second_order():
    """Halving the deviation quarters the difference; tanh is smooth, so that the third order is small at 0.01."""
    network = network_of("mlp")
    params, buffers = weights(network)
    errors = []
    for sd in (0.01, 0.005):
        say = [
            predict_block(network, around(params, buffers, sd=sd, kind=kind).block(0, 4), images())
            for kind in (LinearisedSet, StackedSet)
        ]
        errors.append(float((say[0] - say[1]).norm()))
    assert errors[0] > 1e-6
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_on_the_last_layer_the_expansion_is_the_network(name):
    network = network_of(name)
    params, buffers = weights(network)
    say = [
        predict_block(network, around(params, buffers, varied=list(params)[-2:], kind=kind).block(0, 4), images())
        for kind in (LinearisedSet, StackedSet)
    ]
    torch.testing.assert_close(say[0], say[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("name", NETWORKS)
def test_members_at_the_base_say_what_the_base_says(name, strategy):
    network = network_of(name)
    params, buffers = weights(network, torch.float32)
    logits = predict(network, around(params, buffers, sd=0.0), images(), strategy=strategy)
    with torch.no_grad():
        base = network(params, buffers, images()).numpy()
    np.testing.assert_allclose(logits, np.stack([base] * 4), atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_strategy_block_and_batch_gives_the_float64_expansion(name, monkeypatch):
    network = network_of(name)
    wide = around(*weights(network))
    narrow = around(*weights(network, torch.float32))
    reference = expanded(network, wide, images()).numpy()
    for strategy in ("loop", "vmap"):
        for members in (1, 3, 4):
            limit = members * narrow.bytes_per_member()
            monkeypatch.setattr("multiplicity_bench.benchmark.predict.BLOCK_BYTES", limit)
            logits = predict(network, narrow, images(), strategy=strategy)
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, reference, atol=1e-4)  # float32 through a dozen layers and back
    assert choose_strategy(network, narrow, images()) in ("loop", "vmap")


@dataclass
class Linearised(Generator):
    """Noise on all weights, evaluated in the linearised network."""

    sd: float = 0.05

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        origin = dict(problem.base.params)
        sizes = [p.numel() for p in origin.values()]
        noise = [member_noise(seed, k, sum(sizes), problem.device).split(sizes) for k in range(problem.members)]
        stacked = {
            n: torch.stack([p + self.sd * parts[i].view_as(p) for parts in noise])
            for i, (n, p) in enumerate(origin.items())
        }
        return LinearisedSet(
            size=problem.members,
            shared_params={},
            shared_buffers=dict(problem.base.buffers),
            params=stacked,
            origin=origin,
            notes=["members of the linearised network"],
        )


@pytest.mark.parametrize("settings", [{}, {"network": "smallcnn", "norm": "batch", "classes": 3}], ids=str)
def test_a_generator_of_linearised_members_keeps_to_the_contract(settings, toy):
    problem = toy(**settings)
    found = check_generator(Linearised(), problem)
    assert isinstance(found, LinearisedSet) and found.size == problem.members
    for vmap in (False, True):
        said = member_logits(found, problem, vmap=vmap)
        np.testing.assert_allclose(said.numpy(), predict(problem.network, found, problem.tune.images), atol=1e-5)
        torch.testing.assert_close(said, expanded(problem.network, found, problem.tune.images), rtol=1e-4, atol=1e-4)


def test_a_loaded_set_says_what_the_saved_one_said_and_stores_the_base_once(tmp_path):
    network = network_of("BatchNorm")
    model_set = replace(around(*weights(network, torch.float32)), failed=[2], diagnostics={"tau": 0.5})
    model_set.save(tmp_path, network.describe())
    loaded = ModelSet.load(tmp_path)
    assert type(loaded) is LinearisedSet and not loaded.deployable
    assert (loaded.notes, loaded.failed, loaded.diagnostics) == (["linearised"], [2], {"tau": 0.5})
    for group in ("params", "origin", "shared_params", "shared_buffers"):
        found, wanted = getattr(loaded, group), getattr(model_set, group)
        assert set(found) == set(wanted) and all(torch.equal(found[n], leaf) for n, leaf in wanted.items())
    said = LoadedSet(loaded, Network.restore(loaded.network), []).predict(images().numpy())
    # where a tensor lies in memory may change the last bits of a product
    np.testing.assert_allclose(said, predict(network, model_set, images()), atol=1e-5)
    one = sum(p.nbytes for p in model_set.origin.values())
    assert loaded.bytes_per_member() == one


def test_a_members_leaves_are_not_handed_out_as_a_network():
    network = network_of("mlp")
    model_set = around(*weights(network, torch.float32))
    for export in (model_set.member, LoadedSet(model_set, network, [0]).member):
        with pytest.raises(UserError, match="no weight vectors"):
            export(0)


def test_a_set_moves_to_a_device_with_its_base():
    moved = around(*weights(network_of("mlp"), torch.float32)).to(torch.device("meta"))
    assert isinstance(moved, LinearisedSet)
    block = moved.block(1, 3)
    assert all(leaf.device.type == "meta" for leaf in {**block.params, **block.expand_at}.values())


def test_a_leaf_without_its_base_is_an_error_and_not_a_wrong_number():
    network = network_of("mlp")
    model_set = around(*weights(network, torch.float32))
    del model_set.origin["body.1.weight"]
    with pytest.raises(KeyError, match=r"body\.1\.weight"):
        predict(network, model_set, images(), strategy="loop")
