"""Calibrate the members of a trained PreDiff: how much of each is its own, and how intense it is.

    python examples/calibrate_prediff.py --recipe examples/configs/prediff_radar_small.yaml --pipeline runs/prediff

On the validation split of the recipe, for each lead time, with the least fair CRPS; written into
PIPELINE/model_index.json, so that the pipeline applies it: first the weights of a member, of the control and of what
the forecaster says, then a calibration that bends at the thresholds of the feature extractor. Every member is changed
alone: a forecast does not depend on how many are drawn.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from earthformer_hf import PreDiffPipeline
from earthformer_hf.calibration import calibrated
from earthformer_hf.evaluation.metrics import EnsembleScores
from earthformer_hf.pipeline_prediff import decode_latents, forecast_latents
from earthformer_hf.training import DataArguments, ends_in_one_line, load_windows, parse_recipe
from earthformer_hf.training.calibration import crps_calibration


@dataclass
class CalibrationArguments:
    pipeline: str = field(default="runs/unet", metadata={"help": "folder of the pipeline, which is changed"})
    ensemble_size: int = field(default=8, metadata={"help": "members of each window"})
    windows: int = field(default=16, metadata={"help": "validation windows, evenly spaced"})
    seed: int = field(default=0, metadata={"help": "of the noise"})


def scores(members: torch.Tensor, future: torch.Tensor, observed: torch.Tensor) -> dict[str, np.ndarray]:
    """Of members (E, N, T, H, W, C), clipped to the model's range as forecasts are."""
    metric = EnsembleScores(future.shape[1])
    for ensemble, target, seen in zip(members[..., 0].clamp(0, 1).transpose(0, 1), future[..., 0], observed[..., 0]):
        metric.update(ensemble.numpy(), target.numpy(), seen.numpy())
    return metric.compute()


@ends_in_one_line
def main():
    _, data, arguments = parse_recipe(__doc__, data=DataArguments, calibration=CalibrationArguments)
    if not Path(arguments.pipeline).is_dir():
        raise ValueError(f"--pipeline must be the folder of a trained pipeline, got {arguments.pipeline!r}.")
    pipeline = PreDiffPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    extractor, config = pipeline.feature_extractor, pipeline.unet.config
    if extractor is None or not extractor.thresholds:
        raise ValueError(f"--pipeline {arguments.pipeline}: its feature extractor must state thresholds.")
    _, windows = load_windows(data, extractor, (config.context_length, config.prediction_length), arguments.seed)
    spaced = np.linspace(0, len(windows) - 1, min(arguments.windows, len(windows))).round().astype(int)
    chosen = Subset(windows, spaced.tolist())
    future, observed = (
        torch.stack([item[name] for item in chosen]) for name in ("future_values", "future_observed_mask")
    )
    values = extractor.encode(np.array([0, *extractor.thresholds]))[0].tolist()
    pipeline.register_to_config(calibration=None, blend=None)
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = config.prediction_length, *config.sample_size, config.in_channels
    found = []
    for batch in DataLoader(chosen):
        past = batch["past_values"]
        drawn = pipeline(past, arguments.ensemble_size, generator=generator, output_type="latent").latents
        control = pipeline(past, 1, latents=torch.zeros(1, 1, *shape), output_type="latent").latents
        parts = [drawn[0], control[0]]
        if pipeline.forecaster is not None:
            with torch.no_grad():
                parts.append(forecast_latents(pipeline.forecaster, pipeline.vae, past))
        found.append(parts)
    latents = [torch.stack(parts, 1) for parts in zip(*found)]  # members (E, N, T_out, h, w, c), the others (1, ...)

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        """(E, N, T_out, h, w, c) -> (E, N, T_out, H, W, C)."""
        with torch.no_grad():
            return torch.stack([decode_latents(pipeline.vae, member) for member in latents])

    def report(label: str, members: torch.Tensor) -> None:
        score = scores(members, future, observed)
        print(
            f"{label}: fair CRPS {score['fair_crps']:.5f}, spread-skill ratio {score['spread_skill_ratio']:.2f}, RMSE "
            f"of the mean {score['rmse']:.4f}",
            flush=True,
        )

    members = decoded(latents[0])
    report("as drawn", members)
    _, table = crps_calibration([members], future, observed, values)
    report("calibrated", calibrated(members.flatten(0, 1), table).view_as(members))
    blend, _ = crps_calibration([members, *(decoded(part)[0] for part in latents[1:])], future, observed, values)
    weights = torch.tensor(blend).T[..., None, None, None]  # of members, control and forecast, (T_out, 1, 1, 1) each
    members = decoded(sum(weight * part for weight, part in zip(weights, latents)))
    _, table = crps_calibration([members], future, observed, values)
    report("blended and calibrated", calibrated(members.flatten(0, 1), table).view_as(members))
    for lead, row in enumerate(blend, 1):
        print(f"frame {lead}: {', '.join(f'{weight:.2f}' for weight in row)} of member, control and forecast")
    pipeline.register_to_config(calibration=table, blend=blend)
    pipeline.save_config(arguments.pipeline)


if __name__ == "__main__":
    main()
