"""Retraining: independent members, derived seeds, one recipe, and reuse of what a killed run had finished."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark.toy import toy_problem
from multiplicity_bench.benchmark.train import bootstrap_rows
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Memory, no_groups
from multiplicity_bench.generators.contract import check_generator, check_refusal
from multiplicity_bench.generators.retrain import Retrain
from multiplicity_bench.identity import derive_seed, plain


class Recorder:
    """A `fit` that notes its calls, passes them on, and can stop like a kill before a given call."""

    def __init__(self, fit, stop_before: int | None = None):
        self.fit, self.stop_before, self.calls = fit, stop_before, []

    def __call__(self, seed, **arguments):
        if len(self.calls) == self.stop_before:
            raise KeyboardInterrupt
        self.calls.append({"seed": seed, **arguments})
        return self.fit(seed, **arguments)


def distance(a: dict, b: dict) -> float:
    return float(torch.cat([(a[n] - b[n]).reshape(-1) for n in a]).norm())


@pytest.mark.parametrize("settings", [{}, {"resample": "bootstrap"}, {"init": "base"}], ids=str)
def test_members_differ_from_the_base_and_from_each_other(settings, toy):
    problem = toy(members=4)
    drawn = Retrain(**settings).generate(problem, 0)
    members = [problem.base.params, *(drawn.member(k)[0] for k in range(4))]
    apart = [distance(a, b) for i, a in enumerate(members) for b in members[:i]]
    assert min(apart) > 0.05, "far beyond rounding"
    if settings.get("init") == "base":
        fresh = Retrain().generate(toy(members=4), 0)
        away = [max(distance(problem.base.params, s.member(k)[0]) for k in range(4)) for s in (drawn, fresh)]
        assert away[0] < away[1] / 2, "the same initial weights end closer to the base than others"


def test_the_same_seed_gives_bitwise_the_same_members_whatever_the_global_generator_is(toy):
    problem, state = toy(members=2), torch.get_rng_state()
    first = Retrain().generate(problem, 3)
    torch.manual_seed(1234)
    second = Retrain().generate(replace(problem, checkpoint=Memory()), 3)
    torch.set_rng_state(state)
    assert all(torch.equal(leaf, second.params[n]) for n, leaf in first.params.items())


def test_a_members_training_does_not_depend_on_how_many_there_are(toy):
    few, many = (Retrain().generate(toy(members=m), 3) for m in (2, 3))
    assert all(torch.equal(leaf, many.params[n][:2]) for n, leaf in few.params.items())


def test_a_member_is_the_recipe_run_with_its_own_seed(toy):
    """Member k is `fit(derive_seed(seed, "retrain", k))`: nothing but the seed differs from the base's training."""
    problem = toy(members=2)
    drawn = Retrain().generate(problem, 9)
    alone = problem.fit(derive_seed(9, "retrain", 1))
    assert all(torch.equal(p, drawn.params[n][1]) for n, p in alone.params.items())


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_member_seeds_never_equal_the_bases_or_each_other(seed, toy):
    problem = toy(members=6)
    problem.fit = Recorder(problem.fit)
    Retrain().generate(problem, seed)
    seeds = [call["seed"] for call in problem.fit.calls]
    bases = {*range(1000), *(derive_seed("base", base) for base in range(1000))}
    assert len(set(seeds)) == 6 and not bases & set(seeds)


def test_bootstrap_members_see_resamples_of_their_own(toy):
    problem = toy(members=3)
    problem.fit = Recorder(problem.fit)
    Retrain(resample="bootstrap").generate(problem, 0)
    resamples = [call["resample_seed"] for call in problem.fit.calls]
    assert None not in resamples and len(set(resamples)) == 3
    n = len(problem.train)
    rows = [bootstrap_rows(None, n, seed) for seed in resamples]
    assert not torch.equal(*rows[:2])
    # the share of distinct rows is 1 - 1/e = .632 with sd .036 for 120 images
    assert all(0.5 < len(torch.unique(r)) / n < 0.77 for r in rows)


def test_without_bootstrap_all_members_see_the_same_data(toy):
    problem = toy(members=2)
    problem.fit = Recorder(problem.fit)
    Retrain().generate(problem, 0)
    assert [call["resample_seed"] for call in problem.fit.calls] == [None, None]
    assert [call["init_seed"] for call in problem.fit.calls] == [None, None]


def test_bootstrap_changes_the_members_through_their_data_alone(toy):
    """Same seed, same initial weights and order of rows: what differs is the data."""
    problem = toy(members=2)
    plain, bagged = (
        Retrain(resample=r).generate(replace(problem, checkpoint=Memory()), 0) for r in ("none", "bootstrap")
    )
    assert distance(plain.member(0)[0], bagged.member(0)[0]) > 0.05


def test_members_that_share_the_bases_initial_weights_differ_from_it_in_order_alone(toy):
    problem = toy(members=2)
    problem.fit = Recorder(problem.fit)
    Retrain(init="base").generate(problem, 0)
    assert all(call["init_seed"] == problem.base_seed for call in problem.fit.calls)
    assert all(call["resample_seed"] is None for call in problem.fit.calls)
    # Trained on all data in one batch, the order cannot matter: only rounding of the permuted sums is left.
    together = problem.fit.fit
    seeds = [problem.base_seed, *(call["seed"] for call in problem.fit.calls)]
    base, *members = (together(s, init_seed=problem.base_seed, batch_size=1000, name=str(s)).params for s in seeds)
    assert all(distance(base, member) < 1e-3 for member in members)


def test_the_bases_seed_trains_the_base_again(toy):
    problem = toy(members=2)
    assert distance(problem.fit(problem.base_seed, name="again").params, problem.base.params) == 0


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_resumed_run_trains_only_what_was_missing(finished, toy):
    problem = toy(members=3)
    problem.fit = Recorder(problem.fit, stop_before=finished)
    with pytest.raises(KeyboardInterrupt):
        Retrain().generate(problem, 5)
    resumed = replace(problem, fit=Recorder(problem.fit.fit))
    drawn = Retrain().generate(resumed, 5)
    assert len(resumed.fit.calls) == 3 - finished
    again = Retrain().generate(resumed, 5)
    assert len(resumed.fit.calls) == 3 - finished, "a finished set is not trained again"
    whole = Retrain().generate(toy(members=3), 5)
    for other in (again, whole):
        assert all(torch.equal(leaf, other.params[n]) for n, leaf in drawn.params.items())


def test_members_of_a_batchnorm_network_carry_their_own_statistics(toy):
    problem = toy("smallcnn", norm="batch", classes=3, members=3)
    drawn = Retrain().generate(problem, 0)
    means = drawn.stacked_buffers["body.1.running_mean"]
    assert len(torch.unique(means[:, 0])) == 3 and drawn.shared_buffers == {}


def test_the_toy_problem_shares_nothing_between_calls():
    a, b = toy_problem(n=64), toy_problem(n=64)
    assert all(torch.equal(p, b.base.params[n]) and p is not b.base.params[n] for n, p in a.base.params.items())


DRO = {"objective": "group_dro", "groups": "label"}


@pytest.mark.parametrize("settings", [DRO, {"objective": "class_balanced"}], ids=["group_dro", "class_balanced"])
def test_another_objective_keeps_the_contract_and_gives_other_members(settings, toy):
    problem = toy(members=3, classes=7)  # 120 images: 18 of the first class, 17 of the others
    drawn = check_generator(Retrain(**settings), problem)
    usual = Retrain().generate(replace(problem, checkpoint=Memory()), 1)
    assert distance(drawn.member(0)[0], usual.member(0)[0]) > 1e-3, "far beyond rounding"


def test_a_member_of_another_objective_is_the_recipe_with_it(toy):
    problem = toy(members=2)
    drawn = Retrain(resample="bootstrap", **DRO).generate(problem, 9)
    seed = derive_seed(9, "retrain", 1)
    alone = problem.fit(seed, resample_seed=seed, objective="group_dro", groups="label")
    assert all(torch.equal(p, drawn.params[n][1]) for n, p in alone.params.items())


def test_groups_that_the_data_do_not_have_are_a_reason_to_skip(toy):
    problem = toy(members=2)
    assert Retrain(**DRO).supports(problem) is None
    reason = check_refusal(Retrain(objective="group_dro", groups="sex*label"), problem)
    assert reason == "groups=sex*label: the data know no attribute 'sex': known: label, random"
    assert "strata" in check_refusal(Retrain(objective="group_dro", groups="strata"), problem)
    assert check_refusal(Retrain(**DRO), replace(problem, groups=no_groups))
    assert Retrain().supports(replace(problem, groups=no_groups)) is None


def test_the_usual_objective_is_no_part_of_an_identity():
    assert plain(Retrain()) == {"resample": "none", "init": "fresh"}
    assert plain(Retrain(**DRO)) == {"resample": "none", "init": "fresh", **DRO}


@pytest.mark.parametrize(
    "settings",
    [{"objective": "dro"}, {"objective": "group_dro"}, {"groups": "sex"}, {"objective": "erm", "groups": "a"}],
)
def test_objectives_that_cannot_be_are_one_line(settings):
    with pytest.raises(UserError) as caught:
        Retrain(**settings)
    assert "generator." in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"resample": "jackknife"}, {"init": "zero"}], ids=str)
def test_invalid_settings_are_one_line(settings):
    with pytest.raises(UserError) as caught:
        Retrain(**settings)
    name, value = next(iter(settings.items()))
    assert f"generator.{name}={value}" in str(caught.value) and "\n" not in str(caught.value)
