"""Linear centred kernel alignment, streamed over tokens in float64.

Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, section 3; the selection criterion of
CKA-Guided Modular Quantization (arXiv 2512.16282). With X (n, p), Y (n, q) centred over the n tokens:

    CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)   in [0, 1]

invariant to orthogonal maps and to isotropic scale of either side.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Moments:
    """Sums over tokens of x, y and x'y, from which the centred product follows exactly."""

    def __init__(self):
        self.n, self.sum_x, self.sum_y, self.product = 0, 0, 0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.n += len(x)
        self.sum_x = self.sum_x + x.sum(0)
        self.sum_y = self.sum_y + y.sum(0)
        self.product = self.product + x.T @ y

    def centred(self) -> Tensor:
        return self.product - torch.outer(self.sum_x, self.sum_y) / self.n


class CKA:
    """CKA of many candidates against one reference, which is reduced once.

    The value of a 4-bit layer is 0.999...; in float32 the ranking of candidates is noise. So sums are float64, tokens
    are shifted by the mean of the first chunk (which only conditions the sums: CKA ignores a shift), and the distance
    1 - CKA is what is kept.

    >>> x = torch.randn(64, 8); rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    >>> CKA(x).distance(3 * x @ rotation) < 1e-6
    True
    """

    def __init__(self, reference: Tensor, chunk: int = 8192):
        """reference (n, p), or any shape whose last axis is features."""
        self._x, self._chunk = reference.reshape(-1, reference.shape[-1]), chunk
        self._shift = self._x[:chunk].double().mean(0)
        self._norm = self._product(self._x, self._shift).norm()  # ||X'X||_F

    def _product(self, y: Tensor, shift: Tensor, cross: bool = False) -> Tensor:
        moments = _Moments()
        for x_chunk, y_chunk in zip(self._x.split(self._chunk), y.split(self._chunk)):
            y_chunk = y_chunk.double() - shift
            moments.add(x_chunk.double() - self._shift if cross else y_chunk, y_chunk)
        return moments.centred()

    def distance(self, candidate: Tensor) -> float:
        """1 - CKA between the reference and a candidate (n, q). 0 for identical, NaN if either side is constant."""
        y = candidate.reshape(-1, candidate.shape[-1])
        if len(y) != len(self._x):
            raise ValueError(f"CKA compares the same tokens: {len(self._x)} in the reference, {len(y)} in the candidate")
        shift = y[:self._chunk].double().mean(0)
        cross, own = self._product(y, shift, cross=True).norm(), self._product(y, shift).norm()
        # (a b - c^2) / (a b), written so that the small difference is formed once
        return float((self._norm * own - cross * cross) / (self._norm * own))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """CKA of two sets of features of the same tokens: x (n, p), y (n, q). 1 = same up to rotation and scale."""
    return 1.0 - CKA(x).distance(y)
