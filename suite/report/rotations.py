"""The table "does learning the rotation help": SpinQuant's rotations side by side, over seeds. From the records alone.

results/<model>/spinquant.md, .csv

The records stand on a shelf of their own: rows of a sweep have no place in the main tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from suite.report import data
from suite.store import Record, Store, write_text

SHELF = "rotations"
ORDER = ("none", "random", "hadamard", "random-hadamard", "learned")
CONTROL = "random-hadamard"  # the start of the learning: what every other row is compared with, seed by seed


def write(store: Store, model: str) -> list[Path]:
    """Writes the table of one model; returns the paths, none if there is nothing to show."""
    folder, written = store.folder(model), []
    for name, text in content(store, model).items():
        write_text(folder / name, text)
        written.append(folder / name)
    return written


def content(store: Store, model: str) -> dict[str, str]:
    """The files of one model, corpus after corpus; none if there is nothing to compare."""
    found = {r.identity["task"]["name"] for r in _records(store, model)}
    tasks = [*(task for task in data.TASKS if task in found), *sorted(found - {*data.TASKS})]
    rows = [{"task": task, **row} for task in tasks for row in table(store, model, task)]
    if len({row["rotation"] for row in rows}) < 2:  # the row of a main table, which there is nothing to compare with
        return {}
    return {
        "spinquant.md": markdown(rows, model, {task: full_precision(store, model, task) for task in tasks}),
        "spinquant.csv": pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"),
    }


def table(store: Store, model: str, task: str = "world_wiki_ppl") -> list[dict[str, Any]]:
    """One row per scheme, variant, number of calibration sequences and rotation: perplexity by seed, mean, standard
    deviation, and the difference to the control with its standard error, over the seeds that both have.

    Of several calibration texts, limits, types or versions, those of the record measured last count.
    """
    records = [r for r in _records(store, model) if r.identity["task"]["name"] == task]
    found: dict[tuple, dict[int, float]] = {}
    for record in records:
        if _shared(record) == _shared(records[-1]):
            chosen = record.identity["method"]["options"]
            among = record.identity["scheme"], chosen["variant"], record.identity["calibration"]["nsamples"]
            key = (*among, chosen["rotation"], _learning(chosen))
            found.setdefault(key, {})[chosen["rotation_seed"]] = data.Score(record).value
    seeds = sorted({seed for values in found.values() for seed in values})
    rows = []
    for key in sorted(found, key=lambda key: (*key[:3], ORDER.index(key[3]), key[4])):
        *among, rotation, learning = key
        values, control = found[key], found.get((*among, CONTROL, ""), {})
        differences = (
            [values[seed] - control[seed] for seed in sorted({*values} & {*control})] if rotation != CONTROL else []
        )
        rows.append(
            {
                **dict(zip(("scheme", "variant", "nsamples"), among)),
                "rotation": rotation,
                "learning": learning,
                **{f"seed_{seed}": values.get(seed) for seed in seeds},
                **_summary("", list(values.values())),
                **_summary("difference_", differences),
            }
        )
    return rows


def _records(store: Store, model: str) -> list[Record]:
    """The evaluations that the table is about, in the order of their measurement."""
    found = store.records(model=model, kind="evaluation", mode="matched")
    spun = [r for r in found if r.identity["method"]["method"] == "spinquant" and r.result["kind"] == "perplexity"]
    inner = [r for r in spun if r.identity["method"]["options"]["inner"] == "gptq"]
    return sorted(inner, key=lambda r: r.provenance.get("date", ""))


def _shared(record: Record) -> tuple:
    """What all numbers of a table have in common."""
    identity = record.identity
    calibration = {key: identity["calibration"][key] for key in ("source", "seqlen")}
    return (
        calibration,
        identity["model"],
        identity["dtype"],
        identity["numerics"],
        identity["libraries"],
        identity["task"],
    )


def _learning(options: Mapping[str, Any]) -> str:
    """How rotations were learned."""
    if options["rotation"] != "learned":
        return ""
    through = ", through the scale" if options.get("scale_gradient") else ""
    return f"{options['steps']} x {options['batch']}, rate {options['learning_rate']:g}{through}"


def _summary(prefix: str, values: list[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {
        f"{prefix}mean": statistics.fmean(values) if values else None,
        f"{prefix}deviation": spread,
        f"{prefix}error": None if spread is None else spread / math.sqrt(len(values)),
    }


def full_precision(store: Store, model: str, task: str) -> float | None:
    """The perplexity of the unquantized model, if it was measured."""
    found = [
        r
        for r in store.records(model=model, kind="evaluation")
        if r.identity["scheme"] is None and r.identity["task"]["name"] == task
    ]
    return data.Score(max(found, key=lambda r: r.provenance.get("date", ""))).value if found else None


def markdown(rows: list[Mapping[str, Any]], model: str, full: Mapping[str, float | None]) -> str:
    """rows: of `table`, each with its task; full: task -> the perplexity of the unquantized model."""
    seeds = sorted({key for row in rows for key in row if key.startswith("seed_")}, key=lambda key: int(key[5:]))
    headings = ["scheme", "variant", "sequences", "rotation", *(seed.replace("_", " ") for seed in seeds)]
    headings += ["mean", "sd", f"Δ {CONTROL}"]
    parts = [
        f"# Does learning the rotation help? {data.title_of(model)}\n\n"
        f"Perplexity after each rotation and GPTQ. Sequences: of calibration, for the learning and for GPTQ. "
        f"A seed is that of the calibration sequences, of the random start and of the order of the learning. "
        f"Δ: mean over seeds of the difference to {CONTROL} of the same seed and sequences, ± its standard error. "
        f'"none" is GPTQ without a rotation. W16 leaves the weights as they are: there GPTQ has nothing to do.\n'
    ]
    for task, reference in full.items():
        cells = [
            [
                row["scheme"],
                row["variant"],
                str(row["nsamples"]),
                " ".join(filter(None, (row["rotation"], row["learning"] and f"({row['learning']})"))),
                *(_number(row.get(seed)) for seed in seeds),
                _number(row["mean"]),
                _number(row["deviation"]),
                _difference(row),
            ]
            for row in rows
            if row["task"] == task
        ]
        alignment = ("left", "left", "right", "left", *("right",) * (len(seeds) + 3))
        parts.append(f"## {data.heading(task)}" + (f", full precision {reference:.4f}" if reference is not None else ""))
        parts.append(tabulate(cells, headings, tablefmt="github", disable_numparse=True, colalign=alignment))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference_mean"] is None:
        return ""
    error = row["difference_error"]
    return f"{row['difference_mean']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
