"""The only file that knows model families: where the layers, sites, norms, embedding and head of a model are.

All families here share one layout of module names (Llama's); what differs between them is data in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from suite.errors import PTQError
from suite.linear import Online
from suite.method import Site


@dataclass(frozen=True)
class Family:
    """One model family. `sites` in execution order; paths of modules from the top of the causal model.

    writers: linears of a layer whose outputs are added to the residual stream; value, output: those on either side of the
    attention's mixing; intermediate: the one whose input has the width of the MLP; attention: their module.
    """

    sites: tuple[Site, ...]
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    attention: str = "self_attn"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    intermediate: str = "mlp.down_proj"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


_LLAMA_SITES = (
    Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    Site("o", ("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    Site("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    Site("down", ("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
)

FAMILIES = {
    "llama": Family(_LLAMA_SITES),  # Llama 2, 3, 3.1, 3.2
    "qwen2": Family(_LLAMA_SITES),  # Qwen1.5, 2, 2.5: biases on q, k, v
    "qwen3": Family(_LLAMA_SITES),  # norms on q and k per head; v, and so v -> o, is untouched by them
    "mistral": Family(_LLAMA_SITES),
}


def family(model: nn.Module) -> Family:
    """The family of a model. Raises PTQError for an architecture that is not in the table."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise PTQError(f"unsupported architecture {kind!r}: supported are {', '.join(sorted(FAMILIES))}; "
                       f"a new one is one entry in suite/arch.py")
    return FAMILIES[kind]


def layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers, first to last."""
    return model.get_submodule(family(model).layers)


def embedding(model: nn.Module) -> nn.Embedding:
    return model.get_submodule(family(model).embedding)


def final_norm(model: nn.Module) -> nn.Module:
    return model.get_submodule(family(model).norm)


def head(model: nn.Module) -> nn.Linear:
    return model.get_submodule(family(model).head)


def sites(model: nn.Module) -> tuple[Site, ...]:
    """The sites of every decoder layer of this model.

    With grouped-query attention one row of v feeds several columns of o, so v cannot absorb a scale per column: the
    feeder of "o" is None there. A linear inside an `Online` rotation is named as such, and no feeder reaches through it.
    """
    config = model.config
    grouped = config.num_key_value_heads != config.num_attention_heads
    layer = layers(model)[0]
    return tuple(_rotated(replace(site, feeder=None) if grouped and site.name == "o" else site, layer)
                 for site in family(model).sites)


def _rotated(site: Site, layer: nn.Module) -> Site:
    inner = {name: f"{name}.linear" for name in site.linears if isinstance(layer.get_submodule(name), Online)}
    if not inner:
        return site
    return replace(site, linears=tuple(inner.get(name, name) for name in site.linears), feeder=None,
                   scope=inner.get(site.scope, site.scope))


def head_dim(model: nn.Module) -> int:
    """Width of one attention head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def untie(model: nn.Module) -> None:
    """Gives the head a weight of its own. The config is told, since transformers and lm-eval tie again by it."""
    if getattr(model.config, "tie_word_embeddings", False):
        head(model).weight = nn.Parameter(embedding(model).weight.detach().clone())
        model.config.tie_word_embeddings = False
