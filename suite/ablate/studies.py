"""Measurements that no grid of variants can express. Each is a function of a `Probe`; a `StudyJob` runs and stores it.

Letters: L layers, P candidates, n sequences, t tokens of each, d hidden width.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from suite import arch, calib, evaluation, measuring, models, provenance, variants, windows
from suite.ablate.probe import Probe
from suite.grid import Scheme
from suite.method import LayerEdit, build
from suite.metrics import distances
from suite.store import Record, Store, significant
from suite.walk import REFERENCE_TOKENS, quantize_model

Tell = Callable[[int, str], None]
STUDY = 1  # to be raised by every change of a study that changes its results


@dataclass(frozen=True, eq=False)
class StudyJob:
    """One study of one model; the same interface as `suite.measuring.Job`, so that both share the workers.

    identity: what the record is found by; task: the window task whose text is the test text; limit: of its windows.
    """

    study: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any]
    model: str
    revision: str | None
    dtype: str
    device: str
    sampling: variants.Sampling
    task: str
    limit: int | None
    threads: int | None
    small: bool
    store: Store
    tests: Mapping[str, Any]
    layers: int

    steps = 20

    def do(self, runner: Any, loaded: Any, tell: Tell) -> None:
        """Runs the study and stores its record."""
        tests = loaded.tests(self)
        with measuring.threads_(self.threads), torch.no_grad():
            found = models.load(self.model, dtype=self.dtype, device=self.device, revision=self.revision)
            with provenance.Meter() as meter:
                result = run(self, found, tests, lambda share, text: tell(min(19, int(20 * share)), text))
        told = provenance.provenance(meter)
        self.store.put(Record(self.identity, significant({"label": self.study, **result}), told))
        del found
        gc.collect()
        tell(self.steps, self.study)


def run(job: StudyJob, found: models.Loaded, tests: evaluation.Tasks, tell: Callable[[float, str], None]) -> dict:
    options = dict(job.options)
    sampling = job.sampling
    nsamples = min(sampling.nsamples, options.pop("sequences", sampling.nsamples))
    data = calib.load(sampling.source, found.tokenizer, nsamples, sampling.seqlen, sampling.seed)
    text = next(iter(tests.loaded(job.task)["tasks"].values())).text
    most = options.pop("windows", None)
    limit = min(filter(None, (most, job.limit)), default=None)
    size = windows.fit(None, windows.max_positions(found.model), sampling.seqlen)
    cut = windows.token_windows(text, found.tokenizer, size, limit)
    probe = Probe(found.model, data, cut.tokens.to(arch.embedding(found.model).weight.device))
    scheme = Scheme.of(**{key: options.pop(key) for key in ("wbits", "abits", "group_size") if key in options})
    context = SimpleNamespace(job=job, loaded=found, tests=tests, tell=tell)
    result = FUNCTIONS[job.study](probe, scheme, context, **options)
    return {"protocol": {**cut.protocol, "sequences": nsamples}, "full": _full(probe), **result}


def _full(probe: Probe) -> dict[str, Any]:
    nll = probe.test.nll(probe.test.states[-1])
    return {"nll": nll, "perplexity": probe.perplexity(nll)}


# ---------------------------------------------------------------------------------------------- all assignments


def exhaustive(probe: Probe, scheme: Scheme, context: Any, pool: Sequence[str]) -> dict[str, Any]:
    """Every one of P^L assignments: perplexity on the test windows, loss and metrics at the last layer on calibration.

    The assignments form a tree; each inner node is quantized once, so the cost is that of P + P^2 + ... + P^L layers.
    """
    rules = {name: build(name, **scheme.options).plan(probe.model, probe.calibration) for name in pool}
    measure, leaves = probe.distances(probe.layers - 1), []
    total, done = sum(len(pool) ** (i + 1) for i in range(probe.layers)), 0

    def descend(names: tuple[str, ...], hidden: Tensor, test: Tensor) -> None:
        nonlocal done
        i = len(names)
        if i == probe.layers:
            nll = probe.test.nll(test)
            leaves.append({"choices": list(names), "perplexity": probe.perplexity(nll),
                           "calibration_nll": sum(probe.calib.nll(hidden)) / hidden[:, 1:, 0].numel(),
                           **measure(hidden)})
            return
        view = probe.calib.view(i, hidden)
        for name in pool:
            edit = rules[name][i].quantize(view)
            done += 1
            context.tell(done / total, f"assignment {len(leaves) + 1} of {len(pool) ** probe.layers}")
            descend((*names, name), view.after(edit).outputs(), probe.test.step(i, test, edit))
            view.forget(edit)

    descend((), probe.calib.states[0], probe.test.states[0])
    return {"pool": list(pool), "leaves": leaves}


# ---------------------------------------------------------------------------------------------- single swaps


def swaps(probe: Probe, scheme: Scheme, context: Any, pool: Sequence[str], requantize: bool = True,
          score_tokens: int = REFERENCE_TOKENS) -> dict[str, Any]:
    """The greedy hybrid with the choice of one layer changed at a time: its loss on the test windows.

    requantize: quantize the layers behind the change again, by their own choices, on what then reaches them; without,
    they keep the weights they had. score_tokens: on which the choice is made, the hybrid's own: where two methods lie close,
    other tokens choose otherwise, and another model than the hybrid would be exchanged in.
    """
    first = probe.calibration.sequences(score_tokens)
    rules = {name: build(name, **scheme.options).plan(probe.model, probe.calibration) for name in pool}
    hidden, test = probe.calib.states[0], probe.test.states[0]
    before, names, edits, others = [], [], [], []
    for i in range(probe.layers):
        view, measure, scores, made = probe.calib.view(i, hidden), probe.distances(i, first), {}, {}
        for name in pool:
            made[name] = rules[name][i].quantize(view)
            scores[name] = measure(view.after(made[name]).outputs()[:first])
        names.append(min(scores, key=lambda name: scores[name]["cka"]))
        before.append((hidden, test))
        edits.append(made[names[-1]])
        others.append((made, scores))
        hidden = view.after(edits[-1]).outputs()
        test = probe.test.step(i, test, edits[-1])
        context.tell(0.3 * (i + 1) / probe.layers, f"greedy choice of layer {i + 1}")
    nll = probe.test.nll(test)
    layers = []
    for i, (made, scores) in enumerate(others):
        row: dict[str, Any] = {"layer": i, "chosen": names[i], "swaps": {}}
        for name in pool:
            if name == names[i]:
                continue
            h, x = before[i]
            h, x = probe.calib.step(i, h, made[name]) if requantize else None, probe.test.step(i, x, made[name])
            for j in range(i + 1, probe.layers):
                edit = edits[j]
                if requantize:
                    view = probe.calib.view(j, h)
                    edit = rules[names[j]][j].quantize(view)
                    h = view.after(edit).outputs() if j + 1 < probe.layers else None
                x = probe.test.step(j, x, edit)
            found = probe.test.nll(x)
            row["swaps"][name] = {"nll": found, "perplexity": probe.perplexity(found),
                                  "distance": scores[name]["cka"] - scores[names[i]]["cka"]}
        layers.append(row)
        context.tell(0.3 + 0.7 * (i + 1) / probe.layers, f"swaps in layer {i + 1}")
    return {"pool": list(pool), "requantized": requantize, "layers": layers, "nll": nll,
            "perplexity": probe.perplexity(nll), "tokens": probe.test.tokens.shape[1] - 1}


# ---------------------------------------------------------------------------------------------- degradation


def degradation(probe: Probe, scheme: Scheme, context: Any, bits: Sequence[int], noise: Sequence[float],
                accuracy: str = "", documents: int | None = None) -> dict[str, Any]:
    """One layer damaged at a time, in steps: rounded to fewer bits, or noise added to its weights.

    noise: standard deviation over that of each weight matrix. accuracy: a task of lm-eval, `documents` of it. Of each
    damage: the layer's and the last layer's metrics on calibration, perplexity on the test windows, the accuracy.
    """
    harness = _Accuracy(context, accuracy, documents) if accuracy else None
    kinds = [("bits", b) for b in bits] + [("noise", s) for s in noise]
    points, last = [], probe.distances(probe.layers - 1)
    for i in range(probe.layers):
        measure = probe.distances(i)
        for kind, size in kinds:
            edit = _damaged(probe, i, kind, size, scheme)
            out = probe.calib.step(i, probe.calib.states[i], edit)
            final = probe.calib.through(i + 1, out, {}) if i + 1 < probe.layers else out
            nll = probe.test.nll(probe.test.through(i, probe.test.states[i], {i: edit}))
            points.append({"layer": i, "kind": kind, "size": size, "perplexity": probe.perplexity(nll),
                           "own": measure(out), "final": last(final),
                           **({"accuracy": harness(i, edit)} if harness else {})})
            context.tell(len(points) / (len(kinds) * probe.layers), f"layer {i + 1}, {kind} {size}")
    full = {"full_accuracy": harness(0, LayerEdit())} if harness else {}
    return {"points": points, "accuracy_task": accuracy, **full}


def _damaged(probe: Probe, i: int, kind: str, size: float, scheme: Scheme) -> LayerEdit:
    view = probe.calib.views[i]
    if kind == "bits":
        edit = build("rtn", wbits=int(size), abits=16, group_size=scheme.weight.group_size or 0).quantize(view)
        return LayerEdit(edit.params)
    generator = torch.Generator().manual_seed(1000 * i + int(1000 * size))
    params = {}
    for site in view.sites:
        for name in site.linears:
            weight = view.weight(name)
            drawn = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
            params[f"{name}.weight"] = weight + size * weight.std() * drawn
    return LayerEdit(params)


class _Accuracy:
    """The accuracy of the model on a task of lm-eval while one layer is edited; the layer is put back afterwards."""

    def __init__(self, context: Any, task: str, documents: int | None):
        from suite.adapter import PTQ

        limit = min(filter(None, (documents, context.job.limit)), default=None)
        self._task, self._tests = task, evaluation.Tasks([task], limit)
        self._model = context.loaded.model
        self._harness = PTQ(self._model, tokenizer=context.loaded.tokenizer)

    def __call__(self, i: int, edit: LayerEdit) -> float:
        layer, kept = arch.layers(self._model)[i], {}
        try:
            for key, value in edit.params.items():
                kept[key] = layer.get_parameter(key)
                _set(layer, key, nn.Parameter(value, requires_grad=False))
            found = evaluation.outcome_of(self._task,
                                           evaluation.evaluate_quietly(self._harness, self._tests, self._task))
            return found["metrics"][found["headline"]]["value"]
        finally:
            for key, value in kept.items():
                _set(layer, key, value)


def _set(layer: nn.Module, key: str, value: nn.Parameter) -> None:
    module, _, attribute = key.rpartition(".")
    setattr(layer.get_submodule(module), attribute, value)


# ---------------------------------------------------------------------------------------------- linear reconstruction


def reconstruction(probe: Probe, scheme: Scheme, context: Any, bits: Sequence[int], ridge: float = 1e-4
                   ) -> dict[str, Any]:
    """One layer rounded at a time, and a linear map behind it that was fitted to bring its output back.

    The map is fitted by ridge regression on the first half of the calibration sequences; CKA is that of the second
    half, perplexity that of the test windows. Then all layers together, each map fitted behind those before it.
    ridge: over the mean of the diagonal of X'X.
    """
    half, rows = len(probe.calibration.tokens) // 2, []
    work = [(b, i) for b in bits for i in (*range(probe.layers), None)]
    for done, (b, only) in enumerate(work):
        x, y = probe.test.states[only or 0], probe.test.states[only or 0]  # without the map, with it
        h, g = probe.calib.states[only or 0], probe.calib.states[only or 0]
        layers = range(probe.layers) if only is None else [only]
        for i in layers:
            edit = _damaged(probe, i, "bits", b, scheme)
            h, g = probe.calib.step(i, h, edit), probe.calib.step(i, g, edit)
            x, y = probe.test.step(i, x, edit), probe.test.step(i, y, edit)
            fitted = fit(g[:half], probe.calib.states[i + 1][:half], ridge)
            g, y = fitted(g), fitted(y)
        measure = distances(probe.calib.states[layers[-1] + 1][half:])
        before, after = measure(h[half:]), measure(g[half:])
        ends = [probe.test.nll(probe.test.through(layers[-1] + 1, end, {})) for end in (x, y)]
        told = [{**found, "nll": end, "perplexity": probe.perplexity(end)} for found, end in zip((before, after), ends)]
        rows.append({"layer": only, "bits": b, "before": told[0], "after": told[1]})
        context.tell((done + 1) / len(work), f"{b} bits, layer {only}")
    return {"rows": rows, "ridge": ridge, "tokens": probe.test.tokens.shape[1] - 1}


def fit(x: Tensor, y: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """The affine map of least squares from x (n, t, d) to y (n, t, d), shrunk towards the identity: min over M of
    |(x - mean x) M - (y - mean y)|^2 + ridge * mean diag(x'x) * |M - I|^2, in float64."""
    a, b = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    gram = a.T @ a
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = ridge * gram.diagonal().mean()
    found = torch.linalg.solve(gram + weight * eye, a.T @ b + weight * eye)  # (d, d)
    shift = mean_b - mean_a @ found
    return lambda hidden: (hidden.double() @ found + shift).to(hidden.dtype)


# ---------------------------------------------------------------------------------------------- layer statistics


def statistics(probe: Probe, scheme: Scheme, context: Any) -> dict[str, Any]:
    """Of the weights and of the inputs of each layer: outlier ratio, kurtosis, skewness.

    outlier ratio: the largest channel's largest magnitude over the median channel's; a channel is a column of the
    weight, a feature of the input. kurtosis: fourth standardised moment (3 for a normal distribution); skewness: the
    third. Per site; of a layer the tables show the largest ratio and the means of the moments.
    """
    layers = []
    for view in probe.calib.views:
        inputs: dict[str, Tensor] = {}
        module = arch.layers(probe.model)[view.index]
        handles = [module.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.setdefault(name, args[0].detach())) for site in view.sites]
        try:
            view.fed_by(view.inputs).outputs(min(16, len(probe.calibration.tokens)))
        finally:
            for handle in handles:
                handle.remove()
        row = {"layer": view.index, "inputs": {}, "weights": {}}
        for site in view.sites:
            row["inputs"][site.name] = moments(inputs[site.name].reshape(-1, inputs[site.name].shape[-1]))
            row["weights"][site.name] = moments(torch.cat([view.weight(name) for name in site.linears]))
        layers.append(row)
        context.tell(len(layers) / probe.layers, f"layer {view.index + 1}")
    return {"layers": layers}


def moments(x: Tensor) -> dict[str, float]:
    """x (n, channels).

    >>> round(moments(torch.tensor([[1.0, 10.0], [-1.0, 10.0]]))["outlier_ratio"], 3)
    1.818
    """
    x = x.double()
    largest = x.abs().amax(0)
    z = (x - x.mean()) / x.std()
    return {"outlier_ratio": float(largest.max() / largest.quantile(0.5)), "kurtosis": float((z**4).mean()),
            "skewness": float((z**3).mean())}


# ---------------------------------------------------------------------------------------------- cost


def cost(probe: Probe, scheme: Scheme, context: Any, pool: Sequence[str], candidates: Sequence[int],
         shares: Sequence[float]) -> dict[str, Any]:
    """Seconds of the greedy search by number of candidates (all layers) and by number of layers (the whole pool).

    shares: of the model's layers, the first ones. Processor seconds of this process, so that a second process beside it
    does not count; the wall's stand beside them. The calibration set is that of the probe.
    """
    layers = sorted({max(1, round(share * probe.layers)) for share in shares})
    work = [(probe.layers, p) for p in candidates] + [(count, len(pool)) for count in layers]
    rows = []
    for done, (count, size) in enumerate(dict.fromkeys(work)):
        model = _truncated(context, count)
        method = build("cka-hybrid", pool="|".join(pool[:size]), **scheme.options)
        with provenance.Meter() as meter:
            start, wall = time.process_time(), time.perf_counter()
            quantize_model(method, model, probe.calibration)
            seconds = time.process_time() - start
        rows.append({"layers": count, "candidates": size, "seconds": seconds, "wall": time.perf_counter() - wall,
                     "peak_memory_mib": meter.told["peak_memory_mib"], "pool": list(pool[:size])})
        context.tell((done + 1) / len(work), f"{count} layers, {size} candidates")
    return {"rows": rows, "tokens": probe.calibration.tokens.numel()}


def _truncated(context: Any, count: int) -> nn.Module:
    """The model again, with its first layers only."""
    job = context.job
    model = models.load(job.model, dtype=job.dtype, device=job.device, revision=job.revision).model
    name = arch.family(model).layers
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.ModuleList(itertools.islice(arch.layers(model), count)))
    model.config.num_hidden_layers = count
    return model


FUNCTIONS = {"exhaustive": exhaustive, "swaps": swaps, "degradation": degradation, "reconstruction": reconstruction,
             "statistics": statistics, "cost": cost}
