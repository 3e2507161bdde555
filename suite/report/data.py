"""From records to what tables and plots show: one comparison per setting. No torch, no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from suite import stats
from suite.store import Record, Setting, Store

FULL = "fp16"  # the row that all others are compared with

# the order of rows; compositions follow their transform, unknown methods come before the hybrids
METHODS = ("fp16", "rtn", "gptq", "awq", "smoothquant", "spinquant", "mp-gptq")
HYBRID = "cka-hybrid"

# the order of columns, and their headings
TASKS = {
    "world_wiki_ppl": "wiki", "world_chat_ppl": "chat", "wikitext2_ppl": "WikiText-2", "c4_ppl": "C4",
    "text_ppl": "text",
    "world_math": "math", "world_events": "events", "world_quiz": "quiz", "world_code": "code",
    "gsm8k": "GSM8K", "hellaswag": "HellaSwag", "mmlu": "MMLU", "humaneval": "HumanEval",
}


@dataclass(frozen=True)
class Score:
    """One cell: what a variant scored on a task. value is a perplexity, or a share between 0 and 1."""

    record: Record

    @property
    def value(self) -> float:
        return self.record.result["metrics"][self.record.result["headline"]]["value"]

    @property
    def stderr(self) -> float | None:
        return self.record.result["metrics"][self.record.result["headline"]].get("stderr")

    @property
    def sample(self) -> stats.Sample | None:
        """What the score was measured on, window by window or document by document, if the record kept it."""
        result = self.record.result
        if "windows" in result:
            return stats.Sample.windows(result["windows"]["nll"], result["windows"]["tokens"])
        outcomes = result.get("outcomes", {}).get(result["headline"])
        return stats.Sample.documents(outcomes) if outcomes is not None else None

    @property
    def overlaps(self) -> bool:
        """Whether the variant was calibrated on the text it is evaluated on."""
        return bool(self.record.result.get("calibrated_on_this_text"))


@dataclass
class Row:
    """One variant: its quantization, if that was recorded, and its score per task."""

    label: str
    quantization: Record | None = None
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return self.label != FULL

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        return self.quantization.result["layers"] if self.quantization else ()

    @property
    def is_hybrid(self) -> bool:
        return any("chosen" in layer for layer in self.layers)


@dataclass
class Comparison:
    """All that one setting's tables and plots show. tasks: perplexities first, then accuracies."""

    setting: Setting
    rows: list[Row]
    tasks: list[str]
    kinds: dict[str, str]  # of a task: "perplexity" or "mean"

    def row(self, label: str) -> Row | None:
        return next((row for row in self.rows if row.label == label), None)

    def of_kind(self, kind: str) -> list[str]:
        return [task for task in self.tasks if self.kinds[task] == kind]

    @property
    def model(self) -> str:
        return self.setting.model["name"]

    @property
    def title(self) -> str:
        """The model, with planted outliers named as such."""
        return title_of(self.model)


def title_of(model: str) -> str:
    """
    >>> title_of("tiny-llama-m@outliers=8,seed=1")
    'tiny-llama-m with PLANTED outliers (severity 8, seed 1)'
    """
    base, severity, seed = planted(model)
    if severity is None:
        return base
    return f"{base} with PLANTED outliers (severity {severity:g}" + (f", seed {seed})" if seed else ")")


def planted(model: str) -> tuple[str, float | None, int]:
    """(base model, severity of the planted outliers or None, their seed) of a model's name."""
    found = re.fullmatch(r"(.*)@outliers=([\d.]+)(?:,seed=(\d+))?", model)
    return (found[1], float(found[2]), int(found[3] or 0)) if found else (model, None, 0)


def heading(task: str) -> str:
    return TASKS.get(task, task)


def compare(store: Store, setting: Setting, methods: Iterable[str] = (), tasks: Iterable[str] = ()) -> Comparison:
    """The comparison of a setting: every variant and task that has a record, and those asked for even without one.

    Where a task was measured in two versions, the one measured last counts, and the other's cells are empty.
    """
    rows: dict[str, Row] = {label: Row(label) for label in methods}
    found = [record for record in store.records(model=setting.model["name"])
             if record.kind != "study" and setting.holds(record.identity)]
    found.sort(key=lambda r: r.provenance.get("date", ""))  # of two versions of a plug-in's code, the later one shows
    evaluations = [record for record in found if record.kind == "evaluation"]
    current: dict[str, Record] = {}  # task -> the record measured last
    for record in sorted(evaluations, key=lambda r: r.provenance.get("date", "")):
        current[record.identity["task"]["name"]] = record
    for record in found:
        row = rows.setdefault(record.result["label"], Row(record.result["label"]))
        if record.kind == "quantization":
            row.quantization = record
        elif record.identity["task"] == current[record.identity["task"]["name"]].identity["task"]:
            row.scores[record.identity["task"]["name"]] = Score(record)
    kinds = {task: _kind_by_name(task) for task in tasks} | {task: r.result["kind"] for task, r in current.items()}
    known = list(TASKS)
    ordered = sorted(kinds, key=lambda t: (kinds[t] != "perplexity", known.index(t) if t in known else len(known), t))
    return Comparison(setting, sorted(rows.values(), key=lambda row: _rank(row.label)), ordered, kinds)


def _kind_by_name(task: str) -> str:
    return "perplexity" if task.endswith("_ppl") else "mean"


def _rank(label: str) -> tuple:
    method = label.split(" ")[0]
    first = method.split("+")[0]
    position = METHODS.index(first) if first in METHODS else len(METHODS) + (method == HYBRID)
    return position, "+" in method, label


def settings(store: Store, model: str) -> list[Setting]:
    """The settings that a model's records were measured in, from the records alone.

    Of settings that differ only in what their files' names do not tell (library versions, the suite's numerics), the
    one measured last. A variant that needs no calibration makes a setting of its own only where nothing else does.
    """
    evaluations = sorted(store.records(model=model, kind="evaluation"), key=lambda r: r.provenance.get("date", ""))
    quantized = [r.identity for r in evaluations if r.identity["scheme"] is not None]
    found: dict[str, Setting] = {}
    for identity in quantized:
        if identity["mode"] == "native":
            setting = _setting(identity, None, None)
        elif identity["calibration"] is not None:
            setting = _setting(identity, identity["calibration"], identity["input_policy"])
        else:
            continue
        found[setting.stem] = setting
    shown = {(s.scheme, s.mode, s.dtype, s.limit, s.fewshot) for s in found.values()}
    for identity in quantized:
        setting = _setting(identity, None, None)
        if (setting.scheme, setting.mode, setting.dtype, setting.limit, setting.fewshot) not in shown:
            found[setting.stem] = setting
    return [found[stem] for stem in sorted(found)]


def _setting(identity: Mapping[str, Any], calibration: Mapping[str, Any] | None, input_policy: str | None) -> Setting:
    return Setting(identity["model"], identity["scheme"], identity["mode"], calibration, input_policy,
                   identity["dtype"], identity["seed"], identity["numerics"], identity["libraries"],
                   identity["task"]["limit"], identity["task"]["fewshot"])


# ---------------------------------------------------------------------------------------------- what is better


def best(comparison: Comparison, task: str) -> str | None:
    """The quantized variant that is best on a task and better than the second by the paired test, if there is one."""
    scored = [(row.label, score.sample) for row in comparison.rows if row.quantized
              if (score := row.scores.get(task)) is not None and score.sample is not None]
    if len(scored) < 2:
        return None
    sign = 1 if comparison.kinds[task] == "perplexity" else -1
    (label, first), (_, second) = sorted(scored, key=lambda pair: sign * pair[1].score)[:2]
    return label if stats.better(first, second) else None


def best_mean(comparison: Comparison) -> str | None:
    """As `best`, for the mean over all accuracies."""
    tasks = comparison.of_kind("mean")
    scored = [(row.label, [row.scores[task].sample for task in tasks]) for row in comparison.rows
              if row.quantized and mean_accuracy(row, tasks) is not None]
    if len(scored) < 2 or any(sample is None for _, samples in scored for sample in samples):
        return None
    (label, first), (_, second) = sorted(scored, key=lambda pair: -sum(sample.score for sample in pair[1]))[:2]
    return label if stats.mean_difference(list(zip(first, second, strict=True))).low > 0 else None


def mean_accuracy(row: Row, tasks: Sequence[str]) -> float | None:
    """The unweighted mean over tasks, None unless all of them were run."""
    if not tasks or any(task not in row.scores for task in tasks):
        return None
    return sum(row.scores[task].value for task in tasks) / len(tasks)
