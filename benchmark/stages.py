"""The stages of a run: dataset -> base -> model set -> predictions -> scores -> record.

Each finished stage is an artifact; a run that was killed goes on where it stopped. Nothing after `base` sees val or
test except predictions, which are what every metric reads.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..datasets.api import Data, prepare
from ..errors import Diverged, UserError
from ..generators.api import Memory, Part, Problem, Trained
from ..generators.modelset import ModelSet, StackedSet, under
from ..generators.posterior import FromPosterior
from ..identity import array_digest, canonical_json, derive_seed, digest, plain
from ..leaderboard import record as records
from ..leaderboard.predictions import PRECISION, arrays_predictions, predictions_arrays, save_predictions
from ..leaderboard.view_files import SUFFIX, ViewFile, arrays_views, save_views, view_arrays
from ..metrics.api import Predictions
from ..metrics.evaluation import Evaluation, catalogue, evaluate, view_scores
from ..metrics.views import shown_cases
from .devices import explain_lost, is_lost
from .ensemble import Together, trains_together
from .memory import PeakMemory
from .networks import Network
from .objectives import Grouping
from .predict import base_block, choose_strategy, predict, predict_block
from .progress import log, progress
from .provenance import device_name, provenance
from .sections import cost_section, data_section, plain_score, set_section, views_section
from .spec import Spec, set_numerics
from .store import FileCheckpoint, Stopwatch, Store, synchronise
from .streaming import FilmStore, on_device
from .train import bootstrap_rows as bootstrap
from .train import gradient_norm, mean_loss, train
from .views import Shifted, check_views, shifted

WEIGHTS = "weights.safetensors"
VIEWS = ("val", "test")


@dataclass(frozen=True)
class Seen:
    """What was seen beside val and test: as computed, the arrays of its file, and what is read from them."""

    found: Shifted
    arrays: dict[str, np.ndarray]
    file: ViewFile


@dataclass
class Session:
    """What the runs of one process share: the dataset loaded last."""

    datasets: dict[str, Data] = field(default_factory=dict)

    def data(self, spec: Spec) -> Data:
        """Return the prepared dataset of a run, loading each only once; resampled where the run asks for it."""
        key = canonical_json([spec.part("dataset"), spec.options.data_root, spec.options.resample_seed])
        if key not in self.datasets:
            store = Store(Path(spec.options.artifacts_dir), log)
            data = prepare(spec.dataset, spec.options.data_root, cache=FilmStore(store, spec.names["dataset"]))
            for line in data.exclusions:
                log(f"{data.name}: {line}")
            if spec.options.resample_seed is not None:
                split = data.splits["train"]
                patient = None if split.patient is None else torch.from_numpy(split.patient)
                rows = bootstrap(patient, len(split), derive_seed("resample", spec.options.resample_seed))
                data = replace(data, splits={**data.splits, "train": split.take(rows.numpy())})
            self.datasets = {key: data}
        return self.datasets[key]


class Run:
    """One run: `spec` says what, `session` what is loaded already."""

    def __init__(self, spec: Spec, session: Session):
        self.spec, self.session = spec, session
        set_numerics(spec)
        self.data = session.data(spec)
        self.keys = spec.keys(self.data)
        self.store = Store(Path(spec.options.artifacts_dir), log)
        self.device = spec.device
        self._parts: dict[str, Part] = {}
        first = self.data.splits["train"]
        outputs = len(self.data.classes)
        self.network = Network(spec.part("network"), first.images.shape[1], first.images.shape[2], outputs)

    def part(self, name: str) -> Part:
        """Return images and labels of one split on the device, where they stay if there is room."""
        if name not in self._parts:
            split = self.data.splits[name]
            labels = torch.from_numpy(split.labels).to(self.device)
            self._parts[name] = Part(on_device(split.pixels, self.device), labels)
        return self._parts[name]

    def shown(self, name: str) -> Part:
        """Return images and labels of those cases of a split that shifted views show."""
        part, count = self.part(name), self.spec.options.view_cases
        if not 0 < count < len(part):
            return part
        rows = torch.from_numpy(shown_cases(name, len(part), count)).to(self.device)
        return Part(part.images[rows], part.labels[rows])

    def plan(self) -> list[tuple[str, str, bool]]:
        """Return (stage, key, already there) for every stage."""
        return [(stage, key, self.store.find(stage, key) is not None) for stage, key in self.keys.items()]

    def base(self) -> Trained:
        """Return the base network, trained if it is not in the store."""
        spec, key = self.spec, self.keys["base"]

        def compute(work: Path) -> dict[str, Any]:
            checkpoint = FileCheckpoint(work, self.device)
            trained = self._fit(checkpoint)(self._base_seed(), name="training the base")
            leaves = {f"params/{n}": p for n, p in trained.params.items()}
            leaves |= {f"buffers/{n}": b for n, b in trained.buffers.items()}
            save_file({n: t.cpu().contiguous() for n, t in leaves.items()}, work / WEIGHTS)
            norm = gradient_norm(self.network, self.part("train"), spec.training, trained)
            return {"losses": trained.losses, "gradient_norm": norm, "network": self.network.describe()}

        folder = self.store.produce("base", key, spec.base_identity(self.data), compute)
        leaves = load_file(folder / WEIGHTS, device=str(self.device))
        params, buffers = self.network.init(0)  # files sort names; the network's own order is what flat vectors follow
        found_params, found_buffers = under("params/", leaves), under("buffers/", leaves)
        return Trained({n: found_params[n] for n in params}, {n: found_buffers[n] for n in buffers})

    def _base_seed(self) -> int:
        return derive_seed("base", self.spec.options.base_seed)

    def problem(self, checkpoint: FileCheckpoint | None = None) -> Problem:
        """Return what the generator may see; without a checkpoint, nothing of it survives this process."""
        base = self.base()
        return Problem(
            network=self.network,
            base=base,
            module=lambda: self.network.module(base.params, base.buffers),
            train=self.part("train"),
            tune=self.part("tune"),
            task=self.data.task,
            classes=self.network.outputs,
            loss=mean_loss,
            prior_precision=self.spec.training.prior_precision,
            batch_size=self.spec.training.batch_size,
            fit=self._fit(checkpoint),
            fit_together=self._fit_together(checkpoint),
            groups=self._grouping().codes,
            members=self.spec.options.members,
            base_seed=self._base_seed(),
            device=self.device,
            checkpoint=checkpoint or Memory(),
            progress=progress,
        )

    def model_set(self) -> ModelSet:
        """Return the generator's set, generated if it is not in the store."""
        spec, key = self.spec, self.keys["set"]

        def compute(work: Path) -> dict[str, Any]:
            self.base()
            if isinstance(spec.generator, FromPosterior):
                warm_up()
            before = self.time_base_training()
            clock, memory = Stopwatch(work, self.device), PeakMemory(self.device)
            problem = self.problem(FileCheckpoint(work, self.device))
            problem.clock, problem.part = clock, self._part(clock, memory)
            booked, start = sum(clock.seconds.values()), time.perf_counter()
            seed = derive_seed(
                "generator", spec.names["generator"], spec.options.generator_seed, spec.options.base_seed
            )
            model_set = spec.generator.generate(problem, seed)
            synchronise(self.device)
            # What a generator did not book itself belongs to the set as a whole.
            clock.seconds["fixed"] += max(0.0, time.perf_counter() - start - sum(clock.seconds.values()) + booked)
            clock.seconds["fixed"] += clock.elsewhere
            if not isinstance(model_set, StackedSet):
                with clock.marginal():
                    for _ in model_set.blocks(16):
                        pass
            peak = memory.peak()
            model_set.save(work, self.network.describe())
            return {
                "fixed_s": clock.seconds["fixed"],
                "marginal_s": clock.seconds["marginal"] / model_set.size,
                "attempts": clock.attempts,
                "base_training_s": 0.5 * (before + self.time_base_training()),
                "peak_memory_bytes": peak,
                "bytes_per_member": model_set.bytes_per_member(),
                "threads": torch.get_num_threads(),
                "device_name": device_name(self.device),
            }

        folder = self.store.produce("set", key, spec.identity(self.data), compute)
        return ModelSet.load(folder, self.device)

    def predictions(self, model_set: ModelSet) -> dict[str, Predictions]:
        """Return the set's predictions on val and test, computed if they are not in the store."""
        key = self.keys["predictions"]

        def compute(work: Path) -> dict[str, Any]:
            base, checkpoint = self.base(), FileCheckpoint(work)
            images = self.part("val").images
            strategy = checkpoint.once("strategy", lambda: choose_strategy(self.network, model_set, images))
            for view in VIEWS:
                self._predict_view(work, checkpoint, view, base, model_set, strategy)
            return {"strategy": strategy}

        folder = self.store.produce("predictions", key, {"set": self.keys["set"], "views": list(VIEWS)}, compute)
        return {view: self._load_view(folder, view, model_set) for view in VIEWS}

    def record(self, suite: str | None = None) -> tuple[dict[str, Any], Path]:
        """Carry out the whole run and return its record and where it is written.

        A generator that cannot run here gives a skipped record with its reason; one whose numbers leave the finite
        ones a failed record. Other failures are recorded with their traceback and raised again.
        """
        folder = Path(self.spec.options.records_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # a folder that cannot be written to is told now, not after hours of work
        check_views(self)
        try:
            reason = self.spec.generator.supports(self.problem())
            if reason:
                return self._write("skipped", reason)
            model_set = self.model_set()
            views = self.predictions(model_set)
            # Scores are those of the predictions as they are committed, which is what `leaderboard verify` scores.
            arrays = predictions_arrays(views["val"], views["test"])
            val, test = arrays_predictions(arrays, self.data.task, self.data.positive)
            evaluation = evaluate(val, test, self.spec.settings)
            seen = self._shifted(model_set, views, evaluation, {"val": val, "test": test})
        except Diverged as error:
            return self._write("failed", str(error))
        except (UserError, OSError, KeyboardInterrupt):
            raise
        except Exception as error:
            if is_lost(error):  # says nothing about the generator: no record
                raise explain_lost(error) from error
            self._write("failed", f"{type(error).__name__}: {error}", {"traceback": _traceback()})
            raise
        return self._write("ok", "", model_set=model_set, evaluation=evaluation, arrays=arrays, seen=seen, suite=suite)

    def _shifted(
        self,
        model_set: ModelSet,
        predictions: dict[str, Predictions],
        evaluation: Evaluation,
        parts: dict[str, Predictions],
    ) -> Seen | None:
        """Return what the run asks for beside val and test, if anything; parts: the predictions as committed."""
        if not self.spec.options.views and not self.spec.options.evidence:
            return None
        strategy = self.store.about("predictions", self.keys["predictions"])["strategy"]
        found = shifted(self, model_set, predictions, evaluation.accepted, strategy)
        arrays = view_arrays(found.logits, found.evidence, self.data.task)
        return Seen(found, arrays, arrays_views(arrays, parts))

    def time_base_training(self) -> float:
        """Return the seconds that one base training (without polishing) would take in this process, now.

        The median of three passes over eight batches, scaled to the steps that the base took: short enough to be taken
        right before and right after a set is generated, for the speed of a shared machine changes.
        """
        recipe, data, tune = self.spec.training, self.part("train"), self.part("tune")
        epochs = len(self.store.about("base", self.keys["base"])["losses"])
        few = Part(data.images[: 8 * recipe.batch_size], data.labels[: 8 * recipe.batch_size])
        tuned = max(1, len(tune) * len(few) // len(data))
        timed = train(
            self.network,
            few,
            replace(recipe, epochs=4, polish=0, patience=recipe.patience and 4),
            derive_seed("timing"),
            tune=Part(tune.images[:tuned], tune.labels[:tuned]),
            grouping=lambda groups: self._grouping().codes(groups)[: len(few)],
        ).epoch_s[1:]
        return float(np.median(timed)) * epochs * len(data) / len(few)

    def _grouping(self) -> Grouping:
        """Return what the training samples can be grouped by; hidden strata are found when they are asked for."""
        from .strata import find

        split = self.data.splits["train"]
        return Grouping(split.labels, split.attributes, split.patient, lambda: find(self, "clusters").codes["train"])

    def _fit(self, checkpoint: Any) -> Any:
        split = self.data.splits["train"]
        patient = None if split.patient is None else torch.from_numpy(split.patient)
        grouping = self._grouping()
        data = self.part("train")

        def fit(seed: int, **arguments: Any) -> Trained:
            return train(
                self.network,
                data,
                self.spec.training,
                seed,
                tune=self.part("tune"),
                patient=patient,
                grouping=grouping.codes,
                **{"checkpoint": checkpoint, "progress": progress, **arguments},
            )

        return fit

    def _fit_together(self, checkpoint: Any) -> Together | None:
        """Return the recipe for several networks at once, on a GPU.

        On a CPU little is to be gained, and a choice by timing would make members depend on how busy the machine is.
        """
        recipe, split = self.spec.training, self.data.splits["train"]
        if self.device.type != "cuda" or not trains_together(recipe):
            return None
        patient = None if split.patient is None else torch.from_numpy(split.patient)
        return Together(self.network, self.part("train"), recipe, self.part("tune"), patient, checkpoint, progress)

    def _part(
        self, clock: Stopwatch, memory: PeakMemory
    ) -> Callable[[str, Any, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]:
        def part(name: str, spec: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            whole = {"base": self.keys["base"], "part": name, "spec": plain(spec)}
            key, file = digest(whole), f"{name}.safetensors"

            def build(work: Path) -> dict[str, Any]:
                start = time.perf_counter()
                tensors = compute()
                synchronise(self.device)
                seconds = time.perf_counter() - start
                save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, work / file)
                return {"seconds": seconds, "peak_memory_bytes": memory.peak()}

            found = self.store.find("part", key) is not None
            folder = self.store.produce("part", key, whole, build)
            if found:  # computed for another generator: this one pays for it as if it had done it itself
                about = self.store.about("part", key)
                clock.elsewhere += about["seconds"]
                memory.at_least = max(memory.at_least, about["peak_memory_bytes"] or 0)
            return load_file(folder / file, device=str(self.device))

        return part

    def _predict_view(
        self, work: Path, checkpoint: FileCheckpoint, view: str, base: Trained, model_set: ModelSet, strategy: str
    ) -> None:
        """Write `<view>.npy` [member + 1, sample, class]: the base first, then the members, block after block."""
        images = self.part(view).images
        path = work / f"{view}.npy"
        shape = (model_set.size + 1, len(images), self.network.outputs)
        done = checkpoint.load(f"{view} done")
        if done is None or not path.is_file():
            logits = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            logits[0] = predict_block(self.network, base_block(base), images, strategy)[0].float().cpu().numpy()
            first = 0
        else:
            logits, first = np.lib.format.open_memmap(path, mode="r+"), int(done["members"])

        def write(block: Any, values: Tensor) -> None:
            logits[block.start + 1 : block.start + 1 + block.size] = values.cpu().numpy()
            logits.flush()
            checkpoint.save(f"{view} done", {"members": torch.tensor(block.start + block.size)})

        predict(self.network, model_set, images, strategy=strategy, write=write, first=first, progress=progress)
        logits.flush()

    def _load_view(self, folder: Path, view: str, model_set: ModelSet) -> Predictions:
        logits = np.load(folder / f"{view}.npy", mmap_mode="r", allow_pickle=False)
        split = self.data.splits[view]
        return Predictions(
            logits=logits[1:],
            base=logits[0],
            labels=split.labels,
            task=self.data.task,
            view=view,
            positive=self.data.positive,
            patient=split.patient,
            ids=split.ids,
            attributes=dict(split.attributes),
            failed=tuple(model_set.failed),
        )

    def _about_base(self) -> dict[str, float]:
        about = self.store.about("base", self.keys["base"])
        return {"train_loss": about["losses"][-1], "gradient_norm": about["gradient_norm"]}

    def _write(
        self,
        status: str,
        reason: str,
        diagnostics: dict[str, Any] | None = None,
        *,
        model_set: ModelSet | None = None,
        evaluation: Evaluation | None = None,
        arrays: dict[str, np.ndarray] | None = None,
        seen: Seen | None = None,
        suite: str | None = None,
    ) -> tuple[dict[str, Any], Path]:
        settings = self.spec.settings
        folder = Path(self.spec.options.records_dir)
        record: dict[str, Any] = {
            "row": self.spec.row,
            "status": status,
            "reason": reason,
            "identity": self.spec.identity(self.data),
            "protocol": {
                **plain(settings),
                "metrics": {n: i.version for n, i in catalogue().items()},
                "predictions": PRECISION,
            },
            "scores": {},
            "set": {"drawn": self.spec.options.members, "accepted": [], "diagnostics": diagnostics or {}, "notes": []},
            "data": data_section(self.data),
            "cost": {},
            "provenance": provenance(self.device),
            "predictions": {"file": None, "digest": None},
        }
        if model_set is not None and evaluation is not None and arrays is not None:
            record["scores"] = {key: plain_score(score) for key, score in evaluation.scores.items()}
            record["set"] = set_section(model_set, evaluation) | {"base": self._about_base()}
            record["cost"] = cost_section(
                self.store.about("set", self.keys["set"]), len(evaluation.accepted), model_set.size
            )
            strategy = self.store.about("predictions", self.keys["predictions"])["strategy"]
            record["predictions"] = {"file": None, "digest": array_digest(arrays), "strategy": strategy}
            if seen is not None:
                scores = view_scores(seen.file.predictions, evaluation.accepted, settings)
                record["scores"] |= {key: plain_score(score) for key, score in scores.items()}
                record["views"] = views_section(seen.found, array_digest(seen.arrays), self.spec.options.view_cases)
            if suite is not None:
                name = records.seal(record)["name"]
                path = folder.parent / "predictions" / suite / f"{name}.npz"
                save_predictions(path, arrays)
                record["predictions"]["file"] = path.name
                if seen is not None:
                    save_views(path.with_name(name + SUFFIX), seen.arrays)
                    record["views"]["file"] = name + SUFFIX
        sealed = records.seal(record)
        return sealed, records.write(sealed, folder)


def warm_up() -> None:
    """Load what torch.func and laplace-torch load at their first use, so that no set pays for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import laplace  # noqa: F401

    torch.func.vmap(torch.func.grad(torch.sin))(torch.zeros(2))


def _traceback() -> list[str]:
    """Return the frames of the current exception, innermost last, without the paths of this machine."""
    error = sys.exc_info()[1]
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return [f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno} in {f.name}" for f in frames]
