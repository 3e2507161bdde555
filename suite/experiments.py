"""Grids of runs: which results are missing, the runs that give them, and the records they leave.

A grid is a model, some variants of it (a method, its scheme, its calibration) and some tasks. Each variant is quantized
once, if any of its results is missing, and a record is written as soon as a result is there: an interruption loses the
task in progress and nothing else.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import queue
import random
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from suite import calib, checkpoint, hub, kv, method, models, paths, plugins, preflight, resume, windows
from suite.errors import PTQError, unknown
from suite.grid import UNQUANTIZED_BITS
from suite.provenance import Meter, code, provenance, version
from suite.store import Record, Setting, Store, canonical, digest, significant

NUMERICS = 1  # to be raised by every change of the suite that changes results: records of before are then not reused

METHODS = ("fp16", "rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq", "spinquant", "mp-gptq", "cka-hybrid")
FAST_METHODS = tuple(name for name in METHODS if name != "spinquant")  # learning takes longer than all others together
EMBEDDED_TASKS = ("world_wiki_ppl", "world_chat_ppl", "world_math", "world_events", "world_quiz")
PAPER_TASKS = ("paper",)  # tasks/paper.yaml names them, with their numbers of examples
CODE_TASK = "world_code"  # of the embedded tasks, the one that needs permission to execute code
INSTEAD = "an embedded model (`ptq ls models`) or a local folder"
# What an embedded model takes, in matched mode, in place of a default that was published for large ones. SpinQuant: in
# networks of width 128 and 256 gradients are so small that the published rate hardly turns a rotation; on calibration
# tokens of tiny-llama-s at 4-bit activations a rate of 1.5 made up for a tenth of the loss, 10 a quarter, 30 a half,
# 100 less again; more than one sequence a step cost time and gained nothing.
EMBEDDED_OPTIONS: dict[str, dict[str, Any]] = {"spinquant": {"batch": 1, "learning_rate": 30.0}}
ROTATIONS = ("none", "hadamard", "random-hadamard", "learned")  # cheapest first
FAST_LIMIT, FAST_SAMPLES = 64, 16  # documents or windows of each task, calibration sequences
_ANNOUNCED_TOKENS = 100_000  # of calibration, over all variants of a small model: what is less takes no time worth a word
SMALL_WIDTH = preflight.LARGE_WIDTH  # below, one thread: two spend their time waiting for each other
QUANTIZING_LIBRARIES, EVALUATING_LIBRARIES = ("torch", "transformers"), ("torch", "transformers", "lm-eval")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sampling:
    """Which calibration data is asked for; see `suite.calib.load`."""

    source: str
    nsamples: int
    seqlen: int
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Variant:
    """One quantized model, before it is made: everything that decides its weights.

    label: what tables call it: the method's name, and its options where they differ from the mode's.
    scheme: of the comparison; None for full precision. calibration: None where the method uses none; diagnosed_on: the
    data on which errors by layer are measured. inputs: "quantized" or "full", see `suite.walk.walk`. kvbits: of the
    key-value cache, told in the scheme as well where it is rounded.
    """

    label: str
    method: Any
    mode: str
    scheme: str | None
    calibration: calib.Calibration | None
    diagnosed_on: calib.Calibration | None
    inputs: str = "quantized"
    kvbits: int = UNQUANTIZED_BITS

    @property
    def code(self) -> dict[str, str]:
        """Of the plug-ins it stands on: see `suite.plugins.code_of`."""
        return plugins.code_of(method.to_config(self.method))

    def identity(self, model: Mapping[str, str], dtype: str) -> dict[str, Any]:
        """The part that the records of its quantization and of all its evaluations share, without library versions."""
        used = self.calibration is not None
        return {"model": dict(model), "method": method.to_config(self.method), "scheme": self.scheme,
                "mode": self.mode if self.scheme else None, "calibration": told(self.calibration),
                "input_policy": self.inputs if used else None, "dtype": dtype,
                "seed": self.calibration.seed if used else None, "numerics": NUMERICS,
                **({"kvbits": self.kvbits} if self.kvbits < UNQUANTIZED_BITS else {}),
                **({"plugins": self.code} if self.code else {})}

    def quantization(self, model: Mapping[str, str], dtype: str) -> dict[str, Any]:
        return {"kind": "quantization", **self.identity(model, dtype), "libraries": _libraries(QUANTIZING_LIBRARIES),
                "diagnosed_on": told(self.diagnosed_on)}

    def evaluation(self, model: Mapping[str, str], dtype: str, task: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": "evaluation", **self.identity(model, dtype), "libraries": _libraries(EVALUATING_LIBRARIES),
                "task": dict(task)}


def told(calibration: calib.Calibration | None) -> dict[str, Any] | None:
    """A calibration set as records tell it: of a file its name, and not where it lies."""
    if calibration is None:
        return None
    source = calibration.source
    named = source == calib.EMBEDDED or source in calib.HUB_SETS
    return {**calibration.identity, "source": source if named else Path(source).name}


def _libraries(packages: Iterable[str]) -> dict[str, str | None]:
    return {package: version(package) for package in packages}


# ---------------------------------------------------------------------------------------------- the main table


@dataclass(frozen=True)
class Outcome:
    """What a grid came to. setting: what the report needs to show it; measured and found: results computed now, and
    those that the store had; note: what the user should know; evaluations: (method's label, task) -> identity of the
    record."""

    model: str
    setting: Setting
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    measured: int
    found: int
    note: str = ""
    evaluations: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)


def reproduce(model: str, methods: Sequence[Any] | None = None, tasks: Sequence[str] | None = None, *, store: Store,
              options: Mapping[str, Any] | None = None, kvbits: int = UNQUANTIZED_BITS, mode: str = "matched",
              calib_source: str | None = None, nsamples: int | None = None, seqlen: int | None = None, seed: int = 0,
              fast: bool = False, limit: int | None = None, fewshot: int | None = None,
              allow_eval_calibration: bool = False, allow_code_execution: bool = False, fresh: bool | str = False,
              revision: str | None = None, device: str | None = None, dtype: str | None = None,
              batch_size: int | None = None, batch_tokens: int = calib.BATCH_TOKENS, threads: int | None = None,
              workers: int | None = 1, devices: Sequence[str] = (), progress: Progress | None = None,
              runner: Callable[..., Any] | None = None, announce: Callable[[str], None] | None = None) -> Outcome:
    """Quantizes a model by every method, evaluates each on every task, and stores what the store lacks.

    methods: names, or configured methods. options: of the scheme, for all of them: wbits, abits, group_size, symmetric.
    kvbits: of the key-value cache, for all but full precision.
    mode: "matched" (one scheme, one calibration set for all) or "native" (each method's own published setting).
    fast: FAST_LIMIT documents and windows a task, FAST_SAMPLES calibration sequences; such records are of their own.
    Without `methods`, what is left out then is SpinQuant, which learns.
    allow_code_execution: lets tasks run, in a sandbox, the programs that the model writes; without it such tasks are
    refused, or left out where no tasks are named.
    fresh: measure everything again; "code": what other code than today's has measured. batch_size: of the evaluation,
    batch_tokens: of the calibration; both move results by round-off only. threads: of torch, None: one for a small
    model. workers: variants measured at the same time, each in a process of its own; None: as many as there are cores
    for, if the model is small and on a processor. devices: for the workers, in turn; unless said otherwise one for each.
    runner: what loads, quantizes and evaluates: `Runner`, or a test's stand-in. announce: is told what a long run
    will need, before it starts.

    Raises PTQError before any work: unknown model, method, task, option or mode; a model that is quantized already;
    calibration on an evaluated text; a results folder that cannot be written; whatever `calib.load` raises.

    >>> outcome = reproduce("tiny-llama-s", store=Store("results"), fast=True)  # doctest: +SKIP
    """
    planned = plan(model, methods, tasks, store=store, options=options, kvbits=kvbits, mode=mode,
                   calib_source=calib_source, nsamples=nsamples, seqlen=seqlen, seed=seed, fast=fast, limit=limit,
                   fewshot=fewshot, allow_eval_calibration=allow_eval_calibration,
                   allow_code_execution=allow_code_execution, fresh=fresh, revision=revision,
                   device=device or next(iter(devices), None), dtype=dtype, batch_size=batch_size,
                   batch_tokens=batch_tokens, threads=threads)
    check_memory(planned.jobs, models.resolve(model, revision), store, announce)
    run(planned.jobs, workers, progress, runner, devices)
    return planned.outcome


def check_memory(jobs: Sequence[Job], source: models.Source, store: Store,
                 announce: Callable[[str], None] | None = None) -> None:
    """Announces what the hungriest of the quantizations takes, if the model is large or there is long work. Raises PTQError
    if it does not fit: to be evaluated, a model has to stand in memory as a whole."""
    if not jobs:
        return
    data = [job.variant.diagnosed_on for job in jobs if job.variant.diagnosed_on is not None]
    count, length = max((tuple(one.tokens.shape) for one in data), default=(0, 0))
    if jobs[0].small and count * length * len(jobs) < _ANNOUNCED_TOKENS:
        return
    hungriest = max((job.variant.method for job in jobs), key=lambda one: (preflight.learned(one), preflight.candidates(one)))
    needed = preflight.quantization(source.fetched(), hungriest, count, length, store.root, torch.device(jobs[0].device),
                                    models.parse_dtype(jobs[0].dtype), load="evaluated")
    if announce:
        each = f", for each of {len(jobs)} variants at most" if len(jobs) > 1 else ""
        announce(f"{source.name} {needed.told()}{each}; evaluation comes on top")


@dataclass(frozen=True, eq=False)
class Planned:
    """The work that a grid still needs. outcome: what it will have come to; variants: in the order of the methods;
    tests: the tasks, loaded."""

    outcome: Outcome
    variants: list[Variant]
    jobs: list[Job]
    tests: Tasks

    def quantization(self, variant: Variant) -> dict[str, Any]:
        """The identity of a variant's quantization record."""
        return variant.quantization(self.outcome.setting.model, self.outcome.setting.dtype)

    def evaluation(self, variant: Variant, task: str) -> dict[str, Any]:
        return variant.evaluation(self.outcome.setting.model, self.outcome.setting.dtype, self.tests.identity(task))


def plan(model: str, methods: Sequence[Any] | None = None, tasks: Sequence[str] | None = None, *, store: Store,
         options: Mapping[str, Any] | None = None, kvbits: int = UNQUANTIZED_BITS, mode: str = "matched",
         calib_source: str | None = None, nsamples: int | None = None, seqlen: int | None = None, seed: int = 0,
         fast: bool = False, limit: int | None = None, fewshot: int | None = None, allow_eval_calibration: bool = False,
         allow_code_execution: bool = False, fresh: bool | str = False, revision: str | None = None,
         device: str | None = None, dtype: str | None = None, batch_size: int | None = None,
         batch_tokens: int = calib.BATCH_TOKENS, threads: int | None = None, tests: Tasks | None = None) -> Planned:
    """What `reproduce` would have to measure; takes what it takes, checks what it checks, runs no model.

    tests: the tasks, if they are loaded already.
    """
    store.check_writable()
    source = models.resolve(model, revision)
    if source.kind == "quantized":
        raise PTQError(f"model {model!r} is quantized already: give the full-precision model it was made from")
    embedded = source.kind == "embedded"
    limit = FAST_LIMIT if fast and limit is None else limit
    own = EMBEDDED_OPTIONS if embedded and mode == "matched" else {}
    built = _build(methods or (FAST_METHODS if fast else METHODS), options or {}, mode, own)
    if source.folder is None:
        hub.require(f"model {source.repository!r}", INSTEAD)
    usual = (*EMBEDDED_TASKS, *([CODE_TASK] if allow_code_execution else [])) if embedded else PAPER_TASKS
    tests = tests or Tasks(tasks or usual, limit, fewshot, allow_code_execution=allow_code_execution,
                           leave_out_code=not tasks)

    source = source.fetched()
    config = models.read_json(source.folder / "config.json")
    device = torch.device(device) if device else models.default_device()
    kept = _name(models.parse_dtype(dtype) or models.default_dtype(device))
    sampled = sampling(embedded, config, calib_source, nsamples, seqlen, seed, fast)
    tokenizer = checkpoint.load_tokenizer(source.folder)
    for _, configured, _ in built:
        if (check := getattr(configured, "check", None)) is not None:  # what a method can tell from shapes
            check(SimpleNamespace(**config))
    variants = _variants(built, options or {}, kv.check(kvbits), mode, sampled, calib_source, embedded, tokenizer,
                         batch_tokens)
    overlaps = _overlaps(variants, tests, allow_eval_calibration)

    identity = models.identify(model, source.revision)
    shared = next((v.diagnosed_on for v in variants if v.diagnosed_on is not None), None)
    scheme = str(method.Scheme.of(**(options or {}))) if mode == "matched" else _bits(options or {})
    setting = Setting(identity, _with_cache(scheme, kvbits), mode, told(shared) if mode == "matched" else None,
                      "quantized" if mode == "matched" else None, kept, seed if mode == "matched" else None, NUMERICS,
                      _libraries(EVALUATING_LIBRARIES), limit, fewshot,
                      {name: digest for v in variants for name, digest in v.code.items()})

    small = config.get("hidden_size", 0) < SMALL_WIDTH
    threads = threads or (1 if small else None)
    shared_job = dict(model=model, identity=identity, dtype=kept, revision=source.revision, device=str(device),
                      batch_size=batch_size, threads=threads, layers=config.get("num_hidden_layers", 1), small=small,
                      store=store, tests=tests.recipe, tasks={name: tests.identity(name) for name in tests.names})
    jobs = []
    for variant in variants:
        missing = tuple(task for task in tests.names
                        if _missing(store, variant.evaluation(identity, kept, tests.identity(task)), fresh))
        unquantized = _missing(store, variant.quantization(identity, kept), fresh)
        if missing or unquantized:
            overlapping = frozenset(task for task in missing if (variant.label, task) in overlaps)
            jobs.append(Job(variant, missing, unquantized, overlapping, **shared_job))
    measured = sum(len(job.missing) for job in jobs)
    note = "; ".join(filter(None, (source.note, tests.note)))
    outcome = Outcome(source.name, setting, tuple(v.label for v in variants), tests.names, measured,
                      len(variants) * len(tests.names) - measured, note,
                      {(v.label, task): v.evaluation(identity, kept, tests.identity(task))
                       for v in variants for task in tests.names})
    return Planned(outcome, variants, jobs, tests)


def run(jobs: Sequence[Job], workers: int | None = 1, progress: Progress | None = None,
        runner: Callable[..., Any] | None = None, devices: Sequence[str] = ()) -> None:
    """Does all jobs, of one grid or of several. workers, runner, devices: see `reproduce`."""
    if not jobs:
        return
    if len(devices) > 1:
        workers = workers or len(devices)
    if workers is None:
        threads = jobs[0].threads
        alike = all(job.small and job.threads == threads and job.device == "cpu" for job in jobs)
        workers = (os.cpu_count() or 1) // threads if alike and threads else 1
    if min(workers, len(jobs)) > 1 and runner is None:
        _measure_side_by_side(jobs, min(workers, len(jobs)), progress, devices)
    else:
        _measure_in_turn(jobs, runner or Runner, progress)


def _missing(store: Store, identity: Mapping[str, Any], fresh: bool | str) -> bool:
    """Whether a result must be measured; fresh as `reproduce` takes it."""
    if fresh is True:
        return True
    found = store.find(identity)
    return found is None or (fresh == "code" and found.provenance.get("code") != code())


def severity_sweep(model: str, severities: Sequence[float], methods: Sequence[Any] | None = None,
                   tasks: Sequence[str] = ("world_wiki_ppl",), outlier_seed: int = 0,
                   **arguments: Any) -> list[Outcome]:
    """The runs behind the figure of perplexity against outlier severity: the plain model, then each severity.

    arguments: as `reproduce` takes them. `suite.report.severity_figure` draws it from the first outcome's setting.
    """
    base = models.outliers.parse(model)[0]
    planted = [f"{base}@outliers={severity:g},seed={outlier_seed}" for severity in severities if severity != 1]
    return [reproduce(name, methods, tasks, **arguments) for name in (base, *planted)]


def rotation_sweep(model: str, abits: Sequence[int] = (4, 8), seeds: Sequence[int] = (0, 1, 2), *, wbits: int = 4,
                   rotations: Sequence[str] = ROTATIONS, variant: str = "no_had",
                   learning: Mapping[str, Any] | None = None,
                   tasks: Sequence[str] = ("world_wiki_ppl", "world_chat_ppl"),
                   **arguments: Any) -> list[Outcome]:
    """The runs behind the table "does learning the rotation help": SpinQuant's rotations at each scheme and seed.

    A seed is that of the calibration sequences and of the rotations. learning: options of SpinQuant for "learned"
    (steps, batch, learning_rate, scale_gradient), for an embedded model those of EMBEDDED_OPTIONS unless given. wbits:
    16 shows what the rounding of activations alone costs. arguments: as `reproduce` takes them.
    `suite.report.rotations.write` makes the table.
    """
    usual = EMBEDDED_OPTIONS["spinquant"] if models.resolve(model).kind == "embedded" else {}
    learning = {**usual, **(learning or {})}
    outcomes = []
    for bits in abits:
        for seed in seeds:
            scheme = {"wbits": wbits, "abits": bits}
            made = []
            for rotation in rotations:
                further = learning if rotation == "learned" else {}
                options = {"rotation": rotation, "variant": variant, "rotation_seed": seed, **scheme, **further}
                made.append(method.build("spinquant", **options))
            outcomes.append(reproduce(model, ["fp16", *made], tasks, options=scheme, seed=seed, **arguments))
    return outcomes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class Job:
    """The measurements of one variant that the store lacks; plain data, so that another process can do them.

    missing: tasks; unquantized: whether the record of the quantization is missing too; overlapping: tasks on whose text
    the variant is calibrated; tests: how to load the tasks again; tasks: their identities; share: take the results of
    another variant whose quantized model is the same, bit for bit.
    """

    variant: Variant
    missing: tuple[str, ...]
    unquantized: bool
    overlapping: frozenset[str]
    model: str
    identity: Mapping[str, str]
    dtype: str
    revision: str | None
    device: str
    batch_size: int | None
    threads: int | None
    layers: int
    small: bool
    store: Store
    tests: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    share: bool = False

    @property
    def steps(self) -> int:
        return self.layers + len(self.missing)

    def do(self, runner: Callable[..., Any], loaded: Loaded, tell: Callable[[int, str], None]) -> None:
        measure(self, runner, loaded.tests(self), tell)


def measure(job: Job, runner: Callable[..., Any], tests: Tasks, tell: Callable[[int, str], None]) -> None:
    """Does a job. Each record is written as soon as its result is there. tell(steps done, text) after each step.

    Finished layers, and answers to the task in progress, are kept beside the records until the job is done.
    """
    variant, store = job.variant, job.store
    identity = variant.quantization(job.identity, job.dtype)
    folder = store.folder(job.identity["name"]) / "partial" / digest(identity)[:12]
    with threads_(job.threads), resume.into(folder, {**identity, "device": torch.device(job.device).type}):
        run = runner(job.model, variant, revision=job.revision, device=job.device, dtype=job.dtype,
                     batch_size=job.batch_size)
        with Meter() as meter:
            result = run.quantize(lambda done, total, text: tell(done, f"{variant.label}, layer {done} of {total}"))
        if job.unquantized:
            _put(store, identity, {"label": variant.label, **result}, meter)
        twins = _twins(store, job, result) if job.share else {}
        for done, task in enumerate(job.missing, start=job.layers):
            tell(done, f"{variant.label}, {task}")
            with Meter() as meter:
                result = twins.get(task) or run.evaluate(tests, task)
            overlap = {"calibrated_on_this_text": True} if task in job.overlapping else {}
            _put(store, variant.evaluation(job.identity, job.dtype, job.tasks[task]),
                 {**result, "label": variant.label, **overlap}, meter)
    del run
    if not job.small:  # searching the whole heap takes longer than a small model is worth
        gc.collect()
    tell(job.steps, variant.label)


def _twins(store: Store, job: Job, quantized: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """task -> the result of a variant whose model is the same, to the last bit; it tells whose it was."""
    fingerprint, found = quantized.get("fingerprint"), {}
    if not fingerprint:
        return found
    for other in store.records(job.identity["name"], "quantization", dtype=job.dtype, numerics=NUMERICS):
        if other.result.get("fingerprint") != fingerprint or other.identity["model"] != job.identity:
            continue
        shared = {key: value for key, value in other.identity.items()
                  if key not in ("kind", "libraries", "diagnosed_on")}
        for task in set(job.missing) - set(found):
            record = store.find({"kind": "evaluation", **shared, "libraries": _libraries(EVALUATING_LIBRARIES),
                                 "task": dict(job.tasks[task])})
            if record is not None and "calibrated_on_this_text" not in record.result:
                label = record.result.get("same_model_as", record.result["label"])
                found[task] = {**record.result, "label": job.variant.label, "same_model_as": label}
    return found


def _put(store: Store, identity: dict, result: Mapping[str, Any], meter: Meter) -> None:
    store.put(Record(identity, significant(result), provenance(meter)))


def _measure_in_turn(jobs: Sequence[Job], runner: Callable[..., Any], progress: Progress | None) -> None:
    before, total, loaded = 0, sum(job.steps for job in jobs), Loaded()
    for job in jobs:
        job.do(runner, loaded, _teller(progress, before, total))
        before += job.steps


def _teller(progress: Progress | None, before: int, total: int) -> Callable[[int, str], None]:
    return lambda done, text: progress(before + done, total, text) if progress else None


def _measure_side_by_side(jobs: Sequence[Job], workers: int, progress: Progress | None, devices: Sequence[str] = ()) -> None:
    """Several variants at a time, each worker a fresh process, on one of the devices if there are some. A failure or
    Ctrl-C ends them all; what is stored stays.

    Raises what a worker raised: a PTQError as it was, anything else with the worker's traceback as its text.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    waiting, told = context.Queue(), context.Queue()
    left = iter(reversed(list(enumerate(jobs))))  # hybrids stand last and take longest
    for _ in range(workers):  # one each, the next when that is done: a pipe holds few jobs, a process few open tensors
        waiting.put(next(left, None))
    processes = [context.Process(target=_work, daemon=True,
                                 args=(waiting, told, plugins.loaded(), devices[k % len(devices)] if devices else None))
                 for k in range(workers)]
    done, total, finished = dict.fromkeys(range(len(jobs)), 0), sum(job.steps for job in jobs), 0
    try:
        for process in processes:
            process.start()
        while finished < len(jobs):
            try:
                i, steps, text, error = told.get(timeout=5)
            except queue.Empty:
                if all(not process.is_alive() for process in processes):
                    raise RuntimeError("the worker processes ended without a word, as when the memory runs out: "
                                       "what is finished is stored; run again with --workers 1") from None
                continue
            if error is not None:
                raise error
            if steps == jobs[i].steps:
                finished += 1
                waiting.put(next(left, None))
            done[i] = steps
            if progress:
                progress(sum(done.values()), total, text)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.terminate()  # nothing to those that have ended
        waiting.cancel_join_thread()  # what nobody took any more holds nobody up
        for process in processes:
            process.join()


def _work(waiting: Any, told: Any, plugged: Sequence[str] = (), device: str | None = None) -> None:
    """A worker: does the jobs that wait, until there is None. plugged: the plug-ins whose methods the jobs may hold;
    device: its own, in place of the jobs'."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _end_with_the_parent()
    warnings.simplefilter("ignore")
    for path in plugged:  # before the first job arrives, which is unpickled by the name of its class's module
        plugins.load(path)
    loaded = Loaded()
    while (waited := waiting.get()) is not None:
        i, job = waited
        try:
            job = replace(job, device=device) if device else job
            job.do(Runner, loaded, lambda steps, text, i=i: told.put((i, steps, text, None)))
        except PTQError as error:
            told.put((i, 0, "", error))
        except Exception:  # anything else is a bug, and its traceback would be lost with the process
            told.put((i, 0, "", RuntimeError(traceback.format_exc())))


def _end_with_the_parent() -> None:
    """Ends this process once its parent is gone, however: a worker whose parent was killed would wait for ever, unseen."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


class Loaded:
    """The tasks of jobs, each set loaded once."""

    def __init__(self):
        self._tests: dict[str, Tasks] = {}

    def tests(self, job: Job) -> Tasks:
        key = canonical({**job.tests, "names": list(job.tests["names"])})
        if key not in self._tests:
            self._tests[key] = Tasks(**job.tests)
        return self._tests[key]


class threads_:
    """So many torch threads inside the block; None leaves them alone."""

    def __init__(self, count: int | None):
        self._count = count

    def __enter__(self):
        self._before = torch.get_num_threads()
        if self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *_):
        torch.set_num_threads(self._before)


# ---------------------------------------------------------------------------------------------- variants


def _build(methods: Sequence[Any], options: Mapping[str, Any], mode: str, own: Mapping[str, Mapping[str, Any]]
           ) -> list[tuple[str, Any, method.Native | None]]:
    """(label, configured method, its published setting or None) of each; all mistakes are reported at once.

    own: options by name of method, for methods that are given by name.
    """
    if mode not in ("matched", "native"):
        raise unknown("mode", mode, ("matched", "native"))
    built, mistakes = [], []
    for wanted in methods:
        try:
            name = wanted if isinstance(wanted, str) else method.name_of(wanted)
            published = method.native(name) if mode == "native" else None
            base = dict(published.options) if published else {}
            scheme = {} if method.lookup(name.split("+")[0])().scheme.weight.quantized is False else options
            further = own.get(name, {}) if isinstance(wanted, str) else {}
            configured = method.build(name, **{**base, **further, **scheme}) if isinstance(wanted, str) else wanted
            built.append((label(configured, base), configured, published))
        except PTQError as error:
            mistakes.append(str(error))
    if mistakes:
        raise PTQError("; ".join(dict.fromkeys(mistakes)))
    twice = sorted({name for name, *_ in built if sum(name == other for other, *_ in built) > 1})
    if twice:
        raise PTQError(f"asked for twice: {', '.join(twice)}")
    return built


def label(configured: Any, base: Mapping[str, Any] | None = None) -> str:
    """What tables call a method: its name, and those options that differ from its defaults (or from `base`).

    >>> label(method.build("gptq", wbits=3)), label(method.build("gptq", damp=0.05))
    ('gptq', 'gptq damp=0.05')
    """
    config = method.to_config(configured)
    parts = config.get("parts", [config])
    changed = []
    for part in parts:
        defaults = {**method.options_of(part["method"]), **(base or {})}
        for key, value in part["options"].items():
            usual = defaults.get(key)
            if key not in method.SCHEME_OPTIONS and value != (list(usual) if isinstance(usual, tuple) else usual):
                changed.append(f"{key}={'|'.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join([config["method"], *changed])


def _with_cache(scheme: str, kvbits: int) -> str:
    return f"{scheme} KV{kvbits}" if kvbits < UNQUANTIZED_BITS else scheme


def _bits(options: Mapping[str, Any]) -> str:
    scheme = method.Scheme.of(**options)
    return f"W{scheme.weight.bits}A{scheme.act.bits if scheme.act else 16}"


def sampling(embedded: bool, config: Mapping[str, Any], source: str | None, nsamples: int | None, seqlen: int | None,
              seed: int, fast: bool) -> Sampling:
    """The matched mode's calibration set: 64 x 512 embedded tokens, or 128 x 2048 of WikiText-2's training text."""
    source = source or (calib.EMBEDDED if embedded else "wikitext2")
    count, length = calib.usual_size(source)
    return Sampling(source, nsamples or (FAST_SAMPLES if fast else count),
                    windows.fit(seqlen, config.get("max_position_embeddings"), length), seed)


def _variants(built: Sequence[tuple[str, Any, method.Native | None]], options: Mapping[str, Any], kvbits: int,
              mode: str, matched: Sampling, source: str | None, embedded: bool, tokenizer: Any,
              batch_tokens: int = calib.BATCH_TOKENS) -> list[Variant]:
    loaded: dict[Sampling, calib.Calibration] = {}
    variants = []
    for name, configured, published in built:
        quantized = configured.scheme.weight.quantized or configured.scheme.act is not None
        sampling = matched
        if published is not None:  # the published source, unless another was asked for or the model has its own world
            count = min(published.nsamples, matched.nsamples) if embedded else published.nsamples
            sampling = replace(matched, nsamples=count, seqlen=min(published.seqlen, matched.seqlen),
                               source=source or (calib.EMBEDDED if embedded else published.source))
        if quantized and sampling not in loaded:
            drawn = calib.load(sampling.source, tokenizer, sampling.nsamples, sampling.seqlen, sampling.seed)
            loaded[sampling] = replace(drawn, batch_tokens=batch_tokens)
        data = loaded.get(sampling) if quantized else None
        scheme = _with_cache(str(configured.scheme) if mode == "matched" else _bits(options), kvbits)
        used = data if getattr(configured, "needs_calibration", True) else None
        variants.append(Variant(name, configured, mode, scheme if quantized else None, used, data,
                                published.inputs if published else "quantized",
                                kvbits if quantized else UNQUANTIZED_BITS))
    return variants


def _overlaps(variants: Sequence[Variant], tests: Tasks, allowed: bool) -> set[tuple[str, str]]:
    """(label, task) of every variant calibrated on the text that the task evaluates. Raises PTQError unless allowed."""
    found = {(variant.label, task) for variant in variants if variant.calibration is not None
             for task in tests.names if tests.evaluates(task, variant.calibration)}
    if found and not allowed:
        source = next(v.calibration.source for v in variants if v.calibration is not None)
        evaluating = ", ".join(sorted({task for _, task in found}))
        raise PTQError(f"calibration text {source!r} is what {evaluating} evaluates: "
                       f"give another --calib, or --allow-eval-calibration, which marks such numbers")
    return found


# ---------------------------------------------------------------------------------------------- tasks


# what a table shows of a task that has several metrics; of any other, its first
_HEADLINES = ("perplexity,none", "exact_match,strict-match", "acc_norm,none", "acc,none", "pass@1,create_test")
_SEEDS = {"random": 0, "other": 1234}  # lm-eval's own defaults


class Tasks:
    """Tasks of lm-eval by name, the suite's own among them, and what identifies each.

    A group without a common score, like `paper` or `world`, stands for its members.

    limit: only so many documents (or windows) of each; fewshot: examples before each question, None: those that the
    group `paper` states, else the task's own; metadata: what tasks may read: {"text": file, "window": tokens} for
    window tasks. allow_code_execution: whether tasks may run, in the sandbox, what the model writes; without it they
    are refused, or with leave_out_code left out, which `note` tells.

    Raises PTQError: unknown task (with near misses), a task whose data is not to be had, execution of code that was not
    allowed or cannot be confined.
    """

    def __init__(self, names: Sequence[str], limit: int | None = None, fewshot: int | None = None,
                 metadata: Mapping[str, Any] | None = None, allow_code_execution: bool = False,
                 leave_out_code: bool = False):
        from suite import adapter

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of tasks without metadata, of models in memory
        self.limit, self.fewshot, self._metadata = limit, fewshot, dict(metadata or {})
        self.allow_code_execution, self.note = allow_code_execution, ""
        self._manager = adapter.task_manager(self._metadata)
        if theirs := [name for name in names if name not in self._manager.task_index]:
            adapter.check_mentioned(theirs)
            self._manager = adapter.task_manager(self._metadata, include_defaults=True)
        for name in names:
            if name not in self._manager.task_index:
                raise adapter.unknown_task(name)
        expanded = dict.fromkeys(member for name in names for member in self._members(name))
        if leave_out_code and not allow_code_execution and (left := [
                name for name in expanded if adapter.executes_code(self._manager, name)]):
            expanded = dict.fromkeys(name for name in expanded if name not in left)
            self.note = f"{', '.join(left)} left out, since scoring executes code of the model: --allow-code-execution"
        adapter.check_code_execution(self._manager, expanded, allow_code_execution)
        self.names = tuple(expanded)
        self._shots = {name: set_["num_fewshot"] for name, set_ in adapter.members(self._manager, "paper")
                       if "num_fewshot" in set_}
        self.recipe = {"names": self.names, "limit": limit, "fewshot": fewshot, "metadata": self._metadata,
                       "allow_code_execution": allow_code_execution}
        self._loaded: dict[str, Mapping[str, Any]] = {}
        self._identities: dict[str, dict[str, Any]] = {}

    def _members(self, name: str) -> list[str]:
        """The tasks that a name stands for in a table: itself, or the members of a group that has no score."""
        from suite import adapter

        if (self._manager.task_index[name].cfg or {}).get("aggregate_metric_list"):
            return [name]
        below = [member for member, _ in adapter.members(self._manager, name)]
        return [name] if below == [name] else [one for member in below for one in self._members(member)]

    def loaded(self, name: str) -> Mapping[str, Any]:
        """The tasks and groups behind a name, as `lm_eval.evaluate` takes them."""
        from suite import adapter

        if name not in self._loaded:
            what, instead = f"task {name!r}", f"--data-dir, or other --tasks, e.g. {','.join(EMBEDDED_TASKS)}"
            if adapter.remote(self._manager, name):
                hub.require(what, instead)
            try:
                with hub.local_sets():
                    found = self._manager.load([name])
            except PTQError:
                raise
            except Exception as error:  # the client lets through what each of its formats raises
                if hub.is_fault(error):
                    raise hub.fault(error, what, instead) from None
                raise
            for task in found["tasks"].values():
                if self.fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 in a YAML stays
                    task.set_config(key="num_fewshot", value=self.fewshot)
                elif name in self._shots:
                    task.set_config(key="num_fewshot", value=self._shots[name])
                elif task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=_SEEDS["other"])
            self._loaded[name] = found
        return self._loaded[name]

    def identity(self, name: str) -> dict[str, Any]:
        """{"name", "version", "digest", "num_fewshot", "fewshot", "limit"}; digest: over the YAML and the documents."""
        if name not in self._identities:
            found = self.loaded(name)["tasks"]
            total, versions, shots = hashlib.sha256(), set(), set()
            for leaf in sorted(found):
                task = found[leaf]
                total.update(canonical([leaf, self._yaml(leaf), self._metadata.get("window")]).encode())
                for document in task.eval_docs:
                    total.update(json.dumps(document, sort_keys=True, default=str).encode())
                versions.add(str(task.VERSION))
                shots.add(task.get_config("num_fewshot"))
            self._identities[name] = {"name": name, "version": "|".join(sorted(versions)), "digest": total.hexdigest(),
                                      "num_fewshot": sorted(shots)[0] if len(shots) == 1 else sorted(shots),
                                      "fewshot": self.fewshot, "limit": self.limit}
        return self._identities[name]

    def _yaml(self, leaf: str) -> Any:
        """The task's configuration as written, functions unresolved; None for one without a file of its own."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._manager.task_index.get(leaf)
        if entry is None or entry.yaml_path is None:
            return None
        text = json.dumps(load_yaml(entry.yaml_path, resolve_func=False, recursive=True), default=str)
        return json.loads(text.replace(f"{Path(entry.yaml_path).parent}/", ""))  # functions stand with their folder

    def evaluates(self, name: str, calibration: calib.Calibration) -> bool:
        """Whether a task evaluates the text that a calibration set was cut from: a window task by the digest of its
        text, any of the suite's own by the file of its data."""
        for task in self.loaded(name)["tasks"].values():
            if getattr(task, "OUTPUT_TYPE", None) == "window_nll":
                if any(document["text_digest"] == calibration.text_digest for document in task.eval_docs):
                    return True
            elif file := (task.get_config("dataset_kwargs") or {}).get("file"):
                data = paths.tasks() / "data" / file
                if data.is_file() and calib.text_digest(data.read_text(encoding="utf-8")) == calibration.text_digest:
                    return True
        return False


# ---------------------------------------------------------------------------------------------- running


class Runner:
    """One variant: loaded, quantized and evaluated."""

    def __init__(self, model: str, variant: Variant, revision: str | None = None, device: Any = None,
                 dtype: str | None = None, batch_size: int | None = None):
        self._variant, self._batch_size = variant, batch_size
        self._loaded = models.load(model, dtype=dtype, device=device, revision=revision)
        self._harness: Any = None

    def quantize(self, progress: Progress | None = None) -> dict[str, Any]:
        """Quantizes the model in place: {"layers", "bits", "seconds", "peak_memory_mib", "fingerprint"}."""
        from suite.walk import quantize_model

        variant = self._variant
        with Meter() as meter:
            kv.set_(self._loaded.model, variant.kvbits)
            layers = quantize_model(variant.method, self._loaded.model, variant.diagnosed_on, progress,
                                    diagnostics=True, inputs=variant.inputs)
        weights = sum(layer["weights"] for layer in layers)
        return {"layers": layers, "bits": sum(layer["bits"] * layer["weights"] for layer in layers) / weights,
                "seconds": sum(layer["seconds"] for layer in layers), "peak_memory_mib": meter.told["peak_memory_mib"],
                "fingerprint": models.fingerprint(self._loaded.model), **self._origin}

    @property
    def _origin(self) -> dict[str, Any]:
        """For the record: the commit of a model of the hub (what identifies the model is the digest of its files), and
        what it was trusted with."""
        return {**({"revision": self._loaded.revision} if self._loaded.revision else {}),
                **({"trusted": list(self._loaded.trusted)} if self._loaded.trusted else {})}

    def evaluate(self, tests: Tasks, name: str) -> dict[str, Any]:
        """One task through lm-eval: see `outcome_of`."""
        if self._harness is None:
            from suite.adapter import PTQ

            self._harness = PTQ(self._loaded.model, tokenizer=self._loaded.tokenizer, batch_size=self._batch_size)
        return outcome_of(name, evaluate_quietly(self._harness, tests, name))


def evaluate_quietly(harness: Any, tests: Tasks, name: str) -> Mapping[str, Any]:
    """lm-eval's results of one task, from fixed seeds, without its progress bars: they heed no setting, and the suite
    has a line of its own."""
    from lm_eval.evaluator import evaluate

    from suite.adapter import no_bars

    kept = _Answers(f"answers-{tests.identity(name)['digest'][:16]}-{tests.limit}-{tests.fewshot}")
    for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        silent = functools.partial(getattr(type(harness), request), harness, disable_tqdm=True)
        setattr(harness, request, lambda requests, ask=silent, kind=request, **_: kept.answer(kind, requests, ask))
    harness.cache_hook = kept  # lm-eval tells it each answer at once
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["other"])
    torch.manual_seed(_SEEDS["other"])
    with no_bars():
        return evaluate(lm=harness, task_dict=tests.loaded(name), limit=tests.limit, log_samples=True,
                        bootstrap_iters=1000, confirm_run_unsafe_code=tests.allow_code_execution)


class _Answers:
    """The answers of one task, kept in the workspace of the run as they come, if it has one: after an interruption only
    the rest is asked. The workspace belongs to one variant, so no answer reaches another."""

    def __init__(self, name: str):
        self._workspace, self._name = resume.current(), name
        self._answers: dict[str, Any] = (self._workspace and self._workspace.load(name)) or {}

    @staticmethod
    def _key(kind: str, arguments: Any) -> str:
        return hashlib.sha256(json.dumps([kind, arguments], sort_keys=True, default=str).encode()).hexdigest()

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        """lm-eval's own word for: this request has this answer."""
        if self._workspace is not None:
            self._answers[self._key(kind, list(arguments))] = answer
            if self._workspace.due(self._name):
                self._workspace.save(self._name, self._answers)

    def answer(self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The answers to some requests, in their order; what is kept is not asked again."""
        keys = [self._key(kind, list(request.args)) for request in requests]
        known = {key: self._answers[key] for key in keys if key in self._answers}
        left = [i for i, key in enumerate(keys) if key not in known]
        fresh = dict(zip(left, ask([requests[i] for i in left]) if left else []))
        return [fresh[i] if i in fresh else known[key] for i, key in enumerate(keys)]


def outcome_of(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of lm-eval's results of one task or group.

    {"kind": "perplexity" or "mean", "headline": the metric that tables show, "metrics": {metric: {"value", "stderr"}},
    "info"} and, for the paired tests, "windows": {"nll", "tokens"} or "outcomes": {metric: one outcome per document}: a
    string of 0 and 1 where all are. A group's outcomes stand one task after another, as "info" tells.
    """
    found = results["results"][name]
    metrics = {key: {"value": float(value), "stderr": _number(found.get(_stderr(key)))} for key, value in found.items()
               if "," in key and "_stderr" not in key and _number(value) is not None}
    headline = next((key for key in _HEADLINES if key in metrics), None) or sorted(metrics)[0]
    leaves = sorted(leaf for leaf in results["samples"] if results["samples"][leaf])
    sample = results["samples"][leaves[0]][0]
    answer = sample["filtered_resps"][0]
    if isinstance(answer, Mapping) and "nll" in answer:  # a window task: one document, which holds all windows
        return {"kind": "perplexity", "headline": headline, "metrics": {headline: metrics[headline]},
                "windows": {"nll": answer["nll"], "tokens": answer["predicted"]},
                "info": {**answer["protocol"], "join": sample["doc"]["join"]}}
    outcomes = {}
    for key in metrics:
        metric, _, filtered = key.partition(",")
        values = [sample[metric] for leaf in leaves
                  for sample in sorted(results["samples"][leaf], key=lambda sample: sample["doc_id"])
                  if sample["filter"] == filtered and metric in sample]
        if values and all(isinstance(value, (bool, int, float)) for value in map(_plain, values)):
            outcomes[key] = _compact([float(_plain(value)) for value in values])
    counts = {leaf: len({sample["doc_id"] for sample in results["samples"][leaf]}) for leaf in leaves}
    return {"kind": "mean", "headline": headline, "metrics": metrics, "outcomes": outcomes,
            "info": {"documents": sum(counts.values()), "higher_is_better": _higher(results, name, headline),
                     **({"tasks": counts} if len(counts) > 1 else {})}}


def _stderr(key: str) -> str:
    metric, _, filtered = key.partition(",")
    return f"{metric}_stderr,{filtered}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _compact(values: Sequence[float]) -> str | list[float]:
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else list(values)


def _higher(results: Mapping[str, Any], name: str, headline: str) -> bool | None:
    return (results.get("higher_is_better", {}).get(name) or {}).get(headline.partition(",")[0])
