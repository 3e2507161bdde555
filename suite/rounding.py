"""Round-to-nearest of a layer's linears, and the search for the range that a grid should cover.

Letters: o output rows, i input columns, g groups, s columns per group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from suite.grid import Grid, QuantSpec, Scheme, fake_quantize, find_grid
from suite.method import LayerEdit, LayerView, LinearQuant


def round_to_nearest(layer: LayerView, scheme: Scheme, shrink: Mapping[str, Tensor] | None = None) -> LayerEdit:
    """Every linear of every site on its nearest grid values.

    shrink: linear name -> (o, g), the share of each group's range that the grid covers; 1 where missing.
    """
    params, linears = {}, {}
    for site in layer.sites:
        for name in site.linears:
            weight = layer.weight(name)
            grid = None
            if scheme.weight.quantized:
                grid = find_grid(weight, scheme.weight, (shrink or {}).get(name, 1.0))
                params[f"{name}.weight"] = fake_quantize(weight, grid)
            linears[name] = LinearQuant(grid, scheme.act)
    return LayerEdit(params, linears)


def gram_blocks(gram: Tensor, spec: QuantSpec) -> Tensor:
    """The diagonal blocks (g, s, s) of a Gram matrix (i, i): how inputs of one group move together."""
    i = gram.shape[0]
    g = spec.groups(i)
    return torch.stack([gram[k:k + i // g, k:k + i // g] for k in range(0, i, i // g)])


def search_shrink(weight: Tensor, spec: QuantSpec, blocks: Tensor, lowest: float = 0.5, step: float = 0.05) -> Tensor:
    """The share of the range (o, g) that minimises the output error of each row and group by itself.

    Source: AWQ's clip search (arXiv 2306.00978, and its released code): shares 1, 0.95, ... above `lowest`. The error of
    one group is d' G d with d (s,) the change of the weights and G (s, s) the group's block of the Gram matrix, which
    equals the squared output error of that group over all tokens, where the released code samples 512.

    weight (o, i); blocks (g, s, s).
    """
    o, i = weight.shape
    g = blocks.shape[0]
    best = torch.ones(o, g, device=weight.device)
    least = torch.full((o, g), float("inf"), device=weight.device)
    for k in range(int(round((1 - lowest) / step))):
        share = 1 - k * step
        change = (fake_quantize(weight, find_grid(weight, spec, share)) - weight).float()
        change = change.reshape(o, g, -1).transpose(0, 1)  # (g, o, s)
        error = ((change @ blocks) * change).sum(-1).T  # (o, g)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, torch.full_like(best, share), best)
    return best


def output_error(change: Tensor, gram: Tensor) -> float:
    """Mean over tokens of the squared output change: tr(D G D'), D (o, i) the change of a weight, G (i, i) = X'X / tokens."""
    change = change.float()
    return float(((change @ gram) * change).sum())


def grid_of_rows(grid: Grid, rows: slice) -> Grid:
    """The grid of some rows of a weight."""
    return Grid(grid.spec, grid.scale[rows], None if grid.zero is None else grid.zero[rows])
