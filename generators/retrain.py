"""Independent retrainings by the same recipe: the reference that all other generators are measured against.

Members differ by initial weights and data order (no augmentation), and with `resample=bootstrap` by their training data
as well. With `objective=group_dro` the recipe is another one, and the set is no reference but the rival that a member
chosen from a Rashomon set has to beat (Sagawa, Koh, Hashimoto, Liang, ICLR 2020). Deep ensembles: Lakshminarayanan,
Pritzel, Blundell (NeurIPS 2017); multiplicity of retrained networks in medical imaging: Lockfisch et al. (arXiv
2507.19408, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Diverged, UserError
from ..identity import added_later, derive_seed
from .api import WAYS, AtOnce, Generator, Plan, Problem, Trained, choices, register_generator
from .modelset import ModelSet, stack

FAILED = "failed"


@register_generator("retrain")
@dataclass
class Retrain(Generator):
    """Independent retrainings by the base's recipe: the reference for all other generators.

    resample: none | bootstrap (each member trains on its own bootstrap resample, by patient where known);
    init: fresh | base (the base's own initial weights, so that members differ by the order of the data alone);
    objective: recipe (the base's) | erm | class_balanced | group_dro; groups: of group_dro, such as `sex*label`.
    """

    resample: str = "none"
    init: str = "fresh"
    objective: str = added_later("recipe")
    groups: str = added_later("")

    def __post_init__(self) -> None:
        choices(self.resample, "generator.resample", ("none", "bootstrap"))
        choices(self.init, "generator.init", ("fresh", "base"))
        choices(self.objective, "generator.objective", ("recipe", "erm", "class_balanced", "group_dro"))
        if bool(self.groups) != (self.objective == "group_dro"):
            raise UserError(
                f"generator.groups={self.groups} with generator.objective={self.objective}: group_dro needs groups, "
                "such as sex*label, and nothing else takes them"
            )

    def supports(self, problem: Problem) -> str | None:
        """Return why the training samples cannot be grouped as asked, None where they can or need not be."""
        try:
            if self.groups:
                problem.groups(self.groups)
        except UserError as reason:
            return str(reason)
        return None

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        """Return `problem.members` retrained networks; each finished one survives a kill.

        One whose loss stops being finite has failed, the others go on. Raises Diverged where all have.
        """
        how = self._at_once(problem)
        size = how.members
        chunks = [range(i, min(i + size, problem.members)) for i in range(0, problem.members, size)]
        done: dict[int, dict[str, Tensor]] = {}
        for chunk in problem.progress(chunks, "retraining", len(chunks)):
            done |= self._members(problem, seed, chunk, how.way)
        base = {f"param/{n}": p for n, p in problem.base.params.items()}
        base |= {f"buffer/{n}": b for n, b in problem.base.buffers.items()}
        failed = [k for k, leaves in done.items() if FAILED in leaves]
        if len(failed) == problem.members:
            raise Diverged("retraining: the loss of every member stopped being finite: lower training.lr")
        kept = [base if k in failed else done[k] for k in range(problem.members)]
        members = stack(
            [
                (
                    {n: leaves[f"param/{n}"] for n in problem.base.params},
                    {n: leaves[f"buffer/{n}"] for n in problem.base.buffers},
                )
                for leaves in kept
            ]
        )
        members.failed = failed
        members.diagnostics = {"trained_at_once": size, "way": how.way} if size > 1 else {}
        members.notes = [f"{len(failed)} members diverged in training"] if failed else []
        return members

    def _at_once(self, problem: Problem) -> AtOnce:
        """Return how members are trained at once; chosen once, so that a resumed set goes on in the same way."""
        together = problem.fit_together
        if together is None or self.objective != "recipe":
            return AtOnce(1)
        stored = problem.checkpoint.load("trained at once")
        if stored is None:
            with problem.clock.fixed():
                how = together.at_once(problem.members)
            stored = {"members": torch.tensor(how.members), "way": torch.tensor(WAYS.index(how.way))}
            problem.checkpoint.save("trained at once", stored)
        return AtOnce(int(stored["members"]), WAYS[int(stored["way"])])

    def _members(self, problem: Problem, seed: int, chunk: range, way: str) -> dict[int, dict[str, Tensor]]:
        """Return the leaves of some members, trained where they are not stored; of a failed one, `FAILED`."""
        done = {k: stored for k in chunk if (stored := problem.checkpoint.load(f"member {k}")) is not None}
        if len(done) == len(chunk):
            return done
        plans = [self._plan(problem, derive_seed(seed, "retrain", k)) for k in chunk]
        with problem.clock.marginal():
            if len(chunk) > 1 and problem.fit_together is not None:
                trained = problem.fit_together(plans, way=way, name=f"retraining {chunk[0]} to {chunk[-1]}")
            else:
                trained = [self._alone(problem, plan, k) for k, plan in zip(chunk, plans, strict=True)]
        for k, found in zip(chunk, trained, strict=True):
            if isinstance(found, Diverged):
                done[k] = {FAILED: torch.tensor(True)}
            else:
                done[k] = {f"param/{n}": p for n, p in found.params.items()}
                done[k] |= {f"buffer/{n}": b for n, b in found.buffers.items()}
            problem.checkpoint.save(f"member {k}", done[k])
        return done

    def _plan(self, problem: Problem, seed: int) -> Plan:
        return Plan(
            seed,
            init_seed=problem.base_seed if self.init == "base" else None,
            resample_seed=seed if self.resample == "bootstrap" else None,
        )

    def _alone(self, problem: Problem, plan: Plan, k: int) -> Trained | Diverged:
        changes: dict[str, Any] = (
            {} if self.objective == "recipe" else {"objective": self.objective, "groups": self.groups}
        )
        try:
            return problem.fit(
                plan.seed,
                init_seed=plan.init_seed,
                resample_seed=plan.resample_seed,
                name=f"retraining {k}",
                **changes,
            )
        except Diverged as error:
            return error
