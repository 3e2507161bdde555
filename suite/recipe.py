"""A recipe with which llm-compressor makes the same choices: which layers it scales and rounds by which method.

For people who live in that tool. Its algorithms are its own, so numbers differ a little: it searches AWQ's scales on
sampled outputs, knows no search for ranges, and cannot round a site before the next one of the same layer is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from suite import arch

NAME = "recipe.yaml"
_FOLDS = ("awq", "smoothquant")
_ROUNDS = ("rtn", "gptq")
_HEADER = """\
# What ptq-suite did, in the words of llm-compressor 0.14:
#   oneshot(model=..., dataset=..., recipe="recipe.yaml")
# (its pipeline "sequential" would collect GPTQ's statistics before a fold of the same layer is done).
# AWQ's search for ranges has no counterpart there; a fold that shapes forbid (v_proj before a grouped o_proj) it skips.
"""


def text(record: Mapping[str, Any]) -> str | None:
    """The recipe as YAML for the run that a record tells of; None where llm-compressor has no such method.

    There are recipes for rtn, gptq, awq, smoothquant, awq+gptq and smoothquant+gptq, and for hybrids of them, by layer
    or by site.

    >>> text({"method": {"method": "spinquant", "options": {}}, "layers": [{"layer": 0}]}) is None
    True
    """
    method, layers = record.get("method") or {}, record.get("layers") or []
    options = {key: value for part in method.get("parts", [method]) for key, value in part.get("options", {}).items()}
    sites = {site.name: site for site in arch.FAMILIES["llama"].sites}  # all families share these names
    places: dict[str, dict[str, list[int]]] = {}  # method -> site -> layers
    for layer in layers:
        chosen = layer.get("chosen_by_site") or dict.fromkeys(sites, layer.get("chosen", method.get("method")))
        for site, name in chosen.items():
            places.setdefault(name, {}).setdefault(site, []).append(layer["layer"])
    if not places or any(not _known(name) for name in places) or "wbits" not in options:
        return None
    modifiers: dict[str, Any] = {}
    for name, where in places.items():
        fold = name.split("+")[0]
        if fold in _FOLDS:
            kind = "AWQModifier" if fold == "awq" else "SmoothQuantModifier"
            made = modifiers.setdefault(kind, {**_fold_options(fold, options), "mappings": []})
            made["mappings"] += _mappings(fold, where, sites)
    for name, where in places.items():
        rounds = name.split("+")[-1]
        kind = "GPTQModifier" if rounds == "gptq" else "QuantizationModifier"
        scheme = {"targets": [], **_scheme(options)}
        made = modifiers.setdefault(kind, {**_round_options(rounds, options), "ignore": ["lm_head"],
                                           "config_groups": {"group_0": scheme}})
        made["config_groups"]["group_0"]["targets"] += [
            _pattern(indices, linear) for site, indices in where.items() for linear in sites[site].linears]
    rounding = [kind for kind in modifiers if kind in ("GPTQModifier", "QuantizationModifier")]
    ordered = {kind: modifiers[kind] for kind in (*(k for k in modifiers if k not in rounding), *rounding)}
    return _HEADER + yaml.safe_dump({"quantization_stage": {"quantization_modifiers": ordered}}, sort_keys=False, width=110)


def _known(name: str) -> bool:
    parts = name.split("+")
    return len(parts) == 1 and name in (*_FOLDS, *_ROUNDS) or len(parts) == 2 and parts[0] in _FOLDS and parts[1] in _ROUNDS


def _pattern(layers: Sequence[int], module: str) -> str:
    """A regular expression for one module of some layers.

    >>> _pattern([0, 2], "mlp.up_proj")
    're:.*layers\\\\.(0|2)\\\\.mlp\\\\.up_proj$'
    """
    return rf"re:.*layers\.({'|'.join(map(str, layers))})\.{module.replace('.', chr(92) + '.')}$"


def _mappings(fold: str, where: Mapping[str, Sequence[int]], sites: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for name, layers in where.items():
        feeder = _pattern(layers, sites[name].feeder)
        linears = [_pattern(layers, linear) for linear in sites[name].linears]
        if fold == "awq":
            found.append({"smooth_layer": feeder, "balance_layers": linears})
        elif sites[name].feeder.endswith("norm"):  # SmoothQuant folds into norms only
            found.append([linears, feeder])
    return found


def _fold_options(fold: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if fold == "awq":
        return {"duo_scaling": False, "n_grid": options.get("ratios", 20)}
    return {"smoothing_strength": options.get("alpha", 0.5)}


def _round_options(rounds: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if rounds != "gptq":
        return {}
    return {"dampening_frac": options.get("damp", 0.01), "block_size": options.get("block_size", 128),
            "actorder": "static" if options.get("act_order") else None}


def _scheme(options: Mapping[str, Any]) -> dict[str, Any]:
    group = options["group_size"]
    inputs = None if options["abits"] == 16 else {
        "num_bits": options["abits"], "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"weights": {"num_bits": options["wbits"], "type": "int", "symmetric": options["symmetric"],
                        "strategy": "group" if group else "channel", **({"group_size": group} if group else {})},
            "input_activations": inputs}
