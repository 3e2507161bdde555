"""Tables and plots, from the records of `results/` alone: no torch, no model.

    results/<model>/<setting>.md, .csv, .tex             the table
    results/<model>/<setting>-choices.png, .svg          which method each layer chose, with the margins
    results/<model>/<setting>-candidates.png, .svg       1 - CKA of every candidate in every layer
    results/<model>/<setting>-error-growth.png, .svg     1 - CKA by depth, all methods
    results/<model>/<setting>-severity.png, .svg         perplexity against the severity of planted outliers

The same records give the same bytes, so committed files change only when numbers do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from suite.report import data, plots, tables
from suite.store import Setting, Store, write_bytes

__all__ = ["severity_figure", "terminal_table", "write", "write_all"]


def write(store: Store, setting: Setting, methods: Iterable[str] = (), tasks: Iterable[str] = ()) -> list[Path]:
    """Writes the table and the plots of one setting; returns the paths, the Markdown table first.

    methods, tasks: what was asked for; what has no record of it shows as "not run".

    >>> write(Store("results"), outcome.setting)  # doctest: +SKIP
    """
    comparison = data.compare(store, setting, methods, tasks)
    stem = setting.stem
    content = {f"{stem}.md": tables.markdown(comparison).encode(), f"{stem}.csv": tables.csv(comparison).encode(),
               f"{stem}.tex": tables.latex(comparison).encode()}
    for row in comparison.rows:
        if row.is_hybrid:
            name = stem if row.label == data.HYBRID else f"{stem}-{_slug(row.label)}"
            content |= plots.files(plots.choices(comparison, row), f"{name}-choices")
            if any(layer.get("candidates") for layer in row.layers):  # none were scored for choices that were given
                content |= plots.files(plots.candidates(comparison, row), f"{name}-candidates")
    growth = plots.error_growth(comparison)
    if growth is not None:
        content |= plots.files(growth, f"{stem}-error-growth")
    return _write(store, setting, content)


def write_all(store: Store, model: str) -> list[Path]:
    """Writes the tables and plots of every setting that a model was measured in."""
    return [path for setting in data.settings(store, model) for path in write(store, setting)]


def severity_figure(store: Store, setting: Setting, task: str = "world_wiki_ppl",
                    methods: Iterable[str] = ()) -> list[Path]:
    """Draws perplexity against the severity of planted outliers; returns the paths, none if fewer than two severities
    have records.

    setting: that of the plain model; the planted ones are those of its name in the store, at the same setting.
    methods: which variants, all by default.
    """
    base, wanted = data.planted(setting.model["name"])[0], set(methods)
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    full = float("nan")
    for model in store.models():
        name, severity, _ = data.planted(model)
        if name != base:
            continue
        record = max(store.records(model=model), key=lambda r: r.provenance.get("date", ""))
        comparison = data.compare(store, replace(setting, model=record.identity["model"]))
        for row in comparison.rows:
            added = tables.delta(comparison, row, task)
            if row.label == data.FULL and task in row.scores:
                full = row.scores[task].value
            elif added is not None and (not wanted or row.label in wanted):
                bounds = (added.low, added.high) if added.low == added.low else (added.value, added.value)
                points.setdefault(row.label, []).append((severity or 1.0, added.value, *bounds))
    points = {label: found for label, found in points.items() if len({severity for severity, *_ in found}) > 1}
    if not points:
        return []
    figure = plots.severity(base, task, points, setting.scheme, full)
    plain = replace(setting, model={**setting.model, "name": base})
    return _write(store, plain, plots.files(figure, f"{setting.stem}-severity"))


def terminal_table(store: Store, setting: Setting, paths: Iterable[Path] = (), methods: Iterable[str] = (),
                   tasks: Iterable[str] = ()) -> str:
    """The table as printed at the end of a run, with the paths of the files."""
    lines = "".join(f"  {path}\n" for path in paths)
    return tables.terminal(data.compare(store, setting, methods, tasks)) + (f"\n{lines}" if lines else "")


def _write(store: Store, setting: Setting, content: dict[str, bytes]) -> list[Path]:
    folder = store.folder(setting.model["name"])
    for name, text in content.items():
        write_bytes(folder / name, text)
    return [folder / name for name in content]


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "+-" else "-" for c in label)
