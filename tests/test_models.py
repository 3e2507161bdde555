"""Models by name: what loads, what identifies it, and one clear error for everything that does not load."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from suite import hub, models, zoo
from suite.errors import PTQError


@pytest.fixture
def copy_of_toy(toy_folder, tmp_path):
    return shutil.copytree(toy_folder, tmp_path / "copy")


@pytest.fixture
def online(monkeypatch):
    """A user who has not asked for the cache alone, and a hub that is not there."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub._answers.cache_clear()
    yield monkeypatch
    hub._answers.cache_clear()


def test_loads_a_folder(toy_folder):
    loaded = models.load(str(toy_folder), device="cpu")
    assert loaded.kind == "folder" and loaded.name == toy_folder.name and loaded.record is None
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    tokens = loaded.tokenizer("Bado bidi.", return_tensors="pt").input_ids
    assert torch.equal(loaded.model(tokens).logits, toys.make_toy("llama")(tokens).logits)


def test_type_and_device(toy_folder):
    assert models.load(str(toy_folder), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    with pytest.raises(PTQError, match="unknown dtype 'bfloat61': did you mean 'bfloat16'"):
        models.load(str(toy_folder), dtype="bfloat61")
    if not torch.cuda.is_available():
        with pytest.raises(PTQError, match="no GPU"):
            models.load(str(toy_folder), device="cuda")


def test_digest_identifies_content(toy_folder, copy_of_toy):
    first = models.identify(str(toy_folder))["digest"]
    assert models.identify(str(copy_of_toy))["digest"] == first == models.load(str(toy_folder)).digest
    weights = load_file(copy_of_toy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, copy_of_toy / "model.safetensors", metadata={"format": "pt"})
    second = models.identify(str(copy_of_toy))["digest"]
    assert second != first
    config = json.loads((copy_of_toy / "config.json").read_text())
    (copy_of_toy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert models.identify(str(copy_of_toy))["digest"] not in (first, second)


def test_outliers_are_part_of_the_identity_and_not_of_the_function(toy_folder):
    plain, planted, other = (models.load(f"{toy_folder}{suffix}", dtype="float64")
                             for suffix in ("", "@outliers=8", "@outliers=8,seed=1"))
    assert planted.name == f"{toy_folder.name}@outliers=8,seed=0"
    assert len({plain.digest, planted.digest, other.digest}) == 3
    tokens = torch.randint(0, toys.VOCABULARY, (2, 32))
    expected = plain.model(tokens).logits
    for model in (planted.model, other.model):
        assert (model(tokens).logits - expected).norm() / expected.norm() < 1e-6
    name = "model.layers.1.input_layernorm.weight"
    assert any(not torch.equal(planted.model.get_parameter(n), plain.model.get_parameter(n))
               for n in (name, name.replace("1", "0", 1), name.replace("input", "post_attention")))


def test_digest_of_a_model_in_memory(make_toy):
    model = make_toy()
    first = models.digest_of(model)
    assert models.digest_of(make_toy()) == first
    model.model.norm.weight.data[0] += 1e-3
    assert models.digest_of(model) != first


def test_embedded_names_are_known():
    for name in zoo.names():
        try:
            assert models.resolve(name).kind == "embedded"
        except PTQError as error:
            assert "has no weights in this installation" in str(error)


def test_known_models():
    source = models.resolve("qwen1.5-1.5b")
    assert source.kind == "hub" and source.repository == source.name == "Qwen/Qwen1.5-1.8B"
    assert "no checkpoint is named Qwen1.5-1.5B" in source.note
    assert models.resolve("LLaMA-3-8B", "main").revision == "main"


@pytest.mark.parametrize(("name", "message"), [
    ("tiny-lama-s", "unknown model 'tiny-lama-s': did you mean 'tiny-llama-s'"),
    ("qwen1.5-0.5", "did you mean 'qwen1.5-0.5b'"),
    ("./nowhere", "model folder './nowhere' does not exist"),
    ("a/b/c", "model folder 'a/b/c' does not exist"),
])
def test_unknown_names(name, message):
    with pytest.raises(PTQError, match=message):
        models.load(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(PTQError, match="no config.json"):
        models.load(str(tmp_path))


def test_file_instead_of_folder(toy_folder):
    with pytest.raises(PTQError, match="is a file: give the folder"):
        models.load(str(toy_folder / "config.json"))


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_config_that_is_none(copy_of_toy, content):
    (copy_of_toy / "config.json").write_text(content)
    with pytest.raises(PTQError, match="config.json of 'copy' .* corrupt"):
        models.load(str(copy_of_toy))


def test_unsupported_architecture(copy_of_toy):
    config = json.loads((copy_of_toy / "config.json").read_text())
    (copy_of_toy / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(PTQError, match="unsupported architecture 'gpt2': supported are llama"):
        models.load(str(copy_of_toy))


def test_quantized_by_somebody_else(copy_of_toy):
    config = json.loads((copy_of_toy / "config.json").read_text())
    (copy_of_toy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(PTQError, match="quantized already, by 'awq'"):
        models.load(str(copy_of_toy))


@pytest.mark.parametrize("kept", [0, 4, 100, -1000])
def test_truncated_weights(copy_of_toy, kept):
    path = copy_of_toy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PTQError, match="model.safetensors' are corrupt or cut short"):
        models.load(str(copy_of_toy))


def test_missing_shard(copy_of_toy):
    (copy_of_toy / "model.safetensors").rename(copy_of_toy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy_of_toy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PTQError, match="model-00002-of-00002.safetensors' are missing"):
        models.load(str(copy_of_toy))


def test_other_weights_are_not_read(copy_of_toy):
    (copy_of_toy / "model.safetensors").rename(copy_of_toy / "pytorch_model.bin")
    with pytest.raises(PTQError, match="found pytorch_model.bin, but only safetensors"):
        models.load(str(copy_of_toy))


def test_missing_weight_is_not_filled_with_random_numbers(copy_of_toy):
    weights = load_file(copy_of_toy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy_of_toy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PTQError, match="1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        models.load(str(copy_of_toy))


def test_weight_of_another_shape(copy_of_toy):
    weights = load_file(copy_of_toy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:64].clone()
    save_file(weights, copy_of_toy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PTQError, match=r"model.norm.weight has shape \(64,\), its config.json asks for \(128,\)"):
        models.load(str(copy_of_toy))


def test_no_tokenizer(copy_of_toy):
    for path in copy_of_toy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(PTQError, match="no tokenizer that can be read"):
        models.load(str(copy_of_toy))


# ---------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize("name", ["Qwen/Qwen1.5-0.5B", "llama-3.2-1b"])
def test_no_hub_is_told_at_once(online, name):
    start = time.perf_counter()
    with pytest.raises(PTQError) as caught:
        models.load(name)
    assert time.perf_counter() - start < hub.TIMEOUT + 1
    for part in ("none answers at http://127.0.0.1:9", "tiny-llama-s", "a local folder", "HF_HUB_OFFLINE=1"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_hangs_is_no_hub(online):
    online.setattr(hub, "TIMEOUT", 0.3)
    with socket.socket() as server:  # takes the connection and never answers
        server.bind(("127.0.0.1", 0))
        server.listen()
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.perf_counter()
        assert not hub.reachable()
        assert time.perf_counter() - start < 2


def test_a_hub_that_answers_anything_is_there(online):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()


def test_offline_with_a_cold_cache():  # as the tests run: HF_HUB_OFFLINE=1
    with pytest.raises(PTQError, match="is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"):
        models.load("Qwen/Qwen1.5-0.5B")


def test_offline_with_a_warm_cache(toy_folder):
    """A snapshot in the cache's own layout is found."""
    from huggingface_hub import constants

    cache = os.path.join(constants.HF_HUB_CACHE, "models--somebody--toy")
    commit = "0" * 39 + "1"
    snapshot = os.path.join(cache, "snapshots", commit)
    os.makedirs(os.path.join(cache, "refs"))
    with open(os.path.join(cache, "refs", "main"), "w") as file:
        file.write(commit)
    shutil.copytree(toy_folder, snapshot)
    try:
        loaded = models.load("somebody/toy")
        assert loaded.kind == "hub" and loaded.name == "somebody/toy"
        assert loaded.digest == models.identify(str(toy_folder))["digest"]
    finally:
        shutil.rmtree(cache)


def test_digest_of_a_file_in_the_cache_is_its_name_there(tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_text("not what hashes to that")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert models.file_digest(tmp_path / "model.safetensors") == "ab" * 32


@pytest.mark.parametrize(("kind", "message"), [
    ("GatedRepoError", "is gated: accept its licence"), ("RepositoryNotFoundError", "is not on the hub"),
    ("RevisionNotFoundError", "no such revision"), ("ConnectionError", "cannot be fetched"),
])
def test_what_the_client_raises_becomes_one_line(online, kind, message):
    error = hub.fault(type(kind, (Exception,), {})("first line\nsecond"), "model 'a/b'", "a local folder")
    assert message in str(error) and "\n" not in str(error)


def test_a_local_model_needs_no_network(toy_folder):
    """In a process of its own, that has not been told to stay offline and in which nothing can be looked up."""
    code = ("import socket\n"
            "def refuse(*_, **__): raise SystemExit('the network was asked')\n"
            "socket.getaddrinfo = socket.socket.connect = refuse\n"
            "from suite import models\n"
            f"models.load({str(toy_folder)!r})")
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
