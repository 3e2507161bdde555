"""One line of progress for a person who waits: what is being done, elapsed and remaining time. Silent elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar

_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)

DELAY = 2.0  # seconds; what ends sooner shows nothing


class Progress:
    """A progress line on the terminal, as the callback `progress(done, total, text)` that long work takes.

    It appears after DELAY seconds, tells time every second even while one step lasts, and leaves no trace when it is
    done. Where stderr is not a terminal nothing is written.

    >>> with Progress("gptq") as progress:      # doctest: +SKIP
    ...     quantize_model(method, model, calib, progress.layers(8))
    gptq:  38%|####      | 3/8 [00:12<00:20, layer 4 of 8]
    """

    def __init__(self, title: str, stream=None, delay: float = DELAY):
        self.title, self.stream, self.delay = title, stream, delay
        self._bar = self._clock = None
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> Progress:
        self._token = _CURRENT.set(self)
        stream = self.stream or sys.stderr
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.title,
                file=stream,
                delay=self.delay,
                leave=False,
                ncols=_columns(stream),
                bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
                total=0,
            )
            self._clock = threading.Thread(target=self._tick, daemon=True)
            self._clock.start()
        return self

    def __exit__(self, *_) -> None:
        _CURRENT.reset(self._token)
        if self._bar is not None:
            self._stop.set()
            self._clock.join()
            self._bar.close()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps are finished; `text` names the present one, e.g. "layer 3 of 8, gptq"."""
        if self._bar is not None:
            with self._lock:
                self._bar.total = total
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(done - self._bar.n)

    def layers(self, total: int) -> Callable[[int, int, str], None]:
        """The callback for work that goes layer by layer and tells what is finished: names the layer in work."""

        def tell(done: int, total: int, text: str = "") -> None:
            layer = f"layer {done + 1} of {total}" if done < total else "finishing"
            self(done, total, f"{layer}; {text} before" if text and done < total else layer)

        tell(0, total)
        return tell

    def say(self, text: str) -> None:
        """What is being done, where the number of steps stays."""
        if self._bar is not None:
            with self._lock:
                self._bar.set_postfix_str(text, refresh=False)

    def _tick(self) -> None:
        if not self._stop.wait(self.delay):
            while not self._stop.wait(1.0):
                with self._lock:
                    self._bar.refresh()


def _columns(stream) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 100  # 0: a terminal that does not tell
    except OSError:
        return 100


def tell(text: str) -> None:
    """Says on the progress line in use, if there is one, what long work deep below is doing."""
    if (line := _CURRENT.get()) is not None:
        line.say(text)
