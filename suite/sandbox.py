"""Runs code that a model wrote, on the test of a benchmark, where it can do no harm and give itself no marks.

Each sample gets two processes of its own, or `cells` (suite/cell.py tells what goes on inside): one executes the
program, the other the test. They are confined in the same way, and pass plain values to each other.

- a user without privileges; no capabilities; no way to get any
- no network: a namespace with no interface in use
- no files but the interpreter's own libraries, read-only, and a folder in memory that is gone afterwards
- an empty environment; no standard input or output
- limits on processor time, wall time, memory, file size, open files, processes
- whatever the program started ends with it: it lives in a namespace of processes that is taken down

That needs Linux, and either namespaces that this user may create, or bubblewrap (`bwrap`). Where there is neither,
nothing is run: `require` raises.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from suite.errors import PTQError

_CELL = Path(__file__).with_name("cell.py")
_SEEN_AS = "/cell.py"  # in bubblewrap's file system
_NUMBERS = itertools.count(os.getpid() * 64 % 10**8)
INSTEAD = "install bubblewrap, allow user namespaces, or run as root in a container that may create namespaces"


@dataclass(frozen=True)
class Limits:
    """cpu_seconds: of each process, as many as the metric of the HumanEval authors gives in all; seconds: of the clock,
    for a machine that is busy or a program that sleeps; memory_mib: address space of each process; processes: at most;
    file_mib: of the writable folder in all."""

    cpu_seconds: int = 3
    seconds: float = 12.0
    memory_mib: int = 512
    processes: int = 4
    file_mib: int = 16


@dataclass(frozen=True)
class Verdict:
    """passed: whether the test ran to its end without an exception; reason: why not, in one line."""

    passed: bool
    reason: str = ""


def check(program: str, prompt: str, test: str, entry_point: str, limits: Limits | None = None) -> Verdict:
    """Whether a program passes a test, as HumanEval has them.

    program: the whole text, prompt included; prompt: what the model was given, whose helpers the test may use; test:
    defines check(candidate); entry_point: the function of the program that is the candidate.

    Nothing that the program does raises: whatever is not a pass is a failure. Raises PTQError if this machine cannot
    confine it.

    >>> check("def f(x):\\n    return x", "def f(x):\\n    ...", "def check(c):\\n    assert c(1) == 1", "f").passed
    True
    """
    way, limits = require(), limits or Limits()
    case = {"prompt": prompt, "test": test, "entry_point": entry_point}
    with tempfile.TemporaryDirectory(prefix="ptq-cell-") as folder, contextlib.ExitStack() as opened:
        ask, hear, told = _Pipe(opened), _Pipe(opened), _Pipe(opened)
        cells = [_Cell("answer", way, folder, {"program": program}, limits, (ask.read, hear.write)),
                 _Cell("judge", way, folder, case, limits, (ask.write, hear.read, told.write))]
        try:
            for pipe in (ask, hear):
                pipe.close()
            told.close_write()
            deadline = time.monotonic() + limits.seconds
            for cell in cells:
                cell.confined(deadline)
            return _verdict(told.read, deadline)
        finally:
            for cell in cells:
                cell.end()


def _verdict(pipe: int, deadline: float) -> Verdict:
    found = _read(pipe, deadline)
    if found is None:
        return Verdict(False, "timed out")
    try:
        message = json.loads(found[4:])  # after its length
    except ValueError:
        return Verdict(False, "the test ended without a verdict")
    return Verdict(True) if message == ["passed"] else Verdict(False, str(message[-1]))


def _read(pipe: int, deadline: float, most: int = 4096) -> bytes | None:
    """What comes out of a pipe until it is closed, None if it is open still at the deadline."""
    found = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            more = os.read(pipe, most)
            if not more:
                return found
            found += more[:most - len(found)]
    return None


class _Pipe:
    """Both ends of a pipe, closed at the latest with the stack."""

    def __init__(self, opened: contextlib.ExitStack):
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}
        opened.callback(self.close)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def close_write(self) -> None:
        self._open.remove(self.write)
        os.close(self.write)

    def close_read(self) -> None:
        self._open.remove(self.read)
        os.close(self.read)


class _Cell:
    """One confined process."""

    def __init__(self, role: str, way: str, folder: str, case: Mapping[str, str], limits: Limits,
                 pipes: tuple[int, ...]):
        self._opened = contextlib.ExitStack()
        root = os.path.join(folder, role)
        os.mkdir(root)
        given, self._status = _Pipe(self._opened), _Pipe(self._opened)
        # HOME and PATH belong to the machine outside: the environment is empty.
        self._process = subprocess.Popen(
            [*_prefix(way, limits), _interpreter(), "-I", "-S", _SEEN_AS if way == "bubblewrap" else str(_CELL), role,
             way, *map(str, (given.read, self._status.write, *pipes))],
            env={}, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(given.read, self._status.write, *pipes), start_new_session=True)
        self._status.close_write()
        given.close_read()
        with contextlib.suppress(BrokenPipeError), open(given.write, "w", encoding="utf-8", closefd=False) as file:
            json.dump({**case, "root": root, "visible": _visible(),
                       "limits": {**asdict(limits), "number": next(_NUMBERS)}}, file)
        given.close_write()

    def confined(self, deadline: float) -> None:
        """Waits until the cell says that it is confined. Raises PTQError if it cannot be."""
        said = _read(self._status.read, deadline)
        if said is None or not said.startswith(b"+"):
            why = (said or b"")[1:].decode(errors="replace") or "the process ended"
            raise PTQError(f"code cannot be confined on this machine ({why}): {INSTEAD}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and with it the namespace of processes
        self._process.wait()
        self._opened.close()


# ---------------------------------------------------------------------------------------------- the machine


def _interpreter() -> str:
    """The real one: that of a virtual environment is a link into a folder that the cell does not see."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def _visible() -> list[str]:
    """Folders of libraries: those of the system, and of this interpreter if it stands elsewhere."""
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", sysconfig.get_path("stdlib"),
               os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_exec_prefix, "lib")]
    found: list[str] = []
    for folder in sorted({os.path.abspath(folder) for folder in folders if os.path.isdir(folder)}):
        if not any(folder.startswith(f"{other}/") for other in found):
            found.append(folder)
    return found


def _prefix(way: str, limits: Limits) -> list[str]:
    if way == "namespaces":
        return []
    bound = [word for path in _visible() for word in ("--ro-bind", path, path)]
    executable = _interpreter()
    return [shutil.which("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
            "--uid", "65534", "--gid", "65534", "--size", str(limits.file_mib * 2**20), "--tmpfs", "/tmp",
            *bound, "--ro-bind", executable, executable, "--ro-bind", str(_CELL), _SEEN_AS,
            "--dev-bind", "/dev/null", "/dev/null", "--chdir", "/tmp", "--remount-ro", "/", "--"]


def require() -> str:
    """How this machine confines code: "namespaces" or "bubblewrap". Raises PTQError if it cannot."""
    way, why = _way()
    if way is None:
        raise PTQError(f"code that a model wrote cannot be confined on this machine ({why}), so it is not run: "
                       f"{INSTEAD}")
    return way


@functools.cache
def _way() -> tuple[str | None, str]:
    """The first way in which a harmless program passes its test here, and else the last reason."""
    if not sys.platform.startswith("linux"):
        return None, f"{sys.platform} has no namespaces"
    why = ""
    for way in ("namespaces", "bubblewrap"):
        # Root needs no help; and of what bubblewrap starts for root, the kernel does not count the processes.
        if way == "bubblewrap" and (os.geteuid() == 0 or shutil.which("bwrap") is None):
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="ptq-cell-") as folder, contextlib.ExitStack() as opened:
                ask, told = _Pipe(opened), _Pipe(opened)
                cell = _Cell("answer", way, folder, {"program": ""}, Limits(), (ask.read, told.write))
                try:
                    cell.confined(time.monotonic() + 10)
                    return way, ""
                finally:
                    cell.end()
        except (PTQError, OSError) as error:
            why = str(error).partition("(")[2].partition(")")[0] or str(error)
    return None, why
