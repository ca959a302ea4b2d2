"""The real classes, tiny."""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler

from earthformer_hf import (
    EarthformerAlignmentModel,
    EarthformerConfig,
    EarthformerForPrediction,
    EarthformerUNetModel,
    PreDiffPipeline,
)


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


def inputs_of(config: EarthformerConfig, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random context frames and, of a model that takes them, covariates and time features, by name."""
    inputs = {"past_values": frames(config, batch, seed)}
    if config.num_covariates:
        lengths = {"past_covariates": config.context_length, "future_covariates": config.prediction_length}
        for name, length in lengths.items():
            inputs[name] = torch.randn(batch, length, *config.image_size, config.num_covariates)
    if config.num_time_features:
        inputs["past_time_features"] = torch.randn(batch, config.context_length, config.num_time_features)
    return inputs


def tiny_forecaster(**changes) -> EarthformerForPrediction:
    """Of the frames of `tiny_pipeline`; it corrects its first guess."""
    shape = {"context_length": 3, "prediction_length": 2, "image_size": (12, 16), "first_guess": "advection"}
    model = tiny_model(**(shape | changes))
    torch.nn.init.normal_(model.head.out_proj.weight, std=0.1)
    return model


def tiny_pipeline(scheduler=None, alignment: bool = False, forecaster: bool = False, **unet) -> PreDiffPipeline:
    """Frames 3 -> 2 of 12 x 16 pixels, latents of 6 x 8; random weights, also where training starts at 0."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.0, sample_size=16,
    )  # fmt: skip
    shape = {"sample_size": (6, 8), "prediction_length": 2, "in_channels": 4}
    shape |= {"block_out_channels": (16, 32), "layers_per_block": 1, "resnet_time_scale_shift": "scale_shift"}
    networks = [EarthformerUNetModel(context_length=3, **(shape | {"condition_channels": 4 * forecaster} | unet))]
    if alignment:
        networks.append(EarthformerAlignmentModel(**shape))
    for network in networks:
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    scheduler = scheduler or DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    unet, *rest = (network.eval() for network in networks)
    return PreDiffPipeline(vae.eval(), unet, scheduler, *rest, forecaster=tiny_forecaster() if forecaster else None)
