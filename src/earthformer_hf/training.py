"""One training loop for all recipes: Accelerate, averaged weights, and runs that resume where they stopped.

An interrupted run goes on with the same command, and ends like one that was never interrupted: the order of the data
and the seeds of every step follow from the step's number alone.
"""

import argparse
import difflib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers import EMAModel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import HfArgumentParser, get_scheduler

from .optimization import Muon


@dataclass
class TrainingArguments:
    """What all recipes share, under `training:`."""

    output_dir: str = field(default="runs/model", metadata={"help": "where checkpoints and the best model go"})
    max_steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 5e-3
    position_rate: float = field(
        default=1.0, metadata={"help": "learning rate of position embeddings and biases, relative to the rest"}
    )
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    eval_every: int = 100
    save_every: int = 50
    stop_at: int | None = field(default=None, metadata={"help": "stop before max_steps; the same command goes on"})
    seed: int = 0


def parse_recipe(**parts: Any) -> tuple[dict, ...]:
    """A YAML recipe given as --recipe, its entries overridden by the command line.

    Args:
        parts: name of a block of the recipe -> dataclass of its entries.

    Returns:
        The whole recipe as read, and one dataclass per part.

    Raises:
        SystemExit: an entry that no dataclass has.
    """
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


def train(
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, dict], torch.Tensor],
    train_set: Dataset,
    score_of: Callable[[torch.nn.Module, Accelerator], float],
    save_best: Callable[[torch.nn.Module], None],
    arguments: TrainingArguments,
):
    """Train a model; the averaged weights with the lowest score so far are saved.

    Args:
        model: on the CPU, anew or loaded.
        loss_of: model and batch -> loss; dropout and noise are seeded by the step.
        train_set: item n is a function of n alone, for every n; see [`~earthformer_hf.data.windows.TrainingWindows`].
        score_of: model and accelerator -> score, lower is better, the same on every process.
        save_best: writes the (unwrapped) model into `arguments.output_dir`; called on the main process.
        arguments: see [`TrainingArguments`].

    Raises:
        SystemExit: the loss is not finite, or OUTPUT_DIR holds the checkpoint of a run with another course.
    """
    accelerator = Accelerator()
    ranks = accelerator.num_processes  # a prepared schedule takes one step per process
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    positions: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        kind = positions if "position" in name else matrices if parameter.ndim > 1 else others
        kind.append(parameter)
    rate = arguments.learning_rate
    groups = [{"params": others, "lr": rate}, {"params": positions, "lr": rate * arguments.position_rate}]
    groups = [group for group in groups if group["params"]]
    optimizers = [Muon(matrices, rate, weight_decay=arguments.weight_decay), torch.optim.AdamW(groups, weight_decay=0)]
    steps = ranks * arguments.warmup_steps, ranks * arguments.max_steps
    schedules = [get_scheduler("cosine", optimizer, *steps) for optimizer in optimizers]
    model, *both = accelerator.prepare(model, *optimizers, *schedules)
    optimizers, schedules = both[:2], both[2:]
    ema = EMAModel(model.parameters(), decay=arguments.ema_decay)
    accelerator.register_for_checkpointing(ema)

    # What fixes the course of a run: a checkpoint of another course is not continued.
    course = {name: getattr(arguments, name) for name in ("seed", "max_steps", "learning_rate", "warmup_steps")}
    course["samples_per_step"] = arguments.batch_size * ranks
    progress: dict[str, Any] = {"step": 0, "best": float("inf"), "course": course}
    checkpoint = Path(arguments.output_dir) / "checkpoints" / "last"
    for folder in (checkpoint, checkpoint.with_name("old")):
        if (folder / "progress.json").exists():
            accelerator.load_state(folder)
            progress = json.loads((folder / "progress.json").read_text())
            break
    if progress["course"] != course:
        raise SystemExit(f"{checkpoint} was started with {progress['course']}, not with {course}.")
    ema.to(accelerator.device)

    last = min(arguments.max_steps, arguments.stop_at or arguments.max_steps)
    order = range(progress["step"] * course["samples_per_step"], last * course["samples_per_step"])
    train_loader = accelerator.prepare(DataLoader(train_set, arguments.batch_size, sampler=order))
    bar = tqdm(total=last, initial=progress["step"], disable=not accelerator.is_main_process)
    model.train()
    for batch in train_loader:
        set_seed(arguments.seed + progress["step"], device_specific=ranks > 1)  # of dropout and noise
        loss = loss_of(model, batch)
        if not torch.isfinite(loss):
            raise SystemExit(
                f"step {progress['step']}: the loss is {loss.item()}; the last checkpoint is {checkpoint}."
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        progress["step"] += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.5f}")
        at_end = progress["step"] == last
        if progress["step"] % arguments.eval_every == 0 or progress["step"] == arguments.max_steps:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            model.eval()
            with torch.no_grad():
                score = score_of(model, accelerator)
            model.train()
            if score < progress["best"]:
                progress["best"] = score
                if accelerator.is_main_process:
                    save_best(accelerator.unwrap_model(model))
            ema.restore(model.parameters())
            tqdm.write(f"step {progress['step']}: validation {score:.6f}, best {progress['best']:.6f}")
        if progress["step"] % arguments.save_every == 0 or at_end:
            _save(accelerator, checkpoint, progress)
    accelerator.end_training()


def _save(accelerator: Accelerator, folder: Path, progress: dict):
    """Write the state beside the last one, then take its place: an interrupted write leaves the last one intact."""
    new, old = folder.with_name("new"), folder.with_name("old")
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def mean_over(
    dataset: Dataset,
    batch_size: int,
    total_and_count: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
    accelerator: Accelerator,
) -> float:
    """The mean of a score over a data set, of which each process takes every n-th item.

    Args:
        total_and_count: batch -> sum of the score, and over how many values.
    """
    share = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))  # type: ignore
    total, count = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in DataLoader(share, batch_size):
        one, number = total_and_count(send_to_device(batch, accelerator.device))
        total, count = total + one.double(), count + number
    return (accelerator.reduce(total) / accelerator.reduce(count)).item()
