"""`make speed`: what things cost, as ratios measured side by side in one run, written to SPEED.md and speed.json.

A ratio is baseline / ours at equal work: above 1, ours is faster. Each pair is timed alternately (ours, baseline, ours,
...), at least five times after a warm-up, with the device synchronised; the table shows medians and the spread
(maximum - minimum) / median of ours. Baselines are plain PyTorch or numpy as a careful user would write them. Rows that
take minutes are timed less often, each says how; those of geodesics run on one thread either side, on fewer members.

Arguments measure a subset, which replaces the rows and figures of those names and keeps the others:
`python -m multiplicity_bench.benchmark.speed geodesic_mlp_s100 growth_with_images`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.api import default_data_root
from ..datasets.decoding import decode_films
from ..datasets.films import Films, Rendering
from ..datasets.phantom_cxr import PhantomCXR
from ..datasets.stored import StoredImages
from ..generators.api import WAYS, Part
from ..leaderboard.science import Evidence, parts
from ..metrics.api import Predictions, Settings
from ..metrics.decisions import disagreement, votes
from ..metrics.evaluation import evaluate
from ..metrics.strata import fit_clusters
from ..metrics.uncertainty import AT_K
from .ensemble import AT_ONCE
from .memory import PeakMemory
from .networks import Network
from .predict import predict
from .provenance import device_name
from .speed_baselines import Retraining, diagonal_set, phantom_part, plain_prediction, plain_training, plain_trainings
from .store import Store
from .streaming import FilmStore, Host, StreamedImages
from .timing import compare, timed
from .train import Training, train

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    """Measure the named rows and figures (none: all), on the CPU and on a GPU where there is one; write both files."""
    from . import speed_growth, speed_views

    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    measures, figures = all_measures()
    on_devices = (*MEASURES, *speed_views.MEASURES, *speed_growth.MEASURES)
    known = {f.__name__ for f in (*measures, *figures)}
    if unknown := sorted(set(names) - known):
        raise SystemExit(f"{unknown[0]} is no row or figure: {', '.join(sorted(known))}")
    chosen = set(names) or known
    results: dict[str, list[dict[str, Any]]] = {}
    for measure in measures:
        if (name := measure.__name__) in chosen:
            found = [measure(device) for device in devices] if measure in on_devices else [measure()]
            results[name] = [row for rows in found for row in (rows if isinstance(rows, list) else [rows])]
            for row in results[name]:
                what = f"{name} {row.get('size', '')}"
                print(f"{what:<36} {row['device']:<5} {row['ratio']:.2f} x", file=sys.stderr)
    here = device_name(devices[0])
    measured = dict(f() for f in figures if f.__name__ in chosen)
    values = {what: value if value == "not measured" else f"{value} ({here})" for what, value in measured.items()}
    for what, value in values.items():
        print(f"{what}: {value}", file=sys.stderr)
    kept: list[dict[str, Any]] = []
    if names:  # what was not measured now stays
        kept = [r for r in json.loads((HERE / "speed.json").read_text(encoding="utf-8")) if r["name"] not in results]
        values = figures_of((HERE / "SPEED.md").read_text(encoding="utf-8")) | values
    order = [f.__name__ for f in measures]
    rows = [row for row in (*kept, *(row for found in results.values() for row in found)) if row["name"] in order]
    rows.sort(key=lambda row: (row["device"], order.index(row["name"]), row.get("size", 0)))
    (HERE / "speed.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (HERE / "SPEED.md").write_text(render(rows, values), encoding="utf-8")
    print(f"{HERE / 'SPEED.md'}")


def all_measures() -> tuple[list[Callable[..., Any]], list[Callable[[], tuple[str, str]]]]:
    """Return the functions that measure a row, or several of growing size, and those that measure figures."""
    from . import speed_curvature, speed_geodesics, speed_growth, speed_metrics, speed_views

    figures = [phantom_rate, memory_of_1000_members, science_200x20000, strata_20000x512]
    figures += [*speed_views.FIGURES, *speed_curvature.FIGURES, *speed_metrics.FIGURES]
    figures += [*speed_geodesics.FIGURES, *speed_growth.FIGURES]
    measures: list[Callable[..., Any]] = [
        *MEASURES,
        *DECODING,
        *speed_views.MEASURES,
        *speed_curvature.MEASURES,
        *speed_metrics.MEASURES,
        *speed_geodesics.MEASURES,
        *speed_growth.MEASURES,
        *speed_growth.ON_CPU,
    ]
    return measures, figures


def train_smallcnn(device: torch.device) -> dict[str, Any]:
    """Time two epochs of the recipe on 546 images against a plain PyTorch loop with the same batches and optimiser."""
    data = phantom_part(546, device)
    network, recipe = Network({"name": "smallcnn"}, 1, 28, 2), Training(epochs=2)
    return compare(
        "train_smallcnn",
        device,
        lambda: train(network, data, recipe, 0),
        lambda: plain_training(network, data, recipe),
    )


def train_ensemble_smallcnn(device: torch.device) -> dict[str, Any]:
    """Time the training of several smallcnn (32 on a GPU, 4 on a CPU) on 256 images against as many plain loops.

    All at once where the device makes that faster, else one by one; what all at once would take is given beside it.
    """
    return _ensemble("train_ensemble_smallcnn", {"name": "smallcnn"}, 256, 4, device)


def train_ensemble_resnet18(device: torch.device) -> dict[str, Any]:
    """Time the training of several resnet18 (32 on a GPU, 2 on a CPU; 28 pixels, BatchNorm) on 64 images likewise."""
    return _ensemble("train_ensemble_resnet18", {"name": "resnet18", "norm": "batch"}, 64, 2, device)


def _ensemble(name: str, network: dict[str, Any], images: int, on_a_cpu: int, device: torch.device) -> dict[str, Any]:
    data, function, recipe = phantom_part(images, device), Network(network, 1, 28, 2), Training(epochs=1)
    members = AT_ONCE if device.type == "cuda" else on_a_cpu
    ours = Retraining(function, data, recipe, members)
    row = compare(name, device, ours, partial(plain_trainings, function, data, recipe, members))
    told = f"on the {device.type} " + ("one by one" if ours.how.members == 1 else f"all at once by {ours.how.way}")
    for way in WAYS:
        at_once = partial(ours.together, ours.plans, way=way)
        at_once()
        told += f"; all at once by {way} takes {timed(at_once, device) / row['baseline_s']:.2f} x the loops"
    return row | {"text": told}


def predict_set_smallcnn(device: torch.device) -> dict[str, Any]:
    """Time the prediction of 50 sampled members on 500 images against the usual `vector_to_parameters` loop.

    The loop's network is made of torch's own layers; ours pools faster where it takes no gradients.
    """
    data = phantom_part(500, device)
    network = Network({"name": "smallcnn"}, 1, 28, 2)
    members = diagonal_set(network, 50, device)
    return compare(
        "predict_set_smallcnn",
        device,
        lambda: predict(network, members, data.images),
        lambda: plain_prediction(network, members, data.images),
    )


def disagreement_1000x10000(device: torch.device) -> dict[str, Any]:
    """Time mean pairwise disagreement of 1,000 members on 10,000 cases against a numpy loop over 2,000 of the pairs.

    The loop is timed on 2,000 of the 499,500 pairs and scaled up. Metrics run on the CPU whatever the device.
    """
    generator = np.random.default_rng(0)
    decisions = (generator.random((1000, 10_000)) < generator.random(10_000)).astype(np.int64)
    pairs = generator.integers(0, 1000, (2000, 2))

    def loop() -> None:
        sum(float((decisions[a] != decisions[b]).mean()) for a, b in pairs)

    row = compare("disagreement_1000x10000", device, lambda: disagreement(votes(decisions, 2)), loop)
    scale = 499_500 / len(pairs)
    return row | {"baseline_s": row["baseline_s"] * scale, "ratio": row["ratio"] * scale}


def phantom_rate() -> tuple[str, str]:
    """Return how many phantom images of 28 pixels are rendered per second."""
    start = time.perf_counter()
    PhantomCXR(train=4000, val=100, test=100).load(None)
    return "phantom_cxr, 28 pixels", f"{4200 / (time.perf_counter() - start):,.0f} images per second"


def memory_of_1000_members() -> tuple[str, str]:
    """Return the peak memory above the data of 1,000 smallcnn members predicted and scored on 10,000 images.

    The network runs on 200 images; their logits are repeated 50 times into an array of the full size, which is data:
    what grows with images in prediction is that array alone.
    """
    device = torch.device("cpu")
    network, data = Network({"name": "smallcnn"}, 1, 28, 2), phantom_part(200, device)
    members = diagonal_set(network, 1000, device)
    logits = np.zeros((1000, 10_000, 2), np.float32)
    labels = np.tile(data.labels.numpy(), 50)
    memory = PeakMemory(device)

    def write(block: Any, values: Tensor) -> None:
        logits[block.start : block.start + block.size] = np.tile(values.numpy(), (1, 50, 1))

    start = time.perf_counter()
    predict(network, members, data.images, write=write)
    val, test = (Predictions(logits[:, rows], logits[0, rows], labels[rows], "binary", name, 1) for name, rows in VIEWS)
    evaluate(val, test, Settings(epsilon=10.0, draws=0))
    peak, seconds = memory.peak(), time.perf_counter() - start
    size = "not measured" if peak is None else f"{(peak - logits.nbytes) / 2**30:.2f} GiB above the data"
    return "1,000 members of smallcnn on 10,000 images, predicted (200 of them) and scored", f"{size}, {seconds:.0f} s"


def science_200x20000() -> tuple[str, str]:
    """Return how long all of the science takes for 200 members on 20,000 cases of 10 classes with 1,000 draws.

    Two sets of that size, one the retrainings that the other is held against; 20,000 cases on val, too.
    """
    members, cases, classes = 200, 20_000, 10
    settings = Settings(epsilon=1.0, k=5, draws=1000)
    record = {
        "scores": {f"{name}{at}": {"value": 0.1} for name in AT_K for at in ("", "@5")}
        | {"accuracy.base": {"value": 1}},
        "cost": {"fixed_cost_bt": 1.0, "marginal_cost_bt": 0.1},
    }

    def view(name: str, noise: float) -> Predictions:
        of_view, of_set = np.random.default_rng(len(name)), np.random.default_rng([len(name), int(100 * noise)])
        labels = of_view.integers(classes, size=cases)
        base = of_view.normal(size=(cases, classes)).astype(np.float32)
        base[np.arange(cases), labels] += 3.0
        logits = np.empty((members, cases, classes), np.float16)
        for m in range(members):
            logits[m] = base + noise * of_set.standard_normal((cases, classes), np.float32)
        return Predictions(logits, base, labels, "multiclass", name, attributes={"sex": np.arange(cases) % 2})

    memory, start = PeakMemory(torch.device("cpu")), time.perf_counter()
    cells = {
        row: {0: Evidence(record, view("val", noise), view("test", noise), settings)}
        for row, noise in (("laplace", 0.4), ("retrain", 0.5))
    }
    made = time.perf_counter() - start
    parts(cells, settings.k, settings.epsilon, 0.01, {"retrain"})
    peak, seconds = memory.peak(), time.perf_counter() - start - made
    size = "not measured" if peak is None else f"{peak / 2**30:.1f} GiB"
    return "the science of 200 members (and 200 retrainings) on 20,000 cases of 10 classes", f"{seconds:.0f} s, {size}"


def strata_20000x512() -> tuple[str, str]:
    """Measure the search for hidden strata in 20,000 cases of 512 features and two classes, three clouds in each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=20_000)
    centres = rng.normal(size=(2, 3, 512))
    features = centres[labels, rng.integers(3, size=20_000)] + rng.normal(size=(20_000, 512))
    start = time.perf_counter()
    found = fit_clusters(features, labels, 0)
    found.assign(features, labels)
    return (
        "hidden strata found in 20,000 cases of 512 features, and all assigned",
        f"{time.perf_counter() - start:.1f} s, {found.count} strata of 6",
    )


def data_wait(device: torch.device) -> dict[str, Any]:
    """Time an epoch of smallcnn on 2,000 images of 64 pixels that are streamed from a file, against resident ones.

    The share of the streamed epoch that is spent reading images and moving them to the device is given beside it; the
    file is in the system's cache.
    """
    images = np.random.default_rng(0).integers(0, 256, (2000, 1, 64, 64), dtype=np.uint8)
    labels = (torch.arange(len(images)) % 2).to(device)
    network, recipe = Network({"name": "smallcnn"}, 1, 64, 2), Training(epochs=1)
    waited: list[float] = []

    class Timed(Host):
        def fetch(self, rows: np.ndarray) -> Tensor:
            start = time.perf_counter()
            found = super().fetch(rows)
            waited[-1] += time.perf_counter() - start
            return found

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        stored = StoredImages(np.load(Path(folder) / "images.npy", mmap_mode="r", allow_pickle=False))
        streamed = Part(StreamedImages(Timed(stored, device), np.arange(len(images))), labels)
        resident = Part(torch.from_numpy(images).to(device), labels)
        epochs: list[float] = []

        def ours() -> None:
            waited.append(0.0)
            epochs.append(timed(lambda: train(network, streamed, recipe, 0), device))

        row = compare("data_wait", device, ours, lambda: train(network, resident, recipe, 0))
    share = statistics.median(wait / epoch for wait, epoch in zip(waited[1:], epochs[1:]))
    return row | {"text": f"{share:.1%} of a streamed epoch on the {device.type} is spent waiting for images"}


def decode_1000_png_64() -> dict[str, Any]:
    """Time decoding 1,000 PNGs to 64 pixels into a file against a loop with Pillow in one process that keeps them.

    The PNGs are those of the real sample (64 pixels) where it is there, else made-up ones of 1024 pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        sample = default_data_root() / "nih_chest_xray14_sample" / "images"
        real = sample.is_dir()
        root = sample if real else _films(Path(folder), 1000)
        row = _decoding("decode_1000_png_64", root, Rendering(64))
    return row | {"text": f"the PNGs were {'the real sample' if real else 'made-up ones of 1024 pixels'}"}


def decode_1024_to_224() -> dict[str, Any]:
    """Time decoding 100 made-up PNGs of 1024 pixels to 224 against a loop with Pillow in one process."""
    with tempfile.TemporaryDirectory() as folder:
        row = _decoding("decode_1024_to_224", _films(Path(folder), 100), Rendering(224))
    return row | {"text": f"{100 / row['ours_s']:.0f} images per second, the loop {100 / row['baseline_s']:.0f}"}


def _decoding(name: str, root: Path, rendering: Rendering) -> dict[str, Any]:
    from PIL import Image

    films = Films(root, sorted(path.name for path in root.iterdir()), rendering)
    size = (rendering.size, rendering.size)

    def loop() -> list[np.ndarray]:
        opened = (Image.open(root / file).convert("L") for file in films.files)
        return [np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in opened]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            decode_films(films, FilmStore(Store(Path(folder)), name))

    return compare(name, torch.device("cpu"), ours, loop)


def _films(folder: Path, count: int) -> Path:
    """Write PNGs of 1024 pixels that compress as radiographs do, to about half."""
    from PIL import Image

    rng, y, x = np.random.default_rng(0), *np.mgrid[:1024, :1024] / 1024
    for k in range(count):
        film = 120 + 80 * np.sin(6 * x + k) * np.cos(5 * y) + rng.normal(0, 2, x.shape)
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(folder / f"{k:04d}.png")
    return folder


MEASURES = (
    train_smallcnn,
    train_ensemble_smallcnn,
    train_ensemble_resnet18,
    predict_set_smallcnn,
    disagreement_1000x10000,
    data_wait,
)
DECODING = (decode_1000_png_64, decode_1024_to_224)
FIGURES_HEAD = "| figure | measured |"
VIEWS = (("val", slice(0, 2000)), ("test", slice(2000, 10_000)))


def figures_of(text: str) -> dict[str, str]:
    """Return the figures of an earlier SPEED.md: they stand nowhere else."""
    table = text.partition(FIGURES_HEAD)[2].strip().splitlines()[1:]
    cells = [line.strip("| ").partition(" | ") for line in table]
    return {what: value for what, _, value in cells}


def render(rows: list[dict[str, Any]], figures: dict[str, str]) -> str:
    """Return SPEED.md."""
    lines = ["# What things cost", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += ["Rows may come from different machines: compare ratios, and seconds only on the same device."]
    lines += ["" if any(row["device"] == "cuda" for row in rows) else "GPU: not measured.\n"]
    single, growing = ([row for row in rows if ("size" in row) is grows] for grows in (False, True))
    names = {row["name"] for row in growing}
    lines += ["| what | device | ratio | ours, s | baseline, s | spread |", "|---|---|---|---|---|---|"]
    lines += [f"| {row['name']} | {_cells(row)} |" for row in single]
    texts = {row["name"]: f" Measured: {row['text']}." for row in single if row.get("text")}
    measures = {f.__name__: " ".join((f.__doc__ or "").split()) for f in all_measures()[0]}
    lines += ["", *(f"- `{name}`: {text}{texts.get(name, '')}" for name, text in measures.items() if name not in names)]
    lines += ["", "## How costs grow", ""]
    lines += [
        "| what | by | size | device | ratio | ours, s | baseline, s | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {row['name']} | {row['by']} | {row['size']:,} | {_cells(row)} |" for row in growing]
    lines += ["", *(f"- `{name}`: {text}" for name, text in measures.items() if name in names)]
    lines += [
        "",
        "## Figures",
        "",
        FIGURES_HEAD,
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in figures.items()),
        "",
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    measured = f"{row['ratio']:.2f} | {row['ours_s']:.3g} | {row['baseline_s']:.3g} | {row['spread']:.0%}"
    return f"{row['device']}: {row['device_name']} | {measured}"


if __name__ == "__main__":
    main(sys.argv[1:])
