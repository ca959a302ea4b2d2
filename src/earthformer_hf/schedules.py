"""What a diffusers scheduler does between two steps, in one vocabulary: x = alpha * clean + sigma * noise."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)


# Each takes one sample of one noise level to the next one, so that a sample may be changed between two steps; tested
# with their options. Others go back to samples of earlier steps (Heun, KDPM2, DPMSolverSinglestep, PNDM, SASolver).
STEPWISE_SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)


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


def check_stepwise(scheduler) -> None:
    """Refuse a scheduler that is not one of `STEPWISE_SCHEDULERS`.

    Raises:
        ValueError: names it, and those that are.
    """
    if type(scheduler) not in STEPWISE_SCHEDULERS:
        names = ", ".join(known.__name__ for known in STEPWISE_SCHEDULERS)
        raise ValueError(
            f"`scheduler`: the noise between two steps of {type(scheduler).__name__} is not known; it is of {names}."
        )


def noise_levels(scheduler) -> torch.Tensor:
    """Alpha and sigma before every step and after the last one, float64 (steps + 1, 2).

    Args:
        scheduler: one of `STEPWISE_SCHEDULERS`, after `set_timesteps`.

    Raises:
        ValueError: another scheduler.
    """
    check_stepwise(scheduler)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:  # DDPM, DDIM: by timestep
        steps = scheduler.timesteps.long().cpu()
        last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0), dtype=torch.float64).cpu()
        squares = torch.cat([scheduler.alphas_cumprod.double().cpu()[steps], last[None]])
        return torch.stack([squares.sqrt(), (1 - squares).sqrt()], dim=1)
    sigmas = sigmas.double().cpu()
    if is_flow(scheduler):
        return torch.stack([1 - sigmas, sigmas], dim=1)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver++, DEIS, UniPC keep the variance
        return torch.stack([1 / (1 + sigmas**2).sqrt(), sigmas / (1 + sigmas**2).sqrt()], dim=1)
    return torch.stack([torch.ones_like(sigmas), sigmas], dim=1)  # Euler lets it explode


def check_steps(scheduler, num_inference_steps: int) -> None:
    """Refuse steps that a scheduler cannot take.

    Raises:
        ValueError: more steps than it was made for, or predicted noise at a step that begins with noise alone: the
            clean sample, (x - sigma * noise) / alpha, is 0 / 0 there.
    """
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(num_inference_steps)
    if hasattr(copy, "sigmas") or copy.config.get("prediction_type") != "epsilon":
        return
    if (copy.alphas_cumprod[copy.timesteps.long().cpu()] == 0).any():
        raise ValueError(
            f"`scheduler`: {type(scheduler).__name__} begins with noise alone (zero terminal signal-to-noise ratio), "
            "where prediction_type 'epsilon' tells nothing of the forecast; it takes a network of 'v_prediction' or "
            "'sample'."
        )


def is_flow(scheduler) -> bool:
    """Whether samples go straight from noise to data: x = (1 - sigma) * clean + sigma * noise."""
    config = scheduler.config
    return "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas", False))


def posterior_deviation(before: torch.Tensor, after: torch.Tensor) -> float:
    """Standard deviation of the DDPM step between two noise levels (alpha, sigma), for samples of unit variance.

    Ho et al., "Denoising diffusion probabilistic models", 2020, equation 7; noise levels of other schedulers count
    with alpha^2 / (alpha^2 + sigma^2) in the place of their cumulative product. 1e-10 where nothing is left to do.
    """
    earlier, later = (pair[0] ** 2 / pair.square().sum() for pair in (before, after))
    return float(((1 - later) / (1 - earlier) * (1 - earlier / later)).clamp(min=1e-20).sqrt())


def denoised(scheduler, noise_level: torch.Tensor, model_output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """The clean sample that the network sees behind a noisy one of noise level (alpha, sigma).

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    alpha, sigma = (float(value) for value in noise_level)
    if is_flow(scheduler):
        return noisy - sigma * model_output
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "sample":
        return model_output
    if prediction_type == "epsilon":
        return (noisy - sigma * model_output) / alpha
    if prediction_type == "v_prediction":
        scale = (alpha**2 + sigma**2) ** 0.5
        return (alpha / scale * noisy - sigma * model_output) / scale
    raise ValueError(f"`scheduler`: prediction_type must be epsilon, sample or v_prediction, got {prediction_type!r}.")


def noise_for_training(
    scheduler, clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy samples, their timesteps, and what the network should say of them.

    Args:
        scheduler: DDPM and its kin, or flow matching.
        clean, noise: (B, ...).
        time: (B,) in [0, 1), from clean to pure noise.

    Returns:
        noisy (B, ...), timestep (B,), target (B, ...).
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    if is_flow(scheduler):
        sigma = time.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
        return (1 - sigma) * clean + sigma * noise, time * num_train_timesteps, noise - clean
    timestep = (time * num_train_timesteps).long()
    noisy = scheduler.add_noise(clean, noise, timestep)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "v_prediction":
        return noisy, timestep, scheduler.get_velocity(clean, noise, timestep)
    return noisy, timestep, noise if prediction_type == "epsilon" else clean


__all__ = [
    "STEPWISE_SCHEDULERS",
    "check_steps",
    "check_stepwise",
    "denoised",
    "is_flow",
    "noise_for_training",
    "noise_levels",
    "posterior_deviation",
    "use_float64_tables",
]
