"""The real classes, tiny."""

import os
from pathlib import Path

import torch

from earthformer_hf import EarthformerConfig, EarthformerForPrediction


ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("EARTHFORMER_HF_DATA", ROOT / "../shared/data"))
GOLDENS = Path(os.environ.get("EARTHFORMER_HF_GOLDENS", ROOT / "../shared/goldens"))


def tiny_config(**changes) -> EarthformerConfig:
    """Two levels, global vectors, a grid that cuboids do not divide."""
    options = {
        "context_length": 3,
        "prediction_length": 4,
        "image_size": (20, 28),
        "hidden_sizes": [16, 32],
        "num_global_vectors": 2,
        "stem_channels": [4, 16],
        "stem_strides": [1, 2],
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return EarthformerConfig(**(options | changes))


def tiny_model(**changes) -> EarthformerForPrediction:
    """Random weights, with position biases large enough to matter."""
    model = EarthformerForPrediction(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias" in name:
                parameter.normal_(0, 0.5)
    return model


def frames(config: EarthformerConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random context frames (B, T, H, W, C)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.context_length, *config.image_size, config.num_channels)
    return torch.randn(shape, generator=generator)
