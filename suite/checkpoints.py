"""Checkpoints of other tools as rows of a comparison: evaluated by the same tasks, on record beside the suite's methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from suite import method, models
from suite.adapter import PTQ
from suite.errors import PTQError
from suite.evaluation import Tasks, evaluate_quietly, outcome_of
from suite.experiments import Outcome
from suite.grid import Scheme
from suite.linear import QuantLinear
from suite.provenance import Meter, provenance
from suite.store import Record, Store, significant
from suite.variants import NUMERICS

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")


def check(model: str, rows: Mapping[str, str | Path], methods: Sequence[str] = ()) -> None:
    """Raises PTQError for rows that `measure` could not take, before any work: a label that names a method (of
    `methods`, or any registered one), a folder that is no quantized model, or one of another architecture than `model`."""
    base = models.read_json(models.resolve(model).fetched().folder / "config.json") if rows else {}
    for label, folder in rows.items():
        if label in (*methods, *method.names()):
            raise PTQError(f"checkpoint label {label!r} is a method's name: give another")
        source = models.resolve(str(folder))
        if source.kind != "quantized":
            raise PTQError(f"checkpoint {str(folder)!r} is not quantized: give a checkpoint, or a method's name")
        config = models.read_json(source.folder / "config.json")
        for key in _SHAPE:
            if config.get(key) != base.get(key):
                raise PTQError(f"checkpoint {str(folder)!r} has {key} {config.get(key)!r}, {model!r} has {base.get(key)!r}: "
                               f"give a checkpoint of that model")


def measure(store: Store, outcome: Outcome, model: str, rows: Mapping[str, str | Path], fresh: bool = False,
            allow_code_execution: bool = False) -> Outcome:
    """Evaluates checkpoints on the tasks of a comparison and stores what the store lacks; the outcome with those rows.

    model: the full-precision model that is compared; rows: label -> folder, of the compressed-tensors format or of
    `ptq quantize`. The record tells the checkpoint's digest; its calibration is unknown, so it stands in every table
    that shares the rest. fresh: measure again; allow_code_execution: of the outcome's tasks.

    Raises PTQError: as `check`; a checkpoint of a scheme that is not the comparison's.

    >>> measure(store, outcome, "tiny-llama-s", {"peer-gptq": "/tmp/peer"})  # doctest: +SKIP
    """
    check(model, rows, outcome.methods)
    setting = outcome.setting
    tests = Tasks(outcome.tasks, setting.limit, setting.fewshot, allow_code_execution=allow_code_execution)
    measured, found, evaluations = outcome.measured, outcome.found, dict(outcome.evaluations)
    for label, folder in rows.items():
        digest = models.identify(str(folder))["digest"]
        loaded: Any = None
        for task in outcome.tasks:
            identity = {"kind": "evaluation", "model": dict(setting.model), "scheme": setting.scheme,
                        "method": {"method": label, "options": {"checkpoint": digest}}, "mode": setting.mode,
                        "calibration": None, "input_policy": None, "dtype": setting.dtype, "seed": None,
                        "numerics": NUMERICS, "libraries": dict(setting.libraries), "task": tests.identity(task)}
            evaluations[label, task] = identity
            if not fresh and store.find(identity) is not None:
                found += 1
                continue
            if loaded is None:
                loaded = models.load(str(folder), dtype=setting.dtype)
                _check_scheme(loaded.model, setting.scheme, folder)
                harness = PTQ(loaded.model, tokenizer=loaded.tokenizer)
            with Meter() as meter:
                result = outcome_of(task, evaluate_quietly(harness, tests, task))
            store.put(Record(identity, significant({**result, "label": label}), provenance(meter)))
            measured += 1
    return replace(outcome, methods=(*outcome.methods, *rows), measured=measured, found=found, evaluations=evaluations)


def _check_scheme(model: Any, wanted: str, folder: str | Path) -> None:
    schemes = {str(Scheme(m.spec, m.act)) for m in model.modules() if isinstance(m, QuantLinear)}
    if schemes != {wanted}:
        raise PTQError(f"checkpoint {str(folder)!r} is at {', '.join(sorted(schemes)) or 'W16'}, the comparison at "
                       f"{wanted}: give the same --wbits, --abits and --group-size")
