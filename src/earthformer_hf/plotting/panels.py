"""Rows of maps on equal axes, with coordinates, colour bars and a key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    ANOMALY_LEVELS,
    CHANCE_LEVELS,
    MISSING,
    RAIN_LEVELS,
    add_color_bar,
    add_title,
    chance_style,
    map_style,
    new_figure,
    wrapped,
)
from .fields import Map


if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAG_COLOR = "0.35"
WIDTHS = {1: 6.0, 2: 4.2, 3: 3.4, 4: 2.9}  # of a panel in inches, by the number of columns
WIDTH = 2.3


@dataclass(frozen=True)
class Panel:
    """A map under its title.

    Args:
        values: in the units of the sheet, or chances 0..1.
        is_chance: which of both.
        flag: 1 where the forecast is not reliable.
    """

    title: str
    values: Map
    is_chance: bool = False
    flag: Map | None = None


@dataclass
class Sheet:
    """A figure of maps.

    Args:
        title: above all.
        quantity, units: of the values, rain rates in "mm/h".
        colors: of rain rates.
        rows: label and panels; None for an empty place.
        coasts: lines (n, 2) to draw on each map.
        area: whose edges are those of all maps; each has its own if omitted.
    """

    title: str
    quantity: str
    units: str
    colors: str = "rain"
    rows: list[tuple[str, list[Panel | None]]] = field(default_factory=list)
    coasts: list[np.ndarray] = field(default_factory=list)
    area: Map | None = None

    @property
    def panels(self) -> list[Panel]:
        return [panel for _, panels in self.rows for panel in panels if panel is not None]

    @property
    def columns(self) -> int:
        return max(len(panels) for _, panels in self.rows)

    def styles(self) -> dict[bool, dict[str, Any]]:
        """Arguments of `imshow`, of chances and of values."""
        drawn = [panel.values.values for panel in self.panels if not panel.is_chance]
        return {False: map_style(drawn, self.units, self.colors, hatched=True), True: chance_style(hatched=True)}

    def size(self) -> tuple[float, float]:
        """Of the maps together, in inches."""
        width = WIDTHS.get(self.columns, WIDTH)
        height = 0.95 * min(max(width * (self.area or self.panels[0].values).shape, 0.35 * width), 2 * width)
        return width * self.columns + 1.9, (height + 0.3) * len(self.rows)


Painters = dict[Any, Callable[[Panel], None]]  # axes -> what draws another panel there


def draw_sheet(sheet: Sheet) -> "tuple[Figure, Painters]":
    """A figure of the sheet alone, and what repaints its maps."""
    width, height = sheet.size()
    figure = new_figure(width, height + 1.1)
    painters = draw_rows(figure, figure.add_gridspec(len(sheet.rows), sheet.columns), sheet)
    add_title(figure, sheet.title)
    add_key(figure, sheet.panels)
    return figure, painters


def draw_rows(figure: "Figure", grid: Any, sheet: Sheet) -> Painters:
    """Draw the rows of a sheet into a grid of places, with colour bars; what repaints each map."""
    styles = sheet.styles()
    painters: Painters = {}
    kinds: dict[bool, list[Any]] = {False: [], True: []}
    lowest = {
        column: row for row, (_, panels) in enumerate(sheet.rows) for column, panel in enumerate(panels) if panel
    }
    for row, (label, panels) in enumerate(sheet.rows):
        first = next(column for column, panel in enumerate(panels) if panel)
        for column, panel in enumerate(panels):
            if panel is None:
                continue
            axis = figure.add_subplot(grid[row, column])
            painters[axis] = partial(_paint, axis, sheet, styles[panel.is_chance])
            painters[axis](panel)
            name_coordinates(axis, panel.values.unit, column == first, lowest[column] == row)
            axis.set_ylabel(wrapped(label, 2.0, 10) if column == first else "", fontsize=10)
            kinds[panel.is_chance].append(axis)
    levels = RAIN_LEVELS if sheet.units == "mm/h" else ANOMALY_LEVELS if "norm" in styles[False] else None
    if any(len({panel.is_chance for panel in panels if panel}) > 1 for _, panels in sheet.rows):
        beside = {kind: list(painters) for kind in kinds}  # of rows of both, beside all of them
    else:
        beside = kinds
    add_color_bar(figure, kinds[False], beside[False], f"{sheet.quantity}, {sheet.units or 'units unknown'}", levels)
    add_color_bar(figure, kinds[True], beside[True], "chance, %", CHANCE_LEVELS)
    return painters


def _paint(axis: Any, sheet: Sheet, style: dict[str, Any], panel: Panel) -> None:
    """A map on its axes: hatched where it is missing, and lightly where it is not reliable."""
    for artist in [*axis.images, *axis.collections, *axis.lines]:
        artist.remove()
    shown = panel.values
    values = 100 * shown.values if panel.is_chance else shown.values
    axis.imshow(values, **style, extent=shown.extent, interpolation="nearest")
    axis.patch.set(**(MISSING if np.isnan(values).any() else {"facecolor": "white", "hatch": None}))
    hatch_flag(axis, panel.flag)
    for line in sheet.coasts:
        axis.plot(*line.T, color="0.2", lw=0.5, scalex=False, scaley=False)
    area = sheet.area if sheet.area is not None and sheet.area.unit == shown.unit else shown
    axis.set(xlim=area.extent[:2], ylim=area.extent[2:], aspect=area.aspect)
    axis.set_title(panel.title, fontsize=9, pad=3)


def hatch_flag(axis: Any, flag: Map | None) -> None:
    """Hatch lightly where a flag is 1."""
    if flag is None or not (flag.values >= 0.5).any():
        return
    left, right, bottom, top = flag.extent
    rows, columns = flag.values.shape
    y = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    drawn = axis.contourf(x, y, np.nan_to_num(flag.values), levels=[0.5, 1.5], colors="none", hatches=["...."])
    drawn.set(edgecolor=FLAG_COLOR, linewidth=0)


def name_coordinates(axis: Any, unit: str, is_left: bool, is_bottom: bool) -> None:
    """Coordinates on the outer axes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.tick_params(labelsize=7, length=2, labelleft=is_left, labelbottom=is_bottom)
    axis.xaxis.set_major_locator(MaxNLocator(3, prune="upper"))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    if unit == "degrees":
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _longitude(value)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}°{'NS'[int(value < 0)]}"))
    elif unit == "km":
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} km"))


def _longitude(value: float) -> str:
    east = (value + 180) % 360 - 180
    return f"{abs(east):g}°" + ("" if east in (0, -180) else "EW"[int(east < 0)])


def add_key(figure: "Figure", panels: Sequence[Panel]) -> None:
    """What hatches mean, of those that were drawn."""
    from matplotlib.patches import Patch

    handles = []
    if any(np.isnan(panel.values.values).any() for panel in panels):
        handles.append(Patch(**MISSING, lw=0, label="not observed"))
    if any(panel.flag is not None and (panel.flag.values >= 0.5).any() for panel in panels):
        label = "less reliable: what arrives here comes from beyond the coverage"
        handles.append(Patch(facecolor="white", edgecolor=FLAG_COLOR, hatch="....", lw=0, label=label))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


__all__ = ["Panel", "Painters", "Sheet", "add_key", "draw_rows", "draw_sheet"]
