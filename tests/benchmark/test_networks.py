"""Networks as pure functions of parameters, buffers and images."""

from __future__ import annotations

import pytest
import torch
from multiplicity_bench.benchmark.networks import NETWORKS, MaxPool2, Network
from multiplicity_bench.errors import UserError
from torch import nn

SUITABLE = {"logistic": 28, "mlp": 28, "smallcnn": 28, "resnet18": 28, "resnet50": 64, "densenet121": 64}


def count(network: Network) -> int:
    return sum(p.numel() for p in network.init(0)[0].values())


def images(n: int, size: int, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_every_registered_network_is_tested_here():
    assert set(NETWORKS.names()) == set(SUITABLE)


@pytest.mark.parametrize("name", SUITABLE)
def test_a_network_gives_one_finite_logit_per_output(name):
    network = Network({"name": name}, 3, SUITABLE[name], 5)
    params, buffers = network.init(0)
    with torch.no_grad():
        logits = network(params, buffers, images(2, SUITABLE[name], 3))
    assert logits.shape == (2, 5) and logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize(
    "spec, channels, size, outputs, weights",
    [
        ({"name": "logistic"}, 1, 28, 2, 28 * 28 * 2 + 2),
        ({"name": "mlp", "width": 8, "depth": 2}, 1, 28, 2, 784 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2),
        ({"name": "smallcnn"}, 1, 28, 2, 23_538),
        ({"name": "smallcnn"}, 1, 64, 2, 23_538),
        ({"name": "smallcnn", "norm": "batch"}, 3, 28, 7, 23_538 + 2 * 9 * 16 + 5 * 65),
        ({"name": "resnet18"}, 3, 28, 10, 11_173_962),  # the CIFAR variant, as is widely reported
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
def test_a_network_has_as_many_weights_as_its_layers_add_up_to(spec, channels, size, outputs, weights):
    assert count(Network(spec, channels, size, outputs)) == weights


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_torchvisions_networks_keep_their_weights_but_for_input_and_output(name):
    from torchvision import models

    ours = Network({"name": name}, 3, 64, 1000)
    theirs = getattr(models, name)(weights=None)
    assert count(ours) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_evaluating_changes_nothing_that_was_passed_and_nothing_between_calls(norm):
    network = Network({"name": "smallcnn", "width": 4, "norm": norm}, 1, 12, 2)
    params, buffers = network.init(0)
    kept = {n: leaf.clone() for n, leaf in {**params, **buffers}.items()}
    batch = images(6, 12)
    first = network(params, buffers, batch)
    network(*network.init(1), batch)
    assert torch.equal(network(params, buffers, batch), first)
    assert all(torch.equal(leaf, kept[n]) for n, leaf in {**params, **buffers}.items())


def test_training_mode_updates_the_given_batchnorm_buffers_and_no_others():
    network = Network({"name": "smallcnn", "width": 4, "norm": "batch"}, 1, 12, 2)
    params, buffers = network.init(0)
    others = {n: b.clone() for n, b in buffers.items()}
    batch = images(6, 12)
    network(params, buffers, batch, train=True)
    convolution = torch.nn.functional.conv2d(batch.float() / 127.5 - 1, params["body.0.weight"], padding=1)
    expected = 0.1 * convolution.mean((0, 2, 3))  # momentum 0.1 from a running mean of 0
    assert torch.allclose(buffers["body.1.running_mean"], expected, atol=1e-6)
    assert int(buffers["body.1.num_batches_tracked"]) == 1
    assert all(torch.equal(b, others[n]) for n, b in network.init(0)[1].items())


def test_a_network_with_groupnorm_behaves_in_training_as_in_evaluation():
    network = Network({"name": "resnet18"}, 1, 16, 2)
    params, buffers = network.init(0)
    assert buffers == {}
    with torch.no_grad():
        assert torch.equal(network(params, buffers, images(2, 16), train=True), network(params, buffers, images(2, 16)))


def test_images_are_normalised_to_minus_one_and_one_inside_the_network():
    network = Network({"name": "logistic"}, 1, 2, 1)
    params = {"body.1.weight": torch.ones(1, 4), "body.1.bias": torch.zeros(1)}
    logits = network(params, {}, torch.tensor([[[[0, 0], [0, 0]]], [[[255, 255], [0, 255]]]], dtype=torch.uint8))
    assert logits.ravel().tolist() == pytest.approx([-4.0, 2.0])


def test_fresh_weights_follow_from_the_seed_alone():
    network = Network({"name": "smallcnn"}, 1, 28, 2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, c = network.init(1)[0], Network({"name": "smallcnn"}, 1, 28, 2).init(1)[0], network.init(2)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["body.0.weight"], c["body.0.weight"])


def test_a_module_holds_copies_of_its_weights_and_gives_the_same_logits():
    network = Network({"name": "smallcnn", "norm": "batch", "width": 4}, 1, 12, 2)
    params, buffers = network.init(5)
    module = network.module(params, buffers)
    batch = images(3, 12)
    assert not module.training and torch.equal(module(batch), network(params, buffers, batch))
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert float(params["body.0.weight"].abs().sum()) > 0


def test_a_network_described_and_restored_is_the_same_function():
    network = Network({"name": "mlp", "version": 1, "width": 5, "depth": 1}, 3, 9, 4)
    restored = Network.restore(network.describe())
    weights, batch = network.init(0), images(2, 9, 3)
    assert torch.equal(restored(*weights, batch), network(*weights, batch))
    assert restored.describe() == network.describe()


@pytest.mark.parametrize("shape", [(3, 2, 28, 28), (2, 5, 9, 7), (1, 1, 2, 3), (4, 3, 6, 6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_without_gradients_gives_the_very_numbers_of_torch(shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu().to(memory_format=layout)
    x[0, 0, 0, 0] = float("nan")
    pooled = nn.functional.max_pool2d(x, 2)
    with torch.no_grad():
        found = MaxPool2()(x)
        assert torch.equal(found.nan_to_num(-1.0), pooled.nan_to_num(-1.0)) and bool(found[0, 0, 0, 0].isnan())
        assert torch.equal(torch.func.vmap(MaxPool2())(x[None])[0].nan_to_num(-1.0), pooled.nan_to_num(-1.0))


def test_pooling_has_torchs_derivatives_ties_included():
    """Forwards without gradients, where squares of equal numbers move alike, as behind a ReLU; backwards always."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (2, 3, 8, 8), generator=generator).double()
    moved = torch.where(x > 0, x, 0.0)  # equal numbers have equal tangents, those at 0 none
    with torch.no_grad():
        ours, torchs = (torch.func.jvp(f, (x.relu(),), (moved,)) for f in (MaxPool2(), nn.MaxPool2d(2)))
    for a, b in zip(ours, torchs, strict=True):
        assert torch.equal(a, b)
    gradients = []
    for layer in (MaxPool2(), nn.MaxPool2d(2)):
        leaf = x.clone().requires_grad_()
        (layer(leaf) ** 2).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_depth_zero_is_a_linear_model():
    assert count(Network({"name": "mlp", "depth": 0}, 1, 4, 2)) == 34


@pytest.mark.parametrize(
    "spec, says",
    [
        ({"name": "mlp", "width": 0}, "network.width=0 must be at least 1"),
        ({"name": "mlp", "depth": -1}, "network.depth=-1 must be at least 0"),
        ({"name": "smallcnn", "width": -4}, "network.width=-4 must be at least 1"),
        ({"name": "smallcnn", "width": 6}, "6 channels into 4 groups"),
        ({"name": "smallcnn", "norm": "layer"}, "norm=layer is not a choice: group or batch"),
        ({"name": "resnet18", "norm": "none"}, "norm=none is not a choice"),
        ({"name": "densenet121"}, "at least 32 pixels, these have 28"),
        ({"name": "smalcnn"}, "did you mean 'smallcnn'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_a_network_that_cannot_be_built_is_a_users_mistake_in_one_line(spec, says):
    with pytest.raises(UserError, match=says) as caught:
        Network(spec, 1, 28, 2)
    assert "\n" not in str(caught.value)
