"""Tables of experiments: Markdown, CSV and LaTeX, one set of files per experiment, from sheets of records. No torch.

    results/ablations/<experiment>.md .csv .tex

A sheet of an experiment is a table of its own in the Markdown; the CSV has one row per (model, scheme, row, task), with
every number unrounded; the LaTeX table is the summary of all models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from suite import stats
from suite.report import data, tables
from suite.report.sheets import Line, Sheet

STAR = "*"

NOTES = (
    f"PPL: window perplexity, its {stats.LEVEL:.0%} bootstrap interval over windows in brackets (it is wide because "
    "texts differ, and common to all rows; differences are tested on the same windows). Accuracies in percent, ± "
    "standard error.",
    f"Δ: difference to the row named, paired over windows or documents, with its {stats.LEVEL:.0%} bootstrap interval; "
    f"{STAR} marks one that excludes 0. An accuracy is marked likewise.",
    "Bold: best of the quantized rows, and only where it is better than the second by the same paired test; rows that "
    "are the same model count once.",
)


# ---------------------------------------------------------------------------------------------- one sheet


def cells(sheet: Sheet, columns: Sequence[str], intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of one sheet, as Markdown."""
    winners = {task: sheet.best(task) for task in sheet.tasks}
    accuracies = sheet.of_kind("mean")
    repeated = any(len(line.repeats) > 1 and not line.best_of for line in sheet.lines)
    to = sheet.reference.name
    headings = ["", "bits"] + (["runs"] if repeated else [])
    for task in sheet.of_kind("perplexity"):
        headings += [f"{data.heading(task)} PPL", f"Δ {to}"]
    headings += [f"{data.heading(task)} %" for task in accuracies]
    headings += ["mean %", f"Δ {to}"] if accuracies else []
    extra = [column for column in columns if _has(sheet, column)]
    for column in extra:
        headings += _HEADINGS[column](sheet)
    rows = []
    for line in sheet.lines:
        row = [line.name, "" if line.bits is None else f"{line.bits:.3f}"]
        row += [str(len(line.repeats)) if not line.best_of else ""] if repeated else []
        for task in sheet.of_kind("perplexity"):
            row += [_bold(_perplexity(line, task, intervals), winners[task] == line.name),
                    difference(sheet.difference(line, task), intervals)]
        for task in accuracies:
            row.append(_bold(_accuracy(sheet, line, task), winners[task] == line.name))
        if accuracies:
            row += _mean(sheet, line, accuracies, intervals)
        for column in extra:
            row += _VALUES[column](sheet, line)
        rows.append(row)
    return headings, rows


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best and text else text  # the row compared with has no difference to show


def _perplexity(line: Line, task: str, intervals: bool) -> str:
    value, sample = line.value(task), line.sample(task)
    if value is None:
        return tables.NOT_RUN
    if not intervals or sample is None:
        return f"{value:.3f}"
    found = stats.interval(sample)
    return f"{value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if found.low == found.low else "")


def difference(found: stats.Interval | None, intervals: bool, digits: int = 4, scale: float = 1) -> str:
    if found is None:
        return ""
    star = STAR if found.excludes_zero else ""
    value, low, high = (scale * number for number in (found.value, found.low, found.high))
    bounds = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if intervals and low == low else ""
    return f"{value:+.{digits}f}{star}{bounds}"


def _accuracy(sheet: Sheet, line: Line, task: str) -> str:
    value, error = line.value(task), line.stderr(task)
    if value is None:
        return tables.NOT_RUN
    found = sheet.difference(line, task)
    return (f"{100 * value:.1f}" + (STAR if found is not None and found.excludes_zero else "")
            + (f" ± {100 * error:.1f}" if error is not None else ""))


def _mean(sheet: Sheet, line: Line, tasks: Sequence[str], intervals: bool) -> list[str]:
    values = [line.value(task) for task in tasks]
    if None in values:
        return [tables.NOT_RUN, ""]
    found = None if line is sheet.reference else mean_difference(sheet, line, tasks)
    return [f"{100 * float(np.mean(values)):.1f}", difference(found, intervals, 1, 100)]


def mean_difference(sheet: Sheet, line: Line, tasks: Sequence[str]) -> stats.Interval | None:
    """Mean accuracy of a line minus that of the reference, paired."""
    pairs = [(line.sample(task), sheet.reference.sample(task)) for task in tasks]
    if line is sheet.reference or any(a is None or b is None for a, b in pairs):
        return None
    return stats.mean_difference(pairs)


# ---------------------------------------------------------------------------------------------- further columns


def _has(sheet: Sheet, column: str) -> bool:
    return column != "regret" or sheet.best_assignment is not None


def _first(sheet: Sheet) -> str:
    return sheet.of_kind("perplexity")[0]


def _recovered(sheet: Sheet, line: Line) -> list[str]:
    found = [sheet.recovered(line, task) for task in sheet.of_kind("perplexity")]
    return ["" if share is None or line.uniform or line.name == sheet.full.name else f"{100 * share:+.0f}"
            for share in found]


def choice_counts(line: Line) -> str:
    """How often each method was chosen, over all layers (and sites) and repeats: "gptq 3, awq 1"."""
    found = Counter(name for repeat in line.repeats for choice in repeat.choices for name in choice.split("/"))
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda one: (-one[1], one[0])))


def changed(sheet: Sheet, line: Line) -> float | None:
    """Layers whose choice differs from the reference row's, the mean over repeats."""
    base = sheet.reference.repeats[0].choices if sheet.reference.repeats else []
    found = [sum(a != b for a, b in zip(base, repeat.choices, strict=True)) for repeat in line.repeats
             if len(repeat.choices) == len(base)]
    return float(np.mean(found)) if found and base else None


def _spread(sheet: Sheet, line: Line) -> list[str]:
    return ["" if line.best_of or line.spread(task) is None else f"{line.spread(task):.4f}"
            for task in sheet.of_kind("perplexity")]


def _regret(sheet: Sheet, line: Line) -> list[str]:
    value = line.value(_first(sheet))
    return ["" if value is None else f"{value - sheet.best_assignment:+.4f}"]


def _number(key: str, digits: int) -> Callable[[Sheet, Line], list[str]]:
    def found(sheet: Sheet, line: Line) -> list[str]:
        values = line.numbers(key)
        return [f"{np.mean(values):.{digits}f}" if values and not line.best_of else ""]
    return found


def _changed(sheet: Sheet, line: Line) -> list[str]:
    found = changed(sheet, line)
    return ["" if found is None else f"{found:g}"]


def _short_heads(name: str) -> Callable[[Sheet], list[str]]:
    def headings(sheet: Sheet) -> list[str]:
        tasks = sheet.of_kind("perplexity")
        return [f"{name}, {data.heading(task)}" if len(tasks) > 1 else name for task in tasks]
    return headings


_HEADINGS: dict[str, Callable[[Sheet], list[str]]] = {
    "recovered": _short_heads("recovered %"), "choices": lambda sheet: ["chosen"],
    "changed": lambda sheet: ["layers changed"], "spread": _short_heads("sd over runs"),
    "regret": lambda sheet: [f"regret, {data.heading(_first(sheet))}"], "seconds": lambda sheet: ["seconds"],
    "memory": lambda sheet: ["MiB"],
}
_VALUES: dict[str, Callable[[Sheet, Line], list[str]]] = {
    "recovered": _recovered, "choices": lambda sheet, line: [choice_counts(line)], "changed": _changed,
    "spread": _spread, "regret": _regret, "seconds": _number("seconds", 1), "memory": _number("peak_memory_mib", 0),
}


# ---------------------------------------------------------------------------------------------- all sheets


def number(experiment: Any) -> str:
    return f"Table {experiment.table}. " if experiment.table else ""


def _limited(sheets: Sequence[Sheet]) -> str:
    limit = sheets[0].limit if sheets else None
    return (f"\n**LIMITED to the first {limit} documents or windows of each task: a quick look, not for citing.** With --fast, "
            f"calibration has a quarter of the sequences that a row names.\n" if limit else "")


def markdown(experiment: Any, sheets: Sequence[Sheet], pictures: Sequence[str] = (), extra: str = "") -> str:
    """The page of an experiment: what is varied, a summary over models, a table per model and scheme, the figures."""
    parts = [f"# {number(experiment)}{experiment.title}\n\n{' '.join(experiment.says.split())}\n{_limited(sheets)}"]
    if len(sheets) > 1:
        parts.append(f"## Summary: Δ {sheets[0].reference.name}\n\n{_table(*summary(sheets))}\n")
    for sheet in sheets:
        table = _table(*cells(sheet, experiment.columns))
        parts.append(f"## {data.title_of(sheet.model)}, {sheet.scheme}\n\n{table}\n")
    parts += [extra] if extra else []
    parts += ["\n".join(f"![{picture}]({picture})\n" for picture in pictures)] if pictures else []
    notes = [*NOTES, *_calibrations(sheets), *_column_notes(experiment, sheets)]
    parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def _calibrations(sheets: Sequence[Sheet]) -> list[str]:
    """One note: on how many tokens each model was calibrated; where rows of a sheet differ, their names say it."""
    found = []
    for sheet in sheets:
        records = [repeat.quantization for line in sheet.lines for repeat in line.repeats if repeat.quantization]
        sizes = {f"{c['nsamples']} x {c['seqlen']}" for record in records if (c := record.identity.get("calibration"))}
        if sizes:
            found.append((sizes.pop() if len(sizes) == 1 else "as the rows say", sheet.model))
    told = "; ".join(f"{size} ({models})" for size, models in models_by(found).items())
    return [f"Calibration tokens: {told}."] if found else []


def models_by(sizes: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The models that share a size, in words, from pairs of size and model.

    >>> models_by([("64 x 512", "a"), ("16 x 512", "b"), ("64 x 512", "c")])
    {'64 x 512': 'a, c', '16 x 512': 'b'}
    """
    models: dict[str, dict[str, None]] = {}
    for size, model in sizes:
        models.setdefault(size, {})[data.title_of(model)] = None
    return {size: ", ".join(names) for size, names in models.items()}


def _column_notes(experiment: Any, sheets: Sequence[Sheet]) -> list[str]:
    told = []
    if "recovered" in experiment.columns:
        names = dict.fromkeys(line.name for sheet in sheets for line in sheet.lines if line.uniform)
        told.append(f"Recovered: (best of {', '.join(names)}) - (row), over (best of them) - (full precision), in "
                    f"percent: the best is picked in hindsight on the corpus itself.")
    if any(line.best_of for sheet in sheets for line in sheet.lines):
        told.append("In hindsight: picked by the very numbers that the table shows, so better than any honest choice.")
    followed = {line.name for sheet in sheets for line in sheet.lines for repeat in line.repeats
                if repeat.quantization and repeat.quantization.result.get("follows_from")}
    if followed:
        told.append(f"Not run but concluded from a wider search, whose scores show that this one chooses the same, "
                    f"for at least one model: {', '.join(sorted(followed))}.")
    if "seconds" in experiment.columns:
        told.append("Seconds: of the quantization, by the wall clock, with whatever ran beside it; `cost` compares processor "
                    "seconds.")
    if experiment.note:
        told.append(" ".join(experiment.note.split()))
    return told


def summary(sheets: Sequence[Sheet]) -> tuple[list[str], list[list[str]]]:
    """Rows x (model, scheme, corpus): the difference to the reference; or the mean accuracy where that is asked."""
    several = len({sheet.scheme for sheet in sheets}) > 1
    columns = []
    names = dict.fromkeys(line.name for sheet in sheets for line in sheet.lines)
    for sheet in sheets:
        where = f"{data.title_of(sheet.model)}{' ' + sheet.scheme.split(' ')[0] if several else ''}"
        accuracies = sheet.of_kind("mean")
        if accuracies:
            columns.append((f"{where} mean %", lambda line, sheet=sheet, tasks=accuracies: difference(
                mean_difference(sheet, line, tasks), False, 1, 100)))
            continue
        for task in sheet.of_kind("perplexity"):
            columns.append((f"{where} {data.heading(task)}", lambda line, sheet=sheet, task=task: _bold(
                difference(sheet.difference(line, task), False), sheet.best(task) == line.name)))
    by_sheet = [sheet for sheet in sheets for _ in ([1] if sheet.of_kind("mean") else sheet.of_kind("perplexity"))]
    rows = []
    for name in names:
        row = [name]
        for (_, value), sheet in zip(columns, by_sheet, strict=True):
            line = sheet.line(name)
            row.append("" if line is None else value(line))
        rows.append(row)
    return ["", *(heading for heading, _ in columns)], rows


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["left" if heading in ("", "chosen") else "right" for heading in headings]
    return tabulate(rows, headings, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def frame(experiment: Any, sheets: Sequence[Sheet]) -> pd.DataFrame:
    """Every number: one row per (model, scheme, row, task)."""
    rows = []
    for sheet in sheets:
        for line in sheet.lines:
            for task in sheet.tasks:
                value, sample = line.value(task), line.sample(task)
                own = stats.interval(sample) if sample is not None else None
                found = sheet.difference(line, task)
                perplexity = sheet.kinds[task] == "perplexity"
                rows.append({
                    "model": sheet.model, "scheme": sheet.scheme, "row": line.name, "task": task, "value": value,
                    "low": own and own.low, "high": own and own.high,
                    "stderr": None if perplexity else line.stderr(task),
                    "runs": len(line.values(task)), "sd_over_runs": line.spread(task), "against": sheet.reference.name,
                    "difference": found and found.value, "difference_low": found and found.low,
                    "difference_high": found and found.high, "significant": found and found.excludes_zero,
                    "recovered": sheet.recovered(line, task) if perplexity else None, "effective_bits": line.bits,
                    "chosen": choice_counts(line), "seconds": next(iter(line.numbers("seconds")), None)})
    return pd.DataFrame(rows)


def latex(experiment: Any, sheets: Sequence[Sheet]) -> str:
    headings, rows = summary(sheets) if len(sheets) > 1 else cells(sheets[0], experiment.columns, intervals=False)
    return latex_table(headings, rows, f"{experiment.title}. Difference to {sheets[0].reference.name}. "
                       f"{' '.join(experiment.says.split())} {NOTES[1]} {NOTES[2]}", experiment.name)


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str) -> str:
    """A table float for booktabs; cells in ** are bold."""
    def cell(text: str) -> str:
        return rf"\textbf{{{tables.tex(text[2:-2])}}}" if text.startswith("**") else tables.tex(text)
    lines = [r"\begin{table}", r"\centering", r"\small", rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
             r"\toprule", " & ".join(map(tables.tex, headings)) + r" \\", r"\midrule",
             *(" & ".join(map(cell, row)) + r" \\" for row in rows), r"\bottomrule", r"\end{tabular}",
             rf"\caption{{{tables.tex(caption)}}}", rf"\label{{tab:ablation-{label}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def files(experiment: Any, sheets: Sequence[Sheet], pictures: Mapping[str, bytes], extra: str = "") -> dict[str, bytes]:
    """{file name: content} of an experiment, its pictures too."""
    shown = [name for name in pictures if name.endswith(".png")]
    return {f"{experiment.name}.md": markdown(experiment, sheets, shown, extra).encode(),
            f"{experiment.name}.csv": frame(experiment, sheets).to_csv(
                index=False, float_format="%.7g", lineterminator="\n").encode(),
            f"{experiment.name}.tex": latex(experiment, sheets).encode(), **pictures}
