"""The suite's grids and the schemes of the compressed-tensors format: each in the words of the other.

The format (https://github.com/vllm-project/compressed-tensors) says in config.json on which integer grid each linear is,
in groups of linears with one scheme each. Only integer grids without calibrated activations are of both worlds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from suite.errors import PTQError
from suite.grid import QuantSpec

if TYPE_CHECKING:  # loading it takes seconds, and most commands do without
    from compressed_tensors.quantization import QuantizationScheme

METHOD = "compressed-tensors"
PACKED, BYTES, DENSE = "pack-quantized", "int-quantized", "dense"


def to_scheme(weight: QuantSpec | None, act: QuantSpec | None, targets: list[str]) -> QuantizationScheme:
    """The scheme of linears whose weights lie on `weight` (None: 16 bit) and whose inputs are rounded to `act` (None: not).

    targets: names of the linears, regular expressions after "re:", or the class "Linear".

    >>> to_scheme(QuantSpec(4), None, ["Linear"]).format
    'pack-quantized'
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = None if weight is None else QuantizationArgs(
        num_bits=weight.bits, type="int", symmetric=weight.symmetric, group_size=weight.group_size,
        strategy="group" if weight.group_size else "channel")
    inputs = None if act is None else QuantizationArgs(
        num_bits=act.bits, type="int", symmetric=True, strategy="token", dynamic=True)
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs, format=form_of(weight, act))


def form_of(weight: QuantSpec | None, act: QuantSpec | None) -> str:
    """How the weights of a scheme stand in the file: packed, but for the one case in which engines want bytes."""
    if weight is None:
        return DENSE
    plain = weight.bits == 8 and weight.symmetric and weight.group_size is None
    return BYTES if plain and act is not None and act.bits == 8 else PACKED


def from_scheme(scheme: QuantizationScheme, name: str) -> tuple[QuantSpec | None, QuantSpec | None]:
    """(grid of the weights, grid of the inputs) that a scheme means; None where it rounds nothing.

    Raises PTQError, naming the group, for what the suite has no grid for: floating-point types, calibrated or asymmetric
    activations, scales per tensor or block, rounded outputs.
    """
    def refuse(what: str, found: Any, allowed: str) -> PTQError:
        return PTQError(f"scheme {name!r} of the checkpoint has {what} {found!r}: allowed is {allowed}")

    weights, inputs = scheme.weights, scheme.input_activations
    if scheme.output_activations is not None:
        raise PTQError(f"scheme {name!r} of the checkpoint rounds outputs of linears: allowed are weights and inputs")
    for what, args in (("weights", weights), ("inputs", inputs)):
        if args is not None and (args.type != "int" or args.num_bits not in range(2, 9)):
            raise refuse(f"{what} of type", f"{args.type}{args.num_bits}", "int of 2 to 8 bits")
    if weights is not None and (weights.strategy not in ("group", "channel") or weights.dynamic):
        raise refuse("scales of weights per", weights.strategy, "group or channel, fixed")
    if inputs is not None and not (inputs.strategy == "token" and inputs.dynamic is True and inputs.symmetric):
        kind = f"{'' if inputs.symmetric else 'a'}symmetric, {'dynamic' if inputs.dynamic else 'static'}, {inputs.strategy}"
        raise refuse("scales of inputs", kind, "symmetric, dynamic, one a token")
    weight = None if weights is None else QuantSpec(
        weights.num_bits, weights.symmetric, weights.group_size if weights.strategy == "group" else None)
    return weight, None if inputs is None else QuantSpec(inputs.num_bits, True, None)


def grouped(linears: Mapping[str, tuple[QuantSpec | None, QuantSpec | None]]) -> list[QuantizationScheme]:
    """The schemes of a model, in the order of its linears: name -> (grid of the weight, grid of the input).

    With one scheme for all its target is the class of all linears; with several each lists its own by name.
    """
    names: dict[tuple, list[str]] = {}
    for name, specs in linears.items():
        names.setdefault(specs, []).append(name)
    return [to_scheme(weight, act, ["Linear"] if len(names) == 1 else own) for (weight, act), own in names.items()]
