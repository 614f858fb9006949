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
