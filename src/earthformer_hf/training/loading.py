"""What the training scripts train on: windows of a data set as its recipe asks for them, and their latents."""

import json
from dataclasses import asdict

import numpy as np
from accelerate import PartialState
from diffusers import AutoencoderKL

from ..data import TrainingWindows, Windows, load_dataset
from ..data.latents import EncodedWindows
from ..data.open_sst import nino34
from ..data.windows import heavy_share
from ..evaluation.baselines import OceanRecord, linear_maps
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .arguments import DataArguments, LatentArguments


def load_windows(
    data: DataArguments, extractor: EarthformerFeatureExtractor, lengths: tuple[int, int], seed: int
) -> tuple[TrainingWindows, Windows]:
    """The varied windows of the training split and the plain ones of the validation split.

    Args:
        extractor: turns stored values into the model's range.
        lengths: frames of context and prediction.
        seed: of the order and variation of the training windows.

    Raises:
        ValueError: the data are not there, or an option does not suit them.
    """
    events = load_dataset(data.source, data.data_dir, "train", **data.options, **data.train_options)
    validation_events = load_dataset(data.source, data.data_dir, "val", **data.options)
    if data.teacher_weight:
        if data.source != "open-sst":
            raise ValueError(f"`teacher_weight` needs the source open-sst, got {data.source!r}.")
        events = [
            event | {"teacher": linear_maps(OceanRecord(event, nino34, *lengths), np.array(event["geo"]["lat"]))}
            for event in events
        ]
    windows = Windows(events, extractor.encode, *lengths, data.train_stride, data.frame_stride)
    weights = None
    if data.heavy_threshold is not None:
        weights = heavy_share(windows, data.heavy_threshold, data.heavy_part)
    highest = float("inf")
    if extractor.valid_range is not None:
        highest = (extractor.valid_range[1] - extractor.offset) * extractor.scale
    train_set = TrainingWindows(windows, seed, data.turn, data.gain, data.mix, highest, data.teacher_weight, weights)
    return train_set, Windows(validation_events, extractor.encode, *lengths, data.eval_stride, data.frame_stride)


def load_latents(
    data: DataArguments,
    arguments: LatentArguments,
    extractor: EarthformerFeatureExtractor,
    vae: AutoencoderKL,
    lengths: tuple[int, int],
) -> tuple[EncodedWindows, EncodedWindows]:
    """The windows of [`load_windows`] in the latents of an autoencoder, which is moved to the device of training."""
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed)
    vae.to(PartialState().device)
    description = json.dumps([asdict(data), extractor.to_dict(), lengths, arguments.seed], sort_keys=True)
    return (
        EncodedWindows(
            train_set, vae, arguments.encoded_windows, arguments.latents, f"train {description}", arguments.seed
        ),
        EncodedWindows(eval_set, vae, len(eval_set), arguments.latents, f"val {description}"),
    )


__all__ = ["load_latents", "load_windows"]
