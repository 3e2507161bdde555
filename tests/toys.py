"""Small random models and a tokenizer, built in code: what the tests run on where no trained model is needed.

Norm gains, biases and the sizes of channels are random too, so that an edit that forgets one of them changes the logits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 512
BOS, EOS = "<s>", "</s>"

_SHAPE = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_attention_heads=4,
              max_position_embeddings=512, initializer_range=0.08, bos_token_id=0, eos_token_id=1)

# kind -> (config class, model class, what differs from _SHAPE)
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "qwen": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen-gqa": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=2, tie_word_embeddings=False)),
}


def make_toy(kind: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0, **changes):
    """A random model in evaluation mode. `kind` is a key of KINDS; `changes` are further entries of its config."""
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


def make_text(words: int = 20_000, seed: int = 0) -> str:
    """Seeded text of short sentences and paragraphs: no meaning, but words repeat as words do."""
    generator = torch.Generator().manual_seed(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    lexicon = ["".join(syllables[i] for i in torch.randint(len(syllables), (int(n),), generator=generator))
               for n in torch.randint(1, 4, (400,), generator=generator)]
    rank = torch.rand(words, generator=generator).pow(3).mul(len(lexicon)).long()
    drawn, sentences, start = [lexicon[i] for i in rank], [], 0
    while start < words:
        length = int(torch.randint(4, 12, (1,), generator=generator))
        sentences.append(" ".join(drawn[start : start + length]).capitalize() + ".")
        start += length
    return "\n\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)) + "\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens, trained on `make_text`; puts the BOS token first, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS, EOS], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(make_text().split("\n\n"), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def save_toy(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A folder in Hugging Face format with a toy and the tokenizer, as `--model` takes it."""
    make_toy(kind, dtype, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
