"""Small invented data sets in the layout that the hub has them in, under their own names: what `hub_server` serves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import toys
import yaml


def subjects() -> list[str]:
    """The subjects of MMLU, as lm-eval lists them."""
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    found = (yaml.load(path.read_text(), yaml.BaseLoader) for path in sorted(folder.glob("mmlu_*.yaml")))
    return [one["dataset_name"] for one in found]


def problem(i: int) -> dict:
    return {"question": f"Bado has {i} coins and gets {i + 1} more. How many coins does Bado have?",
            "answer": f"Bado has {i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} coins.\n#### {2 * i + 1}"}


def function(i: int) -> dict:
    return {"task_id": f"HumanEval/{i}", "prompt": f'def add_{i}(x):\n    """Return x plus {i}."""\n',
            "canonical_solution": f"    return x + {i}\n", "entry_point": f"add_{i}",
            "test": f"\n\ndef check(candidate):\n    assert candidate(1) == {i + 1}\n    assert candidate(0) == {i}\n"}


def event(i: int) -> dict:
    return {"ind": i, "activity_label": "Cooking", "ctx_a": f"Bado takes {i} eggs.", "ctx_b": "he",
            "ctx": f"Bado takes {i} eggs. he", "endings": [f"breaks {n} of them." for n in range(4)], "source_id": "x",
            "split": "val", "split_type": "indomain", "label": str(i % 4)}


def question(subject: str, i: int) -> dict:
    return {"question": f"What is {i} plus one?", "subject": subject, "choices": [str(i + n) for n in range(4)],
            "answer": 1}


SETS = {
    "openai/gsm8k": {"main": {"main/train": [problem(i) for i in range(20, 40)],
                              "main/test": [problem(i) for i in range(8)]}},
    "openai/openai_humaneval": {"openai_humaneval": {"openai_humaneval/test": [function(i) for i in range(6)]}},
    "Rowan/hellaswag": {"default": {"data/validation": [event(i) for i in range(8)],
                                    "data/train": [event(i) for i in range(8)]}},
}


def write(root: Path) -> Path:
    """All sets of the group `paper`, below root/datasets."""
    text = {split: toys.make_text(words=6000, seed=seed).split("\n\n")
            for seed, split in enumerate(("train", "validation", "test"), start=5)}
    sets = {**SETS,
            "cais/mmlu": {s: {f"{s}/{split}": [question(s, i) for i in range(n, n + 6)]
                              for n, split in ((0, "dev"), (10, "test"))} for s in subjects()},
            "Salesforce/wikitext": {"wikitext-2-raw-v1": {
                f"wikitext-2-raw-v1/{split}": [{"text": line} for line in lines] for split, lines in text.items()}}}
    for name, configurations in sets.items():
        folder = root / "datasets" / name
        for files in configurations.values():
            for stem, rows in files.items():
                path = folder / f"{stem}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        told = [{"config_name": name, "data_files": [
            {"split": Path(stem).name, "path": f"{stem}-*"} for stem in files]} for name, files in configurations.items()]
        (folder / "README.md").write_text(f"---\n{yaml.dump({'configs': told})}---\n# {name}\n")
    folder = root / "datasets" / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    for name, split in (("c4-validation.00000-of-00008", "validation"), ("c4-train.00000-of-01024", "train")):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": line, "url": "https://example.org", "timestamp": "2019"}) + "\n"
                            for line in text[split])
    return root / "datasets"
