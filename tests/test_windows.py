"""Window perplexity against a direct computation, its protocol, and what it refuses."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from suite import tokens, windows
from suite.errors import PTQError


def direct(model, ids, window):
    """The definition, one token at a time: mean of -log p(token | those before it in the window), tokens 2..N."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        piece = torch.tensor(ids[start:start + window])
        with torch.no_grad():
            probabilities = F.softmax(model(piece[None]).logits[0].double(), -1)
        for position in range(1, window):
            total -= math.log(probabilities[position - 1, piece[position]])
            count += 1
    return math.exp(total / count), count


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_equals_the_direct_computation(make_toy, toy_tokenizer, toy_text, kind):
    model, text = make_toy(kind), toy_text[:3000]
    cut = windows.token_windows(text, toy_tokenizer, 48)
    expected, count = direct(model, toy_tokenizer(text)["input_ids"], 48)
    assert cut.predicted == count and cut.count > 5
    assert windows.perplexity(windows.window_nll(model, cut.tokens), count) == pytest.approx(expected, rel=1e-6)


def test_batches_do_not_change_it(toy_llama, toy_tokenizer, toy_text):
    cut = windows.token_windows(toy_text[:4000], toy_tokenizer, 64)
    one, seven = (windows.window_nll(toy_llama, cut.tokens, batch_size=b) for b in (1, 7))
    assert one.dtype == torch.float64 and one.shape == (cut.count,)
    torch.testing.assert_close(one, seven, rtol=1e-6, atol=0)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(toy_llama, toy_tokenizer, toy_text):
    toy_llama.lm_head.weight.data.zero_()
    cut = windows.token_windows(toy_text[:2000], toy_tokenizer, 64)
    assert windows.perplexity(windows.window_nll(toy_llama, cut.tokens), cut.predicted) == pytest.approx(512, rel=1e-6)


def test_protocol(toy_tokenizer, toy_text):
    cut = windows.token_windows(toy_text, toy_tokenizer, 100)
    ids = toy_tokenizer(toy_text)["input_ids"]
    assert cut.tokens.flatten().tolist() == ids[:len(ids) // 100 * 100]
    assert cut.bos and ids[0] == toy_tokenizer.bos_token_id and toy_tokenizer.bos_token_id not in cut.tokens[1:, 0]
    told = cut.protocol
    assert told["window"] == 100 and told["windows"] == cut.count and told["text_tokens"] == len(ids)
    assert told["tokens"] == cut.count * 99 and "start" in told["bos"]
    without = windows.token_windows(toy_text, toy_tokenizer, 100, special_tokens=False)
    assert not without.bos and without.tokens.flatten().tolist() == ids[1:][:without.tokens.numel()]
    assert without.protocol["data_digest"] != told["data_digest"]
    assert without.protocol["text_digest"] == told["text_digest"]


def test_fewer_windows(toy_tokenizer, toy_text):
    assert windows.token_windows(toy_text, toy_tokenizer, 64, max_windows=3).count == 3
    assert windows.token_windows(toy_text, toy_tokenizer, 64, max_tokens=200).count == 3
    with pytest.raises(PTQError, match="--max-tokens leaves 63"):
        windows.token_windows(toy_text, toy_tokenizer, 64, max_tokens=63)


def test_a_text_is_tokenized_once_for_equal_tokenizers_and_anew_for_another(toy_folder, toy_tokenizer, toy_text, monkeypatch):
    text, calls = toy_text[:2500], []
    monkeypatch.setattr(tokens, "_kept", {})
    other = AutoTokenizer.from_pretrained(toy_folder)
    plain = type(other).__call__
    monkeypatch.setattr(type(other), "__call__", lambda self, *a, **k: calls.append(self) or plain(self, *a, **k))
    first, again = (windows.token_windows(text, tokenizer, 32).tokens for tokenizer in (other, toy_tokenizer))
    assert len(calls) == 1 and torch.equal(first, again)
    bare = windows.token_windows(text, other, 32, special_tokens=False).tokens
    assert len(calls) == 2
    other.add_tokens([text[:6]])
    changed = windows.token_windows(text, other, 32).tokens
    assert len(calls) == 3 and not torch.equal(changed[0], first[0])
    assert torch.equal(bare, torch.tensor(plain(toy_tokenizer, text, add_special_tokens=False)["input_ids"])
                       [:bare.numel()].reshape(bare.shape))
    for start in range(12):
        windows.token_windows(text[start:], other, 32)
    assert len(tokens._kept) == tokens._TEXTS


def test_window_size():
    assert windows.fit(None, 512) == 512 and windows.fit(None, 131072) == 2048 and windows.fit(None, None) == 2048
    assert windows.fit(512, 512) == 512
    with pytest.raises(PTQError, match="513.*at most 512"):
        windows.fit(513, 512)
    with pytest.raises(PTQError, match="window is 1"):
        windows.fit(1, 512)


def test_batch_is_bounded_by_the_logits():
    assert windows.batch_of(2048, 128_256) == 1
    assert windows.batch_of(512, 1024) == 8


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_text(toy_tokenizer, text):
    with pytest.raises(PTQError, match="the text is empty"):
        windows.token_windows(text, toy_tokenizer, 64)


def test_short_text(toy_tokenizer):
    with pytest.raises(PTQError, match=r"has \d+ tokens, fewer than one window of 64"):
        windows.token_windows("Bado bidi.", toy_tokenizer, 64)


def test_bad_files(tmp_path):
    with pytest.raises(PTQError, match="does not exist"):
        windows.read_text(tmp_path / "none.txt")
    with pytest.raises(PTQError, match="is a folder"):
        windows.read_text(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PTQError, match="is empty"):
        windows.read_text(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PTQError, match="UTF-8"):
        windows.read_text(tmp_path / "binary.txt")


def test_a_broken_model_is_named(toy_llama, toy_tokenizer, toy_text):
    toy_llama.lm_head.weight.data[3] = float("nan")
    with pytest.raises(PTQError, match="window 0 has an NLL that is not finite"):
        windows.window_nll(toy_llama, windows.token_windows(toy_text, toy_tokenizer, 64, max_windows=2).tokens)


def test_narrow_types_are_summed_in_wide_ones(make_toy, toy_tokenizer, toy_text):
    cut = windows.token_windows(toy_text, toy_tokenizer, 128, max_windows=8)
    wide, narrow = (windows.perplexity(windows.window_nll(make_toy("llama", dtype), cut.tokens), cut.predicted)
                    for dtype in (torch.float64, torch.bfloat16))
    assert narrow == pytest.approx(wide, rel=2e-2)  # the model's own error; a sum in bfloat16 would add 2^-8 a step
