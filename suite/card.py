"""The model card of an exported checkpoint: how it was made, layer by layer, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.store import Store


def text(config: Any, record: Mapping[str, Any], groups: Sequence[Any], measured: Sequence[Mapping[str, Any]] | None = None
         ) -> str:
    """The README.md of a checkpoint.

    config: of the model; record: of the run that quantized it, or {} if the suite did not; groups: the schemes of its
    linears; measured: rows {"task", "metric", "value", "full"} as `measured` gives them, values in the table's units.
    """
    model, method = record.get("model") or {}, record.get("method") or {}
    name, base = method.get("method", "unknown method"), model.get("name")
    front = ["library_name: transformers", "tags:", "- compressed-tensors", "- quantized"]
    if base and base.count("/") == 1 and "@" not in base:  # an id of the hub
        front.insert(0, f"base_model: {base}")
    lines = ["---", *front, "---", "",
             f"# {base or config.model_type} quantized by {name}, {record.get('scheme', 'compressed-tensors')}", "",
             "Written by `ptq export` of ptq-suite in the compressed-tensors format. It loads by", "",
             "    AutoModelForCausalLM.from_pretrained(folder)", "",
             "with the package `compressed-tensors` installed. lm_head and embeddings are not quantized.", "",
             "## How it was made", ""]
    lines += [f"- {what}: {told}" for what, told in _facts(model, method, record, groups)]
    lines += ["", "## Measured", "", *_table(measured)]
    if layers := record.get("layers"):
        lines += ["", "## Layers", "", *_layers(layers)]
    return "\n".join(lines) + "\n"


def _facts(model: Mapping, method: Mapping, record: Mapping, groups: Sequence[Any]) -> list[tuple[str, str]]:
    facts = []
    if model:
        facts.append(("model", f"{model['name']}, sha256 {model['digest']}"))
    for part in method.get("parts", [method]):
        options = ", ".join(f"{key}={value}" for key, value in part.get("options", {}).items())
        facts.append(("method", f"{part.get('method', 'not recorded')}" + (f" ({options})" if options else "")))
    if calibration := record.get("calibration"):
        facts.append(("calibration", f"{calibration['nsamples']} x {calibration['seqlen']} tokens of "
                                     f"{calibration['source']}, seed {calibration['seed']}, sha256 of the tokens "
                                     f"{calibration['digest']}"))
    for group in groups:
        weights, inputs = group.weights, group.input_activations
        grid = "16 bit" if weights is None else (
            f"int{weights.num_bits}, {'' if weights.symmetric else 'a'}symmetric, one scale "
            + (f"for {weights.group_size} columns" if weights.strategy == "group" else "a row"))
        rounded = "16 bit" if inputs is None else f"int{inputs.num_bits}, dynamic, one scale a token"
        where = "all linears of the decoder layers" if group.targets == ["Linear"] else f"{len(group.targets)} linears"
        facts.append(("scheme", f"{where}: weights {grid}; inputs {rounded}; stored as {group.format}"))
    return facts


def _table(measured: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not measured:
        return ["Nothing was measured of this model, or nothing was on record when this was written. `ptq reproduce` measures,",
                "and `ptq export --results FOLDER` puts here what is in that folder."]
    rows = [f"| {row['task']} | {row['metric']} | {row['full'] or ''} | {row['value']} |" for row in measured]
    return ["| task | metric | full precision | this model |", "|---|---|---|---|", *rows]


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    chosen = any("chosen" in layer for layer in layers)
    lines = ["Bits count the scales. 1 - CKA is the distance of the layer's output to the original's on the calibration",
             "data, 0 being equal.", "", f"| layer |{' method |' if chosen else ''} bits | 1 - CKA |",
             f"|---|{'---|' if chosen else ''}---|---|"]
    for layer in layers:
        distance = (layer.get("errors") or {}).get("cka")
        lines.append(f"| {layer['layer']} |" + (f" {layer.get('chosen', '')} |" if chosen else "")
                     + f" {layer['bits']:.3f} | {'' if distance is None else format(distance, '.3e')} |")
    return lines


def measured(store: Store, record: Mapping[str, Any], checkpoint: str | None = None) -> list[dict[str, str]]:
    """What a results folder holds of a quantized model and of its original: rows for `text`, perplexities first.

    Of the same model, method, options and calibration tokens; or, by its digest, of the `checkpoint` itself, which
    `ptq reproduce --checkpoint` measures. Whole tasks only, none cut short by a limit, none on the calibration's own text.
    """
    found: dict[str, Any] = {}
    full: dict[tuple[str, str], Any] = {}
    for other in store.records((record.get("model") or {}).get("name"), "evaluation"):
        identity, task = other.identity, other.identity["task"]["name"]
        if identity["task"]["limit"] is not None or other.result.get("calibrated_on_this_text"):
            continue
        if identity["scheme"] is None:
            full[identity["model"]["digest"], task] = other
        elif checkpoint and identity["method"]["options"].get("checkpoint") == checkpoint or _made(identity, record):
            found[task] = other
    rows = []
    for task, other in found.items():
        original = full.get((other.identity["model"]["digest"], task))
        rows.append({"task": task, "metric": other.result["headline"].partition(",")[0], "value": _value(other),
                     "full": _value(original) if original else ""})
    return sorted(rows, key=lambda row: (row["metric"] != "perplexity", row["task"]))


def _made(identity: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of a model that was quantized as a record tells."""
    if not record.get("model") or identity["model"]["digest"] != record["model"]["digest"] or "kvbits" in identity:
        return False
    same = all(identity.get(key) == record.get(key) for key in ("method", "scheme", "mode", "plugins"))
    # A method that needs no data has no calibration in its records of evaluations; older folders do not tell their type.
    return (same and identity["dtype"] == record.get("dtype", identity["dtype"])
            and _tokens(identity["calibration"]) in (None, _tokens(record.get("calibration"))))


def _tokens(calibration: Mapping[str, Any] | None) -> str | None:
    return calibration and calibration["digest"]


def _value(record: Any) -> str:
    value = record.result["metrics"][record.result["headline"]]["value"]
    return f"{value:.4f}" if record.result["kind"] == "perplexity" else f"{100 * value:.1f} %"


def told(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it may leave the machine: of a calibration file its name, and not where it lies."""
    calibration = record.get("calibration")
    if not calibration:
        return dict(record)
    return {**record, "calibration": {**calibration, "source": Path(calibration["source"]).name}}
