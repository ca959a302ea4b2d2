"""Scores: by lead time, spectra, reliability, ranks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .canvas import add_legend_and_title, color_of, columns_of, new_figure, wrapped


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_by_lead(
    curves: dict[str, dict[str, np.ndarray]],
    leads: np.ndarray,
    unit: str,
    title: str,
    colors: Mapping[str, str] | None = None,
) -> "Figure":
    """Scores by lead time, a panel each.

    Args:
        curves: name of a score -> label -> its values (leads or fewer,); NaN, where undefined, is left out.
        leads, unit: lead times.
        colors: of systems; by their order if omitted. The same systems in several figures want the same ones.
    """
    colors = color_of(colors, curves)
    columns = columns_of(len(curves))
    lines = -(-len(curves) // columns)
    figure = new_figure(3.6 * columns, 2.8 * lines + 0.8)
    axes = figure.subplots(lines, columns, squeeze=False)
    shared = [values for name, panel in curves.items() if name.startswith("CSI") for values in panel.values()]
    highest = max((float(np.nanmax(values)) for values in shared if np.isfinite(values).any()), default=0.0)
    for axis, (name, panel) in zip(axes.flat, curves.items()):
        for label, values in panel.items():
            axis.plot(leads[: len(values)], values, marker="o", markersize=3, label=label, color=colors[label])
        if name.startswith("CSI"):
            axis.set_ylim(0, 1.05 * highest or 1)
        axis.set_title(wrapped(name, 3.3, 10), fontsize=10)
        axis.set_xlabel(f"lead time, {unit}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    return add_legend_and_title(figure, axes, len(curves), title)


def plot_spectrum(
    wavelength: np.ndarray,
    panels: dict[str, dict[str, np.ndarray]],
    title: str,
    colors: Mapping[str, str] | None = None,
) -> "Figure":
    """Radially averaged power spectra, a panel for each lead time; large scales on the left.

    Args:
        wavelength: (K - 1,) in pixels, of wave numbers 1 .. K - 1.
        panels: title -> label -> power (K,), of wave numbers 0 .. K - 1; "observed" is drawn black.
        colors: see [`plot_by_lead`].
    """
    colors = color_of(colors, panels)
    figure = new_figure(4.6 * len(panels), 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        for label, power in panel.items():
            axis.loglog(wavelength, power[1:], label=label, color=colors[label], lw=2 if label == "observed" else 1.5)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("wavelength, pixels", fontsize=9)
        axis.grid(alpha=0.3, which="both")
        axis.invert_xaxis()
    axes[0, 0].set_ylabel("power", fontsize=9)
    return add_legend_and_title(figure, axes, len(panels), title)


def plot_reliability(
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], title: str, colors: Mapping[str, str] | None = None
) -> "Figure":
    """How often it happened, over the chance that was forecast; on the diagonal if the chances are right.

    Args:
        panels: event in words -> label -> observed frequency (E + 1,) after chances 0, 1 / E .. 1, NaN where none was
            forecast; and the number of forecasts (E + 1,), drawn as the size of the dots, on a logarithmic scale.
        colors: see [`plot_by_lead`].
    """
    colors = color_of(colors, panels)
    columns = columns_of(len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(3.6 * columns, 3.5 * lines + 0.7)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1)
        for label, (frequency, forecasts) in panel.items():
            chance = np.linspace(0, 1, len(frequency))
            axis.plot(chance, frequency, label=label, color=colors[label])
            axis.scatter(chance, frequency, s=8 * np.log10(1 + forecasts), color=colors[label])
        axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), box_aspect=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("forecast chance (larger dots: more often)", fontsize=9)
        axis.set_ylabel("observed frequency", fontsize=9)
        axis.tick_params(labelsize=8)
    return add_legend_and_title(figure, axes, len(panels), title)


def plot_rank_histogram(
    panels: dict[str, dict[str, np.ndarray]], title: str, colors: Mapping[str, str] | None = None
) -> "Figure":
    """How often the observation had each rank among the members; flat, at 1, if it could be one of them.

    Args:
        panels: pixels in words -> label -> counts (E + 1,).
        colors: see [`plot_by_lead`].
    """
    from matplotlib.ticker import MaxNLocator

    colors = color_of(colors, panels)
    figure = new_figure(5 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        for place, (label, counts) in enumerate(panel.items()):
            ranks = np.arange(len(counts)) + 0.8 * ((place + 0.5) / len(panel) - 0.5)
            height = counts * len(counts) / max(1, counts.sum())
            axis.bar(ranks, height, 0.8 / len(panel), label=label, color=colors[label])
        axis.axhline(1, color="0.3", lw=1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(wrapped(name, 4.6, 10), fontsize=10)
        axis.set_xlabel("members below the observation", fontsize=9)
    axes[0, 0].set_ylabel("frequency, over that of a flat histogram", fontsize=8)
    return add_legend_and_title(figure, axes, len(panels), title)


__all__ = ["plot_by_lead", "plot_rank_histogram", "plot_reliability", "plot_spectrum"]
