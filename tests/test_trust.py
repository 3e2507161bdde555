"""Code that comes with a model is not run, and pickled weights are not read, unless the user says so; then both are, and
the record tells."""

import json
import os
import pickle

import pytest
import torch
import toys

from suite import checkpoint, models, preflight, trust
from suite.adapter import PTQ
from suite.errors import PTQError
from suite.method import build

OWN = '''from pathlib import Path
from transformers import LlamaForCausalLM
Path({marker!r}).touch()


class OwnForCausalLM(LlamaForCausalLM):
    def forward(self, *arguments, **named):
        found = super().forward(*arguments, **named)
        found.logits = -found.logits
        return found
'''


@pytest.fixture
def own(tmp_path):
    """A model with code of its own: Llama with the opposite opinion. (folder, file that exists once the code has run)"""
    folder, marker = toys.save_toy(tmp_path / "own"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(OWN.format(marker=str(marker)))
    return folder, marker


@pytest.fixture
def pickled(tmp_path):
    """A model with the same weights in a pickle."""
    folder = toys.save_toy(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(toys.make_toy().state_dict(), folder / "pytorch_model.bin")
    return folder


TOKENS = torch.arange(20).reshape(2, 10)


def test_code_of_its_own_is_not_run_unasked(own, ptq):
    folder, marker = own
    for name in (str(folder), f"{folder}@outliers=8"):
        with pytest.raises(PTQError, match="code of its own .modeling_own.py..*--trust-remote-code.*trust_remote_code=true"):
            models.load(name)
    with pytest.raises(PTQError, match="--trust-remote-code"):
        PTQ(str(folder))
    status, _, err = ptq("quantize", "--model", folder, "--method", "rtn", "--out", "out")
    assert status == 2 and "--trust-remote-code" in err and err.count("\n") == 1
    assert not marker.exists()


def test_code_of_its_own_is_run_if_trusted(own):
    folder, marker = own
    with trust.given(code=True):
        loaded = models.load(str(folder))
        first = models.identify(str(folder))["digest"]
    assert marker.exists() and loaded.trusted == ("code of its own",) and loaded.digest == first
    assert torch.equal(loaded.model(TOKENS).logits, -toys.make_toy()(TOKENS).logits)
    with pytest.raises(PTQError, match="--trust-remote-code"):  # the word held for the block only
        models.load(str(folder))
    (folder / "modeling_own.py").write_text((folder / "modeling_own.py").read_text() + "\n")
    with trust.given(code=True):
        assert models.identify(str(folder))["digest"] != first  # its code is part of what it is
    assert PTQ(str(folder), trust_remote_code=True).get_model_info()["model_trusted"] == ["code of its own"]
    assert trust.CODE not in os.environ


def test_a_quantized_model_keeps_its_code(own, ptq, tmp_path):
    folder, _ = own
    status, _, err = ptq("quantize", "--model", folder, "--method", "rtn", "--calib", "embedded", "--nsamples", 2, "--seqlen",
                         16, "--out", "out", "--trust-remote-code")
    assert status == 0, err
    out = tmp_path / "out"
    assert json.loads((out / "ptq.json").read_text())["record"]["trusted"] == ["code of its own"]
    with pytest.raises(PTQError, match="--trust-remote-code"):
        models.load(str(out))
    with trust.given(code=True):
        loaded, before = models.load(str(out)), checkpoint.identity(out)
    assert type(loaded.model).__name__ == "OwnForCausalLM" and loaded.trusted == ("code of its own",)
    (out / "modeling_own.py").write_text("")
    assert checkpoint.identity(out) != before


def test_pickled_weights_are_not_read_unasked(pickled, ptq):
    class Mine:
        def __reduce__(self):
            return os.mkdir, (str(pickled / "unpickled"),)

    for make in (lambda: None, lambda: (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Mine()))):
        make()
        with pytest.raises(PTQError, match="found pytorch_model.bin, but only safetensors are read; --allow-pickle"):
            models.load(str(pickled))
    with pytest.raises(PTQError, match="allow_pickle=true"):
        PTQ(str(pickled))
    with trust.given(pickle=True), pytest.raises(PTQError, match="cannot be loaded"):
        models.load(str(pickled))  # torch's reader takes tensors only
    assert not (pickled / "unpickled").exists()


def test_pickled_weights_are_read_if_allowed(pickled, toy_folder, ptq, tmp_path):
    with trust.given(pickle=True):
        loaded = models.load(str(pickled))
        assert not preflight.quantization(models.resolve(str(pickled)), build("rtn"), 2, 16, tmp_path).run.by_layer
        with pytest.raises(PTQError, match="--load whole"):
            models.load(str(pickled), by_layer=True)
    assert loaded.trusted == ("pickled weights",) and models.load(str(toy_folder)).trusted == ()
    assert torch.equal(loaded.model(TOKENS).logits, toys.make_toy()(TOKENS).logits)
    with trust.given(pickle=True):  # allowed, and not used where there is no need
        assert models.load(str(toy_folder)).trusted == ()
    assert PTQ(str(pickled), allow_pickle=True).get_model_info()["model_trusted"] == ["pickled weights"]
    line = ["reproduce", pickled, "--methods", "fp16", "--tasks", "world_events", "--limit", 1, "--calib", "embedded",
            "--results", "results", "--workers", 1]
    status, _, err = ptq(*line)
    assert status == 2 and "--allow-pickle" in err and not (tmp_path / "results").exists()
    status, _, err = ptq(*line, "--allow-pickle")
    assert status == 0, err
    told = [json.loads(path.read_text())["result"].get("trusted") for path in (tmp_path / "results").rglob("*.json")]
    assert ["pickled weights"] in told


def test_shards_of_pickled_weights(pickled):
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-2.bin"}}))
    (pickled / "pytorch_model.bin").unlink()
    with trust.given(pickle=True), pytest.raises(PTQError, match="incomplete: pytorch_model-2.bin is missing"):
        models.load(str(pickled))
