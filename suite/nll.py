"""The loss of a language model from the hidden states that enter one of its layers.

Letters: n sequences, t tokens, d hidden width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite import arch


@torch.no_grad()
def nll_from(
    model: nn.Module, hidden: Tensor, first: int, tokens: Tensor, kwargs: Sequence[Mapping[str, Any]], step: int = 8
) -> float:
    """Mean NLL, in nats, of tokens 2..t of every sequence, when `hidden` (n, t, d) enters layer `first`.

    tokens (n, t); kwargs: of every layer, from `suite.walk.layer_kwargs`; step: sequences run at once. `first` may be
    the number of layers: then `hidden` is what the last one put out.
    """
    layers, total = arch.layers(model), 0.0
    for x, target in zip(hidden.split(step), tokens.to(hidden.device).split(step), strict=True):
        for i in range(first, len(layers)):
            out = layers[i](x, **kwargs[i])
            x = out[0] if isinstance(out, tuple) else out
        logits = arch.head(model)(arch.final_norm(model)(x))  # (step, t, v)
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten(), reduction="sum"))
    return total / (len(tokens) * (tokens.shape[1] - 1))
