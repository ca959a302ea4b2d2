"""HDF5 files without the structure of NetCDF: plain arrays, ODIM composites and KNMI's composites.

ODIM: Michelson et al., "EUMETNET OPERA weather radar information model for implementation with the HDF5 file format",
version 2.4, sections 3 and 4 (a value is `gain * stored + offset`; `nodata` was not seen, `undetect` was seen without
an echo: 0 of rain, LOWEST_DBZ of reflectivity, missing of others).
KNMI: Roozekrans and Holleman, "KNMI HDF5 data format specification", version 3.5 (calibration in words,
"GEO=0.01*PV+0.0").
"""

import re
from typing import Any

import numpy as np
from transformers.utils import logging

from .rain import LOWEST_DBZ


logger = logging.get_logger(__name__)

UNITS = {"RATE": "mm/h", "ACRR": "mm", "DBZH": "dBZ", "DBZV": "dBZ", "TH": "dBZ", "TV": "dBZ"}  # of ODIM's quantities
RATES = ("RATE", "ACRR")  # quantities that are 0, not missing, where there is no echo


def plain_dataset(file: Any, group: str | None) -> Any:
    """The arrays of a group of an `h5py.File` without dimension scales, as an `xarray.Dataset`; None if it has any.

    Dimensions are named as the NetCDF library would name them: "phony_dim_0" and so on, by size.

    Raises:
        ValueError: the file has no such group.
    """
    import h5py
    import xarray

    place = file
    if group is not None:
        place = file.get(group)
        if not isinstance(place, h5py.Group):
            raise ValueError(f"`variable`: {file.filename} has no group {group!r}, it holds {sorted(file)}")
    arrays = {name: item for name, item in place.items() if isinstance(item, h5py.Dataset)}
    scales = any(
        "DIMENSION_LIST" in item.attrs or item.attrs.get("CLASS") == b"DIMENSION_SCALE" for item in arrays.values()
    )
    if scales or "_NCProperties" in file.attrs:
        return None
    names: dict[tuple[int, int], str] = {}  # size, how often it came before in the same array -> name
    variables = {}
    for name, item in arrays.items():
        if item.dtype.kind not in "buif":
            continue
        dims = []
        for axis, size in enumerate(item.shape):
            key = size, item.shape[:axis].count(size)
            dims.append(names.setdefault(key, f"phony_dim_{len(names)}"))
        variables[name] = xarray.Variable(dims, _lazy(item), _attributes(item.attrs))
    return xarray.Dataset(variables)


def radar_dataset(file: Any, group: str | None = None) -> Any:
    """A composite of ODIM or KNMI as an `xarray.Dataset` of (time, y, x); None if the file is none.

    Maps of ODIM are named by their quantity. One that states none, and those of several products of one quantity, are
    named by their place, such as "dataset2/data1".

    Args:
        group: of ODIM, the place of the maps to take, "dataset2" or "dataset2/data1", which are then named "data1" or
            "data". A file of KNMI is not decoded by groups.

    Raises:
        ValueError: an ODIM object that is no map, or that has no map in this group.
    """
    what = file.get("what")
    if what is not None and _text(what.attrs.get("object", "")) in (
        "COMP",
        "IMAGE",
        "CVOL",
        "XSEC",
        "RAY",
        "PVOL",
        "SCAN",
    ):
        object_type = _text(what.attrs["object"])
        if object_type not in ("COMP", "IMAGE"):
            raise ValueError(f"is an ODIM object {object_type!r}; only composites and images (COMP, IMAGE) are maps")
        return _odim_dataset(file, group)
    if group is None and "image1" in file and "overview" in file:
        return _knmi_dataset(file)
    return None


def _odim_dataset(file: Any, group: str | None) -> Any:
    import xarray

    frames = _odim_maps(file, group)
    variables = {}
    times = sorted({when for entries in frames.values() for when, _ in entries})
    for name, entries in frames.items():
        entries.sort(key=lambda entry: entry[0])
        if [when for when, _ in entries] != times:
            raise ValueError(
                f"holds {name!r} at {len(entries)} times, other quantities at {len(times)}; choose a map by its "
                "place in `variable`, such as 'dataset1/data1'"
            )
        quantity = _text(entries[0][1]["what"].get("quantity", ""))
        parts = [_Decoded(data["item"], *_odim_rule(data["what"], quantity)) for _, data in entries]
        units = {"units": UNITS[quantity]} if quantity in UNITS else {}
        variables[name] = xarray.Variable(("time", "y", "x"), _lazy(_Stack(parts)), units)
    place = file["where"].attrs if "where" in file else {}
    projection = _text(place.get("projdef", ""))
    corner = _odim_corner(place, projection)
    shape = next(iter(variables.values())).shape
    places = _places(shape, place.get("yscale"), place.get("xscale"), "m", corner)
    is_placed = bool(projection) and (corner is not None or not places)
    attributes = {"projection": projection} if is_placed else {}
    return xarray.Dataset(variables, {"time": np.array(times, "datetime64[s]")} | places, attributes)


def _odim_corner(place: Any, projection: str) -> tuple[float, float] | None:
    """y and x of the north-western corner in the projection's metres; None where it is not stated, or pyproj is not
    installed: such maps lie nowhere on Earth."""
    if not projection or not {"UL_lon", "UL_lat"} <= set(place):
        return None
    try:
        from pyproj import CRS, Transformer
        from pyproj.exceptions import ProjError
    except ModuleNotFoundError:
        logger.warning("pyproj is missing, so that maps lose their place on Earth: pip install 'earthformer-hf[geo]'.")
        return None
    longitude, latitude = (_number(place[name]) for name in ("UL_lon", "UL_lat"))
    try:
        x, y = Transformer.from_crs("EPSG:4326", CRS.from_proj4(projection), always_xy=True).transform(
            longitude, latitude
        )
    except ProjError as problem:
        raise ValueError(f"states the projection {projection!r}, which cannot be used: {problem}") from None
    return (float(y), float(x)) if np.isfinite([y, x]).all() else None


def _odim_maps(file: Any, group: str | None) -> dict[str, list[tuple[np.datetime64, dict[str, Any]]]]:
    """Name -> the time, the stored array and the attributes of each of its maps."""
    maps: dict[str, list[tuple[np.datetime64, dict[str, Any]]]] = {}
    for dataset in _numbered(file, "dataset"):
        outer = _inherited(file["what"].attrs, dataset)
        for data in _numbered(dataset, "data"):
            what = _inherited(outer, data)
            date, time = (
                _text(what.get(end, what.get(name, ""))) for end, name in (("enddate", "date"), ("endtime", "time"))
            )
            when = np.datetime64(f"{date[:4]}-{date[4:6]}-{date[6:8]}T{time[:2]}:{time[2:4]}:{time[4:6]}", "s")
            place = data.name.strip("/")
            name = _text(what.get("quantity", "")) or place
            if group is not None:
                name = f"{place}/data".removeprefix(f"{group}/").removesuffix("/data") if _within(place, group) else ""
            if name:
                maps.setdefault(name, []).append((when, {"item": data["data"], "what": what, "place": place}))
    if group is not None and not maps:
        raise ValueError(f"`variable`: {file.filename} is a composite of ODIM without maps in {group!r}")
    several = [name for name, entries in maps.items() if len({when for when, _ in entries}) < len(entries)]
    for name in several:
        maps |= {entry[1]["place"]: [entry] for entry in maps.pop(name)}
    return maps


def _within(place: str, group: str) -> bool:
    return f"{place}/".startswith(f"{group}/")


def _places(
    shape: tuple[int, ...], height: Any, width: Any, units: str, corner: tuple[float, float] | None
) -> dict[str, Any]:
    """Coordinates of the centres of rows and columns by their spacing; none if it is not stated.

    Args:
        corner: y and x of the north-western corner of the map in its projection; where it is unknown, coordinates
            count from the middle of the pixel there.
    """
    if height is None or width is None:
        return {}
    spacings = -abs(_number(height)), abs(_number(width))
    begins = (0.0, 0.0) if corner is None else [edge + step / 2 for edge, step in zip(corner, spacings)]
    return {
        name: (
            name,
            begin + spacing * np.arange(size),
            {"units": units, "standard_name": f"projection_{name}_coordinate"},
        )
        for name, size, spacing, begin in zip("yx", shape[1:], spacings, begins)
    }


def _odim_rule(what: dict[str, Any], quantity: str) -> tuple[float, float, list[float], dict[float, float]]:
    """Gain, offset, stored values that are missing, and stored values that stand for others."""
    gain, offset = float(what.get("gain", 1)), float(what.get("offset", 0))
    missing = [float(what["nodata"])] if "nodata" in what else []
    if "undetect" not in what:
        return gain, offset, missing, {}
    code = float(what["undetect"])
    if quantity in RATES:
        return gain, offset, missing, {code: 0.0}
    if UNITS.get(quantity) == "dBZ":
        return gain, offset, missing, {code: LOWEST_DBZ}
    return gain, offset, [*missing, code], {}  # a quantity of echoes, such as a velocity, has no value without one


def _knmi_dataset(file: Any) -> Any:
    import xarray

    image = file["image1"]
    calibration = image["calibration"].attrs
    formula = _text(calibration["calibration_formulas"]).replace(" ", "")
    match = re.fullmatch(r"GEO=([-+.\deE]+)\*PV(?:\+?([-+.\deE]+))?", formula)
    if not match:
        raise ValueError(f"has the calibration {formula!r}, which is not of the form GEO=a*PV+b")
    missing = [
        float(np.ravel(calibration[name])[0])
        for name in ("calibration_out_of_image", "calibration_missing_data")
        if name in calibration
    ]
    parameter = _text(image.attrs.get("image_geo_parameter", "image"))  # such as REFLECTIVITY_[DBZ]
    name, unit = parameter.split("_")[0].lower() or "image", re.search(r"\[(.+)\]", parameter)
    values = _Decoded(image["image_data"], float(match[1]), float(match[2] or 0), missing, {})
    units = {} if unit is None else {"units": {"dbz": "dBZ", "mm": "mm"}.get(unit[1].lower(), unit[1])}
    array = xarray.Variable(("time", "y", "x"), _lazy(_Stack([values])), units)
    stamp = _text(file["overview"].attrs["product_datetime_end"])
    day, _, clock = stamp.partition(";")
    day_of_month, month, year = day.split("-")
    months = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
    when = np.datetime64(f"{year}-{months.index(month.upper()) + 1:02d}-{int(day_of_month):02d}T{clock[:8]}", "s")
    projection = file.get("geographic/map_projection")
    text = "" if projection is None else _text(projection.attrs.get("projection_proj4_params", ""))
    grid = file["geographic"].attrs if "geographic" in file else {}
    pixels_in = _text(grid.get("geo_dim_pixel", "")).split(",")[0].lower()
    height, width = (grid.get(f"geo_pixel_size_{axis}") for axis in "yx")
    rows, columns = (grid.get(f"geo_{axis}_offset") for axis in ("row", "column"))  # of the corner, in pixels
    corner = None
    if all(each is not None for each in (height, width, rows, columns)):
        corner = _number(height) * _number(rows), _number(width) * _number(columns)
    places = _places(array.shape, height, width, pixels_in, corner)
    is_placed = bool(text) and (corner is not None or not places)
    coordinates = {"time": np.array([when])} | places
    return xarray.Dataset({name: array}, coordinates, {"projection": text} if is_placed else {})


def _numbered(group: Any, stem: str) -> list[Any]:
    """Groups `stem`1, `stem`2, ... in the order of their numbers."""
    numbers = sorted(int(name[len(stem) :]) for name in group if re.fullmatch(rf"{stem}\d+", name))
    return [group[f"{stem}{number}"] for number in numbers]


def _inherited(above: Any, group: Any) -> dict[str, Any]:
    """Attributes of `what` of a group, and those of the groups above that it does not have."""
    return dict(above) | (dict(group["what"].attrs) if "what" in group else {})


def _number(value: Any) -> float:
    return float(np.ravel(value)[0])


def _text(value: Any) -> str:
    value = np.ravel(value)[0] if np.size(value) else ""
    return (value.decode("latin-1") if isinstance(value, bytes) else str(value)).strip("\0 ")


def _attributes(attributes: Any) -> dict[str, Any]:
    found = {name: attributes[name] for name in attributes if name not in ("REFERENCE_LIST", "CLASS", "NAME")}
    return {name: _text(value) if np.asarray(value).dtype.kind in "SO" else value for name, value in found.items()}


class _Decoded:
    """A stored map whose values are `gain * stored + offset`, NaN where missing; read when it is sliced."""

    def __init__(self, item: Any, gain: float, offset: float, missing: list[float], others: dict[float, float]):
        self.item, self.rule = item, (gain, offset, missing, others)
        self.shape, self.dtype = item.shape, np.dtype("float32")

    def __getitem__(self, key: Any) -> np.ndarray:
        gain, offset, missing, others = self.rule
        stored = np.asarray(self.item[key]).astype("float64")
        values = gain * stored + offset
        for code, value in others.items():
            values[stored == code] = value
        values[np.isin(stored, missing)] = np.nan
        return values.astype("float32")


class _Stack:
    """Maps of one shape along time."""

    def __init__(self, maps: list[_Decoded]):
        if any(part.shape != maps[0].shape for part in maps):
            raise ValueError(f"holds maps of several shapes {sorted({part.shape for part in maps})}")
        self.maps, self.shape, self.dtype = maps, (len(maps), *maps[0].shape), maps[0].dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key
        if isinstance(first, slice):
            chosen = [self.maps[n][tuple(rest)] for n in range(len(self.maps))[first]]
            return np.stack(chosen) if chosen else np.empty((0, *self.maps[0][tuple(rest)].shape), self.dtype)
        return self.maps[int(first)][tuple(rest)]


def _lazy(source: Any) -> Any:
    """What has a shape and a dtype and is read when it is sliced, for xarray."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Lazy(BackendArray):
        def __init__(self):
            self.shape, self.dtype = source.shape, source.dtype

        def __getitem__(self, key):
            support = indexing.IndexingSupport.BASIC
            return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

        def _read(self, key):
            # h5py takes no negative steps
            turned = tuple(
                slice(None, None, -1) if isinstance(k, slice) and (k.step or 1) < 0 else slice(None) for k in key
            )
            rising = tuple(_rising(k, n) if isinstance(k, slice) else k for k, n in zip(key, self.shape))
            values = np.asarray(source[rising])
            return values[tuple(t for t, k in zip(turned, key) if isinstance(k, slice))]

    return indexing.LazilyIndexedArray(Lazy())


def _rising(part: slice, size: int) -> slice:
    numbers = range(size)[part]
    if numbers.step < 0:
        numbers = numbers[::-1]
    return slice(numbers.start, numbers.stop, numbers.step) if len(numbers) else slice(0, 0)


__all__ = ["plain_dataset", "radar_dataset"]
