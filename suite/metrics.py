"""How far a candidate's output is from the unquantized model's: the criteria that a selection can go by.

Letters: n sequences, t tokens of each, d hidden width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite import arch
from suite.cka import CKA

METRICS = {
    "cka": "1 - linear CKA of the layer's outputs (the paper's criterion)",
    "mse": "mean squared difference, relative to the reference's mean square",
    "cosine": "1 - mean cosine similarity, token by token",
    "sqnr": "signal to quantization noise ratio of the outputs",
    "kl": "KL divergence of the next-token distributions that norm and head read off the layer's outputs",
}
_LOGITS = 2**24  # numbers held at once while logits are compared: 64 MiB

Lens = Callable[[Tensor], Tensor]


def distances(reference: Tensor, lens: Lens | None = None) -> Callable[[Tensor], dict[str, float]]:
    """All metrics of a candidate's output against the reference (n, t, d), each as a distance: smaller is closer.

    cka: 1 - linear CKA.   mse: mean squared difference, relative to the reference's mean square.
    cosine: 1 - mean cosine similarity of a token's two outputs.   sqnr: minus the signal-to-noise ratio, in dB.
    kl: only with a `lens`, see `lens_of`: mean over tokens of KL(reference || candidate), in nats.
    """
    x = reference.reshape(-1, reference.shape[-1]).float()
    cka, power = CKA(reference), _squares(x)

    def measure(candidate: Tensor) -> dict[str, float]:
        y = candidate.reshape(x.shape).float()
        noise, other = _squares(y - x), _squares(y)
        lengths = (power * other).sqrt().clamp(min=1e-30)
        # 1 - x'y / |x||y|, from the difference: the cosine itself would leave no digits
        cosine = (noise - (other.sqrt() - power.sqrt()).square()) / (2 * lengths)
        relative = noise.sum() / power.sum()
        found = {"cka": cka.distance(candidate), "mse": float(relative), "cosine": float(cosine.mean()),
                 "sqnr": float(10 * torch.log10(relative.clamp(min=1e-30)))}
        if lens is not None:
            found["kl"] = _divergence(lens, reference.reshape(x.shape), candidate.reshape(x.shape))
        return found

    return measure


def lens_of(model: nn.Module) -> Lens:
    """Hidden states (tokens, d) -> logits (tokens, v), through the model's own final norm and head: the look ahead from
    any layer as if it were the last ("logit lens")."""
    norm, head = arch.final_norm(model), arch.head(model)
    return lambda hidden: head(norm(hidden))


@torch.no_grad()
def _divergence(lens: Lens, reference: Tensor, candidate: Tensor) -> float:
    """Both logits are formed again for each comparison: they would need more memory than the model."""
    step = max(1, _LOGITS // lens(reference[:1]).shape[-1])
    total = 0.0
    for x, y in zip(reference.split(step), candidate.split(step), strict=True):
        p, q = F.log_softmax(lens(x).float(), -1), F.log_softmax(lens(y).float(), -1)
        total += float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().sum())
    return total / len(reference)


def _squares(x: Tensor) -> Tensor:
    """Squared length of each token's vector, summed in float32, as float64: (tokens, d) -> (tokens,)."""
    return x.square().sum(-1).double()
