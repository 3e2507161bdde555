"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the spread of the activations into the weights, then round both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suite.errors import PTQError
from suite.fold import fold
from suite.grid import Scheme
from suite.method import LayerEdit, LayerView, Native, Site, Uniform
from suite.rounding import round_to_nearest


@dataclass(frozen=True)
class SmoothQuant(Uniform):
    """Objective: channels of x / s and of s W that are equally easy to round: s = max|x|^alpha / max|W|^(1 - alpha).

    Source: section 4 of the paper. Both maxima are clamped at 1e-5, the one over W taken over all linears of the site,
    as in the released code. Folds: norm -> q, k, v and norm -> gate, up.

    alpha: 0 moves everything into the activations, 1 everything into the weights. 0.5 by default; 0.85 is published for
    Llama-2-7B and Llama-3, 0.8 for Mistral.

    >>> SmoothQuant(alpha=0.85).alpha
    0.85
    """

    scheme: Scheme = Scheme()
    alpha: float = 0.5
    solves = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise PTQError(f"alpha is {self.alpha}: allowed are numbers from 0 to 1")

    def quantize(self, layer: LayerView) -> LayerEdit:
        step = self.transform(layer)
        return step | round_to_nearest(layer.after(step), self.scheme)

    def transform(self, layer: LayerView) -> LayerEdit:
        whole = LayerEdit()
        for site in layer.sites:
            if site.feeder is not None and layer.weight(site.feeder).dim() == 1:  # fed by a norm
                whole = whole | fold(layer, site, self._scale(layer, site))
        return whole

    def _scale(self, layer: LayerView, site: Site) -> Tensor:
        """(in,)"""
        inputs = layer.stat("absmax", site).clamp(min=1e-5)
        weights = torch.stack([layer.weight(name).float().abs().amax(0) for name in site.linears]).amax(0).clamp(min=1e-5)
        return (inputs.pow(self.alpha) / weights.pow(1 - self.alpha)).clamp(min=1e-5)


NATIVE = Native(options={"symmetric": True, "group_size": 0, "abits": 8}, nsamples=512, seqlen=512, source="pile",
                inputs="full")
