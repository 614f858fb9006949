"""A package of somebody else's adds a generator, a metric and a dataset by entry points; its faults stay its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
SOURCE = Path(__file__).parent / "plugin_pkg"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return a folder in which the plug-in distribution is installed."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source")  # a build leaves files behind
    options = ["--quiet", "--offline", "--no-deps", "--no-build-isolation", "--python", sys.executable]
    done = run([BIN / "uv", "pip", "install", *options, "--target", folder / "site", folder / "source"], folder, None)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(command: list, cwd: Path, site: Path | None) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "UV_SYSTEM_PYTHON")}
    path = {"PYTHONPATH": str(site)} if site else {}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=kept | path, capture_output=True, text=True)


def test_a_plug_in_is_listed_with_its_one_liners_and_origin_and_is_not_imported(site, tmp_path):
    done = run([BIN / "run-benchmark", "list=true"], tmp_path, site)
    assert (done.returncode, done.stderr) == (0, "")  # a broken module would have warned, had it been imported
    for line in (
        "jitter: White noise of one size on every weight of the base. [plug-in of toy-plugin]",
        "flip_share: Share of the members that decide another class than the base, mean over cases. "
        "[plug-in of toy-plugin]",
        "ramps: Noisy ramps of grey that rise to the left or to the right. [plug-in of toy-plugin]",
        "explodes: Says what it would do, had it been imported. [plug-in of toy-plugin]",
    ):
        assert f"  {line}\n" in done.stdout


def test_a_plug_in_runs_beside_the_built_ins_and_its_broken_parts_are_one_warning_each(site, tmp_path):
    command = [BIN / "run-benchmark", "generator=jitter", "dataset=ramps", "network=mlp", "generator.scale=0.5"]
    options = ["training.epochs=2", "members=3", "epsilon=10", "draws=20", "device=cpu", "threads=1"]
    done = run([*command, *options, f"artifacts_dir={tmp_path}/a", f"records_dir={tmp_path}/r"], tmp_path, site)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "r").glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["row"] == "jitter[scale=0.5]" and record["identity"]["dataset"]["name"] == "ramps"
    assert 0 < record["scores"]["flip_share"]["value"] < 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    for warning in (
        "warning: generator 'explodes' of toy-plugin failed to import: "
        "RuntimeError: this plug-in was built for another version of everything",
        "warning: generator 'no_generator' of toy-plugin failed to import: "
        "TypeError: no generator: it lacks __dataclass_fields__, generate",
        "warning: metric 'needs_library' of toy-plugin is unavailable: needs a_library_that_nobody_has",
    ):
        assert warnings.count(warning) == 1
    assert len(warnings) == 3 and "Traceback" not in done.stderr


def test_asking_for_a_broken_plug_in_is_one_line_and_exit_code_2(site, tmp_path):
    done = run([BIN / "run-benchmark", "generator=explodes"], tmp_path, site)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert errors == [
        "error: generator 'explodes' of toy-plugin failed to import: "
        "RuntimeError: this plug-in was built for another version of everything"
    ]
    assert not list(tmp_path.iterdir())


def test_a_plug_in_with_the_name_of_a_built_in_is_one_line_naming_both_and_exit_code_2(tmp_path):
    about = tmp_path / "site" / "impostor-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: impostor\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("[multiplicity_bench.generators]\nswag = impostor:Swag\n", encoding="utf-8")
    done = run([BIN / "run-benchmark", "list=true"], tmp_path, tmp_path / "site")
    assert (done.returncode, done.stderr) == (
        2,
        "error: generator 'swag' is registered twice, by multiplicity_bench.generators.swag and by impostor: "
        "remove one\n",
    )
