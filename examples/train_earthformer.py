"""Train an Earthformer on open radar or sea-surface-temperature data. The same command resumes an interrupted run.

    python examples/train_earthformer.py --recipe examples/configs/earthformer_radar_tiny.yaml --output_dir runs/radar

Every `save_every` steps the complete state is written to OUTPUT_DIR/checkpoints; the model with the best score on the
validation split is in OUTPUT_DIR, ready for `from_pretrained`, with its card, and figures of its forecasts.

    torchrun --standalone --nproc_per_node 8 examples/train_earthformer.py --recipe ... --output_dir ...

trains on 8 GPUs (or, without one, 8 processes of the CPU). `total_batch_size` of the recipe stays what it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import send_to_device, set_seed

from earthformer_hf import (
    EarthformerConfig,
    EarthformerFeatureExtractor,
    EarthformerForPrediction,
    load_dataset,
    sharing,
)
from earthformer_hf.data.open_sst import nino34
from earthformer_hf.data.windows import TrainingWindows, Windows, heavy_share
from earthformer_hf.evaluation.baselines import OceanRecord, linear_maps
from earthformer_hf.plotting import plot_events
from earthformer_hf.sharing.cards import write_card
from earthformer_hf.training import Run, TrainingArguments, mean_over, parse_recipe, train
from earthformer_hf.training.losses import intensity_weighted_mse


INPUTS = ("past_values", "past_covariates", "future_covariates")  # of the model, where it takes them


@dataclass
class DataArguments:
    source: str = field(default="", metadata={"help": "name of the data set, as of earthformer_hf.load_dataset"})
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of its files; EARTHFORMER_HF_DATA if omitted"}
    )
    options: dict = field(default_factory=dict, metadata={"help": "of the data set"})
    train_options: dict = field(default_factory=dict, metadata={"help": "further options, for training only"})
    turn: bool = field(default=False, metadata={"help": "draw flips and quarter turns"})
    gain: float = field(default=1.0, metadata={"help": "draw a factor for the values from 1/gain .. gain"})
    mix: bool = field(default=False, metadata={"help": "draw sums of two windows, for anomalies"})
    heavy_threshold: float | None = field(
        default=None, metadata={"help": "draw windows by how much of them reaches this stored value"}
    )
    heavy_part: str = field(default="future", metadata={"help": "the part of a window that counts: future or context"})
    teacher_weight: float = field(default=0.0, metadata={"help": "share of the target taken from a linear forecast"})
    frame_stride: int = field(default=1, metadata={"help": "2 takes every other frame"})
    train_stride: int = field(default=1, metadata={"help": "frames between training windows"})
    eval_stride: int = field(default=4, metadata={"help": "frames between validation windows"})


@dataclass
class PublishedArguments(TrainingArguments):
    push_to_hub: str | None = field(default=None, metadata={"help": "namespace/name to push the best model to"})


@dataclass
class ForecastArguments(PublishedArguments):
    pretrained: str | None = field(default=None, metadata={"help": "start from this model instead of random weights"})
    intensity_weight: float = field(default=0.0, metadata={"help": "weight of intense values in the loss"})
    intensity_power: float = field(default=1.0, metadata={"help": "how steeply that weight grows with the value"})


def load_windows(
    data: DataArguments, extractor: EarthformerFeatureExtractor, lengths: tuple[int, int], seed: int
) -> tuple[TrainingWindows, Windows]:
    """The varied windows of the training split and the plain ones of the validation split."""
    try:
        events = load_dataset(data.source, data.data_dir, "train", **data.options, **data.train_options)
        val = load_dataset(data.source, data.data_dir, "val", **data.options)
    except ValueError as reason:
        raise SystemExit(str(reason)) from reason
    highest = (
        (extractor.valid_range[1] - extractor.offset) * extractor.scale if extractor.valid_range else float("inf")
    )
    if data.teacher_weight:
        if data.source != "open-sst":
            raise SystemExit(f"--teacher_weight needs the source open-sst, got {data.source!r}.")
        events = [
            event | {"teacher": linear_maps(OceanRecord(event, nino34, *lengths), np.array(event["geo"]["lat"]))}
            for event in events
        ]
    windows = Windows(events, extractor.encode, *lengths, data.train_stride, data.frame_stride)
    train_set = TrainingWindows(
        windows,
        seed,
        data.turn,
        data.gain,
        data.mix,
        highest,
        data.teacher_weight,
        None if data.heavy_threshold is None else heavy_share(windows, data.heavy_threshold, data.heavy_part),
    )
    return train_set, Windows(val, extractor.encode, *lengths, data.eval_stride, data.frame_stride)


def forecast_figure(forecast_of: Callable[[dict], torch.Tensor], windows: Windows, extractor):
    """Observed and forecast frames of the window that varies most, in stored units.

    Args:
        forecast_of: a window's inputs as a batch of one -> (T_out, H, W, C) in the model's range.
        extractor: of the model.
    """
    items = [windows[n] for n in np.linspace(0, len(windows) - 1, min(16, len(windows))).astype(int)]
    item = max(items, key=lambda item: item["future_values"].std().item())
    forecast = forecast_of({name: item[name][None] for name in INPUTS if name in item})
    shown = np.unique(np.linspace(0, len(forecast) - 1, 6).astype(int))
    observed = torch.where(item["future_observed_mask"], item["future_values"], torch.nan)
    frames = {"observed": observed, "forecast": forecast.float().cpu()}
    rows = {name: extractor.decode(values[shown, ..., 0]) for name, values in frames.items()}
    label = f"{extractor.variable or 'value'}, {extractor.units or 'units not stated'}"
    return plot_events(rows, {name: [f"frame {n + 1}" for n in shown] for name in rows}, label, "validation")


def describe(data: DataArguments, train_set, eval_set) -> str:
    """What a model is trained on, in words."""
    return f"{data.source}: {len(train_set)} windows for training, {len(eval_set)} for validation."


def publish(run: Run, recipe: dict, description: str):
    """Write the card of what a run has trained, and push both if that was asked for."""
    arguments = run.arguments
    if not run.accelerator.is_main_process or not run.progress["best_step"]:
        return
    progress = run.progress
    write_card(
        arguments.output_dir, recipe, description, steps=progress["step"], batch_size=run.samples,
        num_processes=run.accelerator.num_processes, skipped_steps=progress["skipped"],
        best_step=progress["best_step"], best_loss=progress["best"],
    )  # fmt: skip
    if arguments.push_to_hub:
        folder, model, extractor = sharing.load(arguments.output_dir)
        sharing.push(model, arguments.push_to_hub, extractor, folder / "README.md")


def main():
    recipe, data, arguments = parse_recipe(data=DataArguments, training=ForecastArguments)
    set_seed(arguments.seed)
    config = EarthformerConfig(**recipe["model"])
    extractor = EarthformerFeatureExtractor(**recipe["feature_extractor"])
    lengths = config.context_length, config.prediction_length
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed)
    if arguments.pretrained:
        model = EarthformerForPrediction.from_pretrained(arguments.pretrained, config=config)
    else:
        model = EarthformerForPrediction(config)

    def loss_of(model, batch):
        return intensity_weighted_mse(
            model(**{name: batch[name] for name in INPUTS if name in batch}).predictions,
            batch["future_values"],
            batch["future_observed_mask"],
            arguments.intensity_weight,
            arguments.intensity_power,
        )

    def score_of(model, accelerator) -> float:
        """The same loss over the observed values of the validation split."""

        def total_and_count(batch):
            count = batch["future_observed_mask"].expand_as(batch["future_values"]).sum()
            return loss_of(model, batch).double() * count, count

        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    def save_best(model):
        model.save_pretrained(arguments.output_dir)
        extractor.save_pretrained(arguments.output_dir)

    def figure_of(model):
        def forecast_of(inputs):
            return model(**send_to_device(inputs, model.device)).predictions[0]

        return forecast_figure(forecast_of, eval_set, extractor)

    run = train(model, loss_of, train_set, score_of, save_best, arguments, figure_of)
    publish(run, recipe, describe(data, train_set.windows, eval_set))


if __name__ == "__main__":
    main()
