"""Forecast El Nino a year ahead, score it against persistence, and draw it.

    python examples/forecast_enso.py                        # real anomalies if there are any, else a simulated ocean
    python examples/forecast_enso.py --input sst.nc         # your own: `ssta` (time, lat 24, lon 72), degrees Celsius

The figure goes to outputs/enso.png.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.data import Windows
from earthformer_hf.data.inputs import ocean_input
from earthformer_hf.data.open_sst import nino34
from earthformer_hf.evaluation import (
    PROTOCOLS,
    baseline_forecaster,
    data_extractor,
    evaluate,
    model_forecaster,
    window_at,
)
from earthformer_hf.evaluation.reports import score_file, score_text
from earthformer_hf.plotting import plot_ocean


EL_NINO = np.datetime64("1997-01", "M")  # where the record holds it, its two years are drawn


def first_drawn_month(months: np.ndarray, index: np.ndarray, past: int, future: int) -> int:
    """The start of the two years that are drawn: those of 1997-98, or of the highest index."""
    start = int(np.flatnonzero(months == EL_NINO)[0]) if EL_NINO in months else max(past, int(index.argmax()) - 11)
    return min(start, len(months) - 24 - future) if len(months) > 24 + future + past else past


def draw(forecaster, windows: Windows, extractor, skill: dict[str, np.ndarray], label: str):
    """A figure: skill by lead time, forecasts of the index through two years, and one forecast as a map.

    Args:
        forecaster: of the model.
        windows: of one event.
        extractor: of the data.
        skill: system -> correlation at each lead time.
    """
    event, past, future = windows.events[0], windows.context_length, windows.length - windows.context_length
    months, values = event["time"].astype("datetime64[M]"), np.asarray(event["values"])
    index = nino34(values)
    start = first_drawn_month(months, index, past, future)
    starts = range(start, min(start + 18, len(months) - future), 3)
    forecasts = []
    for month in starts:
        window = window_at(windows, month - past, extractor)
        forecasts.append(np.where(window.observed, forecaster(window), np.nan))  # (T_out, H, W)
    index_forecasts = [(months[i : i + future], nino34(maps)) for i, maps in zip(starts, forecasts)]
    chosen, lead = len(forecasts) // 2, 6
    month = starts[chosen] + lead - 1
    maps = {
        f"observed, {months[month]}": values[month],
        f"forecast for {months[month]}, {lead} months ahead": forecasts[chosen][lead - 1],
    }
    shown, geo = slice(max(0, start - past), start + 24), event["geo"]
    return plot_ocean(skill, months[shown], index[shown], index_forecasts, maps, geo["lat"], geo["lon"], label)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="monthly anomalies, a NetCDF file (.nc)")
    parser.add_argument("--model", default="model_cards/earthformer-sst-small", help="a model folder, or a hub id")
    parser.add_argument("--output", type=Path, default=Path("outputs/enso.png"), help="the figure")
    arguments = parser.parse_args()
    try:
        model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval()
        extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    except (ValueError, OSError) as reason:
        raise SystemExit(f"--model: {' '.join(str(reason).split())}") from None
    try:
        label, events = ocean_input(arguments.input)
    except (ValueError, OSError) as reason:
        raise SystemExit(f"--input: {' '.join(str(reason).split())}") from None
    past, future = model.config.context_length, model.config.prediction_length
    months, needed = len(events["test"][0]["time"]), past + future + 12  # a year of forecasts
    if months < needed:
        raise SystemExit(f"--input: {arguments.input} must hold at least {needed} months, it holds {months}.")
    print(f"ocean: {label}, forecast by {arguments.model}", flush=True)
    protocol = replace(PROTOCOLS[extractor.protocol], name=label, scores=("nino34",))
    data = data_extractor(protocol)
    windows = {split: Windows(records, data.encode, past, future) for split, records in events.items()}
    forecasters = {"Earthformer": model_forecaster(model, extractor)}
    for name in protocol.baselines if "train" in windows else ("persistence",):
        forecasters[name] = baseline_forecaster(name, protocol, windows.__getitem__)
    results = evaluate(forecasters, windows["test"], protocol)
    print(score_text(score_file(results, protocol), protocol))
    if "simulated" in label:
        print("The model learnt the real ocean, the others this one: these scores only show that all of it runs.")
    skill = {system: scores["nino34"]["correlation_by_lead"] for system, scores in results["scores"].items()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(forecasters["Earthformer"], windows["test"], data, skill, label).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
