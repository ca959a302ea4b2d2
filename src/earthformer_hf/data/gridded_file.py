"""One file of a user's own: its frames, and what is known about them.

xarray reads NetCDF, HDF5, Zarr, GeoTIFF and GRIB; `.npy` arrays are read as memory maps. Dimensions are found by the
CF conventions (https://cfconventions.org), by common names, or by what the user says.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .guards import open_dataset, open_npy


AXES = {  # what names a dimension y or x in the CF conventions: axis, standard names, units; and common names
    "y": ("Y", ("latitude", "projection_y_coordinate", "grid_latitude"), "degrees_north", ("y", "lat", "latitude")),
    "x": ("X", ("longitude", "projection_x_coordinate", "grid_longitude"), "degrees_east", ("x", "lon", "longitude")),
}


class GriddedFile:
    """The frames of an open file, and what is known about them."""

    def __init__(self, path: str, variable: list[str], dims: dict[str, str], select: dict[str, Any]):
        dataset = _open_dataset(path)
        names = variable or _only_variable(dataset, path)
        missing = sorted(set(names) - set(dataset.data_vars))
        if missing:
            raise ValueError(f"`variable`: {path} holds {sorted(map(str, dataset.data_vars))}, not {missing}.")
        self.arrays, orders = [], []
        for name in names:
            try:
                array = dataset[name].sel(select) if select else dataset[name]
            except (KeyError, ValueError) as reason:
                raise ValueError(f"`select`: {name!r} of {path} has no {select}: {reason}.") from None
            if array.dtype.kind not in "buif":
                raise ValueError(f"`variable`: {name!r} of {path} must hold real numbers, got {array.dtype}.")
            orders.append(_dimensions(array, dims, f"{name!r} of {path}"))
            if not orders[-1][0]:
                array, orders[-1][0] = array.expand_dims("time"), "time"
            self.arrays.append(array.squeeze([name for name in array.dims if name not in orders[-1]]))
        self.names, self.order = names, orders[0]
        self.length, *shape = (self.arrays[0].sizes[name] for name in self.order)
        if len(names) > 1 and (len(shape) > 2 or any(array.sizes != self.arrays[0].sizes for array in self.arrays)):
            sizes = {str(array.name): dict(array.sizes) for array in self.arrays}
            raise ValueError(f"`variable`: channels of {path} must be of one shape (T, H, W), got {sizes}.")
        if 0 in (self.length, *shape):
            raise ValueError(f"`variable`: {names} of {path} must not be empty, got {dict(self.arrays[0].sizes)}.")
        self.shape = [*shape, len(names)] if len(names) > 1 else shape
        self.dtype = str(np.result_type(*(array.dtype for array in self.arrays)))
        self.geo = _location(dataset, self.arrays[0], self.order)

    def read(self, frames: slice) -> np.ndarray:
        """Frames (n, H, W[, C])."""
        parts = [array.isel({self.order[0]: frames}).compute() for array in self.arrays]
        values = [part.transpose(*self.order).values for part in parts]
        return values[0] if len(values) == 1 else np.stack(values, axis=-1)


@lru_cache(32)
def gridded_file(process: int, path: str, changed: int, layout: str) -> GriddedFile:
    """`process` keeps the handles of a fork's parent apart."""
    return GriddedFile(path, **json.loads(layout))


def _open_dataset(path: str) -> Any:
    """A file as an `xarray.Dataset` whose arrays are read when they are sliced."""
    import xarray

    if not path.lower().endswith(".npy"):
        try:
            return open_dataset(path)
        except ValueError as reason:
            raise ValueError(str(reason) if path in str(reason) else f"{path}: {reason}") from None
    array = open_npy(path)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"{path} must be (H, W), (T, H, W) or (T, H, W, C), got {array.shape}.")
    names = {2: ("y", "x"), 3: ("time", "y", "x"), 4: ("time", "y", "x", "channel")}[array.ndim]
    return xarray.Dataset({"values": (names, array)})


def _only_variable(dataset: Any, path: str) -> list[str]:
    names = [str(name) for name, array in dataset.data_vars.items() if array.ndim >= 2]
    if len(names) != 1:
        raise ValueError(f"`variable` must be one of {names}, which {path} holds.")
    return names


def _dimensions(array: Any, dims: dict[str, str], what: str) -> list:
    """The dimensions time, y, x and, where there is one, channel of an array; None for the time if it has none."""
    absent = sorted(set(dims.values()) - set(map(str, array.dims)))
    if absent:
        raise ValueError(f"`dims`: {what} has dimensions {array.dims}, not {absent}.")
    channel = dims.get("channel") or ("channel" if "channel" in array.dims else None)
    # a dimension of one element that nothing names says nothing
    rest = [
        name
        for name in array.dims
        if name != channel and (array.sizes[name] > 1 or name in dims.values() or _role_of_dimension(array, name))
    ]
    time = dims.get("time") or next((name for name in rest if _role_of_dimension(array, name) == "time"), None)
    if time is None and len(rest) > 2:
        time = rest[0]
    rest = [name for name in rest if name != time]
    if len(rest) != 2:
        raise ValueError(
            f"`dims`: {what} must have a time, a y and an x, got {dict(array.sizes)}; name them in `dims`, and choose "
            "from others by `select`."
        )
    y, x = rest
    if dims.get("y") == x or dims.get("x") == y or ("y" not in dims and _role_of_dimension(array, x) == "y"):
        y, x = x, y
    return [time, y, x, *([channel] if channel else [])]


def _role_of_dimension(array: Any, name: Any) -> str | None:
    """ "time", "y" or "x", by the coordinates, CF attributes or name of a dimension."""
    if name in ("time", "t") or dates_along(array, (name,)) is not None:
        return "time"
    attributes = array.coords[name].attrs if name in array.coords else {}
    for axis, (letter, standard_names, units, names) in AXES.items():
        if (
            attributes.get("axis") == letter
            or attributes.get("standard_name") in standard_names
            or attributes.get("units") == units
            or str(name).lower() in names
        ):
            return axis
    return None


def dates_along(array: Any, dims: tuple) -> Any:
    """The coordinate with the dates along dimensions, (time,) or (); of a forecast, those for which it is valid."""
    dated = {
        str(name): coordinate
        for name, coordinate in array.coords.items()
        if coordinate.dims == dims and (coordinate.dtype.kind == "M" or _is_cftime(coordinate))
    }
    names = sorted(dated, key=lambda name: (name != "valid_time", (name,) != dims, name != "time"))
    return dated[names[0]] if names else None


def _is_cftime(coordinate: Any) -> bool:
    """Whether a coordinate holds dates of a calendar that numpy lacks."""
    return coordinate.dtype.kind == "O" and hasattr(coordinate.values.ravel()[0], "calendar")


def _location(dataset: Any, array: Any, order: list) -> dict[str, Any]:
    geo: dict[str, Any] = {}
    for role, name in zip("yx", order[1:3]):
        if name in array.coords and array.coords[name].dtype.kind in "uif":
            geo[role] = array.coords[name].values.tolist()
            geo[f"{role}_name"] = str(name)
    mapping = array.encoding.get("grid_mapping") or array.attrs.get("grid_mapping") or "spatial_ref"
    attributes = dataset[mapping].attrs if mapping in dataset.variables else {}
    text = attributes.get("crs_wkt") or attributes.get("spatial_ref")
    if text:
        geo["crs"] = str(text)
    elif attributes:
        geo["grid_mapping"] = {name: np.asarray(value).tolist() for name, value in attributes.items()}
    elif [geo.get("y_name"), geo.get("x_name")] in (["lat", "lon"], ["latitude", "longitude"]):
        geo["crs"] = "EPSG:4326"
    return geo


def check_values(grid: GriddedFile, path: Path):
    """Refuse a file of nothing but missing values; one frame is enough to know, if it is a good one."""
    if np.dtype(grid.dtype).kind != "f":
        return
    for frame in sorted(range(grid.length), key=lambda frame: (frame not in (0, grid.length // 2), frame)):
        if np.isfinite(grid.read(slice(frame, frame + 1))).any():
            return
    raise ValueError(f"{path}, {grid.names}: all {grid.length} frames hold nothing but missing values.")


__all__ = ["GriddedFile", "check_values", "dates_along", "gridded_file"]
