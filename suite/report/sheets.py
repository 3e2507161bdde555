"""What an ablation came to, as tables and figures take it: sheets of lines, from records alone. No torch.

A sheet is one experiment on one model at one scheme; a line is one of its rows, with the records of every repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from suite import stats
from suite.report import data
from suite.store import Record

__all__ = ["Line", "Repeat", "Sheet", "Study"]


@dataclass
class Repeat:
    """One variant: its quantization and its scores, as far as recorded. varied: the value that repeats vary."""

    quantization: Record | None = None
    scores: dict[str, data.Score] = field(default_factory=dict)
    varied: Any = None

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        return self.quantization.result["layers"] if self.quantization else ()

    @property
    def choices(self) -> list[str]:
        """The method of each layer, site by site where sites differ; empty for what chooses nothing."""
        return ["/".join(layer["chosen_by_site"].values()) if layer.get("chosen") == "mixed" else layer["chosen"]
                for layer in self.layers if "chosen" in layer]


@dataclass
class Line:
    """One row. best_of: of other rows, then it has no repeats of its own but theirs."""

    name: str
    repeats: list[Repeat] = field(default_factory=list)
    uniform: bool = False
    best_of: tuple[str, ...] = ()

    def sample(self, task: str) -> stats.Sample | None:
        """What the line scored, window by window or document by document; the mean over its repeats (so that the
        perplexity of several is exp of their mean NLL)."""
        found = [repeat.scores[task].sample for repeat in self._of(task) if task in repeat.scores]
        if not found or any(sample is None for sample in found):
            return None
        values = np.mean([sample.values for sample in found], axis=0)
        return stats.Sample(values, found[0].weights, found[0].kind)

    def value(self, task: str) -> float | None:
        found = self.values(task)
        sample = self.sample(task)
        return sample.score if sample is not None else float(np.mean(found)) if found else None

    def values(self, task: str) -> list[float]:
        """The score of each repeat."""
        return [repeat.scores[task].value for repeat in self._of(task) if task in repeat.scores]

    def spread(self, task: str) -> float | None:
        found = self.values(task)
        return float(np.std(found, ddof=1)) if len(found) > 1 else None

    def stderr(self, task: str) -> float | None:
        """Of an accuracy: lm-eval's, or for several repeats that of the mean over documents."""
        found = [repeat.scores[task] for repeat in self._of(task) if task in repeat.scores]
        if len(found) == 1:
            return found[0].stderr
        sample = self.sample(task)
        return None if sample is None else stats.standard_error(sample.values)

    def _of(self, task: str) -> list[Repeat]:
        """The repeats; of a line that is the best of others, the best one on this task, in hindsight."""
        known = [repeat for repeat in self.repeats if task in repeat.scores]
        if not self.best_of or not known:
            return self.repeats
        sign = -1 if known[0].scores[task].record.result["kind"] == "mean" else 1
        return [min(known, key=lambda repeat: sign * repeat.scores[task].value)]

    @property
    def bits(self) -> float | None:
        found = [repeat.quantization.result["bits"] for repeat in self.repeats if repeat.quantization]
        return float(np.mean(found)) if found else None

    def numbers(self, key: str) -> list[float]:
        """A number of the quantization ("seconds", "peak_memory_mib") of every repeat that was really run."""
        return [repeat.quantization.result[key] for repeat in self.repeats
                if repeat.quantization and repeat.quantization.result.get(key) is not None]


@dataclass
class Sheet:
    """One experiment on one model at one scheme. full: the full-precision model; against: the line the others are
    compared with; tasks: perplexities first; regrets: the perplexity of the best assignment, where all were tried."""

    model: str
    scheme: str
    lines: list[Line]
    tasks: list[str]
    kinds: dict[str, str]
    full: Line
    against: str = ""
    limit: int | None = None
    best_assignment: float | None = None

    def line(self, name: str) -> Line | None:
        return next((line for line in self.lines if line.name == name), None)

    @property
    def reference(self) -> Line:
        return (self.against and self.line(self.against)) or self.full

    def of_kind(self, kind: str) -> list[str]:
        return [task for task in self.tasks if self.kinds[task] == kind]

    def difference(self, line: Line, task: str, to: Line | None = None) -> stats.Interval | None:
        """line - reference, paired; None where one was not measured."""
        a, b = line.sample(task), (to or self.reference).sample(task)
        if a is None or b is None or line is (to or self.reference):
            return None
        return stats.difference(a, b)

    def best(self, task: str) -> str | None:
        """The name of the line that is best and better than the second by the paired test; full precision and lines
        that are made of others do not compete, and equal models count as one."""
        sign = 1 if self.kinds[task] == "perplexity" else -1
        scored: list[tuple[float, str, stats.Sample]] = []
        for line in self.lines:
            sample = line.sample(task)
            if sample is None or line.best_of or line.name == self.full.name:
                continue
            if any(sample == other for _, _, other in scored):
                continue
            scored.append((sign * sample.score, line.name, sample))
        if len(scored) < 2:
            return None
        (_, name, first), (_, _, second) = sorted(scored, key=lambda one: one[0])[:2]
        return name if stats.better(first, second) else None

    def recovered(self, line: Line, task: str) -> float | None:
        """(best uniform - line) / (best uniform - full precision): 1 closes the gap, below 0 widens it."""
        uniform = [other.value(task) for other in self.lines if other.uniform and other.value(task) is not None]
        full, own = self.full.value(task), line.value(task)
        if not uniform or full is None or own is None or min(uniform) <= full:
            return None
        return (min(uniform) - own) / (min(uniform) - full)


@dataclass
class Study:
    """The record of a study of one model."""

    model: str
    record: Record

    @property
    def result(self) -> Mapping[str, Any]:
        return self.record.result
