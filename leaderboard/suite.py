"""A suite: what one table of the board compares, declared beforehand in one YAML file.

A file of `leaderboard/suites/` (or any path) is a mapping with these keys; only title, dataset, network, base_seeds and
rows are required:

    title: str              heading of the table
    description: str        a sentence or two under the heading
    dataset: {name, ...}    name of a dataset and, beside it, its settings, as in {name: breastmnist, size: 28}
    network: {name, ...}    name of a network and its settings
    training: {...}         settings of the training recipe that differ from its defaults
    base_seeds: [int]       seeds of the base networks; at least 5 on a board, for the base is a random effect
    generator_seed: int     seed of the generators (0)
    members: int            networks drawn per row and base seed (20)
    epsilon: float          tolerance of membership on val (0.05), in nats if the loss is nll
    epsilons: [float]       tolerances at which acceptance is shown ([0.02, 0.05, 0.1])
    k: int                  common number of members at which set metrics are compared (5)
    loss: str               nll | zero_one | auroc | balanced_accuracy | brier (nll)
    draws: int              bootstrap draws over patients (1000)
    seed: int               seed of those draws (0)
    margin: float           loss a selected member may give up, in units of the loss (0.01)
    threads: int            CPU threads of every run; left out: the machine's own number
    device: str             cpu | cuda (cpu); one table is one type of device
    predictions: bool       whether predictions are committed beside the records (false)
    views: [str]            shifted views that are predicted and committed, as in [jpeg-3, pgd-4, ood-noise] ([])
    evidence: [str]         what else is measured and committed: energy | max_logit | mahalanobis | knn | vim (detectors
                            of outliers) | saliency | transfer | membership ([])
    view_members: int       members of every set that views and evidence take, the first ones (20)
    view_cases: int         cases of val and of test that they show, drawn at random once for all; left out: all
    intersections: [str]    groups that the fairness page forms from attributes of the data, as in ["sex*view"] ([])
    min_patients: int       patients that a group needs to count (25)
    strata: [str]           hidden strata that are looked for: clusters | slices | disagreement ([])
    truths: [str]           truths of a synthetic set that strata are held against, as in [drain] ([])
    board: bool             whether the suite is part of the committed leaderboard, which then needs 5 base seeds and
                            all controls (false)
    single_base: bool       a board of one base network, declared as such: its intervals are over test cases only, and
                            it has no ranks (false)
    rows: [row]             in the order of the table; a row is a generator, or {generator: {setting: value}} with
                            the settings that differ from the generator's defaults; `members:` beside the name of the
                            generator draws another number for this row

A row is named by its generator and settings, `laplace[structure=kron]`, and so is a record: a setting that repeats a
default would name a row that no record has. Names of settings are checked by whoever runs the suite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, suggest
from ..identity import row_label
from ..metrics.api import LOSSES, MIN_PATIENTS, Settings
from ..metrics.views import EVIDENCE, parse_view

SUITES = Path(__file__).parent / "suites"
CONTROLS = ("identical", "logit_noise", "temperature")
"""Generators that show what a metric does not mean; in every table, never ranked."""

ENOUGH = 5
"""Base seeds that a board needs: the base network is a random effect, and one base says little about another."""

DEVICES = ("cpu", "cuda")
STRATA = ("clusters", "slices", "disagreement")


@dataclass(frozen=True)
class Component:
    """A dataset or a network: its name and the settings the suite declares."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return row_label(self.name, self.settings)


@dataclass(frozen=True)
class Row:
    """One row of a table: a generator, the settings that differ from its defaults, and how many members it draws."""

    generator: str
    settings: dict[str, Any]
    members: int

    @property
    def label(self) -> str:
        return row_label(self.generator, self.settings)

    @property
    def control(self) -> bool:
        return self.generator in CONTROLS


@dataclass(frozen=True)
class Suite:
    """A checked suite file; the module's docstring documents its keys."""

    name: str
    title: str
    dataset: Component
    network: Component
    base_seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    description: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    generator_seed: int = 0
    members: int = 20
    epsilon: float = Settings.epsilon
    epsilons: tuple[float, ...] = Settings.epsilons
    k: int = Settings.k
    loss: str = Settings.loss
    draws: int = Settings.draws
    seed: int = Settings.seed
    margin: float = 0.01
    threads: int | None = None
    device: str = "cpu"
    predictions: bool = False
    views: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    view_members: int = 20
    view_cases: int = 0
    intersections: tuple[str, ...] = ()
    min_patients: int = MIN_PATIENTS
    strata: tuple[str, ...] = ()
    truths: tuple[str, ...] = ()
    board: bool = False
    single_base: bool = False

    @property
    def settings(self) -> Settings:
        """What the suite declares about scoring."""
        return Settings(
            epsilon=self.epsilon, epsilons=self.epsilons, k=self.k, loss=self.loss, draws=self.draws, seed=self.seed
        )

    def row(self, label: str) -> Row:
        """Return the row named `label`; UserError with close names when there is none."""
        for row in self.rows:
            if row.label == label:
                return row
        raise UserError(f"suite {self.name} has no row '{label}': {suggest(label, [r.label for r in self.rows])}")

    def cells(self) -> Iterator[tuple[Row, int]]:
        """Yield (row, base seed) in the order in which a suite runs: all rows of the first base seed come first."""
        for base_seed in self.base_seeds:
            for row in self.rows:
                yield row, base_seed


def suite_names(folder: Path = SUITES) -> list[str]:
    """Return the names of the suite files in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def board_suites(folder: Path = SUITES) -> list[Suite]:
    """Return the suites of `folder` that are part of the committed board, by name."""
    suites = [load_suite(folder / f"{name}.yaml") for name in suite_names(folder)]
    return [suite for suite in suites if suite.board]


def load_suite(name_or_path: str | Path) -> Suite:
    """Read and check a suite, by name from the package or by path (anything with a slash or ending in .yaml, .yml).

    Raises UserError, one line that names file, key and close names.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or "\\" in text or text.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
    else:
        path = SUITES / f"{text}.yaml"
        if text not in suite_names():
            raise UserError(f"unknown suite '{text}': {suggest(text, suite_names())}")
    return _check(path, _read(path))


def suite_of(records: Sequence[Mapping[str, Any]], name: str, title: str, description: str = "") -> Suite:
    """Return the suite that records of one dataset and one network amount to, as the first of them declares it.

    Rows stand in the order in which the records come. For runs that no suite file planned.
    """
    identity, protocol = records[0]["identity"], records[0]["protocol"]
    rows: dict[str, Row] = {}
    for record in records:
        own = record["identity"]
        rows.setdefault(record["row"], Row(own["generator"]["name"], _settings_of(record["row"]), own["members"]))
    return Suite(
        name=name,
        title=title,
        description=description,
        dataset=Component(identity["dataset"]["name"]),
        network=Component(identity["network"]["name"]),
        base_seeds=tuple(sorted({r["identity"]["base_seed"] for r in records})),
        rows=tuple(rows.values()),
        generator_seed=identity["generator_seed"],
        members=identity["members"],
        device=identity["numerics"]["device"],
        epsilons=tuple(protocol["epsilons"]),
        **{key: protocol[key] for key in ("epsilon", "k", "loss", "draws", "seed")},
    )


def _settings_of(label: str) -> dict[str, Any]:
    """Return the settings that a row's label shows, as text: `laplace[structure=kron]` -> {"structure": "kron"}."""
    inside = label.partition("[")[2].removesuffix("]")
    return dict(part.partition("=")[::2] for part in inside.split(",")) if inside else {}


class _Loader(yaml.SafeLoader):
    """YAML without two of its traps: a repeated key is an error, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"key '{key.value}' of line {key.start_mark.line + 1} stands above already")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: the suite file cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not YAML ({reason}): correct it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a suite is a mapping with the keys title, dataset, network, base_seeds, rows")
    return content


def _check(path: Path, content: dict[Any, Any]) -> Suite:
    required = [f.name for f in fields(Suite) if f.name != "name" and _required(f)]
    for key in content:
        if key not in CHECKS:
            raise UserError(f"{path}: unknown key '{key}': {suggest(str(key), CHECKS)}")
    for key in required:
        if key not in content:
            raise UserError(f"{path}: key '{key}' is missing: add it")
    values = {key: CHECKS[key](f"{path}: {key}", value) for key, value in content.items()}
    members, k = values.get("members", Suite.members), values.get("k", Suite.k)
    values["rows"] = tuple(_row(f"{path}: rows[{i}]", row, members) for i, row in enumerate(values["rows"]))
    labels = [row.label for row in values["rows"]]
    for i, row in enumerate(values["rows"]):
        if labels.index(row.label) < i:
            raise UserError(f"{path}: rows[{i}] repeats '{row.label}': remove one of the two")
        if row.members < k:
            raise UserError(f"{path}: rows[{i}] draws {row.members} members, fewer than k = {k}: draw more or lower k")
    if values.get("board"):
        if values.get("single_base"):
            if len(values["base_seeds"]) > 1:
                raise UserError(
                    f"{path}: single_base: there are {len(values['base_seeds'])} base_seeds: remove the key"
                )
        elif len(values["base_seeds"]) < ENOUGH:
            raise UserError(f"{path}: base_seeds: a board needs at least {ENOUGH}: add some, or set board: false")
        if absent := [c for c in CONTROLS if c not in [row.generator for row in values["rows"]]]:
            raise UserError(f"{path}: rows: a board shows every control, {', '.join(absent)} is absent: add it")
    return Suite(name=path.stem, **values)


def _required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _row(where: str, row: Any, members: int) -> Row:
    if isinstance(row, str):
        return Row(_name(where, row), {}, members)
    generators = [key for key in row if key != "members"] if isinstance(row, dict) else []
    if len(generators) != 1:
        raise UserError(f"{where} is no row: write the name of a generator, or {{name: {{setting: value}}}}")
    generator = _name(where, generators[0])
    if "members" in row:
        members = _integer(f"{where}.members", row["members"], least=1)
    settings = row[generators[0]]
    return Row(generator, _mapping(f"{where}.{generator}", {} if settings is None else settings), members)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} must be text, not {_shown(value)}")
    return " ".join(value.split())


def _name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*", value):
        raise UserError(f"{where} must be a name, not {_shown(value)}")
    return value


def _choice(where: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UserError(f"{where} is {_shown(value)}: {suggest(str(value), known)}")
    return value


def _product(where: str, value: Any) -> str:
    """Return names joined by `*`, as in sex*view."""
    names = value.split("*") if isinstance(value, str) else []
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f'{where} must be two or more different attributes, as in "sex*view", not {_shown(value)}')
    return "*".join(_name(where, name) for name in names)


def _view(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be the name of a view, as in jpeg-3, not {_shown(value)}")
    try:
        parse_view(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return value


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where} must be true or false, not {_shown(value)}")
    return value


def _integer(where: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where} must be a whole number of at least {least}, not {_shown(value)}")
    return value


def _number(where: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):  # also false for NaN
        raise UserError(f"{where} must be a number of at least 0, not {_shown(value)}")
    return float(value)


def _distinct(where: str, value: Any, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a list with at least one entry, not {_shown(value)}")
    entries = tuple(check(f"{where}[{i}]", entry) for i, entry in enumerate(value))
    if len(set(entries)) < len(entries):
        raise UserError(f"{where} names an entry twice: {_shown(value)}")
    return entries


def _rows(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a list of generators, not {_shown(value)}")
    return value


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping of settings, not {_shown(value)}")
    for key, entry in value.items():
        _name(f"{where}: the name of a setting", key)
        for part in entry if isinstance(entry, list) else [entry]:
            if part is not None and not isinstance(part, (bool, int, float, str)):
                raise UserError(f"{where}.{key} must be a number, text, true, false, null or a list of them")
    return dict(value)


def _component(where: str, value: Any) -> Component:
    settings = _mapping(where, value)
    if "name" not in settings:
        raise UserError(f"{where} needs a name, as in {{name: ...}}")
    return Component(_name(f"{where}.name", settings.pop("name")), settings)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "title": _text,
    "description": _text,
    "dataset": _component,
    "network": _component,
    "training": _mapping,
    "base_seeds": partial(_distinct, check=partial(_integer, least=0)),
    "generator_seed": partial(_integer, least=0),
    "members": partial(_integer, least=1),
    "epsilon": _number,
    "epsilons": partial(_distinct, check=_number),
    "k": partial(_integer, least=1),
    "loss": partial(_choice, known=LOSSES),
    "draws": partial(_integer, least=1),
    "seed": partial(_integer, least=0),
    "margin": _number,
    "threads": partial(_integer, least=1),
    "device": partial(_choice, known=DEVICES),
    "predictions": _flag,
    "views": partial(_distinct, check=_view),
    "evidence": partial(_distinct, check=partial(_choice, known=EVIDENCE)),
    "view_members": partial(_integer, least=1),
    "view_cases": partial(_integer, least=1),
    "intersections": partial(_distinct, check=_product),
    "min_patients": partial(_integer, least=5),
    "strata": partial(_distinct, check=partial(_choice, known=STRATA)),
    "truths": partial(_distinct, check=_name),
    "board": _flag,
    "single_base": _flag,
    "rows": _rows,
}
