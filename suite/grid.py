"""Integer grids: where the representable values of a weight or an activation lie, and rounding to them.

A grid maps an integer code q to the value (q - zero) * scale. Codes are signed, -2^(b-1) .. 2^(b-1)-1, for symmetric
and asymmetric grids alike, so that every code of up to 8 bits fits into int8.

Letters: o output rows, i input columns, g groups per row, s columns per group (i = g * s), n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suite.errors import PTQError

SCALE_BITS = 16  # scales are rounded to bfloat16, the type in which checkpoints store them
UNQUANTIZED_BITS = 16
_TINY = 1e-8  # a group of zeros gets this scale instead of a division by zero


@dataclass(frozen=True)
class QuantSpec:
    """One grid family: how many bits, symmetric around zero or not, and how many values share a scale.

    bits: 2 to 8; 16 stands for "not quantized".
    group_size: input columns that share a scale; None: one scale per row (weights) or per token (activations).

    Raises PTQError for a number of bits or a group size that no grid has.

    >>> QuantSpec(bits=4).levels
    16
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = 128

    def __post_init__(self):
        if self.bits not in range(2, 9) and self.bits != UNQUANTIZED_BITS:
            raise PTQError(f"bits is {self.bits}: allowed are 2 to 8, and 16 for no quantization")
        if self.group_size is not None and self.group_size < 1:
            raise PTQError(f"group size is {self.group_size}: allowed are positive numbers, or none for one scale per row")

    @property
    def quantized(self) -> bool:
        return self.bits < UNQUANTIZED_BITS

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def groups(self, width: int, name: str = "a weight") -> int:
        """How many groups a row of `width` columns has. Raises PTQError if they do not come out even."""
        if self.group_size is None:
            return 1
        if width % self.group_size:
            fitting = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
            raise PTQError(f"group size {self.group_size} does not divide the width {width} of {name}: "
                           f"use one of {fitting}, or --group-size 0 for one scale per row")
        return width // self.group_size

    def effective_bits(self, width: int) -> float:
        """Bits per weight with the scales (16 bit) and zero points counted.

        >>> QuantSpec(4, True, 128).effective_bits(4096)
        4.125
        """
        if not self.quantized:
            return float(self.bits)
        shared = SCALE_BITS + (0 if self.symmetric else self.bits)
        return self.bits + shared * self.groups(width) / width


@dataclass(frozen=True)
class Scheme:
    """The format all methods of a comparison share: the grid of the weights and that of the activations.

    act None: activations stay in floating point. Activations are quantized dynamically, one scale per token.

    >>> str(Scheme())
    'W4A8 g128'
    """

    weight: QuantSpec = QuantSpec(4, True, 128)
    act: QuantSpec | None = QuantSpec(8, True, None)

    @classmethod
    def of(cls, wbits: int = 4, abits: int = 8, group_size: int = 128, symmetric: bool = True) -> Scheme:
        """From the words of the command line: abits 16 leaves activations alone, group_size 0 is one scale per row."""
        if abits not in (4, 8, 16):
            raise PTQError(f"abits is {abits}: allowed are 4, 8, and 16 for no quantization of activations")
        if group_size < 0:
            raise PTQError(f"group size is {group_size}: allowed are positive numbers, and 0 for one scale per row")
        weight = QuantSpec(wbits, symmetric, group_size or None)
        return cls(weight, None if abits == UNQUANTIZED_BITS else QuantSpec(abits, True, None))

    @property
    def options(self) -> dict:
        """The inverse of `of`."""
        return {"wbits": self.weight.bits, "abits": self.act.bits if self.act else UNQUANTIZED_BITS,
                "group_size": self.weight.group_size or 0, "symmetric": self.weight.symmetric}

    def __str__(self) -> str:
        group = f" g{self.weight.group_size}" if self.weight.group_size else " per channel"
        asymmetric = "" if self.weight.symmetric else " asym"
        return f"W{self.weight.bits}A{self.act.bits if self.act else UNQUANTIZED_BITS}{group}{asymmetric}"


@dataclass(frozen=True)
class Grid:
    """The grid of one weight: scale (o, g) float32 with bfloat16 values, zero (o, g) float32 or None if symmetric."""

    spec: QuantSpec
    scale: Tensor
    zero: Tensor | None = None

    def columns(self, i: int, j: int, width: int) -> Grid:
        """The grid of the columns i..j of a weight with `width` columns, one scale a column: used to round column-wise."""
        size = self.spec.group_size or width
        index = torch.arange(i, j, device=self.scale.device) // size
        return Grid(self.spec, self.scale[:, index], None if self.zero is None else self.zero[:, index])


def find_grid(weight: Tensor, spec: QuantSpec, shrink: Tensor | float = 1.0) -> Grid:
    """The grid that covers `shrink` times the range of each group of a weight.

    weight (o, i); shrink: a number, or (o, g): below 1 the largest values of the group are clipped. Symmetric grids
    spread the range over all codes: scale = max|w| / (2^(b-1) - 1/2), as the GPTQ code and compressed-tensors do.

    >>> g = find_grid(torch.tensor([[-7.5, 3.0]]), QuantSpec(4, True, None)); float(g.scale)
    1.0
    """
    o, i = weight.shape
    w = weight.float().reshape(o, spec.groups(i), -1)  # (o, g, s)
    if spec.symmetric:
        scale = w.abs().amax(-1) * shrink / (spec.levels / 2 - 0.5)  # (o, g)
        return Grid(spec, _storable(scale))
    low, high = w.amin(-1).clamp(max=0) * shrink, w.amax(-1).clamp(min=0) * shrink  # (o, g)
    scale = _storable((high - low) / (spec.levels - 1))
    zero = (spec.qmin - (low / scale).round()).clamp(spec.qmin, spec.qmax)
    return Grid(spec, scale, zero)


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(min=_TINY).to(torch.bfloat16).float()


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """Codes (o, i) float32 of the nearest grid values; weight (o, i)."""
    o, i = weight.shape
    w = weight.float().reshape(o, grid.scale.shape[1], -1) / grid.scale[..., None]  # (o, g, s)
    if grid.zero is not None:
        w = w + grid.zero[..., None]
    return w.round_().clamp_(grid.spec.qmin, grid.spec.qmax).reshape(o, i)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Values (o, i) float32 of codes (o, i)."""
    o, i = codes.shape
    q = codes.float().reshape(o, grid.scale.shape[1], -1)  # (o, g, s)
    if grid.zero is not None:
        q = q - grid.zero[..., None]
    return (q * grid.scale[..., None]).reshape(o, i)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest grid values (o, i), in the type of the weight."""
    return decode(encode(weight, grid), grid).to(weight.dtype)


def fake_quantize_tokens(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """Activations (..., i) rounded to a symmetric grid of their own per token; same type. None: unchanged.

    Dynamic: the scale is max|x| / (2^(b-1) - 1/2) of the token itself, in float32, never stored.
    """
    if spec is None or not spec.quantized:
        return x
    scale = x.float().abs().amax(-1, keepdim=True).clamp_(min=_TINY).div_(spec.levels / 2 - 0.5)  # (..., 1)
    return (x.float() / scale).round_().clamp_(spec.qmin, spec.qmax).mul_(scale).to(x.dtype)
