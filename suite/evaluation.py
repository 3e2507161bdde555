"""Evaluating through lm-eval: the tasks and what identifies them, one task's run, and what records keep of it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from suite import calib, hub, paths, resume
from suite.errors import PTQError
from suite.store import canonical

EMBEDDED_TASKS = ("world_wiki_ppl", "world_chat_ppl", "world_math", "world_events", "world_quiz")
PAPER_TASKS = ("paper",)  # tasks/paper.yaml names them, with their numbers of examples
CODE_TASK = "world_code"  # of the embedded tasks, the one that needs permission to execute code
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
