"""What a CUDA device computes agrees with the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


GENERATORS = ("retrain", "laplace", "swag", "temperature", "logit_noise", "identical")


@pytest.mark.parametrize("generator", [*GENERATORS, "perturb_sgd", "ray_exit", "dissipative", "riemannian_laplace"])
def test_a_run_on_cuda_ends_in_a_record_and_its_members_predict_the_same_on_the_cpu(generator, tmp_path, monkeypatch):
    from multiplicity_bench import load_model_set
    from multiplicity_bench.benchmark.spec import Options, Spec, create
    from multiplicity_bench.benchmark.stages import Run, Session
    from multiplicity_bench.registries import BY_KIND

    monkeypatch.chdir(tmp_path)
    names = {"dataset": "phantom_cxr", "network": "smallcnn", "generator": generator}
    settings = {"dataset": {"train": 300, "val": 40, "test": 40}, "network": {"width": 4}, "generator": {}}
    options = Options(members=6, draws=20, epsilon=5.0, device="cuda")
    options.training.epochs = 2
    parts = {kind: create(BY_KIND[kind], {"name": name, **settings[kind]}) for kind, name in names.items()}
    spec = Spec(**parts, training=options.training, options=options, device=torch.device("cuda"), names=names)
    run = Run(spec, Session())
    record, path = run.record()
    assert record["status"] == "ok", record["reason"]
    on_gpu = run.predictions(run.model_set())["test"].logits
    on_cpu = load_model_set(path).predict(run.data.splits["test"].images)
    # float32 convolutions in another order of summation
    assert np.allclose(on_gpu, on_cpu, atol=1e-3)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_captured_predictions_are_those_of_the_loop(norm):
    from multiplicity_bench.benchmark.networks import Network
    from multiplicity_bench.benchmark.predict import predict
    from multiplicity_bench.generators.modelset import stack

    network = Network({"name": "smallcnn", "width": 8, "norm": norm}, 1, 28, 3)
    members = stack([network.init(k) for k in range(5)]).to(torch.device("cuda"))
    images = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8, device="cuda")
    loop, graph = (predict(network, members, images, strategy=way) for way in ("loop", "graph"))
    assert np.allclose(loop, graph, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("way", ["vmap", "each"])
def test_captured_training_is_that_of_the_loop_on_the_cpu(way, norm, optimizer):
    """In float64, where rounding stays small: three batches of 8 captured, one of 5 that is not, early stops."""
    from multiplicity_bench.benchmark.ensemble import train_together
    from multiplicity_bench.benchmark.networks import Network
    from multiplicity_bench.benchmark.train import Training, train
    from multiplicity_bench.generators.api import Part, Plan, Trained

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (29, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data, tune = Part(images, torch.arange(29) % 2), Part(images.flip(0), torch.arange(29) % 2)
    network = Network({"name": "smallcnn", "width": 4, "norm": norm}, 1, 8, 2)
    recipe = Training(optimizer=optimizer, epochs=5, batch_size=8, lr=0.02, patience=2, augment="shift")
    plans = []
    for k in range(3):
        start = Trained(*network.init(k)).in_dtype(torch.float64)
        start.params = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in start.params.items()}
        plans.append(Plan(seed=k, init=start))
    there, tune_there = (Part(part.images.cuda(), part.labels.cuda()) for part in (data, tune))
    found = train_together(network, there, recipe, plans, way=way, tune=tune_there)
    for plan, member in zip(plans, found, strict=True):
        alone = train(network, data, recipe, plan.seed, init=plan.init, tune=tune)
        for own, other in ((member.params, alone.params), (member.buffers, alone.buffers)):
            for n, leaf in other.items():
                torch.testing.assert_close(own[n].cpu(), leaf, rtol=1e-6, atol=1e-7)


def test_bf16_and_another_layout_train_on_cuda():
    from multiplicity_bench.benchmark.ensemble import train_together
    from multiplicity_bench.benchmark.networks import Network
    from multiplicity_bench.benchmark.train import Training
    from multiplicity_bench.generators.api import Part, Plan

    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8, device="cuda")
    data = Part(images, (torch.arange(64) % 2).cuda())
    network = Network({"name": "smallcnn", "norm": "batch"}, 1, 28, 2)
    losses = {}
    for settings in ({}, {"autocast": "bf16"}, {"channels_last": True}):
        for way in ("vmap", "each"):
            (member,) = train_together(network, data, Training(epochs=1, **settings), [Plan(seed=0)], way=way)
            losses[*settings, way] = member.losses[0]
    # one epoch of two steps: bf16 carries 3 digits
    assert np.allclose(list(losses.values()), losses["vmap",], rtol=0.02)
