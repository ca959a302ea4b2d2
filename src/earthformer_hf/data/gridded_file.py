"""One file of a user's own: its frames, and what is known about them.

xarray reads NetCDF, HDF5, Zarr, GeoTIFF and GRIB; `.npy` arrays are read as memory maps, plain HDF5 by h5py, and the
HDF5 files of radar services by `radar_hdf5.py`. Dimensions are found by the CF conventions (https://cfconventions.org),
by common names, or by what the user says.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from .file_times import decode_times
from .guards import open_dataset, open_hdf5, open_npy
from .measures import canonical_units
from .radar_hdf5 import plain_dataset, radar_dataset


AXES = {  # what names a dimension y or x in the CF conventions: axis, standard names, units; and common names
    "y": ("Y", ("latitude", "projection_y_coordinate", "grid_latitude"), "degrees_north", ("y", "lat", "latitude")),
    "x": ("X", ("longitude", "projection_x_coordinate", "grid_longitude"), "degrees_east", ("x", "lon", "longitude")),
}
# dimensions that are never time: vertical ones and members of an ensemble
OTHER_NAMES = (
    "level", "lev", "plev", "height", "altitude", "depth", "z", "isobaricinhpa", "heightaboveground", "hybrid",
    "layer", "member", "members", "ensemble", "ens", "realization", "number", "bnds", "bounds", "nv",
)  # fmt: skip
TIME_UNITS = {"second": 1, "sec": 1, "minute": 60, "min": 60, "hour": 3600, "hr": 3600, "h": 3600, "day": 86400}
OTHER_STANDARD_NAMES = ("realization", "air_pressure", "height", "altitude", "depth", "atmosphere_hybrid_sigma")
LEAD_NAMES = ("lead_time", "leadtime", "forecast_period")


class IsForecast(ValueError):
    """A file is a forecast where observations are wanted."""


class GriddedFile:
    """The frames of an open file, and what is known about them.

    Args:
        path: of the file.
        layout: see `FolderConfig.layout`: `variable` (names), `dims`, `select`, `grib_keys`, `allow_sparse`,
            `missing_value`; and `forecasts`, False to refuse them.
        dataset: an open `xarray.Dataset` to take instead; `path` then is what errors call it.

    Raises:
        ValueError: names the file, the option, what was expected and what came.
        IsForecast: times lie after a reference time, and `forecasts` is False.
    """

    def __init__(self, path: str, layout: dict[str, Any], dataset: Any = None):
        group, variable = _group_and_names(layout["variable"])
        dataset = _open(path, group, layout) if dataset is None else decode_times(dataset)
        if not layout.get("forecasts", True) and (why := _is_forecast(dataset)):
            raise IsForecast(f"{path} is a forecast, no observation: {why}")
        names = variable or _only_variable(dataset, path)
        missing = sorted(set(names) - set(map(str, dataset.variables)))
        if missing:
            raise ValueError(f"`variable`: {path} holds {_described_variables(dataset, path)}, not {missing}.")
        self.arrays, orders = [], []
        for name in names:
            array, order = _one_variable(dataset, name, path, layout)
            self.arrays.append(array)
            orders.append(order)
        self.dataset, self.names, self.order = dataset, names, orders[0]
        self.length, *shape = (self.arrays[0].sizes[name] for name in self.order)
        if len(names) > 1 and (len(shape) > 2 or any(array.sizes != self.arrays[0].sizes for array in self.arrays)):
            sizes = {str(array.name): dict(array.sizes) for array in self.arrays}
            raise ValueError(f"`variable`: channels of {path} must be of one shape (T, H, W), got {sizes}.")
        if 0 in (self.length, *shape):
            raise ValueError(f"`variable`: {names} of {path} must not be empty, got {dict(self.arrays[0].sizes)}.")
        self.shape = [*shape, len(names)] if len(names) > 1 else shape
        self.masks = [_valid_interval(array, layout["missing_value"]) for array in self.arrays]
        self.dtype = str(np.result_type(*(_dtype(array, mask) for array, mask in zip(self.arrays, self.masks))))
        self.geo = _location(dataset, self.arrays[0], self.order) | _units_of(self.arrays)
        self.decibels = [str(array.attrs.get("units", "")).lower() in ("dbz", "db") for array in self.arrays]

    def read(self, frames: slice, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Frames (n, H, W[, C]) of a part of the grid, NaN where the file says that a value is none."""
        values = []
        part_of = dict(zip(self.order, (frames, rows, columns)))
        for array, mask in zip(self.arrays, self.masks):
            part = array.isel(part_of).compute().transpose(*self.order).values
            if mask is not None:
                lowest, highest, flags = mask
                part = part.astype(np.result_type(part.dtype, "float32"))
                part[(part < lowest) | (part > highest)] = np.nan
                for low, high in flags:
                    part[(part >= low) & (part <= high)] = np.nan
            values.append(part.astype(self.dtype, copy=False))
        return values[0] if len(values) == 1 else np.stack(values, axis=-1)

    def dates(self) -> Any:
        """The coordinate with the dates of the frames, (T,) or, of a single frame, (); None if there is none.

        Of a forecast, those for which it is valid, or the reference time plus the steps.
        """
        array = self.arrays[0]
        dates = _dates_along(self.dataset, array, (self.order[0],))
        if dates is None and self.length == 1:
            dates = _dates_along(self.dataset, array, ())
        return dates

    def places(self) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
        """Of a curvilinear grid, latitudes and longitudes (H, W) and their attributes, by name; else empty."""
        found = {}
        for name, variable in self.dataset.variables.items():
            if variable.ndim != 2 or set(variable.dims) != set(self.order[1:3]) or variable.dtype.kind not in "iuf":
                continue
            for standard, units in (("latitude", "degrees_north"), ("longitude", "degrees_east")):
                said = variable.attrs.get("standard_name"), variable.attrs.get("units")
                if standard in said or units in said or str(name).lower() in (standard, standard[:3]):
                    values = variable.transpose(*self.order[1:3]).values
                    found[str(name)] = (values, {"standard_name": standard, "units": units})
        return found if len(found) == 2 else {}


@lru_cache(32)
def gridded_file(process: int, path: str, changed: str, layout: str) -> GriddedFile:
    """`process` keeps the handles of a fork's parent apart."""
    return GriddedFile(path, json.loads(layout))


def _group_and_names(variable: list[str]) -> tuple[str | None, list[str]]:
    """The group that all names are in, and the names within it."""
    groups = {name.rpartition("/")[0].strip("/") for name in variable}
    if len(groups) > 1:
        raise ValueError(f"`variable` must name fields of one group, got {variable}.")
    return (groups.pop() or None) if groups else None, [name.rpartition("/")[2] for name in variable]


def _open(path: str, group: str | None, layout: dict[str, Any]) -> Any:
    """A file as an `xarray.Dataset` whose arrays are read when they are sliced."""
    import xarray

    try:
        if path.lower().endswith(".npy"):
            array = open_npy(path)
            if array.ndim not in (2, 3, 4):
                raise ValueError(f"{path} must be (H, W), (T, H, W) or (T, H, W, C), got {array.shape}.")
            dims = {2: ("y", "x"), 3: ("time", "y", "x"), 4: ("time", "y", "x", "channel")}[array.ndim]
            return xarray.Dataset({"values": (dims, array)})
        if path.lower().endswith((".h5", ".hdf5", ".hdf", ".he5")):
            file = open_hdf5(path, layout["allow_sparse"])
            found = radar_dataset(file, group)
            found = found if found is not None else plain_dataset(file, group)
            if found is not None:
                return decode_times(xarray.decode_cf(found, decode_times=False))
        options: dict[str, Any] = {"group": group} if group else {}
        if layout["grib_keys"]:
            options["backend_kwargs"] = {"filter_by_keys": layout["grib_keys"]}
        return decode_times(open_dataset(path, layout["allow_sparse"], decode_times=False, **options))
    except Exception as reason:  # whatever a damaged file may cause
        text = one_line(reason)
        if "filter_by_keys" in text and not layout["grib_keys"]:
            text = f"holds messages of several kinds; choose some by `grib_keys`, such as {_grib_suggestion(text)}"
        raise ValueError(text if path in text else f"{path}: {text}") from None


def _grib_suggestion(text: str) -> str:
    """The first choice that cfgrib names."""
    return "{" + text.partition("filter_by_keys={")[2].partition("}")[0] + "}"


def _is_field(dataset: Any, name: str) -> bool:
    """Whether a variable may be a map: not the bounds of another, and no classes, which have flags and no units."""
    attributes = dataset[name].attrs
    bounds = {other.attrs.get("bounds") or other.attrs.get("climatology") for other in dataset.variables.values()}
    classes = "flag_meanings" in attributes and canonical_units(str(attributes.get("units", ""))) == "1"
    return dataset[name].ndim >= 2 and name not in bounds and not classes


def _only_variable(dataset: Any, path: str) -> list[str]:
    names = [str(name) for name in dataset.data_vars if _is_field(dataset, name)]
    if len(names) != 1:
        raise ValueError(f"`variable` must be one of {_described_variables(dataset, path)}, which {path} holds.")
    return names


def _described_variables(dataset: Any, path: str) -> list[str]:
    """Names of the fields of a file; of one that has none at its top, those of its groups."""
    names = [str(name) for name in dataset.data_vars if _is_field(dataset, name)]
    if names or not path.lower().endswith((".nc", ".nc4", ".h5", ".hdf5", ".hdf", ".he5")):
        return sorted(names)
    import h5py

    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 2:
            found.append(name)

    try:
        open_hdf5(path).visititems(visit)
    except ValueError:  # a classic NetCDF file has no groups
        pass
    return sorted(found)


def _one_variable(dataset: Any, name: str, path: str, layout: dict[str, Any]) -> tuple[Any, list]:
    """A variable as an array of time, y, x and perhaps a channel, and the names of these dimensions."""
    select = layout["select"]
    try:
        array = dataset[name].sel(select) if select else dataset[name]
    except (KeyError, ValueError) as reason:
        raise ValueError(f"`select`: {name!r} of {path} has no {select}: {reason}.") from None
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise ValueError(f"`variable`: {name!r} of {path} must hold real numbers, got {array.dtype}.")
    order = _dimensions(dataset, array, layout["dims"], f"{name!r} of {path}")
    if not order[0]:
        array, order[0] = array.expand_dims("time"), "time"
    return array.squeeze([name for name in array.dims if name not in order]), order


def _valid_interval(array: Any, missing: float | None) -> tuple[float, float, list[tuple[float, float]]] | None:
    """The lowest and highest value that exists, and values that are flags; None if nothing says it.

    CF conventions, section 2.5.1: `valid_range` is in the units of the stored, packed numbers. One of real
    numbers, where whole numbers are stored, is in those of the unpacked values (NetCDF User's Guide,
    "Attribute Conventions").
    """
    attributes, packing = array.attrs, array.encoding
    lowest, highest = attributes.get("valid_range", (attributes.get("valid_min"), attributes.get("valid_max")))
    flags = attributes.get("flag_values") if "units" in attributes else None
    if lowest is None and highest is None and flags is None and missing is None:
        return None
    scale, offset = float(packing.get("scale_factor", 1)), float(packing.get("add_offset", 0))
    whole_numbers = np.dtype(packing.get("dtype", array.dtype)).kind in "iu"
    slack = abs(scale) / 4 if whole_numbers and (scale != 1 or offset != 0) else 0.0  # of rounding in unpacking

    def unpacked(limit: Any) -> float:
        is_unpacked = whole_numbers and np.asarray(limit).dtype.kind == "f"
        return float(limit) if is_unpacked else float(limit) * scale + offset

    limits = [unpacked(limit) for limit in (lowest, highest) if limit is not None]
    if len(limits) == 1:
        limits.append(np.inf if (lowest is None) == (scale < 0) else -np.inf)
    ends = sorted(limits or [-np.inf, np.inf])
    values = [unpacked(flag) for flag in ([] if flags is None else np.ravel(flags))]
    none = [(value - slack, value + slack) for value in values]
    return ends[0] - slack, ends[1] + slack, none if missing is None else [*none, (missing, missing)]


def _dtype(array: Any, mask: Any) -> np.dtype:
    dtype = np.result_type(array.dtype, "float32") if mask is not None else array.dtype
    return dtype.newbyteorder("=")


def _dimensions(dataset: Any, array: Any, dims: dict[str, str], what: str) -> list:
    """The dimensions time, y, x and, where there is one, channel of an array; None for the time if it has none."""
    absent = sorted(set(dims.values()) - set(map(str, array.dims)))
    if absent:
        raise ValueError(f"`dims`: {what} has dimensions {array.dims}, not {absent}.")
    channel = dims.get("channel") or ("channel" if "channel" in array.dims else None)
    roles = {name: _role_of_dimension(dataset, array, name) for name in array.dims}
    # a dimension of one element that nothing names says nothing
    rest = [
        name
        for name in array.dims
        if name != channel and (array.sizes[name] > 1 or name in dims.values() or roles[name] in ("time", "y", "x"))
    ]
    time = dims.get("time") or next((name for name in rest if roles[name] == "time"), None)
    if time is None and len(rest) > 2:
        time = next((name for name in rest if roles[name] is None), None)
        if time is None or len(rest) > 3:
            others = [name for name in rest if roles[name] == "other"]
            raise ValueError(
                f"`dims`: {what} must have a time, a y and an x, got {dict(array.sizes)}; name the time in `dims`, "
                f"and choose from others by `select`, such as select={{{(others or rest)[0]!r}: ...}}."
            )
    rest = [name for name in rest if name != time]
    if len(rest) != 2:
        raise ValueError(
            f"`dims`: {what} must have a time, a y and an x, got {dict(array.sizes)}; name them in `dims`, and choose "
            "from others by `select`."
        )
    y, x = rest
    if dims.get("y") == x or dims.get("x") == y or ("y" not in dims and roles[x] == "y"):
        y, x = x, y
    return [time, y, x, *([channel] if channel else [])]


def _role_of_dimension(dataset: Any, array: Any, name: Any) -> str | None:
    """ "time", "y", "x", or "other" (a level, a member), by coordinates, CF attributes or name; None if unknown."""
    attributes = array.coords[name].attrs if name in array.coords else {}
    if str(name).lower() in OTHER_NAMES or attributes.get("axis") == "Z" or "positive" in attributes:
        return "other"
    if attributes.get("standard_name") in OTHER_STANDARD_NAMES:
        return "other"
    if name in ("time", "t") or _dates_along(dataset, array, (name,)) is not None:
        return "time"
    for axis, (letter, standard_names, units, names) in AXES.items():
        if (
            attributes.get("axis") == letter
            or attributes.get("standard_name") in standard_names
            or attributes.get("units") == units
            or str(name).lower() in names
        ):
            return axis
    return None


def _dates_along(dataset: Any, array: Any, dims: tuple) -> Any:
    """The coordinate or variable of a file with the dates along dimensions of an array; None if there is none."""
    along = {**{str(name): c for name, c in array.coords.items()}}
    for name, variable in dataset.data_vars.items():  # a scalar or 1-D variable that is no coordinate
        if str(name) not in along and variable.attrs.get("standard_name") == "time":
            along[str(name)] = variable
    dated = {name: c for name, c in along.items() if c.dims == dims and _is_time(c)}
    names = sorted(dated, key=lambda name: (name != "valid_time", (name,) != dims, name != "time"))
    reference = ("forecast_reference_time",)
    usable = [name for name in names if dated[name].attrs.get("standard_name") not in reference] or names
    if usable and not (dims == () and usable[0] not in ("valid_time",) and _steps(along, ()) is not None):
        return dated[usable[0]]
    steps = _steps(along, dims)
    starts = [c for c in along.values() if c.dims == () and _is_time(c)]
    return starts[0] + steps if steps is not None and starts else (dated[usable[0]] if usable else None)


def _steps(along: dict[str, Any], dims: tuple) -> Any:
    """The lead times of a forecast along dimensions."""
    for coordinate in along.values():
        unit = TIME_UNITS.get(str(coordinate.attrs.get("units", "")).lower().rstrip("s"))
        if coordinate.dims == dims and unit is not None and coordinate.dtype.kind in "uif":
            return (coordinate.astype("float64") * unit).round().astype("timedelta64[s]")
    return None


def _is_forecast(dataset: Any) -> str | None:
    """Why a dataset is a forecast: it has lead times, or times after a reference time; None if it is none.

    The analyses and observations of a weather service, as GRIB, have a reference time and a lead time of 0.
    """
    references, times = [], []
    for name, variable in dataset.variables.items():
        standard = variable.attrs.get("standard_name")
        if standard == "forecast_period" or str(name).lower() in LEAD_NAMES:
            if variable.dtype.kind in "iufm" and (np.asarray(variable.values).astype("float64") > 0).any():
                return f"it has lead times, {str(name)!r}"
        elif variable.dtype.kind == "M" and "forecast_reference_time" in (standard, name):
            references.append(variable.values.max())
        elif variable.dtype.kind == "M" and name in ("time", "valid_time"):
            times.append(variable.values.max())
    if references and times and max(times) > max(references):
        return f"its times end at {max(times)!s:.19}, its reference time is {max(references)!s:.19}"
    return None


def _is_time(coordinate: Any) -> bool:
    return coordinate.dtype.kind == "M" or "undecoded_time" in coordinate.attrs


def _location(dataset: Any, array: Any, order: list) -> dict[str, Any]:
    geo: dict[str, Any] = {}
    for role, name in zip("yx", order[1:3]):
        if name in array.coords and array.coords[name].dtype.kind in "uif":
            geo[role] = array.coords[name].values.tolist()
            geo[f"{role}_name"] = str(name)
            if units := array.coords[name].attrs.get("units"):
                geo[f"{role}_units"] = str(units)
    mapping = array.encoding.get("grid_mapping") or array.attrs.get("grid_mapping") or "spatial_ref"
    attributes = dataset[mapping].attrs if mapping in dataset.variables else {}
    text = attributes.get("crs_wkt") or attributes.get("spatial_ref") or dataset.attrs.get("projection")
    if text:
        geo["crs"] = str(text)
    elif attributes:
        geo["grid_mapping"] = {name: np.asarray(value).tolist() for name, value in attributes.items()}
    elif [geo.get("y_name"), geo.get("x_name")] in (["lat", "lon"], ["latitude", "longitude"]):
        geo["crs"] = "EPSG:4326"
    return geo


def _units_of(arrays: list[Any]) -> dict[str, str]:
    """The units that the file states, of each channel once."""
    stated = dict.fromkeys(str(array.attrs.get("units", "")).strip() for array in arrays)
    return {"units": ", ".join(stated)} if all(stated) else {}


def check_values(grid: GriddedFile, path: Path):
    """Refuse a file of nothing but missing values; one frame is enough to know, if it is a good one.

    Raises:
        ValueError: names the file.
    """
    frames = sorted(range(grid.length), key=lambda frame: (frame not in (0, grid.length // 2), frame))
    for frame in frames:
        values = grid.read(slice(frame, frame + 1))  # also of whole numbers: a damaged file shows here
        if np.dtype(grid.dtype).kind != "f" or np.isfinite(values).any():
            return
    raise ValueError(f"{path}, {grid.names}: all {grid.length} frames hold nothing but missing values.")


__all__ = ["GriddedFile", "IsForecast", "check_values", "gridded_file"]
