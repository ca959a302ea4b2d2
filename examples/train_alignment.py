"""Train the alignment network of a PreDiff pipeline: it tells from noisy latents how intense their frames will be.

    python examples/train_alignment.py --recipe examples/configs/prediff_radar_small.yaml --pipeline runs/unet \\
        --output_dir runs/alignment

The best network is written into the pipeline's folder, as `alignment/`. The same command resumes.

Guidance goes where a network errs: asked for more rain, it finds latents that the network takes for more rain. With
`guided_weight` the network also learns what latents that were shifted by its own gradient are decoded to.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel, set_seed
from diffusers import DDPMScheduler

from earthformer_hf import EarthformerAlignmentModel, PreDiffPipeline
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.guidance import energy_of, sizes_of_steps
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


DEVIATIONS = 3  # of the usual change, that guided latents are shifted by at most
SHIFTS = 3  # of the steps of guidance


@dataclass
class AlignmentArguments(LatentArguments):
    pipeline: str = field(default="runs/unet", metadata={"help": "folder of the pipeline"})
    guided_weight: float = field(default=0.0, metadata={"help": "weight in the loss of guided latents"})


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

    pipeline.vae.requires_grad_(False)

    def guided_errors(model, latents, generator=None):
        """Of the mean intensity of decoded frames, for clean latents that were shifted towards random targets."""
        draws = torch.rand(len(latents), generator=generator).to(latents) * 2 - 1
        timestep = torch.zeros(len(latents), dtype=torch.long, device=latents.device)

        network = extract_model_from_parallel(model)  # whose gradients by the latents no other process shares

        def quantity(latents):
            return network(latents, timestep).prediction.flatten(1).mean(1)

        with torch.no_grad():
            target = quantity(latents) + DEVIATIONS * statistics["change_deviation"] * draws
        for _ in range(SHIFTS):
            energy, gradient = energy_of(quantity, latents, target)
            size = sizes_of_steps(energy, gradient).view(-1, *(1,) * (latents.ndim - 1))
            latents = latents - size * gradient
        with torch.no_grad():
            means = pipeline.decode(latents).flatten(2).mean(2)  # (N, T_out)
        return (model(latents, timestep).prediction[..., 0] - means).square()

    def loss_of(model, batch):
        errors = squared_errors(model, batch)
        loss = errors.sum() / max(len(errors), 1)
        if arguments.guided_weight:
            some = batch["future_latents"][: max(1, len(errors) // (4 * config.prediction_length))]
            loss = loss + arguments.guided_weight * guided_errors(model, some).mean()
        return loss

    def score_of(model, accelerator) -> float:
        """Mean squared error of the validation split, at noise and timesteps that are always the same."""
        generator = validation_generator(accelerator.process_index)

        def total_and_count(batch):
            errors = squared_errors(model, batch, generator)
            total = errors.double().sum()
            if arguments.guided_weight:
                guided = guided_errors(model, batch["future_latents"][:1], generator).mean()
                total = total + arguments.guided_weight * guided.double() * errors.numel()
            return total, torch.tensor(errors.numel(), device=errors.device)

        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    def save_best(model):
        model.save_pretrained(Path(arguments.pipeline) / "alignment")
        pipeline.register_modules(alignment=model)
        pipeline.save_config(arguments.pipeline)

    settings = run_settings(data, pipeline.feature_extractor, model.config, train_set, eval_set)
    train(model, loss_of, train_set, score_of, save_best, arguments, settings=settings)


if __name__ == "__main__":
    main()
