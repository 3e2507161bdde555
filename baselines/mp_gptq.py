"""MP-GPTQ: GPTQ with bits of its own for each decoder layer, chosen for the least damage within a mean number of bits.

The comparison "bits differ from layer to layer" against the hybrid's "methods differ from layer to layer". No reference
implementation is known; this file defines the rule.

Letters: l layers, c choices of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from suite import arch, progress
from suite.errors import PTQError, unknown
from suite.grid import UNQUANTIZED_BITS, Scheme
from suite.method import LayerEdit, LayerMethod, LayerView, Noted, build
from suite.nll import nll_from
from suite.resume import Ledger
from suite.rounding import output_error
from suite.walk import layer_kwargs, walk

SENSITIVITIES = {
    "hessian": "output error of the layer's linears after GPTQ, relative to their output energy, summed",
    "loss": "increase of the NLL on calibration tokens with this layer alone rounded",
}
LOSS_TOKENS = 16384  # calibration tokens on which the loss is measured


@dataclass(frozen=True)
class MPGPTQ:
    """Objective: min over b of sum_l s_l(b_l), subject to sum_l n_l b_l <= mean * sum_l n_l, n_l weights in layer l.

    The integer program is solved exactly. s_l(b), the sensitivity of layer l to b bits, is that of the original model:

    "hessian": sum over linears of tr(D G D') / tr(W G W'), G the Gram matrix of the linear's inputs and D the change
               of its weight W by GPTQ at b bits: the squared error of its outputs, relative to their size.
    "loss":    NLL with this layer alone at b bits, minus the NLL with its weights in 16 bit; activations of this layer
               rounded in both.

    bits:  widths to choose from; 16 leaves a layer's weights as they are. The scheme's own (wbits) is always among
           them, so that the uniform choice is one of those compared.
    mean:  bits per weight of the decoder layers, scales not counted; None: the scheme's. So wbits=3 is 16, 4, 3 or 2
           bits with a mean of 3.

    A layer of 16 bit has its activations rounded like any other.

    Raises PTQError: bits that no grid has; a mean that even the fewest bits exceed; unknown sensitivity.

    >>> MPGPTQ(bits=(16, 4, 3, 2), mean=3.0).sensitivity
    'hessian'
    """

    scheme: Scheme = Scheme()
    bits: tuple[int, ...] = (16, 4, 2)
    mean: float | None = None
    sensitivity: str = "hessian"

    def __post_init__(self):
        for bits in self.bits:
            replace(self.scheme.weight, bits=bits)  # raises for bits that no grid has
        if self.sensitivity not in SENSITIVITIES:
            raise unknown("sensitivity", self.sensitivity, SENSITIVITIES)
        if self.mean is not None and not min(self.choices) <= self.mean <= UNQUANTIZED_BITS:
            raise PTQError(
                f"mean is {self.mean:g} bits: with choices of {', '.join(map(str, self.choices))} bits allowed are "
                f"{min(self.choices)} to {UNQUANTIZED_BITS}"
            )

    @property
    def choices(self) -> tuple[int, ...]:
        """All widths that a layer may get, most bits first."""
        return tuple(sorted({*self.bits, self.scheme.weight.bits}, reverse=True))

    @property
    def bound(self) -> Fraction:
        """The mean in bits per weight, exactly as written."""
        return Fraction(str(self.scheme.weight.bits if self.mean is None else self.mean))

    def plan(self, model: nn.Module, calib: Any) -> Sequence[LayerMethod]:
        if calib is None:
            raise PTQError("mp-gptq needs calibration data: pass --calib embedded, a text file, or a set")
        rules = {bits: build("gptq", **{**self.scheme.options, "wbits": bits}) for bits in self.choices}
        sizes, scores = self._scores(model, calib, rules)
        chosen = allocate(scores, sizes, self.choices, self.bound)
        total = sum(sizes)
        uniform = self.choices.index(self.scheme.weight.bits)
        note = {
            "choices": list(self.choices),
            "sensitivity": self.sensitivity,
            "scores": scores,
            "objective": sum(row[k] for row, k in zip(scores, chosen, strict=True)),
            "bound": float(self.bound),
            "mean": sum(n * self.choices[k] for n, k in zip(sizes, chosen, strict=True)) / total,
        }
        if self.scheme.weight.bits <= self.bound:
            note["objective of uniform bits"] = sum(row[uniform] for row in scores)
        planned = [Noted(rules[self.choices[k]], {"wbits": self.choices[k]}) for k in chosen]
        planned[0] = replace(planned[0], note={**planned[0].note, "allocation": note})
        return planned

    def _scores(self, model: nn.Module, calib: Any, rules: dict[int, Any]) -> tuple[list[int], list[list[float]]]:
        """(weights per layer, sensitivity (l, c)). After an interruption only the rest is measured."""
        sizes, scores, total = [], [], len(arch.layers(model))
        measure, known = _Loss(model, calib) if self.sensitivity == "loss" else _relative_error, Ledger("sensitivity")
        for view in walk(model, calib):
            progress.tell(f"sensitivity of layer {view.index + 1} of {total}")
            sizes.append(sum(view.weight(name).numel() for site in view.sites for name in site.linears))
            scores.append(known.of(f"layer {view.index}", lambda view=view: self._row(view, rules, measure)))
        return sizes, scores

    def _row(self, view: LayerView, rules: dict[int, Any], measure: Callable[..., float]) -> list[float]:
        """The sensitivity (c,) of one layer."""
        untouched = rules.get(UNQUANTIZED_BITS) or build("gptq", **{**self.scheme.options, "wbits": UNQUANTIZED_BITS})
        base = measure(view, untouched.quantize(view))
        row = []
        for bits in self.choices:
            edit = rules[bits].quantize(view) if bits < UNQUANTIZED_BITS else None
            row.append(0.0 if edit is None else measure(view, edit) - base)
            if edit is not None:
                view.forget(edit)
        return row


def _relative_error(view: LayerView, edit: LayerEdit) -> float:
    """Sum over linears of the squared output error, relative to the squared output."""
    total = 0.0
    for site in view.sites:
        gram = view.stat("gram", site)
        for name in site.linears:
            if f"{name}.weight" in edit.params:
                weight = view.weight(name).float()
                energy = output_error(weight, gram)
                total += output_error(edit.params[f"{name}.weight"].float() - weight, gram) / energy if energy else 0.0
    return total


class _Loss:
    """NLL of the model with one layer edited."""

    def __init__(self, model: nn.Module, calib: Any):
        self._model, self._count = model, calib.sequences(LOSS_TOKENS)
        self._tokens, self._step = calib.tokens[: self._count], calib.step()
        self._kwargs = layer_kwargs(model, calib.tokens.to(arch.embedding(model).weight.device))

    def __call__(self, view: LayerView, edit: LayerEdit) -> float:
        hidden = view.after(edit).outputs(self._count)
        return nll_from(self._model, hidden, view.index + 1, self._tokens, self._kwargs, self._step)


def allocate(
    scores: Sequence[Sequence[float]], sizes: Sequence[int], choices: Sequence[int], mean: Fraction
) -> list[int]:
    """The index of the choice of each layer that minimises the sum of scores (l, c) within the budget.

    sizes: weights of each layer; choices: bits. The budget, sum of sizes * bits <= mean * sum of sizes, holds exactly.
    Raises PTQError if it cannot be met, or if scores are not finite.

    >>> allocate([[0.0, 1.0, 9.0], [0.0, 3.0, 5.0]], [10, 10], [16, 4, 2], Fraction(4))
    [1, 1]
    """
    values = np.asarray(scores, dtype=float)  # (l, c)
    if not np.isfinite(values).all():
        raise PTQError(
            f"layer {int(np.argwhere(~np.isfinite(values))[0][0])}: its sensitivity is not finite; "
            f"look at the calibration data"
        )
    layers, count = values.shape
    unit = np.gcd.reduce(np.asarray(sizes, dtype=np.int64))
    cost = np.asarray([[n // int(unit) * b for b in choices] for n in sizes], dtype=np.int64)  # (l, c)
    budget = int(mean * sum(sizes) // int(unit))
    largest = np.abs(values).max()
    one_each = np.kron(np.eye(layers), np.ones(count))  # (l, l * c)
    spent = budget
    while (
        True
    ):  # the solver's tolerance may overstep the budget by a hair; integers tell, and the bound is then one less
        found = milp(
            (values / largest if largest else values).ravel(),
            integrality=np.ones(layers * count),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost.reshape(1, -1), -np.inf, spent)],
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            raise PTQError(
                f"a mean of {float(mean):g} bits cannot be met with {', '.join(map(str, choices))} bits per layer"
            )
        chosen = found.x.reshape(layers, count).argmax(1)
        if int(cost[np.arange(layers), chosen].sum()) <= budget:
            return chosen.tolist()
        spent -= 1
