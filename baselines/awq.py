"""AWQ (Lin et al., arXiv 2306.00978): scale up the weights of salient channels before rounding, as seen in the activations.

Letters: o output rows, i input columns, g groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suite.errors import PTQError
from suite.fold import fold
from suite.grid import Scheme, fake_quantize, find_grid
from suite.method import LayerEdit, LayerView, Native, Site, Uniform
from suite.rounding import gram_blocks, output_error, round_to_nearest, search_shrink

_UNCLIPPED = ("q_proj", "k_proj")  # their errors meet in a product, which the released code found too fragile to clip


@dataclass(frozen=True)
class AWQ(Uniform):
    """Objective, per site: min over s of the error at the output of the site's scope when W is rounded as Q(W s) / s.

    Source: section 3.2 of the paper and the released code: s = mean|x|^ratio, ratio = k / ratios for k = 0 .. ratios - 1,
    clamped at 1e-4, divided by sqrt(max s * min s); the scope is the attention for q, k, v, the MLP for gate and up, the
    linear itself for o and down. Folds: norm -> q, k, v; v -> o where there is no grouped-query attention; norm -> gate,
    up; up -> down. Then a search for the range of each group (not for q and k).

    ratios: how many exponents are tried.   clip: search ranges.   clip_lowest: the smallest share of a range tried.

    Deviations: errors at a linear's own output and of clipping are computed from the Gram matrix, exactly over all
    tokens, where the released code samples; attention and MLP run on a sample of 2,048 tokens; inputs come from the
    quantized prefix (matched mode) or the full-precision model (native mode, as released).

    >>> AWQ(clip=False).ratios
    20
    """

    scheme: Scheme = Scheme()
    ratios: int = 20
    clip: bool = True
    clip_lowest: float = 0.5

    def __post_init__(self):
        if self.ratios < 1:
            raise PTQError(f"ratios is {self.ratios}: allowed are whole numbers from 1")
        if not 0 < self.clip_lowest < 1:
            raise PTQError(f"clip_lowest is {self.clip_lowest}: allowed are numbers between 0 and 1")

    def quantize(self, layer: LayerView) -> LayerEdit:
        step, scales = self._fold_all(layer)
        scaled = layer.after(step)
        shrink = self._ranges(layer, scaled, scales) if self.clip and self.scheme.weight.quantized else None
        return step | round_to_nearest(scaled, self.scheme, shrink)

    def transform(self, layer: LayerView) -> LayerEdit:
        """The folds alone."""
        return self._fold_all(layer)[0]

    def _fold_all(self, layer: LayerView) -> tuple[LayerEdit, dict[str, Tensor]]:
        """The folds, and the scale (i,) of each site. A fold changes the inputs of no other site, so all statistics are
        those of the layer as it is."""
        whole, ratios, scales = LayerEdit(), {}, {}
        for site in layer.sites:
            if site.feeder is not None and self.scheme.weight.quantized:
                current = layer.after(whole)
                ratios[site.name], scales[site.name] = self._search(layer, current, site)
                whole = whole | fold(current, site, scales[site.name])
        return LayerEdit(whole.params, whole.linears, {"ratios": ratios}), scales

    def _search(self, layer: LayerView, current: LayerView, site: Site) -> tuple[float, Tensor]:
        """The best exponent and its scale (i,)."""
        magnitude = layer.stat("absmean", site)  # (i,)
        weights = {name: current.weight(name) for name in site.linears}
        through_scope = site.scope not in site.linears
        target = layer.scope_outputs(site, {}) if through_scope else None
        best = (float("inf"), 0.0, torch.ones_like(magnitude))
        for k in range(self.ratios):
            ratio = k / self.ratios
            scale = magnitude.pow(ratio).clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            rounded = {f"{name}.weight": self._rounded(weight, scale) for name, weight in weights.items()}
            if through_scope:
                loss = float((layer.scope_outputs(site, rounded) - target).float().pow(2).mean())
            else:
                loss = sum(output_error(rounded[f"{name}.weight"] - weight, layer.stat("gram", site))
                           for name, weight in weights.items())
            if loss < best[0]:
                best = (loss, ratio, scale)
        if best[0] == float("inf"):
            raise PTQError(f"layer {layer.index}, site {site.name}: no scale gives a finite error; "
                           "look at the calibration data")
        return best[1], best[2]

    def _rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Q(W s) / s (o, i), in the weight's type."""
        scaled = weight.float() * scale
        return (fake_quantize(scaled, find_grid(scaled, self.scheme.weight)) / scale).to(weight.dtype)

    def _ranges(self, layer: LayerView, scaled: LayerView, scales: dict[str, Tensor]) -> dict[str, Tensor]:
        """linear -> share of the range (o, g). The Gram matrix after the fold is the one before it, rescaled."""
        found = {}
        for site in layer.sites:
            gram = layer.stat("gram", site)
            if site.name in scales:
                inverse = 1 / scales[site.name]
                gram = gram * inverse[:, None] * inverse
            blocks = gram_blocks(gram, self.scheme.weight)  # (g, s, s)
            for name in site.linears:
                if not name.endswith(_UNCLIPPED):
                    found[name] = search_shrink(scaled.weight(name), self.scheme.weight, blocks, self.clip_lowest)
        return found


NATIVE = Native(options={"symmetric": False, "abits": 16}, nsamples=128, seqlen=512, source="pile", inputs="full")
