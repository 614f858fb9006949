"""`make groups`: groups/<suite>.json for the board suites, from their data and a frozen reference network.

Predictions hold codes of attributes; their names, the hidden strata and the known truths of a synthetic set stand in
this file, made once per dataset and shared by all generators.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ..datasets.api import Data
from ..errors import UserError
from ..leaderboard.cells import settle
from ..leaderboard.cli import FOLDER, Parser, execute
from ..leaderboard.groups import FILES, Groups, Stratification, declared, to_text
from ..leaderboard.record import read_all
from ..leaderboard.suite import Suite, board_suites, load_suite
from .board import spec_of
from .stages import VIEWS, Run, Session
from .strata import REFERENCE_SEEDS, find


def groups_of(run: Run, suite: Suite) -> Groups:
    """Return the groups of a suite's cases; `run` is any run of the suite."""
    data = run.data
    strata = {kind: find(run, kind) for kind in suite.strata}
    return Groups(
        suite=suite.name,
        dataset=data.digest,
        declared=declared(suite),
        attributes=data.attribute_values,
        strata={
            kind: Stratification(found.names, {view: found.codes[view] for view in VIEWS}, found.places, found.about)
            for kind, found in strata.items()
        },
        truths={name: {view: _truth(data, name, view) for view in VIEWS} for name in suite.truths},
        references=list(REFERENCE_SEEDS) if suite.strata else [],
    )


def _truth(data: Data, name: str, view: str) -> np.ndarray:
    latents = data.splits[view].latents
    if name not in latents:
        known = ", ".join(sorted(latents)) or "none"
        raise UserError(f"dataset {data.name} has no truth '{name}': it has {known}")
    return latents[name].astype(np.int64)


def main(argv: list[str] | None = None) -> int:
    """Write the files of the suites."""
    parser = Parser(prog="groups", description="Find the groups of the board suites' cases.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="names or paths; default: the board's")
    parser.add_argument(
        "--records", type=Path, default=FOLDER / "records", metavar="DIR", help="folder of their records"
    )
    parser.add_argument("--artifacts", type=Path, default=Path("outputs/artifacts"), metavar="DIR", help="the store")
    parser.add_argument("--data-root", metavar="DIR", help="as data_root of run-benchmark")
    parser.add_argument("--out", type=Path, default=FOLDER / FILES, metavar="DIR", help="the folder they go to")
    parser.set_defaults(run=_run)
    return execute(parser, argv)


def _run(args: argparse.Namespace) -> int:
    chosen = [load_suite(name) for name in args.suites] or [s for s in board_suites() if s.predictions]
    records, session = read_all(args.records), Session()
    args.out.mkdir(parents=True, exist_ok=True)
    for suite in chosen:
        scored = [r for r in settle(suite, records).records if r["status"] == "ok"]
        if not scored:
            raise UserError(f"suite {suite.name} has no record in {args.records}: run the suite first")
        options = {"data_root": args.data_root, "artifacts_dir": str(args.artifacts), "records_dir": str(args.records)}
        run = Run(spec_of(scored[0], **options), session)
        if run.data.digest != scored[0]["identity"]["dataset"]["digest"]:
            raise UserError(
                f"suite {suite.name}: the data differ from those of its records (content digest): see --data-root"
            )
        path = args.out / f"{suite.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_text(groups_of(run, suite)), encoding="utf-8")
        temporary.replace(path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
