"""Model sets: files without code, damaged files, devices, sizes, and noise that nothing global can touch."""

from __future__ import annotations

import json
import pickletools
from dataclasses import replace

import pytest
import torch
from multiplicity_bench.errors import UserError
from multiplicity_bench.generators.api import Memory
from multiplicity_bench.generators.contract import member_logits
from multiplicity_bench.generators.controls import Identical, LogitNoise, Temperature
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.modelset import (
    FILE,
    DiagonalSet,
    KroneckerSet,
    ModelSet,
    StackedSet,
    member_noise,
)
from multiplicity_bench.generators.retrain import Retrain
from multiplicity_bench.generators.riemannian_laplace import RiemannianLaplace
from multiplicity_bench.generators.swag import SWAG
from safetensors import safe_open
from safetensors.torch import save_file

GENERATORS = {
    "stacked": Retrain(),
    "diagonal": Laplace(prior_precision="30"),
    "lowrank": SWAG(epochs=2),
    "kronecker": Laplace(structure="kron", prior_precision="30"),
    "dual": Laplace(structure="full", prior_precision="30"),
    "output": LogitNoise(),
    "linearised": RiemannianLaplace(linearised=True, subset="last_layer", prior_precision="30"),
}
MORE = {
    "identical": Identical(),
    "temperature": Temperature(),
    "last layer": Laplace(subset="last_layer", structure="kron", prior_precision="30"),
    "kept batchnorm": Laplace(prior_precision="30", batchnorm="keep"),
}


@pytest.fixture(scope="module")
def problem(toy):
    return toy("smallcnn", norm="batch", classes=3, members=3)


@pytest.fixture(scope="module")
def drawn(problem):
    """Return `drawn(name)`: the set of one of the generators above, drawn once."""
    sets: dict[str, ModelSet] = {}

    def get(name: str) -> ModelSet:
        if name not in sets:
            sets[name] = (GENERATORS | MORE)[name].generate(replace(problem, checkpoint=Memory()), 8)
        return sets[name]

    return get


def header(path) -> dict:
    """Return the JSON header of a safetensors file, read by hand: 8 bytes of length, then the text."""
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_the_cases_cover_every_kind_of_set(drawn):
    built_in = {kind for kind in ModelSet.kinds if kind and not kind.startswith("test: ")}
    assert {drawn(name).kind for name in GENERATORS} == set(GENERATORS) == built_in


@pytest.mark.parametrize("name", GENERATORS | MORE)
def test_a_loaded_set_equals_the_saved_one(name, drawn, problem, tmp_path):
    original = drawn(name)
    original.save(tmp_path, {"spec": {"name": "smallcnn"}, "outputs": 3})
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    for path in (tmp_path, str(tmp_path), tmp_path / FILE):
        loaded = ModelSet.load(path)
        assert type(loaded) is type(original) and loaded.size == original.size
    assert loaded.network == {"spec": {"name": "smallcnn"}, "outputs": 3}
    for attribute in ("deployable", "batchnorm", "notes", "diagnostics"):
        assert getattr(loaded, attribute) == getattr(original, attribute)
    for k in range(original.size):
        for found, wanted in zip(loaded.block(k, k + 1).member(0), original.block(k, k + 1).member(0)):
            assert set(found) == set(wanted)
            for n, leaf in found.items():
                if original.kind in (
                    "lowrank",
                    "kronecker",
                    "dual",
                ):  # products: a tensor's layout may change the last bits
                    torch.testing.assert_close(leaf, wanted[n], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(leaf, wanted[n])
    torch.testing.assert_close(
        member_logits(loaded, problem), member_logits(original, problem), rtol=1e-5, atol=1e-5
    )  # where a tensor lies in memory may change the last bits of a product


@pytest.mark.parametrize("name", GENERATORS)
def test_a_saved_set_is_tensors_and_json_without_pickle(name, drawn, tmp_path):
    drawn(name).save(tmp_path)
    about = header(tmp_path / FILE)
    stored = json.loads(about["__metadata__"]["about"])
    assert stored["kind"] == name and stored["size"] == 3
    entries = [value for key, value in about.items() if key != "__metadata__"]
    assert entries and all(set(entry) == {"dtype", "shape", "data_offsets"} for entry in entries)
    with pytest.raises(ValueError):
        list(pickletools.genops((tmp_path / FILE).read_bytes()))


def test_failed_members_survive_a_file_and_files_from_before_there_were_any_load(drawn, tmp_path):
    replace(drawn("diagonal"), failed=[0, 2]).save(tmp_path)
    loaded = ModelSet.load(tmp_path)
    assert loaded.failed == [0, 2]
    with pytest.raises(UserError, match="member=2 failed when it was made"):
        loaded.member(2)
    assert loaded.member(1)
    with safe_open(tmp_path / FILE, "pt") as f:
        about, tensors = json.loads(f.metadata()["about"]), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    del about["failed"]
    save_file(tensors, tmp_path / FILE, metadata={"about": json.dumps(about)})
    assert ModelSet.load(tmp_path).failed == []


def test_a_sampled_set_takes_one_set_of_factors_not_one_per_member(drawn, tmp_path):
    few, many = replace(drawn("kept batchnorm")), replace(drawn("kept batchnorm"), size=1000)
    sizes = []
    for i, model_set in enumerate((few, many)):
        (folder := tmp_path / str(i)).mkdir()
        model_set.save(folder)
        sizes.append((folder / FILE).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 64


def damaged(path, change):
    raw = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(raw)))


DAMAGES = {
    "cut short": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "a header that is no JSON": lambda raw: raw[:8] + b"x" * 40 + raw[48:],
    "another format": lambda raw: b"PK\x03\x04" + raw,
    "text": lambda raw: b"hello, world\n" * 10,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_line_that_names_it(damage, drawn, tmp_path):
    drawn("kept batchnorm").save(tmp_path)
    damaged(tmp_path / FILE, damage)
    refused(tmp_path)


def refused(folder):
    with pytest.raises(UserError) as caught:
        ModelSet.load(folder)
    assert str(folder / FILE) in str(caught.value) and "\n" not in str(caught.value)


ABOUT = {"kind": "stacked", "size": 1, "settings": {}, "network": None}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"about": "no json"},
        {"about": "[]"},
        {"about": json.dumps({"kind": "unheard of"})},
        {"about": json.dumps({k: v for k, v in ABOUT.items() if k != "settings"})},
        {"about": json.dumps({**ABOUT, "kind": "diagonal"})},
        {"about": json.dumps({**ABOUT, "colour": "blue"})},
    ],
    ids=str,
)
def test_a_foreign_safetensors_file_is_refused(metadata, tmp_path):
    save_file({"state/w": torch.zeros(3)}, tmp_path / FILE, metadata=metadata)
    refused(tmp_path)


def test_tensors_of_an_unknown_group_are_refused(tmp_path):
    save_file({"weights": torch.zeros(3)}, tmp_path / FILE, metadata={"about": json.dumps(ABOUT)})
    refused(tmp_path)


def test_a_missing_file_is_one_line(tmp_path):
    refused(tmp_path)


def test_a_member_outside_the_set_is_one_line(drawn):
    for index in (-1, 3):
        with pytest.raises(UserError, match=f"member={index} is not in the set: it has members 0 to 2"):
            drawn("diagonal").member(index)


@pytest.mark.parametrize("name", GENERATORS | MORE)
@pytest.mark.parametrize("max_members", [1, 2, 3, 100])
def test_members_do_not_depend_on_the_block_size(name, max_members, drawn):
    model_set = drawn(name)
    whole, seen = model_set.block(0, model_set.size), 0
    for block in model_set.blocks(max_members):
        assert block.start == seen and block.size <= max_members
        for i in range(block.size):
            for found, wanted in zip(block.member(i), whole.member(seen + i)):
                assert all(torch.equal(leaf, wanted[n]) for n, leaf in found.items())
        seen += block.size
    assert seen == model_set.size


def test_a_members_noise_is_a_function_of_seed_member_and_stream_alone():
    cpu = torch.device("cpu")
    wanted = member_noise(5, 3, 100, cpu)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(77)
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = member_noise(5, 3, 100, cpu)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_rng_state(state)
    assert torch.equal(found, wanted) and found.dtype == torch.float32
    assert torch.equal(state, torch.get_rng_state())
    others = [member_noise(6, 3, 100, cpu), member_noise(5, 4, 100, cpu), member_noise(5, 3, 100, cpu, "low rank")]
    assert not any(torch.equal(wanted, other) for other in others)


def test_noise_is_standard_normal_and_independent_between_members():
    noise = torch.stack([member_noise(0, k, 2000, torch.device("cpu")).double() for k in range(50)])
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / n**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / n) ** 0.5
    off = torch.corrcoef(noise) - torch.eye(50)
    assert float(off.abs().max()) < 5 / 2000**0.5  # 1,225 correlations


@pytest.mark.parametrize(
    ("name", "leaves"),
    [("stacked", "all and statistics"), ("lowrank", "all and statistics"), ("kept batchnorm", "all")],
)
def test_bytes_per_member_are_those_of_its_own_leaves(name, leaves, drawn, problem):
    weights = sum(p.nbytes for p in problem.base.params.values())
    statistics = sum(b.nbytes for b in problem.base.buffers.values())
    assert drawn(name).bytes_per_member() == weights + (statistics if "statistics" in leaves else 0)


def test_shared_leaves_cost_nothing_per_member(drawn, problem):
    last = replace(drawn("last layer"), stacked_buffers={}, shared_buffers=problem.base.buffers)
    assert last.bytes_per_member() == 99 * 4  # 32 x 3 weights and 3 biases in float32
    assert drawn("identical").bytes_per_member() == 0
    assert drawn("output").bytes_per_member() == 4


@pytest.mark.parametrize("name", GENERATORS | MORE)
def test_a_set_moves_to_a_device_as_a_whole(name, drawn, problem):
    original = replace(drawn(name), network={"outputs": 3}, failed=[1])
    moved = original.to(torch.device("meta"))
    leaves = {**moved.shared_params, **moved.shared_buffers, **moved.stacked_buffers, **moved.tensors()}
    assert leaves and all(leaf.device.type == "meta" for leaf in leaves.values())
    assert type(moved) is type(original) and moved.network == original.network
    stays = original.to(torch.device("cpu"))
    assert moved.failed == stays.failed == [1]
    assert (stays.size, stays.notes, stays.deployable, stays.batchnorm, stays.diagnostics) == (
        original.size,
        original.notes,
        original.deployable,
        original.batchnorm,
        original.diagnostics,
    )
    for found, wanted in zip(stays.block(1, 2).member(0), original.block(1, 2).member(0)):
        assert all(torch.equal(leaf, wanted[n]) for n, leaf in found.items())
    assert all(p.device.type == "cpu" for p in original.shared_params.values()), "the original stays where it was"


def test_more_than_ten_leaves_keep_their_order_in_a_file(tmp_path):
    """Names in a file are sorted as text, where leaf 10 comes before leaf 2."""
    mean = {f"layer.{chr(ord('z') - i)}": torch.full((2,), float(i)) for i in range(13)}
    diagonal = DiagonalSet(1, {}, {}, mean=mean, factors={"sd": torch.arange(26.0)}, seed=1)
    factors = {f"values.{i}.0": torch.full((2,), 10.0**i) for i in range(13)}
    factors |= {f"vectors.{i}.0": torch.eye(2) for i in range(13)}
    kronecker = KroneckerSet(1, {}, {}, mean=mean, factors=factors, seed=1)
    for model_set in (diagonal, kronecker):
        model_set.save(tmp_path)
        loaded = ModelSet.load(tmp_path)
        assert list(loaded.leaves(0)) == list(mean)
        assert all(torch.equal(leaf, model_set.leaves(0)[n]) for n, leaf in loaded.leaves(0).items())


def test_a_seed_of_63_bits_survives_a_file(tmp_path):
    seed = 2**63 - 25
    diagonal = DiagonalSet(1, {}, {}, mean={"w": torch.zeros(3)}, factors={"sd": torch.ones(3)}, seed=seed)
    diagonal.save(tmp_path)
    assert ModelSet.load(tmp_path).seed == seed


def test_leaves_that_share_memory_are_written_apart(tmp_path):
    weights = torch.arange(4.0)
    aliased = StackedSet(2, {"a": weights, "b": weights[:2]}, {}, params={"w": weights.expand(2, 4)})
    aliased.save(tmp_path)
    loaded = ModelSet.load(tmp_path)
    assert torch.equal(loaded.params["w"], weights.repeat(2, 1)) and torch.equal(loaded.shared_params["b"], weights[:2])
    loaded.shared_params["a"][0] = 9
    assert float(loaded.params["w"][0, 0]) == 0


@pytest.mark.parametrize("name", ["diagonal", "lowrank", "kronecker"])
def test_a_sets_noise_is_its_members_noise(name, drawn):
    model_set = drawn(name)
    noise = model_set.noise(2, 50)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, member_noise(model_set.seed, 2, 50, torch.device("cpu")))
