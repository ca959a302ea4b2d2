"""Train the autoencoder of PreDiff on single radar frames. The same command resumes an interrupted run.

    python examples/train_autoencoder.py --recipe examples/configs/autoencoder_radar.yaml --output_dir runs/vae

With all options it is the training of PreDiff, and of latent diffusion (Rombach et al., CVPR 2022): reconstruction,
divergence of the latents from a unit Gaussian, and from `discriminator_start` on a discriminator that tells frames
from reconstructions, and against which the autoencoder is trained.

The latents of the best model have unit variance: its `scaling_factor` is measured on the validation split. With
`pretrained` only the decoder learns, on the frames of other storms say: the latents stay what they are, and a denoiser
that was trained in them goes on being of use.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.training import (
    DataArguments,
    Run,
    TrainingArguments,
    build,
    ends_in_one_line,
    load_windows,
    mean_over,
    parse_recipe,
    run_settings,
)
from earthformer_hf.training.autoencoder import Autoencoder, measure_scaling_factor, pictures
from earthformer_hf.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from earthformer_hf.training.losses import intensity_weighted_mse, laplace_loss


@dataclass
class AutoencoderArguments(TrainingArguments):
    loss: Literal["mse", "laplace"] = field(
        default="mse", metadata={"help": "of the reconstruction: mean, or PreDiff's sum of absolute errors"}
    )
    intensity_weight: float = field(default=0.0, metadata={"help": "mse: weight of intense values"})
    learn_log_variance: bool = field(default=False, metadata={"help": "laplace: learn the error's log-variance"})
    kl_weight: float = field(default=1e-6, metadata={"help": "weight of the latents' divergence from a unit Gaussian"})
    discriminator_weight: float = field(
        default=0.0, metadata={"help": "weight of the discriminator's judgement; 0 trains none"}
    )
    discriminator_start: int = field(default=0, metadata={"help": "step from which it judges"})
    pretrained: str | None = field(
        default=None, metadata={"help": "folder of a trained one, whose decoder alone is trained further"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.learn_log_variance and self.loss != "laplace":
            raise ValueError(f"`learn_log_variance` needs the loss laplace, got {self.loss!r}.")


def autoencoder_from(folder: str) -> AutoencoderKL:
    """A trained autoencoder in single precision, whose latents stay what they are."""
    if not Path(folder).is_dir():
        raise ValueError(f"--pretrained must be the folder of a trained autoencoder, got {folder!r}.")
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.encoder.requires_grad_(False)
    if vae.quant_conv is not None:
        vae.quant_conv.requires_grad_(False)
    return vae


def reconstruct(model: nn.Module, batch: dict, arguments: AutoencoderArguments):
    """The reconstruction (B, 1, H, W, C), the loss of its errors, and that of the latents' divergence."""
    frames, observed = batch["future_values"], batch["future_observed_mask"]
    reconstruction, posterior, log_variance = model(frames)
    divergence = arguments.kl_weight * posterior.kl().mean()
    if arguments.loss == "laplace":
        return reconstruction, laplace_loss(reconstruction, frames, observed, log_variance), divergence
    error = intensity_weighted_mse(reconstruction, frames, observed, arguments.intensity_weight)
    return reconstruction, error, divergence / frames[0].numel()


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, autoencoder=AutoencoderArguments)
    set_seed(arguments.seed)
    extractor = build(recipe, "feature_extractor", EarthformerFeatureExtractor)
    train_set, eval_set = load_windows(data, extractor, (1, 1), arguments.seed)
    further = arguments.pretrained is not None
    vae = autoencoder_from(arguments.pretrained) if further else build(recipe, "vae", AutoencoderKL)
    run = Run(arguments, run_settings(data, extractor, vae.config, train_set, eval_set))
    model = run.prepare(Autoencoder(vae, arguments.learn_log_variance))
    if arguments.discriminator_weight:
        discriminator = PatchDiscriminator(vae.config.in_channels)
        prepared_discriminator = run.prepare(discriminator)

    def score_of(model, accelerator) -> float:
        """Mean squared error over the observed values of the validation split; measures the latents on the way."""

        def total_and_count(batch):
            frames, observed = batch["future_values"], batch["future_observed_mask"]
            return (model(frames)[0] - frames)[observed].double().square().sum(), observed.sum()

        if not further:
            measure_scaling_factor(vae, eval_set, arguments.batch_size, accelerator)
        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    for micro_batches in run.steps(train_set):
        losses = []
        adversarial = arguments.discriminator_weight > 0 and run.step >= arguments.discriminator_start
        for batch in micro_batches:
            reconstruction, error, divergence = reconstruct(model, batch, arguments)
            loss = error + divergence
            if adversarial:  # the autoencoder's turn: reconstructions that look real
                discriminator.requires_grad_(False)
                (judgement,) = discriminator(pictures(reconstruction))
                weight = adaptive_weight(error, -judgement.mean(), vae.decoder.conv_out.weight)
                loss = loss - arguments.discriminator_weight * weight * judgement.mean()
            run.backward(loss)
            if adversarial:  # the discriminator's turn, whose gradients are those of its own loss alone
                discriminator.requires_grad_(True)
                frames = pictures(batch["future_values"]), pictures(reconstruction.detach())
                run.backward(hinge_loss(*prepared_discriminator(*frames)))
            losses.append(loss)
        run.update(losses)
        run.evaluate(score_of, lambda best: best.vae.save_pretrained(arguments.output_dir))
        run.save()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
