"""BatchNorm statistics of moved members: re-estimation equals torch's own, keeping them keeps them shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.generators.api import Part
from multiplicity_bench.generators.batchnorm import BATCH, IMAGES, has_batchnorm, reestimated, settle_batchnorm
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.swag import SWAG
from multiplicity_bench.identity import derive_seed


def by_torch(problem, params, seed):
    """Return what `torch.optim.swa_utils.update_bn` computes for `params`, on the same batches."""
    module = problem.module()
    module.load_state_dict(params, strict=False)
    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(derive_seed(seed, "batchnorm")))
    batches = [problem.train.images[rows] for rows in order[:IMAGES].split(BATCH) if len(rows) > 1]
    torch.optim.swa_utils.update_bn(batches, module)
    return dict(module.named_buffers())


def moved(problem):
    generator = torch.Generator().manual_seed(0)
    return {
        n: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
        for n, p in problem.base.params.items()
    }


def in_float64(problem, n: int):
    """Return the problem in float64 with `n` training images: more than one batch, so that averaging matters."""
    base = replace(
        problem.base,
        params={k: p.double() for k, p in problem.base.params.items()},
        buffers={k: b.double() if b.is_floating_point() else b for k, b in problem.base.buffers.items()},
    )
    function: Network = problem.network
    images = torch.randint(0, 256, (n, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return replace(
        problem,
        base=base,
        module=lambda: function.module(base.params, base.buffers),
        train=Part(images, torch.zeros(n, dtype=torch.long)),
    )


@pytest.mark.parametrize("n", [300, 2 * BATCH + 1], ids=["unequal batches", "a last batch of one image"])
def test_reestimated_statistics_equal_torchs_update_bn(n, toy):
    problem = in_float64(toy("smallcnn", norm="batch", classes=3), n)
    params = moved(problem)
    found, wanted = reestimated(problem, params, 5), by_torch(problem, params, 5)
    assert set(found) == set(wanted) == set(problem.base.buffers)
    for name, buffer in found.items():
        # the same operations on the same batches in float64
        torch.testing.assert_close(buffer, wanted[name], rtol=1e-12, atol=1e-12)
        assert name.endswith("num_batches_tracked") or not torch.equal(buffer, problem.base.buffers[name])


def test_reestimated_statistics_are_the_mean_of_the_batches_statistics(toy):
    """The first layer's by hand: its inputs are the images, so batch means and unbiased variances average."""
    problem = in_float64(toy("smallcnn", norm="batch", classes=3), 300)
    params = moved(problem)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(derive_seed(5, "batchnorm")))
    x = problem.train.images.double() / 127.5 - 1
    maps = torch.nn.functional.conv2d(x, params["body.0.weight"], padding=1)
    batches = [maps[rows] for rows in order.split(BATCH)]
    buffers = reestimated(problem, params, 5)
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.var((0, 2, 3), correction=1) for b in batches]).mean(0)
    torch.testing.assert_close(buffers["body.1.running_mean"], means, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(buffers["body.1.running_var"], variances, rtol=1e-10, atol=1e-12)


def test_reestimating_uses_at_most_5000_images(toy):
    shared = toy("smallcnn", norm="batch", classes=3)
    problem = in_float64(shared, IMAGES + 100)
    buffers = reestimated(problem, problem.base.params, 0)
    assert int(buffers["body.1.num_batches_tracked"]) == -(-IMAGES // BATCH)


@pytest.mark.parametrize("generator", [Laplace(prior_precision="100"), SWAG(epochs=2)], ids=["laplace", "swag"])
def test_reestimate_gives_every_member_statistics_of_its_own(generator, toy):
    problem = toy("smallcnn", norm="batch", classes=3)
    drawn = generator.generate(problem, 3)
    assert drawn.batchnorm == "reestimate" and drawn.shared_buffers == {}
    assert all(len(b) == problem.members for b in drawn.stacked_buffers.values())
    for k in (0, problem.members - 1):
        params, buffers = drawn.member(k)
        wanted = by_torch(problem, params, 3)
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, wanted[name], rtol=1e-5, atol=1e-6)  # float32
    assert not torch.equal(drawn.stacked_buffers["body.5.running_mean"][0], drawn.member(1)[1]["body.5.running_mean"])


@pytest.mark.parametrize(
    "generator", [Laplace(prior_precision="100", batchnorm="keep"), SWAG(epochs=2, batchnorm="keep")]
)
def test_keep_leaves_the_bases_statistics_shared(generator, toy):
    problem = toy("smallcnn", norm="batch", classes=3)
    drawn = generator.generate(problem, 3)
    assert drawn.batchnorm == "keep" and drawn.stacked_buffers == {}
    assert set(drawn.shared_buffers) == set(problem.base.buffers)
    assert all(torch.equal(drawn.shared_buffers[n], b) for n, b in problem.base.buffers.items())


def test_a_network_without_batchnorm_has_no_policy(toy):
    problem = toy("mlp")
    assert not has_batchnorm(problem) and has_batchnorm(toy("smallcnn", norm="batch", classes=3))
    drawn = Laplace(prior_precision="100").generate(problem, 0)
    assert drawn.batchnorm is None and settle_batchnorm(problem, drawn, "reestimate", 0) is drawn
    assert drawn.stacked_buffers == {}
