"""A method against others, or today's code against a reference: what is missing is run, then everything is judged.

The noise floor of a difference is what runs of one method differ among themselves: with other calibration seeds, and
with other batch sizes in calibration and evaluation. The larger one of the two methods counts. Those runs are kept
apart from the results, below <results>/noise/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import baseline as references
from suite import calib, checkpoints, experiments, measuring, method, models
from suite.baseline import Baseline, Entry, Run
from suite.errors import PTQError, unknown
from suite.measuring import Progress
from suite.provenance import code, version
from suite.report.comparison import Comparison, Match, judge
from suite.report.data import Score
from suite.store import Store
from suite.verdict import RULES, Rules

REPEATS = 2  # further calibration seeds
NOISE = "noise"
OTHER_BATCH = {"batch_size": 4, "batch_tokens": 2048}  # of evaluation and calibration, in the repeat with other batches

Floors = Mapping[tuple[str, str], float | None]  # (label, task) -> units of the score
Announce = Callable[[str], None]


def compare(model: str, candidate: Any, against: Sequence[Any] = (), tasks: Sequence[str] | None = None, *, store: Store,
            checkpoint_rows: Mapping[str, str | Path] | None = None, rules: Rules = RULES, repeats: int = REPEATS,
            workers: int | None = 1, progress: Progress | None = None, runner: Any = None,
            announce: Announce | None = None, **arguments: Any) -> Comparison:
    """A method against others on one model, task by task.

    candidate, against: names or configured methods. checkpoint_rows: label -> folder of checkpoints that stand beside
    them, see `suite.checkpoints.measure`: against the candidate, or with candidate None the first as the candidate.
    repeats: calibration seeds of the noise floor; 0: not measured. workers, progress, runner, announce, arguments: as
    `suite.experiments.reproduce` takes them.

    Raises PTQError as `reproduce`, `suite.checkpoints.measure` and `suite.report.comparison.judge` do.

    >>> compare("tiny-llama-s", "my_method", ["gptq"], store=Store("runs")).status  # doctest: +SKIP
    0
    >>> compare("tiny-llama-s", None, ["gptq"], store=Store("runs"), checkpoint_rows={"peer": "/tmp/peer"})  # doctest: +SKIP
    """
    rows = dict(checkpoint_rows or {})
    methods = [*([candidate] if candidate is not None else []), *against]
    if not methods or len(methods) + len(rows) < 2:
        raise PTQError("nothing to compare with: name at least one method, e.g. --against gptq")
    checkpoints.check(model, rows)
    measured = Measured(model, methods, tasks, store, repeats, arguments)
    outcome, own = measured.outcome, measured.outcome.methods
    if rows:  # before the methods: a checkpoint of another scheme is told at once
        outcome = checkpoints.measure(store, outcome, model, rows)
    measured.run(workers, progress, runner, announce)
    floors = measured.floors()
    first, *others = (*own, *rows) if candidate is not None else (*list(rows)[:1], *own, *list(rows)[1:])
    matches = []
    for other in others:
        for task in outcome.tasks:
            records = [store.find(outcome.evaluations[label, task]) for label in (first, other)]
            noted = (*_noted(records[0]), *(_ONE_RUN.format(label) for label in (first, other) if label in rows))
            matches.append(Match(outcome.model, first, other, task, *records, _larger(floors, (first, other), task),
                                 noted=noted))
    return judge(f"{first} on {outcome.model}", _setting(outcome), matches, rules)


_ONE_RUN = "checkpoint {} is one run, so the noise floor is that of the methods beside it"


class Measured:
    """The results of some methods on one model, and the repeats that tell their noise floors: `jobs` are what is missing.

    Repeats: so many further calibration seeds, for methods that calibrate, and once other batches; none if 0.
    """

    def __init__(self, model: str, methods: Sequence[Any] | None, tasks: Sequence[str] | None, store: Store,
                 repeats: int, arguments: Mapping[str, Any]):
        if repeats < 0:
            raise PTQError(f"repeats is {repeats}: allowed are whole numbers from 0; 0 leaves the noise floor unmeasured")
        planned = experiments.plan(model, methods, tasks, store=store, **arguments)
        self.model, self.outcome, self._store, self._repeats = model, planned.outcome, store, []
        self._revision = arguments.get("revision")
        self.jobs = list(planned.jobs)
        configured = [variant.method for variant in planned.variants]
        calibrating = [variant.method for variant in planned.variants if variant.calibration is not None]
        seed, folder = arguments.get("seed", 0), store.root / NOISE
        runs = [(Store(folder / "seeds"), calibrating, {"seed": seed + k}) for k in range(1, repeats + 1)]
        runs += [(Store(folder / "batches"), configured, OTHER_BATCH)] if repeats else []
        for where, chosen, changes in runs:
            if chosen:
                again = experiments.plan(model, chosen, self.outcome.tasks, store=where, tests=planned.tests,
                                         **{**arguments, **changes})
                self.jobs += again.jobs
                self._repeats.append((where, again.outcome.evaluations))

    def run(self, workers: int | None, progress: Progress | None, runner: Any, announce: Announce | None) -> None:
        """Does the jobs. Raises PTQError, before, if they do not fit into the memory."""
        source = models.resolve(self.model, self._revision)
        experiments.check_memory(self.jobs, source, self._store, announce)
        measuring.run(self.jobs, workers, progress, runner)

    def floors(self) -> Floors:
        """What runs of each variant differ among themselves, per task, at most; once the jobs are done."""
        scores = {key: [_score(self._store, identity)] for key, identity in self.outcome.evaluations.items()}
        for where, evaluations in self._repeats:
            for key, identity in evaluations.items():
                scores[key].append(_score(where, identity))
        return {key: _range(values) for key, values in scores.items()}


def _score(store: Store, identity: Mapping[str, Any]) -> float:
    sample = Score(store.find(identity)).sample
    return sample.score if sample is not None else math.nan


def _range(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) - min(finite) if len(finite) > 1 else None


def _larger(floors: Floors, labels: Iterable[str], task: str) -> float | None:
    known = [floor for label in labels if (floor := floors.get((label, task))) is not None]
    return max(known, default=None)


def _noted(record: Any) -> tuple[str, ...]:
    marked = record.result.get("calibrated_on_this_text")
    return (f"calibrated on the text of {record.identity['task']['name']}",) if marked else ()


def _setting(outcome: experiments.Outcome) -> str:
    limit = f", {outcome.setting.limit} documents or windows a task" if outcome.setting.limit else ""
    return f"{outcome.setting.scheme} ({outcome.setting.mode}){limit}"


# ---------------------------------------------------------------------------------------------- references


def freeze(name: str, model_names: Sequence[str], methods: Sequence[Any] | None = None,
           tasks: Sequence[str] | None = None, *, store: Store, repeats: int = REPEATS, workers: int | None = 1,
           progress: Progress | None = None, runner: Any = None, announce: Announce | None = None,
           **arguments: Any) -> Baseline:
    """A reference of some models: what is missing is measured, the noise floors too, and all is taken into one object.

    repeats, workers, progress, runner, announce, arguments: as for `compare`.

    >>> references.save(freeze("today", ["tiny-llama-s"], store=store), path)  # doctest: +SKIP
    """
    runs = []
    for measured in [Measured(model, methods, tasks, store, repeats, arguments) for model in model_names]:
        measured.run(workers, progress, runner, announce)
        floors = measured.floors()
        entries = [Entry.of(store.find(identity), floors.get(key))
                   for key, identity in measured.outcome.evaluations.items()]
        runs.append(Run(measured.model, _kept(arguments), entries))
    return Baseline(name, runs)


_PASSED_ON = ("options", "kvbits", "mode", "calib_source", "nsamples", "seqlen", "seed", "fast", "limit", "fewshot",
              "dtype", "revision")


def _kept(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that decide results, as JSON; of a calibration file its name, and not where it lies."""
    kept = {key: arguments[key] for key in _PASSED_ON if arguments.get(key) not in (None, {}, False)}
    source = kept.get("calib_source")
    if source is not None and source != calib.EMBEDDED and source not in calib.HUB_SETS:
        kept["calib_source"] = Path(source).name
    return kept


def _by_label(label: str, options: Mapping[str, Any]) -> Any:
    """The method that a label of `variants.label` stands for: its name if it has today's defaults, else built."""
    name, *changed = label.split(" ")
    if not changed:
        return name
    given = dict(part.split("=", 1) for part in changed)
    scheme = {} if method.lookup(name.split("+")[0])().scheme.weight.quantized is False else options
    return method.build(name, **scheme, **given)


def against_baseline(reference: Baseline, model_names: Sequence[str] | None = None,
                     methods: Sequence[str] | None = None, tasks: Sequence[str] | None = None, *, store: Store,
                     rules: Rules = RULES, calib_source: str | None = None, **arguments: Any) -> Comparison:
    """Today's code against a reference: the same variants on the same tasks, measured anew wherever the code has
    changed since the store's result.

    model_names, methods (labels of the reference), tasks: only those; all by default. calib_source: where the
    calibration file of the reference lies. arguments: of `reproduce`, that decide no result (workers, progress, device).

    Raises PTQError: names that the reference lacks, and a reference of which nothing can be compared any more, because
    models, tasks, calibration or library versions are others; before anything is measured where that can be told.
    """
    matches: list[Match] = []
    for run in [reference.run(name) for name in model_names] if model_names else reference.runs:
        entries = _chosen(reference, run, methods, tasks)
        _require_comparable(reference, run, entries)
        given = dict(run.arguments)
        if calib_source is not None:
            given["calib_source"] = calib_source
        labels = list(dict.fromkeys(entry.label for entry in entries))
        built = [_by_label(label, given.get("options") or {}) for label in labels]
        outcome = experiments.reproduce(run.model, built, list(dict.fromkeys(e.task for e in entries)), store=store,
                                        fresh="code", **given, **arguments)
        for entry in entries:
            identity = outcome.evaluations.get((entry.label, entry.task))
            now = store.find(identity) if identity is not None else None
            apart = references.apart(entry.identity, identity) if identity is not None else [
                f"variant: {entry.label} is called {', '.join(outcome.methods)} today"]
            noted = references.moved(entry.identity, identity) if identity is not None else []
            matches.append(Match(run.model, entry.label, f"baseline {reference.name}", entry.task, now, entry.record,
                                 entry.noise, True, tuple(apart), (*noted, *_other_machine(entry, now))))
    named = ", ".join(dict.fromkeys(match.model for match in matches))
    return judge(f"today's code on {named}", f"code {code()[:12]}", matches, rules)


def _chosen(reference: Baseline, run: Run, methods: Sequence[str] | None, tasks: Sequence[str] | None) -> list[Entry]:
    for kind, wanted, there in (("method", methods, run.labels), ("task", tasks, run.tasks)):
        for name in wanted or ():
            if name not in there:
                raise unknown(f"{kind} in baseline {reference.name!r} of {run.model}", name, there)
    return [e for e in run.entries if (not methods or e.label in methods) and (not tasks or e.task in tasks)]


def _require_comparable(reference: Baseline, run: Run, entries: Sequence[Entry]) -> None:
    """Raises PTQError, before any work, if the model's files or the libraries alone make everything incomparable."""
    model = models.identify(run.model, run.arguments.get("revision"))
    reasons: list[str] = []
    for entry in entries:
        libraries = {name: version(name) for name in entry.identity["libraries"]}
        now = {**entry.identity, "model": dict(model), "libraries": libraries}
        if not (found := references.apart(entry.identity, now)):
            return
        reasons += found
    raise PTQError(f"baseline {reference.name!r} cannot be compared with today's {run.model}, since these differ: "
                   f"{'; '.join(dict.fromkeys(reasons))}: save a new one with `ptq baseline save`")


def _other_machine(entry: Entry, now: Any) -> list[str]:
    processor = (now.provenance.get("hardware") or {}).get("cpu") if now is not None else None
    if processor is None or entry.measured.get("processor") in (None, processor):
        return []
    return [f"measured on {entry.measured['processor']}, now on {processor}: rounding may differ"]
