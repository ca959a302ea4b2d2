"""Scores that one benchmark defines: the Nino3.4 skill of ICAR-ENSO, the EarthNetScore, the Frechet video distance.

`compute` returns a dictionary of numpy arrays, scores and counts, as in `metrics.py`; undefined is NaN.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from .metrics import Values, ratio


def nino34_weights(leads: int) -> np.ndarray:
    """The weights of C-Nino3.4-WM, (leads,): 1.5 (4 months), 2 (7), 3 (7), 4 (further ones), each times ln(lead).

    From the ICAR-ENSO competition; they do not add up to 1, and the first is 0.

    Example:

    ```python
    >>> nino34_weights(leads=5).round(2).tolist()
    [0.0, 1.04, 1.65, 2.08, 3.22]

    ```
    """
    steps = np.repeat([1.5, 2.0, 3.0, 4.0], [4, 7, 7, max(0, leads - 18)])[:leads]
    return steps * np.log(np.arange(1, leads + 1))


class Nino34Skill(Metric):
    """Correlation and error of forecasts of the Nino3.4 index.

    C-Nino3.4-M is the mean over leads of the correlation over forecasts, C-Nino3.4-WM the mean of [`nino34_weights`]
    times it (so it can be larger than 1); both higher is better. Earthformer, section 4.3. The index is of three-month
    means: `three_month_means` of `nino34` (`data.open_sst`).

    Args:
        leads: three-month means of each forecast.

    `compute` returns `c_nino34_m`, `c_nino34_wm`, `rmse` (the mean over leads, in degrees Celsius);
    `correlation_by_lead`, `rmse_by_lead` (leads,); `correlation_by_month`, `rmse_by_month` (12, leads), by the
    calendar month that is forecast first, January on top; and the counts `forecasts` and `forecasts_by_month` (12,).

    Example:

    ```python
    >>> metric = Nino34Skill(leads=2)
    >>> index = np.array([[0.5, 1.0], [-1.0, 0.0], [1.5, 2.0]])  # (forecasts, leads) in degrees Celsius
    >>> metric.update(index + 0.5, index, start_month=np.array([0, 1, 2]))  # right but for a constant
    >>> {name: float(metric.compute()[name].round(3)) for name in ("c_nino34_m", "rmse")}
    {'c_nino34_m': 1.0, 'rmse': 0.5}

    ```
    """

    full_state_update = False
    sums: Tensor
    forecasts: Tensor

    def __init__(self, leads: int):
        super().__init__()
        self.leads = leads
        # Of forecasts x and observations y: x, y, x^2, y^2, x y, (x - y)^2.
        self.add_state("sums", torch.zeros(6, 12, leads, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("forecasts", torch.zeros(12, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Values, targets: Values, start_month: Values) -> None:
        """Add forecasts.

        Args:
            predictions, targets: (N, leads) in degrees Celsius.
            start_month: (N,) integers, the calendar month that is forecast first, 0 for January.

        Raises:
            ValueError: other shapes or months, or values that are not finite.
        """
        x, y = (torch.as_tensor(values, device=self.device).double() for values in (predictions, targets))
        month = torch.as_tensor(start_month, device=self.device).long()
        if x.shape != (len(month), self.leads) or y.shape != x.shape:
            raise ValueError(
                f"`predictions` and `targets` must be ({len(month)}, {self.leads}), "
                f"got {tuple(x.shape)} and {tuple(y.shape)}."
            )
        if ((month < 0) | (month > 11)).any():
            raise ValueError(f"`start_month` must lie in 0..11, got {month.tolist()}.")
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError("`predictions` and `targets` must be finite, got NaN or infinity.")
        self.sums.index_add_(1, month, torch.stack([x, y, x * x, y * y, x * y, (x - y).square()]))
        self.forecasts += torch.bincount(month, minlength=12)

    def compute(self) -> dict[str, np.ndarray]:
        sums, forecasts = self.sums.cpu().numpy(), self.forecasts.cpu().numpy()
        correlation, error = skill_of_sums(sums.sum(1), forecasts.sum())
        correlation_by_month, error_by_month = skill_of_sums(sums, forecasts[:, None])
        return {
            "c_nino34_m": correlation.mean(),
            "c_nino34_wm": (nino34_weights(self.leads) * correlation).mean(),
            "rmse": error.mean(),
            "correlation_by_lead": correlation,
            "rmse_by_lead": error,
            "correlation_by_month": correlation_by_month,
            "rmse_by_month": error_by_month,
            "forecasts": forecasts.sum(),
            "forecasts_by_month": forecasts,
        }


def skill_of_sums(sums: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlation and root mean squared error from sums over `count` pairs.

    Args:
        sums: (6, ...), of x, y, x^2, y^2, x y and (x - y)^2.

    Returns:
        (...) each; the correlation is NaN where x or y does not vary by more than rounding.
    """
    x, y, xx, yy, xy, squared = sums
    variances = np.stack([xx - ratio(x * x, count), yy - ratio(y * y, count)])
    varies = (variances > 1e-12 * np.stack([xx, yy])).all(0)
    scale = np.sqrt(np.where(varies, variances.prod(0), 0))
    return ratio(xy - ratio(x * y, count), scale), np.sqrt(ratio(squared, count))


def earthnet_parts(predictions: np.ndarray, targets: np.ndarray, observed: np.ndarray) -> dict[str, float]:
    """The four parts of the EarthNetScore of one cube, each 0..1, 1 is best.

    - `mad`: 1 - median |x - y|^0.0665 over clear values.
    - `ols`: 1 - mean (|difference of slopes| / 4)^0.1008 over pixels that were clear twice or more. A slope is the
      least-squares change of NDVI from the first clear step to the last: the target's over its clear steps, the
      forecast's over all steps between.
    - `emd`: 1 - mean W^0.1008 over these pixels, W the earth mover's distance between all NDVI values of the forecast
      and the clear ones of the target.
    - `ssim`: S^10.3, S the mean structural similarity (scikit-image's window of 7 x 7, range 2) of the frames and
      channels of which more than 70 % were clear, the forecast put in for the rest; 0 where S is below 0.

    Requena-Mesa et al., "EarthNet2021: a large-scale dataset and challenge for Earth surface forecasting as a guided
    video prediction task", CVPR workshops 2021, section 4, and its toolkit, which has the exponents. The toolkit adds
    a random matrix before it solves for the slopes, counts a pixel that was clear less than twice as a slope without
    error, and then takes such a pixel's mask from the blue channel of `ssim`. Here nothing is random, such a pixel
    has no slope, and masks stay.

    Args:
        predictions, targets: (T, H, W, 4), blue, green, red, near infrared; cut to 0..1. T is at most 40.
        observed: bool (T, H, W), false under clouds.

    Returns:
        `mad`, `ols`, `emd`, `ssim`; NaN where no pixel, or no frame, was clear enough.

    Example:

    ```python
    >>> cube = np.random.default_rng(0).uniform(size=(4, 8, 8, 4))  # (T, H, W, 4)
    >>> earthnet_parts(cube, cube, np.ones((4, 8, 8), bool))
    {'mad': 1.0, 'ols': 1.0, 'emd': 1.0, 'ssim': 1.0}

    ```
    """
    from skimage.metrics import structural_similarity

    x = np.clip(predictions.astype("float64"), 0, 1)
    y = np.where(observed[..., None], np.clip(targets.astype("float64"), 0, 1), x)
    parts = dict.fromkeys(("mad", "ols", "emd", "ssim"), math.nan)
    if observed.any():
        parts["mad"] = 1 - np.median(np.abs(x - y)[observed] ** 0.06649346971087526)

    # Series of pixels (N, T) that were clear twice or more.
    clear = observed.reshape(len(observed), -1).T
    often = clear.sum(1) > 1
    forecast, target = (_vegetation_index(values).reshape(len(values), -1).T[often] for values in (x, y))
    clear, exponent = clear[often], 0.10082047548620601
    if often.any():
        time, between = _from_first_to_last(clear)
        difference = weighted_slope(time, target, clear) - weighted_slope(time, forecast, between)
        parts["ols"] = 1 - ((np.abs(difference) / 4) ** exponent).mean()
        parts["emd"] = 1 - (earth_movers_distance(forecast, target, clear) ** exponent).mean()

    enough = observed.mean((1, 2)) > 0.7
    if enough.any():
        frames = zip(x[enough], y[enough])  # the mean over channels, and then over frames
        similarity = np.mean([structural_similarity(*pair, data_range=2, channel_axis=-1) for pair in frames])
        parts["ssim"] = max(0.0, similarity) ** 10.31885115
    return {name: float(np.clip(value, 0, 1)) for name, value in parts.items()}


def _vegetation_index(values: np.ndarray) -> np.ndarray:
    """NDVI of blue, green, red, near infrared: (..., 4) -> (...)."""
    return (values[..., 3] - values[..., 2]) / (values[..., 3] + values[..., 2] + 1e-6)


def _from_first_to_last(clear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Time, 0 at the first clear step and 1 at the last, and whether it lies between them; (N, T) each."""
    step = np.arange(clear.shape[1])
    first, last = clear.argmax(1)[:, None], clear.shape[1] - 1 - clear[:, ::-1].argmax(1)[:, None]
    return (step - first) / (last - first), (step >= first) & (step <= last)


def weighted_slope(time: np.ndarray, values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Least-squares slopes of series (N, T) over the times `used` (N, T): (N,)."""
    count = used.sum(1, keepdims=True)
    t = np.where(used, time - (time * used).sum(1, keepdims=True) / count, 0)
    return (t * values).sum(1) / (t * t).sum(1)


def earth_movers_distance(first: np.ndarray, second: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Wasserstein-1 distance between all values of `first` and the `used` ones of `second`, (N, T) each: (N,).

    Example:

    ```python
    >>> used = np.array([[True, True, False]])
    >>> earth_movers_distance(np.array([[0.0, 0.0, 0.0]]), np.array([[1.0, 2.0, 9.0]]), used).tolist()
    [1.5]

    ```
    """
    values = np.concatenate([first, second], axis=1)
    weights = np.concatenate([np.full(first.shape, 1 / first.shape[1]), used / -used.sum(1, keepdims=True)], axis=1)
    order = values.argsort(1)
    values, weights = (np.take_along_axis(x, order, axis=1) for x in (values, weights))
    return (np.abs(weights.cumsum(1)[:, :-1]) * np.diff(values, axis=1)).sum(1)


class EarthNetScore(Metric):
    """Harmonic mean of the four parts of [`earthnet_parts`], each averaged over the cubes where it is defined.

    0..1, 1 is best; 0 if a part is 0, which the toolkit leaves out of the mean instead.

    `compute` returns `earthnet_score`, `mad`, `ols`, `emd`, `ssim`, and the counts of cubes of each, `mad_cubes` etc.

    Example:

    ```python
    >>> metric = EarthNetScore()
    >>> cubes = np.random.default_rng(0).uniform(size=(1, 4, 8, 8, 4))  # (B, T, H, W, 4)
    >>> metric.update(0.9 * cubes, cubes, np.ones((1, 4, 8, 8), bool))  # nothing under clouds
    >>> {name: float(metric.compute()[name].round(3)) for name in ("earthnet_score", "mad", "ols", "emd", "ssim")}
    {'earthnet_score': 0.437, 'mad': 0.178, 'ols': 0.839, 'emd': 0.818, 'ssim': 0.893}

    ```
    """

    full_state_update = False
    total: Tensor
    cubes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cubes", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Values, targets: Values, observed: Values) -> None:
        """Add forecasts.

        Args:
            predictions, targets: (B, T, H, W, 4), blue, green, red, near infrared in 0..1; T is at most 40.
            observed: bool (B, T, H, W), false under clouds.

        Raises:
            ValueError: other shapes, a mask that is not bool, or, where it was observed, values that are not finite.
        """
        predictions, targets, observed = (
            np.asarray(torch.as_tensor(x).cpu()) for x in (predictions, targets, observed)
        )
        shape = (*observed.shape, 4)
        if observed.ndim != 4 or observed.shape[1] > 40 or predictions.shape != shape or targets.shape != shape:
            raise ValueError(
                "`predictions` and `targets` must be (B, T, H, W, 4) and `observed` (B, T, H, W) with T up to 40, "
                f"got {predictions.shape}, {targets.shape} and {observed.shape}."
            )
        if observed.dtype != bool:
            raise ValueError(f"`observed` must be bool, got {observed.dtype}.")
        if not (np.isfinite(predictions).all() and np.isfinite(targets[observed]).all()):
            raise ValueError("`predictions` must be finite, and `targets` wherever `observed` is true, got NaN.")
        for cube in zip(predictions, targets, observed):
            parts = torch.tensor(list(earthnet_parts(*cube).values()), dtype=torch.float64, device=self.device)
            self.total += parts.nan_to_num(0)
            self.cubes += ~parts.isnan()

    def compute(self) -> dict[str, np.ndarray]:
        cubes = self.cubes.cpu().numpy()
        means = ratio(self.total.cpu().numpy(), cubes)
        with np.errstate(divide="ignore"):
            score = len(means) / (1 / means).sum()
        names = ("mad", "ols", "emd", "ssim")
        counts = {f"{name}_cubes": count for name, count in zip(names, cubes)}
        return {"earthnet_score": score} | dict(zip(names, means)) | counts


class FrechetVideoDistance(FrechetInceptionDistance):
    """Frechet distance of the features of forecast and observed videos, 0 is best: torchmetrics' FID, your features.

    |m - n|^2 + tr(S + C - 2 (S C)^1/2) of their means m, n and unbiased covariances S, C. Unterthiner et al., "FVD: a
    new metric for video generation", 2019. Values compare only for the same features: published ones are of an I3D
    network that is not shipped here.

    Args:
        features: maps what `update` is given, such as videos (B, T, H, W), to features (B, F).
        num_features: F; there should be many more videos than features.

    `update(videos, real)` adds observed videos with `real=True` and forecasts with `real=False`. `compute` returns
    `fvd`, NaN with fewer than two videos of either kind, and the counts `observed_videos` and `forecast_videos`.

    Example:

    ```python
    >>> metric = FrechetVideoDistance(lambda videos: videos.mean((2, 3)), num_features=3)  # the mean of each frame
    >>> videos = torch.rand(50, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> metric.update(videos, real=True)
    >>> metric.update(videos + 2, real=False)
    >>> round(float(metric.compute()["fvd"]), 3)  # the squared shift of three features
    12.0

    ```
    """

    def __init__(self, features: Callable[[Any], Tensor], num_features: int):
        super().__init__(feature=_FeatureModule(features, num_features))
        self.orig_dtype = torch.float64  # torchmetrics sets it on the first update, which an idle process never sees

    def compute(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        counts = self.real_features_num_samples, self.fake_features_num_samples
        distance = super().compute() if min(counts) > 1 else torch.tensor(math.nan)
        observed, forecast = (count.cpu().numpy() for count in counts)
        return {"fvd": distance.cpu().numpy(), "observed_videos": observed, "forecast_videos": forecast}


class _FeatureModule(torch.nn.Module):
    """A function as a module, as torchmetrics asks for it."""

    def __init__(self, function: Callable[[Any], Tensor], num_features: int):
        super().__init__()
        self.function, self.num_features = function, num_features

    def forward(self, videos: Any) -> Tensor:
        return self.function(videos)


__all__ = [
    "EarthNetScore",
    "FrechetVideoDistance",
    "Nino34Skill",
    "earth_movers_distance",
    "earthnet_parts",
    "nino34_weights",
]
