"""The model `ptq` of lm-eval: quantizes on loading, and answers like any Hugging Face model; and the window tasks.

    lm_eval.simple_evaluate(model="ptq", model_args="pretrained=tiny-llama-s,method=gptq,wbits=4,abits=8", tasks=[...],
                            task_manager=suite.adapter.task_manager())

All arguments of lm-eval's `HFLM` that make sense for a model quantized here keep their meaning; the others are refused,
so that no argument is without effect. Everything else is an option of the method.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval.filters
import lm_eval.tasks
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.models.huggingface import HFLM
from torch import nn

from suite import arch, checkpoint, hub, kv, models, paths, plugins, preflight, sandbox, trust, walk, windows
from suite import calib as calibration
from suite import method as methods
from suite.errors import PTQError, unknown
from suite.grid import UNQUANTIZED_BITS
from suite.linear import QuantLinear
from suite.progress import Progress
from suite.provenance import several_processes

log = logging.getLogger(__name__)

LONGEST = 2048  # tokens of a sequence for which the automatic batch size reckons
HUB_SOURCE = "wikitext2"  # calibrates models of the hub; all others the embedded text, which needs no hub
MODES = ("matched", "native")
AUTO_BATCH_TOKENS = 16_384  # tokens run at once where the batch size is left to the suite

# What HFLM does with a model that it loads itself, and silently leaves undone with one that it is given.
_REFUSED = {
    "parallelize": "the model is loaded by the suite", "tp_plan": "the model is loaded by the suite",
    "max_memory_per_gpu": "the model is loaded by the suite", "max_cpu_memory": "the model is loaded by the suite",
    "offload_folder": "the model is loaded by the suite", "subfolder": "give the subfolder itself as pretrained",
    "peft": "merge the adapter into the weights first", "delta": "apply the delta to the weights first",
    "autogptq": "pass a full-precision model and method=gptq",
    "gptqmodel": "pass a full-precision model and method=gptq",
    "gguf_file": "only safetensors are read",
    "use_fast_tokenizer": "the tokenizer is loaded as its folder says",
}
_HFLM_DEFAULTS = {name: p.default for name, p in inspect.signature(HFLM.__init__).parameters.items()
                  if name not in ("self", "pretrained") and p.kind is not p.VAR_KEYWORD}
_OWN = ("pretrained", "method", "plugin", "calib", "kvbits", "nsamples", "seqlen", "seed", "mode", "allow_eval_calibration",
        "trust_remote_code", "allow_pickle")


class PTQ(HFLM):
    """A language model, quantized by one of the suite's methods while it is loaded.

    pretrained: an embedded name, a folder, a quantized folder, a name or id of the hub, or a model in memory (it is
    copied before it is quantized). method: its name; None leaves the model as it is. calib, nsamples, seqlen, seed:
    the calibration text, by default the embedded one (for a model of the hub, WikiText-2's training text). mode:
    "matched", or "native" for the method's published setting.
    plugin: a file with a method of your own, see `suite.plugins.load`.
    trust_remote_code, allow_pickle: run code that the model brings; read pickled weights where it has no safetensors.
    kvbits: 2 to 8 round the key-value cache, with or without a method.
    allow_eval_calibration: let a window task run on the very text the model was calibrated on; its result says so.
    batch_size: None or "auto" on a processor: as many sequences as keep it busy. Other arguments: `HFLM`'s, and the
    options of the method (wbits, abits, group_size, damp, ...).

    Started in several processes (`accelerate launch`), each quantizes on a device of its own, which ends in the same model
    everywhere, and answers its share of the requests.

    A name with a comma in it stands in quotes on lm-eval's command line: pretrained="tiny-llama-s@outliers=8,seed=1".

    Raises PTQError: everything that `models.load`, `method.build` and `calib.load` refuse; arguments that are unknown
    (with near misses) or would have no effect.

    >>> PTQ("tiny-llama-s", method="gptq", wbits=4, abits=8).variant  # doctest: +SKIP
    'tiny-llama-s, gptq W4A8 g128'
    """

    def __init__(self, pretrained: str | nn.Module, method: str | None = None, calib: str | None = None,
                 nsamples: int | None = None, seqlen: int | None = None, seed: int | None = None, mode: str = "matched",
                 kvbits: int | None = None, allow_eval_calibration: bool = False, plugin: str | None = None,
                 batch_size: int | str | None = None,
                 device: str | None = None, dtype: str | torch.dtype | None = None, revision: str | None = None,
                 tokenizer: Any = None, trust_remote_code: bool = False, allow_pickle: bool = False, **arguments: Any):
        if plugin is not None:
            plugins.load(plugin)
        harness, options = _sort(method, arguments)
        configured, published = _configured(method, mode, options)
        calibrated = {"calib": calib, "nsamples": nsamples, "seqlen": seqlen, "seed": seed}
        if configured is None and (stray := [name for name, value in calibrated.items() if value is not None]):
            raise PTQError(f"{', '.join(stray)} without a method: name one (method=gptq), or leave them out")
        team = _team()
        if isinstance(pretrained, str):
            if "@outliers=" in pretrained and "seed=" not in pretrained and seed is not None:
                raise PTQError(f"seed={seed} beside {pretrained!r} may be meant for the outliers or for the "
                               f"calibration: write the outliers' own into the name, in quotes: "
                               f"pretrained=\"{pretrained},seed=0\",seed={seed}")
            with trust.given(trust_remote_code, allow_pickle):
                if configured is not None:
                    _check_memory(pretrained, revision, configured, published, calib, nsamples, seqlen,
                                  _device(device) if team is None else team.device, dtype)
                loaded = models.load(pretrained, dtype=dtype, device=_device(device) if team is None else team.device,
                                     revision=revision)
        else:
            loaded = _given(pretrained, dtype, device)
        if loaded.note:
            log.warning("%s", loaded.note)
        model, tokenizer = loaded.model, _tokenizer(tokenizer, loaded)
        self.calibration = None
        if configured is not None and loaded.kind == "quantized":
            raise PTQError(f"{pretrained!r} is quantized already: leave out method={method}, "
                           f"or give the full-precision model")
        if kvbits is not None:
            if loaded.kind == "quantized":
                raise PTQError(f"kvbits={kvbits}, but {pretrained!r} is quantized already, with a key-value cache of "
                               f"{kv.bits_of(model)} bits: leave it out, or quantize again with --kvbits {kvbits}")
            if loaded.kind == "given" and kv.check(kvbits) < UNQUANTIZED_BITS:
                loaded = replace(loaded, model=copy.deepcopy(model))
                model = loaded.model
            kv.set_(model, kvbits)
        if configured is not None and (configured.scheme.weight.quantized or configured.scheme.act is not None):
            if loaded.kind == "given":
                model = copy.deepcopy(model)
            source, count, length = _sampling(calib, published, loaded.kind, nsamples)
            length = windows.fit(seqlen, windows.max_positions(model), length)
            self.calibration = calibration.load(source, tokenizer, count, length, seed or 0)
            with Progress(f"{loaded.name} {method}") as line:
                self.layers = walk.quantize_model(configured, model, self.calibration,
                                                  line.layers(model.config.num_hidden_layers), inputs=published.inputs)
        else:
            self.layers = []
        self._loaded, self._configured, self.mode = loaded, configured, mode
        self.allow_eval_calibration = allow_eval_calibration
        head = arch.head(model).weight
        with _silenced(logging.getLogger("lm_eval.models.huggingface")):  # it warns of models in memory, always
            super().__init__(model, tokenizer=tokenizer, batch_size=_batch_size(batch_size, model), **harness)
        if arch.head(self.model).weight is not head:  # HFLM ties the head again where the configuration says so
            raise PTQError("lm-eval tied the head to the embedding again: the model's configuration must say "
                           "tie_word_embeddings=False once they differ")
        if team is not None:
            self._join(team)
        # Results carry this name, and the base model's own configuration stays as it is.
        self._config = copy.deepcopy(self._config)
        self._config._name_or_path = self.variant
        self.pretrained, self.revision = self.variant, revision or "main"

    def _join(self, team: Accelerator) -> None:
        """Takes part in an evaluation by several processes, which `HFLM` leaves out for a model that it is given."""
        if self._configured is not None and len(set(gather_object([models.fingerprint(self.model)]))) > 1:
            raise PTQError(f"the {team.num_processes} processes have not quantized to the same model, as on GPUs of several "
                           f"kinds: quantize first, `ptq quantize ... --out FOLDER`, and evaluate with pretrained=FOLDER")
        self.accelerator, self._rank, self._world_size = team, team.process_index, team.num_processes

    # ------------------------------------------------------------------ identity

    @property
    def variant(self) -> str:
        """The model, the method and its scheme, for people; `model_identity` is what identifies."""
        if self._configured is None:
            record = self._loaded.record
            made = f", {_made(record)}" if record is not None else ""
            return f"{self._loaded.name}{made}{self._cached}"
        native = ", native" if self.mode == "native" else ""
        made = f"{methods.name_of(self._configured)} {self._configured.scheme}{self._cached}{native}"
        return f"{self._loaded.name}, {made}"

    @property
    def _cached(self) -> str:
        bits = kv.bits_of(self.model)
        return f" KV{bits}" if bits < UNQUANTIZED_BITS else ""

    def model_identity(self) -> dict:
        """Everything that decides the answers, as JSON: model, method and options, calibration, type, tokenization."""
        digest = self._digest
        return {
            "model": {"name": self._loaded.name, "digest": digest},
            "method": None if self._configured is None else methods.to_config(self._configured),
            "mode": self.mode,
            "calibration": None if self.calibration is None else self.calibration.identity,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "mixed_precision": None if self.mixed_precision_dtype is None else str(self.mixed_precision_dtype),
            "max_length": self.max_length, "truncation": self.truncation,
            "add_bos_token": self.add_bos_token, "prefix_token_id": self.prefix_token_id,
            "kvbits": kv.bits_of(self.model),
            **({"plugins": code} if (code := self._code) else {}),
        }

    @property
    def _code(self) -> dict[str, str]:
        return {} if self._configured is None else plugins.code_of(methods.to_config(self._configured))

    @cached_property
    def _digest(self) -> str:
        return self._loaded.digest or models.digest_of(self._loaded.model)

    def get_model_info(self) -> dict:
        """What lm-eval writes into "config" of its results. Asks no hub."""
        codes = sum(module.codes.numel() for module in self.model.modules() if isinstance(module, QuantLinear))
        return {"model_name": self.variant, "model_identity": self.model_identity(), "model_sha": self._digest,
                "model_num_parameters": sum(p.numel() for p in self.model.parameters()) + codes,
                "model_dtype": str(self.model.dtype), "model_revision": self.revision,
                **({"model_trusted": list(self._loaded.trusted)} if self._loaded.trusted else {})}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Lets lm-eval's `use_cache` work for one variant per file.

        Its keys hold the request and not the model, so that a second model would be given the answers of the first: the
        file is signed with the identity of this variant. Raises PTQError for a file that another one, or an unsigned
        model, has written.
        """
        database = getattr(cache_hook, "dbdict", None)
        if database is not None:
            mine = json.dumps(self.model_identity(), sort_keys=True)
            signed = database.get(_SIGNATURE)
            if signed != mine:
                if len(database):
                    whose = "another variant" if signed else "an unnamed model"
                    raise PTQError(f"the cache {database.filename!r} holds answers of {whose}, not of {self.variant}: "
                                   f"give each variant a file of its own in use_cache, or none")
                database[_SIGNATURE] = mine
                database.commit()
        super().set_cache_hook(cache_hook)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM.generate_until`. Raises PTQError for answers that are longer than all that the model takes."""
        for request in requests:
            asked = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if asked >= self.max_length:
                raise PTQError(f"task {request.task_name} asks for answers of up to {asked} tokens, and the model takes "
                               f"{self.max_length} in all, the question among them: leave the task out")
        return super().generate_until(requests, disable_tqdm)

    # ------------------------------------------------------------------ window perplexity

    def window_nll(self, requests: Sequence[WindowRequest], disable_tqdm: bool = False) -> list[dict]:
        """As `window_nll`; refuses the text that the model was calibrated on, unless that was allowed."""
        for request in requests:
            if self._calibration_digest == windows.text_digest(request.text) and not self.allow_eval_calibration:
                raise PTQError(f"task {request.task_name} evaluates the text that the model was calibrated on: "
                               f"calibrate on another, or pass allow_eval_calibration=true, which marks the result")
        answers = window_nll(self, requests, disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            if self._calibration_digest == windows.text_digest(request.text):
                answer["protocol"]["calibrated_on_this_text"] = True
        return answers

    @property
    def _calibration_digest(self) -> str | None:
        return None if self.calibration is None else self.calibration.text_digest


_SIGNATURE = "ptq-suite variant"


def _sort(method: str | None, arguments: Mapping[str, Any]) -> tuple[dict, dict]:
    """(arguments of HFLM, options of the method). Raises PTQError for what is neither, or has no effect here."""
    allowed = methods.options_of(method) if method is not None else {}
    harness, options, mistakes = {}, {}, []
    for name, value in arguments.items():
        if name in _REFUSED:
            if value not in (None, _HFLM_DEFAULTS[name]):
                mistakes.append(f"argument {name} has no effect on model ptq: {_REFUSED[name]}")
        elif name == "backend":
            if value not in ("default", "causal"):
                mistakes.append(f"backend is {value!r}: only causal models are supported")
        elif name in _HFLM_DEFAULTS:
            harness[name] = value
        elif name in allowed:
            options[name] = value
        elif method is None and name in methods.SCHEME_OPTIONS:
            mistakes.append(f"{name} without a method: name one (method=rtn), or leave it out")
        else:
            of = f" with method {method}" if method else ""
            usable = {*_OWN, *allowed, *(set(_HFLM_DEFAULTS) - set(_REFUSED))}
            mistakes.append(str(unknown(f"argument of model ptq{of}", name, usable)))
    if mistakes:
        raise PTQError("; ".join(mistakes))
    return harness, options


def _configured(method: str | None, mode: str, options: Mapping[str, Any]) -> tuple[Any, methods.Native]:
    """The method, and the calibration that goes with the mode."""
    if mode not in MODES:
        raise unknown("mode", str(mode), MODES)
    matched = methods.Native(source="")  # of the usual size, whatever the source
    if method is None:
        if mode == "native":
            raise PTQError("mode native without a method: name one (method=gptq)")
        return None, matched
    published = methods.native(method) if mode == "native" else matched
    return methods.build(method, **{**published.options, **options}), published


def _sampling(calib: str | None, published: methods.Native, kind: str, nsamples: int | None) -> tuple[str, int, int]:
    """(source, sequences, tokens of each) of the calibration set, before it is fitted to the model."""
    source = calib or published.source or (HUB_SOURCE if kind == "hub" else calibration.EMBEDDED)
    count, length = (published.nsamples, published.seqlen) if published.source else calibration.usual_size(source)
    return source, nsamples or count, length


def _check_memory(name: str, revision: str | None, configured: Any, published: methods.Native, calib: str | None,
                  nsamples: int | None, seqlen: int | None, device: Any, dtype: Any) -> None:
    """Tells what quantizing a large model takes. Raises PTQError if it does not fit: to be evaluated, it has to stand in
    memory as a whole."""
    source = models.resolve(name, revision).fetched()
    config = preflight.config_of(source)
    if source.kind == "quantized" or config.get("hidden_size", 0) < preflight.LARGE_WIDTH:
        return
    _, count, length = _sampling(calib, published, source.kind, nsamples)
    length = windows.fit(seqlen, config.get("max_position_embeddings"), length)
    needed = preflight.quantization(source, configured, count, length, None, models.device_of(device),
                                    models.parse_dtype(dtype), load="evaluated")
    log.warning("%s %s; evaluation comes on top", source.name, needed.told())


def _device(device: str | None) -> str | None:
    """lm-eval's command line says cuda:0 where nothing was said; without a GPU that means the processor, as in HFLM."""
    if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
        log.info("device %s is not there: using the processor", device)
        return "cpu"
    return device


def _team() -> Accelerator | None:
    """The processes that `accelerate launch` or torchrun has started, of which this is one; None for one alone."""
    if not several_processes():
        return None
    patient = InitProcessGroupKwargs(timeout=timedelta(weeks=52))  # shares of unequal length wait for each other
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])


@contextlib.contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """Keeps a logger's warnings back."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _given(model: nn.Module, dtype: Any, device: str | None) -> models.Loaded:
    """A model in memory. It stays where and as it is: what would move or cast it is refused."""
    if not isinstance(model, nn.Module):
        raise PTQError(f"pretrained is a {type(model).__name__}: give a name, a folder, or a model")
    wanted = models.parse_dtype(dtype)
    if wanted not in (None, model.dtype):
        raise PTQError(f"dtype is {wanted}, the model given is {model.dtype}: cast it before")
    if device is not None and torch.device(_device(device)).type != model.device.type:
        raise PTQError(f"device is {device}, the model given is on {model.device}: move it before")
    arch.family(model)
    name = getattr(model, "name_or_path", "") or model.config.model_type
    return models.Loaded(model.eval(), None, str(name).rstrip("/").rpartition("/")[2], "", "given")


def _tokenizer(tokenizer: Any, loaded: models.Loaded) -> Any:
    if isinstance(tokenizer, str):
        return checkpoint.load_tokenizer(Path(tokenizer))
    if tokenizer is not None:
        return tokenizer
    if loaded.tokenizer is not None:
        return loaded.tokenizer
    if path := getattr(loaded.model, "name_or_path", ""):
        return checkpoint.load_tokenizer(Path(path))
    raise PTQError("a model in memory needs its tokenizer: pass tokenizer=")


def _batch_size(asked: int | str | None, model: nn.Module) -> int | str:
    """HFLM's batch size. On a GPU lm-eval tries for the largest; a processor gains nothing beyond AUTO_BATCH_TOKENS."""
    if asked is None or (str(asked).startswith("auto") and model.device.type == "cpu"):
        return max(1, AUTO_BATCH_TOKENS // min(windows.max_positions(model) or LONGEST, LONGEST))
    if not str(asked).startswith("auto") and not (str(asked).isdigit() and int(asked) > 0):
        raise PTQError(f"batch_size is {asked!r}: allowed are whole numbers from 1, auto, and auto:N")
    return asked


def _made(record: Mapping[str, Any]) -> str:
    """How a quantized folder came about, from the record in it."""
    method = record.get("method")
    name = method.get("method", "") if isinstance(method, Mapping) else str(method or "")
    return f"{name} {record.get('scheme', '')}".strip() or "quantized"


# ---------------------------------------------------------------------------------------------- window tasks


class WindowRequest(Instance):
    """lm-eval's request, with the text beside the arguments: those are written into every logged sample."""

    text: str


def window_nll(lm: HFLM, requests: Sequence[WindowRequest], disable_tqdm: bool = False) -> list[dict]:
    """The NLL of every window of each request's text, for any Hugging Face model of lm-eval.

    A request's arguments: the digest of the text, and {"window", "default_window", "max_windows", "rank",
    "world_size"}. Returns per request {"nll": [one sum per window, in nats], "predicted": tokens per window,
    "protocol": see `suite.windows.Windows.protocol`}. Of several processes each takes every world_size-th window.
    """
    answers = []
    for request in requests:
        _, rules = request.args
        size = windows.fit(rules["window"], lm.max_length, rules["default_window"])
        cut = windows.token_windows(request.text, lm.tokenizer, size, rules["max_windows"],
                                    special_tokens=lm.add_bos_token is not False,
                                    name=f"the text of task {request.task_name}")
        tokens = cut.tokens[rules["rank"]::rules["world_size"]]
        # lm-eval's default of 1 is no wish; a larger one is a bound.
        batch = windows.batch_of(size, lm.model.config.vocab_size)
        if isinstance(lm.batch_size, int) and lm.batch_size > 1:
            batch = min(batch, lm.batch_size)
        narrow = lm.mixed_precision_dtype
        with torch.autocast(lm.device.type, dtype=narrow, enabled=narrow is not None):
            nll = windows.window_nll(lm.model, tokens, batch, keep_as=f"windows-{windows.digest(tokens)[:16]}-{batch}")
        answers.append({"nll": nll.tolist(), "predicted": size - 1, "protocol": cut.protocol})
    return answers


HFLM.window_nll = window_nll  # so that lm-eval's own `hf` runs the window tasks as well


class WindowPerplexity(Task):
    """Perplexity over windows of a text as an lm-eval task: `class: !function suite.adapter.WindowPerplexity`.

    In the YAML, one source: `text_file` (beside the tasks), `dataset` (of the hub: path, name, split, field, rows,
    data_files), or neither for a file that the user names in the metadata: --metadata text=FILE. Also `join`: what
    stands between documents; `default_window`: tokens per window where the model takes as many; `max_windows`.
    The user's metadata may set `window`. `--limit N` takes the first N windows (a fraction: one).

    One document, whose answer holds the NLL of every window; the protocol goes into the task's configuration in the
    results.
    """

    VERSION = 1
    OUTPUT_TYPE = "window_nll"
    KEYS = ("task", "class", "output_type", "tag", "metadata",
            "text_file", "dataset", "join", "default_window", "max_windows")

    def __init__(self, config: Mapping[str, Any]):
        if stray := set(config) - set(self.KEYS):
            raise unknown(f"key of task {config.get('task')}", sorted(stray)[0], self.KEYS)
        self._source = dict(config)
        asked = config.get("metadata") or {}
        self.VERSION = asked.get("version", self.VERSION)
        self._window = asked.get("window")
        self._text_path = asked.get("text")
        self._instances, self._limit, self.fewshot_rnd = None, None, None
        self._training_docs = self._fewshot_docs = None
        # lm-eval passes the model's arguments down as metadata: only what concerns the task is kept.
        kept = {key: asked[key] for key in ("version", "window") if key in asked}
        self._config = TaskConfig(task=config["task"], output_type=self.OUTPUT_TYPE, num_fewshot=0, metadata=kept)
        self._filters = [lm_eval.filters.build_filter_ensemble("none", [["take_first", None]])]
        if self._window is not None and not (isinstance(self._window, int) and self._window >= 2):
            raise PTQError(f"window is {self._window!r}: allowed are whole numbers from 2")

    @cached_property
    def text(self) -> str:
        """The whole text, documents joined. Raises PTQError: no file named, file missing or empty, no hub."""
        name, join = self._source["task"], self._source.get("join", "\n\n")
        if "text_file" in self._source:
            return windows.read_text(paths.tasks() / self._source["text_file"])
        if "dataset" in self._source:
            rules = dict(self._source["dataset"])
            field, rows = rules.pop("field", "text"), rules.pop("rows", None)
            instead = "an embedded task (world_wiki_ppl, world_chat_ppl) or text_ppl with a file of your own"
            data = hub.dataset(rules.pop("path"), rules.pop("name", None), rules.pop("split"), instead, **rules)
            return join.join(data[field] if rows is None else data[:rows][field])
        if not self._text_path:
            raise PTQError(f"task {name} needs a text file: pass --metadata text=FILE, "
                           f"or task_manager(metadata={{'text': FILE}})")
        return windows.read_text(self._text_path)

    @cached_property
    def _doc(self) -> dict:
        join = self._source.get("join", "\n\n")
        told = "none: one file, as it is" if join is None or "join" not in self._source else repr(join)
        return {"text_digest": windows.text_digest(self.text), "characters": len(self.text), "join": told}

    def build_all_requests(self, *, limit: int | None = None, samples: Any = None, rank: int = 0, world_size: int = 1,
                           **_: Any) -> None:
        """One request per process. Chat templates and few-shot examples do not apply to a running text."""
        if samples is not None:
            raise PTQError(f"task {self._source['task']} has windows, not samples: use --limit")
        most = [n for n in (self._source.get("max_windows"), limit and int(limit)) if n]
        rules = {"window": self._window, "default_window": self._source.get("default_window", windows.DEFAULT_WINDOW),
                 "max_windows": min(most) if most else None, "rank": rank, "world_size": world_size}
        whose = (self._source["task"], rank, 1)
        self._instances = [self.construct_requests(self._doc, None, metadata=whose, rules=rules)]

    def construct_requests(self, doc: dict, ctx: Any, *, metadata: tuple, rules: dict, **_: Any) -> WindowRequest:
        request = WindowRequest(request_type=self.OUTPUT_TYPE, doc=doc, arguments=(doc["text_digest"], rules), idx=0,
                                metadata=metadata)
        request.text = self.text
        return request

    def process_results(self, doc: dict, results: list[dict]) -> dict:
        (answer,) = results
        self._config.metadata["protocol"] = {**answer["protocol"], "join": doc["join"]}
        total, count = sum(answer["nll"]), len(answer["nll"])
        return {"perplexity": (total, answer["predicted"] * count)}

    def aggregation(self) -> dict:
        return {"perplexity": _perplexity}

    def higher_is_better(self) -> dict:
        return {"perplexity": False}

    def doc_iterator(self, *, rank: int = 0, **_: Any) -> Iterator[tuple[int, dict]]:
        yield rank, self._doc  # every process has its share of the one text

    def test_docs(self) -> list[dict]:
        return [self._doc]

    def has_test_docs(self) -> bool:
        return True

    def has_validation_docs(self) -> bool:
        return False

    def has_training_docs(self) -> bool:
        return False

    def doc_to_text(self, doc: dict) -> str:
        return ""

    def doc_to_target(self, doc: dict) -> str:
        return ""


def _perplexity(sums: list[tuple[float, int]]) -> float:
    """From (NLL, predicted tokens) of each process."""
    total, predicted = (sum(column) for column in zip(*sums, strict=True))
    return windows.perplexity(torch.tensor([total], dtype=torch.float64), predicted)


# ---------------------------------------------------------------------------------------------- lm-eval


BORROWED = ("gsm8k", "hellaswag", "mmlu/default")  # folders of lm-eval's own tasks that the group `paper` names


def task_manager(metadata: Mapping[str, Any] | None = None, include_defaults: bool = False,
                 include_path: str | Sequence[str] | None = None) -> lm_eval.tasks.TaskManager:
    """lm-eval's task manager with the suite's tasks, and those of lm-eval that the paper uses.

    include_defaults: all of lm-eval's own tasks; reading the index of their 14,000 takes ten seconds. metadata: what the
    tasks may read, {"text": file, "window": tokens} for window tasks. include_path: further folders with tasks.
    """
    further = [include_path] if isinstance(include_path, str) else list(include_path or ())
    return lm_eval.tasks.TaskManager(include_path=[*([] if include_defaults else _borrowed()), str(paths.tasks()), *further],
                                     include_defaults=include_defaults, metadata=dict(metadata or {}))


def _borrowed() -> list[str]:
    return [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in BORROWED]


def check_mentioned(names: Iterable[str], folders: Sequence[str | Path] = (), mine: Iterable[str] | None = None) -> None:
    """Raises PTQError for a name that no task file of lm-eval's has in it, nor one of the folders: an answer in a second,
    where the index of them all takes ten. What is no plain name (a pattern, a file) passes. mine: as for `unknown_task`."""
    plain = [name for name in names if re.fullmatch(r"[\w.+-]+", name) and not Path(name).exists()]
    for name in plain:
        if not _mentioned(name, (str(Path(lm_eval.tasks.__file__).parent), *map(str, folders))):
            raise unknown_task(name, mine)


@functools.cache
def _mentioned(name: str, folders: tuple[str, ...]) -> bool:
    word = name.encode()
    whole = re.compile(rb"(?<![\w-])" + re.escape(word) + rb"(?![\w-])")
    for root in folders:
        for folder, _, files in os.walk(root):
            for file in files:
                if file.endswith(".yaml"):
                    with open(os.path.join(folder, file), "rb") as opened:
                        text = opened.read()
                    if word in text and whole.search(text):
                        return True
    return False


def unknown_task(name: str, mine: Iterable[str] | None = None) -> PTQError:
    """The error for a task that there is not. mine: the names to propose, by default those of the suite and the paper."""
    if mine is None:
        mine = {*ours(), *dict(members(task_manager(), "paper"))}
    return unknown("task", name, [*mine, "a task of `ptq lm-eval ls tasks`"])


def is_ours(manager: lm_eval.tasks.TaskManager, name: str) -> bool:
    """Whether a task or group is one of the suite's files."""
    path = manager.task_index[name].yaml_path if name in manager.task_index else None
    return path is not None and paths.tasks() in Path(path).parents


def members(manager: lm_eval.tasks.TaskManager, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The direct members of a group, each with what the group sets for it; of anything else, itself.

    >>> members(task_manager(), "paper")[2]  # doctest: +SKIP
    ('gsm8k', {'num_fewshot': 5})
    """
    listed = (manager.task_index[name].cfg or {}).get("task")
    if not isinstance(listed, list):
        return [(name, {})]
    found = []
    for member in listed:
        set_ = dict(member) if isinstance(member, Mapping) else {"task": member}
        found.append((set_.pop("group", None) or set_.pop("task"), set_))
    return found


def leaves(manager: lm_eval.tasks.TaskManager, name: str) -> list[str]:
    """The tasks behind a name: those of a group or tag, of groups in groups; of a task, itself."""
    entry = manager.task_index[name]
    if not entry.yaml_path and entry.tags:
        return sorted(entry.tags)
    below = [member for member, _ in members(manager, name)]
    return [name] if below == [name] else [leaf for member in below if member in manager.task_index
                                           for leaf in leaves(manager, member)]


def executes_code(manager: lm_eval.tasks.TaskManager, name: str) -> list[str]:
    """The tasks behind a name whose scoring runs what the model wrote."""
    return [leaf for leaf in leaves(manager, name) if (manager.task_index[leaf].cfg or {}).get("unsafe_code")]


def check_code_execution(manager: lm_eval.tasks.TaskManager, names: Iterable[str], allowed: bool) -> None:
    """Raises PTQError if tasks among those named execute code and that was not allowed, cannot be confined on this
    machine, or would be executed by lm-eval in the open."""
    unsafe = sorted({leaf for name in names for leaf in executes_code(manager, name)})
    if not unsafe:
        return
    confined = [name for name in manager.all_tasks if is_ours(manager, name) and executes_code(manager, name) == [name]]
    if stray := [name for name in unsafe if name not in confined]:
        raise PTQError(f"task {stray[0]} executes code of the model, and lm-eval does so unconfined: "
                       f"in the suite's sandbox run {', '.join(confined)}")
    if not allowed:
        raise PTQError(f"task {', '.join(unsafe)} executes code that the model writes: pass --allow-code-execution to "
                       f"run it in a sandbox, or leave the task out")
    sandbox.require()


def remote(manager: lm_eval.tasks.TaskManager, name: str) -> list[str]:
    """The tasks behind a name whose data stands on the hub alone: neither in the package nor below --data-dir."""
    found = []
    for leaf in leaves(manager, name):
        config = manager.task_index[leaf].cfg or {}
        repository = config.get("dataset_path") or (config.get("dataset") or {}).get("path")
        if (repository or not is_ours(manager, leaf)) and not (repository and hub.local_copy(repository)):
            found.append(leaf)
    return found


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars that lm-eval draws whatever the settings say."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    modules = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    bars = [module.tqdm for module in modules]
    for module, bar in zip(modules, bars):
        module.tqdm = lambda *args, bar=bar, **named: bar(*args, **{**named, "disable": True})
    try:
        yield
    finally:
        for module, bar in zip(modules, bars):
            module.tqdm = bar


def run_lm_eval(argv: Sequence[str]) -> None:
    """lm-eval's own command line, with the model `ptq` and the suite's tasks registered.

    Raises PTQError for unknown tasks and for arguments that lm-eval refuses; SystemExit as its parser does.

    >>> run_lm_eval(["run", "--model", "ptq", "--model_args", "pretrained=m", "--tasks", "world"])  # doctest: +SKIP
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    parser = HarnessCLI()
    argv, data_dir = _without_value(argv, "--data-dir")
    hub.use_data_dir(data_dir and Path(data_dir))
    allowed = "--allow-code-execution" in argv
    argv = [word for word in argv if word != "--allow-code-execution"]
    given, sys.argv = sys.argv, ["ptq lm-eval", *argv]  # its parser reads, and completes, the process's own arguments
    try:
        args = parser.parse_args()
    finally:
        sys.argv = given
    if hasattr(args, "include_path"):
        theirs = [args.include_path] if args.include_path else []
        args.include_path = [str(paths.tasks()), *theirs]
    confirmed = getattr(args, "confirm_run_unsafe_code", False)  # in lm-eval's own words, for its own tasks
    if args.command == "run":
        _complete(args)
        if allowed:
            args.confirm_run_unsafe_code = True
    mine = ours()
    with (_indexing(args, mine, allowed, confirmed), hub.local_sets(),
          contextlib.nullcontext() if sys.stderr.isatty() else no_bars()):
        try:
            parser.execute(args)
        except ValueError as error:
            message = str(error)
            if message.startswith("Tasks not found: "):
                raise unknown_task(message.removeprefix("Tasks not found: "), mine) from None
            raise
        except OSError as error:
            if hub.is_fault(error):
                raise hub.fault(error, "the data of a task", "tasks of the suite: " + ", ".join(mine)) from None
            raise


def ours() -> list[str]:
    """The names of the suite's tasks and groups."""
    manager = task_manager()
    return sorted(name for name in manager.all_tasks if is_ours(manager, name))


def _complete(args: Any) -> None:
    """Checks lm-eval's arguments before anything slow happens, and leaves the batch size of `ptq` to the model."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    if getattr(args, "model", None) == "ptq" and not getattr(args, "config", None) and not hasattr(args, "batch_size"):
        args.batch_size = "auto"
    if not getattr(args, "config", None):
        try:
            with _silenced(logging.getLogger("lm_eval.config.evaluate_config")):  # it will say it all again
                EvaluatorConfig.from_cli(copy.deepcopy(args))
        except ValueError as error:
            raise PTQError(f"lm-eval refuses these arguments: {error}") from None


def _without_value(argv: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """A command line without an option of the suite's own, and the option's value."""
    kept, value, words = [], None, iter(argv)
    for word in words:
        if word == option:
            value = next(words, None)
            if value is None:
                raise PTQError(f"{option} needs a value")
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            kept.append(word)
    return kept, value


def _asked(args: Any) -> set[str]:
    """The names of the tasks that lm-eval's command line is given, as far as they stand on it."""
    given = getattr(args, "tasks", None) or []
    return {name for part in ([given] if isinstance(given, str) else given) for name in part.split(",")}


@contextlib.contextmanager
def _indexing(args: Any, mine: Sequence[str], allowed: bool, confirmed: bool) -> Iterator[None]:
    """Lets the task manager that lm-eval's command line builds leave out lm-eval's own tasks where none of them is
    asked for, and miss a hub that they need before the model is loaded; it has no argument for either."""
    theirs, asked = lm_eval.tasks.TaskManager, _asked(args)
    known = set(task_manager().all_tasks)
    whole = args.command not in ("run", "validate") or asked - known or getattr(args, "config", None)
    if args.command == "run" and not getattr(args, "config", None):
        check_mentioned(sorted(asked - known), getattr(args, "include_path", None) or (), mine)

    class Manager(theirs):
        def __init__(self, *positional: Any, **named: Any):
            if not whole:
                named["include_path"] = [*_borrowed(), *(named.get("include_path") or ())]
            super().__init__(*positional, **{**named, "include_defaults": bool(whole)})
            if args.command == "run":
                found = sorted(asked & set(self.all_tasks))
                if not confirmed:
                    check_code_execution(self, found, allowed)
                if fetching := [leaf for name in found for leaf in remote(self, name)]:
                    hub.require(f"the data of task {fetching[0]!r}", "tasks of the suite: " + ", ".join(mine))

    lm_eval.tasks.TaskManager = Manager
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = theirs
