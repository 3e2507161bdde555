"""Every registered method keeps the contract, and every check of the contract rejects a method that breaks it."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

import numpy
import pytest
import torch

from suite import arch, method, testing, walk
from suite.errors import PTQError
from suite.fold import fold
from suite.grid import QuantSpec, Scheme, fake_quantize, find_grid
from suite.method import LayerEdit, LinearQuant, Uniform
from suite.rounding import round_to_nearest
from suite.testing import CHECKS, TOYS


@testing.parametrize_with_checks(method.names() + method.compositions())
def test_contract(check, make_method, toy):
    check(make_method, toy)


# ---------------------------------------------------------------------------------------------- broken methods


@dataclass(frozen=True)
class Sound(Uniform):
    """Round-to-nearest: what the broken ones would be without their defect."""

    scheme: Scheme = Scheme()

    def quantize(self, layer):
        return round_to_nearest(layer, self.scheme)


def _with(edit: LayerEdit, **params: torch.Tensor) -> LayerEdit:
    return edit | LayerEdit({key.replace("__", "."): value for key, value in params.items()})


class WritesTheWeight(Sound):
    def quantize(self, layer):
        layer.weight("mlp.up_proj").mul_(0.5)
        return super().quantize(layer)


class WritesTheGram(Sound):
    def quantize(self, layer):
        layer.stat("gram", layer.sites[0]).diagonal().add_(1)
        return super().quantize(layer)


class WritesTheOutputs(Sound):
    def quantize(self, layer):
        layer.outputs().zero_()
        return super().quantize(layer)


class RandomRounding(Sound):
    """Stochastic, from a generator that goes on between calls."""

    generator = torch.Generator().manual_seed(0)

    def quantize(self, layer):
        edit, name = super().quantize(layer), "mlp.up_proj"
        grid = edit.linears[name].grid
        noise = torch.rand(layer.weight(name).shape, generator=self.generator) - 0.5
        shifted = layer.weight(name) + (noise * grid.scale.repeat_interleave(128, 1)).to(layer.weight(name).dtype)
        return _with(edit, mlp__up_proj__weight=fake_quantize(shifted, grid))


class ForgetsALinear(Sound):
    def quantize(self, layer):
        edit = super().quantize(layer)
        return LayerEdit(edit.params, {k: v for k, v in edit.linears.items() if k != "self_attn.k_proj"})


class DeclaresAStranger(Sound):
    def quantize(self, layer):
        return super().quantize(layer) | LayerEdit(linears={"mlp.gate": LinearQuant(None)})


class ChangesTheType(Sound):
    def quantize(self, layer):
        edit = super().quantize(layer)
        return _with(edit, mlp__up_proj__weight=edit.params["mlp.up_proj.weight"].double())


class ChangesTheShape(Sound):
    def quantize(self, layer):
        edit = super().quantize(layer)
        return _with(edit, mlp__up_proj__weight=edit.params["mlp.up_proj.weight"][:64])


class GivesNaN(Sound):
    def quantize(self, layer):
        edit = super().quantize(layer)
        return _with(edit, mlp__up_proj__weight=edit.params["mlp.up_proj.weight"] * float("nan"))


class ChangesAStranger(Sound):
    def quantize(self, layer):
        return super().quantize(layer) | LayerEdit({"mlp.gate.weight": torch.zeros(2)})


class NotesATensor(Sound):
    def quantize(self, layer):
        return super().quantize(layer) | LayerEdit(note={"loss": torch.zeros(())})


class RoundsLater(Sound):
    """Shows unrounded weights when it is scored; the layer that is written then feeds the next with rounded ones."""

    def quantize(self, layer):
        scale = layer.stat("absmax", layer.sites[0]).clamp(min=1e-3)
        step = fold(layer, layer.sites[0], scale / scale.mean())
        return step | LayerEdit(linears=round_to_nearest(layer.after(step), self.scheme).linears)


class NeverRounds(Sound):
    """Declares grids and leaves the weights as they are."""

    def quantize(self, layer):
        return LayerEdit(linears=super().quantize(layer).linears)


class FoldsAfterRounding(Sound):
    def quantize(self, layer):
        edit = super().quantize(layer)
        return edit | fold(layer.after(edit), layer.sites[0], torch.linspace(1, 1.01, 128))


class SharesOneScaleTooMany(Sound):
    """Declares the grid of a weight that it did not round to: that of half the range."""

    def quantize(self, layer):
        edit, name = super().quantize(layer), "mlp.up_proj"
        grid = find_grid(layer.weight(name), self.scheme.weight, 0.5)
        return edit | LayerEdit(linears={name: LinearQuant(grid, self.scheme.act)})


class MoreLevels(Sound):
    """Rounds to 5 bits and declares 4, at a scale that hides it: only counting values can tell."""

    def quantize(self, layer):
        edit, weight = super().quantize(layer), layer.weight("mlp.up_proj")
        finer = dataclasses.replace(self.scheme.weight, bits=self.scheme.weight.bits + 1)
        return _with(edit, mlp__up_proj__weight=fake_quantize(weight, find_grid(weight, finer)))


class NoZeroPoints(Sound):
    """Asked for an asymmetric grid, gives a symmetric one."""

    def quantize(self, layer):
        symmetric = dataclasses.replace(self.scheme, weight=dataclasses.replace(self.scheme.weight, symmetric=True))
        edit = round_to_nearest(layer, symmetric)
        grid = {k: dataclasses.replace(v.grid, spec=self.scheme.weight) for k, v in edit.linears.items()}
        return edit | LayerEdit(linears={k: LinearQuant(g, self.scheme.act) for k, g in grid.items()})


class OneScaleTooFew(Sound):
    """Declares groups and gives one scale per row."""

    def quantize(self, layer):
        edit = round_to_nearest(layer, Scheme(QuantSpec(self.scheme.weight.bits, group_size=None), self.scheme.act))
        spec, name = self.scheme.weight, "mlp.down_proj"
        grid = dataclasses.replace(edit.linears[name].grid, spec=spec)
        return super().quantize(layer) | LayerEdit(
            {f"{name}.weight": edit.params[f"{name}.weight"]}, {name: LinearQuant(grid, self.scheme.act)}
        )


class NegativeScales(Sound):
    def quantize(self, layer):
        edit = super().quantize(layer)
        return edit | LayerEdit(
            linears={
                k: LinearQuant(dataclasses.replace(v.grid, scale=-v.grid.scale), v.act) for k, v in edit.linears.items()
            }
        )


class PlanScalesANorm(Sound):
    def plan(self, model, calib):
        with torch.no_grad():
            arch.final_norm(model).weight.mul_(1.001)
        return super().plan(model, calib)


class PlanForgetsABias(Sound):
    """Scales v and o against each other, but not the bias of v."""

    def plan(self, model, calib):
        with torch.no_grad():
            for layer in arch.layers(model):
                layer.self_attn.v_proj.weight.mul_(2)
                layer.self_attn.o_proj.weight.div_(2)
        return super().plan(model, calib)


class OneRuleTooFew(Sound):
    def plan(self, model, calib):
        return super().plan(model, calib)[1:]


class KnowsItsCaller(Sound):
    """Better where it is compared with the reference than where it is not."""

    def quantize(self, layer):
        try:
            layer.reference.sum()
        except RuntimeError:
            return super().quantize(layer)
        return round_to_nearest(layer, self.scheme, {"mlp.up_proj": 0.9})


class LeavesAHook(Sound):
    def plan(self, model, calib):
        arch.layers(model)[0].register_forward_hook(lambda *_: None)
        return super().plan(model, calib)


class ReplacesForward(Sound):
    def plan(self, model, calib):
        norm = arch.final_norm(model)
        norm.forward = norm.forward
        return super().plan(model, calib)


class SeedsTorch(Sound):
    def quantize(self, layer):
        torch.manual_seed(0)
        return super().quantize(layer)


class DrawsFromPython(Sound):
    def quantize(self, layer):
        random.random()
        return super().quantize(layer)


class DrawsFromNumpy(Sound):
    def quantize(self, layer):
        numpy.random.rand()
        return super().quantize(layer)


class TurnsTheCacheOff(Sound):
    def plan(self, model, calib):
        model.config.use_cache = False
        return super().plan(model, calib)


class FreezesTheNorms(Sound):
    def plan(self, model, calib):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return super().plan(model, calib)


class LeavesGradients(Sound):
    def plan(self, model, calib):
        model(calib.tokens[:1, :4]).logits.sum().backward()
        return super().plan(model, calib)


class ModeOfItsOwn(Sound):
    def quantize(self, layer):
        torch.set_default_dtype(torch.float64)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(True)
        return super().quantize(layer)


@dataclass
class Thawed(Uniform):
    scheme: Scheme = Scheme()

    def quantize(self, layer):
        return round_to_nearest(layer, self.scheme)


@dataclass(frozen=True)
class NeedsAnOption(Sound):
    share: float = field(kw_only=True)


@dataclass(frozen=True)
class HidesAField(Sound):
    """Equal in its configuration, not in its result."""

    calls = []

    def quantize(self, layer):
        self.calls.append(layer.index)
        return round_to_nearest(layer, self.scheme, {"mlp.up_proj": 1 - 0.01 * len(self.calls)})


@dataclass(frozen=True)
class HoldsATensor(Sound):
    share: torch.Tensor = field(default_factory=lambda: torch.ones(1))


@dataclass(frozen=True)
class ForgetsASetting(Sound):
    """A field that never reaches the configuration's rebuilt twin."""

    share: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "share", self.share / 2)


class IgnoresTheBits(Sound):
    def quantize(self, layer):
        return round_to_nearest(layer, Scheme(QuantSpec(4), self.scheme.act))


class LosesABias(Sound):
    """More than rounding: the model is changed at any number of bits."""

    def quantize(self, layer):
        return super().quantize(layer) | LayerEdit(
            {"post_attention_layernorm.weight": layer.weight("post_attention_layernorm") * 1.2}
        )


class FirstSequence(Sound):
    """Scales by the first calibration sequence alone."""

    def quantize(self, layer):
        largest = layer.inputs()[0].abs().amax(0).float().clamp(min=1e-3)
        step = fold(layer, layer.sites[0], largest / largest.mean())
        return step | round_to_nearest(layer.after(step), self.scheme)


class LastBatch(Sound):
    """Scales by a statistic that every batch overwrites."""

    def quantize(self, layer):
        largest = layer.inputs().split(layer._step)[-1].abs().amax((0, 1)).float().clamp(min=1e-3)
        step = fold(layer, layer.sites[0], largest / largest.mean())
        return step | round_to_nearest(layer.after(step), self.scheme)


class OverflowsLater(Sound):
    """Finite weights, from a division by almost zero, that no longer give finite outputs."""

    def quantize(self, layer):
        edit, small = super().quantize(layer), layer.stat("absmax", layer.sites[2]).min().clamp(min=1e-38)
        gain = layer.weight("post_attention_layernorm") + 0.01 / small
        return edit if layer.index == 0 else edit | LayerEdit({"post_attention_layernorm.weight": gain})


class NeedsFullRank(Sound):
    def quantize(self, layer):
        for site in layer.sites:
            torch.linalg.cholesky(layer.stat("gram", site))
        return super().quantize(layer)


class SaysTooLittle(Sound):
    def quantize(self, layer):
        if (layer.stat("absmax", layer.sites[0]) == 0).any():
            raise PTQError("bad data")
        return super().quantize(layer)


class HidesScales(Sound):
    """Declares one scale per row and stores one per group."""

    def quantize(self, layer):
        edit = super().quantize(layer)
        per_row = dataclasses.replace(self.scheme.weight, group_size=None)
        return edit | LayerEdit(
            linears={k: LinearQuant(dataclasses.replace(v.grid, spec=per_row), v.act) for k, v in edit.linears.items()}
        )


class SpendsMore(Sound):
    """Keeps one linear at 8 bits on top of the budget."""

    def quantize(self, layer):
        eight = dataclasses.replace(self.scheme, weight=dataclasses.replace(self.scheme.weight, bits=8))
        edit, finer, name = super().quantize(layer), round_to_nearest(layer, eight), "mlp.down_proj"
        return edit | LayerEdit({f"{name}.weight": finer.params[f"{name}.weight"]}, {name: finer.linears[name]})


class UntiesInSecret(Sound):
    """Gives the head a weight of its own and does not tell the configuration."""

    def plan(self, model, calib):
        head = arch.head(model)
        head.weight = torch.nn.Parameter(head.weight.detach() * 2)
        arch.final_norm(model).weight.data /= 2
        return super().plan(model, calib)


class WritesBeforeItFails(Sound):
    def plan(self, model, calib):
        arch.final_norm(model).weight.data += 1
        width = arch.layers(model)[0].mlp.up_proj.weight.shape[1]
        self.scheme.weight.groups(width)
        return super().plan(model, calib)


@dataclass(frozen=True)
class ForgivesGroups(Sound):
    """Where the group does not fit, silently takes one scale per row."""

    def __post_init__(self):
        if 128 % (self.scheme.weight.group_size or 128):
            object.__setattr__(self, "scheme", Scheme(QuantSpec(self.scheme.weight.bits, group_size=None)))


BROKEN = {
    "purity": [WritesTheWeight, WritesTheGram, WritesTheOutputs, RandomRounding],
    "coverage": [
        ForgetsALinear,
        DeclaresAStranger,
        ChangesTheType,
        ChangesTheShape,
        GivesNaN,
        ChangesAStranger,
        NotesATensor,
    ],
    "grid": [
        NeverRounds,
        FoldsAfterRounding,
        SharesOneScaleTooMany,
        MoreLevels,
        NoZeroPoints,
        OneScaleTooFew,
        NegativeScales,
    ],
    "plan_preserves_function": [PlanScalesANorm, PlanForgetsABias, OneRuleTooFew],
    "hybrid_of_one": [RoundsLater, KnowsItsCaller],
    "no_trace": [
        LeavesAHook,
        ReplacesForward,
        SeedsTorch,
        DrawsFromPython,
        DrawsFromNumpy,
        TurnsTheCacheOff,
        FreezesTheNorms,
        LeavesGradients,
        ModeOfItsOwn,
    ],
    "configuration": [Thawed, NeedsAnOption, HidesAField, HoldsATensor, ForgetsASetting],
    "error_falls_with_bits": [IgnoresTheBits, LosesABias],
    "batches_and_order": [FirstSequence, LastBatch],
    "hard_inputs": [OverflowsLater, NeedsFullRank, SaysTooLittle],
    "bits": [HidesScales, SpendsMore],
    "harness": [UntiesInSecret],
    "errors": [ForgivesGroups],
}


@pytest.fixture
def register(monkeypatch):
    """Puts a class of this file into the registry for one test."""

    def add(cls: type) -> testing.MakeMethod:
        monkeypatch.setitem(method._BUILTIN, cls.__name__, f"{__name__}:{cls.__name__}")
        return testing.maker(cls.__name__)

    yield add
    torch.use_deterministic_algorithms(False)


def rejections(name: str, make_method: testing.MakeMethod) -> list[str]:
    found = []
    for toy in CHECKS[name].toys:
        try:
            CHECKS[name](make_method, toy)
        except testing.ContractViolation as violation:
            found.append(str(violation))
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_method_passes(name, register):
    assert rejections(name, register(Sound)) == []


@pytest.mark.parametrize(
    "name, cls",
    [(name, cls) for name, broken in BROKEN.items() for cls in broken],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_method_is_rejected(name, cls, register):
    found = rejections(name, register(cls))
    assert found, f"{name} does not notice {cls.__name__}"
    assert all(len(message) > 60 for message in found)  # a sentence, not a word


def test_every_check_has_a_method_that_it_rejects():
    assert set(BROKEN) == set(CHECKS) and len(CHECKS) == 13


def test_a_plan_that_writes_before_the_error_is_rejected(register, monkeypatch):
    """The engine looks at group sizes before it plans; the check does not rely on it."""
    monkeypatch.setattr(walk, "_check_groups", lambda *_: None)
    assert "had been written before" in rejections("errors", register(WritesBeforeItFails))[0]


def test_options_taken_without_a_word_are_rejected():
    assert "an unknown option is taken without a word" in rejections("errors", lambda **options: Sound())[0]
    assert "TypeError" in rejections("errors", Sound)[0]


# ---------------------------------------------------------------------------------------------- running them


class Honest(RandomRounding):
    expected_failures = {"purity": "rounds at random"}


class Stale(Sound):
    expected_failures = {"grid": "was off its grid once"}


class Mistyped(Sound):
    expected_failures = {"puritty": "rounds at random"}


def test_outcomes_name_check_toy_and_reason(register):
    register(Honest), register(Stale), register(NeverRounds)
    assert {o.status for o in testing.run_checks("Honest", ["purity"])} == {"expected failure"}
    outcome = next(testing.run_checks("Honest", ["purity"]))
    assert (outcome.check, outcome.toy) == ("purity", "biased")
    assert outcome.message.startswith("rounds at random (layer 0: a second call of quantize gave another")
    assert {o.status for o in testing.run_checks("Stale", ["grid"])} == {"passed although expected to fail"}
    failed = list(testing.run_checks("NeverRounds", ["grid", "coverage"]))
    assert {(o.check, o.status) for o in failed} == {("grid", "failed"), ("coverage", "passed")}


def test_expected_failures_of_a_composition_are_those_of_its_parts(register, monkeypatch):
    monkeypatch.setattr(method.lookup("awq"), "expected_failures", {"grid": "a"}, raising=False)
    register(Honest)
    assert testing.expected_failures(testing.maker("awq+Honest")) == {"grid": "a", "purity": "rounds at random"}


def test_unknown_names_of_checks(register):
    with pytest.raises(PTQError, match="'purity'"):
        list(testing.run_checks("rtn", ["puritty"]))
    with pytest.raises(PTQError, match="expected_failures of Mistyped.*'purity'"):
        testing.expected_failures(register(Mistyped))


def test_cases_for_pytest(register, monkeypatch):
    monkeypatch.setattr(method, "_ADDED", {})
    mark = testing.parametrize_with_checks([register(Honest).args[0], Sound]).mark
    cases = {case.id: case for case in mark.args[1]}
    assert len(cases) == 2 * sum(len(check.toys) for check in CHECKS.values())
    assert [m.kwargs["reason"] for m in cases["Honest-purity-biased"].marks] == ["rounds at random"]
    assert not cases["Sound-purity-biased"].marks and not cases["Honest-grid-gqa"].marks


def test_every_toy_is_used():
    assert {toy.name for check in CHECKS.values() for toy in check.toys} == set(TOYS)
