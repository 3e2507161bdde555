"""Quantizes a model with llm-compressor by a recipe and the token ids given. Runs in the environment of `make peers`.

    .venv-peers/bin/python peers/oneshot.py MODEL TOKENS.json RECIPE.yaml OUT [--form pack-quantized]

TOKENS.json is a list of sequences of token ids, taken in their order: the tool by itself draws another order each time.
The number type is the one the model is stored in.
"""

import argparse
import json

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

# AWQ pins its cache in memory for a GPU, and fails where there is none. It is a matter of speed alone.
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda *_, **__: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "tokens", "recipe", "out"):
        parser.add_argument(name)
    parser.add_argument("--form", default="pack-quantized")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with open(given.tokens) as file:
        sequences = json.load(file)
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences])
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    # In the tool's own pipeline each modifier sees the data by itself. In "sequential" all see it at once, and GPTQ would
    # sum over the inputs from before a fold.
    oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=given.recipe, pipeline="independent",
            max_seq_length=len(sequences[0]), num_calibration_samples=len(sequences), shuffle_calibration_samples=False)
    model.save_pretrained(given.out, save_compressed=True, quantization_format=given.form)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
