"""Early stopping by the loss on tune: the weights of the best epoch, once some epochs have brought nothing better.

The learning rate keeps the schedule of the recipe's full length. The part that decides is tune, which a recipe may see;
val decides membership and must not (Prechelt 1998).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..generators.api import NetworkFunction, Part, Trained
from ..generators.modelset import under
from .objectives import mean_loss
from .predict import base_block, predict_block


def loss_on(network: NetworkFunction, trained: Trained, part: Part) -> float:
    """Return the mean loss in nats, BatchNorm in eval mode."""
    return float(mean_loss(predict_block(network, base_block(trained), part.images)[0], part.labels))


@dataclass
class BestEpoch:
    """The weights of the epoch with the least loss so far.

    patience: epochs without a smaller loss after which training is to stop; since: how many there were; leaves: copies,
    named `param/...` and `buffer/...`.
    """

    patience: int
    loss: float = math.inf
    since: int = 0
    leaves: dict[str, Tensor] = field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        """Whether training is to stop; it stays so."""
        return self.since >= self.patience

    def see(self, loss: float, now: Trained) -> None:
        """Take the weights at the end of an epoch, and their loss, into account."""
        self.since += 1
        if loss < self.loss or not self.leaves:
            self.loss, self.since = loss, 0
            self.leaves = {f"param/{n}": p.detach().clone() for n, p in now.params.items()}
            self.leaves |= {f"buffer/{n}": b.detach().clone() for n, b in now.buffers.items()}

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return parameters and buffers of the best epoch."""
        return under("param/", self.leaves), under("buffer/", self.leaves)

    def state(self) -> dict[str, Tensor]:
        """Return all of it as tensors, for a checkpoint."""
        return {**self.leaves, "best": torch.tensor([self.loss, self.since], dtype=torch.float64)}

    @staticmethod
    def restored(patience: int, state: Mapping[str, Tensor]) -> BestEpoch:
        """Return what `state` was made of."""
        loss, since = state["best"].tolist()
        return BestEpoch(patience, loss, int(since), {n: t for n, t in state.items() if n != "best"})
