"""Quantized models on disk: back bit for bit, whole or not at all, and corrupt ones refused."""

import hashlib
import json
import shutil

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from suite import calib, checkpoint, method, models, walk
from suite.errors import PTQError
from suite.linear import QuantLinear, RoundedLinear

TOKENS = torch.randint(0, toys.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(5))


def quantized(kind="llama", dtype=torch.float32, name="rtn", **options):
    model = toys.make_toy(kind, dtype)
    sequences = calib.from_tokens(torch.randint(0, toys.VOCABULARY, (4, 64)))
    walk.quantize_model(method.build(name, **options), model, sequences)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_tokenizer):
    """A saved quantized toy. Shared: tests copy it before they break it."""
    target = tmp_path_factory.mktemp("quantized") / "toy"
    record = {"method": {"method": "rtn"}, "scheme": "W4A8"}
    return checkpoint.save(quantized(symmetric=False), toy_tokenizer, target, record)


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


@pytest.mark.parametrize("kind", toys.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    dict(name="rtn", wbits=3, symmetric=False, group_size=64), dict(name="smoothquant", wbits=4, abits=4, group_size=0),
    dict(name="gptq", wbits=8, abits=16), dict(name="rtn", wbits=16, abits=8),
], ids=lambda o: " ".join(map(str, o.values())))
def test_logits_come_back_bit_for_bit(tmp_path, toy_tokenizer, kind, dtype, options):
    model = quantized(kind, dtype, **options)
    checkpoint.save(model, toy_tokenizer, tmp_path / "out", {})
    back, tokenizer, _ = checkpoint.load(tmp_path / "out")
    assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)
    assert back.dtype == dtype and not back.training and tokenizer("Bado").input_ids == toy_tokenizer("Bado").input_ids
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, RoundedLinear))}
    assert len(linears) == 14
    for name, linear in linears.items():
        found = back.get_submodule(name)
        assert type(found) is type(linear) and found.act == linear.act
        if isinstance(linear, QuantLinear):
            assert found.spec == linear.spec
            assert torch.equal(found.codes, linear.codes) and torch.equal(found.scale, linear.scale)


def test_untied_by_a_method_stays_untied(tmp_path, toy_tokenizer):
    model = quantized("llama-tied")
    from suite import arch

    arch.untie(model)
    model.lm_head.weight.data.mul_(2)
    checkpoint.save(model, toy_tokenizer, tmp_path / "out", {})
    back, *_ = checkpoint.load(tmp_path / "out")
    assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)


def test_what_is_on_disk(folder):
    tensors = load_file(folder / "quantized.safetensors")
    name = "model.layers.0.self_attn.q_proj."
    assert tensors[name + "codes"].dtype == torch.int8 and tensors[name + "codes"].shape == (128, 128)
    assert tensors[name + "scale"].dtype == torch.bfloat16 and tensors[name + "zero"].dtype == torch.int8
    assert name + "weight" not in tensors
    record = json.loads((folder / "ptq.json").read_text())
    assert record["linears"][name[:-1]] == {"act": {"bits": 8, "group_size": None, "symmetric": True},
                                            "weight": {"bits": 4, "group_size": 128, "symmetric": False}}
    assert record["record"] == {"method": {"method": "rtn"}, "scheme": "W4A8"}
    assert record == checkpoint.read_record(folder)
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())


def test_tied_weights_are_stored_once(tmp_path, toy_tokenizer):
    checkpoint.save(quantized("qwen"), toy_tokenizer, tmp_path / "out", {})
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "quantized.safetensors")


def test_linears_of_a_site_share_their_rounding(folder):
    layer = checkpoint.load(folder)[0].model.layers[0]
    q, k, o = (layer.get_submodule(f"self_attn.{n}_proj") for n in "qko")
    assert q.rounding is k.rounding and q.rounding is not o.rounding


def test_models_load_it(folder, toy_folder):
    loaded = models.load(str(folder), device="cpu")
    assert loaded.kind == "quantized" and loaded.record["scheme"] == "W4A8" and loaded.name == "toy"
    assert loaded.digest == models.identify(str(folder))["digest"] != models.identify(str(toy_folder))["digest"]
    with pytest.raises(PTQError, match="outliers are planted before quantization"):
        models.load(f"{folder}@outliers=8")


def test_digest_follows_the_weights_and_the_grids(tmp_path, toy_tokenizer, folder):
    digests = {checkpoint.identity(folder)}
    for i, options in enumerate([dict(wbits=3, symmetric=False), dict(symmetric=False, abits=16)]):
        checkpoint.save(quantized(**options), toy_tokenizer, tmp_path / str(i), {})
        digests.add(checkpoint.identity(tmp_path / str(i)))
    checkpoint.save(quantized(symmetric=False), toy_tokenizer, tmp_path / "same", {"another": "record"})
    digests.add(checkpoint.identity(tmp_path / "same"))
    assert len(digests) == 3


def test_another_type_decodes_the_weights_anew(tmp_path, toy_tokenizer):
    model = quantized(abits=16)  # rounded activations would fall to the other side here and there
    checkpoint.save(model, toy_tokenizer, tmp_path / "out", {})
    wide, *_ = checkpoint.load(tmp_path / "out", dtype=torch.float64)
    linear = wide.model.layers[0].mlp.down_proj
    assert linear.weight.dtype == torch.float64 and linear.scale.dtype == torch.float32
    expected = model(TOKENS).logits
    assert (wide(TOKENS).logits - expected).norm() / expected.norm() < 1e-5


def test_other_loaders_refuse_it(folder):
    """They would fill the linears that they do not find with random numbers."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("bug")])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written(tmp_path, toy_tokenizer, folder, monkeypatch, error, existing):
    target = tmp_path / "out"
    if existing:
        shutil.copytree(folder, target)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(toy_tokenizer), "save_pretrained", fail)
    told = error if error is KeyboardInterrupt else PTQError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(told):
        checkpoint.save(quantized(), toy_tokenizer, target, {}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    if existing:
        checkpoint.load(target)  # the old one, unharmed


def test_existing_folders(tmp_path, toy_tokenizer, folder):
    model, target = quantized(wbits=2), shutil.copytree(folder, tmp_path / "out")
    with pytest.raises(PTQError, match="exists and is not empty: give another, or pass --overwrite"):
        checkpoint.save(model, toy_tokenizer, target, {})
    checkpoint.save(model, toy_tokenizer, target, {"new": True}, overwrite=True)
    assert checkpoint.load(target)[2] == {"new": True}
    (tmp_path / "mine").mkdir()
    checkpoint.save(model, toy_tokenizer, tmp_path / "mine", {})  # an empty folder is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_what_is_not_overwritten(tmp_path, toy_tokenizer):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(PTQError, match="no quantized model, and is not overwritten"):
        checkpoint.save(quantized(), toy_tokenizer, tmp_path / "thesis", {}, overwrite=True)
    with pytest.raises(PTQError, match="is a file"):
        checkpoint.save(quantized(), toy_tokenizer, tmp_path / "thesis" / "chapter.txt", {}, overwrite=True)
    with pytest.raises(PTQError, match="cannot be written"):
        checkpoint.save(quantized(), toy_tokenizer, tmp_path / "thesis" / "chapter.txt" / "out", {})
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


def test_full_precision_is_not_saved_here(tmp_path, toy_llama, toy_tokenizer):
    with pytest.raises(PTQError, match="no quantized linear"):
        checkpoint.save(toy_llama, toy_tokenizer, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- corruption


def test_no_quantized_model(toy_folder):
    with pytest.raises(PTQError, match="is no quantized model: it has no ptq.json"):
        checkpoint.load(toy_folder)


@pytest.mark.parametrize("change", [lambda d: d[:-100], lambda d: d[:7], lambda d: b""])
def test_truncated_weights(broken, change):
    path = broken / "quantized.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(PTQError, match="corrupt or cut short"):
        models.load(str(broken))


def test_one_bit_changed(broken):
    path = broken / "quantized.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(PTQError, match="their checksum differs"):
        models.load(str(broken))


def test_weights_gone(broken):
    (broken / "quantized.safetensors").unlink()
    with pytest.raises(PTQError, match="are missing"):
        models.load(str(broken))


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read"), ("[]", "cannot be read"), ('{"format": 99}', "has format 99, this version reads 1"),
    ('{"format": 1}', "lacks a part"),
])
def test_broken_record(broken, content, message):
    (broken / "ptq.json").write_text(content)
    with pytest.raises(PTQError, match=message):
        models.load(str(broken))


@pytest.mark.parametrize(("key", "message"), [
    ("model.norm.weight", "model.norm.weight is missing"),
    ("model.layers.0.mlp.up_proj.codes", "up_proj lacks its codes"),
    ("lm_head.weight", "lm_head.weight is missing"),
])
def test_tensors_that_do_not_fit(broken, key, message):
    """A record and weights that are whole, but not of one model."""
    tensors = load_file(broken / "quantized.safetensors")
    del tensors[key]
    save_file(tensors, broken / "quantized.safetensors")
    record = json.loads((broken / "ptq.json").read_text())
    record["sha256"] = hashlib.sha256((broken / "quantized.safetensors").read_bytes()).hexdigest()
    (broken / "ptq.json").write_text(json.dumps(record))
    with pytest.raises(PTQError, match=message):
        models.load(str(broken))
