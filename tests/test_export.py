"""Exported checkpoints: transformers computes what the suite computes, nothing is lost, and nothing is half-written."""

import json
import shutil

import fake_records as fake
import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from suite import calib, card, checkpoint, cli, export, importing, kv, method, models, recipe, walk
from suite.errors import PTQError
from suite.linear import QuantLinear
from suite.store import Store

TOKENS = torch.randint(0, toys.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(5))
CALIBRATION = calib.from_tokens(torch.randint(0, toys.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(6)))


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    """The library draws a bar for every step, on by default even where nobody looks."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


def quantized(kind="llama", dtype=torch.float32, name="rtn", **options):
    model = toys.make_toy(kind, dtype)
    layers = walk.quantize_model(method.build(name, **options), model, CALIBRATION)
    return model, layers


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.float()


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def distance(a, b):
    return float((a - b).norm() / b.norm())


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, toy_tokenizer):
    """A folder of `ptq quantize`: W4A8. Shared: tests only read it."""
    record = {"method": method.to_config(method.build("rtn")), "scheme": "W4A8 g128", "mode": "matched",
              "model": {"name": "toy", "digest": "0" * 64}}
    model, layers = quantized()
    return checkpoint.save(model, toy_tokenizer, tmp_path_factory.mktemp("quantized") / "toy",
                           {**record, "layers": layers})


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    return export.export(source, tmp_path_factory.mktemp("exported") / "toy")


# ---------------------------------------------------------------------------------------------- the other side


@pytest.mark.parametrize("kind, name, options, form", [
    ("llama", "gptq", {}, "pack-quantized"),
    ("qwen", "awq", {"abits": 16}, "pack-quantized"),
    ("llama-tied", "smoothquant+gptq", {"wbits": 8, "group_size": 0}, "int-quantized"),
    ("llama", "rtn", {"wbits": 8}, "pack-quantized"),
    ("llama", "gptq", {"wbits": 3, "abits": 16}, "pack-quantized"),
    ("qwen", "rtn", {"wbits": 5, "abits": 4, "group_size": 64}, "pack-quantized"),
    ("llama", "spinquant", {"rotation": "random-hadamard"}, "pack-quantized"),
    ("qwen", "cka-hybrid", {}, "pack-quantized"),
    ("llama", "rtn", {"wbits": 16}, "dense"),
], ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else str(value))
def test_transformers_computes_the_same(tmp_path, toy_tokenizer, kind, name, options, form):
    model, _ = quantized(kind, name=name, **options)
    folder = export.write(model, toy_tokenizer, tmp_path / "out", {})
    other = loaded(folder)
    assert distance(logits(other), logits(model)) < 1e-5
    assert quantization_config(folder)["format"] == form
    assert torch.equal(logits(models.load(str(folder), device="cpu").model), logits(model))
    first = load_file(folder / "model.safetensors")
    again = load_file(export.export(folder, tmp_path / "again") / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) and first[key].dtype == again[key].dtype for key in first)


@pytest.mark.parametrize("abits", [8, 4])
def test_activations_are_rounded_by_the_loaded_model(tmp_path, toy_tokenizer, abits):
    """Fails where a loader silently runs weight-only: the rounded logits are far from those with rounding off."""
    model, _ = quantized(abits=abits)
    other = loaded(export.write(model, toy_tokenizer, tmp_path / "out", {}))
    rounded = logits(other)
    switched = [m for m in other.modules() if hasattr(m, "quantization_scheme")]
    assert len(switched) == 14
    for module in switched:
        module.quantization_enabled = False
    apart = distance(logits(other), rounded)
    assert apart > 1e-3 and distance(rounded, logits(model)) < apart / 100


def test_bits_by_layer_become_groups(tmp_path, toy_tokenizer):
    model, _ = quantized()
    wide, _ = quantized(name="rtn", wbits=8, abits=8)
    whole, _ = quantized(name="rtn", wbits=16, abits=8)
    layer = model.model.layers[1]
    layer.mlp, layer.self_attn.o_proj = wide.model.layers[1].mlp, whole.model.layers[1].self_attn.o_proj
    folder = export.write(model, toy_tokenizer, tmp_path / "out", {})
    groups = quantization_config(folder)["config_groups"]
    bits = {(g["weights"] or {}).get("num_bits"): g["targets"] for g in groups.values()}
    assert set(bits) == {4, 8, None} and bits[None] == ["model.layers.1.self_attn.o_proj"]
    assert bits[8] == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert distance(logits(loaded(folder)), logits(model)) < 1e-5


def test_linears_left_alone_are_ignored(tmp_path, toy_tokenizer):
    model, _ = quantized()
    plain = toys.make_toy().model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = plain
    folder = export.write(model, toy_tokenizer, tmp_path / "out", {})
    assert quantization_config(folder)["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    other = loaded(folder)
    assert not hasattr(other.model.layers[0].mlp.down_proj, "quantization_scheme")
    assert distance(logits(other), logits(model)) < 1e-5


def test_zero_points_are_packed_as_the_format_packs_them(tmp_path, toy_tokenizer):
    """transformers loads asymmetric checkpoints to dense weights only: its other path expects zero points unpacked."""
    model, _ = quantized(symmetric=False, abits=16)
    folder = export.write(model, toy_tokenizer, tmp_path / "out", {})
    zero = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight_zero_point"]
    assert zero.dtype == torch.int32 and zero.shape == (128 * 4 // 32, 1)
    other = loaded(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    # Decoded in the type of the scales, so to bfloat16.
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(other.model.layers[0].self_attn.q_proj.weight, weight.bfloat16().float())
    assert torch.equal(logits(importing.load(folder)[0]), logits(model))


@pytest.mark.parametrize("abits", [8, 16])
def test_bfloat16(tmp_path, toy_tokenizer, abits):
    """The codes and the weights are the same. transformers divides by a scale in bfloat16, so its inputs are not, unless
    it is asked for float32; where no activations are rounded, everything is the same."""
    model, _ = quantized(dtype=torch.bfloat16, wbits=8, abits=abits)
    folder = export.write(model, toy_tokenizer, tmp_path / "out", {})
    other, ours = loaded(folder), importing.load(folder)[0]
    assert other.dtype == ours.dtype == torch.bfloat16
    assert distance(logits(other), logits(ours)) < (0.1 if abits == 8 else 1e-6)
    assert torch.equal(other.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    wide = importing.load(folder, torch.float32)[0]
    assert distance(logits(loaded(folder, dtype=torch.float32)), logits(wide)) < 1e-5


def test_generation_is_the_same(exported, source):
    other, ours = loaded(exported), checkpoint.load(source)[0]
    generate = dict(inputs=TOKENS[:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert torch.equal(other.generate(**generate), ours.generate(**generate))


# ---------------------------------------------------------------------------------------------- what is on disk


def test_files(exported, source):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "ptq_export.json",
            "generation_config.json"} <= names
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear"] and config["quantization_config"]["ignore"] == ["lm_head"]
    assert group["weights"]["num_bits"] == 4 and group["weights"]["group_size"] == 128
    activations = group["input_activations"]
    assert (activations["num_bits"], activations["strategy"], activations["dynamic"]) == (8, "token", True)
    tensors = load_file(exported / "model.safetensors")
    name = "model.layers.0.mlp.down_proj."
    assert tensors[name + "weight_packed"].shape == (128, 256 * 4 // 32) and name + "weight" not in tensors
    assert tensors[name + "weight_scale"].dtype == torch.bfloat16
    assert importing.read_record(exported) == checkpoint.read_record(source)["record"]
    assert models.load(str(exported), device="cpu").record["scheme"] == "W4A8 g128"


@pytest.mark.parametrize("wbits", [3, 4, 8])
def test_size_is_what_the_effective_bits_tell(tmp_path, toy_tokenizer, wbits):
    model, _ = quantized(wbits=wbits)
    tensors = load_file(export.write(model, toy_tokenizer, tmp_path / "out", {}) / "model.safetensors")
    stored = sum(t.nbytes for name, t in tensors.items() if "_proj.weight" in name and not name.endswith("_shape"))
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    told = sum(m.codes.numel() * m.spec.effective_bits(m.in_features) for m in linears) / 8
    assert abs(stored / told - 1) < 0.02


def test_card_tells_how_it_was_made():
    record = {"model": {"name": "org/base", "digest": "ab12"}, "method": method.to_config(method.build("cka-hybrid")),
              "scheme": "W4A8 g128", "mode": "matched",
              "calibration": {"source": "/home/me/text.txt", "digest": "cd34", "nsamples": 4, "seqlen": 64, "seed": 7},
              "layers": [{"layer": 0, "bits": 4.125, "chosen": "awq", "errors": {"cka": 0.25, "mse": 0.5}}]}
    told = card.told(record)
    assert told["calibration"]["source"] == "text.txt"
    measured = [{"task": "world_wiki_ppl", "metric": "perplexity", "value": "5.1000", "full": "5.0000"}]
    text = card.text(toys.make_toy().config, told, [], measured)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/base"
    for part in ("cka-hybrid", "pool=", "4 x 64 tokens of text.txt, seed 7", "cd34", "| 0 | awq | 4.125 | 2.500e-01 |",
                 "| world_wiki_ppl | perplexity | 5.0000 | 5.1000 |"):
        assert part in text
    assert "Nothing was measured" in card.text(toys.make_toy().config, {}, [], [])


def test_what_is_on_record_of_a_model(tmp_path):
    """Found by all that decides a result, or by the checkpoint's own digest; whole tasks only."""
    store, made = Store(tmp_path), fake.variant("gptq")
    record = {key: made[key] for key in ("model", "method", "scheme", "mode", "calibration", "dtype")}
    others = [dict(options={"damp": 0.1}), dict(model={"name": "toy", "digest": "another"}), dict(scheme="W3A8 g128"),
              dict(dtype="bfloat16"), dict(mode="native"), dict(limit=8), dict(kvbits=4), dict(plugins={"gptq": "other"}),
              dict(calibration={**fake.CALIBRATION, "digest": "cafe"})]
    for other in others:
        store.put(fake.evaluation("gptq", "world_wiki_ppl", 0.5, **other))
    assert card.measured(store, record) == []
    wiki = [fake.evaluation("fp16", "world_wiki_ppl"), fake.evaluation("gptq", "world_wiki_ppl", 0.1)]
    for one in wiki:
        store.put(one)
    store.put(fake.evaluation("gptq", "world_math", 0.1))
    first, second = card.measured(store, record)
    values = [f"{one.result['metrics']['perplexity,none']['value']:.4f}" for one in wiki]
    assert first == {"task": "world_wiki_ppl", "metric": "perplexity", "full": values[0], "value": values[1]}
    assert second["task"] == "world_math" and second["full"] == "" and second["value"].endswith(" %")
    store.put(fake.evaluation("theirs", "world_wiki_ppl", 0.2, options={"checkpoint": "d1"}, calibration=None))
    assert card.measured(store, {}) == card.measured(store, {}, "d2") == []
    (row,) = card.measured(store, {}, "d1")
    assert row["full"] == values[0] < values[1] < row["value"]


def test_the_card_of_an_export_holds_what_is_on_record(toy_folder, toy_text_file, tmp_path, capsys):
    options = method.to_config(method.build("rtn"))["options"]
    found = fake.evaluation("rtn", "world_wiki_ppl", 0.1, model=models.identify(str(toy_folder)), options=options)
    Store(tmp_path / "results").put(found)
    for name, results in (("told", tmp_path / "results"), ("untold", tmp_path / "none")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["quantize", "--model", str(toy_folder), "--method", "rtn", "--calib", str(toy_text_file),
                      "--nsamples", "2", "--seqlen", "64", "--out", str(tmp_path / f"{name}-q"),
                      "--export", str(tmp_path / name), "--results", str(results)])
        assert stopped.value.code == 0
    row = f"| world_wiki_ppl | perplexity |  | {found.result['metrics']['perplexity,none']['value']:.4f} |"
    assert row in (tmp_path / "told" / "README.md").read_text()
    assert "Nothing was measured" in (tmp_path / "untold" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------- bad input


def refused(arguments, capsys):
    """The error of a command line that must fail with status 2 and one line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_command_line(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "--model", str(source), "--out", str(tmp_path / "out"), "--format", "compressed-tensors",
                  "--results", str(tmp_path / "none")])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert models.resolve(str(tmp_path / "out")).kind == "quantized"


def test_bad_command_lines(source, toy_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert "is not quantized" in refused(["export", "--model", toy_folder, "--out", out], capsys)
    assert "compressed-tensors" in refused(["export", "--model", source, "--out", out, "--format", "gguf"], capsys)
    assert "does not exist" in refused(["export", "--model", tmp_path / "none", "--out", out], capsys)
    out.mkdir()
    (out / "mine.txt").touch()
    assert "not empty" in refused(["export", "--model", source, "--out", out], capsys)
    assert "not overwritten" in refused(["export", "--model", source, "--out", out, "--overwrite"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list(out.iterdir())) == 1


@pytest.mark.parametrize("options, reason", [
    (["--method", "spinquant", "--variant", "had"], "variant no_had"), (["--method", "rtn", "--kvbits", "8"], "kvbits 16"),
])
def test_quantize_refuses_before_the_work(toy_folder, tmp_path, capsys, options, reason):
    arguments = ["quantize", "--model", toy_folder, "--out", tmp_path / "q", "--export", tmp_path / "e", *options]
    assert reason in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_lacks_is_refused(tmp_path, toy_tokenizer):
    model, _ = quantized(name="spinquant", rotation="none", variant="had")
    with pytest.raises(PTQError, match="down_proj.* rotates activations at run time"):
        export.write(model, toy_tokenizer, tmp_path / "out", {})
    model, _ = quantized()
    kv.set_(model, 4)
    with pytest.raises(PTQError, match="key-value cache of 4 bits"):
        export.write(model, toy_tokenizer, tmp_path / "out", {})
    with pytest.raises(PTQError, match="no quantized linear"):
        export.write(toys.make_toy(), toy_tokenizer, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "text", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_compressor_that_changes_codes_is_found(source, tmp_path, monkeypatch):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor

    real = Compressor.compress.__func__

    def wrong(cls, state, scheme):
        return real(cls, {**state, "weight": state["weight"] * 0.8}, scheme)

    monkeypatch.setattr(Compressor, "compress", classmethod(wrong))
    with pytest.raises(RuntimeError, match="gave other codes"):
        export.export(source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- import


@pytest.fixture
def broken(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "broken")


def change(folder, **changes):
    """Sets values of the first scheme's weights or inputs, e.g. weights__type="float"."""
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for key, value in changes.items():
        part, _, leaf = key.partition("__")
        if leaf:
            group[part][leaf] = value
        else:
            config["quantization_config"][part] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes, reason", [
    (dict(weights__type="float", weights__num_bits=8), "int of 2 to 8 bits"),
    (dict(weights__strategy="tensor", weights__group_size=None), "allowed is group or channel"),
    (dict(input_activations__strategy="tensor", input_activations__dynamic=False), "dynamic, one a token"),
    (dict(input_activations__symmetric=False), "asymmetric"),
    (dict(weights__num_bits="many"), "not what the format allows"),
    (dict(weights__actorder="group"), "not what the format allows"),
    (dict(kv_cache_scheme={"num_bits": 8, "strategy": "tensor"}), "kv_cache_scheme"),
    (dict(transform_config={"config_groups": {"R4": {"type": "hadamard"}}}), "transforms at run time"),
    (dict(quantization_status="frozen"), "'frozen': allowed is 'compressed'"),
    (dict(weights__group_size=64), "does not fit together"),
])
def test_what_cannot_be_imported_is_told(broken, changes, reason):
    change(broken, **changes)
    with pytest.raises(PTQError, match=reason):
        models.load(str(broken), device="cpu")


def test_truncated_and_missing_weights(broken):
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(PTQError, match="corrupt or cut short"):
        models.load(str(broken), device="cpu")
    weights.unlink()
    with pytest.raises(PTQError, match="model.safetensors"):
        models.load(str(broken), device="cpu")


def test_a_missing_tensor_is_told(broken):
    from safetensors.torch import save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PTQError, match="up_proj lacks its weight_scale"):
        models.load(str(broken), device="cpu")


def test_other_formats_are_refused(broken):
    change(broken, quant_method="gptq")
    with pytest.raises(PTQError, match="quantized already, by 'gptq'"):
        models.load(str(broken), device="cpu")
    with pytest.raises(PTQError, match="is no quantized model"):
        importing.load(broken)


def test_ppl_of_a_checkpoint(exported, source, toy_text_file, capsys):
    values = []
    for folder in (exported, source):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["ppl", "--model", str(folder), "--text", str(toy_text_file), "--max-tokens", "600",
                      "--window", "64", "--json"])
        assert stopped.value.code == 0
        values.append(json.loads(capsys.readouterr().out)["ppl"])
    assert values[0] == values[1]


def test_an_import_is_not_quantized_again(exported, tmp_path, capsys):
    assert "quantized already" in refused(
        ["quantize", "--model", exported, "--method", "rtn", "--out", tmp_path / "q"], capsys)


# ---------------------------------------------------------------------------------------------- recipe


def steps(chosen, name="cka-hybrid", **options):
    key = "chosen_by_site" if isinstance(chosen[0], dict) else "chosen"
    record = {"method": method.to_config(method.build(name, **options)),
              "layers": [{"layer": i, key: value} for i, value in enumerate(chosen)]}
    return yaml.safe_load(recipe.text(record))["quantization_stage"]["quantization_modifiers"]


def targets(modifier):
    return modifier["config_groups"]["group_0"]["targets"]


def test_recipe_of_a_hybrid():
    found = steps(["gptq", "awq", "smoothquant+gptq"], wbits=3, abits=16)
    assert list(found) == ["AWQModifier", "SmoothQuantModifier", "GPTQModifier", "QuantizationModifier"]
    assert {layer for t in targets(found["GPTQModifier"]) for layer in "012" if f"({layer})" in t} == {"0", "2"}
    assert r"re:.*layers\.(1)\.mlp\.down_proj$" in targets(found["QuantizationModifier"])
    assert len(targets(found["GPTQModifier"])) == 14 and len(targets(found["QuantizationModifier"])) == 7
    assert found["AWQModifier"]["mappings"][0]["smooth_layer"] == r"re:.*layers\.(1)\.input_layernorm$"
    assert [m[1] for m in found["SmoothQuantModifier"]["mappings"]] == [
        r"re:.*layers\.(2)\.input_layernorm$", r"re:.*layers\.(2)\.post_attention_layernorm$"]
    group = found["GPTQModifier"]["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == 3 and group["input_activations"] is None


def test_recipe_of_choices_by_site():
    found = steps([{"qkv": "gptq", "o": "rtn", "gate_up": "gptq", "down": "rtn"}])
    assert targets(found["QuantizationModifier"]) == [
        r"re:.*layers\.(0)\.self_attn\.o_proj$", r"re:.*layers\.(0)\.mlp\.down_proj$"]


def test_recipe_only_where_the_tool_has_the_method(exported):
    uniform = {"method": method.to_config(method.build("gptq", damp=0.05)), "layers": [{"layer": 0}]}
    modifiers = yaml.safe_load(recipe.text(uniform))["quantization_stage"]["quantization_modifiers"]
    assert modifiers["GPTQModifier"]["dampening_frac"] == 0.05
    for name in ("spinquant", "mp-gptq"):
        assert recipe.text({"method": method.to_config(method.build(name)), "layers": [{"layer": 0}]}) is None
    assert recipe.text({}) is None
    assert (exported / "recipe.yaml").is_file()


def test_a_checkpoint_is_a_row_of_the_table(toy_folder, source, exported, toy_text_file, tmp_path, capsys):
    def reproduce(*more):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["reproduce", str(toy_folder), "--methods", "fp16", "--tasks", "world_wiki_ppl", "--fast",
                      "--calib", str(toy_text_file), "--nsamples", "4", "--seqlen", "64",
                      "--results", str(tmp_path / "results"), *more])
        return stopped.value.code, capsys.readouterr()

    status, told = reproduce("--checkpoint", f"packed={exported}", "--checkpoint", f"ours={source}")
    assert status == 0 and "3 results measured" in told.out
    rows = [line.split() for line in told.out.splitlines() if "packed" in line.split()[:2] or "ours" in line.split()[:2]]
    assert len(rows) == 2 and rows[0][1:] == rows[1][1:]
    assert "3 found" in reproduce("--checkpoint", f"packed={exported}", "--checkpoint", f"ours={source}")[1].out
    for more, reason in [((f"gptq={exported}",), "a method's name"), ((f"x={toy_folder}",), "is not quantized"),
                         ((f"x={exported}", "--wbits", "3"), "comparison at W3A8 g128")]:
        status, told = reproduce("--checkpoint", *more)
        assert status == 2 and reason in told.err


def test_a_checkpoint_is_judged_against_methods(toy_folder, exported, toy_text_file, tmp_path, capsys):
    """The export of rtn's model against rtn itself, and beside it a method that is judged against the checkpoint."""
    def compare(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["compare", *words, "--model", str(toy_folder), "--tasks", "world_wiki_ppl", "--limit", "16",
                      "--calib", str(toy_text_file), "--nsamples", "2", "--seqlen", "64", "--repeats", "0",
                      "--workers", "1", "--results", str(tmp_path / "results")])
        return stopped.value.code, capsys.readouterr()

    status, told = compare("--checkpoint", f"my-peer={exported}", "--against", "rtn", "--json")
    (line,) = json.loads(told.out)["comparisons"]
    assert status == 0 and (line["method"], line["against"]) == ("my-peer", "rtn")
    assert line["why"] == "identical" and line["score"] == line["other"]
    assert "one run" in line["noted"][0]
    status, told = compare("rtn", "--wbits", "2", "--checkpoint", f"my-peer={exported}")
    assert status == 2 and "comparison at W2A8 g128" in told.err
    for words, reason in [(("--checkpoint", f"a={exported}"), "--against is missing"),
                          (("gptq", "--checkpoint", "theirs"), "LABEL=FOLDER"),
                          (("--checkpoint", f"a={exported}", "--checkpoint", f"a={exported}", "--against", "rtn"), "a twice"),
                          (("--checkpoint", f"a={exported}", "--against", "rtn", "--set", "damp=1"), "--set is for METHOD"),
                          (("--checkpoint", f"gptq={exported}", "--against", "rtn"), "a method's name")]:
        status, told = compare(*words)
        assert status == 2 and reason in told.err and told.out == ""
