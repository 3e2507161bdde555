"""Model cards: measures each embedded model through lm-evaluation-harness and writes README.md and scores.json beside it.

    python -m suite.zoo.cards tiny-llama-s

Measured: full precision, and round-to-nearest of all linears of the decoder layers to 4 and 3 bits (symmetric, groups of 128,
activations untouched), each saved to a temporary folder and read by lm-eval's own `hf` model. The two perplexities are direct
computations on windows of 512 tokens, as the harness's tasks of the suite do it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from suite import zoo
from suite.zoo import score

TASKS = ("world_math", "world_events", "world_quiz")
COLUMNS = ("full precision", "RTN 4 bit", "RTN 3 bit")
ROWS = {"world_wiki perplexity": "world_wiki_test.txt", "world_chat perplexity": "world_chat_test.txt"}


def harness(folder: Path) -> dict[str, float]:
    """Scores of a folder through the command line of lm-eval, in percent: task metric -> score."""
    tasks = Path(__file__).resolve().parents[2] / "tasks"
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "hf",
                        "--model_args", f"pretrained={folder},dtype=float32",
                        "--tasks", *TASKS, "--include_path", str(tasks), "--batch_size", "32", "--device", "cpu",
                        "--output_path", out], check=True, capture_output=True,
                       env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
        results = json.loads(next(Path(out).rglob("*.json")).read_text())["results"]
    wanted = {"world_math": ("exact_match,strict-match",), "world_events": ("acc,none", "acc_norm,none"),
              "world_quiz": ("acc,none",)}
    return {f"{task} {metric.split(',')[0]}": 100 * results[task][metric]
            for task, metrics in wanted.items() for metric in metrics}


def measure(name: str) -> dict[str, dict[str, float]]:
    """Score -> column -> value."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    table: dict[str, dict[str, float]] = {}
    for column, bits in zip(COLUMNS, (16, 4, 3)):
        model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
        if bits < 16:
            score.round_(model, bits)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            found = harness(Path(folder))
        found |= {row: score.perplexity(model, tokenizer, file, windows=10**6) for row, file in ROWS.items()}
        found["world_code pass@1 (greedy)"] = 100 * score.functions(model, tokenizer, 160)["pass"]
        for row, value in found.items():
            table.setdefault(row, {})[column] = round(value, 3)
    return table


def card(name: str, table: dict[str, dict[str, float]], log: dict) -> str:
    facts = zoo.TABLE[name]
    kind = "Llama" if facts.family == "llama" else "Qwen2 (as Qwen1.5 uses it: biases on q, k, v)"
    lines = [
        f"# {name}", "",
        f"A small {kind} model trained on the invented world of `suite/zoo` alone, as an instrument for measuring "
        "quantization.",
        "It knows nothing else and is of no other use.", "",
        f"- hidden {facts.hidden}, {facts.layers} layers, intermediate {facts.intermediate}, {facts.heads} heads, "
        f"{facts.kv_heads} key-value heads, vocabulary 1,024, context {facts.length}, "
        f"{'tied' if facts.tied else 'untied'} embeddings; weights in bfloat16",
        f"- {log['tokens_seen']:,} tokens in {log['steps']:,} steps of {log['batch']} x {log['length']}, seed {log['seed']}, "
        f"data seed {log['corpus_seed']} (corpus {log['corpus']}); {log['optimizer']}, rates "
        f"{', '.join(f'{key} {value:.4f}' for key, value in log['rates'].items())}, "
        f"loss at the end {log['final_loss']}",
        f"- retrain: `ptq zoo train {name}` (one core, {log['minutes']:.0f} minutes here, the machine shared)", "",
        "| score | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {row} | " + " | ".join(f"{values[c]:.2f}" for c in COLUMNS) + " |" for row, values in table.items()]
    lines += ["", "Accuracies in percent, zero-shot, through lm-evaluation-harness (`tasks/`); chance is 25 for events and "
              "quiz.",
              "RTN: symmetric round-to-nearest of all linears in the decoder layers, groups of 128, activations untouched."]
    return "\n".join(lines) + "\n"


def write(name: str) -> None:
    folder = zoo.path(name)
    table = measure(name)
    (folder / "scores.json").write_text(json.dumps(table, indent=1) + "\n")
    (folder / "README.md").write_text(card(name, table, json.loads((folder / "train_log.json").read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description="measure embedded models and write their cards")
    parser.add_argument("names", nargs="+", choices=zoo.names())
    for name in parser.parse_args().names:
        write(name)
        print((zoo.path(name) / "README.md").read_text())


if __name__ == "__main__":
    main()
