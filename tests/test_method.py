"""The registry: names, options, configurations, compositions, and the plain data that methods exchange."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json

import pytest
import torch

from suite import arch, method
from suite.errors import PTQError
from suite.grid import QuantSpec, Scheme, find_grid
from suite.method import Composed, LayerEdit, LinearQuant, build, from_config, name_of, options_of, to_config

ALL = method.names() + method.compositions()


def error_of(act) -> str:
    with pytest.raises(PTQError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- names


def test_names():
    assert {"fp16", "rtn", "gptq", "awq", "smoothquant", "cka-hybrid"} <= set(method.names())
    assert {"awq+gptq", "smoothquant+gptq"} <= set(method.compositions())
    assert method.names() == sorted(method.names())


@pytest.mark.parametrize("name", ALL)
def test_name_of_what_was_built(name):
    assert name_of(build(name)) == name


def test_unknown_method_gives_near_misses():
    text = error_of(lambda: build("gptqq"))
    assert "unknown method 'gptqq'" in text and "did you mean 'gptq'" in text and "smoothquant" in text


def test_an_object_of_another_class_has_no_name():
    assert "Scheme is not a registered method" in error_of(lambda: name_of(Scheme()))


def test_installed_packages_are_found(monkeypatch):
    """An entry point of the group ptq_suite.methods is a method like any other."""
    point = importlib.metadata.EntryPoint("theirs", "baselines.rtn:RTN", method.ENTRY_POINTS)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == method.ENTRY_POINTS else []
    )
    assert "theirs" in method.names() and build("theirs", wbits=3).scheme.weight.bits == 3
    assert name_of(build("awq+theirs").transformer) == "awq"


# ---------------------------------------------------------------------------------------------- options


def test_options_are_flat():
    assert options_of("rtn") == {"wbits": 4, "abits": 8, "group_size": 128, "symmetric": True}
    assert options_of("gptq")["damp"] == 0.01 and options_of("awq+gptq")["ratios"] == 20
    assert options_of("fp16")["wbits"] == 16


def test_strings_are_parsed():
    gptq = build(
        "gptq", wbits="3", abits="16", group_size="64", symmetric="false", damp="0.05", act_order="yes", block_size="32"
    )
    assert gptq.scheme == Scheme.of(3, 16, 64, False)
    assert (gptq.damp, gptq.act_order, gptq.block_size) == (0.05, True, 32)
    assert build("cka-hybrid", pool="gptq|rtn").pool == build("cka-hybrid", pool="gptq,rtn").pool == ("gptq", "rtn")
    assert build("cka-hybrid", pool=["rtn"]).pool == ("rtn",)


@pytest.mark.parametrize(
    "name, option, value, words",
    [
        ("gptq", "damp", "much", ["damp", "'much'", "a number"]),
        ("gptq", "block_size", "1.5", ["'1.5'", "whole number"]),
        ("gptq", "block_size", 1.5, ["1.5", "whole number"]),
        ("gptq", "act_order", "maybe", ["'maybe'", "true and false"]),
        ("gptq", "act_order", 2, ["2", "true and false"]),
        ("rtn", "wbits", "four", ["wbits", "'four'", "whole number"]),
        ("gptq", "dampp", 1, ["unknown option of gptq 'dampp'", "did you mean 'damp'"]),
        ("rtn", "wbits", 9, ["9", "2 to 8"]),
        ("rtn", "abits", 7, ["7", "4, 8, and 16"]),
        ("gptq", "damp", 0, ["0", "above 0"]),
        ("gptq", "block_size", 0, ["0", "from 1"]),
        ("awq", "ratios", 0, ["0", "from 1"]),
        ("awq", "clip_lowest", 1.0, ["1.0", "between 0 and 1"]),
        ("smoothquant", "alpha", 1.5, ["1.5", "0 to 1"]),
        ("cka-hybrid", "metric", "ckaa", ["'ckaa'", "'cka'"]),
        ("cka-hybrid", "pool", "", ["empty", "at least one"]),
        ("cka-hybrid", "pool", "rtn|rtn", ["rtn, rtn", "none twice"]),
        ("cka-hybrid", "block", 0, ["0", "from 1"]),
        ("cka-hybrid", "score_tokens", 0, ["0", "from 1"]),
        ("fp16", "wbits", 4, ["fp16", "W4"]),
        ("awq+gptq", "alpha", 1, ["unknown option of awq+gptq 'alpha'", "damp", "ratios"]),
    ],
)
def test_mistakes_in_options(name, option, value, words):
    text = error_of(lambda: build(name, **{option: value}))
    assert all(word in text for word in words), text


def test_all_mistakes_at_once():
    text = error_of(lambda: build("gptq", dampp=1, block_size="x", act_order="maybe"))
    assert all(word in text for word in ("dampp", "block_size", "act_order"))


def test_unknown_member_of_a_pool(toy_llama):
    assert "'gptqq'" in error_of(lambda: build("cka-hybrid", pool="gptqq").plan(toy_llama, None))


# ---------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", ALL)
def test_configuration_comes_back(name):
    options = {} if name == "fp16" else {"wbits": 3, "group_size": 64, "abits": 16, "symmetric": False}
    made = build(name, **options)
    config = json.loads(json.dumps(to_config(made)))
    assert from_config(config) == made and from_config(config) != build(name, **{**options, "group_size": 32})


def test_configuration_holds_every_field():
    made = build("cka-hybrid", pool="rtn|gptq", metric="mse", block=2, score_tokens=100)
    assert to_config(made) == {
        "method": "cka-hybrid",
        "options": {
            "wbits": 4,
            "abits": 8,
            "group_size": 128,
            "symmetric": True,
            "pool": ["rtn", "gptq"],
            "metric": "mse",
            "block": 2,
            "score_tokens": 100,
            "unit": "layer",
            "search": "greedy",
            "width": 1,
            "refine": "none",
            "pick": "closest",
            "pick_seed": 0,
            "choices": [],
        },
    }


@pytest.mark.parametrize("name", method.names())
def test_changed_fields_change_the_configuration(name):
    made = build(name)
    others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.9, tuple: lambda v: v[:1] or ("awq",)}
    beside = {"width": {"search": "beam"}, "pick_seed": {"pick": "random"}}  # without which they would have no effect
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if type(value) in others:
            made = dataclasses.replace(build(name), **beside.get(field.name, {}))
            changed = dataclasses.replace(made, **{field.name: others[type(value)](value)})
            assert changed != made and to_config(changed) != to_config(made)
            assert from_config(json.loads(json.dumps(to_config(changed)))) == changed


# ---------------------------------------------------------------------------------------------- compositions


def test_parts_get_their_options_and_the_scheme():
    made = build("smoothquant+gptq", alpha="0.85", damp=0.05, wbits=3)
    assert isinstance(made, Composed) and made.transformer.alpha == 0.85 and made.rounding.damp == 0.05
    assert made.scheme == made.transformer.scheme == made.rounding.scheme and made.scheme.weight.bits == 3
    assert from_config(json.loads(json.dumps(to_config(made)))) == made


@pytest.mark.parametrize(
    "name, words",
    [
        ("awq+smoothquant+gptq", ["3 parts", "awq+gptq"]),
        ("gptq+awq", ["gptq has no transform", "awq, smoothquant"]),
        ("awq+cka-hybrid", ["cka-hybrid decides for the whole model"]),
        ("awq+gptqq", ["'gptqq'"]),
        ("awqq+gptq", ["'awqq'"]),
    ],
)
def test_impossible_compositions(name, words):
    text = error_of(lambda: build(name))
    assert all(word in text for word in words), text


def test_composition_rounds_the_transformed_layer():
    class View:
        edits = []

        def after(self, edit):
            self.edits.append(edit)
            return "the transformed layer"

    class Transform:
        def transform(self, layer):
            return LayerEdit({"norm.weight": 1, "w.weight": 1}, note={"ratios": {}})

    class Rounding:
        def quantize(self, layer):
            assert layer == "the transformed layer"
            return LayerEdit({"w.weight": 2}, {"w": LinearQuant(None)}, {"losses": {}})

    edit = Composed(Transform(), Rounding()).quantize(View())
    assert edit.params == {"norm.weight": 1, "w.weight": 2} and list(edit.linears) == ["w"]
    assert set(edit.note) == {"ratios", "losses"}


# ---------------------------------------------------------------------------------------------- native settings


def test_native_settings_are_the_published_ones():
    gptq, awq, smoothquant = (method.native(n) for n in ("gptq", "awq", "smoothquant"))
    assert gptq.options["symmetric"] is False and gptq.options["group_size"] == 0 and gptq.options["act_order"] is True
    assert (gptq.nsamples, gptq.seqlen, gptq.inputs) == (128, 2048, "quantized")
    assert (awq.nsamples, awq.seqlen, awq.source, awq.inputs) == (128, 512, "pile", "full")
    assert awq.options["symmetric"] is False
    assert (smoothquant.nsamples, smoothquant.seqlen) == (512, 512) and smoothquant.options["group_size"] == 0
    assert method.native("awq+gptq") == gptq and method.native("rtn") == method.Native()


@pytest.mark.parametrize("name", ALL)
def test_native_options_are_options(name):
    build(name, **method.native(name).options)


# ---------------------------------------------------------------------------------------------- plain data


def test_the_later_edit_wins():
    grid = find_grid(torch.randn(2, 8), QuantSpec(4, True, None))
    first = LayerEdit({"a": 1, "b": 1}, {"x": LinearQuant(None)}, {"n": 1, "m": 1})
    second = LayerEdit({"b": 2, "c": 2}, {"x": LinearQuant(grid)}, {"m": 2})
    both = first | second
    assert both.params == {"a": 1, "b": 2, "c": 2} and both.note == {"n": 1, "m": 2} and both.linears["x"].bits == 4
    assert first.params == {"a": 1, "b": 1} and second.params == {"b": 2, "c": 2}
    assert LinearQuant(None).bits == 16


# ---------------------------------------------------------------------------------------------- families


def test_sites_of_the_families(make_toy):
    for kind in ("llama", "qwen"):
        model = make_toy(kind)
        layer, sites = arch.layers(model)[0], arch.sites(model)
        named = [name for site in sites for name in site.linears]
        linears = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        assert sorted(named) == sorted(linears) and len(set(named)) == len(named)
        for site in sites:
            layer.get_submodule(site.scope)
            if site.feeder:
                layer.get_submodule(site.feeder)


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen"])
def test_linears_of_a_site_read_one_tensor_in_the_order_given(kind, make_toy):
    model, seen = make_toy(kind), []
    layer = arch.layers(model)[0]
    for site in arch.sites(model):
        for name in site.linears:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, site=site: seen.append((site.name, name, args[0]))
            )
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert [name for _, name, _ in seen] == [name for site in arch.sites(model) for name in site.linears]
    for site in arch.sites(model):
        inputs = [x for s, _, x in seen if s == site.name]
        assert all(x is inputs[0] for x in inputs)


def test_v_feeds_o_only_without_grouped_queries(make_toy):
    feeders = {kind: {s.name: s.feeder for s in arch.sites(make_toy(kind))}["o"] for kind in ("llama", "llama-mha")}
    assert feeders == {"llama": None, "llama-mha": "self_attn.v_proj"}


def test_unknown_family(toy_llama):
    toy_llama.config.model_type = "gpt2"
    assert "'gpt2'" in error_of(lambda: arch.layers(toy_llama)) and "llama, mistral, qwen2, qwen3" in error_of(
        lambda: arch.sites(toy_llama)
    )


def test_untied_head_stays_untied(make_toy):
    model = make_toy("llama-tied")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens).logits
        arch.untie(model)
        arch.head(model).weight.mul_(2)
        model.tie_weights()
        assert torch.equal(model(tokens).logits, 2 * before)
    assert arch.head(model).weight is not arch.embedding(model).weight
    untied = make_toy("llama")
    head = arch.head(untied).weight
    arch.untie(untied)
    assert arch.head(untied).weight is head


def test_an_option_that_came_later_leaves_earlier_records_their_method():
    """At the value that stands for what was, the configuration is that of before; and both come back."""
    plain, other = build("spinquant"), build("spinquant", scale_gradient=True)
    assert "scale_gradient" not in to_config(plain)["options"] and to_config(other)["options"]["scale_gradient"] is True
    assert from_config(to_config(plain)) == plain and from_config(to_config(other)) == other
    assert "scale_gradient" in options_of("spinquant"), "it can be given like any other"
