"""Model sets from Python: `load_model_set(record)` returns members with weights, and predicts with all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..generators.modelset import Leaves, ModelSet
from ..leaderboard.record import read
from .networks import Network
from .predict import predict


@dataclass
class LoadedSet:
    """A model set with its network; `accepted` are the members of the Rashomon set, decided on val."""

    model_set: ModelSet
    network: Network
    accepted: list[int]

    def member(self, index: int) -> tuple[Leaves, Leaves]:
        """Return all parameters and buffers of one member; UserError where members are no weight vectors."""
        return self.model_set.member(index)

    def predict(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Return float32 logits [member, sample, class] on uint8 images [sample, channel, height, width]."""
        images = torch.as_tensor(images)
        wanted = (self.network.channels, self.network.size, self.network.size)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
            raise UserError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 of shape (sample, {wanted})")
        device = next(iter({**self.model_set.shared_params, **self.model_set.tensors()}.values())).device
        logits = predict(self.network, self.model_set, images.to(device))
        assert logits is not None  # only a streaming prediction returns nothing
        return logits


def load_model_set(
    record: str | Path, artifacts_dir: str | Path = "outputs/artifacts", device: str = "cpu"
) -> LoadedSet:
    """Load the model set behind a record from the artifact store.

    Raises UserError when the record is not one, or its set is not in the store (then run its cell again).
    """
    from .store import Store

    content = read(Path(record))
    if content["status"] != "ok":
        raise UserError(f"{record}: has no model set, it was {content['status']}: {content['reason']}")
    folder = Store(Path(artifacts_dir)).find("set", content["key"])
    if folder is None:
        raise UserError(f"{record}: its model set is not in {artifacts_dir}: run its cell again, or name the store")
    model_set = ModelSet.load(folder, device)
    assert model_set.network is not None  # every stored set describes its network
    return LoadedSet(model_set, Network.restore(model_set.network), content["set"]["accepted"])
