"""Knowledge alignment: forecasts that obey a constraint, without training anew.

Each denoising step is shifted towards lower *energy*, the distance between what a member will hold and a target:

    U(z_t, t) = || quantity(z_t, t) - target ||,      z_(t-1) <- z_(t-1) - guidance_scale * sigma_t * grad U(z_t, t)

`quantity` is read from the noisy latents by an alignment network, or from the decoded frames of the clean latents that
the denoiser sees behind them. Without a `guidance_scale` each shift is as long as it takes, to first order, to bring
the energy to 0, and the network reads the clean latents too: it says which way, and decoded frames say how far.

Source: Gao et al., "PreDiff", NeurIPS 2023, https://arxiv.org/abs/2307.10422, section 3.3, equation 6.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging

from .schedules import check_stepwise, is_flow, noise_levels, posterior_deviation


logger = logging.get_logger(__name__)

Target = float | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]

# Options of schedulers under which a shift is lost (new noise replaces the sample at every step), or the noise levels
# are not what they seem.
UNGUIDED_OPTIONS = ("stochastic_sampling", "invert_sigmas", "solver_p")


class KnowledgeAlignmentCallback(PipelineCallback):
    r"""
    Shifts every step of a [`PreDiffPipeline`] towards a target; pass it as `callback_on_step_end`. Several work
    together in a [`~diffusers.callbacks.MultiPipelineCallbacks`].

    Without a `guidance_scale`, the clean latents that the denoiser sees behind a sample are read, and shifted along
    the gradient by energy / gradient^2, no further than they are long themselves, and the sample with them: what is
    read meets the target, whatever the schedule, the data and the quantity. An alignment network gives the gradient;
    how far the mean intensity is from the target is read from decoded frames: guidance goes where a network errs.

    With one, the rule for all schedulers: a sample alpha * clean + sigma * noise is brought to unit variance by
    dividing by sqrt(alpha^2 + sigma^2), and shifted there by guidance_scale * sigma_t * gradient, where sigma_t is the
    standard deviation of the DDPM step between the same two noise levels. Under DDPM that is the paper's step exactly.
    The shifts of few long steps add up to less than those of many short ones. The last step, which ends on the clean
    sample, is not shifted, so that a schedule of one step is not guided.

    The energy is one norm per member: a forecast does not depend on its neighbours. It works with the schedulers in
    `STEPWISE_SCHEDULERS` of `schedules.py`; an alignment network, with those that are no flow matching.

    Args:
        target: what `quantity` should be, also to be set later: a number, a tensor (B,) or (B, E), or a function of
            the context frames (B, T_in, H, W, C) that returns one; see [`intensity_change`], [`mean_intensity`]. The
            same function as `quantity`, a mean over frames, conserves it.
        quantity (`callable`, *optional*): a differentiable function of decoded frames (N, T_out, H, W, C) that returns
            one number per member, (N,). If omitted, an alignment network tells the mean over frames of what it was
            trained on, from the latents.
        guidance_scale (`float`, *optional*): how hard to pull, as in the paper; as hard as the target asks if omitted.
        alignment ([`EarthformerAlignmentModel`], *optional*): the network; the pipeline's own if omitted.
        future_values (`torch.Tensor`, *optional*): observed frames (B, T_out, H, W, C) whose mean intensity, or
            `quantity`, becomes the target. That is no forecast, so it needs `oracle=True`.
        oracle (`bool`): allows `future_values`.

    Raises:
        ValueError: both `target` and `future_values`, or `future_values` without `oracle=True`.
    """

    def __init__(
        self,
        target: Target | None = None,
        quantity: Callable[[torch.Tensor], torch.Tensor] | None = None,
        guidance_scale: float | None = None,
        alignment: ModelMixin | None = None,
        future_values: torch.Tensor | None = None,
        oracle: bool = False,
    ):
        super().__init__()
        if target is not None and future_values is not None:
            raise ValueError("KnowledgeAlignmentCallback: give one of `target` and `future_values`, not both.")
        if future_values is not None and not oracle:
            raise ValueError(
                "KnowledgeAlignmentCallback: `future_values` guides with what was observed later, which no forecast "
                "has; pass `oracle=True` if that is meant."
            )
        if future_values is not None:
            target = (quantity or frame_mean)(future_values)
        self.target, self.quantity = target, quantity
        self.guidance_scale, self.alignment = guidance_scale, alignment

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        subfolder: str = "alignment",
        target: Target | None = None,
        guidance_scale: float | None = None,
        **kwargs,
    ) -> "KnowledgeAlignmentCallback":
        """A callback with the alignment network of a pipeline's folder or hub id.

        Args:
            subfolder: where the network lies.
            target, guidance_scale: as for the class.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `variant`, `dtype` or
                `torch_dtype`.

        Raises:
            ValueError: another keyword.
        """
        from .unet_earthformer import EarthformerAlignmentModel

        known = (
            "revision",
            "token",
            "cache_dir",
            "force_download",
            "local_files_only",
            "variant",
            "dtype",
            "torch_dtype",
        )
        if "dtype" in kwargs:
            kwargs["torch_dtype"] = kwargs.pop("dtype")
        if set(kwargs) - set(known):
            raise ValueError(
                f"KnowledgeAlignmentCallback.from_pretrained: unknown arguments {sorted(set(kwargs) - set(known))}."
            )
        network = EarthformerAlignmentModel.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, use_safetensors=True, **kwargs
        )
        return cls(target, alignment=network.eval(), guidance_scale=guidance_scale)

    @property
    def tensor_inputs(self) -> list[str]:
        return ["latents", "denoised_latents" if self._reads_clean else "noisy_latents", "past_values"]

    @property
    def _reads_clean(self) -> bool:
        """Whether `quantity` is read from the clean latents that the denoiser sees; in the paper a network is not."""
        return self.quantity is not None or self.guidance_scale is None

    def check_inputs(self, pipeline, past_values: torch.Tensor, ensemble_size: int):
        """Called by the pipeline before any computation.

        Raises:
            ValueError: no alignment network where one is needed, one that does not fit the latents, a scheduler that
                guidance is not tested with, a `guidance_scale` that is no number, or a target of the wrong shape.
        """
        scheduler = pipeline.scheduler
        check_stepwise(scheduler)
        for option in UNGUIDED_OPTIONS:
            if scheduler.config.get(option):
                raise ValueError(f"`scheduler`: guidance does not work with {option}={scheduler.config[option]!r}.")
        if self.quantity is None:
            self._check_alignment(pipeline)
        try:
            finite = self.guidance_scale is None or math.isfinite(self.guidance_scale)
        except TypeError:
            finite = False
        if not finite:
            raise ValueError(f"`guidance_scale` must be a finite number or None, got {self.guidance_scale!r}.")
        self._target(past_values, ensemble_size)

    def _check_alignment(self, pipeline):
        network = self.alignment or getattr(pipeline, "alignment", None)
        if network is None:
            raise ValueError(
                "KnowledgeAlignmentCallback: without `quantity` the pipeline needs an `alignment` network, or the "
                "callback one."
            )
        for name in ("sample_size", "prediction_length", "in_channels"):
            ours, theirs = network.config[name], pipeline.unet.config[name]
            if list(ours) != list(theirs) if name == "sample_size" else ours != theirs:
                raise ValueError(f"`alignment`: its {name} is {ours}, that of the latents is {theirs}.")
        if is_flow(pipeline.scheduler):
            raise ValueError(
                "`scheduler`: an alignment network is trained on the noise of DDPM, which "
                f"{type(pipeline.scheduler).__name__} with flow matching does not make; give a `quantity` of decoded "
                "frames."
            )

    def callback_fn(self, pipeline, step_index: int, timesteps: torch.Tensor, callback_kwargs: dict) -> dict[str, Any]:
        latents = callback_kwargs["latents"]  # (B, E, T_out, h, w, c)
        before, after = noise_levels(pipeline.scheduler)[step_index : step_index + 2]
        target = self._target(callback_kwargs["past_values"], latents.shape[1]).flatten()  # (B * E,)
        target = target.to(latents.device, torch.float32)
        if self._reads_clean:
            basis, timestep = callback_kwargs["denoised_latents"].flatten(0, 1), torch.zeros_like(timesteps)
        else:
            basis, timestep = callback_kwargs["noisy_latents"].flatten(0, 1) / float(before.norm()), timesteps
        if self.quantity is None:
            quantity = self._alignment_quantity(pipeline, timestep, latents.device)
        else:
            quantity = self._decoded_quantity(pipeline)

        parts = zip(*(tensor.split(pipeline.max_batch_size or len(basis)) for tensor in (basis, target)))
        energy, gradient = (torch.cat(tensors) for tensors in zip(*(energy_of(quantity, *part) for part in parts)))
        if self.guidance_scale is None:
            sizes = float(after[0]) * sizes_of_steps(energy, gradient)  # a sample holds so much of the clean latents
        else:
            size = self.guidance_scale * posterior_deviation(before, after) * float(after.norm())
            sizes = torch.full_like(energy, size)
        shift = -(sizes[:, None] * gradient.flatten(1)).view_as(latents)
        shifted = (latents.float() + shift).to(latents.dtype)
        _shift_corrector(pipeline.scheduler, before, after, shift.flatten(0, 1))

        if not torch.equal(shifted, latents):
            pipeline._shifted_by.add(self)
        if step_index == pipeline.num_timesteps - 1 and self not in pipeline._shifted_by:
            logger.warning(
                f"KnowledgeAlignmentCallback: guidance changed nothing in {pipeline.num_timesteps} step(s). The last "
                "step of a schedule is never shifted, so take more steps, or a larger `guidance_scale` than "
                f"{self.guidance_scale}."
            )
        callback_kwargs["latents"] = shifted
        return callback_kwargs

    def _alignment_quantity(self, pipeline, timestep: torch.Tensor, device: torch.device) -> Callable:
        """What the alignment network reads from latents of unit variance, (N, T_out, h, w, c) -> (N,).

        Of clean ones, the mean intensity of their decoded frames, with the network's gradient.
        """
        network = self.alignment or pipeline.alignment
        if network.device != device:
            network.to(device)

        def quantity(part):
            read = network(part.to(network.dtype), timestep, return_dict=False)[0].flatten(1).mean(1).float()
            if not self._reads_clean:
                return read
            with torch.no_grad():
                held = frame_mean(pipeline.decode(part)).float()
            return read + (held - read).detach()

        return quantity

    def _decoded_quantity(self, pipeline) -> Callable:
        """`quantity` of the frames that clean latents stand for, (N, T_out, h, w, c) -> (N,)."""

        def quantity(part):
            values = self.quantity(pipeline.decode(part))
            if values.shape != (len(part),):
                raise ValueError(f"`quantity` must return {len(part)} numbers, got shape {tuple(values.shape)}.")
            return values

        return quantity

    def _target(self, past_values: torch.Tensor, ensemble_size: int) -> torch.Tensor:
        """The target of every member, (B, E)."""
        batch = len(past_values)
        target = self.target(past_values) if callable(self.target) else self.target
        try:
            target = torch.as_tensor(target, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"`target` must be a number, a tensor or a function, got {target!r}.") from None
        if not torch.isfinite(target).all():
            raise ValueError(f"`target` must be finite, got {target}.")
        if target.ndim == 0:
            return target.expand(batch, ensemble_size)
        if target.shape == (batch,):
            return target[:, None].expand(batch, ensemble_size)
        if target.shape == (batch, ensemble_size):
            return target
        raise ValueError(
            f"`target` must be one number, or of shape (B,) = ({batch},) or (B, E) = ({batch}, {ensemble_size}), got "
            f"{tuple(target.shape)}."
        )


def _shift_corrector(scheduler, before: torch.Tensor, after: torch.Tensor, shift: torch.Tensor) -> None:
    """Let UniPC's corrector keep the shift of a step.

    The next step computes this step's sample once more, from the one before it times the ratio of sigmas (of alphas
    if the solver is written for noise). So that one is shifted too, by the shift over that ratio.
    """
    if getattr(scheduler, "last_sample", None) is not None:
        kept = 1 if scheduler.config.predict_x0 else 0
        ratio = float(after[kept] / before[kept])
        if ratio > 0:  # no step follows where the noise is gone
            scheduler.last_sample = scheduler.last_sample + shift / ratio


def energy_of(quantity: Callable, latents: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """| quantity(latents) - target | of each member, and its gradient: latents (N, ...), target (N,) -> (N,) and as
    latents.

    float32, whatever the dtype of the latents. The parameters of networks inside `quantity` get no gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        latents, target = latents.detach().clone().requires_grad_(), target.clone()
        scale = latents[0].numel()  # the gradient of a mean over many pixels would vanish in half precision
        energy = (quantity(latents).float() - target).abs()
        gradient = torch.autograd.grad((energy * scale).sum(), latents)[0].float() / scale
        return energy.detach(), gradient


def sizes_of_steps(energy: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What to take of a gradient (N, ...) for an energy (N,) to fall to 0 to first order, (N,); at most so much that a
    step is as long as latents of unit variance are."""
    length = gradient.flatten(1).norm(dim=1).clamp(min=1e-20)
    return torch.minimum(energy / length, torch.full_like(length, gradient[0].numel() ** 0.5)) / length


# ---------------------------------------------------------------------------------------------------------------------
# Quantities of frames, and targets that follow from the context
# ---------------------------------------------------------------------------------------------------------------------


def frame_mean(frames: torch.Tensor) -> torch.Tensor:
    """The mean intensity of each member: frames (N, T, H, W, C) -> (N,)."""
    return frames.flatten(1).mean(1)


def intensity_change(mean: float, deviation: float, n: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Target: the mean intensity of the last context frame + mean + n deviations, not below 0.

    Args:
        mean, deviation: of the change of mean intensity, mean of the future minus last context frame, over the
            training set, in the model's range: `change_mean` and `change_deviation` in
            `pipeline.alignment.config.statistics`.
        n: how unusual a change is asked for: -2 strong decay, 0 the usual, +2 strong growth.
    """

    def target(past_values: torch.Tensor) -> torch.Tensor:
        return (frame_mean(past_values[:, -1:]) + mean + n * deviation).clamp(min=0)

    return target


def mean_intensity(mean: float, deviation: float, n: float) -> float:
    """Target: mean + n deviations of the future's mean intensity over the training set, whatever the context.

    The control of the paper, section 4.2; `mean` and `deviation` are in `pipeline.alignment.config.statistics`. It
    asks a drizzle and a squall line for the same amount of rain; mostly [`intensity_change`] is what is meant.
    """
    return mean + n * deviation


__all__ = [
    "KnowledgeAlignmentCallback",
    "frame_mean",
    "intensity_change",
    "mean_intensity",
]
