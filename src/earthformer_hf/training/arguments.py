"""What a recipe and the command line may choose."""

import argparse
import difflib
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser


if TYPE_CHECKING:
    pass


@dataclass
class TrainingArguments:
    """What all recipes share, under `training:`."""

    output_dir: str = field(default="runs/model", metadata={"help": "where checkpoints and the best model go"})
    max_steps: int = 1000
    batch_size: int = field(default=4, metadata={"help": "items of a micro-batch, per process"})
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "items of a step: gradients are accumulated up to it, on however many processes"},
    )
    optimizer: Literal["muon", "adamw"] = field(
        default="muon", metadata={"help": "muon: for weight matrices, with AdamW for the rest; adamw: for all"}
    )
    learning_rate: float = 5e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "of AdamW"})
    position_rate: float = field(
        default=1.0, metadata={"help": "learning rate of position embeddings and biases, relative to the rest"}
    )
    weight_decay: float = 0.01
    warmup_steps: int = 100
    min_lr_rate: float = field(default=0.0, metadata={"help": "learning rate at the end, relative to the highest"})
    max_grad_norm: float = 1.0
    ema_decay: float | None = field(default=0.99, metadata={"help": "of the averaged weights; null keeps none"})
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more work"})
    torch_compile: bool = field(default=False, metadata={"help": "compile the attention blocks"})
    num_workers: int = field(default=0, metadata={"help": "processes that read data, per process that trains"})
    eval_every: int = 100
    patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one"}
    )
    save_every: int = 50
    stop_at: int | None = field(default=None, metadata={"help": "stop before max_steps; the same command goes on"})
    on_nan: Literal["stop", "skip"] = field(default="stop", metadata={"help": "what a step that is not finite does"})
    report_to: Literal["none", "tensorboard", "trackio"] = "none"
    seed: int = 0


def join_processes() -> PartialState:
    """The processes that torchrun started; without being told, Accelerate leaves each alone where there is no GPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def parse_recipe(**parts: Any) -> tuple[dict, ...]:
    """A YAML recipe given as --recipe, its entries overridden by the command line; joins the processes of torchrun.

    Args:
        parts: name of a block of the recipe -> dataclass of its entries.

    Returns:
        The whole recipe as read, and one dataclass per part.

    Raises:
        SystemExit: an entry that no dataclass has.
    """
    join_processes()
    recipe_parser = argparse.ArgumentParser(add_help=False)
    recipe_parser.add_argument("--recipe", type=Path, required=True)
    known, others = recipe_parser.parse_known_args()
    recipe = yaml.safe_load(known.recipe.read_text())
    parser = HfArgumentParser(tuple(parts.values()))
    for name, kind in parts.items():
        names = {f.name for f in fields(kind)}
        for entry in recipe.get(name) or {}:
            if entry not in names:
                near = difflib.get_close_matches(entry, names, n=1, cutoff=0.0)[0]
                sys.exit(f"{known.recipe}: unknown entry {entry!r} of `{name}`; did you mean {near!r}?")
        parser.set_defaults(**(recipe.get(name) or {}))
    return recipe, *parser.parse_args_into_dataclasses(others)
