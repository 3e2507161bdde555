"""What loading a model may do beyond reading numbers: run Python that comes with the model, unpickle its weights.

Neither happens unless the user says so (--trust-remote-code, --allow-pickle). The word stands in the environment, so
that worker processes have it too.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

CODE, PICKLE = "PTQ_TRUST_REMOTE_CODE", "PTQ_ALLOW_PICKLE"


@contextlib.contextmanager
def given(code: bool = False, pickle: bool = False) -> Iterator[None]:
    """Allows code of a model's own, pickled weights, or both inside the block; what was allowed before stays so.

    >>> with given(pickle=True): allows(PICKLE), allows(CODE)
    (True, False)
    """
    before = {name: os.environ.get(name) for name in (CODE, PICKLE)}
    os.environ.update({name: "1" for name, allowed in ((CODE, code), (PICKLE, pickle)) if allowed})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def allows(what: str) -> bool:
    """Whether CODE or PICKLE is allowed."""
    return os.environ.get(what) == "1"


def own_code(folder: Path) -> list[str]:
    """The files of Python that the configuration of a model, or of its tokenizer, names as code to be run."""
    named = set()
    for file in ("config.json", "tokenizer_config.json"):
        try:
            mapped = json.loads((folder / file).read_text(encoding="utf-8")).get("auto_map")
        except (OSError, ValueError, AttributeError):  # whoever needs the file will tell
            continue
        for entry in mapped.values() if isinstance(mapped, dict) else ():
            named |= {str(one).rpartition("--")[2].partition(".")[0] + ".py"
                      for one in (entry if isinstance(entry, list) else [entry]) if one}
    return sorted(named)
