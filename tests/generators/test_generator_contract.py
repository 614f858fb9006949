"""Every registered generator keeps to the contract, on a plain network and on one with BatchNorm and three classes."""

from __future__ import annotations

import pytest
from multiplicity_bench.generators.api import GENERATORS
from multiplicity_bench.generators.contract import check_generator
from multiplicity_bench.generators.laplace import Laplace

PROBLEMS = {"mlp": {"network": "mlp"}, "batchnorm": {"network": "smallcnn", "norm": "batch", "classes": 3}}
BUILT_IN = {"identical", "laplace", "logit_noise", "retrain", "swag", "temperature"}

VARIANTS = [
    {"structure": "kron", "prior_precision": "30"},
    {"subset": "last_layer", "prior_precision": "30"},
    {"subset": "last_layer", "structure": "kron", "prior_precision": "marglik"},
    {"prior_precision": "marglik", "batchnorm": "keep"},
]
CHOSEN_ON_TUNE = [
    {"structure": "kron"},
    {"subset": "last_layer"},
    {"subset": "last_layer", "structure": "kron"},
    {"prior_precision": "tune_loss"},
]


def label(settings: dict) -> str:
    return ",".join(settings.values())


def test_the_built_in_generators_are_all_registered():
    assert set(GENERATORS.names()) >= BUILT_IN


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", GENERATORS.names())
def test_every_registered_generator_keeps_to_the_contract(name, problem, toy):
    assert check_generator(GENERATORS.get(name)(), toy(**PROBLEMS[problem])) is not None, "built-ins run on the toy"


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


@pytest.mark.parametrize("settings", [{"resample": "bootstrap"}, {"init": "base"}], ids=label)
def test_every_kind_of_retraining_keeps_to_the_contract(settings, toy):
    assert check_generator(GENERATORS.get("retrain")(**settings), toy()) is not None


def test_swag_with_kept_batchnorm_statistics_keeps_to_the_contract(toy):
    swag = GENERATORS.get("swag")(batchnorm="keep", epochs=4)
    assert check_generator(swag, toy(**PROBLEMS["batchnorm"])) is not None
