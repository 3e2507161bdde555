"""Rotations of a whole model that leave its function as it is, and learning them.

Source: SpinQuant (arXiv 2405.16406), section 3: R1 rotates the residual stream, R2 the values of each head between v
and o. Both are products with weights: nothing is left to do when the model runs. R4 stays in the model, before
down_proj. RMSNorm commutes with a rotation once its gain stands in the linears that read it; embeddings are not
centred, which would change a model with RMSNorm.

Rows are vectors: a stream x becomes x R.

Letters: b sequences, t tokens, d hidden width, h width of a head, l layers, v vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from suite import arch, resume
from suite.grid import QuantSpec, fake_quantize, fake_quantize_tokens, find_grid
from suite.hadamard import Orthogonal
from suite.linear import Online
from suite.method import Site
from suite.stiefel import cayley_step, orthogonality_error
from suite.walk import layer_kwargs

TOLERANCE = 1e-5  # of orthogonality, after every step
_CHECKPOINTED_BYTES = 2 * 2**30  # activations beyond this are computed again in the backward pass instead of kept


@dataclass(frozen=True, eq=False)
class Rotations:
    """residual: R1 (d, d); heads: R2 of every layer (l, h, h). float64."""

    residual: Tensor
    heads: Tensor

    def digests(self) -> dict[str, Any]:
        """sha256 of each rotation's float64 bytes."""
        return {"R1": _digest(self.residual), "R2": [_digest(r) for r in self.heads]}


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def fuse_norms_(model: nn.Module) -> None:
    """Moves the gain of every norm on the residual stream into the linears that read it. The head must be untied."""
    for layer in arch.layers(model):
        for site in arch.sites(model):
            if reads_stream(site, layer):
                norm = layer.get_submodule(site.feeder)
                for name in site.linears:
                    _scale_columns_(layer.get_submodule(name).weight, norm.weight)
                norm.weight.fill_(1)
    norm = arch.final_norm(model)
    _scale_columns_(arch.head(model).weight, norm.weight)
    norm.weight.fill_(1)


def _scale_columns_(weight: Tensor, gain: Tensor) -> None:
    weight.copy_(weight.double() * gain.double())


def reads_stream(site: Site, layer: nn.Module) -> bool:
    """Whether the linears of a site read the residual stream, through a norm."""
    return site.feeder is not None and layer.get_submodule(site.feeder).weight.dim() == 1


@torch.no_grad()
def put_online_(model: nn.Module, rotation: Orthogonal) -> None:
    """R4: rotates the input of down_proj when the model runs, and the columns of its weight now."""
    name = arch.family(model).intermediate
    parent, _, leaf = name.rpartition(".")
    for layer in arch.layers(model):
        linear = layer.get_submodule(name)
        linear.weight.copy_(rotation.apply(linear.weight.double()))  # (d, i)
        setattr(layer.get_submodule(parent), leaf, Online(rotation, linear).train(linear.training))


@torch.no_grad()
def rotate_(model: nn.Module, rotations: Rotations) -> None:
    """R1 and R2 into all weights, as float64 products. The head is untied, the norms are fused.

    >>> arch.untie(model); fuse_norms_(model); rotate_(model, rotations)  # doctest: +SKIP
    """
    device = arch.embedding(model).weight.device
    r1, heads = rotations.residual.to(device), rotations.heads.to(device)
    for table in (arch.embedding(model).weight, arch.head(model).weight):  # (v, d)
        table.copy_(table.double() @ r1)
    for layer, r2 in zip(arch.layers(model), heads, strict=True):
        for key, value in rotated(model, layer, r1, r2).items():
            layer.get_parameter(key).copy_(value)


def rotated(model: nn.Module, layer: nn.Module, r1: Tensor, r2: Tensor) -> dict[str, Tensor]:
    """The parameters of one decoder layer that R1 (d, d) and R2 (h, h) change, in the type of the rotations.

    Differentiable in both rotations.
    """
    family, found = arch.family(model), {}
    h = len(r2)
    for site in arch.sites(model):
        for name in site.linears:
            linear = layer.get_submodule(name)
            weight = linear.weight.detach().to(r1.dtype)
            bias = None if linear.bias is None else linear.bias.detach().to(r1.dtype)
            role = name.removesuffix(".linear")
            if reads_stream(site, layer):
                weight = weight @ r1  # (out, d)
            if role == family.value:
                weight = (r2.T @ weight.unflatten(0, (-1, h))).flatten(0, 1)  # (heads, h, d) -> (heads * h, d)
                bias = None if bias is None else (bias.unflatten(0, (-1, h)) @ r2).flatten()
            if role == family.output:
                weight = (weight.unflatten(1, (-1, h)) @ r2).flatten(1)  # (d, heads, h) -> (d, heads * h)
            if role in family.writers:
                weight = r1.T @ weight  # (d, in)
                bias = None if bias is None else bias @ r1
            found[f"{name}.weight"] = weight
            if bias is not None:
                found[f"{name}.bias"] = bias
    return found


# ---------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Schedule:
    """How rotations are learned: `steps` of `batch` sequences, the rate falling to 0 as half a cosine wave."""

    steps: int = 100
    rate: float = 1.5
    batch: int = 8
    seed: int = 0

    def rate_at(self, step: int) -> float:
        return self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2


def learn(
    model: nn.Module,
    start: Rotations,
    tokens: Tensor,
    schedule: Schedule,
    act: QuantSpec | None = None,
    weight: QuantSpec | None = None,
    tell: Callable[[int, str], None] | None = None,
    checkpointing: bool | None = None,
    scale_gradient: bool = False,
) -> tuple[Rotations, dict[str, Any]]:
    """Rotations that lower the loss of the model with rounded activations, and what is to be recorded of the way.

    Objective: the mean NLL of the next token on `tokens` (n, t), inputs of all linears of the decoder layers rounded
    to `act` per token, weights to `weight` where that is given. Rounding passes gradients straight through; with
    scale_gradient they also reach the scale of a token, its largest entry. Steps are those of `suite.stiefel`, in
    float64. The model is untied, its norms are fused; it is run, not changed.

    Which sequences a step sees depends on the seed and on the set of sequences, not on their order. checkpointing: keep
    the layers' inputs only, and compute the rest again in the backward pass; by default where the rest is large.
    tell(step, text) is called before each step.

    State is kept in the run's workspace (`suite.resume`), if there is one.
    """
    device = arch.embedding(model).weight.device
    tokens = _sorted(tokens)
    n, t = tokens.shape
    batch = min(schedule.batch, n)
    if checkpointing is None:
        checkpointing = _activation_bytes(model, batch * t) > _CHECKPOINTED_BYTES
    network = _Network(model, tokens.to(device), act, weight, checkpointing, scale_gradient)
    r1, heads = start.residual.to(device, torch.float64), start.heads.to(device, torch.float64)
    losses: list[float] = []
    worst = 0.0
    workspace = resume.current()
    state = workspace.load("rotation") if workspace else None
    if state:
        r1, heads, losses, worst = state["R1"].to(device), state["R2"].to(device), state["losses"], state["worst"]
    batches = _batches(n, batch, schedule)
    with network.rounding():
        first = network.loss_at(
            start.residual.to(device, torch.float64), start.heads.to(device, torch.float64), batches[0]
        )
        for step in range(len(losses), schedule.steps):
            if tell:
                tell(step, f"rotation {step + 1} of {schedule.steps}, loss {losses[-1] if losses else first:.3f}")
            loss, (g1, g2) = network.gradient(r1, heads, batches[step])
            rate = schedule.rate_at(step)
            r1, heads = cayley_step(r1, g1, rate), cayley_step(heads, g2, rate)
            worst = max(worst, float(orthogonality_error(r1)), float(orthogonality_error(heads)))
            if not worst < TOLERANCE:  # not a number, too
                raise FloatingPointError(
                    f"step {step}: rotations are orthogonal to {worst:.1e} only; the gradient may not be finite"
                )
            losses.append(loss)
            if workspace and workspace.due("rotation"):
                workspace.save("rotation", {"R1": r1.cpu(), "R2": heads.cpu(), "losses": losses, "worst": worst})
        last = network.loss_at(r1, heads, batches[0])
    note = {
        "steps": schedule.steps,
        "sequences": schedule.steps * batch,
        "distinct sequences": len({int(i) for b in batches for i in b}),
        "tokens per sequence": t,
        "losses": losses,
        "loss before": first,
        "loss after": last,
        "orthogonality": worst,
    }
    return Rotations(r1.cpu(), heads.cpu()), note


def _sorted(tokens: Tensor) -> Tensor:
    """The sequences (n, t) in an order that their content decides."""
    return tokens[sorted(range(len(tokens)), key=lambda i: tokens[i].tolist())]


def _batches(n: int, batch: int, schedule: Schedule) -> list[Tensor]:
    """The sequences of every step: passes over all n, each in a new order."""
    generator = torch.Generator().manual_seed(schedule.seed)
    count = schedule.steps * batch
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-count // n))])
    return list(order[:count].split(batch))


def _activation_bytes(model: nn.Module, tokens: int) -> int:
    """About what the backward pass would keep: per layer 12 tensors of the stream's width, 6 of the MLP's."""
    config = model.config
    element = arch.embedding(model).weight.element_size()
    return tokens * config.num_hidden_layers * (12 * config.hidden_size + 6 * config.intermediate_size) * element


class _Network:
    """The model as a function of its rotations."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        act: QuantSpec | None,
        weight: QuantSpec | None,
        checkpointing: bool,
        scale_gradient: bool = False,
    ):
        self._model, self._tokens, self._act, self._weight = model, tokens, act, weight
        self._checkpointing, self._scale_gradient = checkpointing, scale_gradient
        self._kwargs = layer_kwargs(model, tokens)
        self._dtype = arch.embedding(model).weight.dtype
        self._precision = torch.float64 if self._dtype == torch.float64 else torch.float32  # of products with rotations

    def rounding(self) -> _Hooks:
        """Rounds the inputs of all linears of the decoder layers inside the block."""
        return _Hooks(self._model, self._act, self._scale_gradient)

    @torch.no_grad()
    def loss_at(self, r1: Tensor, heads: Tensor, chosen: Tensor) -> float:
        return float(self._loss(r1, heads, chosen))

    def gradient(self, r1: Tensor, heads: Tensor, chosen: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
        with torch.enable_grad():
            r1, heads = r1.detach().requires_grad_(), heads.detach().requires_grad_()
            loss = self._loss(r1, heads, chosen)
            return float(loss.detach()), torch.autograd.grad(loss, (r1, heads))

    def _loss(self, r1: Tensor, heads: Tensor, chosen: Tensor) -> Tensor:
        """Mean NLL of the sequences `chosen`."""
        tokens = self._tokens[chosen.to(self._tokens.device)]
        r1, heads = r1.to(self._precision), heads.to(self._precision)
        embedded = F.embedding(tokens, arch.embedding(self._model).weight.detach()).to(self._precision)
        hidden = (embedded @ r1).to(self._dtype)  # (b, t, d)
        for layer, r2, kwargs in zip(arch.layers(self._model), heads, self._kwargs, strict=True):
            hidden = self._run(self._layer, layer, hidden, r1, r2, kwargs)
        losses = [self._run(self._head, hidden[k : k + 1], tokens[k : k + 1], r1) for k in range(len(tokens))]
        return torch.stack(losses).mean()

    def _run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self._checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def _layer(self, layer: nn.Module, hidden: Tensor, r1: Tensor, r2: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        parameters = rotated(self._model, layer, r1, r2)
        if self._weight is not None:
            parameters = {
                key: _straight_through(value, _on_grid(value, self._weight)) if key.endswith("weight") else value
                for key, value in parameters.items()
            }
        out = functional_call(
            layer, {key: value.to(self._dtype) for key, value in parameters.items()}, (hidden,), dict(kwargs)
        )
        return out[0] if isinstance(out, tuple) else out

    def _head(self, hidden: Tensor, tokens: Tensor, r1: Tensor) -> Tensor:
        """The head reads the stream as it was before the rotation: it is not quantized."""
        normed = arch.final_norm(self._model)(hidden)
        back = (normed.to(self._precision) @ r1.T).to(self._dtype)
        logits = F.linear(back, arch.head(self._model).weight.detach())  # (b, t, v)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(self._precision), tokens[:, 1:].flatten())


class _Hooks:
    """Rounding of the linears' inputs, for the time of a block."""

    def __init__(self, model: nn.Module, act: QuantSpec | None, scale_gradient: bool):
        self._linears = [
            layer.get_submodule(name)
            for layer in arch.layers(model)
            for site in arch.sites(model)
            for name in site.linears
        ]
        self._act, self._scale_gradient, self._handles = act, scale_gradient, []

    def __enter__(self) -> None:
        if self._act is not None:
            self._handles = [linear.register_forward_pre_hook(self._round) for linear in self._linears]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _round(self, _: nn.Module, args: tuple) -> tuple:
        x, rounded = args[0], fake_quantize_tokens(args[0].detach(), self._act)
        if self._scale_gradient and torch.is_grad_enabled():
            return _through_scale(x, rounded), *args[1:]
        return _straight_through(x, rounded), *args[1:]


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, the gradient of `x`."""
    return x + (rounded - x).detach()


def _through_scale(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, with a gradient that knows that the grid of a token (..., i) grows with its largest entry.

    Source: Esser et al., "Learned Step Size Quantization", 2020 (arXiv 1902.08153), section 2.1; here the step is no
    parameter but max|x| times a constant. A token keeps its errors counted in steps: rounded = x + errors * step.
    """
    largest = x.abs().amax(-1, keepdim=True)  # (..., 1)
    errors = (rounded - x.detach()) / largest.detach().clamp(min=torch.finfo(x.dtype).tiny)
    return _straight_through(x, rounded) + errors * (largest - largest.detach())


def _on_grid(weight: Tensor, spec: QuantSpec) -> Tensor:
    exact = weight.detach()
    return fake_quantize(exact, find_grid(exact, spec))
