"""Train the autoencoder of PreDiff on single radar frames. The same command resumes an interrupted run.

    python examples/train_autoencoder.py --recipe examples/configs/prediff_radar_tiny.yaml --output_dir runs/vae

The whole of it is the training of PreDiff, and of latent diffusion (Rombach et al., CVPR 2022): reconstruction,
divergence of the latents from a unit Gaussian, and from `discriminator_start` on a game against a discriminator that
tells frames from reconstructions.

The latents of the best model have unit variance: its `scaling_factor` is measured on the validation split.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import nn
from train_earthformer import DataArguments, load_windows

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.pipeline_prediff import encode_frames
from earthformer_hf.training import Run, TrainingArguments, mean_over, parse_recipe
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
    discriminator_weight: float = field(default=0.0, metadata={"help": "weight of the game; 0 plays none"})
    discriminator_start: int = field(default=0, metadata={"help": "step at which the game begins"})


def pictures(frames: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W, C) -> (B, C, H, W)."""
    return frames[:, 0].permute(0, 3, 1, 2).contiguous()


class Autoencoder(nn.Module):
    """Reconstruction and posterior in one call, as training on several processes needs it."""

    def __init__(self, vae: AutoencoderKL, learn_log_variance: bool = False):
        super().__init__()
        self.vae = vae
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_log_variance)

    def forward(self, frames: torch.Tensor):
        """(B, 1, H, W, C) -> the same, the posterior of its latents, and the log-variance of the error."""
        posterior = self.vae.encode(pictures(frames)).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return self.vae.decode(latents).sample.permute(0, 2, 3, 1)[:, None], posterior, self.log_variance


def main():
    recipe, data, arguments = parse_recipe(data=DataArguments, autoencoder=AutoencoderArguments)
    if arguments.learn_log_variance and arguments.loss != "laplace":
        raise SystemExit("--learn_log_variance needs --loss laplace.")
    set_seed(arguments.seed)
    extractor = EarthformerFeatureExtractor(**recipe["feature_extractor"])
    train_set, eval_set = load_windows(data, extractor, (1, 1), arguments.seed)
    vae = AutoencoderKL(**recipe["vae"])
    last_layer = vae.decoder.conv_out.weight
    run = Run(arguments)
    model = run.prepare(Autoencoder(vae, arguments.learn_log_variance))
    if arguments.discriminator_weight:
        judge = PatchDiscriminator(vae.config.in_channels)
        discriminator = run.prepare(judge)

    def reconstruct(batch):
        """The reconstruction (B, 1, H, W, C), the loss of its errors, and that of the latents."""
        frames, observed = batch["future_values"], batch["future_observed_mask"]
        reconstruction, posterior, log_variance = model(frames)
        divergence = arguments.kl_weight * posterior.kl().mean()
        if arguments.loss == "laplace":
            return reconstruction, laplace_loss(reconstruction, frames, observed, log_variance), divergence
        error = intensity_weighted_mse(reconstruction, frames, observed, arguments.intensity_weight)
        return reconstruction, error, divergence / frames[0].numel()

    def score_of(model, accelerator) -> float:
        """Mean squared error over the observed values of the validation split; measures the latents on the way."""

        def errors(batch):
            frames, observed = batch["future_values"], batch["future_observed_mask"]
            return (model(frames)[0] - frames)[observed].double().square().sum(), observed.sum()

        vae.register_to_config(scaling_factor=1.0)

        def squares(batch):
            latents = encode_frames(vae, batch["future_values"]).double()
            return latents.square().sum(), torch.tensor(latents.numel(), device=latents.device)

        variance = mean_over(eval_set, arguments.batch_size, squares, accelerator)
        vae.register_to_config(scaling_factor=variance**-0.5)
        return mean_over(eval_set, arguments.batch_size, errors, accelerator)

    for micro_batches in run.steps(train_set):
        losses = []
        for batch in micro_batches:
            reconstruction, error, divergence = reconstruct(batch)
            loss = error + divergence
            plays = arguments.discriminator_weight > 0 and run.step >= arguments.discriminator_start
            if plays:  # the autoencoder's turn: reconstructions that look real
                judge.requires_grad_(False)
                (judgement,) = judge(pictures(reconstruction))
                weight = arguments.discriminator_weight * adaptive_weight(error, -judgement.mean(), last_layer)
                loss = loss - weight * judgement.mean()
            run.backward(loss)
            if plays:  # the discriminator's turn, whose gradients are those of its own loss alone
                judge.requires_grad_(True)
                real, fake = discriminator(pictures(batch["future_values"]), pictures(reconstruction.detach()))
                run.backward(hinge_loss(real, fake))
            losses.append(loss)
        run.update(losses)
        run.evaluate(score_of, lambda best: best.vae.save_pretrained(arguments.output_dir))
        run.save()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
