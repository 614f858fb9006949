"""Sweeps on many processors and machines: `hydra/launcher=NAME` over one shared artifact store.

Settings of each launcher are in conf/hydra/launcher. `Sweep` refuses beforehand what would fail or hang later, marks
the folders of results, so that a job that sees other ones says so, and hands on what jobs said and their exit codes.
joblib is Hydra's own plug-in; submitit and Ray are launched from here: Hydra's plug-in for submitit stops waiting at
the first lost job, and the one for Ray asks for older libraries than ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf, open_dict

from ..errors import UserError, suggest
from ..processors import usable_processors

# Launcher -> (extra that it needs, module by which one sees that it is installed); "basic" is Hydra's, one by one.
NEEDS = {
    "basic": None,
    "joblib": ("joblib", "hydra_plugins.hydra_joblib_launcher"),
    "submitit_local": ("submitit", "submitit"),
    "submitit_slurm": ("submitit", "submitit"),
    "ray": ("ray", "ray"),
}
SHARED = ("artifacts_dir", "records_dir")
TOKEN, THREADS = "MULTIPLICITY_BENCH_SWEEP", "MULTIPLICITY_BENCH_THREADS"  # what a launched job is told, and no other
AT_LEAST = {"workers": 1, "cpus_per_task": 1, "timeout_min": 1, "gpus_per_node": 0, "num_cpus": 1, "num_gpus": 0}
OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes; results are in the artifact store
GO_ON = "the same command goes on from here"


@dataclass
class Outcome:
    """How a launched job ended: its exit code, and what it would have printed on stdout and as errors."""

    code: int
    out: str = ""
    errors: list[str] = field(default_factory=list)


def check_arguments(argv: Sequence[str]) -> None:
    """Raise UserError for a launcher that is unknown or not installed, or that nothing would be launched by."""
    chosen = [a.partition("=")[2] for a in argv if a.lstrip("+").startswith("hydra/launcher=")]
    for name in chosen:
        if name not in NEEDS:
            raise UserError(f"unknown launcher '{name}': {suggest(name, NEEDS)}")
        needed = NEEDS[name]
        if needed and not _installed(needed[1]):
            what = f'the extra {needed[0]}: pip install "multiplicity-bench[{needed[0]}]"'
            raise UserError(f"hydra/launcher={name} needs {what}")
    if chosen and not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(argv):
        raise UserError(f"hydra/launcher={chosen[-1]} launches the jobs of a sweep: add -m, and what to sweep over")


def suggest_setting(option: str, argv: Sequence[str]) -> str:
    """Return close names for a setting of the chosen launcher that does not exist."""
    import yaml

    chosen = [a.partition("=")[2] for a in argv if a.lstrip("+").startswith("hydra/launcher=")]
    file = Path(__file__).parent / "conf" / "hydra" / "launcher" / f"{chosen[-1] if chosen else 'basic'}.yaml"
    if not option.startswith("hydra.launcher.") or not file.is_file():
        return "settings of a launcher are hydra.launcher.NAME, beside hydra/launcher=NAME"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    return suggest(option, [f"hydra.launcher.{name}" for name in settings if name[0] != "_"])


def register() -> None:
    """Make the sweeper and the launchers of this module, and their settings in conf/, the ones that Hydra finds."""
    known = Plugins.instance().class_name_to_class  # `register` would name them by their module, which Hydra refuses
    known |= {f"hydra_plugins.multiplicity_bench.{c.__name__}": c for c in (Sweep, SubmititLauncher, RayLauncher)}
    schemas = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in NEEDS.keys() - {"basic"}:  # those of plug-ins, which Hydra would hold our files against
        schemas.pop(f"{name}.yaml", None)


class Sweep(Sweeper):
    """Every combination of what is swept over, with checks before anything is launched and exit codes afterwards."""

    hydra_context: Any
    config: Any
    launcher: Any

    def __init__(self, max_batch_size: int | None, params: Mapping[str, str] | None) -> None:
        self.max_batch_size, self.params = max_batch_size, params or {}

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Take over what Hydra composed; task_function collects exit codes in `codes`."""
        self.hydra_context, self.task, self.config = hydra_context, task_function, config
        self.name = str(config.hydra.runtime.choices["hydra/launcher"])
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run every job, one after the other or as the launcher does, and say how they ended."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # not before Hydra has loaded its plug-ins

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments])
        first = 0
        for batch in BasicSweeper.split_arguments(overrides, self.max_batch_size):
            if self.name == "basic":
                self.validate_batch_is_legal(batch)
                for job in self.launcher.launch(batch, initial_job_idx=first):
                    _ = job.return_value  # raises what the job raised
            else:
                self._tell(self._launch(batch, first))
            first += len(batch)

    def _launch(self, batch: Sequence[Sequence[str]], first: int) -> list[Outcome]:
        """Launch jobs that can run, in folders marked so that a job knows them again, and wait for them."""
        load = self.hydra_context.config_loader.load_sweep_config
        jobs = [load(self.config, list(overrides)) for overrides in batch]
        settings = self.config.hydra.launcher
        _check_settings(self.name, settings, {str(job.device) for job in jobs})
        told = {TOKEN: secrets.token_hex(8), THREADS: threads_of_a_job(self.name, settings, len(batch))}
        extra = [f"+hydra.job.env_set.{name}='{value}'" for name, value in told.items()]
        with contextlib.ExitStack() as marked:
            for folder in dict.fromkeys(Path(job[option]) for job in jobs for option in SHARED):
                marked.enter_context(_marked(folder, f".{told[TOKEN]}"))
            try:
                done = self.launcher.launch([[*overrides, *extra] for overrides in batch], initial_job_idx=first)
            except BrokenExecutor:  # joblib's pool is gone, and what its jobs had to say
                what = "a worker was lost (killed, or out of memory), and the jobs beside it ended"
                return [Outcome(1, errors=[f"{what}: {GO_ON}"])]
        return [job.return_value for job in done]

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.task.codes.append(outcome.code)
            print(outcome.out, end="")
        for line in dict.fromkeys(line for outcome in outcomes for line in outcome.errors):
            print(f"error: {line}", file=sys.stderr)


def threads_of_a_job(name: str, settings: Mapping[str, Any], jobs: int) -> int:
    """Return the CPU threads of one job: what it asks the cluster for, or its share of this host's processors."""
    if name == "submitit_slurm":
        return int(settings["cpus_per_task"])
    if name == "ray":
        return int(settings["num_cpus"])
    workers = settings["n_jobs"] if name == "joblib" else settings["workers"]
    if workers is None or workers < 0:  # joblib counts from the end: -1 is all, -2 all but one
        workers = usable_processors() + 1 + (workers or -1)
    return max(1, usable_processors() // max(1, min(workers, jobs)))


def prepare_job(config: Any) -> None:
    """Take the threads that a launched job is given; UserError if it sees other folders than where it was launched."""
    import torch

    for option in SHARED:
        if not (Path(config[option]) / f".{os.environ[TOKEN]}").is_file():
            where = f"{option}={config[option]} on {socket.gethostname()}"
            raise UserError(
                f"{where} is not the folder of the host that launched the sweep: name one that all hosts share"
            )
    torch.set_num_threads(int(os.environ[THREADS]))  # the option `threads` and a suite's own go before


@dataclass
class Job:
    """All that a worker process needs to carry out one job of a sweep as this process would."""

    launcher: _Launcher
    overrides: list[str]
    number: int
    folder: str = field(default_factory=os.getcwd)
    state: Any = field(default_factory=Singleton.get_state)

    def __call__(self) -> JobReturn:
        """Carry out the job in the folder where the sweep was started."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            where = f"{self.folder} on {socket.gethostname()}: {error.strerror}"
            return _ended(Outcome(2, errors=[f"{where}: start the sweep in a folder that all hosts share"]))
        Singleton.set_state(self.state)
        setup_globals()
        context = self.launcher.context
        config = context.config_loader.load_sweep_config(self.launcher.config, self.overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        return run_job(
            hydra_context=context,
            task_function=self.launcher.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def lost(self, reason: str) -> JobReturn:
        """Return what is known of this job when its worker is gone, or could not begin."""
        what = " ".join(o for o in self.overrides if not o.lstrip("+").startswith("hydra."))
        return _ended(Outcome(1, errors=[f"job {self.number} ({what}) lost its worker ({reason}): {GO_ON}"]))


class _Launcher(Launcher):
    """Keeps its settings, and what Hydra hands to every launcher."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what a job is made of."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Return the jobs of one batch."""
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        return [Job(self, list(overrides), first + i) for i, overrides in enumerate(job_overrides)]


class SubmititLauncher(_Launcher):
    """Launches jobs as processes of this host or as a Slurm array, by submitit; a lost job leaves the others alone."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs and wait for all of them; an interrupt cancels those that are not done."""
        import submitit
        import torch

        settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(self.settings))  # type: ignore[assignment]
        cluster, folder, workers = (settings.pop(name) for name in ("cluster", "folder", "workers"))
        if cluster == "local" and settings["gpus_per_node"] is None:
            settings["gpus_per_node"] = torch.cuda.device_count()  # as a job that is not launched: 0 hides them
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        common = executor._valid_parameters()
        executor.update_parameters(**{k if k in common else f"{cluster}_{k}": v for k, v in settings.items()})
        jobs, submitted = self.jobs(job_overrides, initial_job_idx), []
        try:
            if cluster == "slurm":
                executor.update_parameters(slurm_array_parallelism=workers)
                submitted = executor.map_array(_call, jobs)
            for job in jobs[len(submitted) :]:
                while sum(not other.done() for other in submitted) >= (workers or usable_processors()):
                    time.sleep(0.2)
                submitted.append(executor.submit(_call, job))
            return [_result(job, other) for job, other in zip(jobs, submitted)]
        except KeyboardInterrupt:
            for other in submitted:
                if not other.done():
                    other.cancel(check=False)
            raise


class RayLauncher(_Launcher):
    """Launches jobs as tasks of Ray, on this host or the cluster at `address`; a lost job leaves the others alone."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start or join Ray, refuse what no node has, run the jobs, and leave."""
        import ray

        options = {name: self.settings[name] for name in ("num_cpus", "num_gpus", "max_retries")}
        try:
            _join_ray(self.settings["address"], self.settings["workers"])
            check_resources(options, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            jobs = self.jobs(job_overrides, initial_job_idx)
            task = ray.remote(**options)(_call)
            running = [task.remote(job) for job in jobs]
            returns = []
            for job, reference in zip(jobs, running):
                try:
                    returns.append(ray.get(reference))
                except ray.exceptions.RayError as error:
                    last = str(error).strip().rpartition("\n")[2]
                    returns.append(job.lost(f"{type(error).__name__}: {last}"))
            return returns
        finally:
            ray.shutdown()


def check_resources(options: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise UserError for a job that no node of a Ray cluster can hold: Ray would wait without a word."""
    asked = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    if any(all(node.get(kind, 0) >= count for kind, count in asked.items()) for node in nodes):
        return
    have = "; ".join(", ".join(f"{node.get(kind, 0):g} {kind}" for kind in asked) for node in nodes)
    ask = f"hydra.launcher.num_cpus={asked['CPU']:g} hydra.launcher.num_gpus={asked['GPU']:g}"
    raise UserError(f"{ask}: no node of Ray has that (nodes: {have}): ask for less, or add a node that has it")


def _join_ray(address: str, workers: int | None) -> None:
    import logging

    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"num_cpus": workers or usable_processors(), "include_dashboard": False}
    own["object_store_memory"] = OBJECT_STORE_BYTES
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR, **(own if address == "local" else {}))
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"hydra.launcher.address={address}: Ray cannot be joined there ({reason}): see `ray status`"
        ) from error


def _check_settings(name: str, settings: Mapping[str, Any], devices: set[str]) -> None:
    """Raise UserError for a number out of range, for a GPU that is not there, and for Slurm where it is not."""
    for option, least in AT_LEAST.items():
        value = settings.get(option)
        if value is not None and not (isinstance(value, int | float) and value >= least):
            raise UserError(f"hydra.launcher.{option}={value} must be a number of at least {least}")
    if name == "joblib" and settings["n_jobs"] == 0:
        raise UserError("hydra.launcher.n_jobs=0 launches nothing: name the number of jobs at once, or -1")
    if name == "submitit_slurm" and not all(map(shutil.which, ("sbatch", "srun", "sinfo"))):
        raise UserError(f"hydra/launcher={name} needs Slurm (sbatch, srun, sinfo) on this host: go to a login node")
    there = _gpus(name)
    option = "num_gpus" if name == "ray" else "gpus_per_node"
    asked = settings.get(option) or 0
    if "cuda" in devices and name in ("ray", "submitit_slurm") and not asked:
        raise UserError(f"device=cuda: the job is given no GPU that it does not ask for: add hydra.launcher.{option}=1")
    if there is not None and asked > there:
        raise UserError(f"hydra.launcher.{option}={asked}: no node has more than {there}: ask for less, or device=cpu")


def _gpus(name: str) -> int | None:
    """Return the number of GPUs of this host, or of the Slurm node that has most; None where only Ray knows."""
    if name == "ray":
        return None
    if name == "submitit_slurm":
        answer = subprocess.run(["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True, timeout=60)
        if answer.returncode:
            raise UserError(f"Slurm does not answer ({answer.stderr.strip()}): see sinfo")
        return max((int(count) for count in re.findall(r"gpu(?::[^:,(\s]+)?:(\d+)", answer.stdout)), default=0)
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def _marked(folder: Path, name: str) -> Iterator[None]:
    """Keep an empty file in a folder, by which a job sees that it is the same one; leave the disk as it was."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / name
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # results are in it
            for path in made:
                path.rmdir()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _call(job: Job) -> JobReturn:
    return job()


def _result(job: Job, submitted: Any) -> JobReturn:
    """Wait for a submitted job and return what came of it."""
    from submitit.core.utils import UncompletedJobError

    try:
        return submitted.result()
    except UncompletedJobError:
        return job.lost(f"log: {submitted.paths.stderr}")


def _ended(outcome: Outcome) -> JobReturn:
    return JobReturn(status=JobStatus.COMPLETED, _return_value=outcome)
