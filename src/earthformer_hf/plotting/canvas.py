"""What all figures share: a figure without a display, colours, titles and legends."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Steps of rain rate in mm/h, and their colours.
RAIN_LEVELS = [0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 35, 60, 100]
RAIN_COLORS = [
    "#d6e6f4", "#abd0e6", "#6aaed6", "#3787c0", "#1f9e4a", "#8fd14f", "#f7e225", "#feb72d", "#f2733d", "#c8312a",
]  # fmt: skip
BEYOND = "#7a0177"  # above the highest step
CHANCE_LEVELS = [5, 20, 40, 60, 80, 100]  # in percent
ANOMALY_LEVELS = [-3, -2, -1, -0.5, -0.2, 0.2, 0.5, 1, 2, 3]  # of temperature, in degrees Celsius
COLORS = ("rain", "colour-blind")  # those of rain, and viridis, which the colour-blind read as others do
BAR_INCHES = 4.0
MISSING: dict[str, Any] = {"facecolor": "0.86", "edgecolor": "0.62", "hatch": "////"}
MISSING_WITHOUT_HATCH = "0.8"


def new_figure(width: float, height: float) -> "Figure":
    """A figure in inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def add_title(figure: "Figure", text: str) -> None:
    """A title in lines that the figure's width holds."""
    figure.suptitle(wrapped(text, figure.get_figwidth(), 11), fontsize=11)


def wrapped(text: str, inches: float, size: float) -> str:
    """A text in lines of so many inches, of a font of `size` points whose letters are 0.55 of that wide."""
    width = max(12, int(72 * inches / (0.55 * size)))
    lines: list[str] = []
    for line in text.split("\n"):
        for part in textwrap.wrap(line, width, break_long_words=False):
            lines.append("")
            for piece in [part] if len(part) <= width else re.findall(r"[^_:]*[_:]|[^_:]+", part):  # names of files
                if lines[-1] and len(lines[-1] + piece) > width:
                    lines.append("")
                lines[-1] += piece
    return "\n".join(lines)


def time_labels(times: np.ndarray) -> list[str]:
    """Dates (T,) datetime64 to the month, day, minute or second, as all of them need."""
    units = (unit for unit in "MDm" if (times.astype(f"datetime64[{unit}]") == times).all())
    return [str(time).replace("T", " ") for time in times.astype(f"datetime64[{next(units, 's')}]")]


def quantity_label(variable: str, units: str) -> str:
    """What values are, with their units if they have any."""
    return variable if units == "1" else f"{variable}, {units}"


def within_coverage(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Several (T, H, W), if of one size, without the rows and columns at their edges where none holds a value."""
    known = np.ones(1)
    if len({frames.shape[1:] for frames in maps}) == 1:
        known = np.any([np.isfinite(frames).any(axis=0) for frames in maps], axis=0)
    if known.all() or not known.any():
        return list(maps)
    tall, wide = (np.flatnonzero(known.any(axis)) for axis in (1, 0))
    return [frames[:, tall[0] : tall[-1] + 1, wide[0] : wide[-1] + 1] for frames in maps]


def columns_of(panels: int) -> int:
    """Columns of a grid of panels that is about as wide as it is high, and leaves the fewest places empty."""
    near = math.ceil(math.sqrt(panels))
    return min(near, near + 1, key=lambda columns: -panels % columns)


def system_colors(names: Sequence[str]) -> dict[str, str]:
    """Name of a system -> its colour, by its place; of observations, black."""
    systems = [name for name in dict.fromkeys(names) if name != "observed"]
    return {"observed": "black"} | {name: f"C{place % 10}" for place, name in enumerate(systems)}


def add_legend_and_title(figure: "Figure", axes: np.ndarray, panels: int, title: str) -> "Figure":
    """One legend below, no empty panels, and the title."""
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    known = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    columns = math.ceil(len(known) / math.ceil(len(known) / 5))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    add_title(figure, title)
    return figure


def map_style(values: Sequence[np.ndarray], units: str, colors: str = "rain", hatched: bool = False) -> dict[str, Any]:
    """Arguments of `imshow`: the colours of rain rates, of values of both signs (white is about 0), or of others.

    Args:
        values: all that are drawn, which set the range of what is not rain.
        units: of the values, rain rates in "mm/h".
        colors: of rain rates, see `COLORS`.
        hatched: leave what is missing to the background.

    Raises:
        ValueError: other `colors`.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if colors not in COLORS:
        raise ValueError(f"`colors` must be one of {COLORS}, got {colors!r}.")
    bad = (0, 0, 0, 0) if hatched else MISSING_WITHOUT_HATCH
    if units == "mm/h":
        steps = len(RAIN_COLORS)
        chosen, beyond = RAIN_COLORS, BEYOND
        if colors == "colour-blind":
            chosen, beyond = colormaps["viridis_r"](np.linspace(0, 0.95, steps)).tolist(), "black"
        return {
            "cmap": ListedColormap(chosen).with_extremes(under="white", over=beyond, bad=bad),
            "norm": BoundaryNorm(RAIN_LEVELS, steps),
        }
    seen = np.concatenate([each[np.isfinite(each)] for each in values]) if len(values) else np.empty(0)
    lowest, highest = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    if units == "degC" and lowest < 0:
        signed = colormaps["RdBu_r"].resampled(len(ANOMALY_LEVELS) + 1).with_extremes(bad=bad)
        return {"cmap": signed, "norm": BoundaryNorm(ANOMALY_LEVELS, signed.N, extend="both")}
    name, bottom = ("RdBu_r", -max(-lowest, highest)) if lowest < 0 else ("viridis", 0.0)
    return {"cmap": colormaps[name].with_extremes(bad=bad), "vmin": bottom, "vmax": max(-lowest, highest) or 1.0}


def chance_style(hatched: bool = False) -> dict[str, Any]:
    """Arguments of `imshow`, of chances in percent; white is less than the lowest of `CHANCE_LEVELS`."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    bad = (0, 0, 0, 0) if hatched else MISSING_WITHOUT_HATCH
    steps = len(CHANCE_LEVELS) - 1
    colors = ListedColormap(colormaps["Purples"](np.linspace(0.3, 1, steps))).with_extremes(under="white", bad=bad)
    return {"cmap": colors, "norm": BoundaryNorm(CHANCE_LEVELS, steps)}


def add_color_bar(
    figure: "Figure",
    maps: Iterable[Any],
    beside: Iterable[Any],
    label: str,
    levels: Sequence[float] | None = None,
) -> None:
    """A colour bar of maps, if any was drawn.

    Args:
        maps: that hold an image, or none.
        beside: to the right of which it stands.
        label: with units.
        levels: that are named.
    """
    images = [image for axis in maps for image in axis.images]
    if not images:
        return
    boxes = [axis.get_subplotspec().get_position(figure) for axis in beside]
    inches = figure.get_figheight() * (max(box.y1 for box in boxes) - min(box.y0 for box in boxes))
    shrink = min(0.9, BAR_INCHES / inches)
    options: dict[str, Any] = {"extend": "max"} if levels is RAIN_LEVELS else {}
    bar = figure.colorbar(images[0], ax=list(beside), shrink=shrink, pad=0.01, ticks=levels, **options)
    if levels:
        bar.ax.set_yticklabels([f"{level:g}" for level in levels])
    bar.ax.tick_params(labelsize=8)
    bar.set_label(wrapped(label, shrink * inches, 9), fontsize=9)


def color_of(colors: Mapping[str, str] | None, panels: Mapping[str, Mapping[str, Any]]) -> Mapping[str, str]:
    """The colours of the systems of all panels, those that are given first."""
    return system_colors([name for panel in panels.values() for name in panel]) | dict(colors or {})


__all__ = [
    "ANOMALY_LEVELS",
    "BEYOND",
    "CHANCE_LEVELS",
    "COLORS",
    "MISSING",
    "RAIN_COLORS",
    "RAIN_LEVELS",
    "add_color_bar",
    "add_legend_and_title",
    "add_title",
    "chance_style",
    "color_of",
    "columns_of",
    "map_style",
    "new_figure",
    "quantity_label",
    "system_colors",
    "time_labels",
    "within_coverage",
    "wrapped",
]
