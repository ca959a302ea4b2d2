"""Forecast El Nino: the months that come after the last twelve of a record, and how such forecasts did before.

    python examples/forecast_enso.py                        # real anomalies if there are any, else a simulated ocean
    python examples/forecast_enso.py --input sst.nc         # your own: `ssta` (time, lat 24, lon 72), degrees Celsius

Temperatures on another grid become such anomalies by `earthformer-hf data sst-anomalies`. The figure goes to
outputs/enso.png.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.data import Windows
from earthformer_hf.data.inputs import last_frames, ocean_input
from earthformer_hf.data.open_sst import nino34, three_month_means
from earthformer_hf.errors import ends_in_one_line
from earthformer_hf.evaluation import PROTOCOLS, baseline_forecaster, data_extractor, evaluate, model_forecaster
from earthformer_hf.evaluation.reports import score_file, score_text
from earthformer_hf.plotting import plot_ocean
from earthformer_hf.sharing.loading import refuse_mistyped


HINDCASTS = 120  # the latest so many are scored of a record of one's own
LEAST = 24  # hindcasts, for a range of errors
MAP_LEAD = 6  # months ahead, of the map that is drawn
SECONDS = 0.33  # of a hindcast by all systems on one core, roughly


def coming_months(model, extractor, event: dict) -> tuple[np.ndarray, np.ndarray]:
    """Months (T_out,) and maps (T_out, H, W) in degrees Celsius after an event's last ones, NaN beyond coverage."""
    past = np.asarray(event["values"][-model.config.context_length :])
    inputs = extractor(past, time=event["time"][-len(past) :])
    maps = extractor.decode(model(**inputs).predictions[0, ..., 0])
    months = event["time"][-1].astype("datetime64[M]") + 1 + np.arange(len(maps))
    return months, np.where(extractor.observed(past).all(0), maps, np.nan)


def hindcast(model, extractor, events: dict, label: str) -> dict:
    """Scores of forecasts from every month of the test record, printed; empty if it is too short for one."""
    past, future = model.config.context_length, model.config.prediction_length
    held, needed = len(events["test"][0]["time"]), past + future + 12
    if held < needed:
        print(f"no hindcast: it needs {needed} months, there are {held}")
        return {}
    protocol = replace(PROTOCOLS[extractor.protocol], name=f"hindcast, {label}", scores=("nino34",))
    encode = data_extractor(protocol).encode
    if "train" not in events:
        events = {"test": [last_frames(events["test"][0], HINDCASTS + past + future - 1)]}
    windows = {split: Windows(records, encode, past, future) for split, records in events.items()}
    count = len(windows["test"])
    print(f"{count} hindcasts are scored first, in about {SECONDS * count:.0f} s on one core", flush=True)
    forecasters = {"Earthformer": model_forecaster(model, extractor)}
    for name in protocol.baselines if "train" in windows else ("persistence",):
        forecasters[name] = baseline_forecaster(name, protocol, windows.__getitem__)
    results = evaluate(forecasters, windows["test"], protocol)
    first = events["test"][0]["time"][past].astype("datetime64[M]")
    print(f"hindcast: {results['windows']} forecasts, the first of {first}, from what is known today of those months")
    print(score_text(score_file(results, protocol), protocol))
    return {system: scores["nino34"] for system, scores in results["scores"].items()}


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="monthly anomalies, a NetCDF file (.nc)")
    parser.add_argument("--model", default="model_cards/earthformer-sst-small", help="a model folder, or a hub id")
    parser.add_argument("--output", type=Path, default=Path("outputs/enso.png"), help="the figure")
    arguments = parser.parse_args()
    try:
        refuse_mistyped(arguments.model)
        model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval().requires_grad_(False)
        extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--model: {reason}") from reason
    try:
        label, events = ocean_input(arguments.input)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--input: {reason}") from reason
    event, past = events["test"][0], model.config.context_length
    if len(event["time"]) < past:
        raise ValueError(f"--input: {past} months are needed, {arguments.input} holds {len(event['time'])}.")
    print(f"ocean: {label}, forecast by {arguments.model}", flush=True)
    given = np.isfinite(event["values"][-past:]).all(0)
    used = extractor.observed(event["values"][-past:]).all(0)
    print(
        f"{int(used.sum())} grid points are used, which the model knows; {int((given & ~used).sum())} others are not"
    )

    scores = hindcast(model, extractor, events, label)
    months, maps = coming_months(model, extractor, event)
    means, spread = three_month_means(nino34(maps)), None
    if scores and scores["Earthformer"]["forecasts"] >= LEAST:
        spread = 1.645 * np.asarray(scores["Earthformer"]["rmse_by_lead"])
    title = f"Nino3.4 after {months[0] - 1}, three-month means in degC"
    print(f"\n{title}" + ("; in brackets 90 % by the errors of the hindcasts" if spread is not None else ""))
    for lead, mean in enumerate(means):
        brackets = "" if spread is None else f"  ({mean - spread[lead]:+.2f} .. {mean + spread[lead]:+.2f})"
        print(f"{months[lead]} .. {months[lead + 2]}  {mean:+.2f}{brackets}")
    if "simulated" in label:
        print("The model learnt the real ocean, not this one: these numbers only show that all of it runs.")

    shown = {f"observed, {months[0] - 1}": np.where(used, event["values"][-1], np.nan)}
    shown[f"forecast for {months[MAP_LEAD - 1]}, {MAP_LEAD} months ahead"] = maps[MAP_LEAD - 1]
    skill = {system: entries["correlation_by_lead"] for system, entries in scores.items()}
    recent = event["time"][-24:].astype("datetime64[M]")
    known = recent[1:-1], three_month_means(nino34(event["values"][-24:]))
    figure = plot_ocean(skill, known, (months[1:-1], means, spread), shown, event["geo"], f"{label}: {title}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
