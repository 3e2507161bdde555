"""Figures of one comparison, as PNG and SVG: readable without colour, and the same bytes for the same records.

Every method has a colour, a marker, a line and a hatch of its own, in every figure.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from suite.report.data import HYBRID, Comparison, Row, heading

_RC = {"svg.hashsalt": "ptq-suite", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
       "axes.spines.right": False, "hatch.linewidth": 0.6, "legend.frameon": False, "figure.dpi": 100,
       "savefig.dpi": 160}

# colour, marker, line, hatch. The colours are those of Okabe and Ito, told apart by colour-blind readers too.
_STYLES = {
    "fp16": ("#000000", "", (0, (1, 1)), ""),
    "rtn": ("#999999", "x", (0, (4, 2)), "xxx"),
    "gptq": ("#56B4E9", "o", "-", ""),
    "awq": ("#E69F00", "s", (0, (5, 1)), "///"),
    "smoothquant": ("#009E73", "^", (0, (3, 1, 1, 1)), "|||"),
    "awq+gptq": ("#F0E442", "D", (0, (6, 1, 1, 1)), "++"),
    "smoothquant+gptq": ("#0072B2", "v", (0, (2, 1)), "\\\\\\"),
    "spinquant": ("#CC79A7", "P", (0, (8, 2)), "ooo"),
    "mp-gptq": ("#882255", "X", (0, (3, 3)), "---"),
    HYBRID: ("#D55E00", "*", "-", "OO"),
}
_SPARE = (("#44AA99", "<", "--", ".."), ("#332288", ">", "-.", "**"), ("#DDCC77", "h", ":", "/o"),
          ("#AA4499", "d", "--", "\\o"))


def style(label: str) -> tuple[str, str, Any, str]:
    """(colour, marker, line, hatch) of a variant; those with further options share their method's colour only."""
    method = label.split(" ")[0]
    if label in _STYLES:
        return _STYLES[label]
    spare = _SPARE[sum(label.encode()) % len(_SPARE)]
    return (_STYLES[method][0], *spare[1:]) if method in _STYLES else spare


def files(figure: Figure, stem: str) -> dict[str, bytes]:
    """The figure as {file name: content}: PNG and SVG, without dates or versions."""
    found = {}
    with matplotlib.rc_context(_RC):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for both formats
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, metadata=metadata, bbox_inches="tight")
            found[f"{stem}.{suffix}"] = buffer.getvalue()
    return found


def _figure(width: float, height: float, *shape: int, **options: Any) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(*shape, **options)


def _name(comparison: Comparison) -> str:
    limit = f", first {comparison.setting.limit} documents" if comparison.setting.limit is not None else ""
    return f"{comparison.title}, {comparison.setting.scheme}{limit}"


# ---------------------------------------------------------------------------------------------- the hybrid's choices


def choices(comparison: Comparison, row: Row) -> Figure:
    """The choice strip: which method each layer chose, and by what margin of CKA over the runner-up.

    Where a variant gave its layers bits of their own (MP-GPTQ), these stand in a second strip.
    """
    chosen = [layer.get("chosen", "") for layer in row.layers]
    margins = [layer.get("margin") for layer in row.layers]
    metric = _metric(row)
    mixed = next((other for other in comparison.rows if len(_bits(other)) == len(chosen)), None)
    heights = [1.0, 0.45, 1.6] if mixed else [1.0, 1.6]
    figure, axes = _figure(max(5.0, 0.42 * len(chosen) + 1.6), 2.1 + 0.5 * sum(heights), len(heights), 1, sharex=True,
                           gridspec_kw={"height_ratios": heights})
    strip, bars = axes[0], axes[-1]
    if mixed:
        _allocation(axes[1], mixed)
    with matplotlib.rc_context(_RC):
        for i, name in enumerate(chosen):
            colour, _, _, hatch = style(name)
            strip.add_patch(Rectangle((i - 0.5, 0), 1, 1, facecolor=colour, edgecolor="black", hatch=hatch,
                                      linewidth=0.8))
        _bare(strip, len(chosen))
        strip.set_title(f"{_name(comparison)}\nmethod chosen by {row.label} in each layer")
        names = sorted(set(chosen), key=lambda n: list(_STYLES).index(n) if n in _STYLES else len(_STYLES))
        figure.legend(handles=[Patch(facecolor=style(n)[0], hatch=style(n)[3], edgecolor="black",
                                     label=f"{n} ({chosen.count(n)})") for n in names],
                      loc="outside lower center", ncols=min(4, len(names)), handlelength=2.4, handleheight=1.4)
        known = [margin if margin and margin > 0 else np.nan for margin in margins]
        for i, (name, margin) in enumerate(zip(chosen, known, strict=True)):
            colour, _, _, hatch = style(name)
            bars.bar(i, margin, width=0.7, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)
        if np.isfinite(known).any():
            bars.set_yscale("log")
            bars.set_ylim(*_decades(known))
        bars.set(xlabel="decoder layer", ylabel=f"margin to the\nrunner-up, {metric}")
        _layer_ticks(bars, len(chosen))
    return figure


def _bare(axes, count: int) -> None:
    axes.set(ylim=(0, 1), xlim=(-0.5, count - 0.5), yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)


def _bits(row: Row) -> list[int]:
    """The bits of each layer of a variant that chose them, else nothing."""
    return [layer["wbits"] for layer in row.layers if "wbits" in layer]


def _allocation(axes, row: Row) -> None:
    """A strip of the bits that each layer got; the fewer, the darker."""
    with matplotlib.rc_context(_RC):
        for i, bits in enumerate(_bits(row)):
            shade = min(1.0, 0.35 + 0.65 * math.log2(bits) / 4)
            axes.add_patch(Rectangle((i - 0.5, 0), 1, 1, facecolor=str(shade), edgecolor="black", linewidth=0.8))
            axes.text(i, 0.5, str(bits), ha="center", va="center", fontsize=8)
        _bare(axes, len(row.layers))
        axes.set_title(f"bits of each layer by {row.label}", fontsize=8, pad=3)


def _metric(row: Row) -> str:
    metric = row.quantization.identity["method"].get("options", {}).get("metric", "cka") if row.quantization else "cka"
    return "1 − CKA" if metric == "cka" else metric


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole powers of ten around the finite values, at least one apart, so that a log axis has labels."""
    finite = [value for value in values if value == value and value > 0]
    low, high = math.floor(math.log10(min(finite)) - 0.05), math.ceil(math.log10(max(finite)) + 0.05)
    return 10.0**low, 10.0 ** max(high, low + 1)


def _layer_ticks(axes, count: int) -> None:
    step = max(1, math.ceil(count / 24))
    axes.set_xticks(range(0, count, step))


def candidates(comparison: Comparison, row: Row) -> Figure:
    """The heat map: 1 - CKA of every candidate in every layer, on a log scale, the choice marked."""
    layers = [layer for layer in row.layers if layer.get("candidates")]
    names = list(layers[0]["candidates"])
    values = np.array([[layer["candidates"][name]["cka"] for layer in layers] for name in names], float)
    positive = values[values > 0]
    figure, axes = _figure(max(5.0, 0.55 * len(layers) + 2.6), 0.5 * len(names) + 1.7)
    with matplotlib.rc_context(_RC):
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
        image = axes.imshow(np.where(values > 0, values, positive.min()), norm=norm, cmap="Greys", aspect="auto")
        for j, layer in enumerate(layers):
            i = names.index(layer["chosen"])
            axes.add_patch(Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor="#D55E00", linewidth=2.2))
        if len(layers) <= 32:
            for i, j in np.ndindex(values.shape):
                dark = norm(max(values[i, j], positive.min())) > 0.55
                axes.text(j, i, _short(values[i, j]), ha="center", va="center", fontsize=6.5,
                          color="white" if dark else "black")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(0, len(layers), max(1, math.ceil(len(layers) / 24))),
                        [str(layer["layer"]) for layer in layers][::max(1, math.ceil(len(layers) / 24))])
        axes.set(xlabel="decoder layer")
        axes.set_title(f"{_name(comparison)}\n1 − CKA of each candidate, {row.label}'s choice framed")
        figure.colorbar(image, ax=axes, label="1 − CKA", pad=0.01)
    return figure


def _short(value: float) -> str:
    """
    >>> _short(0.00123), _short(2.5e-5)
    ('1.2e-3', '2.5e-5')
    """
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.1e}").replace("e+0", "")


# ---------------------------------------------------------------------------------------------- errors and perplexity


def error_growth(comparison: Comparison) -> Figure | None:
    """1 - CKA between the quantized and the full-precision model at each depth, one line per method."""
    lines = {row.label: [(layer["layer"], layer["errors"]["cka"]) for layer in row.layers
                         if (layer.get("errors") or {}).get("cka")]
             for row in comparison.rows if row.quantized}
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return None
    figure, axes = _figure(6.4, 4.0)
    with matplotlib.rc_context(_RC):
        for label, points in lines.items():
            _line(axes, label, points)
        axes.set_yscale("log")
        _log_ticks(axes, [value for points in lines.values() for _, value in points])
        axes.set(xlabel="decoder layer", ylabel="1 − CKA to full precision")
        _layer_ticks(axes, 1 + max(layer for points in lines.values() for layer, _ in points))
        axes.set_title(f"{_name(comparison)}\nerror growth by depth")
        figure.legend(loc="outside right center", handlelength=3.6)
    return figure


def severity(base: str, task: str, points: Mapping[str, Sequence[tuple[float, float, float, float]]],
             scheme: str, full: float) -> Figure:
    """What each method adds to the perplexity of full precision, against the severity of planted outliers.

    points: variant -> (severity, perplexity added, low, high), with the bootstrap interval over windows; severity 1 is the
    plain model. full: the perplexity of full precision. The axis is logarithmic, since methods part by orders of magnitude;
    a point that adds nothing has no place on it and is left out.
    """
    figure, axes = _figure(6.4, 4.0)
    with matplotlib.rc_context(_RC):
        axes.set_yscale("log")
        for label, found in points.items():
            ordered = [point for point in sorted(found) if point[1] > 0]
            if not ordered:
                continue
            _line(axes, label, [(s, p) for s, p, _, _ in ordered])
            # the band ends at the smallest positive number where an interval reaches below zero
            axes.fill_between([s for s, *_ in ordered], [max(x[2], 1e-6) for x in ordered], [x[3] for x in ordered],
                              color=style(label)[0], alpha=0.15, linewidth=0)
        values = [p for found in points.values() for _, p, _, _ in found if p > 0]
        if values:
            axes.set_ylim(min(values) / 2, max(values) * 2)
            _log_ticks(axes, values)
        severities = sorted({s for found in points.values() for s, *_ in found})
        axes.set_xscale("log", base=2)
        axes.set_xticks(severities, ["plain" if s == 1 else f"{s:g}" for s in severities])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="severity of the planted outliers",
                 ylabel=f"{heading(task)} perplexity added to {full:.3f},\nthat of full precision")
        axes.set_title(f"{base} with PLANTED outliers, {scheme}\nperplexity against outlier severity")
        figure.legend(loc="outside right center", handlelength=3.6)
    return figure


def _line(axes, label: str, points: Sequence[tuple[float, float]]) -> None:
    colour, marker, line, _ = style(label)
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, linewidth=1.5, markersize=6.5,
              markeredgecolor="black" if marker not in ("x",) else colour, markeredgewidth=0.6, label=label)


def _log_ticks(axes, values: Sequence[float]) -> None:
    """Labels at 1, 2, 5 where the values span less than two decades, else at the decades."""
    if max(values) < 100 * min(values):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value:g}" if value >= 0.1 else _short(value).replace(".0", ""))
    axes.yaxis.set_minor_formatter(NullFormatter())

