"""Grids of runs: which results are missing, and what they come to.

A grid is a model, some variants of it and some tasks. Each variant is quantized once, if any of its results is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from suite import calib, checkpoint, hub, kv, measuring, method, models, preflight
from suite.errors import PTQError
from suite.evaluation import CODE_TASK, EMBEDDED_TASKS, PAPER_TASKS, Tasks
from suite.grid import UNQUANTIZED_BITS
from suite.measuring import Job, Progress
from suite.provenance import code
from suite.store import Setting, Store
from suite.variants import (
    EVALUATING_LIBRARIES,
    NUMERICS,
    Variant,
    bits_of,
    build_all,
    libraries,
    sampling,
    told,
    variants_of,
    with_cache,
)

METHODS = ("fp16", "rtn", "gptq", "awq", "smoothquant", "smoothquant+gptq", "spinquant", "mp-gptq", "cka-hybrid")
FAST_METHODS = tuple(name for name in METHODS if name != "spinquant")  # learning takes longer than all others together
INSTEAD = "an embedded model (`ptq ls models`) or a local folder"
# What an embedded model takes, in matched mode, in place of a default that was published for large ones. SpinQuant: in
# networks of width 128 and 256 gradients are so small that the published rate hardly turns a rotation; on calibration
# tokens of tiny-llama-s at 4-bit activations a rate of 1.5 made up for a tenth of the loss, 10 a quarter, 30 a half,
# 100 less again; more than one sequence a step cost time and gained nothing.
EMBEDDED_OPTIONS: dict[str, dict[str, Any]] = {"spinquant": {"batch": 1, "learning_rate": 30.0}}
ROTATIONS = ("none", "hadamard", "random-hadamard", "learned")  # cheapest first
FAST_LIMIT = 64  # documents or windows of each task in a first look
_ANNOUNCED_TOKENS = 100_000  # of calibration, over all variants of a small model: what is less takes no time worth a word
SMALL_WIDTH = preflight.LARGE_WIDTH  # below, one thread: two spend their time waiting for each other


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
    fast: FAST_LIMIT documents and windows a task, `variants.FAST_SAMPLES` calibration sequences; such records are of their own.
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
    measuring.run(planned.jobs, workers, progress, runner, devices)
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
    built = build_all(methods or (FAST_METHODS if fast else METHODS), options or {}, mode, own)
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
    variants = variants_of(built, options or {}, kv.check(kvbits), mode, sampled, calib_source, embedded, tokenizer,
                         batch_tokens)
    overlaps = _overlaps(variants, tests, allow_eval_calibration)

    identity = models.identify(model, source.revision)
    shared = next((v.diagnosed_on for v in variants if v.diagnosed_on is not None), None)
    scheme = str(method.Scheme.of(**(options or {}))) if mode == "matched" else bits_of(options or {})
    setting = Setting(identity, with_cache(scheme, kvbits), mode, told(shared) if mode == "matched" else None,
                      "quantized" if mode == "matched" else None, kept, seed if mode == "matched" else None, NUMERICS,
                      libraries(EVALUATING_LIBRARIES), limit, fewshot,
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


def _missing(store: Store, identity: Mapping[str, Any], fresh: bool | str) -> bool:
    """Whether a result must be measured; fresh as `reproduce` takes it."""
    if fresh is True:
        return True
    found = store.find(identity)
    return found is None or (fresh == "code" and found.provenance.get("code") != code())


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
