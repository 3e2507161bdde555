"""Rounding of the key-value cache, as an option of the model that goes with every method.

Keys (after the rotary embedding) and values are rounded per token and head to an asymmetric grid before attention reads
them. Rounding a token's keys and values does not depend on other tokens, so rounding what a cache returns is the same
as storing it rounded: the arithmetic is simulated in floating point, like that of the weights.

With SpinQuant's R3 (arXiv 2405.16406, section 3.2) queries and keys are rotated by one Hadamard matrix before the keys
are rounded; their products stay.

Letters: b sequences, a heads, t tokens, h width of a head.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from suite import arch
from suite.errors import PTQError
from suite.grid import UNQUANTIZED_BITS
from suite.hadamard import Orthogonal, transform

ATTENTION = "ptq_kv"  # the name under which transformers finds `attention`
_ATTRIBUTE = "kv"


class KVRounding(nn.Module):
    """What one attention module does to its keys and values: the number of bits, and R3 if there is one."""

    def __init__(self, bits: int, rotation: Orthogonal | None = None):
        super().__init__()
        self.bits, self.transform = bits, rotation.name if rotation else ""
        self.power, self.blocks = (rotation.power, rotation.blocks) if rotation else (1, 1)
        self.register_buffer("factor", rotation.factor if rotation else None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, a, t, h) each."""
        if self.factor is not None:
            factor = self.factor.to(key.device, key.dtype)
            query, key = transform(query, factor, self.power), transform(key, factor, self.power)
        return query, round_heads(key, self.bits), round_heads(value, self.bits)

    @property
    def rotation(self) -> Orthogonal | None:
        return None if self.factor is None else Orthogonal(self.transform, self.factor, self.power, self.blocks)


def round_heads(x: Tensor, bits: int) -> Tensor:
    """(..., h) on an asymmetric grid of 2^bits values per vector, scale in float32; gradients pass straight through.

    >>> round_heads(torch.tensor([0.0, 0.4, 1.0]), 2)
    tensor([0.0000, 0.3333, 1.0000])
    """
    exact = x.detach().float()
    low, high = exact.amin(-1, keepdim=True).clamp(max=0), exact.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = (-low / scale).round()
    rounded = (((exact / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    """transformers' attention function: `sdpa` on rotated and rounded keys and values."""
    rounding = getattr(module, _ATTRIBUTE, None)
    if rounding is not None:
        query, key, value = rounding(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def check(bits: int) -> int:
    """Raises PTQError for a number of bits that no grid has; returns it."""
    if bits not in range(2, 9) and bits != UNQUANTIZED_BITS:
        raise PTQError(f"kvbits is {bits}: allowed are 2 to 8, and 16 for a key-value cache that is not rounded")
    return bits


def set_(model: nn.Module, bits: int, rotation: Orthogonal | None = None) -> None:
    """Rounds the key-value cache of a model from now on; 16 bits leave the model as it is.

    Call it before the model is quantized, so that methods see what it does to their inputs.
    Raises PTQError for bits out of range, and for a model whose attention cannot be exchanged.
    """
    if check(bits) == UNQUANTIZED_BITS:
        return
    for layer in arch.layers(model):
        setattr(
            layer.get_submodule(arch.family(model).attention),
            _ATTRIBUTE,
            KVRounding(bits, rotation).train(model.training),
        )
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise PTQError(
            f"kvbits is {bits}, but the attention of {model.config.model_type!r} cannot be exchanged: use kvbits 16"
        )


def rounding_of(model: nn.Module) -> KVRounding | None:
    """What the model does to its key-value cache, or None."""
    return getattr(arch.layers(model)[0].get_submodule(arch.family(model).attention), _ATTRIBUTE, None)


def bits_of(model: nn.Module) -> int:
    found = rounding_of(model)
    return found.bits if found else UNQUANTIZED_BITS
