"""Forecast the rain of the next hour, score it against persistence, and draw it.

    python examples/forecast_radar.py                        # real radar if there is any, else simulated rain
    python examples/forecast_radar.py --input mine.npy       # your own: mm/h, (T, 128, 128), 2 minutes, 3 km

Your own, every 2 minutes, is forecast for the 24 minutes after its last frame by another model. The figure goes to
outputs/forecast.png. Where the record is long enough, hindcasts within it are also scored.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.data import Windows
from earthformer_hf.data.inputs import last_time, rain_input, wettest_window
from earthformer_hf.errors import ends_in_one_line
from earthformer_hf.evaluation import PROTOCOLS, baseline_forecaster, evaluate, model_forecaster
from earthformer_hf.evaluation.baselines import persistence
from earthformer_hf.evaluation.reports import score_file, score_text
from earthformer_hf.plotting import lead_labels, plot_sequence, sequence_row
from earthformer_hf.sharing.loading import refuse_mistyped


HOUR, MINUTES = "model_cards/earthformer-radar-small", "model_cards/earthformer-radar-tiny"


def score(model, extractor, events, label: str) -> str:
    """The scores of all windows of the events, beside those of persistence."""
    name, scores = f"hindcasts, {label}", ("contingency", "errors")
    protocol = replace(PROTOCOLS[extractor.protocol], name=name, independent="id", scores=scores)
    past, future = model.config.context_length, model.config.prediction_length
    windows = Windows(events, extractor.encode, past, future, protocol.window_stride)
    forecasters = {
        "Earthformer": model_forecaster(model, extractor),
        "persistence": baseline_forecaster("persistence", protocol, lambda split: windows),
    }
    return score_text(score_file(evaluate(forecasters, windows, protocol), protocol), protocol)


@torch.no_grad()
def draw(model, extractor, event: dict, codes: np.ndarray, minutes: np.ndarray, label: str):
    """A figure of one storm: every other one of the last frames that were seen, and of those that follow.

    Args:
        codes, minutes: raw values (T_in + T_out, H, W), and when they were, 0 for the last frame of the past.
    """
    past = model.config.context_length
    future = slice(1, None, 2)
    shown = len(range(model.config.prediction_length)[future])
    context = list(range(past))[::-2][:shown][::-1]  # as far apart, up to the last
    forecast = extractor.decode(model(**extractor(codes[:past])).predictions[0, ..., 0])  # (T_out, H, W)
    frames = {
        "observed": sequence_row(codes[past:][future], codes[context]),
        "Earthformer": sequence_row(forecast[future], columns=len(context)),
        "persistence": sequence_row(persistence(codes[:past], len(forecast))[future], columns=len(context)),
    }
    rows = {name: extractor.to_physical(row) for name, row in frames.items()}
    title = f"{label}: {event['id']}"
    known = np.isfinite(codes[past:]).any()
    made = last_time(event, minutes, known)
    title += ", hindcast" if known else ", forecast"
    if not np.isnat(made):
        title += f" made at {made.astype('datetime64[m]')} UTC"
    leads = lead_labels([*minutes[context], *minutes[past:][future]], made)
    return plot_sequence(rows, leads, title, grid_spacing=extractor.grid_spacing)


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="rain rates in mm/h (.npy, .npz), or open radar data (.h5)")
    parser.add_argument("--model", help=f"a model folder, or a hub id; {HOUR}, of INPUT {MINUTES}, if omitted")
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast.png"), help="the figure")
    arguments = parser.parse_args()
    arguments.model = arguments.model or (HOUR if arguments.input is None else MINUTES)
    try:
        refuse_mistyped(arguments.model)
        model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval()
        extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--model: {reason}") from reason
    past, future = model.config.context_length, model.config.prediction_length
    try:
        label, events = rain_input(arguments.input, extractor)
        latest = label.startswith("input")  # of one's own files what comes next, of others a storm that is known
        event, codes, minutes = wettest_window(events, extractor, past, future, model.config.image_size, latest)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--input: {reason}") from reason
    print(f"rain: {label}, forecast by {arguments.model}", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(model, extractor, event, codes, minutes, label).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}", flush=True)
    if len(event["values"]) >= past + future:
        print(score(model, extractor, events, label))
        if "simulated" in label:
            print("The model learnt from real radar: these scores only show that all of it runs.")


if __name__ == "__main__":
    main()
