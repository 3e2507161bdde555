"""Records: identified by what was run, whole or not at all, and never another's."""

import json
import os
import re

import fake_records as fake
import pytest

from suite import store as module
from suite.errors import PTQError
from suite.store import Record, Store, canonical, digest, folder_of, significant

CHANGES = {
    "model name": {"model": {"name": "toy2", "digest": "digest of toy"}},
    "model digest": {"model": {"name": "toy", "digest": "other"}},
    "method option": {"options": {"damp": 0.05}},
    "scheme": {"scheme": "W3A8 g128"},
    "mode": {"mode": "native"},
    "calibration": {"calibration": {**fake.CALIBRATION, "seed": 1}},
    "input policy": {"input_policy": "full"},
    "dtype": {"dtype": "bfloat16"},
    "seed": {"seed": 1},
    "numerics": {"numerics": 2},
    "libraries": {"libraries": {**fake.LIBRARIES, "torch": "2.14.0"}},
}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def only_file(store):
    (path,) = store.root.glob("*/records/*.json")
    return path


def test_a_record_comes_back_as_it_went_in(store):
    record = fake.evaluation("gptq", "world_wiki_ppl")
    path = store.put(record)
    assert store.find(record.identity) == record
    assert re.fullmatch(r"gptq-W4A8-g128-matched-world_wiki_ppl-[0-9a-f]{12}\.json", path.name)
    assert path.stem.endswith(record.hash[:12])


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_result_is_in_the_identity(store, change):
    """A record is never found for a run that differs in anything."""
    store.put(fake.evaluation("gptq", "world_wiki_ppl"))
    other = fake.evaluation("gptq", "world_wiki_ppl", **CHANGES[change])
    assert store.find(other.identity) is None
    store.put(other)
    assert store.find(other.identity) == other
    assert len(list(store.records())) == 2


@pytest.mark.parametrize("key, value", [("limit", 64), ("num_fewshot", 5), ("version", 2), ("digest", "x"),
                                        ("name", "other")])
def test_the_task_is_part_of_the_identity(store, key, value):
    record = fake.evaluation("gptq", "world_math")
    store.put(record)
    assert store.find({**record.identity, "task": {**record.identity["task"], key: value}}) is None


def test_the_order_of_keys_does_not_matter():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert canonical({"b": "ü", "a": 1.5}) == '{"a":1.5,"b":"ü"}'


def test_an_edited_number_is_found_out(store):
    store.put(fake.evaluation("gptq", "world_math"))
    path = only_file(store)
    path.write_text(path.read_text().replace('"headline": "acc,none"', '"headline": "acc,nine"'))
    with pytest.raises(PTQError, match=f"{path.name}.*numbers were edited"):
        list(store.records())


def test_an_edited_identity_is_found_out(store):
    record = fake.evaluation("gptq", "world_math")
    store.put(record)
    path = only_file(store)
    path.write_text(path.read_text().replace('"mode": "matched"', '"mode": "native"'))
    with pytest.raises(PTQError, match=f"{path.name}.*hash does not fit its identity"):
        store.find(record.identity)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}",
                                     '{"format": 1, "hash": "x", "identity": {}}', "\x00\xff"])
def test_a_broken_file_is_named(store, content):
    store.put(fake.evaluation("gptq", "world_math"))
    path = only_file(store)
    path.write_text(content, encoding="latin-1")
    with pytest.raises(PTQError, match=re.escape(str(path))):
        list(store.records())


def test_a_record_of_a_later_format_is_refused(store):
    store.put(fake.evaluation("gptq", "world_math"))
    path = only_file(store)
    content = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(content))
    with pytest.raises(PTQError, match="format 99, this version reads 1"):
        list(store.records())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing_and_keeps_what_was_there(store, monkeypatch, error):
    record = fake.evaluation("gptq", "world_math")
    store.put(record)

    def interrupted(*_):
        raise error

    monkeypatch.setattr(module.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else PTQError):
        store.put(fake.evaluation("awq", "world_math"))
    monkeypatch.undo()
    assert [r.hash for r in store.records()] == [record.hash]
    assert not list(store.root.rglob("*.tmp"))


def test_what_a_killed_write_leaves_is_ignored(store):
    record = fake.evaluation("gptq", "world_math")
    path = store.put(record)
    (path.parent / f".{path.name}.abc.tmp").write_text('{"half')
    assert [r.hash for r in store.records()] == [record.hash]


def test_the_folder_is_checked_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PTQError, match="cannot be written.*--results"):
        Store(tmp_path / "file" / "results").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PTQError, match="cannot be written"):
        Store(tmp_path / "results").check_writable()


def test_records_are_filtered(store):
    fake.fill(store, methods=("fp16", "gptq"), tasks=("world_math",))
    fake.fill(store, methods=("gptq",), tasks=("world_math",), model="toy@outliers=8,seed=0")
    assert len(list(store.records())) == 6
    assert len(list(store.records(model="toy"))) == 4
    assert len(list(store.records(model="toy", kind="evaluation", mode="matched"))) == 1
    assert store.models() == ["toy", "toy@outliers=8,seed=0"]


def test_a_planted_model_says_so_in_its_path(store):
    path = store.put(fake.evaluation("gptq", "world_math", model="toy@outliers=8,seed=1"))
    assert path.parent.parent.name == "toy-planted-outliers-8-seed-1"
    assert folder_of("Qwen/Qwen1.5-0.5B") == "Qwen--Qwen1.5-0.5B"


def test_two_names_that_share_a_folder_stay_apart(store):
    """The folder is for people; only identities decide."""
    one, other = "toy@outliers=8", "toy-planted-outliers-8"
    assert folder_of(one) == folder_of(other)
    for name in (one, other):
        store.put(fake.evaluation("gptq", "world_math", model=name))
    assert [r.model for r in store.records(model=one)] == [one]


def test_numbers_are_rounded_to_seven_digits():
    assert significant({"nll": [1234.56789012, 1e-9, float("nan")], "n": 3, "ok": True}) == {
        "nll": [1234.568, 1e-9, None], "n": 3, "ok": True}
    with pytest.raises(TypeError):
        significant({"path": object()})


def test_a_record_needs_a_kind_and_a_model():
    with pytest.raises(PTQError, match="kind is 'guess'"):
        Record({"kind": "guess"}, {}, {})
    with pytest.raises(PTQError, match="names no model"):
        Record({"kind": "evaluation"}, {}, {})


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_holds_only_its_own_records(change):
    """The same list of differences, at the level of tables."""
    identity = fake.evaluation("gptq", "world_math", **CHANGES[change]).identity
    inside = change == "method option"  # methods are what a table compares
    assert fake.setting().holds(fake.evaluation("gptq", "world_math").identity)
    assert fake.setting().holds(identity) == inside


def test_full_precision_and_round_to_nearest_belong_to_every_calibration():
    other = fake.setting(calibration={**fake.CALIBRATION, "seed": 1}, seed=1)
    assert other.holds(fake.evaluation("fp16", "world_math").identity)
    assert other.holds(fake.evaluation("rtn", "world_math").identity)
    assert not other.holds(fake.evaluation("gptq", "world_math").identity)
    assert not other.holds(fake.quantization("rtn").identity)  # its errors were measured on other data


def test_limited_and_full_runs_never_share_a_table():
    full = fake.evaluation("fp16", "world_math").identity
    limited = fake.evaluation("fp16", "world_math", limit=64).identity
    assert fake.setting().holds(full) and not fake.setting().holds(limited)
    assert fake.setting(limit=64).holds(limited) and not fake.setting(limit=64).holds(full)
    assert fake.setting().stem != fake.setting(limit=64).stem
