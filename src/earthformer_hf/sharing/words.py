"""Text from elsewhere as it may stand in a card or a score file: no local paths, no markup, no line of its own."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import one_line


# An absolute path of two parts or more within a text; `mm/h`, `../data/x` and https://example.org/x are none.
LOCAL_PATH = re.compile(r"(?:file://|(?<![\w.~:/-]))(/(?:[^\s/'\"`,;:|<>()\[\]{}=]+/)+[^\s/'\"`,;:|<>()\[\]{}=]*)")

# What begins markup in Markdown, anywhere in a line.
MARKUP = re.compile(r"([\\`*\[\]<>|])")


def shown_path(path: str | Path) -> str:
    """An absolute path from the working directory, or its last part if it lies elsewhere; another path as it is."""
    path = Path(path)
    if not path.is_absolute():
        return str(path)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def without_local_paths(value: Any) -> Any:
    """A text with its absolute paths as [`shown_path`] has them; the same of all texts in a list or dict."""
    if isinstance(value, dict):
        return {key: without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [without_local_paths(entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, Path):
        return shown_path(value)
    if not isinstance(value, str):
        return value
    if "\n" not in value and Path(value).is_absolute() and len(Path(value).parts) > 2:  # it may hold spaces
        return shown_path(value)
    return LOCAL_PATH.sub(lambda match: shown_path(match[1]), value)


def shown_command(arguments: Sequence[str]) -> str:
    """A command as a shell takes it, in one line and without local paths."""

    def shown(argument: str) -> str:
        parts = re.split("([=,])", one_line(argument) if argument.strip() else argument)
        return without_local_paths("".join(shown_path(part) if part.startswith("/") else part for part in parts))

    return shlex.join(map(shown, arguments))


def plain(text: object) -> str:
    """A text in one line, whose markup Markdown shows instead of following it."""
    return MARKUP.sub(r"\\\1", one_line("".join(c if c.isprintable() else " " for c in str(text))))


def inline_code(text: object) -> str:
    """A text as code within a line."""
    return f"`{one_line(text).replace('`', '')}`"


def fenced(text: str, language: str = "") -> str:
    """A text as a block of code, which nothing in it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


__all__ = ["fenced", "inline_code", "plain", "shown_command", "shown_path", "without_local_paths"]
