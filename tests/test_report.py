"""Tables and plots from invented records whose winners are known."""

import csv
import io
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import fake_records as fake
import pytest
from matplotlib.image import imread

from suite import report
from suite.report import data, plots, tables
from suite.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


@pytest.fixture
def comparison(store):
    fake.fill(store)
    return data.compare(store, fake.setting())


def cell(comparison, label, column):
    """A cell of the Markdown table by its row and heading (the first of that name)."""
    lines = [line for line in tables.markdown(comparison).splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    return next(row for row in rows if row[0] == label)[rows[0].index(column)]


# ---------------------------------------------------------------------------------------------- tables


def test_rows_and_columns_stand_in_order(comparison):
    assert [row.label for row in comparison.rows] == list(fake.METHODS)  # compositions behind their transform
    assert comparison.tasks == list(fake.TASKS)


def test_the_csv_holds_every_number(comparison):
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(tables.csv(comparison)))}
    gptq, full = rows["gptq"], rows["fp16"]
    assert float(gptq["effective_bits"]) == 4.125 and float(full["effective_bits"]) == 16
    assert float(gptq["seconds"]) == 2.0
    difference = float(gptq["world_wiki_ppl"]) - float(full["world_wiki_ppl"])
    assert float(gptq["world_wiki_ppl_delta"]) == pytest.approx(difference, rel=1e-5)
    assert float(gptq["world_wiki_ppl_delta_low"]) < difference < float(gptq["world_wiki_ppl_delta_high"])
    mean = sum(float(gptq[task]) for task in fake.TASKS[2:]) / 3
    assert float(gptq["mean_accuracy"]) == pytest.approx(mean, rel=1e-6)
    assert full["world_wiki_ppl_delta"] == ""


def test_missing_cells_say_not_run(store):
    fake.fill(store, methods=("fp16", "gptq"))
    store.put(fake.evaluation("awq", "world_math", 0.1))
    comparison = data.compare(store, fake.setting(), methods=("rtn",), tasks=("world_code",))
    assert cell(comparison, "awq", "wiki PPL") == "not run" and cell(comparison, "awq", "bits") == "not run"
    assert cell(comparison, "awq", "math %") != "not run" and cell(comparison, "awq", "mean %") == "not run"
    assert cell(comparison, "rtn", "seconds") == cell(comparison, "gptq", "code %") == "not run"
    for render in (tables.csv, tables.latex, tables.terminal):
        assert render(comparison)


def test_an_empty_store_still_renders(store):
    comparison = data.compare(store, fake.setting(), fake.METHODS, fake.TASKS)
    assert tables.markdown(comparison).count("not run") > 40


def test_bold_only_where_better_than_the_second_by_the_paired_test(store):
    """gptq is better by 0.05 nats in every window: bold. Where only noise differs: not, though it is still the best."""
    for method, damage in (("fp16", 0.0), ("gptq", 0.05), ("awq", 0.1)):
        store.put(fake.evaluation(method, "world_wiki_ppl", damage, noise=0.01))
    for method, damage in (("fp16", 0.0), ("gptq", 0.0500), ("awq", 0.0501)):
        store.put(fake.evaluation(method, "world_chat_ppl", damage, noise=0.05))
    comparison = data.compare(store, fake.setting())
    assert data.best(comparison, "world_wiki_ppl") == "gptq" and cell(comparison, "gptq", "wiki PPL").startswith("**")
    assert data.best(comparison, "world_chat_ppl") is None
    assert "**" not in cell(comparison, "gptq", "chat PPL") and "**" not in cell(comparison, "awq", "chat PPL")


def test_full_precision_is_never_bold(comparison):
    full, hybrid = (comparison.row(label).scores["world_wiki_ppl"].value for label in ("fp16", "cka-hybrid"))
    assert full < hybrid
    columns = ("wiki PPL", "chat PPL", "math %", "mean %")
    assert "**" not in " ".join(cell(comparison, "fp16", column) for column in columns)
    assert data.best(comparison, "world_wiki_ppl") == "cka-hybrid"


def test_equal_results_are_not_bold(store):
    """A hybrid that chose gptq everywhere is gptq."""
    for method in ("gptq", "cka-hybrid"):
        record = fake.evaluation("gptq", "world_wiki_ppl", 0.05)
        identity = {**record.identity, "method": {"method": method, "options": {}}}
        store.put(fake.Record(identity, {**record.result, "label": method}, record.provenance))
    comparison = data.compare(store, fake.setting())
    assert len(comparison.rows) == 2 and data.best(comparison, "world_wiki_ppl") is None


def test_a_single_quantized_row_beats_nobody(store):
    fake.fill(store, methods=("fp16", "gptq"))
    comparison = data.compare(store, fake.setting())
    assert all(data.best(comparison, task) is None for task in fake.TASKS) and data.best_mean(comparison) is None


def test_the_mean_needs_all_tasks_and_is_tested_too(store):
    for method, damage in (("gptq", 0.0), ("awq", 0.4)):
        for task in fake.TASKS[2:]:
            store.put(fake.evaluation(method, task, damage))
    comparison = data.compare(store, fake.setting())
    assert data.best_mean(comparison) == "gptq"
    assert cell(comparison, "gptq", "mean %").startswith("**")


def test_a_difference_is_paired(comparison):
    """The windows differ by far more than the methods: an unpaired interval would be ten times as wide."""
    found = tables.delta(comparison, comparison.row("gptq"), "world_wiki_ppl")
    own = tables.stats.interval(comparison.row("gptq").scores["world_wiki_ppl"].sample)
    assert found.high - found.low < 0.2 * (own.high - own.low)


def test_the_caption_says_what_the_numbers_are(comparison):
    text = tables.caption(comparison)
    for part in ("W4A8 g128", "matched mode", "embedded, 64 x 512 tokens, seed 0", "ca11ca11ca11", "All documents",
                 "windows of 512 tokens", "BOS: none", "torch 2.13.0", "lm-eval 0.4.13", "float32"):
        assert part in text


def test_limited_tables_say_so(store):
    for method in ("fp16", "gptq"):
        store.put(fake.evaluation(method, "world_math", limit=64))
    comparison = data.compare(store, fake.setting(limit=64))
    assert "LIMITED to the first 64 documents" in tables.markdown(comparison)
    assert "LIMITED" in tables.terminal(comparison)


def test_an_overlap_of_calibration_and_evaluation_is_marked(store):
    record = fake.evaluation("gptq", "world_wiki_ppl", 0.1)
    store.put(fake.Record(record.identity, {**record.result, "calibrated_on_this_text": True}, record.provenance))
    comparison = data.compare(store, fake.setting())
    assert cell(comparison, "gptq", "wiki PPL").endswith("†")
    assert "Calibrated on the text" in tables.markdown(comparison)


def test_planted_models_are_named_as_planted(store):
    fake.fill(store, model="toy@outliers=8,seed=1", methods=("fp16", "gptq"))
    paths = report.write(store, fake.setting("toy@outliers=8,seed=1"))
    assert all("planted-outliers-8-seed-1" in str(path) for path in paths)
    assert paths[0].read_text().startswith("# toy with PLANTED outliers (severity 8, seed 1)")
    assert "PLANTED" in report.terminal_table(store, fake.setting("toy@outliers=8,seed=1"))


def test_latex_is_escaped(store):
    store.put(fake.evaluation("gptq", "world_math"))
    store.put(fake.evaluation("awq", "odd_task"))
    text = tables.latex(data.compare(store, fake.setting()))
    assert r"math \%" in text and r"odd\_task \%" in text and r"$\pm$" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
    assert all(row.count("&") == len(columns) - 1 for row in body.strip().splitlines())


def test_a_task_in_two_versions_never_shares_a_column(store):
    """The one measured last counts; whoever was measured on the other is not run."""
    old, new = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    for method, date, digest in (("gptq", old, "old"), ("awq", old, "old"), ("gptq", new, "new")):
        record = fake.evaluation(method, "world_math", date=date)
        task = {**record.identity["task"], "digest": digest}
        store.put(fake.Record({**record.identity, "task": task}, record.result, record.provenance))
    comparison = data.compare(store, fake.setting())
    assert cell(comparison, "gptq", "math %") != "not run" == cell(comparison, "awq", "math %")


# ---------------------------------------------------------------------------------------------- settings


def test_settings_are_found_from_the_records_alone(store):
    fake.fill(store)
    fake.fill(store, scheme="W3A8 g128", methods=("rtn", "gptq"))
    for method in ("fp16", "rtn", "gptq"):
        store.put(fake.evaluation(method, "world_math", limit=64))
    stems = [setting.stem for setting in data.settings(store, "toy")]
    assert stems == ["W3A8-g128-matched-embedded-64x512", "W4A8-g128-matched-embedded-64x512",
                     "W4A8-g128-matched-embedded-64x512-limit64"]
    three = data.compare(store, data.settings(store, "toy")[0])
    assert [row.label for row in three.rows] == ["fp16", "rtn", "gptq"]  # full precision stands in every table


def test_of_two_library_versions_the_last_is_shown(store):
    for torch, date in (("2.12.0", "2026-01-01T00:00:00+00:00"), ("2.13.0", "2026-02-01T00:00:00+00:00")):
        store.put(fake.evaluation("gptq", "world_math", date=date, libraries={**fake.LIBRARIES, "torch": torch}))
    (setting,) = data.settings(store, "toy")
    assert setting.libraries["torch"] == "2.13.0"
    (row,) = data.compare(store, setting).rows
    assert row.scores["world_math"].record.identity["libraries"]["torch"] == "2.13.0"


# ---------------------------------------------------------------------------------------------- files


def test_the_same_records_give_the_same_bytes(store):
    fake.fill(store)
    first = {path: path.read_bytes() for path in report.write(store, fake.setting())}
    assert {path: path.read_bytes() for path in report.write(store, fake.setting())} == first
    assert {path.suffix for path in first} == {".md", ".csv", ".tex", ".png", ".svg"}


def test_plots_are_pictures_with_their_words(store):
    fake.fill(store)
    fake.fill(store, model="toy@outliers=8,seed=0", tasks=("world_wiki_ppl",), severity=2)
    paths = report.write(store, fake.setting()) + report.severity_figure(store, fake.setting())
    kinds = {path.stem.removeprefix(fake.setting().stem).strip("-") for path in paths if path.suffix == ".png"}
    assert kinds == {"choices", "candidates", "error-growth", "severity"}
    for path in paths:
        if path.suffix == ".png":
            height, width, _ = imread(path).shape
            assert height > 300 and width > 600
        elif path.suffix == ".svg":
            ElementTree.parse(path)


def test_the_hybrids_choices_are_drawn_as_recorded(comparison):
    row = comparison.row("cka-hybrid")
    figure = plots.choices(comparison, row)
    strip = figure.axes[0]
    colours = [patch.get_facecolor() for patch in strip.patches]
    expected = [plots.matplotlib.colors.to_rgba(plots.style(layer["chosen"])[0]) for layer in row.layers]
    assert colours == expected
    heights = [bar.get_height() for bar in figure.axes[-1].patches]
    assert heights == pytest.approx([layer["margin"] for layer in row.layers])
    allocation = [text.get_text() for text in figure.axes[1].texts]
    assert allocation == [str(layer["wbits"]) for layer in comparison.row("mp-gptq").layers]


def test_styles_differ_without_colour():
    """Among the methods of the main table, each marker, line and hatch is used once."""
    styles = [plots.style(method) for method in (*fake.METHODS, "spinquant")]
    for part in (1, 3):
        assert len({style[part] for style in styles}) >= len(styles) - 1  # full precision has none, gptq a plain fill
    assert len({str(style[2]) for style in styles}) >= len(styles) - 1


def test_a_layer_without_a_margin_or_error_is_drawn_too(store):
    """One candidate has no runner-up; a block's inner layers have no error of their own."""
    record = fake.quantization("cka-hybrid")
    layers = [{**layer, "margin": None, "errors": None} if i % 2 else {**layer, "margin": 0.0}
              for i, layer in enumerate(record.result["layers"])]
    store.put(fake.Record(record.identity, {**record.result, "layers": layers}, record.provenance))
    store.put(fake.evaluation("cka-hybrid", "world_math"))
    assert any("choices" in path.name for path in report.write(store, fake.setting()))


def test_severity_needs_two_points(store):
    fake.fill(store, methods=("fp16", "gptq"))
    assert report.severity_figure(store, fake.setting()) == []


def test_write_all_writes_every_setting(store):
    fake.fill(store, methods=("fp16", "gptq"))
    fake.fill(store, methods=("gptq",), scheme="W3A8 g128")
    names = {path.name for path in report.write_all(store, "toy") if path.suffix == ".md"}
    assert names == {"W3A8-g128-matched-embedded-64x512.md", "W4A8-g128-matched-embedded-64x512.md"}


def test_the_terminal_shows_the_paths(store):
    fake.fill(store, methods=("fp16", "gptq"))
    paths = report.write(store, fake.setting())
    text = report.terminal_table(store, fake.setting(), paths)
    assert all(str(path) in text for path in paths) and "gptq" in text


def test_the_report_needs_no_torch():
    """Tables can be written again on a machine without it."""
    code = "import sys, suite.report; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
