"""Draw an ensemble of the next 24 minutes of rain, and the chance of exceeding a threshold.

    python examples/forecast_prediff.py                        # real radar if there is any, else simulated rain
    python examples/forecast_prediff.py --input mine.npy       # your own: mm/h, (T, 128, 128), 2 minutes, 3 km

The figure goes to outputs/forecast_prediff.png. Every other frame is used: 13 frames or more are needed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from forecast_radar import describe, input_path, load, wettest

from earthformer_hf import PreDiffPipeline
from earthformer_hf.evaluation.baselines import persistence
from earthformer_hf.evaluation.metrics import EnsembleScores
from earthformer_hf.plotting import plot_sequence


MODEL = "model_cards/prediff-radar-tiny"


def storm(path: Path | None, pipeline: PreDiffPipeline) -> tuple[dict, np.ndarray, list[str]]:
    """The wettest event, the codes (T_in + T_out, H, W) of its first window, NaN where unknown, and column labels."""
    extractor, config = pipeline.feature_extractor, pipeline.unet.config
    try:
        events = load(path, extractor)
    except (ValueError, OSError) as reason:
        raise SystemExit(f"--input: {reason}") from reason
    length = config.context_length + config.prediction_length
    number, unit = int(extractor.time_step[:-1]), extractor.time_step[-1]
    minutes = int(np.timedelta64(number, unit) / np.timedelta64(1, "m"))
    stride = minutes // events[0]["geo"]["minutes"]
    event = wettest(events, extractor, stride * (length - 1) + 1)
    codes = event["values"][::stride][:length].astype("float32")
    size = tuple(2 ** (len(pipeline.vae.config.block_out_channels) - 1) * n for n in config.sample_size)
    if len(codes) < config.context_length or codes.shape[1:] != size:
        raise SystemExit(
            f"--input: {stride * (config.context_length - 1) + 1} frames or more of {size[0]} x {size[1]} are needed, "
            f"got {event['values'].shape}."
        )
    known = np.full((length, *size), np.nan, "float32")
    known[: len(codes)] = np.where(extractor.observed(codes), codes, np.nan)
    leads = [f"{minutes * (i - config.context_length + 1):+d} min" for i in range(length)]
    return event, known, leads


def shown(frames: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
    """A row of the figure: three frames of context, or blanks, then the future."""
    before = np.full((3, *frames.shape[1:]), np.nan) if context is None else context[[0, len(context) // 2, -1]]
    return np.concatenate([before, frames])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--ensemble_size", type=int, default=8)
    parser.add_argument("--threshold", type=float, default=10.0, help="mm/h")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast_prediff.png"))
    arguments = parser.parse_args()
    path = input_path(arguments.input)
    label = describe(path)
    print(f"rain: {label}, ensemble of {arguments.ensemble_size} by {arguments.model}", flush=True)
    pipeline = PreDiffPipeline.from_pretrained(arguments.model)
    extractor = pipeline.feature_extractor
    event, codes, leads = storm(path, pipeline)
    past = pipeline.unet.config.context_length

    generator = torch.Generator().manual_seed(arguments.seed)
    inputs = extractor(codes[:past])
    ensemble = pipeline(**inputs, ensemble_size=arguments.ensemble_size, generator=generator).predictions
    members = extractor.decode(ensemble[0, ..., 0])  # (E, T_out, H, W)
    rain = extractor.to_physical(members)
    chance = (rain >= arguments.threshold).mean(axis=0)  # the chance of an extreme event, (T_out, H, W)

    target = codes[past:]
    observed = np.isfinite(target)
    if observed.any() and len(members) > 1:
        last = persistence(np.nan_to_num(codes[:past]), len(target))
        error = np.abs(last - target)[observed].mean() / 255
        scores = EnsembleScores(len(target), value_range=255)
        scores.update(members, target, observed)
        score = scores.compute()["fair_crps"]
        print(f"this storm: fair CRPS {score:.4f} of code / 255; the error of persistence {error:.4f}")
    print(f"highest chance of {arguments.threshold:g} mm/h or more: {100 * chance.max():.0f} %, in {leads[-1][1:]}")

    known = extractor.to_physical(codes)
    rows = {"observed": shown(known[past:], known[:past]), "ensemble mean": shown(rain.mean(axis=0))}
    rows |= {f"member {number + 1}": shown(member) for number, member in enumerate(rain[:3])}
    chances = {f"chance of {arguments.threshold:g} mm/h": shown(chance)}
    if observed.any():
        happened = np.where(observed, known[past:] >= arguments.threshold, np.nan)
        chances["it happened"] = shown(happened)
    title = f"{label}: {event['id']}, PreDiff, {arguments.ensemble_size} members"
    columns = [leads[i] for i in (0, past // 2, past - 1)] + leads[past:]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot_sequence(rows, columns, title, chances).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
