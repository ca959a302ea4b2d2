"""Losses of training recipes, beyond the mean squared error that the model computes itself."""

import torch


def intensity_weighted_mse(
    predictions: torch.Tensor,
    future_values: torch.Tensor,
    observed: torch.Tensor,
    intensity_weight: float,
) -> torch.Tensor:
    """Mean over observed values of (1 + intensity_weight * max(future, 0)) * (prediction - future)^2.

    Heavy rain is rare, and a plain mean squared error forgets it; cf. the balanced loss of Shi et al., "Deep Learning
    for Precipitation Nowcasting", NeurIPS 2017, https://arxiv.org/abs/1706.03458, section 3.4. With weight 0 it is the
    model's own loss.

    Args:
        predictions, future_values: (B, T, H, W, C) in the model's range.
        observed: bool, broadcasts to them.
    """
    observed = observed.expand_as(predictions)
    error = torch.where(observed, predictions - future_values, 0.0)
    weight = 1 + intensity_weight * torch.where(observed, future_values, 0.0).clamp(min=0)
    return (weight * error.square()).sum() / observed.sum()
