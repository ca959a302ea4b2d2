"""The program and its groups of commands, and how they end when something is wrong."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated

import typer

from ..errors import DEBUG, described, one_line


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
            fail(described(reason))

    return wrapped


@app.callback()
def options_of_all_commands(
    debug: Annotated[bool, typer.Option(DEBUG, help="show where an error arose; anywhere on the line")] = False,
): ...


# arguments of several commands
Token = Annotated[str | None, typer.Option(help="of the hub; that of `hf auth login` if omitted")]
Private = Annotated[bool | None, typer.Option(help="whether a repository that is created is private")]
RepoId = Annotated[str, typer.Argument(help="name or namespace/name")]


__all__ = ["Private", "RepoId", "Token", "app", "data_app", "fail", "fails_in_one_line", "hub_app"]
