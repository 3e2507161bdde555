"""Searches for an assignment of methods to layers that look farther than the greedy choice.

An assignment is one method's name per slot: per decoder layer, or per site of each layer. Nothing here writes the
model; the assignment that is found is quantized afterwards from the first layer to the last, like any other.

Letters: L layers, P candidates, n sequences, t tokens of each, d hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite import arch, progress, resume
from suite.candidates import Candidates, scores_against
from suite.cka import CKA
from suite.errors import PTQError
from suite.method import LayerEdit, LayerView, Site
from suite.method import edit_of as checked
from suite.metrics import Lens
from suite.walk import Live, walk

OBJECTIVES = {
    "cka": "1 - linear CKA of the last layer's outputs",
    "nll": "negative log-likelihood of the calibration tokens",
}
SWEEPS = 2  # of the coordinate descent, at most
_LOGITS = 2**24  # numbers held at once while the loss is measured

Names = tuple[str, ...]  # of a layer: one name, or one per site


# ---------------------------------------------------------------------------------------------- one layer, by site


class SiteView:
    """A layer in which only one site is to be quantized: the same contract, statistics and outputs as the layer's.

    A scale can move only into a norm here: the linears before o and down (v, up) belong to sites of their own.
    """

    layers_spanned = 1

    def __init__(self, layer: Any, site: Site):
        self._layer, self.index = layer, layer.index
        feeds_from_norm = site.feeder is not None and layer.weight(site.feeder).dim() == 1
        self.sites = (site if feeds_from_norm else Site(site.name, site.linears, None, site.scope),)

    def __getattr__(self, name: str) -> Any:  # weight, bias, stat, scope_outputs, outputs, reference, ...
        return getattr(self._layer, name)

    def after(self, edit: LayerEdit) -> SiteView:
        return SiteView(self._layer.after(edit), self.sites[0])


def by_site(layer: LayerView, rules: Sequence[Any], names: Names) -> LayerEdit:
    """One layer quantized with a rule per site. rules, names: in the order of the sites."""
    whole = LayerEdit()
    for site, rule in zip(layer.sites, rules, strict=True):
        whole = whole | rule.quantize(SiteView(layer, site))
    return LayerEdit(whole.params, whole.linears, told(layer.sites, names))


def told(sites: Sequence[Site], names: Names) -> dict[str, Any]:
    """What the record says of a layer's choice: the method, or "mixed" and the method of each site."""
    if len(set(names)) == 1:
        return {"chosen": names[0]} | ({} if len(names) == 1 else {"chosen_by_site": _named(sites, names)})
    return {"chosen": "mixed", "chosen_by_site": _named(sites, names)}


def _named(sites: Sequence[Site], names: Names) -> dict[str, str]:
    return {site.name: name for site, name in zip(sites, names, strict=True)}


def edit_of(layer: LayerView, rules: Mapping[str, Any], names: Names) -> LayerEdit:
    """The edit of a layer by the names of its slots. rules: name -> the rule of this layer."""
    if len(names) == 1:
        edit = rules[names[0]].quantize(layer)
        return LayerEdit(edit.params, edit.linears, {**edit.note, **told(layer.sites, names)})
    return by_site(layer, [rules[name] for name in names], names)


@dataclass(frozen=True)
class Assigned:
    """The local rule of a finished assignment. note: for the record, over what the edit itself tells."""

    rules: Mapping[str, Any]
    names: Names
    note: Mapping[str, Any] = field(default_factory=dict)
    reference_tokens: int = 0

    def quantize(self, layer: LayerView) -> LayerEdit:
        edit = edit_of(layer, self.rules, self.names)
        return LayerEdit(edit.params, edit.linears, {**edit.note, **self.note})


# ---------------------------------------------------------------------------------------------- beam


@dataclass(frozen=True)
class Prefix:
    """The first layers quantized: what each chose, the scores of all its siblings, and what it feeds the next layer."""

    names: tuple[str, ...] = ()
    scores: tuple[Mapping[str, Mapping[str, float]], ...] = ()
    feed: Callable[..., Tensor] | None = None


def beam(model: nn.Module, calib: Any, rules: Mapping[str, Sequence[Any]], metric: str, width: int, tokens: int,
         lens: Lens | None = None) -> Prefix:
    """The best assignment among `width` prefixes that are kept at each layer: width 1 is the greedy choice.

    rules: name -> one rule per layer; metric: of `METRICS`, at the last layer of the prefix; tokens: on which outputs
    are compared. L x P x width quantizations.

    A search that was interrupted continues from its last finished layers (suite.resume).

    Raises PTQError where a score is not a number.
    """
    total, state = len(arch.layers(model)), _BeamState()
    live, kept = state.restored(arch.embedding(model).weight.device) or (None, [Prefix()])
    for view in walk(model, calib, reference=calib.sequences(tokens), live=live):
        progress.tell(f"beam of {width}, layer {view.index + 1} of {total}")
        measure, found = scores_against(view.reference, lens), []
        makers = {name: plan[view.index].quantize for name, plan in rules.items()}
        for prefix in kept:
            fed = view if prefix.feed is None else view.fed_by(prefix.feed)
            scores: dict[str, dict[str, float]] = {}
            for name, tried in Candidates(fed, lens, measure).tried(makers):
                scores[name] = tried.scores
                check_number(scores[name][metric], view.index, metric, name)
                found.append((scores[name][metric], name, prefix, scores, fed, tried))
        found.sort(key=lambda one: one[0])  # stable: of equals the first
        last = view.index == total - 1
        kept = [Prefix((*prefix.names, name), (*prefix.scores, scores),
                       None if last else _kept(fed.after(tried.keep()).outputs()))
                for _, name, prefix, scores, fed, tried in found[:width]]
        state.keep(kept, view.reference)
    return kept[0]


def _kept(outputs: Tensor) -> Callable[..., Tensor]:
    """Outputs as a feed that holds nothing else alive."""
    return lambda first=None: outputs if first is None else outputs[:first]


class _BeamState:
    """The prefixes of a beam in the workspace of the run (suite.resume), if it has one: a search that was killed goes on
    behind the last layer that was kept."""

    def __init__(self):
        self._workspace = resume.current()
        if self._workspace is not None:
            self._workspace.due("beam")  # the clock runs from here

    def restored(self, device: torch.device) -> tuple[Live, list[Prefix]] | None:
        state = self._workspace and self._workspace.load("beam")
        if not state:
            return None
        told = json.loads(state["told"])
        feeds = [None if feed is None else _kept(feed.to(device)) for feed in state["feeds"]]
        kept = [Prefix(tuple(names), tuple(scores), feed) for (names, scores), feed in zip(told, feeds, strict=True)]
        return Live(state["done"], None, state["full"]), kept

    def keep(self, kept: Sequence[Prefix], reference: Tensor) -> None:
        if self._workspace is not None and self._workspace.due("beam"):
            self._workspace.save("beam", {
                "done": len(kept[0].names), "told": json.dumps([(one.names, one.scores) for one in kept]),
                "feeds": [one.feed and one.feed() for one in kept], "full": reference})


def check_number(distance: float, layer: int, metric: str, name: str) -> None:
    if distance != distance:
        raise PTQError(f"layer {layer}: {metric} of candidate {name} is not a number; "
                       f"the layer's outputs are constant or not finite on this calibration data")


# ---------------------------------------------------------------------------------------------- refinement


@dataclass(frozen=True)
class Keeping:
    """A layer's rule of one candidate that keeps what it makes: in `edits`, by layer, name and site ("" for the layer)."""

    rule: Any
    name: str
    edits: dict[tuple[int, str, str], LayerEdit]

    def quantize(self, layer: Any) -> LayerEdit:
        edit = checked(self.rule, layer)
        self.edits[layer.index, self.name, layer.sites[0].name if isinstance(layer, SiteView) else ""] = edit
        return edit


class Refinement:
    """Coordinate descent over a finished assignment: one slot at a time takes the method that lowers the objective.

    The objective ("cka" or "nll", see OBJECTIVES) is that of the whole model on the first half of the calibration
    sequences; a move must also lower it on the second half, which nothing else is chosen by. While moves are tried each
    layer keeps the candidates' weights as quantized behind the starting assignment. What comes out is quantized again,
    from the first layer on, and taken only if the second half agrees that it is better than the start.

    Holds the weights of all candidates of all layers and the hidden states before each layer: for models that leave
    that much memory free. made: edits of candidates behind the starting assignment that are there already (`Keeping`).
    After an interruption the candidates are quantized again, and no value is measured twice.
    """

    def __init__(self, model: nn.Module, calib: Any, rules: Mapping[str, Sequence[Any]], objective: str,
                 made: Mapping[tuple[int, str, str], LayerEdit] | None = None):
        self._model, self._calib, self._rules, self._objective = model, calib, rules, objective
        self._made = made or {}
        self._tokens = calib.tokens.to(arch.embedding(model).weight.device)
        count = len(self._tokens)
        if count < 2:
            raise PTQError("refine needs a calibration set of two sequences at least: one half decides, "
                           "the other tells when to stop")
        self._halves = (slice(0, count // 2), slice(count // 2, count))
        self._references: list[CKA] = []
        self._values = resume.Ledger("refinement")  # its second sweep, too, meets what the first has tried

    def run(self, start: Sequence[Names]) -> tuple[list[Names], dict[str, Any]]:
        """(the assignment, what the record tells: objective on both halves before and after, moves, whether kept)."""
        start = [tuple(names) for names in start]
        self._prepare(start)
        before = [self._value(start, 0, 0), self._value(start, 0, 1)]
        best, values, moves = list(start), before, []
        for sweep in range(SWEEPS):
            moved = False
            for i in range(len(best)):
                for s in range(len(best[i])):
                    progress.tell(f"refining, sweep {sweep + 1}, layer {i + 1} of {len(best)}")
                    tried = {name: self._with(best, i, s, name) for name in self._rules if name != best[i][s]}
                    scores = {name: self._value(candidate, i, 0) for name, candidate in tried.items()}
                    name = min(scores, key=scores.__getitem__, default=None)
                    if name is None or not scores[name] < values[0]:
                        continue
                    held = self._value(tried[name], i, 1)
                    if held < values[1]:
                        best, values, moved = tried[name], [scores[name], held], True
                        moves.append({"layer": i, "slot": s, "to": name})
                        self._advance(best, i)
            if not moved:
                break
        note = {"objective": self._objective, "before": before, "frozen": values, "moves": moves}
        if best == start:
            return best, {**note, "after": before, "kept": False}
        after = self._requantized(best)
        kept = after[1] < before[1]
        return (best if kept else start), {**note, "after": after, "kept": kept}

    def _prepare(self, start: Sequence[Names]) -> None:
        """Quantizes every slot by every candidate behind the starting assignment, and keeps the edits."""
        self._views, self._edits, self._inputs = [], [], []
        feed: Tensor | None = None
        for view in walk(self._model, self._calib, reference=True):
            fed = view if feed is None else view.fed_by(_kept(feed))
            names = start[view.index]
            slots = [("", fed)] if len(names) == 1 else [(site.name, SiteView(fed, site)) for site in view.sites]
            self._edits.append([{name: self._edit(name, site, seen) for name in self._rules} for site, seen in slots])
            self._views.append(view)
            self._inputs.append(fed.inputs())
            feed = self._outputs(view.index, names, self._inputs[-1])
            last = view.reference
        if self._objective == "cka":
            self._references = [CKA(last[half]) for half in self._halves]

    def _edit(self, name: str, site: str, layer: Any) -> LayerEdit:
        there = self._made.get((layer.index, name, site))
        return self._rules[name][layer.index].quantize(layer) if there is None else there.to(layer.device)

    @staticmethod
    def _with(assignment: Sequence[Names], i: int, s: int, name: str) -> list[Names]:
        changed = list(assignment)
        changed[i] = (*changed[i][:s], name, *changed[i][s + 1:])
        return changed

    def _outputs(self, i: int, names: Names, hidden: Tensor) -> Tensor:
        edit = LayerEdit()
        for slot, name in zip(self._edits[i], names, strict=True):
            edit = edit | slot[name]
        return self._views[i].fed_by(_kept(hidden)).after(edit).outputs()

    def _advance(self, assignment: Sequence[Names], first: int) -> None:
        for i in range(first, len(assignment) - 1):
            self._inputs[i + 1] = self._outputs(i, assignment[i], self._inputs[i])

    def _value(self, assignment: Sequence[Names], first: int, half: int) -> float:
        """The objective on a half when layers from `first` on are as assigned, those before as last advanced."""
        def measured() -> float:
            hidden = self._inputs[first][self._halves[half]]
            for i in range(first, len(assignment)):
                hidden = self._outputs(i, assignment[i], hidden)
            return self._score(hidden, half)
        return self._values.of(json.dumps([assignment, half]), measured)

    def _score(self, hidden: Tensor, half: int) -> float:
        if self._objective == "cka":
            return self._references[half].distance(hidden)
        return float(token_nll(self._model, hidden, self._tokens[self._halves[half]]).mean())

    def _requantized(self, assignment: Sequence[Names]) -> list[float]:
        """The objective on both halves after the assignment is quantized from the first layer on."""
        feed: Tensor | None = None
        for view in walk(self._model, self._calib):
            fed = view if feed is None else view.fed_by(_kept(feed))
            rules = {name: plan[view.index] for name, plan in self._rules.items()}
            feed = fed.after(edit_of(fed, rules, assignment[view.index])).outputs()
        return [self._score(feed[half], k) for k, half in enumerate(self._halves)]


@torch.no_grad()
def token_nll(model: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """NLL of tokens 2..t of each sequence when the last layer puts out `hidden` (n, t, d): (n, t - 1) float32."""
    norm, head = arch.final_norm(model), arch.head(model)
    step = max(1, _LOGITS // (hidden.shape[1] * head.weight.shape[0]))
    rows = []
    for x, target in zip(hidden.split(step), tokens.to(hidden.device).split(step), strict=True):
        logits = head(norm(x))[:, :-1].float()  # (step, t - 1, v)
        rows.append(F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), reduction="none")
                    .reshape(len(target), -1))
    return torch.cat(rows)
