"""Train the denoiser of PreDiff in the latents of a trained autoencoder. The same command resumes.

    python examples/train_unet.py --recipe examples/configs/prediff_radar_small.yaml --output_dir runs/unet

With `forecaster`, the folder of a trained Earthformer, the denoiser learns to use what that one forecasts. A block
`sampler` names the scheduler that the pipeline is saved with, where it is another than the one for training.

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

from earthformer_hf import (
    EarthformerFeatureExtractor,
    EarthformerForPrediction,
    EarthformerUNetModel,
    PreDiffPipeline,
)
from earthformer_hf.data.latents import own_entries
from earthformer_hf.pipeline_checks import check_networks
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
    forecaster: str | None = field(default=None, metadata={"help": "folder of a trained Earthformer"})
    pretrained: str | None = field(default=None, metadata={"help": "folder of a trained denoiser to start from"})


class Denoiser(nn.Module):
    """The network and the learned variance of its error at each timestep, which only training needs."""

    def __init__(self, unet: EarthformerUNetModel, timesteps: int):
        super().__init__()
        self.unet = unet
        self.log_variance = nn.Parameter(torch.zeros(timesteps))

    def forward(self, noisy, timestep, context, condition=None):
        return self.unet(noisy, timestep, context, condition).sample, self.log_variance[timestep.long()]


def scheduler_from(config=None, **options):
    """A scheduler of diffusers, by the name of its class, with what it shares of the `config` of another."""
    name = options.pop("class", None)
    if not hasattr(diffusers, str(name)):
        raise ValueError(f"`class` must be a scheduler of diffusers, got {name!r}.")
    kind = getattr(diffusers, name)
    return kind(**options) if config is None else kind.from_config(config, **options)


def forecaster_from(folder: str | None) -> EarthformerForPrediction | None:
    """A trained Earthformer that is not trained on, in single precision."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"--forecaster must be the folder of a trained Earthformer, got {folder!r}.")
    return EarthformerForPrediction.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def denoiser_from(folder: str, expected: dict) -> EarthformerUNetModel:
    """A trained denoiser of the configuration that the recipe has, in single precision."""
    if not Path(folder).is_dir():
        raise ValueError(f"--pretrained must be the folder of a trained denoiser, got {folder!r}.")
    unet = EarthformerUNetModel.from_pretrained(folder, torch_dtype=torch.float32)
    found = own_entries(unet.config)
    if differing := sorted(name for name in expected if found.get(name) != expected[name]):
        raise ValueError(f"--pretrained {folder}: it differs from the recipe's `unet` in {', '.join(differing)}.")
    return unet


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, denoiser=DenoiserArguments)
    set_seed(arguments.seed)
    extractor = build(recipe, "feature_extractor", EarthformerFeatureExtractor)
    scheduler = sampler = build(recipe, "scheduler", scheduler_from)
    if "sampler" in recipe:
        sampler = build(recipe, "sampler", scheduler_from, config=scheduler.config)
    if not Path(arguments.vae).is_dir():
        raise ValueError(f"--vae must be the folder of a trained autoencoder, got {arguments.vae!r}.")
    vae = AutoencoderKL.from_pretrained(arguments.vae).eval().requires_grad_(False)
    unet = build(recipe, "unet", EarthformerUNetModel, in_channels=vae.config.latent_channels)
    if arguments.pretrained is not None:
        unet = denoiser_from(arguments.pretrained, own_entries(unet.config))
    lengths = unet.config.context_length, unet.config.prediction_length
    forecaster = forecaster_from(arguments.forecaster)
    check_networks(vae, unet, forecaster)
    train_set, eval_set = load_latents(data, arguments, extractor, vae, lengths, forecaster)
    model = Denoiser(unet, scheduler.config.num_train_timesteps)

    def predict(model, batch, generator=None):
        noisy, timestep, target = draw_noisy_latents(scheduler, batch["future_latents"], generator)
        output, log_variance = model(noisy, timestep, batch["context_latents"], batch.get("condition_latents"))
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
        pipeline = PreDiffPipeline(vae, model.unet, sampler, feature_extractor=extractor, forecaster=forecaster)
        pipeline.save_pretrained(arguments.output_dir)

    def figure_of(model):
        pipeline = PreDiffPipeline(vae, model.unet, sampler, forecaster=forecaster)
        pipeline.set_progress_bar_config(disable=True)

        def forecast_of(inputs):
            options = {"generator": validation_generator(), "output_type": "pt"}
            ensemble = pipeline(inputs["past_values"], **options).predictions[0]
            return ensemble.mean(0)  # (E, T, H, W, C) -> (T, H, W, C)

        return forecast_figure(forecast_of, eval_set.windows, extractor)

    settings = run_settings(data, extractor, unet.config, train_set, eval_set) | {"scheduler": recipe["scheduler"]}
    run = train(model, loss_of, train_set, score_of, save_best, arguments, figure_of, settings)
    windows = f"{len(train_set)} windows for training, {len(eval_set)} for validation"
    publish(run, arguments, recipe, f"{data.source}: {windows}.")


if __name__ == "__main__":
    main()
