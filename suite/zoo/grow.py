"""Growing a large model from a small trained one, without changing its function: the m models start as what the s models know.

Width doubles by writing the residual stream twice, h' = [h, h]: root mean squares stay, every matrix that reads it is split at
random into two that add up, every matrix that writes it is written twice. Heads are doubled the same way. Neurons of the MLP
are repeated as far as there is room, the columns of down_proj shared out between the copies. Depth doubles by following each
layer with a copy whose outputs are zero. The random splits make the two halves differ from the first step on.
Sources of the idea: Net2Net (arXiv 1511.05641), bert2BERT (arXiv 2110.07143), LEMON (arXiv 2310.07999).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

READ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def split(weight: Tensor, generator: torch.Generator) -> Tensor:
    """(out, in) -> (out, 2 in): [A, W - A] with A a random share of W, so that [A, W - A] [x, x] = W x."""
    share = 0.2 + 0.6 * torch.rand(weight.shape, generator=generator)
    return torch.cat([weight * share, weight * (1 - share)], dim=1)


@torch.no_grad()
def grow_(large: nn.Module, small: nn.Module, seed: int = 0) -> None:
    """Fills `large` (twice the width, heads and layers of `small`, an intermediate size up to twice as large)."""
    generator = torch.Generator().manual_seed(seed)
    old, new = small.state_dict(), large.state_dict()
    embedding = old["model.embed_tokens.weight"]
    new["model.embed_tokens.weight"].copy_(torch.cat([embedding, embedding], dim=1))
    gain = torch.cat([old["model.norm.weight"]] * 2)
    if large.config.tie_word_embeddings:
        new["model.norm.weight"].copy_(gain / 2)  # the head reads both halves
    else:
        new["model.norm.weight"].copy_(gain)
        new["lm_head.weight"].copy_(split(old["lm_head.weight"], generator))
    inner, wide = small.config.intermediate_size, large.config.intermediate_size
    copied = torch.randperm(inner, generator=generator)[: wide - inner]
    for index in range(large.config.num_hidden_layers):
        source, target = f"model.layers.{index // 2}.", f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            new[f"{target}{norm}.weight"].copy_(torch.cat([old[f"{source}{norm}.weight"]] * 2))
        for name in READ:
            weight, bias = old[f"{source}{name}.weight"], old.get(f"{source}{name}.bias")
            again = slice(None) if name.startswith("self_attn") else copied  # every head twice, some neurons twice
            rows = [split(weight, generator), split(weight[again], generator)]
            new[f"{target}{name}.weight"].copy_(torch.cat(rows))
            if bias is not None:
                new[f"{target}{name}.bias"].copy_(torch.cat([bias, bias]))
        out, down = old[f"{source}self_attn.o_proj.weight"], old[f"{source}mlp.down_proj.weight"]
        new_out = torch.cat([split(out, generator), split(out, generator)])
        halves = []
        for _ in range(2):
            share = 0.2 + 0.6 * torch.rand(down[:, copied].shape, generator=generator)
            first, second = down.clone(), down[:, copied] * (1 - share)
            first[:, copied] *= share
            halves.append(torch.cat([first, second], dim=1))
        sounding = float(index % 2 == 0)  # the copy that follows a layer says nothing at first
        new[f"{target}self_attn.o_proj.weight"].copy_(new_out * sounding)
        new[f"{target}mlp.down_proj.weight"].copy_(torch.cat(halves) * sounding)
