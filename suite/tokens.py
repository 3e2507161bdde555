"""A text as token ids, kept for the next who asks.

The variants of a table all read the same few texts, and on small models to tokenize one takes as long as to evaluate it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_TEXTS = 8
_kept: dict[tuple[str, str, bool], Tensor] = {}  # the last texts, by their digest and the tokenizer's


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def token_ids(text: str, tokenizer, special_tokens: bool = True) -> Tensor:
    """The token ids (t,) of a text, int64. special_tokens: whether the tokenizer may add its own. Not to be written into."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = backend and (text_digest(text), text_digest(backend.to_str()), special_tokens)
    if key in _kept:
        return _kept[key]
    ids = torch.tensor(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"], dtype=torch.long)
    if key:
        if len(_kept) >= _TEXTS:
            _kept.pop(next(iter(_kept)))
        _kept[key] = ids
    return ids
