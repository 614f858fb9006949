"""The package as others get it: the wheel, who imports whom, and what must not be in it."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FOLDERS = ("benchmark", "datasets", "generators", "leaderboard", "metrics")
PLAIN = {path.stem for path in ROOT.glob("*.py")}  # the modules at the root, which all folders share
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = {"torch", "torchvision", "laplace", "sklearn", "scipy", "pandas"}


def run(command: list, cwd: Path | None = None, **environment: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with only the given PYTHONPATH, and without settings that would lead uv elsewhere."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "UV_SYSTEM_PYTHON")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
    )


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 11))


def files() -> list[Path]:
    """Return what is, or is about to be, under version control."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of files")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return a folder in which the wheel is installed beside somebody else's `datasets` and `metrics`."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "artifacts", "build", "dist", "outputs", "tests")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)  # a build leaves files behind
    target = folder / "site"
    for name in ("datasets", "metrics"):
        (target / name).mkdir(parents=True)
        (target / name / "__init__.py").write_text("WHOSE = 'somebody else'\n", encoding="utf-8")
    uv = BIN / "uv"
    options = ["--quiet", "--offline", "--python", sys.executable]
    build = [uv, "build", "--wheel", "--no-build-isolation", *options, "--out-dir", folder / "dist", folder / "source"]
    built = run(build)
    assert built.returncode == 0, built.stderr
    (file,) = (folder / "dist").glob("*.whl")
    installed = run([uv, "pip", "install", "--no-deps", *options, "--target", target, file])
    assert installed.returncode == 0, installed.stderr
    return target


def test_the_wheel_lives_beside_packages_named_datasets_and_metrics(wheel):
    code = (
        "import datasets, metrics, multiplicity_bench.datasets, multiplicity_bench.metrics, multiplicity_bench as m;"
        "print(datasets.WHOSE, metrics.WHOSE, m.__file__)"
    )
    done = run([sys.executable, "-c", code], cwd=wheel.parent, PYTHONPATH=wheel)
    assert done.stdout == f"somebody else somebody else {wheel / 'multiplicity_bench' / '__init__.py'}\n", done.stderr
    owned = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert owned - {"__pycache__", ".lock"} == {"bin", "datasets", "metrics", "multiplicity_bench"}


def test_the_wheel_lists_its_components_and_suites(wheel):
    done = run([wheel / "bin" / "run-benchmark", "list=true"], cwd=wheel.parent, PYTHONPATH=wheel)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("swag:", "phantom_cxr:", "smallcnn:", "ambiguity", "quickstart"):
        assert name in done.stdout


def test_the_wheel_finds_its_configuration_and_its_suites(wheel):
    command = [wheel / "bin" / "run-benchmark", "suite=quickstart", "generator=identical", "dry_run=true"]
    done = run([*command, "dataset=phantom_cxr", "dataset.train=60"], cwd=wheel.parent, PYTHONPATH=wheel)
    assert done.returncode == 0, done.stderr
    assert re.search(r"identical, base seed 0.*\n +base +\w+ +miss\n +set +\w+ +miss", done.stdout), done.stdout


def test_the_wheel_holds_every_module_every_setting_file_and_the_type_marker(wheel):
    installed = wheel / "multiplicity_bench"
    missing = [p for p in SOURCES if not (installed / p.relative_to(ROOT)).is_file()]
    settings = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.yaml")]
    missing += [p for p in [*settings, ROOT / "py.typed"] if not (installed / p.relative_to(ROOT)).is_file()]
    assert not missing, f"not in the wheel: {missing}"
    assert not list(installed.rglob("test_*.py"))


def test_the_list_of_packages_equals_the_folders_that_hold_modules():
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    on_disk = {".".join(("multiplicity_bench", *folder.parts)) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk
    known = {*FOLDERS, "tests"}
    strays = {path.relative_to(ROOT).parts[0] for path in files() if path.suffix == ".py" and path.parent != ROOT}
    assert strays <= known, f"modules in folders that are no part of the package: {strays - known}"


MAY_IMPORT = {
    "": set(),
    "datasets": {"datasets"},
    "generators": {"generators"},
    "metrics": {"metrics"},
    "leaderboard": {"leaderboard", "metrics"},
    "benchmark": set(FOLDERS),
}


def internal_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, first part below the package) of everything that a module imports from its own package."""
    inside = ("multiplicity_bench", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(inside[: len(inside) - node.level + 1]) if node.level else []
            module = above + (node.module.split(".") if node.module else [])
            targets = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "multiplicity_bench" and len(target) > 1:
                yield node.lineno, target[1]


@pytest.mark.parametrize("folder", MAY_IMPORT, ids=lambda f: f or "root")
def test_imports_point_one_way(folder):
    # The root hands on two names: `load_model_set` when it is called, and the types of components to type checkers.
    handed_on = {("__init__.py", "benchmark"), *(("registries.py", f) for f in ("datasets", "generators", "metrics"))}
    wrong = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[:-1][:1] != ((folder,) if folder else ()):
            continue
        for line, target in internal_imports(path):
            allowed = target in MAY_IMPORT[folder] | PLAIN or target not in FOLDERS
            if not allowed and (folder or (path.name, target) not in handed_on):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong


@pytest.mark.parametrize("module", ["multiplicity_bench", "multiplicity_bench.registries"])
def test_the_root_imports_no_folder_and_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = set(run([sys.executable, "-c", code]).stdout.split())
    assert module in loaded
    assert not loaded & (HEAVY | {"numpy"} | {f"multiplicity_bench.{folder}" for folder in FOLDERS})


@pytest.mark.parametrize("argument", ["--help", "list=true"])
def test_help_and_list_are_answered_without_torch(argument):
    code = f"""
import sys
from multiplicity_bench.benchmark.cli import main
sys.argv = ["run-benchmark", "{argument}"]
try:
    main()
except SystemExit as end:
    print(end.code, *sys.modules, file=sys.stderr)
"""
    done = run([sys.executable, "-c", code])
    code, *loaded = done.stderr.split()
    assert code == "0" and "swag" in done.stdout
    assert not set(loaded) & HEAVY


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def test_nothing_that_is_loaded_can_execute():
    executing = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    wrong = []
    for path in SOURCES:
        name = path.relative_to(ROOT)
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{name}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in executing]
        for line, function, call in calls(path):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            pickles = ast.unparse(keywords["allow_pickle"]) if "allow_pickle" in keywords else None
            if function in ("eval", "exec", "torch.load", "torch.save", "pd.read_pickle"):
                wrong.append(f"{name}:{line} calls {function}")
            if pickles not in (None, "False") or (function in ("np.load", "numpy.load") and pickles is None):
                wrong.append(f"{name}:{line} calls {function} without allow_pickle=False")
            if function in ("yaml.load", "yaml.load_all") and not is_safe(path, keywords.get("Loader")):
                wrong.append(f"{name}:{line} calls {function} with a loader that may execute")
            if function.startswith("yaml.") and re.search("unsafe|full_load", function):
                wrong.append(f"{name}:{line} calls {function}")
    assert not wrong


def is_safe(path: Path, loader: ast.expr | None) -> bool:
    """Return whether the name of a YAML loader in the module at `path` is a safe loader."""
    if not isinstance(loader, ast.Name):
        return loader is not None and ast.unparse(loader) in ("yaml.SafeLoader", "yaml.CSafeLoader")
    module = importlib.import_module(".".join(("multiplicity_bench", *path.relative_to(ROOT).with_suffix("").parts)))
    return issubclass(getattr(module, loader.id), (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def test_no_file_names_a_package_index_or_a_folder_of_one_machine():
    private = re.compile(
        r"https?://[^\s\"')>]*(?:/simple\b|pythonhosted|artifactory|nexus)|(?:extra-)?index-url\s*="
        r"|(?<![\w.~}$*])/(?:root|home|work|opt|mnt|Users|scratch)/\w"
    )
    wrong = []
    for path in files():
        if path.suffix in (".npz", ".png", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := private.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number} {found.group()}")
    assert not wrong


def test_every_module_and_every_public_function_and_class_has_a_docstring():
    missing = []
    for path in SOURCES:
        module = tree(path)
        nodes = [n for n in module.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
        missing += [f"{path.relative_to(ROOT)}:{n.lineno} {n.name}" for n in nodes if not ast.get_docstring(n)]
        if module.body and not ast.get_docstring(module):  # an empty module only makes a folder of settings a package
            missing.append(str(path.relative_to(ROOT)))
    assert not missing, "\n".join(missing)


def test_every_source_reads_as_python_3_11():
    for path in files():
        if path.suffix == ".py":
            tree(path)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), f"constraints.txt: {line!r} is no NAME==VERSION"
        name, _, version = line.partition("==")
        found[canonicalize_name(name)] = version
    assert len(found) == len(lines), "constraints.txt names a distribution twice"
    return found


def test_constraints_pin_every_dependency_down_to_the_last():
    waiting = [Requirement("multiplicity-bench[dev]"), *map(Requirement, PYPROJECT["build-system"]["requires"])]
    seen: set[tuple[str, str]] = set()
    reached = set()
    while waiting:
        wanted = waiting.pop()
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:  # an environment of the user's own may hold less
            continue
        reached.add(canonicalize_name(wanted.name))
        for extra in ("", *sorted(wanted.extras)):
            if (wanted.name, extra) not in seen:
                seen.add((wanted.name, extra))
                needs = map(Requirement, found.requires or [])
                waiting += [n for n in needs if n.marker is None or n.marker.evaluate({"extra": extra})]
    assert {"torch", "numpy", "mypy"} <= reached
    assert reached - {"multiplicity-bench"} <= set(pins())
    assert "uv" in pins()


def test_the_pins_satisfy_what_the_project_asks_for():
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    versions = pins()
    for requirement in map(Requirement, [*asked, *PYPROJECT["build-system"]["requires"]]):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)


def test_the_commands_are_installed():
    for name in PYPROJECT["project"]["scripts"]:
        assert (BIN / name).exists(), f"{name} is not installed"
