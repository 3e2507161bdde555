"""Runs experiments on models: collects what the store lacks, does it side by side, and hands the records to the report.

Nothing is measured twice: the main table's records are taken where they exist; a variant that another record implies
is told so instead of run (`implied`); and a model that is the same, bit for bit, as one already evaluated takes its
results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from suite import calib, checkpoint, experiments, measuring, method, models, provenance, variants
from suite.ablate import studies
from suite.ablate.plan import CALIBRATION, Experiment, Row
from suite.errors import PTQError
from suite.evaluation import Tasks
from suite.grid import Scheme
from suite.report import data
from suite.report.sheets import Line, Repeat, Sheet, Study
from suite.store import Record, Store, digest, significant

SHELF = "ablations"


@dataclass
class Ablated:
    """What the experiments came to. sheets, studies: by experiment; measured, found, implied: results; models: their
    names; limit: of documents, None for all."""

    sheets: dict[str, list[Sheet]] = field(default_factory=dict)
    studies: dict[str, list[Study]] = field(default_factory=dict)
    measured: int = 0
    found: int = 0
    implied: int = 0
    models: tuple[str, ...] = ()
    limit: int | None = None
    main: dict[str, Any] = field(default_factory=dict)  # model -> Setting of its main table


@dataclass(frozen=True, eq=False)
class _Wanted:
    """One variant of one row: which tasks, and how to find its records."""

    experiment: str
    row: Row
    scheme: str
    varied: Any
    variant: variants.Variant
    tasks: tuple[str, ...]
    planned: experiments.Planned
    measured: bool = True  # else it is shown only if the store has it

    @property
    def key(self) -> str:
        return digest(self.planned.quantization(self.variant))


@dataclass(frozen=True, eq=False)
class _Bench:
    """One model, looked up once."""

    model: str
    source: Any
    config: Mapping[str, Any]
    tests: Tasks
    main: experiments.Planned
    given: Mapping[str, Any]

    @property
    def layers(self) -> int:
        return self.config.get("num_hidden_layers", 1)

    def tasks(self, asked: str | Sequence[str]) -> tuple[str, ...]:
        perplexities = tuple(name for name in self.tests.names if name.endswith("_ppl"))
        return {"all": self.tests.names, "perplexity": perplexities, "wiki": perplexities[:1]}[asked] if isinstance(
            asked, str) else tuple(asked)

    def cut(self, experiment: Experiment) -> dict[str, int]:
        """Calibration that an experiment saves on, on this model: never against what was asked for."""
        free = self.source.kind == "embedded" and self.given.get("nsamples") is None
        return experiment.sampling_of(self.layers) if free else {}

    @property
    def accuracy(self) -> str:
        return next((name for name in self.tests.names if not name.endswith("_ppl")), "")


def ablate(names: Sequence[str], wanted: Sequence[Experiment], *, root: Any, fast: bool = False, seed: int = 0,
           workers: int | None = None, progress: measuring.Progress | None = None,
           runner: Callable[..., Any] | None = None, revision: str | None = None, whole: bool = True,
           announce: Callable[[str], None] | None = None, **given: Any) -> Ablated:
    """Runs experiments on models, reusing what the store has.

    whole: all of the main table too; without, only what of it the experiments show.
    fast: FAST_LIMIT documents and windows a task, FAST_SAMPLES calibration sequences. given: further arguments of
    `experiments.plan` (calib_source, nsamples, seqlen, limit, device, ...). announce: is told what the runs of a large
    model will need, before they start.

    Raises PTQError before any work, as `experiments.reproduce` does.

    >>> ablate(["tiny-llama-s"], plan.load(["pool"]), root="results", fast=True)  # doctest: +SKIP
    """
    given = {"fast": fast, "seed": seed, "revision": revision, **given}
    open_store, shelf = Store(root), Store(root, SHELF)
    benches = [_bench(name, wanted, open_store, given) for name in names]
    rows = {bench.model: _shown(_variants(bench, wanted, shelf), shelf) for bench in benches}
    jobs, done = {}, Ablated(models=tuple(bench.source.name for bench in benches), limit=benches[0].tests.limit)
    for bench in benches:
        done.main[bench.source.name] = bench.main.outcome.setting
        jobs |= _main_jobs(bench, rows[bench.model], whole)
    done.found = sum(bench.main.outcome.found for bench in benches)
    later: dict[str, tuple[Any, _Wanted]] = {}
    for bench in benches:
        for one in rows[bench.model]:
            missing = _missing(one, shelf)
            done.found += len(one.tasks) - len(missing)
            job = _job(one, missing, shelf)
            if job is None or one.key in jobs:
                continue
            if one.key in later:
                merged = tuple(dict.fromkeys((*later[one.key][0].missing, *missing)))
                job = replace(job, missing=merged)
            later[one.key] = (job, one)
    studied = _studies(benches, wanted, shelf)
    first = [job for job, one in later.values() if not _narrow(one.variant.method)]
    second = {key: (job, one) for key, (job, one) in later.items() if _narrow(one.variant.method)}
    for bench in benches:
        mine = [job for job in (*jobs.values(), *(job for job, _ in later.values())) if job.model == bench.model]
        experiments.check_memory(mine, bench.source, open_store, announce)
    todo = [*jobs.values(), *first, *(job for job, *_ in studied if shelf.find(job.identity) is None)]
    done.measured += _do(todo, workers, progress, runner)
    rest, wide = [], {}
    for job, one in second.values():
        name = job.identity["name"]
        if name not in wide:
            wide[name] = [record for record in shelf.records(name, "quantization")
                          if record.identity["method"]["method"] == data.HYBRID]
        missing = _imply(job, one, shelf, wide[name])
        done.implied += len(job.missing) - len(missing)
        if missing or shelf.find(one.planned.quantization(one.variant)) is None:
            rest.append(replace(job, missing=missing))
    done.measured += _do(rest, workers, progress, runner)
    _collect(done, benches, wanted, rows, studied, shelf)
    return done


def _do(jobs: Sequence[Any], workers: int | None, progress: Any, runner: Any) -> int:
    """Largest jobs first, so that workers end together; a list of jobs is worked off from its end."""
    ordered = sorted(jobs, key=_weight)
    measuring.run(ordered, workers, progress, runner)
    return sum(len(getattr(job, "missing", (1,))) for job in jobs)


def _weight(job: Any) -> float:
    if isinstance(job, studies.StudyJob):
        return 200.0 if job.study == "exhaustive" else 50.0 * job.layers
    made = job.variant.method
    pool = len(getattr(made, "pool", ())) or 1
    factor = getattr(made, "width", 1) * (3 if getattr(made, "refine", "none") != "none" else 1)
    learned = 4 if hasattr(made, "rotation") else 1
    return job.layers**2 * (pool * factor * learned + len(job.missing))


# ---------------------------------------------------------------------------------------------- what is wanted


def _bench(name: str, wanted: Sequence[Experiment], store: Store, given: Mapping[str, Any]) -> _Bench:
    main = experiments.plan(name, store=store, **given)
    source = models.resolve(name, given.get("revision")).fetched()
    config = models.read_json(source.folder / "config.json")
    return _Bench(name, source, config, main.tests, main, given)


def _variants(bench: _Bench, wanted: Sequence[Experiment], store: Store) -> list[_Wanted]:
    """Every variant of every row that fits the model. Those of one scheme and calibration are planned together."""
    groups: dict[str, tuple[dict, dict, dict[str, Any]]] = {}
    places, fast = [], bench.given["fast"]
    for experiment in wanted:
        for row in experiment.rows:
            if not row.method or not row.fits(bench.layers) or not experiment.fits(bench.layers):
                continue
            for scheme, measured in experiment.schemes_of(row, fast):
                for options, sampling in row.configurations():
                    sampling = {**bench.cut(experiment), **sampling}
                    given = _method(bench, row.method, scheme, options)
                    group = groups.setdefault(digest([scheme, sampling]), (dict(scheme), sampling, {}))
                    key = variants.label(given) if not isinstance(given, str) else given
                    group[2].setdefault(key, given)
                    varied = None if row.repeat is None else {**options, **sampling}.get(row.repeat[0])
                    group_key, told = digest([scheme, sampling]), str(Scheme.of(**scheme))
                    places.append((experiment, row, group_key, key, varied, told, measured))
    planned: dict[str, tuple[experiments.Planned, dict[str, variants.Variant]]] = {}
    for name, (scheme, sampling, methods) in groups.items():
        arguments = {**bench.given, **_sampling(bench, sampling)}
        found = experiments.plan(bench.model, list(methods.values()), store=store, options=scheme, tests=bench.tests,
                                 **arguments)
        planned[name] = found, dict(zip(methods, found.variants, strict=True))
    return [_Wanted(experiment.name, row, scheme, varied, planned[group][1][key],
                    bench.tasks(experiment.tasks_of(row, bench.layers)), planned[group][0], measured)
            for experiment, row, group, key, varied, scheme, measured in places]


def _shown(rows: Sequence[_Wanted], store: Store) -> list[_Wanted]:
    """Without those that are not to be measured, unless the store has all of an experiment at their scheme."""
    lacking = {(one.experiment, one.scheme) for one in rows if not one.measured
               and _job(one, _missing(one, store), store) is not None}
    return [one for one in rows if one.measured or (one.experiment, one.scheme) not in lacking]


def _missing(one: _Wanted, store: Store) -> list[str]:
    return [task for task in one.tasks if store.find(one.planned.evaluation(one.variant, task)) is None]


def _method(bench: _Bench, name: str, scheme: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A name, as the main table gives it, or a configured method."""
    if not options:
        return name
    own = experiments.EMBEDDED_OPTIONS.get(name, {}) if bench.source.kind == "embedded" else {}
    return method.build(name, **{**own, **scheme, **options})


def _sampling(bench: _Bench, sampling: Mapping[str, int]) -> dict[str, int]:
    """Calibration of a row; of a fast run never more sequences than that has."""
    found = {key: sampling[key] for key in CALIBRATION if key in sampling}
    if bench.given.get("fast") and "nsamples" in found:
        found["nsamples"] = max(2, found["nsamples"] * variants.FAST_SAMPLES // calib.usual_size(calib.EMBEDDED)[0])
    return found


def _main_jobs(bench: _Bench, rows: Sequence[_Wanted], whole: bool) -> dict[str, measuring.Job]:
    """What the main table lacks: all of it, or only what the experiments show, and full precision."""
    shown: dict[str, set[str]] = {digest(bench.main.quantization(bench.main.variants[0])): set()}
    for one in rows:
        shown.setdefault(one.key, set()).update(one.tasks)
    every = next(iter(shown.values()))
    every.update(*shown.values())
    found = {}
    for job in bench.main.jobs:
        key = digest(bench.main.quantization(job.variant))
        if whole:
            found[key] = replace(job, share=True)
        elif key in shown:
            missing = tuple(task for task in job.missing if task in shown[key])
            if missing or job.unquantized:
                found[key] = replace(job, missing=missing, share=True)
    return found


def _job(one: _Wanted, missing: Sequence[str], store: Store) -> measuring.Job | None:
    """What is left to do of a variant, only the tasks that its row asks for."""
    found = next((job for job in one.planned.jobs if job.variant is one.variant), None)
    if found is None or (not missing and not found.unquantized):
        return None
    return replace(found, missing=tuple(missing), share=True)


# ---------------------------------------------------------------------------------------------- what needs no run


def _narrow(made: Any) -> bool:
    """Whether a wider search may imply this one: then it is left until that has run. Searches beyond the greedy one and
    controls wait too, so that the models they come to may be found evaluated already."""
    return method.name_of(made) == data.HYBRID and not (
        _greedy(method.to_config(made)["options"]) and made.metric == "cka" and made.block == 1 and len(made.pool) >= 3)


def _greedy(options: Mapping[str, Any]) -> bool:
    return (options["search"], options["refine"], options["pick"], options["unit"], list(options["choices"])) == (
        "greedy", "none", "closest", "layer", [])


def implied(wanted: Mapping[str, Any], done: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the greedy search `wanted` would choose as the greedy search `done` did, known from the latter's scores.

    wanted, done: options of the hybrid. True if the smaller pool has every method that was chosen, and each is the
    closest by the other metric as well: then both saw the same inputs at each layer, and the same scores.
    """
    free = ("pool", "metric")
    if not (_greedy(wanted) and _greedy(done)) or any(wanted[k] != done[k] for k in wanted if k not in free):
        return False
    if not set(wanted["pool"]) <= set(done["pool"]):
        return False
    for layer in layers:
        scores = {name: layer["candidates"][name].get(wanted["metric"]) for name in wanted["pool"]}
        if layer["chosen"] not in scores or None in scores.values():
            return False
        own = scores.pop(layer["chosen"])
        if any(other <= own for other in scores.values()):  # equals would be decided by their order
            return False
    return True


def _imply(job: measuring.Job, one: _Wanted, store: Store, wide: Sequence[Record]) -> tuple[str, ...]:
    """Stores the records that follow from another hybrid's, if one of `wide` is wide enough; returns the tasks that still
    have to be measured."""
    identity = one.planned.quantization(one.variant)
    if identity["method"]["method"] != data.HYBRID or store.find(identity) is not None:
        return job.missing
    options = identity["method"]["options"]
    for other in wide:
        theirs = other.identity
        if {**identity, "method": None} != {**theirs, "method": None}:
            continue
        if not implied(options, theirs["method"]["options"], other.result["layers"]):
            continue
        because = {"label": other.result["label"], "hash": other.hash}
        layers = [_narrowed(layer, options) for layer in other.result["layers"]]
        result = {**other.result, "label": one.variant.label, "layers": layers, "seconds": None,
                  "peak_memory_mib": None, "follows_from": because}
        told = provenance.provenance(_Unmeasured())
        store.put(Record(identity, significant(result), told))
        missing = []
        for task in job.missing:
            evaluation = one.planned.evaluation(one.variant, task)
            source = store.find({**evaluation, "method": theirs["method"]})
            if source is None:
                missing.append(task)
            else:
                store.put(Record(evaluation, {**source.result, "label": one.variant.label,
                                              "same_model_as": other.result["label"]}, told))
        return tuple(missing)
    return job.missing


class _Unmeasured:
    """In place of a meter, for a record that was concluded and not measured."""

    told = {"wall_seconds": None, "peak_memory_mib": None, "memory_of": None, "peak_gpu_memory_mib": None}


def _narrowed(layer: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    scores = {name: layer["candidates"][name] for name in options["pool"]}
    others = [found[options["metric"]] for name, found in scores.items() if name != layer["chosen"]]
    margin = min(others) - scores[layer["chosen"]][options["metric"]] if others else None
    return {**layer, "candidates": scores, "margin": margin, "seconds": None}


# ---------------------------------------------------------------------------------------------- studies


def _studies(benches: Sequence[_Bench], wanted: Sequence[Experiment], store: Store
             ) -> list[tuple[studies.StudyJob, Experiment, _Bench]]:
    found = []
    for experiment in wanted:
        if not experiment.study:
            continue
        for bench in benches:
            if experiment.fits(bench.layers):
                for scheme, measured in experiment.schemes_of(fast=bench.given["fast"]):
                    job = _study(bench, experiment, scheme, store)
                    if measured or store.find(job.identity) is not None:
                        found.append((job, experiment, bench))
    return found


def _study(bench: _Bench, experiment: Experiment, scheme: Mapping[str, Any], store: Store) -> studies.StudyJob:
    options = {**scheme, **experiment.study_options(bench.layers, bench.given["fast"])}
    if options.get("accuracy") is True:
        options["accuracy"] = bench.accuracy
    setting, given = bench.main.outcome.setting, bench.given
    embedded = bench.source.kind == "embedded"
    sampling = variants.sampling(embedded, bench.config, given.get("calib_source"), given.get("nsamples"),
                                    given.get("seqlen"), given["seed"], given["fast"])
    used = replace(sampling, nsamples=min(sampling.nsamples, options.get("sequences", sampling.nsamples)))
    calibration = calib.load(used.source, checkpoint.load_tokenizer(bench.source.folder), used.nsamples, used.seqlen,
                             used.seed)
    task = bench.tasks("wiki")[0]
    identity = {"kind": "study", "study": experiment.study, "version": studies.STUDY, "model": dict(setting.model),
                "options": options, "scheme": str(Scheme.of(**scheme)), "calibration": variants.told(calibration),
                "dtype": setting.dtype, "numerics": setting.numerics, "libraries": dict(setting.libraries),
                "task": bench.tests.identity(task),
                "accuracy": bench.tests.identity(options["accuracy"]) if options.get("accuracy") else None}
    small = bench.config.get("hidden_size", 0) < experiments.SMALL_WIDTH
    device = given.get("device") or str(models.default_device())
    return studies.StudyJob(experiment.study, options, identity, bench.model, given.get("revision"), setting.dtype,
                            device, sampling, task, bench.tests.limit, given.get("threads") or (1 if small else None),
                            small, store, bench.tests.recipe, bench.layers)


# ---------------------------------------------------------------------------------------------- what was found


def _collect(done: Ablated, benches: Sequence[_Bench], wanted: Sequence[Experiment],
             rows: Mapping[str, Sequence[_Wanted]], studied: Sequence[Any], store: Store) -> None:
    """The records of every line, and of every study."""
    cache: dict[str, Record | None] = {}

    def find(identity: Mapping[str, Any]) -> Record | None:
        key = digest(identity)
        if key not in cache:
            cache[key] = store.find(identity)
        return cache[key]

    def repeat(planned: experiments.Planned, variant: Any, tasks: Sequence[str], varied: Any = None) -> Repeat:
        found = Repeat(find(planned.quantization(variant)), varied=varied)
        for task in tasks:
            if (record := find(planned.evaluation(variant, task))) is not None:
                found.scores[task] = data.Score(record)
        return found

    best: dict[tuple[str, str], float] = {}
    for job, experiment, bench in studied:
        record = store.find(job.identity)
        if record is not None:
            done.studies.setdefault(experiment.name, []).append(Study(bench.source.name, record))
            if experiment.study == "exhaustive":
                best[bench.source.name, record.identity["scheme"]] = min(
                    leaf["perplexity"] for leaf in record.result["leaves"])
    for experiment in wanted:
        for bench in benches if experiment.rows and not experiment.study else ():
            mine = [one for one in rows[bench.model] if one.experiment == experiment.name]
            full = Line(data.FULL, [repeat(bench.main, bench.main.variants[0], bench.tests.names)])
            for scheme in dict.fromkeys(one.scheme for one in mine):
                lines, tasks = [], {}
                for row in experiment.rows:
                    line = Line(row.name, uniform=row.uniform, best_of=row.best_of)
                    for one in mine:
                        if one.scheme == scheme and one.row is row:
                            line.repeats.append(repeat(one.planned, one.variant, one.tasks, one.varied))
                            tasks |= dict.fromkeys(one.tasks)
                    lines.append(line)
                for line in lines:
                    line.repeats += [r for name in line.best_of for other in lines if other.name == name
                                     for r in other.repeats]
                lines = [line for line in lines if line.repeats]
                ordered = [name for name in bench.tests.names if name in tasks]
                kinds = {name: "perplexity" if name.endswith("_ppl") else "mean" for name in ordered}
                done.sheets.setdefault(experiment.name, []).append(Sheet(
                    bench.source.name, scheme, lines, ordered, kinds, full, experiment.against, bench.tests.limit,
                    best.get((bench.source.name, scheme))))


def check(wanted: Sequence[Experiment]) -> None:
    """Raises PTQError for a method or option that does not exist, all mistakes of all experiments at once."""
    mistakes = []
    for experiment in wanted:
        for row in experiment.rows:
            for scheme, _ in experiment.schemes_of(row):
                try:
                    made = method.lookup(row.method.split("+")[0])() if row.method else SimpleNamespace(scheme=None)
                    if row.method and (made.scheme.weight.quantized or row.options):
                        for options, _ in row.configurations():
                            method.build(row.method, **scheme, **options)
                except PTQError as error:
                    mistakes.append(f"experiment {experiment.name}, row {row.name!r}: {error}")
    if mistakes:
        raise PTQError("; ".join(dict.fromkeys(mistakes)))
