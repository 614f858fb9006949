"""Every registered generator keeps to the contract, on a plain network and on one with BatchNorm and three classes."""

from __future__ import annotations

import pytest
from multiplicity_bench.generators.api import GENERATORS
from multiplicity_bench.generators.contract import check_generator
from multiplicity_bench.generators.laplace import Laplace

PROBLEMS = {"mlp": {"network": "mlp"}, "batchnorm": {"network": "smallcnn", "norm": "batch", "classes": 3}}
BUILT_IN = {
    "identical",
    "laplace",
    "logit_noise",
    "dissipative",
    "perturb_sgd",
    "ray_exit",
    "retrain",
    "riemannian_laplace",
    "swag",
    "temperature",
}

VARIANTS = [
    {"structure": "kron", "prior_precision": "30"},
    {"structure": "full", "prior_precision": "30"},
    {"subset": "last_layer", "prior_precision": "30"},
    {"subset": "last_layer", "structure": "kron", "prior_precision": "marglik"},
    {"prior_precision": "marglik", "batchnorm": "keep"},
]
CHOSEN_ON_TUNE = [
    {"structure": "kron"},
    {"structure": "full"},
    {"subset": "last_layer"},
    {"subset": "last_layer", "structure": "kron"},
    {"prior_precision": "tune_loss"},
]
GEODESICS = [
    {"tau": 1.0},
    {"tau": 1.0, "start": "plain", "metric_images": "50"},
    {"start": "polished", "structure": "diag"},
    {"prior_in_metric": True, "structure": "kron"},
    {"tau": 1.0, "radius": "rashomon"},
    {"tau": 1.0, "integrator": "dormand_prince"},
    {"tau": 1.0, "integrator": "ek0", "subset": "last_layer"},
    {"integrator": "projected_flow"},
    {"log_map": True},
    {"linearised": True},
    {"linearised": True, "prior_precision": "tune_acceptance"},
]
# Members that cost many passes are tuned under BatchNorm, where each is re-estimated, in the slow tests only.
DEAR = {"dissipative", "perturb_sgd", "ray_exit", "riemannian_laplace"}


def label(settings: dict) -> str:
    return ",".join(settings.values())


def test_the_built_in_generators_are_all_registered():
    assert set(GENERATORS.names()) >= BUILT_IN


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", GENERATORS.names())
def test_every_registered_generator_keeps_to_the_contract(name, problem, toy):
    given = problem == "batchnorm" and name in DEAR
    generator = GENERATORS.get(name)(**({"prior_precision": "300"} if given else {}))
    assert check_generator(generator, toy(**PROBLEMS[problem], members=3 if given else 6)) is not None, (
        "built-ins run on the toy"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DEAR))
def test_every_generator_that_is_tuned_keeps_to_the_contract_under_batchnorm(name, toy):
    assert check_generator(GENERATORS.get(name)(), toy(**PROBLEMS["batchnorm"])) is not None


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("settings", VARIANTS, ids=label)
def test_every_kind_of_laplace_keeps_to_the_contract(settings, problem, toy):
    assert check_generator(Laplace(**settings), toy(**PROBLEMS[problem])) is not None


@pytest.mark.parametrize("settings", CHOSEN_ON_TUNE, ids=label)
def test_every_laplace_that_is_tuned_keeps_to_the_contract(settings, toy):
    assert check_generator(Laplace(**settings), toy()) is not None


@pytest.mark.slow
@pytest.mark.parametrize("settings", CHOSEN_ON_TUNE, ids=label)
def test_every_laplace_that_is_tuned_keeps_to_the_contract_under_batchnorm(settings, toy):
    assert check_generator(Laplace(**settings), toy(**PROBLEMS["batchnorm"])) is not None


@pytest.mark.filterwarnings("ignore:start=plain")
@pytest.mark.parametrize("settings", GEODESICS, ids=str)
def test_every_kind_of_geodesic_keeps_to_the_contract(settings, toy):
    generator = GENERATORS.get("riemannian_laplace")(**{"prior_precision": "300"} | settings)
    assert check_generator(generator, toy()) is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:start=plain")
@pytest.mark.parametrize("settings", GEODESICS, ids=str)
def test_every_kind_of_geodesic_keeps_to_the_contract_under_batchnorm(settings, toy):
    generator = GENERATORS.get("riemannian_laplace")(**{"prior_precision": "3000"} | settings)
    assert check_generator(generator, toy(**PROBLEMS["batchnorm"], members=3)) is not None


@pytest.mark.parametrize("settings", [{"resample": "bootstrap"}, {"init": "base"}], ids=label)
def test_every_kind_of_retraining_keeps_to_the_contract(settings, toy):
    assert check_generator(GENERATORS.get("retrain")(**settings), toy()) is not None


def test_swag_with_kept_batchnorm_statistics_keeps_to_the_contract(toy):
    swag = GENERATORS.get("swag")(batchnorm="keep", epochs=4)
    assert check_generator(swag, toy(**PROBLEMS["batchnorm"])) is not None
