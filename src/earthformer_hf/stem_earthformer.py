"""The ends of Earthformer: from frames to tokens and back, with convolutions in each frame.

```
frames (B, T, H, W, C) -> [convolutions, patch merging] per stage -> tokens (B, T, h_0, w_0, C_0)      the stem
tokens (B, T, h_0, w_0, C_0) -> [upsampling, convolutions] per stage -> frames (B, T, H, W, C_out)     the head
```

Source: Gao et al., "Earthformer: Exploring Space-Time Transformers for Earth System Forecasting", NeurIPS 2022,
https://arxiv.org/abs/2207.05833, appendix A.
"""

from typing import cast

import torch
from torch import nn

from .configuration_earthformer import EarthformerConfig
from .cuboid import LEAKY_SLOPE, PatchMerging, SafeGroupNorm, Upsample, as_frames
from .folding import upsample_conv


class EarthformerConvStage(nn.Module):
    """Convolutions (3x3, group norm, leaky ReLU) in each frame: a stage of the stem or of the head."""

    def __init__(self, config: EarthformerConfig, in_channels: int, out_channels: int, num_convs: int):
        super().__init__()
        groups = config.stem_norm_groups or max(1, out_channels // 4)
        layers = []
        for i in range(num_convs):
            layers += [
                nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, kernel_size=3, padding=1),
                SafeGroupNorm(groups, out_channels),
                nn.LeakyReLU(LEAKY_SLOPE, inplace=True),  # a group norm needs its input for the gradient, not this
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C_in) -> (B, T, H, W, C_out)."""
        frames = hidden_states.flatten(0, 1).permute(0, 3, 1, 2)  # (B * T, C, H, W)
        frames = self.layers(frames)
        return frames.permute(0, 2, 3, 1).unflatten(0, hidden_states.shape[:2])


class EarthformerStem(nn.Module):
    """From frames, or the covariates of frames, to the tokens of level 0."""

    def __init__(self, config: EarthformerConfig, in_channels: int):
        super().__init__()
        channels = [in_channels, *config.stem_channels]
        strides = [(s, s) if isinstance(s, int) else tuple(s) for s in config.stem_strides]
        self.stages = nn.ModuleList(
            EarthformerConvStage(config, before, after, config.stem_num_convs)
            for before, after in zip(channels, channels[1:])
        )
        self.merges = nn.ModuleList(
            PatchMerging(n, n, stride, config.layer_norm_eps) for n, stride in zip(channels[1:], strides)
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) -> (B, T, h_0, w_0, hidden_sizes[0])."""
        for stage, merge in zip(self.stages, self.merges):
            values = merge(stage(values))
        return values


class EarthformerHead(nn.Module):
    """From the tokens of level 0 back to frames: the stem mirrored, then a linear map to the output channels.

    A first guess and its reach join the last stage, which is as fine as the frames: what is added to a guess depends
    on its smallest scales.
    """

    def __init__(self, config: EarthformerConfig):
        super().__init__()
        channels = [config.stem_channels[-1], *config.stem_channels[::-1]]
        joined = 0 if config.first_guess is None else 2 * cast(int, config.num_output_channels)
        last = len(channels) - 2
        self.sizes = config.stem_sizes[-2::-1]
        self.upsamples = nn.ModuleList(Upsample(n, n) for n in channels[:-1])
        self.stages = nn.ModuleList(
            EarthformerConvStage(config, before + (joined if i == last else 0), after, config.head_num_convs)
            for i, (before, after) in enumerate(zip(channels, channels[1:]))
        )
        self.out_proj = nn.Linear(channels[-1], config.num_output_channels)

    def forward(self, hidden_states: torch.Tensor, guess: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, h_0, w_0, hidden_sizes[0]), guess and reach (B, T, H, W, 2 * C_out) -> (B, T, H, W, C_out)."""
        frames = as_frames(hidden_states)  # (B * T, C, H, W)
        if guess is not None:
            guess = guess.flatten(0, 1).permute(0, 3, 1, 2)
        for i, (upsample, stage, size) in enumerate(zip(self.upsamples, self.stages, self.sizes)):
            first, *others = stage.layers
            beside = guess if i == len(self.stages) - 1 else None
            frames = upsample_conv(frames, size, upsample.conv, first, beside)
            for layer in others:
                frames = layer(frames)
        hidden_states = frames.permute(0, 2, 3, 1).unflatten(0, hidden_states.shape[:2])
        return self.out_proj(hidden_states)


__all__ = ["EarthformerConvStage", "EarthformerHead", "EarthformerStem"]
