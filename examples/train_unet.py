"""Train the denoiser of PreDiff in the latents of a trained autoencoder. The same command resumes.

    python examples/train_unet.py --recipe examples/configs/prediff_radar_tiny.yaml --output_dir runs/unet

OUTPUT_DIR holds a whole pipeline, ready for `PreDiffPipeline.from_pretrained`, with its card, and figures of the means
of its ensembles.
"""

import copy
import json
from dataclasses import asdict, dataclass, field

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn
from train_earthformer import DataArguments, PublishedArguments, describe, forecast_figure, load_windows, publish

from earthformer_hf import EarthformerFeatureExtractor, EarthformerUNetModel, PreDiffPipeline
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.schedules import noise_for_training
from earthformer_hf.training import TrainingArguments, mean_over, parse_recipe, train
from earthformer_hf.training.losses import denoising_loss


@dataclass
class LatentArguments(TrainingArguments):
    latents: str = field(default="runs/latents", metadata={"help": "folder of the encoded windows"})
    encoded_windows: int = field(default=4096, metadata={"help": "how many varied windows are encoded, once"})


@dataclass
class DenoiserArguments(LatentArguments, PublishedArguments):
    vae: str = field(default="runs/vae", metadata={"help": "folder of the trained autoencoder"})


class Denoiser(nn.Module):
    """The network and the learned variance of its error at each timestep, which only training needs."""

    def __init__(self, unet: EarthformerUNetModel, timesteps: int):
        super().__init__()
        self.unet = unet
        self.log_variance = nn.Parameter(torch.zeros(timesteps))

    def forward(self, noisy, timestep, context):
        return self.unet(noisy, timestep, context).sample, self.log_variance[timestep.long()]


def load_latents(
    data: DataArguments,
    arguments: LatentArguments,
    extractor: EarthformerFeatureExtractor,
    vae: AutoencoderKL,
    lengths: tuple[int, int],
) -> tuple[EncodedWindows, EncodedWindows]:
    """The encoded windows of the training and the validation split."""
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed)
    vae.to(PartialState().device)
    description = json.dumps([asdict(data), extractor.to_dict(), lengths, arguments.seed], sort_keys=True)
    return (
        EncodedWindows(
            train_set, vae, arguments.encoded_windows, arguments.latents, f"train {description}", arguments.seed
        ),
        EncodedWindows(eval_set, vae, len(eval_set), arguments.latents, f"val {description}"),
    )


def noisy_future(scheduler, clean, random=None):
    """Noisy latents of the future, timesteps, and what the network should say of them (see `noise_for_training`).

    With a generator `random` they follow from it; else they are drawn by torch.
    """
    noise, share = torch.randn(clean.shape, generator=random), torch.rand(len(clean), generator=random)
    return noise_for_training(scheduler, clean, noise.to(clean), share.to(clean))


def main():
    recipe, data, arguments = parse_recipe(data=DataArguments, denoiser=DenoiserArguments)
    set_seed(arguments.seed)
    extractor = EarthformerFeatureExtractor(**recipe["feature_extractor"])
    vae = AutoencoderKL.from_pretrained(arguments.vae).eval().requires_grad_(False)
    unet = EarthformerUNetModel(in_channels=vae.config.latent_channels, **recipe["unet"])
    lengths = unet.config.context_length, unet.config.prediction_length
    train_set, eval_set = load_latents(data, arguments, extractor, vae, lengths)
    options = dict(recipe["scheduler"])
    scheduler = getattr(diffusers, options.pop("class"))(**options)
    model = Denoiser(unet, scheduler.config.num_train_timesteps)

    def predict(model, batch, random=None):
        noisy, timestep, target = noisy_future(scheduler, batch["future_latents"], random)
        output, log_variance = model(noisy, timestep, batch["context_latents"])
        return output, target, log_variance

    def loss_of(model, batch):
        return denoising_loss(*predict(model, batch))

    def score_of(model, accelerator) -> float:
        """Mean squared error of the validation split, at noise and timesteps that are always the same."""
        random = torch.Generator().manual_seed(0)

        def errors(batch):
            output, target, _ = predict(model, batch, random)
            return (output - target).double().square().sum(), torch.tensor(output.numel(), device=output.device)

        return mean_over(eval_set, arguments.batch_size, errors, accelerator)

    def save_best(model):
        PreDiffPipeline(vae, model.unet, scheduler, feature_extractor=extractor).save_pretrained(arguments.output_dir)

    def figure_of(model):
        pipeline = PreDiffPipeline(vae, model.unet, copy.deepcopy(scheduler))  # sampling changes a scheduler
        pipeline.set_progress_bar_config(disable=True)

        def forecast_of(inputs):
            random = torch.Generator().manual_seed(0)
            return pipeline(**inputs, generator=random, output_type="pt").predictions[0].mean(0)

        return forecast_figure(forecast_of, eval_set.windows, extractor)

    run = train(model, loss_of, train_set, score_of, save_best, arguments, figure_of)
    publish(run, recipe, describe(data, train_set, eval_set))


if __name__ == "__main__":
    main()
