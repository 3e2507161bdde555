"""The Hugging Face hub: is it there, and if not, an error at once that says what to pass instead.

The hub's own client retries for minutes where nothing answers; here one question with a short limit goes first.
"""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from suite.errors import PTQError

TIMEOUT = 4.0  # seconds for the one question whether the hub answers
_TRUE = {"1", "on", "yes", "true"}
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
SKIPPED = ["original/*", "onnx/*", "*.bin", "*.pth", "*.gguf"]


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
    return bool(_kinds(error) & {"ConnectionError", "HfHubHTTPError", "EntryNotFoundError", "DatasetNotFoundError"})


def fault(error: BaseException, what: str, instead: str) -> PTQError:
    """The one-line error for what the hub's client raises."""
    kinds = _kinds(error)
    if "GatedRepoError" in kinds:
        return PTQError(f"{what} is gated: accept its licence at {endpoint()}, log in with `hf auth login`, "
                        f"or pass {instead}")
    if "RevisionNotFoundError" in kinds:
        return PTQError(f"{what}: the hub has no such revision")
    if "RepositoryNotFoundError" in kinds:
        return PTQError(f"{what} is not on the hub at {endpoint()}, or private: check the name, or pass {instead}")
    if offline() and kinds & {"LocalEntryNotFoundError", "FileNotFoundError", "ConnectionError"}:
        return PTQError(f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: "
                        f"unset it, or pass {instead}")
    return PTQError(f"{what} cannot be fetched from {endpoint()} ({type(error).__name__}: "
                    f"{(str(error).strip() or 'no reason given').splitlines()[0]}): try again, or pass {instead}")


def snapshot(repository: str, revision: str | None, instead: str) -> Path:
    """The local folder of a model's safetensors, configuration and tokenizer, fetched if need be.

    Raises PTQError: no hub, no such model or revision, gated, not in the cache, connection lost.
    """
    what = f"model {repository!r}" + (f" at revision {revision!r}" if revision else "")
    require(what, instead)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=WEIGHT_PATTERNS,
                                      ignore_patterns=SKIPPED, local_files_only=offline()))
    except (OSError, ValueError, RuntimeError) as error:
        raise fault(error, what, instead) from None


def dataset(path: str, name: str | None, split: str, instead: str, **options):
    """One split of a data set of the hub, as `datasets.load_dataset` gives it.

    Raises PTQError: no hub, no such set, not in the cache, connection lost.
    """
    what = f"data set {path!r}"
    require(what, instead)
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, **options)
    except Exception as error:  # the client lets through what each of its formats raises
        raise fault(error, what, instead) from None
