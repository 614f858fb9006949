"""`leaderboard`: the commands of the leaderboard package, and those that need everything else.

`export` writes one member's weights, `verify --rerun` computes a record's whole chain again, `clean` looks after the
artifact store.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..leaderboard.cli import Parser, build_parser, execute, record_path, run_verify

TOLERANCE = 1e-6
ROUNDED = 1e-4
"""Tolerance for a rerun whose predictions are not bitwise those of the record.

Another processor or strategy moves float32 logits by a relative 1e-7 to 1e-6. That takes few of them across a rounding
boundary of float16, where each moves by a relative 1e-3: in 42 sets of 156 and 600 cases, means over cases moved by up
to 2e-6. The worst is one case of 100 that is confidently wrong (a logit of -6): it moves the base's loss by 4e-5. A
changed seed or formula moves scores by 1e-3 and more.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    from .store import explain_os_error

    try:
        sys.exit(execute(_parser(), argv))
    except OSError as error:
        print(f"error: {explain_os_error(error)}", file=sys.stderr)
        sys.exit(2)


def _parser() -> Parser:
    parser, commands = build_parser()
    verify = commands.choices["verify"]
    verify.add_argument("--rerun", action="store_true", help="compute the whole chain again and compare the scores")
    verify.add_argument("--data-root", metavar="DIR", help="as data_root of run-benchmark, for --rerun")
    verify.set_defaults(run=_verify)

    export = commands.add_parser("export", help="write one member's weights as safetensors")
    export.add_argument("record", metavar="RECORD", help="path or name of a record")
    export.add_argument("member", metavar="member=N", help="index of the member, counted from 0")
    export.add_argument("--out", type=Path, metavar="FILE", help="default: <record name>-member<N>.safetensors")
    export.add_argument("--artifacts", type=Path, default=Path("outputs/artifacts"), metavar="DIR", help="the store")
    export.set_defaults(run=_export)

    clean = commands.add_parser("clean", help="show the artifacts and remove what no record needs")
    clean.add_argument("--artifacts", type=Path, default=Path("outputs/artifacts"), metavar="DIR", help="the store")
    clean.add_argument(
        "--records", type=Path, default=Path("outputs/records"), metavar="DIR", help="whose sets to keep"
    )
    clean.add_argument("--remove", action="store_true", help="remove; without it, nothing is touched")
    clean.set_defaults(run=_clean)
    return parser


def _verify(args: argparse.Namespace) -> int:
    if not args.rerun:
        return run_verify(args)
    from ..leaderboard.predictions import PRECISION
    from ..leaderboard.record import read
    from .stages import Run, Session

    record = read(record_path(args.record))
    if record["status"] == "ok" and record["protocol"].get("predictions") != PRECISION:
        raise UserError(
            f"{record['name']}: its scores are not of predictions in {PRECISION}, as this version makes them: "
            "use the version of its commit"
        )
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(record, data_root=args.data_root, artifacts_dir=f"{folder}/a", records_dir=f"{folder}/r")
        run = Run(spec, Session())
        if run.data.digest != record["identity"]["dataset"]["digest"]:
            raise UserError(
                f"{record['name']}: the data differ from those it was made from (content digest): see data_root"
            )
        again, _ = run.record()
    if again["key"] != record["key"]:
        raise UserError(f"{record['name']}: this version gives the run another identity: use the version of its commit")
    differences = compare(record, again)
    if differences:
        raise UserError(
            f"{record['name']}: {len(differences)} scores differ when run again: {'; '.join(differences[:5])}"
        )
    print(f"{record['name']}: run again, {len(record['scores'])} scores agree to {tolerance(record, again):g}")
    return 0


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the scores that differ between two records of one run by more than `tolerance`, a phrase each."""
    differences, limit = [], tolerance(old, new)
    for key in sorted(old["scores"].keys() | new["scores"].keys()):
        a, b = (r["scores"].get(key, {}).get("value") for r in (old, new))
        if (a is None) != (b is None) or (a is not None and abs(a - b) > limit):
            differences.append(f"{key} {a} -> {b}")
    return differences


def tolerance(old: dict[str, Any], new: dict[str, Any]) -> float:
    """Return how far scores of two records of one run may differ: 1e-6 if their predictions are equal, else 1e-4.

    A case that changes its decision, rank or bin moves a score by a share of a case, and is reported.
    """
    return TOLERANCE if old["predictions"]["digest"] == new["predictions"]["digest"] else ROUNDED


def spec_of(record: dict[str, Any], **options: Any) -> Any:
    """Return the spec of the run that made `record`; `options` are the paths of this machine."""
    from ..datasets.api import DATASETS
    from ..generators.api import GENERATORS
    from .networks import NETWORKS
    from .spec import Options, Spec, create, resolve_device
    from .train import Training

    identity, protocol, seen = record["identity"], record["protocol"], record.get("views") or {}
    training = Training(**{k: v for k, v in identity["training"].items() if k != "version"})
    chosen = Options(
        training=training,
        **{n: identity[n] for n in ("base_seed", "resample_seed", "generator_seed", "members")},
        **{n: protocol[n] for n in ("epsilon", "k", "loss", "draws", "seed")},
        epsilons=tuple(protocol["epsilons"]),
        device=identity["numerics"]["device"],
        tf32=identity["numerics"]["tf32"],
        threads=record["cost"].get("threads", 0),
        views=list(seen.get("views", [])),
        view_members=seen.get("members", Options.view_members),
        view_cases=seen.get("cases", Options.view_cases),
        **options,
    )
    registries = {"dataset": DATASETS, "network": NETWORKS, "generator": GENERATORS}
    parts = {
        kind: create(registry, {k: v for k, v in identity[kind].items() if k != "digest"})
        for kind, registry in registries.items()
    }
    names = {kind: identity[kind]["name"] for kind in registries}
    return Spec(**parts, training=training, options=chosen, device=resolve_device(chosen.device), names=names)


def _export(args: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from ..leaderboard.record import read
    from .load import load_model_set

    number = args.member.removeprefix("member=")
    if not number.isdigit():
        raise UserError(f"{args.member}: name the member as member=N")
    path = record_path(args.record)
    params, buffers = load_model_set(path, args.artifacts).member(int(number))
    out = args.out or Path(f"{read(path)['name']}-member{number}.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    save_file({n: t.clone().contiguous() for n, t in {**params, **buffers}.items()}, temporary)
    os.replace(temporary, out)
    print(out)
    return 0


def _clean(args: argparse.Namespace) -> int:
    from ..identity import digest
    from ..leaderboard.record import read_all
    from .store import Store

    store = Store(args.artifacts)
    records = read_all(args.records)  # a mistyped folder must not read as "no record needs anything"
    datasets = [record["identity"]["dataset"] for record in records]
    needed = set()
    for record in records:
        base = {n: record["identity"][n] for n in BASE_PARTS}
        needed |= {digest(base), record["key"], digest({"set": record["key"], "views": ["val", "test"]})}
    freed = 0
    for stage, key, size in store.contents():
        spec = store.spec(stage, key)
        keep = key in needed
        if spec is not None and stage == "part":
            keep = spec["base"] in needed
        elif spec is not None and stage == "view":
            keep = spec["set"] in needed
        elif spec is not None and stage == "images":
            keep = any(_shows(dataset, spec) for dataset in datasets)
        action = "needed" if keep else "removed" if args.remove else "not needed"
        print(f"{stage:<12} {key[:13]:<13} {size / 1e6:10.1f} MB  {action}")
        if not keep:
            freed += size
            if args.remove:
                shutil.rmtree(args.artifacts / stage / key)
    what = "removed" if args.remove else "can be removed: leaderboard clean --remove"
    print(f"{freed / 1e6:.1f} MB that no record of {args.records} needs {what}")
    return 0


def _shows(dataset: dict[str, Any], films: dict[str, Any]) -> bool:
    """Whether decoded films are those of a dataset: of its name, and rendered as it says, where it says so."""
    same = all(dataset.get(name, value) == value for name, value in films["rendering"].items())
    return dataset["name"] == films["dataset"] and same


BASE_PARTS = ("dataset", "network", "training", "base_seed", "resample_seed", "numerics")
"""Sections of an identity that the base network depends on (Spec.base_identity)."""
