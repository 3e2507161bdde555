"""Grids of runs: only what is missing is computed, nothing is lost, and nothing is mixed up."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest
import torch

from suite import calib, experiments, measuring, method, variants
from suite.errors import PTQError
from suite.evaluation import Tasks, outcome_of
from suite.experiments import reproduce
from suite.store import Store
from suite.variants import label

TASKS = ("world_wiki_ppl", "world_events")
METHODS = ("fp16", "rtn", "gptq")


class FakeRunner:
    """Counts what it is asked for. fail_at: the call of `evaluate` that is interrupted."""

    calls: list = []
    fail_at: int | None = None

    def __init__(self, model, variant, **_):
        self.variant = variant

    def quantize(self, progress=None):
        self.calls.append((self.variant.label, "quantize"))
        layers = [{"layer": i, "seconds": 0.1, "weights": 10, "bits": 4.125} for i in range(2)]
        return {"layers": layers, "bits": 4.125, "seconds": 0.2, "peak_memory_mib": 1.0}

    def evaluate(self, tests, task):
        if len([call for call in self.calls if call[1] != "quantize"]) == type(self).fail_at:
            raise KeyboardInterrupt
        self.calls.append((self.variant.label, task))
        result = dict(fake.evaluation("gptq", task).result)
        del result["label"]
        return result


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(FakeRunner, "calls", [])
    monkeypatch.setattr(FakeRunner, "fail_at", None)
    return FakeRunner


@pytest.fixture
def run(tmp_path, toy_folder, toy_text_file, runner):
    """`reproduce` on the toy with a runner that only counts."""
    def run(methods=METHODS, tasks=TASKS, **arguments):
        given = {"store": run.store, "runner": runner} | run.given | arguments
        return reproduce(str(toy_folder), methods, tasks, **given)
    run.store, run.folder = Store(tmp_path / "results"), str(toy_folder)
    run.given = dict(calib_source=str(toy_text_file), nsamples=2, seqlen=64)
    return run


def test_everything_is_run_once_and_stored(run, runner):
    outcome = run()
    assert runner.calls == [(m, what) for m in METHODS for what in ("quantize", *TASKS)]
    assert (outcome.measured, outcome.found) == (6, 0)
    assert len(list(run.store.records())) == 9
    assert all(outcome.setting.holds(record.identity) for record in run.store.records())


def test_a_rerun_runs_nothing(run, runner):
    run()
    runner.calls.clear()
    outcome = run()
    assert runner.calls == []
    assert (outcome.measured, outcome.found) == (0, 6)


def test_only_what_is_missing_is_run(run, runner):
    run(METHODS[:2], TASKS[:1])
    runner.calls.clear()
    run()
    assert runner.calls == [("fp16", "quantize"), ("fp16", TASKS[1]), ("rtn", "quantize"), ("rtn", TASKS[1]),
                            ("gptq", "quantize"), ("gptq", TASKS[0]), ("gptq", TASKS[1])]


def test_an_interruption_loses_nothing_that_was_finished(run, runner, monkeypatch):
    monkeypatch.setattr(runner, "fail_at", 3)  # rtn's second task
    with pytest.raises(KeyboardInterrupt):
        run()
    finished = list(runner.calls)
    assert finished[-1] == ("rtn", TASKS[0])
    monkeypatch.setattr(runner, "fail_at", None)
    runner.calls.clear()
    outcome = run()
    assert outcome.found == 3
    evaluated = [call for call in runner.calls if call[1] != "quantize"]
    assert evaluated == [("rtn", TASKS[1]), ("gptq", TASKS[0]), ("gptq", TASKS[1])]


@pytest.mark.parametrize("change", [{"options": {"wbits": 3}}, {"seed": 1}, {"nsamples": 3}, {"seqlen": 32},
                                    {"limit": 5}, {"dtype": "bfloat16"}, {"mode": "native"}])
def test_another_configuration_reuses_nothing_that_it_changes(run, runner, change):
    run(["gptq"])
    runner.calls.clear()
    run(["gptq"], **change)
    assert ("gptq", TASKS[0]) in runner.calls and ("gptq", TASKS[1]) in runner.calls


def test_full_precision_and_rtn_are_reused_for_another_calibration(run, runner):
    run()
    runner.calls.clear()
    run(seed=1)
    assert [call for call in runner.calls if call[1] != "quantize"] == [("gptq", task) for task in TASKS]


def test_another_numerics_version_or_library_reuses_nothing(run, runner, monkeypatch):
    run(["fp16"])
    for name, value in (("NUMERICS", 99), ("version", lambda package: "0.0")):
        runner.calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(variants, name, value)
            run(["fp16"])
        assert len(runner.calls) == 3


def test_fresh_measures_again(run, runner):
    run(["fp16"])
    runner.calls.clear()
    assert run(["fp16"], fresh=True).measured == 2
    assert len(runner.calls) == 3


def test_fast_runs_have_a_setting_of_their_own(run):
    full, fast = run(["fp16"]).setting, run(["fp16"], fast=True).setting
    assert fast.limit == experiments.FAST_LIMIT and full.limit is None
    assert full.stem != fast.stem


def test_progress_ends_at_its_total(run):
    told = []
    run(progress=lambda *step: told.append(step))
    done, totals = [step[0] for step in told], {step[1] for step in told}
    assert done == sorted(done) and totals == {3 * (2 + 2)} and done[-1] == 12


@pytest.mark.parametrize("arguments, message", [
    ({"methods": ["gptqq"]}, "unknown method 'gptqq': did you mean 'gptq'"),
    ({"methods": ["nope", "gptq+awq"]}, "unknown method 'nope'.*composition 'gptq"),
    ({"methods": ["gptq", "gptq"]}, "asked for twice: gptq"),
    pytest.param({"tasks": ["world_mathh"]}, "unknown task 'world_mathh': did you mean 'world_math'",
                 marks=pytest.mark.slow),
    ({"options": {"wbits": 9}}, "bits is 9"),
    ({"mode": "mached"}, "unknown mode 'mached': did you mean 'matched'"),
    ({"calib_source": "missing.txt"}, "missing.txt.*does not exist"),
    ({"seqlen": 4096}, "at most 512"),
])
def test_mistakes_are_found_before_any_work(run, runner, arguments, message):
    with pytest.raises(PTQError, match=message):
        run(**arguments)
    assert runner.calls == [] and not list(run.store.records())


@pytest.mark.parametrize("model, tasks", [("qwen1.5-0.5b", None), ("toy", ["wikitext2_ppl"])])
def test_without_a_hub_the_error_comes_at_once_and_names_what_to_use(run, runner, monkeypatch, model, tasks):
    from suite import hub

    monkeypatch.setattr(hub, "offline", lambda: False)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(PTQError, match="needs a hub, and none answers"):
        if tasks:
            run(tasks=tasks)
        else:
            reproduce(model, store=run.store, runner=runner)
    assert runner.calls == []


def test_an_unwritable_folder_is_found_first(run, runner, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PTQError, match="cannot be written"):
        run(store=Store(tmp_path / "file"))
    assert runner.calls == []


def test_calibration_on_the_evaluated_text_is_refused_or_marked(run, runner):
    from suite import paths

    text = str(paths.tasks() / "data" / "world_wiki_test.txt")
    message = "world_wiki_test.txt.*is what world_wiki_ppl evaluates.*--allow-eval-calibration"
    with pytest.raises(PTQError, match=message):
        run(calib_source=text)
    assert runner.calls == []
    run(calib_source=text, allow_eval_calibration=True)
    marked = {(r.result["label"], r.identity["task"]["name"]) for r in run.store.records(kind="evaluation")
              if r.result.get("calibrated_on_this_text")}
    assert marked == {("gptq", "world_wiki_ppl")}  # round-to-nearest and full precision never saw it
    gptq = next(r for r in run.store.records(kind="quantization") if r.result["label"] == "gptq")
    assert gptq.identity["calibration"]["source"] == "world_wiki_test.txt"  # and not where it lies on this machine


def test_labels_show_options_that_differ():
    assert label(method.build("gptq", wbits=3)) == "gptq"
    assert label(method.build("gptq", damp=0.05)) == "gptq damp=0.05"
    assert label(method.build("cka-hybrid", pool="gptq|awq", block=2)) == "cka-hybrid pool=gptq|awq block=2"
    assert label(method.build("smoothquant+gptq", alpha=0.7)) == "smoothquant+gptq alpha=0.7"


def test_the_identity_of_a_task_follows_its_documents():
    one, other, limited = Tasks(["world_math"]), Tasks(["world_math"]), Tasks(["world_math"], limit=3)
    assert one.identity("world_math") == other.identity("world_math") != limited.identity("world_math")
    other._identities.clear()
    task = other.loaded("world_math")["tasks"]["world_math"]
    task.dataset["test"] = task.dataset["test"].select(range(10))
    assert other.identity("world_math")["digest"] != one.identity("world_math")["digest"]


def test_outcomes_of_a_group_stand_one_task_after_another():
    def sample(i, value, filtered="none"):
        return {"doc_id": i, "filter": filtered, "acc": value, "filtered_resps": [0]}
    results = {"results": {"g": {"alias": "g", "acc,none": 0.75, "acc_stderr,none": 0.1, "sample_len": 4}},
               "samples": {"g_b": [sample(1, 1.0), sample(0, 0.0)], "g_a": [sample(0, np.float64(1)), sample(1, True)]},
               "higher_is_better": {"g": {"acc": True}}}
    found = outcome_of("g", results)
    assert found["outcomes"] == {"acc,none": "1101"}
    assert found["metrics"] == {"acc,none": {"value": 0.75, "stderr": 0.1}}
    assert found["info"] == {"documents": 4, "higher_is_better": True, "tasks": {"g_a": 2, "g_b": 2}}


def test_filters_are_kept_apart():
    results = {"results": {"m": {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.0,
                                 "exact_match,flexible-extract": 1.0, "exact_match_stderr,flexible-extract": 0.0}},
               "samples": {"m": [{"doc_id": 0, "filter": f, "exact_match": v, "filtered_resps": ["1"]}
                                 for f, v in (("strict-match", 0.0), ("flexible-extract", 1.0))]}}
    found = outcome_of("m", results)
    assert found["headline"] == "exact_match,strict-match"
    assert found["outcomes"] == {"exact_match,strict-match": "0", "exact_match,flexible-extract": "1"}


def test_for_real_on_the_toy(run, tmp_path, toy_text):
    """Runner and adapter: the perplexity stored is that of a direct computation, and its windows give it again."""
    outcome = run(("fp16", "rtn"), ("world_wiki_ppl", "world_events"), limit=3, runner=measuring.Runner)
    assert outcome.measured == 4
    by = {(r.result["label"], r.identity["task"]["name"]): r for r in run.store.records(kind="evaluation")}
    record = by["fp16", "world_wiki_ppl"]
    windows = record.result["windows"]
    assert len(windows["nll"]) == 3 and record.result["info"]["windows"] == 3
    stored = record.result["metrics"][record.result["headline"]]["value"]
    assert np.exp(sum(windows["nll"]) / (3 * windows["tokens"])) == pytest.approx(stored, rel=1e-6)
    assert by["rtn", "world_wiki_ppl"].result["windows"]["nll"] != windows["nll"]
    events = by["rtn", "world_events"].result
    assert events["headline"] == "acc_norm,none" and len(events["outcomes"]["acc_norm,none"]) == 3
    layers = next(r for r in run.store.records(kind="quantization") if r.result["label"] == "rtn").result["layers"]
    assert all(0 < layer["errors"]["cka"] < 1 for layer in layers)
    assert record.provenance["hardware"]["threads"] == 1 and record.provenance["wall_seconds"] > 0
    assert torch.get_num_threads() == 1


def test_the_same_model_is_not_evaluated_twice(run, runner, monkeypatch):
    """With `share`, and only then, results are taken from a variant with the same fingerprint; each says so."""
    original = runner.quantize
    same = {"gptq": "one", "awq": "one", "rtn": "two"}
    monkeypatch.setattr(runner, "quantize", lambda self, progress=None: {
        **original(self, progress), "fingerprint": same[self.variant.label]})
    given = dict(store=run.store, **run.given)
    for share in (True, False):
        jobs = experiments.plan(run.folder, ["gptq", "rtn", "awq"], TASKS, **given, fresh=True).jobs
        runner.calls.clear()
        measuring.run([replace(job, share=share) for job in jobs], runner=runner)
        evaluated = [call for call in runner.calls if call[1] != "quantize"]
        expected = ("gptq", "rtn") if share else ("gptq", "rtn", "awq")
        assert evaluated == [(name, task) for name in expected for task in TASKS]
        taken = {r.result["label"]: r.result.get("same_model_as") for r in run.store.records(kind="evaluation")}
        assert taken == {"gptq": None, "rtn": None, "awq": "gptq" if share else None}


def test_fingerprints_tell_models_apart(make_toy):
    from suite import models, walk

    def made(name, **options):
        model = make_toy("llama")
        walk.quantize_model(method.build(name, **options), model, calib.from_tokens(torch.zeros(1, 8)))
        return models.fingerprint(model)
    found = [made("rtn"), made("rtn"), made("rtn", abits=4), made("rtn", wbits=3), made("smoothquant")]
    assert found[0] == found[1] and len(set(found)) == 4


def test_what_lies_on_a_shelf_is_found_from_there_only(run, runner):
    run(["fp16"])
    runner.calls.clear()
    shelf = Store(run.store.root, "ablations")
    assert run(["fp16", "rtn"], store=shelf).measured == 2  # what lies in the open is found
    assert [record.result["label"] for record in run.store.records(kind="quantization")] == ["fp16"]
    assert sorted(record.result["label"] for record in shelf.records(kind="quantization")) == ["fp16", "rtn"]
    assert run(["rtn"], store=shelf).found == 2 and run(["rtn"]).measured == 2


@pytest.mark.slow
def test_side_by_side_gives_the_same_records(run, tmp_path):
    """Two processes, and one: the same results, bit for bit."""
    in_turn = run(("fp16", "rtn"), TASKS, limit=3, runner=None)
    other = Store(tmp_path / "other")
    side_by_side = run(("fp16", "rtn"), TASKS, limit=3, runner=None, workers=2, store=other)
    assert in_turn.measured == side_by_side.measured == 4
    strip = lambda store: {r.hash: r.result for r in store.records(kind="evaluation")}  # noqa: E731
    assert strip(other) == strip(run.store) and len(strip(other)) == 4


@pytest.mark.slow
def test_a_mistake_in_a_worker_reaches_the_user(run, toy_folder, monkeypatch):
    """What fails in another process fails here, as itself."""
    made = experiments.variants_of
    monkeypatch.setattr(experiments, "variants_of", lambda *a: [
        replace(v, calibration=None, diagnosed_on=None) if v.label == "gptq" else v for v in made(*a)])
    with pytest.raises(PTQError, match="needs calibration data"):
        run(("fp16", "gptq"), TASKS[:1], limit=3, runner=None, workers=2)


class _Large:
    """A job with more in it than a pipe holds, and an open tensor."""

    steps = 1

    def __init__(self, number):
        self.number, self.padding, self.tensor = number, b"x" * 300_000, torch.zeros(4)

    def do(self, runner, loaded, tell):
        assert len(self.padding) == 300_000 and not self.tensor.any()
        tell(1, f"job {self.number}")


def test_any_number_of_jobs_of_any_size_is_handed_out():
    told = []
    measuring._measure_side_by_side([_Large(k) for k in range(40)], 2, lambda done, total, text: told.append((done, text)))
    assert sorted(text for _, text in told) == sorted(f"job {k}" for k in range(40))
    assert [done for done, _ in told] == list(range(1, 41))


def test_calibration_identity_tells_names_of_files_only():
    tokens = torch.zeros(2, 4, dtype=torch.long)
    assert variants.told(calib.from_tokens(tokens, "/home/someone/text.txt"))["source"] == "text.txt"
    assert variants.told(calib.from_tokens(tokens, "embedded"))["source"] == "embedded"
    assert variants.told(None) is None


WAITING = """
import multiprocessing, signal
from suite import measuring

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    waiting, told = context.Queue(), context.Queue()
    worker = context.Process(target=measuring._work, args=(waiting, told), daemon=True)
    worker.start()
    waiting.put((0, "no job"))
    told.get()  # what is wrong with that: now it waits for the next one
    print(worker.pid, flush=True)
    signal.pause()
"""


def test_a_worker_ends_with_a_parent_that_was_killed(tmp_path):
    """Else it would hold its memory, and wait for work that nobody sends."""
    (tmp_path / "waiting.py").write_text(WAITING)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "waiting.py")], stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": "."})
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.wait()
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists() or "\nState:\tZ" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by a minute")
