"""Ray exit: members lie where their ray first leaves the tolerance on tune, in the directions of Laplace draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Memory
from multiplicity_bench.generators.batchnorm import reestimated
from multiplicity_bench.generators.contract import check_refusal
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.ray_exit import LONGEST, RayExit, exit_length

PROBLEMS = {"mlp": {"network": "mlp"}, "batchnorm": {"network": "smallcnn", "norm": "batch", "classes": 3}}


@pytest.mark.parametrize("exact", [1e-3, 0.05, 0.7, 1.0, 33.3, 1000.0])
def test_the_length_of_a_ray_is_exact_to_a_thousandth_and_inside(exact):
    found = exit_length(lambda length: length <= exact)
    assert exact * (1 - 1.1e-3) <= found <= exact


def test_a_ray_ends_where_it_first_leaves_though_it_comes_back():
    assert exit_length(lambda length: not 1.0 < length < 2.0) == pytest.approx(1.0, rel=2e-3)


def test_a_ray_that_never_leaves_ends_at_the_limit_and_one_that_starts_outside_has_no_length():
    assert exit_length(lambda length: True) == LONGEST
    assert exit_length(lambda length: length <= 0.0) == 0.0


@pytest.mark.parametrize(
    ("problem", "settings"),
    [
        ("mlp", {}),
        ("mlp", {"structure": "full", "prior_precision": "marglik"}),
        ("mlp", {"structure": "kron", "subset": "last_layer", "target_epsilon": 0.2}),
        ("batchnorm", {"prior_precision": "300"}),
        ("batchnorm", {"prior_precision": "300", "batchnorm": "keep"}),
    ],
    ids=str,
)
def test_members_lie_where_the_loss_on_tune_first_reaches_the_tolerance(problem, settings, toy):
    problem = toy(**PROBLEMS[problem], members=3)
    ray_exit = RayExit(**settings)
    drawn = ray_exit.generate(problem, 3)
    base = problem.tune_loss(problem.base.params, problem.base.buffers)
    limit = base + ray_exit.target_epsilon
    for k in range(3):
        params, buffers = drawn.member(k)
        loss = problem.tune_loss(params, buffers)
        # The length is exact to 1e-3 and the rise no steeper than its fifth power.
        assert limit - 5e-3 * ray_exit.target_epsilon <= loss <= limit + 1e-6
        for share in (0.25, 0.5, 0.75, 0.95):
            on_the_way = {n: p + share * (params[n] - p) for n, p in problem.base.params.items()}
            buffers = reestimated(problem, on_the_way, 3) if drawn.stacked_buffers else problem.base.buffers
            assert problem.tune_loss(on_the_way, buffers) < loss
    assert drawn.notes[-1] == "members lie at the edge of the tolerance on tune by construction"
    assert drawn.diagnostics["rays_without_exit"] == 0


def test_members_lie_on_the_rays_of_the_laplace_draws(toy, draws):
    problem = toy(members=4)
    drawn = RayExit(structure="full").generate(problem, 5)
    plain = Laplace(structure="full").generate(replace(problem, checkpoint=Memory()), 5)
    assert drawn.diagnostics["prior_precision"] == plain.diagnostics["prior_precision"]
    base = torch.cat([p.double().reshape(-1) for p in problem.base.params.values()])
    along, ray = draws(drawn) - base, draws(plain) - base
    lengths = along.norm(dim=1) / ray.norm(dim=1)
    torch.testing.assert_close(along, lengths[:, None] * ray, rtol=0, atol=1e-6)
    assert float(lengths.min()) == pytest.approx(drawn.diagnostics["length_min"], rel=1e-5)
    assert float(lengths.mean()) == pytest.approx(drawn.diagnostics["length_mean"], rel=1e-5)
    assert float(lengths.max()) == pytest.approx(drawn.diagnostics["length_max"], rel=1e-5)


def test_a_ray_without_exit_is_counted(toy):
    """With a tolerance that no loss of this network reaches, all rays end at the limit."""
    problem = toy(members=2)
    drawn = RayExit(prior_precision="1e6", target_epsilon=1e6).generate(problem, 0)
    assert drawn.diagnostics["rays_without_exit"] == 2 and drawn.diagnostics["length_min"] == LONGEST


def test_a_length_that_was_found_is_not_searched_again(toy):
    problem = toy(members=2)
    ray_exit = RayExit(prior_precision="300")
    first = ray_exit.generate(problem, 1)
    problem.checkpoint.save("length 0", {"length": torch.tensor(0.0)})
    resumed = ray_exit.generate(problem, 1)
    for n, leaf in resumed.params.items():
        assert torch.equal(leaf[0], problem.base.params[n]) and torch.equal(leaf[1], first.params[n][1])


def test_what_no_posterior_covers_is_a_skip_and_bad_settings_are_one_line(toy, monkeypatch):
    monkeypatch.setattr("multiplicity_bench.generators.posterior.FULL_LIMIT", 10)
    assert "use a smaller subset" in check_refusal(RayExit(structure="full"), toy())
    for settings in ({"target_epsilon": -1.0}, {"structure": "block"}, {"prior_precision": "wide"}):
        with pytest.raises(UserError, match="generator") as caught:
            RayExit(**settings)
        assert "\n" not in str(caught.value)
