"""`run-benchmark`: one run, a sweep of runs (`-m`), or every cell of a suite."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import UserError, suggest

USAGE = """run-benchmark - do equally accurate networks decide alike?

  run-benchmark                                        the quickstart suite: every generator on synthetic radiographs
  run-benchmark generator=swag dataset=breastmnist     one run
  run-benchmark -m generator=swag,laplace base_seed=0,1,2    a sweep
  run-benchmark -m ... hydra/launcher=joblib           its jobs side by side; submitit_local, submitit_slurm, ray
  run-benchmark suite=NAME|FILE [generator=X]          every cell of a suite, or one row of it
  run-benchmark list=true                              generators, datasets, networks, metrics, views and suites
  run-benchmark ... views=[jpeg-3,pgd-4,ood-noise] evidence=[saliency]    shifted data, and what else is measured
  run-benchmark ... dry_run=true                       the stages, and which of them are in the store

Options (NAME=VALUE):
  generator, dataset, network, suite    names, see list=true; defaults: dataset phantom_cxr, network smallcnn
  generator.FIELD, dataset.FIELD, network.FIELD, training.FIELD     settings of a part (training.epochs=5)
  members            networks drawn (20)
  epsilon            tolerance of membership on val, in nats (0.05); others are shown at epsilons ([0.02,0.05,0.1])
  k                  common number of members at which sets are compared (5)
  views              shifted views of val and test, CORRUPTION-SEVERITY, ATTACK-GREYLEVELS or ood-DATASET, as in
                     [jpeg-3,test/pgd-4,ood-noise] (none), for the first view_members of a set (20)
                     and view_cases of val and of test (0: all)
  evidence           what else is measured of these: energy, max_logit, mahalanobis, knn, vim (detectors of outliers),
                     saliency, transfer (of attacks), membership (does it tell that a case was trained on?) (none)
  loss               loss of membership: nll, zero_one, auroc, balanced_accuracy, brier (nll)
  base_seed, generator_seed, resample_seed             seeds (0, 0, null: no resampling of the training data)
  device             auto, cpu or cuda (auto); tf32=true allows TF32
  threads            CPU threads (0: all; a job of a launcher: what it asks for, or its share of the processors)
  hydra/launcher     of a sweep (-m): basic (one job after the other), joblib, submitit_local, submitit_slurm, ray;
                     hydra.launcher.SETTING as in n_jobs=4 (joblib), partition=NAME (Slurm), address=HOST:PORT (Ray)
  data_root          folder that holds medmnist/*.npz and nih_chest_xray14*/; for dataset=npz a file
                     (default: MULTIPLICITY_BENCH_DATA, else ../shared/data, else ~/.medmnist)
  artifacts_dir, records_dir                           where results go (outputs/artifacts, outputs/records)

Generators:
{generators}
The second command is `leaderboard`: build, check, verify, export, clean.
"""


DEFAULTS = {"dataset": "phantom_cxr", "network": "smallcnn"}


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    argv = sys.argv[1:]
    if {"-h", "--help", "list=true"} & set(argv):  # answered without importing torch, which takes seconds
        sys.exit(guarded(_list if "list=true" in argv else _help))
    sys.exit(guarded(_hydra))


def _to_stderr(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)


def guarded(command: Any, *arguments: Any, report: Callable[[str], None] = _to_stderr) -> int:
    """Return the exit code of `command`: one line and 2 for a user's mistake (Hydra's among them), 130 for Ctrl-C."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints several lines and exits with 1
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return int(command(*arguments) or 0)
    except UserError as error:
        report(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        report(_hydra_message(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = None
        return 0
    except OSError as error:
        from .store import explain_os_error

        report(str(explain_os_error(error)))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 2


def _hydra() -> int:
    import hydra

    _check_flags(sys.argv[1:])
    _check_names(sys.argv[1:])  # before torch is imported: a mistyped name is told at once
    from .launchers import check_arguments, register

    check_arguments(sys.argv[1:])
    _quiet()
    from .spec import register_config

    register_config()
    register()
    task = Task()
    hydra.main(config_path="conf", config_name="config", version_base="1.3")(task)()
    return max(task.codes, default=0)


@dataclass
class Task:
    """What Hydra calls for every job, here or in a worker process; `codes` are the exit codes of the jobs so far."""

    codes: list[int] = field(default_factory=list)

    def __call__(self, config: Any) -> Any:
        """Carry out one job; a launched one hands its output and errors to the process that launched it."""
        from .launchers import TOKEN, Outcome

        _quiet()
        if TOKEN not in os.environ:
            self.codes.append(guarded(run, config))  # raised further, Hydra would add lines of its own
            return None
        errors: list[str] = []
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                code = guarded(_run_launched, config, report=errors.append)
            except Exception:  # a failure of ours, whose frames would be lost on the way
                code = 1
                errors.append(traceback.format_exc())
        return Outcome(code, said.getvalue(), errors)


def _run_launched(config: Any) -> int:
    from .launchers import prepare_job

    prepare_job(config)
    return run(config)


def _quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other


def run(config: Any) -> int:
    """Carry out what one composed configuration asks for: a single run, or the cells of a suite."""
    from hydra.core.hydra_config import HydraConfig

    if config.list:
        _list()
        return 0
    overrides = list(HydraConfig.get().overrides.task)
    if config.suite is None and config.generator is not None:
        return run_one(config)
    return run_suite(config.suite or "quickstart", [o for o in overrides if not o.startswith("suite=")])


def run_one(config: Any) -> int:
    """Carry out one run and print its record's path and main scores."""
    from ..leaderboard.terminal import summary_line, views_lines
    from .spec import build_spec
    from .stages import Run, Session

    task = Run(build_spec(config), Session())
    if config.dry_run:
        _print_plan(task)
        return 0
    record, path = task.record()
    print("\n".join([str(path), summary_line(record), *views_lines(record)]))
    return 1 if record["status"] == "failed" else 0


def run_suite(name: str, overrides: Sequence[str]) -> int:
    """Carry out every cell of a suite (with the user's own overrides on top) and print its table."""
    from ..leaderboard.suite import load_suite, suite_of
    from ..leaderboard.terminal import render_terminal, summary_line
    from .progress import log
    from .stages import Run, Session
    from .suites import chosen_rows, compose_cell

    suite = load_suite(name)
    overrides, rows = chosen_rows(suite, overrides)
    chosen = [o for o in overrides if o.startswith("base_seed=")]  # the user's own seed, not one cell for each
    seeds = suite.base_seeds[:1] if chosen else suite.base_seeds
    cells = [(row, seed) for seed in seeds for row in rows]
    specs = [compose_cell(suite, row, seed, overrides) for row, seed in cells]
    session, kept, code = Session(), [], 0
    for i, spec in enumerate(specs, 1):
        task = Run(spec, session)
        if spec.options.dry_run:
            _print_plan(task)
            continue
        record, path = task.record(suite.name if suite.predictions else None)
        log(f"[{i}/{len(cells)}] {summary_line(record)}\n    {path}")
        kept.append(record)
        code = max(code, int(record["status"] == "failed"))
    if kept:
        print(render_terminal(kept, suite_of(kept, suite.name, suite.title)))  # with the user's overrides
        folder = specs[0].options.records_dir
        print(f"{len(kept)} records in {folder}; all tables: leaderboard build --records {folder} --suite {name}")
    return code


def _print_plan(task: Any) -> None:
    print(
        f"{task.spec.row}, base seed {task.spec.options.base_seed}, dataset {task.data.name} ({task.data.digest[:12]})"
    )
    for stage, key, there in task.plan():
        print(f"  {stage:<12} {key[:12]}  {'hit' if there else 'miss'}")


def _check_flags(argv: Sequence[str]) -> None:
    """Refuse what Hydra's own parser would answer with its usage, several lines long."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: options are NAME=VALUE, see run-benchmark --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(argv)


def _check_names(argv: Sequence[str]) -> None:
    """Refuse an unknown dataset, network or generator with the closest names, before Hydra lists its own."""
    from ..registries import BY_KIND

    for argument in argv:
        group, _, names = argument.lstrip("+~").partition("=")
        if argument.startswith("~") or (group in ("dataset", "network", "generator") and names == "null"):
            raise UserError(f"{argument}: no part can be taken away: leave it out for the default")
        for name in names.split(",") if group in ("dataset", "network", "generator") else []:
            if name and not name.startswith("glob("):
                BY_KIND[group].get(name)


def _hydra_message(error: Exception) -> str:
    """Return Hydra's or OmegaConf's message as one line, with close names for an option that does not exist."""
    parts = [str(e) for e in (error, error.__cause__) if e is not None]
    text = " ".join(" ".join(parts).split())
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", text)
    where = re.search(r"full_key: (\S+)", text)
    if unknown:
        option = where.group(1) if where else unknown.group(1)
        return f"there is no option '{option}': {_suggest_option(option)}"
    text = re.sub(r"\s*\(?(full_key|object_type|reference_type)[:=] ?\S*", "", text)
    return re.sub(r"^Error merging override (\S+)", r"cannot set \1:", text)


def _suggest_option(option: str) -> str:
    from dataclasses import fields

    from ..registries import BY_KIND
    from .spec import Options
    from .train import Training

    part, _, setting = option.partition(".")
    if part == "hydra":
        from .launchers import suggest_setting

        return suggest_setting(option, sys.argv)
    if setting and part in BY_KIND:
        chosen = [a.partition("=")[2] for a in sys.argv if a.startswith(f"{part}=")]
        entries = BY_KIND[part].entries()
        names = chosen if chosen and chosen[-1] in entries else [DEFAULTS.get(part, "")]
        if names[-1] in entries:
            settings = [s.partition("=")[0] for s in entries[names[-1]].settings]
            return f"of {names[-1]}, {suggest(setting, settings)}"
        return f"run-benchmark list=true shows the settings of every {part}"
    known = [f.name for f in fields(Options)] + [f"training.{f.name}" for f in fields(Training)]
    return suggest(option, known)


def _listing(kind: str, settings: bool = False) -> str:
    from .listing import describe

    return describe(kind, settings)


def _help() -> None:
    print(USAGE.format(generators=_listing("generator")), end="")


def _list() -> None:
    from ..leaderboard.suite import suite_names
    from .listing import describe_views

    for kind in ("generator", "dataset", "network", "metric"):
        print(f"{kind}s\n{_listing(kind, settings=True)}")
    print(f"views\n{describe_views()}")
    print("suites\n  " + ", ".join(suite_names()))
