"""Perturb and descend: the descent is the recipe's SGD, tuned on what it ends at, with nothing solved twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Memory, NoClock
from multiplicity_bench.generators.contract import check_refusal
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.perturb_sgd import PerturbSGD
from multiplicity_bench.identity import derive_seed

BATCHNORM = {"network": "smallcnn", "norm": "batch", "classes": 3}


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_without_steps_members_are_the_laplace_draws(structure, toy):
    problem = toy(members=3)
    settings = {"structure": structure, "prior_precision": "40"}
    drawn, plain = (kind.generate(problem, 6) for kind in (PerturbSGD(steps=0, **settings), Laplace(**settings)))
    for k in range(3):
        found, wanted = drawn.member(k)[0], plain.member(k)[0]
        assert all(torch.equal(leaf, wanted[n]) for n, leaf in found.items())


def in_float64(problem):
    """Return the problem with a base in float64, and a curvature of its own."""
    base = replace(
        problem.base,
        params={k: p.double() for k, p in problem.base.params.items()},
        buffers={k: b.double() if b.is_floating_point() else b for k, b in problem.base.buffers.items()},
    )
    function: Network = problem.network
    return replace(
        problem,
        base=base,
        module=lambda: function.module(base.params, base.buffers),
        part=lambda name, spec, compute: compute(),
    )


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ({"network": "mlp"}, {}),
        ({"network": "mlp"}, {"subset": "last_layer", "momentum": 0.0, "lr": 0.05}),
        ({"network": "mlp"}, {"images": 1000, "steps": 3}),
        (BATCHNORM, {}),
        (BATCHNORM, {"batchnorm": "keep", "subset": "body.0+body.13"}),
    ],
    ids=str,
)
def test_the_descent_is_plain_sgd_on_the_recipes_objective(network, settings, toy):
    """Against a module trained by torch.optim.SGD with its own weight decay a/N, in float64."""
    problem = in_float64(toy(**network, members=2))
    generator = PerturbSGD(structure="full", prior_precision="60", **settings)
    drawn = generator.generate(problem, 2)
    plain = Laplace(
        structure="full", prior_precision="60", subset=generator.subset, batchnorm=generator.batchnorm
    ).generate(problem, 2)
    total = len(problem.train)
    for k in range(2):
        module = problem.module()
        module.load_state_dict(plain.member(k)[0], strict=False)
        module.train(generator.batchnorm == "reestimate")
        moving = [p for n, p in module.named_parameters() if n in plain.mean]
        optimizer = torch.optim.SGD(
            moving, lr=generator.lr, momentum=generator.momentum, weight_decay=problem.prior_precision / total
        )
        order = torch.Generator().manual_seed(derive_seed(2, "perturb_sgd", k))
        for _ in range(generator.steps):
            rows = torch.randperm(total, generator=order)[: generator.images]
            loss = torch.nn.functional.cross_entropy(module(problem.train.images[rows]), problem.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = drawn.member(k)[0]
        moved = max(float((found[n] - plain.member(k)[0][n]).abs().max()) for n in plain.mean)
        assert moved > 1e-3, "the descent is no rounding error"
        for n, p in module.named_parameters():
            torch.testing.assert_close(found[n], p.detach(), rtol=0, atol=1e-10)
            assert n in plain.mean or torch.equal(found[n], problem.base.params[n])


class Booked(NoClock):
    """A clock that adds up what is moved from fixed to marginal."""

    def __init__(self):
        self.moved = []

    def transfer(self, seconds: float) -> None:
        self.moved.append(seconds)


def test_the_prior_precision_is_tuned_on_members_after_their_descent_and_these_are_kept(toy, monkeypatch):
    problem = replace(toy(members=20), clock=Booked())
    made, descend = [], PerturbSGD._descend

    def counted(self, problem, drawn, k, seed):
        made.append((float(drawn.factors["sd"][0]), k))
        return descend(self, problem, drawn, k, seed)

    monkeypatch.setattr(PerturbSGD, "_descend", counted)
    generator = PerturbSGD(lr=0.02)
    drawn = generator.generate(problem, 4)
    assert len(made) == len(set(made)), "no member is made twice"
    assert 18 <= len(problem.clock.moved) <= 20 and min(problem.clock.moved) > 0
    limit = problem.tune_loss(problem.base.params, problem.base.buffers) + 0.05
    assert sum(problem.tune_loss(*drawn.member(k)) <= limit for k in range(20)) >= 18
    made.clear()
    assert generator.generate(problem, 4).diagnostics == drawn.diagnostics and not made, "a finished set is only read"
    # The members that the search left behind are those of its choice.
    given = replace(generator, prior_precision=str(drawn.diagnostics["prior_precision"]))
    again = given.generate(replace(problem, checkpoint=Memory()), 4)
    assert all(torch.allclose(leaf, again.params[n], atol=1e-6) for n, leaf in drawn.params.items())


def test_a_descent_that_leaves_the_finite_numbers_is_a_failed_member(toy):
    problem = toy(members=3)
    drawn = PerturbSGD(lr=1e30, prior_precision="40").generate(problem, 0)
    assert drawn.failed == [0, 1, 2]
    for n, leaf in drawn.params.items():
        assert torch.equal(leaf[1], problem.base.params[n])


def test_what_no_posterior_covers_is_a_skip(toy, monkeypatch):
    monkeypatch.setattr("multiplicity_bench.generators.posterior.FULL_LIMIT", 10)
    assert "use a smaller subset" in check_refusal(PerturbSGD(structure="full"), toy())


@pytest.mark.parametrize(
    "settings",
    [{"steps": -1}, {"images": 1}, {"lr": 0.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"structure": "block"}],
    ids=str,
)
def test_invalid_settings_are_one_line(settings):
    with pytest.raises(UserError, match=r"generator.*" + next(iter(settings))) as caught:
        PerturbSGD(**settings)
    assert "\n" not in str(caught.value)
