"""Scores of forecasts: pure functions, and small `torchmetrics.Metric` classes that add up a whole test set.

    scores = ContingencyScores(thresholds=[16, 74, 133], prediction_length=12)
    scores.update(predictions, targets, observed)  # (T, H, W) or (B, T, H, W), arrays or tensors of one unit
    scores.compute()["csi"]  # a dictionary of numpy arrays: the scores, and the counts they were made of

`observed` (bool, the targets' shape) says which pixels were observed; the others enter no score. Ensembles have their
members before time, (E, T, H, W) or (B, E, T, H, W). Names end in `_by_lead` where a score is given for each lead time
(T,); without it a score is pooled: counts and sums over lead times, pixels and windows before any ratio. Counts are
int64, sums float64. A score without events is undefined: NaN, never 0. States add up over processes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure


Values = np.ndarray | Tensor


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator / denominator in float64, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, dtype="float64"), np.asarray(denominator, dtype="float64")
    )
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


class ForecastMetric(Metric):
    """The base class of the scores: sums over windows as states, and one check of the arguments of `update`."""

    full_state_update = False

    def __init__(self, prediction_length: int):
        super().__init__()
        self.prediction_length = prediction_length

    def add_sums(self, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
        """Add states that start at zero and add up over processes."""
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @property
    def lead_index(self) -> Tensor:
        """Lead times 0..T-1, (T, 1, 1) int32."""
        return torch.arange(self.prediction_length, dtype=torch.int32, device=self.device).view(-1, 1, 1)

    def prepare_inputs(
        self, predictions: Values, targets: Values, observed: Values | None, members: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `update` as tensors (B, T, H, W); of an ensemble, predictions (B, E, T, H, W).

        Raises:
            ValueError: shapes that do not belong together, a mask that is not bool, or, where it was observed,
                predictions or targets that are not finite.
        """
        predictions = torch.as_tensor(predictions, device=self.device)
        targets = torch.as_tensor(targets, device=self.device)
        if observed is None:
            observed = torch.ones_like(targets, dtype=torch.bool)
        observed = torch.as_tensor(observed, device=self.device)
        if targets.ndim == 3:
            predictions, targets, observed = predictions[None], targets[None], observed[None]
        one_member = predictions[:, 0] if members and predictions.ndim == 5 else predictions
        if targets.ndim != 4 or targets.shape[1] != self.prediction_length:
            raise ValueError(
                f"`targets` must be (T, H, W) or (B, T, H, W) with T = {self.prediction_length}, "
                f"got {tuple(targets.shape)}."
            )
        if one_member.shape != targets.shape or observed.shape != targets.shape:
            expected = "(B, E, T, H, W), `targets`" if members else "`targets`"
            raise ValueError(
                f"`predictions` must be {expected} and `observed` (B, T, H, W), got {tuple(predictions.shape)}, "
                f"{tuple(targets.shape)} and {tuple(observed.shape)}."
            )
        if observed.dtype != torch.bool:
            raise ValueError(f"`observed` must be bool, got {observed.dtype}.")
        for name, values in (("predictions", predictions), ("targets", targets)):
            unknown = ~torch.isfinite(values)
            if (unknown & (observed[:, None] if values.ndim == 5 else observed)).any():
                raise ValueError(f"`{name}` must be finite wherever `observed` is true, got NaN or infinity.")
        return predictions, targets, observed


def check_thresholds(thresholds: Sequence[float], name: str = "thresholds") -> list[float]:
    """The thresholds as floats; ValueError unless each is finite and larger than the one before."""
    values = [float(threshold) for threshold in thresholds]
    if not values or not all(map(math.isfinite, values)) or any(b <= a for a, b in zip(values, values[1:])):
        raise ValueError(f"`{name}` must be one or more ascending values, all finite, got {values}.")
    return values


def count_true(conditions: Iterable[Tensor]) -> Tensor:
    """How many of the bool tensors are true, element by element, int32."""
    return sum(conditions, torch.zeros((), dtype=torch.int32))


def count_cells(cell: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """How often each flat index into an array of that shape occurs in `cell` where `mask` is true, int64."""
    size = math.prod(shape)
    return torch.bincount(torch.where(mask, cell, size).flatten(), minlength=size + 1)[:size].view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# One forecast
# ---------------------------------------------------------------------------------------------------------------------


def contingency_scores(
    hits: np.ndarray, misses: np.ndarray, false_alarms: np.ndarray, correct_negatives: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of yes-no forecasts from their counts a, c, b, d (hits, misses, false alarms, correct negatives).

    | name             | score                                   | formula                                 | best |
    |------------------|-----------------------------------------|-----------------------------------------|------|
    | `csi`            | critical success index, 0..1            | a / (a + b + c)                         | 1    |
    | `pod`            | probability of detection, 0..1          | a / (a + c)                             | 1    |
    | `far`            | false alarm ratio, 0..1                 | b / (a + b)                             | 0    |
    | `success_ratio`  | 1 - FAR, 0..1                           | a / (a + b)                             | 1    |
    | `frequency_bias` | forecast events per observed one, 0..   | (a + b) / (a + c)                       | 1    |
    | `hss`            | Heidke skill score, -1..1, 0 by chance  | 2 (ad - bc) / ((a+c)(c+d) + (a+b)(b+d)) | 1    |

    Wilks, "Statistical methods in the atmospheric sciences", 3rd edition, 2011, section 8.2.2. The original
    Earthformer reports (frequency bias / ln 2)^2 as its bias, a logarithm left out.

    Args:
        hits, misses, false_alarms, correct_negatives: counts of one shape.

    Returns:
        name -> float64 of that shape, NaN where the denominator is 0.

    Example:

    ```python
    >>> scores = contingency_scores(hits=np.array([30]), misses=np.array([10]), false_alarms=np.array([20]),
    ...                             correct_negatives=np.array([40]))
    >>> [float(scores[name][0].round(3)) for name in ("csi", "pod", "far", "hss")]
    [0.5, 0.75, 0.4, 0.4]

    ```
    """
    a, c, b, d = (np.asarray(x, dtype="float64") for x in (hits, misses, false_alarms, correct_negatives))
    return {
        "csi": ratio(a, a + b + c),
        "pod": ratio(a, a + c),
        "far": ratio(b, a + b),
        "success_ratio": ratio(a, a + b),
        "frequency_bias": ratio(a + b, a + c),
        "hss": ratio(2 * (a * d - b * c), (a + c) * (c + d) + (a + b) * (b + d)),
    }


class ContingencyScores(ForecastMetric):
    """Hits, misses, false alarms and correct negatives, and the scores made of them.

    Args:
        thresholds: ascending; an event is a value of at least the threshold.
        prediction_length: T.
        pool: count the maxima of `pool` x `pool` pixels instead of pixels, of forecast and observation alike
            (PreDiff, table 2, has 4 and 16); rows and columns left over at the end are not counted. A maximum is over
            observed pixels only, and counts if there was one.

    `compute` returns `thresholds`; `hits`, `misses`, `false_alarms`, `correct_negatives` (thresholds, T); and every
    score of [`contingency_scores`], pooled (thresholds,) and `_by_lead` (thresholds, T).

    Example:

    ```python
    >>> metric = ContingencyScores(thresholds=[10], prediction_length=1)
    >>> metric.update(np.array([[[12, 12], [0, 0]]]), np.array([[[15, 0], [0, 11]]]))  # (T, H, W) each
    >>> {name: metric.compute()[name].tolist() for name in ("hits", "misses", "false_alarms", "csi")}
    {'hits': [[1]], 'misses': [[1]], 'false_alarms': [[1]], 'csi': [0.3333333333333333]}

    ```
    """

    joint: Tensor

    def __init__(self, thresholds: Sequence[float], prediction_length: int, pool: int = 1):
        super().__init__(prediction_length)
        if pool < 1:
            raise ValueError(f"`pool` must be at least 1, got {pool}.")
        self.thresholds, self.pool = check_thresholds(thresholds), pool
        classes = len(self.thresholds) + 1
        # Pixels by lead time, thresholds that the observation reaches, and thresholds that the forecast reaches.
        self.add_sums(torch.int64, joint=(prediction_length, classes, classes))

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add forecasts, see the top of the file."""
        predictions, targets, observed = self.prepare_inputs(predictions, targets, observed)
        if self.pool > 1:
            # In the precision of the values: 0.7 in float32 is below 0.7 in float64, and would miss that threshold.
            predictions, targets = (
                F.max_pool2d(
                    (values if values.is_floating_point() else values.double()).masked_fill(~observed, -math.inf),
                    self.pool,
                )
                for values in (predictions, targets)
            )
            observed = F.max_pool2d(observed.float(), self.pool) > 0
        classes = len(self.thresholds) + 1
        cell = self.lead_index
        for values in (targets, predictions):
            cell = cell * classes + count_true(values >= threshold for threshold in self.thresholds)
        self.joint += count_cells(cell, observed, self.joint.shape)

    def compute(self) -> dict[str, np.ndarray]:
        # [t, i, j]: pixels whose observation reaches threshold i or a higher one, and their forecast threshold j
        reached = self.joint.flip(1, 2).cumsum(1).cumsum(2).flip(1, 2).cpu().numpy()
        pixels, observed, forecast = reached[:, 0, :1].T, reached[:, 1:, 0].T, reached[:, 0, 1:].T
        hits = reached.diagonal(axis1=1, axis2=2)[:, 1:].T
        counts = {
            "hits": hits,
            "misses": observed - hits,
            "false_alarms": forecast - hits,
            "correct_negatives": pixels - observed - forecast + hits,
        }
        pooled = contingency_scores(**{name: values.sum(1) for name, values in counts.items()})
        by_lead = {f"{name}_by_lead": values for name, values in contingency_scores(**counts).items()}
        return {"thresholds": np.array(self.thresholds), **counts, **pooled, **by_lead}


class ErrorScores(ForecastMetric):
    """Mean squared and mean absolute error, 0 is best.

    Args:
        prediction_length: T.
        value_range: errors are divided by it (255 gives the errors of a code scaled to 0..1).

    `compute` returns `mse`, `mae`, `mse_by_lead`, `mae_by_lead`, and the counts `pixels` (T,) and `windows`.

    Example:

    ```python
    >>> metric = ErrorScores(prediction_length=2)
    >>> metric.update(np.array([[[1.0]], [[2.0]]]), np.array([[[1.0]], [[4.0]]]))  # (T, H, W) each
    >>> float(metric.compute()["mse"]), metric.compute()["mae_by_lead"].tolist()
    (2.0, [0.0, 2.0])

    ```
    """

    squared: Tensor
    absolute: Tensor
    pixels: Tensor
    windows: Tensor

    def __init__(self, prediction_length: int, value_range: float = 1.0):
        super().__init__(prediction_length)
        self.value_range = value_range
        self.add_sums(torch.float64, squared=(prediction_length,), absolute=(prediction_length,))
        self.add_sums(torch.int64, pixels=(prediction_length,), windows=())

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add forecasts, see the top of the file."""
        predictions, targets, observed = self.prepare_inputs(predictions, targets, observed)
        error = ((predictions.double() - targets.double()) / self.value_range).masked_fill(~observed, 0)
        self.squared += error.square().sum((0, 2, 3))
        self.absolute += error.abs().sum((0, 2, 3))
        self.pixels += observed.sum((0, 2, 3))
        self.windows += len(targets)

    def compute(self) -> dict[str, np.ndarray]:
        pixels = self.pixels.cpu().numpy()
        scores: dict[str, np.ndarray] = {}
        for name, total in (("mse", self.squared.cpu().numpy()), ("mae", self.absolute.cpu().numpy())):
            scores |= {name: ratio(total.sum(), pixels.sum()), f"{name}_by_lead": ratio(total, pixels)}
        return scores | {"pixels": pixels, "windows": self.windows.cpu().numpy()}


class StructuralSimilarity(ForecastMetric):
    """Structural similarity of frames, -1..1, 1 is best: torchmetrics' SSIM with its Gaussian window of 11 x 11.

    (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)) of the windows' means m, variances s^2
    and covariance s_xy, c1 = (0.01 R)^2, c2 = (0.03 R)^2; averaged over the pixels whose whole window was observed.
    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE Trans. Image
    Processing 13, 2004, equation 13.

    Args:
        prediction_length: T.
        value_range: R, the range of the values; never guessed from them.

    `compute` returns `ssim`, `ssim_by_lead`, and the count `pixels` (T,) of such pixels.

    Example:

    ```python
    >>> metric = StructuralSimilarity(prediction_length=1, value_range=1.0)
    >>> frame = np.linspace(0, 1, 256).reshape(1, 16, 16)  # (T, H, W)
    >>> metric.update(frame, frame)
    >>> round(float(metric.compute()["ssim"]), 3)
    1.0

    ```
    """

    similarity: Tensor
    pixels: Tensor

    def __init__(self, prediction_length: int, value_range: float):
        super().__init__(prediction_length)
        self.value_range = value_range
        self.add_sums(torch.float64, similarity=(prediction_length,))
        self.add_sums(torch.int64, pixels=(prediction_length,))

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add forecasts, see the top of the file."""
        predictions, targets, observed = self.prepare_inputs(predictions, targets, observed)
        # Time as channels; an unobserved pixel stands in no window that counts. (Convolutions are slow in float64.)
        predictions, targets = (values.float().masked_fill(~observed, 0) for values in (predictions, targets))
        similarity = structural_similarity_index_measure(
            predictions, targets, data_range=self.value_range, reduction="none", return_full_image=True
        )[1]
        whole = F.max_pool2d((~observed).float(), kernel_size=11, stride=1, padding=5) == 0
        self.similarity += similarity.double().masked_fill(~whole, 0).sum((0, 2, 3))
        self.pixels += whole.sum((0, 2, 3))

    def compute(self) -> dict[str, np.ndarray]:
        total, pixels = self.similarity.cpu().numpy(), self.pixels.cpu().numpy()
        return {"ssim": ratio(total.sum(), pixels.sum()), "ssim_by_lead": ratio(total, pixels), "pixels": pixels}


def neighbourhood_counts(events: Tensor, width: int) -> Tensor:
    """Events (..., H, W) in the `width` x `width` pixels around each pixel; outside there are none."""
    half = width // 2
    total = F.pad(events.int(), (half + 1, half, half + 1, half)).cumsum(-2).cumsum(-1)  # up to and with each pixel
    rows = total[..., width:, :] - total[..., :-width, :]
    return rows[..., width:] - rows[..., :-width]


class FractionsSkillScore(ForecastMetric):
    """Fractions skill score per threshold and neighbourhood, 0..1, 1 is best.

    FSS = 1 - sum (f - o)^2 / (sum f^2 + sum o^2), f and o the fractions of forecast and observed events in the window
    around each pixel; a pixel outside the grid or not observed counts as no event in both. Roberts and Lean,
    "Scale-selective verification of rainfall accumulations", Monthly Weather Review 136, 2008, equations 5 to 7.

    Args:
        thresholds: ascending; an event is a value of at least the threshold.
        widths: of the neighbourhoods, odd numbers of pixels.
        prediction_length: T.

    `compute` returns `thresholds`, `widths`, `fss` (thresholds, widths), `fss_by_lead` (thresholds, widths, T), and
    the counts `forecast_events`, `observed_events` (thresholds, T) and `pixels` (T,).

    Raises:
        ValueError: a width that is not odd.

    Example:

    ```python
    >>> metric = FractionsSkillScore(thresholds=[1], widths=[1, 3], prediction_length=1)
    >>> forecast, observation = np.zeros((2, 1, 8, 8))  # (T, H, W) each
    >>> forecast[0, 3, 3] = observation[0, 3, 4] = 1  # one pixel beside the right one
    >>> metric.update(forecast, observation)
    >>> metric.compute()["fss"].round(3).tolist()
    [[0.0, 0.667]]

    ```
    """

    difference: Tensor
    reference: Tensor
    forecast_events: Tensor
    observed_events: Tensor
    pixels: Tensor

    def __init__(self, thresholds: Sequence[float], widths: Sequence[int], prediction_length: int):
        super().__init__(prediction_length)
        self.thresholds, self.widths = check_thresholds(thresholds), list(widths)
        if not self.widths or any(width < 1 or width % 2 == 0 for width in self.widths):
            raise ValueError(f"`widths` must be odd numbers of pixels, got {self.widths}.")
        shape = (len(self.thresholds), len(self.widths), prediction_length)
        self.add_sums(torch.float64, difference=shape, reference=shape)
        self.add_sums(torch.int64, forecast_events=shape[::2], observed_events=shape[::2], pixels=shape[2:])

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add forecasts, see the top of the file."""
        predictions, targets, observed = self.prepare_inputs(predictions, targets, observed)
        self.pixels += observed.sum((0, 2, 3))
        for i, threshold in enumerate(self.thresholds):
            forecast, target = (predictions >= threshold) & observed, (targets >= threshold) & observed
            self.forecast_events[i] += forecast.sum((0, 2, 3))
            self.observed_events[i] += target.sum((0, 2, 3))
            for j, width in enumerate(self.widths):
                f, o = (neighbourhood_counts(events, width).double() / width**2 for events in (forecast, target))
                self.difference[i, j] += (f - o).square().sum((0, 2, 3))
                self.reference[i, j] += (f.square() + o.square()).sum((0, 2, 3))

    def compute(self) -> dict[str, np.ndarray]:
        difference, reference = self.difference.cpu().numpy(), self.reference.cpu().numpy()
        return {
            "thresholds": np.array(self.thresholds),
            "widths": np.array(self.widths),
            "fss": 1 - ratio(difference.sum(2), reference.sum(2)),
            "fss_by_lead": 1 - ratio(difference, reference),
            "forecast_events": self.forecast_events.cpu().numpy(),
            "observed_events": self.observed_events.cpu().numpy(),
            "pixels": self.pixels.cpu().numpy(),
        }


def radial_power(frames: Tensor) -> Tensor:
    """Radially averaged power spectrum: (..., H, W) -> (..., K), K = (max(H, W) + 1) // 2, float64.

    The mean of |FFT|^2 / (H W) over the wave vectors whose length, in waves per frame, rounds to k = 0..K-1. Ruzanski
    and Chandrasekar, "Scale filtering for improved nowcasting performance in a high-resolution X-band radar network",
    IEEE Trans. Geoscience and Remote Sensing 49, 2011; equal to pysteps' `rapsd` on square frames.

    Example:

    ```python
    >>> wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(16, 16)  # three waves per frame
    >>> int(radial_power(wave).argmax())
    3

    ```
    """
    height, width = frames.shape[-2:]
    power = torch.fft.fft2(frames.double()).abs().square().flatten(-2) / (height * width)
    waves = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=frames.device) for n in (height, width)]
    radius = torch.hypot(waves[0][:, None], waves[1][None]).round().long().flatten()
    total = torch.zeros(*frames.shape[:-2], int(radius.max()) + 1, dtype=power.dtype, device=power.device)
    total.index_add_(-1, radius, power)
    return (total / torch.bincount(radius))[..., : (max(height, width) + 1) // 2]


class PowerSpectrum(ForecastMetric):
    """Radially averaged power spectra of forecasts and observations: a forecast without small scales shows here.

    Only frames that were observed as a whole enter, since a spectrum has no place for missing pixels.

    Args:
        image_size: (H, W).
        prediction_length: T.

    `compute` returns `wavenumber` (K,) in waves per frame, `forecast_power` and `observed_power` (T, K) in the unit of
    the values squared, and the count `frames` (T,).

    Example:

    ```python
    >>> metric = PowerSpectrum(image_size=(16, 16), prediction_length=1)
    >>> observation = np.random.default_rng(0).normal(size=(1, 16, 16))  # (T, H, W)
    >>> metric.update(np.full((1, 16, 16), observation.mean()), observation)  # a forecast without any structure
    >>> power = metric.compute()["forecast_power"][0] / metric.compute()["observed_power"][0]
    >>> power.round(3).tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]

    ```
    """

    forecast: Tensor
    observation: Tensor
    frames: Tensor

    def __init__(self, image_size: tuple[int, int], prediction_length: int):
        super().__init__(prediction_length)
        wavenumbers = (max(image_size) + 1) // 2
        shape = (prediction_length, wavenumbers)
        self.add_sums(torch.float64, forecast=shape, observation=shape)
        self.add_sums(torch.int64, frames=(prediction_length,))

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add forecasts, see the top of the file."""
        predictions, targets, observed = self.prepare_inputs(predictions, targets, observed)
        whole = observed.flatten(2).all(2)
        for state, frames in ((self.forecast, predictions), (self.observation, targets)):
            state += torch.where(whole[..., None], radial_power(frames), 0).sum(0)
        self.frames += whole.sum(0)

    def compute(self) -> dict[str, np.ndarray]:
        frames = self.frames.cpu().numpy()
        return {
            "wavenumber": np.arange(self.forecast.shape[1]),
            "forecast_power": ratio(self.forecast.cpu().numpy(), frames[:, None]),
            "observed_power": ratio(self.observation.cpu().numpy(), frames[:, None]),
            "frames": frames,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Ensembles
# ---------------------------------------------------------------------------------------------------------------------


def ensemble_crps(ensemble: Values, targets: Values) -> tuple[Tensor, Tensor]:
    """Continuous ranked probability score of an ensemble, plain and fair; 0 is best, in the unit of the values.

    plain = mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / E^2, the score of the members' empirical distribution; fair has
    E (E - 1) for E^2, which is, on average, the score of an infinite ensemble of the same distribution: ensembles of
    different size E compare by the fair one. Ferro, "Fair scores for ensemble forecasts", Q. J. R. Meteorol. Soc. 140,
    2014, equations 1 to 3.

    Args:
        ensemble: members x, (E, ...), two or more.
        targets: y, (...).

    Returns:
        Plain and fair, float64, the targets' shape.

    Raises:
        ValueError: fewer than two members, or shapes that do not belong together.

    Example:

    ```python
    >>> plain, fair = ensemble_crps(np.array([[1.0], [3.0]]), np.array([2.0]))  # members (E, ...), observation (...)
    >>> plain.tolist(), fair.tolist()
    ([0.5], [0.0])

    ```
    """
    members, y = torch.as_tensor(ensemble).double(), torch.as_tensor(targets).double()
    size = len(members)
    if size < 2 or members.shape[1:] != y.shape:
        raise ValueError(
            f"`ensemble` must hold at least 2 members of the shape of `targets` {tuple(y.shape)}, "
            f"got {size} of {tuple(members.shape[1:])}."
        )
    error = (members - y).abs().mean(0)
    ranks = (
        2 * torch.arange(size, device=members.device) - size + 1
    )  # pairs in which a sorted member is the larger, less those in which it is the smaller
    differences = torch.tensordot(ranks.double(), members.sort(0).values, 1)  # of all pairs
    return error - differences / size**2, error - differences / (size * (size - 1))


class EnsembleScores(ForecastMetric):
    """CRPS ([`ensemble_crps`]), and the spread of ensembles against the error of their mean.

    `spread_skill_ratio` = sqrt((E + 1) / E * mean ensemble variance) / RMSE of the ensemble mean; 1 if members and
    observation are alike, less if the ensemble is too sure. Fortin et al., "Why should ensemble spread match the RMSE
    of the ensemble mean?", J. Hydrometeorology 15, 2014, equations 14 and 15.

    Args:
        prediction_length: T.
        value_range: values are divided by it (255 gives the scores of a code scaled to 0..1).

    `compute` returns `crps`, `fair_crps`, `spread` (with the factor), `rmse`, `spread_skill_ratio`, each also
    `_by_lead`, and the counts `pixels` (T,) and `windows`.

    Example:

    ```python
    >>> metric = EnsembleScores(prediction_length=1)
    >>> metric.update(np.array([1.0, 3.0]).reshape(2, 1, 1, 1), np.array([[[2.5]]]))  # (E, T, H, W), (T, H, W)
    >>> {name: float(metric.compute()[name].round(3)) for name in ("crps", "fair_crps", "spread", "rmse")}
    {'crps': 0.5, 'fair_crps': 0.0, 'spread': 1.732, 'rmse': 0.5}

    ```
    """

    crps: Tensor
    fair_crps: Tensor
    variance: Tensor
    squared: Tensor
    pixels: Tensor
    windows: Tensor

    def __init__(self, prediction_length: int, value_range: float = 1.0):
        super().__init__(prediction_length)
        self.value_range = value_range
        shape = (prediction_length,)
        self.add_sums(torch.float64, crps=shape, fair_crps=shape, variance=shape, squared=shape)
        self.add_sums(torch.int64, pixels=shape, windows=())

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add ensembles, see the top of the file."""
        predictions, targets, observed = self.prepare_inputs(predictions, targets, observed, members=True)
        members = predictions.shape[1]
        for lead in range(self.prediction_length):  # one at a time, for memory
            ensemble = predictions[:, :, lead].double().movedim(1, 0) / self.value_range
            target = targets[:, lead].double() / self.value_range
            plain, fair = ensemble_crps(ensemble, target)
            parts = (
                (self.crps, plain),
                (self.fair_crps, fair),
                (self.variance, ensemble.var(0) * (members + 1) / members),
                (self.squared, (ensemble.mean(0) - target).square()),
            )
            for state, values in parts:
                state[lead] += values.masked_fill(~observed[:, lead], 0).sum()
        self.pixels += observed.sum((0, 2, 3))
        self.windows += len(targets)

    def compute(self) -> dict[str, np.ndarray]:
        pixels = self.pixels.cpu().numpy()
        scores: dict[str, np.ndarray] = {}
        for suffix, reduce in (("", np.sum), ("_by_lead", np.asarray)):
            crps, fair_crps, variance, squared = (
                ratio(reduce(total.cpu().numpy()), reduce(pixels))
                for total in (self.crps, self.fair_crps, self.variance, self.squared)
            )
            scores |= {f"crps{suffix}": crps, f"fair_crps{suffix}": fair_crps}
            scores |= {f"spread{suffix}": np.sqrt(variance), f"rmse{suffix}": np.sqrt(squared)}
            scores[f"spread_skill_ratio{suffix}"] = ratio(np.sqrt(variance), np.sqrt(squared))
        return scores | {"pixels": pixels, "windows": self.windows.cpu().numpy()}


def wet_pixels(ensemble: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Where the observation or any member (B, E, T, H, W) reaches the threshold: bool (B, T, H, W).

    Members and observation decide alike, so that a calibrated ensemble stays calibrated on these pixels; those of the
    observation alone would make it look too dry.
    """
    return (targets >= threshold) | (ensemble.amax(1) >= threshold)


class RankHistogram(ForecastMetric):
    """How often the observation has each rank among the members: flat if they are alike.

    Rank r: the observation is larger than r members. Where n members equal the observation, as where it does not rain,
    each of the n + 1 ranks that it may have counts 1 / (n + 1): what a draw among them gives on average. Hamill,
    "Interpretation of rank histograms for verifying ensemble forecasts", Monthly Weather Review 129, 2001.

    Args:
        ensemble_size: E.
        prediction_length: T.
        wet_threshold: counts also the wet pixels alone, those where the observation or a member reaches it.

    `compute` returns the counts `ranks`, and `ranks_wet` with a `wet_threshold`, (T, E + 1) float64.

    Example:

    ```python
    >>> metric = RankHistogram(ensemble_size=2, prediction_length=1)
    >>> members = np.array([1.0, 3.0]).reshape(2, 1, 1, 1) * np.ones((2, 1, 1, 3))  # (E, T, H, W)
    >>> metric.update(members, np.array([[[0.0, 2.0, 3.0]]]))  # below both, between them, as the higher one
    >>> metric.compute()["ranks"].tolist()
    [[1.0, 1.5, 0.5]]

    ```
    """

    ties: Tensor
    ties_wet: Tensor

    def __init__(self, ensemble_size: int, prediction_length: int, wet_threshold: float | None = None):
        super().__init__(prediction_length)
        self.ensemble_size, self.wet_threshold = ensemble_size, wet_threshold
        # Pixels by lead time, members below the observation, and members equal to it: whole numbers, which add up
        # exactly; they are spread over the ranks at the end.
        shape = (prediction_length, ensemble_size + 1, ensemble_size + 1)
        self.add_sums(torch.int64, ties=shape, ties_wet=shape)

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add ensembles, see the top of the file."""
        ensemble, targets, observed = self.prepare_inputs(predictions, targets, observed, members=True)
        check_ensemble_size(ensemble, self.ensemble_size)
        below = count_true(member < targets for member in ensemble.unbind(1))
        equal = count_true(member == targets for member in ensemble.unbind(1))
        cell = (self.lead_index * (self.ensemble_size + 1) + below) * (self.ensemble_size + 1) + equal
        self.ties += count_cells(cell, observed, self.ties.shape)
        if self.wet_threshold is not None:
            wet = observed & wet_pixels(ensemble, targets, self.wet_threshold)
            self.ties_wet += count_cells(cell, wet, self.ties.shape)

    def compute(self) -> dict[str, np.ndarray]:
        counts = {"ranks": spread_ties(self.ties.cpu().numpy())}
        return counts | (
            {"ranks_wet": spread_ties(self.ties_wet.cpu().numpy())} if self.wet_threshold is not None else {}
        )


def spread_ties(ties: np.ndarray) -> np.ndarray:
    """Ranks (T, E + 1) of counts (T, E + 1, E + 1) by members below and members equal: b..b + n share alike.

    Example:

    ```python
    >>> spread_ties(np.array([[[0, 3], [2, 0]]])).tolist()  # three pixels: one member, equal; two: it is below
    [[1.5, 3.5]]

    ```
    """
    ranks = np.zeros(ties.shape[:2])
    for equal in range(ties.shape[2]):
        for below in range(ties.shape[1] - equal):
            ranks[:, below : below + equal + 1] += ties[:, below, equal, None] / (equal + 1)
    return ranks


def check_ensemble_size(ensemble: Tensor, ensemble_size: int) -> None:
    """ValueError unless the ensemble (B, E, ...) has that many members."""
    if ensemble.shape[1] != ensemble_size:
        raise ValueError(f"`predictions` must hold {ensemble_size} members, got {ensemble.shape[1]}.")


def roc_area(forecasts: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Area under the relative operating characteristic, 0..1, 1 is best, 0.5 has no skill.

    The chance that an event got a higher probability than a non-event, half of the ties added: the trapezoids' area
    under probability of detection over false alarm rate. Mason and Graham, "Areas beneath the relative operating
    characteristics (ROC) and relative operating levels (ROL) curves", Q. J. R. Meteorol. Soc. 128, 2002.

    Args:
        forecasts, events: (..., probabilities), counts of forecasts of each probability, ascending, and of the events
            that followed.

    Returns:
        (...), NaN without events or without non-events.

    Example:

    ```python
    >>> forecasts, events = np.array([6, 4]), np.array([1, 3])  # of the chances 0 and 1
    >>> float(roc_area(forecasts, events).round(3))
    0.792

    ```
    """
    events, non_events = events.astype("float64"), (forecasts - events).astype("float64")
    lower = np.cumsum(non_events, axis=-1) - non_events  # non-events of a lower probability
    ranked_higher = (events * (lower + non_events / 2)).sum(-1)
    return ratio(ranked_higher, events.sum(-1) * non_events.sum(-1))


class ProbabilityScores(ForecastMetric):
    """Reliability and ROC area ([`roc_area`]) of an ensemble's chances k / E of reaching a threshold.

    Reliability: of all forecasts of one chance, how often it happened; the chance itself if it is reliable. Wilks,
    "Statistical methods in the atmospheric sciences", 3rd edition, 2011, section 8.4.4.

    Args:
        thresholds: ascending; an event is a value of at least the threshold.
        ensemble_size: E.
        prediction_length: T.
        wet_threshold: scores also the wet pixels alone, those where the observation or a member reaches it; above it
            this leaves forecasts of chance 0 out and no others.

    `compute` returns `thresholds`, `probability` (E + 1,) the chances, `reliability` (thresholds, E + 1) the observed
    frequency of each, `roc_area` (thresholds,), `roc_area_by_lead` (thresholds, T), and the counts `forecasts` and
    `events` (thresholds, T, E + 1); with a `wet_threshold` also all of them but the first two with `_wet` appended.

    Example:

    ```python
    >>> metric = ProbabilityScores(thresholds=[1], ensemble_size=2, prediction_length=1)
    >>> members = np.array([[0.0, 2.0, 2.0], [0.0, 0.0, 2.0]]).reshape(2, 1, 1, 3)  # (E, T, H, W): chances 0, 1/2, 1
    >>> metric.update(members, np.array([[[0.0, 2.0, 2.0]]]))
    >>> metric.compute()["probability"].tolist(), metric.compute()["reliability"].tolist()
    ([0.0, 0.5, 1.0], [[0.0, 1.0, 1.0]])

    ```
    """

    forecasts: Tensor
    events: Tensor
    forecasts_wet: Tensor
    events_wet: Tensor

    def __init__(
        self,
        thresholds: Sequence[float],
        ensemble_size: int,
        prediction_length: int,
        wet_threshold: float | None = None,
    ):
        super().__init__(prediction_length)
        self.thresholds, self.ensemble_size, self.wet_threshold = (
            check_thresholds(thresholds),
            ensemble_size,
            wet_threshold,
        )
        shape = (len(self.thresholds), prediction_length, ensemble_size + 1)
        self.add_sums(torch.int64, forecasts=shape, events=shape, forecasts_wet=shape, events_wet=shape)

    def update(self, predictions: Values, targets: Values, observed: Values | None = None) -> None:
        """Add ensembles, see the top of the file."""
        ensemble, targets, observed = self.prepare_inputs(predictions, targets, observed, members=True)
        check_ensemble_size(ensemble, self.ensemble_size)
        masks = [(observed, self.forecasts, self.events)]
        if self.wet_threshold is not None:
            wet = observed & wet_pixels(ensemble, targets, self.wet_threshold)
            masks.append((wet, self.forecasts_wet, self.events_wet))
        for i, threshold in enumerate(self.thresholds):
            members = count_true(member >= threshold for member in ensemble.unbind(1))
            cell = (self.lead_index * (self.ensemble_size + 1) + members) * 2 + (targets >= threshold)
            for mask, forecasts, events in masks:
                non_events, hits = count_cells(cell, mask, (*forecasts[i].shape, 2)).unbind(-1)
                forecasts[i] += non_events + hits
                events[i] += hits

    def compute(self) -> dict[str, np.ndarray]:
        scores = {
            "thresholds": np.array(self.thresholds),
            "probability": np.arange(self.ensemble_size + 1) / self.ensemble_size,
        }
        tables = {"": (self.forecasts, self.events)}
        if self.wet_threshold is not None:
            tables["_wet"] = (self.forecasts_wet, self.events_wet)
        for suffix, table in tables.items():
            forecasts, events = (counts.cpu().numpy() for counts in table)
            scores |= {
                f"reliability{suffix}": ratio(events.sum(1), forecasts.sum(1)),
                f"roc_area{suffix}": roc_area(forecasts.sum(1), events.sum(1)),
                f"roc_area_by_lead{suffix}": roc_area(forecasts, events),
                f"forecasts{suffix}": forecasts,
                f"events{suffix}": events,
            }
        return scores


__all__ = [
    "ContingencyScores",
    "EnsembleScores",
    "ErrorScores",
    "FractionsSkillScore",
    "PowerSpectrum",
    "ProbabilityScores",
    "RankHistogram",
    "StructuralSimilarity",
    "contingency_scores",
    "ensemble_crps",
    "radial_power",
    "roc_area",
]
