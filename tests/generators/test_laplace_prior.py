"""How Laplace's prior precision is chosen, what it refuses, and its settings."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.errors import Diverged, UserError
from multiplicity_bench.generators.api import Part, Trained
from multiplicity_bench.generators.contract import check_refusal
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.posterior import STRUCTURES
from multiplicity_bench.generators.prior import HIGH, LOW, RESOLUTION, choose_prior, reaches_on_tune, widest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def acceptance_on_tune(problem, drawn, epsilon: float) -> float:
    """Return the share of members within `epsilon` of the base's loss on tune."""
    limit = problem.tune_loss(problem.base.params, problem.base.buffers) + epsilon
    return sum(problem.tune_loss(*drawn.member(k)) <= limit for k in range(drawn.size)) / drawn.size


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"structure": "kron"},
        {"structure": "full"},
        {"subset": "last_layer"},
        {"target_acceptance": 0.5},
        {"target_epsilon": 0.2, "structure": "kron", "subset": "last_layer"},
    ],
    ids=str,
)
def test_tune_acceptance_takes_the_widest_posterior_that_reaches_the_target(settings, toy):
    problem = toy(members=20)  # the draws that it is tuned on are the set's own first 20
    laplace = Laplace(**settings)
    drawn = laplace.generate(problem, 4)
    precision = drawn.diagnostics["prior_precision"]
    assert 10**LOW <= precision <= 10**HIGH
    assert acceptance_on_tune(problem, drawn, laplace.target_epsilon) >= laplace.target_acceptance
    wider = replace(laplace, prior_precision=str(precision / 3)).generate(problem, 4)
    reached = acceptance_on_tune(problem, wider, laplace.target_epsilon) >= laplace.target_acceptance
    assert not reached or precision == pytest.approx(10**LOW), "three times wider misses it, unless nothing is wider"


def test_tune_acceptance_takes_re_estimated_batchnorm_into_account(toy):
    problem = toy("smallcnn", norm="batch", classes=3, members=20)
    laplace = Laplace(subset="last_layer", target_acceptance=0.5)
    drawn = laplace.generate(problem, 1)
    assert acceptance_on_tune(problem, drawn, laplace.target_epsilon) >= 0.5


def test_tune_loss_takes_the_best_predictive_loss_of_the_grid(toy):
    problem = toy(members=20)

    def predictive_loss(drawn) -> float:
        members = [problem.logits(*drawn.member(k), problem.tune.images).double() for k in range(20)]
        mean = torch.stack([m.softmax(-1) for m in members]).mean(0)
        return float(torch.nn.functional.nll_loss(mean.log(), problem.tune.labels))

    chosen = Laplace(structure="kron", prior_precision="tune_loss").generate(problem, 2)
    losses = [
        predictive_loss(Laplace(structure="kron", prior_precision=str(10**exponent)).generate(problem, 2))
        for exponent in torch.linspace(LOW, HIGH, 23).tolist()
    ]
    assert predictive_loss(chosen) == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_marglik_is_the_librarys_own(structure, subset, toy):
    problem = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace as LaplaceTorch

        library = LaplaceTorch(
            problem.module(), "classification", subset_of_weights=subset, hessian_structure=structure
        )
        library.fit(DataLoader(TensorDataset(problem.train.images, problem.train.labels), batch_size=120))
        library.optimize_prior_precision(method="marglik")
    drawn = Laplace(structure=structure, subset=subset, prior_precision="marglik").generate(problem, 0)
    assert drawn.diagnostics["prior_precision"] == drawn.diagnostics["prior_precision_marglik"]
    # float32 gradients over 100 steps of Adam, batches summed in another order
    assert drawn.diagnostics["prior_precision"] == pytest.approx(library.prior_precision.item(), rel=1e-3)


def test_marglik_is_close_to_the_maximum_of_the_evidence(toy):
    """The evidence of a diagonal posterior is stationary where a |w|^2 = sum h/(h + a) (MacKay 1992, eq. 4.22)."""
    problem = toy()
    drawn = Laplace(prior_precision="1").generate(problem, 0)
    h = drawn.factors["sd"].double() ** -2 - 1
    squared = sum(float(p.double().square().sum()) for p in problem.base.params.values())
    a = 1.0
    for _ in range(500):
        a = float((h / (h + a)).sum()) / squared
    # laplace-torch stops after 100 steps of Adam at rate .1 on log a
    assert drawn.diagnostics["prior_precision_marglik"] == pytest.approx(a, rel=0.05)


def rising_step(seed: int) -> float:
    """Return where a random step function starts to hold."""
    return LOW + (HIGH - LOW) * float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(10))
def test_bisection_finds_what_brute_force_finds(seed):
    """On all 2^12 + 1 points of the grid that bisection can reach."""
    step = rising_step(seed)
    grid = [LOW + (HIGH - LOW) * i / 2**12 for i in range(2**12 + 1)]
    assert widest(lambda x: x >= step, LOW, HIGH, resolution=RESOLUTION) == next(x for x in grid if x >= step)


@pytest.mark.parametrize("stride", [0.5, 0.7, 20.0])
@pytest.mark.parametrize("seed", range(10))
def test_a_search_from_a_start_stops_within_its_resolution_after_the_fewest_tries(seed, stride):
    step, start, tried = rising_step(seed), rising_step(seed + 100), []

    def reaches(x: float) -> bool:
        tried.append(x)
        return x >= step

    found = widest(reaches, LOW, HIGH, start=start, stride=stride, resolution=0.1)
    assert step <= found < step + 0.1 and found in tried and min(tried) >= LOW and max(tried) <= HIGH
    strides = abs(start - step) / stride
    assert tried[0] == start and len(tried) <= 2 + strides + math.ceil(math.log2(min(stride, HIGH - LOW) / 0.1))
    # What was reached last is what is returned: members of that try are those of the choice.
    assert found == [x for x in tried if x >= step][-1]


@pytest.mark.parametrize("start", [None, -5.0, LOW, 3.0, HIGH, 12.0])
def test_a_search_stops_at_the_low_end_and_fails_beyond_the_high_end(start):
    assert widest(lambda x: True, LOW, HIGH, start=start, resolution=0.1) == LOW
    with pytest.raises(Diverged, match=r"no prior precision up to 1e9 reaches the target acceptance on tune"):
        widest(lambda x: False, LOW, HIGH, start=start, resolution=0.1)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_an_early_decision_is_the_one_that_counting_all_members_takes(seed, target, toy):
    problem = toy()
    base = problem.tune_loss(problem.base.params, problem.base.buffers)
    random = torch.rand(25, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = random < (target + 0.1 * (seed % 3 - 1))  # shares on both sides of the target
    losses = [base + (0.04 if within else (0.06, math.nan, math.inf)[k % 3]) for k, within in enumerate(inside)]
    asked = []

    def loss(k: int) -> float:
        asked.append(k)
        return losses[k]

    decision = reaches_on_tune(problem, loss, 25, 0.05, target)
    assert decision == (int(inside.sum()) / 25 >= target)
    assert asked == list(range(len(asked))), "members are asked for in order, none twice"
    # One member fewer would have left both decisions open.
    known = int(inside[: len(asked) - 1].sum())
    assert known / 25 < target <= (known + 25 - len(asked) + 1) / 25


def test_a_number_and_marglik_cost_no_draws(toy):
    def member(precision, k):
        raise AssertionError("nothing is drawn")

    assert choose_prior("12.5", toy(), 3.0, member, 0.05, 0.9) == 12.5
    assert choose_prior("marglik", toy(), 3.0, member, 0.05, 0.9) == 3.0


@pytest.mark.parametrize(("first", "second"), [("10", "10.0"), ("1e2", "100"), ("0.50", ".5"), ("1e-3", "0.001")])
def test_two_spellings_of_a_number_are_one_setting(first, second):
    assert Laplace(prior_precision=first) == Laplace(prior_precision=second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "krno"}, "did you mean 'kron'"),
        ({"batchnorm": "update"}, "generator.batchnorm=update"),
        ({"prior_precision": "marglike"}, "did you mean 'marglik'"),
        ({"prior_precision": "0"}, "must be a positive number"),
        ({"prior_precision": "-3"}, "must be a positive number"),
        ({"prior_precision": "nan"}, "must be a positive number"),
        ({"prior_precision": "inf"}, "must be a positive number"),
        ({"target_acceptance": 0.0}, "target_acceptance"),
        ({"target_acceptance": 1.1}, "target_acceptance"),
        ({"target_epsilon": 0.0}, "target_epsilon"),
    ],
    ids=str,
)
def test_an_invalid_setting_is_one_line_that_names_it(settings, message):
    with pytest.raises(UserError) as caught:
        Laplace(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Convolutional(nn.Module):
    """A network without a linear layer; `extra` is applied to its logits."""

    def __init__(self, extra: nn.Module):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), extra)

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)


def with_module(problem, module: nn.Module):
    base = Trained({n: p.detach().clone() for n, p in module.named_parameters()}, {})

    def network(params, buffers, images, train=False):
        return torch.func.functional_call(module, {**params}, (images,))

    def fresh():
        again = type(module)(module.body[3])
        again.load_state_dict(base.params)
        return again.eval()

    return replace(problem, network=network, base=base, module=fresh)


def test_multi_label_data_are_a_skip_of_the_library_with_its_reason(toy):
    for structure in ("diag", "kron"):
        problem = replace(toy(), task="multilabel")
        assert "multi-label" in check_refusal(Laplace(structure=structure, engine="laplace_torch"), problem)
        assert Laplace(structure=structure).supports(problem) is None


def test_a_tune_set_that_is_too_small_is_a_skip_unless_the_prior_is_given(toy):
    problem = toy()
    few = replace(problem, tune=Part(problem.tune.images[:24], problem.tune.labels[:24]))
    for how in ("tune_acceptance", "tune_loss"):
        assert "tune has 24 images" in check_refusal(Laplace(prior_precision=how), few)
    assert Laplace(prior_precision="marglik").supports(few) is None
    assert Laplace(prior_precision="10").supports(few) is None
    enough = replace(problem, tune=Part(problem.tune.images[:25], problem.tune.labels[:25]))
    assert Laplace().supports(enough) is None


def test_jacobians_that_are_too_large_are_a_skip_of_the_library_that_names_the_alternative(toy):
    function = Network({"name": "mlp", "width": 1450}, 1, 6, 2)
    large = Trained(*function.init(0))
    problem = replace(toy(), network=function, base=large, module=lambda: function.module(large.params, large.buffers))
    reason = check_refusal(Laplace(engine="laplace_torch"), problem)
    entries = 2 * sum(p.numel() for p in large.params.values())
    assert f"{entries:,}" in reason and "use engine=native" in reason
    assert Laplace().supports(problem) is None
    assert Laplace(subset="last_layer").supports(problem) is None
    assert Laplace(structure="kron").supports(problem) is None


def test_a_network_without_a_linear_layer_has_no_last_layer(toy):
    problem = with_module(toy(), Convolutional(nn.Identity()))
    for structure in ("diag", "kron"):
        reason = check_refusal(Laplace(structure=structure, subset="last_layer"), problem)
        assert "no layer that" in reason and "last_layer" in reason
    assert Laplace(structure="kron", prior_precision="10").generate(problem, 0).size == problem.members


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("first_layer", "no layer 'first_layer': did you mean 'last_layer'"),
        ("body.1+body.33", "no layer 'body.33': did you mean 'body.3'"),
        ("body.1+", "no layer ''"),
        ("all+body.1", "no layer 'all'"),
    ],
)
def test_a_layer_that_is_not_there_is_one_line_with_close_names(subset, message, toy):
    for structure in STRUCTURES:
        laplace = Laplace(structure=structure, subset=subset, prior_precision="3")
        for act in (lambda: laplace.supports(toy()), lambda: laplace.generate(toy(), 0)):  # noqa: B023
            with pytest.raises(UserError) as caught:
                act()
            assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_order_of_layers_means_nothing():
    first, second = Laplace(subset="body.3+body.1"), Laplace(subset="body.1+body.3+body.1")
    assert first == second and first.subset == "body.1+body.3"


def test_layers_without_kronecker_factors_are_a_skip_of_kfac_alone(toy):
    problem = with_module(toy(), Convolutional(nn.PReLU()))
    for engine, said in (("laplace_torch", "not body.3.weight"), ("auto", "not of body.3")):
        assert said in check_refusal(Laplace(structure="kron", prior_precision="10", engine=engine), problem)
    assert Laplace(prior_precision="10").generate(problem, 0).size == problem.members


def test_the_draws_are_booked_as_fixed_cost_once(toy):
    """Choosing the prior is a cost of the set; BatchNorm statistics are a cost of each member."""
    booked = []

    class Clock:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            booked.append(self.name)

        def __exit__(self, *error):
            pass

    clock = SimpleNamespace(fixed=lambda: Clock("fixed"), marginal=lambda: Clock("marginal"))
    Laplace(subset="last_layer", prior_precision="50").generate(replace(toy(), clock=clock), 0)
    assert booked == ["fixed"]
    booked.clear()
    batchnorm = replace(toy("smallcnn", norm="batch", classes=3), clock=clock)
    Laplace(subset="last_layer", prior_precision="50").generate(batchnorm, 0)
    assert booked == ["fixed"] + ["marginal"] * batchnorm.members
