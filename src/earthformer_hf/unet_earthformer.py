"""The networks of PreDiff: an Earthformer-shaped denoiser, and the network that tells what a noisy forecast will hold.

```
context (B, T_in, h, w, c)  sample (B, T_out, h, w, c)  + a channel that marks the context
                 \\        /
        level 0: residual block + cuboid attention ------ + ------ residual block + cuboid attention -> T_out frames
                 | merge 2x2                                                              ^ upsample
        level 1: residual block + cuboid attention ------------- residual block + cuboid attention
```

A condition, what is known already about each frame of the forecast, stands beside that frame in further channels.
Every residual block takes the time embedding of the denoising step. The alignment network is the left half, read out
frame by frame through attention pooling.

Source: Gao et al., "PreDiff: Precipitation Nowcasting with Latent Diffusion Models", NeurIPS 2023,
https://arxiv.org/abs/2307.10422, section 3 and appendix. The attention itself is in `cuboid.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .cuboid import (
    MAX_LEVELS,
    MAX_SIZE,
    SELF_ATTENTION_PATTERNS,
    Cuboid,
    CuboidAttentionBase,
    CuboidLayerConfig,
    CuboidSelfAttentionBlock,
    FeedForward,
    PatchMerging,
    PositionEmbedding,
    SafeGroupNorm,
    Upsample,
    check_layers,
    in_half_precision,
    pattern_cuboids,
    reduced_size,
)
from .winograd import winograd_conv3d


@dataclass
class EarthformerUNetOutput(BaseOutput):
    """
    Output of [`EarthformerUNetModel`].

    Args:
        sample (`torch.Tensor`): (B, T_out, h, w, c), what the training objective asks for: noise, sample or velocity.
    """

    sample: torch.Tensor


@dataclass
class EarthformerAlignmentOutput(BaseOutput):
    """
    Output of [`EarthformerAlignmentModel`].

    Args:
        prediction (`torch.Tensor`): (B, T_out, out_channels), a number per frame of the noise-free forecast.
    """

    prediction: torch.Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


def group_norm(channels: int) -> SafeGroupNorm:
    """32 groups where they divide the channels, else one group per channel (which cancels an added embedding)."""
    return SafeGroupNorm(32 if channels % 32 == 0 else channels, channels)


class TimeResidualBlock(nn.Module):
    """Two 3x3x3 convolutions over time, height and width, between which the time embedding enters.

    Args:
        in_channels, out_channels: where they differ, a 1x1x1 convolution is the residual.
        embedding_channels: of the time embedding; None for a block without one.
        scale_shift: whether the embedding scales and shifts the second norm's output, or is added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None,
        dropout: float,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_proj = None
        if embedding_channels is not None:
            self.time_proj = nn.Linear(embedding_channels, (2 if scale_shift else 1) * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """hidden_states (B, T, H, W, C_in), embedding (B, E) -> (B, T, H, W, C_out)."""
        volume = hidden_states.permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
        if torch.is_grad_enabled() and not in_half_precision(volume):
            volume = volume.contiguous()  # else convolutions are as fast with channels last
        hidden = winograd_conv3d(F.silu(self.norm1(volume)), self.conv1)
        if self.time_proj is None or embedding is None:
            hidden = self.norm2(hidden)
        else:
            embedding = self.time_proj(F.silu(embedding))[:, :, None, None, None]
            if self.scale_shift:
                scale, shift = embedding.chunk(2, dim=1)
                hidden = self.norm2(hidden) * (1 + scale) + shift
            else:
                hidden = self.norm2(hidden + embedding)
        hidden = self.shortcut(volume) + winograd_conv3d(self.dropout(F.silu(hidden)), self.conv2)
        return hidden.permute(0, 2, 3, 4, 1).contiguous()


class AttentionPooling(nn.Module):
    """One vector per frame: its mean asks every place of the frame.

    The read-out of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """

    def __init__(self, channels: int, places: int, num_heads: int, out_channels: int):
        super().__init__()
        self.num_heads = num_heads
        self.position_embedding = nn.Parameter(torch.randn(places + 1, channels) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, places, C) -> (N, out_channels)."""
        tokens = torch.cat([hidden_states.mean(1, keepdim=True), hidden_states], dim=1) + self.position_embedding
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mean = F.scaled_dot_product_attention(query[:, :, :1], key, value)  # (N, heads, 1, C / heads)
        return self.out_proj(mean.flatten(1))


@dataclass(frozen=True)
class PathConfig:
    """What the way down and the way up have in common.

    Args:
        layer_config: of all attention and feed-forward layers.
        channels: of each level, the finest first.
        depths: attention blocks of each level, each after the level's residual block.
        cuboids: of each level's blocks.
        num_global_vectors: 0 for none.
        time_scale_shift: how the time embedding enters, see [`TimeResidualBlock`].
    """

    layer_config: CuboidLayerConfig
    channels: Sequence[int]
    depths: Sequence[int]
    cuboids: Sequence[Sequence[Cuboid]]
    num_global_vectors: int
    time_scale_shift: bool

    def residual_blocks(self) -> nn.ModuleList:
        """One per level."""
        time_channels = 4 * self.channels[0]
        return nn.ModuleList(
            TimeResidualBlock(width, width, time_channels, 0.0, self.time_scale_shift) for width in self.channels
        )

    def attention_blocks(self, last_level: int | None) -> nn.ModuleList:
        """A list of blocks per level. The global vectors end with `last_level`: its last attention reads them only."""
        return nn.ModuleList(
            nn.ModuleList(
                CuboidSelfAttentionBlock(
                    self.layer_config,
                    width,
                    cuboids,
                    use_global_vectors=self.num_global_vectors > 0,
                    update_last=level != last_level or block < depth - 1,
                )
                for block in range(depth)
            )
            for level, (width, depth, cuboids) in enumerate(zip(self.channels, self.depths, self.cuboids))
        )


class DownPath(nn.Module):
    """From frames and a denoising step to the tokens of every level: what both networks begin with.

    Args:
        config: of both paths.
        frames, size, in_channels: of the input.
        update_last: whether the last attention updates the global vectors, for a way up that reads them.
    """

    def __init__(self, config: PathConfig, frames: int, size: Sequence[int], in_channels: int, update_last: bool):
        super().__init__()
        channels, num_global_vectors = config.channels, config.num_global_vectors
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.in_block = TimeResidualBlock(in_channels, channels[0], None, config.layer_config.dropout)
        self.position_embedding = PositionEmbedding(frames, size, channels[0])
        self.global_vectors = (
            nn.Parameter(torch.zeros(num_global_vectors, channels[0])) if num_global_vectors else None
        )
        self.residuals = config.residual_blocks()
        self.levels = config.attention_blocks(last_level=None if update_last else len(channels) - 1)
        self.merges = nn.ModuleList(
            PatchMerging(before, after, (2, 2), config.layer_config.layer_norm_eps)
            for before, after in zip(channels, channels[1:])
        )
        self.global_projections = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(channels, channels[1:]) if num_global_vectors
        )

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T, h, w, C), timestep (B,) -> tokens of every level, time embedding, global vectors."""
        embedding = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))  # (B, 4 * channels[0])
        hidden_states = self.in_block(hidden_states)
        hidden_states = hidden_states + self.position_embedding(hidden_states.device)
        global_vectors = None
        if self.global_vectors is not None:
            global_vectors = self.global_vectors.expand(hidden_states.shape[0], -1, -1)
        states = []
        for i, blocks in enumerate(self.levels):
            if i > 0:
                hidden_states = self.merges[i - 1](hidden_states)
                if global_vectors is not None:
                    global_vectors = self.global_projections[i - 1](global_vectors)
            for block in blocks:  # one residual block per level, before each of its attention blocks
                hidden_states, global_vectors = block(self.residuals[i](hidden_states, embedding), global_vectors)
            states.append(hidden_states)
        return states, embedding, global_vectors


class UpPath(nn.Module):
    """From the tokens of every level of the way down to new tokens of the finest."""

    def __init__(self, config: PathConfig):
        super().__init__()
        channels = config.channels
        self.residuals = config.residual_blocks()
        self.levels = config.attention_blocks(last_level=0)
        self.upsamples = nn.ModuleList(Upsample(after, before) for before, after in zip(channels, channels[1:]))
        self.global_projections = nn.ModuleList(
            nn.Linear(after, before) for before, after in zip(channels, channels[1:]) if config.num_global_vectors
        )

    def forward(
        self, states: Sequence[torch.Tensor], embedding: torch.Tensor, global_vectors: torch.Tensor | None
    ) -> torch.Tensor:
        """What `DownPath` returns: (B, T, h_i, w_i, channels[i]) per level, (B, E), (B, G, C) -> (B, T, h, w, C)."""
        hidden_states, coarsest = states[-1], len(states) - 1
        for i in range(coarsest, -1, -1):
            if i < coarsest:
                hidden_states = self.upsamples[i](hidden_states, states[i].shape[2:4]) + states[i]
                if global_vectors is not None:
                    global_vectors = self.global_projections[i](global_vectors)
            for block in self.levels[i]:
                hidden_states, global_vectors = block(self.residuals[i](hidden_states, embedding), global_vectors)
        return hidden_states


def initialize(module: nn.Module):
    """As the originals: normal linear maps with variance 1 / fan-in, and zeros at the end of every residual branch."""
    if isinstance(module, FeedForward):
        nn.init.kaiming_normal_(module.up.weight, nonlinearity="linear")
        nn.init.zeros_(module.up.bias)
        nn.init.zeros_(module.down.weight)
        nn.init.zeros_(module.down.bias)
    elif isinstance(module, CuboidAttentionBase):
        nn.init.trunc_normal_(module.relative_position_bias, std=0.02)
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and name != "global_out_proj":  # which keeps PyTorch's default
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        nn.init.zeros_(module.out_proj.weight)
        nn.init.zeros_(module.out_proj.bias)
    elif isinstance(module, TimeResidualBlock):
        nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(module.conv2.bias)
    elif isinstance(module, PatchMerging):
        nn.init.kaiming_normal_(module.reduction.weight, nonlinearity="linear")
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, DownPath) and module.global_vectors is not None:
        nn.init.trunc_normal_(module.global_vectors, std=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class EarthformerNoisyModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """What [`EarthformerUNetModel`] and [`EarthformerAlignmentModel`] share: checks."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CuboidSelfAttentionBlock", "TimeResidualBlock", "PositionEmbedding"]
    _repeated_blocks = ["CuboidSelfAttentionBlock"]

    def _path_config(self, frames: int) -> PathConfig:
        """The configuration, checked and with one value per level.

        Args:
            frames: of the sequence that the network sees.

        Raises:
            ValueError: a field that cannot work.
        """
        config = self.config
        channels, heads = config.block_out_channels, config.num_attention_heads
        if len(channels) > MAX_LEVELS:
            raise ValueError(f"`block_out_channels` must have at most {MAX_LEVELS} entries, got {len(channels):,}.")
        depths, patterns = self._per_level("layers_per_block"), self._per_level("attention_pattern")
        if len(channels) == 0 or any(width < 1 or width % heads for width in channels):
            raise ValueError(f"`block_out_channels` must be multiples of num_attention_heads={heads}, got {channels}.")
        if min(depths) < 1:
            raise ValueError(f"`layers_per_block` must be at least 1, got {config.layers_per_block}.")
        if len(config.sample_size) != 2 or min(config.sample_size) < 1:
            raise ValueError(f"`sample_size` must be a positive height and width, got {config.sample_size}.")
        if config.prediction_length < 1 or config.get("context_length", 1) < 1 or config.in_channels < 1:
            raise ValueError("`context_length`, `prediction_length` and `in_channels` must be at least 1.")
        further = config.get("num_global_vectors", 0), config.get("condition_channels", 0)
        if min(further) < 0:
            raise ValueError("`num_global_vectors` and `condition_channels` must be at least 0.")
        if max(frames, config.in_channels, *further, *channels, *config.sample_size) > MAX_SIZE:
            raise ValueError(f"frames, channels, global vectors and `sample_size` must be at most {MAX_SIZE:,}.")
        scale_shift = config.resnet_time_scale_shift
        if scale_shift not in ("default", "scale_shift"):
            raise ValueError(f"`resnet_time_scale_shift` must be 'default' or 'scale_shift', got {scale_shift!r}.")
        cuboids, grids, size = [], [], config.sample_size
        for pattern in patterns:
            grids.append((frames, *size))
            cuboids.append(pattern_cuboids(pattern, grids[-1], SELF_ATTENTION_PATTERNS))
            size = reduced_size(size, (2, 2))
        check_layers(depths, cuboids, grids)
        layer_config = CuboidLayerConfig(
            heads, config.mask_padding, dropout=config.dropout, attention_dropout=config.dropout
        )
        return PathConfig(
            layer_config, channels, depths, cuboids, config.get("num_global_vectors", 0), scale_shift == "scale_shift"
        )

    def _per_level(self, name: str) -> list:
        value, levels = self.config[name], len(self.config.block_out_channels)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * levels
        if len(values) != levels:
            raise ValueError(f"`{name}` must have one value, or one per level ({levels}), got {value}.")
        return values

    def _check(self, name: str, frames: torch.Tensor, length: int, channels: int):
        expected = (length, *self.config.sample_size, channels)
        if frames.ndim != 5 or tuple(frames.shape[1:]) != expected or frames.shape[0] == 0:
            raise ValueError(
                f"`{name}` must have shape (batch, time, height, width, channels) = (at least 1, "
                f"{', '.join(map(str, expected))}), got {tuple(frames.shape)}."
            )

    @staticmethod
    def _timesteps(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        """One number for all, or one per sample -> (B,)."""
        timestep, batch = torch.as_tensor(timestep, device=sample.device), sample.shape[0]
        if timestep.ndim > 1 or timestep.numel() not in (1, batch):
            raise ValueError(f"`timestep` must be one number or {batch}, got shape {tuple(timestep.shape)}.")
        return timestep.reshape(-1).expand(batch)


class EarthformerUNetModel(EarthformerNoisyModel):
    r"""
    A U-shaped cuboid transformer that denoises the latents of a forecast, given the latents of its context.

    With `condition_channels` it is also told what another model forecasts, as in CasCast (Gong et al., ICML 2024,
    https://arxiv.org/abs/2402.04290) and DiffCast (Yu et al., CVPR 2024, https://arxiv.org/abs/2312.06734). A frame of
    that forecast is joined to the channels of the frame with its lead time, where a longer context would only add
    frames to compare with.

    Args:
        sample_size (`tuple[int, int]`): height and width of the latents.
        context_length, prediction_length (`int`): frames.
        in_channels (`int`): channels of the latents.
        block_out_channels (`tuple[int]`): channels of each level, the finest first; the grid halves between levels.
        layers_per_block (`int` or `tuple[int]`): attention blocks of each level, on the way down and on the way up.
        num_attention_heads (`int`): heads of every attention.
        attention_pattern (`str` or `tuple[str]`): how attention cuts its grid, as in [`EarthformerConfig`].
        num_global_vectors (`int`): global vectors; 0 for none.
        mask_padding (`bool`): whether tokens added to fill the last cuboid are hidden. The published model lets them
            take part (false).
        resnet_time_scale_shift (`str`): "default" adds the time embedding before a group norm, which cancels it where
            a group has one channel (widths below 64, or no multiples of 32); "scale_shift" applies it after the norm.
        dropout (`float`): probability, also of attention weights.
        condition_channels (`int`): channels of what is known already about each frame of the forecast, such as the
            latents of a deterministic one; 0 for the published network, which knows nothing.

    Raises:
        ValueError: a value that cannot work.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: Sequence[int] = (16, 16),
        context_length: int = 7,
        prediction_length: int = 6,
        in_channels: int = 64,
        block_out_channels: Sequence[int] = (256, 512),
        layers_per_block: int | Sequence[int] = 4,
        num_attention_heads: int = 4,
        attention_pattern: str | Sequence[str] = "axial",
        num_global_vectors: int = 0,
        mask_padding: bool = True,
        resnet_time_scale_shift: str = "default",
        dropout: float = 0.1,
        condition_channels: int = 0,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        frames = context_length + prediction_length
        config = self._path_config(frames)
        self.down = DownPath(config, frames, sample_size, in_channels + 1 + condition_channels, update_last=True)
        self.up = UpPath(config)
        self.out_proj = nn.Linear(config.channels[0], in_channels)
        self.apply(initialize)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        context: torch.Tensor,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> EarthformerUNetOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor`): noisy latents of the forecast, (B, T_out, h, w, c).
            timestep (`torch.Tensor`, `float` or `int`): denoising step, one number or one per sample (B,).
            context (`torch.Tensor`): latents of the context, (B, T_in, h, w, c).
            condition (`torch.Tensor`): what is known already about the forecast, (B, T_out, h, w, condition_channels);
                of a network with `condition_channels`, and only of one.

        Raises:
            ValueError: an argument has another shape; a condition is missing, or given to a network that takes none.
        """
        self._check("sample", sample, self.config.prediction_length, self.config.in_channels)
        self._check("context", context, self.config.context_length, self.config.in_channels)
        self._check_condition(condition)
        batch = sample.shape[0]
        for name, given in (("context", context), ("condition", condition)):
            if given is not None and given.shape[0] != batch:
                raise ValueError(f"`{name}` must have the batch size of `sample`, {batch}, got {given.shape[0]}.")

        # 1. context and sample in one sequence, a channel that marks the context, and what is known of the sample
        hidden_states = torch.cat([context, sample], dim=1)
        observed = torch.zeros_like(hidden_states[..., :1])
        observed[:, : context.shape[1]] = 1
        channels = [hidden_states, observed]
        if condition is not None:
            channels.append(F.pad(condition, (0, 0, 0, 0, 0, 0, context.shape[1], 0)))  # 0 for the context
        hidden_states = torch.cat(channels, dim=-1)  # (B, T_in + T_out, h, w, c + 1 + condition_channels)
        if self.training and self.is_gradient_checkpointing and torch.is_grad_enabled():
            hidden_states.requires_grad_()  # reentrant checkpoints drop the gradients of adapters behind other inputs

        # 2. down, with the embedding of the denoising step
        states, embedding, global_vectors = self.down(hidden_states, self._timesteps(timestep, sample))

        # 3. up
        hidden_states = self.up(states, embedding, global_vectors)  # (B, T_in + T_out, h, w, channels of level 0)

        # 4. the frames of the forecast
        prediction = self.out_proj(hidden_states[:, context.shape[1] :])
        return EarthformerUNetOutput(sample=prediction) if return_dict else (prediction,)

    def _check_condition(self, condition: torch.Tensor | None):
        channels = self.config.condition_channels
        if condition is None and channels:
            raise ValueError(f"`condition` is missing: this network has condition_channels={channels}.")
        if condition is not None and not channels:
            raise ValueError("`condition` must be None: this network has condition_channels=0.")
        if condition is not None:
            self._check("condition", condition, self.config.prediction_length, channels)


class EarthformerAlignmentModel(EarthformerNoisyModel):
    r"""
    What a noisy forecast will hold, such as the mean intensity of each frame: the network of knowledge alignment
    (PreDiff, section 3.3).

    Args:
        sample_size, prediction_length, in_channels: of the latents.
        out_channels (`int`): numbers per frame.
        block_out_channels, layers_per_block, num_attention_heads, attention_pattern, mask_padding: as in
            [`EarthformerUNetModel`].
        resnet_time_scale_shift, dropout: likewise.
        statistics (`dict[str, float]`, *optional*): what is usual in the training set, for targets of guidance: `mean`
            and `deviation` of the future's mean intensity, `change_mean` and `change_deviation` of its difference from
            the last context frame, in the model's range. The network does not use them.

    Raises:
        ValueError: a value that cannot work.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: Sequence[int] = (16, 16),
        prediction_length: int = 6,
        in_channels: int = 64,
        out_channels: int = 1,
        block_out_channels: Sequence[int] = (128, 256),
        layers_per_block: int | Sequence[int] = 1,
        num_attention_heads: int = 4,
        attention_pattern: str | Sequence[str] = "axial",
        mask_padding: bool = True,
        resnet_time_scale_shift: str = "default",
        dropout: float = 0.1,
        statistics: dict[str, float] | None = None,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        config = self._path_config(prediction_length)
        self.down = DownPath(config, prediction_length, sample_size, in_channels, update_last=False)
        for _ in block_out_channels[1:]:
            sample_size = reduced_size(sample_size, (2, 2))
        width = block_out_channels[-1]
        self.norm_out = group_norm(width)
        self.pool = AttentionPooling(width, sample_size[0] * sample_size[1], num_attention_heads, out_channels)
        self.apply(initialize)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> EarthformerAlignmentOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor`): noisy latents of the forecast, (B, T_out, h, w, c).
            timestep (`torch.Tensor`, `float` or `int`): denoising step, one number or one per sample (B,).

        Raises:
            ValueError: an argument has another shape.
        """
        self._check("sample", sample, self.config.prediction_length, self.config.in_channels)
        states, _, _ = self.down(sample, self._timesteps(timestep, sample))
        frames = states[-1].flatten(0, 1).flatten(1, 2)  # (B * T, places, C)
        frames = F.silu(self.norm_out(frames.transpose(1, 2).contiguous())).transpose(1, 2)
        prediction = self.pool(frames).unflatten(0, sample.shape[:2])
        return EarthformerAlignmentOutput(prediction=prediction) if return_dict else (prediction,)


__all__ = ["EarthformerAlignmentModel", "EarthformerUNetModel"]
