"""What is forecast instead of a network's own values, so that intensities are as frequent as the observed ones."""

import math

import torch


MAX_VALUES = 64  # of a calibration


def is_calibration(calibration: list[list[float]], prediction_length: int) -> bool:
    """Whether rows fit [`calibrated`]: `prediction_length` + 1 of them, all rising, of one length."""
    try:
        lengths = {len(row) for row in calibration}
        rising = all(0 < b - a < math.inf for row in calibration for a, b in zip(row, row[1:]))
    except TypeError:
        return False
    return (
        len(calibration) == prediction_length + 1 and len(lengths) == 1 and 2 <= min(lengths) <= MAX_VALUES and rising
    )


def calibrated(predictions: torch.Tensor, calibration: list[list[float]]) -> torch.Tensor:
    """Predictions by a calibration, piecewise linear, beyond its ends moved as at these; differentiable.

    Args:
        predictions: (B, T, H, W, C) in the model's range.
        calibration: a row of values, and for each of T lead times a row of what the network says where they are meant.
    """
    issued, *said = (predictions.new_tensor(row) for row in calibration)
    return interpolated(predictions, issued, torch.stack(said)[:, None, None, None])


def interpolated(values: torch.Tensor, issued: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """What is issued for values, piecewise linear, beyond the ends moved as at these; differentiable.

    Args:
        values: (...).
        issued: at the knots, (K,).
        knots: (..., K), rising, whose other dimensions broadcast to `values`.
    """
    slopes = issued.diff() / knots.diff(dim=-1)
    one = torch.ones_like(slopes[..., :1])
    bends = torch.cat([one, slopes, one], dim=-1).diff(dim=-1)  # of the slope, at each knot
    result = values - knots[..., 0] + issued[0]
    for k in range(len(issued)):  # one by one: maps are large
        result = result + bends[..., k] * torch.relu(values - knots[..., k])
    return result


__all__ = ["calibrated", "interpolated", "is_calibration"]
