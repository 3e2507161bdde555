"""A fold moves a scale between a feeder and its consumers and leaves the layer's function as it is."""

from __future__ import annotations

import pytest
import torch

from suite import calib, walk
from suite.fold import fold

TOKENS = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))


def view_of(model):
    return next(walk.walk(model, calib.from_tokens(TOKENS)))


def site_of(view, name):
    return next(site for site in view.sites if site.name == name)


def scale_for(view, site, seed=0):
    """Scales over four orders of magnitude."""
    width = view.weight(site.linears[0]).shape[1]
    return torch.logspace(-2, 2, width)[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("llama", "qkv"),
        ("llama", "gate_up"),
        ("llama", "down"),
        ("llama-mha", "o"),
        ("qwen", "qkv"),
        ("qwen", "o"),
        ("qwen", "gate_up"),
        ("qwen", "down"),
    ],
)
def test_function_stays(kind, name, make_toy):
    view = view_of(make_toy(kind, torch.float64))
    site = site_of(view, name)
    edit = fold(view, site, scale_for(view, site).double())
    before, after = view.outputs(), view.after(edit).outputs()
    assert not torch.equal(before, after)  # something was done
    assert (after - before).norm() / before.norm() < 1e-6


@pytest.mark.parametrize("kind, name", [("qwen", "qkv"), ("qwen", "o"), ("qwen", "gate_up"), ("qwen", "down")])
def test_inputs_are_divided_and_weights_multiplied(kind, name, make_toy):
    view = view_of(make_toy(kind))
    site, others = site_of(view, name), [s for s in view.sites if s.name != name]
    scale = scale_for(view, site)
    folded = view.after(fold(view, site, scale))
    for kind_of in ("absmax", "absmean"):
        assert torch.allclose(folded.stat(kind_of, site) * scale, view.stat(kind_of, site), rtol=1e-4)
        for other in others:  # a fold changes the inputs of no other site
            assert torch.allclose(folded.stat(kind_of, other), view.stat(kind_of, other), rtol=1e-3, atol=1e-6)
    expected = view.stat("gram", site) / scale / scale[:, None]
    assert torch.allclose(folded.stat("gram", site), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    for linear in site.linears:
        assert torch.allclose(folded.weight(linear), view.weight(linear) * scale)


def test_bias_of_a_feeder_is_divided(make_toy):
    view = view_of(make_toy("qwen"))
    site = site_of(view, "o")
    scale = scale_for(view, site)
    edit = fold(view, site, scale)
    assert torch.allclose(edit.params["self_attn.v_proj.bias"], view.bias("self_attn.v_proj") / scale)
    assert not edit.linears and set(edit.params) == {
        "self_attn.v_proj.weight",
        "self_attn.v_proj.bias",
        "self_attn.o_proj.weight",
    }


def test_type_stays(make_toy):
    view = view_of(make_toy("qwen", torch.bfloat16))
    for site in view.sites:
        edit = fold(view, site, scale_for(view, site))
        assert {value.dtype for value in edit.params.values()} == {torch.bfloat16}


def test_original_is_untouched(make_toy):
    model = make_toy("qwen")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    view = view_of(model)
    for site in view.sites:
        fold(view, site, scale_for(view, site))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_no_feeder_is_an_error(toy_llama):
    view = view_of(toy_llama)
    with pytest.raises(ValueError, match="site o has no feeder"):
        fold(view, site_of(view, "o"), torch.ones(128))
