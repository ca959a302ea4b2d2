"""Forecasts without a neural network, to measure one against."""

from collections.abc import Callable

import numpy as np

from .data.open_sst import three_month_means


def persistence(past: np.ndarray, prediction_length: int) -> np.ndarray:
    """The last frame repeated: (T_in, ...) -> (prediction_length, ...)."""
    return np.repeat(past[-1:], prediction_length, axis=0)


def dressed_persistence(past: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """An ensemble: the last frame repeated, plus errors that persistence made on other days, not below 0.

    Args:
        past: (T_in, H, W).
        errors: (E, T_out, H, W), observed minus persisted frames drawn from the training set.

    Returns:
        (E, T_out, H, W).
    """
    return np.maximum(past[-1] + errors, 0)


def has_extrapolation() -> bool:
    """Whether pysteps and OpenCV, which `extrapolation` needs, are installed (the extra `optical-flow`)."""
    from importlib.util import find_spec

    return find_spec("pysteps") is not None and find_spec("cv2") is not None


def extrapolation(rain: np.ndarray, prediction_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last rain field moved along the motion of the last three (Lucas-Kanade, semi-Lagrangian; pysteps).

    Args:
        rain: (T_in, H, W) rain rate in mm/h, missing values as 0.
        prediction_length: frames to forecast.

    Returns:
        (prediction_length, H, W) rain rate in mm/h, and a mask, true where the rain came from within the frame;
        elsewhere the forecast is 0.
    """
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # pysteps greets on import
        from pysteps import motion, nowcasts

    motion_field = motion.get_method("LK")(10 * np.log10(np.maximum(rain[-3:], 0.01)))
    forecast = nowcasts.get_method("extrapolation")(rain[-1], motion_field, prediction_length)
    reachable = np.isfinite(forecast)
    return np.where(reachable, forecast, 0.0), reachable


def steps_ensemble(
    rain: np.ndarray, prediction_length: int, ensemble_size: int, minutes: float, kilometers: float, seed: int
) -> np.ndarray:
    """An ensemble of the rain field moved along its motion, with noise that grows from small scales to large (STEPS).

    Bowler, Pierce and Seed, "STEPS: a probabilistic precipitation forecasting scheme", Q. J. R. Meteorol. Soc. 132,
    2006, as pysteps has it, with its defaults. Where it cannot be run, as on a field almost without rain, all members
    are the extrapolation.

    Args:
        rain: (T_in, H, W) rain rate in mm/h, missing values as 0; the last three frames are used.
        prediction_length: frames to forecast.
        minutes, kilometers: between frames and grid points.
        seed: of the noise.

    Returns:
        (ensemble_size, prediction_length, H, W) rain rate in mm/h; 0 where the rain would come from outside.
    """
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # pysteps greets on import, and reports
        from pysteps import motion, nowcasts

        dry, floor = -10.0, -15.0  # dBR of 0.1 mm/h, and what stands for no rain
        decibel = 10 * np.log10(np.maximum(rain[-3:], 1e-9))
        decibel[decibel < dry] = floor
        try:
            velocity = motion.get_method("LK")(decibel)
            ensemble = nowcasts.get_method("steps")(
                decibel,
                velocity,
                prediction_length,
                n_ens_members=ensemble_size,
                precip_thr=dry,
                kmperpixel=kilometers,
                timestep=minutes,
                seed=seed,
            )
        except (ValueError, RuntimeError, IndexError, np.linalg.LinAlgError):
            return np.repeat(extrapolation(rain, prediction_length)[0][None], ensemble_size, axis=0)
    return np.where(np.nan_to_num(ensemble, nan=floor) >= dry, 10 ** (ensemble / 10), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Indices of the ocean: each function is fitted on a record of months and forecasts three-month means of an index
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


def persisted_index(record: OceanRecord) -> np.ndarray:
    """The index of the last context month at every lead, (windows, leads)."""
    return np.repeat(record.index[record.last, None], record.leads, axis=1)


def damped_persistence(train: OceanRecord, test: OceanRecord) -> np.ndarray:
    """A regression on the last month's index per start month and lead, (windows, leads)."""
    targets, forecast = train.targets(), np.empty((len(test.last), test.leads))
    for month in range(12):
        fitted, used = train.start_month == month, test.start_month == month
        design = np.stack([train.index[train.last[fitted]], np.ones(fitted.sum())], axis=1)
        weights, *_ = np.linalg.lstsq(design, targets[fitted], rcond=None)
        forecast[used] = np.stack([test.index[test.last[used]], np.ones(used.sum())], axis=1) @ weights
    return forecast


class LeadingComponents:
    """Leading principal components of the anomalies at nodes that are never missing, weighted by area."""

    def __init__(self, train: OceanRecord, lat: np.ndarray, number: int):
        self.nodes = np.isfinite(train.values).all(0)
        self.weight = np.broadcast_to(np.sqrt(np.cos(np.deg2rad(lat)))[:, None], self.nodes.shape)[self.nodes]
        self.mean = train.values[:, self.nodes].mean(0)
        anomalies = (train.values[:, self.nodes] - self.mean) * self.weight
        self.patterns = np.linalg.svd(anomalies, full_matrices=False)[2][:number]

    def __call__(self, record: OceanRecord) -> np.ndarray:
        """(months, number)."""
        return (record.values[:, self.nodes] - self.mean) * self.weight @ self.patterns.T


def linear_inverse_model(
    train: OceanRecord, test: OceanRecord, lat: np.ndarray, number: int = 20, lag: int = 3
) -> np.ndarray:
    """One linear map of the leading components from month to month, applied lead by lead, (windows, leads).

    Penland and Sardeshmukh, "The optimal growth of tropical sea surface temperature anomalies", J. Climate 8, 1995.
    """
    components = LeadingComponents(train, lat, number)
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
    train: OceanRecord, test: OceanRecord, lat: np.ndarray, number: int = 12, penalty: float = 10.0
) -> np.ndarray:
    """Ridge regression on the leading components of the last month and their three-month change, (windows, leads).

    Each start month has its own regression, in which training windows of near start months weigh more.
    """
    components = LeadingComponents(train, lat, number)

    def features(record):
        states, last = components(record), record.last
        return np.c_[states[last], states[last - 3] - states[last], np.ones(len(last))]

    fitted, used, targets = features(train), features(test), train.targets()
    forecast = np.empty((len(test.last), test.leads))
    for month in range(12):
        distance = np.minimum((train.start_month - month) % 12, (month - train.start_month) % 12)
        weighted = fitted.T * np.exp(-0.5 * (distance / 1.5) ** 2)
        weights = np.linalg.solve(weighted @ fitted + penalty * np.eye(fitted.shape[1]), weighted @ targets)
        forecast[test.start_month == month] = used[test.start_month == month] @ weights
    return forecast


def linear_maps(record: OceanRecord, lat: np.ndarray, number: int = 12, penalty: float = 3000.0) -> np.ndarray:
    """Ridge regression of the leading components of every future month on those of the last year, as maps.

    Fitted on the record's own windows, it is what a linear model can explain of them: a target without noise, from
    which a network learns faster than from single futures (`teacher_weight` of `examples/train_earthformer.py`).

    Returns:
        (windows, prediction_length, H, W) anomalies in degrees Celsius, NaN at nodes that are ever missing.
    """
    components, months = LeadingComponents(record, lat, number), np.arange(record.leads + 2)
    states = components(record)
    past = np.concatenate([states[record.last - lag] for lag in (0, 1, 2, 3, 5, 7, 9, 11)], axis=1)
    future = states[record.last[:, None] + 1 + months].reshape(len(past), -1)
    weights = np.linalg.solve(past.T @ past + penalty * np.eye(past.shape[1]), past.T @ future)
    maps = np.full((len(past), len(months), *record.values.shape[1:]), np.nan, "float32")
    forecast = (past @ weights).reshape(len(past), len(months), number)
    maps[:, :, components.nodes] = forecast @ components.patterns / components.weight + components.mean
    return maps
