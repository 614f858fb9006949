"""Attribution maps against closed forms of linear networks, finite differences and captum; null and ceiling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam, Saliency
from multiplicity_bench.benchmark.explanations import (
    METHODS,
    RANDOM_NETWORKS,
    STEPS,
    attribute,
    completeness,
    explain,
    explained_classes,
    explained_decisions,
    margins,
    random_networks,
    rounding_noise,
    unsupported,
)
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import base_block
from multiplicity_bench.benchmark.toy import toy_problem
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Trained
from multiplicity_bench.generators.modelset import (
    Block,
    DiagonalSet,
    LinearisedSet,
    ModelSet,
    OutputSet,
    StackedSet,
    stack,
)
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.explanations import agreement, comparators, pairwise_agreement
from scipy.stats import spearmanr
from torch import Tensor

SMALLCNN = {"name": "smallcnn", "width": 4}


def make_images(n: int = 9, channels: int = 1, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator).to(torch.uint8)


def fresh(network: Network, seed: int) -> Trained:
    """Fresh weights in float64: two ways to one map then differ by rounding far from any kink of a ReLU."""
    return Trained(*network.init(seed)).in_dtype(torch.float64)


def make_set(network: Network, size: int = 3) -> StackedSet:
    members = [fresh(network, k) for k in range(size)]
    return stack([(m.params, m.buffers) for m in members])


def whole(model_set: ModelSet) -> Block:
    return model_set.block(0, model_set.size)


def linear_weights(block: Block, outputs: int, channels: int) -> np.ndarray:
    """Weights of the logits by grey level, [member, class, channel, row, column], images of 12 pixels."""
    return block.params["body.1.weight"].view(block.size, outputs, channels, 12, 12).numpy() / 127.5


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize(("outputs", "multilabel"), [(2, False), (3, False), (2, True)])
def test_maps_of_linear_networks_are_their_weights_and_weights_times_pixels(outputs, multilabel, strategy):
    network = Network({"name": "logistic"}, 3, 12, outputs)
    block, images = whole(make_set(network)), make_images(channels=3)
    classes = np.arange(9) % outputs
    w = linear_weights(block, outputs, 3)
    margin = w[:, classes] - w[:, 1 - classes] if outputs == 2 and not multilabel else w[:, classes]
    about = {"multilabel": multilabel, "strategy": strategy}
    gradient = attribute(network, block, images, classes, "gradient", **about)
    assert gradient.shape == (3, 9, 12, 12) and gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, margin.sum(axis=2), rtol=1e-5, atol=1e-8)  # maps are float32
    integrated = attribute(network, block, images, classes, "integrated_gradients", **about)
    np.testing.assert_allclose(integrated, (margin * images.numpy()).sum(axis=2), rtol=1e-5, atol=1e-6)
    found = completeness(network, block, images, classes, integrated, multilabel)
    np.testing.assert_allclose(found.change, (margin * images.numpy()).sum(axis=(2, 3, 4)), atol=1e-9)
    assert np.abs(found.error).max() < 1e-5  # 144 float32 roundings of values of at most 1
    for method in ("gradient", "integrated_gradients"):
        signed = attribute(network, block, images, classes, method, **about)
        assert (signed < 0).any()
        np.testing.assert_array_equal(explain(network, block, images, classes, method, **about), np.abs(signed))


def test_linear_networks_agree_as_the_ranks_of_their_absolute_weights():
    network = Network({"name": "logistic"}, 1, 12, 2)
    block, images = whole(make_set(network)), make_images()
    maps = explain(network, block, images, np.zeros(9, np.int64), "gradient")
    w = linear_weights(block, 2, 1)
    w = np.abs(w[:, 0] - w[:, 1]).reshape(3, -1)
    each = [[spearmanr(a, b).statistic for b in w] for a in w]
    found = pairwise_agreement(maps, np.zeros((3, 9)), maps[0], np.zeros(9), "spearman")
    for m in range(3):
        expected = np.mean([each[m][n] for n in range(3) if n != m])
        np.testing.assert_allclose(found.members[m], expected, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("outputs", [2, 3])
def test_captum_gives_the_same_maps(outputs, channels):
    network = Network(SMALLCNN, channels, 12, outputs)
    block, images = whole(make_set(network, 2)), make_images(channels=channels)
    classes = torch.arange(9) % outputs
    for m in range(2):
        module = network.module(*block.member(m))
        last = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)][-1]

        def margin(x, module=module):
            return margins(module(x), classes.repeat(len(x) // 9))

        x = images.double().requires_grad_()
        path = IntegratedGradients(margin).attribute(x, torch.zeros_like(x), n_steps=STEPS, method="riemann_middle")
        cam = LayerGradCam(margin, last).attribute(x, relu_attributions=True)
        expected = {
            "gradient": Saliency(margin).attribute(x, abs=False).sum(1),
            "integrated_gradients": path.sum(1),
            "grad_cam": LayerAttribution.interpolate(cam, (12, 12), "bilinear")[:, 0],
        }
        for method, map_ in expected.items():
            found = attribute(network, block, images, classes, method)[m]
            assert map_.abs().max() > 0
            np.testing.assert_allclose(found, map_.detach(), rtol=1e-5, atol=1e-6 * float(map_.detach().abs().max()))


def test_sixteen_midpoints_are_near_the_integral_for_a_smooth_network():
    """The midpoint rule errs by O(1/steps^2): 128 steps are 64 times closer to the integral than 16."""
    network = Network({"name": "mlp", "width": 8}, 1, 12, 3)
    block, images, classes = whole(make_set(network)), make_images(), torch.arange(9) % 3
    found = attribute(network, block, images, classes, "integrated_gradients")
    path = (torch.arange(128) + 0.5)[:, None, None, None, None] / 128 * images.double()
    for m in range(3):
        x = path.flatten(0, 1).requires_grad_()
        total = margins(block.member_logits(network, m, x), classes.repeat(128)).sum()
        exact = (torch.autograd.grad(total, x)[0].view_as(path).mean(0) * images)[:, 0].numpy()
        np.testing.assert_allclose(found[m], exact, atol=2e-3 * np.abs(exact).max())
    about = completeness(network, block, images, classes, found)
    assert 1e-8 < about.share < 1e-3  # not zero: the rule is no exact integral
    with torch.no_grad():
        black = torch.stack([block.member_logits(network, m, torch.zeros(1, 1, 12, 12)) for m in range(3)])
        of_image = torch.stack([block.member_logits(network, m, images) for m in range(3)])
    change = (of_image - black)[:, torch.arange(9), classes].numpy()
    np.testing.assert_allclose(about.change, change, atol=1e-12)
    np.testing.assert_allclose(about.error, found.sum((2, 3)) - change, atol=1e-5)  # 144 float32 numbers are summed


def make_last_layer_set(network: Network) -> DiagonalSet:
    params, buffers = fresh(network, 0).params, fresh(network, 0).buffers
    shared = dict(list(params.items())[:-2])
    mean = {n: p for n, p in params.items() if n not in shared}
    sd = torch.full((sum(p.numel() for p in mean.values()),), 0.3, dtype=torch.float64)
    return DiagonalSet(3, shared, buffers, mean=mean, factors={"sd": sd}, seed=7)


def linearised(network: Network) -> LinearisedSet:
    members, origin = make_set(network), fresh(network, 9)
    return LinearisedSet(3, {}, origin.buffers, params=members.params, origin=origin.params)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["GroupNorm", "BatchNorm", "last layer", "linearised"])
def test_batches_and_strategies_give_the_same_maps(kind, method):
    network = Network(SMALLCNN | ({"norm": "batch"} if kind == "BatchNorm" else {}), 1, 12, 3)
    block = whole({"last layer": make_last_layer_set, "linearised": linearised}.get(kind, make_set)(network))
    if unsupported(network, block, method):
        return
    images, classes = make_images(5), np.arange(5) % 3
    loop = attribute(network, block, images, classes, method)
    assert (loop[0] != loop[1]).any() and (loop[:, 0] != loop[:, 1]).any()
    for strategy, batch in (("loop", 2), ("vmap", 5)):
        found = attribute(network, block, images, classes, method, strategy=strategy, batch=batch)
        np.testing.assert_allclose(found, loop, rtol=1e-5, atol=1e-7 * np.abs(loop).max())


def test_linearised_members_are_explained_by_the_function_that_they_are():
    network = Network({"name": "mlp", "width": 8}, 1, 12, 2)
    block, images = whole(linearised(network)), make_images(3)
    classes = torch.tensor([0, 1, 1])
    found = attribute(network, block, images, classes, "gradient")
    for row, column in ((0, 0), (5, 7), (11, 3)):
        step = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
        step[..., row, column] = 1e-3
        for m in range(3):
            up, down = (margins(block.member_logits(network, m, images + s), classes) for s in (step, -step))
            expected = ((up - down) / 2e-3).numpy()
            np.testing.assert_allclose(found[m, :, row, column], expected, rtol=1e-4, atol=1e-9)
    itself = attribute(network, replace(block, expand_at=None), images, classes, "gradient")
    assert np.abs(found - itself).max() > 0.1 * np.abs(itself).max()


@pytest.mark.parametrize("change", ["temperature", "noise"])
def test_sets_that_change_outputs_are_explained_by_the_network_before(change):
    network = Network(SMALLCNN, 1, 12, 2)
    params, buffers = network.init(0)
    model_set = OutputSet(4, params, buffers, values=torch.linspace(0.5, 2, 4), change=change, seed=3)
    images, classes = make_images(), np.arange(9) % 2
    for method in METHODS:
        base = explain(network, base_block(Trained(params, buffers)), images, classes, method)
        for strategy in ("loop", "vmap"):
            maps = explain(network, whole(model_set), images, classes, method, strategy=strategy, batch=5)
            assert maps.shape == (4, 9, 12, 12) and maps.flags.writeable
            np.testing.assert_allclose(maps, np.broadcast_to(base, maps.shape), atol=1e-5 * base.max())
    integrated = attribute(network, whole(model_set), images, classes, "integrated_gradients")
    assert completeness(network, whole(model_set), images, classes, integrated).change.std(axis=0).max() == 0


def test_no_gradient_of_a_parameter_is_taken():
    network = Network(SMALLCNN, 1, 12, 2)
    block = whole(make_set(network))
    for leaf in block.params.values():
        leaf.requires_grad_()
        leaf.register_hook(lambda _: pytest.fail("a parameter got a gradient"))
    for method in METHODS:
        for strategy in ("loop", "vmap"):
            maps = attribute(network, block, make_images(3), np.zeros(3, np.int64), method, strategy=strategy)
            assert np.abs(maps).max() > 0


def test_what_has_no_grad_cam_says_why():
    images, classes = make_images(2), np.zeros(2, np.int64)
    network = Network({"name": "mlp", "width": 8}, 1, 12, 2)
    block = whole(make_set(network))
    assert unsupported(network, block, "gradient") is None
    with pytest.raises(Undefined, match=r"^no Grad-CAM: network=mlp has no convolution$"):
        attribute(network, block, images, classes, "grad_cam")
    network = Network(SMALLCNN, 1, 12, 2)
    assert unsupported(network, whole(make_set(network)), "grad_cam") is None
    with pytest.raises(Undefined, match=r"^no Grad-CAM of a linearised network"):
        attribute(network, whole(linearised(network)), images, classes, "grad_cam")
    with pytest.raises(UserError, match=r"^method=gradcam is not a choice: did you mean 'grad_cam' or 'gradient'\?$"):
        attribute(network, block, images, classes, "gradcam")


def test_the_explained_class_is_the_bases_and_decisions_are_about_it():
    base = np.array([[0.2, 0.1, -1.0], [-3.0, -2.0, -2.5], [1.0, 1.0, 0.0]], np.float32)
    classes = explained_classes(base)
    assert classes.tolist() == [0, 1, 0] and classes.dtype == np.int64
    members = np.stack([base, -base])
    assert explained_decisions(members, classes).tolist() == [[0, 1, 0], [2, 0, 2]]
    assert explained_decisions(members, classes, multilabel=True).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_rounding_noise_moves_each_value_by_one_level_at_most():
    images = make_images(20)
    images[0], images[1] = 0, 255
    noised = rounding_noise(images)
    moves = noised.to(torch.int16) - images.to(torch.int16)
    assert noised.dtype == torch.uint8 and torch.equal(noised, rounding_noise(images))
    assert moves[0].unique().tolist() == [0, 1] and moves[1].unique().tolist() == [-1, 0]
    shares = [(moves[2:] == move).double().mean().item() for move in (-1, 0, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.04)  # 2592 draws: 4 sd


def test_random_networks_are_fresh_and_always_the_same():
    network = Network(SMALLCNN, 1, 12, 2)
    state = torch.random.get_rng_state()
    found, again = random_networks(network), random_networks(network)
    assert torch.equal(state, torch.random.get_rng_state()) and found.size == RANDOM_NETWORKS == 5
    first = {n: leaf.flatten(1) for n, leaf in found.params.items()}["body.0.weight"]
    assert torch.equal(first, again.params["body.0.weight"].flatten(1))
    drawn = torch.cat([first, *(network.init(seed)[0]["body.0.weight"].view(1, -1) for seed in range(20))])
    assert len(drawn.unique(dim=0)) == 25


def test_the_null_is_near_chance_on_a_trained_network_and_below_the_ceiling():
    problem = toy_problem("mlp", n=400)
    network, images = problem.network, problem.tune.images
    block = base_block(problem.base)
    logits = network(problem.base.params, problem.base.buffers, images).numpy()
    classes = explained_classes(logits)
    maps, noised = (explain(network, block, x, classes, "gradient")[0] for x in (images, rounding_noise(images)))
    random = explain(network, whole(random_networks(network)), images, classes, "gradient")
    rank, overlap = (comparators(maps, random, noised, measure) for measure in ("spearman", "top10"))
    # All images share what the 5 random networks are: sd 1/sqrt(35 * 5) = .076 of their mean rank correlation, and
    # sqrt(.11 * .89 / 4 / 5) = .07 of their mean overlap, which is 4 of 36 pixels by chance.
    assert rank.null.mean() == pytest.approx(0.0, abs=0.23)
    assert overlap.null.mean() == pytest.approx(4 / 36, abs=0.21)
    assert rank.ceiling.mean() > 0.95 and overlap.ceiling.mean() > 0.9
    # A network trained again knows the same pixels: the set lies between the two.
    other = explain(network, base_block(problem.fit(5)), images, classes, "gradient")[0]
    assert rank.null.mean() + 0.2 < agreement(maps, other, "spearman").mean() < rank.ceiling.mean()
