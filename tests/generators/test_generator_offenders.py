"""The contract catches what it promises to catch: generators that break one clause each fail with that clause."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from multiplicity_bench.generators.api import Generator, Memory, Problem
from multiplicity_bench.generators.contract import check_generator, check_refusal
from multiplicity_bench.generators.modelset import Block, DiagonalSet, ModelSet, StackedSet
from multiplicity_bench.generators.swag import SWAG

COUNTER = itertools.count()


@dataclass
class Sound(Generator):
    """Small independent noise on every weight."""

    sd: float = 0.01

    def generate(self, problem: Problem, seed: int) -> ModelSet:
        return self.around(problem, seed)

    def around(self, problem: Problem, seed: int, kind: type[DiagonalSet] = DiagonalSet, size: int = 0) -> DiagonalSet:
        mean = dict(problem.base.params)
        count = sum(leaf.numel() for leaf in mean.values())
        return kind(
            size=size or problem.members,
            shared_params={},
            shared_buffers=dict(problem.base.buffers),
            mean=mean,
            factors={"sd": torch.full((count,), self.sd)},
            seed=seed,
        )


class ChangesBase(Sound):
    def generate(self, problem, seed):
        drawn = self.around(problem, seed)
        next(iter(problem.base.params.values())).add_(1e-3)
        return drawn


class UsesTorchsGlobalNoise(Sound):
    def generate(self, problem, seed):
        torch.randn(3)
        return self.around(problem, seed)


class SeedsNumpy(Sound):
    def generate(self, problem, seed):
        np.random.seed(seed)  # noqa: NPY002  (the offence)
        return self.around(problem, seed)


class SeedsPython(Sound):
    def generate(self, problem, seed):
        random.seed(seed)
        return self.around(problem, seed)


class ChangesDtype(Sound):
    def generate(self, problem, seed):
        drawn = self.around(problem, seed)
        torch.set_default_dtype(torch.float64)
        return drawn


class ChangesGradMode(Sound):
    def generate(self, problem, seed):
        torch.set_grad_enabled(False)
        return self.around(problem, seed)


class ChangesItsSettings(Sound):
    def generate(self, problem, seed):
        self.sd *= 0.5
        return self.around(problem, seed)


class IgnoresSeed(Sound):
    def generate(self, problem, seed):
        return self.around(problem, 7)


class IsNotReproducible(Sound):
    def generate(self, problem, seed):
        return self.around(problem, next(COUNTER))


class DrawsTooFew(Sound):
    def generate(self, problem, seed):
        return self.around(problem, seed, size=problem.members - 1)


class HasNaN(Sound):
    def generate(self, problem, seed):
        drawn = self.around(problem, seed)
        drawn.factors["sd"][3] = float("nan")
        return drawn


class HasDoubleWeights(Sound):
    def generate(self, problem, seed):
        drawn = self.around(problem, seed)
        drawn.mean = {n: leaf.double() for n, leaf in drawn.mean.items()}
        return drawn


class HasWrongShape(Sound):
    def generate(self, problem, seed):
        drawn = self.around(problem, seed)
        drawn.mean = {n: leaf.reshape(-1) for n, leaf in drawn.mean.items()}
        return drawn


class LosesALeaf(Sound):
    def generate(self, problem, seed):
        drawn = self.around(problem, seed)
        name = next(iter(drawn.mean))
        drawn.factors["sd"] = drawn.factors["sd"][drawn.mean.pop(name).numel() :]
        return drawn


@dataclass
class ByBlock(DiagonalSet):
    kind: ClassVar[str] = "test: by block"

    def block(self, start: int, stop: int) -> Block:
        shifted = replace(self, seed=self.seed + start)
        return DiagonalSet.block(shifted, start, stop)


class DependsOnBlock(Sound):
    def generate(self, problem, seed):
        return self.around(problem, seed, ByBlock)


@dataclass
class Forgetful(DiagonalSet):
    kind: ClassVar[str] = "test: forgetful"

    def settings(self):
        return {**super().settings(), "seed": "0"}


class LosesItsSeedWhenSaved(Sound):
    def generate(self, problem, seed):
        return self.around(problem, seed, Forgetful)


class TrustsAHalfFinishedCheckpoint(Sound):
    """Stores the members one by one but takes the first stored state for a finished one."""

    def generate(self, problem, seed):
        if (done := problem.checkpoint.load("members")) is None:
            done = {n: leaf[None].repeat(problem.members, *[1] * leaf.ndim) for n, leaf in problem.base.params.items()}
            for k in range(problem.members):
                for n, leaf in self.around(problem, seed).leaves(k).items():
                    done[n][k] = leaf
                problem.checkpoint.save("members", done)
        return StackedSet(problem.members, {}, dict(problem.base.buffers), params=done)


class NamesAStrangerAsFailed(Sound):
    def generate(self, problem, seed):
        return replace(self.around(problem, seed), failed=[problem.members])


class ForgetsFailuresWhenResumed(Sound):
    def generate(self, problem, seed):
        resumed = problem.checkpoint.load("members") is not None
        problem.checkpoint.save("members", {})
        return replace(self.around(problem, seed), failed=[] if resumed else [2])


@dataclass
class Silent(DiagonalSet):
    kind: ClassVar[str] = "test: silent"

    @classmethod
    def restore(cls, tensors, settings, **common):
        return super().restore(tensors, settings, **{**common, "failed": []})


class LosesItsFailuresWhenSaved(Sound):
    def generate(self, problem, seed):
        return replace(self.around(problem, seed, Silent), failed=[0])


class GivesAnEmptyReason(Sound):
    def supports(self, problem):
        return ""


OFFENDERS = {
    ChangesBase: "the base must not change",
    UsesTorchsGlobalNoise: "the global random state must not change",
    SeedsNumpy: "the global random state must not change",
    SeedsPython: "the global random state must not change",
    ChangesDtype: "the default dtype must not change",
    ChangesGradMode: "the grad mode must not change",
    ChangesItsSettings: "must not change the hyper-parameters",
    IgnoresSeed: "another seed must give another set",
    IsNotReproducible: "the same seed must give the same set",
    DrawsTooFew: "drew 5 members instead of 6",
    HasNaN: "is not finite",
    HasDoubleWeights: "dtype or device",
    HasWrongShape: "has shape",
    LosesALeaf: "a member has the base's leaves",
    DependsOnBlock: "members must not depend on the block",
    LosesItsSeedWhenSaved: "a loaded set must equal the saved one",
    TrustsAHalfFinishedCheckpoint: "resumed after 1 checkpoints",
    NamesAStrangerAsFailed: r"failed members are indices of the set, each once, in order: \[6\]",
    ForgetsFailuresWhenResumed: "resumed after 1 checkpoints",
    LosesItsFailuresWhenSaved: "a loaded set must equal the saved one",
    GivesAnEmptyReason: "returns a reason or None",
}


@pytest.fixture
def problem(toy):
    """A toy problem whose base is its own, with the process's state put back afterwards."""
    shared = toy()
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    yield replace(shared, base=copy.deepcopy(shared.base), checkpoint=Memory())
    torch.set_rng_state(state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def test_a_sound_generator_passes(problem):
    assert check_generator(Sound(), problem).size == problem.members


@pytest.mark.parametrize(("offender", "clause"), OFFENDERS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_an_offender_fails_with_the_clause_it_breaks(offender, clause, problem):
    with pytest.raises(AssertionError, match=clause):
        check_generator(offender(), problem)


def test_a_class_that_is_no_dataclass_is_refused(problem):
    class Bare(Generator):
        pass

    with pytest.raises(AssertionError, match="plain dataclass"):
        check_generator(Bare(), problem)


def test_settings_that_are_not_stored_verbatim_are_refused(problem):
    @dataclass
    class Renames(Sound):
        rate: float = field(default=1.0)

        def __post_init__(self):
            del self.__dict__["rate"]

    with pytest.raises(AssertionError, match="stored verbatim"):
        check_generator(Renames(), problem)


def test_a_generator_that_gives_a_reason_is_a_skip_and_is_never_run(problem):
    @dataclass
    class Elsewhere(Generator):
        def supports(self, problem):
            return "needs four legs"

    assert check_generator(Elsewhere(), problem) is None
    assert check_refusal(Elsewhere(), problem) == "needs four legs"
    with pytest.raises(AssertionError, match="Sound must say why"):
        check_refusal(Sound(), problem)


@pytest.fixture(autouse=True, scope="module")
def _no_foreign_kinds():
    """Take the kinds of sets that this file defines out of the table again."""
    yield
    for kind in [k for k in ModelSet.kinds if k.startswith("test: ")]:
        del ModelSet.kinds[kind]


def test_a_generator_that_takes_longer_than_it_may_is_caught(problem):
    with pytest.raises(AssertionError, match="contract tests must stay quick"):
        check_generator(SWAG(epochs=2), problem, seconds=0.0)
