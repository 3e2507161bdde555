"""Invented records: what the report is tested on, and what a fake runner returns."""

from __future__ import annotations

import numpy as np

from suite.store import Record, Setting, Store, significant

CALIBRATION = {"source": "embedded", "digest": "ca11" * 16, "nsamples": 64, "seqlen": 512, "seed": 0}
LIBRARIES = {"torch": "2.13.0", "transformers": "5.23.0"}
TASKS = ("world_wiki_ppl", "world_chat_ppl", "world_math", "world_events", "world_quiz")
METHODS = ("fp16", "rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq", "mp-gptq", "cka-hybrid")
POOL = ("gptq", "awq", "smoothquant")


def variant(method: str = "gptq", model: str | dict = "toy", scheme: str = "W4A8 g128",
            options: dict | None = None, **changes) -> dict:
    """The identity shared by the records of one variant."""
    plain = method == "fp16"
    named = model if isinstance(model, dict) else {"name": model, "digest": f"digest of {model}"}
    identity = {"model": named, "method": {"method": method, "options": options or {}},
                "scheme": None if plain else scheme, "mode": None if plain else "matched",
                "calibration": None if method in ("fp16", "rtn") else CALIBRATION,
                "input_policy": None if method in ("fp16", "rtn") else "quantized", "dtype": "float32",
                "seed": None if method in ("fp16", "rtn") else 0,
                "numerics": 1, "libraries": LIBRARIES}
    return identity | changes


def setting(model: str = "toy", **changes) -> Setting:
    fixed = {"model": {"name": model, "digest": f"digest of {model}"}, "scheme": "W4A8 g128", "mode": "matched",
             "calibration": CALIBRATION, "input_policy": "quantized", "dtype": "float32", "seed": 0, "numerics": 1,
             "libraries": {**LIBRARIES, "lm-eval": "0.4.13"}}
    return Setting(**(fixed | changes))


def provenance(date: str = "2026-01-01T00:00:00+00:00") -> dict:
    return {"date": date}


def quantization(method: str, layers: int = 8, seed: int = 0, **changes) -> Record:
    """Errors that grow by depth; the hybrid's choices vary."""
    random, identity = np.random.default_rng([seed, sum(method.encode())]), variant(method, **changes)
    rows = []
    for i in range(layers):
        row = {"layer": i, "seconds": 0.25, "weights": 1000, "bits": 16.0 if method == "fp16" else 4.125}
        if method != "fp16":
            row["errors"] = {"cka": float(1e-4 * (i + 1) ** 1.5 * random.uniform(0.5, 3)), "mse": 1e-3}
        if method == "cka-hybrid":
            scores = {name: {"cka": float(1e-4 * (i + 1) * random.uniform(0.7, 2)), "mse": 1e-3} for name in POOL}
            first, second, *_ = sorted(scores, key=lambda name: scores[name]["cka"])
            row |= {"chosen": first, "candidates": scores, "margin": scores[second]["cka"] - scores[first]["cka"]}
        if method == "mp-gptq":
            row["wbits"] = (16, 4, 2, 4)[i % 4]
        rows.append(row)
    result = {"label": method, "layers": rows, "bits": rows[0]["bits"], "seconds": 0.25 * layers,
              "peak_memory_mib": 512.0}
    return Record({"kind": "quantization", **identity, "diagnosed_on": None if method == "fp16" else CALIBRATION},
                  significant(result), provenance())


def evaluation(method: str, task: str, damage: float = 0.0, n: int = 200, limit: int | None = None, noise: float = 0.0,
               date: str = "2026-01-01T00:00:00+00:00", **changes) -> Record:
    """damage: nats per token lost, or the share of documents lost; noise: of the window's own share of it."""
    common, own = np.random.default_rng(sum(task.encode())), np.random.default_rng(sum((method + task).encode()))
    n = min(n, limit or n)
    identity = {"kind": "evaluation", **variant(method, **changes),
                "task": {"name": task, "version": 1, "digest": f"digest of {task}", "num_fewshot": 0, "fewshot": None,
                         "limit": limit}}
    identity["libraries"] = {**identity["libraries"], "lm-eval": "0.4.13"}
    if task.endswith("_ppl"):
        nll = 511 * (common.normal(1.4, 0.2, n) + damage + own.normal(0, noise, n))
        result = {"kind": "perplexity", "headline": "perplexity,none",
                  "metrics": {"perplexity,none": {"value": float(np.exp(nll.sum() / 511 / n)), "stderr": None}},
                  "windows": {"nll": nll.tolist(), "tokens": 511},
                  "info": {"window": 512, "bos": "none", "join": "\\n\\n", "tokens": 511 * n,
                           "data_digest": "da7a" * 16}}
    else:
        right = (common.uniform(size=n) < 0.8) & (own.uniform(size=n) >= damage)
        stated = {"value": float(right.mean()), "stderr": float(right.std(ddof=1) / n**0.5)}
        result = {"kind": "mean", "headline": "acc,none", "metrics": {"acc,none": stated}, "info": {},
                  "outcomes": {"acc,none": "".join(map(str, right.astype(int)))}}
    return Record(identity, significant({"label": method, **result}), provenance(date))


DAMAGE = {"fp16": 0.0, "rtn": 0.12, "gptq": 0.06, "awq": 0.08, "smoothquant": 0.09, "smoothquant+gptq": 0.05,
          "mp-gptq": 0.07, "cka-hybrid": 0.03}


def fill(store: Store, methods=METHODS, tasks=TASKS, severity: float = 1.0, **changes) -> None:
    """A full set of records of one model."""
    for method in methods:
        store.put(quantization(method, **changes))
        for task in tasks:
            store.put(evaluation(method, task, DAMAGE[method] * severity, noise=0.01, **changes))
