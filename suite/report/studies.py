"""Tables of the studies: what was measured beside the grids, from their records alone. No torch.

Each function takes the studies of one experiment, one per model, and returns the page's body (Markdown), and the rows
of the CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from suite import stats
from suite.report import ablations, data
from suite.report.sheets import Sheet, Study

METRICS = ("cka", "mse", "cosine", "sqnr")
WORDS = {"cka": "1 − CKA", "mse": "MSE", "cosine": "1 − cosine", "sqnr": "−SQNR"}
Choices = Mapping[tuple[str, str], Sequence[str]]  # (model, scheme) -> the greedy hybrid's method of each layer
Rows = list[dict[str, Any]]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headings, tablefmt="pipe", disable_numparse=True,
                    colalign=["left", *["right"] * (len(headings) - 1)])


def _head(study: Study) -> str:
    return f"{data.title_of(study.model)}, {study.record.identity['scheme']}"


def _interval(found: stats.Interval, digits: int = 2) -> str:
    bounds = f" [{found.low:.{digits}f}, {found.high:.{digits}f}]" if found.low == found.low else ""
    return f"{found.value:.{digits}f}{bounds}"


def _paired(study: Study, nll: Sequence[float], base: Sequence[float]) -> stats.Interval:
    """The difference in perplexity on the same windows."""
    tokens = study.result["protocol"]["window"] - 1
    return stats.difference(stats.Sample.windows(nll, tokens), stats.Sample.windows(base, tokens))


# ---------------------------------------------------------------------------------------------- degradation


def correlations(study: Study) -> dict[tuple[str, str, str], stats.Interval]:
    """(own or final, metric, "perplexity" or "accuracy") -> Spearman's rho of the distance with the damage."""
    points, full, found = study.result["points"], study.result["full"]["perplexity"], {}
    damage = {"perplexity": [point["perplexity"] - full for point in points]}
    if "full_accuracy" in study.result:
        damage["accuracy"] = [study.result["full_accuracy"] - point["accuracy"] for point in points]
    for place in ("own", "final"):
        for metric in METRICS:
            distances = [point[place][metric] for point in points]
            for kind, values in damage.items():
                found[place, metric, kind] = stats.spearman(distances, values)
    return found


def degradation(studies: Sequence[Study], choices: Choices, sheets: Any) -> tuple[str, Rows]:
    parts, rows = [], []
    for study in studies:
        found = correlations(study)
        kinds = list(dict.fromkeys(kind for *_, kind in found))
        names = {"perplexity": "rho with the rise in perplexity",
                 "accuracy": f"rho with the loss of {data.heading(study.result['accuracy_task'])} accuracy"}
        body = [[f"{WORDS[metric]} of the {'damaged' if place == 'own' else 'last'} layer",
                 *(_interval(found[place, metric, kind]) for kind in kinds)]
                for place in ("own", "final") for metric in METRICS]
        full = study.result.get("full_accuracy")
        parts.append(f"## {_head(study)}\n\n{len(study.result['points'])} damaged models; full precision: perplexity "
                     f"{study.result['full']['perplexity']:.3f}" + (f", accuracy {100 * full:.1f} %" if full else "")
                     + f".\n\n{_table(['', *(names[kind] for kind in kinds)], body)}\n")
        for point in study.result["points"]:
            rows.append({"model": study.model, "layer": point["layer"], "kind": point["kind"], "size": point["size"],
                         **{f"own_{m}": point["own"][m] for m in METRICS},
                         **{f"final_{m}": point["final"][m] for m in METRICS},
                         "perplexity": point["perplexity"], "accuracy": point.get("accuracy")})
    parts.append("Spearman's rank correlation over all damaged models, its 95 % bootstrap interval in brackets. Every "
                 "distance is larger for a worse layer, so rho should be near 1. SQNR is a monotone function of MSE.\n")
    return "\n".join(parts), rows


# ---------------------------------------------------------------------------------------------- linear reconstruction


def reconstruction(studies: Sequence[Study], choices: Choices, sheets: Any) -> tuple[str, Rows]:
    parts, rows = [], []
    for study in studies:
        body = []
        for row in study.result["rows"]:
            before, after = row["before"], row["after"]
            change = _paired(study, after["nll"], before["nll"])
            layer = "all" if row["layer"] is None else str(row["layer"])
            body.append([f"{row['bits']} bits, layer {layer}", f"{before['cka']:.2e}", f"{after['cka']:.2e}",
                         f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}",
                         ablations.difference(change, True, 3)])
            rows.append({"model": study.model, "bits": row["bits"], "layer": layer, "cka_before": before["cka"],
                         "cka_after": after["cka"], "perplexity_before": before["perplexity"],
                         "perplexity_after": after["perplexity"], "difference": change.value,
                         "difference_low": change.low, "difference_high": change.high})
        singles = [r for r in study.result["rows"] if r["layer"] is not None]
        raised = [r for r in singles if r["after"]["cka"] < r["before"]["cka"]]
        helped = [r for r in raised if r["after"]["perplexity"] < r["before"]["perplexity"]]
        headings = ["", "1 − CKA before", "after", "PPL before", "after", "Δ"]
        full = study.result["full"]["perplexity"]
        parts.append(f"## {data.title_of(study.model)}\n\nFull precision: {full:.3f}. The map raised CKA in "
                     f"{len(raised)} of {len(singles)} single layers, and perplexity fell in {len(helped)} of those.\n\n"
                     f"{_table(headings, body)}\n")
    return "\n".join(parts), rows


# ---------------------------------------------------------------------------------------------- single swaps


def swaps(studies: Sequence[Study], choices: Choices, sheets: Any) -> tuple[str, Rows]:
    parts, rows, shares = [], [], []
    for study in studies:
        body, best, safe = [], 0, 0
        for layer in study.result["layers"]:
            changes = {name: _paired(study, swap["nll"], study.result["nll"]) for name, swap in layer["swaps"].items()}
            best += all(change.value >= 0 for change in changes.values())
            safe += all(not change.high < 0 for change in changes.values())
            for name, change in changes.items():
                distance = layer["swaps"][name]["distance"]
                body.append([f"layer {layer['layer']}: {layer['chosen']} → {name}", f"{distance:+.2e}",
                             ablations.difference(change, True, 4)])
                rows.append({"model": study.model, "layer": layer["layer"], "chosen": layer["chosen"], "swap": name,
                             "cka_distance_added": distance, "perplexity": layer["swaps"][name]["perplexity"],
                             "difference": change.value, "difference_low": change.low, "difference_high": change.high})
        count = len(study.result["layers"])
        behind = "quantized again" if study.result["requantized"] else "left as they were"
        shares.append([data.title_of(study.model), f"{best} of {count}", f"{safe} of {count}", behind])
        parts.append(f"## {_head(study)}\n\nThe hybrid's perplexity: {study.result['perplexity']:.3f}.\n\n"
                     f"{_table(['exchanged', '1 − CKA added', 'Δ PPL'], body)}\n")
    top = _table(["", "layers whose choice was the best", "layers where no exchange is significantly better",
                  "the layers behind"], shares)
    return f"{top}\n\n" + "\n".join(parts), rows


# ---------------------------------------------------------------------------------------------- all assignments


def exhaustive(studies: Sequence[Study], choices: Choices, sheets: Any) -> tuple[str, Rows]:
    parts, rows = [], []
    for study in studies:
        leaves = sorted(study.result["leaves"], key=lambda leaf: leaf["perplexity"])
        ranks = {tuple(leaf["choices"]): i + 1 for i, leaf in enumerate(leaves)}
        picked = {"best of all, in hindsight": leaves[0]}
        greedy = choices.get((study.model, study.record.identity["scheme"]))
        if greedy and tuple(greedy) in ranks:
            picked["greedy by CKA"] = next(leaf for leaf in leaves if leaf["choices"] == list(greedy))
        for metric in ("cka", "mse", "cosine"):
            picked[f"least {WORDS[metric]} of the last layer"] = min(leaves, key=lambda leaf: leaf[metric])
        picked["least loss on the calibration text"] = min(leaves, key=lambda leaf: leaf["calibration_nll"])
        for name in study.result["pool"]:
            picked[f"{name} everywhere"] = next(leaf for leaf in leaves if set(leaf["choices"]) == {name})
        picked["median"], picked["worst"] = leaves[len(leaves) // 2], leaves[-1]
        body = [[what, " ".join(leaf["choices"]), f"{leaf['perplexity']:.4f}",
                 f"{leaf['perplexity'] - leaves[0]['perplexity']:+.4f}", f"{ranks[tuple(leaf['choices'])]}"]
                for what, leaf in picked.items()]
        ppl = [leaf["perplexity"] for leaf in leaves]
        order = {"1 − CKA": "cka", "MSE": "mse", "1 − cosine": "cosine", "calibration loss": "calibration_nll"}
        rho = "; ".join(f"{word} {_interval(stats.spearman([leaf[key] for leaf in leaves], ppl))}"
                        for word, key in order.items())
        parts.append(f"## {_head(study)}\n\n{len(leaves)} assignments; full precision "
                     f"{study.result['full']['perplexity']:.4f}. Spearman's rho over all of them, between perplexity "
                     f"and the last layer's distance: {rho}.\n\n"
                     f"{_table(['picked by', 'assignment', 'PPL', 'regret', 'rank'], body)}\n")
        rows += [{"model": study.model, "scheme": study.record.identity["scheme"],
                  "assignment": " ".join(leaf["choices"]),
                  **{key: leaf[key] for key in ("perplexity", "calibration_nll", *METRICS)}} for leaf in leaves]
    return "\n".join(parts), rows


# ---------------------------------------------------------------------------------------------- layer statistics


def of_layer(layer: Mapping[str, Any], side: str) -> dict[str, float]:
    """A layer's numbers from those of its sites: the largest outlier ratio, the means of the moments."""
    sites = list(layer[side].values())
    return {"outlier_ratio": max(site["outlier_ratio"] for site in sites),
            "kurtosis": float(np.mean([site["kurtosis"] for site in sites])),
            "skewness": float(np.mean([site["skewness"] for site in sites]))}


def statistics(studies: Sequence[Study], choices: Choices, sheets: Any) -> tuple[str, Rows]:
    parts, rows = [], []
    for study in studies:
        greedy, body = choices.get((study.model, study.record.identity["scheme"]), ()), []
        for layer in study.result["layers"]:
            chosen = greedy[layer["layer"]] if greedy else ""
            numbers = {side: of_layer(layer, side) for side in ("weights", "inputs")}
            body.append([str(layer["layer"]), *(f"{value:.2f}" for side in numbers.values() for value in side.values()),
                         chosen])
            rows.append({"model": study.model, "layer": layer["layer"], "chosen": chosen,
                         **{f"{side}_{key}": v for side, found in numbers.items() for key, v in found.items()}})
        headings = ["layer", *(f"{side}: {word}" for side in ("weights", "inputs")
                               for word in ("outlier ratio", "kurtosis", "skewness")), "chosen"]
        parts.append(f"## {data.title_of(study.model)}\n\n{_table(headings, body)}\n")
    parts.append("Outlier ratio: the largest channel's largest magnitude over the median channel's, the largest of the "
                 "layer's four sites. Kurtosis (3 for a normal distribution) and skewness: the mean of the sites.\n")
    return "\n".join(parts), rows


# ---------------------------------------------------------------------------------------------- cost


def per_candidate(study: Study) -> float:
    """Seconds of one candidate in one layer: the least-squares line through the origin, seconds = a x layers x
    candidates."""
    product = np.array([row["layers"] * row["candidates"] for row in study.result["rows"]], float)
    seconds = np.array([row["seconds"] for row in study.result["rows"]])
    return float((product * seconds).sum() / (product**2).sum())


def cost(studies: Sequence[Study], choices: Choices, sheets: Mapping[str, Sequence[Sheet]]) -> tuple[str, Rows]:
    parts, rows = [], []
    for study in studies:
        line, body = per_candidate(study), []
        for row in study.result["rows"]:
            expected = line * row["layers"] * row["candidates"]
            body.append([f"{row['layers']} layers, {row['candidates']} candidates", f"{row['seconds']:.2f}",
                         f"{expected:.2f}", f"{row['seconds'] / expected:.2f}", f"{row['peak_memory_mib']:.0f}"])
            kept = ("layers", "candidates", "seconds", "wall", "peak_memory_mib")
            rows.append({"model": study.model, **{key: row[key] for key in kept}, "line": expected})
        pool = max((row["pool"] for row in study.result["rows"]), key=len)
        headings = ["", "processor s", "line", "ratio", "peak MiB"]
        parts.append(f"## {data.title_of(study.model)}\n\nCandidates in the order {', '.join(pool)}; "
                     f"{study.result['tokens']:,} calibration tokens; line: {line:.2f} s x layers x candidates.\n\n"
                     f"{_table(headings, body)}\n")
    for sheet in sheets.get("perplexity", ()):
        known = [(one, one.numbers("seconds"), one.numbers("peak_memory_mib")) for one in sheet.lines]
        body = [[one.name, f"{seconds[0]:.1f}", f"{memory[0]:.0f}"]
                for one, seconds, memory in known if seconds and memory]
        parts.append(f"## By method: {data.title_of(sheet.model)}, {sheet.scheme}\n\nAs recorded in the main table, "
                     f"where variants may have been measured side by side.\n\n"
                     f"{_table(['', 'seconds', 'peak MiB'], body)}\n")
    return "\n".join(parts), rows


BODIES: dict[str, Callable[..., tuple[str, Rows]]] = {
    "degradation": degradation, "reconstruction": reconstruction, "swaps": swaps, "exhaustive": exhaustive,
    "statistics": statistics, "cost": cost}


def _protocols(studies: Sequence[Study]) -> str:
    """On how much the studies were made; models that differ are named."""
    sizes = []
    for study in studies:
        protocol, calibration = study.result["protocol"], study.record.identity["calibration"]
        size = (f"{protocol['windows']} windows of {protocol['window']} tokens, {protocol['sequences']} calibration sequences "
                f"of {calibration['seqlen']}")
        sizes.append((size, study.model))
    found = ablations.models_by(sizes)
    return " ".join(f"{size} ({models})." if len(found) > 1 else f"{size}." for size, models in found.items())


def files(experiment: Any, studies: Sequence[Study], choices: Choices, sheets: Mapping[str, Sequence[Sheet]],
          pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """{file name: content} of a study's experiment, its pictures too."""
    body, rows = BODIES[experiment.study](studies, choices, sheets)
    limit = studies[0].record.identity["task"].get("limit")
    limited = f"\n**LIMITED to the first {limit} windows: a quick look, not for citing.**\n" if limit else ""
    about = (f"Test text: {data.heading(studies[0].record.identity['task']['name'])}. {_protocols(studies)} Computed layer by "
             f"layer in this suite, not through lm-eval.")
    shown = "\n".join(f"![{name}]({name})\n" for name in pictures if name.endswith(".png"))
    page = (f"# {ablations.number(experiment)}{experiment.title}\n\n{' '.join(experiment.says.split())}\n{limited}\n"
            f"{about}\n\n{body}\n{shown}")
    table = pd.DataFrame(rows)
    short = table.select_dtypes("number").columns
    tex = ablations.latex_table(list(table.columns), [[f"{v:.4g}" if c in short and v == v else str(v) for c, v in
                                                       zip(table.columns, row, strict=True)]
                                                      for row in table.head(60).itertuples(index=False)],
                                f"{experiment.title}. {' '.join(experiment.says.split())}", experiment.name)
    return {f"{experiment.name}.md": page.encode(), f"{experiment.name}.tex": tex.encode(),
            f"{experiment.name}.csv": table.to_csv(index=False, float_format="%.7g", lineterminator="\n").encode(),
            **pictures}
