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

from ..errors import UserError
from ..identity import added_later, derive_seed
from .api import Generator, Problem, choices, register_generator
from .modelset import ModelSet, stack


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
        """Return `problem.members` retrained networks; each finished one survives a kill."""
        members = []
        for k in problem.progress(range(problem.members), "retraining", problem.members):
            done = problem.checkpoint.load(f"member {k}")
            if done is None:
                done = self._train(problem, seed, k)
                problem.checkpoint.save(f"member {k}", done)
            params = {n: done[f"param/{n}"] for n in problem.base.params}
            members.append((params, {n: done[f"buffer/{n}"] for n in problem.base.buffers}))
        return stack(members)

    def _train(self, problem: Problem, seed: int, k: int) -> dict:
        member_seed = derive_seed(seed, "retrain", k)
        changes: dict[str, Any] = (
            {} if self.objective == "recipe" else {"objective": self.objective, "groups": self.groups}
        )
        with problem.clock.marginal():
            trained = problem.fit(
                member_seed,
                init_seed=problem.base_seed if self.init == "base" else None,
                resample_seed=member_seed if self.resample == "bootstrap" else None,
                name=f"retraining {k}",
                **changes,
            )
        leaves = {f"param/{n}": p for n, p in trained.params.items()}
        return leaves | {f"buffer/{n}": b for n, b in trained.buffers.items()}
