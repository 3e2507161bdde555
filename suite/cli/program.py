"""The program `ptq`: one line of error for a mistake of the user, one for Ctrl-C, a traceback for a bug.

What is asked for is checked in the commands, the work is done elsewhere. Heavy imports stand inside the commands, so that
help is instant.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from suite.errors import PTQError, unknown

PROGRAM = "ptq"


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
