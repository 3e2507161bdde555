"""Methods from outside: a file or a folder that `--plugin` names, or an installed package with an entry point.

    ptq compare my_method --plugin path/to/my_method.py --against gptq --model tiny-llama-s

A file with one method gives it the file's name; `METHODS = {"name": Class}` in the file gives others. Results of a
plug-in are stored with the digest of its code, so an edited file never receives the results of what it was before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from suite import conformance, method
from suite.errors import PTQError

_MODULE = "ptq_plugin_"  # before the file's name: no plug-in can stand in the way of another module
_LOADED: dict[Path, Loaded] = {}


@dataclass(frozen=True)
class Loaded:
    """A plug-in of this process. digest: SHA-256 of its code as it was when it was imported."""

    path: Path
    names: tuple[str, ...]
    digest: str


def load(path: str | Path) -> tuple[str, ...]:
    """Imports a plug-in and registers its methods; returns their names. A second time: nothing but the names.

    path: a Python file, or a folder with an `__init__.py`.

    Raises PTQError: no such file, a file that fails to import (with the line), one without a method or with several
    and no METHODS, a name that is taken, a class that has not the form of a method (with what was expected and found).

    >>> load("examples/range_search.py")  # doctest: +SKIP
    ('range_search',)
    """
    given, path = str(path), Path(path).expanduser().resolve()
    if path in _LOADED:
        return _LOADED[path].names
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".py":
        what = "has no __init__.py" if path.is_dir() else "is no Python file" if path.exists() else "does not exist"
        raise PTQError(f"plug-in {given!r} {what}: give a file like my_method.py, or the folder of a package")
    stem = path.stem
    module_name = _MODULE + "".join(c if c.isalnum() else "_" for c in stem)
    if (other := next((p for p in _LOADED if p.stem == stem), None)) is not None:
        raise PTQError(f"plug-ins {str(other)!r} and {str(path)!r} have the same file name: rename one of them")
    digest = _digest([file] if file == path else sorted(path.rglob("*.py")), file.parent)
    module = _import(module_name, file, path.is_dir())
    before = method.added()
    try:
        for name, cls in _methods(module, stem, given).items():
            method.add(name, cls, str(path))
    except PTQError:
        sys.modules.pop(module_name, None)
        for name in set(method.added()) - set(before):
            method.remove(name)
        raise
    names = tuple(name for name in method.added() if name not in before)
    _LOADED[path] = Loaded(path, names, digest)
    return names


def _import(name: str, file: Path, package: bool) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file,
                                                  submodule_search_locations=[str(file.parent)] if package else None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up, and so does whatever pickles
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's file does
        sys.modules.pop(name, None)
        raise PTQError(f"plug-in {str(file)!r} cannot be imported: {method.fault(error)}") from error
    return module


def _methods(module: ModuleType, stem: str, path: str) -> Mapping[str, Any]:
    """Name -> class, as METHODS says, else the one method that the module defines under the name of its file."""
    if (stated := getattr(module, "METHODS", None)) is not None:
        if not isinstance(stated, Mapping) or not stated or not all(isinstance(name, str) for name in stated):
            raise PTQError(f"plug-in {path!r}: expected METHODS = {{\"name\": Class}}, found {stated!r}")
        return stated
    own = {name: value for name, value in vars(module).items()
           if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")}
    whole = {name: cls for name, cls in own.items() if hasattr(cls, "plan")}
    if len(whole) == 1:
        return {stem: next(iter(whole.values()))}
    if whole:
        raise PTQError(f"plug-in {path!r} defines {len(whole)} methods, {', '.join(whole)}: "
                       f"say which has which name, METHODS = {{\"{stem}\": {next(iter(whole))}, ...}}")
    rules = [name for name, cls in own.items() if hasattr(cls, "quantize")]
    found = f"{rules[0]}, which has quantize but no plan: let it inherit from suite.method.Uniform" if rules else (
        f"the classes {', '.join(own)}" if own else "no class")
    raise PTQError(f"plug-in {path!r} has no method: found {found}. The form of a method: {conformance.FORM}")


def loaded() -> tuple[str, ...]:
    """The paths of all plug-ins of this process, for another one to load."""
    return tuple(str(path) for path in _LOADED)


def code_of(config: Any) -> dict[str, str]:
    """The digests of the code of all plug-ins that a method's configuration (`method.to_config`) names, itself, its
    parts, members of a pool, inner methods: part of the identity of results. Empty for built-in methods.

    >>> code_of({"method": "gptq", "options": {}})
    {}
    """
    names = {part for text in _strings(config) for part in text.split("+")}
    found = {name: plugin.digest for plugin in _LOADED.values() for name in plugin.names if name in names}
    installed = method._installed()
    return dict(sorted({**{name: _digest_of_package(name) for name in names & set(installed)}, **found}.items()))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _digest_of_package(name: str) -> str:
    """Of all Python files of the top-level package that an entry point's class comes from, or of its one file."""
    top = sys.modules[method.lookup(name).__module__.partition(".")[0]]
    if folders := getattr(top, "__path__", None):
        folder = Path(next(iter(folders)))
        return _digest(sorted(folder.rglob("*.py")), folder)
    file = Path(inspect.getfile(top))
    return _digest([file], file.parent)


def _digest(files: Sequence[Path], folder: Path) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes() + b"\n")
    return total.hexdigest()
