"""Commands that forecast again and again: over an archive, from a folder that is watched, for who asks."""

import json
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from .data import source_options
from .forecasts import (
    CoarsenTo,
    Crs,
    Device,
    Ensemble,
    GridOf,
    GridSpacing,
    Guide,
    Lead,
    MaxMemory,
    Mean,
    Members,
    ModelId,
    Neighbourhood,
    Option,
    Overlap,
    Percentile,
    ResampleTime,
    Seed,
    Steps,
    Threshold,
    TimeStep,
    Units,
    Variable,
)
from .frame import RENAMED, app, fails_in_one_line


NAMES = RENAMED | {"threshold": "thresholds", "percentile": "percentiles"}  # option -> argument of Python
OF_FORECASTS = (  # options of both archive and watch
    "lead ensemble steps seed guide coarsen_to resample_time grid threshold neighbourhood percentile mean members "
    "variable units time_step grid_spacing crs overlap max_memory"
).split()


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command as options of a forecast, without those that are not given."""
    found = {NAMES.get(name, name): given[name] for name in OF_FORECASTS if given[name] is not None}
    return found | source_options(given["option"])


@app.command("archive")
@fails_in_one_line
def archive_command(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="files, a folder, or a pattern in quotes")],
    model: ModelId,
    out: Annotated[Path, typer.Option("--out", "-o", help="a .zarr store; one that was begun goes on")],
    start: Annotated[str, typer.Option(help="the first time to forecast from, such as 2020-01-01T12:00")],
    end: Annotated[str, typer.Option(help="the last one")],
    every: Annotated[str, typer.Option(help="from one to the next, such as 10m")],
    dask: Annotated[str | None, typer.Option(help="address of a Dask scheduler, such as tcp://host:8786")] = None,
    workers: Annotated[int, typer.Option(help="processes on this machine, without --dask")] = 2,
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
    overlap: Overlap = None,
    max_memory: MaxMemory = "4GB",
    option: Option = None,
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="say what was done as JSON")] = False,
):
    """Forecast from each of many times in an archive, into one Zarr store. Run it again after a kill: it goes on.

    earthformer-hf archive "radar/*.nc" --model model_cards/earthformer-radar-tiny --out hindcasts.zarr
    --start 2020-06-01T00:00 --end 2020-06-02T00:00 --every 10m
    """
    options = _options(locals())
    from ..forecasting import forecast_archive

    summary = forecast_archive(
        model,
        inputs if len(inputs) > 1 else inputs[0],
        out,
        start,
        end,
        every,
        scheduler=dask,
        workers=workers,
        device=device,
        **options,
    )
    if json_:
        typer.echo(json.dumps({"out": str(out)} | summary))
        return
    for time, reason in summary["left_out"].items():
        typer.echo(f"left out {time}: {reason}")
    typer.echo(
        f"{out}: {summary['made']} starts forecast, {summary['kept']} kept, {len(summary['left_out'])} left out"
    )


@app.command("serve")
@fails_in_one_line
def serve_command(
    model: ModelId,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="to listen at")] = 8000,
    max_queue: Annotated[int, typer.Option(help="requests at once; a further one is answered 503")] = 16,
    max_upload: Annotated[int, typer.Option(help="of a request, in MB")] = 128,
    timeout: Annotated[float, typer.Option(help="seconds from a request to its answer")] = 300.0,
    max_memory: Annotated[str, typer.Option(help="for the arrays of a forecast")] = "4GB",
    device: Device = "auto",
):
    """Forecast what is sent to http://HOST:PORT/forecast, NetCDF or JSON; /docs describes it.

    earthformer-hf serve --model model_cards/earthformer-radar-tiny
    curl --data-binary @radar.nc -H "Content-Type: application/x-netcdf" localhost:8000/forecast -o nowcast.nc
    """
    try:
        import uvicorn

        from ..forecasting.service import service
    except ModuleNotFoundError as reason:
        raise ValueError(f"{reason.name} is missing; install it with: pip install 'earthformer-hf[serve]'.") from None
    limits = {"max_queue": max_queue, "max_upload": max_upload * 10**6, "timeout": timeout, "max_memory": max_memory}
    uvicorn.run(service(model, device=device, **limits), host=host, port=port)  # type: ignore[arg-type]


@app.command("watch")
@fails_in_one_line
def watch_command(
    folder: Annotated[Path, typer.Argument(help="whose files get new frames")],
    model: ModelId,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the forecasts")],
    interval: Annotated[str, typer.Option(help="from one look to the next, such as 10s or 1m")] = "10s",
    once: Annotated[bool, typer.Option("--once", help="look once, as for cron")] = False,
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
    overlap: Overlap = None,
    max_memory: MaxMemory = "4GB",
    option: Option = None,
    device: Device = "auto",
):
    """Forecast whenever a new frame has come into a folder, each time once; SIGTERM and Ctrl-C end it.

    earthformer-hf watch /data/radar --model model_cards/earthformer-radar-tiny --out nowcasts --interval 30s
    """
    options = _options(locals())
    from ..forecasting.watch import Watch, only_watch, watch

    watched = Watch(model, folder, out, typer.echo, device, **options)
    if once:
        with only_watch(watched.out):
            watched.look()
        if watched.is_waiting:  # cron is told
            raise typer.Exit(1)
        return
    stop = threading.Event()

    def end(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # the second one does not wait for the forecast

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    for _ in watch(watched, interval, stop):
        pass
    typer.echo("ended")


__all__ = ["archive_command", "serve_command", "watch_command"]
