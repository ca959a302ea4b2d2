"""Forecast the rain of the next 24 minutes, score it against persistence, and draw it.

    python examples/forecast_radar.py                        # real radar if there is any, else simulated rain
    python examples/forecast_radar.py --input mine.npy       # your own: mm/h, (T, 128, 128), 2 minutes, 3 km

The figure goes to outputs/forecast.png. With 25 frames or more the forecast is also scored.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.data import open_radar, simulated
from earthformer_hf.data.guards import load_npz, open_npy
from earthformer_hf.data.windows import Windows
from earthformer_hf.evaluation import baseline_forecaster, evaluate, model_forecaster
from earthformer_hf.evaluation.baselines import persistence
from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.evaluation.reports import score_file, score_text
from earthformer_hf.plotting import plot_sequence


MODEL = "model_cards/earthformer-radar-tiny"
REAL = Path(os.environ.get("EARTHFORMER_HF_DATA", "../shared/data")) / "radar_open_3km.h5"


def input_path(path: Path | None) -> Path | None:
    """The input that was asked for, else real radar if there is any; None: simulated rain."""
    return path or (REAL if REAL.exists() else None)


def describe(path: Path | None) -> str:
    """What the input is, in words."""
    if path is None:
        return "simulated rain (not real)"
    if path.suffix in (".h5", ".hdf5"):
        return f"real radar (MRMS groups of {path.name})"
    return f"input {path.name}"


def load(path: Path | None, extractor) -> list[dict]:
    """The input's events, in proxy codes."""
    if path is None:
        events = simulated.rain_events(8)
    elif path.suffix in (".h5", ".hdf5"):
        return open_radar.load_events(path, "test")
    elif path.suffix in (".npy", ".npz"):
        arrays = load_npz(path) if path.suffix == ".npz" else {"": open_npy(path)}
        if len(arrays) != 1:
            raise SystemExit(f"--input: {path} must hold one array, it holds {sorted(arrays)}.")
        (rain,) = arrays.values()
        if rain.ndim != 3 or rain.dtype.kind not in "iuf":
            raise SystemExit(
                f"--input: {path} must hold rain rate in mm/h (T, 128, 128), got {rain.dtype} {rain.shape}."
            )
        wrong = np.isinf(rain) | (rain < 0)
        if wrong.any():
            first = tuple(int(n) for n in np.argwhere(wrong)[0])
            raise SystemExit(f"--input: {path} holds {wrong.sum()} negative or infinite rates, the first at {first}.")
        events = [{"id": path.stem, "values": rain, "geo": {"minutes": 2}}]
    else:
        raise SystemExit(f"--input: {path} must be .npy or .npz (mm/h) or .h5 (open radar layout).")
    for event in events:
        rain = event["values"].astype("float32")
        codes = extractor.from_physical(np.nan_to_num(rain))
        event["values"] = np.where(np.isfinite(rain), codes, extractor.missing_value).astype("float32")
    return events


def wettest(events: list[dict], extractor, length: int) -> dict:
    """The event with most rain, among those of so many frames if there are any."""
    return max(events, key=lambda e: (len(e["values"]) >= length, extractor.encode(e["values"])[0].mean()))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast.png"))
    arguments = parser.parse_args()
    path = input_path(arguments.input)
    label = describe(path)
    print(f"rain: {label}, forecast by {arguments.model}", flush=True)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval()
    extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    try:
        events = load(path, extractor)
    except (ValueError, OSError) as reason:
        raise SystemExit(f"--input: {reason}") from reason
    past, future = model.config.context_length, model.config.prediction_length
    minutes = events[0]["geo"]["minutes"]
    longest = max(len(event["values"]) for event in events)
    if longest < past or events[0]["values"].shape[1:] != tuple(model.config.image_size):
        grid = " x ".join(map(str, model.config.image_size))
        raise SystemExit(f"--input: {past} frames or more of {grid} are needed, got {events[0]['values'].shape}.")
    if longest >= past + future:
        protocol = replace(PROTOCOLS[extractor.protocol], name=label, scores=("contingency", "errors"))
        windows = Windows(events, extractor.encode, past, future, protocol.window_stride)
        forecasters = {
            "Earthformer": model_forecaster(model, extractor),
            "persistence": baseline_forecaster("persistence", protocol, lambda split: windows),
        }
        print(score_text(score_file(evaluate(forecasters, windows, protocol), protocol), protocol))
        if path is None:
            print("The model learnt from real radar: these scores only show that all of it runs.")

    # The picture: the wettest event, its first window.
    event = wettest(events, extractor, past + future)
    codes = event["values"][: past + future]
    shown = [i for i in (1, 3, 5, 7, 9, 11) if i < future]
    known = np.full((past + future, *codes.shape[1:]), np.nan, "float32")
    known[: len(codes)] = np.where(extractor.observed(codes), codes, np.nan)
    rain = extractor.to_physical(known)
    predictions = model(**extractor(codes[:past])).predictions[0, ..., 0]
    last = np.where(extractor.observed(codes[past - 1 : past]), codes[past - 1 : past], np.nan)
    before = [past - 7, past - 4, past - 1]
    blank = np.full((len(before), *codes.shape[1:]), np.nan)
    rows = {
        "observed": np.concatenate([rain[before], rain[past:][shown]]),
        "Earthformer": np.concatenate([blank, extractor.to_physical(extractor.decode(predictions))[shown]]),
        "persistence": np.concatenate([blank, extractor.to_physical(persistence(last, future))[shown]]),
    }
    leads = [f"{minutes * (i - past + 1)} min" for i in before] + [f"+{minutes * (i + 1)} min" for i in shown]
    title = f"{label}: {event['id']}"
    if "time" in event:
        title += f", forecast made at {event['time'][past - 1].astype('datetime64[m]')} UTC"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot_sequence(rows, leads, title).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
