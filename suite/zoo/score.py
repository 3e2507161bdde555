"""A fast in-process look at a model during training: how it does on each kind of text. Published scores go through lm-eval.

    python -m suite.zoo.score tiny-llama-s --bits 16 3
"""

from __future__ import annotations

import argparse
import json
import re

import torch

from suite import zoo
from suite.zoo.corpus import TASKS


def rows(task: str, limit: int) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()[:limit]]


@torch.no_grad()
def log_likelihoods(model, tokenizer, pairs: list[tuple[str, str]], batch: int = 64) -> list[float]:
    """Sum of log-probabilities of each continuation after its context, in nats."""
    scores = []
    for start in range(0, len(pairs), batch):
        part = pairs[start:start + batch]
        whole = [tokenizer(context + continuation)["input_ids"] for context, continuation in part]
        lengths = [len(tokenizer(context)["input_ids"]) for context, _ in part]
        width = max(map(len, whole))
        ids = torch.tensor([w + [0] * (width - len(w)) for w in whole])
        logs = model(input_ids=ids).logits.float().log_softmax(-1)
        for row, (w, n) in enumerate(zip(whole, lengths)):
            scores.append(sum(logs[row, i - 1, w[i]].item() for i in range(n, len(w))))
    return scores


def quiz(model, tokenizer, limit: int) -> dict[str, float]:
    items = rows("world_quiz", limit)
    pairs = [(q["prompt"], f" {choice}") for q in items for choice in q["choices"]]
    scores = torch.tensor(log_likelihoods(model, tokenizer, pairs)).view(-1, 4)
    return {"acc": (scores.argmax(1) == torch.tensor([q["answer"] for q in items])).float().mean().item()}


def events(model, tokenizer, limit: int) -> dict[str, float]:
    items = rows("world_events", limit)
    pairs = [(e["query"], f" {choice}") for e in items for choice in e["choices"]]
    scores = torch.tensor(log_likelihoods(model, tokenizer, pairs)).view(-1, 4)
    sizes = torch.tensor([[len(c) for c in e["choices"]] for e in items])
    labels = torch.tensor([e["label"] for e in items])
    return {"acc": (scores.argmax(1) == labels).float().mean().item(),
            "acc_norm": ((scores / sizes).argmax(1) == labels).float().mean().item()}


def generate(model, tokenizer, prompts: list[str], most: int, batch: int = 64) -> list[str]:
    """Greedy continuations."""
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(prompts), batch):
        coded = tokenizer(prompts[start:start + batch], return_tensors="pt", padding=True)
        out = model.generate(input_ids=coded["input_ids"], attention_mask=coded["attention_mask"], max_new_tokens=most,
                             do_sample=False)
        texts += tokenizer.batch_decode(out[:, coded["input_ids"].shape[1]:], skip_special_tokens=True)
    tokenizer.padding_side = "right"
    return texts


def math(model, tokenizer, limit: int) -> dict[str, float]:
    items = rows("world_math", limit)
    texts = generate(model, tokenizer, [f"Question: {p['question']}\nAnswer:" for p in items], 48)
    found = [re.search(r"#### (\d+)", text) for text in texts]
    return {"exact": sum(f is not None and f.group(1) == p["answer"].split("#### ")[1]
                         for f, p in zip(found, items)) / len(items)}


def functions(model, tokenizer, limit: int) -> dict[str, float]:
    items = rows("world_code", limit)
    texts = generate(model, tokenizer, [f["prompt"] for f in items], 40)
    passed = 0
    for item, text in zip(items, texts):
        body = text.split("\ndef ")[0]
        scope: dict = {}
        try:
            exec(item["prompt"] + body + "\n" + item["test"], scope)  # noqa: S102  (one line of arithmetic by our own model)
            scope["check"](scope[item["entry_point"]])
            passed += 1
        except Exception:  # a model may write anything
            pass
    return {"pass": passed / len(items)}


@torch.no_grad()
def perplexity(model, tokenizer, file: str, window: int = 512, windows: int = 30) -> float:
    ids = tokenizer((TASKS / file).read_text()[:200_000])["input_ids"]
    total = 0.0
    windows = min(windows, len(ids) // window)
    for i in range(windows):
        part = torch.tensor([ids[i * window:(i + 1) * window]])
        total += model(input_ids=part, labels=part).loss.item()
    return float(torch.tensor(total / windows).exp())


@torch.no_grad()
def round_(model, bits: int, group: int = 128) -> None:
    """Symmetric round-to-nearest of every linear in the decoder layers, in place."""
    top = 2 ** (bits - 1) - 1
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            w = module.weight.float().view(module.weight.shape[0], -1, group)
            scale = w.abs().amax(-1, keepdim=True) / top
            module.weight.copy_(((w / scale).round().clamp(-top - 1, top) * scale).view(module.weight.shape))


def score(model, tokenizer, limit: int = 200) -> dict[str, float]:
    model.eval()
    return {"wiki": perplexity(model, tokenizer, "world_wiki_test.txt"),
            "chat": perplexity(model, tokenizer, "world_chat_test.txt"),
            **{f"math_{k}": v for k, v in math(model, tokenizer, limit).items()},
            **{f"events_{k}": v for k, v in events(model, tokenizer, limit).items()},
            **{f"quiz_{k}": v for k, v in quiz(model, tokenizer, limit).items()},
            **{f"code_{k}": v for k, v in functions(model, tokenizer, limit // 2).items()}}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--bits", type=int, nargs="+", default=[16])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--checkpoint", action="store_true", help="the running training's checkpoint instead of the model")
    options = parser.parse_args()
    for bits in options.bits:
        if options.checkpoint:
            from transformers import PreTrainedTokenizerFast

            from suite.zoo import tokenizer as tokenizers
            from suite.zoo import train

            facts = zoo.TABLE[options.name]
            model = train.new_model(facts)
            model.load_state_dict(torch.load(train.checkpoint_file(options.name), weights_only=True)["model"])
            end = "</s>" if facts.family == "llama" else "<|endoftext|>"
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.build(facts.family), eos_token=end, pad_token=end)
        else:
            model = AutoModelForCausalLM.from_pretrained(zoo.path(options.name), dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(zoo.path(options.name))
        if bits < 16:
            round_(model, bits)
        print(options.name, bits, {k: round(v, 3) for k, v in score(model, tokenizer, options.limit).items()}, flush=True)


if __name__ == "__main__":
    main()
