"""Reading a recipe and the command line, so that a mistake in either ends in one line.

A recipe is a YAML file of blocks. Some fill the dataclasses of [`arguments`], and the command line overrides their
entries; the others (`model`, `vae`, ...) are the keyword arguments of a class, see [`build`].
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from ..configuration_earthformer import nearest_name
from ..errors import one_line
from .distributed import join_processes


Built = TypeVar("Built")

# What the blocks of a recipe may be called. One recipe may serve several scripts.
BLOCKS = (
    "model", "vae", "unet", "alignment_network", "scheduler", "sampler", "feature_extractor", "data",
    "training", "autoencoder", "denoiser", "alignment",
)  # fmt: skip


def parse_recipe(description: str | None = None, /, **blocks: Any) -> tuple[dict, ...]:
    """A YAML recipe given as --recipe, its entries overridden by the command line; joins the processes of torchrun.

    Args:
        description: what `--help` says before it lists the options.
        blocks: name of a block of the recipe -> dataclass of its entries.

    Returns:
        The whole recipe as read, and one dataclass per block.

    Raises:
        SystemExit: a file that is no recipe, an entry that no dataclass has, a value of the wrong type. One line.
    """
    parser = _Parser(
        tuple(blocks.values()), description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file; the other options override its entries")
    path_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    path_parser.add_argument("--recipe", type=Path, nargs="?")
    path = path_parser.parse_known_args()[0].recipe
    recipe: dict = {}
    if path is not None:
        recipe = _read(path)
        for block, dataclass in blocks.items():
            parser.set_defaults(**_entries(recipe, block, dataclass, path))
    join_processes()
    try:
        *parsed, _ = parser.parse_args_into_dataclasses(look_for_args_file=False)
    except ValueError as reason:  # also an option that no dataclass has
        parser.error(one_line(reason))
    return recipe, *parsed


def build(recipe: dict, block: str, factory: Callable[..., Built], **further: Any) -> Built:
    """Call a class with the entries of a recipe's block.

    Args:
        further: keyword arguments that the recipe does not hold.

    Raises:
        ValueError: the recipe lacks the block, or the class refuses an entry.
    """
    if not isinstance(recipe.get(block), dict):
        raise ValueError(
            f"The recipe must hold a block `{block}` of entries, it has {recipe.get(block, sorted(recipe))!r}."
        )
    try:
        return factory(**recipe[block], **further)
    except (TypeError, ValueError, StrictDataclassError) as reason:
        raise ValueError(f"`{block}` of the recipe: {one_line(reason)}") from reason


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: {message}")  # without a usage of forty options


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the description."""


def _read(path: Path) -> dict:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        sys.exit(f"--recipe {path} cannot be read: {one_line(reason)}")
    if not isinstance(recipe, dict):
        sys.exit(f"--recipe {path} must hold blocks such as `data:`, got {type(recipe).__name__}.")
    for block in recipe:
        if block not in BLOCKS:
            close = nearest_name(str(block), BLOCKS, cutoff=0.0)
            sys.exit(f"--recipe {path}: unknown block {block!r}; did you mean {close!r}?")
    return recipe


def _entries(recipe: dict, block: str, dataclass: type, path: Path) -> dict[str, Any]:
    """The entries of a block, checked against the fields of its dataclass."""
    entries = recipe.get(block) or {}
    if not isinstance(entries, dict):
        sys.exit(f"{path}: `{block}` must hold entries, got {entries!r}.")
    types, names = get_type_hints(dataclass), {field.name for field in fields(dataclass)}
    checked = {}
    for name, value in entries.items():
        if name not in names:
            close = nearest_name(str(name), names, cutoff=0.0)
            sys.exit(f"{path}: unknown entry {name!r} of `{block}`; did you mean {close!r}?")
        expected = types[name]
        if expected in (float, float | None) and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                value = float(value)  # YAML 1.1 reads 1e-3 as text
            except ValueError:
                pass
        try:
            type_validator(name, value, expected)
        except TypeError as reason:
            sys.exit(f"{path}: `{block}`: {one_line(reason)}")
        checked[name] = value
    return checked


__all__ = ["build", "parse_recipe"]
