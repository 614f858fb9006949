"""Random changes of training images, drawn anew for every epoch and carried out on the device that holds them.

With them the end of a training is no mode of any loss that a Laplace approximation sees, so the recipe has none by
default. Shifts pad with black; both are those of He, Zhang, Ren, Sun (CVPR 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..identity import derive_seed

AUGMENTATIONS = ("none", "shift", "shift_flip")


def draw_changes(kind: str, seed: int, epoch: int, samples: int, side: int) -> Tensor | None:
    """Return what happens to every sample in an epoch, int64 [sample, 3]: rows down, columns right, mirrored (0, 1).

    Shifts are uniform up to a fourteenth of the side either way (2 of 28 pixels). None where nothing happens.
    """
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(derive_seed(seed, "augment", epoch))
    most = max(1, side // 14)
    shifts = torch.randint(-most, most + 1, (samples, 2), generator=generator)
    flips = torch.randint(2 if kind == "shift_flip" else 1, (samples, 1), generator=generator)
    return torch.cat([shifts, flips], dim=1)


def changed(images: Tensor, changes: Tensor) -> Tensor:
    """Return images [sample, channel, height, width], mirrored left to right and then shifted as `changes` say.

    changes: as drawn by `draw_changes`, on the device of the images.
    """
    samples, channels, height, width = images.shape
    down, right, mirrored = changes[:, :, None].unbind(1)
    rows = torch.arange(height, device=images.device) - down
    columns = torch.arange(width, device=images.device) - right
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    columns = torch.where(mirrored == 1, width - 1 - columns, columns)
    sample = torch.arange(samples, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1)[:, None, :, None], columns.clamp(0, width - 1)[:, None, None, :]
    return images[sample, channel, rows, columns] * inside
