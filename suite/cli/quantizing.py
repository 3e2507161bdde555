"""`ptq quantize`, `plan`, `export`: one model, one method, a folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from suite.cli.options import (
    CALIBRATION,
    MEMORY,
    PLUGIN,
    REVISION,
    SCHEME,
    TRUST,
    WHOLE,
    Choice,
    Words,
    only_given,
    options,
    set_of,
)
from suite.cli.program import choose_threads, commands, note
from suite.errors import PTQError
from suite.paths import RESULTS


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
@REVISION
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
    chosen = only_given(wbits=wbits, abits=abits, group_size=group_size, metric=metric, pool=pool, block=block,
                        rotation=rotation, variant=variant)
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

    told = walk.totals(layers)
    click.echo(f"{loaded.name}: {method}, {configured.scheme}, {told['bits']:.3f} bits per weight with scales, "
               f"{told['seconds']:.1f} s")
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
@REVISION
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

    configured = build(method, **only_given(wbits=wbits, abits=abits, group_size=group_size))
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
