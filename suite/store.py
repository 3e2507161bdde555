"""One JSON record per run, found by the hash of everything that decides its result.

    results/<model>/records/<readable>-<first 12 digits of the hash>.json
    results/<model>/ablations/records/...       the same, of a store with the shelf "ablations"

A record has an identity (what was run: hashed), a result (what came out) and a provenance (when, where, with which
code: told, but not part of the identity). The hash is the SHA-256 of the identity's canonical JSON, so two runs share
a record exactly when nothing that decides the result differs, and a model, configuration, limit or library version
can never receive the result of another. A second hash covers the whole record and shows any later edit.

Files appear whole or not at all: they are written beside their place, flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import PTQError

FORMAT = 1  # of the file; a reader refuses what it does not know
KINDS = ("quantization", "evaluation", "study")
_SHOWN = 12  # digits of the hash in a file's name


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN.

    >>> canonical({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def significant(value: Any, digits: int = 7) -> Any:
    """The value with every float rounded to so many significant digits, inside lists and dicts too.

    Infinite and undefined numbers, which JSON lacks, become None.

    >>> significant({"nll": [1.23456789, 2]}, 4)
    {'nll': [1.235, 2]}
    """
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): significant(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [significant(item, digits) for item in value]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return significant(value.item(), digits)
    raise TypeError(f"a record holds JSON, not {type(value).__name__}")


def folder_of(model: str) -> str:
    """The folder of a model's results. A planted model says so in its path.

    >>> folder_of("tiny-llama-m@outliers=8,seed=1"), folder_of("Qwen/Qwen1.5-0.5B")
    ('tiny-llama-m-planted-outliers-8-seed-1', 'Qwen--Qwen1.5-0.5B')
    """
    return _slug(model.replace("/", "--").replace("@outliers=", "-planted-outliers-"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")


@dataclass(frozen=True)
class Record:
    """One finished run. All three parts are JSON.

    identity:   "kind" ("quantization", "evaluation" or "study"), "model" {"name", "digest"}, "method", ...: see
                `suite.variants.Variant`. Everything that decides the result, and nothing else.
    result:     the numbers, and what is needed to test and draw them.
    provenance: versions, commit, hardware, time, memory, date: see `suite.provenance`.

    Raises PTQError for an identity without a known kind or without a model.
    """

    identity: Mapping[str, Any]
    result: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __post_init__(self):
        if self.identity.get("kind") not in KINDS:
            raise PTQError(f"a record's kind is {self.identity.get('kind')!r}: allowed are {', '.join(KINDS)}")
        if not {"name", "digest"} <= set(self.identity.get("model") or ()):
            raise PTQError("a record's identity names no model: it needs model.name and model.digest")

    @property
    def kind(self) -> str:
        return self.identity["kind"]

    @property
    def model(self) -> str:
        return self.identity["model"]["name"]

    @property
    def hash(self) -> str:
        return digest(self.identity)


@dataclass(frozen=True)
class Setting:
    """What the rows of one table share. Records of two settings never stand in one table.

    A part that is None holds nothing fixed: in native mode every method has its own scheme and calibration. Likewise a
    record in which a part is None stands in every table that shares the rest: full precision has no scheme, and
    round-to-nearest no calibration. plugins: name -> digest of the code of plug-ins whose rows the table may have;
    results of what their files were before stay out.
    """

    model: Mapping[str, str]
    scheme: str | None
    mode: str
    calibration: Mapping[str, Any] | None
    input_policy: str | None
    dtype: str
    seed: int | None
    numerics: int
    libraries: Mapping[str, str]
    limit: int | None = None
    fewshot: int | None = None
    plugins: Mapping[str, str] | None = None

    def holds(self, identity: Mapping[str, Any]) -> bool:
        """Whether a record of this identity belongs to this setting."""
        loose = ("scheme", "mode", "calibration", "input_policy", "seed", "diagnosed_on")
        stated = {**{key: getattr(self, key, None) for key in loose}, "diagnosed_on": self.calibration}
        code = identity.get("plugins", {})
        task = identity.get("task") or {"limit": self.limit, "fewshot": self.fewshot}
        return (all(identity.get(key) is None or stated[key] is None or identity[key] == stated[key] for key in loose)
                and all(identity.get(key) == getattr(self, key) for key in ("model", "dtype", "numerics"))
                and all((self.plugins or {}).get(name, digest) == digest for name, digest in code.items())
                and all(self.libraries.get(name, found) == found for name, found in identity["libraries"].items())
                and task.get("limit") == self.limit and task.get("fewshot") == self.fewshot)

    @property
    def stem(self) -> str:
        """The name of this setting's files, e.g. "W4A8-g128-matched-embedded-64x512-limit64"."""
        c = self.calibration
        parts = [self.scheme, self.mode, c and f"{c['source']}-{c['nsamples']}x{c['seqlen']}",
                 c and c["seed"] and f"seed{c['seed']}", self.dtype != "float32" and self.dtype,
                 self.fewshot is not None and f"{self.fewshot}shot", self.limit is not None and f"limit{self.limit}"]
        return _slug("-".join(str(part) for part in parts if part))


class Store:
    """The records below a results folder.

    shelf: where new records go, if not among those that the main tables are drawn from. What stands there is found
    first, then what stands in the open; a store without a shelf does not look into any.

    >>> store = Store("results")                        # doctest: +SKIP
    >>> store.put(Record(identity, result, provenance)) # doctest: +SKIP
    >>> store.find(identity).result                     # doctest: +SKIP
    """

    def __init__(self, root: str | os.PathLike, shelf: str | None = None):
        self.root, self.shelf = Path(root), shelf

    def folder(self, model: str) -> Path:
        """Where the tables, plots and records of a model stand."""
        return self.root / folder_of(model)

    def models(self) -> list[str]:
        """The names of all models that have records, sorted."""
        return sorted({record.model for record in self.records()})

    def find(self, identity: Mapping[str, Any]) -> Record | None:
        """The record of exactly this identity, or None. Raises PTQError if its file is corrupt or was edited."""
        wanted = digest(identity)
        for place in self._places:
            folder = self.folder(identity["model"]["name"]) / place
            for path in sorted(folder.glob(f"*-{wanted[:_SHOWN]}.json")):
                record = read(path)
                if record.hash == wanted:
                    return record
        return None

    @property
    def _places(self) -> tuple[str, ...]:
        """The folders of records inside a model's, the one that is written first."""
        return (f"{self.shelf}/records", "records") if self.shelf else ("records",)

    def put(self, record: Record) -> Path:
        """Writes a record, atomically; replaces the one of the same identity. Returns its path.

        Raises PTQError if the folder cannot be written.
        """
        identity, hashed = record.identity, record.hash
        content = {"format": FORMAT, "hash": hashed, "identity": identity, "result": record.result,
                   "provenance": record.provenance}
        content["checksum"] = digest(content)
        path = self.folder(record.model) / self._places[0] / f"{_readable(identity)}-{hashed[:_SHOWN]}.json"
        write_text(path, _pretty(content) + "\n")
        return path

    def records(self, model: str | None = None, kind: str | None = None, **identity: Any) -> Iterator[Record]:
        """All records, in the order of their paths (those on the shelf first), that have the given parts in their
        identity.

        >>> list(Store("results").records(model="tiny-llama-s", kind="evaluation", mode="matched")) # doctest: +SKIP
        """
        files = "*-quantization-*.json" if kind == "quantization" else "*.json"  # others need not even be read
        for path in (path for place in self._places
                     for path in sorted(self.root.glob(f"{folder_of(model) if model else '*'}/{place}/{files}"))):
            record = read(path)
            if model in (None, record.model) and kind in (None, record.kind) and all(
                    record.identity.get(key) == value for key, value in identity.items()):
                yield record

    def check_writable(self) -> None:
        """Raises PTQError if the results folder cannot be written: to be called before any work begins."""
        there = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=there, suffix=".tmp"):  # the folder itself is made with the first result
                pass
        except OSError as error:
            raise PTQError(f"the results folder {self.root} cannot be written ({error.strerror}): "
                           f"give another with --results, or change its permissions") from None


def _readable(identity: Mapping[str, Any]) -> str:
    """The part of a file's name that is for people; only the hash identifies."""
    method, task = identity.get("method") or {}, identity.get("task") or {}
    limit = f"limit{task['limit']}" if task.get("limit") is not None else ""
    parts = (identity.get("study", method.get("method", "")), identity.get("scheme", ""), identity.get("mode", ""),
             task.get("name", identity["kind"]), limit)
    return "-".join(_slug(str(part)) for part in parts if part)


def read(path: Path) -> Record:
    """The record in a file. Raises PTQError, naming the file, if it is unreadable, of another format, or was edited."""
    advice = "delete it, and the next run measures it again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated, hashed, found = content.pop("checksum"), content["hash"], content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PTQError(f"the record {path} cannot be read ({type(error).__name__}: {error}): {advice}") from None
    if found != FORMAT:
        raise PTQError(f"the record {path} has format {found!r}, this version reads {FORMAT}: {advice}")
    if digest(content["identity"]) != hashed:
        raise PTQError(f"the record {path} is corrupt: its hash does not fit its identity, so one was edited: {advice}")
    if digest(content) != stated:
        raise PTQError(f"the record {path} is corrupt: its checksum does not fit, so its numbers were edited: {advice}")
    return Record(content["identity"], content["result"], content["provenance"])


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whatever interrupts. Raises PTQError if its folder cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise PTQError(f"{path} cannot be written ({error.strerror}): give another folder with --results") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException as error:  # KeyboardInterrupt too: leave nothing half-written
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise PTQError(f"{path} cannot be written ({error.strerror})") from None
        raise
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _pretty(value: Any, indent: int = 0) -> str:
    """JSON in which every key of a dict, and every dict of a list, has a line of its own; lists of numbers have one."""
    inner = " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        lines = (f"{inner}{json.dumps(key)}: {_pretty(item, indent + 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        lines = (inner + json.dumps(item, ensure_ascii=False) for item in value)
        return "[\n" + ",\n".join(lines) + "\n" + " " * indent + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
