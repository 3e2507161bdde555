"""Measuring: one variant loaded, quantized, evaluated; many of them in turn or side by side.

A record is written as soon as a result is there: an interruption loses the task in progress and nothing else.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from suite import kv, models, plugins, resume
from suite.errors import PTQError
from suite.evaluation import Tasks, evaluate_quietly, outcome_of
from suite.provenance import Meter, provenance
from suite.store import Record, Store, canonical, digest, significant
from suite.variants import EVALUATING_LIBRARIES, NUMERICS, Variant, libraries

Progress = Callable[[int, int, str], None]


def run(jobs: Sequence[Job], workers: int | None = 1, progress: Progress | None = None,
        runner: Callable[..., Any] | None = None, devices: Sequence[str] = ()) -> None:
    """Does all jobs, of one grid or of several. workers, runner, devices: see `suite.experiments.reproduce`."""
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
            record = store.find({"kind": "evaluation", **shared, "libraries": libraries(EVALUATING_LIBRARIES),
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


class Runner:
    """One variant: loaded, quantized and evaluated."""

    def __init__(self, model: str, variant: Variant, revision: str | None = None, device: Any = None,
                 dtype: str | None = None, batch_size: int | None = None):
        self._variant, self._batch_size = variant, batch_size
        self._loaded = models.load(model, dtype=dtype, device=device, revision=revision)
        self._harness: Any = None

    def quantize(self, progress: Progress | None = None) -> dict[str, Any]:
        """Quantizes the model in place: {"layers", "bits", "seconds", "peak_memory_mib", "fingerprint"}."""
        from suite.walk import quantize_model, totals

        variant = self._variant
        with Meter() as meter:
            kv.set_(self._loaded.model, variant.kvbits)
            layers = quantize_model(variant.method, self._loaded.model, variant.diagnosed_on, progress,
                                    diagnostics=True, inputs=variant.inputs)
        return {"layers": layers, **totals(layers), "peak_memory_mib": meter.told["peak_memory_mib"],
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
