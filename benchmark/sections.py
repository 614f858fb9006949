"""The sections of a record: what it says about the set, its costs and the data."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..datasets.api import Data
from ..generators.modelset import ModelSet
from ..metrics.evaluation import Evaluation
from .views import Shifted


def plain_score(score: Any) -> dict[str, Any]:
    """Return a score as a record holds it."""
    return {name: getattr(score, name) for name in score.__dataclass_fields__}


def set_section(model_set: ModelSet, evaluation: Evaluation) -> dict[str, Any]:
    """Return what the record says about the set: who was drawn, who failed, who is in, and by which losses on val.

    A failed member has the base's weights and no loss of its own: null.
    """
    who = evaluation.membership
    return {
        "drawn": model_set.size,
        "failed": model_set.failed,
        "accepted": [int(k) for k in evaluation.accepted],
        "deployable": model_set.deployable,
        "batchnorm": model_set.batchnorm,
        "notes": [*model_set.notes, *evaluation.warnings],
        "diagnostics": model_set.diagnostics,
        "epsilon_in_se": evaluation.epsilon_in_se,
        "val_loss_base": float(who.base),
        "val_loss": [None if failed else float(loss) for loss, failed in zip(who.members, who.failed)],
    }


def cost_section(about: dict[str, Any], accepted: int, drawn: int) -> dict[str, Any]:
    """Return the costs of METRICS.md, 8: fixed and marginal, in seconds and in base trainings (`_bt`)."""
    unit = about["base_training_s"]
    whole = about["fixed_s"] + drawn * about["marginal_s"]
    per_accepted = whole / accepted if accepted else None
    seconds = {"fixed_cost": about["fixed_s"], "marginal_cost": about["marginal_s"], "cost_per_accepted": per_accepted}
    cost = {f"{n}_s": value for n, value in seconds.items()}
    cost |= {f"{n}_bt": None if value is None else value / unit for n, value in seconds.items()}
    return cost | {
        "cost_per_accepted_with_base_bt": (whole + unit) / accepted / unit if accepted else None,
        "base_training_s": unit,
        "peak_memory_bytes": about["peak_memory_bytes"],
        "bytes_per_member": about["bytes_per_member"],
        "resumed": about["attempts"] > 1,
        "hardware": f"{about['device_name']}, {about['threads']} CPU threads",
        "threads": about["threads"],
    }


def data_section(data: Data) -> dict[str, Any]:
    """Return what the record says about the data."""
    patients = [s.patient for s in data.splits.values()]
    known = [p for p in patients if p is not None]
    return {
        "task": data.task,
        "classes": data.classes,
        "positive": data.positive,
        "synthetic": data.synthetic,
        "licence": data.licence,
        "source": data.source,
        "notes": data.notes,
        "sizes": {name: len(split) for name, split in data.splits.items()},
        "patients": {n: len(np.unique(s.patient)) for n, s in data.splits.items() if s.patient is not None}
        if len(known) == len(patients)
        else None,
        "duplicates": data.duplicates,
    }


def views_section(seen: Shifted, digest: str, cases: int) -> dict[str, Any]:
    """Return what the record says about shifted views and other evidence.

    digest: of the arrays of their file; cases: of a part, that they show (0: all).
    """
    return {
        "file": None,
        "digest": digest,
        "members": seen.members,
        **({"cases": cases} if cases else {}),
        "views": sorted(seen.logits),
        "evidence": {where: sorted(named) for where, named in seen.evidence.items()},
        "notes": list(seen.notes),
        "seconds": seen.seconds,
    }
