"""What a diffusers scheduler does between two steps, in one vocabulary: x = alpha * clean + sigma * noise."""

import torch
from diffusers import DDPMScheduler


def use_float64_tables(scheduler) -> None:
    """Let a DDPMScheduler compute its coefficients in float64; other schedulers are left as they are.

    `1 - alphas_cumprod` in float32 costs four digits at the last steps of a long chain. Samples keep their dtype, and
    nothing of this is saved with the scheduler.
    """
    if isinstance(scheduler, DDPMScheduler):
        scheduler.betas = scheduler.betas.double()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = torch.ones((), dtype=torch.float64)


def noise_levels(scheduler) -> torch.Tensor:
    """Alpha and sigma before every step and after the last one, float64 (steps + 1, 2).

    Args:
        scheduler: after `set_timesteps`.

    Raises:
        ValueError: a scheduler whose samples are of no known form.
    """
    if not hasattr(scheduler, "timesteps") or not (hasattr(scheduler, "alphas_cumprod") or is_flow(scheduler)):
        raise ValueError(
            f"`scheduler`: {type(scheduler).__name__} has neither `alphas_cumprod` nor flow-matching `sigmas`, from "
            "which alpha and sigma of a step follow; DDPM, DDIM, DPM-Solver++, UniPC, Euler and FlowMatchEuler have."
        )
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:  # DDPM, DDIM: by timestep
        steps = scheduler.timesteps.long().cpu()
        squares = torch.cat([scheduler.alphas_cumprod.double().cpu()[steps], torch.ones(1, dtype=torch.float64)])
        return torch.stack([squares.sqrt(), (1 - squares).sqrt()], dim=1)
    sigmas = sigmas.double().cpu()[: len(scheduler.timesteps) + 1]
    if len(sigmas) == len(scheduler.timesteps):
        sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    if is_flow(scheduler):
        return torch.stack([1 - sigmas, sigmas], dim=1)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver++, UniPC keep the variance
        return torch.stack([1 / (1 + sigmas**2).sqrt(), sigmas / (1 + sigmas**2).sqrt()], dim=1)
    return torch.stack([torch.ones_like(sigmas), sigmas], dim=1)  # Euler lets it explode


def with_steps(scheduler):
    """A copy of a scheduler that has timesteps."""
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(2)
    return copy


def is_flow(scheduler) -> bool:
    """Whether samples go straight from noise to data: x = (1 - sigma) * clean + sigma * noise."""
    config = scheduler.config
    return "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas", False))


def posterior_deviation(before: torch.Tensor, after: torch.Tensor) -> float:
    """Standard deviation of the DDPM step between two noise levels (alpha, sigma), for samples of unit variance.

    Ho et al., "Denoising diffusion probabilistic models", 2020, equation 7; levels of other schedulers count with the
    signal's share alpha^2 / (alpha^2 + sigma^2) in the place of their cumulative product.
    """
    share, later = (level[0] ** 2 / level.square().sum() for level in (before, after))
    return float(((1 - later) / (1 - share) * (1 - share / later)).clamp(min=1e-20).sqrt())


def denoised(scheduler, level: torch.Tensor, model_output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """The clean sample that the network sees behind a noisy one of level (alpha, sigma).

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    alpha, sigma = (float(value) for value in level)
    if is_flow(scheduler):
        return noisy - sigma * model_output
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return model_output
    if kind == "epsilon":
        return (noisy - sigma * model_output) / alpha
    if kind == "v_prediction":
        scale = (alpha**2 + sigma**2) ** 0.5
        return (alpha / scale * noisy - sigma * model_output) / scale
    raise ValueError(f"`scheduler`: prediction_type must be epsilon, sample or v_prediction, got {kind!r}.")


def noise_for_training(
    scheduler, clean: torch.Tensor, noise: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy samples, their timesteps, and what the network should say of them.

    Args:
        scheduler: DDPM and its kin, or flow matching.
        clean, noise: (B, ...).
        share: (B,) in [0, 1): how far along the way to pure noise.

    Returns:
        noisy (B, ...), timestep (B,), target (B, ...).
    """
    number = scheduler.config.num_train_timesteps
    if is_flow(scheduler):
        sigma = share.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
        return (1 - sigma) * clean + sigma * noise, share * number, noise - clean
    timestep = (share * number).long()
    noisy = scheduler.add_noise(clean, noise, timestep)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return noisy, timestep, scheduler.get_velocity(clean, noise, timestep)
    return noisy, timestep, noise if kind == "epsilon" else clean
