"""Train the denoiser of PreDiff in the latents of a trained autoencoder. The same command resumes.

    python examples/train_unet.py --recipe examples/configs/prediff_radar_tiny.yaml --output_dir runs/unet

OUTPUT_DIR holds a whole pipeline, ready for `PreDiffPipeline.from_pretrained`.
"""

from dataclasses import dataclass, field

import diffusers
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn
from train_earthformer import DataArguments, load_windows

from earthformer_hf import EarthformerFeatureExtractor, EarthformerUNetModel, PreDiffPipeline
from earthformer_hf.losses import denoising_loss
from earthformer_hf.schedules import noise_for_training
from earthformer_hf.training import TrainingArguments, mean_over, parse_recipe, train


@dataclass
class DenoiserArguments(TrainingArguments):
    vae: str = field(default="runs/vae", metadata={"help": "folder of the trained autoencoder"})
    learn_log_variance: bool = field(default=True, metadata={"help": "weigh timesteps by a learned variance"})


class Denoiser(nn.Module):
    """The network and the learned variance of its error at each timestep, which only training needs."""

    def __init__(self, unet: EarthformerUNetModel, timesteps: int):
        super().__init__()
        self.unet = unet
        self.log_variance = nn.Parameter(torch.zeros(timesteps))

    def forward(self, noisy, timestep, context):
        return self.unet(noisy, timestep, context).sample, self.log_variance[timestep.long()]


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: torch.Tensor, sample: bool) -> torch.Tensor:
    """Frames (B, T, H, W, C) -> scaled latents (B, T, h, w, c): the posterior's mode, or a sample of it."""
    posterior = vae.encode(frames.flatten(0, 1).permute(0, 3, 1, 2).contiguous()).latent_dist
    latents = posterior.sample() if sample else posterior.mode()
    return (latents * vae.config.scaling_factor).permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def main():
    recipe, data, arguments = parse_recipe(data=DataArguments, denoiser=DenoiserArguments)
    set_seed(arguments.seed)
    extractor = EarthformerFeatureExtractor(**recipe["feature_extractor"])
    vae = AutoencoderKL.from_pretrained(arguments.vae).eval().requires_grad_(False)
    unet = EarthformerUNetModel(in_channels=vae.config.latent_channels, **recipe["unet"])
    lengths = unet.config.context_length, unet.config.prediction_length
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed)
    options = dict(recipe["scheduler"])
    scheduler = getattr(diffusers, options.pop("class"))(**options)
    model = Denoiser(unet, scheduler.config.num_train_timesteps)

    def predict(model, batch, noise, share, sample=True):
        vae.to(batch["past_values"].device)
        clean, context = encode(vae, batch["future_values"], sample), encode(vae, batch["past_values"], False)
        noisy, timestep, target = noise_for_training(scheduler, clean, noise.to(clean), share.to(clean.device))
        output, log_variance = model(noisy, timestep, context)
        return output, target, log_variance if arguments.learn_log_variance else None

    def loss_of(model, batch):
        shape = (len(batch["future_values"]), lengths[1], *unet.config.sample_size, unet.config.in_channels)
        return denoising_loss(*predict(model, batch, torch.randn(shape), torch.rand(shape[0])))

    def score_of(model, accelerator) -> float:
        """Mean squared error of the validation split, at noise and timesteps that are always the same."""
        random = torch.Generator().manual_seed(0)

        def errors(batch):
            shape = (len(batch["future_values"]), lengths[1], *unet.config.sample_size, unet.config.in_channels)
            noise, share = torch.randn(shape, generator=random), torch.rand(shape[0], generator=random)
            output, target, _ = predict(model, batch, noise, share, sample=False)
            return (output - target).double().square().sum(), torch.tensor(output.numel(), device=output.device)

        return mean_over(eval_set, arguments.batch_size, errors, accelerator)

    def save_best(model):
        PreDiffPipeline(vae, model.unet, scheduler, feature_extractor=extractor).save_pretrained(arguments.output_dir)

    train(model, loss_of, train_set, score_of, save_best, arguments)


if __name__ == "__main__":
    main()
