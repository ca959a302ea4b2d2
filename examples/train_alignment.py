"""Train the alignment network of a PreDiff pipeline: it tells from noisy latents how intense their frames will be.

    python examples/train_alignment.py --recipe examples/configs/prediff_radar_small.yaml --pipeline runs/unet \\
        --output_dir runs/alignment

The best network is written into the pipeline's folder, as `alignment/`. The same command resumes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler

from earthformer_hf import EarthformerAlignmentModel, PreDiffPipeline
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.training import (
    DataArguments,
    LatentArguments,
    build,
    ends_in_one_line,
    load_latents,
    mean_over,
    parse_recipe,
    run_settings,
    train,
    validation_generator,
)
from earthformer_hf.training.losses import draw_noisy_latents


@dataclass
class AlignmentArguments(LatentArguments):
    pipeline: str = field(default="runs/unet", metadata={"help": "folder of the pipeline"})


def intensity_statistics(windows: EncodedWindows) -> dict[str, float]:
    """Mean and deviation of the future's mean intensity, and of its change from the last context frame."""
    future = windows.stacked("future_mean").nanmean(1)
    change = future - windows.stacked("context_mean")[:, -1]
    return {
        "mean": future.mean().item(),
        "deviation": future.std().item(),
        "change_mean": change.mean().item(),
        "change_deviation": change.std().item(),
    }


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, alignment=AlignmentArguments)
    if not Path(arguments.pipeline).is_dir():
        raise ValueError(f"--pipeline must be the folder of a trained pipeline, got {arguments.pipeline!r}.")
    pipeline = PreDiffPipeline.from_pretrained(arguments.pipeline)
    set_seed(arguments.seed)  # after loading, which draws weights before it fills them
    config = pipeline.unet.config
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # the noise of training, whatever samples
    lengths = config.context_length, config.prediction_length
    parts = (
        pipeline.feature_extractor,
        pipeline.vae,
        lengths,
        pipeline.forecaster,
    )  # latents that the denoiser learnt of
    train_set, eval_set = load_latents(data, arguments, *parts)
    shape = {name: config[name] for name in ("sample_size", "prediction_length", "in_channels")}
    statistics = intensity_statistics(train_set)
    model = build(recipe, "alignment_network", EarthformerAlignmentModel, **shape, statistics=statistics)

    def squared_errors(model, batch, generator=None):
        """Of the mean intensity over observed values, for every frame that was observed: (N,)."""
        noisy, timestep, _ = draw_noisy_latents(scheduler, batch["future_latents"], generator)
        error = model(noisy, timestep).prediction[..., 0] - batch["future_mean"]
        return error[~batch["future_mean"].isnan()].square()

    def loss_of(model, batch):
        errors = squared_errors(model, batch)
        return errors.sum() / max(len(errors), 1)

    def score_of(model, accelerator) -> float:
        """Mean squared error of the validation split, at noise and timesteps that are always the same."""
        generator = validation_generator(accelerator.process_index)

        def total_and_count(batch):
            errors = squared_errors(model, batch, generator)
            return errors.double().sum(), torch.tensor(errors.numel(), device=errors.device)

        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    def save_best(model):
        model.save_pretrained(Path(arguments.pipeline) / "alignment")
        pipeline.register_modules(alignment=model)
        pipeline.save_config(arguments.pipeline)

    settings = run_settings(data, pipeline.feature_extractor, model.config, train_set, eval_set)
    train(model, loss_of, train_set, score_of, save_best, arguments, settings=settings)


if __name__ == "__main__":
    main()
