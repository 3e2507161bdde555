"""The toys are what their names say: a test that uses them can rely on it."""

import pytest
import torch
import toys
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("kind", toys.KINDS)
def test_same_seed_same_model_and_outside_state_untouched(kind):
    state = torch.random.get_rng_state()
    first, again, other = toys.make_toy(kind), toys.make_toy(kind), toys.make_toy(kind, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, again(tokens).logits)
        assert not torch.allclose(first(tokens).logits, other(tokens).logits)


def test_folder_loads_as_saved(toy_folder, toy_text):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy_folder), AutoTokenizer.from_pretrained(toy_folder)
    ids = tokenizer(toy_text[:500]).input_ids
    assert ids[0] == tokenizer.bos_token_id and max(ids) < model.config.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True) == toy_text[:500]
    assert len(tokenizer(toy_text).input_ids) > 20_000
