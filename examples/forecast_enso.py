"""Forecast El Nino a year ahead, score it against persistence, and draw it.

    python examples/forecast_enso.py                        # real anomalies if there are any, else a simulated ocean
    python examples/forecast_enso.py --input sst.nc         # your own: `ssta` (time, lat 24, lon 72), degrees Celsius

The figure goes to outputs/enso.png.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.benchmark_metrics import correlation_by_lead
from earthformer_hf.data import open_sst, simulated
from earthformer_hf.data.windows import Windows
from earthformer_hf.evaluation import forecast_windows, index_table, score_index
from earthformer_hf.plotting import plot_ocean


MODEL = "model_cards/earthformer-sst-small"
REAL = Path(os.environ.get("EARTHFORMER_HF_DATA", "../shared/data")) / "sst_kaplan_1856_2014.nc"
EVENT = np.datetime64("1997-01", "M")  # the plume is drawn through the two years from here on


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--output", type=Path, default=Path("outputs/enso.png"))
    arguments = parser.parse_args()
    path = arguments.input or (REAL if REAL.exists() else None)
    if arguments.input:
        label = f"input {path.name}"
    else:
        label = f"real ocean (Kaplan SST, {path.name}, 1993-2014)" if path else "simulated ocean (not real)"
    print(f"ocean: {label}, forecast by {arguments.model}", flush=True)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval()
    extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    if arguments.input:
        try:
            (event,), fitting = open_sst.load_events(path), ()
        except (ValueError, OSError) as reason:
            raise SystemExit(f"--input: {reason}") from reason
    elif path is None:
        (event,), fitting = simulated.sst_events(20), (*simulated.sst_events(60, 1), *simulated.sst_events(20, 2))
    else:
        (event,) = open_sst.load_events(path, "test")
        fitting = (*open_sst.load_events(path, "train"), *open_sst.load_events(path, "val"))
    if len(event["time"]) < model.config.context_length + model.config.prediction_length + 12:
        raise SystemExit(f"--input: {path} must hold at least 38 months, it holds {len(event['time'])}.")
    past, future = model.config.context_length, model.config.prediction_length
    systems, targets = score_index(model, extractor, event, *fitting)
    print(index_table(systems, targets, f"Nino3.4 correlation skill, {label}"))
    if path is None:
        print("The model learnt the real ocean, the others this one: these scores only show that all of it runs.")

    # The picture: forecasts through the two years of the largest event, or of 1997-98.
    months, index = event["time"], open_sst.nino34(event["values"])
    start = int(np.flatnonzero(months == EVENT)[0]) if EVENT in months else max(past, int(index.argmax()) - 11)
    start = min(start, len(months) - 24 - future) if len(months) > 24 + future + past else past
    part = slice(max(0, start - past), start + 24)
    starts = range(start, min(start + 18, len(months) - future), 3)
    windows = Windows(
        [{"id": "event", "values": event["values"][i - past : i + future]} for i in starts],
        extractor.encode, past, future,
    )  # fmt: skip
    ocean = extractor.observed(event["values"]).all(0)
    forecasts = [np.where(ocean, extractor.decode(x), np.nan) for x in forecast_windows(model, windows)]
    plumes = [(months[i : i + future], open_sst.nino34(x)) for i, x in zip(starts, forecasts)]
    chosen, lead = len(forecasts) // 2, 6
    month = starts[chosen] + lead - 1
    maps = {
        f"observed, {months[month]}": event["values"][month],
        f"forecast for {months[month]}, {lead} months ahead": forecasts[chosen][lead - 1],
    }
    skill = {system: correlation_by_lead(forecast, targets) for system, forecast in systems.items()}
    skill = {"Earthformer" if system == "model" else system: values for system, values in skill.items()}
    figure = plot_ocean(
        skill, months[part], index[part], plumes, maps, event["geo"]["lat"], event["geo"]["lon"], label
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
