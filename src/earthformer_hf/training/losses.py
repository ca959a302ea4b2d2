"""Losses of training recipes, beyond the mean squared error that the model computes itself."""

from collections.abc import Sequence

import torch

from ..schedules import noise_for_training


def intensity_weighted_mse(
    predictions: torch.Tensor,
    future_values: torch.Tensor,
    observed: torch.Tensor,
    intensity_weight: float,
    intensity_power: float = 1.0,
    lead_power: float = 0.0,
) -> torch.Tensor:
    """Mean over observed values of (1 + intensity_weight * max(future, 0)^intensity_power) * (prediction - future)^2.

    Heavy rain is rare, and a plain mean squared error forgets it; cf. the balanced loss of Shi et al., "Deep Learning
    for Precipitation Nowcasting", NeurIPS 2017, https://arxiv.org/abs/1706.03458, section 3.4. With weight 0 it is the
    model's own loss.

    Args:
        predictions, future_values: (B, T, H, W, C) in the model's range.
        observed: bool, broadcasts to them.
        lead_power: frame t counts t^-lead_power as much as the first one, of a mean weight of 1: late frames, whose
            errors are larger, do not outweigh the early ones.
    """
    observed = observed.expand_as(predictions)
    error = torch.where(observed, predictions - future_values, 0.0)
    if lead_power:
        leads = torch.arange(1.0, predictions.shape[1] + 1, device=predictions.device) ** -lead_power
        error = error * (leads / leads.mean()).sqrt()[:, None, None, None]
    weight = 1 + intensity_weight * torch.where(observed, future_values, 0.0).clamp(min=0) ** intensity_power
    return (weight * error.square()).sum() / observed.sum().clamp(min=1)


def soft_csi_loss(
    predictions: torch.Tensor,
    future_values: torch.Tensor,
    observed: torch.Tensor,
    thresholds: Sequence[float],
    width: float = 0.02,
) -> torch.Tensor:
    """1 - the critical success index of a batch, mean over the thresholds that occur in it; differentiable.

    A squared error pays for smooth maps: a cell of heavy rain half a grid cell away counts twice. This pays for maps
    that are as often above a threshold as the observed ones, at the same places. Whether a prediction reaches a
    threshold is a sigmoid of its distance; CSI = hits / (hits + misses + false alarms), as evaluation counts it.

    Args:
        predictions, future_values: (B, T, H, W, C) in the model's range.
        observed: bool, broadcasts to them.
        thresholds: in the model's range.
        width: of the sigmoid, in the model's range.
    """
    observed = observed.expand_as(predictions)
    found = []
    for threshold in thresholds:
        event = (future_values >= threshold) & observed
        forecast = torch.where(observed, torch.sigmoid((predictions - threshold) / width), 0.0)
        hits = torch.where(event, forecast, 0.0).sum()
        events = event.sum()
        csi = hits / (forecast.sum() + events - hits).clamp(min=1e-6)
        found.append(torch.where(events > 0, 1 - csi, torch.nan))
    return torch.stack(found).nanmean().nan_to_num()


def laplace_loss(
    predictions: torch.Tensor, values: torch.Tensor, observed: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """Sum over observed values of |prediction - value| / exp(log_variance) + log_variance, mean over samples.

    The reconstruction's part of PreDiff's autoencoder loss, after Rombach et al., "High-resolution image synthesis
    with latent diffusion models", CVPR 2022.

    Args:
        predictions, values: (B, ...).
        observed: bool, broadcasts to them.
        log_variance: one number for all values; 0 leaves the plain error.
    """
    observed = observed.expand_as(predictions)
    error = torch.where(observed, predictions - values, 0.0).abs() / log_variance.exp()
    return (error.sum() + log_variance * observed.sum()) / len(predictions)


def denoising_loss(model_output: torch.Tensor, target: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Mean squared error of what a denoiser should say, weighed by a learned variance per timestep.

    Mean over samples of mse / exp(log_variance) + log_variance: PreDiff's objective, after Rombach et al.,
    "High-resolution image synthesis with latent diffusion models", CVPR 2022.

    Args:
        model_output, target: (B, ...) noise, sample or velocity.
        log_variance: (B,) learned entries at the samples' timesteps; 0 leaves the plain error.
    """
    error = (model_output.float() - target.float()).square().flatten(1).mean(1)
    return (error / log_variance.exp() + log_variance).mean()


def draw_noisy_latents(
    scheduler, clean: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents with noise of a random timestep each: what a denoiser is trained on.

    Args:
        scheduler: see [`~earthformer_hf.schedules.noise_for_training`].
        clean: (B, ...).
        generator: of noise and timesteps, on the CPU; torch's own if omitted.

    Returns:
        noisy (B, ...), timestep (B,), target of the network (B, ...).
    """
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.rand(len(clean), generator=generator)  # 0 is clean, 1 pure noise
    return noise_for_training(scheduler, clean, noise.to(clean), times.to(clean))


__all__ = ["denoising_loss", "draw_noisy_latents", "intensity_weighted_mse", "laplace_loss", "soft_csi_loss"]
