"""Writes what experiments came to: one page with tables and figures per experiment, below results/ablations/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from suite.ablate.plan import Experiment
from suite.ablate.run import SHELF, Ablated
from suite.report import ablations, data, figures, paper, plots, studies
from suite.report.sheets import Sheet
from suite.store import Store, write_bytes


def write(done: Ablated, experiments: Sequence[Experiment], root: Path | str) -> list[Path]:
    """Writes all pages; returns their paths, Markdown first.

    Runs of limited documents go to a folder of their own, and so do those of planted models only: they say nothing of
    any real one.
    """
    planted = "-planted" if all(data.planted(model)[1] is not None for model in done.models) else ""
    folder = Path(root) / (f"{SHELF}{planted}" + ("" if done.limit is None else f"-limit{done.limit}"))
    found = content(done, experiments, root)
    for name, text in found.items():
        write_bytes(folder / name, text)
    return [folder / name for name in sorted(found, key=lambda name: (not name.endswith(".md"), name))]


def content(done: Ablated, experiments: Sequence[Experiment], root: Path | str,
            drawn: Callable[..., dict[str, bytes]] = plots.files) -> dict[str, bytes]:
    """{file name: content} of all pages. drawn: (figure, stem) -> its files."""
    found: dict[str, bytes] = {}
    choices = greedy(done)
    for experiment in experiments:
        pictures: dict[str, bytes] = {}
        for word in experiment.figures:
            for stem, figure in _FIGURES[word](done, experiment, choices).items():
                if figure is not None:
                    pictures |= drawn(figure, f"{experiment.name}-{stem}")
        if experiment.study and done.studies.get(experiment.name):
            found |= studies.files(experiment, done.studies[experiment.name], choices, done.sheets, pictures)
        elif done.sheets.get(experiment.name):
            found |= ablations.files(experiment, done.sheets[experiment.name], pictures)
    if done.sheets.get("perplexity"):
        found |= paper.files(Store(root), [sheet for name in ("perplexity", "low-bits") for sheet in
                                           done.sheets.get(name, ())])
    return found


def greedy(done: Ablated) -> dict[tuple[str, str], list[str]]:
    """(model, scheme) -> the choices of the hybrid as it is by default, in the order in which they were found. Of several
    calibrations the main table's counts, else the first."""
    found: dict[tuple[str, str], list[str]] = {}
    usual: dict[tuple[str, str], list[str]] = {}
    for sheet in (sheet for sheets in done.sheets.values() for sheet in sheets):
        for line in sheet.lines:
            for repeat in line.repeats[:1]:
                record, where = repeat.quantization, (sheet.model, sheet.scheme)
                if record is not None and record.result["label"] == data.HYBRID:
                    found.setdefault(where, repeat.choices)
                    if record.identity["calibration"] == done.main[sheet.model].calibration:
                        usual.setdefault(where, repeat.choices)
    return found | usual


def _stem(sheet: Sheet) -> str:
    return f"{_slug(sheet.model)}-{sheet.scheme.split(' ')[0]}"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in text)


def _of_sheets(draw: Callable, stem: str) -> Callable:
    return lambda done, experiment, choices: {stem: draw(done.sheets.get(experiment.name, ()))}


def _of_studies(draw: Callable, stem: str) -> Callable:
    return lambda done, experiment, choices: {stem: draw(done.studies.get(experiment.name, ()))}


def _depth(done: Ablated, experiment: Experiment, choices) -> dict:
    return {"by-depth": figures.choices_by_depth([(f"{model} {scheme.split(' ')[0]}", names)
                                                  for (model, scheme), names in sorted(choices.items())])}


def _candidates(done: Ablated, experiment: Experiment, choices) -> dict:
    """The heat map of the largest pool of each model."""
    found = {}
    for sheet in done.sheets.get(experiment.name, ()):
        widest = max(sheet.lines, key=lambda line: len((line.repeats[0].layers or [{}])[0].get("candidates", ())))
        found[f"{_stem(sheet)}-candidates"] = figures.candidates(sheet, widest.name)
    return found


def _growth(done: Ablated, experiment: Experiment, choices) -> dict:
    return {f"{_stem(sheet)}-error-growth": figures.error_growth(sheet)
            for sheet in done.sheets.get(experiment.name, ())}


def _pareto(done: Ablated, experiment: Experiment, choices) -> dict:
    return {"pareto": figures.pareto([sheet for name in ("perplexity", "low-bits", "low-bits-further", experiment.name)
                                      for sheet in done.sheets.get(name, ())])}


_FIGURES: dict[str, Callable] = {
    "choices_by_depth": _depth, "candidates": _candidates, "error_growth": _growth, "pareto": _pareto,
    "granularity": _of_sheets(figures.granularity, "units"), "sensitivity": _of_sheets(figures.sensitivity, "data"),
    "metrics": _of_sheets(figures.metrics, "dots"), "recovered": _of_sheets(figures.recovered, "dots"),
    "degradation": _of_studies(figures.degradation, "scatter"),
    "reconstruction": _of_studies(figures.reconstruction, "arrows"), "swaps": _of_studies(figures.swaps, "dots"),
    "cost": _of_studies(figures.cost, "line"),
    "statistics": lambda done, experiment, choices: {
        "layers": figures.statistics(done.studies.get(experiment.name, ()), choices)},
}
