"""Linear centred kernel alignment, streamed over tokens in float64.

Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, section 3; the selection criterion of
CKA-Guided Modular Quantization (arXiv 2512.16282). With X (n, p), Y (n, q) centred over the n tokens:

    CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)   in [0, 1]

invariant to orthogonal maps and to isotropic scale of either side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """CKA of two sets of features of the same tokens, by the formula: x (n, p), y (n, q). 1 = same up to rotation and scale.

    Raises ValueError if the numbers of tokens differ. NaN if either side is constant.

    >>> linear_cka(torch.eye(4), 2 * torch.eye(4))
    1.0
    """
    if len(x) != len(y):
        raise ValueError(f"CKA compares the same tokens: {len(x)} in one set, {len(y)} in the other")
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


class CKA:
    """1 - CKA of many candidates against one reference of the same width, which is reduced once.

    The value of a 4-bit layer is 0.999..., so the ranking of candidates lies in digits that float32 does not have. The
    distance is therefore formed from the difference D = Y - X. With A = X'X, B = X'D, C = D'D (all centred):

        Y'X = A + B'     Y'Y = A + B + B' + C     1 - CKA = (|A| |Y'Y| - |Y'X|^2) / (|A| |Y'Y|)

    The numerator is of second order in D: it inherits the relative error of B and C, not the absolute error of A. So
    products of chunks may be formed in float32, at full speed; their sums, and all that follows, are float64.

    >>> x = torch.randn(64, 8); CKA(x).distance(3 * x) < 1e-6
    True
    """

    def __init__(self, reference: Tensor, chunk: int = 4096):
        """reference (n, p), or any shape whose last axis is features."""
        self._x, self._chunk = reference.reshape(-1, reference.shape[-1]).float(), chunk
        self._mean = torch.stack([x.sum(0, dtype=torch.float64) for x in self._x.split(chunk)]).sum(0) / len(self._x)
        self._gram = self._sum(lambda x, _: x.T @ x, self._x)  # A (p, p)

    def _centred(self, x: Tensor) -> Tensor:
        return x - self._mean.to(x.dtype)

    def _sum(self, product: Callable[[Tensor, Tensor], Tensor], other: Tensor) -> Tensor:
        """Float64 sum over chunks of a product of the centred reference and the chunk of another tensor."""
        total = torch.zeros(self._x.shape[1], self._x.shape[1], dtype=torch.float64, device=self._x.device)
        for x, y in zip(self._x.split(self._chunk), other.split(self._chunk)):
            total += product(self._centred(x), y)
        return total

    def distance(self, candidate: Tensor) -> float:
        """1 - CKA between the reference and a candidate of the same shape; 1 if the candidate is constant, NaN if the
        reference is, or if a value is not finite.

        Raises ValueError for another shape.
        """
        y = candidate.reshape(-1, candidate.shape[-1]).float()
        if y.shape != self._x.shape:
            raise ValueError(f"a candidate must have the reference's shape {tuple(self._x.shape)}, "
                             f"this one has {tuple(y.shape)}")
        difference = y - self._x
        shift = difference.mean(0, dtype=torch.float64).float()
        difference -= shift
        a, b = self._gram, self._sum(lambda x, d: x.T @ d, difference)
        c = self._sum(lambda _, d: d.T @ d, difference)
        own, cross = a + b + b.T + c, a + b
        norms = a.norm() * own.norm()
        return float(((norms - cross.square().sum()) / norms).clamp(min=0))  # a NaN stays one
