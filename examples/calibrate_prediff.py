"""Find how far the members of a trained PreDiff should differ, and make their intensities as frequent as the observed.

    python examples/calibrate_prediff.py --recipe examples/configs/prediff_radar_small.yaml --pipeline runs/prediff

Both on the validation split of the recipe, and written into PIPELINE/model_index.json, so that the pipeline applies
them. Members are drawn from noise of several deviations, of each the quantiles are matched at the thresholds of the
feature extractor for each lead time, and the pair with the least fair CRPS is kept. Every member is changed alone, so
that a forecast does not depend on how many are drawn.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from earthformer_hf import PreDiffPipeline
from earthformer_hf.calibration import calibrated
from earthformer_hf.evaluation.metrics import EnsembleScores
from earthformer_hf.training import DataArguments, ends_in_one_line, load_windows, parse_recipe
from earthformer_hf.training.calibration import quantile_calibration


@dataclass
class CalibrationArguments:
    pipeline: str = field(default="runs/unet", metadata={"help": "folder of the pipeline, which is changed"})
    noise_scales: list[float] = field(
        default_factory=lambda: [1.0, 1.1, 1.2], metadata={"help": "deviations of the noise that are tried"}
    )
    ensemble_size: int = field(default=8, metadata={"help": "members of each window"})
    windows: int = field(default=16, metadata={"help": "validation windows, evenly spaced"})
    seed: int = field(default=0, metadata={"help": "of the noise"})


def members(pipeline: PreDiffPipeline, windows, arguments: CalibrationArguments, noise_scale: float) -> torch.Tensor:
    """Ensembles (N, E, T_out, H, W, C) of N windows, not calibrated."""
    pipeline.register_to_config(noise_scale=noise_scale, calibration=None)
    generator = torch.Generator().manual_seed(arguments.seed)
    options = {"ensemble_size": arguments.ensemble_size, "generator": generator, "output_type": "pt"}
    return torch.cat([pipeline(batch["past_values"], **options).predictions for batch in DataLoader(windows)])


def scores(ensembles: torch.Tensor, future: torch.Tensor, observed: torch.Tensor) -> dict[str, np.ndarray]:
    """Of ensembles, clipped to the model's range as forecasts are."""
    metric = EnsembleScores(future.shape[1])
    for ensemble, target, seen in zip(ensembles[..., 0].clamp(0, 1), future[..., 0], observed[..., 0]):
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
    found = []
    for noise_scale in arguments.noise_scales:
        plain = members(pipeline, chosen, arguments, noise_scale)
        table = quantile_calibration([(drawn, future, observed) for drawn in plain.unbind(1)], values)
        matched = torch.stack([calibrated(drawn, table) for drawn in plain.unbind(1)], 1)
        for label, ensembles in (("as drawn", plain), ("quantiles matched", matched)):
            score = scores(ensembles, future, observed)
            print(
                f"noise of {noise_scale:g}, {label}: fair CRPS {score['fair_crps']:.5f}, spread-skill "
                f"{score['spread_skill_ratio']:.2f}, RMSE of the mean {score['rmse']:.4f}",
                flush=True,
            )
        found.append((score["fair_crps"], noise_scale, table))
    _, noise_scale, table = min(found)
    pipeline.register_to_config(noise_scale=noise_scale, calibration=table)
    pipeline.save_config(arguments.pipeline)
    print(f"{arguments.pipeline}: noise of {noise_scale:g} and its quantiles are written into model_index.json")


if __name__ == "__main__":
    main()
