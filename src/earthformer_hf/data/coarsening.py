"""Coarser grids: means of squares of pixels, of reflectivity in rain rates."""

import numpy as np

from .rain import decibels_of_rain, rain_of_decibels


def coarsened(values: np.ndarray, factor: int, decibels: list[bool]) -> np.ndarray:
    """Means of squares of `factor` pixels, of those observed if they are half or more: (n, H, W[, C]) -> coarser.

    Args:
        decibels: of each channel, whether it is dBZ, which is averaged in rain rates.
    """
    channels = values[..., None] if values.ndim == 3 else values
    frames, height, width, depth = channels.shape
    dtype = np.result_type(values.dtype, "float32")
    linear = channels.astype("float64")
    for channel in np.flatnonzero(decibels):
        linear[..., channel] = rain_of_decibels(linear[..., channel])
    squares = linear.reshape(frames, height // factor, factor, width // factor, factor, depth)
    observed = np.isfinite(squares).sum((2, 4))
    total = np.where(np.isfinite(squares), squares, 0).sum((2, 4))
    mean = np.where(2 * observed >= factor**2, total / np.maximum(observed, 1), np.nan)
    for channel in np.flatnonzero(decibels):
        mean[..., channel] = decibels_of_rain(mean[..., channel])
    return (mean[..., 0] if values.ndim == 3 else mean).astype(dtype)


__all__ = ["coarsened"]
