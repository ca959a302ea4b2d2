"""Train an Earthformer on open radar or sea-surface-temperature data. The same command resumes an interrupted run.

    python examples/train_earthformer.py --recipe examples/configs/earthformer_radar_tiny.yaml --output_dir runs/radar

Every `save_every` steps the complete state is written to OUTPUT_DIR/checkpoints; the model with the best score on the
validation split is in OUTPUT_DIR, ready for `from_pretrained`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.baselines import OceanRecord, linear_maps
from earthformer_hf.data import open_radar, open_sst
from earthformer_hf.data.windows import TrainingWindows, Windows, heavy_share
from earthformer_hf.losses import intensity_weighted_mse
from earthformer_hf.training import TrainingArguments, mean_over, parse_recipe, train


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
        default=None, metadata={"help": "draw windows by how much of them reaches this stored value"}
    )
    heavy_part: str = field(default="future", metadata={"help": "the part of a window that counts: future or context"})
    teacher_weight: float = field(default=0.0, metadata={"help": "share of the target taken from a linear forecast"})
    frame_stride: int = field(default=1, metadata={"help": "2 takes every other frame"})
    eval_stride: int = field(default=4, metadata={"help": "frames between validation windows"})


@dataclass
class ForecastArguments(TrainingArguments):
    pretrained: str | None = field(default=None, metadata={"help": "start from this model instead of random weights"})
    intensity_weight: float = field(default=0.0, metadata={"help": "weight of intense values in the loss"})
    intensity_power: float = field(default=1.0, metadata={"help": "how steeply that weight grows with the value"})


def load_windows(
    data: DataArguments, extractor: EarthformerFeatureExtractor, lengths: tuple[int, int], seed: int
) -> tuple[TrainingWindows, Windows]:
    """The varied windows of the training split and the plain ones of the validation split."""
    path = Path(os.environ.get("EARTHFORMER_HF_DATA", "../shared/data")) / data.file
    if data.source not in SOURCES:
        raise SystemExit(f"--source must be one of {sorted(SOURCES)}, got {data.source!r}.")
    events = SOURCES[data.source](path, "train", **data.train_options)
    highest = (
        (extractor.valid_range[1] - extractor.offset) * extractor.scale if extractor.valid_range else float("inf")
    )
    if data.teacher_weight:
        if data.source != "open_sst":
            raise SystemExit(f"--teacher_weight needs the source open_sst, got {data.source!r}.")
        for event in events:
            event["teacher"] = linear_maps(OceanRecord(event, open_sst.nino34, *lengths), event["geo"]["lat"])
    windows = Windows(events, extractor.encode, *lengths, frame_stride=data.frame_stride)
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
    val = SOURCES[data.source](path, "val")
    return train_set, Windows(val, extractor.encode, *lengths, data.eval_stride, data.frame_stride)


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
            model(batch["past_values"]).predictions,
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

    train(model, loss_of, train_set, score_of, save_best, arguments)


if __name__ == "__main__":
    main()
