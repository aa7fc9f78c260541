"""The application: its commands in groups, and how every command reports errors and interruption.

Results go to stdout, everything else to stderr. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hashret.cli.backup import backup
from hashret.cli.calibrate import calibrate
from hashret.cli.common import ClickException, UsageError, require_command, visible
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

GROUPS: dict[str, dict[str, Callable[..., int]]] = {
    "Start": {"demo": demo, "index": index},
    "Search": {"query": query, "dupes": dupes, "verdict": verdict, "calibrate": calibrate},
    "Keep a collection": {
        "info": info,
        "remove": remove,
        "reindex": reindex,
        "failures": failures,
        "doctor": doctor,
        "backup": backup,
        "estimate": estimate,
        "export": export,
        "import": import_,
    },
    "Models": {"train": train, "eval": evaluate},
    "Serve": {"serve": serve},
}

COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


class _GroupedCommands(TyperGroup):
    """Lists the commands of the help in groups (`rich_help_panel`), in plain text. Typer does so only with Rich."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width  # the width of descriptions in Typer
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.commands[name]
            groups.setdefault(command.rich_help_panel, []).append(
                (name.ljust(width), command.get_short_help_str(limit))
            )
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows)


app = typer.Typer(name="hashret", cls=_GroupedCommands, rich_markup_mode=None)


def _show_version(is_given: bool) -> None:
    if is_given:
        print(version())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def hashret(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find similar images in milliseconds by compact binary codes, learned from your own images without labels.

    \b
    Two commands to begin with:
      hashret index photos/
      hashret query image.png
    """
    require_command(context)


class _Interrupted(Exception):
    """Ctrl-C in a command. What Typer does with a KeyboardInterrupt differs between its versions."""


def _interruptible(command: Callable[..., int]) -> Callable[..., int]:
    @wraps(command)
    def interruptible(*arguments: Any, **options: Any) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return interruptible


for group, commands in GROUPS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=group)(_interruptible(command))
TASKS = {task.__name__: task for task in (reconstruct, denoise, upscale, sample, plot)}
for name, command in TASKS.items():
    model.command(name)(_interruptible(command))
app.add_typer(model, rich_help_panel="Models")


def main() -> None:
    """Run the command line of this process and exit."""
    limit_spinning()
    warnings.formatwarning = lambda message, *_, **__: f"hashret: {visible(' '.join(str(message).split()))}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # print paths that are not UTF-8 as the bytes they are
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code: int = app(arguments, prog_name="hashret", standalone_mode=False) or 0
        sys.stdout.flush()  # here a full disk or a closed pipe can still be reported
        return code
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = _command_path(arguments) if context is None else context.command_path
        return _fail(f"{error.format_message().rstrip('.?')}: see {command} --help", 2)
    except ClickException as error:
        return _fail(error.format_message(), 1)
    except HashretError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}: check the disk and permissions", 1)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        return _fail("interrupted: run the same command to continue", 130)


def _command_path(arguments: list[str]) -> str:
    """Return the command that a command line calls, with the names before it."""
    names = arguments[:1] if arguments and arguments[0] in {*COMMANDS, "model"} else []
    if names == ["model"] and arguments[1:2] and arguments[1] in TASKS:
        names = arguments[:2]
    return " ".join(["hashret", *names])


def _fail(message: str, code: int) -> int:
    print(f"hashret: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code
