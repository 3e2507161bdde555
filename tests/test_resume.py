"""A run that was killed at any moment goes on from its last finished layer, or its last answers, to the same result."""

import hashlib
import importlib
import os
import random
import signal
import time
from functools import partial

import pytest
import torch
import toys

from suite import arch, calib, layer_state, resume, search, walk, windows
from suite.errors import PTQError
from suite.method import build

METHODS = {"gptq": {}, "awq": {"wbits": 3}, "smoothquant+gptq": {"abits": 16}, "mp-gptq": {}, "cka-hybrid": {},
           "cka-hybrid block=2": {"block": 2}, "cka-hybrid beam": {"search": "beam", "width": 2},
           "cka-hybrid by site": {"pool": ("gptq", "awq"), "unit": "site", "refine": "nll", "wbits": 3},
           "mp-gptq by loss": {"sensitivity": "loss"},
           "spinquant": {"steps": 2, "batch": 1, "variant": "had"},
           "gptq W16A8": {"wbits": 16}}


@pytest.fixture(autouse=True)
def every_layer_is_kept(monkeypatch):
    monkeypatch.setattr(resume.Workspace, "due", lambda *_: True)


def data():
    generator = torch.Generator().manual_seed(1)
    return calib.from_tokens(torch.randint(0, toys.VOCABULARY, (6, 64), generator=generator))


def hashed(model) -> str:
    """Of the integers, scales, and all other weights; what is decoded from them may have zeros of either sign."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def quantized(folder, method, inputs="quantized", stop_after=None, layers=4, kind="qwen"):
    """(hash of the model, records without times). stop_after: the layer at which the run breaks off."""
    name, _, _ = method.partition(" ")
    model = toys.make_toy(kind, layers=layers)

    def progress(done, total, text):
        if done == stop_after:
            raise KeyboardInterrupt

    with resume.into(folder, {"method": method}):
        records = walk.quantize_model(build(name, **METHODS[method]), model, data(), progress, True, inputs)
    return hashed(model), [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_gives_the_same_model_and_records(tmp_path, method, monkeypatch):
    expected = quantized(tmp_path / "undisturbed", method)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "x", method, stop_after=2)
    assert (tmp_path / "x" / "layer-001.pt").exists() and not (tmp_path / "x" / "layer-002.pt").exists()
    rounded = []
    commit = walk.commit
    monkeypatch.setattr(walk, "commit", lambda model, view, edit: (rounded.append(view.index), commit(model, view, edit)))
    assert quantized(tmp_path / "x", method) == expected
    assert min(rounded) == 2  # what was done is not done again
    assert not (tmp_path / "x").exists()


def test_a_beam_goes_on_behind_its_last_layer(tmp_path, monkeypatch):
    """Interrupted in its third layer, and again in its last: no layer is searched twice, and the end is the same."""
    expected, searched = quantized(tmp_path / "undisturbed", "cka-hybrid beam"), []

    def tell(text, stops):
        searched.append(int(text.split()[4]))
        if searched[-1] in stops:
            raise KeyboardInterrupt

    for stops in ((3,), (4,)):
        monkeypatch.setattr(search.progress, "tell", partial(tell, stops=stops))
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path / "x", "cka-hybrid beam")
    monkeypatch.setattr(search.progress, "tell", partial(tell, stops=()))
    assert quantized(tmp_path / "x", "cka-hybrid beam") == expected
    assert searched == [1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("method, place, target", [
    ("cka-hybrid by site", "suite.select.SelectBySite.quantize", "a rehearsal chooses layer by layer"),
    ("cka-hybrid by site", "suite.search.Refinement._score", "a refinement measures one assignment after the other"),
    ("mp-gptq by loss", "baselines.mp_gptq.MPGPTQ._row", "sensitivities come layer by layer")])
def test_what_is_measured_before_the_walk_is_not_measured_again(tmp_path, method, place, target, monkeypatch):
    """Interrupted before its first measurement, in the middle and near the end: each is made once, to the same result."""
    module, owner, name = place.rsplit(".", 2)
    owner, calls = getattr(importlib.import_module(module), owner), []
    plain = getattr(owner, name)

    def counted(stop):
        def call(*arguments, **further):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            return plain(*arguments, **further)
        monkeypatch.setattr(owner, name, call)

    counted(None)
    expected, usual = quantized(tmp_path / "undisturbed", method), len(calls)
    calls.clear()
    for stop in (0, usual // 3, usual // 2):
        counted(stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path / "x", method)
    counted(None)
    assert quantized(tmp_path / "x", method) == expected
    assert usual >= 4 and len(calls) == usual, target


def test_also_on_full_precision_inputs(tmp_path):
    expected = quantized(tmp_path / "undisturbed", "gptq", "full")
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "x", "gptq", "full", stop_after=1)
    assert quantized(tmp_path / "x", "gptq", "full") == expected
    assert expected[0] != quantized(tmp_path / "y", "gptq")[0]


def test_a_run_that_was_killed_after_its_last_layer(tmp_path):
    expected = quantized(tmp_path / "undisturbed", "gptq")
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "x", "gptq", stop_after=4)
    assert quantized(tmp_path / "x", "gptq") == expected


def test_killed_at_random_moments(tmp_path):
    """Twenty processes, killed without a warning; each time the next one goes on, and comes to the same end."""
    method = "cka-hybrid"
    start = time.monotonic()
    expected = quantized(tmp_path / "undisturbed", method)
    usual = time.monotonic() - start
    draw, at = random.Random(0), []
    for trial in range(20):
        folder = tmp_path / str(trial)
        child = os.fork()
        if child == 0:
            quantized(folder, method)
            os._exit(0)
        time.sleep(draw.uniform(0.05, 0.95) * usual)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        at.append(len(list(folder.glob("layer-*.pt"))) if folder.exists() else -1)
        assert quantized(folder, method) == expected, f"killed after {at[-1]} layers"
    assert len(set(at)) > 2  # the moments were different ones


def test_another_run_refuses_to_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "x", "gptq", stop_after=2)
    with pytest.raises(PTQError, match="state of another run, which differs in method"):
        quantized(tmp_path / "x", "cka-hybrid")


@pytest.mark.parametrize("key", ["model", "calibration", "versions", "device"])
def test_nor_with_another_model_or_library(tmp_path, key):
    identity = {"model": {"digest": "a"}, "calibration": {"digest": "b"}, "versions": {"torch": "2"}, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt), resume.into(tmp_path / "x", identity) as workspace:
        workspace.save("state", 1)
        raise KeyboardInterrupt
    with pytest.raises(PTQError, match=f"differs in {key}: repeat that run"):
        resume.into(tmp_path / "x", {**identity, key: "c"}).__enter__()
    with resume.into(tmp_path / "x", identity) as workspace:
        assert workspace.load("state") == 1


def test_a_layer_comes_back_as_it_was():
    """Every kind of linear, bias, scale and zero point."""
    for method, kind in (("gptq", "llama"), ("awq", "qwen"), ("gptq W16A8", "qwen")):
        model, other = toys.make_toy(kind), toys.make_toy(kind)
        options = METHODS[method] | ({"symmetric": False} if method == "awq" else {})
        walk.quantize_model(build(method.split()[0], **options), model, data())
        for i in range(len(arch.layers(model))):
            layer_state.put_(other, i, layer_state.take(arch.layers(model)[i]))
        tokens = data().tokens
        assert torch.equal(model(tokens).logits, other(tokens).logits) and str(model) == str(other)
        assert hashed(model) == hashed(other)


# ---------------------------------------------------------------------------------------------- evaluation


def test_windows_go_on_after_the_last_finished_batch(tmp_path, monkeypatch):
    model, tokens = toys.make_toy(), torch.randint(0, toys.VOCABULARY, (10, 32))
    expected, batches = windows.window_nll(model, tokens, 2), []

    def stop(done, total):
        batches.append(done)
        if len(batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), resume.into(tmp_path / "x", {}):
        windows.window_nll(model, tokens, 2, stop, keep_as="w")
    with resume.into(tmp_path / "x", {}):
        assert torch.equal(windows.window_nll(model, tokens, 2, lambda done, _: batches.append(done), "w"), expected)
    assert batches == [2, 4, 6, 8, 10]
    assert torch.equal(windows.window_nll(model, tokens, 2, keep_as="w"), expected)  # and without a workspace


@pytest.mark.parametrize("task", ["world_math", "world_events"])
def test_answers_are_asked_once(tmp_path, toy_folder, monkeypatch, task):
    """An evaluation that breaks off in the middle asks the rest only, and ends with the same result."""
    from lm_eval.models.huggingface import HFLM

    from suite import models
    from suite.adapter import PTQ
    from suite.evaluation import Tasks, evaluate_quietly, outcome_of

    tests = Tasks([task], limit=4)
    harness = PTQ(str(toy_folder), batch_size=2)
    expected = outcome_of(task, evaluate_quietly(harness, tests, task))
    run, asked = {"forward": 0, "stop": None}, []
    call = HFLM._model_generate if task == "world_math" else HFLM._model_call

    def counted(self, *arguments, **named):
        run["forward"] += 1
        if run["forward"] == run["stop"]:
            raise KeyboardInterrupt
        return call(self, *arguments, **named)

    monkeypatch.setattr(HFLM, call.__name__, counted)
    for stop in (None, 2, None):
        run.update(forward=0, stop=stop)
        folder = tmp_path / ("whole" if not asked else "x")
        try:
            with resume.into(folder, {"model": models.identify(str(toy_folder))}):
                found = outcome_of(task, evaluate_quietly(PTQ(str(toy_folder), batch_size=2), tests, task))
        except KeyboardInterrupt:
            found = None
        asked.append(run["forward"])
    assert found == expected
    assert asked[0] > asked[2] == asked[0] - 1  # one batch was finished before the interruption
