"""The registry: what is found without importing, and what is said when something is wrong."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from multiplicity_bench import registry as module
from multiplicity_bench.errors import Unavailable, UserError
from multiplicity_bench.registries import BY_KIND
from multiplicity_bench.registry import Registry

PACKAGE = {
    "__init__.py": '"""Shapes."""\nfrom .api import SHAPES\n',
    "api.py": """
from multiplicity_bench.registry import Registry
SHAPES = Registry("shape", "NAME", "register_shape", "NAME.plugins", ("area",))
register_shape = SHAPES.register
""",
    "round.py": '''
"""Round things."""
from .api import register_shape

@register_shape("circle")
class Circle:
    """The set of points at one distance.

    More about it.
    """

@register_shape("oval", "ellipse")
class Oval:
    area = 2
''',
    "needy.py": '''
"""Needs a library."""
import a_library_that_nobody_has
from .api import register_shape

@register_shape("fractal")
def fractal():
    """Is never long enough."""
''',
    "wrong.py": '''
"""Fails."""
from .api import register_shape
raise ValueError("no\\nmore")

@register_shape("hole")
def hole():
    """Is not there."""
''',
    "silent.py": 'raise SystemExit("imported without being asked for")\n',
}


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> Registry:
    """Return the registry of a package that is written for the test; none of its components is imported yet."""
    name = f"shapes_{tmp_path.name}"
    (tmp_path / name).mkdir()
    for file, text in PACKAGE.items():
        (tmp_path / name / file).write_text(text.replace("NAME", name), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name).SHAPES


def plug_in(monkeypatch, tmp_path, distribution: str, **points: str) -> None:
    """Pretend that a distribution with these entry points is installed; its modules lie in tmp_path."""
    dist = SimpleNamespace(name=distribution)
    found = [EntryPoint(n, value, "group")._for(dist) for n, value in points.items()]
    monkeypatch.setattr(module, "entry_points", lambda group: found)


def test_names_and_one_liners_are_read_without_importing(shapes):
    entries = shapes.entries()
    assert list(entries) == ["fractal", "circle", "oval", "ellipse", "hole"]
    assert entries["circle"].summary == "The set of points at one distance."
    assert entries["oval"].summary == "Round things."  # without a docstring of its own: the module's
    assert entries["fractal"].origin == f"{shapes.package}.needy"
    assert not {m for m in sys.modules if m.startswith(shapes.package)} - {shapes.package, f"{shapes.package}.api"}


def test_a_component_is_imported_when_it_is_asked_for(shapes):
    assert shapes.get("circle").__name__ == "Circle"
    assert f"{shapes.package}.round" in sys.modules and f"{shapes.package}.needy" not in sys.modules
    assert shapes.get("oval") is shapes.get("ellipse")


def test_an_unknown_name_suggests_close_ones(shapes):
    with pytest.raises(UserError, match=r"^unknown shape 'circel': did you mean 'circle'\?$"):
        shapes.get("circel")
    with pytest.raises(UserError, match=r"^unknown shape 'zzz': known: circle, ellipse, fractal, hole, oval$"):
        shapes.get("zzz")


def test_a_missing_library_is_named(shapes):
    with pytest.raises(Unavailable, match=r"shape 'fractal' of \w+\.needy is unavailable: needs a_library_that_nobody"):
        shapes.get("fractal")


def test_any_failure_of_an_import_is_one_line_with_its_reason(shapes):
    with pytest.raises(Unavailable, match=r"^shape 'hole' of \w+\.wrong failed to import: ValueError: no more$"):
        shapes.get("hole")


def test_loading_all_warns_once_about_each_that_cannot_be_imported(shapes):
    with pytest.warns(UserWarning) as caught:
        assert [name for name, _ in shapes.load_all()] == ["circle", "oval", "ellipse"]
    assert [str(w.message).split()[1] for w in caught] == ["'fractal'", "'hole'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(shapes.load_all())) == 3


def test_a_name_registered_twice_names_both_origins(shapes):
    shapes.get("circle")

    class Ring:
        pass

    with pytest.raises(UserError, match=r"shape 'circle' is registered twice, by \w+\.round\.Circle and by .*Ring"):
        shapes.register("circle")(Ring)
    assert shapes.get("circle").__name__ == "Circle"


def test_registering_the_same_object_again_changes_nothing(shapes):
    circle = shapes.get("circle")
    assert shapes.register("circle")(circle) is circle


def test_what_a_process_registers_itself_is_known_by_name(shapes):
    @shapes.register("square")
    class Square:
        pass

    assert shapes.get("square") is Square and shapes.names()[-1] == "square"


def test_a_plug_in_is_described_from_its_source_alone(shapes, monkeypatch, tmp_path):
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    source = '"""Guests."""\nraise SystemExit\nclass Star:\n    """Five points."""\nclass Moon:\n    pass\n'
    (tmp_path / "guest" / "shapes.py").write_text(source, encoding="utf-8")
    points = {"star": "guest.shapes:Star", "moon": "guest.shapes:Moon", "lost": "nowhere.at_all:X"}
    plug_in(monkeypatch, tmp_path, "guest-dist", **points)
    entries = shapes.entries()
    assert [entries[n].summary for n in ("star", "moon", "lost")] == ["Five points.", "Guests.", ""]
    assert entries["star"].origin == "guest-dist"
    assert "guest" not in sys.modules


def test_a_plug_in_that_leaves_the_process_while_importing_is_a_reason(shapes, monkeypatch, tmp_path):
    (tmp_path / "leaving.py").write_text("raise SystemExit('no licence')", encoding="utf-8")
    plug_in(monkeypatch, tmp_path, "leaver", star="leaving:Star")
    with pytest.raises(Unavailable, match="shape 'star' of leaver failed to import: SystemExit: no licence"):
        shapes.get("star")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("Star = 5", "TypeError: no shape: it lacks area"),
        ("Moon = 5", "AttributeError: .* has no attribute 'Star'"),
        (
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Star:\n    area: int = 1",
            "TypeError: it is a frozen dataclass, which refuses every setting: make it a plain one",
        ),
    ],
)
def test_a_plug_in_that_is_no_component_is_a_reason(shapes, monkeypatch, tmp_path, source, reason):
    name = f"guest_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    plug_in(monkeypatch, tmp_path, "guest-dist", star=f"{name}:Star")
    with pytest.raises(Unavailable, match=f"shape 'star' of guest-dist failed to import: {reason}"):
        shapes.get("star")


def test_two_plug_ins_of_one_name_name_both_distributions(shapes, monkeypatch):
    found = [EntryPoint("star", "x:Y", "g")._for(SimpleNamespace(name=n)) for n in ("first-dist", "second-dist")]
    monkeypatch.setattr(module, "entry_points", lambda group: found)
    with pytest.raises(UserError, match="shape 'star' is registered twice, by first-dist and by second-dist"):
        shapes.entries()


def test_an_empty_registry_says_so(tmp_path, monkeypatch):
    (tmp_path / "empty_package.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="unknown shape 'x': nothing is registered"):
        Registry("shape", "empty_package", "register_shape").get("x")


@pytest.mark.parametrize("kind", BY_KIND)
def test_every_built_in_has_a_one_liner_and_registers_what_its_source_says(kind):
    registry = BY_KIND[kind]
    entries = {name: entry for name, entry in registry.entries().items() if entry.plugin is None}
    assert len(entries) >= 5 or kind == "dataset"
    for name, entry in entries.items():
        assert 10 < len(entry.summary) < 120, f"{kind} {name}: {entry.summary!r}"
        component = registry.get(name)
        registry._check(component)
        assert component.__module__ == entry.module
