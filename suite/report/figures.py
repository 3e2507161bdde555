"""Figures of the ablations, as PNG and SVG: readable without colour, the same bytes for the same records. No torch.

Each function returns a figure, or None where the records do not hold what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from suite.report import data, plots
from suite.report.ablations import changed
from suite.report.sheets import Line, Sheet, Study
from suite.report.studies import METRICS, WORDS, Choices, correlations, of_layer, per_candidate

_LINEAR = 1e-3  # rise in perplexity below which the scale is linear
_CORPORA = (("o", "black"), ("s", "white"), ("^", "#999999"))  # marker and filling of the first, second, ... corpus


def _panels(count: int, width: float, height: float, columns: int = 2, **options: Any) -> tuple[Figure, list]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plots._figure(width * columns, height * rows, rows, columns, squeeze=False, **options)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def _title(sheet: Sheet) -> str:
    limit = f", first {sheet.limit}" if sheet.limit is not None else ""
    return f"{_short(sheet.model)}, {sheet.scheme}{limit}"


def _short(model: str) -> str:
    base, severity, _ = data.planted(model)
    return base if severity is None else f"{base}, PLANTED outliers {severity:g}"


def _patches(names: Sequence[str], counts: Mapping[str, int] | None = None) -> list[Patch]:
    return [Patch(facecolor=plots.style(name)[0], hatch=plots.style(name)[3], edgecolor="black",
                  label=name + (f" ({counts[name]})" if counts else "")) for name in names]


def _ordered(names: Sequence[str]) -> list[str]:
    known = list(plots._STYLES)
    return sorted(dict.fromkeys(names), key=lambda name: (known.index(name) if name in known else len(known), name))


# ---------------------------------------------------------------------------------------------- choices


def choices_by_depth(rows: Sequence[tuple[str, Sequence[str]]]) -> Figure | None:
    """The hybrid's choices of several models, one strip each, stretched to the same depth. rows: (name, choices)."""
    rows = [(name, choices) for name, choices in rows if choices]
    if not rows:
        return None
    figure, axes = plots._figure(7.4, 1.3 + 0.42 * len(rows))
    with matplotlib.rc_context(plots._RC):
        for y, (_, choices) in enumerate(reversed(rows)):
            for i, method in enumerate(choices):
                colour, _, _, hatch = plots.style(method)
                axes.add_patch(Rectangle((i / len(choices), y + 0.1), 1 / len(choices), 0.8, facecolor=colour,
                                         edgecolor="black", hatch=hatch, linewidth=0.8))
        axes.set(xlim=(0, 1), ylim=(0, len(rows)), xlabel="depth (0: first decoder layer, 1: last)")
        axes.set_yticks([y + 0.5 for y in range(len(rows))], [name for name, _ in reversed(rows)])
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
        axes.set_title("method chosen by the CKA hybrid, by depth")
        figure.legend(handles=_patches(_ordered([m for _, choices in rows for m in choices])), ncols=4,
                      loc="outside lower center", handlelength=2.4, handleheight=1.4)
    return figure


def _adapted(sheet: Sheet, lines: Sequence[Line]) -> SimpleNamespace:
    """A sheet as the figures of the main table take it."""
    rows = [data.Row(line.name, line.repeats[0].quantization) for line in lines if line.repeats]
    return SimpleNamespace(title=data.title_of(sheet.model), rows=rows,
                           setting=SimpleNamespace(limit=sheet.limit, scheme=sheet.scheme))


def candidates(sheet: Sheet, name: str) -> Figure | None:
    """1 - CKA of every candidate in every layer of one line, the choice framed."""
    line = sheet.line(name)
    if line is None or not any(layer.get("candidates") for layer in line.repeats[0].layers):
        return None
    figure = plots.candidates(_adapted(sheet, [line]), data.Row(name, line.repeats[0].quantization))
    figure.axes[0].set_title(f"{_title(sheet)}\n1 − CKA of each candidate; framed: the choice of “{name}”", fontsize=9)
    return figure


def error_growth(sheet: Sheet) -> Figure | None:
    return plots.error_growth(_adapted(sheet, [line for line in sheet.lines if line.name != data.FULL]))


# ---------------------------------------------------------------------------------------------- dots


def dots(sheets: Sequence[Sheet], value: Callable[[Sheet, Line, str], tuple[float, float, float] | None], label: str,
         title: str, columns: int = 2) -> Figure | None:
    """One panel per sheet, one row per line, one mark per corpus, with an interval where there is one. Panels side by side
    have the same lines; those that neither has are left out."""
    if not sheets:
        return None
    every = [name for name in dict.fromkeys(line.name for sheet in sheets for line in sheet.lines) if name != data.FULL]
    beside = [sheets[k:k + columns] for k in range(0, len(sheets), columns)]
    names = [[name for name in every if any(sheet.line(name) for sheet in row)] for row in beside]
    heights = [1.0 + 0.3 * len(shown) for shown in names]
    figure, axes = _panels(len(sheets), 5.4, sum(heights) / len(heights), columns, sharey="row",
                           gridspec_kw={"height_ratios": heights})
    with matplotlib.rc_context(plots._RC):
        for k, (panel, sheet) in enumerate(zip(axes, sheets, strict=True)):
            tasks, shown = sheet.of_kind("perplexity"), names[k // columns]
            for t, task in enumerate(tasks):
                marker, fill = _CORPORA[t % len(_CORPORA)]
                for y, name in enumerate(reversed(shown)):
                    line = sheet.line(name)
                    found = value(sheet, line, task) if line is not None else None
                    if found is None:
                        continue
                    middle, low, high = found
                    at = y + (0.17 if t == 0 else -0.17) * (len(tasks) > 1)
                    if low == low and high > low:
                        panel.plot([low, high], [at, at], color="black", linewidth=0.9, zorder=1)
                    panel.plot([middle], [at], marker, color="black", markerfacecolor=fill, markersize=5, zorder=2)
            panel.set_yticks(range(len(shown)), list(reversed(shown)))
            panel.set_ylim(-0.6, len(shown) - 0.4)
            panel.grid(axis="y", linewidth=0.3, color="#cccccc")
            panel.xaxis.set_major_locator(MaxNLocator(6))
            panel.set_title(_title(sheet), fontsize=9)
            panel.set_xlabel(label, fontsize=8)
        tasks = sheets[0].of_kind("perplexity")
        handles = [Line2D([], [], linestyle="", marker=_CORPORA[t % 3][0], color="black",
                          markerfacecolor=_CORPORA[t % 3][1], label=data.heading(task)) for t, task in enumerate(tasks)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figure.suptitle(title, fontsize=10)
    return figure


def above_full(sheet: Sheet, line: Line, task: str) -> tuple[float, float, float] | None:
    """Perplexity above full precision, with its paired interval."""
    found = sheet.difference(line, task, sheet.full)
    return None if found is None else (found.value, found.low, found.high)


def metrics(sheets: Sequence[Sheet]) -> Figure | None:
    return dots(sheets, above_full, "perplexity above full precision", "what the choice goes by, and controls")


def recovered(sheets: Sequence[Sheet]) -> Figure | None:
    """Perplexity above full precision of every search; how much of the gap that recovers stands in the table."""
    return dots(sheets, above_full, "perplexity above full precision", "uniform methods and searches")


# ---------------------------------------------------------------------------------------------- lines


def granularity(sheets: Sequence[Sheet]) -> Figure | None:
    """Perplexity against the size of the unit that shares a choice."""
    if not sheets:
        return None
    figure, axes = _panels(len(sheets), 4.2, 2.9)
    with matplotlib.rc_context(plots._RC):
        for panel, sheet in zip(axes, sheets, strict=True):
            names = [line.name for line in sheet.lines]
            for t, task in enumerate(sheet.of_kind("perplexity")):
                marker, fill = _CORPORA[t]
                found = [above_full(sheet, line, task) for line in sheet.lines]
                known = [(x + 0.08 * (t - 0.5), *one) for x, one in enumerate(found) if one is not None]
                if not known:
                    continue
                x, y, low, high = (np.array(column, float) for column in zip(*known, strict=True))
                panel.errorbar(x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], color="black", marker=marker,
                               markerfacecolor=fill, linestyle="-" if t == 0 else (0, (4, 2)), linewidth=1, capsize=2,
                               markersize=5, label=data.heading(task))
            panel.set_xticks(range(len(names)), [name.replace("block of ", "") for name in names], fontsize=8)
            panel.set_xlabel("layers that share a choice", fontsize=8)
            panel.set_ylabel("PPL above full precision", fontsize=8)
            panel.set_title(_title(sheet), fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def sensitivity(sheets: Sequence[Sheet]) -> Figure | None:
    """Perplexity by calibration seed and by number of sequences."""
    if not sheets:
        return None
    figure, axes = _panels(len(sheets), 4.6, 2.9)
    with matplotlib.rc_context(plots._RC):
        for panel, sheet in zip(axes, sheets, strict=True):
            task, ticks = sheet.of_kind("perplexity")[0], []
            for x, line in enumerate(sheet.lines):
                values = line.values(task)
                hollow = "gptq" in line.name
                panel.plot([x] * len(values), values, "s" if hollow else "o", color="black", linestyle="",
                           markerfacecolor="white" if hollow else "#56B4E9", markersize=5)
                if len(values) > 1:
                    panel.plot([x - 0.25, x + 0.25], [np.mean(values)] * 2, color="black", linewidth=1.4)
                moved = changed(sheet, line)
                ticks.append(line.name.replace(", ", "\n").replace(" sequences", " seq.")
                             + ("" if moved is None or x == 0 else f"\n{moved:g} changed"))
            panel.set_xticks(range(len(ticks)), ticks, fontsize=6.5)
            panel.set_xlim(-0.6, len(ticks) - 0.4)
            panel.set_ylabel(f"{data.heading(task)} perplexity", fontsize=8)
            panel.set_title(_title(sheet), fontsize=9)
            panel.ticklabel_format(axis="y", useOffset=False)
    return figure


def pareto(sheets: Sequence[Sheet]) -> Figure | None:
    """Perplexity above full precision against effective bits, both of 8-bit activations, one panel per model; a line joins
    a method's bits. On a logarithmic axis, where 4 bits would otherwise be one spot."""
    points: dict[str, dict[str, dict[float, float]]] = {}
    task = ""
    for sheet in sheets:
        if "A8" not in sheet.scheme:
            continue
        task = sheet.of_kind("perplexity")[0]
        full = sheet.full.value(task)
        for line in sheet.lines:
            name = _family(line.name)
            value = line.value(task)
            known = full is not None and value is not None and line.bits is not None
            if name is not None and known and line.bits < 16 and value > full:
                points.setdefault(sheet.model, {}).setdefault(name, {})[round(line.bits, 3)] = value - full
    points = {model: found for model, found in points.items()
              if len({bits for line in found.values() for bits in line}) > 1}
    if not points:
        return None
    figure, axes = _panels(len(points), 4.4, 3.2)
    with matplotlib.rc_context(plots._RC):
        for panel, (model, lines) in zip(axes, points.items(), strict=True):
            for name in _ordered(list(lines)):
                plots._line(panel, name, sorted(lines[name].items()))
            panel.set_yscale("log")
            panel.set(xlabel="effective bits per weight")
            panel.set_ylabel(f"{data.heading(task)} perplexity above full precision", fontsize=8)
            panel.set_title(_short(model), fontsize=9)
        shown = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels())}
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, handlelength=3.4)
    return figure


def _family(name: str) -> str | None:
    """The method that a row stands for in the figure of bits, None for rows that are none."""
    if name.startswith("mp-gptq"):
        return "mp-gptq"
    same = {"hybrid of methods": data.HYBRID, "gptq at 4 bits": "gptq"}
    return same.get(name, name if name in plots._STYLES else None)


def _few_ticks(panel, values: Sequence[float]) -> None:
    """Ticks with plain numbers on a log axis, also where the values span much less than a decade."""
    low, high = min(values), max(values)
    if high / low < 2.5:
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    else:
        ticks = LogLocator(subs=(1, 2, 5)).tick_values(low, high)
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.minorticks_off()
    span = math.log(high / low) * 0.06
    panel.set_ylim(low * math.exp(-span), high * math.exp(span))


# ---------------------------------------------------------------------------------------------- studies


def degradation(studies: Sequence[Study]) -> Figure | None:
    """Rise of perplexity against each metric of the damaged layer: a row of panels per model."""
    if not studies:
        return None
    figure, axes = plots._figure(11.2, 0.6 + 2.3 * len(studies), len(studies), len(METRICS), squeeze=False, sharey="row")
    with matplotlib.rc_context(plots._RC):
        for row, study in zip(axes, studies, strict=True):
            full, found = study.result["full"]["perplexity"], correlations(study)
            layers = 1 + max(point["layer"] for point in study.result["points"])
            for panel, metric in zip(row, METRICS, strict=True):
                for kind, marker in (("bits", "o"), ("noise", "^")):
                    points = [p for p in study.result["points"] if p["kind"] == kind]
                    if points:
                        panel.scatter([p["own"][metric] for p in points], [p["perplexity"] - full for p in points],
                                      c=[p["layer"] for p in points], cmap="Greys", vmin=-0.4 * layers, vmax=layers - 1,
                                      marker=marker, s=24, edgecolors="black", linewidths=0.6)
                if metric != "sqnr":
                    panel.set_xscale("log")
                rho = found["own", metric, "perplexity"]
                panel.set_title(f"ρ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]", fontsize=8)
                panel.set_xlabel(f"{WORDS[metric]} of the layer" + (", dB" if metric == "sqnr" else ""), fontsize=8)
            rises = [p["perplexity"] - full for p in study.result["points"]]
            row[0].set_yscale("symlog", linthresh=_LINEAR)  # shared; a little damage may lower perplexity
            row[0].set_ylim(min(0, *rises) - 0.2 * _LINEAR, 1.5 * max(rises))
            ticks = [0, *(10.0**k for k in range(-3, 4) if 10.0**k <= 1.5 * max(rises))]
            row[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            row[0].set_ylabel(f"{_short(study.model)}\nrise in perplexity", fontsize=8)
        handles = [Line2D([], [], linestyle="", marker=marker, color="black", markerfacecolor="#bbbbbb", label=label)
                   for marker, label in (("o", "rounded to fewer bits"), ("^", "noise added"))]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, title="the darker, the later the layer")
    return figure


def reconstruction(studies: Sequence[Study]) -> Figure | None:
    """Before and after the linear map: an arrow per layer, in the plane of 1 - CKA and perplexity."""
    if not studies:
        return None
    figure, axes = _panels(len(studies), 4.4, 3.3)
    with matplotlib.rc_context(plots._RC):
        for panel, study in zip(axes, studies, strict=True):
            bits = list(dict.fromkeys(row["bits"] for row in study.result["rows"]))
            values = []
            for row in study.result["rows"]:
                if row["layer"] is None:
                    continue
                a, b = row["before"], row["after"]
                marker = "o" if row["bits"] == bits[0] else "s"
                panel.annotate("", (b["cka"], b["perplexity"]), (a["cka"], a["perplexity"]),
                               arrowprops={"arrowstyle": "->", "linewidth": 0.8, "color": "#555555"})
                panel.plot(a["cka"], a["perplexity"], marker, color="black", markersize=5)
                panel.plot(b["cka"], b["perplexity"], marker, color="black", markerfacecolor="white", markersize=5)
                values += [a["perplexity"], b["perplexity"]]
            panel.axhline(study.result["full"]["perplexity"], color="black", linewidth=0.8, linestyle=(0, (1, 1)))
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_yscale("log")
            _few_ticks(panel, [*values, study.result["full"]["perplexity"]])
            panel.set(xlabel="1 − CKA of the layer's output")
            panel.set_ylabel("perplexity", fontsize=8)
            panel.set_title(_short(study.model), fontsize=9)
        handles = [Line2D([], [], linestyle="", marker=marker, color="black", markerfacecolor=fill, label=label)
                   for marker, fill, label in (("o", "black", f"{bits[0]} bits, before"), ("o", "white", "after"),
                                               ("s", "black", f"{bits[-1]} bits, before"), ("s", "white", "after"))]
        handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (1, 1)), label="full precision"))
        figure.legend(handles=handles, loc="outside lower center", ncols=5, columnspacing=1.0, handletextpad=0.4)
    return figure


def swaps(studies: Sequence[Study]) -> Figure | None:
    """What exchanging one layer's method does to perplexity; one panel per model."""
    if not studies:
        return None
    figure, axes = _panels(len(studies), 4.8, 2.9)
    with matplotlib.rc_context(plots._RC):
        seen = []
        for panel, study in zip(axes, studies, strict=True):
            for layer in study.result["layers"]:
                for k, (name, swap) in enumerate(sorted(layer["swaps"].items())):
                    colour, marker, *_ = plots.style(name)
                    change = swap["perplexity"] - study.result["perplexity"]
                    panel.plot(layer["layer"] + 0.24 * (k - 0.5), change, marker, color=colour, markeredgecolor="black",
                               markersize=6)
                    seen.append(name)
            panel.axhline(0, color="black", linewidth=0.8, linestyle=(0, (2, 2)))
            panel.set_xticks([layer["layer"] for layer in study.result["layers"]],
                             [f"{layer['layer']}\n{_ABBREVIATED.get(layer['chosen'], layer['chosen'])}"
                              for layer in study.result["layers"]], fontsize=7)
            panel.set_xlabel("decoder layer, and the method it had", fontsize=8)
            panel.set_ylabel("change in perplexity", fontsize=8)
            panel.set_title(f"{_short(study.model)}, {study.record.identity['scheme']}", fontsize=9)
        handles = [Line2D([], [], linestyle="", marker=plots.style(name)[1], color=plots.style(name)[0],
                          markeredgecolor="black", label=f"exchanged for {name}") for name in _ordered(seen)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


_ABBREVIATED = {"smoothquant": "smooth", "smoothquant+gptq": "sm+gptq"}


def statistics(studies: Sequence[Study], choices: Choices) -> Figure | None:
    """Outlier ratio, kurtosis and skewness of each layer's weights and inputs, marked by the method that it chose."""
    if not studies:
        return None
    words = {"outlier_ratio": "outlier ratio", "kurtosis": "kurtosis", "skewness": "skewness"}
    figure, axes = plots._figure(11.2, 2.4 * len(studies), len(studies), 6, squeeze=False)
    with matplotlib.rc_context(plots._RC):
        seen = []
        for at, (row, study) in enumerate(zip(axes, studies, strict=True)):
            greedy = choices.get((study.model, study.record.identity["scheme"]), ())
            for column, (side, key) in enumerate((side, key) for side in ("weights", "inputs") for key in words):
                panel = row[column]
                values = [of_layer(layer, side)[key] for layer in study.result["layers"]]
                panel.plot(range(len(values)), values, color="#999999", linewidth=1, zorder=1)
                for i, value in enumerate(values):
                    name = greedy[i] if greedy else ""
                    colour, marker, *_ = plots.style(name) if name else ("white", "o")
                    panel.plot(i, value, marker, color=colour, markeredgecolor="black", markersize=6, zorder=2)
                    seen.append(name)
                panel.set_xticks(range(0, len(values), max(1, len(values) // 4)))
                panel.margins(y=0.15)
                panel.tick_params(labelsize=7)
                panel.yaxis.set_major_locator(MaxNLocator(4))
                if at == 0:
                    panel.set_title(f"{side}: {words[key]}", fontsize=8)
                if at == len(studies) - 1:
                    panel.set_xlabel("decoder layer", fontsize=8)
            row[0].set_ylabel(_short(study.model), fontsize=8)
        handles = [Line2D([], [], linestyle="", marker=plots.style(name)[1], color=plots.style(name)[0],
                          markeredgecolor="black", label=f"chose {name}") for name in _ordered(seen) if name]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def cost(studies: Sequence[Study]) -> Figure | None:
    """Seconds of the search against layers x candidates, and the line through the origin."""
    if not studies:
        return None
    figure, axes = _panels(len(studies), 4.2, 3.0)
    with matplotlib.rc_context(plots._RC):
        for panel, study in zip(axes, studies, strict=True):
            rows, most = study.result["rows"], 0
            layers, pool = max(r["layers"] for r in rows), max(r["candidates"] for r in rows)
            for label, marker, fill, kept in (
                    (f"all {layers} layers", "o", "black", [r for r in rows if r["layers"] == layers]),
                    (f"fewer layers, {pool} candidates", "s", "white", [r for r in rows if r["layers"] != layers])):
                x = [r["layers"] * r["candidates"] for r in kept]
                panel.plot(x, [r["seconds"] for r in kept], marker, color="black", markerfacecolor=fill, linestyle="",
                           label=label)
                most = max([most, *x])
            panel.plot([0, most], [0, per_candidate(study) * most], color="black", linewidth=0.8, linestyle=(0, (3, 2)),
                       label="proportional")
            panel.set(xlabel="layers × candidates", xlim=(0, None), ylim=(0, None))
            panel.set_ylabel("processor seconds", fontsize=8)
            panel.set_title(_short(study.model), fontsize=9)
            panel.legend(fontsize=7, loc="upper left")
    return figure
