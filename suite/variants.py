"""Variants of a model: a method, its scheme, its calibration; what tables call one, and what identifies its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite import calib, method, plugins, windows
from suite.errors import PTQError, unknown
from suite.grid import UNQUANTIZED_BITS
from suite.provenance import version

NUMERICS = 1  # to be raised by every change of the suite that changes results: records of before are then not reused

FAST_SAMPLES = 16  # calibration sequences of a first look
QUANTIZING_LIBRARIES, EVALUATING_LIBRARIES = ("torch", "transformers"), ("torch", "transformers", "lm-eval")


@dataclass(frozen=True)
class Sampling:
    """Which calibration data is asked for; see `suite.calib.load`."""

    source: str
    nsamples: int
    seqlen: int
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Variant:
    """One quantized model, before it is made: everything that decides its weights.

    label: what tables call it: the method's name, and its options where they differ from the mode's.
    scheme: of the comparison; None for full precision. calibration: None where the method uses none; diagnosed_on: the
    data on which errors by layer are measured. inputs: "quantized" or "full", see `suite.walk.walk`. kvbits: of the
    key-value cache, told in the scheme as well where it is rounded.
    """

    label: str
    method: Any
    mode: str
    scheme: str | None
    calibration: calib.Calibration | None
    diagnosed_on: calib.Calibration | None
    inputs: str = "quantized"
    kvbits: int = UNQUANTIZED_BITS

    @property
    def code(self) -> dict[str, str]:
        """Of the plug-ins it stands on: see `suite.plugins.code_of`."""
        return plugins.code_of(method.to_config(self.method))

    def identity(self, model: Mapping[str, str], dtype: str) -> dict[str, Any]:
        """The part that the records of its quantization and of all its evaluations share, without library versions."""
        used = self.calibration is not None
        return {"model": dict(model), "method": method.to_config(self.method), "scheme": self.scheme,
                "mode": self.mode if self.scheme else None, "calibration": told(self.calibration),
                "input_policy": self.inputs if used else None, "dtype": dtype,
                "seed": self.calibration.seed if used else None, "numerics": NUMERICS,
                **({"kvbits": self.kvbits} if self.kvbits < UNQUANTIZED_BITS else {}),
                **({"plugins": self.code} if self.code else {})}

    def quantization(self, model: Mapping[str, str], dtype: str) -> dict[str, Any]:
        return {"kind": "quantization", **self.identity(model, dtype), "libraries": libraries(QUANTIZING_LIBRARIES),
                "diagnosed_on": told(self.diagnosed_on)}

    def evaluation(self, model: Mapping[str, str], dtype: str, task: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": "evaluation", **self.identity(model, dtype), "libraries": libraries(EVALUATING_LIBRARIES),
                "task": dict(task)}


def told(calibration: calib.Calibration | None) -> dict[str, Any] | None:
    """A calibration set as records tell it: of a file its name, and not where it lies."""
    if calibration is None:
        return None
    source = calibration.source
    named = source == calib.EMBEDDED or source in calib.HUB_SETS
    return {**calibration.identity, "source": source if named else Path(source).name}


def libraries(packages: Iterable[str]) -> dict[str, str | None]:
    return {package: version(package) for package in packages}


def build_all(methods: Sequence[Any], options: Mapping[str, Any], mode: str, own: Mapping[str, Mapping[str, Any]]
              ) -> list[tuple[str, Any, method.Native | None]]:
    """(label, configured method, its published setting or None) of each; all mistakes are reported at once.

    own: options by name of method, for methods that are given by name.
    """
    if mode not in ("matched", "native"):
        raise unknown("mode", mode, ("matched", "native"))
    built, mistakes = [], []
    for wanted in methods:
        try:
            name = wanted if isinstance(wanted, str) else method.name_of(wanted)
            published = method.native(name) if mode == "native" else None
            base = dict(published.options) if published else {}
            scheme = {} if method.lookup(name.split("+")[0])().scheme.weight.quantized is False else options
            further = own.get(name, {}) if isinstance(wanted, str) else {}
            configured = method.build(name, **{**base, **further, **scheme}) if isinstance(wanted, str) else wanted
            built.append((label(configured, base), configured, published))
        except PTQError as error:
            mistakes.append(str(error))
    if mistakes:
        raise PTQError("; ".join(dict.fromkeys(mistakes)))
    twice = sorted({name for name, *_ in built if sum(name == other for other, *_ in built) > 1})
    if twice:
        raise PTQError(f"asked for twice: {', '.join(twice)}")
    return built


def label(configured: Any, base: Mapping[str, Any] | None = None) -> str:
    """What tables call a method: its name, and those options that differ from its defaults (or from `base`).

    >>> label(method.build("gptq", wbits=3)), label(method.build("gptq", damp=0.05))
    ('gptq', 'gptq damp=0.05')
    """
    config = method.to_config(configured)
    parts = config.get("parts", [config])
    changed = []
    for part in parts:
        defaults = {**method.options_of(part["method"]), **(base or {})}
        for key, value in part["options"].items():
            usual = defaults.get(key)
            if key not in method.SCHEME_OPTIONS and value != (list(usual) if isinstance(usual, tuple) else usual):
                changed.append(f"{key}={'|'.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join([config["method"], *changed])


def with_cache(scheme: str, kvbits: int) -> str:
    return f"{scheme} KV{kvbits}" if kvbits < UNQUANTIZED_BITS else scheme


def bits_of(options: Mapping[str, Any]) -> str:
    scheme = method.Scheme.of(**options)
    return f"W{scheme.weight.bits}A{scheme.act.bits if scheme.act else 16}"


def sampling(embedded: bool, config: Mapping[str, Any], source: str | None, nsamples: int | None, seqlen: int | None,
             seed: int, fast: bool) -> Sampling:
    """The matched mode's calibration set: 64 x 512 embedded tokens, or 128 x 2048 of WikiText-2's training text."""
    source = source or (calib.EMBEDDED if embedded else "wikitext2")
    count, length = calib.usual_size(source)
    return Sampling(source, nsamples or (FAST_SAMPLES if fast else count),
                    windows.fit(seqlen, config.get("max_position_embeddings"), length), seed)


def variants_of(built: Sequence[tuple[str, Any, method.Native | None]], options: Mapping[str, Any], kvbits: int,
                mode: str, matched: Sampling, source: str | None, embedded: bool, tokenizer: Any,
                batch_tokens: int = calib.BATCH_TOKENS) -> list[Variant]:
    loaded: dict[Sampling, calib.Calibration] = {}
    variants = []
    for name, configured, published in built:
        quantized = configured.scheme.weight.quantized or configured.scheme.act is not None
        sampling = matched
        if published is not None:  # the published source, unless another was asked for or the model has its own world
            count = min(published.nsamples, matched.nsamples) if embedded else published.nsamples
            sampling = replace(matched, nsamples=count, seqlen=min(published.seqlen, matched.seqlen),
                               source=source or (calib.EMBEDDED if embedded else published.source))
        if quantized and sampling not in loaded:
            drawn = calib.load(sampling.source, tokenizer, sampling.nsamples, sampling.seqlen, sampling.seed)
            loaded[sampling] = replace(drawn, batch_tokens=batch_tokens)
        data = loaded.get(sampling) if quantized else None
        scheme = with_cache(str(configured.scheme) if mode == "matched" else bits_of(options), kvbits)
        used = data if getattr(configured, "needs_calibration", True) else None
        variants.append(Variant(name, configured, mode, scheme if quantized else None, used, data,
                                published.inputs if published else "quantized",
                                kvbits if quantized else UNQUANTIZED_BITS))
    return variants
