"""Forecasters: models, pipelines and forecasts without a neural network, each a function of a window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..data import Windows, load_dataset
from ..data import windows as windows_of
from ..data.events import builder_of
from ..data.open_radar import rain_rate, stored_code
from ..data.open_sst import nino34
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from . import baselines
from .protocols import Protocol


@dataclass(frozen=True)
class Window:
    """A window in stored units.

    Args:
        number, start: among the windows of the data set, and its first frame in the event.
        event: see `earthformer_hf.data`.
        past: (T_in, H, W[, C]), missing values as the source codes them.
        filled_past: the same, missing values replaced by the data set's fill value.
        future: (T_out, H, W[, C]), the truth; no forecaster looks at it.
        observed: bool, shape of `future`.
        covariates: (T_in + T_out, H, W, K) or None.
    """

    number: int
    start: int
    event: dict
    past: np.ndarray
    filled_past: np.ndarray
    future: np.ndarray
    observed: np.ndarray
    covariates: np.ndarray | None


Forecaster = Callable[[Window], np.ndarray]


def data_extractor(protocol: Protocol) -> EarthformerFeatureExtractor:
    """What the stored numbers of the protocol's data set are: missing values, fill value, physical units."""
    return EarthformerFeatureExtractor(**builder_of(protocol.dataset).FACTS.feature_extractor)


def protocol_windows(protocol: Protocol, data_dir: str | Path | None = None, split: str | None = None) -> Windows:
    """The windows of a protocol, in the range of [`data_extractor`]; of another split if one is named."""
    table = load_dataset(protocol.dataset, data_dir, split or protocol.split, **protocol.options)
    lengths, strides = _lengths(protocol), (protocol.window_stride, protocol.frame_stride)
    return windows_of(table, data_extractor(protocol).encode, *lengths, stride=strides[0], frame_stride=strides[1])


def _lengths(protocol: Protocol) -> tuple[int, int]:
    return protocol.context_length, protocol.prediction_length


def window_at(windows: Windows, number: int, extractor: EarthformerFeatureExtractor) -> Window:
    """A window in stored units; `extractor` knows what is missing."""
    index, start = windows.index[number].tolist()
    event, past = windows.events[index], windows.context_length
    frames = windows.raw(number)
    observed = extractor.observed(frames)
    filled = np.where(observed, frames, extractor.fill_value or 0).astype("float32")
    if "observed" in event:
        given = windows.cutter.frames(event, start, "observed")
        observed = observed & (given if given.ndim == observed.ndim else given[..., None])
    covariates = windows.cutter.frames(event, start, "covariates") if "covariates" in event else None
    return Window(number, start, event, frames[:past], filled[:past], frames[past:], observed[past:], covariates)


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
    """Ensembles of a [`PreDiffPipeline`]; the noise of a window follows from its number."""
    pipeline.set_progress_bar_config(disable=True)

    def forecast(window: Window) -> np.ndarray:
        ensemble = pipeline(
            **pipeline.feature_extractor(window.past),
            ensemble_size=ensemble_size,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(window.number),
        ).predictions[0]
        return pipeline.feature_extractor.decode(ensemble.reshape(-1, *window.future.shape))

    return forecast


RAIN_BASELINES = ("extrapolation", "s-prog", "anvil", "steps")


def baseline_forecaster(
    name: str, protocol: Protocol, load: Callable[[str], Windows], ensemble_size: int = 8
) -> Forecaster:
    """A forecast without a neural network, see `baselines.py`.

    Args:
        name: "persistence", "dressed persistence" (an ensemble), or one of `RAIN_BASELINES` or
            `OceanForecaster.MODELS`.
        protocol: whose windows are forecast.
        load: split -> its windows, for what is fitted.
        ensemble_size: of ensembles.

    Raises:
        ValueError: another name.
        ImportError: it needs pysteps, which is not installed.
    """
    if name == "persistence":
        return lambda window: baselines.persistence(window.filled_past, protocol.prediction_length)
    if name == "dressed persistence":
        return _dressed_persistence(protocol, load(protocol.training_split), ensemble_size)
    if name in RAIN_BASELINES:
        return _rain_forecaster(name, protocol, ensemble_size)
    if name in OceanForecaster.MODELS:
        return OceanForecaster(name, protocol, load)
    known = ("persistence", "dressed persistence", *RAIN_BASELINES, *OceanForecaster.MODELS)
    raise ValueError(f"`name` must be one of {known}, got {name!r}.")


def _dressed_persistence(protocol: Protocol, training: Windows, ensemble_size: int) -> Forecaster:
    """With errors of training windows that are drawn anew for each window."""
    extractor = data_extractor(protocol)

    def forecast(window: Window) -> np.ndarray:
        random, errors = np.random.default_rng(window.number), []
        for number in random.integers(len(training), size=ensemble_size):
            other = window_at(training, int(number), extractor)
            known = other.observed & extractor.observed(other.past[-1])
            errors.append(np.where(known, other.future.astype("float64") - other.past[-1], 0.0))
        return baselines.dressed_persistence(window.filled_past, np.stack(errors))

    return forecast


def _rain_forecaster(name: str, protocol: Protocol, ensemble_size: int) -> Forecaster:
    """Nowcasts of the rain rate, coded to half a dB as the data are."""
    if not baselines.has_extrapolation():
        raise ImportError("pysteps is not installed: pip install 'earthformer-hf[optical-flow]'")
    extractor, future = data_extractor(protocol), protocol.prediction_length
    kilometers = float(extractor.grid_spacing.split()[0])

    def forecast(window: Window) -> np.ndarray:
        past, reachable = extractor.to_physical(window.filled_past), None
        if name == "extrapolation":
            rain, reachable = baselines.extrapolation(past, future)
        elif name == "steps":
            minutes = window.event["geo"]["minutes"] * protocol.frame_stride
            rain = baselines.steps_ensemble(past, future, ensemble_size, minutes, kilometers, seed=window.number)
        else:
            rain = {"s-prog": baselines.sprog, "anvil": baselines.anvil}[name](past, future)
        codes = np.round(extractor.from_physical(rain_rate(stored_code(rain))))
        return codes if reachable is None else np.ma.masked_array(codes, ~reachable)

    return forecast


class OceanForecaster:
    """Forecasts of the index: fitted on the training record, with the setting that is best on the validation record.

    Args:
        name, protocol, load: as for [`baseline_forecaster`]; both splits must hold a single record.
    """

    MODELS: ClassVar[dict[str, tuple[Callable, Mapping[str, Sequence]]]] = {
        "damped persistence": (baselines.damped_persistence, {}),
        "linear inverse model": (baselines.linear_inverse_model, baselines.LINEAR_INVERSE_GRID),
        "seasonal ridge": (baselines.seasonal_ridge, baselines.SEASONAL_RIDGE_GRID),
    }

    def __init__(self, name: str, protocol: Protocol, load: Callable[[str], Windows]):
        splits = protocol.training_split, protocol.validation_split
        (training,), (validation,) = (load(split).events for split in splits)
        self.lengths = _lengths(protocol)
        self.train, self.lat = self.record(training), np.asarray(training["geo"]["lat"])
        self.model, grid = self.MODELS[name]
        self.setting: dict[str, Any] = {}
        if grid:
            self.setting = baselines.best_setting(self.model, self.train, self.record(validation), self.lat, grid)
        self.forecasts: dict[str, np.ndarray] = {}  # event -> (starts, leads)

    def record(self, event: dict) -> baselines.OceanRecord:
        return baselines.OceanRecord(event, nino34, *self.lengths)

    def __call__(self, window: Window) -> np.ndarray:
        event = window.event["id"]
        if event not in self.forecasts:
            lat = {"lat": self.lat} if self.setting else {}
            self.forecasts[event] = self.model(self.train, self.record(window.event), **lat, **self.setting)
        return self.forecasts[event][window.start]
