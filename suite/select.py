"""The selection: each unit of layers gets the method of a pool whose output is closest to the unquantized model's.

Source: CKA-Guided Modular Quantization (arXiv 2512.16282): greedy from the first layer, each candidate fed by the
layers quantized so far, at one format for all layers; O(layers x candidates) quantizations, not candidates^layers.
Beyond the paper: a beam of prefixes, a choice per site, a refinement of the finished assignment, and the controls.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from suite import arch
from suite.candidates import Candidates, Tried
from suite.errors import PTQError, unknown
from suite.grid import Scheme
from suite.method import LayerEdit, LayerView, Site, build, lookup
from suite.metrics import METRICS, Lens, lens_of
from suite.resume import Ledger
from suite.search import OBJECTIVES, Assigned, Keeping, Refinement, SiteView, beam, check_number, told
from suite.walk import REFERENCE_TOKENS, walk

UNITS, SEARCHES, PICKS = ("layer", "site"), ("greedy", "beam"), ("closest", "farthest", "random")


@dataclass(frozen=True)
class Select:
    """The local rule of a hybrid: every candidate's edit, scored; the closest wins.

    rules: for each candidate, its rule for every layer of the unit. farthest: the worst wins, for a control.
    """

    names: tuple[str, ...]
    rules: tuple[Sequence[Any], ...]
    metric: str
    reference_tokens: int = REFERENCE_TOKENS
    lens: Lens | None = None
    farthest: bool = False

    def quantize(self, layer: LayerView) -> LayerEdit:
        scores: dict[str, dict[str, float]] = {}
        best: tuple[float, str, Tried] | None = None
        makers = {name: partial(_made, rules) for name, rules in zip(self.names, self.rules, strict=True)}
        for name, tried in Candidates(layer, self.lens).tried(makers):
            scores[name] = tried.scores
            distance = scores[name][self.metric]
            check_number(distance, layer.index, self.metric, name)
            loser = tried
            if best is None or self._wins(distance, best[0]):
                loser, best = best[2] if best else None, (distance, name, tried)
            if loser is not None:
                loser.drop()
        _, chosen, winner = best
        edit = winner.keep()
        note = {"chosen": chosen, "candidates": scores, "margin": _margin(scores, chosen, self.metric)}
        return LayerEdit(edit.params, edit.linears, {**edit.note, **note})

    def _wins(self, distance: float, best: float) -> bool:
        return distance > best if self.farthest else distance < best


@dataclass(frozen=True)
class SelectBySite:
    """As `Select`, but every site of the layer has a choice of its own, in the order of the sites.

    A candidate is scored at the output of the layer, with the sites before it as chosen and those after it unquantized.
    All sites are quantized on the statistics of the layer as it came in, like the layer of a pure method.
    """

    names: tuple[str, ...]
    rules: tuple[Any, ...]
    metric: str
    reference_tokens: int = REFERENCE_TOKENS
    lens: Lens | None = None

    def quantize(self, layer: LayerView) -> LayerEdit:
        candidates, whole, chosen, table = Candidates(layer, self.lens), LayerEdit(), [], {}
        for site in layer.sites:
            makers = {name: partial(_site_made, rule, site, whole) for name, rule in zip(self.names, self.rules, strict=True)}
            found = dict(candidates.tried(makers))
            scores = table[site.name] = {name: tried.scores for name, tried in found.items()}
            for name in scores:
                check_number(scores[name][self.metric], layer.index, self.metric, name)
            chosen.append(min(scores, key=lambda name: scores[name][self.metric]))
            whole = found.pop(chosen[-1]).keep()
            for loser in found.values():
                loser.drop()
        note = {**told(layer.sites, tuple(chosen)), "candidates_by_site": table}
        return LayerEdit(whole.params, whole.linears, note)


def _made(rules: Sequence[Any], layer: LayerView) -> LayerEdit:
    return layer.quantize_with(rules)


def _site_made(rule: Any, site: Site, before: LayerEdit, layer: LayerView) -> LayerEdit:
    """The sites before as chosen, and one more."""
    return before.to(layer.device) | rule.quantize(SiteView(layer, site))


def _margin(scores: Mapping[str, Mapping[str, float]], chosen: str, metric: str) -> float | None:
    """By how much the nearest of the others is farther than the one chosen; below 0 where it is nearer."""
    others = [found[metric] for name, found in scores.items() if name != chosen]
    return min(others) - scores[chosen][metric] if others else None


@dataclass(frozen=True)
class Hybrid:
    """CKA-guided modular quantization.

    pool:   names of registered methods; all get the same scheme and their default options.
    metric: one of `METRICS`, or what the record calls it; the record keeps all of them for every candidate (kl only
            where it decides).
    score_tokens: calibration tokens on which outputs are compared, the first ones; the methods themselves see all. The
            winner's outputs are completed and feed the next layer, so that nothing is computed twice.
    block:  consecutive layers that share one choice (1: the paper's main setting; its ablation has 2, 4, 8).
    unit:   "layer"; "site" for a choice per site (q/k/v, o, gate/up, down), where scales move into norms only;
            "block-4" is the same as block=4.

    Beyond the paper:
    search: "greedy", or "beam", which keeps the `width` best prefixes at each layer; width 1 is greedy.
    refine: "none"; "cka" or "nll": then one slot at a time is changed wherever that lowers the objective of the whole
            model on half of the calibration sequences and on the other half too; see `suite.search.Refinement`.

    Controls:
    pick:   "closest"; "farthest", the worst choice everywhere; "random", drawn from `pick_seed`.
    choices: a finished assignment, one name of the pool per layer; nothing is scored.

    Raises PTQError: empty pool, a name that is unknown, twice there, or rewrites the model (SpinQuant); unknown metric,
    unit, search, refine or pick; block or width below 1; options that would have no effect together.

    >>> Hybrid(pool=("gptq", "awq")).metric
    'cka'
    """

    scheme: Scheme = Scheme()
    pool: tuple[str, ...] = ("gptq", "awq", "smoothquant")
    metric: str = "cka"
    block: int = 1
    score_tokens: int = REFERENCE_TOKENS
    unit: str = "layer"
    search: str = "greedy"
    width: int = 1
    refine: str = "none"
    pick: str = "closest"
    pick_seed: int = 0
    choices: tuple[str, ...] = ()

    def __post_init__(self):
        if self.unit.startswith("block-") and self.unit[6:].isdigit():  # one identity for both ways to say it
            if self.block not in (1, int(self.unit[6:])):
                raise PTQError(f"unit is {self.unit} and block is {self.block}: give one of them")
            object.__setattr__(self, "block", int(self.unit[6:]))
            object.__setattr__(self, "unit", "layer")
        if not self.pool or len(set(self.pool)) != len(self.pool):
            raise PTQError(f"pool is {', '.join(self.pool) or 'empty'}: it needs at least one method, and none twice")
        for name in self.pool:
            if any(getattr(lookup(part), "rewrites_model", False) for part in name.split("+")):
                raise PTQError(f"pool has {name}, which rewrites the whole model before it quantizes a layer: "
                               f"its layers cannot stand among those of other methods")
        for option, allowed in {"metric": METRICS, "search": SEARCHES, "pick": PICKS,
                                "unit": (*UNITS, "block-2, block-3, ..."), "refine": ("none", *OBJECTIVES)}.items():
            if getattr(self, option) not in allowed:
                raise unknown(option, getattr(self, option), allowed)
        for option in ("block", "score_tokens", "width"):
            if getattr(self, option) < 1:
                raise PTQError(f"{option} is {getattr(self, option)}: allowed are whole numbers from 1")
        if stray := [name for name in self.choices if name not in self.pool]:
            raise unknown("method in choices", stray[0], self.pool)
        self._check_together()

    def _check_together(self) -> None:
        """An option that another one leaves without effect would make an ablation that changes nothing."""
        searching = self.search != "greedy" or self.refine != "none"
        free = self.pick == "closest" and not self.choices
        for wrong, why in (
            (self.width > 1 and self.search == "greedy", f"width={self.width} has no effect with search=greedy: "
                                                         f"give search=beam"),
            (self.pick_seed != 0 and self.pick != "random",
             f"pick_seed={self.pick_seed} has no effect without pick=random"),
            (self.choices and self.pick != "closest", f"pick={self.pick} beside choices, which leave nothing to pick"),
            (not free and (self.search != "greedy" or self.unit != "layer" or self.refine != "none"),
             "pick and choices are controls: they go with unit=layer, search=greedy, refine=none"),
            (self.block > 1 and (searching or self.unit != "layer" or not free and self.pick != "farthest"),
             f"block={self.block} goes with unit=layer, search=greedy, refine=none, and without choices"),
            (self.unit == "site" and self.search != "greedy", "unit=site goes with search=greedy"),
        ):
            if wrong:
                raise PTQError(why)

    def plan(self, model: nn.Module, calib: Any) -> Sequence[Any]:
        total = model.config.num_hidden_layers
        plans = {}
        for name in self.pool:
            plans[name] = build(name, **self.scheme.options).plan(model, calib)
            if len(plans[name]) != total:
                raise PTQError(f"pool member {name!r} has a rule for {len(plans[name])} units, the model has {total} "
                               f"layers: a member of a pool needs one rule per layer")
        if self.choices or self.pick == "random":
            return self._fixed(plans, total)
        lens = lens_of(model) if self.metric == "kl" else None
        if self.search == "greedy" and self.refine == "none":
            return self._greedy(plans, total, lens)
        if calib is None:
            raise PTQError(f"cka-hybrid with search={self.search}, refine={self.refine} needs calibration data: "
                           f"pass --calib embedded, a text file, or a set")
        return self._searched(model, calib, plans, lens)

    def _greedy(self, plans: Mapping[str, Sequence[Any]], total: int, lens: Lens | None) -> list[Any]:
        if self.unit == "site":
            return [SelectBySite(self.pool, tuple(plan[i] for plan in plans.values()), self.metric, self.score_tokens,
                                 lens) for i in range(total)]
        return [Select(self.pool, tuple(plan[i:i + self.block] for plan in plans.values()), self.metric,
                       self.score_tokens, lens, self.pick == "farthest")
                for i in range(0, total, self.block)]

    def _fixed(self, plans: Mapping[str, Sequence[Any]], total: int) -> list[Assigned]:
        drawn = random.Random(self.pick_seed)
        names = self.choices or tuple(drawn.choice(self.pool) for _ in range(total))
        if len(names) != total:
            raise PTQError(f"choices names {len(names)} layers, the model has {total}")
        return [Assigned({name: plans[name][i]}, (name,)) for i, name in enumerate(names)]

    def _searched(self, model: nn.Module, calib: Any, plans: Mapping[str, Sequence[Any]], lens: Lens | None
                  ) -> list[Assigned]:
        """The assignment is found before anything is written; its layers are then quantized like any other's."""
        edits: dict[tuple[int, str, str], LayerEdit] = {}  # what a refinement needs of the greedy search before it
        if self.search == "beam":
            found = beam(model, calib, plans, self.metric, self.width, self.score_tokens, lens)
            names = [(name,) for name in found.names]
            notes = [{"candidates": scores, "margin": _margin(scores, name, self.metric)}
                     for name, scores in zip(found.names, found.scores, strict=True)]
        else:  # greedy, and refined: without that nothing has to be searched before
            kept = {name: [Keeping(rule, name, edits) for rule in plan] for name, plan in plans.items()}
            names, notes = self._rehearsed(model, calib, kept, lens)
        if self.refine != "none":
            first = names
            names, note = Refinement(model, calib, plans, self.refine, edits).run(first)
            # scores were those of the layer behind another prefix, wherever an earlier choice has changed
            changed = [a != b for a, b in zip(first, names, strict=True)]
            notes = [{} if any(changed[:i + 1]) else one for i, one in enumerate(notes)]
            notes[0] = {**notes[0], "refined": note}
        return [Assigned({name: plan[i] for name, plan in plans.items()}, chosen, note)
                for i, (chosen, note) in enumerate(zip(names, notes, strict=True))]

    def _rehearsed(self, model: nn.Module, calib: Any, plans: Mapping[str, Sequence[Any]], lens: Lens | None
                   ) -> tuple[list[tuple[str, ...]], list[dict]]:
        """The greedy choice of each slot, found without writing the model. What was chosen before an interruption is
        not searched again."""
        names, notes, feed, chosen = [], [], None, Ledger("rehearsal")
        for view, rule in zip(walk(model, calib, reference=calib.sequences(self.score_tokens)),
                              self._greedy(plans, len(arch.layers(model)), lens), strict=True):
            fed, key = view if feed is None else view.fed_by(feed), f"layer {view.index}"
            if key in chosen:
                rules = {name: plan[view.index] for name, plan in plans.items()}
                rule = Assigned(rules, tuple(chosen[key]["names"]))
            edit = rule.quantize(fed)
            outputs = fed.after(edit).outputs()
            feed = lambda first=None, outputs=outputs: outputs if first is None else outputs[:first]  # noqa: E731
            found = chosen.of(key, partial(_found, edit.note))
            names.append(tuple(found["names"]))
            notes.append(found["note"])
        return names, notes


def _found(note: Mapping[str, Any]) -> dict[str, Any]:
    """What a rehearsal keeps of a layer: the names of its slots, and what the record will tell of the search."""
    by_site = note.get("chosen_by_site")
    return {"names": list(by_site.values()) if by_site else [note["chosen"]],
            "note": {key: note[key] for key in ("candidates", "candidates_by_site", "margin") if key in note}}
