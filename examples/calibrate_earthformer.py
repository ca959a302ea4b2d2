"""Find how far a trained Earthformer is right, and make its intensities as frequent as the observed ones.

    python examples/calibrate_earthformer.py --recipe examples/configs/earthformer_radar_small.yaml --output_dir runs/x

Both for each lead time, on the validation split of the recipe, and written into OUTPUT_DIR/config.json, so that the
model applies them. What a network adds to its first guess is weighed so that the squared error is least: trained on
few storms it is surer than it is right. A squared error also makes heavy rain rarer with each lead time; quantiles are
matched at the thresholds of the feature extractor, as far as the error stays well below that of the first guess.
"""

import numpy as np
import torch
from torch.utils.data import DataLoader
from train_earthformer import ForecastArguments

from earthformer_hf import EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.calibration import calibrated
from earthformer_hf.training import MODEL_INPUTS, DataArguments, build, ends_in_one_line, load_windows, parse_recipe
from earthformer_hf.training.calibration import correction_weights, quantile_calibration


STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a lead's calibration
SPENT = 0.75  # of what the network gains over the first guess in squared error, this much may go to a calibration


def bounded(
    calibration: list[list[float]], predictions: torch.Tensor, future: torch.Tensor, guess: torch.Tensor
) -> list[list[float]]:
    """The same calibration, at each lead time as strong as the squared error keeps a part of the network's gain over
    the first guess.

    Args:
        predictions, future, guess: (N, T, H, W, C), NaN in `future` where it was not observed.
    """
    issued, *said = (torch.tensor(row) for row in calibration)
    chosen = []
    for lead, row in enumerate(said):
        part = predictions[:, lead : lead + 1], future[:, lead : lead + 1], guess[:, lead : lead + 1]
        own, guessed = ((part[index] - part[1]).square().nanmean() for index in (0, 2))
        limit = own + SPENT * (guessed - own).clamp(min=0)
        for strength in STRENGTHS:
            knots = issued + strength * (row - issued)
            error = (calibrated(part[0], [issued.tolist(), knots.tolist()]) - part[1]).square().nanmean()
            if error <= limit:
                break
        chosen.append(knots.tolist())
    return [calibration[0], *chosen]


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, training=ForecastArguments)
    extractor = build(recipe, "feature_extractor", EarthformerFeatureExtractor)
    model = EarthformerForPrediction.from_pretrained(arguments.output_dir).eval()
    config = model.config
    config.correction_weights = config.calibration = None
    lengths = config.context_length, config.prediction_length
    _, windows = load_windows(data, extractor, lengths, arguments.seed, config.image_size)
    found = []
    for batch in DataLoader(windows, arguments.batch_size):
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        with torch.inference_mode():
            outputs = model.model(**inputs)
            predictions = model(**inputs).predictions
        guess = torch.zeros_like(predictions) if outputs.first_guess is None else outputs.first_guess
        future = torch.where(batch["future_observed_mask"], batch["future_values"], torch.nan)
        found.append((predictions, future, guess))
    predictions, future, guess = (torch.cat(parts) for parts in zip(*found))
    if config.first_guess is not None:
        config.correction_weights = correction_weights(predictions, future, guess)
        weights = torch.tensor(config.correction_weights)[:, None, None, None]
        predictions = guess + weights * (predictions - guess)
        print("weights of the correction: " + ", ".join(f"{weight:.2f}" for weight in config.correction_weights))
    values = extractor.encode(np.array([0, *extractor.thresholds]))[0].tolist()
    calibration = quantile_calibration([(predictions, future, future.isfinite())], values)
    if config.first_guess is not None:
        calibration = bounded(calibration, predictions, future, guess)
    config.calibration = calibration
    model.save_pretrained(arguments.output_dir)
    for lead, row in enumerate(calibration[1:], 1):
        said = ", ".join(f"{value:.0f}" for value in extractor.decode(np.array(row)))
        print(f"frame {lead}: {said} where {[0, *extractor.thresholds]} are meant")


if __name__ == "__main__":
    main()
