"""An embedded model, exported: transformers and lm-eval's own model give the suite's numbers; llm-compressor's own
checkpoints are read, where `make peers` has built its environment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from suite import calib, checkpoint, export, method, models, paths, recipe, walk, windows

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv-peers" / "bin" / "python"
MODEL = "tiny-llama-s"


def quantize(name, tokens=(8, 256), **options):
    loaded = models.load(MODEL, device="cpu")
    data = calib.load(calib.EMBEDDED, loaded.tokenizer, *tokens, 0)
    configured = method.build(name, **options)
    layers = walk.quantize_model(configured, loaded.model, data)
    return loaded, data, {"method": method.to_config(configured), "layers": layers}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(the suite's model, its tokenizer, the exported folder). Shared: tests only read them."""
    loaded, _, record = quantize("cka-hybrid")
    folder = tmp_path_factory.mktemp("exported") / MODEL
    return loaded, export.write(loaded.model, loaded.tokenizer, folder, record)


@pytest.mark.slow
@torch.no_grad()
def test_logits_choices_and_perplexity(hybrid):
    loaded, folder = hybrid
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = (paths.tasks() / "data" / "world_wiki_test.txt").read_text()
    cut = windows.token_windows(text, loaded.tokenizer, 512, max_windows=4)
    ours, theirs = loaded.model(cut.tokens).logits, other(cut.tokens).logits
    assert (theirs - ours).norm() / ours.norm() < 1e-3
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() >= 0.999
    first, second = (windows.perplexity(windows.window_nll(m, cut.tokens), cut.predicted) for m in (loaded.model, other))
    assert abs(second / first - 1) < 1e-3


@pytest.mark.slow
def test_plain_lm_eval_gives_the_same_scores(hybrid, tmp_path):
    """`lm_eval --model hf`, in a process that never imports the suite's model, against `--model ptq`."""
    _, folder = hybrid
    scores = {}
    for kind in ("hf", "ptq"):
        program = ["lm_eval", "run"] if kind == "hf" else ["suite.cli", "lm-eval", "run"]
        subprocess.run([sys.executable, "-m", *program, "--model", kind, "--model_args", f"pretrained={folder}",
                        "--tasks", "world_quiz", "--limit", "24", "--device", "cpu", "--batch_size", "8",
                        "--include_path", str(paths.tasks()), "--output_path", str(tmp_path / kind)],
                       cwd=ROOT, check=True, capture_output=True, timeout=600)
        found = json.loads(next((tmp_path / kind).rglob("*.json")).read_text())["results"]["world_quiz"]
        scores[kind] = {key: value for key, value in found.items() if key.startswith("acc")}
    assert scores["hf"] == scores["ptq"] and scores["hf"]


@pytest.mark.slow
@pytest.mark.skipif(not PEER.is_file(), reason="needs llm-compressor: `make peers` builds its environment")
def test_llm_compressor(tmp_path):
    """Its rounding to nearest is the suite's, code for code; its GPTQ is read, and near the suite's."""
    text = (paths.tasks() / "data" / "world_wiki_test.txt").read_text()
    perplexities = {}
    for name in ("rtn", "gptq"):
        loaded, data, record = quantize(name, wbits=3)
        (tmp_path / "tokens.json").write_text(json.dumps(data.tokens.tolist()))
        (tmp_path / "recipe.yaml").write_text(recipe.text(record))
        done = subprocess.run([PEER, ROOT / "peers" / "oneshot.py", models.resolve(MODEL).folder, tmp_path / "tokens.json",
                               tmp_path / "recipe.yaml", tmp_path / name], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        peer = models.load(str(tmp_path / name), device="cpu")
        assert peer.kind == "quantized" and peer.record == {}
        cut = windows.token_windows(text, loaded.tokenizer, 512, max_windows=4)
        perplexities[name] = [windows.perplexity(windows.window_nll(m, cut.tokens), cut.predicted)
                              for m in (loaded.model, peer.model)]
        ours, theirs = (m.model.layers[1].mlp.up_proj.codes.float() for m in (loaded.model, peer.model))
        assert (ours - theirs).abs().max() <= (1 if name == "rtn" else 7)
        assert (ours == theirs).float().mean() > (0.99 if name == "rtn" else 0.5)
        first = load_file(tmp_path / name / "model.safetensors")
        again = load_file(export.export(tmp_path / name, tmp_path / f"{name}-again") / "model.safetensors")
        packed = [key for key in first if key.endswith("weight_packed")]
        assert len(packed) == 28 and all(torch.equal(first[key], again[key]) for key in packed)
    for ours, theirs in perplexities.values():
        assert abs(theirs / ours - 1) < 0.02
    assert not checkpoint.is_quantized(tmp_path / "gptq")
