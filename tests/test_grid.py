"""Grids: codes in range, values on the grid, bits counted, mistakes named; and the quantized linear that holds them."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from suite.errors import PTQError
from suite.grid import (
    Grid,
    QuantSpec,
    Scheme,
    decode,
    encode,
    fake_quantize,
    fake_quantize_tokens,
    find_grid,
)
from suite.linear import QuantLinear, RoundedLinear, TokenRounding

SPECS = [
    QuantSpec(bits, symmetric, group)
    for bits, symmetric, group in itertools.product(range(2, 9), (True, False), (None, 32))
]


@pytest.fixture
def weight():
    """(16, 64), groups of different size, one group of zeros."""
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 64)
    w[3, 32:] = 0
    return w


# ---------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_whole_numbers_in_range_and_values_few(spec, weight):
    grid = find_grid(weight, spec)
    codes, values = encode(weight, grid), fake_quantize(weight, grid)
    assert torch.equal(codes, codes.round()) and torch.equal(codes.to(torch.int8).float(), codes)
    assert codes.min() >= -(2 ** (spec.bits - 1)) and codes.max() <= 2 ** (spec.bits - 1) - 1
    assert grid.scale.shape == (16, 64 // (spec.group_size or 64))
    for group in values.reshape(16 * grid.scale.shape[1], -1):
        assert len(group.unique()) <= 2**spec.bits


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nearest_value_of_the_whole_grid(spec, weight):
    """Against the list of all values that the grid has."""
    grid = find_grid(weight, spec)
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    all_codes = torch.arange(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1)).float()
    values = (all_codes - zero[..., None]) * grid.scale[..., None]  # (o, g, 2^b)
    grouped = weight.reshape(*grid.scale.shape, -1)
    least = (grouped[..., None] - values[:, :, None]).abs().amin(-1)
    found = (grouped - fake_quantize(weight, grid).reshape(grouped.shape)).abs()
    assert torch.allclose(found, least, rtol=0, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_is_rounding_once(spec, dtype, weight):
    weight = weight.to(dtype)
    grid = find_grid(weight, spec)
    once = fake_quantize(weight, grid)
    assert once.dtype == dtype and torch.equal(fake_quantize(once, grid), once)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_error_is_at_most_half_a_step(spec, weight):
    """The grid covers the range: nothing is clipped, but for the rounding of the scale to bfloat16 (2^-8)."""
    grid = find_grid(weight, spec)
    step = grid.scale.repeat_interleave(64 // grid.scale.shape[1], 1)
    clipped = (
        weight.abs().reshape(*grid.scale.shape, -1).amax(-1).repeat_interleave(64 // grid.scale.shape[1], 1) * 2**-7
    )
    assert ((fake_quantize(weight, grid) - weight).abs() <= 0.5 * step * (1 + 1e-5) + clipped).all()


def test_symmetric_scale_spreads_the_range_over_all_codes():
    grid = find_grid(torch.tensor([[-7.5, 3.0], [1.0, 15.0]]), QuantSpec(4, True, None))
    assert grid.scale.flatten().tolist() == [1.0, 2.0] and grid.zero is None
    assert fake_quantize(torch.tensor([[-7.5, 3.2]]), Grid(grid.spec, grid.scale[:1])).tolist() == [[-8.0, 3.0]]


@pytest.mark.parametrize("low, high", [(0.5, 2.0), (-2.0, -0.5), (-1.0, 3.0), (0.0, 0.0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_grid_holds_zero_exactly(low, high, bits):
    weight = torch.linspace(low, high, 32)[None]
    grid = find_grid(weight, QuantSpec(bits, False, None))
    assert grid.spec.qmin <= grid.zero <= grid.spec.qmax and grid.zero == grid.zero.round()
    assert fake_quantize(torch.zeros(1, 32), grid).abs().max() == 0
    step = float(grid.scale)
    assert (fake_quantize(weight, grid) - weight).abs().max() <= step * 0.5 + abs(high - low) * 2**-7


def test_asymmetric_is_finer_on_one_sided_weights():
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        (fake_quantize(weight, find_grid(weight, QuantSpec(4, s, 32))) - weight).square().mean() for s in (True, False)
    ]
    assert errors[1] < errors[0] / 3  # half the step, a quarter of the error


def test_shrink_clips_the_group_it_is_given_for(weight):
    spec = QuantSpec(4, True, 32)
    whole, shrink = find_grid(weight, spec), torch.ones(16, 2)
    shrink[0, 1] = 0.5
    half = find_grid(weight, spec, shrink)
    assert torch.allclose(half.scale[0, 1], whole.scale[0, 1] / 2, rtol=2**-7)
    changed = (half.scale != whole.scale).nonzero().tolist()
    assert changed == [[0, 1]]


def test_scales_survive_bfloat16(weight):
    for symmetric in (True, False):
        grid = find_grid(weight, QuantSpec(4, symmetric, 32))
        assert torch.equal(grid.scale, grid.scale.bfloat16().float()) and (grid.scale > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_are_rounded_as_the_whole(symmetric, weight):
    grid = find_grid(weight, QuantSpec(3, symmetric, 32))
    part = grid.columns(20, 50, 64)
    assert torch.equal(fake_quantize(weight[:, 20:50], part), fake_quantize(weight, grid)[:, 20:50])
    per_row = find_grid(weight, QuantSpec(3, symmetric, None))
    assert torch.equal(
        fake_quantize(weight[:, 20:50], per_row.columns(20, 50, 64)), fake_quantize(weight, per_row)[:, 20:50]
    )


# ---------------------------------------------------------------------------------------------- bits and words


@pytest.mark.parametrize(
    "spec, width, bits",
    [
        (QuantSpec(4, True, 128), 4096, 4 + 16 / 128),
        (QuantSpec(4, False, 128), 4096, 4 + 20 / 128),
        (QuantSpec(3, False, 64), 128, 3 + 19 / 64),
        (QuantSpec(8, True, None), 256, 8 + 16 / 256),
        (QuantSpec(16), 128, 16.0),
    ],
)
def test_effective_bits_count_scales_and_zero_points(spec, width, bits):
    assert spec.effective_bits(width) == bits
    if spec.quantized:
        grid = find_grid(torch.randn(4, width), spec)
        stored = (
            4 * width * spec.bits + grid.scale.numel() * 16 + (0 if spec.symmetric else grid.zero.numel() * spec.bits)
        )
        assert stored / (4 * width) == bits


@pytest.mark.parametrize("act, group, symmetric", [(16, 0, True), (8, 128, False), (4, 32, True)])
def test_scheme_and_its_words(act, group, symmetric):
    scheme = Scheme.of(3, act, group, symmetric)
    assert scheme.options == {"wbits": 3, "abits": act, "group_size": group, "symmetric": symmetric}
    assert Scheme.of(**scheme.options) == scheme
    assert (scheme.act is None) == (act == 16) and scheme.weight.group_size == (group or None)


def test_names_of_schemes():
    assert str(Scheme()) == "W4A8 g128"
    assert str(Scheme.of(3, 16, 0, False)) == "W3A16 per channel asym"
    assert Scheme() == Scheme.of()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: QuantSpec(9), ["9", "2 to 8", "16"]),
        (lambda: QuantSpec(1), ["1", "2 to 8"]),
        (lambda: QuantSpec(4, True, 0), ["0", "positive"]),
        (lambda: Scheme.of(abits=5), ["5", "4, 8, and 16"]),
        (lambda: Scheme.of(group_size=-1), ["-1", "positive"]),
        (
            lambda: QuantSpec(4, True, 96).groups(128, "self_attn.q_proj"),
            ["96", "128", "self_attn.q_proj", "[16, 32, 64, 128]"],
        ),
    ],
)
def test_mistakes_give_the_value_found_and_those_allowed(make, words):
    with pytest.raises(PTQError) as error:
        make()
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_have_scales_of_their_own(bits):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    x[1, 2] *= 1000
    rounded = fake_quantize_tokens(x, QuantSpec(bits, True, None))
    alone = torch.stack([torch.stack([fake_quantize_tokens(t, QuantSpec(bits, True, None)) for t in row]) for row in x])
    assert torch.equal(rounded, alone)
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    assert ((rounded - x).abs() <= 0.5 * step * (1 + 1e-4)).all() and len(rounded[0, 0].unique()) <= 2**bits


def test_tokens_of_zeros_and_no_rounding():
    assert fake_quantize_tokens(torch.zeros(2, 8), QuantSpec(8)).abs().max() == 0
    x = torch.randn(2, 8)
    assert fake_quantize_tokens(x, None) is x and fake_quantize_tokens(x, QuantSpec(16)) is x
    assert fake_quantize_tokens(x.bfloat16(), QuantSpec(8)).dtype == torch.bfloat16


def test_shared_rounding_is_done_once_and_notices_changes(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "suite.linear.fake_quantize_tokens", lambda x, spec: calls.append(1) or fake_quantize_tokens(x, spec)
    )
    rounding, x = TokenRounding(QuantSpec(8, True, None)), torch.randn(4, 32)
    with torch.no_grad():
        first = rounding(x)
        assert rounding(x) is first and len(calls) == 1
        x[0] *= 2  # in place: the same tensor, another value
        assert torch.equal(rounding(x), fake_quantize_tokens(x, rounding.spec)) and len(calls) == 2
        assert torch.equal(rounding(x.clone()), rounding(x))
        assert len(calls) == 4  # another tensor, and back
    with torch.inference_mode():
        y = torch.randn(4, 32)  # an inference tensor has no version to compare
        rounding(y)
        y.mul_(3)
        assert torch.equal(rounding(y), fake_quantize_tokens(y, rounding.spec))


def test_rounding_passes_no_stale_graph():
    rounding, x = TokenRounding(QuantSpec(8, True, None)), torch.randn(4, 32, requires_grad=True)
    with torch.no_grad():
        rounding(x)
    assert rounding(x).requires_grad


def test_copies_of_a_rounding_share_nothing():
    rounding = TokenRounding(QuantSpec(4, True, None))
    with torch.no_grad():
        rounding(torch.randn(2, 8))
    for other in (copy.deepcopy(rounding), pickle.loads(pickle.dumps(rounding))):
        assert other.spec == rounding.spec and other._rounded is None


# ---------------------------------------------------------------------------------------------- quantized linears


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_scales_give_the_weight_back(bits, dtype, symmetric, weight):
    spec = QuantSpec(bits, symmetric, 32)
    grid = find_grid(weight.to(dtype), spec)
    rounded = fake_quantize(weight.to(dtype), grid)
    linear = QuantLinear.of(rounded, grid, None, TokenRounding(None))
    assert linear.codes.dtype == torch.int8 and linear.weight.dtype == dtype
    assert torch.equal(linear.weight, rounded)
    zero = torch.zeros(16, 2) if symmetric else linear.zero
    by_hand = (linear.codes.float().reshape(16, 2, 32) - zero[..., None]) * linear.scale[..., None]
    assert torch.equal(by_hand.reshape(16, 64).to(dtype), rounded)
    assert torch.equal(decode(linear.codes, linear.grid).to(dtype), rounded)


@pytest.mark.parametrize("act", [None, QuantSpec(8, True, None)])
def test_linears_compute_what_they_say(act, weight):
    bias, x = torch.randn(16), torch.randn(5, 64)
    grid = find_grid(weight, QuantSpec(4, True, 32))
    rounded = fake_quantize(weight, grid)
    quantized = QuantLinear.of(rounded, grid, bias, TokenRounding(act))
    expected = nn.functional.linear(fake_quantize_tokens(x, act), rounded, bias)
    assert torch.equal(quantized(x), expected) and quantized.act == act
    original = nn.Linear(64, 16)
    kept = RoundedLinear(original, TokenRounding(act))
    assert torch.equal(kept(x), original(fake_quantize_tokens(x, act))) and kept.weight is original.weight


def test_state_of_a_quantized_linear_is_codes_scales_and_bias(weight):
    symmetric = QuantLinear.of(weight, find_grid(weight, QuantSpec(4, True, 32)), torch.zeros(16), TokenRounding(None))
    asymmetric = QuantLinear.of(weight, find_grid(weight, QuantSpec(4, False, 32)), None, TokenRounding(None))
    assert set(symmetric.state_dict()) == {"codes", "scale", "bias"}
    assert set(asymmetric.state_dict()) == {"codes", "scale", "zero"}
    assert not list(symmetric.parameters())
