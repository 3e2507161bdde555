"""`make bench`: the speed of the suite as ratios measured in one run, on one model, with one number of threads.

    python -m suite.bench --model tiny-llama-m --threads 2

Ratios, not seconds: they hold on a slow machine too. Each is printed with the bound it is meant to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from suite import arch, candidates, select, walk
from suite.calib import Calibration
from suite.method import build

POOL = ("gptq", "awq", "smoothquant")


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The median time of a call."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def matrix_rate(width: int, inner: int, tokens: int = 8192) -> float:
    """Floating-point operations a second of this machine, in the shape that a layer's products have."""
    x, w = torch.randn(tokens, width), torch.randn(inner, width)
    return 2 * tokens * width * inner / seconds(lambda: x @ w.T, 9)


def floor_operations(model: nn.Module, calib: Calibration, candidates: int) -> float:
    """Operations that a hybrid cannot avoid: reference pass, statistics pass, one pass per candidate, Gram matrices."""
    tokens, sequence = calib.tokens.numel(), calib.tokens.shape[1]
    one_pass = gram = 0.0
    for layer in arch.layers(model):
        for site in arch.sites(model):
            widths = [layer.get_submodule(name).weight.shape for name in site.linears]
            one_pass += sum(2 * tokens * o * i for o, i in widths)
            gram += 2 * tokens * widths[0][1] ** 2
        one_pass += 2 * 2 * tokens * sequence * model.config.hidden_size / 2  # causal scores and their sum over values
    return (2 + candidates) * one_pass + gram


def quantize_seconds(model: nn.Module, calib: Calibration, name: str, **options) -> float:
    """The time of one quantization."""
    copied = copy.deepcopy(model)
    start = time.perf_counter()
    walk.quantize_model(build(name, **options), copied, calib)
    return time.perf_counter() - start


def fewer(calib: Calibration, parts: int) -> Calibration:
    """The first sequences of a calibration, one part in so many."""
    return dataclasses.replace(calib, tokens=calib.tokens[:max(1, len(calib.tokens) // parts)])


@contextlib.contextmanager
def stages():
    """Seconds spent in each stage of a hybrid, nested stages subtracted from the outer one."""
    spent: dict[str, float] = defaultdict(float)
    stack: list[float] = []

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            stack.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                spent[name] += taken - stack.pop()
                if stack:
                    stack[-1] += taken

        return wrapper

    from suite.method import lookup

    patches = [(walk.LayerView, "outputs", "passes (reference, candidates)"), (walk.LayerView, "_gather", "statistics pass"),
               (candidates, "distances", "scoring")]
    patches += [(lookup(name), "quantize", f"{name}: search and rounding") for name in POOL]
    saved = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    try:
        for owner, attribute, name in patches:
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
        original = candidates.distances
        candidates.distances = lambda reference: timed("scoring", original(reference))
        yield spent
    finally:
        for owner, attribute, function in saved:
            setattr(owner, attribute, function)


def linear_fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of y over x."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - (residual**2).sum() / ((y - np.mean(y)) ** 2).sum())


def shortened(model: nn.Module, layers: int) -> nn.Module:
    """A copy of the model with its first layers only."""
    short = copy.deepcopy(model)
    kept = arch.layers(short)[:layers]
    parent, _, attribute = arch.family(short).layers.rpartition(".")
    setattr(short.get_submodule(parent), attribute, nn.ModuleList(kept))
    short.config.num_hidden_layers = layers
    return short


def selection(model: nn.Module, calib: Calibration, print_: Callable[[str], None] = print, repeats: int = 2) -> dict:
    """The cost of the hybrid: against its candidates one after another, against the arithmetic floor, and its growth.

    The best of `repeats` turns counts for each; growth is measured on a quarter of the calibration, once for each point.
    """
    quantize_seconds(shortened(model, 1), fewer(calib, 8), "cka-hybrid")  # what is done once in a process is not measured
    turns: dict[str, list[float]] = {name: [] for name in (*POOL, "cka-hybrid")}
    rates = []
    for turn in range(repeats):  # in turns, so that what else the machine does falls on all
        rates.append(matrix_rate(model.config.hidden_size, model.config.intermediate_size))
        with stages() if turn == repeats - 1 else contextlib.nullcontext() as spent:
            turns["cka-hybrid"].append(quantize_seconds(model, calib, "cka-hybrid"))
        for name in POOL:
            turns[name].append(quantize_seconds(model, calib, name))
    single, hybrid, rate = {name: min(turns[name]) for name in POOL}, min(turns["cka-hybrid"]), max(rates)
    floor = floor_operations(model, calib, len(POOL)) / rate
    print_(f"matrix products: {rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads; "
           f"calibration {calib.tokens.shape[0]} x {calib.tokens.shape[1]} tokens")
    print_("one method:  " + ", ".join(f"{name} {s:.2f} s" for name, s in single.items()))
    print_(f"hybrid:      {hybrid:.2f} s = {hybrid / sum(single.values()):.2f} of the three one after another (bound 0.70)")
    print_(f"             {hybrid / floor:.2f} times the arithmetic floor of {floor:.2f} s (bound 1.50)")
    for name, s in sorted(spent.items(), key=lambda item: -item[1]):
        print_(f"             {s:6.2f} s  {s / floor:5.2f} of the floor  {name}")

    depths = sorted({max(1, len(arch.layers(model)) * k // 4) for k in (1, 2, 3, 4)})
    part = fewer(calib, 4)
    by_depth = [quantize_seconds(shortened(model, depth), part, "cka-hybrid") for depth in depths]
    fits = {"layers": linear_fit(depths, by_depth), "candidates": linear_fit(*_repeated_candidate(model, part))}
    for what, (slope, intercept, r2) in fits.items():
        print_(f"growth:      {slope:.3f} s for each of the {what} + {intercept:.3f} s, R^2 {r2:.3f} (1 is a line; "
               f"{len(part.tokens)} sequences)")
    return {"single": single, "hybrid": hybrid, "floor": floor, "stages": dict(spent), "fits": fits, "rate": rate}


def _repeated_candidate(model: nn.Module, calib: Calibration) -> tuple[list[float], list[float]]:
    """Seconds of a selection among 1 to 4 candidates of the same price, so that what grows is their number alone."""
    rule = build("smoothquant")
    counts, taken = [1, 2, 3, 4], []
    for count in counts:
        names = tuple(f"candidate {k}" for k in range(count))

        class Repeated:
            scheme = rule.scheme

            def plan(self, model, calib):
                return [select.Select(names, ([rule],) * count, "cka")] * len(arch.layers(model))

        taken.append(seconds(lambda: walk.quantize_model(Repeated(), copy.deepcopy(model), calib), 1))
    return counts, taken


def evaluation(name: str, print_: Callable[[str], None] = print, limit: int = 96) -> dict:
    """What a quantized model costs to evaluate, against the full-precision model: the same tokens through lm-eval, and
    generation of a fixed number of tokens."""
    from suite import evaluation, models
    from suite.adapter import PTQ

    loaded = {kind: models.load(name) for kind in ("fp16", "rtn")}
    walk.quantize_model(build("rtn"), loaded["rtn"].model, None)
    harness = {kind: PTQ(one.model, tokenizer=one.tokenizer) for kind, one in loaded.items()}
    tests = evaluation.Tasks([task for task in evaluation.EMBEDDED_TASKS if task != "world_math"], limit)
    prompt = torch.randint(10, 500, (32, 64))
    ratios = {}
    for task in (*tests.names, "generation"):
        def run(kind: str) -> None:
            if task == "generation":
                loaded[kind].model.generate(prompt, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)
            else:
                evaluation.evaluate_quietly(harness[kind], tests, task)

        taken: dict[str, list[float]] = {"fp16": [], "rtn": []}
        for _ in range(3):  # in turns, so that what else the machine does falls on both
            for kind in taken:
                taken[kind].append(seconds(lambda: run(kind), 1))
        ratios[task] = statistics.median(taken["rtn"]) / statistics.median(taken["fp16"])
        print_(f"evaluation:  {task:15} {statistics.median(taken['fp16']):6.2f} s in full precision, "
               f"{ratios[task]:.2f} times that quantized (bound 1.25)")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the suite, as ratios measured in one run.")
    parser.add_argument("--model", default="tiny-llama-m", help="a model's name or folder [tiny-llama-m]")
    parser.add_argument("--threads", type=int, default=1, help="threads of every part; 1 suits small models [1]")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each quantization, the best of which counts [2]")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration sequences [64]")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of each [512]")
    arguments = parser.parse_args()

    from suite import calib, models

    torch.set_num_threads(arguments.threads)
    loaded = models.load(arguments.model)
    data = calib.load(calib.EMBEDDED, loaded.tokenizer, arguments.nsamples, arguments.seqlen)
    print(f"{arguments.model} on {arguments.threads} threads, torch {torch.__version__}")
    selection(loaded.model, data, lambda line: print(line, flush=True), arguments.repeats)
    evaluation(arguments.model, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
