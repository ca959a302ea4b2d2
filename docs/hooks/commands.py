"""The page of the command `earthformer-hf`, from the program itself."""

import re
from collections.abc import Iterator
from typing import Any


def commands(group: Any, name: str = "earthformer-hf") -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, with their whole names."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def command_page() -> str:
    """A section for each command: what it does, and a table of its arguments and options."""
    from typer.main import get_command

    from earthformer_hf.cli import app

    return "\n\n".join(_section(name, command) for name, command in commands(get_command(app)))


def _section(name: str, command: Any) -> str:
    words = (command.help or "").replace("\b", "").strip().split("\n\n")
    text = [" ".join(words[0].split())]
    for part in words[1:]:
        is_example = part.startswith("earthformer-hf")
        text.append(f"```bash\n{_example(part)}\n```" if is_example else " ".join(part.split()))
    rows = ["| argument or option | what | if omitted |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        names = ", ".join(f"`{option}`" for option in parameter.opts)
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        default = "" if parameter.default is None or callable(parameter.default) else f"`{parameter.default}`"
        default = "must be given" if parameter.required else default
        rows.append(f"| {names} | {getattr(parameter, 'help', '') or ''} | {default} |")
    return "\n\n".join([f"## {name.removeprefix('earthformer-hf ')}", *text, "\n".join(rows)])


def _example(text: str) -> str:
    return re.sub(r"\n\s+", " ", text) if text.count("earthformer-hf") == 1 else text


__all__ = ["command_page", "commands"]
