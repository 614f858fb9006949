"""CUDA graphs: what a function launches is recorded once and replayed, without the interpreter between two kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before a capture, in which libraries choose their algorithms and ask for their memory."""


class Captured:
    """A function of tensors on a CUDA device, whose shapes never change.

    Its result is overwritten by the next call. moved: tensors that the function changes in place; the calls that warm
    up leave no trace in them. The function must not wait for the device (no `.item()`, no copy to the host).
    """

    def __init__(self, function: Callable[..., Any], moved: Iterable[Tensor] = ()):
        self.function, self.moved = function, list(moved)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the function returns for `inputs`, in tensors that the next call writes to."""
        if self.graph is None:
            self.graph = self._capture(inputs)
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output

    def _capture(self, inputs: Iterable[Tensor]) -> torch.cuda.CUDAGraph:
        """Record the function; a recording carries nothing out, so only the warm-up has to be undone."""
        self.inputs = [t.detach().clone() for t in inputs]
        before = [t.detach().clone() for t in self.moved]
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*self.inputs)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self.function(*self.inputs)
        with torch.no_grad():
            for tensor, was in zip(self.moved, before, strict=True):
                tensor.copy_(was)
        return graph
