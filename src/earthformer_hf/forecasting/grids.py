"""Regular grids: where their cells lie, coarser ones, and the way back.

A grid spacing other than the model's is met by means over areas: each coarse cell takes every fine cell by the share
of it that it covers, of what was observed, if that is half of the coarse cell or more. The way back is bilinear
between the centres of coarse cells.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.coarsening import area_means, coarse_length
from ..data.measures import KILOMETERS_PER_DEGREE, UNKNOWN, parsed_spacing, spacing_of
from ..errors import one_line


logger = logging.get_logger(__name__)
WHOLE = 0.1  # by what part a whole number of cells may differ from the spacing that was asked for
UNEVEN = 0.01  # by what part steps between rows may differ from each other
UNITS_OF_AXES = {"metre": ("m", "m"), "kilometre": ("km", "km"), "degree": ("degrees_north", "degrees_east")}
Places = Mapping[str, tuple[np.ndarray, Mapping[str, Any]]]


@dataclass(frozen=True)
class Grid:
    """The cells of maps (H, W).

    Args:
        y, x: centres of rows (H,) and columns (W,), evenly spaced.
        geo: what else is known, as `geo` of [`~earthformer_hf.data.folder.Folder`]: `y_name`, `x_name`, `y_units`,
            `x_units`, `crs` or `grid_mapping`; `grid_spacing` where coordinates do not tell it.
        places: of a curvilinear grid: name -> latitudes or longitudes of the cells (H, W), and their attributes.
    """

    y: np.ndarray
    x: np.ndarray
    geo: Mapping[str, Any]
    places: Places = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.y), len(self.x)

    @property
    def names(self) -> tuple[str, str]:
        """Of rows and columns."""
        return str(self.geo.get("y_name", "y")), str(self.geo.get("x_name", "x"))

    @property
    def spacing(self) -> str:
        """Such as "3 km" or "5 degrees"; "unknown" if nothing says it."""
        return spacing_of({**self.geo, "y": self.y, "x": self.x} if self.is_placed else self.geo)

    @property
    def is_placed(self) -> bool:
        """Whether rows and columns have coordinates, not numbers alone."""
        return {"y_name", "x_name"} <= set(self.geo)

    @property
    def kilometers(self) -> float | None:
        """The geometric mean of height and width of a cell; None if they are unknown."""
        cell = self.cell
        return None if cell is None else float(np.sqrt(cell[0] * cell[1]))

    @property
    def cell(self) -> tuple[float, float] | None:
        """Height and width of a cell in kilometres; None if they are unknown. Degrees of longitude count by the
        cosine of the grid's middle latitude."""
        amount, unit = parsed_spacing(self.spacing)
        if not unit:
            return None
        if unit == "km":
            return amount, amount
        middle = float(np.mean(self.y)) if "y_name" in self.geo else 0.0
        height = amount * KILOMETERS_PER_DEGREE
        return height, height * float(np.cos(np.radians(middle)))

    @property
    def reversed(self) -> tuple[bool, bool]:
        """Whether the first row is the southernmost, and whether the first column is the easternmost; False where
        nothing says it."""
        up, right = float(self.y[-1] - self.y[0]), float(self.x[-1] - self.x[0])
        if not self.is_placed or not {"crs", "grid_mapping", "y_units"} & set(self.geo):
            up, right = 0.0, 0.0
            for values, attributes in self.places.values():
                if "north" in str(attributes.get("units")):
                    up = float(np.nanmean(np.diff(values, axis=0)))
                else:
                    right = float(np.nanmean(np.diff(_unbroken(values), axis=1)))
        return up > 0, right < 0

    def turned(self, rows: bool, columns: bool) -> "Grid":
        """The grid with its rows, or columns, in reverse order."""
        down, across = (slice(None, None, -1 if side else 1) for side in (rows, columns))
        places = {name: (values[down, across], attributes) for name, (values, attributes) in self.places.items()}
        return replace(self, y=self.y[down], x=self.x[across], places=places)

    def coarser(self, factor: float) -> "Grid":
        """The grid whose cells are `factor` times as wide; the last row and column may reach beyond this one's."""
        if factor == 1:
            return self
        sides = []
        for centres in (self.y, self.x):
            step = (centres[-1] - centres[0]) / (len(centres) - 1) if len(centres) > 1 else 1.0
            middles = (np.arange(coarse_length(len(centres), factor)) + 0.5) * factor - 0.5
            sides.append(centres[0] + step * middles)
        geo = dict(self.geo)
        if "grid_spacing" in geo:
            amount, unit = parsed_spacing(str(geo["grid_spacing"]))
            geo["grid_spacing"] = f"{amount * factor:.6g} {unit}"
        places = {name: (_coarser_places(values, factor), about) for name, (values, about) in self.places.items()}
        return replace(self, y=sides[0], x=sides[1], geo=geo, places=places)


def _coarser_places(values: np.ndarray, factor: float) -> np.ndarray:
    """Latitudes or longitudes (H, W) -> means over areas (h, w)."""
    return area_means(_unbroken(values)[None], factor)[0]


def _unbroken(degrees: np.ndarray) -> np.ndarray:
    """Degrees (H, W) that do not jump by 360 where they cross the date line."""
    middle = np.nanmedian(degrees)
    return (degrees.astype("float64") - middle + 180) % 360 - 180 + middle


def grid_of(geo: Mapping[str, Any], shape: tuple[int, int], places: Places | None = None) -> Grid:
    """The grid of an event; numbers of rows and columns where it has no coordinates.

    Coordinates without units have those of the coordinate reference system, if pyproj is there to tell them. One that
    pyproj does not know is left out, with a warning.

    Raises:
        ValueError: coordinates that are not evenly spaced.
    """
    rest = {name: value for name, value in geo.items() if name not in ("y", "x", "lat", "lon")}
    sides = []
    for name, other, length in (("y", "lat", shape[0]), ("x", "lon", shape[1])):
        found = geo.get(name, geo.get(other))
        if found is None:
            sides.append(np.arange(float(length)))
            continue
        centres = np.asarray(found, "float64")
        rest.setdefault(f"{name}_name", name if name in geo else other)
        if name not in geo:
            rest.setdefault(f"{name}_units", "degrees_north" if name == "y" else "degrees_east")
        steps = np.diff(centres)
        if len(steps) and np.abs(steps - steps.mean()).max() > UNEVEN * abs(steps.mean()):
            raise ValueError(
                f"`data`: rows and columns must be evenly spaced, {rest[f'{name}_name']} has steps of "
                f"{steps.min():g} to {steps.max():g}."
            )
        sides.append(centres)
    return with_units(Grid(sides[0], sides[1], _with_known_system(rest), places or {}))


def with_units(grid: Grid) -> Grid:
    """The grid, its coordinates in the units of its coordinate reference system if they state none.

    Raises:
        ValueError: see [`reference_system`].
    """
    system = reference_system(grid.geo)
    if system is None or not grid.is_placed or "y_units" in grid.geo:
        return grid
    names = {axis.unit_name for axis in system.axis_info[:2]}
    units = UNITS_OF_AXES.get(names.pop()) if len(names) == 1 else None
    return grid if units is None else replace(grid, geo={**grid.geo, "y_units": units[0], "x_units": units[1]})


def reference_system(geo: Mapping[str, Any]) -> Any:
    """The `pyproj.CRS` that a `geo` states; None if it states none, or pyproj is not installed.

    Raises:
        ValueError: what it states is none.
    """
    text, attributes = geo.get("crs"), geo.get("grid_mapping")
    if not (text or attributes) or find_spec("pyproj") is None:
        return None
    try:
        if text:
            return _system_of(str(text))
        return _system_of_mapping(json.dumps(dict(attributes or {}), default=lambda value: value.tolist()))
    except Exception as reason:  # whatever a text or attributes may cause
        stated = text or attributes.get("grid_mapping_name", attributes)  # type: ignore[union-attr]
        raise ValueError(f"`crs`: {stated!r} is no coordinate reference system: {one_line(reason)}.") from None


@functools.lru_cache(64)
def _system_of(text: str) -> Any:
    """The `pyproj.CRS` of a text; remembered, for PROJ takes a third of a second."""
    from pyproj import CRS

    return CRS.from_user_input(text)


@functools.lru_cache(64)
def _system_of_mapping(attributes: str) -> Any:
    """The `pyproj.CRS` of a grid mapping's attributes, as JSON."""
    from pyproj import CRS

    return CRS.from_cf(json.loads(attributes))


def _with_known_system(geo: dict[str, Any]) -> dict[str, Any]:
    """What is known, without a coordinate reference system that is none."""
    try:
        reference_system(geo)
    except ValueError as reason:
        logger.warning(f"{reason} What the data state is left out; `crs` states another.")
        return {name: value for name, value in geo.items() if name not in ("crs", "grid_mapping")}
    return geo


def coarsening(grid: Grid, target: str) -> float:
    """How many cells of a grid make one of the spacing `target`; a whole number where one is within a tenth.

    Raises:
        ValueError: a spacing that cannot be read, or that is unknown of the grid, or finer than the grid.
    """
    amount, unit = parsed_spacing(target)
    own = parsed_spacing(grid.spacing)[0] if unit == "degrees" and "degree" in grid.spacing else grid.kilometers
    wanted = amount if unit == "km" or "degree" in grid.spacing else amount * KILOMETERS_PER_DEGREE
    if not unit or not own:
        raise ValueError(
            f"`coarsen_to` must be a spacing such as '3 km', of a grid whose spacing is known, got {target!r} of a "
            f"grid of {grid.spacing}; `grid_spacing` states it."
        )
    factor = wanted / own
    if factor < 1 - WHOLE:
        raise ValueError(f"`coarsen_to` must not be finer than the grid of {grid.spacing}, got {target!r}.")
    nearest = max(1, round(factor))
    return float(nearest) if abs(nearest / factor - 1) <= WHOLE else factor


def interpolated(values: np.ndarray, factor: float, shape: tuple[int, int]) -> np.ndarray:
    """From coarse cells back to fine ones, bilinear: (n, h, w), NaN where missing -> (n, H, W).

    Of missing neighbours the others take the weight; a fine cell amid missing ones alone is missing.
    """
    if factor == 1:
        return values
    seen = np.isfinite(values)
    filled, weight = np.where(seen, values, 0).astype("float32"), seen.astype("float32")
    for axis, length in ((1, shape[0]), (2, shape[1])):
        filled, weight = (_between(array, factor, length, axis) for array in (filled, weight))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 1e-3, filled / weight, np.nan).astype("float32")


def _between(values: np.ndarray, factor: float, length: int, axis: int) -> np.ndarray:
    places = np.clip((np.arange(length) + 0.5) / factor - 0.5, 0, values.shape[axis] - 1)
    before = np.minimum(places.astype(int), max(0, values.shape[axis] - 2))
    after = np.minimum(before + 1, values.shape[axis] - 1)
    shape = [1] * values.ndim
    shape[axis] = -1
    part = (places - before).astype("float32").reshape(shape)
    return np.take(values, before, axis) * (1 - part) + np.take(values, after, axis) * part


def check_spacing(grid: Grid, spacing: str) -> None:
    """Refuse a grid of another spacing than the model's, by more than a tenth.

    Raises:
        ValueError: names the argument that converts.
    """
    if spacing == UNKNOWN:
        return
    if grid.spacing == UNKNOWN:
        raise ValueError(
            f"`data`: its grid spacing is unknown, the model takes {spacing}; state it by `grid_spacing`."
        )
    if coarsening(grid, spacing) != 1:
        raise ValueError(
            f"`data` has a grid of {grid.spacing}, the model takes {spacing}: `coarsen_to={spacing!r}` takes means."
        )


__all__ = [
    "Grid",
    "Places",
    "check_spacing",
    "coarsening",
    "grid_of",
    "interpolated",
    "reference_system",
    "with_units",
]
