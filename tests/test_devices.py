"""Several devices: candidates side by side give what one after another gives, bit for bit; an evaluation that
`accelerate launch` splits over processes gives the scores of one."""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toys

from suite import calib, candidates, depot, measuring, models, walk
from suite.errors import PTQError
from suite.method import build

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
HYBRIDS = {"paper": {}, "kl": {"metric": "kl"}, "blocks": {"block": 2}, "sites": {"unit": "site"},
           "beam": {"search": "beam", "width": 2}, "farthest": {"pick": "farthest", "pool": ("rtn", "gptq")}}


def data():
    generator = torch.Generator().manual_seed(1)
    return calib.from_tokens(torch.randint(0, toys.VOCABULARY, (4, 48), generator=generator))


def quantized(options, devices, inputs="quantized", place="device"):
    model = toys.make_toy("qwen", layers=3)
    with candidates.on(devices), depot.of(place):
        records = walk.quantize_model(build("cka-hybrid", **options), model, data(), diagnostics=True, inputs=inputs)
    return model.state_dict(), [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys() and all(torch.equal(one[0][key], other[0][key]) for key in one[0])


@pytest.mark.parametrize("name", HYBRIDS)
def test_candidates_side_by_side_change_nothing(name):
    assert_same(quantized(HYBRIDS[name], [CPU]), quantized(HYBRIDS[name], [CPU, CPU]))


@pytest.mark.parametrize("inputs", ["quantized", "full"])
def test_nor_with_activations_elsewhere_and_other_inputs(inputs):
    options = {"block": 2, "pool": ("rtn", "gptq")}
    assert_same(quantized(options, [], inputs), quantized(options, [CPU, CPU, CPU], inputs, "disk"))


@pytest.fixture
def view():
    with candidates.on([CPU, CPU]):
        yield next(walk.walk(toys.make_toy(layers=2), data(), reference=2))


def test_they_do_run_at_the_same_time_each_on_a_twin(view):
    together, seen = threading.Barrier(2, timeout=30), []

    def make(twin):
        together.wait()  # passed by two, or by none
        seen.append((twin, depot._CURRENT.get()[0], torch.is_grad_enabled()))
        return build("gptq").quantize(twin)

    before = {key: value.clone() for key, value in view._original.items()}
    with depot.of("host"), torch.no_grad():
        found = dict(candidates.Candidates(view).tried({"a": make, "b": make}))
    twins = [twin for twin, *_ in seen]
    assert twins[0] is not twins[1] and view not in twins and twins[0]._layer is not twins[1]._layer
    assert [rest for _, *rest in seen] == [["host", False]] * 2  # what holds for the caller holds for its threads
    assert found["a"].scores == found["b"].scores and not view._stats
    assert all(torch.equal(view._original[key], value) for key, value in before.items())


def test_the_one_that_is_kept_is_not_run_again(view, monkeypatch):
    tried = dict(candidates.Candidates(view).tried({name: build(name).quantize for name in ("rtn", "gptq")}))
    edit = tried["rtn"].keep()
    tried["gptq"].drop()
    monkeypatch.setattr(walk, "functional_call", lambda *_: pytest.fail("a layer was run"))
    assert view.after(edit).outputs(2).shape == (2, 48, 128)


def test_an_error_in_one_of_them_arrives(view):
    def broken(_):
        raise PTQError("this one is broken")

    with pytest.raises(PTQError, match="this one is broken"):
        list(candidates.Candidates(view).tried({"good": build("rtn").quantize, "bad": broken}))


def test_devices_have_names():
    assert models.devices_of(["cpu"]) == (CPU,)
    if not torch.cuda.is_available():
        assert models.devices_of(["all"]) == (CPU,)
        with pytest.raises(PTQError, match="'cuda:1' is not there"):
            models.devices_of(["cuda:0", "cuda:1"][1:])


def test_each_worker_has_a_device_of_its_own(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Job:
        device: str = "cuda"
        steps = 1

        def do(self, runner, loaded, tell):
            tell(1, self.device)

    told = queue.SimpleQueue()
    for device in ("cuda:1", None):
        waiting = iter([(0, Job()), None])
        measuring._work(SimpleNamespace(get=lambda: next(waiting)), told, (), device)
    assert [told.get()[2] for _ in range(2)] == ["cuda:1", "cuda"]

    class Queue(queue.Queue):  # as one of multiprocessing
        cancel_join_thread = staticmethod(lambda: None)

    started = []
    process = SimpleNamespace(start=lambda: None, terminate=lambda: None, join=lambda timeout=None: None)
    context = SimpleNamespace(Queue=Queue, Process=lambda args, **_: (started.append(args[-1]), args[1].put((0, 1, "", None)),
                                                                   args[1].put((1, 1, "", None)), process)[-1])
    monkeypatch.setattr(measuring.multiprocessing, "get_context", lambda _: context)
    measuring.run([Job(), Job()], None, devices=("cuda:0", "cuda:1"))
    measuring.run([Job(), Job()], 2, devices=())
    assert started == ["cuda:0", "cuda:1", None, None]


def test_devices_of_the_command_line(ptq):
    quantize = ["quantize", "--model", "tiny-llama-s", "--out", "out", "--devices", "cpu", "--method"]
    for line, words in (([*quantize, "gptq"], "no effect with method gptq"),
                        ([*quantize, "cka-hybrid", "--device", "cpu"], "--device and --devices are both given"),
                        (["reproduce", "tiny-llama-s", "--devices", "tpu"], "device is 'tpu'")):
        status, out, err = ptq(*line)
        assert status == 2 and words in err and err.count("\n") == 1 and not out


# ---------------------------------------------------------------------------------------------- several processes

EVALUATE = """
import json, sys
import lm_eval, suite.adapter
arguments, tasks, out = json.loads(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
found = lm_eval.simple_evaluate(model="ptq", model_args=arguments, tasks=tasks, limit=5, batch_size=1, bootstrap_iters=0,
                                task_manager=suite.adapter.task_manager())
if found:
    open(out, "x").write(json.dumps({"results": found["results"], "counts": found["n-samples"]}))
"""


@pytest.mark.slow
def test_accelerate_launch_gives_the_scores_of_one_process(toy_folder, toy_text_file, tmp_path):
    import lm_eval

    from suite import adapter

    arguments = {"pretrained": str(toy_folder), "method": "gptq", "wbits": 3, "abits": 8, "calib": str(toy_text_file),
                 "nsamples": 2, "seqlen": 32}
    tasks = ["world_events", "world_math", "world_wiki_ppl"]
    script, out = tmp_path / "evaluate.py", tmp_path / "out.json"
    script.write_text(EVALUATE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, str(script), json.dumps(arguments), ",".join(tasks), str(out)], text=True,
                          capture_output=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    several = json.loads(out.read_text())
    one = lm_eval.simple_evaluate(model="ptq", model_args=arguments, tasks=tasks, limit=5, batch_size=1, bootstrap_iters=0,
                                  task_manager=adapter.task_manager())
    assert {several["counts"][task]["effective"] for task in tasks[:2]} == {5}  # and not 10: each was asked once
    for task in tasks:
        expected = {k: v for k, v in one["results"][task].items() if isinstance(v, float)}
        assert expected and {k: several["results"][task][k] for k in expected} == pytest.approx(expected, rel=1e-9)


def test_other_commands_do_not_run_in_several_processes(ptq, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ptq("ls", "metrics")[0] == 0  # a cluster may set this for everything
    monkeypatch.setenv("LOCAL_RANK", "0")
    status, out, err = ptq("reproduce", "tiny-llama-s")
    assert status == 2 and "started in 2 processes" in err and "--devices" in err and not out


def test_processes_must_agree_on_the_model(toy_folder, toy_text_file, monkeypatch):
    from suite import adapter

    class Team:
        device, process_index, num_processes = CPU, 0, 2

        def unwrap_model(self, model):
            return model

    monkeypatch.setattr(adapter, "_team", Team)
    monkeypatch.setattr(adapter, "gather_object", lambda mine: [*mine, *mine])
    arguments = {"method": "rtn", "calib": str(toy_text_file), "nsamples": 2, "seqlen": 16}
    assert adapter.PTQ(str(toy_folder), **arguments).world_size == 2
    monkeypatch.setattr(adapter, "gather_object", lambda mine: [*mine, "of another GPU"])
    assert adapter.PTQ(str(toy_folder)).world_size == 2  # as it is on disk: nothing to differ in
    with pytest.raises(PTQError, match="2 processes have not quantized to the same model.*pretrained=FOLDER"):
        adapter.PTQ(str(toy_folder), **arguments)
