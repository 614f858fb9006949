"""Objectives against closed forms and torch: group DRO's weights, its sampler, class weights, groups by name."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.objectives import ClassBalanced, GroupDRO, Grouping, MeanLoss, case_losses, mean_loss
from multiplicity_bench.benchmark.train import Training, bootstrap_rows, train
from multiplicity_bench.datasets.phantom_cxr import PhantomCXR
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Part
from multiplicity_bench.identity import plain
from torch import nn

LOGITS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0, 1, 1])
FINDINGS = torch.tensor([[1, -1, 0], [0, 0, 0], [1, 0, -1], [-1, -1, -1], [0, 1, 0], [0, 0, 0], [0, 0, -1]])


def logistic(images: torch.Tensor, labels: torch.Tensor) -> tuple[Network, Part]:
    return Network({"name": "logistic"}, 1, images.shape[-1], 2), Part(images, labels)


@pytest.mark.parametrize("a, c", [((1.0, 4.0), (0.0, 1.0)), ((2.0, 0.5), (-1.0, 3.0))])
def test_two_quadratic_losses_end_equal_at_the_minimax_point_whatever_the_sizes_of_the_groups(a, c):
    codes = torch.tensor([5] * 90 + [2] * 10)  # group 2 comes first: it has the lower code
    dro = GroupDRO(codes, step=0.02)
    scale, centre = (torch.tensor([v[int(k == 2)] for k in codes], dtype=torch.float64) for v in (a, c))
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    points, weights = [], []
    for epoch in range(300):
        for rows in dro.order(0, epoch).split(20):
            loss = dro.robust(scale[rows] * (t - centre[rows]) ** 2, rows)
            (gradient,) = torch.autograd.grad(loss, t)
            with torch.no_grad():
                t -= 0.02 * gradient
            points.append(t.item())
            weights.append(dro.weights.tolist())
    second = len(points) // 2
    (a1, a2), (c1, c2) = a, c
    best = (math.sqrt(a1) * c1 + math.sqrt(a2) * c2) / (math.sqrt(a1) + math.sqrt(a2))
    found, (q2, q1) = np.mean(points[second:]), np.mean(weights[second:], axis=0)
    # The ergodic average of simultaneous gradient steps is off by the order of the step, 0.02.
    assert found == pytest.approx(best, abs=0.02 * abs(c2 - c1))
    assert a1 * (found - c1) ** 2 == pytest.approx(a2 * (found - c2) ** 2, rel=0.1)
    assert q1 / q2 == pytest.approx(math.sqrt(a2 / a1), rel=0.1)  # where the weighted gradients cancel
    assert abs(a1 * c1 * 0.9 + a2 * c2 * 0.1 - best * (a1 * 0.9 + a2 * 0.1)) > 0.1, "the mean loss has another minimum"


def test_training_balances_groups_that_the_mean_loss_trades_by_their_size():
    """Blank images, nine of ten positive: the mean loss says .9, equal losses of both classes need a coin."""
    network, data = logistic(torch.zeros(100, 1, 4, 4, dtype=torch.uint8), (torch.arange(100) % 10 > 0).long())
    recipe = Training(optimizer="sgd", lr=0.1, epochs=40, prior_precision=0.0, momentum=0.0)
    groups = Grouping(data.labels.numpy()).codes
    chances = {}
    for objective, named in (("erm", ""), ("class_balanced", ""), ("group_dro", "label")):
        trained = train(network, data, recipe, 0, grouping=groups, objective=objective, groups=named)
        chances[objective] = float(network(trained.params, trained.buffers, data.images[:1]).softmax(1)[0, 1])
    assert chances["erm"] == pytest.approx(0.9, abs=0.02)
    assert chances["class_balanced"] == pytest.approx(0.5, abs=0.02)
    # the sampler's batches are noisy, and the rate is decayed to 0 by the end
    assert chances["group_dro"] == pytest.approx(0.5, abs=0.03)


def test_weights_are_the_exponentials_of_the_summed_losses():
    dro, generator = GroupDRO(torch.arange(12) % 4, step=0.3), torch.Generator().manual_seed(1)
    summed = np.zeros(4)
    for _ in range(20):
        rows = torch.randint(12, (5,), generator=generator)
        losses = torch.rand(5, generator=generator, dtype=torch.float64)
        dro.robust(losses, rows)
        for g in set((rows % 4).tolist()):
            summed[g] += float(losses[rows % 4 == g].mean())
    expected = np.exp(0.3 * summed) / np.exp(0.3 * summed).sum()
    assert dro.weights.numpy() == pytest.approx(expected, rel=1e-10)


def test_huge_losses_of_a_thousand_groups_neither_overflow_nor_end_a_groups_hopes():
    dro = GroupDRO(torch.arange(1000), step=0.01)
    losses = torch.full((1000,), 1.0)
    losses[3] = 1e4
    for _ in range(50):
        loss = dro.robust(losses, torch.arange(1000))
        assert math.isfinite(loss)
    assert float(dro.weights.sum()) == pytest.approx(1, rel=1e-12)
    assert float(dro.weights[3]) == pytest.approx(1, rel=1e-12) and float(dro.weights[7]) == 0
    losses[7] = 3e4
    for _ in range(50):
        dro.robust(losses, torch.arange(1000))
    assert float(dro.weights[7]) == pytest.approx(1, rel=1e-12), "a weight of exp(-5000) must come back"


def test_the_sampler_draws_every_group_as_often_and_every_sample_of_a_group_as_often():
    codes = torch.tensor([0] * 270 + [1] * 27 + [2] * 3)[
        torch.randperm(300, generator=torch.Generator().manual_seed(0))
    ]
    dro = GroupDRO(codes, 0.01)
    drawn = torch.cat([dro.order(4, epoch) for epoch in range(100)])
    by_group = torch.bincount(codes[drawn], minlength=3)
    # 30,000 draws, a third each: sd 82; 4.5 sd
    assert all(abs(int(n) - 10_000) < 370 for n in by_group)
    for g, n in ((0, 270), (1, 27), (2, 3)):
        counts = torch.bincount(drawn, minlength=300)[codes == g].double()
        expected = float(by_group[g]) / n
        # chi^2 with n - 1 degrees of freedom: mean n - 1, sd sqrt(2 (n - 1))
        assert float(((counts - expected) ** 2 / expected).sum()) < n - 1 + 5 * math.sqrt(2 * (n - 1))


def test_the_samplers_order_follows_from_seed_and_epoch_and_is_as_long_as_that_of_the_mean_loss():
    dro = GroupDRO(torch.arange(40) % 3, 0.01)
    assert torch.equal(dro.order(1, 2), dro.order(1, 2)) and len(dro.order(1, 2)) == len(MeanLoss(40).order(1, 2)) == 40
    assert not torch.equal(dro.order(1, 2), dro.order(1, 3)) and not torch.equal(dro.order(1, 2), dro.order(2, 2))


def test_a_batch_that_lacks_groups_estimates_the_weighted_loss_without_bias():
    """Mean over all 27 equally likely batches of three places among three groups of one sample."""
    losses = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)
    values = []
    for batch in itertools.product(range(3), repeat=3):
        dro = GroupDRO(torch.arange(3), step=1e-9)
        dro.state["log_q"] = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
        rows = torch.tensor(batch)
        values.append(float(dro.robust(losses[rows], rows)))
    assert np.mean(values) == pytest.approx(0.2 * 0.3 + 0.5 * 2.0 + 0.3 * 5.0, rel=1e-7)


@pytest.mark.parametrize("labels", [LABELS, FINDINGS], ids=["classes", "findings"])
def test_the_loss_of_a_single_group_is_the_mean_loss(labels):
    dro = GroupDRO(torch.full((20,), 8), step=0.5)
    for rows in (torch.arange(7), torch.arange(7) * 2):
        assert float(dro(LOGITS, labels, rows)) == pytest.approx(float(mean_loss(LOGITS, labels)), rel=1e-12)


@pytest.mark.parametrize("labels", [LABELS, FINDINGS], ids=["classes", "findings"])
def test_the_losses_of_cases_average_to_the_mean_loss(labels):
    found = case_losses(LOGITS, labels)
    assert found.shape == (7,) and float(found.mean()) == pytest.approx(float(mean_loss(LOGITS, labels)), rel=1e-12)


def test_class_balanced_is_the_weighted_cross_entropy_of_torch():
    weight = torch.tensor([7 / (3 * n) for n in (2, 4, 1)], dtype=torch.float64)
    found = ClassBalanced(LABELS, 3)
    # on all data the mean weight is 1, so that torch's division by the summed weights is one by the samples
    whole = nn.functional.cross_entropy(LOGITS, LABELS, weight=weight)
    assert float(found(LOGITS, LABELS, torch.arange(7))) == pytest.approx(float(whole), rel=1e-12)
    batch = nn.functional.cross_entropy(LOGITS[:3], LABELS[:3], weight=weight, reduction="sum") / 3
    assert float(found(LOGITS[:3], LABELS[:3], torch.arange(3))) == pytest.approx(float(batch), rel=1e-12)


def test_class_balanced_weighs_each_findings_known_positives_as_much_as_its_negatives():
    total = 0.0
    for label in range(3):
        column, known = FINDINGS[:, label], FINDINGS[:, label] >= 0
        for value in (0, 1):
            n, of = int((column == value).sum()), int(known.sum())
            weight = 1.0 if label == 2 else of / (2 * n)  # no positive of the last is known
            for s in torch.nonzero(column == value).ravel().tolist():
                p = torch.sigmoid(LOGITS[s, label])
                total -= weight * math.log(p if value else 1 - p)
    found = ClassBalanced(FINDINGS, 3)(LOGITS, FINDINGS, torch.arange(7))
    assert float(found) == pytest.approx(total / 7 / 3, rel=1e-12)


def test_a_class_that_does_not_occur_takes_no_weight_from_the_others():
    found = ClassBalanced(torch.tensor([0, 0, 0, 2]), 4).weights
    assert found.tolist() == pytest.approx([4 / 6, 0, 2, 0])


def test_groups_go_along_when_the_training_data_are_resampled():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 6, 6), generator=generator, dtype=torch.uint8)
    network, data = logistic(images, torch.randint(2, (60,), generator=generator))
    patient, codes = torch.arange(60) // 2, torch.randint(3, (60,), generator=generator)
    recipe = Training(epochs=2, objective="group_dro", groups="any", group_step=0.5)
    resampled = train(network, data, recipe, 0, patient=patient, grouping=lambda groups: codes, resample_seed=9)
    rows = bootstrap_rows(patient, 60, 9)
    drawn = Part(images[rows], data.labels[rows])
    explicit = train(network, drawn, recipe, 0, grouping=lambda groups: codes[rows])
    misled = train(network, drawn, recipe, 0, grouping=lambda groups: codes)
    assert all(torch.equal(resampled.params[n], explicit.params[n]) for n in explicit.params)
    assert any(not torch.equal(resampled.params[n], misled.params[n]) for n in misled.params)


def test_the_recipe_is_what_it_was_where_no_objective_is_named():
    assert plain(Training()) == {
        "optimizer": "adamw",
        "lr": 0.003,
        "batch_size": 32,
        "epochs": 30,
        "momentum": 0.9,
        "prior_precision": 1,
        "polish": 0,
    }
    named = plain(Training(objective="group_dro", groups="sex*label", group_step=0.1))
    assert (named["objective"], named["groups"], named["group_step"]) == ("group_dro", "sex*label", 0.1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "group_dor"}, "training.objective=group_dor is not a choice: did you mean 'group_dro'"),
        ({"objective": "group_dro"}, "needs training.groups"),
        ({"groups": "sex"}, "training.groups=sex is for training.objective=group_dro, not erm"),
        ({"objective": "class_balanced", "groups": "sex"}, "not class_balanced"),
        ({"group_step": 0.0}, "group_step"),
        ({"group_step": math.inf}, "group_step"),
        ({"objective": "class_balanced", "polish": 3}, "training.polish=3"),
    ],
    ids=str,
)
def test_objectives_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        Training(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


SEX, SITE = np.array([0, 1, 1, -1, 0, 1, 0, 1]), np.array([3, 3, 3, 3, 7, 7, 7, 7])
WHO = Grouping(np.array([0, 1, 0, 1, 0, 1, 0, 1]), {"sex": SEX, "site": SITE}, np.array([9, 9, 4, 4, 4, 1, 2, 8]))


def test_a_product_of_names_is_the_groups_that_occur_with_the_unknown_as_one_of_them():
    codes = WHO.codes("sex*site").tolist()
    pairs = list(zip(SEX.tolist(), SITE.tolist()))
    assert max(codes) + 1 == len(set(pairs)) == 5
    assert all((codes[i] == codes[j]) == (pairs[i] == pairs[j]) for i in range(8) for j in range(8))
    assert len(set(WHO.codes("sex").tolist())) == 3
    assert WHO.codes("label").tolist() == WHO.labels.tolist()


def test_strata_are_made_when_they_are_asked_for():
    asked: list[bool] = []

    def strata() -> torch.Tensor:
        asked.append(True)
        return torch.tensor([0, 0, 5, 5, 5, 5, 5, 5])

    grouping = Grouping(WHO.labels, strata=strata)
    grouping.codes("label")
    assert not asked
    assert grouping.codes("strata").tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert len(set(grouping.codes("strata*label").tolist())) == 4


def test_random_groups_hold_whole_patients_evenly_and_stay_the_same():
    patient = np.repeat(np.arange(50), 3)[np.random.default_rng(0).permutation(150)]
    grouping = Grouping(np.zeros(150, np.int64), {}, patient)
    codes = grouping.codes("random").numpy()
    of_patient = [set(codes[patient == p].tolist()) for p in range(50)]
    assert all(len(found) == 1 for found in of_patient)
    assert sorted(np.bincount([next(iter(found)) for found in of_patient])) == [12, 12, 13, 13]
    assert np.array_equal(codes, grouping.codes("random").numpy())
    alone = Grouping(np.zeros(150, np.int64)).codes("random").numpy()
    assert sorted(np.bincount(alone)) == [37, 37, 38, 38]


@pytest.mark.parametrize(
    "grouping, groups, message",
    [
        (WHO, "sexx*label", "groups=sexx*label: the data know no attribute 'sexx': did you mean 'sex' or 'site'?"),
        (WHO, "strata", "groups=strata: this run knows no strata"),
        (Grouping(WHO.labels), "sex", "groups=sex: the data know no attribute 'sex': known: label, random"),
        (Grouping(FINDINGS.numpy(), {"sex": SEX}), "sex*label", "'label' is one of several in a multi-label task"),
        (Grouping(np.zeros(8, np.int64)), "label", "all training samples are in one group"),
        (WHO, "sex*", "no attribute ''"),
    ],
    ids=["close names", "no strata", "no attributes", "several labels", "one group", "no name"],
)
def test_groups_that_the_data_do_not_have_are_one_line(grouping, groups, message):
    with pytest.raises(UserError) as caught:
        grouping.codes(groups)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_training_that_was_told_nothing_about_its_samples_says_so():
    network, data = logistic(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2)
    with pytest.raises(UserError, match="groups=label: nothing is known"):
        train(network, data, Training(objective="group_dro", groups="label"), 0)


def worst_group(objective: str, groups: str, seed: int, parts: list[tuple[Part, np.ndarray]]) -> float:
    (data, tag), (test, test_tag) = parts
    network = Network({"name": "mlp", "width": 32}, 1, 28, 2)
    grouping = Grouping(data.labels.numpy(), {"tag": tag})
    recipe = Training(epochs=8, prior_precision=30.0, objective=objective, groups=groups)
    trained = train(network, data, recipe, seed, grouping=grouping.codes)
    right = (network(trained.params, trained.buffers, test.images).argmax(1) == test.labels).numpy()
    labels = test.labels.numpy()
    return min(float(right[(test_tag == t) & (labels == y)].mean()) for t in (0, 1) for y in (0, 1))


def test_group_dro_raises_the_accuracy_of_the_worst_group_on_films_with_a_misleading_tag():
    """A tag in the corner agrees with the label on 95 of 100 training films and on half of the test films."""
    splits, parts = PhantomCXR(train=600, val=2, test=600).load(None).splits, []
    for i, (split, agree) in enumerate([("train", 0.95), ("test", 0.5)]):
        images, labels = splits[split].images.copy(), splits[split].labels
        agrees = np.random.default_rng(i).random(len(labels)) < agree
        tag = np.where(agrees, labels, 1 - labels)
        images[tag == 1, :, :5, :5] = 255
        parts.append((Part(torch.from_numpy(images), torch.from_numpy(labels)), tag))
    accuracy = {
        named: [worst_group("group_dro" if named else "erm", named, seed, parts) for seed in range(3)]
        for named in ("", "tag*label", "random")
    }
    # Groups hold about 130 test films: the sd of an accuracy of .2 is .035. The mean loss follows the tag (none right
    # where it misleads), and so does group DRO over groups that have nothing to do with it.
    assert max(accuracy[""]) < 0.05 and max(accuracy["random"]) < 0.05
    assert min(accuracy["tag*label"]) > 0.15
