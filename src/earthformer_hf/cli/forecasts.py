"""Commands that forecast a user's own data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .data import source_options
from .frame import app, fails_in_one_line
from .plots import Colors, check_pictures, draw


# options of several commands
ModelId = Annotated[str, typer.Option("--model", "-m", help="a model folder, or a hub id")]
Lead = Annotated[str | None, typer.Option(help="how far, such as 2h; the model's own length if omitted")]
Ensemble = Annotated[int, typer.Option(help="members, of a pipeline")]
Steps = Annotated[int | None, typer.Option(help="denoising steps, of a pipeline")]
Seed = Annotated[int, typer.Option(help="of a pipeline's noise")]
CoarsenTo = Annotated[str | None, typer.Option(help="the model's grid spacing, such as '3 km': means")]
ResampleTime = Annotated[str | None, typer.Option(help="the model's time step, such as 10m")]
GridOf = Annotated[str, typer.Option(help="of the result: input or model")]
Threshold = Annotated[list[float] | None, typer.Option(help="write the chance that it is reached; may be repeated")]
Neighbourhood = Annotated[str | None, typer.Option(help="of chances: reached anywhere within, such as '10 km'")]
Percentile = Annotated[list[float] | None, typer.Option(help="of the members; may be repeated")]
Mean = Annotated[bool, typer.Option("--mean", help="write the mean of the members")]
Variable = Annotated[str | None, typer.Option(help="to read, where there are several")]
TimeStep = Annotated[str | None, typer.Option(help="where the files have no dates, such as 5m")]
GridSpacing = Annotated[str | None, typer.Option(help="where the files do not say it, such as '1 km'")]
Crs = Annotated[str | None, typer.Option(help="where the files do not say it, such as EPSG:3035")]
Overlap = Annotated[int | None, typer.Option(help="of tiles, in the model's pixels")]
MaxMemory = Annotated[str, typer.Option(help="for the arrays of the forecast")]
Members = Annotated[bool, typer.Option(help="write the members")]
Units = Annotated[str | None, typer.Option(help="where the files do not say them: mm/h, mm, dBZ, ...")]
Option = Annotated[list[str] | None, typer.Option("--option", help="NAME=VALUE, as for the data set folder")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto")]
Guide = Annotated[str | None, typer.Option(help="such as change=+2sigma: ask a pipeline for more or less than usual")]


@app.command("forecast")
@fails_in_one_line
def forecast_command(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="files, a folder, or a pattern in quotes")],
    model: ModelId,
    out: Annotated[Path, typer.Option("--out", "-o", help="a .nc, .zarr or .tif file")],
    lead: Lead = None,
    ensemble: Ensemble = 8,
    steps: Steps = None,
    seed: Seed = 0,
    guide: Guide = None,
    coarsen_to: CoarsenTo = None,
    resample_time: ResampleTime = None,
    grid: GridOf = "input",
    threshold: Threshold = None,
    neighbourhood: Neighbourhood = None,
    percentile: Percentile = None,
    mean: Mean = False,
    members: Members = True,
    variable: Variable = None,
    units: Units = None,
    time_step: TimeStep = None,
    grid_spacing: GridSpacing = None,
    crs: Crs = None,
    start: Annotated[str | None, typer.Option(help="where the files have no dates, such as 2020-01-01T12:00")] = None,
    until: Annotated[str | None, typer.Option(help="forecast from the last frame up to this time")] = None,
    option: Option = None,
    overlap: Overlap = None,
    max_memory: MaxMemory = "4GB",
    plot: Annotated[Path | None, typer.Option(help="draw it: .png, .jpg, .pdf or .svg")] = None,
    animate: Annotated[Path | None, typer.Option(help="as a moving picture: .gif, or .mp4 where ffmpeg is")] = None,
    colors: Colors = "rain",
    device: Device = "auto",
    dask: Annotated[str | None, typer.Option(help="let a worker of this Dask scheduler make it")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    json_: Annotated[bool, typer.Option("--json", help="say what was done as JSON")] = False,
):
    """Forecast what follows the last frames of your files, on their own grid.

    Rain rates, amounts and dBZ become what the model takes; another time step or grid spacing only if asked for.

    earthformer-hf forecast radar_*.nc --model model_cards/prediff-radar-small --out nowcast.nc --threshold 10
    """
    from ..forecasting import forecast, forecast_on, observe, observed_maps, save
    from ..forecasting.files import check_target

    check_target(out, overwrite)
    check_pictures(plot, animate)
    data: Any = inputs if len(inputs) > 1 else inputs[0]
    about: dict[str, Any] = {"variable": variable, "units": units, "time_step": time_step, "crs": crs, "start": start}
    about |= {"grid_spacing": grid_spacing, "until": until} | source_options(option)
    options: dict[str, Any] = {"lead": lead, "ensemble_size": ensemble, "num_inference_steps": steps, "seed": seed}
    options |= {"guide": guide, "coarsen_to": coarsen_to, "resample_time": resample_time, "grid": grid}
    options |= {"members": members, "mean": mean, "percentiles": percentile or (), "thresholds": threshold or ()}
    options |= {"neighbourhood": neighbourhood, "overlap": overlap, "max_memory": max_memory, "device": device}
    observations = observe(data, **about) if dask is None or plot or animate else None
    if dask is None:
        dataset = forecast(model, observations, **options)
    else:
        dataset = forecast_on(dask, model, data, **about, **options)
    save(dataset, out, overwrite)
    if observations is not None and (plot or animate):
        draw(dataset, observed_maps(dataset, observations), plot, animate, colors)
    pictures = [path for path in (plot, animate) if path is not None]
    typer.echo(_as_json(dataset, out, pictures) if json_ else _in_words(dataset, out, pictures))


def _in_words(dataset: Any, out: Path, pictures: list[Path]) -> str:
    """What a forecast holds, a line for each variable."""
    lines = []
    if "time" in dataset.coords:
        times = [str(value)[:16].replace("T", " ") for value in dataset["time"].values[[0, -1]]]
        last = str(dataset["forecast_reference_time"].values)[:16].replace("T", " ")
        lines.append(f"from {last}: {times[0]} to {times[1]}")
    for name, array in dataset.data_vars.items():
        sizes = " x ".join(f"{size} {dimension}" for dimension, size in array.sizes.items())
        units = array.attrs.get("units", "1")
        highest = f", at most {float(array.max()):.3g}" + ("" if units == "1" else f" {units}")
        lines.append(f"{name}: {sizes}" + ("" if name == "quality_flag" else highest))
    return "\n".join([*lines, *(f"{path}: written" for path in (out, *pictures))])


def _as_json(dataset: Any, out: Path, pictures: list[Path]) -> str:
    import json

    found: dict[str, Any] = {"out": str(out), "pictures": [str(path) for path in pictures]}
    found |= {"variables": {str(name): dict(array.sizes) for name, array in dataset.data_vars.items()}}
    if "time" in dataset.coords:
        found["forecast_reference_time"] = str(dataset["forecast_reference_time"].values)[:19]
        found["time"] = [str(value)[:19] for value in dataset["time"].values]
    return json.dumps(found | {"attributes": {name: str(value) for name, value in dataset.attrs.items()}})


@app.command("info")
@fails_in_one_line
def info_command(
    model: Annotated[str, typer.Argument(help="a model folder, or a hub id")],
    json_: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
):
    """Say what a model takes and gives."""
    import json

    from ..forecasting import describe

    facts = describe(model)
    typer.echo(json.dumps(facts) if json_ else "\n".join(f"{name + ':':20}{value}" for name, value in facts.items()))


__all__ = [
    "CoarsenTo",
    "Crs",
    "Device",
    "Ensemble",
    "GridOf",
    "GridSpacing",
    "Guide",
    "Lead",
    "MaxMemory",
    "Mean",
    "Members",
    "ModelId",
    "Neighbourhood",
    "Option",
    "Overlap",
    "Percentile",
    "ResampleTime",
    "Seed",
    "Steps",
    "Threshold",
    "TimeStep",
    "Units",
    "Variable",
    "forecast_command",
    "info_command",
]
