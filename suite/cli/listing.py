"""`ptq ls`: methods, models, tasks, metrics, experiments."""

from __future__ import annotations

import itertools
import json
import re
import sys
from typing import Any

import click

from suite.cli.options import PLUGIN, Choice, options
from suite.cli.program import commands
from suite.errors import PTQError


@commands.command("ls")
@click.argument("thing", type=Choice("methods", "models", "tasks", "metrics", "experiments"))
@click.option("--json", "as_json", is_flag=True, help="A list of JSON objects.")
@options(PLUGIN)
def list_(thing, as_json):
    """List what there is: methods with their options, models, tasks, the metrics of the hybrid, or the ablations.

    \b
    Examples:
      ptq ls methods
      ptq ls models --json
      ptq ls tasks
      ptq ls methods --plugin my_method.py
    """
    rows = {"methods": _methods, "models": _models, "tasks": _tasks, "metrics": _metrics, "experiments": _experiments}[thing]()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        click.echo(f"{row['name']:{width}}  {row['what']}")
        if row.get("options"):
            click.echo(
                f"{'':{width}}  options: " + " ".join(f"{key}={_word(value)}" for key, value in row["options"].items())
            )


def _word(value: Any) -> str:
    """A default as one would write it on the command line."""
    if isinstance(value, (tuple, list)):
        return "|".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _methods() -> list[dict]:
    from suite import method

    rows = []
    for name in method.names():
        try:
            rows.append({"name": name, "what": _told(method.lookup(name)), "options": method.options_of(name)})
        except PTQError as error:  # somebody's broken package, beside which the others still work
            rows.append({"name": name, "what": f"CANNOT BE USED: {error}"})
    return rows + [
        {"name": name, "what": "{}'s transform, then {}'s rounding; options of both".format(*name.split("+"))}
        for name in method.compositions()
    ]


def _told(method: type) -> str:
    """The first paragraph of the docstring of a method's file, as one line."""
    text = sys.modules[method.__module__].__doc__ or method.__doc__ or ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def _models() -> list[dict]:
    """Every model with a short name: what it is, and what quantizing it by the hybrid takes on this machine."""
    from suite import models, preflight, zoo
    from suite.method import build
    from suite.paths import known_models

    device = models.default_device()
    dtype = models.default_dtype(device)
    speed, hybrid, rows = preflight.rate(device, dtype, seconds=0.1), build("cka-hybrid"), []
    for e in zoo.TABLE.values():
        trained = (zoo.path(e.name) / "config.json").exists()
        what = f"embedded: {e.family}, {e.layers} layers, width {e.hidden}{', tied embeddings' if e.tied else ''}"
        rows.append({"name": e.name, "what": what + ("" if trained else "; NOT TRAINED in this installation")})
    for name, known in known_models().items():
        run = preflight.Run.of(preflight.Shape.of(known["shape"]), hybrid, 128, 2048, dtype, device.type == "cuda")
        need = preflight.need(run)
        lean = preflight.need(preflight.replace(run, by_layer=True, activations="disk"))
        memory = ["device", "host"][not run.cuda]
        what = (f"hub: {known['hub']}, {known['parameters'] / 1e9:.1f} B parameters, licence {known['licence']}"
                f"{', gated' if known['gated'] else ''}; the hybrid takes {preflight.gib(getattr(need, memory))} of "
                f"{'GPU ' if run.cuda else ''}memory (by layer {preflight.gib(getattr(lean, memory))}), "
                f"about {preflight.duration(need.seconds(speed))} here{'; ' + known['note'] if known.get('note') else ''}")
        rows.append({"name": name, "what": what, "parameters": known["parameters"], "licence": known["licence"],
                     "gated": known["gated"], "hub": known["hub"], "memory": getattr(need, memory),
                     "seconds": need.seconds(speed)})
    return rows


def _tasks() -> list[dict]:
    """Name and first comment of every task file: no task is loaded for that."""
    from suite.paths import tasks

    rows = []
    for path in sorted(tasks().glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        named = re.search(r"^group:\s*(\S+)", text, re.MULTILINE) or re.search(r"^task:\s*(\S+)", text, re.MULTILINE)
        if named:
            comment = " ".join(
                line.lstrip("# ") for line in itertools.takewhile(lambda x: x.startswith("#"), text.splitlines())
            )
            rows.append({"name": named.group(1), "what": comment})
    return rows


def _experiments() -> list[dict]:
    from suite.ablate import plan

    return [{"name": e.name, "what": (f"table {e.table}: " if e.table else "") + e.title} for e in plan.load()]


def _metrics() -> list[dict]:
    from suite.select import METRICS

    return [{"name": name, "what": what} for name, what in METRICS.items()]
