"""Figures of forecasts. Functions of arrays that return a figure: they never save and never show."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# SEVIR-like steps of rain rate in mm/h, and their colours.
RAIN_LEVELS = [0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 35, 60, 100]
RAIN_COLORS = [
    "#d6e6f4", "#abd0e6", "#6aaed6", "#3787c0", "#1f9e4a", "#8fd14f", "#f7e225", "#feb72d", "#f2733d", "#c8312a",
]  # fmt: skip


def _figure(*args, **kwargs):
    """A figure that needs no display, with its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(*args, **kwargs)
    FigureCanvasAgg(figure)
    return figure


def plot_sequence(
    rows: dict[str, np.ndarray], leads: Sequence[str], title: str, chances: dict[str, np.ndarray] | None = None
) -> "Figure":
    """Maps of rain, one row per entry, one column per time.

    Args:
        rows: label -> rain rate in mm/h (columns, H, W); NaN is drawn grey, a frame of only NaN is left blank.
        leads: a label for each column, such as "+10 min".
        title: says what is drawn, and whether it is real.
        chances: further rows below, label -> probabilities 0..1 (columns, H, W), with NaN as above.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap

    chances = chances or {}
    colors = ListedColormap(RAIN_COLORS).with_extremes(under="white", over="#7a0177", bad="0.8")
    rain_style = {"cmap": colors, "norm": BoundaryNorm(RAIN_LEVELS, len(RAIN_COLORS))}
    chance_style = {"cmap": "Purples", "vmin": 0, "vmax": 100}
    lines = [(label, frames, rain_style) for label, frames in rows.items()]
    lines += [(label, 100 * frames, chance_style) for label, frames in chances.items()]
    figure = _figure(figsize=(1.9 * len(leads) + 1.2, 1.95 * len(lines) + 0.9), layout="constrained")
    axes = figure.subplots(len(lines), len(leads), squeeze=False)
    for line, (label, frames, style) in zip(axes, lines):
        line[0].set_ylabel(label, fontsize=10)
        for axis, frame in zip(line, frames):
            axis.set_xticks([])
            axis.set_yticks([])
            if np.isnan(frame).all():
                for side in axis.spines.values():
                    side.set_visible(False)
            else:
                axis.imshow(frame, **style, interpolation="nearest")
    for axis, lead in zip(axes[0], leads):
        axis.set_title(lead, fontsize=10)
    parts = (
        ("rain rate, mm/h", axes[: len(rows)], RAIN_LEVELS, "max"),
        ("chance, %", axes[len(rows) :], [0, 20, 40, 60, 80, 100], "neither"),
    )
    for label, part, ticks, extend in parts:
        images = [image for axis in part.flat for image in axis.images]
        if images:
            bar = figure.colorbar(images[0], ax=part, shrink=0.8, pad=0.01, extend=extend, ticks=ticks)
            bar.ax.set_yticklabels([f"{level:g}" for level in ticks], fontsize=8)
            bar.set_label(label, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_frames(rows: dict[str, np.ndarray], columns: Sequence[str], title: str, label: str) -> "Figure":
    """Maps of any quantity on one scale of colours, one row per entry, one column per time.

    Args:
        rows: label -> values (columns, H, W); NaN is left blank.
        columns: a label for each column.
        title: says what is drawn.
        label: the quantity and its unit.
    """
    figure = _figure(figsize=(1.9 * len(columns) + 1.2, 1.95 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    everything = np.stack([*rows.values()])
    scale = {"vmin": np.nanmin(everything), "vmax": np.nanmax(everything), "interpolation": "nearest"}
    for line, (name, frames) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=10)
        for axis, frame in zip(line, frames):
            axis.set_xticks([])
            axis.set_yticks([])
            image = axis.imshow(frame, **scale)
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01).set_label(label, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_ocean(
    skill: dict[str, np.ndarray],
    months: np.ndarray,
    index: np.ndarray,
    plumes: list[tuple[np.ndarray, np.ndarray]],
    maps: dict[str, np.ndarray],
    lat: np.ndarray,
    lon: np.ndarray,
    title: str,
) -> "Figure":
    """Skill by lead, a plume of forecasts through one event, and maps of the ocean.

    Args:
        skill: label -> correlation per lead (leads,); the first is drawn boldest.
        months, index: (T,) datetime64 months and the observed index in degrees Celsius.
        plumes: (months, index) of each forecast.
        maps: label -> anomalies in degrees Celsius (H, W), NaN on land.
        lat, lon: coordinates of the maps, in degrees.
        title: says what is drawn, and whether it is real.
    """
    figure = _figure(figsize=(13, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 2 * len(maps), height_ratios=[1.25, 1])
    axis = figure.add_subplot(grid[0, : len(maps)])
    for number, (label, values) in enumerate(skill.items()):
        axis.plot(np.arange(1, len(values) + 1), values, marker="o", markersize=3, label=label, lw=2.6 - 0.4 * number)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(
        xlabel="lead, months (start of the three-month mean)", ylabel="correlation", title="Nino3.4 skill by lead"
    )
    axis.legend(fontsize=8)

    axis = figure.add_subplot(grid[0, len(maps) :])
    for number, (plume_months, values) in enumerate(plumes):
        color = f"C{number % 10}"
        axis.plot(plume_months, values, color=color, lw=1.3, alpha=0.9)
        axis.plot(plume_months[:1], values[:1], color=color, marker="o", markersize=4)
    axis.plot(months, index, color="black", lw=2.4, label="observed")
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(ylabel="Nino3.4 anomaly, degC", title="forecasts through one event (a dot marks the first month)")
    axis.legend(fontsize=8)
    axis.tick_params(axis="x", labelrotation=30)

    highest = max(float(np.nanmax(np.abs(values))) for values in maps.values())
    axes, mesh = [], None
    for number, (label, values) in enumerate(maps.items()):
        axis = figure.add_subplot(grid[1, 2 * number : 2 * number + 2])
        mesh = axis.pcolormesh(lon, lat, values, cmap="RdBu_r", vmin=-highest, vmax=highest, shading="nearest")
        axis.set_facecolor("0.85")
        axis.set(title=label, xlabel="longitude")
        axis.add_patch(_nino34_box())
        axes.append(axis)
    axes[0].set_ylabel("latitude")
    if mesh is not None:
        figure.colorbar(mesh, ax=axes, label="degC", shrink=0.9, pad=0.01)
    figure.suptitle(title, fontsize=11)
    return figure


def _nino34_box():
    from matplotlib.patches import Rectangle

    return Rectangle((190, -5), 50, 10, fill=False, color="black", lw=1.2)
