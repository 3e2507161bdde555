"""Round-to-nearest on ranges that were searched for: a group's largest weights are clipped where all others gain by it."""

from dataclasses import dataclass

import torch

from suite.grid import Scheme, fake_quantize, find_grid
from suite.method import LayerEdit, LayerView, Uniform
from suite.rounding import round_to_nearest


@dataclass(frozen=True)
class RangeSearch(Uniform):
    """Objective, per row and group: min over the share s of sum_j E[x_j^2] (Q_s(w_j) - w_j)^2.

    Q_s rounds to the grid that covers s times the group's range; E[x_j^2] is the mean square of input j over the
    calibration tokens. It is the output error if inputs did not move together. tries: shares from 1 down to `lowest`.
    """

    scheme: Scheme = Scheme()
    tries: int = 12
    lowest: float = 0.6

    def quantize(self, layer: LayerView) -> LayerEdit:
        shares = {}
        for site in layer.sites:
            power = layer.stat("gram", site).diagonal()  # (i,)
            for name in site.linears:
                shares[name] = self._search(layer.weight(name), power)
        return round_to_nearest(layer, self.scheme, shares)

    def _search(self, weight: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
        """The best share of each row and group: weight (o, i), power (i,) -> (o, g)."""
        spec = self.scheme.weight
        o, g = weight.shape[0], spec.groups(weight.shape[1])
        least = torch.full((o, g), float("inf"), device=weight.device)
        best = torch.ones_like(least)
        for share in torch.linspace(1, self.lowest, self.tries).tolist():
            change = fake_quantize(weight, find_grid(weight, spec, share)) - weight  # (o, i)
            error = (change.float().square() * power).reshape(o, g, -1).sum(-1)  # (o, g)
            better = error < least
            best, least = torch.where(better, share, best), torch.where(better, error, least)
        return best
