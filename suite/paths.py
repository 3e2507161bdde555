"""Where the suite's own files stand: in a checkout, or inside an installed wheel."""

from __future__ import annotations

import json
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

KNOWN_MODELS = _PACKAGE / "known_models.json"  # models of the hub that have a short name
RESULTS = Path("results")  # below the folder a command is run in, unless --results says otherwise


def tasks() -> Path:
    """The folder of the lm-eval tasks and their data: `tasks/` of a checkout, `suite/_tasks/` of a wheel."""
    for folder in (_PACKAGE.parent / "tasks", _PACKAGE / "_tasks"):
        if any(folder.glob("*.yaml")):  # `tasks` is also a name that other people's folders in site-packages have
            return folder
    raise FileNotFoundError(
        f"the installation is incomplete: no tasks beside or inside {_PACKAGE.name}/; install it again"
    )


def known_models() -> dict[str, dict]:
    """The table of models of the hub that have a short name: "hub", "parameters", "gated", "licence", "shape" (as in
    its config.json), and "note". An entry that is "like" another has all of that one's facts but those it states."""
    table = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))
    return {name: {**table.get(entry.get("like"), {}), **entry} for name, entry in table.items()}
