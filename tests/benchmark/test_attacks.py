"""Attacks against closed forms of linear networks, gradients by hand, and one another."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import attacks
from multiplicity_bench.benchmark.attacks import Attack, attack, choose_attack_strategy, predict_each
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import base_block, predict_block
from multiplicity_bench.benchmark.toy import toy_problem
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Trained
from multiplicity_bench.generators.modelset import LinearisedSet, ModelSet, OutputSet, StackedSet, stack

NETWORKS = {
    "mlp": {"name": "mlp", "width": 8},
    "GroupNorm": {"name": "smallcnn", "width": 4},
    "BatchNorm": {"name": "smallcnn", "width": 4, "norm": "batch"},
}
KINDS = ["stacked", "last layer", "linearised", "temperature", "noise"]
EVERY = [Attack("fgsm"), Attack("fgsm", "l2", 0.05), Attack("pgd"), Attack("pgd", "l2", 0.05), Attack("square")]
NAMES = [f"{a.name} {a.norm}" for a in EVERY]


def images(n: int = 10, size: int = 8, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, high, (n, 1, size, size), generator=generator).to(torch.uint8)


def members_of(network: Network, kind: str = "stacked", size: int = 3, dtype=torch.float64) -> ModelSet:
    """Return a set of a kind in float64, in which loop and vmap differ by too little to turn a sign of a gradient."""
    cast = lambda leaves: {n: t.to(dtype) if t.is_floating_point() else t for n, t in leaves.items()}  # noqa: E731
    drawn = [tuple(map(cast, network.init(k))) for k in range(size)]
    params, buffers = drawn[0]
    if kind == "stacked":
        return stack(drawn)
    if kind in ("temperature", "noise"):
        values = torch.linspace(0.5, 2, size, dtype=dtype)
        return OutputSet(size, params, buffers, deployable=False, values=values, change=kind, seed=3)
    names = list(params)[-2:] if kind == "last layer" else list(params)
    stacked = {n: torch.stack([p[n] for p, _ in drawn]) for n in names}
    if kind == "last layer":
        return StackedSet(size, {n: p for n, p in params.items() if n not in names}, buffers, params=stacked)
    near = {n: params[n] + 0.1 * (leaf - params[n]) for n, leaf in stacked.items()}
    return LinearisedSet(size, {}, buffers, params=near, origin=params)


def linear(n: int = 60, outputs: int = 2, sharpness: float = 1.0):
    """Return a linear network as a block of one member, mid-grey images and their gap in logits z_1 - z_0.

    `z = W (x / 127.5 - 1) + b`; the gap of a two-class network changes by `weights @ dx`, dx in grey levels.
    """
    network = Network({"name": "logistic"}, 1, 6, outputs)
    params, buffers = network.init(3)
    params = {name: sharpness * p.double() for name, p in params.items()}
    pixels = images(n, 6, 90, 166)
    block = base_block(Trained(params, buffers))
    weights = params["body.1.weight"].numpy() / 127.5
    return network, block, pixels, weights


def gaps(network, block, pixels) -> np.ndarray:
    logits = predict_block(network, block, pixels)[0].double().numpy()
    return logits[:, 1] - logits[:, 0]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss [member, sample] as any library has it, in float64."""
    each = [torch.nn.functional.cross_entropy(own.double(), labels, reduction="none") for own in logits]
    return torch.stack(each)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_decision_flips_just_beyond_its_margin_over_the_dual_norm(name, norm, dual):
    network, block, pixels, weights = linear()
    clean = gaps(network, block, pixels)
    needed = np.abs(clean) / np.linalg.norm(weights[1] - weights[0], dual) / 255
    settings = {} if name == "fgsm" else {"steps": 20}
    for radius in np.quantile(needed, [0.2, 0.5, 0.8]):
        if norm == "l2" and name == "pgd":  # each step takes what a random start left across by a third
            settings["step"] = radius / 2
        found = attack(
            network, block, pixels, torch.tensor(clean > 0).long(), Attack(name, norm, radius, **settings), 0
        )
        flipped = (gaps(network, block, found[0]) > 0) != (clean > 0)
        assert flipped[needed < 0.999 * radius].all()
        assert not flipped[needed > 1.001 * radius].any()
        assert flipped.any() and not flipped.all()


@pytest.mark.parametrize("classes", [2, 4])
def test_fgsm_moves_along_the_sign_of_the_plain_cross_entropys_gradient(classes):
    network = Network(NETWORKS["mlp"], 1, 8, classes)
    block = members_of(network).block(0, 3)
    pixels, labels = images(20), torch.arange(20) % classes
    found = attack(network, block, pixels, labels, Attack("fgsm", radius=4 / 255), 0)
    for k, own in enumerate(found):
        shown = pixels.double().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(network(*block.member(k), shown)[None], labels).sum(), shown)
        wanted = (pixels + 4 * gradient.sign()).clamp(0, 255).float()
        moved = (own != pixels).flatten(1).any(1)
        torch.testing.assert_close(own[moved], wanted[moved], rtol=0, atol=1e-4)
        assert moved.sum() >= 18  # a step may overshoot: then the clean image stays


@pytest.mark.parametrize("radius", [3.3 / 255, 1 / 7])
@pytest.mark.parametrize("chosen", EVERY, ids=NAMES)
def test_no_image_leaves_the_ball_or_the_box(chosen, radius):
    network = Network(NETWORKS["GroupNorm"], 1, 8, 3)
    block = members_of(network, dtype=torch.float32).block(0, 2)
    pixels = images()
    pixels[::2] = pixels[::2] // 128 * 255
    chosen = replace(chosen, radius=radius, steps=30 if chosen.name == "square" else None)
    found = attack(network, block, pixels, torch.arange(10) % 3, chosen, 0)
    assert found.dtype == torch.float32 and found.shape == (2, 10, 1, 8, 8)
    assert found.min() >= 0 and found.max() <= 255
    change = (found.double() - pixels.double()).flatten(2)
    size = change.abs().amax(2) if chosen.norm == "linf" else change.norm(dim=2)
    assert float(size.max()) <= radius * 255
    assert float(size.max()) > 0.999 * radius * 255


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_are_never_weaker(norm):
    network = Network(NETWORKS["GroupNorm"], 1, 8, 2)
    block = members_of(network).block(0, 3)
    pixels, labels = images(), torch.arange(10) % 2
    radius = {"linf": 8 / 255, "l2": 0.3}[norm]
    losses = [cross_entropy(predict_block(network, block, pixels), labels)]
    for steps in (1, 2, 5, 10, 20):
        found = attack(network, block, pixels, labels, Attack("pgd", norm, radius, steps, radius / 2), 0)
        losses.append(cross_entropy(predict_each(network, block, found), labels))
    for fewer, more in pairwise(losses):
        assert (more >= fewer - 1e-9).all()
    assert (losses[-1] > losses[0] + 0.01).any()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("mlp", kind) for kind in KINDS),
        *((n, k) for n in ("GroupNorm", "BatchNorm") for k in ("stacked", "linearised")),
    ],
)
def test_loop_and_vmap_find_the_same_images(name, kind):
    network = Network(NETWORKS[name], 1, 8, 3)
    block = members_of(network, kind).block(0, 3)
    labels = torch.arange(10) % 3
    labels[4] = -1
    for chosen in (Attack("pgd", steps=4), Attack("pgd", "l2", 0.1, steps=4), Attack("square", steps=10)):
        loop, vmap = (attack(network, block, images(), labels, chosen, 0, s) for s in ("loop", "vmap"))
        torch.testing.assert_close(loop, vmap, rtol=0, atol=1e-3)  # grey levels in float32
        assert torch.equal(loop[0], loop[1]) <= (kind == "temperature")  # of which the gradients differ by a factor
        logits = [predict_each(network, block, loop, s) for s in ("loop", "vmap")]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_ones_own_that_all_share_give_the_ordinary_predictions(kind, strategy):
    network = Network(NETWORKS["GroupNorm"], 1, 8, 3)
    block = members_of(network, kind).block(0, 3)
    pixels = images()
    own = predict_each(network, block, pixels.expand(3, *pixels.shape), strategy)
    torch.testing.assert_close(own, predict_block(network, block, pixels), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["linearised", "temperature", "noise"])
def test_members_that_are_no_weight_vectors_are_attacked_in_what_they_say(kind):
    """The climbed loss is that of their own outputs; noise is a constant of the image as far as gradients go."""
    network = Network(NETWORKS["mlp"], 1, 8, 3)
    block = members_of(network, kind).block(0, 3)
    pixels, labels = images(30), torch.arange(30) % 3
    found = attack(network, block, pixels, labels, Attack("pgd", radius=8 / 255), 0)
    before = cross_entropy(predict_block(network, block, pixels), labels)
    after = cross_entropy(predict_each(network, block, found), labels)
    assert (after >= before).all()
    shown = pixels.double().requires_grad_()
    logits = torch.stack([block.member_logits(network, k, shown) for k in range(3)])
    logits = logits if block.output is None else block.output(logits, shown)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), shown)
    promised = 8 * gradient.abs().sum() / 90  # for a change of 8 grey levels to the sign of the gradient
    assert (after - before).mean() > 0.5 * promised


@pytest.mark.parametrize("chosen", EVERY, ids=NAMES)
def test_blocks_batches_and_where_one_starts_are_irrelevant(chosen, monkeypatch):
    network = Network(NETWORKS["mlp"], 1, 8, 3)
    model_set = members_of(network)
    pixels, labels = images(), torch.arange(10) % 3
    chosen = replace(chosen, steps=20 if chosen.name == "square" else None)
    whole = attack(network, model_set.block(0, 3), pixels, labels, chosen, 5)
    parts = [
        attack(network, model_set.block(a, b), pixels[4:], labels[4:], chosen, 5, first=4) for a, b in ((0, 1), (1, 3))
    ]
    torch.testing.assert_close(torch.cat(parts), whole[:, 4:], rtol=0, atol=1e-3)
    monkeypatch.setattr(attacks, "CPU_BATCH", 3)
    batched = attack(network, model_set.block(0, 3), pixels, labels, chosen, 5)
    torch.testing.assert_close(batched, whole, rtol=0, atol=1e-3)
    other = attack(network, model_set.block(0, 3), pixels, labels, chosen, 6)
    assert torch.equal(other, batched) == (chosen.name == "fgsm")


def test_out_of_memory_halves_the_batch():
    network = Network(NETWORKS["mlp"], 1, 8, 3)
    block = members_of(network).block(0, 2)
    seen = []

    def small(params, buffers, pixels):
        seen.append(len(pixels))
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("too many images")
        return network(params, buffers, pixels)

    labels = torch.arange(10) % 3
    found = attack(small, block, images(), labels, Attack("pgd"), 0)
    torch.testing.assert_close(found, attack(network, block, images(), labels, Attack("pgd"), 0), rtol=0, atol=1e-3)
    torch.testing.assert_close(predict_each(small, block, found), predict_each(network, block, found))
    assert max(seen) > 4

    def none(params, buffers, pixels):
        raise torch.OutOfMemoryError("no memory at all")

    with pytest.raises(torch.OutOfMemoryError):
        attack(none, block, images(), labels, Attack("pgd"), 0)


@pytest.mark.parametrize("chosen", EVERY, ids=NAMES)
def test_copies_of_the_base_are_shown_the_bases_own_images(chosen):
    problem = toy_problem(n=80)
    copies = StackedSet(4, problem.base.params, problem.base.buffers)
    base = base_block(problem.base)
    part, chosen = problem.tune, replace(chosen, steps=20 if chosen.name == "square" else None)
    own = attack(problem.network, base, part.images, part.labels, chosen, 0)
    found = attack(problem.network, copies.block(0, 4), part.images, part.labels, chosen, 0)
    assert torch.equal(found, own.expand_as(found))
    said = predict_each(problem.network, copies.block(0, 4), found)
    assert torch.equal(said, predict_each(problem.network, base, own).expand_as(said))


def test_an_attack_changes_neither_weights_nor_gradients_nor_the_global_generator():
    network = Network(NETWORKS["BatchNorm"], 1, 8, 3)
    model_set = members_of(network)
    block = model_set.block(0, 2)
    for leaf in block.params.values():
        leaf.requires_grad_()
    kept = {n: leaf.clone() for n, leaf in {**block.params, **block.buffers}.items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        found = attack(network, block, images(), torch.arange(10) % 3, Attack("pgd"), 0)
        assert not torch.is_grad_enabled()
    assert not found.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(leaf, kept[n]) for n, leaf in {**block.params, **block.buffers}.items())
    assert all(leaf.grad is None for leaf in block.params.values())


def test_a_sure_network_is_attacked_like_an_unsure_one():
    """Logits times 10^5: the cross-entropy underflows, and with it its gradient, but margins keep their signs."""
    network, block, pixels, _ = linear()
    _, sure, _, _ = linear(sharpness=1e5)
    labels = torch.tensor(gaps(network, block, pixels) > 0).long()
    shown = pixels.double().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(network(*sure.member(0), shown)[None], labels).sum(), shown)
    gone = (gradient == 0).flatten(1).all(1)
    assert gone.sum() > 30
    chosen = Attack("pgd", radius=10 / 255)
    found = [attack(network, b, pixels, labels, chosen, 0) for b in (block, sure)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0][0], pixels.float())


def test_square_reaches_nearly_what_a_linear_network_allows():
    network, block, pixels, weights = linear(24)
    clean = gaps(network, block, pixels)
    needed = np.abs(clean) / np.abs(weights[1] - weights[0]).sum() / 255
    radius = float(np.median(needed))
    chosen = Attack("square", radius=radius, steps=1000)
    found = attack(network, block, pixels, torch.tensor(clean > 0).long(), chosen, 0)
    left = gaps(network, block, found[0]) / clean
    np.testing.assert_array_equal(left < 0, needed < radius)
    most = np.where(needed > radius, radius / needed, 1.0)  # of the margin; a flipped case is left alone
    assert (1 - left >= 0.95 * most).all() and (1 - left <= most + 1e-6)[needed > radius].all()


def test_square_does_not_beat_pgd_on_a_smooth_network_but_does_where_gradients_are_masked():
    problem = toy_problem(n=240)
    part, base = problem.tune, base_block(problem.base)

    def masked(params, buffers, pixels):
        """Steps of one grey level: no gradient, hardly another network."""
        return problem.network(params, buffers, torch.round(pixels.float()))

    def wrong(network, chosen):
        found = attack(network, base, part.images, part.labels, chosen, 0)
        return int((predict_each(network, base, found)[0].argmax(-1) != part.labels).sum())

    pgd, square = Attack("pgd", radius=12 / 255), Attack("square", radius=12 / 255)
    clean = int((predict_block(problem.network, base, part.images)[0].argmax(-1) != part.labels).sum())
    assert clean < wrong(problem.network, square) <= wrong(problem.network, pgd) + 1
    assert wrong(masked, square) > wrong(masked, pgd) + 5


def test_a_sample_without_a_label_is_attacked_in_the_members_own_decision():
    network = Network(NETWORKS["mlp"], 1, 8, 3)
    block = members_of(network).block(0, 3)
    decided = predict_block(network, block, images()).argmax(-1)
    found = attack(network, block, images(), torch.full((10,), -1), Attack("pgd"), 0)
    for k in range(3):
        own = attack(network, block, images(), decided[k], Attack("pgd"), 0)[k]
        assert torch.equal(found[k], own)


def test_of_a_multilabel_network_the_known_labels_are_attacked():
    """FGSM moves along the sign of `sum over known labels of sigmoid(m_l) dm_l/dx`, m the log odds against a label."""
    network, block, pixels, weights = linear(40, outputs=3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 2, (40, 3), generator=generator)
    labels[:4] = -1
    logits = predict_block(network, block, pixels)[0].numpy()
    targets = np.where((labels < 0).all(1, keepdim=True), logits > 0, labels)
    against = np.where(targets == 1, -1.0, 1.0)
    slopes = against / (1 + np.exp(-against * logits)) * (targets >= 0)
    found = attack(network, block, pixels, labels, Attack("fgsm", radius=2 / 255), 0)[0]
    wanted = pixels.flatten(1).numpy() + 2 * np.sign(slopes @ weights)
    np.testing.assert_allclose(found.flatten(1).numpy(), wanted, atol=1e-4)
    square = attack(network, block, pixels, labels, Attack("square", radius=2 / 255, steps=30), 0)
    assert float((square[0] - pixels).abs().max()) == 2


@pytest.mark.parametrize("kind", ["stacked", "noise"])
def test_the_strategy_is_timed_where_something_is_stacked(kind):
    network = Network(NETWORKS["mlp"], 1, 8, 3)
    chosen = choose_attack_strategy(network, members_of(network, kind), images())
    assert chosen in (["loop"] if kind == "noise" else ["loop", "vmap"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "pdg"}, "attack.name=pdg is not a choice"),
        ({"name": "pgd", "norm": "l1"}, "attack.norm=l1 is not a choice"),
        ({"name": "pgd", "radius": 0.0}, "attack.radius=0.0 must be positive"),
        ({"name": "pgd", "steps": 0}, "attack.steps=0 must be positive"),
        ({"name": "pgd", "step": float("nan")}, "attack.step=nan must be positive"),
        ({"name": "fgsm", "steps": 2}, "attack.steps=2 with attack.name=fgsm"),
        ({"name": "square", "norm": "l2"}, "attack.norm=l2 with attack.name=square"),
        ({"name": "square", "step": 0.1}, "attack.step=0.1 with attack.name=square"),
    ],
)
def test_a_setting_that_means_nothing_is_the_users_mistake(settings, message):
    with pytest.raises(UserError, match=message):
        Attack(**settings)
