"""A forecast as a moving picture."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .coasts import coastlines
from .fields import check_forecast, forecasts, read_map
from .forecasts import Pages
from .panels import Panel, Sheet, draw_sheet


if TYPE_CHECKING:
    from xarray import DataArray, Dataset

ENDINGS = (".gif", ".mp4")
CONTEXT = 6  # observed frames, before the forecast
SHOWN = ("forecast", "mean", "member 1")
DPI = 90


def check_animation(path: str | Path) -> Path:
    """Refuse, before a forecast is made, a moving picture that could not be written.

    Raises:
        ValueError: another ending than `.gif` and `.mp4`, or MP4 where ffmpeg is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"`path` must end in one of {ENDINGS}, got {path.name!r}.")
    if path.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise ValueError(f"`path`: MP4 needs ffmpeg, which is not installed; GIF works: {path.with_suffix('.gif')}.")
    return path


def animate_forecast(
    dataset: "Dataset",
    path: str | Path,
    observations: "DataArray | None" = None,
    *,
    colors: str = "rain",
    frames_per_second: float = 3.0,
) -> None:
    """Write a forecast as a GIF or, where ffmpeg is installed, an MP4: whole, or not at all.

    A frame for each lead shows the forecast, or the mean and the first member, and the chance of the first threshold.

    Args:
        dataset, colors: see [`~earthformer_hf.plotting.plot_forecast`].
        path: ends in `.gif` or `.mp4`; what was there is replaced.
        observations: see [`~earthformer_hf.plotting.plot_forecast`]; the last six come before the forecast.
        frames_per_second: of the moving picture.

    Raises:
        ValueError: see [`check_animation`] and [`~earthformer_hf.plotting.plot_forecast`]; a disk that is full.
    """
    path = check_animation(path)
    check_forecast(dataset)
    pages = Pages(dataset, observations)
    frames = _frames(pages)
    sheet = Sheet(pages.title(), pages.name, pages.units, colors, [("", list(frames[-1]))])
    sheet.area = pages.area()
    sheet.coasts = coastlines(dataset, sheet.area.extent, sheet.area.unit)
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(part, _pictures(sheet, frames), frames_per_second)
        os.replace(part, path)
    except OSError as reason:
        raise ValueError(f"`path`: {path} cannot be written: {reason.strerror or reason}.") from reason
    finally:
        part.unlink(missing_ok=True)


def _frames(pages: Pages) -> list[list[Panel]]:
    """The panels of each frame: those that were observed have no chances."""
    maps = {label: read for label, read in forecasts(pages.dataset, 1).items() if label in SHOWN}
    frames = []
    for observed in pages.context(CONTEXT, []) if maps else []:
        if observed is not None:
            frames.append([Panel(f"observed\n{observed.title}", observed.values) for _ in maps])
    for place, lead in enumerate(pages.times.leads):
        title = pages.times.title(lead)
        shown = [
            Panel(f"{label}\n{title}", read_map(read(place)), flag=pages.flag(place)) for label, read in maps.items()
        ]
        if len(pages.thresholds):
            label, panels = pages.chances(0, [place])
            chance = panels[0]
            assert chance is not None
            shown.append(Panel(f"{label}\n{title}", chance.values, True, chance.flag))
        frames.append(shown)
    return frames


def _pictures(sheet: Sheet, frames: Sequence[Sequence[Panel]]) -> Iterator[np.ndarray]:
    """Each frame as (H, W, 3) bytes of even sizes, drawn by repainting the maps of the last."""
    figure, painters = draw_sheet(sheet)
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # all frames have the layout of the last
    for panels in frames:
        for place, (axis, paint) in enumerate(painters.items()):
            axis.set_visible(place < len(panels))
            if place < len(panels):
                paint(panels[place])
        figure.canvas.draw()
        picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        yield picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2].copy()


def _write_gif(path: Path, pictures: Iterator[np.ndarray], frames_per_second: float) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(picture) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=1000 / frames_per_second, loop=0)


def _write_mp4(path: Path, pictures: Iterator[np.ndarray], frames_per_second: float) -> None:
    first = next(pictures)
    size = f"{first.shape[1]}x{first.shape[0]}"
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{frames_per_second:g}", "-i", "-"]
    command = ["ffmpeg", "-y", "-loglevel", "error", *given, "-pix_fmt", "yuv420p", str(path)]
    content = b"".join(picture.tobytes() for picture in itertools.chain([first], pictures))
    done = subprocess.run(command, input=content, capture_output=True)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip().split("\n")[-1])


__all__ = ["ENDINGS", "animate_forecast", "check_animation"]
