"""A linear forecast beside the network: what the leading patterns of the last frames say of those to come.

Linear inverse models (Penland and Sardeshmukh, "The optimal growth of tropical sea surface temperature anomalies",
Journal of Climate 8, 1995) forecast an ocean's anomalies as well as many networks do, and better with coefficients
that follow the season (Shin et al., "Impact of annual cycle on ENSO variability and predictability", Journal of
Climate 34, 2021). LSTNet (Lai et al., SIGIR 2018) too adds a network's forecast to a linear one.
"""

from typing import cast

import torch
from torch import nn
from transformers import initialization as init

from .configuration_earthformer import EarthformerConfig


class LinearForecast(nn.Module):
    """A linear map of how strong patterns are in the last frames of the context to how strong they are in each frame
    of the forecast. With time features, its coefficients are linear in those of the last frame.

    Weights: `patterns` (H, W, C, K); `weight` (T_out, K, (1 + time features) * lags * K), the last frame first.
    """

    def __init__(self, config: EarthformerConfig):
        super().__init__()
        self.lags = config.linear_lags
        components = config.linear_components
        height, width = cast(list[int], config.image_size)
        self.patterns = nn.Parameter(torch.empty(height, width, config.num_channels, components))
        features = (1 + config.num_time_features) * self.lags * components
        self.weight = nn.Parameter(torch.empty(config.prediction_length, components, features))

    @torch.no_grad()
    def reset(self):
        """Initialise it such that it forecasts zeros."""
        init.normal_(self.patterns, std=self.patterns[..., 0].numel() ** -0.5)
        init.zeros_(self.weight)

    def features(self, past_values: torch.Tensor, past_time_features: torch.Tensor | None = None) -> torch.Tensor:
        """What the map is of: (B, T_in, H, W, C), (B, T_in, time features) -> (B, (1 + time features) * lags * K)."""
        last = past_values[:, -self.lags :].flip(1)
        amplitudes = torch.einsum("bthwc,hwck->btk", last, self.patterns.to(last.dtype)).flatten(1)
        if past_time_features is None:
            return amplitudes
        calendar = past_time_features[:, -1].to(amplitudes.dtype)
        return torch.cat([amplitudes, (calendar[:, :, None] * amplitudes[:, None]).flatten(1)], dim=1)

    def forward(self, past_values: torch.Tensor, past_time_features: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T_in, H, W, C), (B, T_in, time features) -> (B, T_out, H, W, C)."""
        features = self.features(past_values, past_time_features)
        amplitudes = torch.einsum("bf,tkf->btk", features, self.weight.to(features.dtype))
        return torch.einsum("btk,hwck->bthwc", amplitudes, self.patterns.to(features.dtype))


__all__ = ["LinearForecast"]
