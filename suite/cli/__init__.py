"""The command line: a file for each kind of question, `program.py` below them all.

The commands are listed in the order of these imports.
"""

# ruff: noqa: I001
from suite.cli.program import commands, main
from suite.cli import quantizing, evaluating, tables, judging, listing, embedded

__all__ = ["commands", "embedded", "evaluating", "judging", "listing", "main", "quantizing", "tables"]
