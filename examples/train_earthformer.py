"""Train an Earthformer on open radar or sea-surface-temperature data. The same command resumes an interrupted run.

    python examples/train_earthformer.py --recipe examples/configs/earthformer_radar_tiny.yaml --output_dir runs/radar

Every `save_every` steps the complete state is written to OUTPUT_DIR/checkpoints; the model with the best score on the
validation split is in OUTPUT_DIR, ready for `from_pretrained`.
"""

import argparse
import json
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, get_scheduler

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.baselines import OceanRecord, linear_maps
from earthformer_hf.data import open_radar, open_sst
from earthformer_hf.data.windows import TrainingWindows, Windows, heavy_share
from earthformer_hf.losses import intensity_weighted_mse
from earthformer_hf.optimization import Muon


SOURCES = {"open_radar": open_radar.load_events, "open_sst": open_sst.load_events}


@dataclass
class DataArguments:
    source: str = field(default="", metadata={"help": "open_radar or open_sst"})
    file: str = field(default="", metadata={"help": "file name below EARTHFORMER_HF_DATA"})
    train_options: dict = field(default_factory=dict, metadata={"help": "options of the reader, for training only"})
    turn: bool = field(default=False, metadata={"help": "draw flips and quarter turns"})
    gain: float = field(default=1.0, metadata={"help": "draw a factor for the values from 1/gain .. gain"})
    mix: bool = field(default=False, metadata={"help": "draw sums of two windows, for anomalies"})
    heavy_threshold: float | None = field(
        default=None, metadata={"help": "draw windows by how much of their future reaches this stored value"}
    )
    teacher_weight: float = field(default=0.0, metadata={"help": "share of the target taken from a linear forecast"})
    eval_stride: int = field(default=4, metadata={"help": "frames between validation windows"})


@dataclass
class TrainingArguments:
    output_dir: str = field(default="runs/earthformer", metadata={"help": "where checkpoints and the best model go"})
    pretrained: str | None = field(default=None, metadata={"help": "start from this model instead of random weights"})
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
    intensity_weight: float = field(default=0.0, metadata={"help": "weight of intense values in the loss"})
    eval_every: int = 100
    save_every: int = 50
    stop_at: int | None = field(default=None, metadata={"help": "stop before max_steps; the same command goes on"})
    seed: int = 0


def parse_arguments() -> tuple[dict, DataArguments, TrainingArguments]:
    """The recipe's values, overridden by the command line."""
    recipe_parser = argparse.ArgumentParser(add_help=False)
    recipe_parser.add_argument("--recipe", type=Path, required=True)
    known, others = recipe_parser.parse_known_args()
    recipe = yaml.safe_load(known.recipe.read_text())
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    for part, kind in (("data", DataArguments), ("training", TrainingArguments)):
        unknown = set(recipe[part]) - {f.name for f in fields(kind)}
        if unknown:
            raise SystemExit(f"{known.recipe}: unknown entries of `{part}`: {sorted(unknown)}.")
    parser.set_defaults(**recipe["data"], **recipe["training"])
    data, training = parser.parse_args_into_dataclasses(others)
    return recipe, data, training


@torch.no_grad()
def evaluate(model, loader, accelerator) -> float:
    """Mean squared error over the observed values of the validation split."""
    model.eval()
    total, count = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        predictions = model(batch["past_values"]).predictions
        observed = batch["future_observed_mask"].expand_as(predictions)
        error = (predictions - batch["future_values"])[observed]
        total, count = total + error.double().square().sum(), count + observed.sum()
    model.train()
    return (accelerator.reduce(total) / accelerator.reduce(count)).item()


def save(accelerator, folder: Path, progress: dict):
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


def main():
    recipe, data, arguments = parse_arguments()
    accelerator = Accelerator()
    set_seed(arguments.seed)
    config = EarthformerConfig(**recipe["model"])
    extractor = EarthformerFeatureExtractor(**recipe["feature_extractor"])
    path = Path(os.environ.get("EARTHFORMER_HF_DATA", "../shared/data")) / data.file
    lengths = config.context_length, config.prediction_length
    if data.source not in SOURCES:
        raise SystemExit(f"--source must be one of {sorted(SOURCES)}, got {data.source!r}.")
    train_events = SOURCES[data.source](path, "train", **data.train_options)
    highest = (
        (extractor.valid_range[1] - extractor.offset) * extractor.scale if extractor.valid_range else float("inf")
    )
    if data.teacher_weight:
        if data.source != "open_sst":
            raise SystemExit(f"--teacher_weight needs the source open_sst, got {data.source!r}.")
        for event in train_events:
            record = OceanRecord(event, open_sst.nino34, *lengths)
            event["teacher"] = linear_maps(record, event["geo"]["lat"])
    windows = Windows(train_events, extractor.encode, *lengths)
    train_set = TrainingWindows(
        windows,
        arguments.seed,
        data.turn,
        data.gain,
        data.mix,
        highest,
        data.teacher_weight,
        None if data.heavy_threshold is None else heavy_share(windows, data.heavy_threshold),
    )
    eval_set = Windows(SOURCES[data.source](path, "val"), extractor.encode, *lengths, stride=data.eval_stride)

    if arguments.pretrained:
        model = EarthformerForPrediction.from_pretrained(arguments.pretrained, config=config)
    else:
        model = EarthformerForPrediction(config)
    matrices, others, positions = [], [], []
    for name, parameter in model.named_parameters():
        kind = positions if "position" in name else matrices if parameter.ndim > 1 else others
        kind.append(parameter)
    rate = arguments.learning_rate
    groups = [{"params": others, "lr": rate}, {"params": positions, "lr": rate * arguments.position_rate}]
    optimizers = [Muon(matrices, rate, weight_decay=arguments.weight_decay), torch.optim.AdamW(groups, weight_decay=0)]
    ranks = accelerator.num_processes  # a prepared schedule takes one step per process
    steps = ranks * arguments.warmup_steps, ranks * arguments.max_steps
    schedules = [get_scheduler("cosine", optimizer, *steps) for optimizer in optimizers]
    eval_loader = DataLoader(eval_set, arguments.batch_size)
    model, eval_loader, *both = accelerator.prepare(model, eval_loader, *optimizers, *schedules)
    optimizers, schedules = both[:2], both[2:]
    ema = EMAModel(model.parameters(), decay=arguments.ema_decay)
    accelerator.register_for_checkpointing(ema)

    # What fixes the course of a run: a checkpoint of another course is not continued.
    course = {name: getattr(arguments, name) for name in ("seed", "max_steps", "learning_rate", "warmup_steps")}
    course["samples_per_step"] = arguments.batch_size * ranks
    progress = {"step": 0, "best": float("inf"), "course": course}
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
    for batch in train_loader:
        set_seed(arguments.seed + progress["step"])  # of dropout
        predictions = model(batch["past_values"]).predictions
        loss = intensity_weighted_mse(
            predictions,
            batch["future_values"],
            batch["future_observed_mask"],
            arguments.intensity_weight,
        )
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
            score = evaluate(model, eval_loader, accelerator)
            if score < progress["best"]:
                progress["best"] = score
                if accelerator.is_main_process:
                    accelerator.unwrap_model(model).save_pretrained(arguments.output_dir)
                    extractor.save_pretrained(arguments.output_dir)
            ema.restore(model.parameters())
            tqdm.write(f"step {progress['step']}: validation MSE {score:.6f}, best {progress['best']:.6f}")
        if progress["step"] % arguments.save_every == 0 or at_end:
            save(accelerator, checkpoint, progress)
    accelerator.end_training()


if __name__ == "__main__":
    main()
