"""Whether a class has the form of a method, told from its fields and signatures alone: nothing is quantized.

What it does with a layer is for the contract checks (`suite.testing`); this is what a plug-in must have to be called.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from suite.errors import PTQError
from suite.grid import Scheme

FORM = ("@dataclass(frozen=True) class MyMethod(suite.method.Uniform): scheme: Scheme = Scheme(); "
        "def quantize(self, layer) -> LayerEdit")
SIGNATURES = {  # function -> its positional arguments, and what it returns
    "plan": (("model", "calib"), "Sequence[LayerMethod]"),
    "quantize": (("layer",), "LayerEdit"),
    "transform": (("layer",), "LayerEdit"),
}


def require(cls: Any, name: str, origin: str) -> None:
    """Raises PTQError, with all that is wrong at once, unless a class can be registered as a method.

    name: what it is to be called; origin: the file or package it comes from.

    >>> require(int, "my_method", "my.py")
    Traceback (most recent call last):
    suite.errors.PTQError: method 'my_method' of my.py breaks the protocol: expected a frozen dataclass, found int; ...
    """
    mistakes = list(_mistakes(cls))
    if mistakes:
        raise PTQError(f"method {name!r} of {where(cls, origin)} breaks the protocol: {'; '.join(mistakes)}. "
                       f"The form of a method: {FORM}")


def where(cls: Any, origin: str) -> str:
    """The origin, with the line at which the class begins, where it is known."""
    try:
        return f"{origin}, line {inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return origin


def _mistakes(cls: Any) -> Iterator[str]:
    if not isinstance(cls, type):
        yield f"expected a class, found {cls!r}"
        return
    if not dataclasses.is_dataclass(cls):
        yield f"expected a frozen dataclass, found {cls.__name__} without @dataclass(frozen=True)"
    elif not cls.__dataclass_params__.frozen:
        yield "expected @dataclass(frozen=True), found a dataclass that is not frozen"
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    bare = [f.name for f in fields.values()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if bare:
        yield f"expected a default for every option, found none for {', '.join(bare)}"
    if fields and "scheme" not in fields:
        yield f"expected the field `scheme: Scheme = Scheme()`, found the fields {', '.join(fields)}"
    if dataclasses.is_dataclass(cls) and not fields:
        yield "expected the field `scheme: Scheme = Scheme()`, found no fields"
    for function in SIGNATURES:
        yield from _signature(cls, function)
    if fields and not bare and "scheme" in fields:
        yield from _construction(cls)


def _signature(cls: type, function: str) -> Iterator[str]:
    arguments, result = SIGNATURES[function]
    expected = f"{function}(self, {', '.join(arguments)}) -> {result}"
    found = inspect.getattr_static(cls, function, None)
    if found is None:
        if function == "plan":
            yield f"expected {expected}, found none: inherit from suite.method.Uniform, or write it"
        if function == "quantize" and _plans_itself(cls):
            yield f"expected {expected}, found none: the plan of Uniform makes the method its own rule for every layer"
        return
    if isinstance(found, (staticmethod, classmethod, property)) or not callable(found):
        yield f"expected {expected}, found a {type(found).__name__}"
        return
    told = _told(found)
    try:
        inspect.signature(found).bind(None, *arguments)
    except TypeError:
        yield f"expected {expected}, found {function}{told}"
    except ValueError:  # no signature to be had: it shows when it is called
        return


def _plans_itself(cls: type) -> bool:
    """Whether the plan is the inherited one of `Uniform`, which needs a `quantize` beside it."""
    plan = inspect.getattr_static(cls, "plan", None)
    return getattr(plan, "__qualname__", "") == "Uniform.plan"


def _told(function: Callable) -> str:
    """The signature as it stands in the file, without the types: "(self, model)"."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "(?)"
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _construction(cls: type) -> Iterator[str]:
    try:
        made = cls()
    except Exception as error:  # whatever a constructor may raise
        yield f"expected that {cls.__name__}() works, found {type(error).__name__}: {error}"
        return
    if not isinstance(made.scheme, Scheme):
        yield f"expected the field `scheme: Scheme = Scheme()`, found scheme = {made.scheme!r}"
