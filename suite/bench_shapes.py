"""Quantization at the size of real models, without their weights: random weights in the shape of a known model.

    python -m suite.bench_shapes --shape llama-3-8b --shape qwen1.5-0.5b --out shapes.json

Per method: seconds, peak memory beside the estimate of `suite.preflight`, and the share of the time that matrix products
take. Random weights cost what trained ones cost; their errors say nothing, and none are told.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suite import models, preflight, walk
from suite.calib import Calibration, from_tokens
from suite.method import build
from suite.paths import known_models
from suite.provenance import Meter, hardware, versions

METHODS = ("rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq", "mp-gptq", "spinquant", "cka-hybrid")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product", "_flash_attention", "_efficient_attention",
            "linear", "cholesky", "triangular_solve", "linalg")


def random_model(name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A model of a known shape with small random weights, built on the device. layers: only so many."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(known_models()[name]["shape"])
    if layers is not None:
        shape["num_hidden_layers"] = min(layers, shape["num_hidden_layers"])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, max_position_embeddings=4096)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


def share_of_products(method: Any, model: nn.Module, data: Calibration) -> float:
    """Of the time that operators take, the part in matrix products, factorizations and attention, by torch's profiler
    over the first layer."""
    from torch.profiler import ProfilerActivity, profile

    cuda = next(model.parameters()).is_cuda
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        view = next(walk.walk(model, data, reference=len(data.tokens)))
        rule = method.plan(model, data)[0]
        edit = rule.quantize(view)
        view.after(edit).outputs()
    times = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
             for event in profiler.key_averages()}
    products = sum(t for key, t in times.items() if any(word in key for word in PRODUCTS))
    return products / max(sum(times.values()), 1e-9)


def measure(name: str, method: str, device: torch.device, dtype: torch.dtype, data: Calibration,
            layers: int | None) -> dict[str, Any]:
    """One quantization: seconds, the peak and its estimate in MiB, the share of matrix products."""
    configured = build(method)
    model = random_model(name, device, dtype, layers)
    n, t = data.tokens.shape
    run = preflight.Run(preflight.Shape.of(model.config.to_dict()), n, t, preflight.bytes_of(dtype),
                        device.type == "cuda", preflight.candidates(configured),
                        getattr(configured, "needs_calibration", True))
    need, before = preflight.need(run), Meter.memory()
    share = None
    if run.calibrated and not getattr(configured, "rewrites_model", False) and getattr(configured, "block", 1) == 1:
        share = share_of_products(configured, random_model(name, device, dtype, 1), data)
        gc.collect()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    start = time.perf_counter()
    with Meter() as meter:
        walk.quantize_model(configured, model, data)
    seconds = time.perf_counter() - start
    estimate = need.device / 2**20 if run.cuda else before + (need.host - weights) / 2**20
    peak = meter.told["peak_gpu_memory_mib"] if run.cuda else meter.told["peak_memory_mib"]
    return {"shape": name, "layers": len(model.model.layers), "method": method, "seconds": round(seconds, 2),
            "peak_mib": peak, "estimated_mib": round(estimate, 1), "share_of_matrix_products": share and round(share, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantization of random weights in the shapes of real models.")
    parser.add_argument("--shape", action="append", choices=sorted(known_models()), help="[llama-3-8b, qwen1.5-0.5b]")
    parser.add_argument("--method", action="append", help=f"[{', '.join(METHODS)}]")
    parser.add_argument("--layers", type=int, help="only so many decoder layers [all]")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", help="[cuda where there is one]")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    device = models.device_of(arguments.device)
    dtype = models.default_dtype(device)
    rows = []
    for shape in arguments.shape or ("llama-3-8b", "qwen1.5-0.5b"):
        vocabulary = known_models()[shape]["shape"]["vocab_size"]
        generator = torch.Generator().manual_seed(0)
        data = from_tokens(torch.randint(vocabulary, (arguments.nsamples, arguments.seqlen), generator=generator))
        for method in arguments.method or METHODS:
            rows.append(measure(shape, method, device, dtype, data, arguments.layers))
            print(json.dumps(rows[-1]), flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if arguments.out:
        told = {"hardware": hardware(), "versions": versions(), "dtype": str(dtype).removeprefix("torch."),
                "nsamples": arguments.nsamples, "seqlen": arguments.seqlen, "rows": rows}
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
