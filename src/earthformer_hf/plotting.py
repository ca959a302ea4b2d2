"""Figures of forecasts. Functions of arrays that return a figure: they never save and never show."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
    rows: dict[str, np.ndarray],
    leads: Sequence[str],
    title: str,
    chances: dict[str, np.ndarray] | None = None,
    units: str = "mm/h",
) -> "Figure":
    """Maps of rain or of another quantity, one row per entry, one column per time.

    Args:
        rows: label -> values (columns, H, W); NaN is drawn grey, a frame of only NaN is left blank.
        leads: a label for each column, such as "+10 min".
        title: says what is drawn, and whether it is real.
        chances: further rows below, label -> probabilities 0..1 (columns, H, W), with NaN as above.
        units: of the values: rain rates in "mm/h" have their own colours, all else one scale from lowest to highest.
    """
    chances = chances or {}
    style = _map_style(np.stack(list(rows.values())), units)
    chance_style = {"cmap": "Purples", "vmin": 0, "vmax": 100}
    lines = [(label, frames, style) for label, frames in rows.items()]
    lines += [(label, 100 * frames, chance_style) for label, frames in chances.items()]
    height, width = next(iter(rows.values())).shape[1:]
    size = 1.9 * len(leads) + 1.2, max(1.1, 1.95 * height / width) * len(lines) + 0.9
    figure = _figure(figsize=size, layout="constrained")
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
    rain = units == "mm/h"
    _add_color_bar(figure, axes[: len(rows)], "rain rate, mm/h" if rain else units, RAIN_LEVELS if rain else None)
    _add_color_bar(figure, axes[len(rows) :], "chance, %", [0, 20, 40, 60, 80, 100])
    figure.suptitle(title, fontsize=11)
    return figure


def sequence_row(future: np.ndarray, context: np.ndarray | None = None, columns: int = 3) -> np.ndarray:
    """A row of [`plot_sequence`]: frames of the context (columns, H, W), or blanks in their place, then the future."""
    blank = np.full((columns, *future.shape[1:]), np.nan)
    return np.concatenate([blank if context is None else context, future])


def _map_style(values: np.ndarray, units: str) -> dict[str, Any]:
    """Arguments of `imshow`: the colours of rain rates, of values of both signs (white is 0), or of others."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if units == "mm/h":
        colors = ListedColormap(RAIN_COLORS).with_extremes(under="white", over="#7a0177", bad="0.8")
        return {"cmap": colors, "norm": BoundaryNorm(RAIN_LEVELS, len(RAIN_COLORS))}
    lowest, highest = float(np.nanmin(values)), float(np.nanmax(values))
    name, bottom = ("RdBu_r", -max(-lowest, highest)) if lowest < 0 else ("viridis", 0)
    return {"cmap": colormaps[name].with_extremes(bad="0.8"), "vmin": bottom, "vmax": max(-lowest, highest)}


def _add_color_bar(figure: "Figure", axes: np.ndarray, label: str, ticks: list | None):
    """A colour bar beside maps, if any was drawn."""
    images = [image for axis in axes.flat for image in axis.images]
    if not images:
        return
    extend = "max" if ticks is RAIN_LEVELS else "neither"
    bar = figure.colorbar(images[0], ax=axes, shrink=0.8, pad=0.01, extend=extend, ticks=ticks)
    if ticks:
        bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)


def plot_events(rows: dict[str, np.ndarray], times: dict[str, Sequence[str]], label: str, title: str) -> "Figure":
    """A contact sheet: one row of maps per event.

    Args:
        rows: id -> values (columns, H, W) in stored units; NaN is drawn grey.
        times: id -> a label for each column.
        label: what the values are, with units.
        title: says what is drawn.
    """
    from matplotlib import colormaps

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
    size = (1.9 * columns + 1.2, (1.9 * height / width + 0.35) * len(rows) + 0.6)
    figure = _figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    image = None
    for line, (name, frames) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=7)
        for axis, frame, time in zip(line, frames, times[name]):
            image = axis.imshow(frame, **style, interpolation="nearest")
            axis.set_title(time, fontsize=7, pad=2)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    bar = figure.colorbar(image, ax=axes, shrink=min(1, 3 / len(rows)), pad=0.01, extend="both")
    bar.set_label(label, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_by_lead(curves: dict[str, dict[str, np.ndarray]], leads: np.ndarray, unit: str, title: str) -> "Figure":
    """Scores by lead time, a panel each.

    Args:
        curves: name of a score -> label -> its values (leads or fewer,); NaN, where undefined, is left out.
        leads, unit: lead times.
    """
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = _figure(figsize=(3.6 * columns, 2.8 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    labels = list(dict.fromkeys(label for panel in curves.values() for label in panel))  # one colour in all panels
    for axis, (name, panel) in zip(axes.flat, curves.items()):
        for label, values in panel.items():
            color = f"C{labels.index(label) % 10}"
            axis.plot(leads[: len(values)], values, marker="o", markersize=3, label=label, color=color)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"lead time, {unit}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    return _add_legend_and_title(figure, axes, len(curves), title)


def _add_legend_and_title(figure: "Figure", axes: np.ndarray, panels: int, title: str) -> "Figure":
    """One legend below, no empty panels, and the title."""
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    known = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=min(5, len(known)), fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_spectrum(wavelength: np.ndarray, panels: dict[str, dict[str, np.ndarray]], title: str) -> "Figure":
    """Radially averaged power spectra, a panel for each lead time; large scales on the left.

    Args:
        wavelength: (K - 1,) in pixels, of wave numbers 1 .. K - 1.
        panels: title -> label -> power (K,), of wave numbers 0 .. K - 1; "observed" is drawn black.
    """
    figure = _figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        for label, power in panel.items():
            axis.loglog(wavelength, power[1:], label=label, **({"color": "k", "lw": 2} if label == "observed" else {}))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("wavelength, pixels", fontsize=9)
        axis.grid(alpha=0.3, which="both")
        axis.invert_xaxis()
    axes[0, 0].set_ylabel("power", fontsize=9)
    return _add_legend_and_title(figure, axes, len(panels), title)


def plot_reliability(panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], title: str) -> "Figure":
    """How often it happened, over the chance that was forecast; on the diagonal if the chances are right.

    Args:
        panels: event in words -> label -> observed frequency (E + 1,) after chances 0, 1 / E .. 1, NaN where none was
            forecast; and the number of forecasts (E + 1,), drawn as the size of the dots, on a logarithmic scale.
    """
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(figsize=(3.6 * columns, 3.5 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1)
        for label, (frequency, forecasts) in panel.items():
            chance = np.linspace(0, 1, len(frequency))
            (line,) = axis.plot(chance, frequency, label=label)
            axis.scatter(chance, frequency, s=8 * np.log10(1 + forecasts), color=line.get_color())
        axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("forecast chance", fontsize=9)
        axis.set_ylabel("observed frequency", fontsize=9)
        axis.tick_params(labelsize=8)
    return _add_legend_and_title(figure, axes, len(panels), title)


def plot_rank_histogram(panels: dict[str, dict[str, np.ndarray]], title: str) -> "Figure":
    """How often the observation had each rank among the members; flat, at 1, if it could be one of them.

    Args:
        panels: pixels in words -> label -> counts (E + 1,).
    """
    figure = _figure(figsize=(5 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        for place, (label, counts) in enumerate(panel.items()):
            ranks = np.arange(len(counts)) + 0.8 * ((place + 0.5) / len(panel) - 0.5)
            axis.bar(ranks, counts * len(counts) / max(1, counts.sum()), 0.8 / len(panel), label=label)
        axis.axhline(1, color="0.3", lw=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("members below the observation", fontsize=9)
    axes[0, 0].set_ylabel("frequency, over that of a flat histogram", fontsize=9)
    return _add_legend_and_title(figure, axes, len(panels), title)


def plot_ocean(
    skill: dict[str, np.ndarray],
    observed: tuple[np.ndarray, np.ndarray],
    forecast: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    maps: dict[str, np.ndarray],
    geo: dict,
    title: str,
) -> "Figure":
    """Skill by lead, the index of the coming months as a plume, and maps of the ocean.

    Args:
        skill: label -> correlation per lead (leads,); the first is drawn boldest. Empty where there is none.
        observed: (T,) datetime64 months in the middle of three, and the observed index in degrees Celsius.
        forecast: (leads,) such months, the forecast index, and half the width of its range or None.
        maps: label -> anomalies in degrees Celsius (H, W), NaN where there are none.
        geo: `lat` and `lon` of the maps, in degrees.
        title: says what is drawn, and whether it is real.
    """
    figure = _figure(figsize=(13, 6.6), layout="constrained")
    columns = len(maps)
    grid = figure.add_gridspec(2, 2 * columns, height_ratios=[1.25, 1])
    if skill:
        axis = figure.add_subplot(grid[0, :columns])
        for place, (label, values) in enumerate(skill.items()):
            leads = np.arange(1, len(values) + 1)
            axis.plot(leads, values, marker="o", markersize=3, label=label, lw=2.6 - 0.4 * place)
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set(xlabel="lead, months (start of the three-month mean)", ylabel="correlation")
        axis.set_title("Nino3.4 skill of the hindcasts, by lead")
        axis.legend(fontsize=8)

    _draw_plume(figure.add_subplot(grid[0, columns:] if skill else grid[0, :]), observed, forecast)

    highest = max(float(np.nanmax(np.abs(values))) for values in maps.values())
    axes, mesh = [], None
    for place, (label, values) in enumerate(maps.items()):
        axis = figure.add_subplot(grid[1, 2 * place : 2 * place + 2])
        colours = {"cmap": "RdBu_r", "vmin": -highest, "vmax": highest}
        mesh = axis.pcolormesh(geo["lon"], geo["lat"], values, shading="nearest", **colours)
        axis.set_facecolor("0.85")
        axis.set(title=label, xlabel="longitude")
        axis.add_patch(_nino34_box())
        axes.append(axis)
    axes[0].set_ylabel("latitude")
    if mesh is not None:
        figure.colorbar(mesh, ax=axes, label="degC", shrink=0.9, pad=0.01)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_plume(axis: Any, observed: tuple, forecast: tuple):
    """The index that was observed and, from its last month on, the forecast; arguments as of [`plot_ocean`]."""
    months, index, half_width = forecast
    from_last = np.append(observed[0][-1], months), np.append(observed[1][-1], index)
    if half_width is not None:
        width = np.append(0, half_width)
        ends, label = (from_last[1] - width, from_last[1] + width), "90 %, by the errors of the hindcasts"
        axis.fill_between(from_last[0], *ends, color="C0", alpha=0.25, label=label)
    axis.plot(*from_last, color="C0", lw=1, ls=":")
    axis.plot(months, index, color="C0", marker="o", markersize=4, lw=2, label="forecast")
    axis.plot(*observed, color="black", lw=2.4, label="observed")
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(
        ylabel="Nino3.4, three-month means, degC", title=f"the coming months, {months[0] - 1} to {months[-1] + 1}"
    )
    axis.legend(fontsize=8)
    axis.tick_params(axis="x", labelrotation=30)


def _nino34_box():
    from matplotlib.patches import Rectangle

    return Rectangle((190, -5), 50, 10, fill=False, color="black", lw=1.2)


__all__ = [
    "plot_by_lead",
    "plot_events",
    "plot_ocean",
    "plot_rank_histogram",
    "plot_reliability",
    "plot_sequence",
    "plot_spectrum",
    "sequence_row",
]
