"""Round-to-nearest: each weight to the closest value of its group's grid. The control that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

from suite.grid import Scheme
from suite.method import LayerEdit, LayerView, Uniform
from suite.rounding import round_to_nearest


@dataclass(frozen=True)
class RTN(Uniform):
    """Objective: min |w - q(w)| per weight, the grid spanning each group's range. Uses no data.

    >>> RTN(Scheme.of(wbits=3)).scheme.weight.bits
    3
    """

    scheme: Scheme = Scheme()
    needs_calibration = False  # told to those who load data; the walk finds out by itself

    def quantize(self, layer: LayerView) -> LayerEdit:
        return round_to_nearest(layer, self.scheme)

