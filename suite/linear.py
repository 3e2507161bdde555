"""The quantized linear: integer codes and scales that other code can read back, run at full-precision speed."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite.grid import Grid, QuantSpec, decode, encode, fake_quantize_tokens
from suite.hadamard import Orthogonal, transform


class TokenRounding:
    """Activation rounding shared by the linears of one site: they read the same tensor, so it is rounded once.

    Remembers the last tensor it was given (and its version, so that an in-place change is seen) for as long as that
    lives, and the rounded copy with it: between two calls of a layer it holds no memory.
    """

    def __init__(self, spec: QuantSpec | None):
        self.spec = spec
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self._rounded: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.spec is None or not self.spec.quantized:
            return x
        if torch.is_grad_enabled() or x.is_inference():  # a version counter or a graph is missing: no sharing
            return fake_quantize_tokens(x, self.spec)
        if self._seen is None or self._seen[0]() is not x or self._seen[1] != x._version:
            self._seen, self._rounded = (weakref.ref(x, self._forget), x._version), fake_quantize_tokens(x, self.spec)
        return self._rounded

    def _forget(self, _: object) -> None:
        self._seen = self._rounded = None

    def __deepcopy__(self, memo):
        return type(self)(self.spec)

    def __reduce__(self):
        return type(self), (self.spec,)


class QuantLinear(nn.Module):
    """y = round_tokens(x) W' + b with W = (codes - zero) * scale.

    Buffers: `codes` (out, in) int8, `scale` (out, groups), `zero` (out, groups) or None; `weight` (out, in) is decoded
    once, in the type of the model, and not saved: the arithmetic is simulated in floating point, as in the papers.
    """

    def __init__(self, codes: Tensor, grid: Grid, bias: Tensor | None, rounding: TokenRounding, dtype: torch.dtype):
        super().__init__()
        self.spec, self.rounding = grid.spec, rounding
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", grid.scale.float())
        self.register_buffer("zero", None if grid.zero is None else grid.zero.float())
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.register_buffer("weight", decode(codes, grid).to(dtype), persistent=False)

    @classmethod
    def of(cls, weight: Tensor, grid: Grid, bias: Tensor | None, rounding: TokenRounding) -> QuantLinear:
        """From a weight (out, in) that already lies on its grid."""
        return cls(encode(weight, grid), grid, bias, rounding, weight.dtype)

    @property
    def act(self) -> QuantSpec | None:
        return self.rounding.spec

    @property
    def grid(self) -> Grid:
        return Grid(self.spec, self.scale, self.zero)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounding(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        act = self.act.bits if self.act else 16
        return f"in_features={self.in_features}, out_features={self.out_features}, W{self.spec.bits}A{act}"


class RoundedLinear(nn.Module):
    """A linear whose weight stays in floating point and whose input is rounded per token (W16A8)."""

    def __init__(self, linear: nn.Linear, rounding: TokenRounding):
        super().__init__()
        self.rounding, self.weight, self.bias = rounding, linear.weight, linear.bias
        self.out_features, self.in_features = linear.weight.shape

    @property
    def act(self) -> QuantSpec | None:
        return self.rounding.spec

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounding(x), self.weight, self.bias)


class Online(nn.Module):
    """A linear whose input is rotated first: y = linear(x M). M is orthogonal, and its inverse is in the linear's weight.

    Rotated inputs have no outliers, so they are rounded after the rotation, by the linear itself. `transform` is the
    name of M for people; buffer `factor` (m, m) with `power` and `blocks` is M, see `suite.hadamard.Orthogonal`.
    """

    def __init__(self, rotation: Orthogonal, linear: nn.Module):
        super().__init__()
        self.transform, self.power, self.blocks, self.linear = rotation.name, rotation.power, rotation.blocks, linear
        self.register_buffer("factor", rotation.factor.to(linear.weight.device, linear.weight.dtype))

    @property
    def rotation(self) -> Orthogonal:
        return Orthogonal(self.transform, self.factor, self.power, self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(transform(x, self.factor.to(x.dtype), self.power))

    def extra_repr(self) -> str:
        return self.transform
