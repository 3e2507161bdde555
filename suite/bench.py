"""`ptq bench`: the speed of the suite as ratios measured in one run, on one model, with one number of threads.

Ratios, not seconds: they hold on a busy or a slow machine too. Each is printed with the bound it is meant to keep.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from suite import arch, select, walk
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
    method = build(name, **options)

    def run():
        walk.quantize_model(method, copy.deepcopy(model), calib)

    return seconds(run)


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
               (select, "distances", "scoring")]
    patches += [(lookup(name), "quantize", f"{name}: search and rounding") for name in POOL]
    saved = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    try:
        for owner, attribute, name in patches:
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
        original = select.distances
        select.distances = lambda reference: timed("scoring", original(reference))
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


def selection(model: nn.Module, calib: Calibration, print_: Callable[[str], None] = print) -> dict:
    """The cost of the hybrid: against its candidates one after another, against the arithmetic floor, and its growth."""
    single = {name: quantize_seconds(model, calib, name) for name in POOL}
    hybrid = quantize_seconds(model, calib, "cka-hybrid")
    rate = matrix_rate(model.config.hidden_size, model.config.intermediate_size)
    floor = floor_operations(model, calib, len(POOL)) / rate
    with stages() as spent:
        walk.quantize_model(build("cka-hybrid"), copy.deepcopy(model), calib)
    print_(f"matrix products: {rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads; "
           f"calibration {calib.tokens.shape[0]} x {calib.tokens.shape[1]} tokens")
    print_("one method:  " + ", ".join(f"{name} {s:.2f} s" for name, s in single.items()))
    print_(f"hybrid:      {hybrid:.2f} s = {hybrid / sum(single.values()):.2f} of the three one after another (bound 0.70)")
    print_(f"             {hybrid / floor:.2f} times the arithmetic floor of {floor:.2f} s (bound 1.50)")
    for name, s in sorted(spent.items(), key=lambda item: -item[1]):
        print_(f"             {s:6.2f} s  {s / floor:5.2f} of the floor  {name}")

    depths = sorted({max(1, len(arch.layers(model)) * k // 4) for k in (1, 2, 3, 4)})
    by_depth = [quantize_seconds(shortened(model, d), calib, "cka-hybrid") for d in depths]
    by_pool = [quantize_seconds(model, calib, "cka-hybrid", pool=pool)
               for pool in ("smoothquant", "smoothquant|rtn", "smoothquant|rtn|smoothquant+gptq", "smoothquant|rtn|smoothquant+gptq|gptq")]
    fits = {"layers": linear_fit(depths, by_depth)}
    # candidates differ in price: what must be linear is the sum of their own times against the time of the pool
    rtn, smooth, both, gptq = by_pool[1] - by_pool[0], by_pool[0], by_pool[2] - by_pool[1], by_pool[3] - by_pool[2]
    fits["same candidate, more often"] = linear_fit(*_repeated_candidate(model, calib))
    for what, (slope, intercept, r2) in fits.items():
        print_(f"growth:      {what}: {slope:.3f} s each + {intercept:.3f} s, R^2 {r2:.3f} (linear is 1)")
    print_(f"added cost of a candidate: rtn {rtn:.2f} s, smoothquant+gptq {both:.2f} s, gptq {gptq:.2f} s; smoothquant alone {smooth:.2f} s")
    return {"single": single, "hybrid": hybrid, "floor": floor, "stages": dict(spent), "fits": fits, "rate": rate}


def _repeated_candidate(model: nn.Module, calib: Calibration) -> tuple[list[float], list[float]]:
    """Seconds of a selection among 1 to 4 candidates that cost the same."""
    rule = build("smoothquant")
    counts, taken = [1, 2, 3, 4], []
    for count in counts:
        names = tuple(f"candidate {k}" for k in range(count))

        class Repeated:
            scheme = rule.scheme

            def plan(self, model, calib):
                return [select.Select(names, ([rule],) * count, "cka")] * len(arch.layers(model))

        taken.append(seconds(lambda: walk.quantize_model(Repeated(), copy.deepcopy(model), calib)))
    return counts, taken
