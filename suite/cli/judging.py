"""`ptq check`, `compare`, `baseline`: verdicts on a method of one's own, and on today's code."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

import click

from suite.cli.options import (
    CALIBRATION,
    CHECKPOINTS,
    MEASURING,
    PLUGIN,
    REPORTS,
    SCHEME,
    Words,
    arguments_of,
    options,
    rows_of,
    set_of,
)
from suite.cli.program import Commands, commands, note
from suite.errors import PTQError


@commands.command()
@click.argument("method")
@click.option("--checks", type=Words(), help="Only these checks.  [all]")
@options(PLUGIN, REPORTS)
def check(method, checks, as_json, junit):
    """Check that a method keeps the contract: purity, coverage, grids, bits, errors, ..., on small random models.

    Each failure says what is wrong and where to look. A method may declare a failure that it cannot avoid:
    expected_failures = {"check": "reason"}; it is shown as such. Exit status: 1 if any check fails, 2 on an error.

    \b
    Examples:
      ptq check my_method --plugin my_method.py
      ptq check gptq --checks purity,grid
      ptq check awq+my_method --plugin my_method.py --junit checks.xml
    """
    from suite import testing
    from suite.progress import Progress
    from suite.report import verdicts

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model in memory
    done = []
    with Progress(f"checking {method}") as progress:
        for outcome in testing.run_checks(method, checks):
            done.append(outcome)
            progress(len(done), sum(len(testing.CHECKS[name].toys) for name in checks or testing.CHECKS), outcome.check)
    _report(junit, verdicts.checks_junit(method, done))
    click.echo((verdicts.checks_json if as_json else verdicts.checks_text)(method, done))
    return 1 if any(outcome.status == "failed" for outcome in done) else 0


@commands.command()
@click.argument("method", required=False)
@click.option("--against", type=Words(), help="The methods to compare with: names, or TRANSFORM+ROUNDING.")
@click.option("--against-baseline", metavar="NAME|FILE", help="Instead: today's code against `ptq baseline save`.")
@click.option("--model", type=Words(), metavar="MODEL", help="A name of `ptq ls models`, a folder, or an id of the hub.")
@options(CHECKPOINTS, MEASURING, SCHEME, CALIBRATION, PLUGIN)
@set_of("METHOD")
@click.option(
    "--margin-ppl",
    type=float,
    default=0.1,
    show_default=True,
    help="Differences in perplexity below so many percent do not matter.",
)
@click.option(
    "--margin-acc",
    type=float,
    default=1.0,
    show_default=True,
    help="Differences in accuracy below so many points do not matter.",
)
@click.option("--level", type=float, default=0.95, show_default=True, help="Confidence of intervals and tests.")
@options(REPORTS)
@click.pass_context
def compare(context, method, against, against_baseline, model, margin_ppl, margin_acc, level, as_json, junit, **given):
    """Judge a method against others: better, worse, equal within a margin, or undecided, task by task.

    Runs what is missing in the results folder. Differences are paired over windows or documents, tested (McNemar's
    exact test for right and wrong answers, else the paired t test), and corrected by Holm's rule over all of them; one
    inside the noise floor, which other calibration seeds and batch sizes make, is never called better or worse.

    A checkpoint stands beside the methods of --against; without METHOD the first one is judged itself.

    With --against-baseline: today's code against frozen results, of METHOD or of all methods in it.

    Exit status, for CI: 1 if any verdict is worse, 2 on an error, else 0.

    \b
    Examples:
      ptq compare my_method --plugin my_method.py --against gptq,cka-hybrid --model tiny-llama-m
      ptq compare awq+gptq --against gptq --model tiny-llama-s --tasks world_wiki_ppl --margin-ppl 0.5
      ptq compare gptq --set act_order=true --against rtn --model tiny-qwen-s --fast --json
      ptq compare --checkpoint theirs=/tmp/theirs --against gptq,cka-hybrid --model tiny-llama-s
      ptq compare --against-baseline embedded --model tiny-llama-s --junit gate.xml
      ptq compare gptq --against-baseline results/baselines/embedded.json
    """
    with _errors_are_status_2():
        from suite import compare as comparing
        from suite.report import verdicts
        from suite.verdict import Rules

        rules = Rules(level, margin_ppl / 100, margin_acc / 100)
        if against_baseline is not None:
            _refuse(context, "--against-baseline", {"calib", "tasks", "results", "workers", "margin_ppl", "margin_acc",
                                                    "level", "model", "method", "as_json", "junit", "against_baseline",
                                                    "plugin", "trust_remote_code", "allow_pickle"})
            judged = _against_baseline(comparing, against_baseline, model, method, rules, given)
        else:
            judged = _against_methods(comparing, method, against, model, rules, given)
        _report(junit, verdicts.junit(judged))
        whole = against_baseline is None
        click.echo(verdicts.as_json(judged) if as_json else verdicts.text(judged, unchanged=whole))
        return judged.status


def _refuse(context, with_: str, allowed: set[str]) -> None:
    """Raises PTQError for an option that has no effect beside another."""
    from click.core import ParameterSource

    for name in context.params:
        if name not in allowed and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            raise PTQError(f"{option} has no effect with {with_}, which holds it: leave it out")


def _against_methods(comparing, method, against, model, rules, given):
    from suite.method import build, lookup
    from suite.progress import Progress

    rows = rows_of(given["checkpoints"])
    for what, value, example in (("METHOD", method or rows, "ptq compare my_method"),
                                 ("--against", against or (method and rows), "--against gptq"),
                                 ("--model", model, "--model tiny-llama-s")):
        if not value:
            raise PTQError(f"{what} is missing: e.g. {example}; or give --against-baseline")
    if len(model) > 1:
        raise PTQError(f"--model has {len(model)} models: compare on one at a time")
    arguments = arguments_of(given)
    candidate = method
    if given["extra"]:
        if not method:
            raise PTQError("--set is for METHOD, which is missing: leave --set out, or name a method")
        quantizes = lookup(method.split("+")[0])().scheme.weight.quantized
        candidate = build(method, **(arguments["options"] if quantizes else {}), **dict(given["extra"]))
    with Progress(f"{method or next(iter(rows))} on {model[0]}") as progress:
        return comparing.compare(model[0], candidate, against or (), given["tasks"], checkpoint_rows=rows, rules=rules,
                                 repeats=given["repeats"], progress=progress, announce=note, **arguments)


def _against_baseline(comparing, name, model, method, rules, given):
    from suite import baseline as references
    from suite.progress import Progress
    from suite.store import Store

    store = Store(given["results"])
    path = references.path_of(store, name)
    reference = references.read(path, name)
    with Progress(f"against baseline {reference.name}") as progress:
        return comparing.against_baseline(
            reference, model, [method] if method else None, given["tasks"], store=store, rules=rules,
            calib_source=given["calib"], workers=given["workers"], progress=progress, announce=note)


def _report(path, content: bytes) -> None:
    if path is not None:
        from suite.store import write_bytes

        write_bytes(path, content)


@contextlib.contextmanager
def _errors_are_status_2():
    """A gate whose status 1 says "worse" must not say so when it breaks, in somebody's plug-in or in the suite."""
    try:
        yield
    except (PTQError, click.ClickException, BrokenPipeError):
        raise
    except Exception as error:
        import traceback

        traceback.print_exc()
        from suite.method import fault

        raise PTQError(f"no verdict was reached: {fault(error)}") from error


@commands.group(cls=Commands)
def baseline():
    """References: results frozen in one file that can be committed, for `ptq compare --against-baseline`.

    \b
    Examples:
      ptq baseline save embedded --model tiny-llama-s,tiny-qwen-s
    """


@baseline.command()
@click.argument("name")
@click.option("--model", required=True, type=Words(), help="Names of `ptq ls models`, folders, or ids of the hub.")
@click.option("--methods", type=Words(), help="Names of `ptq ls methods`.  [those of the main table]")
@options(MEASURING, SCHEME, CALIBRATION, PLUGIN)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The file.  [RESULTS/baselines/NAME.json]")
def save(name, model, methods, out, **given):
    """Freeze results as a reference, with their noise floors: one file. What is missing is measured first.

    \b
    Examples:
      ptq baseline save today --model tiny-llama-s
      ptq baseline save embedded --model tiny-llama-s,tiny-qwen-s --methods fp16,rtn,gptq,cka-hybrid
      ptq baseline save mine --plugin my_method.py --model tiny-llama-s --methods my_method --out mine.json
    """
    from suite import baseline as references
    from suite import compare as comparing
    from suite.progress import Progress

    if out is None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise PTQError(f"baseline name {name!r}: allowed are letters, digits, and . _ - after the first")
    arguments = arguments_of(given)
    path = out or arguments["store"].root / references.FOLDER / f"{name}.json"
    with Progress(f"baseline {name}") as progress:
        frozen = comparing.freeze(
            name, model, methods, given["tasks"], repeats=given["repeats"], progress=progress, announce=note,
            **arguments)
    references.save(frozen, path)
    for run in frozen.runs:
        click.echo(f"{run.model}: {len(run.labels)} methods, {len(run.tasks)} tasks")
    click.echo(str(path))
