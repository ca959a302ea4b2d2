"""Docstrings name other objects as transformers does, [`Name`] or [`~package.Name`]: here these become links."""

import re
from pathlib import Path

import griffe


REFERENCE = re.compile(r"\[`(~?)!?([\w.]+)`\](?![\[(])")
ARGUMENT = re.compile(r"^(\s+[\w, ]+ )\((`.*)\):", re.MULTILINE)  # name (`type`, *optional*):
PAGES = Path(__file__).resolve().parents[1] / "reference"
SHOWN = re.compile(r"^::: (\S+)$", re.MULTILINE)

# name of what a page of the reference shows -> its path
PLACES = {path.rsplit(".", 1)[-1]: path for page in PAGES.glob("*.md") for path in SHOWN.findall(page.read_text())}


class CrossReferences(griffe.Extension):
    """Links to what the reference shows; the plain name of all else."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        if pkg.name == "earthformer_hf":
            link_members(pkg)


def link_members(parent: griffe.Object) -> None:
    """Give the docstrings of a module's or a class's members their links."""
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.docstring is not None:
            text = ARGUMENT.sub(lambda match: f"{match[1]}({re.sub('[`*]', '', match[2])}):", member.docstring.value)
            member.docstring.value = REFERENCE.sub(_linked, text)
        link_members(member)


def _linked(match: re.Match) -> str:
    short, path = match.groups()
    name = path.rsplit(".", 1)[-1]
    shown = f"`{name if short else path}`"
    return f"[{shown}][{PLACES[name]}]" if name in PLACES else shown
