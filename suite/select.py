"""The selection: each unit of layers gets the method of a pool whose output is closest to the unquantized model's.

Source: CKA-Guided Modular Quantization (arXiv 2512.16282): greedy from the first layer, each candidate fed by the layers
quantized so far, at one format for all layers; O(layers x candidates) quantizations instead of candidates^layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from suite.cka import CKA
from suite.errors import PTQError, unknown
from suite.grid import Scheme
from suite.method import LayerEdit, LayerView, build, lookup
from suite.walk import REFERENCE_TOKENS


def distances(reference: Tensor) -> Callable[[Tensor], dict[str, float]]:
    """All metrics of a candidate's output against the reference (n, t, d), each as a distance: smaller is closer.

    cka: 1 - linear CKA.   mse: mean squared difference, relative to the reference's mean square.
    cosine: 1 - mean cosine similarity of a token's two outputs.   sqnr: minus the signal-to-noise ratio, in dB.
    """
    x = reference.reshape(-1, reference.shape[-1]).float()
    cka, power = CKA(reference), _squares(x)

    def measure(candidate: Tensor) -> dict[str, float]:
        y = candidate.reshape(x.shape).float()
        noise, other = _squares(y - x), _squares(y)
        lengths = (power * other).sqrt().clamp(min=1e-30)
        # 1 - x'y / |x||y|, from the difference: the cosine itself would leave no digits
        cosine = (noise - (other.sqrt() - power.sqrt()).square()) / (2 * lengths)
        relative = noise.sum() / power.sum()
        return {"cka": cka.distance(candidate), "mse": float(relative), "cosine": float(cosine.mean()),
                "sqnr": float(10 * torch.log10(relative.clamp(min=1e-30)))}

    return measure


def _squares(x: Tensor) -> Tensor:
    """Squared length of each token's vector, summed in float32, as float64: (tokens, d) -> (tokens,)."""
    return x.square().sum(-1).double()


METRICS = {
    "cka": "1 - linear CKA of the layer's outputs (the paper's criterion)",
    "mse": "mean squared difference, relative to the reference's mean square",
    "cosine": "1 - mean cosine similarity, token by token",
    "sqnr": "signal to quantization noise ratio of the outputs",
}


@dataclass(frozen=True)
class Select:
    """The local rule of a hybrid: every candidate's edit, scored; the closest wins.

    rules: for each candidate, its rule for every layer of the unit.
    """

    names: tuple[str, ...]
    rules: tuple[Sequence[Any], ...]
    metric: str
    reference_tokens: int = REFERENCE_TOKENS

    def quantize(self, layer: LayerView) -> LayerEdit:
        reference = layer.reference
        measure = distances(reference)
        scores: dict[str, dict[str, float]] = {}
        best: tuple[float, str, LayerEdit] | None = None
        for name, rules in zip(self.names, self.rules, strict=True):
            edit = layer.quantize_with(rules)
            scores[name] = measure(layer.after(edit).outputs(len(reference)))
            distance = scores[name][self.metric]
            if distance != distance:
                raise PTQError(f"layer {layer.index}: {self.metric} of candidate {name} is not a number; "
                               f"the layer's outputs are constant or not finite on this calibration data")
            loser = edit
            if best is None or distance < best[0]:
                loser, best = best[2] if best else None, (distance, name, edit)
            if loser is not None:
                layer.forget(loser)
        distance, chosen, edit = best
        others = [s[self.metric] for name, s in scores.items() if name != chosen]
        note = {"chosen": chosen, "candidates": scores, "margin": min(others) - distance if others else None}
        return LayerEdit(edit.params, edit.linears, {**edit.note, **note})


@dataclass(frozen=True)
class Hybrid:
    """CKA-guided modular quantization.

    pool:   names of registered methods; all get the same scheme and their default options.
    metric: one of `METRICS`, or what the record calls it; the record keeps all of them for every candidate.
    score_tokens: calibration tokens on which outputs are compared, the first ones; the methods themselves see all. The
            winner's outputs are completed and feed the next layer, so that nothing is computed twice.
    block:  consecutive layers that share one choice (1: the paper's main setting; its ablation has 2, 4, 8).

    Raises PTQError: empty pool, a name that is unknown, twice there, or rewrites the model (SpinQuant); unknown metric,
    block below 1.

    >>> Hybrid(pool=("gptq", "awq")).metric
    'cka'
    """

    scheme: Scheme = Scheme()
    pool: tuple[str, ...] = ("gptq", "awq", "smoothquant")
    metric: str = "cka"
    block: int = 1
    score_tokens: int = REFERENCE_TOKENS

    def __post_init__(self):
        if not self.pool or len(set(self.pool)) != len(self.pool):
            raise PTQError(f"pool is {', '.join(self.pool) or 'empty'}: it needs at least one method, and none twice")
        for name in self.pool:
            if any(getattr(lookup(part), "rewrites_model", False) for part in name.split("+")):
                raise PTQError(f"pool has {name}, which rewrites the whole model before it quantizes a layer: "
                               f"its layers cannot stand among those of other methods")
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)
        if self.block < 1:
            raise PTQError(f"block is {self.block}: allowed are whole numbers from 1")
        if self.score_tokens < 1:
            raise PTQError(f"score_tokens is {self.score_tokens}: allowed are whole numbers from 1")

    def plan(self, model: nn.Module, calib: Any) -> Sequence[Select]:
        total = model.config.num_hidden_layers
        plans = []
        for name in self.pool:
            plans.append(build(name, **self.scheme.options).plan(model, calib))
            if len(plans[-1]) != total:
                raise PTQError(f"pool member {name!r} has a rule for {len(plans[-1])} units, the model has {total} layers: "
                               f"a member of a pool needs one rule per layer")
        return [Select(self.pool, tuple(plan[i:i + self.block] for plan in plans), self.metric,
                       self.score_tokens)
                for i in range(0, total, self.block)]
