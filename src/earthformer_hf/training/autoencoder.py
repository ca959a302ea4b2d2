"""PreDiff's autoencoder as it is trained: on single frames, channels last as everywhere in this package."""

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.data import Dataset

from ..pipeline_prediff import encode_frames
from .distributed import mean_over


def pictures(frames: torch.Tensor) -> torch.Tensor:
    """Single frames (B, 1, H, W, C) -> (B, C, H, W)."""
    return frames[:, 0].permute(0, 3, 1, 2).contiguous()


class Autoencoder(nn.Module):
    """Reconstruction and posterior in one call, as training on several processes needs it.

    Args:
        vae: what is trained.
        learn_log_variance: of the reconstruction's error, see [`~earthformer_hf.training.losses.laplace_loss`]; else
            it is 0.
    """

    def __init__(self, vae: AutoencoderKL, learn_log_variance: bool = False):
        super().__init__()
        self.vae = vae
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_log_variance)

    def forward(self, frames: torch.Tensor):
        """(B, 1, H, W, C) -> the same, the posterior of its latents, and the log-variance of the error."""
        posterior = self.vae.encode(pictures(frames)).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return self.vae.decode(latents).sample.permute(0, 2, 3, 1)[:, None], posterior, self.log_variance


def measure_scaling_factor(vae: AutoencoderKL, windows: Dataset, batch_size: int, accelerator: Accelerator):
    """Set the `scaling_factor` of an autoencoder that gives the latents of the windows' futures unit variance."""
    vae.register_to_config(scaling_factor=1.0)

    def total_and_count(batch):
        latents = encode_frames(vae, batch["future_values"]).double()
        return latents.square().sum(), torch.tensor(latents.numel(), device=latents.device)

    variance = mean_over(windows, batch_size, total_and_count, accelerator)
    vae.register_to_config(scaling_factor=variance**-0.5)


__all__ = ["Autoencoder", "measure_scaling_factor", "pictures"]
