"""Gradient descent over orthogonal matrices.

Source: Li, Fuxin, Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform", 2020
(arXiv 2002.01113), section 4 and its algorithm 1, as SpinQuant (arXiv 2405.16406, section 3.3) uses it: no momentum.

Letters: n order of the matrices, ... any number of matrices of the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CONTRACTION = 0.5  # q of the paper: the step is at most 2 q / |W|
_TINY = 1e-8


def cayley_step(x: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of descent from orthogonal x (..., n, n) against a Euclidean gradient (..., n, n); a new tensor.

    With W = A - A', A = G X' - X X' G X' / 2 (skew: the gradient turned into the tangent space), the step follows

        X(s) = (I + s W / 2)^-1 (I - s W / 2) X        s = min(rate, 2 q / |W|), q = 0.5

    |W| is the largest absolute column sum. Deviation: the paper iterates towards X(s), which is why it bounds the step;
    here the system is solved, so that X(s) is orthogonal to machine precision, and the bound is kept as its step rule.

    >>> x = torch.eye(4, dtype=torch.float64)
    >>> float(orthogonality_error(cayley_step(x, torch.randn(4, 4, dtype=torch.float64), 1.5))) < 1e-12
    True
    """
    inner = gradient @ x.mT
    a = inner - x @ (x.mT @ inner) / 2
    w = a - a.mT  # (..., n, n), skew
    size = w.abs().sum(-2).amax(-1)[..., None, None]  # (..., 1, 1)
    half = (2 * _CONTRACTION / (size + _TINY)).clamp(max=rate) / 2 * w
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(identity + half, (identity - half) @ x)


def orthogonality_error(x: Tensor) -> Tensor:
    """The largest entry of |X'X - I| over all matrices (..., n, n)."""
    return (x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max()
