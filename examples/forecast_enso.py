"""Forecast El Nino a year ahead, score it against persistence, and draw it.

    python examples/forecast_enso.py                        # real anomalies if there are any, else a simulated ocean
    python examples/forecast_enso.py --input sst.nc         # your own: `ssta` (time, lat 24, lon 72), degrees Celsius

The figure goes to outputs/enso.png.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.data import Windows, open_sst, simulated
from earthformer_hf.evaluation import baseline_forecaster, data_extractor, evaluate, model_forecaster, window_at
from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.evaluation.reports import score_file, score_text
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
            events = {"test": open_sst.load_events(path)}
        except (ValueError, OSError) as reason:
            raise SystemExit(f"--input: {reason}") from reason
    elif path is None:
        years = {"train": (60, 1), "val": (20, 2), "test": (20, 0)}
        events = {split: simulated.sst_events(*number_and_seed) for split, number_and_seed in years.items()}
    else:
        events = {split: open_sst.load_events(path, split) for split in ("train", "val", "test")}
    (event,) = events["test"]
    past, future = model.config.context_length, model.config.prediction_length
    if len(event["time"]) < past + future + 12:
        raise SystemExit(f"--input: {path} must hold at least 38 months, it holds {len(event['time'])}.")
    protocol = replace(PROTOCOLS[extractor.protocol], name=label, scores=("nino34",))
    data = data_extractor(protocol)
    windows = {split: Windows(records, data.encode, past, future) for split, records in events.items()}
    forecasters = {"Earthformer": model_forecaster(model, extractor)}
    for name in protocol.baselines if "train" in windows else ("persistence",):
        forecasters[name] = baseline_forecaster(name, protocol, windows.__getitem__)
    results = evaluate(forecasters, windows["test"], protocol)
    print(score_text(score_file(results, protocol), protocol))
    if path is None:
        print("The model learnt the real ocean, the others this one: these scores only show that all of it runs.")

    # The picture: forecasts through the two years of the largest event, or of 1997-98.
    months, index = event["time"], open_sst.nino34(event["values"])
    start = int(np.flatnonzero(months == EVENT)[0]) if EVENT in months else max(past, int(index.argmax()) - 11)
    start = min(start, len(months) - 24 - future) if len(months) > 24 + future + past else past
    part = slice(max(0, start - past), start + 24)
    starts = range(start, min(start + 18, len(months) - future), 3)
    forecasts = []
    for i in starts:
        window = window_at(windows["test"], i - past, data)
        forecasts.append(np.where(window.observed, forecasters["Earthformer"](window), np.nan))
    plumes = [(months[i : i + future], open_sst.nino34(x)) for i, x in zip(starts, forecasts)]
    chosen, lead = len(forecasts) // 2, 6
    month = starts[chosen] + lead - 1
    maps = {
        f"observed, {months[month]}": event["values"][month],
        f"forecast for {months[month]}, {lead} months ahead": forecasts[chosen][lead - 1],
    }
    skill = {system: scores["nino34"]["correlation_by_lead"] for system, scores in results["scores"].items()}
    figure = plot_ocean(
        skill, months[part], index[part], plumes, maps, event["geo"]["lat"], event["geo"]["lon"], label
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
