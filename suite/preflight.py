"""What a run will need, before it starts: memory of the device and of the host, disk, time; and whether that is there.

Everything follows from the shape of the model, the calibration set and the method; only the speed of this machine is
measured, in a fraction of a second. The estimate stands in the record beside the measured peak.

Letters: n sequences of t tokens, d hidden width, f width of the MLP, b bytes of a number.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from suite import hub, models
from suite.errors import PTQError

BATCH_TOKENS = 8192  # of a calibration batch, see suite.calib.Calibration.step
SCORED_TOKENS = 16384  # on which outputs are compared, see suite.walk.REFERENCE_TOKENS
LONG = 60.0  # seconds; what takes longer is announced
LARGE_WIDTH = 1024  # of the hidden states; a model that is narrower fits everywhere
HEADROOM = 0.9  # of what is free may be asked for
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, from its config.json.

    >>> Shape.of({"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2,
    ...           "vocab_size": 10, "tie_word_embeddings": True}).layer_weights
    640
    """

    width: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    biases: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        return cls(config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"], heads,
                   config.get("num_key_value_heads") or heads,
                   config.get("head_dim") or config["hidden_size"] // heads, config["vocab_size"],
                   bool(config.get("tie_word_embeddings")), config.get("model_type") == "qwen2")

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of every linear of a layer, in the order of the sites."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return [(q, self.width), (kv, self.width), (kv, self.width), (self.width, q),
                (self.inner, self.width), (self.inner, self.width), (self.width, self.inner)]

    @property
    def sites(self) -> list[tuple[int, int]]:
        """(out, in) of each site, the outputs of its linears together: qkv, o, gate_up, down."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return [(q + 2 * kv, self.width), (self.width, q), (2 * self.inner, self.width), (self.width, self.inner)]

    @property
    def site_widths(self) -> list[int]:
        """Width of the input of each site."""
        return [i for _, i in self.sites]

    @property
    def layer_weights(self) -> int:
        return sum(o * i for o, i in self.linears)

    @property
    def outside(self) -> int:
        """Weights of the embedding, and of the head where it is one of its own."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        small = 2 * self.width + (q + 2 * kv if self.biases else 0)
        return self.outside + self.layers * (self.layer_weights + small) + self.width


@dataclass(frozen=True)
class Run:
    """What is to be done. candidates: quantizations per layer, 1 for a plain method; calibrated: whether the method
    reads activations; solves: and solves with Gram matrices of them; diagnosed: whether errors by layer are measured;
    bytes: of a number; by_layer: weights read one layer at a time; activations: a place of suite.depot; kept: whether
    anything is written; devices: on which candidates are tried side by side; learned: sequences that a rotation is
    learned on."""

    shape: Shape
    nsamples: int
    seqlen: int
    bytes: int
    cuda: bool = False
    candidates: int = 1
    calibrated: bool = True
    by_layer: bool = False
    activations: str = "device"
    kept: bool = True
    devices: int = 1
    learned: int = 0
    solves: bool = True
    diagnosed: bool = False

    @classmethod
    def of(cls, shape: Shape, method: Any, nsamples: int, seqlen: int, dtype: torch.dtype, cuda: bool, **further: Any) -> Run:
        """The run of a configured method; further: the fields that it does not decide."""
        return cls(shape, nsamples, seqlen, bytes_of(dtype), cuda, candidates(method),
                   getattr(method, "needs_calibration", True), learned=learned(method),
                   solves=getattr(method, "solves", True), **further)

    @property
    def tokens(self) -> int:
        return self.nsamples * self.seqlen


@dataclass(frozen=True)
class Need:
    """Bytes of each kind of memory beyond what the process has now, and floating-point operations."""

    device: float
    host: float
    disk: float
    operations: float

    def seconds(self, rate: float) -> float:
        return self.operations / rate


def need(run: Run) -> Need:
    """The peak of a quantization.

    Weights: of the whole model with the codes that are added, or of one layer. Activations: what feeds the layer, what
    it puts out, and the first sequences of the unquantized model's and of two candidates' outputs. Work: one batch
    inside the layer, the Gram matrices, and what GPTQ, the hungriest of the solvers, computes from one of them.
    """
    s, b = run.shape, run.bytes
    layer = s.layer_weights * (b + 1)  # decoded weight and code
    if run.by_layer:
        resting, outside = 2 * layer, s.vocabulary * s.width * b
        host_weights = s.layers * s.layer_weights + (0 if s.tied else s.vocabulary * s.width * b)
    else:
        resting, outside, host_weights = s.layers * layer, s.outside * b, 0
    held = min(run.candidates, 2) * s.layer_weights * b  # the edit in work, and the best one so far
    if run.devices > 1:
        held += s.layer_weights * b  # a twin of the layer, see suite.candidates
    work, live, scored = 4 * 5 * max(o * i for o, i in s.linears), 0.0, 0.0
    if run.calibrated:
        if run.solves:  # four copies of a Gram matrix, and five of its site's weights, in float32
            work = 4 * max(4 * i * i + 5 * o * i for o, i in s.sites)
        else:
            work += s.layer_weights * b  # the layer as it is before it is rounded
        work += 4 * sum(w * w for w in s.site_widths)  # all Gram matrices
    if run.calibrated or run.diagnosed:
        batch = min(run.tokens, max(BATCH_TOKENS, run.seqlen))
        # On a processor malloc keeps about as much again of what one operation after the other has freed.
        work += batch * (4 * s.inner + 6 * s.width) * b * (1 if run.cuda else 2)
        live = 2 * run.tokens * s.width * b
        scored = (2 + min(run.candidates, 2)) * min(run.tokens, SCORED_TOKENS) * s.width * max(b, 4)
    work += held
    device = resting + outside + work + scored + (live if run.activations == "device" else 0)
    host = host_weights + (live if run.activations == "host" else 0)
    kept = s.layers * s.layer_weights + (live / 2 + scored / 4 if run.calibrated else 0)  # codes, and what feeds a layer
    disk = kept + s.layers * s.layer_weights + s.outside * b if run.kept else 0
    disk += live if run.activations == "disk" else 0
    if not run.cuda:
        device, host = 0.0, device + host
    return Need(device, host, disk, operations(run))


def operations(run: Run) -> float:
    """Of the passes over the calibration set, the Gram matrices, and a solve per site of each candidate."""
    s = run.shape
    if not run.calibrated:
        return 10.0 * s.layers * s.layer_weights
    one_pass = 2 * run.tokens * s.layer_weights + 2 * run.tokens * run.seqlen * s.heads * s.head_width
    gram = 2 * run.tokens * sum(w * w for w in s.site_widths)
    solve = (sum(2 * w**3 for w in s.site_widths) + 4 * sum(o * i * i for o, i in s.linears) / 8) * run.solves
    tried = math.ceil(run.candidates / run.devices)
    learning = 6 * run.learned * run.seqlen * (s.layers * s.layer_weights + s.vocabulary * s.width)  # forward and backward
    return s.layers * ((2 + tried) * one_pass + gram + tried * solve) + learning


# ---------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Free:
    """Bytes that are free: of the device's memory (0 without a GPU), the host's, and the disk of a folder."""

    device: int
    host: int
    disk: int

    @classmethod
    def now(cls, folder: Path | None, device: torch.device) -> Free:
        on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        folder = folder or Path(tempfile.gettempdir())
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        return cls(on_device, host_memory(), shutil.disk_usage(existing).free)


def host_memory() -> int:
    """Bytes of memory that this process may still take: what the machine has left, or its control group."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    left = int(found.group(1)) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for most, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                       ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        limit, now = _read(most).strip(), _read(used).strip()
        if limit.isdigit() and now.isdigit() and int(limit) < 2**60:
            left = min(left, int(limit) - int(now))
    return max(left, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations a second in a matrix product, measured for about so long."""
    size = 4096 if device.type == "cuda" else 768
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    x @ y
    done, start = 0, time.perf_counter()
    while True:
        x @ y
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
        if (taken := time.perf_counter() - start) > seconds:
            return 2 * size**3 * done / taken


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """A run as it will be done: how, what it needs, what there is, and how long it takes."""

    run: Run
    need: Need
    free: Free
    seconds: float

    @property
    def lacks(self) -> list[str]:
        """What does not fit: "GPU memory", "memory", "disk"."""
        pairs = (("GPU memory", self.need.device, self.free.device), ("memory", self.need.host, self.free.host),
                 ("disk", self.need.disk, self.free.disk))
        return [name for name, needed, free in pairs if needed > free * HEADROOM]

    def as_json(self) -> dict[str, Any]:
        """Everything as numbers: bytes, seconds."""
        return {"need": asdict(self.need), "free": asdict(self.free), "seconds": self.seconds, "lacks": self.lacks,
                "by_layer": self.run.by_layer, "activations": self.run.activations, "nsamples": self.run.nsamples,
                "seqlen": self.run.seqlen}

    def against(self, measured: Mapping[str, Any], before: float) -> dict[str, Any]:
        """The estimate beside the measured peak, in MiB, for the record. before: what the process had at the start, without
        the model."""
        estimated = self.need.device / 2**20 if self.run.cuda else self.need.host / 2**20 + before
        peak = measured["peak_gpu_memory_mib"] if self.run.cuda else measured["peak_memory_mib"]
        return {"estimated_mib": round(estimated, 1), "measured_mib": peak, "by_layer": self.run.by_layer,
                "activations": self.run.activations, "of": "GPU" if self.run.cuda else "process"}

    def told(self) -> str:
        """One line for people."""
        parts = [f"{gib(self.need.device)} of GPU memory ({gib(self.free.device)} free)"] if self.run.cuda else []
        parts += [f"{gib(self.need.host)} of memory ({gib(self.free.host)} free)",
                  *([f"{gib(self.need.disk)} of disk ({gib(self.free.disk)} free)"] if self.need.disk else []),
                  f"about {duration(self.seconds)}"]
        how = ["weights one layer at a time"] if self.run.by_layer else []
        how += [f"activations on the {self.run.activations}"] if self.run.activations != "device" else []
        return f"needs {', '.join(parts)}" + (f"; {', '.join(how)}" if how else "")


def plan(run: Run, free: Free, speed: float, by_layer: bool | None = None, activations: str | None = None,
         optional: bool = True) -> Plan:
    """The first way that fits, from the fastest to the leanest; what is given is left as it is. optional: the user could
    give it otherwise, so that the error may say so.

    Raises PTQError, with what would make it fit, if none does.
    """
    ways = [replace(run, by_layer=layered, activations=place)
            for layered in ((False, True) if by_layer is None else (by_layer,))
            for place in (("device", "host", "disk") if activations is None else (activations,))
            if run.cuda or place != "host" or activations]
    ways.sort(key=lambda way: (("device", "host", "disk").index(way.activations), way.by_layer))
    tried = [Plan(way, found := need(way), free, found.seconds(speed)) for way in ways]
    for one in tried:
        if not one.lacks:
            return one
    leanest = min(tried, key=lambda one: (len(one.lacks), one.need.host + one.need.device))
    raise PTQError(f"this run does not fit, for lack of {' and '.join(leanest.lacks)}: it {leanest.told()}. "
                   f"{advice(leanest, by_layer if optional else None, activations if optional else None)}")


def advice(best: Plan, by_layer: bool | None, activations: str | None) -> str:
    """What would make a run fit that does not."""
    options = []
    if by_layer is False:
        options.append("--load layer (or auto) reads one layer at a time")
    if activations not in (None, "disk") and best.run.calibrated:
        options.append("--activations disk (or auto) keeps activations in a file")
    room = {"GPU memory": best.free.device - best.need.device, "memory": best.free.host - best.need.host}
    short = -min((room[name] for name in best.lacks if name in room), default=0.0)
    if short > 0 and best.run.calibrated and best.run.nsamples > 16:
        options.append(f"--nsamples {max(16, best.run.nsamples // 4)} takes fewer calibration sequences")
    if "disk" in best.lacks:
        options.append("--out on another disk")
    return "Give " + ", or ".join(options or ["a smaller model, or a machine with more memory"])


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def config_of(source: models.Source) -> dict[str, Any]:
    """The config.json of a model, or the shape in the table of known models; of a model of the hub nothing else is
    fetched. Raises PTQError as `suite.hub` does."""
    if source.folder is not None:
        return models.read_json(source.folder / "config.json")
    known = (entry["shape"] for entry in models.KNOWN.values() if entry["hub"] == source.repository)
    return next(known, None) or models.read_json(hub.config(source.repository, source.revision))


def quantization(source: models.Source, method: Any, nsamples: int, seqlen: int, folder: Path | None,
                 device: torch.device | None = None, dtype: torch.dtype | None = None, load: str = "auto",
                 activations: str = "auto", speed: float | None = None, devices: int = 1) -> Plan:
    """The plan of quantizing a model into a folder, or in memory only (None). load: "auto", "whole" or "layer";
    or "evaluated", as a whole and with all activations on the device; activations: "auto" or a place of suite.depot.
    Raises PTQError if it does not fit."""
    device = device or models.default_device()
    dtype = dtype or models.default_dtype(device)
    run = Run.of(Shape.of(config_of(source)), method, nsamples, seqlen, dtype, device.type == "cuda",
                 kept=folder is not None, devices=devices, diagnosed=nsamples > 0)
    whole_model = bool(getattr(method, "rewrites_model", False)) or source.outliers is not None
    if source.folder is not None and models.trusted(source.folder)[-1:] == ("pickled weights",):
        load = "whole" if load == "auto" else load  # a file of them is read as a whole
    if whole_model and load == "layer":
        raise PTQError(f"--load layer: {source.name} by this method is changed as a whole before its layers are "
                       f"quantized: use --load whole")
    layered = False if whole_model else {"auto": None, "layer": True}.get(load, False)
    if load == "evaluated":
        activations = "device"
    return plan(run, Free.now(folder, device), speed or rate(device, dtype), layered,
                None if activations == "auto" else activations, not whole_model and load != "evaluated")


def candidates(method: Any) -> int:
    """How many quantizations of a layer a configured method makes."""
    return len(getattr(method, "pool", ())) or 1


def learned(method: Any) -> int:
    """How many sequences a configured method learns from, those of all steps together."""
    return method.steps * method.batch if getattr(method, "rotation", "") == "learned" else 0


def bytes_of(dtype: torch.dtype) -> int:
    return math.ceil(torch.finfo(dtype).bits / 8)
