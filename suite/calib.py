"""Calibration data: a seeded set of token windows, identified by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from suite import hub
from suite.errors import PTQError, unknown
from suite.tokens import text_digest, token_ids

EMBEDDED = "embedded"
BATCH_TOKENS = 8192


def usual_size(source: str) -> tuple[int, int]:
    """(sequences, tokens of each) of the matched mode: 128 x 2,048 as in the papers, 64 x 512 of the embedded text."""
    return (64, 512) if source == EMBEDDED else (128, 2048)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tokens every method of a comparison sees.

    tokens (n, t) int64; source: the name they came from; digest: sha256 of the tokens, the identity in records;
    text_digest: sha256 of the text they were cut from, by which a run on the evaluated text is recognised.
    batch_tokens: how many are run at once; moves results by round-off only, so it is no part of the identity.
    """

    tokens: Tensor
    source: str
    digest: str
    text_digest: str
    seed: int
    batch_tokens: int = BATCH_TOKENS

    @property
    def identity(self) -> dict:
        n, t = self.tokens.shape
        return {"source": self.source, "digest": self.digest, "nsamples": n, "seqlen": t, "seed": self.seed}

    def step(self) -> int:
        """Sequences per batch: about `batch_tokens` tokens."""
        return max(1, self.batch_tokens // self.tokens.shape[1])

    def sequences(self, tokens: int) -> int:
        """How many sequences hold at least `tokens` tokens, in whole batches, so that batches stay the same; at most all."""
        n, t = self.tokens.shape
        batches = -(-tokens // (t * self.step()))
        return min(n, batches * self.step())


def from_tokens(tokens: Tensor, source: str = "given", seed: int = 0, text: str = "") -> Calibration:
    """A calibration set from token windows (n, t)."""
    return Calibration(tokens.long(), source, digest(tokens), text_digest(text), seed)


def digest(tokens: Tensor) -> str:
    """sha256 of token windows and their shape."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.cpu().long().numpy().tobytes()).hexdigest()


def windows(ids: Tensor, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """`nsamples` random windows of `seqlen` tokens, as the GPTQ code draws them (with replacement): (n, t).

    Raises PTQError if the text is shorter than one window.
    """
    if len(ids) < seqlen:
        raise PTQError(f"calibration text has {len(ids)} tokens, fewer than one sequence of {seqlen}: "
                       f"give more text or a smaller --seqlen")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - seqlen + 1, (nsamples,), generator=generator)
    return torch.stack([ids[s:s + seqlen] for s in starts.tolist()])


def load(source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0) -> Calibration:
    """Calibration windows from the embedded text ("embedded"), a local text file, or a hub set ("wikitext2", "c4", "pile").

    The text is tokenized once and cut into random windows.

    Raises PTQError: unknown source, missing or empty file, text shorter than a window, no hub reachable.
    """
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen)):
        if value < 1:
            raise PTQError(f"{name} is {value}: allowed are whole numbers from 1")
    text = read_text(source)
    return from_tokens(windows(token_ids(text, tokenizer), nsamples, seqlen, seed), source, seed, text)


def read_text(source: str) -> str:
    """The text behind a calibration source. Raises PTQError as `load` does."""
    if source == EMBEDDED:
        from suite import zoo

        return Path(zoo.calib_text()).read_text(encoding="utf-8")
    if source in HUB_SETS:
        return HUB_SETS[source]()
    path = Path(source)
    if not path.exists():
        if "/" in source or "." in source:
            raise PTQError(f"calibration text {source!r} does not exist: give a text file, or one of "
                           f"{', '.join([EMBEDDED, *HUB_SETS])}")
        raise unknown("calibration source", source, [EMBEDDED, *HUB_SETS, "a path to a text file"])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PTQError(f"calibration text {source!r} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise PTQError(f"calibration text {source!r} is empty: give a file with text")
    return text


def _hub(path: str, config: str | None, split: str, field: str, join: str, rows: int | None = None,
         **options) -> Callable[[], str]:
    def fetch() -> str:
        data = hub.dataset(path, config, split, f"--calib {EMBEDDED} or a text file", **options)
        return join.join(data[field] if rows is None else data[:rows][field])

    return fetch


HUB_SETS: dict[str, Callable[[], str]] = {
    "wikitext2": _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", "\n\n"),
    "c4": _hub("allenai/c4", None, "train", "text", "\n\n", 20_000,
               data_files={"train": "en/c4-train.00000-of-01024.json.gz"}),
    "pile": _hub("mit-han-lab/pile-val-backup", None, "validation", "text", "\n\n", 20_000),
}
