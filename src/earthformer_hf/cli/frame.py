"""The program and its groups of commands, and how they end when something is wrong."""

import re
import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Annotated

import typer
from typer.models import OptionInfo

from .. import __version__
from ..errors import DEBUG, described, one_line


RENAMED = {"ensemble": "ensemble_size", "steps": "num_inference_steps"}  # option -> argument of Python
# An option may be written with - or _ between its words.
app = typer.Typer(
    help="Earthformer and PreDiff.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
hub_app = typer.Typer(help="Write, push and check model folders.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")
data_app = typer.Typer(help="Prepare, describe, draw and push data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def fail(reason: object):
    """End with one line of what is wrong, and exit code 1."""
    typer.echo(f"error: {one_line(reason)}", err=True)
    raise typer.Exit(1)


def fails_in_one_line(command: Callable) -> Callable:
    """A command that ends with one line where bad input would end it with a traceback."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except Exception as reason:  # whatever it is, a user wants the words first
            if DEBUG in sys.argv:
                raise
            fail(_with_flags(described(reason), command))

    return wrapped


def _with_flags(text: str, command: Callable) -> str:
    """A message about arguments of Python, about the options of a command where they are such: `coarsen_to='3 km'` as
    `--coarsen-to '3 km'`."""
    options: dict[str, str] = {}
    for name, parameter in signature(command).parameters.items():
        about = getattr(parameter.annotation, "__metadata__", ())
        if any(isinstance(each, OptionInfo) for each in about):
            flag = "--" + name.strip("_").replace("_", "-")
            options |= {each: flag for each in (name, f"{name}s", RENAMED.get(name, name))}  # `thresholds`: one by one

    def of_command(match: re.Match) -> str:
        name, value = match[1], match[2]
        if name not in options:
            return match[0]
        return f"`{options[name]} {value[1:]}`" if value else f"`{options[name]}`"

    return re.sub(r"`([a-z_]+)(=[^`]+)?`", of_command, text)


def _tell_version(asked: bool):
    if asked:
        typer.echo(f"earthformer_hf {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all_commands(
    debug: Annotated[bool, typer.Option(DEBUG, help="show where an error arose; anywhere on the line")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="the version of this package")
    ] = False,
): ...


# arguments of several commands
Token = Annotated[str | None, typer.Option(help="of the hub; that of `hf auth login` if omitted")]
Private = Annotated[bool | None, typer.Option(help="whether a repository that is created is private")]
RepoId = Annotated[str, typer.Argument(help="name or namespace/name")]


__all__ = ["RENAMED", "Private", "RepoId", "Token", "app", "data_app", "fail", "fails_in_one_line", "hub_app"]
