"""Penultimate features of members, and pytorch-ood's detectors on them against the same computed by hand in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import features
from multiplicity_bench.benchmark.features import DETECTORS, detector_scores, embed, skip_reason
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import base_block, predict_block
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Part, Trained
from multiplicity_bench.generators.modelset import LinearisedSet, OutputSet, StackedSet, stack
from multiplicity_bench.metrics.ood import ood_metrics
from scipy.special import logsumexp

WEIGHT, BIAS = "body.5.weight", "body.5.bias"  # of the last layer of the network below


@pytest.fixture(scope="module")
def network() -> Network:
    return Network({"name": "mlp", "width": 12}, 1, 28, 3)


@pytest.fixture(scope="module")
def base(network) -> Trained:
    return Trained(*network.init(0))


@pytest.fixture(scope="module")
def members(network):
    """Three networks of their own."""
    return stack([network.init(seed) for seed in (1, 2, 3)])


@pytest.fixture(scope="module")
def last_layers(base):
    """Four last layers on one trunk."""
    noise = torch.Generator().manual_seed(0)
    own = {n: base.params[n] + torch.randn(4, *base.params[n].shape, generator=noise) for n in (WEIGHT, BIAS)}
    shared = {n: p for n, p in base.params.items() if n not in own}
    return StackedSet(size=4, shared_params=shared, shared_buffers={}, params=own)


def draw_images(count: int, seed: int, low: int = 0, high: int = 120) -> torch.Tensor:
    return torch.randint(low, high, (count, 1, 28, 28), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="module")
def train() -> Part:
    """120 images of three classes, which differ in the brightness of a third of the image each."""
    images, labels = draw_images(120, 0), torch.arange(120) % 3
    for c in range(3):
        images[labels == c, :, 9 * c : 9 * c + 9] += 80
    return Part(images, labels)


@pytest.mark.parametrize("which", ["members", "last_layers"])
def test_features_of_members_make_the_logits_that_are_predicted(network, which, request, train):
    block = request.getfixturevalue(which).block(0, 3)
    found = list(features.features(network, block, train.images, batch=50))
    predicted = predict_block(network, block, train.images).numpy()
    assert len(found) == 3
    for k, seen in enumerate(found):
        params, _ = block.member(k)
        assert seen.features.shape == (120, 12) and seen.features.dtype == np.float32
        made = seen.features @ params[WEIGHT].numpy().T + params[BIAS].numpy()
        assert np.allclose(made, predicted[k], atol=1e-5) and np.allclose(seen.logits, predicted[k], atol=1e-5)
        alone = embed(network, Trained(*block.member(k)), train.images)
        assert np.allclose(seen.features, alone.features, atol=1e-6)


def test_members_that_share_the_trunk_cost_one_pass(network, members, last_layers, train, monkeypatch):
    passes = []
    monkeypatch.setattr(features, "embed", lambda *args: passes.append(args) or embed(*args))
    found = list(features.features(network, last_layers.block(0, 4), train.images))
    assert len(passes) == 1 and all(seen.features is found[0].features for seen in found)
    list(features.features(network, members.block(0, 3), train.images))
    assert len(passes) == 4


def test_buffers_of_their_own_are_not_shared():
    network = Network({"name": "smallcnn", "width": 2, "norm": "batch"}, 1, 28, 2)
    params, buffers = network.init(0)
    own = {n: torch.stack([b, b + 1]) for n, b in buffers.items() if n.endswith("running_mean")}
    shared = {n: b for n, b in buffers.items() if n not in own}
    made = StackedSet(size=2, shared_params=params, shared_buffers=shared, stacked_buffers=own, params={})
    one, other = features.features(network, made.block(0, 2), draw_images(4, 0))
    assert not np.allclose(one.features, other.features)


def by_hand(train, labels, seen, weight, bias):
    """Return the detectors' scores in float64, from their papers' definitions."""
    z, x, w, b = (np.asarray(a, np.float64) for a in (train, seen, weight, bias))
    means = np.stack([z[labels == c].mean(axis=0) for c in range(3)])
    inverse = np.linalg.inv((z - means[labels]).T @ (z - means[labels]) + 1e-6 * np.eye(z.shape[1]))
    squared = [np.einsum("nd,de,ne->n", x - m, inverse, x - m) for m in means]
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    distances = np.linalg.norm(unit(x)[:, None] - unit(z), axis=-1)
    logits, origin = x @ w.T + b, -np.linalg.pinv(w) @ b
    _, vectors = np.linalg.eigh((z - origin).T @ (z - origin))
    rest = vectors[:, : z.shape[1] - z.shape[1] // 2]
    alpha = (z @ w.T + b).max(axis=1).mean() / np.linalg.norm((z - origin) @ rest, axis=1).mean()
    energy = -logsumexp(logits, axis=1)
    return {
        "energy": energy,
        "max_logit": -logits.max(axis=1),
        "mahalanobis": np.sqrt(np.min(squared, axis=0)),
        "knn": np.sort(distances, axis=1)[:, 49],
        "vim": alpha * np.linalg.norm((x - origin) @ rest, axis=1) + energy,
    }


@pytest.mark.parametrize("which", ["members", "last_layers"])
def test_detectors_are_those_of_their_papers_fitted_for_every_member(network, which, request, train):
    block = request.getfixturevalue(which).block(0, 3)
    views = {"val": draw_images(30, 1), "ood-noise": draw_images(20, 2, 0, 256)}
    found = detector_scores(network, block, train, views)
    assert not found.reasons and found.views["val"].dtype == np.float32
    for name, images in views.items():
        assert found.views[name].shape == (3, 5, len(images))
        for k in range(3):
            member = Trained(*block.member(k))
            z, x = (embed(network, member, i).features for i in (train.images, images))
            expected = by_hand(z, train.labels.numpy(), x, member.params[WEIGHT], member.params[BIAS])
            for d, detector in enumerate(DETECTORS):
                assert np.allclose(found.views[name][k, d], expected[detector], rtol=2e-3, atol=1e-4), detector


def test_far_images_are_detected_by_features(network, base, train):
    same = draw_images(90, 5)
    for c in range(3):
        same[30 * c : 30 * c + 30, :, 9 * c : 9 * c + 9] += 80
    views = {"test": same, "ood-bright": draw_images(60, 6, 200, 256)}
    found = detector_scores(network, base_block(base), train, views).views
    for detector in ("mahalanobis", "knn", "vim"):
        d = DETECTORS.index(detector)
        assert ood_metrics(found["test"][0, d], found["ood-bright"][0, d]).auroc > 0.99, detector
        halves = found["test"][0, d, ::2], found["test"][0, d, 1::2]
        assert 0.2 < ood_metrics(*halves).auroc < 0.8, detector  # more of the same images is not detected


def changed(base: Trained, change) -> Trained:
    params = {n: p.clone() for n, p in base.params.items()}
    change(params["body.3.weight"], params["body.3.bias"])
    return Trained(params, base.buffers)


def test_a_covariance_that_cannot_be_inverted_gives_nan_with_its_reason(network, base, train):
    def twice(weight, bias):
        weight[1], bias[1] = weight[0], bias[0]

    views = {"val": draw_images(30, 1)}
    scale = Trained({n: 30 * p if n == "body.1.weight" else p for n, p in changed(base, twice).params.items()}, {})
    found = detector_scores(network, base_block(scale), train, views)
    assert found.reasons == {
        "mahalanobis": {0: "the covariance of 12 features of 120 images is numerically singular"},
    }
    nan = np.isnan(found.views["val"][0])
    assert nan[DETECTORS.index("mahalanobis")].all() and nan.any(axis=1).sum() == 1


def test_dead_features_are_no_singular_covariance(network, base, train):
    def dead(weight, bias):
        weight[:2], bias[:2] = 0, 0

    member = changed(base, dead)
    views = {"val": draw_images(30, 1)}
    found = detector_scores(network, base_block(member), train, views)
    z, x = (embed(network, member, i).features for i in (train.images, views["val"]))
    assert not found.reasons and not z[:, :2].any()
    expected = by_hand(z, train.labels.numpy(), x, member.params[WEIGHT], member.params[BIAS])
    assert np.allclose(found.views["val"][0, DETECTORS.index("mahalanobis")], expected["mahalanobis"], rtol=2e-3)


def test_images_of_unknown_class_do_not_count_for_the_class_means(network, base, train):
    views, d = {"val": draw_images(30, 1)}, DETECTORS.index("mahalanobis")
    labels = torch.where(torch.arange(120) < 30, -1, train.labels)
    some = detector_scores(network, base_block(base), Part(train.images, labels), views)
    rest = detector_scores(network, base_block(base), Part(train.images[30:], train.labels[30:]), views)
    assert np.allclose(some.views["val"][0, d], rest.views["val"][0, d], rtol=1e-4)


def test_what_train_has_too_few_of_is_told(network, base, train):
    views = {"val": draw_images(5, 1)}
    few = detector_scores(network, base_block(base), Part(train.images[:49], train.labels[:49]), views)
    assert few.reasons == {"knn": {0: "train has 49 images, 50 neighbours are needed"}}
    two = detector_scores(network, base_block(base), Part(train.images, train.labels % 2), views)
    assert two.reasons == {"mahalanobis": {0: "class 2 has no image in train"}}
    several = detector_scores(network, base_block(base), Part(train.images, torch.zeros(120, 3)), views)
    assert sorted(several.reasons) == ["energy", "mahalanobis", "vim"]
    assert several.reasons["vim"] == {0: "defined for one class per image, these have several labels"}
    assert np.isfinite(several.views["val"][0]).all(axis=1).tolist() == [d in ("max_logit", "knn") for d in DETECTORS]


def test_members_without_features_of_their_own_are_a_skip_with_its_reason(network, base, members, last_layers):
    shared = {"size": 2, "shared_params": base.params, "shared_buffers": {}}
    noisy = OutputSet(**shared, values=torch.ones(2))
    origin = {WEIGHT: base.params[WEIGHT]}
    params = {WEIGHT: torch.stack([base.params[WEIGHT]] * 2)}
    linearised = LinearisedSet(**shared, params=params, origin=origin)
    assert skip_reason(network, members) == skip_reason(network, last_layers) == ""
    assert skip_reason(network, noisy) == "members that change the outputs of the base have no features of their own"
    assert skip_reason(network, linearised) == "members of the linearised network have no features of their own"
    for made in (noisy, linearised):
        with pytest.raises(ValueError, match="no features of their own"):
            list(features.features(network, made.block(0, 2), draw_images(2, 0)))


@pytest.mark.parametrize("spec", [{"name": "logistic", "pool": 7}, {"name": "mlp", "depth": 0}])
def test_networks_whose_only_layer_sees_the_pixels_are_a_skip_with_its_reason(spec):
    network = Network(spec, 1, 28, 2)
    trained = Trained(*network.init(0))
    reason = f"network={spec['name']} has no penultimate features"
    assert skip_reason(network, stack([network.init(0)])) == features.without_features(network) == reason
    with pytest.raises(UserError, match=f"{reason}: choose another network"):
        embed(network, trained, draw_images(2, 0))
