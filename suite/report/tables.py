"""Tables of one comparison: Markdown, CSV and LaTeX for files, and a narrower one for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from tabulate import tabulate

from suite import stats
from suite.report.data import FULL, Comparison, Row, Score, best, best_mean, heading, mean_accuracy

NOT_RUN = "not run"
_OVERLAP = "†"


class _Marked:
    """A cell's text, and whether it is best. Each format writes that in its own way."""

    def __init__(self, text: str, best: bool = False):
        self.text, self.best = text, best


def frame(comparison: Comparison) -> pd.DataFrame:
    """Every number of the comparison, one row per variant, unrounded: what the CSV holds.

    Per perplexity TASK: TASK, TASK_low, TASK_high (bootstrap over windows), TASK_delta, .._delta_low, .._delta_high
    (difference to full precision, paired over windows). Per accuracy TASK: TASK, TASK_stderr, and the differences.
    """
    rows = []
    for row in comparison.rows:
        record = row.quantization
        cells = {"method": row.label, "effective_bits": record and record.result["bits"],
                 "seconds": record and record.result["seconds"],
                 "peak_memory_mib": record and record.result["peak_memory_mib"]}
        for task in comparison.tasks:
            cells |= _numbers(comparison, row, task)
        cells["mean_accuracy"] = mean_accuracy(row, comparison.of_kind("mean"))
        rows.append(cells)
    return pd.DataFrame(rows)


def _numbers(comparison: Comparison, row: Row, task: str) -> dict[str, float | None]:
    score, perplexity = row.scores.get(task), comparison.kinds[task] == "perplexity"
    spread = ("low", "high") if perplexity else ("stderr",)
    names = [task, *(f"{task}_{name}" for name in (*spread, "delta", "delta_low", "delta_high"))]
    if score is None:
        return dict.fromkeys(names)
    own = score.sample and stats.interval(score.sample)
    values = [score.value, *((own and own.low, own and own.high) if perplexity else (score.stderr,))]
    found = delta(comparison, row, task)
    differences = (found.value, found.low, found.high) if found else (None,) * 3
    return dict(zip(names, [*values, *differences], strict=True))


def delta(comparison: Comparison, row: Row, task: str) -> stats.Interval | None:
    """The difference to full precision on a task, paired; None for full precision itself or where one was not run."""
    full = comparison.row(FULL)
    if not row.quantized or full is None or task not in row.scores or task not in full.scores:
        return None
    a, b = row.scores[task].sample, full.scores[task].sample
    return stats.difference(a, b) if a is not None and b is not None else None


def _cells(comparison: Comparison, intervals: bool) -> tuple[list[str], list[list[_Marked]]]:
    """Headings and cells. intervals: with the bounds of every difference."""
    accuracies, perplexities = comparison.of_kind("mean"), comparison.of_kind("perplexity")
    winners, mean_winner = {task: best(comparison, task) for task in comparison.tasks}, best_mean(comparison)
    headings = ["method", "bits"]
    for task in perplexities:
        headings += [f"{heading(task)} PPL", "Δ FP16"]
    headings += [f"{heading(task)} %" for task in accuracies]
    headings += (["mean %", "Δ FP16"] if accuracies else []) + ["seconds"]
    full = comparison.row(FULL)
    full_mean = full and mean_accuracy(full, accuracies)
    rows = []
    for row in comparison.rows:
        record = row.quantization
        cells = [_Marked(row.label), _Marked(f"{record.result['bits']:.3f}" if record else NOT_RUN)]
        for task in perplexities:
            cells += [_Marked(_perplexity(row.scores.get(task)), winners[task] == row.label),
                      _Marked(_difference(delta(comparison, row, task), intervals))]
        for task in accuracies:
            cells.append(_Marked(_accuracy(row.scores.get(task)), winners[task] == row.label))
        if accuracies:
            mean = mean_accuracy(row, accuracies)
            cells.append(_Marked(NOT_RUN if mean is None else f"{100 * mean:.1f}", mean_winner == row.label))
            known = mean is not None and full_mean is not None and row.quantized
            cells.append(_Marked(f"{100 * (mean - full_mean):+.1f}" if known else ""))
        cells.append(_Marked(f"{record.result['seconds']:.1f}" if record else NOT_RUN))
        rows.append(cells)
    return headings, rows


def _perplexity(score: Score | None) -> str:
    if score is None:
        return NOT_RUN
    return f"{score.value:.3f}" + (_OVERLAP if score.overlaps else "")


def _accuracy(score: Score | None) -> str:
    if score is None:
        return NOT_RUN
    return f"{100 * score.value:.1f}" + (f" ± {100 * score.stderr:.1f}" if score.stderr is not None else "") + (
        _OVERLAP if score.overlaps else "")


def _difference(found: stats.Interval | None, intervals: bool) -> str:
    if found is None:
        return ""
    bounds = f" [{found.low:+.3f}, {found.high:+.3f}]" if intervals and found.low == found.low else ""
    return f"{found.value:+.3f}{bounds}"


# ---------------------------------------------------------------------------------------------- words


def caption(comparison: Comparison) -> str:
    """What the numbers are: model, format, calibration, mode, limits, protocol, versions. One paragraph."""
    setting, c = comparison.setting, comparison.setting.calibration
    sentences = [f"{comparison.title}: {setting.scheme or 'full precision'}, {setting.mode} mode"
                 + (" (each method with its published settings and calibration)" if setting.mode == "native" else "")
                 + f", computed in {setting.dtype}."]
    if c:
        sentences.append(f"Calibration: {c['source']}, {c['nsamples']} x {c['seqlen']} tokens, seed {c['seed']}, "
                         f"sha256 {c['digest'][:12]}; inputs of each layer from the {setting.input_policy} model.")
    sentences.append("All documents and windows." if setting.limit is None
                     else f"LIMITED to the first {setting.limit} documents of each task: a quick look, not for citing.")
    if setting.fewshot is not None:
        sentences.append(f"{setting.fewshot} examples before each question.")
    sentences += _protocols(comparison)
    sentences.append(f"Model sha256 {setting.model['digest'][:12]}; "
                     + ", ".join(f"{name} {found}" for name, found in sorted(setting.libraries.items()))
                     + f"; numerics {setting.numerics}.")
    return " ".join(sentences)


def _protocols(comparison: Comparison) -> list[str]:
    """How each perplexity was measured; tasks with the same protocol share a sentence."""
    told: dict[str, list[str]] = {}
    for task in comparison.of_kind("perplexity"):
        record = next((row.scores[task].record for row in comparison.rows if task in row.scores), None)
        info = record.result.get("info", {}) if record else {}
        if info:
            protocol = (f"windows of {info.get('window')} tokens without overlap, BOS: {info.get('bos')}, "
                        f"documents joined by: {info.get('join')}")
            told.setdefault(protocol, []).append(f"{heading(task)} {info.get('tokens'):,} tokens, data sha256 "
                                                 f"{str(info.get('data_digest'))[:12]}")
    return [f"Perplexity: exp of the mean token NLL, {protocol} ({'; '.join(tasks)})."
            for protocol, tasks in told.items()]


def notes(comparison: Comparison) -> list[str]:
    """The footnotes: what bold means, what the numbers behind ± and in brackets are, and any warning."""
    found = [f"Bold: the best of the quantized rows, and only where it is better than the second by a paired bootstrap "
             f"over windows or documents ({stats.LEVEL:.0%}, {stats.RESAMPLES:,} draws); no bold means that the first "
             f"two cannot be told apart.",
             "Δ FP16: difference to the full-precision row, its paired bootstrap interval in brackets; the "
             "intervals of the perplexities themselves stand in the CSV. ±: standard error. Bits: per decoder weight, "
             "scales counted. Seconds: to quantize."]
    if any(score.overlaps for row in comparison.rows for score in row.scores.values()):
        found.append(f"{_OVERLAP} Calibrated on the text it is evaluated on: not a fair number.")
    return found


# ---------------------------------------------------------------------------------------------- formats


def markdown(comparison: Comparison) -> str:
    headings, rows = _cells(comparison, intervals=True)
    table = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in rows]
    body = tabulate(table, headings, tablefmt="pipe", disable_numparse=True, colalign=_alignment(headings))
    footnotes = "\n".join(f"- {note}" for note in notes(comparison))
    return f"# {comparison.title}\n\n{caption(comparison)}\n\n{body}\n\n{footnotes}\n"


def csv(comparison: Comparison) -> str:
    return frame(comparison).to_csv(index=False, float_format="%.7g", lineterminator="\n")


def latex(comparison: Comparison) -> str:
    """A table float for booktabs, with the footnotes in its caption."""
    headings, rows = _cells(comparison, intervals=False)
    table = [[rf"\textbf{{{tex(cell.text)}}}" if cell.best else tex(cell.text) for cell in row] for row in rows]
    lines = [r"\begin{table}", r"\centering", r"\small", rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
             r"\toprule", " & ".join(map(tex, headings)) + r" \\", r"\midrule",
             *(" & ".join(row) + r" \\" for row in table), r"\bottomrule", r"\end{tabular}",
             rf"\caption{{{tex(' '.join([caption(comparison), *notes(comparison)]))}}}",
             rf"\label{{tab:{comparison.model}-{comparison.setting.stem}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$", "±": r"$\pm$", "†": r"$^\dagger$"}


def tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def terminal(comparison: Comparison) -> str:
    """The table as it is printed: an asterisk for bold, no intervals, and a line of what it is."""
    headings, rows = _cells(comparison, intervals=False)
    table = [[cell.text + ("*" if cell.best else "") for cell in row] for row in rows]
    body = tabulate(table, headings, tablefmt="simple", disable_numparse=True, colalign=_alignment(headings))
    limit = "" if comparison.setting.limit is None else f", LIMITED to {comparison.setting.limit} documents"
    return (f"{comparison.title}: {comparison.setting.scheme}, {comparison.setting.mode} mode{limit}\n\n{body}\n\n"
            f"* best of the quantized rows, and better than the second by a paired test\n")


def _alignment(headings: Sequence[str]) -> list[str]:
    return ["left", *["right"] * (len(headings) - 1)]
