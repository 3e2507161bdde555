"""One quantized decoder layer as plain tensors: what a run keeps of a finished layer, and continues from.

The form is that of quantized folders (suite/checkpoint.py): codes, scales and zero points instead of decoded weights,
so that a layer costs a byte per weight; and it is exact: the restored layer gives the same outputs to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from suite import arch
from suite.grid import Grid, QuantSpec
from suite.linear import QuantLinear, RoundedLinear, TokenRounding


def spec_as_json(spec: QuantSpec | None) -> dict | None:
    return None if spec is None else {"bits": spec.bits, "symmetric": spec.symmetric, "group_size": spec.group_size}


def grids(module: nn.Module) -> dict[str, dict]:
    """{"weight", "act"} of every quantized linear inside a module, by its name there."""
    return {name: {"weight": spec_as_json(getattr(linear, "spec", None)), "act": spec_as_json(linear.act)}
            for name, linear in module.named_modules() if isinstance(linear, (QuantLinear, RoundedLinear))}


def compact(leaf: str, tensor: Tensor) -> Tensor:
    """Scales in bfloat16 and zero points in int8 where that loses nothing."""
    if leaf not in ("scale", "zero"):
        return tensor
    stored = tensor.to(torch.bfloat16 if leaf == "scale" else torch.int8)
    return stored if torch.equal(stored.float(), tensor) else tensor


def take(layer: nn.Module) -> dict[str, Any]:
    """{"linears": name -> the grids of its weight and input, "tensors": name -> tensor, on the processor}.

    Names are those inside the layer.
    """
    tensors = {}
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        parent, _, leaf = name.rpartition(".")
        quantized = isinstance(layer.get_submodule(parent), QuantLinear)
        if not (quantized and leaf == "weight"):  # which is decoded from the codes
            tensors[name] = (compact(leaf, tensor) if quantized else tensor).detach().cpu()
    return {"linears": grids(layer), "tensors": tensors}


@torch.no_grad()
def put_(model: nn.Module, index: int, state: dict[str, Any]) -> None:
    """Makes layer `index` of a model the one that `take` has read. The inverse, to the last bit.

    Raises KeyError or RuntimeError for a state that is not of such a layer.
    """
    layer, device = arch.layers(model)[index], arch.embedding(model).weight.device
    # Copied: what was read from a file lies at any address, and products of such tensors differ in the last bit.
    tensors = {name: tensor.to(device, copy=True) for name, tensor in state["tensors"].items()}
    sites = {name: site.name for site in arch.sites(model) for name in site.linears}
    shared: dict[tuple, TokenRounding] = {}
    for name, specs in state["linears"].items():
        old, act = layer.get_submodule(name), specs["act"] and QuantSpec(**specs["act"])
        # One rounding for the linears that read the same tensor, as the walk commits them.
        rounding = shared.setdefault((sites[name], act), TokenRounding(act or None))
        if specs["weight"] is None:
            new: nn.Module = RoundedLinear(old, rounding)
        else:
            zero = tensors.pop(f"{name}.zero", None)
            grid = Grid(QuantSpec(**specs["weight"]), tensors.pop(f"{name}.scale").float(),
                        None if zero is None else zero.float())
            new = QuantLinear(tensors.pop(f"{name}.codes"), grid, tensors.pop(f"{name}.bias", None), rounding,
                              old.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, new.train(old.training))
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = layer.get_submodule(parent)
        if leaf in module._parameters:
            asked = module._parameters[leaf].requires_grad
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=asked))
        else:
            module._buffers[leaf] = tensor
