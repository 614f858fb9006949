"""One small registry that generators, metrics, datasets and networks share.

A component is a decorated class or function in a module of its own. Built-ins are found by reading the source of the
package's modules (`ast`, nothing is imported), so that names and one-liners cost milliseconds; a component is imported
when it is first asked for. Third parties add components by an entry point of the registry's group.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import Unavailable, UserError, suggest

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What is known about a component before it is imported; settings: its fields, `name=default`."""

    name: str
    module: str
    summary: str
    origin: str
    plugin: EntryPoint | None = None
    settings: tuple[str, ...] = ()


class Registry(Generic[T]):
    """Components of one kind by name.

    `kind` is the word used in messages ("generator"), `package` the import name whose modules hold the built-ins,
    `decorator` the function that registers them, `group` the entry-point group of plug-ins (None: no plug-ins),
    `needs` the attributes without which a plug-in's object is no component of this kind.
    """

    def __init__(self, kind: str, package: str, decorator: str, group: str | None = None, needs: tuple[str, ...] = ()):
        self.kind, self.package, self.decorator, self.group, self.needs = kind, package, decorator, group, needs
        self._warned: set[str] = set()
        self._entries: dict[str, Entry] | None = None
        self._objects: dict[str, T] = {}
        self._origins: dict[str, str] = {}

    def register(self, *names: str) -> Callable[[Any], Any]:
        """Register the decorated object under each of `names`; a name that is taken is an error naming both origins."""

        def decorate(obj: Any) -> Any:
            origin = f"{obj.__module__}.{obj.__qualname__}"
            for name in names:
                if self._origins.get(name, origin) != origin:
                    both = f"{self._origins[name]} and by {origin}"
                    raise UserError(f"{self.kind} '{name}' is registered twice, by {both}: rename one")
                self._origins[name] = origin
                self._objects[name] = obj
            return obj

        return decorate

    def entries(self) -> dict[str, Entry]:
        """Return every component that can be asked for, without importing any; built-ins first, each part sorted."""
        if self._entries is None:
            found: dict[str, Entry] = {}
            for entry in (*_builtins(self.package, self.decorator), *self._plugins()):
                if entry.name in found:
                    both = f"{found[entry.name].origin} and by {entry.origin}"
                    raise UserError(f"{self.kind} '{entry.name}' is registered twice, by {both}: remove one")
                found[entry.name] = entry
            self._entries = found
        return self._entries

    def names(self) -> list[str]:
        """Return all names: built-ins, plug-ins, and what this process registered itself."""
        known = self.entries()
        return [*known, *sorted(set(self._objects) - set(known))]

    def get(self, name: str) -> T:
        """Import and return the component `name`.

        Raises UserError with close names when it is unknown, Unavailable with the reason when it cannot be imported.
        """
        if name in self._objects:
            return self._objects[name]
        entry = self.entries().get(name)
        if entry is None:
            raise UserError(f"unknown {self.kind} '{name}': {suggest(name, self.names())}")
        try:
            if entry.plugin is not None:
                component = entry.plugin.load()
                self._check(component)
                self.register(name)(component)
            else:
                importlib.import_module(entry.module)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            raise Unavailable(f"{self.kind} '{name}' of {entry.origin} is unavailable: needs {error.name}") from error
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way; the rest of the suite must go on
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise Unavailable(f"{self.kind} '{name}' of {entry.origin} failed to import: {reason}") from error
        return self._objects[name]

    def load_all(self) -> Iterator[tuple[str, T]]:
        """Yield every component that can be imported; one that cannot is a warning (once) that names its origin."""
        for name in self.names():
            try:
                yield name, self.get(name)
            except Unavailable as error:
                if name not in self._warned:  # Python's own memory of what it warned about is erased by catch_warnings
                    self._warned.add(name)
                    warnings.warn(str(error), stacklevel=2)

    def _check(self, component: Any) -> None:
        """Raise TypeError when a plug-in's object cannot be a component of this kind."""
        missing = [attribute for attribute in self.needs if not hasattr(component, attribute)]
        if missing:
            raise TypeError(f"no {self.kind}: it lacks {', '.join(missing)}")
        if getattr(getattr(component, "__dataclass_params__", None), "frozen", False):
            raise TypeError("it is a frozen dataclass, which refuses every setting: make it a plain one")

    def _plugins(self) -> Iterator[Entry]:
        for point in sorted(entry_points(group=self.group), key=lambda p: p.name) if self.group else []:
            origin = point.dist.name if point.dist else "an unknown distribution"
            yield Entry(point.name, point.module, _plugin_summary(point), origin, point)


def _builtins(package: str, decorator: str) -> Iterator[Entry]:
    """Read `@decorator("name", ...)` from the sources of a package, or of a single module, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin)
    sources = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    for source in sources:
        module = package if source == path else f"{package}.{source.stem}"
        text = source.read_text(encoding="utf-8")
        if f"@{decorator}(" not in text:
            continue
        tree = ast.parse(text)
        shared = _first_line(ast.get_docstring(tree))
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == decorator:
                    summary = _first_line(ast.get_docstring(node)) or shared
                    for arg in mark.args:
                        if isinstance(arg, ast.Constant) and isinstance(arg.value, str):
                            yield Entry(arg.value, module, summary, module, None, _settings(node, tree))


def _settings(node: ast.stmt, tree: ast.Module) -> tuple[str, ...]:
    """Return the fields `name=default` of a dataclass, after those of its bases in the same module."""
    if not isinstance(node, ast.ClassDef):
        return ()
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    found: list[str] = []
    for other in tree.body:
        if isinstance(other, ast.ClassDef) and other.name in bases:
            found += _settings(other, tree)
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or line.value is None:
            continue
        if "ClassVar" not in ast.unparse(line.annotation):
            default = line.value
            if isinstance(default, ast.Call) and ast.unparse(default.func) == "added_later":
                default = default.args[0]
            found.append(f"{ast.unparse(line.target)}={ast.unparse(default)}")
    return tuple(found)


def _plugin_summary(point: EntryPoint) -> str:
    """Read the one-liner of a plug-in from its source (its object's docstring, else its module's), importing nothing.

    "" where the source cannot be found or read: what is wrong with it shows when it is used.
    """
    top, *inner = point.module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # of the top alone: finding a module inside it would import it
        if spec is None or spec.origin is None:
            return ""
        path = Path(spec.origin)
        if inner:
            path = path.parent.joinpath(*inner)
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""
    named = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == point.attr]
    return _first_line(next(map(ast.get_docstring, named), None)) or _first_line(ast.get_docstring(tree))


def _first_line(docstring: str | None) -> str:
    return docstring.strip().splitlines()[0].strip() if docstring and docstring.strip() else ""
