"""Train the denoiser of PreDiff in the latents of a trained autoencoder. The same command resumes.

    python examples/train_unet.py --recipe examples/configs/prediff_radar_tiny.yaml --output_dir runs/unet

OUTPUT_DIR holds a whole pipeline, ready for `PreDiffPipeline.from_pretrained`, with its card, and figures of the means
of its ensembles.
"""

from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn

from earthformer_hf import EarthformerFeatureExtractor, EarthformerUNetModel, PreDiffPipeline
from earthformer_hf.training import (
    DataArguments,
    LatentArguments,
    PublishedArguments,
    build,
    ends_in_one_line,
    forecast_figure,
    load_latents,
    mean_over,
    parse_recipe,
    publish,
    run_settings,
    train,
    validation_generator,
)
from earthformer_hf.training.losses import denoising_loss, draw_noisy_latents


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


def scheduler_from(**options):
    """A scheduler of diffusers, by the name of its class."""
    name = options.pop("class", None)
    if not hasattr(diffusers, str(name)):
        raise ValueError(f"`class` must be a scheduler of diffusers, got {name!r}.")
    return getattr(diffusers, name)(**options)


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, denoiser=DenoiserArguments)
    set_seed(arguments.seed)
    extractor = build(recipe, "feature_extractor", EarthformerFeatureExtractor)
    scheduler = build(recipe, "scheduler", scheduler_from)
    if not Path(arguments.vae).is_dir():
        raise ValueError(f"--vae must be the folder of a trained autoencoder, got {arguments.vae!r}.")
    vae = AutoencoderKL.from_pretrained(arguments.vae).eval().requires_grad_(False)
    unet = build(recipe, "unet", EarthformerUNetModel, in_channels=vae.config.latent_channels)
    lengths = unet.config.context_length, unet.config.prediction_length
    train_set, eval_set = load_latents(data, arguments, extractor, vae, lengths)
    model = Denoiser(unet, scheduler.config.num_train_timesteps)

    def predict(model, batch, generator=None):
        noisy, timestep, target = draw_noisy_latents(scheduler, batch["future_latents"], generator)
        output, log_variance = model(noisy, timestep, batch["context_latents"])
        return output, target, log_variance

    def loss_of(model, batch):
        return denoising_loss(*predict(model, batch))

    def score_of(model, accelerator) -> float:
        """Mean squared error of the validation split, at noise and timesteps that are always the same."""
        generator = validation_generator(accelerator.process_index)

        def total_and_count(batch):
            output, target, _ = predict(model, batch, generator)
            return (output - target).double().square().sum(), torch.tensor(output.numel(), device=output.device)

        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    def save_best(model):
        PreDiffPipeline(vae, model.unet, scheduler, feature_extractor=extractor).save_pretrained(arguments.output_dir)

    def figure_of(model):
        pipeline = PreDiffPipeline(vae, model.unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)

        def forecast_of(inputs):
            ensemble = pipeline(**inputs, generator=validation_generator(), output_type="pt").predictions[0]
            return ensemble.mean(0)  # (E, T, H, W, C) -> (T, H, W, C)

        return forecast_figure(forecast_of, eval_set.windows, extractor)

    settings = run_settings(data, extractor, unet.config, train_set, eval_set) | {"scheduler": recipe["scheduler"]}
    run = train(model, loss_of, train_set, score_of, save_best, arguments, figure_of, settings)
    windows = f"{len(train_set)} windows for training, {len(eval_set)} for validation"
    publish(run, arguments, recipe, f"{data.source}: {windows}.")


if __name__ == "__main__":
    main()
