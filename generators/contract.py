"""What every generator must keep to, as one function: `check_generator(MyGenerator(), toy_problem())`.

Modelled on scikit-learn's `check_estimator`. It raises AssertionError naming the clause that is broken.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .api import Generator, Memory, Problem
from .modelset import ModelSet


class Interrupted(Exception):
    """Raised by the contract's checkpoint in the middle of a generation."""


class _Interrupting(Memory):
    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().save(name, tensors)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def check_generator(generator: Generator, problem: Problem, seed: int = 1, seconds: float = 60.0) -> ModelSet | None:
    """Check every clause of the generator contract on `problem` and return the set (None if it is not supported).

    No change to the base, the global random state, dtype or grad mode; size, shapes, dtype, device, finiteness, which
    members failed; the same seed gives the same set and another seed another one; members do not depend on the block
    size; vmap equals loop; saving and loading changes nothing; a generation that was interrupted and resumed equals an
    uninterrupted one; one generation takes less than `seconds`. That a scale of zero gives the base is left to the
    generator's own tests: which setting is the scale, only they know.
    """
    assert is_dataclass(generator), "a generator is a plain dataclass of hyper-parameters"
    assert all(f.name in vars(generator) for f in fields(generator)), "hyper-parameters are stored verbatim"
    reason = generator.supports(problem)
    if reason is not None:
        assert isinstance(reason, str) and reason, "supports() returns a reason or None"
        return None
    model_set = _without_side_effects(generator, problem, seed)
    _well_formed(model_set, problem)
    start = time.perf_counter()
    again = replace(generator).generate(_fresh(problem), seed)
    took = time.perf_counter() - start
    assert took < seconds, f"a toy set took {took:.1f} s, more than {seconds:g}: contract tests must stay quick"
    assert _equal(model_set, again, problem), "the same seed must give the same set"
    other = generator.generate(_fresh(problem), seed + 1)
    assert generator.control or not _equal(model_set, other, problem), "another seed must give another set"
    _independent_of_blocks(model_set, problem)
    _vmap_equals_loop(model_set, problem)
    _survives_saving(model_set, problem)
    _resumes(generator, problem, seed, model_set)
    return model_set


def check_refusal(generator: Generator, problem: Problem) -> str:
    """Return the reason why `generator` does not support `problem`, checking that it gives one instead of failing."""
    reason = generator.supports(problem)
    assert isinstance(reason, str) and reason, f"{type(generator).__name__} must say why it cannot run here"
    return reason


def member_logits(model_set: ModelSet, problem: Problem, max_members: int = 3, vmap: bool = False) -> Tensor:
    """Return logits [member, sample, class] of all members on tune, by the plainest means."""
    rows, images = [], problem.tune.images
    with torch.no_grad():
        for block in model_set.blocks(max_members):
            if vmap and (block.params or block.buffers):
                one = lambda p, b, block=block: block.logits(problem.network, p, b, images)  # noqa: E731
                logits = torch.func.vmap(one)(block.params, block.buffers)
            else:
                logits = torch.stack([block.member_logits(problem.network, k, images) for k in range(block.size)])
            rows.append(logits if block.output is None else block.output(logits, images))
    return torch.cat(rows)


def _fresh(problem: Problem) -> Problem:
    return replace(problem, checkpoint=Memory())


def _without_side_effects(generator: Generator, problem: Problem, seed: int) -> ModelSet:
    before, settings = copy.deepcopy(problem.base), copy.deepcopy(vars(generator))
    state, dtype, grad = _random_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    model_set = generator.generate(_fresh(problem), seed)
    for library, value in _random_state().items():
        assert value == state[library], f"the global random state must not change ({library})"
    assert dtype == torch.get_default_dtype(), "the default dtype must not change"
    assert grad == torch.is_grad_enabled(), "the grad mode must not change"
    assert settings == vars(generator), "generate() must not change the hyper-parameters"
    for name in ("params", "buffers"):
        for n, leaf in getattr(before, name).items():
            assert torch.equal(leaf, getattr(problem.base, name)[n]), f"the base must not change ({n})"
    return model_set


def _random_state() -> dict[str, Any]:
    """Return the state of every global generator of random numbers, comparable by value."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (kind, np.asarray(keys).tolist(), rest),
        "python": random.getstate(),
    }


def _well_formed(model_set: ModelSet, problem: Problem) -> None:
    assert model_set.size == problem.members, f"drew {model_set.size} members instead of {problem.members}"
    count = 0
    for block in model_set.blocks(2):
        assert block.start == count, "blocks come in order"
        count += block.size
        for k in range(block.size):
            params, buffers = block.member(k)
            for found, wanted in ((params, problem.base.params), (buffers, problem.base.buffers)):
                assert set(found) == set(wanted), "a member has the base's leaves"
                for n, leaf in found.items():
                    assert leaf.shape == wanted[n].shape, f"{n} has shape {tuple(leaf.shape)}"
                    assert leaf.dtype == wanted[n].dtype and leaf.device == wanted[n].device, f"{n}: dtype or device"
                    assert bool(torch.isfinite(leaf).all()), f"{n} is not finite"
    assert count == model_set.size, "blocks cover the set"
    failed = [k for k in range(model_set.size) if k in model_set.failed]
    assert model_set.failed == failed, f"failed members are indices of the set, each once, in order: {model_set.failed}"
    assert isinstance(model_set.bytes_per_member(), int)


def _equal(a: ModelSet, b: ModelSet, problem: Problem) -> bool:
    """Return whether two sets have the same leaves and failed members and say the same, to rounding.

    Where a tensor lies in memory decides which kernel a CPU takes, so that a product's last bits may differ.
    """
    if a.failed != b.failed:
        return False
    for k in range(a.size):
        for found, wanted in zip(a.block(k, k + 1).member(0), b.block(k, k + 1).member(0), strict=True):
            if not all(torch.allclose(leaf, wanted[n], rtol=1e-5, atol=1e-6) for n, leaf in found.items()):
                return False
    return torch.allclose(member_logits(a, problem), member_logits(b, problem), rtol=1e-5, atol=1e-5)


def _independent_of_blocks(model_set: ModelSet, problem: Problem) -> None:
    whole = model_set.block(0, model_set.size)
    for k in range(model_set.size):
        for found, wanted in zip(model_set.block(k, k + 1).member(0), whole.member(k), strict=True):
            assert all(torch.equal(leaf, wanted[n]) for n, leaf in found.items()), (
                "members must not depend on the block"
            )
    one, all_ = (member_logits(model_set, problem, n) for n in (1, model_set.size))
    assert torch.allclose(one, all_, rtol=1e-5, atol=1e-5), "members must not depend on the block size"


def _vmap_equals_loop(model_set: ModelSet, problem: Problem) -> None:
    loop, vmap = (member_logits(model_set, problem, vmap=v) for v in (False, True))
    assert torch.allclose(loop, vmap, atol=1e-4), "vmap over members must equal the loop"


def _survives_saving(model_set: ModelSet, problem: Problem) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model_set.save(Path(folder))
        loaded = ModelSet.load(Path(folder), problem.device)
    assert _equal(model_set, loaded, problem), "a loaded set must equal the saved one"
    assert loaded.deployable == model_set.deployable and loaded.notes == model_set.notes


def _resumes(generator: Generator, problem: Problem, seed: int, whole: ModelSet) -> None:
    for after in (1, 3):
        checkpoint = _Interrupting(after)
        interrupted = replace(problem, checkpoint=checkpoint)
        try:
            generator.generate(interrupted, seed)
        except Interrupted:
            checkpoint.left = -1
            resumed = generator.generate(interrupted, seed)
            assert _equal(whole, resumed, problem), f"resumed after {after} checkpoints, the set differs"
