"""Scores of forecasts: pure functions, and a small accumulator for a whole test set.

Every score comes with the counts it was made of; a score without events is undefined: NaN.
"""

from collections.abc import Sequence

import numpy as np


def contingency_counts(
    predictions: np.ndarray, targets: np.ndarray, observed: np.ndarray, thresholds: Sequence[float]
) -> dict[str, np.ndarray]:
    """Hits, misses, false alarms and correct negatives per threshold and lead time.

    Args:
        predictions, targets: (T, ...) in one unit, such as the stored code or mm/h.
        observed: bool, same shape; false values count nowhere.
        thresholds: an event is a value of at least the threshold.

    Returns:
        int64 arrays (thresholds, T).
    """
    axes = tuple(range(1, predictions.ndim))
    counts: dict[str, list] = {"hits": [], "misses": [], "false_alarms": [], "correct_negatives": []}
    for threshold in thresholds:
        said, happened = predictions >= threshold, targets >= threshold
        counts["hits"].append((said & happened & observed).sum(axes))
        counts["misses"].append((~said & happened & observed).sum(axes))
        counts["false_alarms"].append((said & ~happened & observed).sum(axes))
        counts["correct_negatives"].append((~said & ~happened & observed).sum(axes))
    return {name: np.array(values, dtype=np.int64) for name, values in counts.items()}


def critical_success_index(hits: np.ndarray, misses: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
    """CSI = hits / (hits + misses + false alarms), in 0..1, higher is better; NaN without any of the three.

    Schaefer, "The critical success index as an indicator of warning skill", Weather and Forecasting 5, 1990.
    """
    union = hits + misses + false_alarms
    return np.divide(hits, union, out=np.full(np.shape(union), np.nan), where=union > 0)


class RainScores:
    """Counts and squared errors of many forecasts of rain.

    Args:
        thresholds: in the unit of the values passed to `update`.
        value_range: the values' range, by which errors are divided (255 for a code).
    """

    def __init__(self, thresholds: Sequence[float], value_range: float = 255.0):
        self.thresholds, self.value_range = list(thresholds), value_range
        self.counts: dict[str, np.ndarray] = {}
        self.squared_error, self.pixels, self.windows = 0.0, 0, 0

    def update(self, predictions: np.ndarray, targets: np.ndarray, observed: np.ndarray):
        """Add one forecast: (T, H, W) each, `observed` bool."""
        for name, values in contingency_counts(predictions, targets, observed, self.thresholds).items():
            self.counts[name] = self.counts.get(name, 0) + values
        error = (predictions[observed].astype("float64") - targets[observed]) / self.value_range
        self.squared_error += float(np.square(error).sum())
        self.pixels += int(observed.sum())
        self.windows += 1

    @property
    def mse(self) -> float:
        """Mean squared error over observed pixels, of values divided by `value_range`; lower is better."""
        return self.squared_error / self.pixels if self.pixels else float("nan")

    def csi(self, by_lead: bool = False) -> np.ndarray:
        """CSI per threshold, pooled over all pixels, lead times and windows; `by_lead`: (thresholds, T)."""
        parts = [self.counts[name] for name in ("hits", "misses", "false_alarms")]
        return critical_success_index(*(parts if by_lead else [part.sum(1) for part in parts]))

    @property
    def csi_mean(self) -> float:
        """CSI-M: the mean of the thresholds' pooled CSI (Earthformer, table 6); NaN if one of them is undefined."""
        return float(self.csi().mean())


def fair_crps(ensemble: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of an ensemble, lower is better, in the unit of the values.

    mean |x_i - y| - mean over pairs i < j of |x_i - x_j| / 2: what an infinite ensemble of the same distribution would
    score, on average, so that ensembles of different size compare. Ferro, "Fair scores for ensemble forecasts",
    Q. J. R. Meteorol. Soc. 140, 2014, equation 3.

    Args:
        ensemble: (E, ...), two members or more.
        targets: (...).

    Returns:
        (...) float64.

    Raises:
        ValueError: fewer than two members, or shapes that do not belong together.
    """
    members = len(ensemble)
    if members < 2 or ensemble.shape[1:] != targets.shape:
        raise ValueError(
            f"fair_crps: `ensemble` must be (at least 2, *{targets.shape}) for `targets`, got {ensemble.shape}."
        )
    error = np.abs(ensemble.astype("float64") - targets).mean(0)
    ranks = 2 * np.arange(members) - members + 1  # of sorted members: how often each is the larger of a pair, net
    spread = np.tensordot(ranks, np.sort(ensemble.astype("float64"), axis=0), 1) / (members * (members - 1))
    return error - spread


class EnsembleScores:
    """Fair CRPS of many ensembles of rain, and the scores of their means.

    Args:
        thresholds, value_range: as for [`RainScores`].
    """

    def __init__(self, thresholds: Sequence[float], value_range: float = 255.0):
        self.mean = RainScores(thresholds, value_range)
        self.crps_sum: np.ndarray | float = 0.0
        self.pixels: np.ndarray | int = 0

    def update(self, ensemble: np.ndarray, targets: np.ndarray, observed: np.ndarray):
        """Add one forecast: ensemble (E, T, H, W), the others (T, H, W), `observed` bool."""
        score = fair_crps(ensemble, targets) / self.mean.value_range
        self.crps_sum = self.crps_sum + np.where(observed, score, 0).sum((1, 2))
        self.pixels = self.pixels + observed.sum((1, 2))
        self.mean.update(ensemble.mean(0), targets, observed)

    @property
    def crps(self) -> float:
        """Fair CRPS over all observed pixels, of values divided by `value_range`; lower is better."""
        return float(np.sum(self.crps_sum) / np.sum(self.pixels))

    @property
    def crps_by_lead(self) -> np.ndarray:
        """(T,), NaN where nothing was observed."""
        pixels = np.asarray(self.pixels)
        return np.divide(self.crps_sum, pixels, out=np.full(pixels.shape, np.nan), where=pixels > 0)


def three_month_means(index: np.ndarray) -> np.ndarray:
    """Moving means of months k, k+1, k+2 along the last axis: (..., T) -> (..., T - 2)."""
    return (index[..., :-2] + index[..., 1:-1] + index[..., 2:]) / 3


def correlation_by_lead(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Pearson correlation over forecasts, per lead: (N, T), (N, T) -> (T,), in -1..1; NaN where either is constant."""
    x, y = predictions - predictions.mean(0), targets - targets.mean(0)
    scale = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return np.divide((x * y).sum(0), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def rmse_by_lead(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Root mean squared error over forecasts, per lead: (N, T), (N, T) -> (T,), in the unit of the values."""
    return np.sqrt(np.square(predictions - targets).mean(0))
