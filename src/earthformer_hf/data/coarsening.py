"""Coarser grids: means over the areas of their cells, of reflectivity in rain rates."""

import numpy as np

from .rain import decibels_of_rain, rain_of_decibels


LEAST_OBSERVED = 0.5  # part of a coarse cell, below which it is missing


def coarsened(values: np.ndarray, factor: int, decibels: list[bool]) -> np.ndarray:
    """Means over squares of `factor` pixels, of which half is observed: (n, H, W[, C]) -> coarser.

    Args:
        decibels: of each channel, whether it is dBZ, which is averaged in rain rates.
    """
    channels = values[..., None] if values.ndim == 3 else values
    coarser = []
    for channel, is_decibel in enumerate(decibels):
        linear = channels[..., channel].astype("float64")
        if is_decibel:
            linear = rain_of_decibels(linear)
        mean = area_means(linear, factor)
        coarser.append(decibels_of_rain(mean) if is_decibel else mean)
    result = np.stack(coarser, axis=-1).astype(np.result_type(values.dtype, "float32"))
    return result[..., 0] if values.ndim == 3 else result


def coarse_length(length: int, factor: float) -> int:
    """How many coarse cells cover so many fine ones; a last one of which less than half is covered is left out."""
    return max(1, int(np.floor(length / factor + 0.5 + 1e-9)))


def area_means(values: np.ndarray, factor: float) -> np.ndarray:
    """Means over the areas of coarse cells: (n, H, W), NaN where missing -> (n, h, w)."""
    if factor == 1:
        return values
    seen = np.isfinite(values)
    sums = _sums(_sums(np.where(seen, values, 0), factor, 1), factor, 2)
    areas = _sums(_sums(seen, factor, 1), factor, 2)
    least = LEAST_OBSERVED * factor**2 * (1 - 1e-6)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(areas >= least, sums / areas, np.nan).astype(np.result_type(values.dtype, "float32"))


def _sums(values: np.ndarray, factor: float, axis: int) -> np.ndarray:
    """Integrals along an axis over cells of width `factor`, where each value fills a cell of width 1."""
    length = values.shape[axis]
    edges = np.clip(np.arange(coarse_length(length, factor) + 1) * factor, 0, length)
    before = np.minimum(np.floor(edges).astype(int), length)
    padding = [(0, 0)] * values.ndim
    padding[axis] = (1, 1)
    total = np.cumsum(np.pad(values, padding).astype("float64"), axis=axis)  # from the edge, one step beyond the end
    shape = [1] * values.ndim
    shape[axis] = -1
    lower = np.take(total, before, axis)
    inside = (np.take(total, before + 1, axis) - lower) * (edges - before).reshape(shape)
    return np.diff(lower + inside, axis=axis)


__all__ = ["area_means", "coarse_length", "coarsened"]
