"""Images that are streamed give the same numbers as resident ones, and a run on films decodes them once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark import streaming
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.predict import STRATEGIES, predict
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.benchmark.streaming import StreamedImages, on_device
from multiplicity_bench.benchmark.toy import problem_of, toy_problem
from multiplicity_bench.benchmark.train import Training, gradient_norm, train
from multiplicity_bench.datasets import api, decoding
from multiplicity_bench.datasets.api import Data, Split
from multiplicity_bench.datasets.films import Films, Rendering
from multiplicity_bench.datasets.stored import StoredImages
from multiplicity_bench.generators.api import GENERATORS, Memory, Part
from multiplicity_bench.generators.jacobian import root_rows
from multiplicity_bench.generators.surface import NetworkSurface
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_room(monkeypatch):
    monkeypatch.setattr(streaming, "RESIDENT_SHARE", 0.0)


def streamed(images: torch.Tensor) -> StreamedImages:
    """Return the images as a part has them that does not fit: from an array on disk, as far as anyone can tell."""
    found = on_device(StoredImages(images.numpy()), CPU)
    assert isinstance(found, StreamedImages)
    return found


def streamed_part(part: Part) -> Part:
    return Part(streamed(part.images), part.labels)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (90, 1, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """The number of images of every read."""
    counts: list[int] = []
    fetch = streaming.Host.fetch
    monkeypatch.setattr(streaming.Host, "fetch", lambda host, rows: counts.append(rows.size) or fetch(host, rows))
    return counts


def test_images_are_resident_where_they_fit_and_streamed_where_not(images, monkeypatch):
    source = StoredImages(images.numpy())
    monkeypatch.setattr(streaming, "RESIDENT_SHARE", 0.3)
    monkeypatch.setattr(streaming, "_free_memory", lambda device: images.nbytes / 0.3 + 1)
    monkeypatch.setattr("multiplicity_bench.datasets.stored.BLOCK_BYTES", 7 * 30)
    found = on_device(source, CPU)
    assert type(found) is torch.Tensor and torch.equal(found, images)
    monkeypatch.setattr(streaming, "_free_memory", lambda device: images.nbytes / 0.3 - 1)
    assert isinstance(on_device(source, CPU), StreamedImages)
    held = on_device(images.numpy(), CPU)
    assert type(held) is torch.Tensor and held.data_ptr() == images.data_ptr(), "an array on a CPU is there already"


def test_free_memory_is_between_nothing_and_all_there_is():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < streaming._free_memory(CPU) <= int(lines["MemTotal"].split()[0]) * 1024


def test_streamed_images_describe_themselves_without_being_read(images, fetched):
    found = streamed(images)
    assert isinstance(found, torch.Tensor) and found.shape == images.shape and found.size(0) == len(found) == 90
    assert (found.dtype, found.device, found.ndim, found.nbytes) == (torch.uint8, CPU, 4, images.nbytes)
    assert not found.is_cuda and not found.requires_grad and "StreamedImages" in repr(found)
    parts = found[10:50], found.detach(), found[::3], *found.split(40)
    assert [len(part) for part in parts] == [40, 90, 30, 40, 40, 10] and fetched == []


@pytest.mark.parametrize(
    "key",
    [
        7,
        -1,
        slice(3, 60),
        slice(None, None, 7),
        slice(-5, None),
        slice(80, 300),
        torch.tensor([5, 5, 0, 89, -3]),
        torch.zeros(0, dtype=torch.long),
        torch.arange(90) % 4 == 0,
        torch.tensor([[1, 2], [3, 4]]),
        [4, 2],
        (slice(None), 0),
        (torch.tensor([3, 4]), 0, slice(2)),
        None,
    ],
    ids=str,
)
def test_what_is_asked_for_is_what_a_tensor_gives(images, key):
    found = streamed(images)[key]
    assert found.shape == images[key].shape
    torch.testing.assert_close(found + 0, images[key], rtol=0, atol=0)


def test_indices_read_only_their_rows_and_give_ordinary_tensors(images, fetched):
    found = streamed(images)
    rows = torch.randperm(90)
    assert type(found[rows[:8]]) is type(found[2]) is torch.Tensor
    assert type(found[20:60][rows[:5] % 40]) is torch.Tensor
    assert fetched == [8, 1, 5]


@pytest.mark.parametrize("size", [1, 40, 90, 100])
def test_chunks_are_those_of_a_tensor_and_read_one_after_the_other(images, size, fetched):
    chunks = list(zip(streamed(images).split(size), images.split(size), strict=True))
    assert fetched == []
    for found, expected in chunks:
        assert torch.equal(found.float(), expected.float()) and torch.equal(found.double(), expected.double())
    assert fetched == [len(expected) for _, expected in chunks], "what is used twice is read once"


def test_a_chunk_that_is_too_large_is_not_kept(images, fetched, monkeypatch):
    monkeypatch.setattr(streaming, "KEPT_BYTES", 30 * 39)
    found = streamed(images)
    for chunk in (found[:40], found[:39]):
        assert torch.equal(chunk.float(), chunk.float())
    assert fetched == [40, 40, 39]


def test_whatever_else_is_computed_from_them_is_what_a_tensor_gives(images):
    found = streamed(images)
    assert np.array_equal(found.detach().cpu().numpy(), images.numpy())
    assert torch.equal(torch.cat([found[:2], images[:1]]), torch.cat([images[:2], images[:1]]))
    assert torch.equal(found[:5].repeat(2, 1, 1, 1), images[:5].repeat(2, 1, 1, 1))
    weights = torch.rand(5, requires_grad=True)
    (found.float() @ weights).sum().backward()
    torch.testing.assert_close(weights.grad, images.float().sum((0, 1, 2)))


@pytest.mark.parametrize("in_dims", [0, None])
def test_functions_are_vectorised_over_them(images, in_dims):
    weights = torch.rand(90, 5)

    def score(image: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda w: ((image.float() @ w) ** 2).mean())(w)

    over = torch.func.vmap(score, in_dims=(in_dims, 0))
    torch.testing.assert_close(over(streamed(images), weights), over(images, weights))


def test_a_loader_batches_them(images):
    loader = DataLoader(TensorDataset(streamed(images), torch.arange(90)), batch_size=32)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), images)


def network_and_part() -> tuple[Network, Part]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (70, 1, 8, 8), generator=generator).to(torch.uint8)
    return Network({"name": "smallcnn", "width": 4, "norm": "batch"}, 1, 8, 2), Part(images, torch.arange(70) % 2)


@pytest.mark.parametrize("resample_seed", [None, 3])
def test_training_on_streamed_images_gives_the_same_weights(resample_seed):
    network, part = network_and_part()
    recipe = Training(epochs=2, polish=2)
    trained = [train(network, data, recipe, 0, resample_seed=resample_seed) for data in (part, streamed_part(part))]
    for leaves in ("params", "buffers"):
        for resident, moved in zip(*(getattr(one, leaves).values() for one in trained), strict=True):
            assert torch.equal(resident, moved)
    assert trained[0].losses == trained[1].losses
    norms = [gradient_norm(network, data, recipe, trained[0]) for data in (part, streamed_part(part))]
    assert norms[0] == norms[1]


def test_training_holds_no_more_than_a_batch_at_once(fetched):
    network, part = network_and_part()
    train(network, streamed_part(part), Training(epochs=1, batch_size=16), 0)
    assert fetched == [16, 16, 16, 16, 6]


def made(name: str, **settings):
    generator = GENERATORS.get(name)(**settings)
    generator.name = name
    return generator


CASES = {
    "laplace by laplace-torch": ("laplace", {"structure": "kron"}),
    "laplace, diagonal": ("laplace", {"structure": "diag", "prior_precision": "marglik"}),
    "laplace, exact": ("laplace", {"structure": "full", "prior_precision": "marglik"}),
    "geodesics": ("riemannian_laplace", {"prior_precision": "100"}),
    "geodesics of the linearised network": (
        "riemannian_laplace",
        {"linearised": True, "metric_images": "all", "prior_precision": "100"},
    ),
    "noise by image": ("logit_noise", {}),
    "swag": ("swag", {}),
}


@pytest.fixture(scope="module")
def resident_problem():
    return toy_problem(members=3)


@pytest.mark.parametrize("case", CASES)
def test_a_generator_gives_the_same_set_and_predictions(case, resident_problem, monkeypatch):
    monkeypatch.setattr(NetworkSurface, "_faster", lambda *_: "loop")  # timing would choose, and rounding differ
    problem = resident_problem
    name, settings = CASES[case]
    moved = problem_of(
        problem.network, streamed_part(problem.train), streamed_part(problem.tune), Training(epochs=8, lr=0.01), 3
    )
    expected = made(name, **settings).generate(replace(problem, checkpoint=Memory()), 5)
    found = made(name, **settings).generate(moved, 5)
    assert expected.diagnostics == found.diagnostics
    for strategy in STRATEGIES if name != "logit_noise" else ("loop",):
        np.testing.assert_array_equal(
            predict(problem.network, found, moved.tune.images, strategy=strategy),
            predict(problem.network, expected, problem.tune.images, strategy=strategy),
        )


def test_the_exact_curvature_of_streamed_images_reads_a_chunk_at_a_time(resident_problem, fetched):
    problem = replace(resident_problem, train=streamed_part(resident_problem.train))
    names = list(problem.base.params)
    rows = torch.cat(list(root_rows(problem, names, problem.train)))
    assert torch.equal(rows, torch.cat(list(root_rows(problem, names, resident_problem.train))))
    assert max(fetched) <= 64 < len(problem.train)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_on_cuda_images_are_moved_when_they_are_used_and_give_what_resident_ones_give(images):
    resident, found = images.cuda(), on_device(images.numpy(), torch.device("cuda"))
    assert isinstance(found, StreamedImages) and found.is_cuda and found.device == resident.device
    rows = torch.randperm(90)
    for index in (rows, rows.cuda(), 4, rows.cuda() > 30):
        assert torch.equal(found[index], resident[index]) and found[index].device == resident.device
    for moved, expected in zip(found.split(40), resident.split(40), strict=True):
        assert torch.equal(moved.float(), expected.float())
    assert np.array_equal(found.detach().cpu().numpy(), images.numpy())


@dataclass
class Radiographs:
    """A dataset of films of 28 pixels that says what could not be read."""

    root: str = ""
    size: int = 28
    version = 1

    def load(self, data_root: Path | None = None) -> Data:
        splits = {}
        for name, count in (("train", 80), ("val", 40), ("test", 40)):
            files = [f"{name}{k}.png" for k in range(count)]
            films = Films(Path(self.root), files, Rendering(self.size), "exclude")
            splits[name] = Split(films, np.arange(count) % 2, np.arange(count))
        return Data("films", "binary", ["no", "yes"], splits, positive=1)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    for name, count in (("train", 80), ("val", 40), ("test", 40)):
        for k in range(count):
            pixels = rng.integers(0, 200, (32, 32)) + 40 * (k % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{name}{k}.png")
    (root / "val3.png").write_bytes(b"broken")
    return root


@pytest.fixture
def spec_of(make_spec, films):
    def make(folder: Path, *overrides: str, **settings):
        spec = make_spec(folder, *overrides)
        return replace(
            spec,
            dataset=Radiographs(str(films), **settings),
            options=replace(spec.options, data_root=str(films)),
            names={**spec.names, "dataset": "films"},
        )

    return make


def test_a_run_on_streamed_films_ends_in_the_record_of_resident_ones(
    spec_of, run_to_end, assert_equal_records, tmp_path, monkeypatch
):
    resident = run_to_end(spec_of(tmp_path / "resident", "generator=swag"))
    monkeypatch.setattr(api, "RESIDENT_BYTES", 0)
    run = Run(spec_of(tmp_path / "streamed", "generator=swag"), Session())
    assert isinstance(run.data.splits["train"].images, StoredImages)
    assert all(isinstance(run.part(name).images, StreamedImages) for name in ("train", "tune", "val", "test"))
    streamed_run = run_to_end(spec_of(tmp_path / "streamed", "generator=swag"))
    assert resident.record["status"] == "ok"
    assert_equal_records(resident.record, streamed_run.record)


def test_films_are_decoded_once_into_the_store_and_exclusions_are_said_at_every_loading(
    spec_of, tmp_path, monkeypatch, capsys
):
    session, said = Session(), "films: 1 of 160 films cannot be read and are left out: val3.png"
    first = Run(spec_of(tmp_path), session)
    Run(spec_of(tmp_path, "generator=identical"), session)
    assert capsys.readouterr().err.splitlines().count(said) == 1
    assert len(first.data.splits["val"]) == 39
    assert said.removeprefix("films: ") in first.data.notes
    (artifact,) = (p for p in (tmp_path / "artifacts" / "images").iterdir() if p.is_dir())
    assert {p.name for p in artifact.iterdir()} == {"images.npy", "unreadable.json", "manifest.json"}
    monkeypatch.setattr(decoding, "decode", lambda path, rendering: pytest.fail("decoded again"))
    assert Run(spec_of(tmp_path), Session()).data.digest == first.data.digest
    assert capsys.readouterr().err.splitlines().count(said) == 1


def test_clean_keeps_the_films_of_records_and_removes_others(spec_of, run_to_end, tmp_path, leaderboard):
    done = run_to_end(spec_of(tmp_path, "generator=identical"))
    needed = {p.name for p in (tmp_path / "artifacts" / "images").iterdir() if p.is_dir()}
    Run(spec_of(tmp_path, size=16), Session())
    other = replace(spec_of(tmp_path), names={"dataset": "other", "network": "mlp", "generator": "identical"})
    Run(other, Session())
    folders = lambda: {p.name for p in (tmp_path / "artifacts" / "images").iterdir() if p.is_dir()}  # noqa: E731
    assert len(folders()) == 3 and len(needed) == 1
    answer = leaderboard("clean", "--remove", "--artifacts", str(done.artifacts), "--records", f"{tmp_path}/records")
    assert answer.code == 0 and folders() == needed
