"""Commands and options that draw forecasts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .frame import app, fails_in_one_line


PICTURES = (".png", ".jpg", ".pdf", ".svg")
Colors = Annotated[str, typer.Option(help="of rain: rain, or colour-blind")]


def check_pictures(plot: Path | None, animate: Path | None) -> None:
    """Refuse, before a forecast is made, pictures that could not be written.

    Raises:
        ValueError: another ending, MP4 without ffmpeg, or a folder that cannot be written.
        ImportError: matplotlib is not installed.
    """
    from ..plotting import check_animation
    from ..sharing.files import check_writable

    if plot is None and animate is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("pictures need matplotlib; install it with pip install 'earthformer-hf[plot]'.") from None
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            raise ValueError(f"a picture must end in one of {PICTURES}, got {plot.name!r}.")
        check_writable(plot.parent)
    if animate is not None:
        check_writable(check_animation(animate).parent)


def draw(
    dataset: Any, observations: Any, plot: Path | None, animate: Path | None, colors: str, **options: Any
) -> None:
    """A forecast as a picture and as an animation, whichever is asked for."""
    from ..evaluation.reports import write_figure
    from ..plotting import animate_forecast, plot_forecast

    if plot is not None:
        write_figure(plot_forecast(dataset, observations, colors=colors, **options), plot)
    if animate is not None:
        animate_forecast(dataset, animate, observations, colors=colors)


@app.command("plot")
@fails_in_one_line
def plot_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a forecast, .nc or .zarr")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the picture: .png, .jpg, .pdf or .svg")] = None,
    animate: Annotated[Path | None, typer.Option(help="a moving picture: .gif, or .mp4 where ffmpeg is")] = None,
    observed: Annotated[
        list[str] | None, typer.Option(help="what was observed, as the INPUT of forecast; may be repeated")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="draw only the chance that it is reached")] = None,
    lead: Annotated[str | None, typer.Option(help="draw only this lead, such as 20m, with all members")] = None,
    time: Annotated[str | None, typer.Option(help="or only this valid time, such as 2020-06-01T12:40")] = None,
    start: Annotated[str | None, typer.Option(help="of an archive: from when; the last if omitted")] = None,
    colors: Colors = "rain",
):
    """Draw a forecast that was written: maps under valid times and leads, members, and chances.

    earthformer-hf plot nowcast.nc --out nowcast.png
    """
    from ..forecasting import observe, observed_maps, open_forecast

    if out is None and animate is None:
        raise ValueError("`--out` or `--animate` must say what to write.")
    check_pictures(out, animate)
    dataset = open_forecast(file, start)
    known = None
    if observed:
        known = observed_maps(dataset, observe(observed if len(observed) > 1 else observed[0]))
    draw(dataset, known, out, animate, colors, threshold=threshold, lead=lead, time=time)
    for path in (out, animate):
        if path is not None:
            typer.echo(f"{path}: written")


__all__ = ["Colors", "check_pictures", "draw", "plot_command"]
