"""The embedded models: four small trained language models, so that everything runs without a hub.

Only facts and paths here; nothing heavy is imported, so the command line can list the models at once.

>>> "tiny-llama-s" in names()
True
>>> path("tiny-qwen-m").name
'tiny-qwen-m'
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from suite.errors import unknown

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Embedded:
    """An embedded model: its architecture and how it was trained.

    steps and batch count optimizer steps and sequences of `length` tokens a step.
    """

    name: str
    family: str  # "llama" or "qwen2"
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool
    steps: int
    batch: int
    length: int = 512
    seed: int = 0
    pace: float = 1.0  # factor on the learning rates


TABLE: dict[str, Embedded] = {model.name: model for model in (
    Embedded("tiny-llama-s", "llama", 128, 4, 384, 4, 2, True, steps=4400, batch=4),
    Embedded("tiny-llama-m", "llama", 256, 8, 640, 8, 4, False, steps=2000, batch=4, pace=0.8),
    Embedded("tiny-qwen-s", "qwen2", 128, 4, 384, 4, 4, True, steps=3600, batch=4),
    Embedded("tiny-qwen-m", "qwen2", 256, 8, 640, 8, 8, True, steps=2000, batch=4, pace=0.8),
)}


def names() -> list[str]:
    """Names of the embedded models."""
    return list(TABLE)


def path(name: str) -> Path:
    """The folder of an embedded model in Hugging Face format."""
    if name not in TABLE:
        raise unknown("embedded model", name, TABLE)
    return HERE / "models" / name


def calib_text() -> Path:
    """The calibration text: all six kinds, from the training side, no document shared with any test."""
    return HERE / "data" / "calib.txt"
