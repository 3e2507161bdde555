"""The tokenizers of the embedded models: one byte-level BPE, dressed as each family dresses it.

Vocabulary 1,024, every digit a token of its own. Llama: `<s>` is put first, `</s>` ends a document. Qwen2: nothing is put
first, `<|endoftext|>` ends a document. Three special tokens each, so that ordinary tokens have the same ids in both families.
How a text is split before the merges is the family's own rule: transformers reads every `qwen2` tokenizer with the rule of
the real one, whatever its files say, so the model has to be trained with it (tests/test_zoo.py compares the two).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from suite.zoo import corpus

VOCABULARY = 1024
SPECIAL = {"llama": ["<unk>", "<s>", "</s>"], "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
MERGES = Path(__file__).resolve().parent / "data" / "merges.txt"
TRAINING_DOCUMENTS = 30_000


def learn() -> list[tuple[str, str]]:
    """The merges of a BPE trained on generator output; data/merges.txt keeps them (written by this module, run as a script)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL["llama"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = itertools.islice(corpus.documents(corpus.SEEDS["tokenizer"]), TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def splitter() -> pre_tokenizers.PreTokenizer:
    """Digits one by one, the rest by the words of GPT-2: what the merges were learned on, and the Llama-like models."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def qwen2(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer that transformers makes of these pieces for a `qwen2` model: Qwen's splitting rule and normal form."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, pad_token="<|endoftext|>").backend_tokenizer


def build(family: str) -> Tokenizer:
    """The tokenizer of a family: special tokens first, then the bytes, then the merges in their order."""
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    pieces = SPECIAL[family] + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if family == "qwen2":
        tokenizer = qwen2(vocabulary, merges)
    else:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = splitter()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.add_special_tokens(SPECIAL[family])
    return tokenizer


def save(family: str, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as AutoTokenizer reads them."""
    from transformers import PreTrainedTokenizerFast

    special = {"llama": dict(bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"),
               "qwen2": dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>")}[family]
    PreTrainedTokenizerFast(tokenizer_object=build(family), model_max_length=512, clean_up_tokenization_spaces=False,
                            **special).save_pretrained(folder)


def main() -> None:
    MERGES.write_text("".join(f"{left} {right}\n" for left, right in learn()), encoding="utf-8")
    print(f"{MERGES.name}: {len(build('llama').get_vocab())} tokens")


if __name__ == "__main__":
    main()
