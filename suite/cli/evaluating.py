"""`ptq ppl`, `lm-eval`: one model, its scores."""

from __future__ import annotations

import json

import click

from suite.cli.options import PLUGIN, REVISION, TRUST, WHOLE, options
from suite.cli.program import choose_threads, commands, note


@commands.command()
@click.option("--model", required=True, metavar="MODEL", help="A name, a folder, or a folder of `ptq quantize`.")
@click.option("--text", required=True, type=click.Path(), help="A text file.")
@click.option("--window", type=int, help="Tokens per window.  [as many as the model takes, up to 2048]")
@click.option("--max-tokens", type=WHOLE, help="Use only so many tokens of the text.  [all]")
@REVISION
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
