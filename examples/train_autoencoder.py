"""Train the autoencoder of PreDiff on single radar frames. The same command resumes an interrupted run.

    python examples/train_autoencoder.py --recipe examples/configs/prediff_radar_tiny.yaml --output_dir runs/vae

The latents of the best model have unit variance: its `scaling_factor` is measured on the validation split.
"""

from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn
from train_earthformer import DataArguments, load_windows

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.losses import intensity_weighted_mse
from earthformer_hf.pipeline_prediff import encode_frames
from earthformer_hf.training import TrainingArguments, mean_over, parse_recipe, train


@dataclass
class AutoencoderArguments(TrainingArguments):
    kl_weight: float = field(default=1e-6, metadata={"help": "weight of the latents' divergence from a unit Gaussian"})
    intensity_weight: float = field(default=0.0, metadata={"help": "weight of intense values in the loss"})


class Autoencoder(nn.Module):
    """Reconstruction and posterior in one call, as training on several processes needs it."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, frames: torch.Tensor):
        """(B, 1, H, W, C) -> the same and the posterior of its latents."""
        posterior = self.vae.encode(frames[:, 0].permute(0, 3, 1, 2).contiguous()).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return self.vae.decode(latents).sample.permute(0, 2, 3, 1)[:, None], posterior


def main():
    recipe, data, arguments = parse_recipe(data=DataArguments, autoencoder=AutoencoderArguments)
    set_seed(arguments.seed)
    extractor = EarthformerFeatureExtractor(**recipe["feature_extractor"])
    train_set, eval_set = load_windows(data, extractor, (1, 1), arguments.seed)
    model = Autoencoder(AutoencoderKL(**recipe["vae"]))

    def loss_of(model, batch):
        frames, observed = batch["future_values"], batch["future_observed_mask"]
        reconstruction, posterior = model(frames)
        error = intensity_weighted_mse(reconstruction, frames, observed, arguments.intensity_weight)
        return error + arguments.kl_weight * posterior.kl().mean() / frames[0].numel()

    def score_of(model, accelerator) -> float:
        """Mean squared error over the observed values of the validation split; measures the latents on the way."""

        def errors(batch):
            frames, observed = batch["future_values"], batch["future_observed_mask"]
            return (model(frames)[0] - frames)[observed].double().square().sum(), observed.sum()

        vae = accelerator.unwrap_model(model).vae
        vae.register_to_config(scaling_factor=1.0)

        def squares(batch):
            latents = encode_frames(vae, batch["future_values"]).double()
            return latents.square().sum(), torch.tensor(latents.numel(), device=latents.device)

        variance = mean_over(eval_set, arguments.batch_size, squares, accelerator)
        vae.register_to_config(scaling_factor=variance**-0.5)
        return mean_over(eval_set, arguments.batch_size, errors, accelerator)

    train(model, loss_of, train_set, score_of, lambda best: best.vae.save_pretrained(arguments.output_dir), arguments)


if __name__ == "__main__":
    main()
