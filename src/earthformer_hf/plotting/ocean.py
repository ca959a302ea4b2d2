"""The index of El Nino: skill, plume and maps."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import add_title, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import DataArray


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
    figure = new_figure(13, 6.6)
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

    draw_plume(figure.add_subplot(grid[0, columns:] if skill else grid[0, :]), observed, forecast)

    highest = max(float(np.nanmax(np.abs(values))) for values in maps.values())
    axes, mesh = [], None
    for place, (label, values) in enumerate(maps.items()):
        axis = figure.add_subplot(grid[1, 2 * place : 2 * place + 2])
        colours: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -highest, "vmax": highest}
        mesh = axis.pcolormesh(geo["lon"], geo["lat"], values, shading="nearest", **colours)
        axis.set_facecolor("0.85")
        axis.set(title=label, xlabel="longitude", **_extent(list(maps.values()), geo))
        axis.add_patch(nino34_box())
        axes.append(axis)
    axes[0].set_ylabel("latitude")
    if mesh is not None:
        figure.colorbar(mesh, ax=axes, label="degC", shrink=0.9, pad=0.01)
    add_title(figure, title)
    return figure


def _extent(maps: list[np.ndarray], geo: dict) -> dict[str, tuple[float, float]]:
    """Limits of the axes around what any of the maps holds, and a little more."""
    known = np.any(np.isfinite(maps), axis=0)
    lat, lon = (np.asarray(geo[name])[known.any(axis)] for name, axis in (("lat", 1), ("lon", 0)))
    return {"ylim": (lat.min() - 7.5, lat.max() + 7.5), "xlim": (lon.min() - 7.5, lon.max() + 7.5)}


def draw_plume(axis: Any, observed: tuple, forecast: tuple, members: np.ndarray | None = None):
    """The index that was observed and, from its last month on, the forecast; arguments as of [`plot_ocean`].

    Args:
        members: (E, leads), of an ensemble whose mean is the forecast.
    """
    months, index, half_width = forecast
    begun = observed[0] < months[0]
    start = observed[0][begun][-1:], observed[1][begun][-1:]
    from_last = np.append(start[0], months), np.append(start[1], index)
    if half_width is not None:
        width = np.append(np.zeros(len(start[0])), half_width)
        ends, label = (from_last[1] - width, from_last[1] + width), "90 %, by the errors of the hindcasts"
        axis.fill_between(from_last[0], *ends, color="C0", alpha=0.25, label=label)
    if members is not None:
        lines = axis.plot(months, members.T, color="C0", lw=0.8, alpha=0.5)
        lines[0].set_label(f"{len(members)} members")
    axis.plot(*from_last, color="C0", lw=1, ls=":")
    label = "forecast" if members is None else "their mean"
    axis.plot(months, index, color="C0", marker="o", markersize=4, lw=2, label=label)
    if len(observed[0]):
        axis.plot(*observed, color="black", lw=2.4, label="observed")
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(
        ylabel="Nino3.4, three-month means, degC", title=f"the coming months, {months[0] - 1} to {months[-1] + 1}"
    )
    axis.legend(fontsize=8)
    axis.tick_params(axis="x", labelrotation=30)


def nino34_box():
    """A frame of the region of Nino3.4, in degrees east."""
    from matplotlib.patches import Rectangle

    return Rectangle((190, -5), 50, 10, fill=False, color="black", lw=1.2)


def nino34_means(maps: "DataArray") -> np.ndarray | None:
    """Three-month means of the mean over latitude -5..5 and longitude 190..240, of maps (..., T, lat, lon).

    Returns:
        (..., T - 2), of months 2 .. T - 1; None of maps that do not show the region, or of fewer than three.
    """
    y, x = maps.dims[-2:]
    if y not in maps.coords or x not in maps.coords or maps.shape[-3] < 3:
        return None
    rows, columns = maps[y].values, maps[x].values % 360
    chosen = (np.abs(rows) <= 5, (columns >= 190) & (columns <= 240))
    if "degree" not in str(maps[y].attrs.get("units", "degrees")) or not (chosen[0].any() and chosen[1].any()):
        return None
    region = maps.isel({y: chosen[0], x: chosen[1]}).values
    index = np.nanmean(region, axis=(-2, -1))
    return (index[..., :-2] + index[..., 1:-1] + index[..., 2:]) / 3


__all__ = ["draw_plume", "nino34_box", "nino34_means", "plot_ocean"]
