"""State of long work that survives a killed process.

Whoever starts a run says where its state may stand and what identifies the run; the code that works long, deep below,
saves and asks for its state by a name, and need not know who started it:

    with resume.into(Path("out.partial"), identity):        # the command
        ...
            workspace = resume.current()                    # the work; None where nobody asked for this
            state = workspace.load("rotation")
            workspace.save("rotation", {"step": 7, "x": tensor})

The folder appears with the first state that is saved and goes when the run ends well. It belongs to one identity
(model, method, calibration, versions): another run refuses to continue from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from suite.errors import PTQError

SECONDS = 2.0  # between two savings of a state
_SHARE = 0.05  # of the time at most goes into saving

_IDENTITY, _LOCK = "identity.json", "lock"
_CURRENT: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


class Workspace:
    """The states of one run in a folder. See `into`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.identity = folder, json.loads(json.dumps(identity, sort_keys=True, allow_nan=False))
        self._lock: int | None = None
        self._saved: dict[str, tuple[float, float]] = {}  # name -> when it was saved last, how long that took
        if folder.exists() and not self._begun():
            self._open()

    def _begun(self) -> bool:
        """Whether the run that made the folder was killed before it had said what it is: there is nothing to continue."""
        return self.folder.is_dir() and all(path.name == _LOCK or path.name.startswith(".") for path in self.folder.iterdir())

    def _open(self) -> None:
        path = self.folder / _IDENTITY
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PTQError(
                f"{str(self.folder)!r} is not the state of a run that was interrupted ({type(error).__name__}): "
                f"remove it, or give another output folder"
            ) from None
        if found != self.identity:
            different = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
            raise PTQError(
                f"{str(self.folder)!r} holds the state of another run, which differs in {', '.join(different)}: repeat "
                f"that run, remove the folder, or give another output folder"
            )
        self._acquire()

    def _acquire(self) -> None:
        self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process dies
        except OSError:
            raise PTQError(
                f"{str(self.folder)!r} is in use by a run that is still going: wait for it, or give another "
                f"output folder"
            ) from None

    def load(self, name: str, lazily: bool = False) -> Any | None:
        """What was saved last under a name, tensors on the processor; None if nothing was. lazily: tensors are read
        from the file when they are used.

        Raises PTQError for a file that cannot be read.
        """
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
        except Exception as error:  # the unpickler raises many kinds
            raise PTQError(
                f"{str(path)!r} cannot be read ({type(error).__name__}): remove {str(self.folder)!r}"
            ) from None

    def save(self, name: str, state: Any) -> None:
        """Keeps a state (tensors, numbers, strings, lists, dicts of them), atomically."""
        start = time.monotonic()
        try:
            if self._lock is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._acquire()
                self._write(
                    _IDENTITY, lambda path: path.write_text(json.dumps(self.identity, indent=1, sort_keys=True) + "\n")
                )
            self._write(f"{name}.pt", lambda path: torch.save(state, path))
        except OSError as error:
            raise PTQError(
                f"{str(self.folder)!r} cannot be written ({error.strerror}): give another output folder"
            ) from None
        self._saved[name] = time.monotonic(), time.monotonic() - start

    def due(self, name: str) -> bool:
        """Whether it is time to save again: some seconds have passed, and saving takes a small share of the time."""
        now = time.monotonic()
        when, took = self._saved.setdefault(name, (now, 0.0))
        return now - when >= max(SECONDS, took / _SHARE)

    def _write(self, name: str, write: Any) -> None:
        temporary = self.folder / f".{name}.tmp"
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)

    def close(self, finished: bool) -> None:
        if finished and self.folder.exists():
            # In one step out of the way: a kill in the middle of the removal must not leave half a state behind.
            gone = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.done")
            with contextlib.suppress(OSError):
                os.replace(self.folder, gone)
            shutil.rmtree(gone, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def into(folder: Path, identity: Mapping[str, Any]) -> Iterator[Workspace]:
    """Lets the work inside the block keep its state in a folder, and continue from what is there.

    identity: JSON, everything that decides the result. The folder is removed when the block ends well, and stays when
    it ends by an exception.

    Raises PTQError: the folder holds the state of another run, is in use, or is no such folder.
    """
    workspace = Workspace(Path(folder), identity)
    token, finished = _CURRENT.set(workspace), False
    try:
        yield workspace
        finished = True
    finally:
        _CURRENT.reset(token)
        workspace.close(finished)


def current() -> Workspace | None:
    """The workspace of the run in progress, or None."""
    return _CURRENT.get()


class Ledger:
    """Numbers that a run measures one after the other, each under a key of its own. They are kept in the workspace of
    the run, if it has one, so that after an interruption the same run measures only the rest.

    >>> ledger = Ledger("scores")
    >>> ledger.of("layer 0", lambda: 0.5), ledger.of("layer 0", lambda: 0.7)
    (0.5, 0.5)
    """

    def __init__(self, name: str):
        self._workspace, self._name = current(), name
        kept = self._workspace and self._workspace.load(name)
        self._known: dict[str, Any] = json.loads(kept["known"]) if kept else {}
        if self._workspace is not None:
            self._workspace.due(name)  # the clock runs from here

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        """What stands under a key, JSON; measured where nothing does."""
        if key not in self._known:
            self._known[key] = measure()
            if self._workspace is not None and self._workspace.due(self._name):
                self._workspace.save(self._name, {"known": json.dumps(self._known)})
        return self._known[key]
