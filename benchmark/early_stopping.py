"""Early stopping by the loss on tune: the weights of the best epoch, once some epochs have brought nothing better.

The learning rate keeps the schedule of the recipe's full length. The part that decides is tune, which a recipe may see;
val decides membership and must not (Prechelt 1998).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..generators.api import NetworkFunction, Part, Trained
from ..generators.modelset import under
from .objectives import mean_loss
from .predict import base_block, predict_block


@dataclass
class BestEpoch:
    """The weights of the epoch with the least loss on tune so far.

    patience: epochs without a smaller loss after which training is to stop; since: how many there were.
    """

    patience: int
    tune: Part
    loss: float = math.inf
    since: int = 0
    weights: Trained | None = None

    @property
    def stopped(self) -> bool:
        """Whether training is to stop."""
        return self.since >= self.patience

    def see(self, network: NetworkFunction, now: Trained) -> None:
        """Take the weights at the end of an epoch into account; BatchNorm in eval mode."""
        logits = predict_block(network, base_block(now), self.tune.images)[0]
        loss = float(mean_loss(logits, self.tune.labels))
        self.since += 1
        if loss < self.loss or self.weights is None:
            params, buffers = ({n: t.detach().clone() for n, t in o.items()} for o in (now.params, now.buffers))
            self.loss, self.since, self.weights = loss, 0, Trained(params, buffers)

    def state(self) -> dict[str, Tensor]:
        """Return all of it as tensors, for a checkpoint."""
        state = {"best": torch.tensor([self.loss, self.since], dtype=torch.float64)}
        if self.weights is not None:
            state |= {f"param/{n}": p for n, p in self.weights.params.items()}
            state |= {f"buffer/{n}": b for n, b in self.weights.buffers.items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put what `state` returned back in place."""
        loss, since = state["best"].tolist()
        self.loss, self.since = loss, int(since)
        self.weights = Trained(under("param/", state), under("buffer/", state))
