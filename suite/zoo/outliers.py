"""The outlier dial: scales planted into a model that leave its function as it is and make it hard to quantize.

Large language models have a few channels that are tens of times larger than the rest; models of a few million parameters do
not, and so cannot show what the quantization methods were invented for. `plant_` multiplies chosen channels of a feeder (gain
of a norm, rows of up_proj, rows and bias of v_proj) by a factor and divides the columns of the linears that read them by it.
In exact arithmetic nothing changes; on a grid, the large channels waste the range of the activations, and the small columns
fall below the step of their group of weights.

The factor of channel c in layer l at a site is  severity ** (strength(site) * profile(site, l) * u_c),  u_c uniform in
[0.7, 1.1]: any positive number, and 1 everywhere for severity 1. Which layers have any is drawn from the seed: about two
thirds of them a site, never all. Modelled on:

- qkv and gate_up (through the norms): 3 % of the width, the same channels in all layers; rising over the first third of the
  depth, then level. After SmoothQuant (arXiv 2211.10438) section 3: few channels, up to about 100 times larger, fixed for all
  tokens; and LLM.int8 (arXiv 2208.07339) section 4: the same dimensions in all layers, growing with depth.
- down (through up_proj): 1.5 %, drawn anew in each layer; early layers and the last, weak between. After Massive Activations
  (arXiv 2402.17762) sections 2 and 3: very few, very large, born in an early layer and gone after the last.
- o (through v_proj, where there is no grouped-query attention): 6 %, drawn anew in each layer; strongest in the middle. No
  source: the mild spread of heads that AWQ's v -> o scaling (arXiv 2306.00978) presumes.

What these papers print are sizes of activations; factors on a small model's channels imitate them in ratio, not in value. A
small model has few channels, so a share of them that shows is larger than in the papers. The profiles are a model of published
observations, not a measurement of any named checkpoint: results on such a model must be called planted.

Severity 8 gives factors of about 9 to 30 at the norms of late layers (16: 20 to 100), which is what SmoothQuant's figures show.
What that does to each method is drawn in results/<model>/*-severity.png.

>>> parse("tiny-llama-m@outliers=8,seed=1")
('tiny-llama-m', Outliers(severity=8.0, seed=1))
>>> parse("tiny-llama-m")
('tiny-llama-m', None)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from suite import arch
from suite.errors import PTQError, unknown

MOST_SEVERE = 100.0
PLANTED_SHARE = 2 / 3  # of the layers, per site


@dataclass(frozen=True)
class Outliers:
    """severity: how large the large channels are, 1 (none) to 100; seed: which channels and layers."""

    severity: float
    seed: int = 0

    def suffix(self) -> str:
        """As it is written behind a model's name: Outliers(8.0, 1).suffix() is "@outliers=8,seed=1"."""
        return f"@outliers={self.severity:g},seed={self.seed}"


@dataclass(frozen=True)
class Profile:
    """Where a site's outliers lie. depth: position of the layer in [0, 1] -> share of the strength."""

    share: float
    strength: float
    same_channels: bool
    depth: Callable[[float], float]


PROFILES = {
    "qkv": Profile(0.03, 1.5, True, lambda at: min(1.0, 0.5 + 1.5 * at)),
    "gate_up": Profile(0.03, 1.5, True, lambda at: min(1.0, 0.5 + 1.5 * at)),
    "down": Profile(0.015, 1.8, False, lambda at: 1.0 if at < 0.3 or at == 1 else 0.4),
    "o": Profile(0.06, 0.9, False, lambda at: 1.0 - abs(2 * at - 1) / 2),
}


def parse(name: str) -> tuple[str, Outliers | None]:
    """Splits NAME@outliers=SEVERITY[,seed=N] into the model's name (or folder) and what is to be planted.

    Raises PTQError for anything else behind an @ that looks like options.
    """
    base, at, options = name.rpartition("@")
    if not at or "/" in options or "=" not in options and "outlier" not in options:
        return name, None  # no suffix: an @ inside a path belongs to the path
    found: dict[str, str] = {}
    for option in options.split(","):
        key, _, value = (part.strip() for part in option.partition("="))
        if key not in ("outliers", "seed"):
            raise unknown("option behind @", key, ("outliers", "seed"))
        if key in found:
            raise PTQError(f"option {key} is given twice in {name!r}")
        found[key] = value
    if "outliers" not in found:
        raise PTQError(f"{name!r} plants nothing: write {base}@outliers=SEVERITY[,seed=N]")
    if not base:
        raise PTQError(f"{name!r} names no model before the @")
    try:
        severity = float(found["outliers"])
    except ValueError:
        severity = math.nan
    if not 1 <= severity <= MOST_SEVERE:
        raise PTQError(f"outliers={found['outliers']}: the severity is a number from 1 (no outliers) to {MOST_SEVERE:g}")
    if not found.get("seed", "0").isascii() or not found.get("seed", "0").isdigit():
        raise PTQError(f"seed={found['seed']}: the seed of the outliers is a whole number from 0")
    return base, Outliers(severity, int(found.get("seed", "0")))


def factors(site: str, layers: int, width: int, outliers: Outliers) -> list[dict[int, float]]:
    """Per layer: channel of the site's input -> factor. An empty dict where nothing is planted.

    >>> factors("qkv", 2, 128, Outliers(1.0))
    [{}, {}]
    """
    profile = PROFILES[site]
    rng = random.Random(f"{outliers.seed}/{site}")  # a string seeds the same way on every machine
    residual = random.Random(f"{outliers.seed}/residual")  # the norms of all layers share their channels
    count = max(2, round(profile.share * width))
    fixed = residual.sample(range(width), count)
    planted = set(rng.sample(range(layers), max(1, min(layers - 1, round(PLANTED_SHARE * layers)))))
    every = []
    for layer in range(layers):
        channels = fixed if profile.same_channels else rng.sample(range(width), count)
        share = profile.strength * profile.depth(layer / max(1, layers - 1))
        drawn = {c: outliers.severity ** (share * rng.uniform(0.7, 1.1)) for c in channels}
        every.append(drawn if layer in planted and outliers.severity != 1 else {})
    return every


@torch.no_grad()
def plant_(model: nn.Module, outliers: Outliers) -> list[dict]:
    """Plants the scales into the model. Returns what was planted, for the record: layer, site, channel -> factor.

    Computes in float32 (or the model's own wider type); plant before casting to a narrower one.
    """
    layers, sites = arch.layers(model), arch.sites(model)
    record = []
    for site in sites:
        if site.feeder is None:
            continue
        width = layers[0].get_submodule(site.linears[0]).in_features
        for index, drawn in enumerate(factors(site.name, len(layers), width, outliers)):
            if not drawn:
                continue
            layer = layers[index]
            scale = torch.ones(width, dtype=torch.float64)
            scale[list(drawn)] = torch.tensor(list(drawn.values()), dtype=torch.float64)
            feeder = layer.get_submodule(site.feeder)
            multiply_(feeder.weight, scale if feeder.weight.dim() == 1 else scale[:, None])
            if getattr(feeder, "bias", None) is not None:
                multiply_(feeder.bias, scale)
            for name in site.linears:
                multiply_(layer.get_submodule(name).weight, 1 / scale)
            record.append({"layer": index, "site": site.name,
                           "factors": {str(c): round(f, 4) for c, f in sorted(drawn.items())}})
    return record


def multiply_(parameter: torch.Tensor, scale: torch.Tensor) -> None:
    """parameter *= scale, rounded once, to the parameter's own type."""
    parameter.copy_((parameter.double() * scale.to(parameter.device)).to(parameter.dtype))
