"""SWAG: its moments on Gaussian iterates, the covariance of its draws, and when iterates are collected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark.train import Training, train
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Part, Trained
from multiplicity_bench.generators.modelset import LowRankSet
from multiplicity_bench.generators.swag import SWAG, Moments


def gaussian_iterates(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n correlated Gaussian iterates [n, 4] in float64 and their covariance."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    mean = torch.tensor([3.0, -2.0, 0.5, 100.0], dtype=torch.float64)
    return mean + torch.randn(n, 4, generator=generator, dtype=torch.float64) @ root.T, root @ root.T


def collected(iterates: torch.Tensor, rank: int) -> Moments:
    moments = Moments(rank)
    for weights in iterates:
        moments.add(weights)
    return moments


def members(factors: dict, size: int, scale: float = 0.5) -> LowRankSet:
    return LowRankSet(
        size=size,
        shared_params={},
        shared_buffers={},
        mean={"w": factors["mean"]},
        factors={"sd": factors["sd"], "D": factors["D"]},
        seed=3,
        scale=scale,
    )


def test_moments_are_mean_and_variance_with_ddof_0_of_the_iterates():
    iterates, _ = gaussian_iterates(50)
    factors = collected(iterates, rank=8).factors()
    # the iterates are float64, the factors are stored as float32
    torch.testing.assert_close(factors["mean"].double(), iterates.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(factors["sd"].double() ** 2, iterates.var(0, correction=0), rtol=1e-5, atol=0)
    assert int(factors["count"]) == 50


def test_moments_do_not_cancel_for_large_weights_with_a_small_spread():
    """Float32 sums of squares would give 0 or worse here: 1e4^2 has a spacing of 8 in float32."""
    iterates = 1e4 + 1e-2 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sd = collected(iterates, rank=5).factors()["sd"].double()
    torch.testing.assert_close(sd, iterates.std(0, correction=0), rtol=1e-5, atol=0)


def test_deviations_are_the_last_ones_from_the_running_mean():
    """Maddox et al. 2019, algorithm 1: D's columns are w_t - mean_t, mean_t the mean of the first t iterates."""
    iterates, _ = gaussian_iterates(12)
    factors = collected(iterates, rank=5).factors()
    wanted = torch.stack([iterates[t] - iterates[: t + 1].mean(0) for t in range(7, 12)], 1)
    torch.testing.assert_close(factors["D"].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0, 0.1])
def test_draws_have_covariance_scale_times_diag_plus_low_rank(scale, draws, worst_moments):
    iterates, _ = gaussian_iterates(30)
    factors = collected(iterates, rank=6).factors()
    low = factors["D"].double()
    covariance = scale * (torch.diag(factors["sd"].double() ** 2) + low @ low.T / 5)
    found = draws(members(factors, 20_000, scale))
    of_mean, of_covariance = worst_moments(found, factors["mean"].double(), covariance)
    # the largest of 14 z-values exceeds 4.5 with probability 1e-4; the seed is fixed
    assert of_mean < 4.5 and of_covariance < 4.5


def test_at_half_scale_and_full_rank_variances_are_those_of_the_iterates_and_covariances_are_halved(
    draws, worst_moments
):
    """scale = 1/2 gives S_ii / 2 + S_ii / 2 on the diagonal and S_ij / 2 off it (K = all iterates)."""
    n = 400
    iterates, true = gaussian_iterates(n)
    factors = collected(iterates, rank=n).factors()
    empirical = torch.cov(iterates.T, correction=0)
    halved = 0.5 * (empirical + torch.diag(empirical.diagonal()))
    low = factors["D"].double()
    analytic = 0.5 * (torch.diag(factors["sd"].double() ** 2) + low @ low.T / (n - 1))
    # Deviations are from the running mean: the first ones are short, E (w_t - mean_t)^2 = S (t - 1)/t. That lowers
    # D D'/(K - 1) by H_K/K = 1.6 %, and its noise is of the same size.
    torch.testing.assert_close(analytic.diagonal(), halved.diagonal(), rtol=0.03, atol=0)
    torch.testing.assert_close(analytic, halved, rtol=0.03, atol=0.03 * float(true.diagonal().max()))
    found = draws(members(factors, 20_000))
    of_mean, of_covariance = worst_moments(found, factors["mean"].double(), analytic)
    assert of_mean < 4.5 and of_covariance < 4.5
    variances = found.var(0) / iterates.var(0, correction=0)
    # 20,000 draws: relative sd of a variance .01; 1 % from the running mean
    torch.testing.assert_close(variances, torch.ones(4, dtype=torch.float64), rtol=0, atol=0.06)


def scripted(problem, updates_per_epoch: int, skipped_last: bool = False):
    """Return the problem with a `fit` that walks from the base in steps of +1, and the settings it was called with."""
    calls = {}

    def fit(seed, *, init, on_step, epochs, name, **recipe):
        calls.update(recipe, seed=seed, init=init, epochs=epochs)
        update, per_epoch = 0, updates_per_epoch + skipped_last
        for epoch in range(epochs):
            for i in range(updates_per_epoch):
                update += 1
                on_step(epoch * per_epoch + i, {n: p + update for n, p in init.params.items()}, {})
        return Trained(init.params, init.buffers)

    return replace(problem, fit=fit), calls


@pytest.mark.parametrize(("per_epoch", "times"), [(1, [4, 8, 12]), (2, [2, 4, 6, 8, 10, 12]), (4, range(1, 13))])
def test_iterates_are_collected_at_the_promised_times(per_epoch, times, toy):
    """120 training images in batches of 32 are 4 updates per epoch."""
    problem, calls = scripted(toy(), 4)
    drawn = SWAG(epochs=3, per_epoch=per_epoch).generate(problem, 0)
    times = torch.tensor(list(times), dtype=torch.float64)
    assert drawn.diagnostics["iterates"] == len(times)
    moved = [float((drawn.mean[n] - p).mean()) for n, p in problem.base.params.items()]
    # float32 weights of order 1 to 10
    assert moved == pytest.approx([float(times.mean())] * len(moved), abs=1e-5)
    assert float(drawn.factors["sd"].mean()) == pytest.approx(float(times.std(correction=0)), abs=1e-5)
    assert calls["constant_lr"] is True and calls["optimizer"] == "sgd" and calls["polish"] == 0
    assert calls["init"] is problem.base and calls["epochs"] == 3


@pytest.mark.parametrize("per_epoch", [1, 2, 3])
def test_a_last_batch_of_one_image_loses_no_iterates(per_epoch, toy):
    """The recipe leaves such a batch out: 97 images in batches of 32 are 3 updates per epoch, not 4."""
    shared = toy()
    data = Part(shared.train.images[:97], shared.train.labels[:97])
    problem, _ = scripted(replace(shared, train=data), 3, skipped_last=True)
    drawn = SWAG(epochs=4, per_epoch=per_epoch).generate(problem, 0)
    assert drawn.diagnostics["iterates"] == {1: 4, 2: 12, 3: 12}[per_epoch]

    def fit(seed, **arguments):
        return train(shared.network, data, Training(), seed, **arguments)

    real = SWAG(epochs=4, per_epoch=per_epoch).generate(replace(problem, fit=fit), 0)
    assert real.diagnostics["iterates"] == drawn.diagnostics["iterates"]


def test_a_scale_of_almost_zero_gives_the_mean(toy):
    drawn = SWAG(epochs=2, scale=1e-20).generate(toy(), 0)
    for k in range(drawn.size):
        params, _ = drawn.member(k)
        for name, leaf in params.items():  # sd 1e-10 times that of the iterates, below float32 rounding
            torch.testing.assert_close(leaf, drawn.mean[name], rtol=1e-6, atol=1e-8)
    moved = torch.cat([(drawn.mean[n] - p).reshape(-1) for n, p in toy().base.params.items()])
    assert drawn.diagnostics["distance_of_mean_from_base"] == pytest.approx(float(moved.norm()), rel=1e-4)
    assert float(moved.norm()) > 0


def test_finished_moments_are_not_collected_again(toy):
    problem = toy()
    first = SWAG(epochs=2).generate(problem, 0)

    def fit(*args, **kwargs):
        raise AssertionError("trained again")

    again = SWAG(epochs=2).generate(replace(problem, fit=fit), 0)
    assert all(torch.equal(first.member(2)[0][n], leaf) for n, leaf in again.member(2)[0].items())


@pytest.mark.parametrize(
    "settings",
    [{"rank": 1}, {"epochs": 1, "per_epoch": 1}, {"lr": 0.0}, {"scale": 0.0}, {"batchnorm": "none"}],
    ids=str,
)
def test_invalid_settings_are_one_line(settings):
    with pytest.raises(UserError) as caught:
        SWAG(**settings)
    assert "\n" not in str(caught.value)
