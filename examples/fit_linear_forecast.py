"""Add a linear forecast to a trained Earthformer: the network and the linear forecast each count for a share.

    python examples/fit_linear_forecast.py --recipe examples/configs/earthformer_sst_small.yaml \\
        --pretrained runs/sst-network --output_dir runs/sst-small

The linear forecast is a ridge regression among the leading patterns of the last frames, with coefficients that follow
the season, fitted on the training split of the recipe. Patterns, frames and penalties are those with the least squared
error in blocks of the training split that were left out and in the validation split, all counting the same; the share
is that with the least error in the validation split. The error is that of the maps, or of the Nino3.4 index where the
protocol scores that. Two forecasts that err differently are better together than either.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader
from train_earthformer import ForecastArguments

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.data.open_sst import nino34, three_month_means
from earthformer_hf.evaluation import PROTOCOLS
from earthformer_hf.linear_forecast import LinearForecast
from earthformer_hf.training import DataArguments, build, ends_in_one_line, load_windows, parse_recipe
from earthformer_hf.training.linear import fit_patterns, fit_weights


COMPONENTS, LAGS = (8, 12, 16, 20), (3, 4, 6)
PENALTIES, SEASON_PENALTIES = (10.0, 30.0, 100.0, 300.0, 1000.0), (300.0, 1000.0, 3000.0)
SHARES = tuple(n / 10 for n in range(11))  # of the network
BLOCKS = 6  # of the training split
TIME_FEATURES = "month_of_year"
INPUTS = ("past_values", "future_values", "past_time_features")


def all_windows(windows) -> dict[str, torch.Tensor]:
    batches = list(DataLoader(windows, 64))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def scored_part(maps: torch.Tensor, extractor: EarthformerFeatureExtractor) -> torch.Tensor:
    """What the protocol scores of maps (N, T, H, W, 1): the index's three-month means, or the maps themselves."""
    protocol = PROTOCOLS.get(extractor.protocol)
    if protocol is not None and "nino34" in protocol.scores:
        return torch.from_numpy(three_month_means(nino34(maps[..., 0].numpy())))
    return maps


def without_blocks(count: int, apart: int) -> list[tuple[slice, np.ndarray]]:
    """Blocks of windows, and the windows that share no frame with a block."""
    edges = np.linspace(0, count, BLOCKS + 1).astype(int)
    every = np.arange(count)
    return [(slice(a, b), every[(every < a - apart) | (every >= b + apart)]) for a, b in itertools.pairwise(edges)]


@torch.inference_mode()
def best_linear(config: EarthformerConfig, extractor: EarthformerFeatureExtractor, training, validation):
    """The fitted linear forecast whose settings err least in blocks left out and in the validation split."""

    def error(linear: LinearForecast, part: dict[str, torch.Tensor], chosen: slice = slice(None)) -> float:
        forecast = linear(part["past_values"][chosen], part["past_time_features"][chosen])
        return float((scored_part(forecast, extractor) - part["truth"][chosen]).square().nanmean())

    def fitted(linear: LinearForecast, penalties: tuple[float, float], chosen=slice(None)) -> LinearForecast:
        fit_weights(linear, *(training[name][chosen] for name in INPUTS), *penalties)
        return linear

    for part in (training, validation):
        observed = torch.where(part["future_observed_mask"], part["future_values"], torch.nan)
        part["truth"] = scored_part(observed, extractor)
    blocks = without_blocks(len(training["past_values"]), config.context_length + config.prediction_length)
    least, best = math.inf, None
    for components, lags in itertools.product(COMPONENTS, LAGS):
        options = {"linear_components": components, "linear_lags": lags}
        linear = LinearForecast(EarthformerConfig(**config.to_diff_dict() | options))
        fit_patterns(linear, training["past_values"][:, -1])
        for penalties in itertools.product(PENALTIES, SEASON_PENALTIES):
            errors = [error(fitted(linear, penalties, others), training, block) for block, others in blocks]
            errors.append(error(fitted(linear, penalties), validation))
            if np.mean(errors) < least:
                least, best = np.mean(errors), (options, penalties)
                words = f"{components} patterns in {lags} frames, penalties {penalties[0]:g} and {penalties[1]:g}"
                print(f"{words}: error {least:.6f}, of validation {errors[-1]:.6f}", flush=True)
    options, penalties = best
    config = EarthformerConfig(**config.to_diff_dict() | options)
    linear = LinearForecast(config)
    fit_patterns(linear, training["past_values"][:, -1])
    return config, fitted(linear, penalties)


@torch.inference_mode()
def best_share(network, linear, extractor: EarthformerFeatureExtractor, validation) -> float:
    """Of the network, with the least error on the validation split."""
    own = torch.cat([network(part).predictions for part in validation["past_values"].split(16)])
    own, truth = scored_part(own, extractor), validation["truth"]
    forecast = scored_part(linear(validation["past_values"], validation["past_time_features"]), extractor)
    errors = {n: float((n * own + (1 - n) * forecast - truth).square().nanmean()) for n in SHARES}
    print("share of the network, error: " + ", ".join(f"{share:.0%} {error:.6f}" for share, error in errors.items()))
    return min(errors, key=errors.__getitem__)


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, training=ForecastArguments)
    network = EarthformerForPrediction.from_pretrained(arguments.pretrained, dtype=torch.float32).eval()
    if network.config.first_guess or network.config.calibration or network.config.linear_components:
        raise ValueError(f"--pretrained {arguments.pretrained}: it must forecast by its network alone.")
    extractor = build(recipe, "feature_extractor", EarthformerFeatureExtractor, time_features=TIME_FEATURES)
    lengths = network.config.context_length, network.config.prediction_length
    data = replace(data, mix=False, teacher_weight=0.0, eval_stride=1)
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed, network.config.image_size)
    training, validation = all_windows(train_set.windows), all_windows(eval_set)
    seasonal = {"linear_components": 1, "num_time_features": training["past_time_features"].shape[-1]}
    config = EarthformerConfig(**network.config.to_diff_dict() | seasonal)
    config, linear = best_linear(config, extractor, training, validation)
    share = best_share(network, linear, extractor, validation)
    model = EarthformerForPrediction(config)
    model.load_state_dict(network.state_dict(), strict=False)
    model.linear_forecast.load_state_dict(linear.state_dict())
    with torch.no_grad():
        model.linear_forecast.weight *= 1 - share
        for part in model.head.out_proj.parameters():
            part *= share
    model.save_pretrained(arguments.output_dir)
    extractor.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
