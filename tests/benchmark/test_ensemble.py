"""Networks trained at once: the steps of the loop that trains them one by one, and members that share nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark import ensemble
from multiplicity_bench.benchmark.ensemble import Stack, Together, train_together, trains_together, way_of_training
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.benchmark.toy import toy_problem
from multiplicity_bench.benchmark.train import Training, train
from multiplicity_bench.errors import Diverged
from multiplicity_bench.generators.api import WAYS, AtOnce, Memory, Part, Plan, Trained
from multiplicity_bench.generators.contract import check_generator
from multiplicity_bench.generators.retrain import Retrain

NETWORKS = {
    "mlp": {"name": "mlp", "width": 4},
    "groupnorm": {"name": "smallcnn", "width": 4, "norm": "group"},
    "batchnorm": {"name": "smallcnn", "width": 4, "norm": "batch"},
}
RECIPE = Training(epochs=3, batch_size=8, lr=0.02)
ROUNDING = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture(scope="module")
def data() -> Part:
    """33 images of two classes: four batches of 8, and one of a single image, which is left out."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(33) % 2
    images = (60 + 80 * labels[:, None, None, None] + 40 * torch.randn(33, 1, 6, 6, generator=generator)).clamp(0, 255)
    return Part(images.to(torch.uint8), labels)


def plans(network: Network, count: int = 3, **changes) -> list[Plan]:
    """Return plans that start in float64, where rounding stays small, from weights of which none is 0.

    A bias of 0 whose channel is dead has no gradient but rounding, which AdamW makes as large as any other.
    """
    made = []
    for k in range(count):
        start, generator = Trained(*network.init(10 + k)).in_dtype(torch.float64), torch.Generator().manual_seed(k)
        start.params = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in start.params.items()}
        made.append(Plan(seed=k, init=start, **changes))
    return made


def assert_same(found: Trained, alone: Trained) -> None:
    """Weights and statistics to rounding in float64; the losses of an epoch are summed in float32."""
    assert list(found.params) == list(alone.params)
    for own, other in ((found.params, alone.params), (found.buffers, alone.buffers)):
        for n, leaf in other.items():
            torch.testing.assert_close(own[n], leaf, **ROUNDING)
    assert found.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_those_of_the_loop(name, optimizer, way, data):
    network = Network(NETWORKS[name], 1, 6, 2)
    recipe = replace(RECIPE, optimizer=optimizer)
    together = train_together(network, data, recipe, plans(network), way=way)
    for plan, found in zip(plans(network), together, strict=True):
        assert_same(found, train(network, data, recipe, plan.seed, init=plan.init))
    moved = together[0].params["body.1.weight" if name == "mlp" else "body.0.weight"]
    assert float((moved - plans(network)[0].init.params[next(iter(together[0].params))]).abs().max()) > 0.01


@pytest.mark.parametrize("augment", ["none", "shift_flip"])
@pytest.mark.parametrize("patient", [None, torch.arange(33) // 3], ids=["images", "patients"])
def test_each_member_has_a_resample_and_an_augmentation_of_its_own(patient, augment, data):
    network, recipe = Network(NETWORKS["batchnorm"], 1, 6, 2), replace(RECIPE, augment=augment)
    some = [replace(plan, resample_seed=(None, 5, 6)[k]) for k, plan in enumerate(plans(network))]
    for plan, found in zip(some, train_together(network, data, recipe, some, patient=patient), strict=True):
        alone = train(
            network, data, recipe, plan.seed, init=plan.init, resample_seed=plan.resample_seed, patient=patient
        )
        assert_same(found, alone)


EARLY = replace(RECIPE, epochs=12, patience=2, lr=0.05)
"""Three members whose last epochs are different ones."""


def tune() -> Part:
    """20 images without a class, on which every training soon gets worse."""
    generator = torch.Generator().manual_seed(5)
    return Part(torch.randint(0, 256, (20, 1, 6, 6), generator=generator).to(torch.uint8), torch.arange(20) % 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm"])
def test_each_member_stops_early_on_its_own(norm, optimizer, way, data, monkeypatch):
    network, recipe = Network(NETWORKS[norm], 1, 6, 2), replace(EARLY, optimizer=optimizer)
    left, keep = [], Stack.keep

    def counted(stack, rows):
        left.append(len(rows))
        keep(stack, rows)

    monkeypatch.setattr(Stack, "keep", counted)
    together = train_together(network, data, recipe, plans(network, 4), way=way, tune=tune())
    lengths = []
    for plan, found in zip(plans(network, 4), together, strict=True):
        alone = train(network, data, recipe, plan.seed, init=plan.init, tune=tune())
        assert_same(found, alone)
        lengths.append(len(alone.losses))
    assert len(set(lengths)) > 1 and min(lengths) < recipe.epochs
    assert left and left[0] <= 2, "members that have stopped cost nothing any more"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{"autocast": "bf16"}, {"channels_last": True}], ids=["bf16", "channels_last"])
def test_numerics_of_the_recipe_are_those_of_every_member(settings, way, data):
    network, recipe = Network(NETWORKS["batchnorm"], 1, 6, 2), replace(RECIPE, epochs=1, **settings)
    found = train_together(network, data, recipe, [Plan(seed=k) for k in range(2)], way=way)
    exact = train(network, data, replace(RECIPE, epochs=1), 1)
    alone = train(network, data, recipe, 1)
    assert torch.equal(alone.params["body.0.weight"], exact.params["body.0.weight"]) is False
    # bf16 carries 3 digits; another layout adds in another order, which AdamW's first steps make larger
    assert found[1].losses == pytest.approx(alone.losses, rel=0.02 if "autocast" in settings else 2e-3)
    assert all(p.dtype == torch.float32 for p in found[1].params.values())


def test_fresh_weights_are_drawn_by_the_seeds(data):
    network = Network(NETWORKS["mlp"], 1, 6, 2)
    short = replace(RECIPE, epochs=1, lr=1e-12)
    own, given = train_together(network, data, short, [Plan(seed=4), Plan(seed=4, init_seed=9)])
    for found, seed in ((own, 4), (given, 9)):
        for n, leaf in network.init(seed)[0].items():
            torch.testing.assert_close(found.params[n], leaf, rtol=0, atol=1e-9)


def test_labels_of_several_at_once(data):
    network = Network(NETWORKS["groupnorm"], 1, 6, 3)
    labels = torch.randint(-1, 2, (33, 3), generator=torch.Generator().manual_seed(2))
    several = Part(data.images, labels)
    found = train_together(network, several, RECIPE, plans(network))
    alone = train(network, several, RECIPE, 1, init=plans(network)[1].init)
    for n, leaf in alone.params.items():
        torch.testing.assert_close(found[1].params[n], leaf, **ROUNDING)


def test_a_member_that_diverges_is_said_and_leaves_the_others_alone(data):
    network = Network(NETWORKS["batchnorm"], 1, 6, 2)
    some = plans(network)
    broken = Trained({n: p * math.nan for n, p in some[1].init.params.items()}, some[1].init.buffers)
    found = train_together(network, data, RECIPE, [some[0], replace(some[1], init=broken), some[2]], name="retraining")
    assert isinstance(found[1], Diverged) and str(found[1]).startswith(
        "retraining, member 1: the loss of epoch 1 is not"
    )
    for k in (0, 2):
        alone = train(network, data, RECIPE, k, init=some[k].init)
        for n, leaf in alone.params.items():
            torch.testing.assert_close(found[k].params[n], leaf, **ROUNDING)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("base", [RECIPE, EARLY], ids=["all epochs", "early stop"])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(base, optimizer, data, monkeypatch):
    network, recipe = Network(NETWORKS["batchnorm"], 1, 6, 2), replace(base, optimizer=optimizer)
    whole = train_together(network, data, recipe, plans(network), tune=tune())
    longest = max(len(found.losses) for found in whole)
    monkeypatch.setattr(ensemble, "CHECKPOINT_EVERY_S", -1.0)
    memory = Memory()

    def killed(epochs, description, total):
        yield from list(epochs)[: longest - 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(network, data, recipe, plans(network), tune=tune(), checkpoint=memory, progress=killed)
    seen = []

    def counted(epochs, description, total):
        for epoch in epochs:
            seen.append(epoch)
            yield epoch

    again = train_together(network, data, recipe, plans(network), tune=tune(), checkpoint=memory, progress=counted)
    assert seen[0] == longest - 1
    for a, b in zip(whole, again, strict=True):
        assert all(torch.equal(leaf, b.params[n]) for n, leaf in a.params.items()) and a.losses == b.losses


def test_only_plain_risk_minimisation_is_stacked():
    assert trains_together(RECIPE)
    assert not trains_together(replace(RECIPE, polish=2))
    assert not trains_together(replace(RECIPE, objective="class_balanced"))


class Three:
    """Three at once, as a GPU may find faster, wherever this runs."""

    def __init__(self, problem, recipe):
        self.together = Together(problem.network, problem.train, recipe, checkpoint=problem.checkpoint)
        self.calls = []

    def at_once(self, members):
        return AtOnce(3, "each")

    def __call__(self, plans, *, way="vmap", name="training"):
        self.calls.append((name, way))
        return self.together(plans, way=way, name=name)


@pytest.fixture(scope="module")
def stacked():
    """Return a toy problem whose retrainings are stacked, and the same without."""
    plain = toy_problem("mlp", members=5)
    return replace(plain, fit_together=Three(plain, Training(epochs=8, lr=0.01)), checkpoint=Memory()), plain


def test_retrain_trains_at_once_what_the_device_makes_faster(stacked):
    problem, plain = stacked
    found, alone = Retrain().generate(problem, 2), Retrain().generate(replace(plain, checkpoint=Memory()), 2)
    assert problem.fit_together.calls == [("retraining 0 to 2", "each"), ("retraining 3 to 4", "each")]
    assert found.diagnostics == {"trained_at_once": 3, "way": "each"} and alone.diagnostics == {}
    for n, leaf in alone.params.items():
        torch.testing.assert_close(found.params[n], leaf, rtol=0, atol=0.02)  # 8 epochs of float32


def test_stacked_retraining_keeps_the_contract(stacked):
    check_generator(Retrain(), stacked[0])


def test_a_diverged_member_fails_and_the_set_goes_on(stacked):
    plain = stacked[1]

    def fit(seed, **arguments):
        if arguments["name"] == "retraining 1":
            raise Diverged("retraining 1: the loss of epoch 1 is not finite")
        return plain.fit(seed, **arguments)

    found = Retrain().generate(replace(plain, fit=fit, checkpoint=Memory(), members=3), 0)
    assert found.failed == [1] and found.notes == ["1 members diverged in training"]
    assert all(torch.equal(found.params[n][1], p) for n, p in plain.base.params.items())

    def never(seed, **arguments):
        raise Diverged("no")

    with pytest.raises(Diverged, match="every member"):
        Retrain().generate(replace(plain, fit=never, checkpoint=Memory(), members=2), 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_after_the_other_is_the_loop_to_the_bit(name, optimizer, data):
    network, recipe = Network(NETWORKS[name], 1, 6, 2), replace(RECIPE, optimizer=optimizer, augment="shift")
    for k, found in enumerate(train_together(network, data, recipe, [Plan(seed=k) for k in range(3)], way="each")):
        alone = train(network, data, recipe, k)
        assert all(torch.equal(leaf, alone.params[n]) for n, leaf in found.params.items())
        assert all(torch.equal(leaf, alone.buffers[n]) for n, leaf in found.buffers.items())


def test_a_cpu_trains_one_by_one(make_spec, tmp_path):
    assert Run(make_spec(tmp_path, "generator=retrain"), Session()).problem().fit_together is None


def timed(seconds: dict[str, float]):
    """Return stand-ins for training at once and alone whose second epoch takes these seconds; an error is raised."""

    def together(network, data, recipe, plans, *, way):
        assert (recipe.epochs, recipe.patience, len(data)) == (2, 0, 32)
        found = seconds[way] if not callable(seconds[way]) else seconds[way](len(plans))
        return [Trained({}, {}, [0.0, 0.0], [99.0, found]) for _ in plans]

    def alone(network, data, recipe, seed):
        assert (recipe.epochs, recipe.patience, len(data)) == (2, 0, 32)
        return Trained({}, {}, [0.0, 0.0], [0.01, seconds["alone"]])

    return together, alone


def no_memory(limit: int):
    def seconds(members):
        if members > limit:
            raise torch.OutOfMemoryError("injected")
        return 0.5

    return seconds


def no_graph(members):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"alone": 1.0, "vmap": 0.9, "each": 1.1}, AtOnce(4, "vmap")),
        ({"alone": 1.0, "vmap": 0.9, "each": 0.8}, AtOnce(4, "each")),
        ({"alone": 1.0, "vmap": 1.1, "each": 1.1}, AtOnce(1)),
        ({"alone": 1.0, "vmap": no_memory(2), "each": no_memory(0)}, AtOnce(2, "vmap")),
        ({"alone": 1.0, "vmap": no_graph, "each": 0.9}, AtOnce(4, "each")),
    ],
    ids=["vmap", "each", "alone", "memory", "graph"],
)
def test_what_is_fastest_in_its_second_epoch_is_chosen(seconds, chosen, data, monkeypatch):
    together, alone = timed(seconds)
    monkeypatch.setattr(ensemble, "train_together", together)
    monkeypatch.setattr(ensemble, "train", alone)
    recipe = replace(RECIPE, patience=3)
    assert way_of_training(Network(NETWORKS["mlp"], 1, 6, 2), data, recipe, 4) == chosen
