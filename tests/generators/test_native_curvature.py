"""Our own diagonal and Kronecker-factored curvatures against the dense GGN in float64, and against laplace-torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multiplicity_bench.generators import layer_gradients, native_curvature
from multiplicity_bench.generators.api import Part, Trained
from multiplicity_bench.generators.contract import check_generator
from multiplicity_bench.generators.laplace import Laplace
from multiplicity_bench.generators.modelset import KroneckerSet
from multiplicity_bench.generators.native_curvature import (
    fit_diagonal,
    fit_kronecker,
    kronecker_factors,
    native_obstacle,
)
from multiplicity_bench.generators.patch_moments import PatchMoments
from multiplicity_bench.generators.posterior import (
    Options,
    fit_curvature,
    fit_posterior,
    leaf_names,
    posterior_obstacle,
)
from torch import nn
from torch.func import functional_call

NETWORKS = {
    "mlp": {"network": "mlp", "width": 4, "depth": 2, "n": 40},
    "groupnorm": {"network": "smallcnn", "width": 2, "norm": "group", "size": 4},
    "batchnorm": {"network": "smallcnn", "width": 4, "norm": "batch", "size": 6},
    "resnet18": {"network": "resnet18", "norm": "batch", "size": 8, "n": 2},
}
TASKS = ("binary", "multiclass", "multilabel")


class Grey(nn.Module):
    """Images as numbers of about 1, in the dtype of the network."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1 / 64))

    def forward(self, images):
        return images.to(self.scale) * self.scale - 2


class Places(nn.Module):
    """Positions of an image as a sequence of feature vectors."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


ODD = {
    "strided, dilated, padded": lambda: nn.Sequential(
        Grey(), nn.Conv2d(1, 3, 3, stride=2, dilation=2, padding=(2, 1)), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    ),
    "grouped": lambda: nn.Sequential(
        Grey(), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    ),
    "positions, layer norm, in place": lambda: nn.Sequential(
        *(Grey(), nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), Places(), nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh()),
        *(Mean(), nn.Linear(5, 3)),
    ),
    "one feature per channel": lambda: nn.Sequential(
        Grey(), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.GroupNorm(2, 6), nn.Linear(6, 3)
    ),
}


@pytest.fixture
def problems(untrained, with_labels):
    """Return `problems(network, task)`."""

    def make(network: str, task: str = "multiclass"):
        problem = untrained(**NETWORKS[network], classes=2 if task == "binary" else 3)
        return with_labels(problem) if task == "multilabel" else problem

    return make


@pytest.fixture
def odd(untrained):
    """Return `odd(module)`: a problem on images of 6 x 6 with a network that the suite does not have."""

    def make(make_module):
        problem = untrained("mlp", size=6)
        torch.manual_seed(0)
        module = make_module()
        module(problem.train.images)  # lazy layers take their sizes, BatchNorm moves from its initial statistics
        module.eval()
        params = {n: p.detach().clone() for n, p in module.named_parameters()}
        buffers = {n: b.clone() for n, b in module.named_buffers()}

        def network(params, buffers, images):
            return functional_call(module, ({**params}, {**buffers}), (images,))

        return replace(problem, network=network, base=Trained(params, buffers), module=lambda: fresh(module, params))

    def fresh(module, params):
        import copy

        made = copy.deepcopy(module)
        made.load_state_dict(params, strict=False)
        return made

    return make


def block_diagonal(matrix, problem, names):
    """Return the matrix without what lies outside the blocks of single leaves."""
    sizes = [problem.base.params[n].numel() for n in names]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return matrix * (owner[:, None] == owner[None, :])


def dense(found, problem, names):
    """Return the blocks `U (l_B x l_A) U'` of fitted factors, [param, param] in float64."""
    blocks = []
    for i in range(len(names)):
        factors = []
        for j in (0, 1):
            if f"values.{i}.{j}" in found:
                values, vectors = found[f"values.{i}.{j}"].double(), found[f"vectors.{i}.{j}"].double()
                factors.append(vectors @ torch.diag(values) @ vectors.T)
        blocks.append(torch.kron(*factors) if len(factors) == 2 else factors[0])
    return torch.block_diag(*blocks)


def close(found, wanted, relative=2e-5):
    """Assert equality to float32's rounding, relative to the largest entry."""
    assert float(wanted.abs().max()) > 0
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=relative * float(wanted.abs().max()))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("network", ["mlp", "groupnorm", "batchnorm"])
def test_the_diagonal_is_that_of_the_dense_ggn(network, task, problems, dense_ggn, monkeypatch):
    problem = problems(network, task)
    monkeypatch.setattr(layer_gradients, "IMAGES", 5)  # batches, the last of them shorter
    monkeypatch.setattr(native_curvature, "PIECE", 300)  # and pieces of batches
    found = fit_diagonal(problem, list(problem.base.params))
    close(found["diagonal"], dense_ggn(problem).diagonal())
    assert float(found["diagonal_mean"]) == pytest.approx(float(found["diagonal"].mean()), rel=1e-5)


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_the_diagonal_holds_for_every_shape_of_layer(make, odd, dense_ggn):
    problem = odd(make)
    close(fit_diagonal(problem, list(problem.base.params))["diagonal"], dense_ggn(problem).diagonal())


def test_the_diagonal_of_a_residual_network_in_some_of_its_leaves(problems, dense_ggn):
    problem = problems("resnet18")
    names = ["body.0.weight", "body.3.norm1.bias", "body.5.shortcut.0.weight", "body.13.weight"]
    names = [n for n in problem.base.params if n in names]
    assert len(names) == 4
    close(fit_diagonal(problem, names)["diagonal"], dense_ggn(problem, names).diagonal(), 1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_drawn_labels_are_right_in_the_mean(task, problems, dense_ggn, monkeypatch):
    """The mean of 20 fits of 200 draws each is within 6 standard errors, which these fits give."""
    problem = problems("mlp", task)
    names = list(problem.base.params)
    exact = dense_ggn(problem).diagonal()
    few = []
    for k in range(20):
        monkeypatch.setattr(layer_gradients, "derive_seed", lambda *parts, k=k: 1000 * k + parts[-1])
        few.append(fit_diagonal(problem, names, draws=200)["diagonal"].double())
    found = torch.stack(few)
    error = (found.mean(0) - exact) / (found.std(0) / len(few) ** 0.5)
    assert float(error[exact > 1e-6 * exact.max()].abs().max()) < 6, "of 71 to 87 correlated t-values with 19 degrees"
    assert not torch.equal(few[0], few[1])
    assert torch.equal(
        fit_diagonal(problem, names, draws=3)["diagonal"], fit_diagonal(problem, names, draws=3)["diagonal"]
    )


@pytest.mark.parametrize("network", ["mlp", "groupnorm", "batchnorm"])
def test_kfac_is_laplace_torchs_where_both_work(network, problems):
    problem = problems(network)
    names = leaf_names(problem.module(), "kron", "all")  # norm layers frozen: the library cannot have them
    library, own = fit_curvature(problem, "kron", names), fit_kronecker(problem, names)
    close(dense(own, problem, names), dense(library, problem, names))
    assert float(own["diagonal_mean"]) == pytest.approx(float(library["diagonal_mean"]), rel=1e-4)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_input_factors_from_spectra_are_those_from_patches(task, odd, with_labels, monkeypatch):
    """In float64, with strides, dilation and few channels, which are left to patches, between other convolutions."""
    problem = odd(
        lambda: nn.Sequential(
            *(Grey(), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()),
            *(nn.Conv2d(3, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.Tanh()),
            *(nn.GroupNorm(1, 3), nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.LazyLinear(3)),
        ).double()
    )
    problem = with_labels(problem) if task == "multilabel" else problem
    names = list(problem.base.params)
    monkeypatch.setattr(layer_gradients, "IMAGES", 5)
    found = kronecker_factors(problem, names)
    spectral = [n for n, own in found.items() if isinstance(own.inputs, PatchMoments)]
    assert spectral == ["3.weight", "10.weight"]
    monkeypatch.setattr(native_curvature, "spectrum_pays", lambda *shape: False)
    monkeypatch.setattr(native_curvature, "BLOCK", 10)  # rows of a factor in several blocks, the last of them shorter
    for name, own in kronecker_factors(problem, names).items():
        for ours, wanted in zip(found[name].matrices(), own.matrices(), strict=True):
            assert wanted.dtype == torch.float64
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_the_diagonal_is_laplace_torchs_where_both_work(problems):
    problem = problems("groupnorm")
    names = list(problem.base.params)
    close(fit_diagonal(problem, names)["diagonal"], fit_curvature(problem, "diag", names)["diagonal"].double())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("network", ["groupnorm", "batchnorm"])
def test_the_blocks_of_norm_layers_are_exact(network, task, problems, dense_ggn):
    problem = problems(network, task)
    names = [f"body.{layer}.{leaf}" for layer in (1, 5, 9) for leaf in ("weight", "bias")]
    exact = block_diagonal(dense_ggn(problem, names), problem, names)
    for approximation in ("expand", "reduce"):
        close(dense(fit_kronecker(problem, names, approximation), problem, names), exact)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("task", TASKS)
def test_kfac_is_exact_for_one_image_and_weights_at_one_position(task, approximation, odd, dense_ggn):
    """A convolution of the image's own size is a linear layer: nothing is shared, and one image factorises."""
    problem = odd(lambda: nn.Sequential(Grey(), nn.Conv2d(1, 3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3)))
    label = torch.tensor([[1, -1, 0]]) if task == "multilabel" else torch.tensor([1])
    problem = replace(problem, train=Part(problem.train.images[:1], label), task=task)
    names = list(problem.base.params)
    found = dense(fit_kronecker(problem, names, approximation), problem, names)
    close(found, block_diagonal(dense_ggn(problem, names), problem, names))


def test_reduce_takes_the_mean_of_inputs_and_the_sum_of_gradients(odd):
    """By its definition, position by position, with patches cut by hand and gradients by autograd."""
    problem = odd(lambda: nn.Sequential(Grey(), nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)))
    names = ["1.weight", "1.bias"]
    a, b = torch.zeros(9, 9).double(), torch.zeros(2, 2).double()
    module = problem.module().double()
    for image in problem.train.images:
        x = image[None].double() / 64 - 2
        inputs = torch.stack([x[0, 0, i : i + 3, j : j + 3].reshape(-1) for i in range(4) for j in range(4)])
        out = module[1](x).detach().requires_grad_()
        logits = module[2:](out)[0]
        jacobian = torch.stack([torch.autograd.grad(z, out, retain_graph=True)[0][0].sum((1, 2)) for z in logits])
        p = logits.detach().softmax(0)
        a += torch.outer(inputs.mean(0), inputs.mean(0))
        b += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    wanted = torch.block_diag(torch.kron(b, a / len(problem.train)), b)
    close(dense(fit_kronecker(problem, names, "reduce"), problem, names), wanted)


def test_draws_of_factors_with_few_images_are_those_of_the_whole_basis(odd):
    """Fewer images than inputs: the eigenvectors of eigenvalue 0 are left out, and draws know them all the same."""
    problem = odd(lambda: nn.Sequential(Grey(), nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)))
    names = ["2.weight"]
    found = fit_kronecker(problem, names, "reduce")
    few = {n: t for n, t in found.items() if n.startswith(("values", "vectors"))}
    assert few["vectors.0.1"].shape == (36, len(problem.train))
    rest = torch.linalg.qr(few["vectors.0.1"].double(), mode="complete")[0][:, len(problem.train) :].float()
    whole = few | {
        "values.0.1": torch.cat([few["values.0.1"], torch.zeros(36 - len(problem.train))]),
        "vectors.0.1": torch.cat([few["vectors.0.1"], rest], 1),
    }
    common = {"size": 3, "mean": {"2.weight": problem.base.params["2.weight"]}, "seed": 5, "scale": 2.0}
    sets = [KroneckerSet(shared_params={}, shared_buffers={}, factors=f, **common) for f in (few, whole)]
    for k in range(3):
        torch.testing.assert_close(sets[0].perturbation(k), sets[1].perturbation(k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "native"},
        {"engine": "native", "mc_samples": 2},
        {"engine": "native", "structure": "kron"},
        {"structure": "kron", "kfac_approx": "reduce"},
    ],
    ids=str,
)
def test_sets_from_own_curvatures_keep_the_contract(settings, toy):
    check_generator(Laplace(**settings), toy("mlp"))


def test_the_library_comes_first_and_the_own_engine_where_it_cannot(problems):
    plain, several = problems("groupnorm"), problems("groupnorm", "multilabel")
    for structure in ("diag", "kron"):
        assert fit_posterior(plain, structure, "all").engine == "laplace_torch"
        assert fit_posterior(several, structure, "all").engine == "native"
        asked = Options(engine="laplace_torch")
        assert posterior_obstacle(plain, structure, "all", asked) is None
        assert "no multi-label likelihood" in posterior_obstacle(several, structure, "all", asked)
    with_norms = fit_posterior(plain, "kron", "all", Options(engine="native"))
    assert with_norms.names == list(plain.base.params) and with_norms.notes == []
    assert with_norms.diagnostics(1.0)["engine"] == "native"
    assert fit_posterior(plain, "kron", "all", Options(mc_samples=1)).engine == "native"


def test_a_diagonal_too_large_for_the_library_is_our_own(problems, monkeypatch):
    from multiplicity_bench.generators import posterior

    monkeypatch.setattr(posterior, "JACOBIAN_LIMIT", 10)
    assert fit_posterior(problems("mlp"), "diag", "all").engine == "native"


def test_what_has_no_rows_by_layer_is_refused_with_the_layer(odd, problems):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(36, 36)
            self.outer = nn.Linear(36, 3)

        def forward(self, images):
            return self.outer(self.inner(self.inner(images.flatten(1) / 255.0)))

    twice = odd(Twice)
    names = list(twice.base.params)
    assert native_obstacle(twice, "diag", names, "expand") == "layer inner is used 2 times in a forward pass, not once"
    assert native_obstacle(twice, "diag", ["outer.weight"], "expand") is None
    grouped = odd(ODD["grouped"])
    assert "no grouped convolution such as 3" in native_obstacle(grouped, "kron", list(grouped.base.params), "expand")
    strange = odd(lambda: nn.Sequential(Grey(), nn.Flatten(1, 2), nn.Conv1d(6, 2, 3), nn.Flatten(), nn.LazyLinear(3)))
    assert "not of 2" in native_obstacle(strange, "diag", list(strange.base.params), "expand")
