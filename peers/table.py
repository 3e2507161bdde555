"""Perplexity of llm-compressor's methods beside the suite's: same model, same calibration tokens, same scheme.

    .venv/bin/python peers/table.py tiny-llama-s [--wbits 4] [--abits 8] [--out results/peers]

Both sides' checkpoints are read by the suite and evaluated by the same windows, so differences are paired. Rounding to
nearest shows what the two arithmetics differ by; GPTQ of llm-compressor runs three times, each with another order of the
calibration sequences, as it shuffles them by itself. Needs `make peers`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from suite import calib, export, method, models, paths, recipe, stats, walk, windows  # noqa: E402
from suite.errors import PTQError  # noqa: E402

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
METHODS = ("rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq")
TEXTS = {"wiki": "world_wiki_test.txt", "chat": "world_chat_test.txt"}


def peer(model: Path, tokens: Path, steps: str, out: Path, shuffle: int | None = None) -> Path:
    """A checkpoint made by llm-compressor with a recipe. Raises PTQError, with its last words, if it fails."""
    if not PYTHON.is_file():
        raise PTQError(f"{PYTHON.relative_to(ROOT)} is not there: run `make peers` first")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.with_suffix(".yaml")
    written.write_text(steps)
    order = [] if shuffle is None else ["--shuffle", str(shuffle)]
    done = subprocess.run([PYTHON, ROOT / "peers" / "oneshot.py", model, tokens, written, out, *order],
                          capture_output=True, text=True, cwd=out.parent)
    if done.returncode:
        raise PTQError(f"llm-compressor failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}")
    return out


def samples(name: str, max_windows: int | None) -> dict[str, stats.Sample]:
    """Text -> NLL by window of a model by name."""
    loaded, found = models.load(name, device="cpu"), {}
    for text, file in TEXTS.items():
        content = (paths.tasks() / "data" / file).read_text(encoding="utf-8")
        cut = windows.token_windows(content, loaded.tokenizer, 512, max_windows=max_windows)
        nll = windows.window_nll(loaded.model, cut.tokens)
        found[text] = stats.Sample.windows(nll.tolist(), cut.size - 1)
    return found


def rows(name: str, options: dict, nsamples: int, seqlen: int, max_windows: int | None, names=METHODS):
    """(method, whose, text -> sample) in the order of the table; the original comes first."""
    yield "fp16", "", samples(name, max_windows)
    with tempfile.TemporaryDirectory() as folder:
        base, place = models.resolve(name).folder, Path(folder)
        loaded = models.load(name, device="cpu")
        data = calib.load(calib.EMBEDDED, loaded.tokenizer, nsamples, seqlen, 0)
        tokens = place / "tokens.json"
        tokens.write_text(json.dumps(data.tokens.tolist()))
        for method_name in names:
            configured = method.build(method_name, **options)
            loaded = models.load(name, device="cpu")
            layers = walk.quantize_model(configured, loaded.model, data)
            record = {"method": method.to_config(configured), "layers": layers}
            export.write(loaded.model, loaded.tokenizer, place / method_name, record)
            yield method_name, "suite", samples(str(place / method_name), max_windows)
            orders = (0, 1, 2) if "gptq" in method_name else (None,)
            for order in orders:
                made = peer(base, tokens, recipe.text(record), place / f"{method_name}-peer-{order}", order)
                whose = "llm-compressor" + ("" if order is None else f", order {order}")
                yield method_name, whose, samples(str(made), max_windows)


def table(found: list) -> list[str]:
    """The rows as markdown. The last columns are peer - suite with the paired 95 % interval: above 0, ours is better."""
    lines = ["| method | made by | " + " | ".join(TEXTS) + " | " + " | ".join(f"{t}: peer - suite" for t in TEXTS) + " |",
             "|---|---|" + "---|" * (2 * len(TEXTS))]
    ours = {name: scores for name, whose, scores in found if whose == "suite"}
    for name, whose, scores in found:
        cells = [f"{scores[text].score:.4f}" for text in TEXTS]
        for text in TEXTS:
            if whose.startswith("llm"):
                gap = stats.difference(scores[text], ours[name][text])
                cells.append(f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]")
            else:
                cells.append("")
        lines.append(f"| {name} | {whose} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--abits", type=int, default=8)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "peers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    try:
        for row in rows(given.model, {"wbits": given.wbits, "abits": given.abits}, given.nsamples, given.seqlen,
                        given.max_windows, given.methods.split(",")):
            found.append(row)
            print(row[0], row[1], *(f"{text} {sample.score:.4f}" for text, sample in row[2].items()), flush=True)
    except PTQError as error:
        sys.exit(f"table.py: error: {error}")
    lines = table(found)
    title = f"# {given.model}, W{given.wbits}A{given.abits} g128: the suite beside llm-compressor"
    about = (f"Window perplexity (512 tokens), {len(next(iter(found[0][2].values())).values)} windows of wiki; calibration "
             f"{given.nsamples} x {given.seqlen} embedded tokens, the same for both; one thread. Both evaluated by the "
             f"suite from compressed-tensors checkpoints. Made by `peers/table.py`.")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.model.replace('@', '-')}-W{given.wbits}A{given.abits}.md"
    path.write_text("\n".join([title, "", about, "", *lines, ""]))
    print(path)


if __name__ == "__main__":
    main()
