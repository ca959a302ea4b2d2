"""Draw an ensemble of the next hour of rain, and the chance of exceeding a threshold.

    python examples/forecast_prediff.py                        # real radar if there is any, else simulated rain
    python examples/forecast_prediff.py --input mine.npy       # your own: mm/h, (T, 128, 128), 2 minutes, 3 km

The figure goes to outputs/forecast_prediff.png. Frames 10 minutes apart are used, the last
hour of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from earthformer_hf import PreDiffPipeline
from earthformer_hf.data.inputs import last_time, rain_input, wettest_window
from earthformer_hf.data.measures import parsed_spacing
from earthformer_hf.errors import ends_in_one_line
from earthformer_hf.evaluation.baselines import persistence
from earthformer_hf.evaluation.metrics import EnsembleScores
from earthformer_hf.forecasting.dataset import Products, near
from earthformer_hf.plotting import lead_labels, plot_sequence, sequence_row


def and_highest(maps: np.ndarray) -> np.ndarray:
    """Maps (..., T, H, W) and, as one more, the highest of all times, of what was observed."""
    return np.concatenate([maps, np.fmax.reduce(maps, axis=-3, keepdims=True)], axis=-3)


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="rain rates in mm/h (.npy, .npz), or open radar data (.h5)")
    parser.add_argument("--model", default="model_cards/prediff-radar-small", help="a pipeline's folder, or a hub id")
    parser.add_argument("--ensemble_size", type=int, default=8, help="members")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="more are slower, and hardly better")
    parser.add_argument("--threshold", type=float, default=10.0, help="of the chance, in mm/h")
    parser.add_argument("--neighbourhood", default="10 km", help="of the chance: how far from a place it may happen")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast_prediff.png"), help="the figure")
    arguments = parser.parse_args()
    try:
        pipeline = PreDiffPipeline.from_pretrained(arguments.model)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--model: {reason}") from reason
    extractor, config = pipeline.feature_extractor, pipeline.unet.config
    past, pixels_per_latent = config.context_length, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    image_size = [pixels_per_latent * n for n in config.sample_size]
    try:
        label, events = rain_input(arguments.input, extractor)
        lengths, latest = (past, config.prediction_length), label.startswith("input")
        event, codes, minutes = wettest_window(events, extractor, *lengths, image_size, latest)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--input: {reason}") from reason
    print(f"rain: {label}, ensemble of {arguments.ensemble_size} by {arguments.model}", flush=True)

    generator = torch.Generator().manual_seed(arguments.seed)
    inputs = extractor(codes[:past])
    steps = {"num_inference_steps": arguments.num_inference_steps, "generator": generator}
    ensemble = pipeline(**inputs, ensemble_size=arguments.ensemble_size, **steps).predictions
    members = extractor.decode(ensemble[0, ..., 0])  # (E, T_out, H, W)
    rain = extractor.to_physical(members)
    radius = Products(neighbourhood=arguments.neighbourhood).radius()
    spacing = parsed_spacing(extractor.grid_spacing)[0]

    def happens(maps: np.ndarray) -> np.ndarray:
        """Where the threshold is reached close by, at each time and at any, (T_out + 1, H, W) of (T_out, H, W)."""
        return and_highest(near(maps >= arguments.threshold, radius, (spacing, spacing)))

    chance = np.mean([happens(member) for member in rain], axis=0)  # of an extreme event, (T_out + 1, H, W)

    target = codes[past:]
    observed = np.isfinite(target)
    if observed.any() and len(members) > 1:
        last = persistence(np.nan_to_num(codes[:past]), len(target))
        error = np.abs(last - target)[observed].mean() / 255
        scores = EnsembleScores(len(target), value_range=255)
        scores.update(members, target, observed)
        score = scores.compute()["fair_crps"]
        print(f"this storm: fair CRPS {score:.4f} of code / 255; the error of persistence {error:.4f}")
    close = f"within {arguments.neighbourhood}"
    text = (
        f"highest chance of {arguments.threshold:g} mm/h or more {close}, {minutes[past]} to {minutes[-1]} min ahead"
    )
    print(f"{text}: {100 * chance[:-1].max():.0f} % at one time, {100 * chance[-1].max():.0f} % at any time")

    known = extractor.to_physical(codes)
    before = known[:past][-len(chance) :]  # as many maps as follow below them
    rows = {"observed": sequence_row(and_highest(known[past:]), before)}
    rows["ensemble mean"] = sequence_row(and_highest(rain.mean(axis=0)), columns=len(before))
    rows |= {
        f"member {n + 1}": sequence_row(and_highest(rain[n]), columns=len(before)) for n in range(min(3, len(rain)))
    }
    chances = {f"{arguments.threshold:g} mm/h or more\n{close}": sequence_row(chance, columns=len(before))}
    if observed.any():
        happened = np.where(and_highest(observed), happens(known[past:]), np.nan)
        chances[f"it happened\n{close}"] = sequence_row(happened, columns=len(before))
    title = f"{label}: {event['id']}, PreDiff, {arguments.ensemble_size} members"
    made = last_time(event, minutes, bool(observed.any()))
    leads = [*lead_labels([*minutes[past - len(before) : past], *minutes[past:]], made), "at any time"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure = plot_sequence(rows, leads, title, chances, grid_spacing=extractor.grid_spacing)
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
