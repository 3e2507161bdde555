"""GPTQ (Frantar et al., arXiv 2210.17323): weights are rounded column by column, each column's error made up for by the rest.

Letters: o output rows of all linears of a site, i input columns, b columns per lazy block, s columns per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suite.errors import PTQError
from suite.grid import Grid, QuantSpec, Scheme, find_grid
from suite.method import LayerEdit, LayerView, LinearQuant, Native, Site, Uniform
from suite.rounding import gram_blocks, grid_of_rows, output_error, round_to_nearest, search_shrink

_MOST_DAMP = 1.0  # beyond the mean diagonal itself the Hessian says nothing any more


@dataclass(frozen=True)
class GPTQ(Uniform):
    """Objective, per linear: min over q on the grid of tr((Q - W) H (Q - W)'), H the Gram matrix of the inputs.

    Source: section 3 of the paper; defaults are those of the released code (damping 0.01, block 128).

    damp:            share of the mean diagonal added to the diagonal. If the Cholesky factor does not exist it is raised
                     tenfold, up to 1, and the value used goes into the record.
    act_order:       columns in order of falling diagonal ("desc_act"). Groups stay groups of neighbouring columns, with
                     grids fixed in advance, so that the checkpoint needs no column index (the released code's
                     `static_groups`).
    true_sequential: each site sees the inputs that the already quantized sites of its layer produce.
    block_size:      columns after which the lazy updates are applied; changes the result only to round-off.
    clip:            search the range of each group (AWQ's search); off in the released code.

    Deviation: the linears of a site share one solve, since they share H; the result is the same row by row.

    >>> GPTQ(Scheme.of(wbits=3), act_order=True).damp
    0.01
    """

    scheme: Scheme = Scheme()
    damp: float = 0.01
    act_order: bool = False
    true_sequential: bool = False
    block_size: int = 128
    clip: bool = False

    def __post_init__(self):
        if not 0 < self.damp <= _MOST_DAMP:
            raise PTQError(f"damp is {self.damp}: allowed are numbers above 0 and up to {_MOST_DAMP:g} (of the mean diagonal)")
        if self.block_size < 1:
            raise PTQError(f"block_size is {self.block_size}: allowed are whole numbers from 1")

    def quantize(self, layer: LayerView) -> LayerEdit:
        if not self.scheme.weight.quantized:
            return round_to_nearest(layer, self.scheme)
        whole, original, losses, damps = LayerEdit(), layer, {}, {}
        for site in layer.sites:
            step = self._quantize_site(layer, site)
            whole = whole | step
            losses.update(step.note["losses"])
            damps.update(step.note["damp"])
            if self.true_sequential:
                layer = original.after(whole)
        return LayerEdit(whole.params, whole.linears, {"losses": losses, **({"raised damping": damps} if damps else {})})

    def _quantize_site(self, layer: LayerView, site: Site) -> LayerEdit:
        weights = [layer.weight(name) for name in site.linears]
        stacked, gram = torch.cat([w.float() for w in weights]), layer.stat("gram", site)  # (o, i), (i, i)
        try:
            quantized, grid, damp = solve(stacked, gram, self.scheme.weight, self.damp, self.block_size, self.act_order,
                                          self.clip)
        except PTQError as error:
            raise PTQError(f"layer {layer.index}, site {site.name}: {error}") from None
        params, linears, losses, row = {}, {}, {}, 0
        for name, weight in zip(site.linears, weights):
            rows = slice(row, row + len(weight))
            params[f"{name}.weight"] = quantized[rows].to(weight.dtype)
            linears[name] = LinearQuant(grid_of_rows(grid, rows), self.scheme.act)
            losses[name] = output_error(quantized[rows] - stacked[rows], gram)
            row = rows.stop
        return LayerEdit(params, linears, {"losses": losses, "damp": {site.name: damp} if damp != self.damp else {}})


def solve(weight: Tensor, gram: Tensor, spec: QuantSpec, damp: float = 0.01, block_size: int = 128,
          act_order: bool = False, clip: bool = False) -> tuple[Tensor, Grid, float]:
    """One weight (o, i) float32 against one Gram matrix (i, i): the rounded weight, its grid, the damping that was used.

    Dead inputs (a zero on the diagonal) get weight 0, as in the released code.

    Raises PTQError if the Gram matrix is not finite or cannot be factored with any damping.
    """
    o, i = weight.shape
    size = spec.group_size or i
    w, h = weight.clone(), gram.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0

    static = act_order  # a group whose columns are visited at different times needs its grid in advance
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(i, device=w.device)
    blocks = gram_blocks(h, spec) if clip else None  # (g, s, s)
    fixed = find_grid(w, spec, search_shrink(w, spec, blocks) if clip else 1.0) if static else None
    h = h[order][:, order]
    factor, used = inverse_factor(h, damp)  # (i, i), upper
    del h

    # a group must begin and end with a block, or hold whole blocks, so that its grid is found on up-to-date columns
    block_size = block_size if block_size % size == 0 or size % block_size == 0 else size
    columns = w[:, order].T.contiguous()  # (i, o): a column is contiguous
    done = torch.empty_like(columns)
    scales, zeros = [], []
    if fixed is not None:
        per_column = fixed.columns(0, i, i)
        column_scale, column_zero = per_column.scale[:, order].T.contiguous(), (
            None if per_column.zero is None else per_column.zero[:, order].T.contiguous())
    for start in range(0, i, block_size):
        stop = min(start + block_size, i)
        errors = torch.empty(stop - start, o, device=w.device)
        for c in range(start, stop):
            if fixed is None and c % size == 0:
                group = columns[c:c + size].T  # (o, s)
                local = QuantSpec(spec.bits, spec.symmetric, None)
                share = search_shrink(group, local, blocks[c // size][None]) if clip else 1.0
                found = find_grid(group, local, share)
                scales.append(found.scale)
                zeros.append(found.zero)
                scale, zero = found.scale[:, 0], None if found.zero is None else found.zero[:, 0]
            elif fixed is not None:
                scale, zero = column_scale[c], None if column_zero is None else column_zero[c]
            column = columns[c]  # (o,)
            code = column / scale if zero is None else column / scale + zero
            code = code.round_().clamp_(spec.qmin, spec.qmax)
            done[c] = (code if zero is None else code - zero) * scale
            error = (column - done[c]).div_(factor[c, c])
            columns[c + 1:stop].addr_(factor[c, c + 1:stop], error, alpha=-1)  # (rest of block, o)
            errors[c - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)  # (rest, o)
    quantized = torch.empty_like(w)
    quantized[:, order] = done.T
    grid = fixed or Grid(spec, torch.cat(scales, 1), None if spec.symmetric else torch.cat(zeros, 1))
    return quantized, grid, used


def inverse_factor(h: Tensor, damp: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor (i, i) of the inverse of h + damp * mean(diag) * I, and the damping that was used.

    Raises PTQError, with the cause, where no damping up to 1 makes h positive definite.
    """
    if not torch.isfinite(h).all():
        raise PTQError("the Gram matrix of the inputs is not finite: look for overflow in the calibration pass")
    mean = h.diagonal().mean()
    while True:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these is as large as the Gram matrix
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            del factor
            inverse, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return inverse, damp
        if damp >= _MOST_DAMP:
            raise PTQError(f"the Gram matrix is not positive definite even with damping {damp:g}: use more calibration data")
        damp = min(damp * 10, _MOST_DAMP)


NATIVE = Native(options={"symmetric": False, "abits": 16, "group_size": 0, "act_order": True, "true_sequential": True},
                nsamples=128, seqlen=2048)
