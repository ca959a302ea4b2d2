"""Forecasters: models, pipelines, and forecasts without a neural network, each a function of a [`Window`].

A forecaster returns what follows in stored units: maps (T_out, H, W[, C]), an ensemble (E, T_out, H, W), or, under a
protocol of an index, the index (leads,).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState

from .. import data
from ..data import Windows, load_dataset
from ..data.events import builder_of
from ..data.open_radar import rain_rate, stored_code
from ..data.open_sst import nino34
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..pipeline_prediff import PreDiffPipeline
from ..sharing.push import load
from . import baselines
from .protocols import Protocol


@dataclass(frozen=True)
class Window:
    """A window in stored units.

    Args:
        index: of the window among those of the data set.
        start: its first frame in the event.
        event: see `earthformer_hf.data`.
        past: (T_in, H, W[, C]), missing values as the source codes them.
        filled_past: the same, missing values replaced by the data set's fill value.
        future: (T_out, H, W[, C]), the truth; no forecaster looks at it.
        observed: bool, shape of `future`.
        covariates: (T_in + T_out, H, W, K) or None.
    """

    index: int
    start: int
    event: dict
    past: np.ndarray
    filled_past: np.ndarray
    future: np.ndarray
    observed: np.ndarray
    covariates: np.ndarray | None


Forecaster = Callable[[Window], np.ndarray]


# ---------------------------------------------------------------------------------------------------------------------
# The windows of a protocol
# ---------------------------------------------------------------------------------------------------------------------


def data_extractor(protocol: Protocol) -> EarthformerFeatureExtractor:
    """What the stored numbers of the protocol's data set are: missing values, fill value, physical units."""
    return EarthformerFeatureExtractor(**builder_of(protocol.dataset).FACTS.feature_extractor)


def protocol_windows(protocol: Protocol, data_dir: str | Path | None = None, split: str | None = None) -> Windows:
    """The windows of a protocol, in the range of [`data_extractor`]; of another split if one is named."""
    table = load_dataset(protocol.dataset, data_dir, split or protocol.split, **protocol.options)
    strides = {"stride": protocol.window_stride, "frame_stride": protocol.frame_stride}
    return data.windows(table, data_extractor(protocol).encode, *window_lengths(protocol), **strides)


def window_lengths(protocol: Protocol) -> tuple[int, int]:
    """Frames of past and future."""
    return protocol.context_length, protocol.prediction_length


def window_at(windows: Windows, index: int, extractor: EarthformerFeatureExtractor) -> Window:
    """A window in stored units; `extractor` knows what is missing."""
    event_index, start = windows.index[index].tolist()
    event, past = windows.events[event_index], windows.context_length
    frames = windows.raw(index)
    observed = extractor.observed(frames)
    filled = np.where(observed, frames, extractor.fill_value or 0).astype("float32")
    if "observed" in event:
        given = windows.cutter.frames(event, start, "observed")
        observed = observed & (given if given.ndim == observed.ndim else given[..., None])
    covariates = windows.cutter.frames(event, start, "covariates") if "covariates" in event else None
    return Window(index, start, event, frames[:past], filled[:past], frames[past:], observed[past:], covariates)


# ---------------------------------------------------------------------------------------------------------------------
# Neural networks
# ---------------------------------------------------------------------------------------------------------------------


def model_forecaster(model, extractor: EarthformerFeatureExtractor) -> Forecaster:
    """Forecasts of an [`EarthformerForPrediction`] and its feature extractor."""

    @torch.inference_mode()
    def forecast(window: Window) -> np.ndarray:
        inputs = dict(extractor(window.past[None] if window.past.ndim == 4 else window.past))
        if window.covariates is not None and model.config.num_covariates:
            covariates = torch.from_numpy(window.covariates[None])
            inputs["past_covariates"] = covariates[:, : len(window.past)]
            inputs["future_covariates"] = covariates[:, len(window.past) :]
        predictions = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).predictions[0]
        return extractor.decode(predictions.reshape(window.future.shape))

    return forecast


def pipeline_forecaster(pipeline, ensemble_size: int = 8, num_inference_steps: int = 20) -> Forecaster:
    """Ensembles of a [`PreDiffPipeline`]; the index of a window seeds its noise."""
    pipeline.set_progress_bar_config(disable=True)

    def forecast(window: Window) -> np.ndarray:
        ensemble = pipeline(
            **pipeline.feature_extractor(window.past),
            ensemble_size=ensemble_size,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(window.index),
        ).predictions[0]
        return pipeline.feature_extractor.decode(ensemble.reshape(-1, *window.future.shape))

    return forecast


def load_forecaster(
    model: str | Path, ensemble_size: int = 8, num_inference_steps: int = 20
) -> tuple[Forecaster, str | None, Path, dict[str, Any]]:
    """The forecaster of a model or pipeline, on this process's device.

    Args:
        model: a folder or a hub id.
        ensemble_size, num_inference_steps: of a pipeline.

    Returns:
        The forecaster; the name of the protocol that its feature extractor names; the folder of its weights; and the
        settings with which a pipeline draws its ensembles.

    Raises:
        ValueError: no model, or one without a feature extractor.
    """
    folder, loaded, extractor = load(model)
    extractor = extractor or getattr(loaded, "feature_extractor", None)
    if extractor is None:
        raise ValueError(f"`model`: {model} has no feature extractor.")
    device = PartialState().device
    if isinstance(loaded, PreDiffPipeline):
        loaded.to(device, torch.float32)
        settings = {"num_inference_steps": num_inference_steps, "scheduler": type(loaded.scheduler).__name__}
        forecaster = pipeline_forecaster(loaded, ensemble_size, num_inference_steps)
        return forecaster, extractor.protocol, folder, settings
    return model_forecaster(loaded.eval().to(device), extractor), extractor.protocol, folder, {}


# ---------------------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------------------

RAIN_BASELINES = ("extrapolation", "s-prog", "anvil", "steps")


def baseline_forecaster(
    name: str, protocol: Protocol, load_split: Callable[[str], Windows], ensemble_size: int = 8
) -> Forecaster:
    """A forecast without a neural network, see `baselines.py`.

    Args:
        name: "persistence", "dressed persistence" (an ensemble), or one of `RAIN_BASELINES` or
            `OceanForecaster.MODELS`.
        protocol: whose windows are forecast.
        load_split: split -> its windows, for baselines that learn from the training split.
        ensemble_size: of ensembles.

    Raises:
        ValueError: another name.
        ImportError: it needs pysteps, which is not installed.
    """
    if name == "persistence":
        return lambda window: baselines.persistence(window.filled_past, protocol.prediction_length)
    if name == "dressed persistence":
        return _dressed_persistence(protocol, load_split(protocol.training_split), ensemble_size)
    if name in RAIN_BASELINES:
        return _rain_forecaster(name, protocol, ensemble_size)
    if name in OceanForecaster.MODELS:
        return OceanForecaster(name, protocol, load_split)
    known = ("persistence", "dressed persistence", *RAIN_BASELINES, *OceanForecaster.MODELS)
    raise ValueError(f"`name` must be one of {known}, got {name!r}.")


def protocol_baselines(
    protocol: Protocol, data_dir: str | Path | None = None, ensemble_size: int = 8
) -> tuple[dict[str, Forecaster], dict[str, str]]:
    """The baselines of a protocol by name; and of each that cannot be run here, the reason."""
    forecasters: dict[str, Forecaster] = {}
    left_out: dict[str, str] = {}
    for name in protocol.baselines:
        try:
            load_split = partial(protocol_windows, protocol, data_dir)
            forecasters[name] = baseline_forecaster(name, protocol, load_split, ensemble_size)
        except ImportError as reason:
            left_out[name] = str(reason)
    return forecasters, left_out


def _dressed_persistence(protocol: Protocol, training: Windows, ensemble_size: int) -> Forecaster:
    """Persistence plus its errors in other, random windows of the training split."""
    extractor = data_extractor(protocol)

    def forecast(window: Window) -> np.ndarray:
        random, errors = np.random.default_rng(window.index), []
        for index in random.integers(len(training), size=ensemble_size):
            other = window_at(training, int(index), extractor)
            known = other.observed & extractor.observed(other.past[-1])
            errors.append(np.where(known, other.future.astype("float64") - other.past[-1], 0.0))
        return baselines.dressed_persistence(window.filled_past, np.stack(errors))

    return forecast


def _rain_forecaster(name: str, protocol: Protocol, ensemble_size: int) -> Forecaster:
    """Nowcasts of the rain rate, rounded to half a dB of reflectivity as the data are."""
    if not baselines.is_pysteps_available():
        raise ImportError("pysteps is not installed: pip install 'earthformer-hf[optical-flow]'")
    extractor, future = data_extractor(protocol), protocol.prediction_length
    kilometers = float(extractor.grid_spacing.split()[0])

    def forecast(window: Window) -> np.ndarray:
        past, reachable = extractor.to_physical(window.filled_past), None
        if name == "extrapolation":
            rain, reachable = baselines.extrapolation(past, future)
        elif name == "steps":
            minutes = window.event["geo"]["minutes"] * protocol.frame_stride
            rain = baselines.steps_ensemble(past, future, ensemble_size, minutes, kilometers, seed=window.index)
        else:
            rain = {"s-prog": baselines.sprog, "anvil": baselines.anvil}[name](past, future)
        codes = np.round(extractor.from_physical(rain_rate(stored_code(rain))))
        return codes if reachable is None else np.ma.masked_array(codes, ~reachable)

    return forecast


class OceanForecaster:
    """Forecasts of the Nino3.4 index by a model that is fitted on the training record.

    Its `setting` is the one that is best on the validation record.

    Args:
        name, protocol, load_split: as for [`baseline_forecaster`]; both splits must hold a single record.
    """

    MODELS: ClassVar[dict[str, tuple[Callable, Mapping[str, Sequence]]]] = {
        "damped persistence": (baselines.damped_persistence, {}),
        "linear inverse model": (baselines.linear_inverse_model, baselines.LINEAR_INVERSE_GRID),
        "seasonal ridge": (baselines.seasonal_ridge, baselines.SEASONAL_RIDGE_GRID),
    }

    def __init__(self, name: str, protocol: Protocol, load_split: Callable[[str], Windows]):
        splits = protocol.training_split, protocol.validation_split
        (training,), (validation,) = (load_split(split).events for split in splits)
        self.lengths = window_lengths(protocol)
        self.train, self.lat = self.record(training), np.asarray(training["geo"]["lat"])
        self.model, grid = self.MODELS[name]
        self.setting: dict[str, Any] = {}
        if grid:
            self.setting = baselines.best_setting(self.model, self.train, self.record(validation), self.lat, grid)
        self.forecasts: dict[str, np.ndarray] = {}  # event -> (starts, leads)

    def record(self, event: dict) -> baselines.OceanRecord:
        """The months of an event."""
        return baselines.OceanRecord(event, nino34, *self.lengths)

    def __call__(self, window: Window) -> np.ndarray:
        event = window.event["id"]
        if event not in self.forecasts:
            lat = {"lat": self.lat} if self.setting else {}
            self.forecasts[event] = self.model(self.train, self.record(window.event), **lat, **self.setting)
        return self.forecasts[event][window.start]


__all__ = [
    "RAIN_BASELINES",
    "Forecaster",
    "OceanForecaster",
    "Window",
    "baseline_forecaster",
    "data_extractor",
    "load_forecaster",
    "model_forecaster",
    "pipeline_forecaster",
    "protocol_baselines",
    "protocol_windows",
    "window_at",
    "window_lengths",
]
