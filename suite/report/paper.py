"""The paper's numbers beside ours: what was reported, what this suite measured, and why the two differ. No torch.

    results/ablations/paper.md .csv .tex

The paper's values stand in `paper.json`, only those that are known; the others are blank. Ours are looked up in the
records, whatever they are: nothing is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from suite.report import ablations, data
from suite.report.sheets import Sheet
from suite.store import Record, Store

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
TOLERANCE = 0.01  # of a perplexity: other versions, other hardware; accuracies match within two standard errors
PAPER_PROTOCOL = {"window": 2048, "calibration": (128, 2048)}


def rows(store: Store) -> list[dict[str, Any]]:
    """One row per value of the paper: model, task, method, paper, ours, difference, protocol, verdict."""
    records = list(store.records(kind="evaluation"))
    return [_row(entry, name, value, records) for entry in PAPER["values"] for name, value in entry["methods"].items()]


def _row(entry: Mapping[str, Any], name: str, value: float | None, records: Sequence[Record]) -> dict[str, Any]:
    found = _ours(entry, name, records)
    row = {"model": entry["model"], "task": entry["task"], "method": name, "paper": value, "ours": None,
           "difference": None, "protocol": "", "verdict": "not run"}
    if found is None:
        return row
    score = data.Score(found)
    perplexity = found.result["kind"] == "perplexity"
    ours = score.value if perplexity else 100 * score.value
    differing = _settings(entry, found)
    row |= {"ours": ours, "protocol": _protocol(found)}
    if value is None:
        return row | {"verdict": "no value in the paper that we know of"}
    allowed = TOLERANCE * value if perplexity else 200 * (score.stderr or 0)
    near = abs(ours - value) <= allowed
    told = "; ".join(differing) or "no setting that we know of; the paper states no more"
    return row | {"difference": ours - value, "verdict": "matched" if near else f"differs: {told}"}


def _ours(entry: Mapping[str, Any], name: str, records: Sequence[Record]) -> Record | None:
    """The last record of the method at the paper's format, on all documents."""
    scheme = None if name == data.FULL else PAPER["scheme"]
    found = [record for record in records if record.model in entry["hub"] and record.identity["scheme"] == scheme
             and record.identity["task"]["name"] == entry["task"] and record.identity["task"]["limit"] is None
             and record.identity["method"]["method"] == name and record.identity["mode"] in (None, "matched")]
    return max(found, key=lambda record: record.provenance.get("date", ""), default=None)


def _settings(entry: Mapping[str, Any], record: Record) -> list[str]:
    """The settings in which our run is known to differ from the paper's."""
    told = [entry["other"]] if "other" in entry else []
    told += [f"run on {record.model}"] if record.model != entry["hub"][0] else []
    window, calibration = record.result.get("info", {}).get("window"), record.identity.get("calibration")
    if window not in (None, PAPER_PROTOCOL["window"]):
        told.append(f"windows of {window} tokens, the papers' have {PAPER_PROTOCOL['window']}")
    if calibration and (calibration["nsamples"], calibration["seqlen"]) != PAPER_PROTOCOL["calibration"]:
        told.append(f"calibrated on {calibration['nsamples']} x {calibration['seqlen']} tokens")
    return told


def _protocol(record: Record) -> str:
    info, task = record.result.get("info", {}), record.identity["task"]
    if "window" in info:
        return f"windows of {info['window']}"
    return f"{task['num_fewshot']}-shot, {info.get('documents')} documents"


def paper_share() -> float:
    """What the paper's Llama-3-8B row on C4 comes to: (best baseline - hybrid) / (best baseline - full precision)."""
    values = next(entry["methods"] for entry in PAPER["values"] if entry["task"] == "c4_ppl")
    best = min(values[name] for name in ("awq", "gptq", "smoothquant", "spinquant"))
    return (best - values["cka-hybrid"]) / (best - values["fp16"])


def shares(sheets: Sequence[Sheet]) -> list[list[str]]:
    """The same share on the models that were run: model, corpus, FP16, best baseline, hybrid, recovered."""
    found = []
    for sheet in sheets:
        line = next((line for line in sheet.lines if line.name == data.HYBRID), None)
        for task in sheet.of_kind("perplexity") if line else ():
            uniform = [one for one in sheet.lines if one.uniform and one.value(task) is not None]
            share = sheet.recovered(line, task)
            if not uniform or share is None:
                continue
            best = min(uniform, key=lambda one: one.value(task))
            found.append([f"{data.title_of(sheet.model)}, {sheet.scheme}", data.heading(task),
                          f"{sheet.full.value(task):.3f}", f"{best.value(task):.3f} ({best.name})",
                          f"{line.value(task):.3f}", ablations.difference(sheet.difference(line, task, best), False),
                          f"{100 * share:+.0f}"])
    return found


def files(store: Store, sheets: Sequence[Sheet]) -> dict[str, bytes]:
    found = rows(store)
    text = [[row["model"], data.heading(row["task"]), row["method"], _number(row["paper"]), _number(row["ours"]),
             "" if row["difference"] is None else f"{row['difference']:+.2f}", row["protocol"], row["verdict"]]
            for row in found if row["paper"] is not None or row["ours"] is not None]
    headings = ["model", "measured on", "method", "paper", "ours", "difference", "our protocol", "verdict"]
    table = tabulate(text, headings, tablefmt="pipe", disable_numparse=True,
                     colalign=["left", "left", "left", "right", "right", "right", "left", "left"])
    derived = "; ".join(f"{entry['model']} {data.heading(entry['task'])} {name}: {how}" for entry in PAPER["values"]
                        for name, how in entry.get("derived", {}).items())
    own = tabulate(shares(sheets), ["model", "corpus", "FP16", "best baseline", "hybrid", "Δ", "recovered %"],
                   tablefmt="pipe", disable_numparse=True, colalign=["left", "left", *["right"] * 5])
    page = (f"# Table 10. The paper's table beside ours\n\nValues of {PAPER['source']}, at {PAPER['scheme']}, as far "
            f"as they are known here; nothing is filled in. Derived: {derived}. Matched: within {TOLERANCE:.0%} of a "
            f"perplexity, or within two standard errors of an accuracy.\n\n{table}\n\n"
            f"## The paper's claim on the models that were run\n\nThe share of the perplexity gap between the best "
            f"baseline (GPTQ, AWQ, SmoothQuant, SpinQuant or round-to-nearest, picked in hindsight) and full precision "
            f"that the hybrid closes; the paper's Llama-3-8B on C4 comes to {100 * paper_share():.0f} %. Below 0: "
            f"worse than that baseline. Δ: hybrid minus best baseline, {ablations.STAR} where its paired interval excludes "
            f"0.\n\n{own}\n")
    tex = ablations.latex_table(headings, text, f"Values of {PAPER['source']} beside ours", "paper")
    return {"paper.md": page.encode(), "paper.tex": tex.encode(),
            "paper.csv": pd.DataFrame(found).to_csv(index=False, float_format="%.7g", lineterminator="\n").encode()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
