"""Where a number comes from: versions, commit, hardware, time, memory. Told in every record, part of no identity.

Nothing here names the machine, its user or its folders.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from suite import paths

PACKAGES = ("ptq-suite", "torch", "transformers", "lm-eval", "datasets", "accelerate", "tokenizers", "safetensors",
            "numpy", "scipy")
_ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a package without its local part ("2.13.0+cpu" is "2.13.0"), None if it is missing."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


@functools.cache
def commit() -> dict[str, Any] | None:
    """{"hash", "dirty"} of the checkout this process was started from, None outside of one.

    dirty: code differs from the commit; new or changed results do not count.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(("git", "-C", str(_ROOT), *arguments), capture_output=True, text=True, check=True,
                              timeout=20).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _ROOT:  # installed inside somebody else's checkout
            return None
        changed = git("status", "--porcelain", "--", "suite", "baselines", "tasks")
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def code() -> str:
    """SHA-256 of the suite's own source: whether two results were measured by the same code, committed or not."""
    folders = [(_ROOT / "suite", "*.py"), (_ROOT / "baselines", "*.py"), (paths.tasks(), "*.py"), (paths.tasks(), "*.yaml")]
    total = hashlib.sha256()
    for folder, pattern in folders:
        for path in sorted(folder.rglob(pattern)):
            total.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in GiB, and the GPUs if torch is loaded and sees any."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads() if torch else None,
            "memory_gib": _gib(_field("/proc/meminfo", "MemTotal")), "gpus": gpus, "system": platform.system()}


def several_processes() -> int:
    """How many processes `accelerate launch` or torchrun has started for one run, 0 for one that was started by itself."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if "LOCAL_RANK" in os.environ and count.isdigit() and int(count) > 1 else 0


def _field(path: str, key: str) -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
        return found.group(1).strip() if found else None
    return None


def _gib(kilobytes: str | None) -> float | None:
    return round(int(kilobytes.split()[0]) / 2**20, 1) if kilobytes else None


class Meter:
    """Wall time in seconds and peak memory in MiB of a stretch of work.

    The kernel's high-water mark is reset at the start where it allows that (Linux); elsewhere the peak is that of the
    whole process, and `of` says so.

    >>> with Meter() as meter: sum(range(1000))
    >>> sorted(meter.told)
    ['memory_of', 'peak_gpu_memory_mib', 'peak_memory_mib', 'wall_seconds']
    """

    def __enter__(self):
        self.of = "process"
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self.of = "run"
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    @staticmethod
    def memory() -> float:
        """MiB of memory that this process has now; 0 where the system does not tell."""
        found = _field("/proc/self/status", "VmRSS")
        return int(found.split()[0]) / 1024 if found else 0.0

    @property
    def sofar(self) -> dict[str, Any]:
        """What would be told if the work ended here."""
        self.__exit__()
        return self.told

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._start
        peak = _field("/proc/self/status", "VmHWM")
        kilobytes = int(peak.split()[0]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gpu = round(self._cuda.max_memory_allocated() / 2**20, 1) if self._cuda else None
        self.told = {"wall_seconds": round(self.seconds, 3), "peak_memory_mib": round(kilobytes / 1024, 1),
                     "memory_of": self.of, "peak_gpu_memory_mib": gpu}

    @property
    def _cuda(self):
        torch = sys.modules.get("torch")
        return torch.cuda if torch and torch.cuda.is_available() else None


def provenance(meter: Meter) -> dict[str, Any]:
    """All of it, for one finished run."""
    now = datetime.datetime.now(datetime.UTC)
    return {"date": now.isoformat(timespec="seconds"), **meter.told, "commit": commit(), "code": code(),
            "versions": versions(), "hardware": hardware()}
