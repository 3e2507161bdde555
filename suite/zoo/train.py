"""Training of the embedded models, on one processor core each.

    python -m suite.zoo.train tiny-llama-s
    python -m suite.zoo.train tiny-llama-m --steps 1500

Matrices inside the layers learn by Muon, everything else by AdamW; the learning rate is constant and falls linearly to zero
over the last part (so the length can be decided late: kill the run, start it again with another --steps). Forward and backward
run in bfloat16, the weights are kept in float32 and saved in bfloat16. A run that is killed continues from its checkpoint,
which is written atomically and belongs to one training text; corpus and checkpoint lie in the cache folder
($XDG_CACHE_HOME/ptq-suite/zoo), the result in suite/zoo/models/NAME.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from suite import zoo
from suite.zoo import corpus, tokenizer

CORPUS_TOKENS = 9_100_000
WARMUP = 40
DECAY = 0.3  # the last part of the steps, over which the learning rate falls to zero
RATES = {"muon": 0.015, "adamw": 3e-3}
EMPHASIS = 4.0
CHECKPOINT_SECONDS = 60
LOG_STEPS = 50


def cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq-suite" / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def corpus_hash() -> str:
    """Identifies the training text: a hash of its length and of its first documents."""
    digest = hashlib.sha256(str(CORPUS_TOKENS).encode())
    for text in itertools.islice(corpus.pages(corpus.SEEDS["train"]), 2000):
        digest.update(text.encode())
    return digest.hexdigest()[:12]


@functools.cache
def stream_hash(family: str) -> str:
    """Identifies the training tokens: the text, and the tokenizer that splits it."""
    return hashlib.sha256((corpus_hash() + tokenizer.build(family).to_str()).encode()).hexdigest()[:12]


def tokens(family: str) -> np.ndarray:
    """The training stream as token ids, uint16: documents one after the other with their end (and start) tokens."""
    file = cache() / f"corpus-{family}-{stream_hash(family)}.npy"
    if not file.exists():
        coder = tokenizer.build(family)
        end = [coder.token_to_id("</s>" if family == "llama" else "<|endoftext|>")]
        parts, total, stream = [], 0, corpus.pages(corpus.SEEDS["train"])
        while total < CORPUS_TOKENS:
            for coded in coder.encode_batch([next(stream) for _ in range(2000)]):
                parts.append(np.array(coded.ids + end, dtype=np.uint16))
                total += len(parts[-1])
        partial = file.with_name(f"{file.stem}.{os.getpid()}.npy")
        np.save(partial, np.concatenate(parts))
        os.replace(partial, file)
    return np.load(file, mmap_mode="r")


def checkpoint_file(name: str) -> Path:
    """Where a run keeps its state; other training tokens give another file, so no run mixes two texts."""
    return cache() / f"{name}-{stream_hash(zoo.TABLE[name].family)}.pt"


def new_model(facts: zoo.Embedded) -> torch.nn.Module:
    """The model before training, in float32, from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(facts.seed)
    llama = facts.family == "llama"
    config = (LlamaConfig if llama else Qwen2Config)(
        vocab_size=tokenizer.VOCABULARY, hidden_size=facts.hidden, intermediate_size=facts.intermediate,
        num_hidden_layers=facts.layers, num_attention_heads=facts.heads, num_key_value_heads=facts.kv_heads,
        max_position_embeddings=facts.length, tie_word_embeddings=facts.tied, rms_norm_eps=1e-6,
        bos_token_id=1 if llama else None, eos_token_id=2 if llama else 0, pad_token_id=2 if llama else 0)
    return (LlamaForCausalLM if llama else Qwen2ForCausalLM)(config)


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for embedding, head, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [torch.optim.Muon(matrices, lr=RATES["muon"], weight_decay=0.02, momentum=0.95),
            torch.optim.AdamW(others, lr=RATES["adamw"], betas=(0.9, 0.98), weight_decay=0.0)]


def answer_tokens(family: str) -> tuple[torch.Tensor, int]:
    """Ids of the digits and of "="."""
    coder = tokenizer.build(family)
    return torch.tensor([coder.token_to_id(digit) for digit in "0123456789"]), coder.token_to_id("=")


def emphasis(batch: torch.Tensor, digits: torch.Tensor, equals: int) -> torch.Tensor:
    """Weights of the targets batch[1:]: EMPHASIS for results after "=", else 1.

    Results are a small part of the text and nearly all of what arithmetic is; without this their gradient drowns in that of
    words nobody can foresee. The loss that is logged is not weighted.
    """
    digit = torch.isin(batch, digits)
    first = digit[1:] & (batch[:-1] == equals)
    second = torch.zeros_like(first)
    second[1:] = digit[2:] & first[:-1]
    return 1.0 + (EMPHASIS - 1.0) * (first | second)


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: warm-up, constant, linear fall.  rate(0, 100) is small, rate(50, 100) is 1."""
    left = (steps - step) / (DECAY * steps)
    return min(1.0, (step + 1) / WARMUP, left)


def save(model: torch.nn.Module, facts: zoo.Embedded, log: dict) -> Path:
    """The model in bfloat16 with tokenizer and log, in Hugging Face format."""
    import copy

    from transformers import GenerationConfig

    folder = zoo.path(facts.name)
    folder.mkdir(parents=True, exist_ok=True)
    copied = copy.deepcopy(model).to(torch.bfloat16)
    copied.config.dtype = torch.bfloat16
    ids = {k: getattr(copied.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    copied.generation_config = GenerationConfig(**ids)
    copied.save_pretrained(folder)
    tokenizer.save(facts.family, folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    (folder / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")
    return folder


def train(name: str, steps: int | None = None, threads: int = 1, resume: bool = True, stop_at: int | None = None,
          compiled: bool = False) -> Path:
    """Train an embedded model from scratch, or go on where a killed run stopped. Returns its folder.

    compiled: through torch.compile, about a sixth faster, needs a C++ compiler. stop_at ends the run at that step as if it
    had been killed (for tests).
    """
    import transformers

    zoo.path(name)  # raises for an unknown name
    facts = zoo.TABLE[name]
    steps = steps or facts.steps
    torch.set_num_threads(threads)
    data = tokens(facts.family)
    model = new_model(facts).train()
    tools = optimizers(model)
    forward = torch.compile(model) if compiled else model
    checkpoint = checkpoint_file(name)
    first, curve, spent = 0, [], 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for tool, saved in zip(tools, state["tools"]):
            tool.load_state_dict(saved)
        first, curve, spent = state["step"], state["curve"], state["spent"]

    def keep(step: int) -> None:
        partial = checkpoint.with_suffix(f".{os.getpid()}")
        torch.save({"model": model.state_dict(), "tools": [t.state_dict() for t in tools], "step": step, "curve": curve,
                    "spent": spent}, partial)
        os.replace(partial, checkpoint)

    started = saved_at = time.monotonic()
    before, window = spent, facts.batch * facts.length
    digits, equals = answer_tokens(facts.family)
    losses: list[float] = []
    for step in range(first, steps):
        for tool, base in zip(tools, RATES.values()):
            for group in tool.param_groups:
                group["lr"] = base * facts.pace * rate(step, steps)
        begin = (step * window) % (len(data) - window - 1)
        batch = torch.from_numpy(data[begin:begin + window + 1].astype(np.int64))
        inputs, targets = batch[:-1].view(facts.batch, -1), batch[1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = forward(input_ids=inputs, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets, reduction="none")
        weights = emphasis(batch, digits, equals)
        ((each * weights).sum() / weights.sum()).backward()
        loss = each.detach().mean()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad(set_to_none=True)
        losses.append(loss.item())
        spent = before + time.monotonic() - started
        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps:
            mean = sum(losses) / len(losses)
            curve.append([step + 1, round(mean, 4)])
            losses = []
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name} step {step + 1}/{steps} loss {mean:.4f} {window / pace:.0f} tok/s "
                  f"elapsed {spent / 60:.1f} min left {pace * (steps - step - 1) / 60:.1f} min", file=sys.stderr, flush=True)
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            keep(step + 1)
            saved_at = time.monotonic()
        if stop_at == step + 1:
            keep(step + 1)
            return checkpoint
    log = {"name": name, "seed": facts.seed, "steps": steps, "tokens_seen": steps * window, "batch": facts.batch,
           "length": facts.length, "optimizer": "Muon (matrices), AdamW (rest)",
           "rates": {k: v * facts.pace for k, v in RATES.items()}, "warmup": WARMUP, "decay": DECAY, "emphasis": EMPHASIS,
           "corpus": corpus_hash(), "corpus_seed": corpus.SEEDS["train"], "final_loss": curve[-1][1],
           "loss_curve": curve[::5] + curve[-1:], "minutes": round(spent / 60, 1), "threads": threads, "compiled": compiled,
           "versions": {"python": platform.python_version(), "torch": torch.__version__,
                        "transformers": transformers.__version__}}
    folder = save(model, facts, log)
    checkpoint.unlink(missing_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="train an embedded model")
    parser.add_argument("name", choices=zoo.names())
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="through torch.compile; needs a C++ compiler")
    options = parser.parse_args()
    print(train(options.name, options.steps, options.threads, compiled=options.compiled))


if __name__ == "__main__":
    main()
