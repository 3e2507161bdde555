"""Small random models, text and a tokenizer, built in code: what the tests run on where no trained model is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from suite.testing import KINDS, VOCABULARY, make_toy  # noqa: F401

BOS, EOS = "<s>", "</s>"


def make_text(words: int = 20_000, seed: int = 0) -> str:
    """Seeded text of short sentences and paragraphs: no meaning, but words repeat as words do."""
    generator = torch.Generator().manual_seed(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    lexicon = [
        "".join(syllables[i] for i in torch.randint(len(syllables), (int(n),), generator=generator))
        for n in torch.randint(1, 4, (400,), generator=generator)
    ]
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
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(make_text().split("\n\n"), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def save_toy(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A folder in Hugging Face format with a toy and the tokenizer, as `--model` takes it."""
    make_toy(kind, dtype, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
