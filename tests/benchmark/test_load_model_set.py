"""Model sets from Python: what `load_model_set` returns predicts what the run stored."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.load import load_model_set
from multiplicity_bench.benchmark.stages import Session
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard.predictions import load_arrays


@pytest.mark.parametrize("which", ["retrained", "noisy"])
def test_a_loaded_set_predicts_what_its_run_stored(which, make_spec, request):
    run = request.getfixturevalue(which)
    loaded = load_model_set(run.path, run.artifacts)
    stored = load_arrays(run.folder / "predictions" / "tiny" / run.record["predictions"]["file"])
    data = Session().data(make_spec(run.folder))
    logits = loaded.predict(data.splits["test"].images)
    shifted = logits - logits.max(axis=-1, keepdims=True)  # committed as distances to the top class, of 11 bits
    np.testing.assert_allclose(shifted, stored["test_logits"], rtol=2**-11, atol=1e-5)
    assert loaded.accepted == run.record["set"]["accepted"]


def test_a_member_is_a_weight_vector_whose_network_gives_that_members_logits(retrained):
    loaded = load_model_set(str(retrained.path), str(retrained.artifacts))
    images = torch.randint(0, 256, (3, 1, 28, 28)).to(torch.uint8)
    params, buffers = loaded.member(2)
    with torch.no_grad():
        logits = loaded.network(params, buffers, images).numpy()
    np.testing.assert_allclose(logits, loaded.predict(images)[2], atol=1e-5)


def test_members_that_are_no_weight_vectors_are_refused_with_a_sentence(noisy):
    with pytest.raises(UserError, match="no weight vectors"):
        load_model_set(noisy.path, noisy.artifacts).member(0)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 28, 29), np.uint8),
        np.zeros((2, 3, 28, 28), np.uint8),
        np.zeros((1, 28, 28), np.uint8),
        np.zeros((2, 1, 28, 28), np.float32),
        np.zeros((28, 28), np.uint8),
    ],
    ids=["width", "channels", "no sample axis", "float", "one image"],
)
def test_images_of_another_shape_or_type_are_refused_in_one_line(retrained, images):
    with pytest.raises(UserError, match=r"give uint8 of shape \(sample, \(1, 28, 28\)\)") as caught:
        load_model_set(retrained.path, retrained.artifacts).predict(images)
    assert "\n" not in str(caught.value)


def test_a_record_without_its_set_says_where_it_was_looked_for(retrained, tmp_path):
    with pytest.raises(UserError, match=f"not in {tmp_path}"):
        load_model_set(retrained.path, tmp_path)


def test_a_corrupted_set_is_never_loaded(retrained, tmp_path):
    shutil.copytree(retrained.artifacts, tmp_path / "artifacts")
    file = tmp_path / "artifacts" / "set" / retrained.record["key"] / "set.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="run its cell again"):
        load_model_set(retrained.path, tmp_path / "artifacts")


def test_a_record_edited_by_hand_is_refused(retrained, tmp_path):
    copy = tmp_path / retrained.path.name
    copy.write_text(retrained.path.read_text().replace('"members": 4', '"members": 5'))
    with pytest.raises(UserError, match="section 'identity' was edited"):
        load_model_set(copy, retrained.artifacts)
