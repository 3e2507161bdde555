"""Edits that leave the function of a layer as it is: a per-channel scale moved from a feeder into its consumers.

Source: SmoothQuant (arXiv 2211.10438) section 4 and AWQ (arXiv 2306.00978) section 3.2 use the same identity,
(x / s) (s W)' = x W', with the division absorbed by whatever produced x.
"""

from __future__ import annotations

from torch import Tensor

from suite.method import LayerEdit, LayerView, Site


def fold(layer: LayerView, site: Site, scale: Tensor) -> LayerEdit:
    """Divides the input of `site` by `scale` (in,) and multiplies the columns of its linears by it.

    The feeder (a norm's gain (d,), or a linear's rows (out, in) and bias (out,)) takes up the division.
    Raises ValueError if the site has no feeder that could.

    >>> step = fold(layer, site, torch.ones(128))   # doctest: +SKIP
    """
    if site.feeder is None:
        raise ValueError(f"site {site.name} has no feeder that absorbs a scale")
    params: dict[str, Tensor] = {}
    gain = layer.weight(site.feeder)
    inverse = (1 / scale).to(gain.device)
    params[f"{site.feeder}.weight"] = (gain.float() * (inverse if gain.dim() == 1 else inverse[:, None])).to(gain.dtype)
    bias = layer.bias(site.feeder)
    if bias is not None:
        params[f"{site.feeder}.bias"] = (bias.float() * inverse).to(bias.dtype)
    for name in site.linears:
        weight = layer.weight(name)
        params[f"{name}.weight"] = (weight.float() * scale.to(weight.device)).to(weight.dtype)  # (out, in) * (in,)
    return LayerEdit(params)
