"""A reference is one file that comes back as it was, and that nobody edits unnoticed."""

import json

import fake_records as fake
import pytest

from suite import baseline
from suite.baseline import Baseline, Entry, Run
from suite.errors import PTQError
from suite.store import Store


@pytest.fixture
def frozen():
    entries = [Entry.of(fake.evaluation(method, task), noise)
               for method, noise in (("gptq", 0.25), ("rtn", None)) for task in ("world_wiki_ppl", "world_math")]
    return Baseline("today", [Run("toy", {"options": {"wbits": 3}, "seed": 1}, entries)])


def test_round_trip(tmp_path, frozen):
    path = baseline.save(frozen, tmp_path / "today.json")
    assert baseline.read(path) == frozen
    run = baseline.read(path).run("toy")
    assert (run.labels, run.tasks) == (["gptq", "rtn"], ["world_wiki_ppl", "world_math"])
    assert run.entries[0].record.result["windows"] == fake.evaluation("gptq", "world_wiki_ppl").result["windows"]


def test_the_file_has_a_line_per_entry_and_the_same_bytes_each_time(tmp_path, frozen):
    first, again = (baseline.save(frozen, tmp_path / name).read_bytes() for name in ("a.json", "b.json"))
    assert first == again
    assert sum(b'"label":"' in line for line in first.splitlines()) == 4


def test_only_the_metric_that_tables_show_is_kept():
    record = fake.evaluation("gptq", "world_math")
    record.result["metrics"]["other,none"] = {"value": 0.5, "stderr": None}
    record.result["outcomes"]["other,none"] = "01"
    kept = Entry.of(record, None).result
    assert set(kept["metrics"]) == set(kept["outcomes"]) == {"acc,none"}


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def better(content):
    content["runs"][0]["entries"][1]["result"]["outcomes"]["acc,none"] = "1" * 200


@pytest.mark.parametrize("spoil, words", [
    (lambda path: edited(path, better), "corrupt or was edited"),
    (lambda path: edited(path, lambda c: c.update(format=99)), "format 99, this version reads 1"),
    (lambda path: edited(path, lambda c: c.pop("checksum")), "corrupt or was edited"),
    (lambda path: edited(path, lambda c: c.pop("format")), "cannot be read"),
    (lambda path: path.write_text(path.read_text()[:-40]), "cannot be read"),
    (lambda path: path.write_text("[]"), "cannot be read"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
])
def test_a_spoiled_file_is_refused(tmp_path, frozen, spoil, words):
    path = baseline.save(frozen, tmp_path / "today.json")
    spoil(path)
    with pytest.raises(PTQError, match=words) as error:
        baseline.read(path)
    assert str(path) in str(error.value) and "ptq baseline save" in str(error.value)


def test_names_and_files(tmp_path, frozen):
    store = Store(tmp_path)
    path = baseline.path_of(store, "today")
    baseline.save(frozen, path)
    assert path == tmp_path / "baselines" / "today.json" and list(store.records()) == []
    assert baseline.path_of(store, "some/where.json").as_posix() == "some/where.json"
    with pytest.raises(PTQError, match="'todai'.*did you mean 'today'"):
        baseline.read(baseline.path_of(store, "todai"), "todai")
    with pytest.raises(PTQError, match="does not exist"):
        baseline.read(tmp_path / "elsewhere" / "today.json")
    with pytest.raises(PTQError, match="model in baseline 'today' 'tou': did you mean 'toy'"):
        baseline.read(path).run("tou")


def test_an_empty_reference_is_refused():
    with pytest.raises(PTQError, match="no results"):
        Baseline("today", [Run("toy", {}, [])])


BEFORE = fake.evaluation("gptq", "world_math").identity


@pytest.mark.parametrize("changes, told", [
    ({"libraries": {**BEFORE["libraries"], "torch": "2.14.0"}}, ["libraries.torch: 2.13.0, now 2.14.0"]),
    ({"calibration": {**BEFORE["calibration"], "nsamples": 8}}, ["calibration.nsamples: 64, now 8"]),
    ({"task": {**BEFORE["task"], "digest": "another"}}, ["task.digest: digest of world_math, now another"]),
    ({"model": {**BEFORE["model"], "digest": "x" * 64}}, ["model.digest: digest of toy, now xxxxxxxxxxxx..."]),
    ({"dtype": "bfloat16", "seed": 1}, ["dtype: float32, now bfloat16", "seed: 0, now 1"]),
    ({"kvbits": 4}, ["kvbits: none, now 4"]),
    ({"numerics": 2}, []),
])
def test_what_makes_results_incomparable(changes, told):
    assert baseline.apart(BEFORE, {**BEFORE, **changes}) == told


def test_what_is_compared_and_told():
    now = {**BEFORE, "numerics": 2, "method": {"method": "gptq", "options": {"damp": 0.05}}, "plugins": {"mine": "ab"}}
    assert baseline.moved(BEFORE, now) == ["method.options.damp: none, now 0.05", "numerics: 1, now 2",
                                           "plugins: none, now {\"mine\": \"ab\"}"]
    assert baseline.moved(BEFORE, BEFORE) == []
