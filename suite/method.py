"""The two protocols that a quantization method is, the plain data they exchange, and the registry of methods.

A `Method` sees the whole model once and returns one local rule per decoder layer; a `LayerMethod` sees one layer,
read-only, and returns the tensors that it wants changed. Nothing here writes a model: `suite.walk.commit` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from suite import conformance
from suite.errors import PTQError, unknown
from suite.grid import Grid, QuantSpec, Scheme

# ---------------------------------------------------------------------------------------------- plain data


@dataclass(frozen=True)
class Site:
    """Linears of one decoder layer that read the same input.

    name:    "qkv", "o", "gate_up", "down": the field's word, and the key of the site's statistics.
    linears: names inside the layer, in execution order, e.g. ("self_attn.q_proj", "self_attn.k_proj", ...).
    feeder:  the module whose output they read, where it can absorb a per-channel scale, else None.
    scope:   the module at whose output AWQ measures the loss of this site: attention, MLP, or the linear itself.
    """

    name: str
    linears: tuple[str, ...]
    feeder: str | None
    scope: str


@dataclass(frozen=True)
class LinearQuant:
    """The declared grid of one linear: `grid` of its weight (None: left in 16 bit), `act` of its input (None: not rounded)."""

    grid: Grid | None
    act: QuantSpec | None = None

    @property
    def bits(self) -> int:
        return self.grid.spec.bits if self.grid else 16

    def to(self, device: torch.device) -> LinearQuant:
        """The same with its scales on a device."""
        if self.grid is None:
            return self
        zero = None if self.grid.zero is None else self.grid.zero.to(device)
        return LinearQuant(Grid(self.grid.spec, self.grid.scale.to(device), zero), self.act)


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """What a method wants changed in one layer. Plain data: it can be scored, compared, saved, thrown away.

    params:  parameter name inside the layer -> replacement of the same shape and type; the weight of a quantized linear
             is already rounded to its grid.
    linears: linear name -> its declared grid. A name missing here is a linear that this edit leaves unquantized.
    note:    JSON for the record: losses, the chosen method, every fallback taken.
    """

    params: Mapping[str, Tensor] = field(default_factory=dict)
    linears: Mapping[str, LinearQuant] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, later: LayerEdit) -> LayerEdit:
        """Both edits; where both change the same thing, `later` wins."""
        return LayerEdit({**self.params, **later.params}, {**self.linears, **later.linears}, {**self.note, **later.note})

    def to(self, device: torch.device) -> LayerEdit:
        """The same edit with its tensors on a device; itself where they are there already."""
        if all(value.device == device for value in self.params.values()):
            return self
        return LayerEdit({key: value.to(device) for key, value in self.params.items()},
                         {name: quant.to(device) for name, quant in self.linears.items()}, self.note)


# ---------------------------------------------------------------------------------------------- protocols


class LayerView(Protocol):
    """One decoder layer and the calibration data that reaches it. Read-only; its tensors are shared between methods.

    Letters: n sequences, t tokens each, d hidden width.
    """

    index: int
    sites: Sequence[Site]

    @property
    def reference(self) -> Tensor:
        """(k, t, d) output of this layer in the unquantized model, for the first k sequences: as many as hold the number
        of tokens that the rule asks for with its attribute `reference_tokens` (none where it has no such attribute)."""

    def weight(self, name: str) -> Tensor:
        """(out, in) weight of a linear, or (d,) of a norm, as this view has it."""

    def bias(self, name: str) -> Tensor | None:
        """(out,) bias of a linear, or None."""

    def stat(self, kind: str, site: Site) -> Tensor:
        """A statistic of the site's input over all calibration tokens, float32: "gram" (in, in) = X'X / tokens,
        "absmax" (in,), "absmean" (in,). The first call makes one pass that fills every kind and site; later calls are
        free."""

    def scope_outputs(self, site: Site, params: Mapping[str, Tensor]) -> Tensor:
        """Output of the site's scope on a fixed sample of the calibration tokens, with `params` (names inside the
        layer) in place of the layer's own and no activation rounding."""

    def outputs(self, first: int | None = None) -> Tensor:
        """(n, t, d) output of the layer on the calibration inputs, or on the first sequences, activation rounding
        included; memoised."""

    def after(self, edit: LayerEdit) -> LayerView:
        """The same layer with `edit` applied, statistics not yet computed. The original is untouched."""


class LayerMethod(Protocol):
    def quantize(self, layer: LayerView) -> LayerEdit:
        """The edit that quantizes every linear of every site."""


class Transform(Protocol):
    """What some methods do before they round: a change of the weights that leaves the layer's function as it is."""

    def transform(self, layer: LayerView) -> LayerEdit:
        """The function-preserving edit; `linears` is empty."""


class Method(Protocol):
    """An entry of the benchmark: a frozen dataclass of hyper-parameters, all with defaults, one of them `scheme`.

    Class attributes, where they differ from the usual: `needs_calibration = False` if no data decides its weights;
    `solves = False` if it uses data and yet solves nothing with a Gram matrix of inputs, which takes most of the memory
    (suite.preflight);
    `expected_failures = {check: reason}` for contract checks (suite.testing) that it cannot pass;
    `rewrites_model = True` if its rules fit only the model that its plan has rewritten, so that no hybrid can have it;
    `added = {"option": value}` for options that came after results were recorded, with the value at which the method is
    what it was: there they are left out of identities, so that records and baselines of before are still its own.
    """

    scheme: Scheme

    def plan(self, model: nn.Module, calib: Any) -> Sequence[LayerMethod]:
        """One local rule per unit of `block` consecutive decoder layers (attribute, 1 where it is missing).
        May rewrite the model in place (rotation) provided its outputs stay the same; may read it through `walk`."""


class Uniform:
    """The plan of a method that treats all layers alike: itself, for each."""

    def plan(self, model: nn.Module, calib: Any) -> Sequence[LayerMethod]:
        return [self] * model.config.num_hidden_layers


def edit_of(rule: Any, layer: LayerView) -> LayerEdit:
    """The edit of a rule for a layer. Raises PTQError where it is none: what calls the rules of others goes through here."""
    edit = rule.quantize(layer)
    if not isinstance(edit, LayerEdit):
        function = f"{type(rule).__module__}.{type(rule).__qualname__}.quantize"
        raise PTQError(f"layer {layer.index}: expected {function}(layer) -> LayerEdit, found {type(edit).__name__}: "
                       f"return LayerEdit(params, linears)")
    return edit


@dataclass(frozen=True)
class Noted:
    """A rule whose edit carries a further note: how a plan tells the record what it decided for this layer, or, with the
    first layer, for the whole model."""

    rule: Any
    note: Mapping[str, Any]

    @property
    def reference_tokens(self) -> int:
        return getattr(self.rule, "reference_tokens", 0)

    def quantize(self, layer: LayerView) -> LayerEdit:
        edit = self.rule.quantize(layer)
        return LayerEdit(edit.params, edit.linears, {**edit.note, **self.note})


@dataclass(frozen=True)
class Native:
    """A method's own published setting, where it departs from the matched one: the module constant `NATIVE` of its file.

    options: options that differ from the defaults (bits stay as asked for); nsamples x seqlen tokens of `source`;
    inputs: "quantized" or "full", see `suite.walk.walk`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    nsamples: int = 128
    seqlen: int = 2048
    source: str = "wikitext2"
    inputs: str = "quantized"


def native(name: str) -> Native:
    """The published setting of a method; that of a composition is its rounding's. Methods without one: the matched one."""
    return getattr(sys.modules[lookup(name.split("+")[-1]).__module__], "NATIVE", Native())


# ---------------------------------------------------------------------------------------------- registry

_BUILTIN = {
    "fp16": "baselines.fp16:FP16",
    "rtn": "baselines.rtn:RTN",
    "gptq": "baselines.gptq:GPTQ",
    "awq": "baselines.awq:AWQ",
    "smoothquant": "baselines.smoothquant:SmoothQuant",
    "spinquant": "baselines.spinquant:SpinQuant",
    "mp-gptq": "baselines.mp_gptq:MPGPTQ",
    "cka-hybrid": "suite.select:Hybrid",
}
ENTRY_POINTS = "ptq_suite.methods"
SCHEME_OPTIONS = tuple(Scheme().options)


_ADDED: dict[str, tuple[type, str]] = {}  # of this process: name -> class, and where it comes from


def names() -> list[str]:
    """Every registered method: the built-in ones, those of installed packages, and those added by a plug-in."""
    return sorted({*_BUILTIN, *_ADDED, *_installed()})


def compositions() -> list[str]:
    """The transform+rounding names that the registered methods allow with GPTQ's rounding, e.g. "awq+gptq"."""
    found = []
    for name in names():
        with contextlib.suppress(PTQError):  # a broken package spoils its own name only
            found += [f"{name}+gptq"] if hasattr(lookup(name), "transform") else []
    return found


def add(name: str, cls: type, origin: str) -> None:
    """Registers a method in this process. origin: the file it comes from, for errors.

    Raises PTQError: a name that is no word or is taken, a class that has not the form of a method.

    >>> add("my_method", MyMethod, "my_method.py")  # doctest: +SKIP
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise PTQError(f"method name {name!r} of {origin}: allowed are letters, digits, and . _ - after the first")
    taken = _BUILTIN.get(name) or (_ADDED[name][1] if name in _ADDED else None)
    if taken is None and name in _installed():
        taken = _told(_installed()[name][0])
    if taken is not None:
        if name in _ADDED and _ADDED[name] == (cls, origin):
            return
        raise PTQError(f"method name {name!r} of {conformance.where(cls, origin)} is taken by {taken}: "
                       f"rename the file, or give another name in its METHODS = {{name: class}}")
    conformance.require(cls, name, origin)
    _ADDED[name] = (cls, origin)


def remove(name: str) -> None:
    """Takes an added method out of the registry again."""
    _ADDED.pop(name, None)


def added() -> dict[str, str]:
    """The methods that plug-ins added to this process: name -> where it comes from."""
    return {name: origin for name, (_, origin) in sorted(_ADDED.items())}


def _installed() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Name -> the entry points of that name; more than one different one is a clash."""
    return _scan(importlib.metadata.entry_points, tuple(sys.path))


@functools.cache  # reading the metadata of all packages takes longer than most of what asks for it
def _scan(entry_points: Any, path: tuple[str, ...]) -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if all(point.value != other.value for other in found.setdefault(point.name, [])):
            found[point.name].append(point)
    return found


def _told(point: importlib.metadata.EntryPoint) -> str:
    package = f"package {point.dist.name} {point.dist.version}, " if point.dist is not None else ""
    return f"{package}entry point {point.name} = {point.value!r}"


def lookup(name: str) -> type:
    """The dataclass of a method by its name.

    Raises PTQError: an unknown name, one that two packages claim, a package that fails to import or holds no method.
    """
    installed = _installed().get(name, [])
    if name in _BUILTIN or name in _ADDED or len(installed) > 1:
        if installed:
            claims = [*(["this suite"] if name in _BUILTIN else []), *([_ADDED[name][1]] if name in _ADDED else []),
                      *map(_told, installed)]
            raise PTQError(f"method name {name!r} is claimed by {' and by '.join(claims)}: "
                           f"rename the entry point, or uninstall the package")
        if name in _ADDED:
            return _ADDED[name][0]
        module, attribute = _BUILTIN[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    if installed:
        return _load(name, installed[0])
    raise unknown("method", name, names())


def _load(name: str, point: importlib.metadata.EntryPoint) -> type:
    try:
        cls = point.load()
    except Exception as error:  # whatever somebody's package raises
        raise PTQError(f"method {name!r} of {_told(point)} cannot be imported: {fault(error)}") from error
    conformance.require(cls, name, _told(point))
    return cls


def fault(error: BaseException) -> str:
    """What failed, and the line of whose file: for errors in other people's code."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    at = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    last = str(error).strip().splitlines()[-1:]  # a worker's failure arrives as the whole text of its traceback
    return f"{type(error).__name__}: {last[0] if last else 'no message'}{at}"


@dataclass(frozen=True)
class Composed(Uniform):
    """A transform followed by another method's rounding: "awq+gptq" scales like AWQ, then rounds like GPTQ."""

    transformer: Any
    rounding: Any

    @property
    def scheme(self) -> Scheme:
        return self.rounding.scheme

    def quantize(self, layer: LayerView) -> LayerEdit:
        step = self.transformer.transform(layer)
        return step | self.rounding.quantize(layer.after(step))


def options_of(name: str) -> dict[str, Any]:
    """The options of a method with their defaults, the scheme's words in place of `scheme`.

    >>> options_of("rtn")["wbits"]
    4
    """
    if "+" in name:
        return {k: v for part in name.split("+") for k, v in options_of(part).items()}
    found: dict[str, Any] = {}
    for f in dataclasses.fields(lookup(name)):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise PTQError(f"field {f.name!r} of method {name!r} has no default: every option of a method needs one")
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        found.update(default.options if f.name == "scheme" else {f.name: default})
    return found


def build(name: str, **options: Any) -> Any:
    """A configured method from its name and flat options, as the command line and the harness give them.

    Values may be strings ("0.01", "true", "gptq|awq"); they are converted to the type of the option's default.
    All mistakes are reported at once.

    Raises PTQError: unknown method, unknown option (with near misses), a value of the wrong kind, bits out of range.

    >>> build("gptq", wbits=3, damp="0.05").damp
    0.05
    """
    if "+" in name:
        return _compose(name, options)
    cls, allowed = lookup(name), options_of(name)
    mistakes = [str(unknown(f"option of {name}", key, allowed)) for key in options if key not in allowed]
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for key, value in options.items():
        if key in allowed:
            try:
                values[key] = _convert(value, bool if key == "symmetric" else int if key in SCHEME_OPTIONS else hints[key])
            except ValueError as error:
                mistakes.append(f"option {key} of {name}: {error}")
    if mistakes:
        raise PTQError("; ".join(mistakes))
    scheme = Scheme.of(**{**cls().scheme.options, **{k: values.pop(k) for k in SCHEME_OPTIONS if k in values}})
    return cls(scheme=scheme, **values)


def _compose(name: str, options: Mapping[str, Any]) -> Composed:
    first, *rest = name.split("+")
    if len(rest) != 1:
        raise PTQError(f"composition {name!r} has {len(rest) + 1} parts: a composition is TRANSFORM+ROUNDING, e.g. awq+gptq")
    if not hasattr(lookup(first), "transform"):
        transforms = [n for n in names() if hasattr(lookup(n), "transform")]
        raise PTQError(f"composition {name!r}: {first} has no transform; the first part must be one of {', '.join(transforms)}")
    if not hasattr(lookup(rest[0]), "quantize"):
        raise PTQError(f"composition {name!r}: {rest[0]} decides for the whole model and cannot round a single layer")
    allowed = {part: options_of(part) for part in (first, rest[0])}
    stray = [str(unknown(f"option of {name}", k, options_of(name))) for k in options
             if not any(k in a for a in allowed.values())]
    if stray:
        raise PTQError("; ".join(stray))
    parts = [build(part, **{k: v for k, v in options.items() if k in allowed[part]}) for part in (first, rest[0])]
    return Composed(*parts)


def _convert(value: Any, hint: Any) -> Any:
    """A value as its type hint says; strings are parsed. Raises ValueError with the value found and the kind allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        parts = re.split(r"[|,]", value) if isinstance(value, str) else value
        return tuple(_convert(part, arguments[0]) for part in parts if part != "")
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "yes", "1", "false", "no", "0"):
            return value.lower() in ("true", "yes", "1")
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise ValueError(f"{value!r} found, allowed are true and false")
        return bool(value)
    if hint in (int, float):
        try:
            number = hint(value)
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} found, allowed is {'a whole number' if hint is int else 'a number'}") from None
        if hint is int and isinstance(value, float) and value != number:
            raise ValueError(f"{value!r} found, allowed is a whole number")
        return number
    return hint(value) if hint is str else value


def to_config(method: Any) -> dict:
    """JSON from which `from_config` rebuilds an equal method: {"method": name, "options": {...}}; without the options
    that the method came without, while they are what they were (`added`)."""
    if isinstance(method, Composed):
        return {"method": name_of(method), "parts": [to_config(method.transformer), to_config(method.rounding)]}
    options: dict[str, Any] = {}
    added = getattr(method, "added", {})
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if f.name in added and value == added[f.name]:
            continue
        options.update(value.options if f.name == "scheme" else {f.name: list(value) if isinstance(value, tuple) else value})
    return {"method": name_of(method), "options": options}


def from_config(config: Mapping[str, Any]) -> Any:
    if "parts" in config:
        return Composed(*(from_config(part) for part in config["parts"]))
    return build(config["method"], **config["options"])


def name_of(method: Any) -> str:
    """The registered name of a configured method."""
    if isinstance(method, Composed):
        return f"{name_of(method.transformer)}+{name_of(method.rounding)}"
    for name in (*_BUILTIN, *_ADDED, *_installed()):
        with contextlib.suppress(PTQError):  # a broken package spoils its own name only
            if type(method) is lookup(name):
                return name
    raise PTQError(f"{type(method).__name__} is not a registered method: registered are {', '.join(names())}")
