"""From a suite file to runs: each cell is the same composition of options that a user could type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose

from ..errors import UserError, suggest
from ..leaderboard.suite import Row, Suite
from .spec import Spec, build_spec

SCORING = ("epsilon", "k", "loss", "draws", "seed")


def chosen_rows(suite: Suite, overrides: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Return the overrides that are left, and the rows they choose: `generator=X` is one generator's rows.

    With settings (`generator.FIELD=VALUE`) it is that generator with these settings, in the suite's protocol.
    """
    names = [o.partition("=")[2] for o in overrides if o.startswith("generator=")]
    settings = [o for o in overrides if o.lstrip("+").startswith("generator.")]
    rest = [o for o in overrides if not o.startswith("generator=")]
    if not names:
        if settings:
            raise UserError(f"{settings[0]}: say which row it is for: add generator=NAME")
        return rest, list(suite.rows)
    if settings:
        return rest, [Row(names[-1], {}, suite.members)]
    rows = [row for row in suite.rows if names[-1] in (row.generator, row.label)]
    if not rows:
        raise UserError(
            f"suite {suite.name} has no row '{names[-1]}': {suggest(names[-1], [r.label for r in suite.rows])}"
        )
    return rest, rows


def compose_cell(suite: Suite, row: Row, base_seed: int, overrides: Sequence[str]) -> Spec:
    """Return the run of one cell: the suite's declarations, the row's settings, and the user's overrides on top."""
    declared = [
        f"dataset={suite.dataset.name}",
        f"network={suite.network.name}",
        f"generator={row.generator}",
        *_settings("dataset", suite.dataset.settings),
        *_settings("network", suite.network.settings),
        *_settings("training", suite.training),
        *_settings("generator", row.settings),
        *(f"{name}={_text(getattr(suite, name))}" for name in SCORING),
        f"epsilons={_text(list(suite.epsilons))}",
        f"members={row.members}",
        f"base_seed={base_seed}",
        f"generator_seed={suite.generator_seed}",
        f"device={suite.device}",
        *(f"{name}={_text(list(getattr(suite, name)))}" for name in ("views", "evidence") if getattr(suite, name)),
        f"view_members={suite.view_members}",
        f"view_cases={suite.view_cases}",
        *([f"threads={suite.threads}"] if suite.threads else []),
    ]
    # A later override of a group (dataset=...) drops the settings that the suite declared for another component.
    replaced = {o.partition("=")[0] for o in overrides}
    kept = [o for o in declared if o.partition("=")[0] not in replaced and o.partition(".")[0] not in replaced]
    return build_spec(compose("config", overrides=[*kept, *overrides]))


def _settings(group: str, settings: Mapping[str, Any]) -> list[str]:
    return [f"{group}.{name}={_text(value)}" for name, value in settings.items()]


def _text(value: Any) -> str:
    """Return a value in Hydra's override grammar, which reads JSON."""
    return "null" if value is None else json.dumps(value)
