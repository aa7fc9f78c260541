"""The application: its commands, and what every one of them does about errors and interruption.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import io
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from hashret.cli.calibrate import calibrate
from hashret.cli.common import visible
from hashret.cli.demo import demo
from hashret.cli.doctor import doctor
from hashret.cli.dupes import dupes, verdict
from hashret.cli.estimate import estimate
from hashret.cli.eval import evaluate
from hashret.cli.failures import failures
from hashret.cli.index import index, reindex
from hashret.cli.info import info
from hashret.cli.model import denoise, model, plot, reconstruct, sample, upscale
from hashret.cli.query import query
from hashret.cli.remove import remove
from hashret.cli.serve import serve
from hashret.cli.train import train
from hashret.cli.transfer import export, import_
from hashret.errors import HashretError
from hashret.process import limit_spinning, version

# Typer's own exceptions derive from the UsageError and the ClickException of the click that it brings or depends on.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(name="hashret", add_completion=False, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def hashret(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Find similar images in milliseconds by compact binary codes, learned from your own images without labels.

    Two commands to begin with: hashret index photos/, then hashret query image.png
    """
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


class _Interrupted(Exception):
    """Ctrl-C in a command. Typer would make of a KeyboardInterrupt what its version likes."""


def _interruptible(command: Callable[..., int]) -> Callable[..., int]:
    @wraps(command)
    def interruptible(*arguments: Any, **options: Any) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return interruptible


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "index": index,
    "query": query,
    "eval": evaluate,
    "dupes": dupes,
    "verdict": verdict,
    "calibrate": calibrate,
    "info": info,
    "reindex": reindex,
    "remove": remove,
    "failures": failures,
    "doctor": doctor,
    "estimate": estimate,
    "export": export,
    "import": import_,
    "serve": serve,
    "demo": demo,
}

for name, command in COMMANDS.items():
    app.command(name)(_interruptible(command))
for ability in (reconstruct, denoise, upscale, sample, plot):
    model.command()(_interruptible(ability))
app.add_typer(model)


def main() -> None:
    """Run the command line of this process and exit."""
    limit_spinning()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths that are not UTF-8 come out as the bytes they are
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    try:
        code: int = app(arguments, prog_name="hashret", standalone_mode=False) or 0
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        return code
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "hashret"
        return _fail(f"{error.format_message().rstrip('.')}: see {command} --help", 2)
    except _ClickException as error:
        return _fail(error.format_message(), 1)
    except HashretError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}: check the disk and permissions", 1)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        return _fail("interrupted: run the same command to go on", 130)


def _fail(text: str, code: int) -> int:
    print(f"hashret: {visible(' '.join(text.split()))}", file=sys.stderr)
    return code
