"""Train the alignment network of a PreDiff pipeline: what noisy latents will hold. The same command resumes.

    python examples/train_alignment.py --recipe examples/configs/prediff_radar_tiny.yaml --pipeline runs/unet \\
        --output_dir runs/alignment

The best network is written into the pipeline's folder, as `alignment/`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_seed
from train_earthformer import DataArguments
from train_unet import LatentArguments, load_latents, noisy_future

from earthformer_hf import EarthformerAlignmentModel, PreDiffPipeline
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.training import mean_over, parse_recipe, train


@dataclass
class AlignmentArguments(LatentArguments):
    pipeline: str = field(default="runs/unet", metadata={"help": "folder of the pipeline"})


def usual_intensity(windows: EncodedWindows) -> dict[str, float]:
    """Mean and deviation of the future's mean intensity, and of its change from the last context frame."""
    future = torch.cat([chunk.get_tensor("future_mean") for chunk in windows.chunks]).nanmean(1)
    change = future - torch.cat([chunk.get_tensor("context_mean") for chunk in windows.chunks])[:, -1]
    return {
        "mean": future.mean().item(),
        "deviation": future.std().item(),
        "change_mean": change.mean().item(),
        "change_deviation": change.std().item(),
    }


def main():
    recipe, data, arguments = parse_recipe(data=DataArguments, alignment=AlignmentArguments)
    pipeline = PreDiffPipeline.from_pretrained(arguments.pipeline)
    set_seed(arguments.seed)  # after loading, which draws weights before it fills them
    scheduler, config = pipeline.scheduler, pipeline.unet.config
    lengths = config.context_length, config.prediction_length
    train_set, eval_set = load_latents(data, arguments, pipeline.feature_extractor, pipeline.vae, lengths)
    shape = {name: config[name] for name in ("sample_size", "prediction_length", "in_channels")}
    statistics = usual_intensity(train_set)
    model = EarthformerAlignmentModel(**shape, **recipe["alignment_network"], statistics=statistics)

    def errors(model, batch, random=None):
        """Squared errors of the mean intensity, over observed values, of every frame that was observed: (N,)."""
        noisy, timestep, _ = noisy_future(scheduler, batch["future_latents"], random)
        error = model(noisy, timestep).prediction[..., 0] - batch["future_mean"]
        return error[~batch["future_mean"].isnan()].square()

    def loss_of(model, batch):
        return errors(model, batch).mean()

    def score_of(model, accelerator) -> float:
        """Mean squared error of the validation split, at noise and timesteps that are always the same."""
        random = torch.Generator().manual_seed(0)

        def total_and_count(batch):
            error = errors(model, batch, random)
            return error.double().sum(), torch.tensor(error.numel(), device=error.device)

        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    def save_best(model):
        model.save_pretrained(Path(arguments.pipeline) / "alignment")
        pipeline.register_modules(alignment=model)
        pipeline.save_config(arguments.pipeline)

    train(model, loss_of, train_set, score_of, save_best, arguments)


if __name__ == "__main__":
    main()
