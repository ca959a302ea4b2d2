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
from ..data import Windows
from ..data.events import SOURCES, builder_of, options_of
from ..data.hosted import open_table
from ..data.measures import DataFacts
from ..data.open_sst import nino34
from ..data.rain import RainCoding, lowest_value, rain_coding
from ..data.sevir import code_of_vil, vil_of_code
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..pipeline_prediff import PreDiffPipeline
from ..sharing.loading import load, to_single_precision
from . import baselines
from .data_facts import facts_of_events
from .protocols import BASELINES, Protocol


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
        past_observed, observed: bool, shapes of `past` and of `future`.
        covariates: (T_in + T_out, H, W, K) or None.
        time: of `past`, (T_in,) datetime64, or None.
    """

    index: int
    start: int
    event: dict
    past: np.ndarray
    filled_past: np.ndarray
    future: np.ndarray
    past_observed: np.ndarray
    observed: np.ndarray
    covariates: np.ndarray | None
    time: np.ndarray | None = None


Forecaster = Callable[[Window], np.ndarray]


# ---------------------------------------------------------------------------------------------------------------------
# The windows of a protocol
# ---------------------------------------------------------------------------------------------------------------------


def data_extractor(protocol: Protocol) -> EarthformerFeatureExtractor:
    """What the stored numbers of the protocol's data set are: missing values, fill value, physical units.

    From the source, and from `feature_extractor` of the protocol, which comes first.
    """
    known: dict[str, Any] = {}
    if protocol.dataset in SOURCES:
        known = builder_of(protocol.dataset).facts_of(protocol.options).feature_extractor
    return EarthformerFeatureExtractor(**(known | protocol.feature_extractor))


def protocol_windows(protocol: Protocol, data_dir: str | Path | None = None, split: str | None = None) -> Windows:
    """The windows of a protocol, in the range of [`data_extractor`]; of another split if one is named.

    Raises:
        ValueError: the data are not there, or the split is too short.
    """
    split = split or protocol.split
    table = open_table(protocol.dataset, data_dir, split, **protocol.options)
    strides = {"stride": protocol.window_stride, "frame_stride": protocol.frame_stride}
    encode = data_extractor(protocol).encode
    try:
        return data.windows(table, encode, *window_lengths(protocol), **strides)
    except ValueError as reason:
        words = f"`dataset`, {split!r} of {protocol.dataset}: {reason}"
        if protocol.dataset in SOURCES and {"fractions", "dates"} <= options_of(builder_of(protocol.dataset)):
            frames = sum(map(len, table["time"][:]))
            words += (
                f" {split!r} holds {frames} frames in {len(table)} events; `fractions` or `dates` may give it more."
            )
        raise ValueError(words) from reason


def window_lengths(protocol: Protocol) -> tuple[int, int]:
    """Frames of past and future."""
    return protocol.context_length, protocol.prediction_length


def window_at(windows: Windows, index: int, extractor: EarthformerFeatureExtractor) -> Window:
    """A window in stored units; `extractor` knows what is missing.

    Of one without any observed context the future counts as not observed: there is nothing to forecast from.
    """
    event_index, start = windows.index[index].tolist()
    event, past = windows.events[event_index], windows.context_length
    frames = windows.raw(index)
    observed = extractor.observed(frames)
    filled = np.where(observed, frames, extractor.fill_value or 0).astype("float32")
    if "observed" in event:
        given = windows.cutter.frames(event, start, "observed")
        observed = observed & (given if given.ndim == observed.ndim else given[..., None])
    if not observed[:past].any():
        observed = np.zeros_like(observed)
    covariates = windows.cutter.frames(event, start, "covariates") if "covariates" in event else None
    time = windows.cutter.frames(event, start, "time")[:past] if "time" in event else None
    masks = observed[:past], observed[past:]
    return Window(index, start, event, frames[:past], filled[:past], frames[past:], *masks, covariates, time)


# ---------------------------------------------------------------------------------------------------------------------
# Neural networks
# ---------------------------------------------------------------------------------------------------------------------


def model_forecaster(model, extractor: EarthformerFeatureExtractor) -> Forecaster:
    """Forecasts of an [`EarthformerForPrediction`] and its feature extractor."""

    @torch.inference_mode()
    def forecast(window: Window) -> np.ndarray:
        past = window.past[None] if window.past.ndim == 4 else window.past
        inputs = dict(extractor(past, time=window.time))
        inputs["past_observed_mask"] = torch.from_numpy(window.past_observed).reshape(inputs["past_values"].shape)
        if window.covariates is not None and model.config.num_covariates:
            covariates = torch.from_numpy(window.covariates[None])
            inputs["past_covariates"] = covariates[:, : len(window.past)]
            inputs["future_covariates"] = covariates[:, len(window.past) :]
        predictions = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).predictions[0]
        return extractor.decode(predictions.reshape(window.future.shape))

    return forecast


def pipeline_forecaster(pipeline, ensemble_size: int = 8, num_inference_steps: int = 10) -> Forecaster:
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


@dataclass(frozen=True)
class LoadedModel:
    """A model or pipeline that was loaded to be scored.

    Args:
        forecaster: of it.
        extractor: its feature extractor.
        folder: of its weights.
        settings: with which a pipeline draws its ensembles; empty of a model.
    """

    forecaster: Forecaster
    extractor: EarthformerFeatureExtractor
    folder: Path
    settings: dict[str, Any]


def load_forecaster(model: str | Path, ensemble_size: int = 8, num_inference_steps: int = 10) -> LoadedModel:
    """The forecaster of a model or pipeline, on this process's device.

    Args:
        model: a folder or a hub id.
        ensemble_size, num_inference_steps: of a pipeline.

    Raises:
        ValueError: no model, one without a feature extractor, or an ensemble of fewer than 2 members.
    """
    folder, loaded, extractor = load(model)
    extractor = extractor or getattr(loaded, "feature_extractor", None)
    if extractor is None:
        raise ValueError(f"`model`: {model} has no feature extractor.")
    to_single_precision(loaded, PartialState().device)
    if isinstance(loaded, PreDiffPipeline):
        check_ensemble_size(ensemble_size, f"the pipeline {model}")
        settings = {"num_inference_steps": num_inference_steps, "scheduler": type(loaded.scheduler).__name__}
        forecaster = pipeline_forecaster(loaded, ensemble_size, num_inference_steps)
        return LoadedModel(forecaster, extractor, folder, settings)
    return LoadedModel(model_forecaster(loaded.eval(), extractor), extractor, folder, {})


def check_ensemble_size(ensemble_size: int, what: str) -> None:
    """ValueError unless there are 2 members or more, without which nothing can be said of an ensemble."""
    if ensemble_size < 2:
        raise ValueError(f"`ensemble_size` must be at least 2 for {what}, got {ensemble_size}.")


# ---------------------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------------------

RAIN_BASELINES = ("extrapolation", "s-prog", "anvil", "steps")


def baseline_forecaster(
    name: str,
    protocol: Protocol,
    load_split: Callable[[str], Windows],
    ensemble_size: int = 8,
    facts: DataFacts | None = None,
) -> Forecaster:
    """A forecast without a neural network, see `baselines.py`.

    Args:
        name: of `BASELINES` in `protocols.py`.
        protocol: whose windows are forecast.
        load_split: split -> its windows, for baselines that learn from the training split.
        ensemble_size: of ensembles.
        facts: of the data; those of each window's event if omitted.

    Raises:
        ValueError: another name, or, by that name, why it cannot work on the data.
        ImportError: it needs pysteps, which is not installed.
    """
    if name not in BASELINES:
        raise ValueError(f"`name` must be one of {tuple(BASELINES)}, got {name!r}.")
    if BASELINES[name] == "ensemble":
        check_ensemble_size(ensemble_size, f"the baseline {name!r}")
    if name == "persistence":
        return lambda window: baselines.persistence(window.filled_past, protocol.prediction_length)
    if name == "last clear value":
        return lambda window: baselines.last_clear_value(
            window.filled_past, window.past_observed, protocol.prediction_length
        )
    try:
        if name == "advection":
            return _advection(protocol)
        if name == "dressed persistence":
            return _dressed_persistence(protocol, load_split(protocol.training_split), ensemble_size, facts)
        if name in RAIN_BASELINES:
            return RainForecaster(name, protocol, ensemble_size, facts)
        return OceanForecaster(name, protocol, load_split)
    except (ValueError, LookupError) as reason:
        raise ValueError(f"the baseline {name!r} cannot work on these data: {reason}") from reason


def protocol_baselines(
    protocol: Protocol,
    data_dir: str | Path | None = None,
    ensemble_size: int = 8,
    facts: DataFacts | None = None,
    further: Sequence[str] = (),
) -> tuple[dict[str, Forecaster], dict[str, str]]:
    """Baselines of a protocol, and further ones, by name; and of each whose libraries are not installed, the reason.

    The EarthNetScore is always shown beside that of the last clear value: the persistence of its authors
    (Requena-Mesa et al., 2021, section 5).

    Raises:
        ValueError: a further one that is unknown, or of which the protocol scores nothing.
    """
    for name in further:
        if name not in BASELINES:
            raise ValueError(f"`further_baselines` must be of {tuple(BASELINES)}, got {name!r}.")
        protocol.families_of(BASELINES[name], f"the baseline {name!r}")
    forecasters: dict[str, Forecaster] = {}
    left_out: dict[str, str] = {}
    load_split = partial(protocol_windows, protocol, data_dir)
    earthnet = ("last clear value",) if "earthnet" in protocol.scores else ()
    for name in dict.fromkeys((*protocol.baselines, *earthnet, *further)):
        try:
            forecasters[name] = baseline_forecaster(name, protocol, load_split, ensemble_size, facts)
        except ImportError as reason:
            left_out[name] = str(reason)
    return forecasters, left_out


def _facts_of_window(window: Window, protocol: Protocol) -> DataFacts:
    event = window.event
    return facts_of_events([(str(event["id"]), event.get("time", ()), event.get("geo", {}))], protocol)


def _advection(protocol: Protocol) -> Forecaster:
    """The last frame along its motion; what it cannot reach is masked."""
    if protocol.context_length < baselines.CONTEXT["advection"]:
        raise ValueError(f"it needs a context of {baselines.CONTEXT['advection']} frames")

    def forecast(window: Window) -> np.ndarray:
        scaled = window.filled_past / np.float32(protocol.value_range)
        values, reachable = baselines.advection(scaled, window.past_observed, protocol.prediction_length)
        return np.ma.masked_array(values * np.float32(protocol.value_range), ~reachable)

    return forecast


def _dressed_persistence(
    protocol: Protocol, training: Windows, ensemble_size: int, facts: DataFacts | None
) -> Forecaster:
    """Persistence plus its errors in other, random windows of the training split."""
    extractor = data_extractor(protocol)

    def forecast(window: Window) -> np.ndarray:
        random, errors = np.random.default_rng(window.index), []
        for index in random.integers(len(training), size=ensemble_size):
            other = window_at(training, int(index), extractor)
            known = other.observed & extractor.observed(other.past[-1])
            errors.append(np.where(known, other.future.astype("float64") - other.past[-1], 0.0))
        lowest = lowest_value(extractor, facts or _facts_of_window(window, protocol))
        return baselines.dressed_persistence(window.filled_past, np.stack(errors), lowest)

    return forecast


class RainForecaster:
    """Nowcasts of the rain rate by pysteps, in stored units; of SEVIR, of vertically integrated liquid in kg/m2, which
    rises by decibels as rain does.

    Args:
        name: of `RAIN_BASELINES`.
        protocol, ensemble_size, facts: as for [`baseline_forecaster`].

    Attributes:
        fallbacks: indices of the windows for which the method could not be run, as on a field almost without rain,
            and the extrapolation took its place.

    Raises:
        ValueError: the data are no rain; or "steps" is to work on data of unknown time step or grid spacing.
        ImportError: pysteps is not installed.
    """

    def __init__(self, name: str, protocol: Protocol, ensemble_size: int = 8, facts: DataFacts | None = None):
        if not baselines.is_pysteps_available():
            raise ImportError("pysteps is not installed: pip install 'earthformer-hf[optical-flow]'")
        self.name, self.protocol, self.ensemble_size, self.facts = name, protocol, ensemble_size, facts
        self.extractor, self.fallbacks = data_extractor(protocol), set[int]()
        if facts is not None:
            self.check(facts)
        if protocol.context_length < baselines.CONTEXT[name]:
            raise ValueError(f"it needs a context of {baselines.CONTEXT[name]} frames, got {protocol.context_length}")

    def check(self, facts: DataFacts) -> RainCoding:
        """The coding of the rain, or of SEVIR's; ValueError if there is none, or a step or spacing is missing."""
        if self.name == "steps" and None in (facts.minutes, facts.kilometers):
            raise ValueError(
                f"its noise needs the time step and the grid spacing, got {facts.time_step} and {facts.grid_spacing}; "
                "`feature_extractor` of the protocol may state `time_step` and `grid_spacing`"
            )
        if self.protocol.dataset in ("sevir", "sevir-lr") and self.protocol.options.get("image_type", "vil") == "vil":
            return RainCoding(vil_of_code, lambda vil, dry: code_of_vil(vil))
        return rain_coding(self.extractor, facts)

    def __call__(self, window: Window) -> np.ndarray:
        facts, future = self.facts or _facts_of_window(window, self.protocol), self.protocol.prediction_length
        coding, reachable = self.check(facts), None
        if window.past.ndim != 3:
            raise ValueError(f"the baseline {self.name!r} takes one variable (T, H, W), got {window.past.shape}.")
        past = np.where(window.past_observed, coding.to_rain(window.filled_past), 0)
        options: dict[str, Any] = {"on_fallback": lambda: self.fallbacks.add(window.index)}
        if self.name == "extrapolation":
            rain, reachable = baselines.extrapolation(past, future)
        elif self.name == "steps":
            options |= {"minutes": facts.minutes, "kilometers": facts.kilometers, "seed": window.index}
            rain = baselines.steps_ensemble(past, future, self.ensemble_size, **options)
        else:
            rain = {"s-prog": baselines.sprog, "anvil": baselines.anvil}[self.name](past, future, **options)
        dry = window.past[window.past_observed].min(initial=0)  # in dBZ; 0 dBZ is no rain in any case
        values = coding.from_rain(rain, dry)
        return values if reachable is None else np.ma.masked_array(values, ~reachable)


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
    "LoadedModel",
    "OceanForecaster",
    "RainForecaster",
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
