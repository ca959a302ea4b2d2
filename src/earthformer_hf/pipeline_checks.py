"""What a PreDiff pipeline refuses before any computation, each with the argument, what was expected and what came."""

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedModel

from .calibration import is_calibration
from .schedules import check_steps, check_stepwise


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def scale_factor(vae: AutoencoderKL) -> int:
    """Pixels along a side of a latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def frame_size(vae: AutoencoderKL, unet: ModelMixin) -> list[int]:
    """Height and width of the frames whose latents `unet` takes."""
    return [scale_factor(vae) * length for length in unet.config.sample_size]


def check_networks(vae: AutoencoderKL, unet: ModelMixin, forecaster: PreTrainedModel | None = None):
    """Refuse networks that do not fit each other.

    Raises:
        ValueError: other latents, a `unet` that is told of a forecast without a `forecaster` or the other way round,
            or a `forecaster` of other frames.
    """
    latents, frames = unet.config, vae.config
    if frames.latent_channels != latents.in_channels:
        raise ValueError(
            f"`unet` takes latents of {latents.in_channels} channels, `vae` gives {frames.latent_channels}."
        )
    told = 0 if forecaster is None else frames.latent_channels
    if latents.condition_channels != told:
        raise ValueError(
            f"`unet` must have condition_channels={told} {'without' if forecaster is None else 'beside'} a "
            f"`forecaster`, got {latents.condition_channels}."
        )
    if forecaster is None:
        return
    expected = {name: latents[name] for name in ("context_length", "prediction_length")}
    expected |= {"image_size": frame_size(vae, unet), "num_covariates": 0}
    expected |= dict.fromkeys(("num_channels", "num_output_channels"), frames.in_channels)
    for name, value in expected.items():
        got = getattr(forecaster.config, name)
        if (list(got) if name == "image_size" else got) != value:
            raise ValueError(f"`forecaster` must have {name}={value} to fit `unet` and `vae`, got {got}.")


def check_calibration(calibration: list[list[float]] | None, prediction_length: int):
    """Refuse a calibration that is not of so many lead times.

    Raises:
        ValueError: no rising rows of one length.
    """
    if calibration is not None and not is_calibration(calibration, prediction_length):
        raise ValueError(
            f"`calibration` must be {prediction_length + 1} rising rows of one length, got {calibration!r}."
        )


def check_blend(blend: list[list[float]] | None, prediction_length: int, forecasts: bool):
    """Refuse a blend that is not of so many lead times, or of something that there is not.

    Raises:
        ValueError: no rows of finite numbers: a member's weight, its control's and, where there is a forecaster
            (`forecasts`), that of its forecast.
    """
    if blend is None:
        return
    names = ["member", "control"] + ["forecast"] * forecasts
    try:
        fits = len(blend) == prediction_length and all(len(row) == len(names) for row in blend)
        fits = fits and all(math.isfinite(weight) for row in blend for weight in row)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"`blend` must be {prediction_length} rows of finite weights of {', '.join(names)}, got {blend!r}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of a call
# ---------------------------------------------------------------------------------------------------------------------


def check_inputs(
    pipeline,
    past_values: torch.Tensor,
    ensemble_size: int,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    eta: float,
    output_type: str,
    max_batch_size: int | None,
    callback: Callable | PipelineCallback | MultiPipelineCallbacks | None,
    tensor_names: list[str],
):
    """Refuse what a [`PreDiffPipeline`] cannot be called with.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    vae, unet = pipeline.vae, pipeline.unet
    check_networks(vae, unet, pipeline.forecaster)
    _check_frames(past_values, (unet.config.context_length, *frame_size(vae, unet), vae.config.in_channels))
    bound = 1 if max_batch_size is None else max_batch_size
    _check_integers(ensemble_size=ensemble_size, num_inference_steps=num_inference_steps, max_batch_size=bound)
    _check_noise(generator, latents, eta, (len(past_values), ensemble_size, *pipeline._latent_shape))
    if output_type not in ("np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'np', 'pt' or 'latent', got {output_type!r}.")
    _check_callback(pipeline, callback, tensor_names, past_values, ensemble_size)
    check_steps(pipeline.scheduler, int(num_inference_steps))


def stacked(past_values) -> torch.Tensor:
    """A batch (B, T, H, W, C) from what `__call__` accepts."""
    try:
        if not isinstance(past_values, (list, tuple)):
            return torch.as_tensor(past_values)
        items = [torch.as_tensor(item) for item in past_values]
    except (TypeError, ValueError, RuntimeError) as reason:
        raise ValueError(f"`past_values` must be a tensor, an array or a list of them: {reason}") from None
    items = [item[0] if item.ndim == 5 and len(item) == 1 else item for item in items]
    if not items or any(item.ndim != 4 or item.shape != items[0].shape for item in items):
        shapes = [tuple(item.shape) for item in items]
        raise ValueError(
            "`past_values` as a list must hold arrays of one shape (time, height, width, channels), with or without a "
            f"leading 1, got {shapes}."
        )
    return torch.stack(items)


def _check_frames(past_values: torch.Tensor, expected: tuple[int, ...]):
    if past_values.ndim != 5 or tuple(past_values.shape[1:]) != expected or len(past_values) == 0:
        raise ValueError(
            "`past_values` must have shape (batch, time, height, width, channels) = (at least 1, "
            f"{', '.join(map(str, expected))}), got {tuple(past_values.shape)}."
        )
    if not past_values.is_floating_point():
        raise ValueError(f"`past_values` must be floating point, got {past_values.dtype}.")
    if not torch.isfinite(past_values).all():
        raise ValueError("`past_values` must be finite: fill missing values first, as the feature extractor does.")


def _check_integers(**values):
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def _check_noise(generator, latents, eta: float, shape: tuple[int, ...]):
    """`shape`: of the latents of all members, (B, E, T_out, h, w, c)."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
    batch, ensemble_size = shape[:2]
    if isinstance(generator, list) and len(generator) != batch * ensemble_size:
        raise ValueError(
            f"`generator` as a list must have one entry per member, {batch} samples x {ensemble_size} members = "
            f"{batch * ensemble_size}, got {len(generator)}."
        )
    if latents is not None and not (isinstance(latents, torch.Tensor) and torch.isfinite(latents).all()):
        raise ValueError("`latents` must be a tensor of finite values.")
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"`latents` must have shape (B, E, T_out, h, w, c) = {shape}, got {tuple(latents.shape)}.")
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be a number from 0 to 1, got {eta!r}.")


def callback_tensors(callback, given: list[str]) -> list[str]:
    """What a callback is given: a class of diffusers says so itself, for a function it is an argument."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return list(dict.fromkeys(callback.tensor_inputs))
    return given


def _check_callback(pipeline, callback, tensor_names: list[str], past_values: torch.Tensor, ensemble_size: int):
    unknown = sorted(set(tensor_names) - set(known := pipeline._callback_tensor_inputs))
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {known}, got {unknown}.")
    if callback is not None and "denoised_latents" in tensor_names:
        check_stepwise(pipeline.scheduler)
    for part in getattr(callback, "callbacks", [callback]):
        if hasattr(part, "check_inputs"):
            part.check_inputs(pipeline, past_values, ensemble_size)


def answered(answer, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor that a callback returns, or the one it was given if it returns none of that name."""
    if not isinstance(answer, dict):
        raise ValueError(f"`callback_on_step_end` must return a dict of tensors, got {type(answer).__name__}.")
    given, got = tensors[name], answer.get(name, tensors[name])
    facts = [
        (tuple(tensor.shape), tensor.dtype, tensor.device) if isinstance(tensor, torch.Tensor) else type(tensor)
        for tensor in (given, got)
    ]
    if facts[0] != facts[1]:
        raise ValueError(
            f"`callback_on_step_end` must return `{name}` of the shape, dtype and device that it was given, "
            f"{facts[0]}, got {facts[1]}."
        )
    return got


__all__ = [
    "answered",
    "callback_tensors",
    "check_blend",
    "check_calibration",
    "check_inputs",
    "check_networks",
    "frame_size",
    "scale_factor",
    "stacked",
]
