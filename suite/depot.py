"""Where the activations of the calibration set stand between two layers: on the device, in host memory, or in a file.

They are read once per pass, batch after batch, so where they do not fit on the device the host's memory serves as well,
and where they do not fit there either, a memory-mapped file:

    with depot.of("disk", Path("out.partial")):
        quantize_model(...)

What is scored, the first sequences, always stands on the device.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from suite.errors import unknown

PLACES = ("device", "host", "disk")
_CURRENT: ContextVar[tuple[str, Path | None]] = ContextVar("depot", default=("device", None))


@contextlib.contextmanager
def of(place: str, folder: Path | None = None) -> Iterator[None]:
    """Keeps activations in one of `PLACES` inside the block. folder: for their files, by default the system's own.
    Raises PTQError for an unknown place."""
    if place not in PLACES:
        raise unknown("place for activations", place, PLACES)
    token = _CURRENT.set((place, folder))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def gather(count: int, chunks: Iterable[Tensor], whole: bool = True) -> Tensor:
    """One tensor of `count` rows from chunks as they come, each freed before the next is made. whole: all sequences are
    among them; only such tensors leave the device.

    >>> gather(3, iter([torch.ones(2, 1), torch.zeros(1, 1)])).flatten()
    tensor([1., 1., 0.])
    """
    place, folder = _CURRENT.get() if whole else ("device", None)
    store, filled = None, 0
    for chunk in chunks:
        if store is None:
            store = _empty((count, *chunk.shape[1:]), chunk, place, folder)
        store[filled:filled + len(chunk)] = chunk
        filled += len(chunk)
    if store is None or filled != count:
        raise RuntimeError(f"{filled} of {count} sequences came")
    return store


def _empty(shape: tuple[int, ...], like: Tensor, place: str, folder: Path | None) -> Tensor:
    if place == "device":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if place == "host":
        return torch.empty(shape, dtype=like.dtype)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".activations-", suffix=".tmp")
    os.close(handle)
    try:  # the file has no name any more as soon as it is mapped, and goes with the tensor
        return torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=like.dtype).view(shape)
    finally:
        os.unlink(name)
