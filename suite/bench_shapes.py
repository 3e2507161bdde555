"""Quantization at the size of real models, without their weights: random weights in the shape of a known model.

    python -m suite.bench_shapes --shape llama-3-8b --shape qwen1.5-0.5b --out results/shapes-gpu.json

Per method: seconds, peak memory beside the estimate of `suite.preflight`, and the share of the time that matrix products
take. Random weights cost what trained ones cost; their errors say nothing, and none are told. Each measurement has a
process of its own, so that none finds memory that another has left.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suite import models, preflight, walk
from suite.calib import Calibration, from_tokens
from suite.errors import PTQError
from suite.method import build
from suite.paths import known_models
from suite.provenance import Meter, hardware, versions

METHODS = ("rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq", "mp-gptq", "spinquant", "cka-hybrid")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product", "_flash_attention", "_efficient_attention",
            "linear", "cholesky", "triangular_solve", "linalg")


def random_model(shape: Mapping[str, Any], device: torch.device, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A model of a shape (as in its config.json) with small random weights, built on the device. layers: only so many."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(shape)
    if layers is not None:
        shape["num_hidden_layers"] = min(layers, shape["num_hidden_layers"])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, max_position_embeddings=4096)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


def random_tokens(shape: Mapping[str, Any], nsamples: int, seqlen: int) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return from_tokens(torch.randint(shape["vocab_size"], (nsamples, seqlen), generator=generator))


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


def measure(shape: Mapping[str, Any], method: str, device: str, nsamples: int, seqlen: int, layers: int | None = None,
            threads: int | None = None, share: bool = True) -> dict[str, Any]:
    """One quantization: seconds, the peak of the process (or the GPU) and its estimate in MiB, the share of matrix
    products; what was there before the run, the model without its layers' codes, is part of both."""
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    dtype = models.default_dtype(place)
    configured, data = build(method), random_tokens(shape, nsamples, seqlen)
    model = random_model(shape, place, dtype, layers)
    run = preflight.Run.of(preflight.Shape.of(model.config.to_dict()), configured, nsamples, seqlen, dtype,
                           place.type == "cuda")
    gc.collect()
    expected = estimate(run, model, before := Meter.memory())  # now: quantized, the model has other parameters
    with Meter() as meter:
        walk.quantize_model(configured, model, data)
    peak = meter.told["peak_gpu_memory_mib"] if run.cuda else meter.told["peak_memory_mib"]
    found = {"layers": len(model.model.layers), "method": method, "seconds": round(meter.seconds, 3),
             "before_mib": round(before), "peak_mib": round(peak), "estimated_mib": round(expected),
             "share_of_matrix_products": None}
    if share and run.calibrated and not getattr(configured, "rewrites_model", False):
        del model
        found["share_of_matrix_products"] = round(
            share_of_products(configured, random_model(shape, place, dtype, 1), data), 3)
    return found


def estimate(run: preflight.Run, model: nn.Module, before: float) -> float:
    """MiB: of the GPU's memory in all, or of the process, which has the model's weights already among what it had before."""
    need = preflight.need(run)
    return need.device / 2**20 if run.cuda else before + (need.host - models.weights_in_memory(model)) / 2**20


def in_its_own_process(*arguments: Any) -> dict[str, Any]:
    """`measure` in a new process, which has the libraries and nothing else. Raises PTQError if it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["suite.models", "suite.walk", "suite.preflight"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:
            raise PTQError("the process that measured was killed, as when the memory runs out: give fewer --layers, "
                           "--nsamples, or --seqlen") from None


def table(told: Mapping[str, Any]) -> str:
    """The measurements as Markdown."""
    machine = told["hardware"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    lines = [f"# Quantization of random weights in real shapes, {told['dtype']}", "",
             f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB; {gpus}. "
             f"torch {told['versions']['torch']}, transformers {told['versions']['transformers']}. Made by "
             f"`python -m suite.bench_shapes`. Peak: of the {'GPU' if machine['gpus'] else 'process'}; the estimate is that of "
             f"`ptq plan`.", "",
             "| shape | layers | tokens | method | seconds | peak MiB | estimated MiB | off by | in matrix products |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in told["rows"]:
        share = row["share_of_matrix_products"]
        lines.append(f"| {row['shape']} | {row['layers']} | {row['nsamples']} x {row['seqlen']} | {row['method']} | "
                     f"{row['seconds']:.1f} | {row['peak_mib']:,} | {row['estimated_mib']:,} | "
                     f"{row['estimated_mib'] / row['peak_mib'] - 1:+.0%} | {'' if share is None else f'{share:.0%}'} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quantization of random weights in the shapes of real models.")
    parser.add_argument("--shape", action="append", choices=sorted(known_models()), help="[llama-3-8b, qwen1.5-0.5b]")
    parser.add_argument("--method", action="append", help=f"[{', '.join(METHODS)}]")
    parser.add_argument("--layers", type=int, help="only so many decoder layers [all]")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", help="[cuda where there is one]")
    parser.add_argument("--threads", type=int, help="of the processor [torch's choice]")
    parser.add_argument("--no-share", action="store_true", help="leave out the share of matrix products")
    parser.add_argument("--out", type=Path, help="a JSON file, and a table beside it; further rows are added to it")
    given = parser.parse_args(arguments)
    device = models.device_of(given.device)
    if given.threads:
        torch.set_num_threads(given.threads)  # what is told of the machine
    told = {"hardware": hardware(), "versions": versions(), "dtype": str(models.default_dtype(device)).removeprefix("torch."),
            "rows": json.loads(given.out.read_text())["rows"] if given.out and given.out.exists() else []}
    for shape in given.shape or ("llama-3-8b", "qwen1.5-0.5b"):
        for method in given.method or METHODS:
            start = time.monotonic()
            row = in_its_own_process(known_models()[shape]["shape"], method, str(device), given.nsamples, given.seqlen,
                                     given.layers, given.threads, not given.no_share)
            row = {"shape": shape, "nsamples": given.nsamples, "seqlen": given.seqlen, **row}
            print(json.dumps({**row, "whole": round(time.monotonic() - start)}), flush=True)
            told["rows"].append(row)
            if given.out:
                given.out.write_text(json.dumps(told, indent=1) + "\n")
                given.out.with_suffix(".md").write_text(table(told))


if __name__ == "__main__":
    main()
