"""The Hugging Face hub: is it there, and if not, an error at once that says what to pass instead.

The hub's own client retries for minutes where nothing answers; here one question with a short limit goes first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from suite import trust
from suite.errors import PTQError

TIMEOUT = 4.0  # seconds for the one question whether the hub answers
_TRUE = {"1", "on", "yes", "true"}
DATA_DIR = "PTQ_DATA_DIR"  # the environment's name for the folder of local copies; reaches worker processes too
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
PICKLED_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
SKIPPED = ["original/*", "onnx/*", "*.pth", "*.gguf"]


def endpoint() -> str:
    """The address of the hub: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def offline() -> bool:
    """Whether the user asked for the cache alone (HF_HUB_OFFLINE=1)."""
    return any(os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def reachable() -> bool:
    """Whether the hub answers at all, within TIMEOUT seconds. Any answer counts, an error page too."""
    return _answers(endpoint())


@functools.lru_cache(maxsize=8)
def _answers(address: str) -> bool:
    answered = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT):
                answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)
        except (OSError, ValueError):
            pass

    # In a thread: looking up a name can hang for longer than any timeout that the request knows.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return bool(answered)


def require(what: str, instead: str) -> None:
    """Raises PTQError if `what` can come neither from a hub that answers nor, being asked for, from the cache.

    >>> require("model 'Qwen/Qwen1.5-0.5B'", "an embedded model")  # doctest: +SKIP
    suite.errors.PTQError: model 'Qwen/Qwen1.5-0.5B' needs a hub, and none answers at https://huggingface.co: pass ...
    """
    if not offline() and not reachable():
        raise PTQError(f"{what} needs a hub, and none answers at {endpoint()}: pass {instead}, "
                       f"or set HF_HUB_OFFLINE=1 where it is in the cache already")


def _kinds(error: BaseException) -> set[str]:
    """The names of an error's classes, by which those of the client and of the libraries below it are told apart."""
    return {kind.__name__ for kind in type(error).__mro__}


def is_fault(error: BaseException) -> bool:
    """Whether an error came from the hub's client: not there, not found, not allowed, not in the cache."""
    return bool(_kinds(error) & {"ConnectionError", "HfHubHTTPError", "EntryNotFoundError", "DatasetNotFoundError",
                                 "TransportError"})


def fault(error: BaseException, what: str, instead: str) -> PTQError:
    """The one-line error for what the hub's client raises."""
    kinds = _kinds(error)
    if "GatedRepoError" in kinds or "DatasetNotFoundError" in kinds and "gated" in str(error):
        return PTQError(f"{what} is gated: accept its licence at {endpoint()}, log in with `hf auth login`, "
                        f"or pass {instead}")
    if "RevisionNotFoundError" in kinds:
        return PTQError(f"{what}: the hub has no such revision")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return PTQError(f"{what} is not on the hub at {endpoint()}, or private: check the name, or pass {instead}")
    if offline() and kinds & {"LocalEntryNotFoundError", "FileNotFoundError", "ConnectionError"}:
        return PTQError(f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: "
                        f"unset it, or pass {instead}")
    return PTQError(f"{what} cannot be fetched from {endpoint()} ({type(error).__name__}: "
                    f"{(str(error).strip() or 'no reason given').splitlines()[0]}): try again, or pass {instead}")


def snapshot(repository: str, revision: str | None, instead: str) -> Path:
    """The local folder of a model's safetensors, configuration and tokenizer, fetched if need be; where `suite.trust`
    allows it also of its code, and of pickled weights if it has no others.

    Raises PTQError: no hub, no such model or revision, gated, not in the cache, connection lost.
    """
    what = f"model {repository!r}" + (f" at revision {revision!r}" if revision else "")
    require(what, instead)
    from huggingface_hub import snapshot_download

    def fetched(patterns: list[str]) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=SKIPPED,
                                      local_files_only=offline()))

    try:
        folder = fetched([*WEIGHT_PATTERNS, *(["*.py"] if trust.allows(trust.CODE) else [])])
        if trust.allows(trust.PICKLE) and not any(folder.glob("*.safetensors")):
            fetched(PICKLED_PATTERNS)
        return folder
    except Exception as error:  # a connection that breaks comes through as what the transport below raises
        raise fault(error, what, instead) from None


def config(repository: str, revision: str | None = None) -> Path:
    """The config.json of a model, and nothing else of it. Raises PTQError as `snapshot` does."""
    what, instead = f"model {repository!r}", "a local folder"
    require(what, instead)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision, local_files_only=offline()))
    except Exception as error:
        raise fault(error, what, instead) from None


def dataset(path: str, name: str | None, split: str, instead: str, **options):
    """One split of a data set of the hub, as `datasets.load_dataset` gives it. options: `data_files`, by split.

    Raises PTQError: no hub, no such set, not in the cache, connection lost.
    """
    what = f"data set {path!r}"
    if local_copy(path) is None:
        require(what, instead)
    import datasets

    try:
        if "data_files" in options and local_copy(path) is None:
            return _files(path, split, **options)
        with local_sets():
            return datasets.load_dataset(path, name, split=split, **options)
    except PTQError:
        raise
    except Exception as error:  # the client lets through what each of its formats raises
        raise fault(error, what, instead) from None


def _files(repository: str, split: str, data_files: Mapping[str, str]) -> Any:
    """Single files of a large set. Fetched by name: `datasets` finds a set that was loaded by its files in the cache
    only while the hub answers."""
    import datasets
    from huggingface_hub import hf_hub_download

    fetched = {key: hf_hub_download(repository, file, repo_type="dataset", local_files_only=offline())
               for key, file in data_files.items()}
    return datasets.load_dataset(_format(Path(data_files[split])), data_files=fetched, split=split)


# ---------------------------------------------------------------------------------------------- local copies


def local_copy(repository: str) -> Path | None:
    """The folder of a data set below the folder of --data-dir, or None: "openai/gsm8k" is looked for as openai/gsm8k,
    openai--gsm8k, openai_gsm8k and gsm8k."""
    root = os.environ.get(DATA_DIR)
    if not root:
        return None
    names = (repository, repository.replace("/", "--"), repository.replace("/", "_"), repository.rpartition("/")[2])
    return next((Path(root, name) for name in names if Path(root, name).is_dir()), None)


def use_data_dir(folder: Path | None) -> None:
    """Takes data sets from the copies below a folder from now on, where it has them. Raises PTQError if there is none."""
    if folder is None:
        return
    if not folder.is_dir():
        raise PTQError(f"data folder {str(folder)!r} does not exist: give the folder that holds openai/gsm8k, ...")
    os.environ[DATA_DIR] = str(folder.absolute())


@contextlib.contextmanager
def local_sets() -> Iterator[None]:
    """Lets `datasets.load_dataset`, which lm-eval's tasks call, find the local copies; without any it changes nothing."""
    if not os.environ.get(DATA_DIR):
        yield
        return
    import datasets

    theirs = datasets.load_dataset

    def load(path: str, name: str | None = None, *, split: str | None = None, data_files: Any = None,
             **options: Any) -> Any:
        if (folder := local_copy(path)) is None:
            return theirs(path, name, split=split, data_files=data_files, **options)
        return _local(theirs, folder, name, split, data_files)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = theirs


def _local(load: Any, folder: Path, name: str | None, split: str | None, data_files: Any) -> Any:
    """A set from a folder: a copy of the hub's repository, or files named by split: test.jsonl, train-00000.parquet.

    A file of all configurations is told apart by its column "subject", as in copies of MMLU; a single file is any split
    that is asked for.
    """
    if (folder / "README.md").is_file() and "configs:" in (folder / "README.md").read_text(encoding="utf-8"):
        return load(str(folder), name, split=split, data_files=data_files)
    inside = folder / name if name and (folder / name).is_dir() else folder
    if data_files is not None:
        named = data_files if isinstance(data_files, Mapping) else {split or "train": data_files}
        files = {key: [str(folder / file) for file in ([value] if isinstance(value, str) else value)]
                 for key, value in named.items()}
    else:
        files = {}
        for path in sorted(p for p in inside.rglob("*") if p.is_file() and _format(p)):
            files.setdefault(path.name.partition(".")[0].partition("-")[0], []).append(str(path))
    if data_files is None and len(files) == 1 and next(iter(files)) not in ("train", "validation", "test", "dev"):
        files = {split or "test": next(iter(files.values()))}
    missing = [file for paths in files.values() for file in paths if not Path(file).is_file()]
    if not files or missing or (split is not None and split not in files):
        lacks = f"lacks {Path(missing[0]).name}" if missing else f"has no file of split {split or 'test'!r}"
        raise PTQError(f"local copy {str(folder)!r} {lacks}: found {', '.join(sorted(files)) or 'no data file'}; name "
                       f"files by split, e.g. test.jsonl or test-00000-of-00001.parquet")
    found = load(_format(Path(next(iter(files.values()))[0])), data_files=files)
    if name and inside == folder:
        found = type(found)({key: rows.filter(lambda row: row["subject"] == name) if "subject" in rows.column_names
                             else rows for key, rows in found.items()})
    return found if split is None else found[split]


def _format(path: Path) -> str | None:
    """The reader of `datasets` for a file, None for what is no data."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(suffixes[-1] if suffixes else "")
