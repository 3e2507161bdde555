"""Rounding of the key-value cache: the grid, the attention that reads it, R3, checkpoints and the harness."""

from __future__ import annotations

import json

import pytest
import torch
from toys import make_tokenizer, make_toy

from suite import adapter, checkpoint, kv, method, walk
from suite.errors import PTQError
from suite.hadamard import online
from suite.testing import TOYS, _logits, _relative


def quantized_by_hand(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One vector on the grid of 2^bits equal steps from its smallest to its largest value, 0 among them."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / (2**bits - 1)
    shift = round(-low / step)
    return torch.tensor([(min(max(round(float(v) / step + shift), 0), 2**bits - 1) - shift) * step for v in x])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_head_of_each_token_has_a_grid_of_its_own(bits):
    x = torch.randn(2, 3, 5, 16) * torch.logspace(-2, 2, 5)[:, None]
    rounded = kv.round_heads(x, bits)
    for index in [(0, 0, 0), (1, 2, 4), (0, 1, 2)]:
        assert torch.allclose(rounded[index], quantized_by_hand(x[index], bits), rtol=1e-5, atol=1e-7)
        assert len(rounded[index].unique()) <= 2**bits


def test_gradients_pass_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    kv.round_heads(x, 2).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


@pytest.mark.parametrize("name", ["gqa", "biased"])
def test_more_bits_less_error_and_16_none(name):
    toy = TOYS[name]
    tokens, exact = toy.tokens(seed=1), _logits(toy.model(), toy.tokens(seed=1))
    errors = {}
    for bits in (2, 4, 8, 16):
        model = toy.model()
        kv.set_(model, bits)
        errors[bits] = _relative(_logits(model, tokens), exact)
    assert errors[2] > errors[4] > errors[8] > errors[16] == 0
    assert errors[8] < 0.02


def test_generation_with_a_cache_is_the_pass_over_the_whole_text():
    toy = TOYS["gqa"]
    model, tokens = toy.model(torch.float64), toy.tokens(2, 12, seed=1)
    kv.set_(model, 3)
    whole = _logits(model, tokens)
    with torch.no_grad():
        first = model(tokens[:, :7], use_cache=True)
        rest = [
            model(tokens[:, k : k + 1], past_key_values=first.past_key_values, use_cache=True).logits
            for k in range(7, 12)
        ]
    stepwise = torch.cat([first.logits, *rest], 1)
    assert (stepwise - whole).abs().max() < 1e-5 * whole.abs().max()


def test_the_rotation_of_keys_and_queries_changes_nothing_but_the_rounding():
    toy = TOYS["gqa"]
    tokens, exact = toy.tokens(seed=1), _logits(toy.model(torch.float64), toy.tokens(seed=1))
    errors = {}
    for bits in (4, 8):
        for rotation in (None, online(32)):
            model = toy.model(torch.float64)
            kv.set_(model, bits, rotation)
            errors[bits, rotation is not None] = _relative(_logits(model, tokens), exact)
    assert errors[8, True] < errors[4, True] and errors[8, True] < 2 * errors[8, False]
    x = kv.KVRounding(8, online(32))
    q, k, v = torch.randn(3, 1, 4, 6, 32, dtype=torch.float64).unbind()
    rq, rk, rv = x(q, k, v)
    assert (rq @ rk.mT - q @ k.mT).abs().max() < 0.5 and not torch.allclose(rq, q) and (rv - v).abs().max() < 0.05


def test_padded_batches_answer_like_single_sequences():
    toy = TOYS["gqa"]
    model, tokens = toy.model(torch.float64), toy.tokens(1, 9, seed=1)
    kv.set_(model, 4)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
    assert (found - _logits(model, tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("name", method.names())
def test_it_goes_with_every_method(name):
    toy, tokens = TOYS["biased"], TOYS["biased"].tokens(2, seed=1)
    options = {"steps": 2} if "steps" in method.options_of(name) else {}
    logits = {}
    for bits in (16, 3):
        model = toy.model()
        kv.set_(model, bits)
        walk.quantize_model(method.build(name, **options), model, toy.calib())
        logits[bits] = _logits(model, tokens)
        assert kv.bits_of(model) == bits and logits[bits].isfinite().all()
    assert not torch.equal(logits[16], logits[3])


def test_bits_out_of_range_are_an_error():
    model = make_toy()
    with pytest.raises(PTQError, match="kvbits is 1.*2 to 8"):
        kv.set_(model, 1)
    assert kv.bits_of(model) == 16 and model.config._attn_implementation != kv.ATTENTION


def test_a_checkpoint_keeps_bits_and_rotations(tmp_path):
    toy, tokenizer = TOYS["gqa"], make_tokenizer()
    model = toy.model()
    kv.set_(model, 4)
    made = method.build("spinquant", rotation="hadamard", variant="had", inner="rtn")
    walk.quantize_model(made, model, toy.calib())
    folder = checkpoint.save(model, tokenizer, tmp_path / "out", {"method": method.to_config(made)})
    told = json.loads((folder / "ptq.json").read_text())
    assert told["kv"]["bits"] == 4 and told["kv"]["rotation"]["name"] == "hadamard 32"
    assert set(told["online"]) == {f"model.layers.{k}.mlp.down_proj" for k in range(2)}
    loaded, _, _ = checkpoint.load(folder)
    assert kv.bits_of(loaded) == 4
    assert torch.equal(_logits(loaded, toy.tokens(seed=1)), _logits(model, toy.tokens(seed=1)))

    told["kv"]["bits"] = 8
    before = checkpoint.identity(folder)
    (folder / "ptq.json").write_text(json.dumps(told))
    assert checkpoint.identity(folder) != before


def test_the_harness_rounds_and_tells(toy_folder):
    plain, rounded = adapter.PTQ(str(toy_folder)), adapter.PTQ(str(toy_folder), kvbits=3)
    tokens = TOYS["gqa"].tokens(2, 20, seed=3)
    assert not torch.equal(plain._model_call(tokens), rounded._model_call(tokens))
    assert rounded.model_identity()["kvbits"] == 3 and rounded.variant.endswith("KV3")
    assert plain.model_identity() != rounded.model_identity()
    with pytest.raises(PTQError, match="kvbits"):
        adapter.PTQ(str(toy_folder), kvbits=9)
