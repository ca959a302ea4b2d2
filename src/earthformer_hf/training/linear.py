"""The linear part of a model, fitted: leading patterns of the training frames, and a ridge regression among them."""

import torch

from ..linear_forecast import LinearForecast


@torch.no_grad()
def fit_patterns(linear: LinearForecast, frames: torch.Tensor):
    """Take the patterns that explain most of frames (N, H, W, C), around 0: orthonormal, the leading one first.

    Raises:
        ValueError: fewer frames than patterns.
    """
    count = linear.patterns.shape[-1]
    if len(frames) < count:
        raise ValueError(f"`frames` must be at least as many as the {count} patterns, got {len(frames)}.")
    found = torch.linalg.svd(frames.flatten(1).double(), full_matrices=False).Vh[:count]  # (K, H * W * C)
    linear.patterns.copy_(found.T.reshape(linear.patterns.shape))


@torch.no_grad()
def fit_weights(
    linear: LinearForecast,
    past_values: torch.Tensor,
    future_values: torch.Tensor,
    past_time_features: torch.Tensor | None = None,
    penalty: float = 1.0,
    season_penalty: float = 10.0,
):
    """Ridge regression of the patterns' amplitudes in the forecast on those in the context.

    Args:
        past_values, future_values: all windows, (N, T_in, H, W, C) and (N, T_out, H, W, C).
        past_time_features: (N, T_in, S).
        penalty: on the squared weights, in mean squared amplitudes.
        season_penalty: on those of the time features.
    """
    features = linear.features(past_values, past_time_features).double()  # (N, F)
    amplitudes = torch.einsum("bthwc,hwck->btk", future_values, linear.patterns).double()
    plain = linear.lags * linear.patterns.shape[-1]
    penalties = torch.full((features.shape[1],), season_penalty, dtype=torch.float64)
    penalties[:plain] = penalty
    scale = features[:, :plain].square().mean()
    square = features.T @ features + torch.diag(scale * penalties)
    weight = torch.linalg.solve(square, features.T @ amplitudes.flatten(1))  # (F, T_out * K)
    linear.weight.copy_(weight.T.reshape(linear.weight.shape))


__all__ = ["fit_patterns", "fit_weights"]
