"""The candidates for a unit of layers: quantized and scored one after another, or side by side on several devices.

    with candidates.on([torch.device("cuda:0"), torch.device("cuda:1")]):
        quantize_model(build("cka-hybrid"), model, calib)

Each device has a twin of the layers and gathers their statistics for itself; a thread per device takes the next
candidate that waits. On devices of one kind the result is that of one after another, bit for bit.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

import torch

from suite.method import LayerEdit
from suite.metrics import Lens, distances

Scores = dict[str, float]
Measure = Callable[[torch.Tensor], Scores]
_DEVICES: ContextVar[tuple[torch.device, ...]] = ContextVar("devices", default=())


@contextlib.contextmanager
def on(devices: Sequence[torch.device]) -> Iterator[None]:
    """Lets searches inside the block try candidates side by side on these devices; on one, or none, in turn."""
    token = _DEVICES.set(tuple(devices))
    try:
        yield
    finally:
        _DEVICES.reset(token)


@dataclass(frozen=True, eq=False)
class Tried:
    """A candidate: its scores, by metric; its edit stands where it was made until it is kept."""

    scores: Scores
    _layer: Any
    _view: Any
    _edit: LayerEdit

    def keep(self) -> LayerEdit:
        """The edit, on the device of the layer, which has its outputs from now on."""
        if self._view is self._layer:
            return self._edit
        edit = self._edit.to(self._layer.device)
        self._layer.adopt(edit, self._view.after(self._edit))
        self._view.forget(self._edit)
        return edit

    def drop(self) -> None:
        """Frees what it holds."""
        self._view.forget(self._edit)


class Candidates:
    """The candidates for one view (suite.walk), compared with the unquantized model's outputs at `view.reference`.
    measure: `scores_against` that reference, if the caller has it.

    >>> for name, tried in Candidates(view).tried({"gptq": GPTQ().quantize, "rtn": RTN().quantize}): tried.scores
    """

    def __init__(self, layer: Any, lens: Lens | None = None, measure: Measure | None = None):
        self._layer, devices, reference = layer, _DEVICES.get(), layer.reference
        self._compared = len(reference)
        self._places = [(layer, measure or scores_against(reference, lens))] if len(devices) < 2 else [
            (layer.on(device), scores_against(reference.to(device), lens and _from(lens, layer.device))) for device in devices]

    def tried(self, makers: Mapping[str, Callable[[Any], LayerEdit]]) -> Iterator[tuple[str, Tried]]:
        """Each candidate, in order. makers: name -> what makes the edit of a view. What the caller drops before it asks
        for the next one is not held longer."""
        if len(self._places) == 1:
            for name, make in makers.items():
                yield name, self._try(*self._places[0], make)
            return
        idle, gradients = queue.SimpleQueue(), torch.is_grad_enabled()
        for place in self._places:
            idle.put(place)

        def work(make: Callable[[Any], LayerEdit]) -> Tried:
            view, measure = idle.get()
            try:
                with torch.set_grad_enabled(gradients):  # a matter of each thread
                    return self._try(view, measure, make)
            finally:
                idle.put((view, measure))

        with ThreadPoolExecutor(len(self._places)) as threads:
            futures = [threads.submit(copy_context().run, work, make) for make in makers.values()]
        for name, future in zip(makers, futures, strict=True):
            yield name, future.result()

    def _try(self, view: Any, measure: Measure, make: Callable[[Any], LayerEdit]) -> Tried:
        edit = make(view)
        outputs = view.after(edit).outputs(self._compared)
        return Tried(measure(outputs), self._layer, view, edit)


def scores_against(reference: torch.Tensor, lens: Lens | None) -> Measure:
    """What scores outputs against the unquantized model's; lens: for the metric kl."""
    return distances(reference) if lens is None else distances(reference, lens)


def _from(lens: Lens, home: torch.device) -> Lens:
    """A lens that stays on its device, for hidden states on another."""
    return lambda hidden: lens(hidden.to(home)).to(hidden.device)
