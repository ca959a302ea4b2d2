"""Maps of arrays: sequences in rows, and contact sheets of events."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    CHANCE_LEVELS,
    RAIN_LEVELS,
    add_color_bar,
    add_title,
    chance_style,
    map_style,
    new_figure,
    within_coverage,
    wrapped,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_sequence(
    rows: dict[str, np.ndarray],
    leads: Sequence[str],
    title: str,
    chances: dict[str, np.ndarray] | None = None,
    units: str = "mm/h",
    differences: dict[str, np.ndarray] | None = None,
    grid_spacing: str = "unknown",
) -> "Figure":
    """Maps of rain or of another quantity, one row per entry, one column per time.

    Where only the first row has the first columns, those of the context, they are drawn as a line of their own above.

    Args:
        rows: label -> values (columns, H, W); NaN is drawn grey, a frame of only NaN is left blank. Edges where no
            frame of any row holds a value are cut off.
        leads: a label for each column, such as "+10 min".
        title: says what is drawn, and whether it is real.
        chances: further rows below, label -> probabilities 0..1 (columns, H, W), with NaN as above.
        units: of the values: rain rates in "mm/h" have their own colours, all else one scale from lowest to highest.
        differences: the last rows, label -> differences of values (columns, H, W), blue where there is more.
        grid_spacing: in km, such as "3 km", for a scale bar in the first map; none is drawn if it is another.
    """
    chances, differences = chances or {}, differences or {}
    style = map_style(list(rows.values()), units)
    lines = [(label, frames, style) for label, frames in rows.items()]
    lines += [(label, 100 * frames, chance_style()) for label, frames in chances.items()]
    lines += [(label, frames, _difference_style(differences)) for label, frames in differences.items()]
    covered = within_coverage([frames for _, frames, _ in lines])
    lines = [(label, frames, style) for (label, _, style), frames in zip(lines, covered)]
    given = _only_in_first(covered)
    if given:
        label, whole, style = lines[0]
        later = len(whole) - given
        before = whole[max(0, given - later) : given]
        before = np.concatenate([before, np.full_like(whole, np.nan)])[:later]
        lines = [(label, frames[given:], style) for label, frames, style in lines]
        lines.insert(0, (f"{label} before", before, style))
    height, width = covered[0].shape[1:]
    row_height = max(1.1, 1.95 * height / width)
    columns = len(leads) - given
    figure = new_figure(1.9 * columns + 1.2, row_height * len(lines) + 0.9)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for line, (label, frames, style) in zip(axes, lines):
        first_drawn = int(np.argmin([np.isnan(frame).all() for frame in frames]))
        line[first_drawn].set_ylabel(wrapped(label, row_height, 10), fontsize=10)
        for axis, frame in zip(line, frames):
            axis.set_xticks([])
            axis.set_yticks([])
            if np.isnan(frame).all():
                for side in axis.spines.values():
                    side.set_visible(False)
            else:
                axis.imshow(frame, **style, interpolation="nearest")
    for line, labels in ((axes[0], leads[:given][-columns:]), (axes[1 if given else 0], leads[given:])):
        for axis, lead in zip(line, labels):
            axis.set_title(lead, fontsize=10)
    if grid_spacing.endswith(" km"):
        _add_scale_bar(axes[0, 0], width, float(grid_spacing.removesuffix(" km")))
    rain = units == "mm/h"
    label, levels = ("rain rate, mm/h", RAIN_LEVELS) if rain else (units, None)
    second = len(lines) - len(differences)
    first = second - len(chances)
    kinds = (axes[:first], label, levels), (axes[first:second], "chance, %", CHANCE_LEVELS)
    for some, text, steps in (*kinds, (axes[second:], f"difference, {units}", None)):
        add_color_bar(figure, some.ravel(), some.ravel(), text, steps)
    add_title(figure, title)
    return figure


def _only_in_first(lines: Sequence[np.ndarray]) -> int:
    """How many of the first columns hold frames in the first line alone, of two or more; 0 if all do."""
    found = [int(np.argmin([np.isnan(frame).all() for frame in frames])) for frames in lines]
    return min(found[1:]) if len(found) > 1 and found[0] == 0 else 0


def lead_labels(minutes: Sequence[int], made: np.datetime64 | None = None) -> list[str]:
    """Labels of columns for [`plot_sequence`]: lead times, and valid times in UTC if `made` is that of lead 0."""
    leads = [f"{lead:+d} min" for lead in minutes]
    if made is None or np.isnat(made):
        return leads
    valid = [(made + np.timedelta64(int(lead), "m")).astype("datetime64[m]").item() for lead in minutes]
    return [f"{lead}, {time:%H:%M} UTC" for lead, time in zip(leads, valid)]


def _add_scale_bar(axis: Any, width: int, kilometres: float):
    """The longest round length within 2/5 of a map of so many pixels, each so many kilometres wide."""
    longest = 0.4 * width * kilometres
    power = 10.0 ** np.floor(np.log10(longest))
    length = max(part * power for part in (1, 2, 5) if part * power <= longest)
    axis.plot([0.04, 0.04 + length / kilometres / width], [0.05, 0.05], "k", linewidth=2.5, transform=axis.transAxes)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    axis.text(0.04, 0.08, f"{length:g} km", fontsize=8, transform=axis.transAxes, bbox=box)


def _difference_style(differences: dict[str, np.ndarray]) -> dict[str, Any]:
    """One scale around 0, which leaves the largest hundredth beyond it."""
    from matplotlib import colormaps

    values = np.abs(np.concatenate([frames.ravel() for frames in differences.values()]))
    values = values[values > 0]  # NaN is not
    highest = float(np.percentile(values, 99)) if len(values) else 1.0
    return {"vmin": -highest, "vmax": highest, "cmap": colormaps["RdBu"].with_extremes(bad="0.8")}


def sequence_row(future: np.ndarray, context: np.ndarray | None = None, columns: int = 3) -> np.ndarray:
    """A row of [`plot_sequence`]: frames of the context (columns, H, W), or blanks in their place, then the future."""
    blank = np.full((columns, *future.shape[1:]), np.nan)
    return np.concatenate([blank if context is None else context, future])


def plot_events(rows: dict[str, np.ndarray], times: dict[str, Sequence[str]], label: str, title: str) -> "Figure":
    """A contact sheet: one row of maps per event.

    Args:
        rows: id -> values (columns, H, W) in stored units; NaN is drawn grey. Edges where no frame holds a value are
            cut off.
        times: id -> a label for each column.
        label: what the values are, with units.
        title: says what is drawn.
    """
    from matplotlib import colormaps

    rows = dict(zip(rows, within_coverage(list(rows.values()))))
    values = np.concatenate([frames.ravel() for frames in rows.values()])
    values = values[np.isfinite(values)]
    lowest, highest = np.percentile(values, [0.5, 99.5]) if len(values) else (0, 1)
    if lowest < 0 < highest:  # anomalies
        highest = max(-lowest, highest)
        lowest, colors = -highest, "RdBu_r"
    else:
        colors = "viridis"
    style = {"vmin": lowest, "vmax": highest, "cmap": colormaps[colors].with_extremes(bad="0.8")}
    columns = max(len(frames) for frames in rows.values())
    height, width = next(iter(rows.values())).shape[1:]
    row_height = 1.9 * height / width + 0.35
    figure = new_figure(1.9 * columns + 1.2, row_height * len(rows) + 0.6)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    image: Any = None
    for line, (name, frames) in zip(axes, rows.items()):
        line[0].set_ylabel(wrapped(name, row_height, 7), fontsize=7)
        for axis, frame, time in zip(line, frames, times[name]):
            image = axis.imshow(frame, **style, interpolation="nearest")
            axis.set_title(time, fontsize=7, pad=2)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    bar = figure.colorbar(image, ax=axes, shrink=min(1, 3 / len(rows)), pad=0.01, extend="both")
    bar.set_label(wrapped(label, min(row_height * len(rows), 3), 8), fontsize=8)
    add_title(figure, title)
    return figure


__all__ = ["lead_labels", "plot_events", "plot_sequence", "sequence_row"]
