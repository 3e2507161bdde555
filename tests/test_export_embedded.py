"""An embedded model, exported: transformers and lm-eval's own model give the suite's numbers; llm-compressor's own
checkpoints are read, where `make peers` has built its environment."""

import json
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from suite import adapter, calib, checkpoint, export, importing, method, models, paths, recipe, walk, windows
from suite.linear import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv-peers" / "bin" / "python"
MODEL = "tiny-llama-s"


def quantize(*choices, **options):
    """A hybrid with one method per layer."""
    loaded = models.load(MODEL, device="cpu")
    data = calib.load(calib.EMBEDDED, loaded.tokenizer, 8, 256, 0)
    configured = method.build("cka-hybrid", pool=tuple(dict.fromkeys(choices)), choices=choices, **options)
    layers = walk.quantize_model(configured, loaded.model, data)
    return loaded, data, {"method": method.to_config(configured), "layers": layers}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(the suite's model and tokenizer, the exported folder). Shared: tests only read them."""
    loaded, _, record = quantize("gptq", "awq", "smoothquant", "gptq")
    folder = tmp_path_factory.mktemp("exported") / MODEL
    return loaded, export.write(loaded.model, loaded.tokenizer, folder, record)


def some_windows(tokenizer):
    text = (paths.tasks() / "data" / "world_wiki_test.txt").read_text()
    return windows.token_windows(text, tokenizer, 512, max_windows=4)


def perplexity(model, cut):
    return windows.perplexity(windows.window_nll(model, cut.tokens), cut.predicted)


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.slow
@torch.no_grad()
def test_logits_choices_and_perplexity(hybrid):
    loaded, folder = hybrid
    other, cut = AutoModelForCausalLM.from_pretrained(folder).eval(), some_windows(loaded.tokenizer)
    assert other.dtype == torch.float32
    ours, theirs = loaded.model(cut.tokens).logits, other(cut.tokens).logits
    assert distance(theirs, ours) < 1e-3
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() >= 0.999
    assert abs(perplexity(other, cut) / perplexity(loaded.model, cut) - 1) < 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_stored_in_bfloat16(hybrid, tmp_path):
    """transformers rounds the scales of activations to bfloat16, so logits are as far from the suite's as either is from
    float32; perplexity is the same nonetheless."""
    loaded, folder = hybrid
    ours = importing.load(folder, torch.bfloat16)[0]
    other = AutoModelForCausalLM.from_pretrained(export.write(ours, loaded.tokenizer, tmp_path / "narrow", {})).eval()
    assert other.dtype == torch.bfloat16
    cut = some_windows(loaded.tokenizer)
    exact, mine, theirs = (model(cut.tokens).logits for model in (loaded.model, ours, other))
    assert 1e-3 < distance(theirs, exact) < 1.2 * distance(mine, exact) < 0.03
    assert (theirs.argmax(-1) == mine.argmax(-1)).float().mean() > 0.98
    assert abs(perplexity(other, cut) / perplexity(ours, cut) - 1) < 1e-3


@pytest.mark.slow
def test_size_on_disk_is_what_the_effective_bits_tell(hybrid):
    loaded, folder = hybrid
    linears = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    told = sum(m.codes.numel() * m.spec.effective_bits(m.in_features) for m in linears) / 8
    rest = sum(parameter.nbytes for parameter in loaded.model.parameters())  # embeddings and norms, tied ones once
    assert len(linears) == 28 and told / rest > 0.5
    assert abs((folder / "model.safetensors").stat().st_size / (told + rest) - 1) < 0.02


PLAIN = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
folder, tasks, out = sys.argv[1:]
found = lm_eval.simple_evaluate("hf", f"pretrained={folder}", tasks=["world_quiz"], limit=6, device="cpu", batch_size=1,
                                task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0)
assert not any(name.startswith("suite") for name in sys.modules)
json.dump([found["results"], found["samples"]], open(out, "w"), default=str)
"""


@pytest.mark.slow
def test_plain_lm_eval_gives_the_same_scores(hybrid, tmp_path):
    """lm-eval's own model `hf`, in a process that never imports the suite: document by document. One at a time, since
    what a batch changes in the last digit can move an activation to the next integer."""
    loaded, folder = hybrid
    subprocess.run([sys.executable, "-c", PLAIN, folder, paths.tasks(), tmp_path / "out.json"], cwd=tmp_path, check=True,
                   capture_output=True, timeout=600)
    harness = adapter.PTQ(loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    ours = lm_eval.simple_evaluate(harness, tasks=["world_quiz"], limit=6, task_manager=adapter.task_manager(),
                                   bootstrap_iters=0)
    results, samples = json.loads((tmp_path / "out.json").read_text())
    assert results["world_quiz"]["acc,none"] == ours["results"]["world_quiz"]["acc,none"]
    by_document = {sample["doc_id"]: sample for sample in samples["world_quiz"]}
    for sample in ours["samples"]["world_quiz"]:
        found = by_document.pop(sample["doc_id"])
        answers = [[float(answer[0]) for answer in one["filtered_resps"]] for one in (found, sample)]
        assert answers[0] == pytest.approx(answers[1], rel=1e-5) and len(answers[0]) == 4
    assert by_document == {}


@pytest.mark.slow
@pytest.mark.skipif(not PEER.is_file(), reason="needs llm-compressor: `make peers` builds its environment")
def test_llm_compressor(tmp_path):
    """A hybrid's recipe makes the same choices there. Its rounding to nearest is the suite's, code for code; what it makes
    by other methods is read, is near the suite's, and is exported again as it was."""
    loaded, data, record = quantize("rtn", "gptq", "awq", "smoothquant", wbits=3)
    source = models.load(MODEL, device="cpu")
    source.model.save_pretrained(tmp_path / "base")
    source.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "tokens.json").write_text(json.dumps(data.tokens.tolist()))
    (tmp_path / "recipe.yaml").write_text(recipe.text(record))
    done = subprocess.run([PEER, ROOT / "peers" / "oneshot.py", *(tmp_path / name for name in (
        "base", "tokens.json", "recipe.yaml", "peer"))], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    peer = models.load(str(tmp_path / "peer"), device="cpu")
    assert peer.kind == "quantized" and peer.record == {} and not checkpoint.is_quantized(tmp_path / "peer")
    same = []
    for ours, theirs in zip(loaded.model.model.layers, peer.model.model.layers, strict=True):
        pairs = [(ours.get_submodule(name).codes, theirs.get_submodule(name).codes)
                 for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
        same.append(min(float((a == b).float().mean()) for a, b in pairs))
    assert same[0] > 0.99 and min(same) > 0.3 and max(same[1:]) < 0.99
    cut = some_windows(loaded.tokenizer)
    assert abs(perplexity(peer.model, cut) / perplexity(loaded.model, cut) - 1) < 0.03
    first = load_file(tmp_path / "peer" / "model.safetensors")
    again = load_file(export.export(tmp_path / "peer", tmp_path / "again") / "model.safetensors")
    packed = [key for key in first if key.endswith("weight_packed")]
    assert len(packed) == 28 and all(torch.equal(first[key], again[key]) for key in packed)
