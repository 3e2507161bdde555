"""Methods against each other and against a reference: what is run, what the noise floor is, and what the gate says."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import fake_records as fake
import pytest

from suite import baseline, compare, experiments, method, plugins, provenance, variants
from suite.errors import PTQError
from suite.report import verdicts
from suite.report.comparison import Match, judge
from suite.store import Record, Store
from suite.verdict import Rules

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("world_wiki_ppl", "world_events")
DAMAGE = {"rtn": 0.02, "gptq": 0.0, "awq": 0.0}


class FakeRunner:
    """Damage by method, more of it by calibration seed and batch: invented results, each call noted."""

    calls: list = []
    worse = 0.0  # what later code adds to every method's damage

    def __init__(self, model, variant, batch_size=None, **_):
        self.variant, self.batch = variant, batch_size
        self.tokens = variant.diagnosed_on.batch_tokens if variant.diagnosed_on else None

    def quantize(self, progress=None):
        return {"layers": [{"layer": 0, "seconds": 0.1, "weights": 10, "bits": 4.125}], "bits": 4.125, "seconds": 0.1,
                "peak_memory_mib": 1.0}

    def evaluate(self, tests, task):
        seed = self.variant.calibration.seed if self.variant.calibration else 0
        self.calls.append((self.variant.label, task, seed, self.batch, self.tokens))
        damage = DAMAGE[self.variant.label] + 0.001 * seed + (0.0005 if self.batch else 0) + self.worse
        result = dict(fake.evaluation("gptq", task, damage).result)
        del result["label"]
        return result


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(FakeRunner, "calls", [])
    monkeypatch.setattr(FakeRunner, "worse", 0.0)
    return FakeRunner


@pytest.fixture
def given(tmp_path, toy_text_file, runner):
    return dict(store=Store(tmp_path / "results"), calib_source=str(toy_text_file), nsamples=2, seqlen=64, runner=runner)


# ---------------------------------------------------------------------------------------------- methods


def test_what_is_missing_is_run_and_judged(given, runner, toy_folder):
    found = compare.compare(str(toy_folder), "rtn", ["gptq"], TASKS, repeats=2, **given)
    assert [(li.match.method, li.match.against, li.match.task) for li in found.lines] == [
        ("rtn", "gptq", task) for task in TASKS]
    assert found.lines[0].word == "worse" and found.status == 1
    runner.calls.clear()
    again = compare.compare(str(toy_folder), "gptq", ["rtn"], TASKS, repeats=2, **given)
    assert runner.calls == [] and again.lines[0].word == "better" and again.status == 0
    assert again.lines[0].verdict.difference.value == pytest.approx(-found.lines[0].verdict.difference.value)


def test_the_noise_floor_is_other_seeds_and_other_batches(given, runner, toy_folder):
    """rtn does not calibrate: no seed moves it. The larger of the two methods' floors counts."""
    found = compare.compare(str(toy_folder), "rtn", ["gptq"], TASKS[:1], repeats=2, **given)
    usual, other = (None, 8192), tuple(compare.OTHER_BATCH.values())
    assert len(runner.calls) == 6 and set(runner.calls) == {
        ("rtn", TASKS[0], 0, *usual), ("gptq", TASKS[0], 0, *usual), ("gptq", TASKS[0], 1, *usual),
        ("gptq", TASKS[0], 2, *usual), ("rtn", TASKS[0], 0, *other), ("gptq", TASKS[0], 0, *other)}
    perplexity = found.lines[0].verdict.other
    assert found.lines[0].verdict.noise == pytest.approx(perplexity * (2.718281828 ** 0.002 - 1), rel=1e-4)
    plain = compare.compare(str(toy_folder), "rtn", ["gptq"], TASKS[:1], repeats=0, **given)
    assert plain.lines[0].verdict.noise is None


def test_repeats_are_kept_apart_from_the_results(given, toy_folder):
    compare.compare(str(toy_folder), "rtn", ["gptq"], TASKS[:1], repeats=1, **given)
    assert {(r.result["label"], r.identity["seed"]) for r in given["store"].records(kind="evaluation")} == {
        ("rtn", None), ("gptq", 0)}
    assert len(list((given["store"].root / "noise").rglob("*_ppl*.json"))) == 3


def test_a_difference_inside_the_noise_is_not_significant(given, toy_folder, monkeypatch):
    monkeypatch.setitem(DAMAGE, "rtn", 0.0015)  # sure, and less than the 0.002 that two seeds make
    found = compare.compare(str(toy_folder), "rtn", ["gptq"], TASKS[:1], repeats=2, **given)
    assert found.lines[0].word == "undecided" and found.lines[0].verdict.within_noise
    without = compare.compare(str(toy_folder), "rtn", ["gptq"], TASKS[:1], repeats=0, **given)
    assert without.lines[0].word == "worse"


@pytest.mark.parametrize("wrong, words", [
    ({"against": []}, "nothing to compare with"), ({"against": ["rtn"]}, "asked for twice: rtn"),
    ({"against": ["gptqq"]}, "did you mean 'gptq'"), ({"repeats": -1}, "repeats is -1"),
    ({"model": "tiny-llama-x"}, "tiny-llama-s"),
])
def test_mistakes_before_any_work(given, runner, toy_folder, wrong, words):
    asked = {"model": str(toy_folder), "candidate": "rtn", "against": ["gptq"], "tasks": TASKS} | wrong
    with pytest.raises(PTQError, match=words):
        compare.compare(**asked, **given)
    assert runner.calls == []


# ---------------------------------------------------------------------------------------------- judging records


def match(mine, other, **changes):
    return Match("toy", "mine", "other", other.identity["task"]["name"], mine, other, **changes)


def test_records_that_do_not_match():
    wiki = fake.evaluation("gptq", "world_wiki_ppl")
    with pytest.raises(PTQError, match="differ in their task"):
        judge("t", "s", [match(fake.evaluation("rtn", "world_wiki_ppl", limit=50), wiki)])
    with pytest.raises(PTQError, match="differ in their model"):
        judge("t", "s", [match(fake.evaluation("rtn", "world_wiki_ppl", model="toy2"), wiki)])
    few = [fake.evaluation(m, "world_math", n=8) for m in ("rtn", "gptq")]
    with pytest.raises(PTQError, match="task world_math on toy has 8 documents"):
        judge("t", "s", [match(*few)])
    bare = [Record(r.identity, {k: v for k, v in r.result.items() if k != "outcomes"}, {}) for r in few]
    with pytest.raises(PTQError, match="keep no outcome per document for acc,none"):
        judge("t", "s", [match(*bare)])


def test_a_score_of_which_less_is_better_is_judged_the_other_way_round():
    more, less = (fake.evaluation(m, "world_math", damage) for m, damage in (("rtn", 0.0), ("gptq", 0.3)))
    assert judge("t", "s", [match(more, less)]).lines[0].word == "better"
    less.result["info"] = {"higher_is_better": False}
    assert judge("t", "s", [match(more, less)]).lines[0].word == "worse"


# ---------------------------------------------------------------------------------------------- forms


@pytest.fixture
def judged():
    """One better, one worse, one equal, one undecided, one incomparable."""
    base = {task: fake.evaluation("gptq", task) for task in fake.TASKS}
    matches = [
        match(fake.evaluation("rtn", "world_wiki_ppl", -0.02, noise=0.01), base["world_wiki_ppl"], noise=0.01),
        match(fake.evaluation("rtn", "world_chat_ppl", 0.02, noise=0.01), base["world_chat_ppl"]),
        match(base["world_events"], base["world_events"]),
        match(fake.evaluation("rtn", "world_math", 0.02), base["world_math"], noted=("numerics: 1, now 2",)),
        match(None, base["world_quiz"], apart=("libraries.torch: 2.13.0, now 2.14.0",)),
    ]
    return judge("mine on toy", "W4A8 g128", matches, Rules(margin_acc=0.015))


def test_json(judged):
    content = json.loads(verdicts.as_json(judged))
    assert content["counts"] == dict.fromkeys(("better", "worse", "equal", "undecided", "incomparable"), 1)
    assert content["status"] == judged.status == 1 and content["rules"]["margin_acc"] == 0.015
    first, *_, last = content["comparisons"]
    assert first["verdict"] == "better" and first["low"] < first["difference"] < first["high"] < 0
    assert first["noise"] == 0.01 and first["n"] == 200 and first["unit"] == "windows"
    assert last["verdict"] == "incomparable" and last["apart"] == ["libraries.torch: 2.13.0, now 2.14.0"]


def test_text(judged):
    text = verdicts.text(judged)
    words = {line.split()[0]: line.rstrip() for line in text.splitlines() if line.split()}
    assert words["wiki"].endswith("better") and words["chat"].endswith("worse")
    assert "equal: identical" in words["events"] and "documents would decide" in words["math"]
    assert "incomparable: libraries.torch: 2.13.0, now 2.14.0" in words["quiz"]
    assert "not measured" in words["chat"] and "mine: numerics: 1, now 2" in text
    assert text.splitlines()[-1].startswith("5 verdicts: 1 better, 1 worse, 1 equal, 1 undecided, 1 incomparable; worse:")
    moved = verdicts.text(judged, unchanged=False)
    assert "events" not in moved and "1 of 5 results are identical" in moved


def test_junit(judged):
    root = ElementTree.fromstring(verdicts.junit(judged))
    (suite,) = root.findall("testsuite")
    assert (root.get("tests"), root.get("failures")) == ("5", "1")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped"), suite.get("errors")) == ("5", "1", "2", "0")
    cases = {case.get("name"): case for case in suite}
    assert "difference +" in cases["world_chat_ppl"].find("failure").get("message")
    assert "would decide" in cases["world_math"].find("skipped").get("message")
    assert cases["world_events"].find("failure") is None and cases["world_events"].find("skipped") is None


# ---------------------------------------------------------------------------------------------- references


@pytest.fixture
def frozen(given, toy_folder, tmp_path):
    """A reference of two methods, and what measures them again with "later code"."""
    reference = compare.freeze("ref", [str(toy_folder)], ["rtn", "gptq"], TASKS, repeats=1, **given)
    path = baseline.save(reference, tmp_path / "ref.json")
    return baseline.read(path)


def later(given, monkeypatch, text="later"):
    monkeypatch.setattr(provenance, "code", lambda: text)
    monkeypatch.setattr(experiments, "code", lambda: text)
    return {key: given[key] for key in ("store", "runner", "calib_source")}


def test_a_reference_has_results_arguments_and_noise(frozen, toy_folder, toy_text_file):
    (run,) = frozen.runs
    assert run.model == str(toy_folder) and (run.labels, run.tasks) == (["rtn", "gptq"], list(TASKS))
    assert run.arguments == {"calib_source": toy_text_file.name, "nsamples": 2, "seqlen": 64}  # no path of this machine
    noise = {(e.label, e.task): e.noise for e in run.entries}
    assert noise["gptq", TASKS[0]] > noise["rtn", TASKS[0]] > 0


def test_the_same_code_measures_nothing_again(frozen, given, runner, monkeypatch):
    runner.calls.clear()
    given = {key: given[key] for key in ("store", "runner", "calib_source")}
    found = compare.against_baseline(frozen, **given)
    assert runner.calls == [] and found.status == 0
    assert {(li.word, li.verdict.why) for li in found.lines} == {("equal", "identical")}


def test_later_code_is_measured_anew(frozen, given, runner, monkeypatch):
    runner.calls.clear()
    found = compare.against_baseline(frozen, **later(given, monkeypatch))
    assert len(runner.calls) == 4 and {li.word for li in found.lines} == {"equal"}
    runner.worse = 0.03
    found = compare.against_baseline(frozen, **later(given, monkeypatch, "still later"))
    words = {(li.match.method, li.match.task): li.word for li in found.lines}
    assert words["rtn", TASKS[0]] == words["gptq", TASKS[0]] == "worse" and found.status == 1
    runner.worse = 0.0004  # sure on so many windows, but less than what another seed makes
    found = compare.against_baseline(frozen, methods=["gptq"], tasks=TASKS[:1], rules=Rules(margin_ppl=0),
                                     **later(given, monkeypatch, "later yet"))
    assert [(li.word, li.verdict.within_noise) for li in found.lines] == [("undecided", True)] and found.status == 0


def test_some_or_all_of_a_reference_is_incomparable(frozen, given, toy_folder, runner, monkeypatch):
    run = frozen.runs[0]
    runner.calls.clear()

    def changed(which, **parts):
        entries = [e if not which(e) else baseline.Entry(**{**vars(e), "identity": {**e.identity, **parts}})
                   for e in run.entries]
        return baseline.Baseline("ref", [baseline.Run(run.model, run.arguments, entries)])

    older = {**run.entries[0].identity["libraries"], "torch": "2.12.0"}
    some = changed(lambda e: e.label == "gptq", libraries=older)
    given = {key: given[key] for key in ("store", "runner", "calib_source")}
    found = compare.against_baseline(some, **given)
    apart = [li for li in found.lines if li.word == "incomparable"]
    assert [li.match.method for li in apart] == ["gptq", "gptq"] and "torch: 2.12.0, now" in apart[0].match.apart[0]
    retrained = {**run.entries[0].identity["model"], "digest": "f" * 64}
    for parts, words in (({"libraries": older}, "libraries.torch: 2.12.0"),
                         ({"model": retrained}, "model.digest: ffffffffffff...")):
        with pytest.raises(PTQError, match=words):
            compare.against_baseline(changed(lambda e: True, **parts), **given)
    other_text = changed(lambda e: True, task={**run.entries[0].identity["task"], "digest": "another"})
    with pytest.raises(PTQError, match="none of the 4 results can be compared, since these differ: .*task.digest: another"):
        compare.against_baseline(other_text, **given)
    assert runner.calls == []


@pytest.mark.parametrize("asked, words", [
    ({"methods": ["gptqq"]}, "method in baseline 'ref' of .* 'gptqq': did you mean 'gptq'"),
    ({"tasks": ["world_evens"]}, "task in baseline 'ref' of .*did you mean 'world_events'"),
    ({"model_names": ["tiny-llama-s"]}, "model in baseline 'ref' 'tiny-llama-s'"),
])
def test_names_that_a_reference_lacks(frozen, given, asked, words):
    with pytest.raises(PTQError, match=words):
        compare.against_baseline(frozen, store=given["store"], **asked)


@pytest.mark.parametrize("made", ["gptq", "awq+gptq", method.build("gptq", damp=0.05, act_order=True, wbits=3),
                                  method.build("cka-hybrid", pool=("gptq", "rtn"), wbits=3), "fp16"])
def test_a_label_gives_its_method_back(made):
    options = {"wbits": 3}
    (label, configured, _), = variants.build_all([made], options, "matched", {})
    assert variants.build_all([compare._by_label(label, options)], options, "matched", {})[0][:2] == (label, configured)


# ---------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def ptq(ptq, monkeypatch):
    """The command line of conftest.py; plug-ins are forgotten afterwards."""
    monkeypatch.setattr(method, "_ADDED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    return ptq


EXAMPLE, BROKEN = ROOT / "examples" / "range_search.py", ROOT / "examples" / "range_search_broken.py"
SMALL = ("--model", "tiny-llama-s", "--tasks", "world_wiki_ppl", "--limit", 24, "--nsamples", 8, "--seqlen", 256,
         "--wbits", 3, "--repeats", 1, "--workers", 1)


def test_the_gate_rejects_the_broken_example(ptq):
    """On a trained model, from quantization to exit status; and a reference of one method is what another code meets."""
    status, out, err = ptq("compare", "range_search_broken", "--plugin", BROKEN, "--against", "rtn", *SMALL, "--json",
                           "--junit", "gate.xml")
    (line,) = json.loads(out)["comparisons"]
    assert (status, line["verdict"], err) == (1, "worse", "") and line["noise"] is not None
    assert ElementTree.parse("gate.xml").getroot().get("failures") == "1"
    status, out, _ = ptq("baseline", "save", "ref", "--methods", "rtn", *SMALL)
    assert status == 0 and out.splitlines()[-1] == "results/baselines/ref.json"
    status, out, _ = ptq("compare", "--against-baseline", "ref", "--model", "tiny-llama-s")
    assert status == 0 and "1 of 1 results are identical" in out and out.splitlines()[-1] == "1 verdicts: 1 equal"


def test_check(ptq):
    status, out, _ = ptq("check", "range_search_broken", "--plugin", BROKEN, "--checks", "error_falls_with_bits,bits",
                         "--junit", "checks.xml")
    assert status == 1 and "clipped ranges" in out and out.splitlines()[-1].startswith("range_search_broken: 1 failed")
    suite = ElementTree.parse("checks.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    status, out, _ = ptq("check", "rtn", "--checks", "purity", "--json")
    assert status == 0 and {c["status"] for c in json.loads(out)["checks"]} == {"passed"}


def test_an_expected_failure_is_shown_with_its_reason(ptq, tmp_path):
    declared = '    expected_failures = {"grid": "to show one"}\n'
    text = EXAMPLE.read_text().replace("    scheme: Scheme", f"{declared}    scheme: Scheme")
    (tmp_path / "mine.py").write_text(text)
    status, out, _ = ptq("check", "mine", "--plugin", "mine.py", "--checks", "grid")
    assert status == 0 and "passed although expected to fail" in out and "to show one" in out
    broken = text.replace("return round_to_nearest(layer, self.scheme, shares)",
                          "return LayerEdit(linears=round_to_nearest(layer, self.scheme, shares).linears)")
    (tmp_path / "mine2.py").write_text(broken)
    status, out, _ = ptq("check", "mine2", "--plugin", "mine2.py", "--checks", "grid")
    assert status == 0 and "expected failure" in out and "to show one (layer 0" in out


@pytest.mark.parametrize("arguments, words", [
    (("compare", "--against", "gptq", "--model", "tiny-llama-s"), "METHOD is missing"),
    (("compare", "rtn", "--model", "tiny-llama-s"), "--against is missing"),
    (("compare", "rtn", "--against", "gptq"), "--model is missing"),
    (("compare", "rtn", "--against", "gptq", "--model", "tiny-llama-s,tiny-qwen-s"), "one at a time"),
    (("compare", "rtnn", "--against", "gptq", "--model", "tiny-llama-s"), "did you mean 'rtn'"),
    (("compare", "rtn", "--against", "gptq", "--model", "tiny-llama-s", "--margin-ppl", "100"), "margin_ppl is 1.0"),
    (("compare", "rtn", "--against-baseline", "nope"), "nope.json' does not exist"),
    (("compare", "rtn", "--against-baseline", "x.json", "--wbits", "3"), "--wbits has no effect with --against-baseline"),
    (("compare", "rtn", "--against-baseline", "x.json", "--against", "gptq"), "--against has no effect"),
    (("baseline", "save", "a/b", "--model", "tiny-llama-s"), "baseline name 'a/b'"),
    (("check", "rtn", "--checks", "puritty"), "did you mean 'purity'"),
    (("check", "mine"), "unknown method 'mine'"),
    (("ls", "methods", "--plugin", "none.py"), "plug-in 'none.py' does not exist"),
])
def test_mistakes_on_the_command_line(ptq, tmp_path, arguments, words):
    status, out, err = ptq(*arguments)
    assert status == 2 and out == "" and words in err and re.fullmatch(r"ptq: error: [^\n]*\n", err)
    assert list(tmp_path.iterdir()) == []


def test_a_plug_in_that_breaks_is_no_verdict(ptq, tmp_path):
    """Status 1 says "worse"; a bug must not."""
    text = EXAMPLE.read_text().replace("        shares = {}\n", "        shares = {}[0]\n")
    (tmp_path / "mine.py").write_text(text)
    status, out, err = ptq("compare", "mine", "--plugin", "mine.py", "--against", "rtn", *SMALL)
    assert status == 2 and out == "" and "Traceback" in err
    assert re.search(r"ptq: error: no verdict was reached: KeyError: 0 \(.*mine.py, line \d+\)\n$", err)
