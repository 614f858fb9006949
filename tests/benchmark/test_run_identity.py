"""The identity of a run: what decides its result, and nothing else."""

from __future__ import annotations

import pytest
from multiplicity_bench.benchmark.spec import build_spec, resolve_device
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.errors import UserError
from omegaconf import OmegaConf

SESSION = Session()


def keys(spec) -> dict[str, str]:
    return spec.keys(SESSION.data(spec))


@pytest.mark.parametrize(
    "change",
    [
        "epsilon=0.02",
        "k=3",
        "epsilons=[0.1]",
        "loss=brier",
        "draws=7",
        "seed=5",
        "threads=2",
        "artifacts_dir=/elsewhere",
        "records_dir=/elsewhere",
        "dry_run=true",
        "training.prior_precision=1.0",
        "training.prior_precision=1",
    ],
)
def test_scoring_paths_and_threads_are_no_part_of_an_identity(make_spec, tmp_path, change):
    assert keys(make_spec(tmp_path, change)) == keys(make_spec(tmp_path))


@pytest.mark.parametrize(
    "change, kept",
    [
        ("members=5", {"base"}),
        ("generator_seed=1", {"base"}),
        ("generator.resample=bootstrap", {"base"}),
        ("generator=swag", {"base"}),
        ("base_seed=1", set()),
        ("resample_seed=0", set()),
        ("training.epochs=3", set()),
        ("training.lr=0.004", set()),
        ("network.width=9", set()),
        ("dataset.seed=1", set()),
        ("dataset.test=41", set()),
        ("tf32=true", set()),
    ],
)
def test_a_change_of_what_decides_a_result_gives_other_keys_from_there_on(make_spec, tmp_path, change, kept):
    before, after = keys(make_spec(tmp_path)), keys(make_spec(tmp_path, change))
    assert {stage for stage in before if before[stage] == after[stage]} == kept


def test_one_and_one_point_zero_are_one_setting(make_spec, tmp_path):
    settings = ("generator=swag", "generator.epochs=2")
    a, b = (make_spec(tmp_path, *settings, f"generator.lr={lr}", "training.prior_precision=2") for lr in ("1", "1.0"))
    c = make_spec(tmp_path, *settings, "generator.lr=1", "training.prior_precision=2.0")
    assert keys(a) == keys(b) == keys(c) and a.row == b.row == "swag[epochs=2,lr=1]"


def test_a_row_is_named_by_its_generator_and_what_differs_from_its_defaults(make_spec, tmp_path):
    assert make_spec(tmp_path).row == "retrain"
    assert make_spec(tmp_path, "generator.resample=none").row == "retrain"
    assert make_spec(tmp_path, "generator.resample=bootstrap").row == "retrain[resample=bootstrap]"


def test_another_epsilon_or_k_finds_every_artifact_and_another_recipe_finds_none(make_spec, retrained):
    def plan(*overrides: str) -> list[bool]:
        return [there for _, _, there in Run(make_spec(retrained.folder, *overrides), SESSION).plan()]

    assert plan() == plan("epsilon=0.01", "k=3") == [True] * 3
    assert plan("members=5") == plan("generator_seed=3") == [True, False, False]
    assert plan("training.epochs=3") == [False] * 3


def test_another_epsilon_gives_another_record_under_the_same_key(make_spec, retrained, tmp_path):
    spec = make_spec(retrained.folder, "epsilon=0.0", f"records_dir={tmp_path}")
    record, path = Run(spec, Session()).record()
    assert record["key"] == retrained.record["key"] and path.name == retrained.path.name
    assert record["digests"]["identity"] == retrained.record["digests"]["identity"]
    assert record["digests"]["scores"] != retrained.record["digests"]["scores"]
    assert record["set"]["val_loss"] == retrained.record["set"]["val_loss"]


def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="no CUDA device here: use device=cpu"):
        resolve_device("cuda")
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        resolve_device("cude")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_device("auto").type == resolve_device("cuda").type == "cuda"


def test_numerics_belong_to_the_identity_and_the_index_of_a_device_does_not(make_spec, tmp_path):
    import torch

    spec = make_spec(tmp_path)
    assert spec.numerics == {"device": "cpu", "dtype": "float32", "tf32": False, "autocast": "none"}
    spec.device = torch.device("cuda", 3)
    assert spec.numerics["device"] == "cuda"


def test_an_option_added_by_force_is_refused(make_spec, tmp_path):
    with pytest.raises(UserError, match="there is no option 'epsilom': did you mean 'epsilon'"):
        make_spec(tmp_path, "+epsilom=3")


def test_a_run_without_a_generator_says_what_to_add():
    with pytest.raises(UserError, match="generator: none is chosen: add generator=NAME"):
        build_spec(OmegaConf.create({"training": {}, "dataset": {"name": "phantom_cxr"}, "network": {"name": "mlp"}}))
