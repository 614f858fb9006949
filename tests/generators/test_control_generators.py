"""Controls: the copies are exact, temperature changes no decision, the noise belongs to the image alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark.predict import predict
from multiplicity_bench.errors import Diverged, UserError
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.contract import member_logits
from multiplicity_bench.generators.controls import Identical, LogitNoise, Temperature
from multiplicity_bench.generators.modelset import image_noise

PROBLEMS = {"mlp": {"network": "mlp"}, "batchnorm": {"network": "smallcnn", "norm": "batch", "classes": 3}}
OUTPUTS = [Temperature, LogitNoise]


def base_logits(problem) -> torch.Tensor:
    return problem.logits(problem.base.params, problem.base.buffers, problem.tune.images)


def random_images(n: int, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("settings", PROBLEMS.values(), ids=PROBLEMS)
def test_identical_members_say_bitwise_what_the_base_says(settings, toy):
    problem = toy(**settings)
    copies = Identical().generate(problem, 0)
    assert copies.deployable and copies.size == problem.members
    base = base_logits(problem)
    for logits in (
        member_logits(copies, problem, 2),
        torch.from_numpy(predict(problem.network, copies, problem.tune.images)),
    ):
        assert all(torch.equal(member, base) for member in logits)
    params, buffers = copies.member(problem.members - 1)
    assert all(torch.equal(p, problem.base.params[n]) for n, p in params.items())
    assert all(torch.equal(b, problem.base.buffers[n]) for n, b in buffers.items())


@pytest.mark.parametrize("settings", PROBLEMS.values(), ids=PROBLEMS)
def test_temperature_changes_scores_but_no_decision(settings, toy):
    problem = toy(members=20, **settings)
    logits = member_logits(Temperature().generate(problem, 1), problem)
    base = base_logits(problem)
    assert bool((logits.argmax(-1) == base.argmax(-1)).all())
    assert all(not torch.equal(a, b) for i, a in enumerate(logits) for b in [base, *logits[:i]])
    # every member is the base divided by one number
    ratio = logits / base
    assert bool((ratio.flatten(1).std(1) < 1e-4 * ratio.flatten(1).mean(1)).all())


@pytest.mark.parametrize("control", OUTPUTS)
@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.4])
@pytest.mark.parametrize("settings", PROBLEMS.values(), ids=PROBLEMS)
def test_an_output_control_raises_the_mean_tune_loss_by_a_quarter_of_epsilon(settings, epsilon, control, toy):
    problem = toy(members=10, **settings)
    drawn = control(target_epsilon=epsilon).generate(problem, 2)
    labels = problem.tune.labels

    def loss(logits):
        return float(torch.nn.functional.cross_entropy(logits.double(), labels))

    rise = sum(loss(m) for m in member_logits(drawn, problem)) / drawn.size - loss(base_logits(problem))
    # the size is bisected to a relative 1e-6, losses are float32
    assert rise == pytest.approx(epsilon / 4, abs=1e-4)
    assert drawn.diagnostics["tune_loss_rise"] == pytest.approx(rise, abs=1e-5)


def test_temperatures_are_log_normal_with_the_reported_size(toy):
    drawn = Temperature().generate(toy(members=4000), 3)
    z = drawn.values.double().log() / drawn.diagnostics["size"]
    assert float(z.mean()) == pytest.approx(0, abs=0.06)  # sd 1/sqrt(4000) = .016
    assert float(z.std()) == pytest.approx(1, abs=0.05)  # sd 1/sqrt(8000) = .011


@pytest.mark.parametrize("control", OUTPUTS)
def test_an_output_control_has_no_weight_vectors_to_export(control, toy):
    drawn = control().generate(toy(), 0)
    assert not drawn.deployable and any("not deployable" in note for note in drawn.notes)
    with pytest.raises(UserError, match="not deployable") as caught:
        drawn.member(0)
    assert "\n" not in str(caught.value)


def test_noise_is_a_function_of_the_image_alone(toy):
    """The same image gets the same noise in any batch, order or split, and in a set that was drawn anew."""
    problem = toy(members=3)
    drawn = LogitNoise().generate(problem, 4)
    images = torch.cat([problem.tune.images, problem.train.images])
    whole = torch.from_numpy(predict(problem.network, drawn, images))
    noise = whole - problem.logits(problem.base.params, problem.base.buffers, images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = torch.from_numpy(predict(problem.network, drawn, images[order]))
    shuffled = shuffled - problem.logits(problem.base.params, problem.base.buffers, images[order])
    # the noise itself is exact, the base's float32 logits differ in the last bits between batches
    torch.testing.assert_close(shuffled, noise[:, order], rtol=0, atol=1e-5)
    one = image_noise(images[7:8], drawn.seed, range(1, 2), 2)
    everything = image_noise(images, drawn.seed, range(3), 2)
    assert torch.equal(one[0, 0], everything[1, 7])
    assert torch.equal(image_noise(images[order], drawn.seed, range(3), 2), everything[:, order])
    twice = image_noise(images[[3, 9, 3]], drawn.seed, range(3), 2)
    assert torch.equal(twice[:, 0], twice[:, 2]) and not torch.equal(twice[:, 0], twice[:, 1])


def test_noise_differs_between_images_members_classes_and_seeds():
    """All 2 x 5 x 200 x 3 values are different, also for images that differ in one pixel by one."""
    images = random_images(100)
    neighbours = images.clone()
    neighbours[:, 0, 2, 3] = neighbours[:, 0, 2, 3] ^ 1
    images = torch.cat([images, neighbours])
    noise = torch.stack([image_noise(images, seed, range(5), 3) for seed in (0, 1)])
    assert noise.shape == (2, 5, 200, 3)
    assert len(torch.unique(noise)) == noise.numel()


def test_noise_depends_on_where_a_pixel_is():
    images = random_images(50)
    mirrored = images.flip(-1)
    noise = image_noise(torch.cat([images, mirrored]), 0, range(1), 2)[0]
    assert len(torch.unique(noise)) == noise.numel()


def test_noise_is_standard_normal_and_uncorrelated():
    """Over 20 members, 2,000 images and 3 classes: moments, tails, and correlations along every axis."""
    images = random_images(2000)
    noise = image_noise(images, 6, range(20), 3)
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / n**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((noise**3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float((noise**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    ks = _ks_distance(noise.flatten()) * n**0.5
    assert ks < 1.95  # the Kolmogorov distribution exceeds it with probability .001
    by_class, by_member = noise.permute(2, 0, 1).reshape(3, -1), noise.reshape(20, -1)
    for rows in (by_class, by_member):
        off = torch.corrcoef(rows) - torch.eye(len(rows))
        assert float(off.abs().max()) < 4.5 / rows.shape[1] ** 0.5  # at most 190 correlations
    lagged = (noise[:, 1:] * noise[:, :-1]).mean()  # neighbours in the batch
    assert abs(float(lagged)) < 4 / n**0.5


def _ks_distance(values: torch.Tensor) -> float:
    """Return the largest distance of the empirical distribution from the standard normal's."""
    cdf = torch.special.ndtr(torch.sort(values.double()).values)
    steps = torch.arange(1, len(cdf) + 1, dtype=torch.float64) / len(cdf)
    return float(torch.maximum((cdf - steps).abs(), (cdf - steps + 1 / len(cdf)).abs()).max())


def test_neighbouring_images_get_independent_noise():
    """Images that differ in one pixel by one: a linear hash without mixing would show here."""
    images = random_images(2000)
    neighbours = images.clone()
    neighbours[:, 0, 0, 0] = neighbours[:, 0, 0, 0] ^ 1
    a, b = (image_noise(i, 0, range(5), 2).flatten() for i in (images, neighbours))
    assert abs(float((a * b).mean())) < 4 / len(a) ** 0.5


def test_a_target_that_no_change_reaches_is_an_error_not_a_nan(toy):
    """One member that is sharper than a base without errors on tune has a lower loss at every size."""
    problem = toy(members=1)
    sure = base_logits(problem).argmax(-1)
    problem = replace(problem, tune=Part(problem.tune.images, sure))
    outcomes = {}
    for seed in range(6):
        try:
            rise = Temperature().generate(problem, seed).diagnostics["tune_loss_rise"]
            outcomes[seed] = abs(rise - 0.0125) < 1e-4
        except Diverged as error:
            assert "draw more members" in str(error)
            outcomes[seed] = None
    assert set(outcomes.values()) == {True, None}, "some seeds draw a temperature above 1, some below"


@pytest.mark.parametrize("control", OUTPUTS)
@pytest.mark.parametrize("epsilon", [0.0, -0.1])
def test_a_target_that_is_not_positive_is_refused(epsilon, control):
    with pytest.raises(UserError, match="must be positive"):
        control(target_epsilon=epsilon)
