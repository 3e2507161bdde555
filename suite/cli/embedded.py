"""`ptq zoo`: the embedded models."""

from __future__ import annotations

from pathlib import Path

import click

from suite.cli.options import WHOLE
from suite.cli.program import Commands, commands
from suite.errors import PTQError, unknown


@commands.group(cls=Commands)
def zoo():
    """The embedded models: train one again, or show what is known of it.

    \b
    Examples:
      ptq zoo card tiny-llama-s
      ptq zoo train tiny-llama-s
    """


@zoo.command()
@click.argument("name")
@click.option("--steps", type=WHOLE, help="Optimizer steps.  [those of the embedded model]")
@click.option("--threads", type=WHOLE, default=1, show_default=True, help="Processor threads.")
def train(name, steps, threads):
    """Train an embedded model from the seeded generator, in place of the one in this installation.

    A run that is killed continues from its checkpoint.

    \b
    Examples:
      ptq zoo train tiny-llama-s
      ptq zoo train tiny-qwen-m --steps 200 --threads 2
    """
    _embedded(name)
    from suite.zoo.train import train as run

    click.echo(str(run(name, steps, threads)))


@zoo.command()
@click.argument("name")
def card(name):
    """Show the card of an embedded model: architecture, training, scores.

    \b
    Examples:
      ptq zoo card tiny-llama-m
    """
    path = _embedded(name) / "README.md"
    if not path.exists():
        raise PTQError(
            f"the embedded model {name!r} has no card in this installation: train it with `ptq zoo train {name}`"
        )
    click.echo(path.read_text(encoding="utf-8").rstrip())


def _embedded(name: str) -> Path:
    from suite import zoo as models

    if name not in models.names():
        raise unknown("embedded model", name, models.names())
    return models.path(name)
