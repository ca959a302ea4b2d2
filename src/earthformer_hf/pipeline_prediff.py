"""PreDiff: an ensemble of forecasts by latent diffusion.

```
past_values (B, T_in, H, W, C) -> vae.encode -> context_latents (B, T_in, h, w, c), once per sample
                                                       |
noise (B, E, T_out, h, w, c) ----> unet, scheduler, callback: step by step ----> vae.decode -> predictions
```

With a `forecaster`, the unet is also told what a deterministic model forecasts:

```
past_values -> forecaster -> frames (B, T_out, H, W, C) -> vae.encode -> condition (B, T_out, h, w, c), once per sample
```

With a `blend`, a member is moved towards that forecast, and away from the *control*, the run of a sample whose initial
noise is 0, as numerical weather prediction calls its run without perturbations:

```
latents <- a * latents + b * control + c * condition, weights of each lead time
```

Source: Gao et al., "PreDiff: Precipitation Nowcasting with Latent Diffusion Models", NeurIPS 2023,
https://arxiv.org/abs/2307.10422.
"""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from transformers import FeatureExtractionMixin, PreTrainedModel

from .calibration import calibrated
from .pipeline_checks import (
    answered,
    callback_tensors,
    check_blend,
    check_calibration,
    check_inputs,
    scale_factor,
    stacked,
)
from .pipeline_hub import PreDiffHubMixin
from .schedules import denoised, noise_levels, use_float64_tables


MAX_PIXELS = 2**18  # that the autoencoder takes at once: 16 frames of 128 x 128

_TURN = threading.RLock()  # of calls whose networks are offloaded


@dataclass
class PreDiffPipelineOutput(BaseOutput):
    """
    Output of [`PreDiffPipeline`].

    Args:
        predictions (`np.ndarray` or `torch.Tensor`): (B, E, T_out, H, W, C) in the model's range; the latents where
            `output_type="latent"`.
        latents (`torch.Tensor`): (B, E, T_out, h, w, c).
    """

    predictions: np.ndarray | torch.Tensor
    latents: torch.Tensor


def _component_classes() -> dict[str, type]:
    """What each component is loaded as. The imports stand here because diffusers, when it runs a hub repository's
    code, downloads the modules that this file imports, but not those that they import in turn."""
    from .feature_extraction_earthformer import EarthformerFeatureExtractor
    from .modeling_earthformer import EarthformerForPrediction
    from .unet_earthformer import EarthformerAlignmentModel, EarthformerUNetModel

    return {
        "vae": AutoencoderKL,
        "unet": EarthformerUNetModel,
        "scheduler": SchedulerMixin,
        "alignment": EarthformerAlignmentModel,
        "feature_extractor": EarthformerFeatureExtractor,
        "forecaster": EarthformerForPrediction,
    }


class PreDiffPipeline(PreDiffHubMixin, DiffusionPipeline):
    r"""
    Draws an ensemble of forecasts from the frames before.

    A call works on a copy of the pipeline with its own scheduler, which its callbacks are given, so that several
    threads may call one pipeline; the networks are shared. Where they are offloaded, and so move, calls take turns.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): between frames and latents, frame by frame.
        unet ([`EarthformerUNetModel`]): denoises the latents of a forecast, given those of its context.
        scheduler ([`~diffusers.SchedulerMixin`]): DDPM, DDIM, DPM-Solver++, DEIS, UniPC, Euler, or FlowMatchEuler for
            a network trained by flow matching.
        alignment ([`EarthformerAlignmentModel`], *optional*): for [`KnowledgeAlignmentCallback`].
        feature_extractor ([`EarthformerFeatureExtractor`], *optional*): carried along for the caller; the pipeline
            takes and returns the model's range.
        forecaster ([`EarthformerForPrediction`], *optional*): of the same frames; `unet` is told what it forecasts, as
            the latents of `vae`, and has as many `condition_channels`. Without one it is the published pipeline.
        calibration (`list[list[float]]`, *optional*): what is decoded instead of the networks' own values, so that
            intensities are as frequent as the observed ones, in the form of [`EarthformerConfig`]'s. Fitted by
            `examples/calibrate_prediff.py`; None for none, as published.
        blend (`list[list[float]]`, *optional*): for each lead time, how much of a member's own latents, of its
            sample's control and, with a `forecaster`, of its forecast makes the latents that are decoded. Members do
            not depend on each other. Fitted by the same example; None for none, as published.

    Raises:
        ValueError: a `calibration` or `blend` of another form.

    Example:

    ```python
    >>> import torch
    >>> from earthformer_hf import PreDiffPipeline

    >>> pipeline = PreDiffPipeline.from_pretrained("model_cards/prediff-radar-small")
    >>> ensemble = pipeline(past_values, ensemble_size=10, generator=torch.Generator().manual_seed(0)).predictions
    >>> chance = (ensemble[..., 0] > 0.6).mean(axis=1)  # of exceeding a threshold, (B, T_out, H, W)
    ```
    """

    model_cpu_offload_seq = "forecaster->unet->vae"
    _component_classes = staticmethod(_component_classes)
    _optional_components = ["alignment", "feature_extractor", "forecaster"]
    _exclude_from_cpu_offload = ["alignment"]
    _callback_tensor_inputs = ["latents", "noisy_latents", "denoised_latents", "context_latents", "past_values"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        alignment: ModelMixin | None = None,
        feature_extractor: FeatureExtractionMixin | None = None,
        forecaster: PreTrainedModel | None = None,
        calibration: list[list[float]] | None = None,
        blend: list[list[float]] | None = None,
    ):
        super().__init__()
        check_calibration(calibration, unet.config.prediction_length)
        check_blend(blend, unet.config.prediction_length, forecaster is not None)
        self.register_modules(
            vae=vae, unet=unet, scheduler=scheduler, alignment=alignment, feature_extractor=feature_extractor,
            forecaster=forecaster,
        )  # fmt: skip
        self.register_to_config(calibration=calibration, blend=blend)
        self._interrupt, self._num_timesteps = False, 0
        self._max_batch_size: int | None = None
        self._shifted_by: set[PipelineCallback] = set()  # the guidance that has changed latents
        self._blended_with: torch.Tensor | None = None  # what a call adds to each member, (B, T_out, h, w, c)

    @property
    def interrupt(self) -> bool:
        """A callback sets `_interrupt` of the pipeline that it is given, to leave out the remaining steps."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of a call; read by its callbacks, 0 outside."""
        return self._num_timesteps

    @property
    def max_batch_size(self) -> int | None:
        """A call's bound on the members of one network call; read by its callbacks, None outside."""
        return self._max_batch_size

    @torch.no_grad()
    def __call__(
        self,
        past_values: torch.Tensor | np.ndarray | list,
        ensemble_size: int = 8,
        num_inference_steps: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "np",
        return_dict: bool = True,
        max_batch_size: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> PreDiffPipelineOutput | tuple:
        r"""
        Args:
            past_values: context frames (B, T_in, H, W, C) in the model's range, or a list of B arrays of shape
                (T_in, H, W, C) or (1, T_in, H, W, C).
            ensemble_size (`int`): members E per sample.
            num_inference_steps (`int`): denoising steps.
            generator: from one generator (or, by default, from torch's) a base seed is drawn; the noise of member k of
                sample b follows from (base, b, k) alone, so that it is the same whatever the number of samples, the
                ensemble size or `max_batch_size`. A list of B * E generators gives each member the noise that the
                first member of the first sample would have with that generator alone.
            latents (`torch.Tensor`, *optional*): initial noise, (B, E, T_out, h, w, c).
            eta (`float`): for DDIM: 0 deterministic, 1 as noisy as DDPM.
            output_type (`str`): "np" or "pt" for frames, "latent" for latents.
            return_dict (`bool`): else a tuple (predictions, latents).
            max_batch_size (`int`, *optional*): members in one call of the networks; all at once if omitted, except for
                `vae`, which never takes more than `MAX_PIXELS` at once.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step, returns a
                dict with the `latents` to go on with; or a [`~diffusers.callbacks.PipelineCallback`].
            callback_on_step_end_tensor_inputs (`list[str]`): what a function is given: "latents" after the step and
                "noisy_latents" before it, "denoised_latents" (the clean latents that the network saw behind them,
                blended as the result will be), all float32 (B, E, T_out, h, w, c); "context_latents"
                (B, T_in, h, w, c); "past_values" (B, T_in, H, W, C).

        Returns:
            [`PreDiffPipelineOutput`] or a tuple.

        Raises:
            ValueError: an argument that cannot work, before any computation; what a callback returns; NaN latents.
        """
        # 1. Check inputs
        past_values, callback = stacked(past_values), callback_on_step_end
        names = callback_tensors(callback, callback_on_step_end_tensor_inputs)
        check_inputs(
            self, past_values, ensemble_size, num_inference_steps, generator, latents, eta, output_type,
            max_batch_size, callback, names,
        )  # fmt: skip
        grid = (len(past_values), int(ensemble_size))  # B, E
        with self._call(max_batch_size) as call:
            # 2. Encode the context and what is forecast from it, once for all members
            past_values = past_values.to(call._execution_device)
            context_latents, condition = call._encode(past_values), call._condition(past_values)
            # 3. Prepare timesteps
            use_float64_tables(call.scheduler)
            call.scheduler.set_timesteps(int(num_inference_steps), device=call._execution_device)
            # 4. Prepare latents
            generators = _member_generators(generator, *grid)
            latents = call.prepare_latents(generators, latents)  # (B * E, T_out, h, w, c)
            # 5. Denoise, the control first
            given = context_latents, condition, past_values
            call._blended_with = None if self.config.blend is None else call._control(*given, eta)
            latents = call._denoise(latents, *given, generators, eta, callback, names)
            latents = call._blended(latents)
            # 6. Decode
            predictions = latents if output_type == "latent" else call.decode(latents)
        predictions, latents = predictions.unflatten(0, grid), latents.unflatten(0, grid)
        predictions = predictions.float().cpu().numpy() if output_type == "np" else predictions
        output = PreDiffPipelineOutput(predictions=predictions, latents=latents)
        return output if return_dict else output.to_tuple()

    @contextmanager
    def _call(self, max_batch_size: int | None) -> Iterator[Self]:
        """What one call works on: a copy of the pipeline, with its own scheduler and state."""
        call = copy.copy(self)
        call.scheduler = copy.deepcopy(self.scheduler)
        call._interrupt, call._num_timesteps, call._shifted_by, call._blended_with = False, 0, set(), None
        call._max_batch_size = max_batch_size and int(max_batch_size)
        offloaded = hasattr(self, "_offload_device") or self._maybe_raise_error_if_group_offload_active()
        with _TURN if offloaded else nullcontext():
            try:
                yield call
            finally:
                self.maybe_free_model_hooks()

    def prepare_latents(self, generators: list[torch.Generator], latents: torch.Tensor | None = None) -> torch.Tensor:
        """The latents that denoising begins with, float32 (B * E, T_out, h, w, c).

        Args:
            generators: of every member, B * E on the CPU, so that noise is the same on every device.
            latents: noise of unit variance to take instead, (B, E, T_out, h, w, c).
        """
        if latents is None:
            latents = torch.stack([torch.randn(self._latent_shape, generator=member) for member in generators])
        latents = latents.reshape(-1, *self._latent_shape).to(self._execution_device, torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (B, T, H, W, C) -> the mode of their latents (B, T, h, w, c), in the precision of `unet`."""
        return encode_frames(self.vae, frames, self._max_batch_size).to(self.unet.dtype)

    def _condition(self, past_values: torch.Tensor) -> torch.Tensor | None:
        """What the forecaster says follows on context frames, as [`forecast_latents`] in the precision of `unet`."""
        if self.forecaster is None:
            return None
        bound = self._max_batch_size
        return forecast_latents(self.forecaster, self.vae, past_values, bound).to(self.unet.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, T, h, w, c) -> calibrated frames (N, T, H, W, C) in the model's range; differentiable."""
        frames = decode_latents(self.vae, latents, self._max_batch_size)
        return frames if self.config.calibration is None else calibrated(frames, self.config.calibration)

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        """Of one member, (T_out, h, w, c)."""
        config = self.unet.config
        return (config.prediction_length, *config.sample_size, config.in_channels)

    def _control(self, context_latents, condition, past_values, eta) -> torch.Tensor:
        """What all members of a sample are blended with, (B, T_out, h, w, c): its control and its forecast."""
        control = copy.copy(self)
        control.scheduler = copy.deepcopy(self.scheduler)
        control.set_progress_bar_config(disable=True)
        calm = torch.zeros(len(past_values), *self._latent_shape, device=self._execution_device)
        generators = [torch.Generator().manual_seed(0) for _ in calm]  # for schedulers that add noise at each step
        parts = [control._denoise(calm, context_latents, condition, past_values, generators, eta, None, [])]
        parts += [] if condition is None else [condition.float()]
        weights = calm.new_tensor(self.config.blend).T[1:, :, None, None, None]  # (1 or 2, T_out, 1, 1, 1)
        return torch.stack([weight * part for weight, part in zip(weights, parts)]).sum(0)

    def _blended(self, latents: torch.Tensor) -> torch.Tensor:
        """A call's clean latents (B * E, T_out, h, w, c) as they are decoded."""
        if self._blended_with is None:
            return latents
        own = latents.new_tensor(self.config.blend)[:, :1, None, None]  # (T_out, 1, 1, 1)
        return own * latents + self._blended_with.repeat_interleave(len(latents) // len(self._blended_with), 0)

    def _denoise(
        self, latents, context_latents, condition, past_values, generators, eta, callback, tensor_names
    ) -> torch.Tensor:
        """All steps of the scheduler, each followed by the callback: noise -> latents (B * E, T_out, h, w, c)."""
        timesteps, grid = self.scheduler.timesteps, (len(past_values), len(latents) // len(past_values))
        self._num_timesteps = len(timesteps)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {name: given for name, given in (("eta", eta), ("generator", generators)) if name in accepted}
        see_denoised = callback is not None and "denoised_latents" in tensor_names
        by_step = noise_levels(self.scheduler) if see_denoised else None
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                noisy_latents = latents
                model_output = self._predict(noisy_latents, timestep, context_latents, condition)
                latents = self.scheduler.step(model_output, timestep, noisy_latents, **options).prev_sample.float()
                if callback is not None:
                    tensors = {
                        "latents": latents.unflatten(0, grid),
                        "noisy_latents": noisy_latents.unflatten(0, grid),
                        "context_latents": context_latents,
                        "past_values": past_values,
                    }
                    if by_step is not None:
                        denoised_latents = denoised(self.scheduler, by_step[step], model_output, noisy_latents)
                        tensors["denoised_latents"] = self._blended(denoised_latents).unflatten(0, grid)
                    answer = callback(self, step, timestep, {name: tensors[name] for name in tensor_names})
                    latents = answered(answer, "latents", tensors).flatten(0, 1)
                    context_latents = answered(answer, "context_latents", tensors)
                progress_bar.update()
                if self.interrupt:
                    break
        _check_finite(latents, self.scheduler, eta)
        return latents

    def _predict(self, latents, timestep, context_latents, condition) -> torch.Tensor:
        """The network's output for all members, float32 (B * E, T_out, h, w, c), a bounded number at a time."""
        ensemble_size = len(latents) // len(context_latents)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, timestep)
        latents = latents.to(self.unet.dtype)
        outputs = []
        for part in torch.arange(len(latents), device=latents.device).split(self._max_batch_size or len(latents)):
            sample = part // ensemble_size
            told = None if condition is None else condition[sample]
            outputs.append(self.unet(latents[part], timestep, context_latents[sample], told, return_dict=False)[0])
        return torch.cat(outputs).float()


# ---------------------------------------------------------------------------------------------------------------------
# Frames and latents
# ---------------------------------------------------------------------------------------------------------------------


def encode_frames(vae: AutoencoderKL, frames: torch.Tensor, max_batch_size: int | None = None) -> torch.Tensor:
    """Frames (N, T, H, W, C) -> the mode of their scaled latents (N, T, h, w, c), at most `MAX_PIXELS` at once.

    Args:
        max_batch_size: a further bound, on the samples at once.
    """
    images = frames.flatten(0, 1).permute(0, 3, 1, 2).to(vae.dtype).contiguous()  # (N * T, C, H, W)
    parts = _split(images, frames.shape[2] * frames.shape[3], frames.shape[1], max_batch_size)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])  # (N * T, c, h, w)
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return latents.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, max_batch_size: int | None = None) -> torch.Tensor:
    """Scaled latents (N, T, h, w, c) -> frames (N, T, H, W, C), at most `MAX_PIXELS` at once; differentiable.

    Args:
        max_batch_size: a further bound, on the samples at once.
    """
    images = latents.flatten(0, 1).permute(0, 3, 1, 2).to(vae.dtype)  # (N * T, c, h, w)
    images = (images / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).contiguous()
    pixels = latents.shape[2] * latents.shape[3] * scale_factor(vae) ** 2
    parts = _split(images, pixels, latents.shape[1], max_batch_size)
    frames = torch.cat([vae.decode(part).sample for part in parts])  # (N * T, C, H, W)
    return frames.permute(0, 2, 3, 1).unflatten(0, latents.shape[:2])


def forecast_latents(
    forecaster: PreTrainedModel, vae: AutoencoderKL, past_values: torch.Tensor, max_batch_size: int | None = None
) -> torch.Tensor:
    """Context frames (N, T_in, H, W, C) -> latents of the frames that a model forecasts from them alone, which are not
    clipped, (N, T_out, h, w, c).

    Args:
        max_batch_size: a bound on the samples at once.
    """
    parts = past_values.to(forecaster.dtype).split(max_batch_size or len(past_values))
    frames = torch.cat([forecaster(past_values=part).predictions for part in parts])  # (N, T_out, H, W, C)
    return encode_frames(vae, frames, max_batch_size)


def _split(images: torch.Tensor, pixels: int, length: int, max_batch_size: int | None) -> tuple[torch.Tensor, ...]:
    """Images of so many pixels, of samples of so many images, in parts of nearly one size that `vae` takes at once."""
    bound = max(1, MAX_PIXELS // pixels)
    bound = bound if max_batch_size is None else min(bound, max_batch_size * length)
    return images.tensor_split(math.ceil(len(images) / bound))


def _member_generators(generator, batch: int, ensemble_size: int) -> list[torch.Generator]:
    """One generator per member, on the CPU: the same noise on every device."""
    if isinstance(generator, list):
        seeds = [(_random_seed(one), 0, 0) for one in generator]
    else:
        base = _random_seed(generator)
        seeds = [(base, member, sample) for sample in range(batch) for member in range(ensemble_size)]
    states = [np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] for seed in seeds]
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def _random_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))


def _check_finite(latents: torch.Tensor, scheduler, eta: float):
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the latents are not finite after {len(scheduler.timesteps)} steps of {type(scheduler).__name__} with "
            f"eta={eta}: try other options of the scheduler, or look at the weights."
        )


__all__ = ["PreDiffPipeline", "PreDiffPipelineOutput", "decode_latents", "encode_frames", "forecast_latents"]
