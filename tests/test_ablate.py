"""Ablations: experiments as data, what is run and what need not be, and the studies on toys."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import toys
from test_experiments import FakeRunner

from suite import arch, calib, method, walk
from suite.ablate import book, plan, run, studies
from suite.ablate.probe import Probe
from suite.errors import PTQError
from suite.grid import Scheme
from suite.store import Store

GRID = """
title: A grid
tasks: perplexity
against: greedy
rows:
  - {name: greedy, method: cka-hybrid, options: {pool: [rtn, gptq, smoothquant]}}
  - {name: gptq, method: gptq, uniform: true}
  - {name: without smoothquant, method: cka-hybrid, options: {pool: [rtn, gptq]}}
  - {name: random, method: cka-hybrid, options: {pool: [rtn, gptq], pick: random}, repeat: {pick_seed: [0, 1]}}
  - {name: seeds, method: gptq, repeat: {seed: [0, 1]}, tasks: wiki}
  - {name: best, best_of: [gptq, greedy]}
  - {name: huge models only, method: rtn, layers: [100, 200]}
"""


# ---------------------------------------------------------------------------------------------- experiments as data


def test_every_experiment_of_the_suite_is_whole():
    """Parsed, its methods and options built; the tables of the paper are all there."""
    experiments = plan.load()
    run.check(experiments)
    assert {e.table for e in experiments if e.table} == set(range(1, 10))
    assert {e.study for e in experiments if e.study} == set(plan.STUDIES)
    assert {word for e in experiments for word in e.figures} == set(plan.FIGURES)
    assert {word for e in experiments for word in e.columns} <= set(plan.COLUMNS)


def test_a_grid_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(GRID)
    (experiment,) = plan.load([str(tmp_path / "mine.yaml")])
    rows = {row.name: row for row in experiment.rows}
    assert experiment.name == "mine" and experiment.against == "greedy"
    assert [options for options, _ in rows["random"].configurations()] == [
        {"pool": ["rtn", "gptq"], "pick": "random", "pick_seed": seed} for seed in (0, 1)]
    assert [sampling for _, sampling in rows["seeds"].configurations()] == [{"seed": 0}, {"seed": 1}]
    assert not rows["huge models only"].fits(8) and rows["huge models only"].fits(100) and rows["gptq"].fits(8)
    assert experiment.tasks_of(rows["seeds"], 8) == "wiki" and experiment.tasks_of(rows["gptq"], 8) == "perplexity"


def test_larger_models_may_have_fewer_tasks():
    experiment = plan.parse("x", "title: t\nlarge: {tasks: wiki}\nrows: [{name: a, method: rtn}]")
    (row,) = experiment.rows
    assert experiment.tasks_of(row, 4) == "perplexity" and experiment.tasks_of(row, 5) == "wiki"
    assert experiment.sampling_of(5) == {}


@pytest.mark.parametrize("given, cut, named, fast", [
    ({}, 16, 64, False), ({}, 4, 16, True), ({"nsamples": 32}, 32, 64, False)])
def test_larger_embedded_models_may_have_less_calibration(tmp_path, monkeypatch, given, cut, named, fast):
    """A row that names a number of its own keeps it, and so does a user who asks for one; a small model is not cut."""
    experiment = plan.parse("x", """
        title: t
        large: {nsamples: 16}
        rows: [{name: a, method: gptq}, {name: b, method: gptq, calibration: {nsamples: 64}}, {name: c, method: rtn}]
    """)

    def sizes(model):
        bench = run._bench(model, [experiment], run.Store(tmp_path), {"fast": fast, "seed": 0, **given})
        found = [one.planned.quantization(one.variant)["calibration"] for one in run._variants(
            bench, [experiment], run.Store(tmp_path, run.SHELF))]
        return [c and c["nsamples"] for c in found]

    assert sizes("tiny-qwen-m") == [cut, named, None]
    assert sizes("tiny-qwen-s")[0] == given.get("nsamples", 16 if fast else 64)


@pytest.mark.parametrize("text, message", [
    ("title: [", "not YAML"),
    ("- 1", "a mapping of keys is expected, list found"),
    ("rows: []", "no title"),
    ("title: x", "rows or a study"),
    ("title: x\nrowz: []", "unknown key of experiment x 'rowz': did you mean 'rows'"),
    ("title: x\ntable: one\nrows: []", "table is 'one': expected is int"),
    ("title: x\nstudy: exhausting", "unknown study of experiment x 'exhausting': did you mean 'exhaustive'"),
    ("title: x\nlarge: wiki\nrows: []", "large is 'wiki': expected is dict"),
    ("title: x\nlarge: {task: wiki}\nrows: []", "unknown key of experiment x, large 'task': did you mean 'tasks'"),
    ("title: x\nrows: [{name: a}]", "a name, and either a method or best_of"),
    ("title: x\nrows: [{name: a, method: rtn, optoins: {}}]", "unknown key of experiment x, row 1 'optoins'"),
    ("title: x\nrows: [{name: a, method: rtn}, {name: a, method: gptq}]", "row 'a' stands there twice"),
    ("title: x\nagainst: b\nrows: [{name: a, method: rtn}]", "unknown row in against of experiment x 'b'"),
    ("title: x\nrows: [{name: a, best_of: [b]}]", "unknown row in best_of of 'a'"),
    ("title: x\nfigures: [parreto]\nrows: [{name: a, method: rtn}]", "unknown word in figures.*did you mean 'pareto'"),
    ("title: x\ntasks: perplexities\nrows: [{name: a, method: rtn}]", "unknown tasks of experiment x"),
    ("title: x\nrows: [{name: a, method: rtn, repeat: {seed: [1], alpha: [2]}}]", "repeat varies one option, 2 found"),
    ("title: x\nrows: [{name: a, method: rtn, calibration: {samples: 3}}]", "unknown key in calibration"),
])
def test_a_mistake_in_a_file_is_named(text, message):
    with pytest.raises(PTQError, match=message):
        plan.parse("x", text)


def test_unknown_experiments_and_files():
    with pytest.raises(PTQError, match="unknown experiment 'pol': did you mean 'pool'"):
        plan.load(["pol"])
    with pytest.raises(PTQError, match="experiment file '/nowhere/x.yaml' does not exist"):
        plan.load(["/nowhere/x.yaml"])


def test_mistakes_of_methods_and_options_are_found_before_any_work():
    wrong = plan.parse("x", "title: x\nrows: [{name: a, method: gptqq}, {name: b, method: cka-hybrid, "
                            "options: {metric: ckaa}}]")
    with pytest.raises(PTQError, match="row 'a': unknown method 'gptqq'.*row 'b': unknown metric 'ckaa'"):
        run.check([wrong])


# ---------------------------------------------------------------------------------------------- running


class HybridRunner(FakeRunner):
    """The hybrid of three chooses gptq everywhere; scores say so."""

    def quantize(self, progress=None):
        made = super().quantize(progress)
        pool = getattr(self.variant.method, "pool", None)
        if pool:
            scores = {name: {"cka": 1.0 + i, "mse": 1.0} for i, name in enumerate(sorted(pool))}  # gptq < rtn < smooth
            made["layers"] = [{**layer, "chosen": min(scores, key=lambda n: scores[n]["cka"]), "candidates": scores,
                               "margin": 1.0} for layer in made["layers"]]
        return made


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(FakeRunner, "calls", [])
    return HybridRunner


@pytest.fixture
def ablate(tmp_path, toy_folder, toy_text_file, runner):
    def ablate(text=GRID, asked=False, **changes):
        given = dict(root=tmp_path / "results", calib_source=str(toy_text_file), nsamples=2, seqlen=64, runner=runner,
                     whole=False, tasks=("world_wiki_ppl", "world_chat_ppl", "world_events")) | changes
        return run.ablate([str(toy_folder)], [replace(plan.parse("mine", text), asked=asked)], **given)
    ablate.root = tmp_path / "results"
    return ablate


def test_only_what_a_grid_asks_for_is_run_and_it_lands_on_the_shelf(ablate, runner):
    done = ablate()
    evaluated = [call for call in runner.calls if call[1] != "quantize"]
    labels = {label for label, _ in evaluated}
    assert ("gptq", "world_chat_ppl") in evaluated and ("gptq", "world_events") not in evaluated
    assert "cka-hybrid pool=rtn|gptq" not in labels  # follows from the wider search
    assert "cka-hybrid pool=rtn|gptq pick=random pick_seed=1" in labels and "rtn" not in labels
    assert {record.result["label"] for record in Store(ablate.root).records()} == {"fp16", "gptq"}  # of the main table
    assert done.implied == 2
    (sheet,) = done.sheets["mine"]
    assert [line.name for line in sheet.lines] == ["greedy", "gptq", "without smoothquant", "random", "seeds", "best"]
    assert [len(line.repeats) for line in sheet.lines] == [1, 1, 1, 2, 2, 2]
    followed = sheet.line("without smoothquant").repeats[0].quantization.result
    assert followed["follows_from"]["label"] == "cka-hybrid pool=rtn|gptq|smoothquant" and followed["seconds"] is None


def test_a_first_look_takes_the_first_scheme(ablate, runner):
    text = """title: x
schemes: [{wbits: 4, abits: 8}, {wbits: 3, abits: 8}]
rows: [{name: a, method: gptq}, {name: b, method: rtn, schemes: []}, {name: c, method: awq, schemes: [{wbits: 3}]}]"""
    looked, whole = ablate(text, fast=True).sheets["mine"], ablate(text).sheets["mine"]
    told = [[(sheet.scheme[:4], line.name) for sheet in sheets for line in sheet.lines if line.repeats]
            for sheets in (looked, whole)]
    assert told[0] == [("W4A8", "a"), ("W3A8", "c")]
    assert {name for _, name in told[1]} == {"a", "c"} and ("W3A8", "a") in told[1]


def test_further_schemes_are_measured_when_asked_for_and_shown_when_they_are_there(ablate, runner):
    """An experiment that is not named leaves them alone, as long as not all of a scheme is in the store."""
    text = """title: x
further: [{wbits: 3, abits: 8}]
rows: [{name: a, method: gptq}, {name: b, method: awq, schemes: [], further: [{wbits: 4, abits: 8}]}]"""

    def shown(text, asked):
        done = ablate(text, asked=asked)
        return done.measured, [(sheet.scheme[:4], line.name) for sheet in done.sheets["mine"] for line in sheet.lines]

    assert shown(text, False)[1] == [("W4A8", "a")]
    measured, lines = shown(text, True)
    assert measured > 0 and lines == [("W4A8", "a"), ("W4A8", "b"), ("W3A8", "a")]
    assert shown(text, False) == (0, lines)
    assert shown(text.replace("name: a,", "name: a, options: {damp: 0.02},"), False)[1] == [("W4A8", "a"), ("W4A8", "b")]


def test_a_study_at_a_further_scheme_is_done_when_asked_for(tmp_path, runner, monkeypatch):
    text = "title: x\nstudy: statistics\noptions: {sequences: 2}\nfurther: [{wbits: 3, abits: 8}]"
    experiment = plan.parse("mine", text)
    bench = run._bench("tiny-llama-s", [experiment], run.Store(tmp_path), {"fast": False, "seed": 0})
    schemes = {asked: [job.identity["scheme"][:4] for job, *_ in run._studies(
        [bench], [replace(experiment, asked=asked)], run.Store(tmp_path))] for asked in (False, True)}
    assert schemes == {False: ["W4A8"], True: ["W4A8", "W3A8"]}
    job = run._studies([bench], [replace(experiment, asked=True)], run.Store(tmp_path))[1][0]
    run.Store(tmp_path).put(run.Record(job.identity, {"label": "statistics"}, run.provenance.provenance(run._Unmeasured())))
    assert len(run._studies([bench], [experiment], run.Store(tmp_path))) == 2


def test_what_is_asked_for_by_name_has_its_further_schemes():
    assert {e.asked for e in plan.load(["exhaustive", "pool"])} == {True} and {e.asked for e in plan.load()} == {False}
    assert [measured for _, measured in plan.load(["exhaustive"])[0].schemes_of()] == [True, True]


def test_a_second_run_measures_nothing_and_an_interrupted_one_continues(ablate, runner, monkeypatch):
    monkeypatch.setattr(FakeRunner, "fail_at", 4)
    with pytest.raises(KeyboardInterrupt):
        ablate()
    before = len([call for call in runner.calls if call[1] != "quantize"])
    monkeypatch.setattr(FakeRunner, "fail_at", None)
    first = ablate()
    assert first.measured + before > first.measured > 0
    runner.calls.clear()
    assert ablate().measured == 0 and runner.calls == []


def test_what_a_large_model_needs_is_told_and_refused_before_any_work(ablate, runner, monkeypatch):
    from suite import experiments, preflight

    told = []
    ablate(announce=told.append)
    assert told == []  # a toy is small
    monkeypatch.setattr(experiments, "SMALL_WIDTH", 0)
    monkeypatch.setattr(preflight, "rate", lambda *_: 1e9)
    ablate(root=ablate.root / "large", announce=told.append)
    assert len(told) == 1 and "needs" in told[0] and "evaluation comes on top" in told[0]
    monkeypatch.setattr(preflight.Free, "now", classmethod(lambda cls, *_: cls(0, 1000, 10**12)))
    runner.calls.clear()
    with pytest.raises(PTQError, match="memory"):
        ablate(root=ablate.root / "lacking")
    assert runner.calls == []


def test_the_main_table_is_reused(ablate, runner, toy_folder, toy_text_file):
    from suite.experiments import reproduce

    reproduce(str(toy_folder), ["fp16", "gptq"], ["world_wiki_ppl", "world_chat_ppl", "world_events"],
              store=Store(ablate.root), calib_source=str(toy_text_file), nsamples=2, seqlen=64, runner=runner)
    runner.calls.clear()
    ablate()
    assert not [call for call in runner.calls if call[0] == "gptq" and call[1] == "world_chat_ppl"]


def options(**changes):
    return method.to_config(method.build("cka-hybrid", **changes))["options"]


LAYERS = [{"chosen": "gptq", "candidates": {"gptq": {"cka": 1.0, "mse": 2.0}, "awq": {"cka": 2.0, "mse": 3.0},
                                            "smoothquant": {"cka": 3.0, "mse": 1.0}}}]


@pytest.mark.parametrize("changes, expected", [
    ({"pool": "gptq|awq"}, True),
    ({"pool": "awq|gptq"}, True),
    ({"pool": "awq|smoothquant"}, False),  # what was chosen is not there
    ({"pool": "gptq|rtn"}, False),  # somebody new
    ({"metric": "mse"}, False),  # another would win
    ({"metric": "mse", "pool": "gptq|awq"}, True),
    ({"metric": "kl"}, False),  # was not scored
    ({"metric": "cosine"}, False),
    ({"block": 2}, False),
    ({"unit": "site"}, False),
    ({"pick": "farthest"}, False),
    ({"search": "beam", "width": 2}, False),
    ({"refine": "nll"}, False),
    ({"wbits": 3}, False),
])
def test_what_follows_from_a_wider_search(changes, expected):
    assert run.implied(options(**changes), options(), LAYERS) is expected


def test_what_follows_is_what_a_run_gives(make_toy):
    """The implied choices are those of the search itself, bit for bit the same model."""
    data = calib.from_tokens(torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0)))
    models = [make_toy("llama", layers=3) for _ in range(2)]
    wide = walk.quantize_model(method.build("cka-hybrid", pool="rtn|gptq|smoothquant"), models[0], data)
    small = "|".join(sorted({layer["chosen"] for layer in wide} | {"rtn"}))
    assert run.implied(options(pool=small), options(pool="rtn|gptq|smoothquant"), wide)
    walk.quantize_model(method.build("cka-hybrid", pool=small), models[1], data)
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_equals_imply_nothing():
    layers = [{"chosen": "gptq", "candidates": {"gptq": {"cka": 1.0}, "awq": {"cka": 1.0}}}]
    assert not run.implied(options(pool="gptq|awq"), options(), layers)


# ---------------------------------------------------------------------------------------------- studies


class Context:
    @staticmethod
    def tell(share, text):
        assert 0 <= share <= 1


def tokens(n, seed):
    return torch.randint(512, (n, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def probe(make_toy):
    model = make_toy("llama", layers=3)
    with torch.no_grad():
        arch.layers(model)[1].input_layernorm.weight[:4] *= 50
    return Probe(model, calib.from_tokens(tokens(4, 0)), tokens(3, 1))


def direct(model, windows):
    logits = model(windows).logits[:, :-1].detach().double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return float(nll.exp())


def again(probe):
    """The probe's model, once more."""
    import copy

    return copy.deepcopy(probe.model)


def test_all_assignments_are_those_of_whole_models(probe):
    pool, scheme = ("rtn", "smoothquant"), Scheme.of(wbits=3)
    found = studies.exhaustive(probe, scheme, Context, pool)
    assert [tuple(leaf["choices"]) for leaf in found["leaves"]] == list(itertools.product(pool, repeat=3))
    for leaf in found["leaves"][::3]:
        model = again(probe)
        walk.quantize_model(method.build("cka-hybrid", pool=pool, choices=leaf["choices"], wbits=3), model,
                            probe.calibration)
        assert leaf["perplexity"] == pytest.approx(direct(model, probe.test.tokens), rel=1e-5)
        assert leaf["calibration_nll"] == pytest.approx(
            float(torch.log(torch.tensor(direct(model, probe.calib.tokens)))), rel=1e-5)


@pytest.mark.parametrize("requantize", [True, False])
def test_swaps_change_one_layer(probe, requantize):
    pool = ("rtn", "smoothquant")
    found = studies.swaps(probe, Scheme.of(wbits=3), Context, pool, requantize)
    names = [layer["chosen"] for layer in found["layers"]]
    model = again(probe)
    records = walk.quantize_model(method.build("cka-hybrid", pool=pool, wbits=3), model, probe.calibration)
    assert names == [record["chosen"] for record in records]
    assert found["perplexity"] == pytest.approx(direct(model, probe.test.tokens), rel=1e-5)
    for i, layer in enumerate(found["layers"]):
        (other,) = set(pool) - {names[i]}
        choices = [*names[:i], other, *names[i + 1:]]
        model = again(probe)
        walk.quantize_model(method.build("cka-hybrid", pool=pool, choices=choices, wbits=3), model, probe.calibration)
        same = layer["swaps"][other]["perplexity"] == pytest.approx(direct(model, probe.test.tokens), rel=1e-5)
        assert same or not requantize  # frozen layers are those of another prefix
    last = found["layers"][-1]
    assert all(abs(swap["perplexity"] - found["perplexity"]) > 0 for swap in last["swaps"].values())


def test_swaps_choose_on_the_tokens_that_the_hybrid_scores_on(probe):
    """Methods see all of the calibration text, scores a part: with another part it would be another hybrid."""
    pool, data = ("rtn", "smoothquant"), replace(probe.calibration, batch_tokens=32)
    laid_out = Probe(again(probe), data, probe.test.tokens)
    records = walk.quantize_model(method.build("cka-hybrid", pool=pool, wbits=3, score_tokens=1), again(probe), data)
    expected = [abs(record["candidates"]["rtn"]["cka"] - record["candidates"]["smoothquant"]["cka"]) for record in records]

    def added(score_tokens):
        found = studies.swaps(laid_out, Scheme.of(wbits=3), Context, pool, score_tokens=score_tokens)
        return [swap["distance"] for layer in found["layers"] for swap in layer["swaps"].values()]

    assert added(1) == pytest.approx(expected, rel=1e-3)
    assert added(128) != pytest.approx(expected, rel=1e-2)


def test_damage_grows_with_its_size_and_leaves_the_model_alone(probe):
    before = {key: value.clone() for key, value in probe.model.state_dict().items()}
    found = studies.degradation(probe, Scheme(), Context, bits=(6, 2), noise=(0.1, 1.0))
    assert len(found["points"]) == 3 * 4
    for layer in range(3):
        mine = {(p["kind"], p["size"]): p for p in found["points"] if p["layer"] == layer}
        for small, large in ((("bits", 6), ("bits", 2)), (("noise", 0.1), ("noise", 1.0))):
            for metric in ("cka", "mse", "cosine", "sqnr"):
                assert mine[small]["own"][metric] < mine[large]["own"][metric]
            assert mine[small]["final"]["cka"] < mine[large]["final"]["cka"]
    after = probe.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_linear_damage_is_undone_by_the_map():
    x = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    matrix, shift = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8.0)
    repaired = studies.fit(x @ matrix + shift, x, 1e-9)(x @ matrix + shift)
    assert torch.allclose(repaired, x, atol=1e-3)
    strong = studies.fit(x @ matrix, x, 1e9)(x @ matrix)  # shrunk to the identity, but for the mean
    assert torch.allclose(strong - strong.mean((0, 1)), (x @ matrix) - (x @ matrix).mean((0, 1)), atol=1e-3)


def test_reconstruction_raises_cka_where_it_was_fitted(probe):
    found = studies.reconstruction(probe, Scheme(), Context, bits=(2,))
    assert [row["layer"] for row in found["rows"]] == [0, 1, 2, None]
    model = again(probe)
    for view in walk.walk(model, probe.calibration):
        walk.commit(model, view, method.build("rtn", wbits=2, abits=16).quantize(view))
    assert found["rows"][-1]["before"]["perplexity"] == pytest.approx(direct(model, probe.test.tokens), rel=1e-4)
    assert all(row["after"]["cka"] != row["before"]["cka"] for row in found["rows"])


def test_moments_by_their_formulas():
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    found = studies.moments(x)
    assert abs(found["kurtosis"] - 3) < 0.2 and abs(found["skewness"]) < 0.1 and 1 <= found["outlier_ratio"] < 2
    x[:, 3] *= 50
    assert studies.moments(x)["outlier_ratio"] > 30 and studies.moments(x)["kurtosis"] > 6


def test_statistics_see_the_planted_channels(probe):
    found = studies.statistics(probe, Scheme(), Context)["layers"]
    ratios = [layer["inputs"]["qkv"]["outlier_ratio"] for layer in found]
    assert ratios[1] > 10 * max(ratios[0], ratios[2])
    assert all(set(layer["weights"]) == {"qkv", "o", "gate_up", "down"} for layer in found)


@pytest.mark.slow
def test_all_experiments_end_to_end(tmp_path, toy_text_file):
    """Every experiment of the suite on a toy of two layers: measured, drawn, and found again."""
    folder = toys.save_toy(tmp_path / "toy", layers=2)
    wanted = plan.load(plan.names())
    given = dict(root=tmp_path / "results", calib_source=str(toy_text_file), nsamples=2, seqlen=64, limit=2, workers=1,
                 fast=True, tasks=("world_wiki_ppl", "world_events"), whole=False)
    done = run.ablate([str(folder)], wanted, **given)
    paths = book.write(done, wanted, tmp_path / "results")
    assert {path.stem for path in paths if path.suffix == ".md"} == {*plan.names(), "paper"}
    assert {path.parent.name for path in paths} == {"ablations-limit2"}
    pictures = {path.name for path in paths if path.suffix == ".png"}
    assert "bits-pareto.png" in pictures
    for experiment in wanted:  # a name may begin another: low-bits, low-bits-further
        drawn = [name for name in pictures if name.startswith(f"{experiment.name}-")]
        assert len(drawn) >= len(experiment.figures), (experiment.name, drawn)
    assert all(path.stat().st_size > 100 for path in paths)
    assert "not run" not in (tmp_path / "results/ablations-limit2/metric.md").read_text()
    again = run.ablate([str(folder)], wanted, **given)
    assert (again.measured, again.implied) == (0, 0) and again.found > 0


@pytest.mark.slow
def test_studies_for_real_leave_records(toy_folder, toy_text_file, tmp_path):
    """Through the workers' interface: found again, and not run twice."""
    texts = ["title: a\nstudy: degradation\noptions: {bits: [3], noise: [], accuracy: true, documents: 3, windows: 2}",
             "title: b\nstudy: cost\noptions: {pool: [rtn, gptq], candidates: [1, 2], shares: [0.5, 1.0]}"]
    wanted = [plan.parse(f"study{i}", text) for i, text in enumerate(texts)]
    given = dict(root=tmp_path, calib_source=str(toy_text_file), nsamples=2, seqlen=64, limit=3, whole=False, workers=1,
                 tasks=("world_wiki_ppl", "world_events"))
    first = run.ablate([str(toy_folder)], wanted, **given)
    assert first.measured >= 2 and set(first.studies) == {"study0", "study1"}
    points = first.studies["study0"][0].result["points"]
    assert all(0 <= point["accuracy"] <= 1 for point in points)
    assert run.ablate([str(toy_folder)], wanted, **given).measured == 0
