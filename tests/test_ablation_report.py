"""Pages of the ablations, on invented records: what is tested and marked, what the columns hold, and every figure."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import fake_records as fake
import numpy as np
import pytest
from matplotlib.image import imread

from suite import stats
from suite.ablate import plan
from suite.report import ablations, data, figures, paper, plots, studies
from suite.report.sheets import Line, Repeat, Sheet, Study
from suite.store import Record, Store

PPL = ("world_wiki_ppl", "world_chat_ppl")


def repeat(method, tasks=PPL, damage=None, varied=None, **changes):
    damage = fake.DAMAGE.get(method, 0.05) if damage is None else damage
    scores = {task: data.Score(fake.evaluation(method, task, damage, noise=0.01, **changes)) for task in tasks}
    return Repeat(fake.quantization(method, **changes), scores, varied)


def line(name, method, tasks=PPL, uniform=False, damage=None, **changes):
    return Line(name, [repeat(method, tasks, damage, **changes)], uniform)


def sheet(tasks=PPL, against="", lines=None, model="toy", scheme="W4A8 g128", **changes):
    full = line("fp16", "fp16", tasks)
    lines = lines or [full, line("gptq", "gptq", tasks, uniform=True), line("awq", "awq", tasks, uniform=True),
                      line("cka-hybrid", "cka-hybrid", tasks)]
    kinds = {task: "perplexity" if task.endswith("_ppl") else "mean" for task in tasks}
    return Sheet(model, scheme, lines, list(tasks), kinds, full, against, **changes)


def experiment(text="title: A title\nsays: What it says.\nrows: [{name: fp16, method: fp16}]"):
    return plan.parse("mine", text)


def cell(sheet, columns, row, heading, nth=0):
    headings, rows = ablations.cells(sheet, columns)
    at = [i for i, found in enumerate(headings) if found == heading][nth]
    return next(cells for cells in rows if cells[0].strip("*") == row)[at]


# ---------------------------------------------------------------------------------------------- tables


def test_differences_are_paired_and_marked():
    found = sheet()
    text = cell(found, (), "awq", "Δ fp16")
    expected = stats.difference(found.line("awq").sample(PPL[0]), found.full.sample(PPL[0]))
    assert text.startswith(f"{expected.value:+.4f}* [{expected.low:+.4f}")
    same = sheet(lines=[line("one", "gptq"), line("two", "gptq")], against="one")
    assert cell(same, (), "two", "Δ one").startswith("+0.0000 [") and cell(same, (), "one", "Δ one") == ""


def test_only_a_tested_winner_is_bold():
    found = sheet()
    assert found.best(PPL[0]) == "cka-hybrid" and cell(found, (), "cka-hybrid", "wiki PPL").startswith("**")
    assert not cell(found, (), "fp16", "wiki PPL").startswith("**")  # full precision does not compete
    close = sheet(lines=[line("a", "gptq", damage=0.03), line("b", "awq", damage=0.03)])
    assert close.best(PPL[0]) is None
    twins = sheet(lines=[line("a", "gptq"), line("a again", "gptq"), line("worse", "rtn")])
    assert twins.best(PPL[0]) == "a"  # its twin is no rival
    _, rows = ablations.summary([replace(found, against="cka-hybrid"), replace(found, against="cka-hybrid")])
    assert {row[0]: row[1] for row in rows}["cka-hybrid"] == "" and not any("****" in text for row in rows for text in row)


def test_recovered_is_the_share_of_the_gap():
    found = sheet()
    full, best = found.full.value(PPL[0]), min(found.line(name).value(PPL[0]) for name in ("gptq", "awq"))
    own = found.line("cka-hybrid").value(PPL[0])
    share = (best - own) / (best - full)
    assert found.recovered(found.line("cka-hybrid"), PPL[0]) == pytest.approx(share)
    assert cell(found, ("recovered",), "cka-hybrid", "recovered %, wiki") == f"{100 * share:+.0f}"
    assert cell(found, ("recovered",), "gptq", "recovered %, wiki") == ""


def test_repeats_show_their_mean_and_spread():
    several = Line("random", [repeat("gptq", damage=0.05), repeat("awq", damage=0.08)])
    found = sheet(lines=[line("greedy", "cka-hybrid"), several], against="greedy")
    values = [one.scores[PPL[0]].value for one in several.repeats]
    assert several.value(PPL[0]) == pytest.approx(np.exp(np.mean(np.log(values))), rel=1e-6)
    assert cell(found, ("spread",), "random", "sd over runs, wiki") == f"{np.std(values, ddof=1):.4f}"
    assert cell(found, (), "random", "runs") == "2"


def test_the_best_in_hindsight_is_picked_by_corpus():
    best = Line("best", [repeat("gptq", damage=0.02), repeat("awq", damage=0.09)], best_of=("gptq", "awq"))
    found = sheet(lines=[line("greedy", "cka-hybrid"), best])
    assert best.value(PPL[0]) == pytest.approx(best.repeats[0].scores[PPL[0]].value)
    assert best.value(PPL[0]) < best.repeats[1].scores[PPL[0]].value and found.best(PPL[0]) != "best"


def test_choices_and_changes():
    greedy, other = line("greedy", "cka-hybrid"), line("other", "cka-hybrid")
    changed = [dict(layer) for layer in other.repeats[0].layers]
    changed[0]["chosen"], changed[3]["chosen"] = "nobody", "nobody"
    record = other.repeats[0].quantization
    other.repeats[0].quantization = Record(record.identity, {**record.result, "layers": changed}, record.provenance)
    found = sheet(lines=[greedy, other], against="greedy")
    assert ablations.changed(found, other) == 2 and "nobody 2" in ablations.choice_counts(other)
    assert cell(found, ("changed",), "other", "layers changed") == "2"


def test_accuracies_with_their_mean():
    tasks = (*PPL, "world_math", "world_quiz")
    found = sheet(tasks)
    text = cell(found, (), "awq", "math %")
    assert "±" in text
    pairs = [(found.line("awq").sample(task), found.full.sample(task)) for task in tasks[2:]]
    mean = stats.mean_difference(pairs)
    assert cell(found, (), "awq", "Δ fp16", nth=2).startswith(f"{100 * mean.value:+.1f}")


def test_a_page_says_what_is_limited_concluded_and_in_hindsight():
    followed = line("small", "gptq")
    record = followed.repeats[0].quantization
    followed.repeats[0].quantization = Record(
        record.identity, {**record.result, "follows_from": {"label": "x"}, "seconds": None}, record.provenance)
    best = Line("best", [repeat("gptq")], best_of=("gptq",))
    found = sheet(lines=[line("gptq", "gptq", uniform=True), followed, best], limit=64)
    text = experiment("title: A title\nsays: S\ncolumns: [recovered]\nrows: [{name: gptq, method: gptq}]")
    page = ablations.markdown(text, [found, sheet(model="other")])
    assert "LIMITED to the first 64" in page and "Not run but concluded" in page and "hindsight" in page
    assert "## Summary" in page and "toy, W4A8 g128" in page and "other" in page


def test_files_are_whole_and_repeatable():
    found = [sheet(), sheet(model="other", scheme="W3A8 g128")]
    first, second = (ablations.files(experiment(), found, {"a.png": b"x"}) for _ in range(2))
    assert first == second and set(first) == {"mine.md", "mine.csv", "mine.tex", "a.png"}
    assert b"![a.png](a.png)" in first["mine.md"] and first["mine.csv"].count(b"\n") == 1 + 2 * 4 * 2
    body = first["mine.tex"].decode().split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    columns = first["mine.tex"].decode().split(r"\begin{tabular}{")[1].split("}")[0]
    assert all(row.count("&") == len(columns) - 1 for row in body)


# ---------------------------------------------------------------------------------------------- studies


def study(name, result, model="toy", scheme="W4A8 g128"):
    common = {"protocol": {"window": 512, "windows": 20, "sequences": 16}, "full": {"perplexity": 2.0, "nll": nll(2.0)}}
    identity = {"kind": "study", "study": name, "model": {"name": model, "digest": "d"}, "scheme": scheme,
                "calibration": {"nsamples": 16, "seqlen": 256},
                "task": {"name": "world_wiki_ppl", "limit": None}}
    return Study(model, Record(identity, {"label": name, **common, **result}, fake.provenance()))


def nll(perplexity, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return list(511 * (np.log(perplexity) + np.linspace(-0.2, 0.2, 20) + noise * random.normal(size=20)))


def metrics(size):
    return {"cka": 1e-4 * size, "mse": 1e-3 * size, "cosine": 1e-3 * size, "sqnr": float(10 * np.log10(1e-3 * size))}


def degraded():
    points = [{"layer": i, "kind": kind, "size": size, "own": metrics(size * (1 + i)), "final": metrics(2 * size * (1 + i)),
               "perplexity": 2 + 0.01 * size * (1 + i), "accuracy": 0.9 - 0.01 * size}
              for i in range(4) for kind in ("bits", "noise") for size in (1, 4, 16)]
    return study("degradation", {"points": points, "accuracy_task": "world_math", "full_accuracy": 0.92})


def reconstructed():
    rows = [{"layer": layer, "bits": bits, "before": {**metrics(8), "nll": nll(2.4), "perplexity": 2.4},
             "after": {**metrics(2), "nll": nll(2.2, 0.001), "perplexity": 2.2}}
            for bits in (3, 2) for layer in (0, 1, None)]
    return study("reconstruction", {"rows": rows})


def swapped():
    layers = [{"layer": i, "chosen": "gptq", "swaps": {
        "awq": {"nll": nll(2.1 + 0.1 * (-1) ** i, 0.001, i), "perplexity": 2.1 + 0.1 * (-1) ** i, "distance": 1e-5},
        "smoothquant": {"nll": nll(2.3, 0.001, i), "perplexity": 2.3, "distance": 1e-4}}} for i in range(4)]
    return study("swaps", {"layers": layers, "nll": nll(2.1), "perplexity": 2.1, "requantized": True})


def exhausted():
    leaves = [{"choices": [a, b], "perplexity": 2 + 0.1 * i, "calibration_nll": 0.7 + 0.01 * i, **metrics(1 + i)}
              for i, (a, b) in enumerate((a, b) for a in fake.POOL for b in fake.POOL)]
    return study("exhaustive", {"pool": list(fake.POOL), "leaves": leaves})


def described():
    one = {"outlier_ratio": 3.0, "kurtosis": 4.0, "skewness": 0.1}
    layers = [{"layer": i, "inputs": {"qkv": one, "down": {**one, "outlier_ratio": 30.0 + i}}, "weights": {"qkv": one}}
              for i in range(4)]
    return study("statistics", {"layers": layers})


def costed():
    rows = [{"layers": layers, "candidates": n, "seconds": 0.5 * layers * n, "wall": 0.6 * layers * n,
             "peak_memory_mib": 500.0, "pool": list(fake.POOL[:n])} for layers, n in ((4, 1), (4, 2), (4, 3), (2, 3))]
    return study("cost", {"rows": rows, "tokens": 8192})


CHOICES = {("toy", "W4A8 g128"): ["gptq", "awq", "gptq", "smoothquant"]}
ALL = {"degradation": degraded, "reconstruction": reconstructed, "swaps": swapped, "exhaustive": exhausted,
       "statistics": described, "cost": costed}


def page(name, choices=CHOICES):
    made = plan.parse("mine", f"title: T\nsays: S\nstudy: {name}")
    files = studies.files(made, [ALL[name]()], choices, {"perplexity": [sheet()]}, {})
    assert set(files) == {"mine.md", "mine.csv", "mine.tex"} and len(files["mine.csv"].splitlines()) > 2
    return files["mine.md"].decode()


def test_degradation_tells_rank_correlations():
    text = page("degradation")
    assert "1 − CKA of the damaged layer | 1.00 [1.00, 1.00]" in " ".join(text.split()) and "math accuracy" in text


def test_spearman_by_its_formula():
    random = np.random.default_rng(0)
    x, y = random.normal(size=30), random.normal(size=30)
    from scipy.stats import spearmanr

    found = stats.spearman(x, y)
    assert found.value == pytest.approx(spearmanr(x, y).statistic) and found.low < found.value < found.high
    assert stats.spearman([1, 2, 2, 3], [1, 5, 5, 9]).value == pytest.approx(1)


def test_reconstruction_counts_what_helped():
    text = page("reconstruction")
    assert "raised CKA in 4 of 4 single layers, and perplexity fell in 4" in text and "3 bits, layer all" in text


def test_swaps_count_the_best_choices():
    text = " ".join(page("swaps").split())
    assert "| toy | 2 of 4 | 2 of 4 | quantized again |" in text  # in every second layer awq is better


def test_exhaustive_ranks_what_was_picked():
    text = " ".join(page("exhaustive", {("toy", "W4A8 g128"): ["gptq", "smoothquant"]}).split())
    assert "| greedy by CKA | gptq smoothquant | 2.2000 | +0.2000 | 3 |" in text and "9 assignments" in text


def test_statistics_show_the_largest_ratio_of_the_sites():
    assert "33.00" in page("statistics") and "smoothquant" in page("statistics")


def test_cost_beside_its_line():
    assert studies.per_candidate(costed()) == pytest.approx(0.5)
    assert "By method: toy" in page("cost")


# ---------------------------------------------------------------------------------------------- the paper


def test_the_papers_values_stand_as_they_are_and_ours_blank(tmp_path):
    rows = paper.rows(Store(tmp_path))
    known = [row for row in rows if row["paper"] is not None]
    assert len(known) == 19 and all(row["ours"] is None and row["verdict"] == "not run" for row in rows)
    assert round(100 * paper.paper_share()) == 60
    text = paper.files(Store(tmp_path), [sheet()])["paper.md"].decode()
    assert "12.72" in text and "toy, W4A8 g128" in text


def test_ours_beside_the_papers(tmp_path):
    store, model = Store(tmp_path), {"name": "meta-llama/Meta-Llama-3-8B", "digest": "d"}
    for method, value in (("cka-hybrid", 12.75), ("gptq", 13.0)):
        record = fake.evaluation(method, "c4_ppl", model=model)
        result = {**record.result, "metrics": {"perplexity,none": {"value": value, "stderr": None}}}
        store.put(Record(record.identity, result, record.provenance))
    rows = {row["method"]: row for row in paper.rows(store) if row["task"] == "c4_ppl"}
    assert rows["cka-hybrid"]["verdict"] == "matched"
    assert rows["gptq"]["verdict"] == "differs: windows of 512 tokens, the papers' have 2048; calibrated on 64 x 512 tokens"
    assert rows["gptq"]["difference"] == pytest.approx(13.0 - 14.12)
    assert rows["awq"]["verdict"] == "not run"


# ---------------------------------------------------------------------------------------------- figures


def searches():
    return sheet(lines=[line("layer", "cka-hybrid"), line("block of 2", "cka-hybrid", damage=0.05),
                        line("whole model", "gptq")], against="layer")


DRAWN = {
    "choices": lambda: figures.choices_by_depth([("a", ["gptq", "awq"]), ("b", ["gptq"] * 8)]),
    "candidates": lambda: figures.candidates(sheet(), "cka-hybrid"),
    "growth": lambda: figures.error_growth(sheet()),
    "metrics": lambda: figures.metrics([sheet(), sheet(model="other")]),
    "recovered": lambda: figures.recovered([sheet()]),
    "granularity": lambda: figures.granularity([searches()]),
    "sensitivity": lambda: figures.sensitivity([searches()]),
    "degradation": lambda: figures.degradation([degraded(), degraded()]),
    "reconstruction": lambda: figures.reconstruction([reconstructed()]),
    "swaps": lambda: figures.swaps([swapped()]),
    "statistics": lambda: figures.statistics([described()], CHOICES),
    "cost": lambda: figures.cost([costed()]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_pictures(name):
    found = plots.files(DRAWN[name](), name)
    height, width, _ = imread(io.BytesIO(found[f"{name}.png"])).shape
    assert height > 150 and width > 400
    ElementTree.fromstring(found[f"{name}.svg"].decode())


def test_the_pareto_joins_the_bits_of_a_method():
    low = sheet(scheme="W3A8 g128", lines=[line("gptq", "gptq", damage=0.3)])
    record = low.lines[0].repeats[0].quantization
    low.lines[0].repeats[0].quantization = Record(record.identity, {**record.result, "bits": 3.125}, record.provenance)
    panel = figures.pareto([sheet(), low]).axes[0]
    drawn = {handle.get_label(): handle.get_xydata().tolist() for handle in panel.get_lines()}
    assert [x for x, _ in drawn["gptq"]] == [3.125, 4.125] and drawn["gptq"][0][1] > drawn["gptq"][1][1]
    assert figures.pareto([sheet()]) is None  # one width is no curve


def test_panels_have_no_rows_that_are_empty_in_both():
    few = [line("gptq", "gptq"), line("cka-hybrid", "cka-hybrid")]
    figure = figures.metrics([sheet(), sheet(scheme="W3A8 g128"), sheet(model="m", lines=few),
                              sheet(model="m", lines=[few[0], line("awq", "awq")], scheme="W3A8 g128"), sheet(model="n")])
    rows = [[label.get_text() for label in panel.get_yticklabels()] for panel in figure.axes]
    every = [one.name for one in reversed(sheet().lines) if one.name != data.FULL]
    assert rows[0] == rows[4] == rows[2] == every  # those on the right have no labels of their own
    alone = figures.metrics([sheet(), sheet(), sheet(lines=few), sheet(lines=few[:1])]).axes[2]
    assert [label.get_text() for label in alone.get_yticklabels()] == ["cka-hybrid", "gptq"]


def test_a_page_tells_on_how_much_it_was_calibrated():
    def calibrated(model, *sizes):
        made = sheet(model=model)
        for one, size in zip(made.lines[1:], sizes):
            record = one.repeats[0].quantization
            changed = {**record.identity, "calibration": size and {"nsamples": size, "seqlen": 512}}
            one.repeats[0].quantization = Record(changed, record.result, record.provenance)
        return made

    sheets = [calibrated("a", 64, 64, 64), calibrated("b", 16, None, 16), calibrated("c", 8, 9, 9)]
    page = ablations.markdown(experiment(), sheets)
    assert "- Calibration tokens: 64 x 512 (a); 16 x 512 (b); as the rows say (c)." in page


def test_a_study_tells_on_how_much_each_model_was_measured():
    few = study("swaps", {}, model="large")
    few.record.result["protocol"] = {"window": 512, "windows": 5, "sequences": 4}
    same = "20 windows of 512 tokens, 16 calibration sequences of 256"
    assert studies._protocols([study("swaps", {}), study("swaps", {}, model="b")]) == f"{same}."
    assert studies._protocols([study("swaps", {}), few]) == (
        f"{same} (toy). 5 windows of 512 tokens, 4 calibration sequences of 256 (large).")


def test_nothing_to_draw_is_no_figure():
    empty = [figures.metrics, figures.recovered, figures.granularity, figures.sensitivity, figures.degradation,
             figures.reconstruction, figures.swaps, figures.cost, figures.choices_by_depth]
    assert all(draw([]) is None for draw in empty) and figures.statistics([], {}) is None
    assert figures.candidates(sheet(), "gptq") is None


def test_pages_need_no_torch():
    code = "import sys, suite.report.figures, suite.report.paper, suite.ablate.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
