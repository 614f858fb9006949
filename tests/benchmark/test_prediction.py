"""Predictions of a model set: every strategy, block size and batch gives the same logits."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import predict as predict_module
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import base_block, block_size, choose_strategy, predict, predict_block
from multiplicity_bench.generators.api import Trained
from multiplicity_bench.generators.modelset import DiagonalSet, LinearisedSet, ModelSet, OutputSet, StackedSet, stack

NETWORKS = {
    "mlp": {"name": "mlp", "width": 8},
    "GroupNorm": {"name": "smallcnn", "width": 4},
    "BatchNorm": {"name": "smallcnn", "width": 4, "norm": "batch"},
}
KINDS = ["stacked", "diagonal", "last layer", "identical", "temperature", "noise"]


def images(n: int = 30) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 12, 12), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def make_set(network: Network, kind: str, size: int = 5) -> ModelSet:
    params, buffers = network.init(0)
    if kind == "stacked":
        return stack([network.init(k) for k in range(size)])
    if kind == "identical":
        return StackedSet(size, params, buffers)
    if kind in ("temperature", "noise"):
        values = torch.linspace(0.5, 2, size)
        return OutputSet(size, params, buffers, deployable=False, values=values, change=kind, seed=3)
    shared = {} if kind == "diagonal" else dict(list(params.items())[:-2])
    mean = {n: p for n, p in params.items() if n not in shared}
    sd = torch.full((sum(p.numel() for p in mean.values()),), 0.05)
    return DiagonalSet(size, shared, buffers, mean=mean, factors={"sd": sd}, seed=7)


def in_float64(network: Network, model_set: ModelSet, batch: torch.Tensor) -> np.ndarray:
    """Member after member, all weights and the forward pass in float64."""
    logits = []
    for k in range(model_set.size):
        block = model_set.block(k, k + 1)
        params, buffers = block.member(0)
        wide = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
        member = network({n: p.double() for n, p in params.items()}, wide, batch)[None]
        logits.append(member if block.output is None else block.output(member, batch))
    return torch.cat(logits).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_loop_and_vmap_agree_with_a_float64_pass(name, kind):
    network = Network(NETWORKS[name], 1, 12, 3)
    model_set = make_set(network, kind)
    with torch.no_grad():
        reference = in_float64(network, model_set, images())
    strategies = ["loop", "vmap"] if model_set.block(0, 1).params else ["loop"]
    for strategy in strategies:
        logits = predict(network, model_set, images(), strategy=strategy)
        assert logits.shape == (5, 30, 3) and logits.dtype == np.float32
        # float32 carries 1e-7 relative; a dozen layers of sums over at most 144 terms lose two digits
        np.testing.assert_allclose(logits, reference, atol=1e-4)


class Replayed:
    """What a captured function does for whoever calls it: the first function for good, one result for all calls."""

    made: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, function):
        self.function, self.output = function, None

    def __call__(self, *inputs):
        found = self.function(*inputs)
        if self.output is None:
            self.output = found.clone()
            self.made.append(tuple(inputs[0].shape))
        return self.output.copy_(found)


@pytest.mark.parametrize("kind", [*KINDS, "linearised"])
def test_a_captured_pass_is_replayed_for_every_member_and_block(kind, monkeypatch):
    network = Network(NETWORKS["BatchNorm"], 1, 12, 3)
    if kind == "linearised":
        drawn = make_set(network, "stacked")
        about = {"shared_params": {}, "shared_buffers": {}, "stacked_buffers": drawn.stacked_buffers}
        model_set: ModelSet = LinearisedSet(size=5, params=drawn.params, origin=network.init(9)[0], **about)
    else:
        model_set = make_set(network, kind)
    whole = predict(network, model_set, images(), strategy="loop")
    monkeypatch.setattr(predict_module, "Captured", Replayed)
    monkeypatch.setattr(predict_module, "BLOCK_BYTES", 2 * model_set.bytes_per_member())
    monkeypatch.setattr(Replayed, "made", [])
    np.testing.assert_allclose(predict(network, model_set, images(), strategy="graph"), whole, atol=1e-5)
    assert Replayed.made == ([(30, 1, 12, 12)] if model_set.block(0, 1).params else [])


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("kind", ["stacked", "diagonal"])
def test_the_block_size_is_irrelevant(kind, strategy, monkeypatch):
    network = Network(NETWORKS["GroupNorm"], 1, 12, 3)
    model_set = make_set(network, kind)
    whole = predict(network, model_set, images(), strategy=strategy)
    for members in (1, 2, 3):
        monkeypatch.setattr(predict_module, "BLOCK_BYTES", members * model_set.bytes_per_member())
        assert block_size(model_set) == members
        blocked = predict(network, model_set, images(), strategy=strategy)
        if strategy == "loop":
            assert np.array_equal(blocked, whole)
        np.testing.assert_allclose(blocked, whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_are_the_collected_ones_and_can_be_gone_on_with(kind, monkeypatch):
    network = Network(NETWORKS["mlp"], 1, 12, 3)
    model_set = make_set(network, kind)
    whole = predict(network, model_set, images(), strategy="loop")
    monkeypatch.setattr(predict_module, "BLOCK_BYTES", 2 * model_set.bytes_per_member())
    members = max(1, min(5, predict_module.BLOCK_BYTES // max(1, model_set.bytes_per_member())))
    streamed = np.full_like(whole, np.nan)

    def write(block, logits):
        streamed[block.start : block.start + block.size] = logits.numpy()

    assert predict(network, model_set, images(), strategy="loop", write=write, first=members) is None
    assert np.isnan(streamed[:members]).all() and np.array_equal(streamed[members:], whole[members:])
    predict(network, model_set, images(), strategy="loop", write=write)
    assert np.array_equal(streamed, whole)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_running_out_of_memory_halves_the_batch_and_goes_on(strategy, monkeypatch):
    network = Network(NETWORKS["GroupNorm"], 1, 12, 3)
    block = make_set(network, "stacked").block(0, 5)
    whole = predict_block(network, block, images(), strategy)
    run, batches = getattr(predict_module, f"_{strategy}"), []

    def limited(network, block, part):
        batches.append(len(part))
        if len(part) > 8:
            raise torch.OutOfMemoryError("injected")
        return run(network, block, part)

    monkeypatch.setattr(predict_module, f"_{strategy}", limited)
    halved = predict_block(network, block, images(), strategy, batch=32)
    assert batches == [30, 16, 8, 8, 8, 6]
    np.testing.assert_allclose(halved, whole, atol=1e-5)


def test_memory_that_does_not_hold_one_image_is_an_error_not_an_endless_loop(monkeypatch):
    network = Network(NETWORKS["mlp"], 1, 12, 3)

    def never(network, block, part):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(predict_module, "_loop", never)
    with pytest.raises(torch.OutOfMemoryError):
        predict_block(network, make_set(network, "stacked").block(0, 2), images(3), "loop", batch=2)


@pytest.mark.parametrize("kind", ["identical", "temperature", "noise"])
def test_a_set_without_stacked_leaves_runs_the_network_once_and_not_per_member(kind):
    network = Network(NETWORKS["mlp"], 1, 12, 3)
    model_set, calls = make_set(network, kind, size=50), []

    def counted(params, buffers, batch, train=False):
        calls.append(len(batch))
        return network(params, buffers, batch, train)

    assert choose_strategy(counted, model_set, images()) == "loop" and calls == []
    predict(counted, model_set, images(), strategy="loop")
    assert calls == [30]


def test_the_faster_strategy_is_chosen(monkeypatch):
    network = Network(NETWORKS["mlp"], 1, 12, 3)
    model_set, clock = make_set(network, "stacked"), [0.0]
    monkeypatch.setattr(predict_module.time, "perf_counter", lambda: clock[0])
    for slow, fast in (("loop", "vmap"), ("vmap", "loop")):
        cost = {slow: 2.0, fast: 1.0}

        def timed(network, block, images, strategy="loop", batch=256, graphs=None, cost=cost):
            clock[0] += cost[strategy]
            return torch.zeros(1)

        monkeypatch.setattr(predict_module, "predict_block", timed)
        assert choose_strategy(network, model_set, images()) == fast


def test_the_base_is_evaluated_as_a_member_is():
    network = Network(NETWORKS["BatchNorm"], 1, 12, 3)
    params, buffers = network.init(0)
    as_base = predict_block(network, base_block(Trained(params, buffers)), images(), "loop")
    identical = predict_block(network, make_set(network, "identical").block(0, 5), images(), "loop")
    assert as_base.shape == (1, 30, 3) and all(torch.equal(as_base[0], member) for member in identical)


def test_predicting_leaves_no_gradients_and_no_change_of_the_set():
    network = Network(NETWORKS["BatchNorm"], 1, 12, 3)
    model_set = make_set(network, "stacked")
    before = {n: p.clone() for n, p in {**model_set.params, **model_set.stacked_buffers}.items()}
    block = model_set.block(0, 5)
    for p in block.params.values():
        p.requires_grad_()
    assert not predict_block(network, block, images(), "loop").requires_grad
    for n, leaf in {**model_set.params, **model_set.stacked_buffers}.items():
        assert torch.equal(leaf, before[n])
