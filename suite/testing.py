"""The contract of a quantization method as checks that anybody can run, on toys built in code.

Every check is a function `check_<name>(make_method, toy)`: `make_method(**options)` builds the method, `toy` is a small
random model with its calibration data. It returns None, or raises `ContractViolation` with a sentence that says what is
wrong and where to look. No check knows a method by name. A method that is meant to fail a check says so beside itself:

    class MyMethod(Uniform):
        expected_failures = {"batches_and_order": "draws a random subset of the sequences"}

In a pytest file, with the class, or the name of a method that is registered:

    @suite.testing.parametrize_with_checks([MyMethod])
    def test_contract(check, make_method, toy):
        check(make_method, toy)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from suite import arch, calib, method, select, walk
from suite.errors import PTQError, unknown
from suite.grid import Scheme, decode, encode
from suite.method import LayerEdit

VOCABULARY = 512
QUICK_STEPS = 3

_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    max_position_embeddings=512,
    initializer_range=0.08,
    bos_token_id=0,
    eos_token_id=1,
)

# kind -> (config class, model class, what differs from _SHAPE)
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "qwen": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen-gqa": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=2, tie_word_embeddings=False)),
}


# ---------------------------------------------------------------------------------------------- toys


def make_toy(kind: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0, **changes):
    """A random model in evaluation mode. `kind` is a key of KINDS; `changes` are further entries of its config.

    Norm gains, biases and the sizes of channels are random too, so that an edit that forgets one of them changes the
    logits. The same seed gives the same model; no outside state is touched.

    >>> make_toy("qwen", torch.bfloat16).config.tie_word_embeddings
    True
    """
    config_class, model_class, differences = KINDS[kind]
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = model_class(config_class(**{**_SHAPE, "num_hidden_layers": layers, **differences, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.1)
                elif name.endswith("proj.weight"):  # input channels of different size, as trained models have
                    parameter.mul_(torch.empty(parameter.shape[1]).uniform_(0.5, 1.5))
    finally:
        torch.random.set_rng_state(state)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Toy:
    """A small random model and its calibration data; built anew at each call: checks cannot disturb each other."""

    name: str
    kind: str
    dtype: torch.dtype = torch.float32

    def model(self, dtype: torch.dtype | None = None, layers: int = 2, **changes) -> nn.Module:
        return make_toy(self.kind, dtype or self.dtype, layers, **changes)

    def tokens(self, sequences: int = 8, length: int = 40, seed: int = 0) -> Tensor:
        """(sequences, length) token ids."""
        return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))

    def calib(self, sequences: int = 8, length: int = 40, seed: int = 0) -> calib.Calibration:
        return calib.from_tokens(self.tokens(sequences, length, seed))


TOYS = {
    toy.name: toy
    for toy in (
        Toy("gqa", "llama"),  # grouped-query attention: v cannot absorb the scale of o
        Toy("tied", "llama-tied"),  # the head is the embedding
        Toy("biased", "qwen"),  # biases on q, k, v; full multi-head; tied
        Toy("bfloat16", "qwen-gqa", torch.bfloat16),  # biases, grouped-query attention
    )
}


# ---------------------------------------------------------------------------------------------- registry of checks

MakeMethod = Callable[..., Any]
Check = Callable[[MakeMethod, Toy], None]
CHECKS: dict[str, Check] = {}


class ContractViolation(AssertionError):
    """A method breaks the contract: what is wrong, and where to look."""


def _check(*toys: str) -> Callable[[Check], Check]:
    """Registers a check under its function's name without `check_`, with the toys that can show a violation."""

    def register(check: Check) -> Check:
        check.name, check.toys = check.__name__.removeprefix("check_"), tuple(TOYS[name] for name in toys)
        CHECKS[check.name] = check
        return check

    return register


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ContractViolation(message)


# ---------------------------------------------------------------------------------------------- what checks share


def _accepted(make_method: MakeMethod, **options: Any) -> Any | None:
    """The method with these options, or None if it refuses them."""
    try:
        return make_method(**options)
    except PTQError:
        return None


def _layers(made: Any, model: nn.Module, data: calib.Calibration) -> Iterator[tuple[Any, Any]]:
    """Each unit's view and rule. The caller commits, as `quantize_model` does."""
    rules = made.plan(model, data)
    yield from zip(walk.walk(model, data, getattr(made, "block", 1), reference=True), rules, strict=True)


def _edits(made: Any, model: nn.Module, data: calib.Calibration) -> Iterator[tuple[Any, LayerEdit]]:
    """Each layer's view and edit, committed after the caller has looked at them."""
    for view, rule in _layers(made, model, data):
        edit = rule.quantize(view)
        yield from view.parts(edit)
        walk.commit(model, view, edit)


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative to what was wanted."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """Bit for bit; NaN equals NaN."""
    if first is None or second is None:
        return first is second
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and bool(((first == second) | (first.isnan() & second.isnan())).all())
    )


def _differing(
    before: Mapping[str, Any], after: Mapping[str, Any], same: Callable[[Any, Any], bool] = _same
) -> list[str]:
    """Names of what was added, lost or changed."""
    return sorted({*before, *after} - {key for key in before if key in after and same(before[key], after[key])})


def _quantized(make_method: MakeMethod, toy: Toy, **options: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = toy.model()
    return model, walk.quantize_model(make_method(**options), model, toy.calib())


# ---------------------------------------------------------------------------------------------- 1 purity


@_check("biased", "bfloat16")
def check_purity(make_method: MakeMethod, toy: Toy) -> None:
    """`quantize` changes nothing that it was given, and gives the same edit when called again.

    Some channels are dead, since what methods repair in place is often those.
    """
    model, data = toy.model(), toy.calib()
    with torch.no_grad():
        for layer in arch.layers(model):
            for site in arch.sites(model):
                if site.feeder:
                    layer.get_submodule(site.feeder).weight[5] = 0
    for view, rule in _layers(make_method(), model, data):
        before = _given(model, view, data)
        first = rule.quantize(view)
        changed = _differing(before, _given(model, view, data))
        _require(
            not changed,
            f"layer {view.index}: quantize changed {', '.join(changed)} in place; other methods share "
            "them: look for operations that end in _ and for += on tensors of the view, and copy first",
        )
        again = rule.quantize(view)
        different = _differing(_edit_tensors(first), _edit_tensors(again))
        _require(
            not different,
            f"layer {view.index}: a second call of quantize gave another {', '.join(different)}; it must "
            "depend on the view alone: look for random numbers and for values kept on self",
        )
        walk.commit(model, view, first)


def _given(model: nn.Module, view: Any, data: calib.Calibration) -> dict[str, Tensor]:
    """Copies of all that a method could write to."""
    found = {f"the model's {key}": value for key, value in model.state_dict().items()}
    found |= {
        f"the statistic {kind} of site {site.name}": view.stat(kind, site)
        for kind in ("gram", "absmax", "absmean")
        for site in view.sites
    }
    found |= {
        "the layer's inputs": view.inputs(),
        "the layer's outputs": view.outputs(),
        "the reference outputs": view.reference,
        "the calibration tokens": data.tokens,
    }
    return {key: value.clone() for key, value in found.items()}


def _edit_tensors(edit: LayerEdit) -> dict[str, Tensor]:
    found = {f"parameter {key}": value for key, value in edit.params.items()}
    for name, quant in edit.linears.items():
        if quant.grid is not None:
            found |= {f"scale of {name}": quant.grid.scale}
            found |= {f"zero of {name}": quant.grid.zero} if quant.grid.zero is not None else {}
    return found


# ---------------------------------------------------------------------------------------------- 2 coverage


@_check("biased", "bfloat16")
def check_coverage(make_method: MakeMethod, toy: Toy) -> None:
    """Every linear of every site is declared; what changes keeps its shape and type and is finite."""
    model = toy.model()
    for view, edit in _edits(make_method(), model, toy.calib()):
        where, layer = f"layer {view.index}", dict(arch.layers(model)[view.index].named_parameters())
        wanted = {name for site in view.sites for name in site.linears}
        missing, stray = sorted(wanted - set(edit.linears)), sorted(set(edit.linears) - wanted)
        _require(
            not missing,
            f"{where}: the edit declares no grid for {', '.join(missing)}; go through the linears of every "
            "site of view.sites, and declare LinearQuant(None) for one that stays as it is",
        )
        _require(
            not stray,
            f"{where}: the edit declares {', '.join(stray)}, which no site has: use the names in site.linears",
        )
        for key, value in edit.params.items():
            _require(
                key in layer,
                f"{where}: the edit changes {key!r}, which the layer does not have: names are those of "
                "layer.named_parameters(), e.g. 'mlp.down_proj.weight'",
            )
            _require(
                value.shape == layer[key].shape,
                f"{where}: {key} became {tuple(value.shape)}, was {tuple(layer[key].shape)}: an edit keeps every shape",
            )
            _require(
                value.dtype == layer[key].dtype,
                f"{where}: {key} became {value.dtype}, was {layer[key].dtype}: "
                "compute in float32 and return .to(weight.dtype)",
            )
            _require(
                value.isfinite().all(), f"{where}: {key} has values that are not finite: look for divisions by zero"
            )
        try:
            json.dumps(dict(edit.note), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ContractViolation(
                f"{where}: the note of the edit cannot be written as JSON ({error}): "
                "use plain numbers, strings, lists and dicts with string keys"
            ) from None


# ---------------------------------------------------------------------------------------------- 3 grid


@_check("gqa", "bfloat16")
def check_grid(make_method: MakeMethod, toy: Toy) -> None:
    """Each weight lies on the grid that was declared for it: at most 2^bits values per row and group."""
    variants = [(make_method(), 2)]
    variants += [
        (made, 1)
        for options in (dict(symmetric=False), dict(wbits=3, group_size=32), dict(group_size=0))
        if (made := _accepted(make_method, **options)) is not None
    ]
    for made, layers in variants:
        for view, edit in _edits(made, toy.model(layers=layers), toy.calib()):
            for name, quant in edit.linears.items():
                if quant.grid is not None:
                    _require_on_grid(
                        f"layer {view.index}, {name} at {made.scheme}", view.after(edit).weight(name), quant.grid
                    )


def _require_on_grid(where: str, weight: Tensor, grid: Any) -> None:
    (o, i), spec = weight.shape, grid.spec
    g = spec.groups(i)
    for name, tensor in (("scale", grid.scale), ("zero", grid.zero)):
        if tensor is not None:
            _require(
                tuple(tensor.shape) == (o, g),
                f"{where}: the {name} has shape {tuple(tensor.shape)}, must be {(o, g)}: one per row and group",
            )
    _require(
        (grid.zero is None) == spec.symmetric,
        f"{where}: a grid has zero points exactly if it is asymmetric; this one is "
        f"{'symmetric and has some' if spec.symmetric else 'asymmetric and has none'}",
    )
    _require(grid.scale.isfinite().all() and (grid.scale > 0).all(), f"{where}: a scale is not a positive number")
    in_group = weight.reshape(o, g, i // g).sort(-1).values  # (o, g, s)
    distinct = int(((in_group.diff(dim=-1) != 0).sum(-1) + 1).max())
    _require(
        distinct <= spec.levels,
        f"{where}: a row's group holds {distinct} distinct values, {spec.bits} bits have "
        f"{spec.levels}: the weight in the edit must be rounded already, after every scaling",
    )
    nearest = decode(encode(weight, grid), grid).to(weight.dtype)
    _require(
        _same(weight, nearest),
        f"{where}: {int((weight != nearest).sum())} weights do not lie on the declared grid: "
        "declare the very grid that was rounded to, and round after folding, not before",
    )


# ---------------------------------------------------------------------------------------------- 4 plan


@_check("gqa", "tied", "biased")
def check_plan_preserves_function(make_method: MakeMethod, toy: Toy) -> None:
    """`plan` may rewrite the model, but its outputs stay: float64, relative logit error below 1e-6."""
    model, tokens = toy.model(torch.float64), toy.tokens(seed=1)
    made, before = make_method(), _logits(model, tokens)
    rules = made.plan(model, toy.calib())
    error = _relative(_logits(model, tokens), before)
    _require(
        error < 1e-6,
        f"plan changed the logits of the unquantized model by {error:.1e} (relative, float64): an edit of the "
        "model in plan must be undone somewhere else in it; look at biases, tied embeddings and norms",
    )
    units = -(-len(arch.layers(model)) // getattr(made, "block", 1))
    _require(
        len(rules) == units,
        f"plan gave {len(rules)} rules, the model has {units} units of layers: return one rule for each, in order",
    )


# ---------------------------------------------------------------------------------------------- 5 hybrid of one


@dataclass(frozen=True)
class _Alone:
    """A selection among one candidate."""

    candidate: Any

    @property
    def scheme(self) -> Scheme:
        return self.candidate.scheme

    def plan(self, model: nn.Module, data: Any) -> Sequence[Any]:
        return [select.Select(("candidate",), ((rule,),), "mse") for rule in self.candidate.plan(model, data)]


@_check("gqa", "bfloat16")
def check_hybrid_of_one(make_method: MakeMethod, toy: Toy) -> None:
    """Chosen by a hybrid that has no other choice, the method gives the same model, bit for bit.

    A method that takes several layers as one unit cannot be in a pool; for it there is nothing to check.
    """
    made = make_method()
    if getattr(made, "block", 1) != 1:
        return
    alone, selected = toy.model(), toy.model()
    walk.quantize_model(made, alone, toy.calib())
    walk.quantize_model(_Alone(made), selected, toy.calib())
    different = _differing(_state(alone), _state(selected))
    _require(
        not different,
        f"a hybrid of this method alone differs from the method in {', '.join(different[:3])}: what is "
        "written into the model is not what the edit showed when it was scored; look for weights off their "
        "declared grid, and for a quantize that knows where it is called from",
    )


# ---------------------------------------------------------------------------------------------- 6 no trace

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@_check("biased")
def check_no_trace(make_method: MakeMethod, toy: Toy) -> None:
    """Hooks, modes, flags, configuration and random numbers are as before."""
    model = toy.model().train()
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    with _unusual_random_numbers():
        before = _surroundings(model)
        walk.quantize_model(make_method(), model, toy.calib())
        after = _surroundings(model)
    changed = [key for key in after if not _equal(after[key], before.get(key, _NEW.get(key.split()[0])))]
    changed += [f"{key} (lost)" for key in before if key not in after and not key.startswith("gradient")]
    _require(
        not changed,
        f"after quantization these are not as before: {', '.join(changed[:5])}; use a torch.Generator of your "
        "own for random numbers, remove hooks in a finally, and put modes and flags back",
    )


_NEW = {"hooks": 0, "training": True, "gradient": (True, True)}  # of a module or parameter that the model did not have


@contextlib.contextmanager
def _unusual_random_numbers() -> Iterator[None]:
    """Generators in a state that no seed a method might set would give; put back at the end."""
    states = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()
    torch.manual_seed(98765), random.seed(98765), numpy.random.seed(98765)
    try:
        yield
    finally:
        torch.random.set_rng_state(states[0]), random.setstate(states[1]), numpy.random.set_state(states[2])


def _equal(first: Any, second: Any) -> bool:
    return _same(first, second) if isinstance(first, Tensor) else bool(first == second)


def _surroundings(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        "random numbers of torch": torch.random.get_rng_state(),
        "random numbers of Python": str(random.getstate()),
        "random numbers of numpy": str(numpy.random.get_state()),
        "torch.is_grad_enabled": torch.is_grad_enabled(),
        "torch.get_default_dtype": str(torch.get_default_dtype()),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled(),
        "global hooks": sum(len(getattr(nn.modules.module, f"_global{kind}")) for kind in _HOOKS),
    }
    config = model.config.to_dict()
    config.pop("tie_word_embeddings", None)  # a plan may untie the head
    found |= {f"config.{key}": str(value) for key, value in config.items()}
    for name, module in model.named_modules():
        hooks = sum(len(getattr(module, kind)) for kind in _HOOKS)
        found |= {f"training mode of {name}": module.training, f"hooks of {name}": hooks + ("forward" in vars(module))}
    for name, parameter in model.named_parameters():
        found |= {f"gradient flag of {name}": (parameter.requires_grad, parameter.grad is None)}
    return found


# ---------------------------------------------------------------------------------------------- 7 configuration


@_check("gqa")
def check_configuration(make_method: MakeMethod, toy: Toy) -> None:
    """Default-constructible, frozen; rebuilt from its JSON through the registry it is equal and gives equal results."""
    try:
        variants = [make_method()]
    except Exception as error:  # whatever a constructor may raise
        raise ContractViolation(
            f"the method cannot be built without options ({type(error).__name__}: {error}): give every field a default"
        ) from None
    made = variants[0]
    _require(
        dataclasses.is_dataclass(made) and type(made).__dataclass_params__.frozen,
        f"{type(made).__name__} is not a frozen dataclass: write @dataclass(frozen=True) above it; what it works "
        "out goes into local variables or the rules that plan returns",
    )
    _require(
        isinstance(getattr(made, "scheme", None), Scheme),
        f"{type(made).__name__} has no field scheme: Scheme = Scheme()",
    )
    variants += [
        m
        for options in (dict(wbits=3, group_size=64), dict(abits=16, symmetric=False))
        if (m := _accepted(make_method, **options)) is not None
    ]
    for made in variants:
        try:
            config = method.to_config(made)
            rebuilt = method.from_config(json.loads(json.dumps(config)))
        except (PTQError, TypeError, ValueError) as error:
            raise ContractViolation(
                f"{made} does not survive to_config -> JSON -> from_config: {error}; fields hold plain "
                "numbers, strings and tuples of them, and the class is registered"
            ) from None
        _require(
            rebuilt == made,
            f"rebuilt from its JSON, the method is {rebuilt}, was {made}: every field must be in the "
            "configuration, and __eq__ must compare all of them",
        )
    first, second = toy.model(), toy.model()
    walk.quantize_model(made, first, toy.calib())
    walk.quantize_model(rebuilt, second, toy.calib())
    different = _differing(_state(first), _state(second))
    _require(
        not different,
        f"rebuilt from its JSON, the method gives another {', '.join(different[:3])}: something that decides "
        "the result is not a field, or two runs of the same configuration differ",
    )


# ---------------------------------------------------------------------------------------------- 8 error against bits

_NEAR = 4  # times the noise of bfloat16; round-to-nearest is at 2, and at 7 bits it would be at 4


@_check("gqa")
def check_error_falls_with_bits(make_method: MakeMethod, toy: Toy) -> None:
    """More bits, less error; at 8 bits about that of bfloat16. Activations are left alone where possible."""
    tokens = toy.tokens(seed=1)
    model = toy.model()
    wanted = _logits(model, tokens)
    noise = _relative(_logits(model.to(torch.bfloat16), tokens), wanted)
    errors: dict[int, float] = {}
    for options in ({}, dict(wbits=3), dict(wbits=4), dict(wbits=8)):
        made = _accepted(make_method, **options, abits=16) or _accepted(make_method, **options)
        if made is not None:
            model = toy.model()
            walk.quantize_model(made, model, toy.calib())
            errors[made.scheme.weight.bits] = _relative(_logits(model, tokens), wanted)
    bits = sorted(errors)
    table = ", ".join(f"{errors[b]:.4f} at {b} bits" for b in bits)
    _require(all(math.isfinite(e) for e in errors.values()), f"the relative error of the logits is not finite: {table}")
    for fewer, more in itertools.pairwise(bits):
        _require(
            errors[more] < errors[fewer],
            f"the error of the logits does not fall as bits rise: {table}; look whether wbits is "
            "read, and for an error that rounding does not cause",
        )
    if bits[-1] >= 8:
        _require(
            errors[bits[-1]] <= _NEAR * noise,
            f"at {bits[-1]} bits the error of the logits is {errors[bits[-1]]:.4f}, that of "
            f"bfloat16 alone {noise:.4f}: something else than rounding changes the model; "
            "look at folds, biases and clipped ranges",
        )


# ---------------------------------------------------------------------------------------------- 9 batches and order


@_check("gqa")
def check_batches_and_order(make_method: MakeMethod, toy: Toy) -> None:
    """How the calibration sequences are batched, and in which order they come, changes the result to round-off only.

    Order is tried on few enough tokens that the sample on which `scope_outputs` runs holds them all.
    """
    many, few = toy.calib(10, 256), toy.calib()
    batched = dataclasses.replace(many, batch_tokens=2048)
    shuffled = calib.from_tokens(
        few.tokens[torch.randperm(len(few.tokens), generator=torch.Generator().manual_seed(0))]
    )
    made = make_method()
    for what, one, other in (("in other batches", many, batched), ("in another order", few, shuffled)):
        # a model for each, since a plan may rewrite it
        (view, first), (_, second) = (next(_edits(made, toy.model(layers=1), data)) for data in (one, other))
        for key in first.params:
            original = (
                view.weight(key.removesuffix(".weight"))
                if key.endswith(".weight")
                else view.bias(key.removesuffix(".bias"))
            )
            moved = (first.params[key] - second.params[key]).double().square().sum()
            rounding = (first.params[key] - original).double().square().sum()
            _require(
                moved <= 0.05 * rounding,
                f"{key} comes out otherwise when the same calibration sequences are {what}: the "
                f"difference is {float(moved / rounding):.0%} of the change itself; look for a "
                "statistic of one batch or sequence instead of all",
            )


# ---------------------------------------------------------------------------------------------- 10 hard inputs


@_check("biased")
def check_hard_inputs(make_method: MakeMethod, toy: Toy) -> None:
    """Dead or 100 times larger channels, fewer tokens than channels: finite, or an error that names layer and cause."""
    few = toy.calib(1, 16)
    for what, gain, data in (
        ("a dead channel", 0.0, toy.calib()),
        ("a channel 100 times larger", 100.0, toy.calib()),
        ("fewer tokens than channels", 1.0, few),
    ):
        model = toy.model()
        with torch.no_grad():
            for layer in arch.layers(model):
                for name in {site.feeder for site in arch.sites(model)} - {None}:
                    weight = layer.get_submodule(name).weight  # (d,) of a norm, (out, in) of a linear
                    weight[5] *= gain
        try:
            walk.quantize_model(make_method(), model, data)
        except PTQError as error:
            _require(
                re.search(r"layer \d", str(error)),
                f"with {what} the method raises {str(error)!r}: name the layer and the cause",
            )
            continue
        except Exception as error:  # whatever breaks
            raise ContractViolation(
                f"with {what} the method breaks with {type(error).__name__}: {error}; handle it, or raise a "
                "PTQError that names layer and cause"
            ) from error
        _require(
            _logits(model, toy.tokens(seed=1)).isfinite().all(),
            f"with {what} the quantized model's logits are not finite: look for divisions by a statistic that is zero",
        )


# ---------------------------------------------------------------------------------------------- 11 bits


@_check("gqa", "bfloat16")
def check_bits(make_method: MakeMethod, toy: Toy) -> None:
    """The bits in the records are those of the edits, counted anew; their mean is within what the scheme allows."""
    for made in filter(None, (make_method(), _accepted(make_method, wbits=3, group_size=32, symmetric=False))):
        spent, weights, counted = 0.0, 0, []
        for view, edit in _edits(made, toy.model(layers=1), toy.calib()):
            total, size = 0, 0
            for name, quant in edit.linears.items():
                weight = view.weight(name)
                bits = quant.grid.spec.bits if quant.grid else 16
                total += weight.numel() * bits + (sum(_storage(quant.grid)) if quant.grid else 0)
                spent, weights, size = spent + weight.numel() * bits, weights + weight.numel(), size + weight.numel()
            counted.append(total / size)
        records = walk.quantize_model(made, toy.model(layers=1), toy.calib())
        for record, bits in zip(records, counted, strict=True):
            _require(
                abs(record["bits"] - bits) < 1e-9,
                f"layer {record['layer']}: {record['bits']:.4f} bits per weight are "
                f"reported, its edit holds {bits:.4f} with scales and zero points: look "
                "at the QuantSpec that is declared",
            )
        allowed = made.scheme.weight.bits
        _require(
            spent / weights <= allowed + 1e-9,
            f"the edits spend {spent / weights:.4f} bits per weight (scales not counted), the "
            f"scheme {made.scheme} allows {allowed}: declare no more than was asked for",
        )


def _storage(grid: Any) -> tuple[int, int]:
    """Bits of the scales and of the zero points."""
    return grid.scale.numel() * 16, 0 if grid.zero is None else grid.zero.numel() * grid.spec.bits


# ---------------------------------------------------------------------------------------------- 12 harness


@_check("tied")
def check_harness(make_method: MakeMethod, toy: Toy) -> None:
    """Wrapping the quantized model for lm-eval leaves its logits as they are."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1", pad_token="1")
    model, _ = _quantized(make_method, toy)
    tokens = toy.tokens(2, seed=1)
    before = _logits(model, tokens)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    _require(
        _same(wrapped._model_call(tokens), before),
        "the logits change when lm-eval wraps the model: it calls tie_weights(); a plan that gives the head its "
        "own weight must call arch.untie, which sets config.tie_word_embeddings to False",
    )


# ---------------------------------------------------------------------------------------------- 13 errors


@_check("gqa")
def check_errors(make_method: MakeMethod, toy: Toy) -> None:
    """Mistakes are PTQErrors with the value found and what is allowed, and nothing has been written."""
    _require_error(
        lambda: make_method(no_such_option=1),
        ["no_such_option"],
        "an unknown option",
        "build options through suite.method.build, which knows the fields",
    )
    _require_error(lambda: make_method(wbits=99), ["99"], "wbits=99", "leave the scheme's words to Scheme.of")
    made = _accepted(make_method, group_size=96)
    model = toy.model()
    if made is not None and made.scheme.weight.quantized:
        before = _state(model)
        _require_error(
            lambda: walk.quantize_model(made, model, toy.calib()),
            ["96", "128"],
            "a group of 96 in a row of 128",
            "never replace the group size that was asked for",
        )
        changed = _differing(before, _state(model))
        _require(
            not changed,
            f"a group size that fits no width is an error, but {', '.join(changed[:3])} had been written before "
            "it: look at what plan does to the model before it checks",
        )
    model.config.model_type = "gpt2"
    _require_error(
        lambda: walk.quantize_model(make_method(), model, toy.calib()),
        ["gpt2", "llama"],
        "a model of an unsupported family",
        "reach layers and sites through suite.arch",
    )


def _require_error(act: Callable[[], Any], mentioned: Sequence[str], what: str, advice: str) -> None:
    try:
        act()
    except PTQError as error:
        missing = [word for word in mentioned if word not in str(error)]
        _require(not missing, f"the error for {what} does not mention {' and '.join(missing)}: {error}")
        return
    except Exception as error:  # a traceback is not an answer
        raise ContractViolation(
            f"{what} raises {type(error).__name__} ({error}), must be a PTQError: {advice}"
        ) from error
    raise ContractViolation(f"{what} is taken without a word: {advice}")


# ---------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """One check on one toy. status: "passed", "failed", "expected failure", or "passed although expected to fail"."""

    check: str
    toy: str
    status: str
    message: str = ""


def _named(cls: type) -> str:
    """The name of a class of methods; one that has none yet is registered under that of the class."""
    with contextlib.suppress(Exception):  # what is wrong with it is told below
        return method.name_of(cls())
    method.add(cls.__name__, cls, cls.__module__)
    return cls.__name__


def maker(made: str | type | MakeMethod) -> MakeMethod:
    """What builds a method from options: of a registered name (compositions too), of a class, or already such a function.

    The checks are about form, not quality: a method that learns, with an option `steps`, does QUICK_STEPS of them.
    """
    if isinstance(made, type):
        made = _named(made)
    if not isinstance(made, str):
        return made
    with contextlib.suppress(PTQError):  # what cannot be built says so when it is built
        if "steps" in method.options_of(made):
            return functools.partial(method.build, made, steps=QUICK_STEPS)
    return functools.partial(method.build, made)


def expected_failures(make_method: MakeMethod) -> dict[str, str]:
    """Check -> reason, as the class of the method declares them; those of a composition are those of its parts.

    Raises PTQError if a declared name is no check.
    """
    made = make_method()
    parts = [made.transformer, made.rounding] if isinstance(made, method.Composed) else [made]
    found = {name: reason for part in parts for name, reason in getattr(part, "expected_failures", {}).items()}
    for name in found:
        if name not in CHECKS:
            raise unknown(f"check in expected_failures of {type(made).__name__}", name, CHECKS)
    return found


def run_checks(made: str | MakeMethod, checks: Iterable[str] | None = None) -> Iterator[Outcome]:
    """Runs the checks (all, or those named) one after another and yields each outcome as it is known.

    Raises PTQError for an unknown check, and whatever building the method raises.

    >>> {outcome.status for outcome in run_checks("rtn", ["grid"])}
    {'passed'}
    """
    chosen = list(CHECKS if checks is None else checks)
    for name in chosen:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    make_method = maker(made)
    reasons = expected_failures(make_method)
    for name in chosen:
        for toy in CHECKS[name].toys:
            try:
                CHECKS[name](make_method, toy)
            except Exception as error:  # a method may break in any way; the others are still to be checked
                text = (
                    str(error)
                    if isinstance(error, (ContractViolation, PTQError))
                    else f"{type(error).__name__}: {error}"
                )
                status = "expected failure" if name in reasons else "failed"
                yield Outcome(name, toy.name, status, f"{reasons[name]} ({text})" if name in reasons else text)
            else:
                status = "passed although expected to fail" if name in reasons else "passed"
                yield Outcome(name, toy.name, status, reasons.get(name, ""))


def parametrize_with_checks(methods: Iterable[str | type | MakeMethod]) -> Any:
    """A pytest decorator: one test per method, check and toy, with the arguments `check`, `make_method`, `toy`.

    An expected failure that a method declares is shown as xfail with its reason.

    >>> @parametrize_with_checks(["rtn"])
    ... def test_contract(check, make_method, toy):
    ...     check(make_method, toy)
    """
    import pytest

    cases = []
    for made in methods:
        make_method = maker(made)
        reasons = expected_failures(make_method)
        label = made if isinstance(made, str) else getattr(made, "__name__", type(made).__name__)
        for name, check in CHECKS.items():
            marks = [pytest.mark.xfail(reason=reasons[name])] if name in reasons else []
            cases += [
                pytest.param(check, make_method, toy, id=f"{label}-{name}-{toy.name}", marks=marks)
                for toy in check.toys
            ]
    return pytest.mark.parametrize("check, make_method, toy", cases)
