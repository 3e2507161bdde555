"""The unquantized model, as an entry of the benchmark: what every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from suite.errors import PTQError
from suite.grid import UNQUANTIZED_BITS, QuantSpec, Scheme
from suite.method import LayerEdit, LayerView, LinearQuant, Uniform


@dataclass(frozen=True)
class FP16(Uniform):
    """Leaves every linear as it is. Raises PTQError when asked for fewer than 16 bits.

    >>> FP16().scheme.weight.bits
    16
    """

    scheme: Scheme = Scheme(QuantSpec(UNQUANTIZED_BITS), None)
    needs_calibration = False

    def __post_init__(self):
        if self.scheme.weight.quantized or self.scheme.act:
            raise PTQError(f"fp16 quantizes nothing, {self.scheme} asked: leave out wbits and abits, or choose rtn")

    def quantize(self, layer: LayerView) -> LayerEdit:
        return LayerEdit(linears={name: LinearQuant(None) for site in layer.sites for name in site.linears})
