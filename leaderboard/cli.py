"""The command `leaderboard`: build a board from records, check the committed one, verify a record, show what it says.

Commands that need the whole package (exporting a member, running a cell again) add themselves to what `build_parser`
returns: a subparser with `set_defaults(run=function)`, where function takes the parsed arguments and returns an exit
code.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import UserError

FOLDER = Path(__file__).parent


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line on stderr."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> tuple[Parser, argparse._SubParsersAction]:
    """Return the parser of `leaderboard` and the object that takes further commands."""
    parser = Parser(
        prog="leaderboard", description="Build and check leaderboards, which are pure functions of records."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser(
        "build",
        help="write a board from records",
        description="Write a board. Alone: the committed one, and SCIENCE.md with its figures, from the committed "
        "predictions (a minute); with --records or --suite: a board to --out or the terminal.",
    )
    build.add_argument("--records", type=Path, metavar="DIR", help="folder of records (default: the committed ones)")
    build.add_argument("--suite", metavar="NAME", help="name or path of a suite (default: all that have records)")
    build.add_argument("--out", type=Path, metavar="FILE", help="Markdown file; a CSV is written beside it")
    build.set_defaults(run=run_build)

    check = commands.add_parser("check", help="check the committed board, its records and its predictions")
    check.set_defaults(run=run_check)

    verify = commands.add_parser("verify", help="score the predictions of a record again and compare")
    verify.add_argument("record", metavar="RECORD", help="path of a record, or name of a committed one")
    verify.set_defaults(run=run_verify)

    sheet = commands.add_parser("sheet", help="one page on the set of a record: who is in it, how much they disagree")
    sheet.add_argument("record", metavar="RECORD", help="path of a record, or name of a committed one")
    sheet.add_argument("--out", type=Path, metavar="FILE", help="Markdown file (default: the terminal)")
    sheet.set_defaults(run=run_sheet)

    case = commands.add_parser("case", help="what the members of a record's set decide on one test case")
    case.add_argument("record", metavar="RECORD", help="path of a record, or name of a committed one")
    case.add_argument("case", metavar="ID", help="id of the case (else patient code, else index), or patient=CODE")
    case.set_defaults(run=run_case)
    for command in (verify, sheet, case):
        command.add_argument("--predictions", type=Path, metavar="DIR", help="folder of its predictions file")
    return parser, commands


def execute(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parse and run a command; a mistake of the user's is told on stderr, exit code 2."""
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the commands of this module."""
    return execute(build_parser()[0], argv)


def run_build(args: argparse.Namespace) -> int:
    """Write a board, or print it: `leaderboard build`."""
    from .cells import settle_all, verified
    from .render import render, render_csv
    from .science_files import build_science
    from .suite import board_suites, load_suite

    records = _records(args.records)
    if args.suite:
        suites = [load_suite(args.suite)]
    elif args.records:
        suites = _suites_of(records)
    else:
        suites = board_suites()
    if args.out:
        out = args.out
    elif not args.records and not args.suite:
        out = FOLDER / "LEADERBOARD.md"
    else:
        print(render(records, suites), end="")
        return 0
    table = out.with_suffix(".csv") if args.out else FOLDER / "leaderboard.csv"
    if table == out:
        raise UserError(f"--out {out}: is the Markdown file, name it .md")
    _write(out, render(records, suites))
    _write(table, render_csv(records, suites))
    if not args.out:
        tables = settle_all(suites, filter(verified, records))
        build_science(FOLDER, tables, _write)
    print(f"{out} and {table.name}: {len(records)} records, suites {', '.join(suite.name for suite in suites)}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check the committed board: `leaderboard check`."""
    from .check import check

    print(check())
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Score a record's predictions again and compare: `leaderboard verify RECORD`."""
    from .check import verify

    path = record_path(args.record)
    differences = verify(path, _predictions_folder(args, path))
    if differences:
        raise UserError("\n".join(f"{path.stem}: {difference}" for difference in differences))
    print(f"{path.stem}: every score follows from the predictions")
    return 0


def run_sheet(args: argparse.Namespace) -> int:
    """Write the multiplicity sheet of a record, or print it: `leaderboard sheet RECORD`."""
    from .sheet import sheet

    path = record_path(args.record)
    text = sheet(path, _predictions_folder(args, path))
    if args.out:
        _write(args.out, text)
        print(args.out)
    else:
        print(text, end="")
    return 0


def run_case(args: argparse.Namespace) -> int:
    """Print the card of one case, or of one patient: `leaderboard case RECORD ID`."""
    from .sheet import case_card

    path = record_path(args.record)
    print(case_card(path, _predictions_folder(args, path), args.case), end="")
    return 0


def record_path(name_or_path: str) -> Path:
    """Return the path of a record given by path, or by name if it is a committed one."""
    from ..errors import suggest

    path = Path(name_or_path)
    if path.is_file():
        return path
    committed = FOLDER / "records" / f"{path.name.removesuffix('.json')}.json"
    if committed.is_file():
        return committed
    known = [p.stem for p in (FOLDER / "records").glob("*.json")]
    raise UserError(
        f"no record '{name_or_path}': " + (suggest(path.stem, known) if len(known) < 20 else "name its file")
    )


def _predictions_folder(args: argparse.Namespace, record: Path) -> Path:
    return args.predictions or record.parent.parent / "predictions"


def _suites_of(records: list) -> list:
    """Return the suites of the package that `records` fill, and one for each set-up that other records share."""
    from ..identity import digest
    from .cells import settle
    from .suite import load_suite, suite_names, suite_of

    suites, planned = [], set()
    for suite in map(load_suite, suite_names()):
        if found := {r["name"] for r in settle(suite, records).records}:
            suites.append(suite)
            planned |= found
    others: dict[tuple[str, ...], list] = {}
    for record in sorted(records, key=lambda r: (r["row"], r["name"])):
        if record["name"] not in planned:
            identity = record["identity"]
            shared = {part: identity[part] for part in ("dataset", "network", "training", "numerics")}
            names = identity["dataset"]["name"], identity["network"]["name"]
            others.setdefault((*names, digest(shared | {"protocol": record["protocol"]})), []).append(record)
    return suites + [suite_of(some, "-".join(k[:2]), ", ".join(k[:2])) for k, some in sorted(others.items())]


def _records(folder: Path | None) -> list:
    from .record import read_all

    if folder is None and not (FOLDER / "records").is_dir():
        raise UserError(
            "this installation has no committed records: use a checkout of the repository, or --records DIR"
        )
    return read_all(folder or FOLDER / "records")


def _write(path: Path, text: str) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
                f.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --out") from error
