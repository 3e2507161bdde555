"""The command line: what is asked for is checked, the work is done elsewhere. Heavy imports stand inside the commands.

A mistake of the user ends with one line on stderr and status 2; Ctrl-C with one line and 130; anything else that
escapes is a bug, and shows its traceback.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from suite.errors import PTQError, unknown
from suite.paths import RESULTS

PROGRAM = "ptq"


# ---------------------------------------------------------------------------------------------- the program


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line and exits: 0, 2 for a mistake of the user, 130 for Ctrl-C, 1 (with a traceback) for a bug."""
    _quiet()
    try:
        status = commands.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:  # `ptq` or `ptq zoo` alone: the help is the answer
        click.echo(error.ctx.get_help())
        status = 2
    except (PTQError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)
        status = 2
    except Interrupted as interrupted:
        click.echo(f"{PROGRAM}: interrupted{_KEPT.get(interrupted.command, '')}", err=True)
        status = 130
    except BrokenPipeError:  # `ptq ls models | head`
        sys.stdout = open(os.devnull, "w")
        status = 141
    sys.exit(status if isinstance(status, int) else 0)


# What an interruption leaves behind, by command.
_KEPT = {
    "ablate": ": results already measured are kept, and the same command continues from there",
    "reproduce": ": results already measured are kept, and the same command continues from there",
    "compare": ": results already measured are kept, and the same command continues from there",
    "save": ": no baseline was written; results already measured are kept, and the same command continues from there",
    "quantize": ": no model was written, and the same command continues from what it kept",
    "train": ": the same command continues from the last checkpoint",
}


class Interrupted(Exception):
    """Ctrl-C, and the command it hit."""

    def __init__(self, command: str | None):
        self.command = command


def _quiet() -> None:
    """Only the suite speaks: libraries warn of nothing but errors, and draw progress on a terminal alone."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "LMEVAL_LOG_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }.items():
        os.environ.setdefault(name, value)
    # Threads that wait for each other in a spin take the processor from those they wait for when the machine is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


class Commands(click.Group):
    """A group that lists its commands in the order of the file and knows the nearest name of an unknown one."""

    def list_commands(self, context):
        return list(self.commands)

    def resolve_command(self, context, arguments):
        name = arguments[0] if arguments else ""
        if name and not name.startswith("-") and name not in self.commands:
            raise unknown("command", name, self.commands)
        return super().resolve_command(context, arguments)

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:  # here, because click would first write an empty line
            raise Interrupted(context.invoked_subcommand) from None


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


class Words(click.ParamType):
    """Names separated by commas, none twice."""

    name = "a,b,..."

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        words = tuple(word for word in (part.strip() for part in value.split(",")) if word)
        if not words:
            raise PTQError(f"{param.opts[0]} is empty: give names separated by commas")
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise PTQError(f"{param.opts[0]} has {', '.join(twice)} twice")
        return words


class Pair(click.ParamType):
    """key=value."""

    name = "key=value"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key or not text:
            raise PTQError(
                f"{param.opts[0]} {value!r} is no option of a method: write {param.opts[0]} key=value, "
                f"e.g. {param.opts[0]} damp=0.05"
            )
        return key.replace("-", "_"), text


class Row(click.ParamType):
    """LABEL=FOLDER, a checkpoint as a row of a table."""

    name = "label=folder"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        label, equals, folder = value.partition("=")
        if not label or not folder:
            option = param.opts[0]
            raise PTQError(f"{option} {value!r}: write {option} LABEL=FOLDER, e.g. {option} theirs=/tmp/theirs")
        return label, folder


def rows_of(checkpoints: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """label -> folder. Raises PTQError for a label that stands for two."""
    rows = dict(checkpoints)
    if len(rows) < len(checkpoints):
        labels = [label for label, _ in checkpoints]
        raise PTQError(f"--checkpoint has {max(labels, key=labels.count)} twice: give each checkpoint a label of its own")
    return rows


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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ptq-suite", prog_name=PROGRAM)
def commands():
    """Quantize language models after training, and compare the methods on one protocol.

    \b
    Examples:
      ptq ls models
      ptq quantize --model tiny-llama-s --method gptq --out /tmp/gptq
      ptq ppl --model /tmp/gptq --text README.md
      ptq reproduce tiny-llama-s --fast

    Every command has examples of its own: ptq COMMAND --help
    """
    from suite.provenance import several_processes

    if (count := several_processes()) and click.get_current_context().invoked_subcommand != "lm-eval":
        raise PTQError(f"started in {count} processes (accelerate launch, torchrun): of all commands only `ptq lm-eval` shares "
                       f"its work among them; start this one alone, with --devices for several GPUs")


# ---------------------------------------------------------------------------------------------- quantize


@commands.command()
@click.option(
    "--model", required=True, metavar="MODEL", help="A name of `ptq ls models`, a folder, or an id of the hub."
)
@click.option("--method", required=True, metavar="METHOD", help="A name of `ptq ls methods`, or TRANSFORM+ROUNDING.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the quantized model.")
@options(SCHEME, CALIBRATION, PLUGIN)
@set_of("the method")
@click.option("--metric", help="cka-hybrid: what chooses, see `ptq ls metrics`.  [cka]")
@click.option("--pool", type=Words(), help="cka-hybrid: the methods to choose from.  [gptq,awq,smoothquant]")
@click.option("--block", type=WHOLE, help="cka-hybrid: layers that share a choice.  [1]")
@click.option("--rotation", help="spinquant: learned, random-hadamard, hadamard, random or none.  [learned]")
@click.option("--variant", help="spinquant: no_had, or had for Hadamard transforms at run time too.  [no_had]")
@click.option("--revision", help="Of a model of the hub.")
@options(TRUST)
@options(MEMORY)
@click.option("--devices", type=Words(), help="cka-hybrid: GPUs that try its candidates side by side: all, or cuda:0,cuda:1.")
@click.option("--export", "export_to", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Write the model for inference engines too, as `ptq export` does.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True,
              help="With --export: where the numbers of the model card are looked up.")
@click.option("--overwrite", is_flag=True, help="Replace a quantized model in --out.")
def quantize(
    model,
    method,
    out,
    wbits,
    abits,
    group_size,
    kvbits,
    calib,
    nsamples,
    seqlen,
    seed,
    mode,
    extra,
    metric,
    pool,
    block,
    rotation,
    variant,
    revision,
    load,
    activations,
    device,
    dtype,
    devices,
    export_to,
    results,
    overwrite,
):
    """Quantize a model and write it to a folder that the other commands take as a model.

    What takes long keeps its state in OUT.partial: killed, the same command continues from the last finished layer.
    A model that does not fit into the memory is read one layer at a time; `ptq plan` tells beforehand.

    \b
    Examples:
      ptq quantize --model tiny-llama-s --method gptq --out /tmp/gptq
      ptq quantize --model tiny-llama-m --method cka-hybrid --wbits 4 --abits 8 --group-size 128 \\
          --calib embedded --nsamples 64 --seqlen 512 --seed 0 --out /tmp/hybrid
      ptq quantize --model tiny-llama-m --method cka-hybrid --pool gptq,smoothquant+gptq --metric mse --out /tmp/mse
      ptq quantize --model ./my-model --method gptq --set damp=0.05 --set act_order=true --calib t.txt --out /tmp/g
      ptq quantize --model tiny-llama-s --method spinquant --abits 4 --kvbits 4 --variant had --out /tmp/spin
      ptq quantize --model tiny-llama-s --method my_method --plugin my_method.py --out /tmp/mine
      ptq quantize --model tiny-llama-s --method awq --out /tmp/awq --export /tmp/awq-packed
      ptq quantize --model llama-3.2-1b --method cka-hybrid --devices all --out /tmp/hybrid
    """
    given = {
        "wbits": wbits,
        "abits": abits,
        "group_size": group_size,
        "metric": metric,
        "pool": pool,
        "block": block,
        "rotation": rotation,
        "variant": variant,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    for key, value in extra:
        if key in chosen:
            raise PTQError(f"option {key} is given twice: once with --set is enough")
        chosen[key] = value

    from suite.method import Native, build, native, to_config

    published = native(method).options if mode == "native" else {}
    configured = build(method, **{**published, **chosen})
    if not configured.scheme.weight.quantized and configured.scheme.act is None:
        raise PTQError(
            f"method {method} at {configured.scheme} quantizes nothing, so there is nothing to write: "
            f"give fewer bits, or use the model as it is"
        )
    check_out(out, overwrite)
    if export_to is not None:
        from suite import export

        if export_to.expanduser().absolute() == out.expanduser().absolute():
            raise PTQError(f"--export and --out are the same folder {str(out)!r}: give two")
        export.check_plan(configured, configured.scheme, int(kvbits))
        check_out(export_to, overwrite, export.RECORD)

    from suite import calib as calibration
    from suite import candidates, checkpoint, depot, kv, models, plugins, resume, walk, windows
    from suite.progress import Progress
    from suite.provenance import Meter, version

    several = ()
    if devices:
        if device is not None:
            raise PTQError("--device and --devices are both given: the first of --devices is the one of all else")
        if len(getattr(configured, "pool", ())) < 2:
            raise PTQError(f"--devices has no effect with method {method}, which has no candidates to try side by side: "
                           f"give --device")
        several = models.devices_of(devices)

    found = models.resolve(model, revision)
    if found.kind == "quantized":
        raise PTQError(f"model {model!r} is quantized already: give a full-precision model")
    target, kept = several[0] if several else models.device_of(device), models.parse_dtype(dtype)
    planned = planned_quantization(found.fetched(), configured, mode, calib, nsamples, seqlen, out, target, kept, load,
                                   activations, len(several) or 1)
    loaded = models.load(model, dtype=kept, device=target, revision=revision, by_layer=planned.run.by_layer)
    note(loaded.note)
    choose_threads(loaded.model)
    # Models of the hub speak no language that the embedded text is written in; all others need no hub for it.
    matched = Native(source="wikitext2" if loaded.kind == "hub" else calibration.EMBEDDED)
    published = native(method) if mode == "native" else matched
    source = calib or published.source
    count, length = (published.nsamples, published.seqlen) if mode == "native" else calibration.usual_size(source)
    length = windows.fit(seqlen, windows.max_positions(loaded.model), length)
    sequences = calibration.load(source, loaded.tokenizer, nsamples or count, length, seed)
    before = Meter.memory() - models.weights_in_memory(loaded.model) / 2**20
    kv.set_(loaded.model, int(kvbits))
    made = {
        "model": loaded.identity,
        "method": to_config(configured),
        "scheme": str(configured.scheme),
        "mode": mode,
        "calibration": sequences.identity,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        **({"trusted": list(loaded.trusted)} if loaded.trusted else {}),
        **({"plugins": code} if (code := plugins.code_of(to_config(configured))) else {}),
    }
    whole = {
        **made,
        "kvbits": kvbits,
        "inputs": published.inputs,
        "device": loaded.model.device.type,
        "versions": {package: version(package) for package in ("ptq-suite", "torch", "transformers")},
    }
    partial = out.with_name(f"{out.name}.partial")
    with (
        Progress(f"{loaded.name} {method}") as progress,
        resume.into(partial, whole) as workspace,
        depot.of(planned.run.activations, partial.parent),
        candidates.on(several),
        Meter() as meter,
    ):
        layers = walk.quantize_model(
            configured,
            loaded.model,
            sequences,
            progress.layers(loaded.model.config.num_hidden_layers),
            diagnostics=True,
            inputs=published.inputs,
        )
        states = None
        if planned.run.by_layer:
            states = [workspace.load(f"layer-{i:03d}", lazily=True) for i in range(len(layers))]
        record = {**made, "layers": layers, "memory": planned.against(meter.sofar, before)}
        checkpoint.save(loaded.model, loaded.tokenizer, out, record, overwrite, states)
    if export_to is not None:
        export.export(out, export_to, overwrite=overwrite, measured=numbers(results, record))

    weights = sum(layer["weights"] for layer in layers)
    bits = sum(layer["bits"] * layer["weights"] for layer in layers) / weights
    seconds = sum(layer["seconds"] for layer in layers)
    click.echo(f"{loaded.name}: {method}, {configured.scheme}, {bits:.3f} bits per weight with scales, {seconds:.1f} s")
    if any("chosen" in layer for layer in layers):
        click.echo("chosen per layer: " + " ".join(layer["chosen"] for layer in layers))
    click.echo("\n".join(str(path) for path in (out, export_to) if path is not None))


def planned_quantization(source, configured, mode, calib, nsamples, seqlen, out, device, dtype, load, activations,
                         devices=1):
    """How a quantization will be done, announced if it takes long. Raises PTQError if it does not fit."""
    from suite import calib as calibration
    from suite import preflight, windows
    from suite.method import name_of, native

    published = native(name_of(configured)) if mode == "native" else None
    usual = calib or ("wikitext2" if source.kind == "hub" else calibration.EMBEDDED)
    count, length = (published.nsamples, published.seqlen) if published else calibration.usual_size(usual)
    positions = preflight.config_of(source).get("max_position_embeddings")
    plan = preflight.quantization(source, configured, nsamples or count, windows.fit(seqlen, positions, length), out,
                                  device, dtype, load, activations, devices=devices)
    if plan.seconds > preflight.LONG or plan.run.by_layer:
        note(f"{source.name} {plan.told()}")
    return plan


@commands.command()
@click.argument("model")
@click.option("--method", metavar="METHOD", default="cka-hybrid", show_default=True, help="As for `ptq quantize`.")
@options(SCHEME, CALIBRATION, PLUGIN)
@click.option("--revision", help="Of a model of the hub.")
@options(TRUST)
@options(MEMORY)
@click.option("--out", type=click.Path(path_type=Path), default=Path("."), help="Folder whose disk will be used.  [.]")
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
def plan(model, method, wbits, abits, group_size, kvbits, calib, nsamples, seqlen, seed, mode, revision, load,
         activations, device, dtype, out, as_json):
    """What quantizing a model will need on this machine: memory, disk, time; and whether it fits.

    Nothing is loaded; of a model of the hub at most the configuration is fetched. The speed is measured for a moment.

    \b
    Examples:
      ptq plan tiny-llama-m
      ptq plan llama-3-8b --method gptq --nsamples 128 --seqlen 2048
      ptq plan ./my-model --load layer --activations disk
      ptq plan tiny-llama-s --plugin my_method.py --method my_method
    """
    from suite import models
    from suite.method import build

    given = {"wbits": wbits, "abits": abits, "group_size": group_size}
    configured = build(method, **{key: value for key, value in given.items() if value is not None})
    source = models.resolve(model, revision)
    if source.kind == "quantized":
        raise PTQError(f"model {model!r} is quantized already: give a full-precision model")
    made = planned_quantization(source, configured, mode, calib, nsamples, seqlen, out, models.device_of(device),
                                models.parse_dtype(dtype), load, activations)
    note(source.note)
    if as_json:
        click.echo(json.dumps(made.as_json()))
    else:
        click.echo(f"{source.name}, {method} {configured.scheme}, {made.run.nsamples} x {made.run.seqlen} tokens: "
                   f"{made.told()}")


def check_out(folder: Path, overwrite: bool, marker: str = "ptq.json") -> None:
    """Raises PTQError, before any work, if a folder could not be written at the end. Leaves nothing behind."""
    from suite import checkpoint

    checkpoint.check_target(folder, overwrite, marker)
    parent = folder.expanduser().absolute().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".ptq-", suffix=".tmp"):
            pass
    except OSError as error:
        raise PTQError(
            f"output folder {str(folder)!r} cannot be written ({error.strerror}): give another with --out"
        ) from None


@commands.command()
@click.option("--model", required=True, metavar="FOLDER", help="A folder of `ptq quantize`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the checkpoint.")
@click.option("--format", "form", type=Choice("compressed-tensors"), default="compressed-tensors", show_default=True,
              help="Of the checkpoint.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True,
              help="Where the numbers of the model card are looked up.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in --out.")
def export(model, out, form, results, overwrite):
    """Write a quantized model as a checkpoint that transformers and inference engines load.

    Weights are packed by the format's own library; config.json tells the grid of every linear. What the format cannot
    say (rotations at run time, a rounded key-value cache) is refused.

    \b
    Examples:
      ptq export --model /tmp/hybrid --out /tmp/hybrid-packed
      ptq export --model /tmp/hybrid --format compressed-tensors --out /tmp/hybrid-packed --results results
    """
    check_out(out, overwrite, "ptq_export.json")
    from suite import models

    source = models.resolve(model)
    if source.kind != "quantized":
        raise PTQError(f"model {model!r} is not quantized: `ptq quantize --model {model} --export FOLDER` does both")

    from suite import export

    rows = numbers(results, models.record_of(source), models.identify(model)["digest"])
    export.export(source.folder, out, form, overwrite, rows)
    click.echo(str(out))


def numbers(results, record, checkpoint=None):
    """The rows of the model card that a results folder, if there is one, has: see `suite.card.measured`."""
    from suite import card
    from suite.store import Store

    return card.measured(Store(results), record, checkpoint) if results.is_dir() else []


def choose_threads(model: Any) -> None:
    """One thread for a small model, as `ptq reproduce` has it: several wait for each other more than they compute, and
    another order of summation moves GPTQ's result."""
    import torch

    from suite.experiments import SMALL_WIDTH

    if model.config.hidden_size < SMALL_WIDTH:
        torch.set_num_threads(1)


def note(text: str) -> None:
    if text:
        click.echo(f"{PROGRAM}: note: {text}", err=True)


# ---------------------------------------------------------------------------------------------- evaluate


@commands.command()
@click.option("--model", required=True, metavar="MODEL", help="A name, a folder, or a folder of `ptq quantize`.")
@click.option("--text", required=True, type=click.Path(), help="A text file.")
@click.option("--window", type=int, help="Tokens per window.  [as many as the model takes, up to 2048]")
@click.option("--max-tokens", type=WHOLE, help="Use only so many tokens of the text.  [all]")
@click.option("--revision", help="Of a model of the hub.")
@options(TRUST)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON on stdout, and nothing else there.")
def ppl(model, text, window, max_tokens, revision, as_json):
    """Perplexity of a model on a text, as quantization papers measure it.

    The text is tokenized once and cut into windows without overlap; exp of the mean NLL of the tokens 2..N of each.
    lm-eval's own `wikitext` task counts words and gives other numbers.

    \b
    Examples:
      ptq ppl --model tiny-llama-s --text book.txt
      ptq ppl --model /tmp/hybrid --text book.txt --window 512 --max-tokens 100000 --json
      ptq ppl --model tiny-llama-s@outliers=8,seed=1 --text book.txt
    """
    if window is not None:
        from suite.windows import fit

        fit(window, None)
    from suite import models, windows
    from suite.progress import Progress

    content = windows.read_text(text)
    loaded = models.load(model, revision=revision)
    note(loaded.note)
    choose_threads(loaded.model)
    size = windows.fit(window, windows.max_positions(loaded.model))
    cut = windows.token_windows(content, loaded.tokenizer, size, max_tokens=max_tokens, name=f"text file {text!r}")
    with Progress(f"{loaded.name} perplexity") as progress:
        nll = windows.window_nll(loaded.model, cut.tokens, progress=progress)
    value = windows.perplexity(nll, cut.predicted)
    if as_json:
        protocol = cut.protocol
        click.echo(
            json.dumps(
                {
                    "ppl": value,
                    **protocol,
                    "join": "none: one file, as it is",
                    "data_hash": protocol["data_digest"],
                    "model": loaded.name,
                    "model_digest": loaded.digest,
                }
            )
        )
    else:
        click.echo(
            f"{loaded.name}: perplexity {value:.4f} over {cut.predicted} tokens in {cut.count} windows of {size}"
        )


@commands.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@options(PLUGIN)
def lm_eval(arguments):
    """Run lm-evaluation-harness with the model `ptq` and the suite's tasks; everything that follows is lm-eval's own,
    but for --plugin FILE, a Python file with a method of your own.

    \b
    Examples:
      ptq lm-eval run --model ptq --model_args pretrained=tiny-llama-s,method=gptq,wbits=4,abits=8 \\
          --tasks world_math,world_wiki_ppl
      ptq lm-eval run --model ptq --model_args pretrained=/tmp/hybrid --tasks world_events --limit 20
      ptq lm-eval run --plugin my_method.py --model ptq --model_args pretrained=tiny-llama-s,method=my_method \\
          --tasks world_math
      ptq lm-eval run --model ptq --model_args pretrained=tiny-llama-m --tasks world_code --allow-code-execution
      ptq lm-eval ls tasks
    """
    if arguments in (("--help",), ("-h",), ()):
        click.echo(click.get_current_context().get_help())
        click.echo("\nlm-eval's own help: ptq lm-eval run --help")
        return None
    from suite.adapter import run_lm_eval

    return run_lm_eval(list(arguments))


# ---------------------------------------------------------------------------------------------- compare


@commands.command()
@click.argument("model")
@click.option(
    "--methods", type=Words(), help="Names of `ptq ls methods`, or TRANSFORM+ROUNDING.  [those of the main table]"
)
@click.option(
    "--tasks", type=Words(), help="Names of `ptq ls tasks`, or lm-eval's own.  [the embedded world's, or the paper's]"
)
@click.option(
    "--fast", is_flag=True, help="A first look: 64 documents or windows of each task, 16 calibration sequences."
)
@options(SCHEME, CALIBRATION, PLUGIN)
@click.option(
    "--severities",
    type=Words(),
    metavar="S,S,...",
    help="Instead of the main table: perplexity with planted outliers of these severities, as a figure.",
)
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The results folder."
)
@click.option("--revision", help="Of a model of the hub.")
@options(TRUST)
@click.option("--limit", type=WHOLE, help="Only so many documents or windows of each task.  [all; --fast: 64]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with local copies of the hub's data sets.")
@CODE
@click.option("--fresh", is_flag=True, help="Measure again what is there already.")
@click.option("--workers", type=WHOLE, help="Variants measured at the same time.  [one a core; 1 for a large model]")
@click.option("--devices", type=Words(), help="GPUs that measure variants side by side: all, or cuda:0,cuda:1.  [one]")
@click.option(
    "--allow-eval-calibration",
    is_flag=True,
    help="Allow calibration on the text that is evaluated; such numbers are marked.",
)
@options(CHECKPOINTS)
def reproduce(
    model,
    methods,
    tasks,
    fast,
    wbits,
    abits,
    group_size,
    kvbits,
    calib,
    nsamples,
    seqlen,
    seed,
    mode,
    severities,
    results,
    revision,
    limit,
    data_dir,
    allow_code_execution,
    fresh,
    workers,
    devices,
    allow_eval_calibration,
    checkpoints,
):
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
    scheme = {
        key: value
        for key, value in {"wbits": wbits, "abits": abits, "group_size": group_size}.items()
        if value is not None
    }

    from suite import experiments, hub, models, report
    from suite.progress import Progress
    from suite.store import Store

    hub.use_data_dir(data_dir)
    rows = rows_of(checkpoints)
    if rows:
        from suite import checkpoints as others

        if steps:
            raise PTQError("--checkpoint has no effect with --severities, which makes other models: leave one out")
        others.check(model, rows)
    store = Store(results)
    given = dict(
        store=store,
        options=scheme,
        kvbits=int(kvbits),
        mode=mode,
        calib_source=calib,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        fast=fast,
        limit=limit,
        allow_code_execution=allow_code_execution,
        announce=note,
        allow_eval_calibration=allow_eval_calibration,
        fresh=fresh,
        revision=revision,
        workers=workers,
        devices=[str(one) for one in models.devices_of(devices)] if devices else (),
    )
    with Progress(model) as progress:
        if steps:
            outcomes = experiments.severity_sweep(
                model, steps, methods, tasks or ("world_wiki_ppl",), progress=progress, **given
            )
        else:
            outcomes = [experiments.reproduce(model, methods, tasks, progress=progress, **given)]
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
    click.echo(
        f"{sum(o.measured for o in outcomes)} results measured, {sum(o.found for o in outcomes)} found in {results}"
    )


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
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The results folder."
)
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
@click.option(
    "--fast", is_flag=True, help="A first look: 64 documents or windows of each task, 16 calibration sequences."
)
@click.option("--tasks", type=Words(), help="Those that the experiments' words stand for.  [as in reproduce]")
@CODE
@options(CALIBRATION[:-1])
@click.option("--workers", type=WHOLE, help="Measured at the same time.  [one a core; 1 for a large model]")
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The results folder."
)
@click.option("--revision", help="Of a model of the hub.")
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
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The results folder."
)
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
    learning = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "scale_gradient": scale_gradient}
    learning = {name: value for name, value in learning.items() if value is not None}
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
    measured, found = sum(o.measured for o in outcomes), sum(o.found for o in outcomes)
    click.echo(f"{measured} results measured, {found} found in {results}")


# ---------------------------------------------------------------------------------------------- a method of one's own

REPORTS = (
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else there."),
    click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write a JUnit file too."),
)
MEASURING = (
    click.option("--tasks", type=Words(), help="Names of `ptq ls tasks`, or lm-eval's own.  [as `ptq reproduce`]"),
    click.option("--fast", is_flag=True, help="64 documents or windows of each task, 16 calibration sequences."),
    click.option("--limit", type=WHOLE, help="Only so many documents or windows of each task."),
    click.option(
        "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="The results folder."
    ),
    click.option(
        "--repeats",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Further calibration seeds for the noise floor; 0: it is not measured.",
    ),
    click.option("--workers", type=WHOLE, help="Variants measured at the same time.  [one a core; 1 for a large model]"),
    click.option("--revision", help="Of a model of the hub."),
    *TRUST,
)


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


def _measuring(given: dict) -> dict:
    """The arguments of `experiments.reproduce` that options of the command line stand for."""
    from suite.store import Store

    scheme = {key: given[key] for key in ("wbits", "abits", "group_size") if given[key] is not None}
    same = ("nsamples", "seqlen", "seed", "mode", "fast", "limit", "revision", "workers")
    return dict(store=Store(given["results"]), options=scheme, kvbits=int(given["kvbits"]), calib_source=given["calib"],
                **{key: given[key] for key in same})


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
    arguments = _measuring(given)
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
    arguments = _measuring(given)
    path = out or arguments["store"].root / references.FOLDER / f"{name}.json"
    with Progress(f"baseline {name}") as progress:
        frozen = comparing.freeze(
            name, model, methods, given["tasks"], repeats=given["repeats"], progress=progress, announce=note,
            **arguments)
    references.save(frozen, path)
    for run in frozen.runs:
        click.echo(f"{run.model}: {len(run.labels)} methods, {len(run.tasks)} tasks")
    click.echo(str(path))


# ---------------------------------------------------------------------------------------------- look up


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


# ---------------------------------------------------------------------------------------------- embedded models


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


if __name__ == "__main__":
    main()
