"""A reference: the results of one day in one file, which later code is tested against.

    <results>/baselines/<name>.json

One run per model: the arguments that measured it, and one entry per variant and task with the identity of its record,
its observations, where it was measured, and its noise floor. The file is small enough to commit, has one line per entry,
and carries a checksum: an edited one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import PTQError, unknown
from suite.provenance import version
from suite.store import Record, Store, canonical, digest, write_text

FORMAT = 1  # of the file; a reader refuses what it does not know
FOLDER = "baselines"  # below the results folder
# Parts of an identity that make two results of the same variant and task incomparable. The method's options and the
# suite's numerics are not among them: defaults and code are what a reference is there to watch.
APART = ("model", "scheme", "mode", "calibration", "input_policy", "dtype", "seed", "kvbits", "libraries", "task")


@dataclass(frozen=True)
class Entry:
    """One variant on one task. label: what tables call the variant; result: as in its record, of the metric that tables
    show; measured: date, commit, code, versions, processor; noise: the floor in units of the score, None: not measured.
    """

    label: str
    task: str
    identity: Mapping[str, Any]
    result: Mapping[str, Any]
    measured: Mapping[str, Any]
    noise: float | None = None

    @classmethod
    def of(cls, record: Record, noise: float | None) -> Entry:
        result, told = record.result, record.provenance
        headline = result["headline"]
        kept = {key: result[key] for key in ("label", "kind", "headline", "windows", "calibrated_on_this_text")
                if key in result}
        kept["metrics"] = {headline: result["metrics"][headline]}
        if headline in result.get("outcomes", {}):
            kept["outcomes"] = {headline: result["outcomes"][headline]}
        measured = {key: told.get(key) for key in ("date", "commit", "code", "versions")}
        measured["processor"] = (told.get("hardware") or {}).get("cpu")
        return cls(result["label"], record.identity["task"]["name"], record.identity, kept, measured, noise)

    @property
    def record(self) -> Record:
        return Record(self.identity, self.result, self.measured)


@dataclass(frozen=True)
class Run:
    """The entries of one model. arguments: what `suite.experiments.reproduce` was called with, as JSON."""

    model: str
    arguments: Mapping[str, Any]
    entries: Sequence[Entry]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(entry.label for entry in self.entries))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry.task for entry in self.entries))


@dataclass(frozen=True)
class Baseline:
    """A reference. Raises PTQError if it has nothing in it."""

    name: str
    runs: Sequence[Run]
    suite: str | None = field(default_factory=lambda: version("ptq-suite"))

    def __post_init__(self):
        if not any(run.entries for run in self.runs):
            raise PTQError(f"baseline {self.name!r} has no results in it: nothing was measured")

    def run(self, model: str) -> Run:
        """The run of a model. Raises PTQError, with near misses, if there is none."""
        found = next((run for run in self.runs if run.model == model), None)
        if found is None:
            raise unknown(f"model in baseline {self.name!r}", model, [run.model for run in self.runs])
        return found


def path_of(store: Store, name: str) -> Path:
    """The file of a name; a path, or whatever ends in .json, is itself the file.

    >>> path_of(Store("results"), "embedded").as_posix()
    'results/baselines/embedded.json'
    """
    if name.endswith(".json") or "/" in name:
        return Path(name).expanduser()
    return store.root / FOLDER / f"{name}.json"


def save(baseline: Baseline, path: Path) -> Path:
    """Writes a reference, whole or not at all. Raises PTQError if the folder cannot be written."""
    content = {"format": FORMAT, "name": baseline.name, "suite": baseline.suite,
               "runs": [asdict(run) for run in baseline.runs]}
    write_text(path, "".join(_lines({**content, "checksum": digest(content)})))
    return path


def _lines(content: Mapping[str, Any]) -> Iterator[str]:
    """JSON with one line per entry, so that a diff shows which results changed."""
    yield "{\n"
    for key in ("format", "name", "suite"):
        yield f'"{key}": {json.dumps(content[key])},\n'
    yield '"runs": [\n'
    for i, run in enumerate(content["runs"]):
        yield f'{{"model": {json.dumps(run["model"])}, "arguments": {canonical(run["arguments"])}, "entries": [\n'
        yield ",\n".join(canonical(entry) for entry in run["entries"])
        yield "\n]}" + (",\n" if i + 1 < len(content["runs"]) else "\n")
    yield f'],\n"checksum": "{content["checksum"]}"\n}}\n'


def read(path: Path, name: str | None = None, store: Store | None = None) -> Baseline:
    """The reference in a file.

    Raises PTQError: no such file (with the names there are), not JSON, another format, one that was edited.
    """
    advice = "make it again with `ptq baseline save`"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        if there and name is not None:
            raise unknown(f"baseline below {path.parent}", name, there)
        raise PTQError(f"baseline {str(path)!r} does not exist: {advice}, or give the path of one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PTQError(f"baseline {str(path)!r} cannot be read ({type(error).__name__}: {error}): {advice}") from None
    if found != FORMAT:
        raise PTQError(f"baseline {str(path)!r} has format {found!r}, this version reads {FORMAT}: {advice}")
    stated = content.pop("checksum", None)
    try:
        actual = digest(content)
        if actual == stated:
            runs = [Run(run["model"], run["arguments"], [Entry(**entry) for entry in run["entries"]])
                    for run in content["runs"]]
            return Baseline(content["name"], runs, content["suite"])
    except (KeyError, TypeError, ValueError) as error:
        raise PTQError(f"baseline {str(path)!r} is corrupt ({type(error).__name__}: {error}): {advice}") from None
    raise PTQError(f"baseline {str(path)!r} is corrupt or was edited: its checksum does not fit; restore it, or {advice}")


def apart(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes two identities of the same variant and task incomparable: each part with both values, long digests cut.

    >>> apart({"dtype": "float32", "libraries": {"torch": "2.13.0"}}, {"dtype": "float32", "libraries": {"torch": "2.14.0"}})
    ['libraries.torch: 2.13.0, now 2.14.0']
    """
    return [text for key in APART for text in _differing(key, before.get(key), now.get(key))]


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two comparable identities: options whose defaults changed, the suite's numerics, a plug-in's
    code. Told beside the numbers."""
    return [text for key in ("method", "numerics", "plugins")
            for text in _differing(key, before.get(key), now.get(key))]


def _differing(key: str, before: Any, now: Any) -> Iterator[str]:
    if before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for inner in dict.fromkeys([*before, *now]):
            yield from _differing(f"{key}.{inner}", before.get(inner), now.get(inner))
    else:
        yield f"{key}: {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
