"""A model laid out for studies: hidden states of calibration and test text at every layer, and runs from any layer on.

Nothing here writes the model: a layer is changed by a `LayerEdit`, in a view.

Letters: L layers, n sequences (or windows), t tokens of each, d hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from suite.calib import Calibration, from_tokens
from suite.method import LayerEdit
from suite.metrics import distances
from suite.search import token_nll
from suite.walk import LayerView, walk


class Side:
    """One text in the model: the unquantized hidden states (n, t, d) before each layer, `states[0]` the embeddings,
    `states[L]` what the last layer puts out."""

    def __init__(self, model: nn.Module, tokens: Tensor):
        self.model, self.calibration = model, from_tokens(tokens)
        self.views: list[LayerView] = list(walk(model, self.calibration))
        self.states: list[Tensor] = [view.inputs() for view in self.views] + [self.views[-1].outputs()]
        self.tokens = tokens

    def view(self, i: int, hidden: Tensor) -> LayerView:
        """Layer i, fed by given hidden states."""
        return self.views[i].fed_by(lambda first=None: hidden if first is None else hidden[:first])

    def step(self, i: int, hidden: Tensor, edit: LayerEdit | None) -> Tensor:
        """(n, t, d) output of layer i, edited."""
        view = self.view(i, hidden)
        return (view.after(edit) if edit is not None else view).outputs()

    def through(self, first: int, hidden: Tensor, edits: Mapping[int, LayerEdit]) -> Tensor:
        """What the last layer puts out when `hidden` enters layer `first`. edits: by layer, none where missing."""
        for i in range(first, len(self.views)):
            hidden = self.step(i, hidden, edits.get(i))
        return hidden

    def nll(self, hidden: Tensor) -> list[float]:
        """Summed NLL of tokens 2..t of each sequence, when the last layer puts out `hidden`."""
        return token_nll(self.model, hidden, self.tokens).double().sum(1).tolist()


class Probe:
    """Calibration text and test windows side by side.

    calibration: the sequences that methods see; windows (w, N): of the test text.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, windows: Tensor):
        self.model, self.calibration = model.eval(), calibration
        self.calib, self.test = Side(model, calibration.tokens), Side(model, windows)
        self.layers = len(self.calib.views)

    def distances(self, layer: int, first: int | None = None) -> Any:
        """The metrics of outputs of a layer against the unquantized ones, on the first sequences of the calibration text, or
        all."""
        return distances(self.calib.states[layer + 1][:first])

    def perplexity(self, nll: Sequence[float]) -> float:
        windows, size = self.test.tokens.shape
        return float(torch.tensor(nll, dtype=torch.float64).sum().div(windows * (size - 1)).exp())
