"""Make the intensities of a trained PreDiff's members as frequent as the observed ones.

    python examples/calibrate_prediff.py --recipe examples/configs/prediff_radar_small.yaml --pipeline runs/prediff

On the validation split of the recipe, at the thresholds of the feature extractor and for each lead time; written
into PIPELINE/model_index.json, so that the pipeline applies it. Every member is changed alone: a forecast does not
depend on how many are drawn.
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
    ensemble_size: int = field(default=8, metadata={"help": "members of each window"})
    windows: int = field(default=16, metadata={"help": "validation windows, evenly spaced"})
    seed: int = field(default=0, metadata={"help": "of the noise"})


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
    pipeline.register_to_config(calibration=None)
    generator = torch.Generator().manual_seed(arguments.seed)
    options = {"ensemble_size": arguments.ensemble_size, "generator": generator, "output_type": "pt"}
    drawn = torch.cat([pipeline(batch["past_values"], **options).predictions for batch in DataLoader(chosen)])
    members = drawn.unbind(1)  # each (N, T, H, W, C)
    values = extractor.encode(np.array([0, *extractor.thresholds]))[0].tolist()
    table = quantile_calibration([(member, future, observed) for member in members], values)
    matched = torch.stack([calibrated(member, table) for member in members], 1)
    for label, ensembles in (("as drawn", drawn), ("quantiles matched", matched)):
        score = scores(ensembles, future, observed)
        print(
            f"{label}: fair CRPS {score['fair_crps']:.5f}, spread-skill ratio {score['spread_skill_ratio']:.2f}, RMSE "
            f"of the mean {score['rmse']:.4f}"
        )
    pipeline.register_to_config(calibration=table)
    pipeline.save_config(arguments.pipeline)


if __name__ == "__main__":
    main()
