"""The training recipe against plain PyTorch, its seeds, its checkpoints, and the loss for missing labels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from multiplicity_bench.benchmark import train as train_module
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.train import Training, bootstrap_rows, gradient_norm, mean_loss, train
from multiplicity_bench.errors import Diverged, UserError
from multiplicity_bench.generators.api import Memory, Part, Trained
from multiplicity_bench.identity import derive_seed
from torch import Tensor, nn

MLP = {"name": "mlp", "width": 6, "depth": 1}
GROUP = {"name": "smallcnn", "width": 4, "norm": "group"}
BATCH = {"name": "smallcnn", "width": 4, "norm": "batch"}


def problem(n: int = 45, classes: int = 3, size: int = 8) -> Part:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (n, 1, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    images[labels == 0, :, :4] //= 2
    return Part(images, labels)


def in_float64(network: Network, seed: int = 0) -> Trained:
    params, buffers = network.init(seed)
    wide = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    return Trained({n: p.double() for n, p in params.items()}, wide)


def plain_loop(network: Network, data: Part, recipe: Training, seed: int, start: Trained) -> nn.Module:
    """Train an nn.Module as a textbook would: DataLoader order by hand, torch's own scheduler, L2 in the loss."""
    module = network.module(start.params, start.buffers).train()
    settings = {"lr": recipe.lr}
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(module.parameters(), **settings, momentum=recipe.momentum)
    else:
        optimizer = torch.optim.AdamW(module.parameters(), **settings, betas=(recipe.momentum, 0.999), weight_decay=0)
    n, steps = len(data), recipe.epochs * math.ceil(len(data) / recipe.batch_size)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
    for epoch in range(recipe.epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))
        for first in range(0, n, recipe.batch_size):
            rows = order[first : first + recipe.batch_size]
            loss = nn.functional.cross_entropy(module(data.images[rows]), data.labels[rows])
            for p in module.parameters():
                loss = loss + recipe.prior_precision / (2 * n) * (p**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    return module.eval()


@pytest.mark.parametrize("spec", [MLP, GROUP, BATCH], ids=["mlp", "GroupNorm", "BatchNorm"])
@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("adamw", 0.01)])
def test_training_equals_a_plain_pytorch_loop(spec, optimizer, lr):
    data, network = problem(), Network(spec, 1, 8, 3)
    recipe = Training(optimizer=optimizer, lr=lr, batch_size=16, epochs=3, prior_precision=7.0)
    start = in_float64(network)
    trained = train(network, data, recipe, 3, init=start)
    module = plain_loop(network, data, recipe, 3, start)
    # float64 throughout: only the order of additions differs; 9 steps amplify 1e-16 to far less than 1e-9
    for name, p in module.named_parameters():
        assert torch.allclose(trained.params[name], p, rtol=0, atol=1e-9), name
    for name, b in module.named_buffers():
        assert torch.allclose(trained.buffers[name], b, rtol=0, atol=1e-9), name
    assert any(not torch.equal(trained.params[n], start.params[n]) for n in trained.params)


def test_the_prior_pulls_weights_to_zero_as_an_l2_term_of_the_loss():
    data, network = problem(), Network(MLP, 1, 8, 3)
    norms = [
        sum(
            float(p.square().sum())
            for p in train(network, data, Training(epochs=4, prior_precision=a), 0).params.values()
        )
        for a in (0.0, 100.0)
    ]
    assert norms[1] < norms[0]


def test_training_starts_from_weights_that_its_seed_draws_and_leaves_what_it_was_given():
    data, network = problem(), Network(GROUP, 1, 8, 3)
    recipe = Training(epochs=1)
    base = train(network, data, recipe, 1)
    before = {n: p.clone() for n, p in base.params.items()}
    train(network, data, recipe, 2, init=base)
    assert all(torch.equal(base.params[n], before[n]) for n in before)
    again, other = train(network, data, recipe, 1), train(network, data, recipe, 2)
    assert all(torch.equal(base.params[n], again.params[n]) for n in before)
    assert any(not torch.equal(base.params[n], other.params[n]) for n in before)


def test_training_neither_reads_nor_moves_the_global_generator():
    data, network = problem(), Network(GROUP, 1, 8, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train(network, data, Training(epochs=1), 0, resample_seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = train(network, data, Training(epochs=1), 0, resample_seed=4)
    assert all(torch.equal(first.params[n], second.params[n]) for n in first.params)


class Killed(Exception):
    """A kill, injected between two epochs."""


@pytest.mark.parametrize("spec", [GROUP, BATCH], ids=["GroupNorm", "BatchNorm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("killed_before", [1, 3])
@pytest.mark.parametrize("more", [{}, {"patience": 3, "augment": "shift"}], ids=["plain", "early stop"])
def test_a_resumed_training_ends_in_the_same_bits(spec, optimizer, killed_before, more, monkeypatch):
    monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_S", -1.0)
    data, network = problem(), Network(spec, 1, 8, 3)
    recipe = Training(optimizer=optimizer, epochs=4, polish=2, **more)
    whole = train(network, data, recipe, 0, tune=data)
    checkpoint, trained_epochs = Memory(), []

    def until(epochs, description, total=None):
        for epoch in epochs:
            if epoch == killed_before:
                raise Killed
            yield epoch

    def count(epochs, description, total=None):
        for epoch in epochs:
            trained_epochs.append(epoch)
            yield epoch

    with pytest.raises(Killed):
        train(network, data, recipe, 0, tune=data, checkpoint=checkpoint, progress=until)
    resumed = train(network, data, recipe, 0, tune=data, checkpoint=checkpoint, progress=count)
    assert trained_epochs == list(range(killed_before, 4))
    assert resumed.losses == whole.losses and len(whole.losses) == 4
    for name in whole.params:
        assert torch.equal(resumed.params[name], whole.params[name]), name
    for name in whole.buffers:
        assert torch.equal(resumed.buffers[name], whole.buffers[name]), name


@pytest.mark.parametrize("objective, groups", [("class_balanced", ""), ("group_dro", "label")])
def test_a_resumed_training_of_another_objective_ends_in_the_same_bits(objective, groups, monkeypatch):
    monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_S", -1.0)
    data, network = problem(), Network(GROUP, 1, 8, 3)
    recipe = Training(epochs=4, objective=objective, groups=groups, group_step=0.5)
    whole = train(network, data, recipe, 0, grouping=lambda named: data.labels)
    checkpoint = Memory()

    def until(epochs, description, total=None):
        yield from itertools.islice(epochs, 2)
        raise Killed

    with pytest.raises(Killed):
        train(network, data, recipe, 0, grouping=lambda named: data.labels, checkpoint=checkpoint, progress=until)
    resumed = train(network, data, recipe, 0, grouping=lambda named: data.labels, checkpoint=checkpoint)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.params[n], whole.params[n]) for n in whole.params)


def test_a_checkpoint_holds_the_weights_of_the_groups(monkeypatch):
    """Without them the resumed training would start again from even weights and end elsewhere."""
    monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_S", -1.0)
    data, network, checkpoint = problem(), Network(GROUP, 1, 8, 3), Memory()
    recipe = Training(epochs=2, objective="group_dro", groups="label", group_step=0.5)
    train(network, data, recipe, 0, grouping=lambda named: data.labels, checkpoint=checkpoint)
    stored = checkpoint.load("training")
    assert stored["objective/log_q"].exp().sum() == pytest.approx(1)
    assert stored["objective/log_q"].std() > 0.01
    forgetful = Memory()
    even = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    forgetful.save("training", stored | {"objective/log_q": even})
    longer = [
        train(network, data, recipe, 0, grouping=lambda named: data.labels, checkpoint=c, epochs=3)
        for c in (checkpoint, forgetful)
    ]
    assert longer[0].losses[2] != longer[1].losses[2]


def test_a_training_with_a_callback_starts_again_from_its_beginning(monkeypatch):
    monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_S", -1.0)
    data, network, checkpoint, seen = problem(), Network(MLP, 1, 8, 3), Memory(), []
    for _ in range(2):
        train(network, data, Training(epochs=2), 0, checkpoint=checkpoint, on_step=lambda step, p, b: seen.append(step))
    assert seen == 2 * list(range(2 * math.ceil(45 / 32)))


def test_a_constant_rate_is_not_decayed():
    data, network = problem(), Network(MLP, 1, 8, 3)
    start = in_float64(network)
    weights: list[Tensor] = []
    train(
        network,
        data,
        Training(optimizer="sgd", momentum=0.0, lr=1e-3, batch_size=45, epochs=3, prior_precision=0),
        0,
        init=start,
        constant_lr=True,
        on_step=lambda step, params, buffers: weights.append(torch.cat([p.detach().ravel() for p in params.values()])),
    )
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(weights)]
    assert steps[1] == pytest.approx(steps[0], rel=0.05)  # the gradient hardly moves over 1e-3; a cosine would halve it


def test_a_diverging_training_says_so():
    data, network = problem(), Network(MLP, 1, 8, 3)
    with pytest.raises(Diverged, match=r"retraining 3: the loss of epoch \d is not finite.*lr=1e\+30"):
        train(network, data, Training(optimizer="sgd", lr=1e30, epochs=2), 0, name="retraining 3")


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"lr": 0},
        {"epochs": 0},
        {"batch_size": -1},
        {"momentum": 1.0},
        {"prior_precision": -1},
        {"polish": -1},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Training(**settings)


def test_the_last_batch_of_one_image_is_left_out_where_batchnorm_could_not_normalise_it():
    data, network = problem(n=33), Network(BATCH, 1, 8, 3)
    steps: list[int] = []
    train(network, data, Training(batch_size=16, epochs=2), 0, on_step=lambda step, p, b: steps.append(step))
    assert steps == [0, 1, 3, 4]


def test_the_multi_label_loss_counts_known_labels_alone():
    logits = torch.tensor([[0.3, -2.0, 1.0], [4.0, 0.1, -0.5]], dtype=torch.float64)
    labels = torch.tensor([[1, -1, 0], [-1, -1, 1]])
    total = 0.0
    for s in range(2):
        for c in range(3):
            if labels[s, c] >= 0:
                p = 1 / (1 + math.exp(-float(logits[s, c])))
                total -= math.log(p if labels[s, c] == 1 else 1 - p)
    assert float(mean_loss(logits, labels)) == pytest.approx(total / 3 / 2, rel=1e-12)


def test_the_gradient_at_a_missing_label_is_exactly_zero():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([[1, -1, 0], [0, 0, -1], [-1, -1, -1], [1, 1, 1]])
    mean_loss(logits, labels).backward()
    assert ((logits.grad != 0) == (labels >= 0)).all()


def test_the_loss_of_one_label_is_the_mean_cross_entropy_in_nats():
    logits, labels = torch.tensor([[0.0, 0.0], [2.0, -1.0]]), torch.tensor([1, 0])
    assert float(mean_loss(logits, labels)) == pytest.approx((math.log(2) + math.log1p(math.exp(-3))) / 2, rel=1e-6)


def test_a_bootstrap_draws_whole_patients():
    patient = torch.tensor([7, 3, 7, 9, 3, 7, 1, 12])
    rows = {p: sorted(torch.nonzero(patient == p).ravel().tolist()) for p in patient.unique().tolist()}
    for seed in range(20):
        drawn = bootstrap_rows(patient, len(patient), seed)
        counts = torch.bincount(drawn, minlength=8)
        times = {p: {int(counts[r]) for r in of_patient} for p, of_patient in rows.items()}
        assert all(len(t) == 1 for t in times.values()), "a patient was drawn in part"
        assert sum(next(iter(t)) for t in times.values()) == len(rows), "as many patients as there are"


def test_a_bootstrap_without_patients_draws_n_of_n_with_replacement():
    drawn = bootstrap_rows(None, 1000, 0)
    assert len(drawn) == 1000 and torch.equal(drawn, bootstrap_rows(None, 1000, 0))
    assert not torch.equal(drawn, bootstrap_rows(None, 1000, 1))
    # share of distinct rows: 1 - 1/e = 0.632, sd 0.010 for n = 1000
    assert len(drawn.unique()) / 1000 == pytest.approx(1 - math.exp(-1), abs=0.04)


def test_training_on_a_resample_is_training_on_its_rows():
    data, network, recipe = problem(), Network(MLP, 1, 8, 3), Training(epochs=1)
    rows = bootstrap_rows(None, len(data), 9)
    resampled = train(network, data, recipe, 0, resample_seed=9)
    explicit = train(network, Part(data.images[rows], data.labels[rows]), recipe, 0)
    assert all(torch.equal(resampled.params[n], explicit.params[n]) for n in resampled.params)


def test_the_gradient_norm_is_that_of_the_full_objective():
    data, network = problem(n=300), Network(BATCH, 1, 8, 3)
    trained = in_float64(network, 4)
    recipe = Training(prior_precision=11.0)
    leaves = {n: p.clone().requires_grad_() for n, p in trained.params.items()}
    objective = nn.functional.cross_entropy(network(leaves, trained.buffers, data.images), data.labels)
    objective = objective + 11.0 / (2 * 300) * torch.stack([(p**2).sum() for p in leaves.values()]).sum()
    gradients = torch.autograd.grad(objective, list(leaves.values()))
    explicit = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    assert gradient_norm(network, data, recipe, trained) == pytest.approx(explicit, rel=1e-9)


def test_polishing_reaches_the_mode_of_a_convex_objective():
    data, network = problem(), Network({"name": "logistic"}, 1, 8, 3)
    recipe = Training(epochs=3, prior_precision=5.0)
    start = in_float64(network)
    rough = train(network, data, recipe, 0, init=start)
    polished = train(network, data, recipe, 0, init=start, polish=200)
    before, after = (gradient_norm(network, data, recipe, t) for t in (rough, polished))
    assert after < 1e-5 < 1e-3 < before
    # the mode is unique: another start ends in the same weights; |dw| <= |gradient| N / a for an a/N-convex objective
    other = train(network, data, recipe, 1, init=in_float64(network, 8), polish=200)
    for name in polished.params:
        assert torch.allclose(polished.params[name], other.params[name], atol=1e-3)


class Epochs(Memory):
    """A checkpoint that keeps the state after every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, Tensor]] = []

    def save(self, name, tensors) -> None:
        super().save(name, tensors)
        self.states.append({k: v.detach().clone() for k, v in tensors.items()})


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_early_stopping_ends_where_the_loss_on_tune_was_least(patience, monkeypatch):
    monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_S", -1.0)
    data, network, epochs = problem(), Network(BATCH, 1, 8, 3), 16
    generator = torch.Generator().manual_seed(1)
    tune = Part(torch.randint(0, 256, (300, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(300) % 3)
    whole = Epochs()
    train(network, data, Training(epochs=epochs, lr=0.02), 3, checkpoint=whole)
    losses = []
    for state in whole.states:
        module = network.module(
            {n[6:]: t for n, t in state.items() if n.startswith("param/")},
            {n[7:]: t for n, t in state.items() if n.startswith("buffer/")},
        )
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(module(tune.images), tune.labels)))
    last = next(e for e in range(epochs) if e - losses.index(min(losses[: e + 1])) == patience)
    best = losses.index(min(losses[: last + 1]))
    found = train(network, data, Training(epochs=epochs, lr=0.02, patience=patience), 3, tune=tune)
    assert len(found.losses) == last + 1 < epochs
    for name, leaf in found.params.items():
        assert torch.equal(leaf, whole.states[best][f"param/{name}"])
    for name, leaf in found.buffers.items():
        assert torch.equal(leaf, whole.states[best][f"buffer/{name}"])


def test_early_stopping_without_a_part_to_stop_by_says_so():
    with pytest.raises(UserError, match=r"training\.patience=2: there is no part tune"):
        train(Network(MLP, 1, 8, 3), problem(), Training(epochs=1, patience=2), 0)


@pytest.mark.parametrize("field, value", [("augment", "rotate"), ("autocast", "fp8"), ("patience", -1)])
def test_a_setting_that_is_none_is_refused(field, value):
    with pytest.raises(UserError, match=field):
        Training(**{field: value})


def test_bf16_moves_the_result_by_its_rounding_and_keeps_weights_in_float32():
    data, network = problem(), Network(GROUP, 1, 8, 3)
    exact, rounded = (train(network, data, Training(epochs=1, autocast=kind), 0) for kind in ("none", "bf16"))
    assert all(p.dtype == torch.float32 for p in rounded.params.values())
    assert not torch.equal(exact.params["body.0.weight"], rounded.params["body.0.weight"])
    # the first losses come from the same weights: bf16 carries 3 digits
    assert rounded.losses[0] == pytest.approx(exact.losses[0], rel=0.02)


@pytest.mark.parametrize("spec", [GROUP, BATCH], ids=["GroupNorm", "BatchNorm"])
def test_another_layout_of_images_and_weights_trains_the_same_network(spec):
    data, network = problem(), Network(spec, 1, 8, 3)
    plain, turned = (
        train(network, data, Training(epochs=3, channels_last=on), 0, init=in_float64(network)) for on in (False, True)
    )
    for name, leaf in plain.params.items():
        torch.testing.assert_close(turned.params[name], leaf, rtol=1e-8, atol=1e-9)


def test_settings_that_came_later_leave_an_identity_as_it_was():
    from multiplicity_bench.identity import plain

    assert not {"augment", "patience", "autocast", "channels_last"} & set(plain(Training()))
    assert plain(Training(patience=3, autocast="bf16"))["patience"] == 3
