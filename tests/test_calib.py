"""Calibration data: the same seed gives the same windows, the digest identifies them, mistakes are named."""

from __future__ import annotations

import pytest
import torch

from suite import calib
from suite.errors import PTQError


def test_windows_are_windows_of_the_text():
    ids = torch.arange(1000)
    found = calib.windows(ids, 50, 64, seed=0)
    assert found.shape == (50, 64) and (found.diff(dim=1) == 1).all()
    assert found.min() >= 0 and found.max() <= 999
    assert torch.equal(found, calib.windows(ids, 50, 64, seed=0))
    assert not torch.equal(found, calib.windows(ids, 50, 64, seed=1))


def test_first_and_last_position_can_be_drawn():
    found = calib.windows(torch.arange(10), 200, 8, seed=0)
    assert set(found[:, 0].tolist()) == {0, 1, 2}
    assert calib.windows(torch.arange(8), 3, 8, seed=0).tolist() == [list(range(8))] * 3


def test_outside_random_numbers_do_not_matter():
    state = torch.random.get_rng_state()
    first = calib.windows(torch.arange(100), 5, 8, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(calib.windows(torch.arange(100), 5, 8, seed=0), first)


def test_load_of_a_file(toy_text_file, toy_tokenizer, toy_text):
    data = calib.load(str(toy_text_file), toy_tokenizer, nsamples=4, seqlen=32, seed=3)
    ids = toy_tokenizer(toy_text).input_ids
    text = " ".join(map(str, ids))
    assert data.tokens.shape == (4, 32) and data.tokens.dtype == torch.int64
    assert all(" ".join(map(str, row)) in text for row in data.tokens.tolist())
    assert (data.source, data.seed) == (str(toy_text_file), 3)
    assert data.identity == {
        "source": str(toy_text_file),
        "digest": data.digest,
        "nsamples": 4,
        "seqlen": 32,
        "seed": 3,
    }


def test_digests_identify_tokens_and_text(toy_text_file, toy_tokenizer, toy_text, tmp_path):
    load = lambda path, **kw: calib.load(str(path), toy_tokenizer, **{"nsamples": 4, "seqlen": 32, **kw})  # noqa: E731
    data = load(toy_text_file)
    assert data.digest == load(toy_text_file).digest and len(data.digest) == 64
    assert len({data.digest, load(toy_text_file, seed=1).digest, load(toy_text_file, nsamples=5).digest}) == 3
    copy = tmp_path / "copy.txt"
    copy.write_text(toy_text)
    assert load(copy).text_digest == data.text_digest == calib.text_digest(toy_text)
    copy.write_text(toy_text + "x")
    assert load(copy).text_digest != data.text_digest
    flat = calib.from_tokens(torch.arange(12).reshape(3, 4)).digest
    assert flat != calib.from_tokens(torch.arange(12).reshape(4, 3)).digest  # same numbers, other windows


def test_batches_hold_about_8192_tokens():
    assert [calib.from_tokens(torch.zeros(9, t)).step() for t in (64, 2048, 3000, 8192, 9000)] == [128, 4, 2, 1, 1]


@pytest.mark.parametrize("t", [40, 2048, 3000, 9000])
def test_scored_sequences_are_whole_batches_that_hold_the_tokens(t):
    data = calib.from_tokens(torch.zeros(300, t))
    for tokens in (1, 2048, 16384, 30_000):
        found = data.sequences(tokens)
        assert found * t >= tokens or found == 300
        assert found % data.step() == 0 or found == 300
    assert data.sequences(10**9) == 300 and data.sequences(0) == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda load: load("nowhere/text.txt"), ["'nowhere/text.txt'", "does not exist", "embedded", "wikitext2"]),
        (lambda load: load("wikitext3"), ["unknown calibration source 'wikitext3'", "did you mean 'wikitext2'"]),
        (lambda load: load(nsamples=0), ["nsamples is 0", "from 1"]),
        (lambda load: load(seqlen=0), ["seqlen is 0", "from 1"]),
        (lambda load: load(seqlen=10**6), ["fewer than one sequence of 1000000", "--seqlen"]),
    ],
)
def test_mistakes(make, words, toy_text_file, toy_tokenizer):
    with pytest.raises(PTQError) as error:
        make(
            lambda source=str(toy_text_file), nsamples=2, seqlen=8: calib.load(source, toy_tokenizer, nsamples, seqlen)
        )
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, word", [(b"", "empty"), (b" \n\n", "empty"), (b"\xff\xfe\x00", "UTF-8")])
def test_files_without_text(content, word, tmp_path, toy_tokenizer):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(PTQError, match=word):
        calib.load(str(path), toy_tokenizer, 2, 8)
    with pytest.raises(PTQError, match="cannot be read"):
        calib.load(str(tmp_path), toy_tokenizer, 2, 8)


@pytest.mark.parametrize("name", sorted(calib.HUB_SETS))
def test_no_hub_is_an_error_at_once(name, toy_tokenizer):
    """Tests run offline: the answer names the set and what to pass instead."""
    with pytest.raises(PTQError, match="--calib embedded"):
        calib.load(name, toy_tokenizer, 2, 8)


def test_embedded_text(toy_tokenizer):
    data = calib.load("embedded", toy_tokenizer, 4, 64)
    assert data.tokens.shape == (4, 64) and data.source == "embedded"
