"""`ptq reproduce`, `report`, `ablate`, `rotations`: methods against methods, as tables and figures."""

from __future__ import annotations

from pathlib import Path

import click

from suite.cli.options import (
    CALIBRATION,
    CHECKPOINTS,
    CODE,
    LOOK,
    PLUGIN,
    REVISION,
    SCHEME,
    STORE,
    TRUST,
    WHOLE,
    WORKERS,
    Choice,
    Words,
    arguments_of,
    only_given,
    options,
    rows_of,
)
from suite.cli.program import commands, note
from suite.errors import PTQError, unknown


@commands.command()
@click.argument("model")
@click.option(
    "--methods", type=Words(), help="Names of `ptq ls methods`, or TRANSFORM+ROUNDING.  [those of the main table]"
)
@click.option(
    "--tasks", type=Words(), help="Names of `ptq ls tasks`, or lm-eval's own.  [the embedded world's, or the paper's]"
)
@LOOK
@options(SCHEME, CALIBRATION, PLUGIN)
@click.option(
    "--severities",
    type=Words(),
    metavar="S,S,...",
    help="Instead of the main table: perplexity with planted outliers of these severities, as a figure.",
)
@STORE
@REVISION
@options(TRUST)
@click.option("--limit", type=WHOLE, help="Only so many documents or windows of each task.  [all; --fast: 64]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with local copies of the hub's data sets.")
@CODE
@click.option("--fresh", is_flag=True, help="Measure again what is there already.")
@WORKERS
@click.option("--devices", type=Words(), help="GPUs that measure variants side by side: all, or cuda:0,cuda:1.  [one]")
@click.option(
    "--allow-eval-calibration",
    is_flag=True,
    help="Allow calibration on the text that is evaluated; such numbers are marked.",
)
@options(CHECKPOINTS)
def reproduce(model, methods, tasks, severities, data_dir, allow_code_execution, fresh, devices, allow_eval_calibration,
              checkpoints, **given):
    """Compare methods on a model: quantize, evaluate through lm-eval, write tables and plots.

    Only what is missing in the results folder is computed; after an interruption the same command continues.

    \b
    Examples:
      ptq reproduce tiny-llama-m
      ptq reproduce tiny-llama-s --fast
      ptq reproduce tiny-llama-m@outliers=8,seed=1 --methods fp16,gptq,smoothquant,cka-hybrid
      ptq reproduce tiny-qwen-m --wbits 3 --tasks world_wiki_ppl,world_math
      ptq reproduce tiny-llama-m --severities 2,4,8,16,32
      ptq reproduce tiny-llama-s --plugin my_method.py --methods fp16,gptq,my_method,awq+my_method
      ptq reproduce ./my-model --calib my-text.txt --tasks world_math --results /tmp/results
      ptq reproduce qwen1.5-0.5b --tasks paper --limit 100 --data-dir ./sets --allow-code-execution
      ptq reproduce tiny-llama-s --methods fp16,gptq --checkpoint theirs=/tmp/theirs
    """
    steps = [_severity(word) for word in severities or ()]

    from suite import experiments, hub, models, report
    from suite.progress import Progress

    hub.use_data_dir(data_dir)
    rows = rows_of(checkpoints)
    if rows:
        from suite import checkpoints as others

        if steps:
            raise PTQError("--checkpoint has no effect with --severities, which makes other models: leave one out")
        others.check(model, rows)
    arguments = dict(
        arguments_of(given),
        allow_code_execution=allow_code_execution,
        announce=note,
        allow_eval_calibration=allow_eval_calibration,
        fresh=fresh,
        devices=[str(one) for one in models.devices_of(devices)] if devices else (),
    )
    store = arguments["store"]
    with Progress(model) as progress:
        if steps:
            outcomes = experiments.severity_sweep(
                model, steps, methods, tasks or ("world_wiki_ppl",), progress=progress, **arguments
            )
        else:
            outcomes = [experiments.reproduce(model, methods, tasks, progress=progress, **arguments)]
            if rows:
                outcomes = [others.measure(store, outcomes[0], model, rows, fresh, allow_code_execution)]
    for outcome in outcomes:
        note(outcome.note)
        # A sweep is drawn as one figure; `ptq report` makes the tables of its severities from their records.
        written = [] if steps else report.write(store, outcome.setting, outcome.methods, outcome.tasks)
        click.echo(report.terminal_table(store, outcome.setting, written, outcome.methods, outcome.tasks))
    plain = outcomes[0]
    for task in plain.tasks if steps else ():
        for path in report.severity_figure(store, plain.setting, task, plain.methods):
            click.echo(f"  {path}")
    _tell_counts(outcomes, given["results"])


def _tell_counts(outcomes, results) -> None:
    measured, found = sum(outcome.measured for outcome in outcomes), sum(outcome.found for outcome in outcomes)
    click.echo(f"{measured} results measured, {found} found in {results}")


def _severity(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise PTQError(f"--severities: {word!r} is no number: write e.g. --severities 2,4,8,16") from None
    if not 1 < value < 1e6:
        raise PTQError(f"--severities: {word} found, allowed are numbers above 1; the plain model is always among them")
    return value


@commands.command()
@click.argument("model")
@STORE
def report(model, results):
    """Write the tables and plots of a model again, from the results folder alone.

    \b
    Examples:
      ptq report tiny-llama-m
      ptq report tiny-llama-m@outliers=8 --results /tmp/results
    """
    from suite import report as reports
    from suite.report import data
    from suite.store import Store

    if not results.is_dir():
        raise PTQError(
            f"results folder {str(results)!r} does not exist: give another with --results, "
            f"or run `ptq reproduce {model}` first"
        )
    store = Store(results)
    known = store.models()
    recorded = next((name for name in known if name == model or data.planted(name) == data.planted(model)), None)
    if recorded is None:
        raise unknown("model with results", model, known or ["none yet"])
    store.check_writable()
    for setting in data.settings(store, recorded):
        written = reports.write(store, setting) + reports.severity_figure(store, setting)
        click.echo(reports.terminal_table(store, setting, written))


@commands.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--experiments", type=Words(), help="Names of `ptq ls experiments`, or YAML files.  [all]")
@LOOK
@click.option("--tasks", type=Words(), help="Those that the experiments' words stand for.  [as in reproduce]")
@CODE
@options(CALIBRATION[:-1])
@click.option("--workers", type=WHOLE, help="Measured at the same time.  [one a core; 1 for a large model]")
@STORE
@REVISION
@options(TRUST)
def ablate(
    models, experiments, fast, tasks, allow_code_execution, calib, nsamples, seqlen, seed, workers, results, revision
):
    """Run the ablations: every table and figure of the paper, the controls, and what lies beyond it.

    Each experiment is a YAML file: a grid of configurations and how to show it. What the results folder has is taken
    from there; after an interruption the same command continues. Pages are written to RESULTS/ablations/, those of
    models with planted outliers alone to RESULTS/ablations-planted/.

    \b
    Examples:
      ptq ablate tiny-llama-s --fast
      ptq ablate tiny-llama-s tiny-llama-m tiny-qwen-s tiny-qwen-m
      ptq ablate tiny-qwen-s@outliers=16 --experiments metric,search,statistics
      ptq ablate tiny-llama-s --experiments accuracy --allow-code-execution
      ptq ablate tiny-llama-s --experiments my-grid.yaml
      ptq ablate ./my-model --tasks world_wiki_ppl,world_math --calib my-text.txt
    """
    from suite.ablate import book, plan, run
    from suite.progress import Progress

    if twice := sorted({name for name in models if models.count(name) > 1}):
        raise PTQError(f"model {twice[0]} is given twice: once is enough")
    wanted = plan.load(experiments or ())
    run.check(wanted)
    with Progress("ablate") as progress:
        done = run.ablate(models, wanted, root=results, fast=fast, seed=seed, workers=workers, progress=progress,
                          revision=revision, tasks=tasks, calib_source=calib, nsamples=nsamples, seqlen=seqlen,
                          allow_code_execution=allow_code_execution, announce=note, whole=not experiments)
    if not experiments:
        from suite import report as reports
        from suite.store import Store

        for setting in done.main.values():
            reports.write(Store(results), setting)
    for path in book.write(done, wanted, results):
        if path.suffix == ".md":
            click.echo(f"  {path}")
    click.echo(f"{done.measured} results measured, {done.implied} concluded from others, {done.found} found in {results}")


@commands.command()
@click.argument("model")
@click.option("--abits", type=Words(), default="4,8", show_default=True, help="Bits of the activations.")
@click.option("--wbits", type=int, default=4, show_default=True, help="Bits of the weights; 16: not rounded.")
@click.option("--seeds", type=Words(), default="0,1,2", show_default=True, help="Of calibration and rotations.")
@click.option(
    "--variant",
    type=Choice("no_had", "had"),
    default="no_had",
    show_default=True,
    help="had: Hadamard transforms at run time too.",
)
@click.option("--nsamples", type=WHOLE, help="Calibration sequences, for the learning and for GPTQ.  [64; hub models: 128]")
@click.option("--steps", type=WHOLE, help="Of the learning.  [100]")
@click.option("--batch", type=WHOLE, help="Sequences that a step sees.  [8; embedded models: 1]")
@click.option("--learning-rate", type=float, help="Of the first step.  [1.5; embedded models: 30]")
@click.option("--scale-gradient", is_flag=True, default=None, help="Gradients reach the scale of a token, too.")
@click.option("--workers", type=WHOLE, default=1, show_default=True, help="Variants measured at the same time.")
@options(TRUST)
@STORE
def rotations(model, abits, wbits, seeds, variant, nsamples, steps, batch, learning_rate, scale_gradient, workers,
              results):
    """Measure whether learning SpinQuant's rotations helps, and write the table spinquant.md.

    Learned, random-Hadamard, Hadamard and no rotation, at each number of bits and seed. Only what is missing in the
    results folder is computed; after an interruption the same command continues.

    \b
    Examples:
      ptq rotations tiny-llama-s
      ptq rotations tiny-qwen-m --abits 4 --seeds 0,1
      ptq rotations tiny-llama-s --wbits 16 --abits 4 --nsamples 800 --batch 8 --learning-rate 10
    """
    for option, words in {"--abits": abits, "--seeds": seeds}.items():
        if bad := next((word for word in words if not word.isdigit()), None):
            example = "4,8" if "a" in option else "0,1"
            raise PTQError(f"{option}: {bad!r} is no whole number: write e.g. {option} {example}")

    from suite import experiments
    from suite.progress import Progress
    from suite.report import rotations as reports
    from suite.store import Store

    store, bits, numbers = Store(results, reports.SHELF), [int(word) for word in abits], [int(word) for word in seeds]
    learning = only_given(steps=steps, batch=batch, learning_rate=learning_rate, scale_gradient=scale_gradient)
    announced: list[str] = []
    given = dict(wbits=wbits, variant=variant, nsamples=nsamples, learning=learning, store=store, workers=workers,
                 announce=lambda text: (None if announced else note(text), announced.append(text)))  # once for them all
    with Progress(f"{model} rotations") as progress:
        outcomes = experiments.rotation_sweep(model, bits, numbers, progress=progress, **given)
    note(outcomes[0].note)
    for path in reports.write(store, outcomes[0].model):
        if path.suffix == ".md":
            click.echo(path.read_text(encoding="utf-8"))
        click.echo(f"  {path}")
    _tell_counts(outcomes, results)
