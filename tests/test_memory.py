"""A model is quantized in the memory there is: one layer at a time, activations in a file, and the need told before."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from suite import arch, calib, checkpoint, depot, models, preflight, resume, stream, walk
from suite.errors import PTQError
from suite.method import build
from suite.paths import known_models
from suite.preflight import GIB, Free, Run, Shape, need, plan


def data(n=6, t=64):
    generator = torch.Generator().manual_seed(1)
    return calib.from_tokens(torch.randint(0, toys.VOCABULARY, (n, t), generator=generator))


@pytest.fixture(scope="module", params=["llama", "qwen"])
def folder(request, tmp_path_factory):
    """A model of four layers, its weights in two files."""
    path = toys.save_toy(tmp_path_factory.mktemp("models") / request.param, request.param, layers=4)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def present(model) -> list[int]:
    """The layers that hold weights."""
    return [i for i, layer in enumerate(arch.layers(model)) if not any(p.is_meta for p in layer.parameters())]


def saved(folder, out, method, by_layer, stop_after=None, sequences=None, **options):
    loaded = models.load(str(folder), by_layer=by_layer)
    seen = []

    def progress(done, total, text):
        seen.append(present(loaded.model))
        if done == stop_after:
            raise KeyboardInterrupt

    with resume.into(out.with_name(f"{out.name}.partial"), {"m": method}) as workspace:
        layers = walk.quantize_model(build(method, **options), loaded.model, sequences or data(), progress, True)
        states = [workspace.load(f"layer-{i:03d}", lazily=True) for i in range(4)] if by_layer else None
        checkpoint.save(loaded.model, loaded.tokenizer, out, {"method": method}, layers=states)
    return [{k: v for k, v in one.items() if k != "seconds"} for one in layers], seen


@pytest.mark.parametrize("method", ["gptq", "cka-hybrid", "rtn"])
def test_layer_by_layer_gives_the_same_folder(folder, tmp_path, method):
    whole, _ = saved(folder, tmp_path / "whole", method, False)
    layered, seen = saved(folder, tmp_path / "layered", method, True)
    assert layered == whole
    assert max(map(len, seen)) <= 1 and len(seen) == 4  # never two layers in memory
    for name in ("quantized.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "layered" / name).read_bytes()
    told = [json.loads((tmp_path / one / "ptq.json").read_text()) for one in ("whole", "layered")]
    assert told[0] == told[1]


def test_layer_by_layer_continues_after_an_interruption(folder, tmp_path):
    saved(folder, tmp_path / "whole", "gptq", True)
    with pytest.raises(KeyboardInterrupt):
        saved(folder, tmp_path / "again", "gptq", True, stop_after=2)
    _, seen = saved(folder, tmp_path / "again", "gptq", True)
    assert len(seen) == 3  # told once that two are done, then each of the others
    assert (tmp_path / "whole" / "quantized.safetensors").read_bytes() == (
        tmp_path / "again" / "quantized.safetensors").read_bytes()


def test_a_streamed_model_needs_a_place_for_its_layers(folder):
    loaded = models.load(str(folder), by_layer=True)
    assert stream.is_streamed(loaded.model) and present(loaded.model) == []
    with pytest.raises(PTQError, match="into a folder only"):
        walk.quantize_model(build("gptq"), loaded.model, data())
    with pytest.raises(PTQError, match="planted into a whole model"):
        models.load(f"{folder}@outliers=8", by_layer=True)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_activations_elsewhere_change_nothing(tmp_path, place):
    results = []
    for where in ("device", place):
        model = toys.make_toy(layers=3)
        with depot.of(where, tmp_path / "files"):
            walk.quantize_model(build("cka-hybrid"), model, data(), diagnostics=True)
            (view, *_) = walk.walk(model, data())
            mapped = view.inputs()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert mapped.shape[0] == 6 and list(tmp_path.rglob("*.tmp")) == []  # files go with their tensors
    if place == "disk":
        assert (tmp_path / "files").is_dir()


def test_a_quantized_layer_holds_no_activations():
    """One rounded copy for the linears that read one tensor, and only while that tensor lives."""
    from suite.grid import QuantSpec
    from suite.linear import TokenRounding

    rounding, x = TokenRounding(QuantSpec(8, True, None)), torch.randn(4, 8)
    with torch.no_grad():
        assert rounding(x) is rounding(x)
        x[0] = 0
        assert not rounding(x)[0].any()  # a change in place is seen
        del x
    assert rounding._rounded is None


def test_places_have_names():
    with pytest.raises(PTQError, match="unknown place for activations 'dsk': did you mean 'disk'"), depot.of("dsk"):
        pass


# ---------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("name", known_models())
def test_the_shapes_of_known_models_have_their_parameters(name):
    known = known_models()[name]
    assert Shape.of(known["shape"]).parameters == known["parameters"]


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_the_shape_of_a_model_has_its_parameters(kind):
    model = toys.make_toy(kind)
    assert Shape.of(model.config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


LARGE = Run(Shape.of(known_models()["llama-3-8b"]["shape"]), 128, 2048, 2, cuda=True, candidates=3)
ROOMY = Free(80 * GIB, 200 * GIB, 500 * GIB)


def test_the_first_way_that_fits_is_taken():
    assert not plan(LARGE, ROOMY, 1e14).run.by_layer
    small_gpu = plan(LARGE, Free(16 * GIB, 200 * GIB, 500 * GIB), 1e14)
    assert small_gpu.run.by_layer and small_gpu.run.activations == "device" and small_gpu.lacks == []
    tiny_gpu = plan(LARGE, Free(12 * GIB, 200 * GIB, 500 * GIB), 1e14)
    assert tiny_gpu.run.activations == "host" and tiny_gpu.need.device < small_gpu.need.device
    little_memory = plan(LARGE, Free(12 * GIB, 10 * GIB, 500 * GIB), 1e14)
    assert little_memory.run.activations == "disk" and little_memory.need.host < tiny_gpu.need.host


@pytest.mark.parametrize(("free", "given", "words"), [
    (Free(16 * GIB, 200 * GIB, 500 * GIB), {"by_layer": False}, ["GPU memory", "--load layer"]),
    (Free(12 * GIB, 200 * GIB, 500 * GIB), {"activations": "device"}, ["GPU memory", "--activations disk"]),
    (Free(2 * GIB, 200 * GIB, 500 * GIB), {}, ["GPU memory", "--nsamples 32"]),
    (Free(80 * GIB, 200 * GIB, 5 * GIB), {}, ["lack of disk", "--out on another disk"]),
])
def test_what_cannot_fit_is_refused_with_what_would_help(free, given, words):
    with pytest.raises(PTQError) as caught:
        plan(LARGE, free, 1e14, **given)
    for word in ["does not fit", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_needs_grow_with_what_they_depend_on():
    from dataclasses import replace

    base = need(LARGE)
    assert need(replace(LARGE, nsamples=256)).device > base.device
    assert need(replace(LARGE, bytes=4)).device > 1.5 * base.device
    assert need(replace(LARGE, candidates=1)).operations < base.operations
    assert need(replace(LARGE, by_layer=True)).device < base.device / 2
    assert need(replace(LARGE, cuda=False)).device == 0


def test_free_memory_is_measured(tmp_path):
    free = Free.now(tmp_path / "not" / "there", torch.device("cpu"))
    assert 0 < free.host <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") and free.disk > 0
    assert preflight.rate(torch.device("cpu"), torch.float32, 0.01) > 1e8


def test_the_command_refuses_and_tells(toy_folder, tmp_path, monkeypatch, capsys):
    from suite import cli

    def run(*line):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in line])
        return exit_.value.code, *capsys.readouterr()

    status, out, _ = run("plan", toy_folder, "--json")
    told = json.loads(out)
    assert status == 0 and told["need"]["host"] > 0 and told["lacks"] == [] and told["seconds"] > 0
    monkeypatch.setattr(preflight, "host_memory", lambda: 10 * 2**20)
    out_folder = tmp_path / "out"
    status, out, err = run("quantize", "--model", toy_folder, "--method", "gptq", "--out", out_folder)
    assert status == 2 and "does not fit, for lack of memory" in err and not out_folder.exists()


def test_every_long_command_tells_and_refuses(ptq, toy_folder, toy_text_file, tmp_path, monkeypatch):
    """Where a model counts as large, or there is much to calibrate on."""
    from suite import experiments, measuring
    from suite.adapter import PTQ

    monkeypatch.setattr(experiments, "_ANNOUNCED_TOKENS", 1)
    monkeypatch.setattr(preflight, "LARGE_WIDTH", 1)
    monkeypatch.setattr(preflight, "rate", lambda *_: 1e9)
    monkeypatch.setattr(measuring, "run", lambda *_, **__: pytest.fail("went on"))
    given = ["--calib", toy_text_file, "--nsamples", "2", "--seqlen", "32", "--tasks", "world_events", "--limit", "1"]
    lines = [["reproduce", toy_folder, "--methods", "fp16,rtn", *given],
             ["compare", "gptq", "--against", "rtn", "--model", toy_folder, *given, "--repeats", "0"],
             ["baseline", "save", "mine", "--model", toy_folder, "--methods", "rtn", *given, "--repeats", "0"]]
    for line in lines:
        with pytest.raises(pytest.fail.Exception, match="went on"):
            ptq(*line)
    with monkeypatch.context() as patched:
        patched.setattr(preflight, "host_memory", lambda: 2**18)
        for line in lines:
            status, _, err = ptq(*line)
            last = err.splitlines()[-1]
            assert status == 2 and "does not fit, for lack of memory" in last and "--load" not in last
        with pytest.raises(PTQError, match="does not fit, for lack of memory"):
            PTQ(str(toy_folder), method="gptq", calib=str(toy_text_file), nsamples=2, seqlen=32)


def test_what_is_told_before_a_grid_of_runs(toy_folder, tmp_path, monkeypatch):
    from suite import experiments
    from suite.store import Store

    told, jobs = [], [SimpleNamespace(small=True, device="cpu", dtype="float32", variant=SimpleNamespace(
        method=method, diagnosed_on=data())) for method in (build("gptq"), build("spinquant"), build("cka-hybrid"))]
    source, store = models.resolve(str(toy_folder)), Store(tmp_path)
    experiments.check_memory(jobs, source, store, told.append)
    assert told == []  # too little to speak of
    monkeypatch.setattr(experiments, "_ANNOUNCED_TOKENS", 1)
    experiments.check_memory(jobs, source, store, told.append)
    (line,) = told
    for word in ("toy-llama needs", "of memory", "of disk", "about", "for each of 3 variants at most", "on top"):
        assert word in line
    learning = preflight.quantization(source, build("spinquant"), 6, 64, None, speed=1e9)
    assert learning.seconds > 10 * preflight.quantization(source, build("gptq"), 6, 64, None, speed=1e9).seconds
    assert learning.need.disk == 0 and "disk" not in learning.told()


def test_a_plan_for_a_method_of_ones_own(ptq, toy_folder):
    example = Path(__file__).resolve().parent.parent / "examples" / "range_search.py"
    status, out, err = ptq("plan", toy_folder, "--plugin", example, "--method", "range_search")
    assert status == 0 and "range_search W4A8" in out, err


def test_random_weights_in_real_shapes_are_measured(tmp_path, monkeypatch, capsys):
    """The script of the measurements, on a toy of a shape; each row beside its estimate."""
    from suite import bench_shapes

    shape = {**toys.make_toy().config.to_dict(), "num_hidden_layers": 3}
    shape = {key: shape[key] for key in known_models()["llama-3-8b"]["shape"]}
    monkeypatch.setattr(bench_shapes, "known_models", lambda: {"toy": {"shape": shape}})
    monkeypatch.setattr(bench_shapes, "in_its_own_process", bench_shapes.measure)
    out = tmp_path / "shapes.json"
    line = ["--shape", "toy", "--layers", "2", "--nsamples", "2", "--seqlen", "32", "--device", "cpu", "--out", str(out)]
    bench_shapes.main([*line, "--method", "gptq", "--method", "rtn"])
    bench_shapes.main([*line, "--method", "spinquant"])
    told = json.loads(out.read_text())
    assert [(row["method"], row["layers"]) for row in told["rows"]] == [("gptq", 2), ("rtn", 2), ("spinquant", 2)]
    for row in told["rows"]:
        assert row["peak_mib"] == pytest.approx(row["estimated_mib"], rel=0.2) and row["seconds"] > 0
    assert 0 < told["rows"][0]["share_of_matrix_products"] < 1 and told["rows"][1]["share_of_matrix_products"] is None
    assert set(told["hardware"]) == {"cpu", "cores", "threads", "memory_gib", "gpus", "system"}
    page = out.with_suffix(".md").read_text()
    assert "| toy | 2 | 2 x 32 | gptq |" in page and page.count("| toy |") == 3
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_command_quantizes_layer_by_layer(toy_folder, toy_text_file, tmp_path, capsys):
    from suite import cli

    folders = []
    for load in ("whole", "layer"):
        folders.append(tmp_path / load)
        with pytest.raises(SystemExit) as exit_:
            cli.main(["quantize", "--model", str(toy_folder), "--method", "gptq", "--calib", str(toy_text_file),
                      "--nsamples", "4", "--seqlen", "64", "--load", load, "--activations", "disk",
                      "--out", str(folders[-1])])
        assert exit_.value.code == 0
    whole, layered = (folder / "quantized.safetensors" for folder in folders)
    assert whole.read_bytes() == layered.read_bytes()
    memory = json.loads((folders[1] / "ptq.json").read_text())["record"]["memory"]
    assert memory["by_layer"] and memory["activations"] == "disk"
    assert memory["measured_mib"] == pytest.approx(memory["estimated_mib"], rel=0.2)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
