"""Predictions of a model set: logits [member, sample, class], one function, several strategies.

`loop` runs member after member; `vmap` runs a block of members over stacked weights; `graph`, on a GPU, is the loop
with a member's pass captured in a CUDA graph. The same logits to rounding; which is fastest depends on network and
device (vmapped convolutions become grouped convolutions, slow on a CPU), so the first batch is timed each way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generators.api import NetworkFunction, Trained
from ..generators.modelset import Block, ModelSet
from .cuda_graphs import Captured
from .devices import first_line, is_lost
from .progress import log

STRATEGIES = ("loop", "vmap")
"""On every device, for predictions and for gradients by the images."""

BATCH = 256
BLOCK_BYTES = 256 * 2**20


def block_size(model_set: ModelSet) -> int:
    """Return how many members fit a block of 256 MB of weights."""
    return max(1, min(model_set.size, BLOCK_BYTES // max(1, model_set.bytes_per_member())))


def predict_block(
    network: NetworkFunction,
    block: Block,
    images: Tensor,
    strategy: str = "loop",
    batch: int = BATCH,
    graphs: dict[Any, Captured] | None = None,
) -> Tensor:
    """Return logits [member, sample, class] of a block of members on uint8 images, without gradients.

    Out of memory halves the batch and goes on. graphs: what `graph` has captured for other blocks of the same set.
    """
    captured = {} if graphs is None else graphs
    ways: dict[str, Callable[..., Tensor]] = {"loop": _loop, "vmap": _vmap, "graph": partial(_graph, graphs=captured)}
    run = ways[strategy]
    try:
        with torch.no_grad():
            return torch.cat([run(network, block, part) for part in images.split(batch)], dim=1)
    except torch.OutOfMemoryError:
        if batch <= 1:
            raise
        captured.clear()
        torch.cuda.empty_cache()
        return predict_block(network, block, images, strategy, batch // 2, captured)


def base_block(base: Trained) -> Block:
    """Return the base as a block of one member, so that it is evaluated as members are."""
    params = {n: p[None] for n, p in base.params.items()}
    return Block(0, 1, params, {n: b[None] for n, b in base.buffers.items()}, {}, {})


def choose_strategy(network: NetworkFunction, model_set: ModelSet, images: Tensor) -> str:
    """Return the strategy that is faster on one batch of a few members; `loop` where nothing is stacked."""
    few = images[:BATCH] if images.is_cuda else images[:64]  # a CPU's cost grows evenly: a smaller batch tells as much
    block = model_set.block(0, min(4 if images.is_cuda else 2, model_set.size))
    if (not block.params and not block.buffers) or model_set.size < 2:
        return "loop"
    warm, seconds = few if images.is_cuda else few[:8], {}
    for strategy in (*STRATEGIES, "graph") if images.is_cuda else STRATEGIES:
        graphs: dict[Any, Captured] = {}
        try:
            predict_block(network, block, warm, strategy, graphs=graphs).cpu()  # to read a value is to wait for it
        except RuntimeError as error:
            if strategy != "graph" or is_lost(error):
                raise
            log(f"prediction by a CUDA graph is not possible here: {first_line(error)}")
            continue
        start = time.perf_counter()
        predict_block(network, block, few, strategy, graphs=graphs).cpu()
        seconds[strategy] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def predict(
    network: NetworkFunction,
    model_set: ModelSet,
    images: Tensor,
    *,
    strategy: str | None = None,
    write: Callable[[Block, Tensor], None] | None = None,
    first: int = 0,
    progress: Callable[..., Iterable[Any]] = lambda items, description, total=None: items,
) -> np.ndarray | None:
    """Return float32 logits [member, sample, class] of all members on uint8 images [sample, channel, height, width].

    With `write`, each block's logits go there instead (streaming; `first` is the member to go on with) and the result
    is None.
    """
    strategy = strategy or choose_strategy(network, model_set, images)
    size = block_size(model_set)
    starts = range(first, model_set.size, size)
    collected = []
    graphs: dict[Any, Captured] = {}
    for start in progress(starts, "predicting", len(starts)):
        block = model_set.block(start, min(start + size, model_set.size))
        logits = predict_block(network, block, images, strategy, graphs=graphs).float()
        if write is not None:
            write(block, logits)
        else:
            collected.append(logits.cpu().numpy())
    return None if write is not None else np.concatenate(collected)


def all_logits(
    network: NetworkFunction, base: Trained, model_set: ModelSet, images: Tensor, strategy: str
) -> np.ndarray:
    """Return float32 logits [member + 1, sample, class], the base's first, all in the same strategy."""
    of_base = predict_block(network, base_block(base), images, strategy).float().cpu().numpy()
    members = predict(network, model_set, images, strategy=strategy)
    assert members is not None  # nothing is streamed
    return np.concatenate([of_base, members])


def _loop(network: NetworkFunction, block: Block, images: Tensor) -> Tensor:
    if not block.params and not block.buffers:
        logits = network(block.shared_params, block.shared_buffers, images)
        logits = logits.expand(block.size, *logits.shape)
    else:
        logits = _each(block.size, lambda k: block.member_logits(network, k, images))
    return logits if block.output is None else block.output(logits, images)


def _each(members: int, logits_of: Callable[[int], Tensor]) -> Tensor:
    """Return logits [member, sample, class], each put in its place at once.

    Small tensors kept between the large ones of two passes would hold the allocator's memory: gigabytes of it.
    """
    first = logits_of(0)
    out = first.new_empty((members, *first.shape))
    out[0] = first
    for k in range(1, members):
        out[k] = logits_of(k)
    return out


def _vmap(network: NetworkFunction, block: Block, images: Tensor) -> Tensor:
    logits = torch.func.vmap(lambda p, b: block.logits(network, p, b, images))(block.params, block.buffers)
    return logits if block.output is None else block.output(logits, images)


def _graph(network: NetworkFunction, block: Block, images: Tensor, graphs: dict[Any, Captured]) -> Tensor:
    own = [*block.params.values(), *block.buffers.values()]
    if not own:
        return _loop(network, block, images)

    def one(images: Tensor, *leaves: Tensor) -> Tensor:
        params = dict(zip(block.params, leaves, strict=False))
        return block.logits(network, params, dict(zip(block.buffers, leaves[len(params) :], strict=True)), images)

    captured = graphs.setdefault(tuple(images.shape), Captured(one))
    logits = _each(block.size, lambda k: captured(images, *(leaf[k] for leaf in own)))
    return logits if block.output is None else block.output(logits, images)
