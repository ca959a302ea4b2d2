"""What the training scripts train on: windows of a data set as its recipe asks for them, and their latents."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate import PartialState
from diffusers import AutoencoderKL

from ..data import TrainingWindows, Windows
from ..data.events import Events
from ..data.hosted import cached, open_table
from ..data.latents import EncodedWindows, own_entries
from ..data.open_sst import nino34
from ..data.tiles import Tiles
from ..data.windows import heavy_share
from ..evaluation.baselines import OceanRecord, linear_maps
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..modeling_earthformer import EarthformerForPrediction
from .arguments import DataArguments, LatentArguments


def load_windows(
    data: DataArguments,
    extractor: EarthformerFeatureExtractor,
    lengths: tuple[int, int],
    seed: int,
    image_size: Sequence[int] | None = None,
) -> tuple[TrainingWindows, Windows]:
    """The varied windows of the training split and the plain ones of the validation split.

    Args:
        extractor: turns stored values into the model's range.
        lengths: frames of context and prediction.
        seed: of the order and variation of the training windows.
        image_size: height and width that the model takes; any, but the same everywhere, if omitted.

    Raises:
        ValueError: the data are not there, an option does not suit them, they are of another or several sizes, or a
            split is too short for a window or for the processes.
    """
    events: Any = load_events(data, data.train_split, image_size, **data.options, **data.train_options)
    validation_events: Any = load_events(data, data.eval_split, image_size or events.shapes[0][1:3], **data.options)
    if data.teacher_weight:
        if data.source != "open-sst":
            raise ValueError(f"`teacher_weight` needs the source open-sst, got {data.source!r}.")
        events = [
            event | {"teacher": linear_maps(OceanRecord(event, nino34, *lengths), np.array(event["geo"]["lat"]))}
            for event in events
        ]
    if extractor.time_features is not None:
        events, validation_events = (_in_season(part, extractor) for part in (events, validation_events))
    windows = _cut(data, data.train_split, events, extractor, lengths, data.train_stride)
    eval_set = _cut(data, data.eval_split, validation_events, extractor, lengths, data.eval_stride)
    if len(eval_set) < PartialState().num_processes:
        raise ValueError(
            f"`data`: {data.eval_split!r} of {data.source} must hold a window for each of "
            f"{PartialState().num_processes} processes, got {len(eval_set)}."
        )
    weights = None
    if data.heavy_threshold is not None:
        weights = heavy_share(windows, data.heavy_threshold, data.heavy_part)
        if weights.max() == weights.min():
            raise ValueError(f"`heavy_threshold`: {data.heavy_threshold} tells no window from the others.")
    if data.gain != 1 and extractor.transform is not None:
        raise ValueError(f"`gain` needs an extractor without `transform`, got {extractor.transform!r}.")
    highest = float("inf")
    if extractor.valid_range is not None:
        highest = (extractor.valid_range[1] - extractor.offset) * extractor.scale
    train_set = TrainingWindows(windows, seed, data.turn, data.gain, data.mix, highest, data.teacher_weight, weights)
    return train_set, eval_set


def _in_season(events: Sequence[dict], extractor: EarthformerFeatureExtractor) -> list[dict]:
    """Events with the time features of their frames."""
    return [event | {"time_features": extractor.time_features_of(event["time"])} for event in events]


def _cut(
    data: DataArguments,
    split: str,
    events: Any,
    extractor: EarthformerFeatureExtractor,
    lengths: tuple[int, int],
    stride: int,
) -> Windows:
    """The windows of a split's events; what is wrong with them names the split."""
    try:
        return Windows(events, extractor.encode, *lengths, stride, data.frame_stride, on_missing=data.on_missing)
    except ValueError as reason:
        raise ValueError(f"`data`, {split!r} of {data.source}: {reason}") from reason


def load_events(data: DataArguments, split: str, image_size: Sequence[int] | None, **options: Any) -> Events | Tiles:
    """The events of a source's split, or of a data set that was prepared, in one size.

    Args:
        split: in the notation of `datasets`.
        image_size: height and width that they must have; the first event's if omitted.
        options: of a source.

    Raises:
        ValueError: there are no such data, or they are of another size.
    """
    table = open_table(data.source, data.data_dir, split, **options)
    events: Events | Tiles = Events(cached(table, data.cache_dir) if data.cache_dir else table)
    if data.tile is not None:
        events = Tiles(events, data.tile)
    expected = tuple(image_size or events.shapes[0][1:3])
    for index, shape in enumerate(events.shapes):
        if shape[1:3] != expected:
            raise ValueError(
                f"`data`: frames of {data.source}, {split!r}, must all be {expected[0]} x {expected[1]}, event "
                f"{events[index]['id']!r} has {shape[1]} x {shape[2]}; `tile` of the recipe cuts tiles of one size."
            )
    return events


def run_settings(
    data: DataArguments,
    extractor: EarthformerFeatureExtractor,
    config: Mapping[str, Any],
    train_set: TrainingWindows | EncodedWindows,
    eval_set: Windows | EncodedWindows,
) -> dict[str, Any]:
    """What a run follows from beside its arguments: for [`~earthformer_hf.training.Run`].

    Args:
        config: of the model that is trained, a transformers `to_dict()` or a diffusers `config`.
    """
    return {
        "data": _choices(data) | {"digest": train_set.digest, "eval_digest": eval_set.digest},
        "feature_extractor": extractor.to_dict(),
        "model": own_entries(config),
    }


def _choices(data: DataArguments) -> dict[str, Any]:
    """What was chosen of the data, but for the folders where they lie."""
    return {name: value for name, value in asdict(data).items() if name not in ("data_dir", "cache_dir")}


def load_latents(
    data: DataArguments,
    arguments: LatentArguments,
    extractor: EarthformerFeatureExtractor,
    vae: AutoencoderKL,
    lengths: tuple[int, int],
    forecaster: EarthformerForPrediction | None = None,
) -> tuple[EncodedWindows, EncodedWindows]:
    """The windows of [`load_windows`] in the latents of an autoencoder, and the forecasts of a forecaster if there is
    one. Both networks are moved to the device of training."""
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed)
    vae.to(PartialState().device)
    if forecaster is not None:
        forecaster.to(PartialState().device)
    made_of = [_choices(data), extractor.to_dict(), lengths, arguments.seed, train_set.digest, eval_set.digest]
    description = json.dumps(made_of, sort_keys=True)
    folder, count, seed = arguments.latents, arguments.encoded_windows, arguments.seed
    return (
        EncodedWindows(train_set, vae, count, folder, f"train {description}", seed, forecaster),
        EncodedWindows(eval_set, vae, len(eval_set), folder, f"val {description}", forecaster=forecaster),
    )


__all__ = ["load_events", "load_latents", "load_windows", "run_settings"]
