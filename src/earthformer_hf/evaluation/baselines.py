"""Forecasts without a neural network, to measure one against."""

import contextlib
import io
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ..advection import first_guess
from ..data.open_sst import three_month_means


def persistence(past: np.ndarray, prediction_length: int) -> np.ndarray:
    """The last frame repeated: (T_in, ...) -> (prediction_length, ...)."""
    return np.repeat(past[-1:], prediction_length, axis=0)


def last_clear_value(past: np.ndarray, observed: np.ndarray, prediction_length: int) -> np.ndarray:
    """The last value of each pixel that was observed, repeated; of one that never was, that of the last frame.

    Args:
        past: (T_in, H, W[, C]).
        observed: bool, of that shape, false under clouds.

    Returns:
        (prediction_length, H, W[, C]).
    """
    since = np.where(observed.any(0), observed[::-1].argmax(0), 0)  # frames before the last
    last = np.take_along_axis(past, (len(past) - 1 - since)[None], axis=0)
    return np.repeat(last, prediction_length, axis=0)


def dressed_persistence(past: np.ndarray, errors: np.ndarray, lowest: float = 0.0) -> np.ndarray:
    """An ensemble: the last frame repeated, plus errors that persistence made on other days.

    Args:
        past: (T_in, H, W[, C]).
        errors: (E, T_out, H, W[, C]), observed minus persisted frames drawn from the training set.
        lowest: value that exists; no member is below it.

    Returns:
        (E, T_out, H, W[, C]).
    """
    return np.maximum(past[-1] + errors, lowest)


def advection(past: np.ndarray, observed: np.ndarray, prediction_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last frame moved along the motion of the last three, see `advection.py`: of any values, by torch alone.

    Args:
        past: (T_in, H, W[, C]) values of about 0..1, each channel with a motion of its own.
        observed: bool, of that shape.
        prediction_length: frames to forecast.

    Returns:
        (prediction_length, H, W[, C]), and a mask of that shape, true where at least half of a value came from
        observed pixels; the rest of it is 0.
    """
    shape = (*past.shape[:3], 1) if past.ndim == 3 else past.shape
    values = torch.from_numpy(past.reshape(1, *shape).astype("float32"))
    mask = torch.from_numpy(observed.reshape(1, *shape))
    with torch.inference_mode():
        forecast, reach = first_guess("advection", values, prediction_length, shape[-1], mask)
    frames = (prediction_length, *past.shape[1:])
    return forecast.numpy().reshape(frames), reach.numpy().reshape(frames) >= 0.5


def is_pysteps_available() -> bool:
    """Whether pysteps and OpenCV, which the rain baselines need, are installed (the extra `optical-flow`)."""
    from importlib.util import find_spec

    return find_spec("pysteps") is not None and find_spec("cv2") is not None


# Frames of the past that each method looks at.
CONTEXT = {"advection": 3, "extrapolation": 3, "s-prog": 3, "anvil": 4, "steps": 3}

# Rain rates in decibels, 10 log10(mm/h): the lowest that is rain, 0.1 mm/h, and the value that stands for no rain.
LOWEST_RAIN, NO_RAIN = -10.0, -15.0


OnFallback = Callable[[], object]  # is called where a method cannot be run and the extrapolation takes its place


def _last_frames(rain: np.ndarray, frames: int) -> np.ndarray:
    if len(rain) < frames:
        raise ValueError(f"`rain` must hold {frames} frames or more, got {len(rain)}.")
    return rain[-frames:]


def _to_decibel(rain: np.ndarray) -> np.ndarray:
    decibel = 10 * np.log10(np.maximum(rain, 1e-9))
    return np.where(decibel < LOWEST_RAIN, NO_RAIN, decibel)


def _from_decibel(decibel: np.ndarray) -> np.ndarray:
    decibel = np.nan_to_num(decibel, nan=NO_RAIN)
    return np.where(decibel >= LOWEST_RAIN, 10 ** (decibel / 10), 0.0)


def _nowcast(
    method: str,
    fields: np.ndarray,
    decibel: np.ndarray,
    prediction_length: int,
    on_fallback: OnFallback | None,
    **options,
) -> np.ndarray | None:
    """A nowcast of pysteps along the motion of `decibel`; None if pysteps cannot run it, as on an almost dry field."""
    with _silenced():
        from pysteps import motion, nowcasts

        try:
            velocity = motion.get_method("LK")(decibel)
            return nowcasts.get_method(method)(fields, velocity, prediction_length, **options)
        except (ValueError, RuntimeError, IndexError, np.linalg.LinAlgError):
            if on_fallback is not None:
                on_fallback()
            return None


@contextlib.contextmanager
def _silenced():
    """Hide what pysteps prints, and its warnings about divisions by 0 where nothing changes."""
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(divide="ignore", invalid="ignore"):
        yield


def extrapolation(rain: np.ndarray, prediction_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last rain field moved along the motion of the last three (Lucas-Kanade, semi-Lagrangian; pysteps).

    Args:
        rain: (T_in, H, W) rain rate in mm/h, missing values as 0.
        prediction_length: frames to forecast.

    Returns:
        (prediction_length, H, W) rain rate in mm/h, and a mask, true where the rain came from within the frame;
        elsewhere the forecast is 0.

    Raises:
        ValueError: too few frames.
    """
    with _silenced():
        from pysteps import motion, nowcasts

        motion_field = motion.get_method("LK")(10 * np.log10(np.maximum(_last_frames(rain, 3), 0.01)))
        forecast = nowcasts.get_method("extrapolation")(rain[-1], motion_field, prediction_length)
    reachable = np.isfinite(forecast)
    return np.where(reachable, forecast, 0.0), reachable


def sprog(rain: np.ndarray, prediction_length: int, on_fallback: OnFallback | None = None) -> np.ndarray:
    """The rain field moved along its motion, each scale damped as fast as it lost its memory (S-PROG).

    Seed, "A dynamic and spatial scaling approach to advection forecasting", J. Applied Meteorology 42, 2003, as
    pysteps has it, with its defaults. Where it cannot be run, as on a field almost without rain, this is
    [`extrapolation`].

    Args:
        rain: (T_in, H, W) rain rate in mm/h, missing values as 0; the last three frames are used.
        prediction_length: frames to forecast.
        on_fallback: is called if it cannot be run.

    Returns:
        (prediction_length, H, W) rain rate in mm/h; 0 where the rain would come from outside.

    Raises:
        ValueError: too few frames.
    """
    decibel = _to_decibel(_last_frames(rain, 3))
    forecast = _nowcast("sprog", decibel, decibel, prediction_length, on_fallback, precip_thr=LOWEST_RAIN)
    return extrapolation(rain, prediction_length)[0] if forecast is None else _from_decibel(forecast)


def anvil(rain: np.ndarray, prediction_length: int, on_fallback: OnFallback | None = None) -> np.ndarray:
    """The rain field moved along its motion, growing and decaying as it did in each place and on each scale (ANVIL).

    Pulkkinen et al., "Nowcasting of convective rainfall using volumetric radar observations", IEEE Trans. Geoscience
    and Remote Sensing 58, 2020, as pysteps has it, with its defaults and rain rates for integrated liquid. Pixels
    that it leaves undefined, as where nothing changed nearby, and fields on which it cannot be run are those of
    [`extrapolation`].

    Arguments, what is returned and what is raised are those of [`sprog`]; the last four frames are used.
    """
    fields, decibel = _last_frames(rain, 4).astype("float64"), _to_decibel(rain[-3:])
    forecast = _nowcast("anvil", fields, decibel, prediction_length, on_fallback)
    moved = extrapolation(rain, prediction_length)[0]
    return moved if forecast is None else np.where(np.isfinite(forecast), np.maximum(forecast, 0.0), moved)


def steps_ensemble(
    rain: np.ndarray,
    prediction_length: int,
    ensemble_size: int,
    minutes: float,
    kilometers: float,
    seed: int,
    on_fallback: OnFallback | None = None,
) -> np.ndarray:
    """An ensemble of the rain field moved along its motion, with noise that grows from small scales to large (STEPS).

    Bowler, Pierce and Seed, "STEPS: a probabilistic precipitation forecasting scheme", Q. J. R. Meteorol. Soc. 132,
    2006, as pysteps has it, with its defaults. Where it cannot be run, as on a field almost without rain, all members
    are the [`extrapolation`].

    Args:
        rain: (T_in, H, W) rain rate in mm/h, missing values as 0; the last three frames are used.
        prediction_length: frames to forecast.
        minutes, kilometers: between frames and grid points.
        seed: of the noise.
        on_fallback: is called if it cannot be run.

    Returns:
        (ensemble_size, prediction_length, H, W) rain rate in mm/h; 0 where the rain would come from outside.

    Raises:
        ValueError: too few frames.
    """
    decibel = _to_decibel(_last_frames(rain, 3))
    ensemble = _nowcast(
        "steps",
        decibel,
        decibel,
        prediction_length,
        on_fallback,
        n_ens_members=ensemble_size,
        precip_thr=LOWEST_RAIN,
        kmperpixel=kilometers,
        timestep=minutes,
        seed=seed,
    )
    if ensemble is None:
        return np.repeat(extrapolation(rain, prediction_length)[0][None], ensemble_size, axis=0)
    return _from_decibel(ensemble)


# ---------------------------------------------------------------------------------------------------------------------
# The ocean: each function is fitted on a record of months and forecasts three-month means of an index
# ---------------------------------------------------------------------------------------------------------------------


class OceanRecord:
    """A monthly record and its windows of context_length + prediction_length months.

    Args:
        event: `time` (T,) months, `values` (T, H, W) anomalies, NaN where missing.
        index_of: maps (..., H, W) -> the index (...).
        context_length, prediction_length: months.
    """

    def __init__(self, event: dict, index_of: Callable, context_length: int, prediction_length: int):
        self.values = event["values"].astype("float64")
        self.month = event["time"].astype("datetime64[M]").astype(int) % 12
        self.index = index_of(self.values)
        self.leads = prediction_length - 2
        self.last = np.arange(context_length - 1, len(self.index) - prediction_length)  # last month of each context
        self.start_month = self.month[self.last + 1]

    def targets(self) -> np.ndarray:
        """Three-month means of the index, (windows, leads)."""
        months = self.last[:, None] + 1 + np.arange(self.leads + 2)
        return three_month_means(self.index[months])


def damped_persistence(train: OceanRecord, test: OceanRecord) -> np.ndarray:
    """A regression on the last month's index per start month and lead, (windows, leads)."""
    targets, forecast = train.targets(), np.empty((len(test.last), test.leads))
    for month in range(12):
        in_train, in_test = train.start_month == month, test.start_month == month
        design = np.stack([train.index[train.last[in_train]], np.ones(in_train.sum())], axis=1)
        weights, *_ = np.linalg.lstsq(design, targets[in_train], rcond=None)
        forecast[in_test] = np.stack([test.index[test.last[in_test]], np.ones(in_test.sum())], axis=1) @ weights
    return forecast


class LeadingComponents:
    """Leading principal components of the anomalies at nodes that are never missing, weighted by area."""

    def __init__(self, train: OceanRecord, lat: np.ndarray, num_components: int):
        self.nodes = np.isfinite(train.values).all(0)
        self.weight = np.broadcast_to(np.sqrt(np.cos(np.deg2rad(lat)))[:, None], self.nodes.shape)[self.nodes]
        self.mean = train.values[:, self.nodes].mean(0)
        anomalies = (train.values[:, self.nodes] - self.mean) * self.weight
        self.patterns = np.linalg.svd(anomalies, full_matrices=False)[2][:num_components]

    def __call__(self, record: OceanRecord) -> np.ndarray:
        """(months, num_components)."""
        return (record.values[:, self.nodes] - self.mean) * self.weight @ self.patterns.T


def linear_inverse_model(
    train: OceanRecord, test: OceanRecord, lat: np.ndarray, num_components: int, lag: int
) -> np.ndarray:
    """One linear map of the leading components from month to month, applied lead by lead, (windows, leads).

    Penland and Sardeshmukh, "The optimal growth of tropical sea surface temperature anomalies", J. Climate 8, 1995.

    Args:
        num_components: of leading components.
        lag: months over which the map is fitted; its root is the map of one month.
    """
    components = LeadingComponents(train, lat, num_components)
    past, states = components(train), components(test)[test.last]
    to_index, *_ = np.linalg.lstsq(np.c_[past, np.ones(len(past))], train.index, rcond=None)
    step = past[lag:].T @ past[:-lag] @ np.linalg.inv(past[:-lag].T @ past[:-lag])
    rates, modes = np.linalg.eig(step)
    step = np.real(modes * rates.astype(complex) ** (1 / lag) @ np.linalg.inv(modes))  # one month of the map
    index = []
    for _ in range(test.leads + 2):
        states = states @ step.T
        index.append(np.c_[states, np.ones(len(states))] @ to_index)
    return three_month_means(np.stack(index, axis=1))


def seasonal_ridge(
    train: OceanRecord, test: OceanRecord, lat: np.ndarray, num_components: int, lag: int, penalty: float
) -> np.ndarray:
    """Ridge regression on the leading components of the last month and their recent change, (windows, leads).

    Each start month has its own regression, in which training windows of near start months weigh more.

    Args:
        num_components: of leading components.
        lag: months of the change.
        penalty: on the squared weights.
    """
    components = LeadingComponents(train, lat, num_components)

    def features(record):
        states, last = components(record), record.last
        return np.c_[states[last], states[last - lag] - states[last], np.ones(len(last))]

    train_features, test_features, targets = features(train), features(test), train.targets()
    forecast = np.empty((len(test.last), test.leads))
    for month in range(12):
        distance = np.minimum((train.start_month - month) % 12, (month - train.start_month) % 12)
        weighted = train_features.T * np.exp(-0.5 * (distance / 1.5) ** 2)
        penalties = penalty * np.eye(len(weighted))
        weights = np.linalg.solve(weighted @ train_features + penalties, weighted @ targets)
        forecast[test.start_month == month] = test_features[test.start_month == month] @ weights
    return forecast


LINEAR_INVERSE_GRID = {"num_components": (5, 10, 15, 20, 25, 30), "lag": (1, 2, 3, 4, 6)}
SEASONAL_RIDGE_GRID = {"num_components": (8, 12, 16, 20), "lag": (1, 2, 3, 4, 6), "penalty": (1, 10, 100, 1000)}


def best_setting(
    forecast: Callable, train: OceanRecord, validation: OceanRecord, lat: np.ndarray, grid: Mapping[str, Sequence]
) -> dict:
    """The setting of a grid with the least mean squared error on a validation record, fitted on the training record.

    Args:
        forecast: [`linear_inverse_model`] or [`seasonal_ridge`].
        grid: its last arguments by name, each with the values to try: `LINEAR_INVERSE_GRID`, `SEASONAL_RIDGE_GRID`.

    Returns:
        The last arguments by name.
    """
    targets = validation.targets()
    settings = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    errors = [np.square(forecast(train, validation, lat, **setting) - targets).mean() for setting in settings]
    return settings[int(np.argmin(errors))]


def linear_maps(record: OceanRecord, lat: np.ndarray, num_components: int = 12, penalty: float = 3000.0) -> np.ndarray:
    """Ridge regression of the leading components of every future month on those of the last year, as maps.

    Fitted on the record's own windows, the maps are the part of each future that a linear model can explain. They are
    a target without noise, from which a network learns faster than from the futures themselves: `teacher_weight` of a
    recipe.

    Returns:
        (windows, prediction_length, H, W) anomalies in degrees Celsius, NaN at nodes that are ever missing.
    """
    components, months = LeadingComponents(record, lat, num_components), np.arange(record.leads + 2)
    states = components(record)
    past = np.concatenate([states[record.last - lag] for lag in (0, 1, 2, 3, 5, 7, 9, 11)], axis=1)
    future = states[record.last[:, None] + 1 + months].reshape(len(past), -1)
    weights = np.linalg.solve(past.T @ past + penalty * np.eye(past.shape[1]), past.T @ future)
    maps = np.full((len(past), len(months), *record.values.shape[1:]), np.nan, "float32")
    forecast = (past @ weights).reshape(len(past), len(months), num_components)
    maps[:, :, components.nodes] = forecast @ components.patterns / components.weight + components.mean
    return maps


__all__ = [
    "CONTEXT",
    "LINEAR_INVERSE_GRID",
    "SEASONAL_RIDGE_GRID",
    "LeadingComponents",
    "OceanRecord",
    "advection",
    "anvil",
    "best_setting",
    "damped_persistence",
    "dressed_persistence",
    "extrapolation",
    "last_clear_value",
    "is_pysteps_available",
    "linear_inverse_model",
    "linear_maps",
    "persistence",
    "seasonal_ridge",
    "sprog",
    "steps_ensemble",
]
