"""Independent retrainings by the same recipe: the reference that all other generators are measured against.

Members differ by initial weights and data order (no augmentation), and with `resample=bootstrap` by their training data
as well. Deep ensembles: Lakshminarayanan, Pritzel, Blundell (NeurIPS 2017); multiplicity of retrained networks in
medical imaging: Lockfisch et al. (arXiv 2507.19408, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..identity import derive_seed
from .api import Generator, Problem, choices, register_generator
from .modelset import ModelSet, stack


@register_generator("retrain")
@dataclass
class Retrain(Generator):
    """Independent retrainings by the base's recipe: the reference for all other generators.

    resample: none | bootstrap (each member trains on its own bootstrap resample, by patient where known);
    init: fresh | base (the base's own initial weights, so that members differ by the order of the data alone).
    """

    resample: str = "none"
    init: str = "fresh"

    def __post_init__(self) -> None:
        choices(self.resample, "generator.resample", ("none", "bootstrap"))
        choices(self.init, "generator.init", ("fresh", "base"))

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
        with problem.clock.marginal():
            trained = problem.fit(
                member_seed,
                init_seed=problem.base_seed if self.init == "base" else None,
                resample_seed=member_seed if self.resample == "bootstrap" else None,
                name=f"retraining {k}",
            )
        leaves = {f"param/{n}": p for n, p in trained.params.items()}
        return leaves | {f"buffer/{n}": b for n, b in trained.buffers.items()}
