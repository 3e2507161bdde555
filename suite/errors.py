"""The one exception a user's mistake may raise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PTQError(Exception):
    """A mistake in what was asked for: names the thing, the value found, the values allowed, and what to do.

    The command line prints it on one line and exits with status 2; anything else that escapes is a bug of the suite.
    """


def unknown(kind: str, name: str, allowed: Iterable[str]) -> PTQError:
    """The error for a name that is not in a list, with the nearest names first.

    >>> str(unknown("metric", "ckaa", ["cka", "mse"]))
    "unknown metric 'ckaa': did you mean 'cka'? allowed: cka, mse"
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(n) for n in near) + "? " if near else ""
    return PTQError(f"unknown {kind} {name!r}: {hint}allowed: {', '.join(allowed)}")
