"""What the README shows is what runs."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(mark: str, language: str) -> str:
    """Return the first fenced block after a mark in the README."""
    found = re.search(rf"{re.escape(mark)}.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block after {mark}"
    return found.group(1)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The README's generator as an imported module; its registration is taken back afterwards."""
    from multiplicity_bench.generators.api import GENERATORS

    monkeypatch.setattr(GENERATORS, "_objects", dict(GENERATORS._objects))
    monkeypatch.setattr(GENERATORS, "_origins", dict(GENERATORS._origins))
    module = types.ModuleType("isotropic")
    monkeypatch.setitem(sys.modules, "isotropic", module)
    exec(block("<!-- example-generator -->", "python"), module.__dict__)
    return module


def test_the_example_generator_is_complete_in_about_thirty_lines_and_keeps_the_contract(example):
    source = block("<!-- example-generator -->", "python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 35
    exec(block("<!-- example-check -->", "python"), example.__dict__)


def test_the_example_generator_is_found_under_its_name(example):
    from multiplicity_bench.generators.api import GENERATORS

    assert GENERATORS.get("isotropic") is example.Isotropic


def test_the_example_file_in_the_generators_folder_is_listed_without_being_imported(tmp_path):
    package = tmp_path / "listed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "isotropic.py").write_text(block("<!-- example-generator -->", "python") + "\nraise SystemExit\n")
    code = (
        "from multiplicity_bench.registry import Registry\n"
        "entry = Registry('generator', 'listed', 'register_generator').entries()['isotropic']\n"
        "print(entry.summary)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "Isotropic Gaussian around the base: w = w* + sd z.", done.stderr


def test_a_model_set_is_loaded_and_predicts_as_the_readme_shows(tmp_path, monkeypatch):
    from multiplicity_bench.benchmark import cli

    monkeypatch.chdir(tmp_path)
    settings = "generator=swag generator.epochs=1 network=mlp network.width=4 members=5 training.epochs=1"
    data = "dataset.train=80 dataset.val=30 dataset.test=30"
    monkeypatch.setattr(sys, "argv", ["run-benchmark", *settings.split(), *data.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    record = next(Path("outputs/records").glob("*.json"))
    names: dict = {}
    exec(block("### From Python", "python").replace("outputs/records/RECORD.json", str(record)), names)
    assert names["logits"].shape == (5, 4, 2)
    assert len(names["in_the_set"]) == len(names["models"].accepted)
    assert set(names["params"]) == set(names["models"].member(0)[0])


def test_every_option_that_the_readme_names_exists():
    from multiplicity_bench.benchmark.spec import Options

    table = README[README.index("| option | meaning") : README.index("A run is *dataset")]
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    named = {n for row in rows for n in re.findall(r"`(\w+)(?:=\w+)?`", row)}
    fields = set(Options.__dataclass_fields__)
    assert named and named <= fields, named - fields


def test_the_example_criterion_is_taken_up_by_selection_and_resampled_by_patient(monkeypatch):
    import numpy as np
    from multiplicity_bench.metrics.api import METRICS
    from multiplicity_bench.metrics.context import Context
    from multiplicity_bench.metrics.intervals import PatientBootstrap
    from multiplicity_bench.metrics.selection import select

    monkeypatch.setattr(METRICS, "_objects", dict(METRICS._objects))
    monkeypatch.setattr(METRICS, "_origins", dict(METRICS._origins))
    names: dict = {"__name__": "example"}
    exec(block("<!-- example-criterion -->", "python"), names)
    rng = np.random.default_rng(0)
    probabilities, base = rng.dirichlet([1, 1], size=(6, 60)), rng.dirichlet([1, 1], size=60)
    labels = rng.integers(2, size=60)
    views = [Context(probabilities, base, labels, PatientBootstrap(60, rng.integers(30, size=60), 50, 0)) for _ in "vt"]
    (found,) = select([views[0]], [views[1]], 3, 0.05, names=["first_class_recall"]).values()
    recalls = (probabilities.argmax(-1) == 0)[:, labels == 0].mean(axis=1)
    assert recalls[found.chosen] == recalls.max()
    assert found.gain.value == pytest.approx(recalls.max() - (base.argmax(-1) == 0)[labels == 0].mean())
    assert len(found.gain.draws) == 50 and found.gain.draws.std() > 0
