"""Losses of training recipes, beyond the mean squared error that the model computes itself."""

import torch

from ..schedules import noise_for_training


def intensity_weighted_mse(
    predictions: torch.Tensor,
    future_values: torch.Tensor,
    observed: torch.Tensor,
    intensity_weight: float,
    intensity_power: float = 1.0,
) -> torch.Tensor:
    """Mean over observed values of (1 + intensity_weight * max(future, 0)^intensity_power) * (prediction - future)^2.

    Heavy rain is rare, and a plain mean squared error forgets it; cf. the balanced loss of Shi et al., "Deep Learning
    for Precipitation Nowcasting", NeurIPS 2017, https://arxiv.org/abs/1706.03458, section 3.4. With weight 0 it is the
    model's own loss.

    Args:
        predictions, future_values: (B, T, H, W, C) in the model's range.
        observed: bool, broadcasts to them.
    """
    observed = observed.expand_as(predictions)
    error = torch.where(observed, predictions - future_values, 0.0)
    weight = 1 + intensity_weight * torch.where(observed, future_values, 0.0).clamp(min=0) ** intensity_power
    return (weight * error.square()).sum() / observed.sum().clamp(min=1)


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


__all__ = ["denoising_loss", "draw_noisy_latents", "intensity_weighted_mse", "laplace_loss"]
