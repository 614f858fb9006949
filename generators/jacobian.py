"""Jacobians of the logits, image by image, and exact roots of the loss's Hessian: `G = sum_i J_i' H_i J_i = B' B`.

The rows of B are `root(H_i)' J_i`: as many per image as H_i has rank, C - 1 for a softmax over C classes (one for a
binary task), one per label for multi-label tasks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .api import Part, Problem
from .modelset import Leaves

ENTRIES = 2**25
"""Entries of the Jacobians that are held at once beside the result (128 MiB in float32)."""

IMAGES = 64


def jacobian(problem: Problem, names: list[str], images: Tensor, params: Leaves | None = None) -> Tensor:
    """Return dz_c / dw [sample, class, param] of the logits z at `params` (the base's by default), by reverse mode.

    The weights are the leaves `names`, in that order; the network is in eval mode with the base's buffers. The result
    has the dtype of the weights.
    """
    eye = torch.eye(problem.classes, device=images.device).expand(len(images), -1, -1)
    return torch.cat(list(_pulled_back(problem, names, images, eye, params)))


def hessian_root(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Return R [sample, class, row] with `R R' = H`, the Hessian of each sample's loss in its logits, in float64.

    Softmax: `H = diag(p) - p p'` has rank C - 1. `L = diag(s) - p s'`, s = sqrt(p), is a root with L s = 0; the
    reflection that takes s to the first axis makes a column of it vanish, which leaves C - 1 columns
    `s_j (e_j - (p + s_1 e_1) / (1 + s_1))`, j > 1. Multi-label: `diag(sqrt(p (1 - p) / labels))`, zero where a label is
    missing (-1), as in the mean over labels that is the loss.
    """
    logits = logits.double()
    if task == "multilabel":
        known = (labels >= 0) / labels.shape[1]
        return torch.diag_embed((torch.sigmoid(logits) * torch.sigmoid(-logits) * known).sqrt())
    p = logits.softmax(-1)
    s = p.sqrt()
    away = p.clone()
    away[:, 0] += s[:, 0]
    columns = torch.diag_embed(s) - (away / (1 + s[:, :1]))[:, :, None] * s[:, None, :]
    return columns[:, :, 1:]


def rows_per_image(problem: Problem) -> int:
    """Return the number of rows of B that one image gives."""
    return problem.classes - (problem.task != "multilabel")


def root_rows(problem: Problem, names: list[str], part: Part) -> Iterator[Tensor]:
    """Yield the rows `root(H_i)' J_i` [row, param] of B at the base, some images at a time."""
    size = _chunk(problem, names, rows_per_image(problem))
    chunks = list(zip(part.images.split(size), part.labels.split(size), strict=True))
    for images, labels in problem.progress(chunks, "Jacobians", len(chunks)):
        logits = problem.logits(problem.base.params, problem.base.buffers, images)
        roots = hessian_root(logits, labels, problem.task)
        for rows in _pulled_back(problem, names, images, roots, None):
            yield rows.flatten(0, 1)


def _chunk(problem: Problem, names: list[str], rows: int) -> int:
    size = sum(problem.base.params[n].numel() for n in names)
    return max(1, min(IMAGES, ENTRIES // (rows * size)))


def _pulled_back(
    problem: Problem, names: list[str], images: Tensor, cotangents: Tensor, params: Leaves | None
) -> Iterator[Tensor]:
    """Yield `cotangents' J` [sample, row, param] for cotangents [sample, class, row], some images at a time."""
    params = problem.base.params if params is None else params
    varied = {n: params[n].detach() for n in names}
    cotangents = cotangents.to(varied[names[0]].dtype)

    def one(image: Tensor, columns: Tensor) -> Tensor:
        def logits(leaves: Leaves) -> Tensor:
            return problem.network({**params, **leaves}, problem.base.buffers, image[None])[0]

        pull = torch.func.vjp(logits, varied)[1]
        (found,) = torch.func.vmap(pull)(columns.T)
        return torch.cat([found[n].flatten(1) for n in names], 1)

    size = _chunk(problem, names, cotangents.shape[-1])
    for some, columns in zip(images.split(size), cotangents.split(size), strict=True):
        yield torch.func.vmap(one)(some, columns).detach()
