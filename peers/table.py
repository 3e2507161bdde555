"""Perplexity of llm-compressor's methods beside the suite's: same model, same calibration tokens, same scheme.

    .venv/bin/python peers/table.py tiny-llama-s [--wbits 4] [--abits 8] [--orders 3] [--seeds 3] [--out results/peers]

Needs `make peers`. Both sides' checkpoints are read by the suite and evaluated on the same windows, so differences are
paired. Rounding to nearest shows what the two arithmetics differ by. A method that uses calibration data runs several
times on both sides, with other calibration tokens (seeds) and, GPTQ, with the same tokens in other orders: a result
that only holds for one of these is none. OUT/<model>-<scheme>.json holds every run's loss by window, and a run that is
there is not made again; `--seeds 0` draws the table anew from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from suite import calib, export, method, models, paths, provenance, recipe, stats, store, walk, windows  # noqa: E402
from suite.errors import PTQError  # noqa: E402

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
METHODS = ("rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq")
TEXTS = {"wiki": "world_wiki_test.txt", "chat": "world_chat_test.txt"}
WINDOW, NSAMPLES, SEQLEN = 512, 64, 512
ENOUGH = 3  # runs below which no word is given: calibration alone moves a row by as much as methods differ
SUITE, PEER = "suite", "llm-compressor"
LIBRARIES = ("torch", "transformers", "compressed-tensors")


@dataclass(frozen=True, order=True)
class Run:
    """Which calibration data: seed of the tokens, and of the order of their sequences; order 0: as drawn."""

    seed: int
    order: int = 0


def runs_of(name: str, seeds: int, orders: int) -> list[Run]:
    """The runs of a method: rounding to nearest uses no data, and only GPTQ sums over it in a way that order can move.

    >>> runs_of("gptq", seeds=2, orders=2)
    [Run(seed=0, order=0), Run(seed=0, order=1), Run(seed=1, order=0)]
    """
    if name == "rtn":
        return [Run(0)] if seeds else []
    others = [Run(0, order) for order in range(1, orders)] if name.endswith("gptq") and seeds else []
    return sorted({*(Run(seed) for seed in range(seeds)), *others})


def peer(model: Path, tokens: Path, steps: str, out: Path) -> Path:
    """A checkpoint made by llm-compressor with a recipe. Raises PTQError, with its last words, if it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.with_suffix(".yaml")
    written.write_text(steps)
    done = subprocess.run([PYTHON, ROOT / "peers" / "oneshot.py", model, tokens, written, out],
                          capture_output=True, text=True, cwd=out.parent)
    if done.returncode:
        raise PTQError(f"llm-compressor failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}")
    return out


def versions() -> dict[str, dict[str, str]]:
    """Of the libraries of either side. Raises PTQError where `make peers` has not been run."""
    if not PYTHON.is_file():
        raise PTQError(f"{PYTHON.relative_to(ROOT)} is not there: run `make peers` first")
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    names = ("llmcompressor", *LIBRARIES)
    told = subprocess.run([PYTHON, "-c", program, *names], capture_output=True, text=True, check=True).stdout.split()
    return {SUITE: {name: provenance.version(name) for name in LIBRARIES},
            PEER: {name: version.partition("+")[0] for name, version in zip(names, told, strict=True)}}


def losses(name: str) -> dict[str, list[float]]:
    """Text -> summed NLL by window of a model by name, in float32."""
    loaded, found = models.load(name, device="cpu", dtype="float32"), {}
    for text, file in TEXTS.items():
        content = (paths.tasks() / "data" / file).read_text(encoding="utf-8")
        cut = windows.token_windows(content, loaded.tokenizer, WINDOW)
        found[text] = windows.window_nll(loaded.model, cut.tokens).tolist()
    return found


def measure(name: str, options: Mapping, wanted: Sequence[tuple[str, Run]], there: set) -> Iterator[dict]:
    """The rows that are not `there`: {"method", "made_by", "seed", "order", "nll"}; the original first."""
    if ("fp16", "", Run(0)) not in there:
        yield row("fp16", "", Run(0), losses(name))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = place / "base"  # saved by the suite: outliers planted, and in the type that the suite computes in
        loaded = models.load(name, device="cpu", dtype="float32")
        loaded.model.save_pretrained(base)
        loaded.tokenizer.save_pretrained(base)
        for method_name, run in wanted:
            missing = [whose for whose in (SUITE, PEER) if (method_name, whose, run) not in there]
            if not missing:
                continue
            loaded = models.load(name, device="cpu", dtype="float32")
            data = calib.load(calib.EMBEDDED, loaded.tokenizer, NSAMPLES, SEQLEN, run.seed)
            if run.order:
                order = torch.randperm(len(data.tokens), generator=torch.Generator().manual_seed(run.order))
                data = calib.from_tokens(data.tokens[order])
            configured = method.build(method_name, **options)
            layers = walk.quantize_model(configured, loaded.model, data)
            record = {"method": method.to_config(configured), "layers": layers}
            label = f"{method_name}-{run.seed}-{run.order}"
            if SUITE in missing:
                made = export.write(loaded.model, loaded.tokenizer, place / label, record)
                yield row(method_name, SUITE, run, losses(str(made)))
            if PEER in missing:
                tokens = place / "tokens.json"
                tokens.write_text(json.dumps(data.tokens.tolist()))
                yield row(method_name, PEER, run, losses(str(peer(base, tokens, recipe.text(record), place / f"{label}-peer"))))


def row(name: str, whose: str, run: Run, nll: Mapping[str, list[float]]) -> dict:
    return {"method": name, "made_by": whose, "seed": run.seed, "order": run.order, "nll": nll}


def key(one: Mapping) -> tuple[str, str, Run]:
    return one["method"], one["made_by"], Run(one["seed"], one["order"])


# ---------------------------------------------------------------------------------------------- the table


def table(rows: Sequence[Mapping]) -> list[str]:
    """The rows as markdown, a line for each method and maker; of several runs the mean, and the lowest and highest."""
    lines = ["| method | made by | runs | " + " | ".join(TEXTS) + " | "
             + " | ".join(f"{text}: peer - suite" for text in TEXTS) + " |", "|---|---|---|" + "---|" * (2 * len(TEXTS))]
    by_key = {key(one): one["nll"] for one in rows}
    names = list(dict.fromkeys((one["method"], one["made_by"]) for one in rows))
    for name, whose in sorted(names, key=lambda pair: (("fp16", *METHODS).index(pair[0]), pair[1] == PEER)):
        runs = sorted(run for label, maker, run in by_key if (label, maker) == (name, whose))
        found = {text: [sample(by_key[name, whose, run][text]) for run in runs] for text in TEXTS}
        cells = [scores(found[text]) for text in TEXTS]
        for text in TEXTS:
            paired = [(sample(by_key[name, PEER, run][text]), sample(by_key[name, SUITE, run][text]))
                      for run in runs if (name, SUITE, run) in by_key] if whose == PEER else []
            cells.append(gap(paired) if paired else "")
        lines.append(f"| {name} | {whose} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def sample(nll: Sequence[float]) -> stats.Sample:
    return stats.Sample.windows(nll, WINDOW - 1)


def scores(found: Sequence[stats.Sample]) -> str:
    values = [one.score for one in found]
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def gap(paired: Sequence[tuple[stats.Sample, stats.Sample]]) -> str:
    """peer - suite of runs on the same data: their mean with the paired interval over windows, the runs' lowest and
    highest, and a word where there are several runs, and windows and all runs agree on the sign."""
    mean = [sample(np.mean([pair[side].values for pair in paired], axis=0)) for side in (0, 1)]
    over_windows = stats.difference(*mean)
    by_run = [theirs.score - ours.score for theirs, ours in paired]
    word = ""
    if len(by_run) >= ENOUGH and over_windows.low > 0 and min(by_run) > 0:
        word = ": suite better"
    elif len(by_run) >= ENOUGH and over_windows.high < 0 and max(by_run) < 0:
        word = ": peer better"
    spread = f", runs {min(by_run):+.4f} to {max(by_run):+.4f}" if len(by_run) > 1 else ""
    return f"{np.mean(by_run):+.4f} [{over_windows.low:+.4f}, {over_windows.high:+.4f}]{spread}{word}"


def page(held: Mapping) -> str:
    theirs, nll = held["libraries"][PEER], held["rows"][0]["nll"]
    counts = " and ".join(f"{len(values)} of {text}" for text, values in nll.items())
    return "\n".join([
        f"# {held['model']['name']}, {held['scheme']}: the suite beside llm-compressor {theirs['llmcompressor']}", "",
        f"Perplexity on windows of {WINDOW} tokens ({counts}). Calibration: {NSAMPLES} x {SEQLEN} tokens of the embedded text, "
        f"the same tokens in the same order for both. Runs differ in the tokens or in their order; numbers are means, with "
        f"the lowest and the highest. The last columns are above 0 where the suite is better: mean over the runs, in brackets "
        f"the 95 % interval (paired over windows), and the lowest and highest run. The interval does not cover the choice of "
        f"calibration data: a word stands only where there are {ENOUGH} runs or more, and windows and all runs agree.", "",
        *table(held["rows"]), "",
        f"Both sides compute in float32 on one thread; both checkpoints are in the compressed-tensors format, read and "
        f"evaluated by the suite, activations rounded. llm-compressor with transformers {theirs['transformers']}, "
        f"compressed-tensors {theirs['compressed-tensors']}. Made by `peers/table.py`; losses by window in the .json beside.",
        ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--abits", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="of calibration tokens; 0: only draw the table")
    parser.add_argument("--orders", type=int, default=3, help="of the same tokens, for GPTQ")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "peers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    options = {"wbits": given.wbits, "abits": given.abits}
    scheme = f"W{given.wbits}A{given.abits}"
    path = given.out / f"{given.model.replace('@', '-').replace('=', '-')}-{scheme}.json"
    try:
        identity = {"name": given.model, "digest": models.identify(given.model)["digest"]}
        held = json.loads(path.read_text()) if path.is_file() else {
            "model": identity, "scheme": f"{scheme} g128", "libraries": versions(), "rows": []}
        if held["model"] != identity:
            raise PTQError(f"{path} holds runs of another {given.model}: remove it, or give another --out")
        wanted = [(name, run) for name in given.methods.split(",") for run in runs_of(name, given.seeds, given.orders)]
        wanted.sort(key=lambda pair: pair[1])  # an interrupted sweep has something of every method
        if given.seeds:
            if held["libraries"] != versions():
                raise PTQError(f"{path} holds runs of other versions: remove it, or give another --out")
            for one in measure(given.model, options, wanted, {key(one) for one in held["rows"]}):
                held["rows"].append(store.significant(one))
                store.write_bytes(path, (json.dumps(held) + "\n").encode())
                print(*key(one), *(f"{text} {sample(nll).score:.4f}" for text, nll in one["nll"].items()), flush=True)
    except PTQError as error:
        sys.exit(f"table.py: error: {error}")
    store.write_bytes(path.with_suffix(".md"), page(held).encode())
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
