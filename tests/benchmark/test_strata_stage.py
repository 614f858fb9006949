"""Hidden strata as a stage: found on train by networks of their own, stored, and used as groups of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import strata
from multiplicity_bench.benchmark.groups import groups_of
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Trained
from multiplicity_bench.leaderboard.suite import STRATA, Component, Row, Suite


@pytest.fixture
def run(make_spec, tmp_path) -> Run:
    return Run(make_spec(tmp_path), Session())


def test_features_are_what_the_last_layer_makes_the_logits_of(run):
    base = run.base()
    seen = strata.embed(run.network, base, run.part("val").images)
    weight, bias = list(base.params.values())[-2:]
    assert seen.features.shape == (40, 8)
    made = torch.from_numpy(seen.features) @ weight.T + bias
    assert np.allclose(made, seen.logits, atol=1e-6)
    assert np.allclose(run.network(base.params, base.buffers, run.part("val").images).detach(), seen.logits, atol=1e-6)


@pytest.mark.parametrize("kind", STRATA)
def test_every_case_of_every_part_has_a_named_stratum(run, kind):
    found = strata.find(run, kind)
    for part in strata.PARTS:
        assert len(found.codes[part]) == len(run.data.splits[part])
        assert found.codes[part].min() >= 0 and found.codes[part].max() < len(found.names)
    again = strata.find(run, kind)  # from the store
    assert all(np.array_equal(again.codes[part], found.codes[part]) for part in strata.PARTS)
    assert again.names == found.names and again.about == found.about


def test_strata_are_the_same_for_every_base_and_objective_of_a_suite(make_spec, tmp_path):
    session = Session()
    overrides = ("base_seed=3", "training.objective=group_dro", "training.groups=label")
    one, other = (Run(make_spec(tmp_path, *o), session) for o in ((), overrides))
    assert one.keys["base"] != other.keys["base"]
    assert strata.reference(one).keys["base"] == strata.reference(other).keys["base"]


def test_group_dro_trains_over_hidden_strata(make_spec, tmp_path):
    groups = ("generator.objective=group_dro", "generator.groups=strata*label")
    record, _ = Run(make_spec(tmp_path, *groups), Session()).record()
    assert record["status"] == "ok" and record["row"] == "retrain[groups=strata*label,objective=group_dro]"


def test_a_network_without_features_is_refused_in_one_line(run):
    logistic = Network({"name": "logistic"}, 1, 28, 2)
    params, buffers = logistic.init(0)
    with pytest.raises(UserError, match="network=logistic has no penultimate features"):
        strata.embed(logistic, Trained(params, buffers), run.part("val").images)


def test_the_groups_of_a_suite_hold_names_strata_and_truths(run):
    suite = Suite(
        name="tiny",
        title="Tiny",
        dataset=Component("phantom_cxr"),
        network=Component("mlp"),
        base_seeds=(0,),
        rows=(Row("retrain", {}, 4),),
        strata=("slices",),
        truths=("drain",),
    )
    made = groups_of(run, suite)
    assert made.attributes["sex"] == ["F", "M"] and made.dataset == run.data.digest
    assert made.truths["drain"]["test"].tolist() == run.data.splits["test"].latents["drain"].astype(int).tolist()
    assert {view: len(c) for view, c in made.strata["slices"].codes.items()} == {"val": 40, "test": 40}
    assert sorted(made.strata["slices"].places["test"]) == list(range(40))


def test_a_truth_that_the_data_do_not_have_is_told_with_those_they_have(run):
    suite = Suite("tiny", "Tiny", Component("phantom_cxr"), Component("mlp"), (0,), (), truths=("pacemaker",))
    with pytest.raises(UserError, match="dataset phantom_cxr has no truth 'pacemaker': it has age, ap, drain"):
        groups_of(run, suite)
