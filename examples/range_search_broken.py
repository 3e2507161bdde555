"""`range_search` with a mistake, as an example of what `ptq check` and `ptq compare` find: the loop does not ask whether a
share is better than those before, so that every group gets the last one, and is clipped far too hard."""

from dataclasses import dataclass

import torch

from suite.grid import Scheme, fake_quantize, find_grid
from suite.method import LayerEdit, LayerView, Uniform
from suite.rounding import round_to_nearest


@dataclass(frozen=True)
class RangeSearchBroken(Uniform):
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
            best, least = torch.full_like(best, share), torch.minimum(error, least)
        return best
