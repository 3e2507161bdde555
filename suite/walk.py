"""The walk through the decoder layers: the only code that hooks, runs or writes a model.

`walk` yields one view per unit of consecutive layers; `commit` applies an edit; `quantize_model` joins them with a
method's plan. Everything is lazy: a method that asks for nothing (round-to-nearest) causes no calibration pass at all.

Letters: n sequences, t tokens each, d hidden width.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from suite import arch, depot, layer_state, resume
from suite.calib import Calibration
from suite.cka import CKA
from suite.errors import PTQError
from suite.linear import QuantLinear, RoundedLinear, TokenRounding
from suite.method import LayerEdit, LinearQuant, Site, edit_of

REFERENCE_TOKENS = 16384  # tokens on which layer outputs are compared with the unquantized model's
SAMPLE_TOKENS = 2048  # tokens on which `scope_outputs` runs; AWQ's own search uses a sample of this order


Feed = Callable[..., Tensor]  # the hidden states that enter a layer; called with a number: of the first sequences only


class LayerView:
    """One decoder layer and the calibration data that reaches it; see `suite.method.LayerView` for the contract."""

    layers_spanned = 1

    def __init__(self, index: int, layer: nn.Module, sites: Sequence[Site], kwargs: Mapping[str, Any], step: int,
                 inputs: Feed, reference: Callable[[], Tensor], edit: LayerEdit | None = None):
        self.index, self.sites, self._layer, self._kwargs, self._step = index, tuple(sites), layer, kwargs, step
        self._inputs, self._reference, self._edit = inputs, reference, edit or LayerEdit()
        self._original = dict(layer.named_parameters())
        self._outputs: Tensor | None = None
        self._stats: dict[tuple[str, str], Tensor] = {}
        self._scope_calls: dict[str, tuple[tuple, dict]] = {}
        self._children: dict[tuple[int, int], tuple[LayerEdit, LayerView]] = {}

    # ------------------------------------------------------------------ reading

    @property
    def reference(self) -> Tensor:
        return self._reference().to(self.device)

    def weight(self, name: str) -> Tensor:
        return self._parameter(f"{name}.weight").detach()

    def bias(self, name: str) -> Tensor | None:
        key = f"{name}.bias"
        return self._parameter(key).detach() if key in self._original else None

    def _parameter(self, key: str) -> Tensor:
        return self._edit.params[key] if key in self._edit.params else self._original[key]

    def inputs(self, first: int | None = None) -> Tensor:
        """(n, t, d) hidden states that enter the layer; of the first sequences only, if asked."""
        return self._inputs(first)

    # ------------------------------------------------------------------ running

    @torch.no_grad()
    def outputs(self, first: int | None = None) -> Tensor:
        done = 0 if self._outputs is None else len(self._outputs)
        if self._outputs is None or first is None or first > done:
            hidden, run = self._prepare(first)
            if len(hidden) > done:
                before = [self._outputs] if done else []
                with self._rounding():
                    fresh = (run(batch) for batch in hidden[done:].split(self._step))
                    self._outputs = depot.gather(len(hidden), itertools.chain(before, fresh), first is None)
        return self._outputs if first is None else self._outputs[:first].to(self.device)

    @property
    def device(self) -> torch.device:
        return next(iter(self._original.values())).device

    def stat(self, kind: str, site: Site) -> Tensor:
        if (kind, site.name) not in self._stats:
            if kind not in ("gram", "absmax", "absmean"):
                raise ValueError(f"no statistic {kind!r}: there are gram, absmax, absmean")
            self._gather()
        return self._stats[kind, site.name]

    @torch.no_grad()
    def _gather(self) -> None:
        """One pass over the calibration tokens that fills every statistic of every site, and the sample for AWQ's scopes."""
        hidden, run = self._prepare()
        batches = hidden.split(self._step)
        sampled, handles = len(batches[0]), []
        with contextlib.ExitStack() as sampling:
            for site in self.sites:  # set first: what is kept are the arguments before any rounding
                sampling.enter_context(self._recorded(site))
            try:
                handles += [self._layer.get_submodule(site.linears[0]).register_forward_pre_hook(self._collect(site))
                            for site in self.sites]
                with self._rounding():
                    for k, batch in enumerate(batches):
                        with contextlib.suppress(_Seen):
                            run(batch)
                        if k == 0:
                            sampling.close()
            finally:
                for handle in handles:
                    handle.remove()
        for site in self.sites:
            for kind in ("gram", "absmean"):
                self._stats[kind, site.name] /= hidden.shape[0] * hidden.shape[1]
        keep = max(1, min(sampled, SAMPLE_TOKENS // hidden.shape[1]))
        self._scope_calls = {name: (tuple(_head(a, keep, sampled) for a in args),
                                    {k: _head(a, keep, sampled) for k, a in kw.items()})
                             for name, (args, kw) in self._scope_calls.items()}

    def _collect(self, site: Site) -> Callable:
        def hook(_, args):
            x = args[0].reshape(-1, args[0].shape[-1]).float()  # (tokens, in)
            magnitude = x.abs()
            for kind, value in (("gram", x.T @ x), ("absmean", magnitude.sum(0))):
                key = (kind, site.name)
                self._stats[key] = self._stats[key].add_(value) if key in self._stats else value
            largest, key = magnitude.amax(0), ("absmax", site.name)
            self._stats[key] = torch.maximum(self._stats[key], largest) if key in self._stats else largest
            if site == self.sites[-1]:
                raise _Seen

        return hook

    @contextlib.contextmanager
    def _recorded(self, site: Site):
        """Keeps the arguments of the site's scope, as the layer itself calls it."""
        def hook(_, args, kwargs):
            self._scope_calls[site.scope] = (args, kwargs)

        handle = self._layer.get_submodule(site.scope).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def scope_outputs(self, site: Site, params: Mapping[str, Tensor]) -> Tensor:
        if site.scope not in self._scope_calls:
            self._gather()
        args, kwargs = self._scope_calls[site.scope]
        prefix = site.scope + "."
        names = [key for key in self._original if key.startswith(prefix)]
        merged = {key[len(prefix):]: params[key] if key in params else self._parameter(key) for key in names}
        out = functional_call(self._layer.get_submodule(site.scope), merged, args, kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _prepare(self, first: int | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inputs and a function that runs the layer. Both are computed lazily, by running parts of the model: that
        must be over before hooks are set, which would count those runs as well.

        Raises RuntimeError if the layer was written since the view was made: it would show that layer, edited again."""
        now = dict(self._layer.named_parameters())
        if now.keys() != self._original.keys() or any(now[key] is not value for key, value in self._original.items()):
            raise RuntimeError(f"layer {self.index} was written after this view was made: read the view before commit")
        hidden, params, kwargs = self.inputs(first), dict(self._edit.params), dict(self._kwargs)
        device = self.device

        def run(batch: Tensor) -> Tensor:
            out = functional_call(self._layer, params, (batch.to(device),), kwargs)
            return out[0] if isinstance(out, tuple) else out

        return hidden, run

    @contextlib.contextmanager
    def _rounding(self):
        """Activation rounding of the linears that this view has quantized."""
        handles = []
        for site in self.sites:
            shared: dict[Any, TokenRounding] = {}
            for name in site.linears:
                act = self._edit.linears[name].act if name in self._edit.linears else None
                if act is not None:
                    rounding = shared.setdefault(act, TokenRounding(act))
                    handles.append(self._layer.get_submodule(name).register_forward_pre_hook(
                        lambda _, args, rounding=rounding: (rounding(args[0]), *args[1:])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ variations

    def after(self, edit: LayerEdit) -> LayerView:
        if _key(edit) not in self._children:
            child = LayerView(self.index, self._layer, self.sites, self._kwargs, self._step, self._inputs,
                              self._reference, self._edit | edit)
            self._children[_key(edit)] = (edit, child)
        return self._children[_key(edit)][1]

    def forget(self, edit: LayerEdit) -> None:
        """Frees the outputs of a variation that is no longer of interest."""
        self._children.pop(_key(edit), None)

    def fed_by(self, inputs: Feed) -> LayerView:
        """The same layer with other inputs."""
        return LayerView(self.index, self._layer, self.sites, self._kwargs, self._step, inputs, self._reference, self._edit)

    def settled(self, edit: LayerEdit) -> Feed:
        """The outputs after `edit` was written: those already computed, else what the written layer will put out."""
        written = LayerView(self.index, self._layer, self.sites, self._kwargs, self._step, self._inputs, self._reference)
        written._outputs = self.after(edit)._outputs  # what was scored is not run again, the rest runs as written
        return _Once(written.outputs)

    def on(self, device: torch.device) -> LayerView:
        """A twin on a device, with weights and statistics of its own: what is done to it touches nothing of this view,
        so that several threads may each work on one. Inputs are computed here, once."""
        self.inputs()
        return self._twin(device)

    def _twin(self, device: torch.device) -> LayerView:
        return LayerView(self.index, copy.deepcopy(self._layer).to(device), self.sites, _moved(dict(self._kwargs), device),
                         self._step, self._inputs, self._reference, self._edit.to(device))

    def adopt(self, edit: LayerEdit, twin: LayerView) -> None:
        """Takes what a twin has put out after the same edit as the outputs after `edit` here."""
        self.after(edit)._take(twin)

    def _take(self, twin: LayerView) -> None:
        outputs = twin._outputs
        # What stands in host memory or a file (suite.depot) stays there.
        self._outputs = outputs.to(self.device) if outputs is not None and outputs.device == twin.device else outputs

    def quantize_with(self, rules: Sequence[Any]) -> LayerEdit:
        """The edit of one rule per layer spanned: here one."""
        (rule,) = rules
        return edit_of(rule, self)

    def parts(self, edit: LayerEdit) -> list[tuple[LayerView, LayerEdit]]:
        """Each layer spanned, with its share of an edit."""
        return [(self, edit)]


class BlockView:
    """k consecutive layers seen as one: the same contract, with the position in the block before every name ("0.mlp...").

    full: each layer's rule sees what the unquantized model feeds that layer, also inside the block.
    """

    def __init__(self, layers: Sequence[LayerView], full: bool = False):
        chained = [layers[0]]
        for layer in layers[1:]:
            chained.append(layer if full else layer.fed_by(chained[-1].outputs))
        self._set(chained, full)

    def _set(self, layers: Sequence[LayerView], full: bool = False) -> None:
        self.layers, self.index, self.layers_spanned, self._full = list(layers), layers[0].index, len(layers), full
        self._children: dict[tuple[int, int], tuple[LayerEdit, BlockView]] = {}
        self.sites = tuple(Site(f"{j}.{s.name}", tuple(f"{j}.{n}" for n in s.linears),
                                f"{j}.{s.feeder}" if s.feeder else None, f"{j}.{s.scope}")
                           for j, layer in enumerate(layers) for s in layer.sites)

    @classmethod
    def _of(cls, layers: Sequence[LayerView]) -> BlockView:
        view = cls.__new__(cls)
        view._set(layers)
        return view

    def _at(self, name: str) -> tuple[LayerView, str]:
        j, inner = name.split(".", 1)
        return self.layers[int(j)], inner

    def _site(self, site: Site) -> tuple[LayerView, Site]:
        layer, name = self._at(site.name)
        return layer, next(s for s in layer.sites if s.name == name)

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def reference(self) -> Tensor:
        return self.layers[-1].reference

    def inputs(self, first: int | None = None) -> Tensor:
        return self.layers[0].inputs(first)

    def weight(self, name: str) -> Tensor:
        layer, name = self._at(name)
        return layer.weight(name)

    def bias(self, name: str) -> Tensor | None:
        layer, name = self._at(name)
        return layer.bias(name)

    def stat(self, kind: str, site: Site) -> Tensor:
        layer, site = self._site(site)
        return layer.stat(kind, site)

    def scope_outputs(self, site: Site, params: Mapping[str, Tensor]) -> Tensor:
        layer, inner = self._site(site)
        return layer.scope_outputs(inner, {k.split(".", 1)[1]: v for k, v in params.items()})

    def outputs(self, first: int | None = None) -> Tensor:
        return self.layers[-1].outputs(first)

    def after(self, edit: LayerEdit) -> BlockView:
        if _key(edit) not in self._children:
            layers, feed = [], self.layers[0].inputs
            for layer, part in self.parts(edit):
                layers.append(layer.fed_by(feed).after(part))
                feed = layers[-1].outputs
            self._children[_key(edit)] = (edit, self._of(layers))
        return self._children[_key(edit)][1]

    def forget(self, edit: LayerEdit) -> None:
        self._children.pop(_key(edit), None)

    def quantize_with(self, rules: Sequence[Any]) -> LayerEdit:
        """The edit of one rule per layer; its outputs are those of each layer fed by the quantized ones before it."""
        edits, layers, feed = [], [], self.layers[0].inputs
        for layer, rule in zip(self.layers, rules, strict=True):
            fed = layer.fed_by(feed)
            edits.append(edit_of(rule, layer if self._full else fed))
            layers.append(fed.after(edits[-1]))
            feed = layers[-1].outputs
        whole = LayerEdit({f"{j}.{k}": v for j, e in enumerate(edits) for k, v in e.params.items()},
                          {f"{j}.{k}": v for j, e in enumerate(edits) for k, v in e.linears.items()},
                          {"layers": [dict(e.note) for e in edits]})
        self._children[_key(whole)] = (whole, self._of(layers))  # its outputs are there already
        return whole

    def on(self, device: torch.device) -> BlockView:
        first, *others = self.layers  # unless full, the inner ones are fed by each other: by the twins
        return BlockView([first.on(device), *(layer.on(device) if self._full else layer._twin(device) for layer in others)],
                         self._full)

    def adopt(self, edit: LayerEdit, twin: BlockView) -> None:
        for layer, other in zip(self.after(edit).layers, twin.layers, strict=True):
            layer._take(other)

    def settled(self, edit: LayerEdit) -> Feed:
        feed: Feed = self.layers[0].inputs
        for edited in self.after(edit).layers:
            written = LayerView(edited.index, edited._layer, edited.sites, edited._kwargs, edited._step, feed,
                                edited._reference)
            written._outputs = edited._outputs
            feed = _Once(written.outputs)
        return feed

    def parts(self, edit: LayerEdit) -> list[tuple[LayerView, LayerEdit]]:
        notes = edit.note.get("layers", [{}] * len(self.layers))
        shared = {k: v for k, v in edit.note.items() if k != "layers"}
        out = []
        for j, layer in enumerate(self.layers):
            cut = f"{j}."
            out.append((layer, LayerEdit({k[len(cut):]: v for k, v in edit.params.items() if k.startswith(cut)},
                                         {k[len(cut):]: v for k, v in edit.linears.items() if k.startswith(cut)},
                                         {**notes[j], **shared})))
        return out


# ---------------------------------------------------------------------------------------------- the walk


@torch.no_grad()
def layer_kwargs(model: nn.Module, tokens: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments that the model passes to each decoder layer for one sequence (1, t).

    Captured for every layer, since masks and rotary inputs may differ between layers; they broadcast over sequences.
    No layer runs, nor the head: what a layer is told does not depend on what the one before it puts out.
    Raises PTQError if the layers are not fed by the embedding alone.
    """
    calls: list[tuple[Tensor, dict]] = []

    def record(*args, **kwargs):
        calls.append((args[0] if args else kwargs["hidden_states"], kwargs))
        return calls[-1][0]

    layers = list(arch.layers(model))
    try:
        for layer in layers:
            layer.forward = record
        model.base_model(tokens[:1], use_cache=False)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    if not torch.equal(calls[0][0], arch.embedding(model)(tokens[:1])):
        raise PTQError(f"{model.config.model_type!r} changes the embeddings before the first decoder layer: "
                       f"not supported")
    return [{k: v for k, v in kwargs.items() if k != "hidden_states"} for _, kwargs in calls]


@dataclass(frozen=True)
class Live:
    """Where a walk is continued: the first layer that is not done, what feeds it, and what feeds it in the unquantized
    model; None where nothing reads that."""

    done: int
    quantized: Tensor | None
    full: Tensor | None


def walk(model: nn.Module, calib: Calibration | None, block: int = 1, reference: int | bool = 0,
         inputs: str = "quantized", live: Live | None = None) -> Iterator[Any]:
    """Yields a view of each unit of `block` consecutive decoder layers, first to last.

    reference: of how many calibration sequences the unquantized model's hidden states are kept, for views whose
    `reference` is read; True: of all.
    inputs: "quantized": what the layers as committed so far put out; "full": what the unquantized model puts out.
    live: where to continue; the layers before it must be written already.

    Raises PTQError for an unknown input policy or a block size below 1; a view raises it when calibration data is
    needed and `calib` is None.
    """
    if inputs not in ("quantized", "full"):
        raise PTQError(f"input policy {inputs!r}: allowed are 'quantized' and 'full'")
    layers, sites = list(arch.layers(model)), arch.sites(model)
    if block < 1:
        raise PTQError(f"block is {block}: allowed are 1 to {len(layers)}")
    device = arch.embedding(model).weight.device
    kwargs = _Once(lambda: layer_kwargs(model, _tokens(calib, device)))
    step = calib.step() if calib is not None else 1
    embedded = _Once(lambda: _embed(model, _tokens(calib, device), step))
    kept = len(calib.tokens) if calib is not None and (reference is True or inputs == "full") else int(reference)

    quantized_feed: Feed = embedded
    full_feed: Feed = _Once(lambda embedded=embedded: embedded(kept))
    no_output = _no_reference if calib is not None else embedded  # which says that calibration data is needed
    del embedded  # its tokens live as long as something is fed by them
    if live is not None:
        if live.quantized is not None:
            quantized_feed = _given(depot.gather(len(live.quantized), (x.to(device) for x in live.quantized.split(step))))
        full_feed = _given(live.full.to(device, copy=True)) if live.full is not None else no_output
    holder = arch.layers(model)
    bring, release = getattr(holder, "bring", None), getattr(holder, "release", None)  # of suite.stream
    for start in range(live.done if live else 0, len(layers), block):
        views, unit = [], range(start, min(start + block, len(layers)))
        for i in unit:
            if bring:
                bring(i)
            output = no_output
            if kept:
                unquantized = LayerView(i, layers[i], sites, _Lazy(kwargs, i), step, full_feed, _no_reference)
                # A feed may leave the device; the first sequences, which are compared, do not.
                output = _Once(unquantized.outputs if inputs == "full" else partial(unquantized.outputs, kept))
            feed = full_feed if inputs == "full" else quantized_feed
            views.append(LayerView(i, layers[i], sites, _Lazy(kwargs, i), step, feed, output))
            full_feed = output
        view = views[0] if block == 1 else BlockView(views, inputs == "full")
        if kept:
            view.reference  # now, while the layers are unquantized
        yield view
        quantized_feed = getattr(view, "committed", None) or _Once(view.outputs)
        if release and calib is not None:
            quantized_feed()  # now, while the layers are there
        del views, view  # with them go the statistics and the candidates' outputs
        if release:
            for i in unit:
                release(i)


class _Seen(Exception):
    """Ends the run of a layer once its last site has been seen."""


def _key(edit: LayerEdit) -> tuple[int, int]:
    """What decides the outputs of an edit: a note added to it changes nothing. The memo keeps both mappings alive."""
    return id(edit.params), id(edit.linears)


class _Once:
    """A value computed at the first call."""

    def __init__(self, compute: Callable[[], Any]):
        self._compute, self._value = compute, None

    def __call__(self, first: int | None = None):
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value if first is None else self._value[:first]


@torch.no_grad()
def _embed(model: nn.Module, tokens: Tensor, step: int) -> Tensor:
    return depot.gather(len(tokens), (arch.embedding(model)(batch) for batch in tokens.split(step)))


def _given(value: Tensor) -> Feed:
    return _Once(lambda: value)


class _Lazy(Mapping):
    """The keyword arguments of layer i, captured when first looked at."""

    def __init__(self, all_kwargs: _Once, index: int):
        self._all, self._index = all_kwargs, index

    def __getitem__(self, key):
        return self._all()[self._index][key]

    def __iter__(self):
        return iter(self._all()[self._index])

    def __len__(self):
        return len(self._all()[self._index])


def _tokens(calib: Calibration | None, device: torch.device) -> Tensor:
    if calib is None:
        raise PTQError("this method needs calibration data: pass --calib embedded, a text file, or a set")
    return calib.tokens.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    """The arguments of a layer on a device: tensors, in tuples and dicts too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    return tuple(_moved(one, device) for one in value) if type(value) in (tuple, list) else value


def _no_reference() -> Tensor:
    raise RuntimeError("the unquantized outputs were not kept: set reference_tokens on the rule that reads them")


def _head(value: Any, keep: int, n: int) -> Any:
    """The first `keep` sequences of whatever runs over the n sequences of a batch."""
    return value[:keep] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == n else value


# ---------------------------------------------------------------------------------------------- writing


def commit(model: nn.Module, view: Any, edit: LayerEdit) -> None:
    """Writes an edit into the model: the only writer.

    A quantized linear is replaced by one that holds its codes and scales; other parameters are replaced by new ones.
    Raises PTQError, before anything is written, for an edit that breaks the protocol.
    """
    parts = view.parts(edit)
    for layer_view, part in parts:
        _check(layer_view, part)
    view.after(edit)  # while the layer is still the original
    for layer_view, part in parts:
        layer = arch.layers(model)[layer_view.index]
        for key, value in part.params.items():
            module, _, attribute = key.rpartition(".")
            old = getattr(layer.get_submodule(module), attribute)
            setattr(layer.get_submodule(module), attribute, nn.Parameter(value.detach(), requires_grad=old.requires_grad))
        for site in layer_view.sites:
            shared: dict[Any, TokenRounding] = {}
            for name in site.linears:
                _replace(layer, name, part.linears[name], shared)
    view.committed = view.settled(edit)


def _replace(layer: nn.Module, name: str, quant: LinearQuant, shared: dict[Any, TokenRounding]) -> None:
    linear = layer.get_submodule(name)
    if quant.grid is None and quant.act is None:
        return
    rounding = shared.setdefault(quant.act, TokenRounding(quant.act))
    new = (RoundedLinear(linear, rounding) if quant.grid is None
           else QuantLinear.of(linear.weight.detach(), quant.grid, linear.bias, rounding))
    parent, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(parent), attribute, new.train(linear.training))


def _check(view: LayerView, edit: LayerEdit) -> None:
    where = f"layer {view.index}"
    wanted = {name for site in view.sites for name in site.linears}
    if wanted != set(edit.linears):
        missing, extra = sorted(wanted - set(edit.linears)), sorted(set(edit.linears) - wanted)
        raise PTQError(f"{where}: the edit must declare every linear of every site"
                       + (f"; missing: {', '.join(missing)}" if missing else "")
                       + (f"; unknown: {', '.join(extra)}" if extra else ""))
    for key, value in edit.params.items():
        if key not in view._original:
            raise PTQError(f"{where}: the edit changes {key!r}, which the layer does not have: "
                           f"it has {', '.join(sorted(view._original))}")
        old = view._original[key]
        if value.shape != old.shape or value.dtype != old.dtype:
            raise PTQError(f"{where}: {key} became {tuple(value.shape)} {value.dtype}, "
                           f"must stay {tuple(old.shape)} {old.dtype}")
        if not torch.isfinite(value).all():
            raise PTQError(f"{where}: {key} has values that are not finite after quantization")


# ---------------------------------------------------------------------------------------------- whole model


def quantize_model(method: Any, model: nn.Module, calib: Calibration | None,
                   progress: Callable[[int, int, str], None] | None = None,
                   diagnostics: bool = False, inputs: str = "quantized") -> list[dict[str, Any]]:
    """Quantizes a model in place by a method's plan; returns one record per decoder layer.

    calib may be None for a method that asks for no statistics. progress(done, total, text) is called after each layer.
    diagnostics: also compare each quantized layer's output with the unquantized model's (1 - CKA, relative MSE).

    A record: {"layer", "seconds", "bits" (effective, scales counted), "weights" (how many), "errors" (with diagnostics),
    and the note of the method's edit}.

    Raises PTQError for a plan or an edit that breaks the protocol, and whatever the method raises for bad data.
    """
    block = getattr(method, "block", 1)
    total = len(arch.layers(model))
    _check_groups(method, model)
    was_training = model.training
    model.eval()
    try:
        start = time.perf_counter()
        rules = method.plan(model, calib)
        planning = time.perf_counter() - start
        if not isinstance(rules, Sequence):
            raise PTQError(f"expected {type(method).__name__}.plan(model, calib) -> Sequence[LayerMethod], "
                           f"found {type(rules).__name__}: return one rule for each unit of layers")
        if len(rules) != -(-total // block):
            raise PTQError(f"the plan has {len(rules)} rules, the model {total} layers in units of {block}: "
                           f"{-(-total // block)} rules expected")
        reference = max([REFERENCE_TOKENS if diagnostics else 0] + [getattr(rule, "reference_tokens", 0) for rule in rules])
        reference = calib.sequences(reference) if calib is not None else 0
        kept = _Kept(method, model, calib)
        records = kept.restore_()
        if records and progress:
            progress(len(records), total, "continued")
        units = rules[len(records) // block:] if len(records) < total else []
        for rule, view in zip(units, walk(model, calib, block, reference, inputs, kept.live)):  # no rule left: no walk
            start = time.perf_counter()
            edit = edit_of(rule, view)
            commit(model, view, edit)
            seconds = time.perf_counter() - start + (planning if not records else 0.0)
            records += _records(view, edit, seconds, diagnostics and calib is not None)
            kept.save(view, records, reference or inputs == "full", total)
            if progress:
                progress(len(records), total, str(edit.note.get("chosen", "")))
            del view, edit  # with all their tensors, before the next layer is quantized
        return records
    finally:
        model.train(was_training)


class _Kept:
    """What a run keeps of its finished layers in its workspace, if it has one (suite.resume), and continues from.

    States "layer-000", ...: the layers as written; "live": how many are done, their records, and the activations that
    feed the next one. Layers that take less than some seconds are saved several at a time. A method that reads no
    calibration data is quicker done again. Of a streamed model (suite.stream) every layer is kept: it is nowhere else.
    """

    def __init__(self, method: Any, model: nn.Module, calib: Calibration | None):
        self._streamed = hasattr(arch.layers(model), "release")
        useful = self._streamed or calib is not None and getattr(method, "needs_calibration", True)
        self._workspace = resume.current() if useful else None
        if self._streamed and self._workspace is None:
            raise PTQError("a model that is read layer by layer can be quantized into a folder only: `ptq quantize`")
        self._model, self._calib, self._saved, self.live = model, calib, 0, None

    def restore_(self) -> list[dict[str, Any]]:
        """Writes the finished layers into the model; returns their records, none for a new run."""
        state = self._workspace and self._workspace.load("live")
        if not state:
            if self._workspace:
                self._workspace.due("live")  # the clock runs from here
            return []
        for i in range(0 if self._streamed else state["done"]):
            layer_state.put_(self._model, i, self._workspace.load(f"layer-{i:03d}"))
        self._saved = state["done"]
        self.live = Live(state["done"], state["quantized"], state["full"])
        return json.loads(state["records"])

    def save(self, view: Any, records: Sequence[Mapping[str, Any]], has_reference: bool, total: int) -> None:
        """After a unit: its layers, then the rest, so that what is counted as done is there."""
        done = len(records)
        if self._workspace is None or not (self._streamed or done == total or self._workspace.due("live")):
            return
        for i in range(self._saved, done):
            self._workspace.save(f"layer-{i:03d}", layer_state.take(arch.layers(self._model)[i]))
        last = done == total or self._calib is None  # nothing is fed any more
        self._workspace.save("live", {
            "done": done, "records": json.dumps(records), "quantized": None if last else view.committed(),
            "full": view.reference if has_reference and not last else None})
        self._saved = done


def totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the layers' notes: bits per weight, scales included, and the seconds of all.

    >>> totals([{"weights": 1, "bits": 4, "seconds": 2.0}, {"weights": 3, "bits": 8, "seconds": 1.0}])
    {'bits': 7.0, 'seconds': 3.0}
    """
    weights = sum(layer["weights"] for layer in layers)
    return {"bits": sum(layer["bits"] * layer["weights"] for layer in layers) / weights,
            "seconds": sum(layer["seconds"] for layer in layers)}


def _check_groups(method: Any, model: nn.Module) -> None:
    """A group size that divides no width is found before any work, not at the layer that has it."""
    layer = arch.layers(model)[0]
    for site in arch.sites(model):
        for name in site.linears:
            if method.scheme.weight.quantized:
                method.scheme.weight.groups(layer.get_submodule(name).weight.shape[1], name)


def _records(view: Any, edit: LayerEdit, seconds: float, diagnostics: bool) -> list[dict[str, Any]]:
    records = []
    for layer_view, part in view.parts(edit):
        counts = {name: layer_view._original[f"{name}.weight"] for name in part.linears}
        weights = sum(w.numel() for w in counts.values())
        bits = sum(w.numel() * (q.grid.spec.effective_bits(w.shape[1]) if (q := part.linears[name]).grid else 16.0)
                   for name, w in counts.items())
        records.append({**part.note, "layer": layer_view.index, "seconds": seconds / view.layers_spanned,
                        "weights": weights, "bits": bits / weights})  # what is counted here, no note overrides
    if diagnostics:
        reference = view.reference
        out = view.committed(len(reference))
        difference = (out - reference).double().pow(2).sum() / reference.double().pow(2).sum()
        records[-1]["errors"] = {"cka": CKA(reference).distance(out), "mse": float(difference)}
    return records
