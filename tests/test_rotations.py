"""The table "does learning the rotation help": which runs it asks for, and the numbers it shows."""

from __future__ import annotations

import csv
import math

import fake_records as fake
import pytest

from suite import cli, experiments, measuring
from suite.report import rotations
from suite.store import Store

OFFSETS = {"none": 0.3, "hadamard": 0.1, "random-hadamard": 0.2, "learned": 0.0}
NOISE = {0: 0.00, 1: 0.06, 2: 0.03}


def value(options: dict, bits: int) -> float:
    learned = options["rotation_seed"] * 0.01 if options["rotation"] == "learned" else 0.0
    return 10 + bits / 10 + OFFSETS[options["rotation"]] + NOISE[options["rotation_seed"]] + learned


class FakeRunner:
    calls: list = []

    def __init__(self, model, variant, **_):
        self.variant = variant

    def quantize(self, progress=None):
        return {"layers": [], "bits": 4.125, "seconds": 0.2, "peak_memory_mib": 1.0}

    def evaluate(self, tests, task):
        made = self.variant.method
        self.calls.append((made, self.variant.calibration and self.variant.calibration.seed))
        result = dict(fake.evaluation("gptq", task).result)
        del result["label"]
        perplexity = 9.0
        if self.variant.scheme:
            options = {"rotation": made.rotation, "rotation_seed": made.rotation_seed}
            perplexity = value(options, made.scheme.act.bits)
        result["metrics"] = {result["headline"]: {"value": perplexity, "stderr": None}}
        return result


@pytest.fixture
def swept(tmp_path, toy_folder, toy_text_file, monkeypatch):
    monkeypatch.setattr(FakeRunner, "calls", [])
    store = Store(tmp_path / "results")
    given = dict(store=store, calib_source=str(toy_text_file), nsamples=2, seqlen=64, runner=FakeRunner)
    return store, lambda **more: experiments.rotation_sweep(str(toy_folder), **{**given, **more})


def test_every_rotation_is_run_at_every_scheme_and_seed_once(swept):
    store, sweep = swept
    outcomes = sweep()
    runs = [(m.scheme.act.bits, seed, m.rotation) for m, seed in FakeRunner.calls if seed is not None]
    assert sorted(runs) == sorted(2 * [(a, s, r) for a in (4, 8) for s in range(3) for r in experiments.ROTATIONS])
    assert all(m.rotation_seed == seed for m, seed in FakeRunner.calls if seed is not None)
    assert len(FakeRunner.calls) == 50, "on two texts; full precision is run once"
    assert sum(o.measured for o in outcomes) == 50 and sum(o.found for o in outcomes) == 10
    FakeRunner.calls.clear()
    assert sum(o.measured for o in sweep()) == 0 and FakeRunner.calls == []


def test_the_table_compares_seed_by_seed(swept):
    store, sweep = swept
    model = sweep()[0].model
    text, numbers = (path.read_text() for path in rotations.write(store, model))
    found = list(csv.DictReader(numbers.splitlines()))
    assert [row["task"] for row in found] == 8 * ["world_wiki_ppl"] + 8 * ["world_chat_ppl"]
    rows = {(row["scheme"], row["rotation"]): row for row in found[:8]}
    assert len(rows) == 8 and {row["nsamples"] for row in found} == {"2"}
    learned = rows["W4A4 g128", "learned"]
    assert [float(learned[f"seed_{s}"]) for s in range(3)] == pytest.approx([10.4, 10.47, 10.45])
    assert float(learned["mean"]) == pytest.approx(10.44)
    assert float(learned["difference_mean"]) == pytest.approx(-0.19), "-0.20, -0.19, -0.18"
    assert float(learned["difference_error"]) == pytest.approx(0.01 / math.sqrt(3))
    assert rows["W4A4 g128", "random-hadamard"]["difference_mean"] == ""
    assert float(rows["W4A8 g128", "none"]["difference_mean"]) == pytest.approx(0.1)
    assert "## wiki, full precision 9.0000" in text and "-0.1900 ± 0.0058" in text and "learned (100 x 8, rate 1.5)" in text


def test_two_ways_of_learning_are_two_rows(swept):
    store, sweep = swept
    model = sweep(abits=(4,), seeds=(0,))[0].model
    sweep(abits=(4,), seeds=(0,), learning={"batch": 2})
    sweep(abits=(4,), seeds=(0,), learning={"scale_gradient": True})
    rows = [row for row in rotations.table(store, model) if row["rotation"] == "learned"]
    assert [row["learning"] for row in rows] == [
        "100 x 2, rate 1.5", "100 x 8, rate 1.5", "100 x 8, rate 1.5, through the scale"]


def test_other_numbers_of_sequences_are_rows_with_a_control_of_their_own(swept):
    store, sweep = swept
    model = sweep(abits=(4,), seeds=(0,))[0].model
    sweep(abits=(4,), seeds=(0, 1), nsamples=4)
    rows = {(row["nsamples"], row["rotation"]): row for row in rotations.table(store, model)}
    assert len(rows) == 8 and rows[2, "learned"]["seed_1"] is None
    assert rows[2, "learned"]["difference_mean"] == pytest.approx(-0.20)
    assert rows[4, "learned"]["difference_mean"] == pytest.approx(-0.195), "-0.20 and -0.19"


def test_nothing_measured_gives_no_table(tmp_path):
    assert rotations.write(Store(tmp_path), "toy") == []


def test_the_command_writes_the_table(tmp_path, toy_folder, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "Runner", FakeRunner)
    command = ["rotations", str(toy_folder), "--abits", "4", "--seeds", "0,1", "--results", str(tmp_path)]
    sampling = experiments.sampling
    monkeypatch.setattr(experiments, "sampling", lambda embedded, *a: sampling(True, *a))
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "Does learning the rotation help?" in out and "18 results measured" in out
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--seeds", "0", "--steps", "30", "--batch", "4", "--learning-rate", "5"])
    assert ended.value.code == 0 and "learned (30 x 4, rate 5)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--seeds", "0,-1"])
    assert ended.value.code == 2 and "--seeds: '-1'" in capsys.readouterr().err
