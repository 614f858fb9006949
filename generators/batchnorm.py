"""BatchNorm statistics of members that were moved in weight space (Izmailov et al. 2018, section 3.3).

`keep` leaves the base's running statistics; `reestimate` recomputes them for each member on a shuffled pass over up to
5,000 training images, as the plain average of the batches' statistics (momentum 1 / (t + 1)) with dropout off, which is
what `torch.optim.swa_utils.update_bn` computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..identity import derive_seed
from .api import Problem
from .modelset import Leaves, ModelSet

POLICIES = ("keep", "reestimate")
IMAGES = 5000
BATCH = 128


def reestimated(problem: Problem, params: Leaves, seed: int) -> Leaves:
    """Return buffers whose running statistics are re-estimated for `params`, on images ordered by `seed`."""
    module = problem.module()
    module.load_state_dict(params, strict=False)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(derive_seed(seed, "batchnorm")))
    with torch.no_grad():
        for rows in order[:IMAGES].to(problem.device).split(BATCH):
            if len(rows) > 1:
                module(problem.train.images[rows])
    return {n: b.detach().clone() for n, b in module.named_buffers()}


def has_batchnorm(problem: Problem) -> bool:
    """Return whether the network has BatchNorm layers."""
    return any(isinstance(layer, _BatchNorm) for layer in problem.module().modules())


def settled_member(problem: Problem, model_set: ModelSet, member: int, policy: str, seed: int) -> tuple[Leaves, Leaves]:
    """Return parameters and buffers of one member of an unsettled set, under the policy."""
    params, buffers = model_set.block(member, member + 1).member(0)
    if policy == "reestimate" and has_batchnorm(problem):
        buffers = reestimated(problem, params, seed)
    return params, buffers


def settle_batchnorm(problem: Problem, model_set: ModelSet, policy: str, seed: int) -> ModelSet:
    """Apply the policy to a set in place: with `reestimate`, every member gets buffers of its own."""
    if not has_batchnorm(problem):
        return model_set
    model_set.batchnorm = policy
    if policy == "reestimate":
        settled: list[dict[str, Tensor]] = []
        for k in problem.progress(range(model_set.size), "BatchNorm", model_set.size):
            with problem.clock.marginal():
                settled.append(settled_member(problem, model_set, k, policy, seed)[1])
        model_set.stacked_buffers = {n: torch.stack([b[n] for b in settled]) for n in settled[0]}
        model_set.shared_buffers = {}
    return model_set
