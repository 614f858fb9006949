"""What shifted views cost: the board's views of a set, corruptions, and attacks on a set against a plain loop."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..datasets.api import default_data_root
from ..datasets.corruptions import CORRUPTIONS, cannot, corrupt
from ..datasets.phantom_cxr import PhantomCXR
from ..leaderboard.cells import settle
from ..leaderboard.cli import FOLDER
from ..leaderboard.record import read_all
from ..leaderboard.suite import load_suite
from ..metrics.evaluation import evaluate
from .attacks import Attack, attack, choose_attack_strategy, predict_each
from .board import spec_of
from .networks import Network
from .speed_baselines import diagonal_set
from .stages import Run, Session
from .timing import compare, timed
from .views import shifted

MEMBERS, IMAGES = 20, 128


def pgd_smallcnn_20(device: torch.device) -> dict[str, Any]:
    """Time PGD of ten steps on 128 images for each of 20 members of smallcnn against a plain loop over the members.

    Both start at random, take signed steps, project, and predict the attacked images; ours also keeps the strongest
    change of every case. The loop takes all 128 images at once.
    """
    split = PhantomCXR(train=IMAGES, val=50, test=50).load(None).splits["train"]
    images, labels = (torch.from_numpy(a).to(device) for a in (split.images, split.labels))
    network = Network({"name": "smallcnn"}, 1, 28, 2)
    members = diagonal_set(network, MEMBERS, device)
    chosen, block = Attack("pgd"), members.block(0, MEMBERS)
    strategy = choose_attack_strategy(network, members, images)

    def ours() -> None:
        changed = attack(network, block, images, labels, chosen, 0, strategy)
        predict_each(network, block, changed, strategy).cpu()

    def loop() -> None:
        clean, radius, step = images.float(), 255 * chosen.radius, 255 * chosen.step_length
        for k in range(MEMBERS):
            module = network.module(*block.member(k)).requires_grad_(False)
            x = (clean + radius * (2 * torch.rand_like(clean) - 1)).clamp(0, 255)
            for _ in range(chosen.step_count):
                x.requires_grad_(True)
                (gradient,) = torch.autograd.grad(cross_entropy(module(x), labels, reduction="sum"), x)
                x = clean + (x.detach() + step * gradient.sign() - clean).clamp(-radius, radius)
                x = x.clamp(0, 255)
            with torch.no_grad():
                module(x).cpu()

    return compare("pgd_smallcnn_20", device, ours, loop) | {"text": f"strategy {strategy}"}


def views_breastmnist_20() -> tuple[str, str]:
    """Time all views and evidence of the suite breastmnist for the first 20 members of its swag set."""
    what = "the board's views and evidence of BreastMNIST, 20 members of swag, shadow networks of the dataset apart"
    if not (default_data_root() / "medmnist" / "breastmnist.npz").is_file():
        return what, "not measured"
    suite = load_suite("breastmnist")
    record = next(r for r in settle(suite, read_all(FOLDER / "records")).records if r["row"] == "swag")
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(record, data_root=None, artifacts_dir=folder, records_dir=folder)
        spec.options.threads = 0
        spec.options.views, spec.options.evidence = list(suite.views), list(suite.evidence)
        run = Run(spec, Session())
        model_set = run.model_set()
        parts = run.predictions(model_set)
        accepted = evaluate(parts["val"], parts["test"], spec.settings, names=["accuracy"]).accepted
        if "membership" in spec.options.evidence:
            from .shadows import shadows

            shadows(run)
        start = time.perf_counter()
        found = shifted(run, model_set, parts, accepted, "loop")
        seconds = time.perf_counter() - start
    slowest = sorted(found.seconds.items(), key=lambda item: -item[1])[:3]
    return what, f"{seconds:.0f} s; of these {', '.join(f'{name} {s:.0f} s' for name, s in slowest)}"


def corruption_rates() -> tuple[str, str]:
    """Time every corruption of 2,000 images of 28 pixels at severity 3, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        grey = torch.from_numpy(PhantomCXR(train=2000, val=50, test=50).load(None).splits["train"].images)
        rates = {}
        for name in CORRUPTIONS:
            channels = 3 if cannot(name, "pathmnist", 1, 28) and cannot(name, "phantom_cxr", 1, 28) else 1
            images = grey.expand(-1, channels, -1, -1).contiguous()
            corrupt(images[:50], name, 3, 0)
            rates[name] = len(images) / min(timed(partial(corrupt, images, name, 3, 0)) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    slow = sorted(rates.items(), key=lambda item: item[1])[:4]
    said = ", ".join(f"{name} {rate:,.0f}" for name, rate in slow)
    return (
        "corruptions of 28 pixels, images per second on one thread",
        f"slowest {said}, the other {len(rates) - len(slow)} more",
    )


MEASURES = (pgd_smallcnn_20,)
FIGURES = (views_breastmnist_20, corruption_rates)
