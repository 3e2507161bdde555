"""Kinds of values, and the groups of options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from suite.errors import PTQError, unknown
from suite.paths import RESULTS

# ------------------------------------------------------------------------------------------ kinds of values


class Choice(click.ParamType):
    """One of a few words, with near misses in the error."""

    name = "choice"

    def __init__(self, *allowed: str):
        self.allowed = allowed

    def get_metavar(self, param, ctx=None):
        return "|".join(self.allowed)

    def convert(self, value, param, ctx):
        if value not in self.allowed:
            raise unknown(
                f"value of {param.opts[0]}" if param.opts[0].startswith("-") else "thing", value, self.allowed
            )
        return value


class Several(click.ParamType):
    """A tuple read from one word; what is one already stays, since click converts more than once."""

    def convert(self, value, param, ctx):
        return value if isinstance(value, tuple) else self.read(value, param.opts[0])

    def read(self, word: str, option: str) -> tuple[str, ...]:
        raise NotImplementedError


class Words(Several):
    """Names separated by commas, none twice."""

    name = "a,b,..."

    def read(self, word, option):
        words = tuple(part.strip() for part in word.split(",") if part.strip())
        if not words:
            raise PTQError(f"{option} is empty: give names separated by commas")
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise PTQError(f"{option} has {', '.join(twice)} twice")
        return words


class Pair(Several):
    """key=value."""

    name = "key=value"

    def read(self, word, option):
        key, _, text = word.partition("=")
        if not key or not text:
            raise PTQError(
                f"{option} {word!r} is no option of a method: write {option} key=value, e.g. {option} damp=0.05"
            )
        return key.replace("-", "_"), text


class Row(Several):
    """LABEL=FOLDER, a checkpoint as a row of a table."""

    name = "label=folder"

    def read(self, word, option):
        label, _, folder = word.partition("=")
        if not label or not folder:
            raise PTQError(f"{option} {word!r}: write {option} LABEL=FOLDER, e.g. {option} theirs=/tmp/theirs")
        return label, folder


def rows_of(checkpoints: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """label -> folder. Raises PTQError for a label that stands for two."""
    rows = dict(checkpoints)
    if len(rows) < len(checkpoints):
        labels = [label for label, _ in checkpoints]
        raise PTQError(f"--checkpoint has {max(labels, key=labels.count)} twice: give each checkpoint a label of its own")
    return rows


# ------------------------------------------------------------------------------------------ groups of options


WHOLE = click.IntRange(min=1)
SCHEME = (
    click.option("--wbits", type=int, help="Bits of the weights: 2 to 8, or 16 for none.  [4]"),
    click.option("--abits", type=int, help="Bits of the activations: 8, 4, or 16 for none.  [8]"),
    click.option("--group-size", type=int, help="Weights that share a scale; 0: a row.  [128]"),
    click.option(
        "--kvbits",
        type=Choice(*"2345678", "16"),
        default="16",
        help="Bits of the key-value cache: 2 to 8, or 16.  [16]",
    ),
)
CALIBRATION = (
    click.option(
        "--calib",
        metavar="SOURCE",
        help="A text file, or embedded, wikitext2, c4, pile.  [embedded; hub models: wikitext2]",
    ),
    click.option("--nsamples", type=WHOLE, help="Calibration sequences.  [64 of the embedded text, else 128]"),
    click.option("--seqlen", type=click.IntRange(min=2),
                 help="Tokens of each.  [512 of the embedded text, else up to 2048]"),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the calibration sequences."
    ),
    click.option(
        "--mode",
        type=Choice("matched", "native"),
        default="matched",
        show_default=True,
        help="matched: one setting for all methods. native: each method's own published setting.",
    ),
)
CHECKPOINTS = (
    click.option("--checkpoint", "checkpoints", type=Row(), multiple=True, metavar="LABEL=FOLDER",
                 help="A checkpoint of llm-compressor or `ptq export` as one more row; may be repeated."),
)


def _with_plugins(function):
    """The option --plugin, loaded before the command's body: no command sees it."""

    @functools.wraps(function)
    def loaded(*arguments, plugin, **named):
        if plugin:
            from suite import plugins

            for path in plugin:
                plugins.load(path)
        return function(*arguments, **named)

    return click.option(
        "--plugin", metavar="FILE", multiple=True, help="A Python file with a method of your own; may be repeated."
    )(loaded)


def _with_trust(function):
    """The options --trust-remote-code and --allow-pickle, in force during the command: no command sees them."""

    @functools.wraps(function)
    def trusting(*arguments, trust_remote_code, allow_pickle, **named):
        from suite import trust

        with trust.given(trust_remote_code, allow_pickle):
            return function(*arguments, **named)

    code = click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
    return code(click.option("--allow-pickle", is_flag=True, help="Read *.bin where a model has no safetensors.")(trusting))


PLUGIN = (_with_plugins,)
TRUST = (_with_trust,)
MEMORY = (
    click.option("--load", type=Choice("auto", "whole", "layer"), default="auto", show_default=True,
                 help="layer: read the weights one decoder layer at a time."),
    click.option("--activations", type=Choice("auto", "device", "host", "disk"), default="auto", show_default=True,
                 help="Where the calibration set's activations stand between two layers."),
    click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...  [cuda where there is one]"),
    click.option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16.  [float32 on cpu, bfloat16 on cuda]"),
)
CODE = click.option("--allow-code-execution", is_flag=True,
                    help="Let tasks such as humaneval run the model's programs, in a sandbox.")
REPORTS = (
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else there."),
    click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write a JUnit file too."),
)
STORE = click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The results folder."
)
LOOK = click.option(
    "--fast", is_flag=True, help="A first look: 64 documents or windows of each task, 16 calibration sequences."
)
REVISION = click.option("--revision", help="Of a model of the hub.")
WORKERS = click.option(
    "--workers", type=WHOLE, help="Variants measured at the same time.  [one a core; 1 for a large model]"
)
MEASURING = (
    click.option("--tasks", type=Words(), help="Names of `ptq ls tasks`, or lm-eval's own.  [as `ptq reproduce`]"),
    click.option("--fast", is_flag=True, help="64 documents or windows of each task, 16 calibration sequences."),
    click.option("--limit", type=WHOLE, help="Only so many documents or windows of each task."),
    STORE,
    click.option(
        "--repeats",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Further calibration seeds for the noise floor; 0: it is not measured.",
    ),
    WORKERS,
    REVISION,
    *TRUST,
)


# ------------------------------------------------------------------------------------------ on a command


def set_of(method: str):
    """--set KEY=VALUE, any option of `method`, as the help calls it."""
    return click.option(
        "--set",
        "extra",
        type=Pair(),
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Any option of {method} (`ptq ls methods` names them); may be repeated.",
    )


def options(*groups):
    """Several groups of options on one command, in the order given."""

    def decorate(function):
        for group in reversed(groups):
            for option in reversed(group):
                function = option(function)
        return function

    return decorate


# ------------------------------------------------------------------------------------------ what they stand for


def only_given(**options: Any) -> dict[str, Any]:
    """Those options that were given, so that all others keep the defaults of where they go."""
    return {name: value for name, value in options.items() if value is not None}


def arguments_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `experiments.reproduce` that a command's SCHEME, CALIBRATION and run options stand for."""
    from suite.store import Store

    same = ("nsamples", "seqlen", "seed", "mode", "fast", "limit", "revision", "workers")
    return dict(store=Store(given["results"]), kvbits=int(given["kvbits"]), calib_source=given["calib"],
                options=only_given(**{name: given[name] for name in ("wbits", "abits", "group_size")}),
                **{name: given[name] for name in same})
