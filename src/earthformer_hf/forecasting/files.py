"""Forecasts as files: NetCDF, Zarr and cloud-optimised GeoTIFF, each whole or not there."""

import itertools
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sharing.files import check_writable


if TYPE_CHECKING:
    from xarray import Dataset

ENDINGS = (".nc", ".zarr", ".tif", ".tiff")


def check_target(path: str | Path, overwrite: bool = False) -> Path:
    """Refuse, before a forecast is made, a file that could not be written.

    Raises:
        ValueError: another ending than `.nc`, `.zarr`, `.tif` and `.tiff`; something is there already, and
            `overwrite` is not said; a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"`out` must end in one of {ENDINGS}, got {path.name!r}.")
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"`out`: {path} is there already; `overwrite` replaces it.")
    check_writable(path.parent)
    return path


def save(dataset: "Dataset", path: str | Path, overwrite: bool = False) -> None:
    """Write a forecast; a failure leaves what was there before, and nothing else.

    Args:
        dataset: of [`~earthformer_hf.forecasting.forecast`].
        path: `.nc`; `.zarr` (version 3); or `.tif`, a cloud-optimised GeoTIFF of the chances if there are any, else
            of the mean or of the only forecast, a band for each threshold and time.
        overwrite: replace what is there.

    Raises:
        ValueError: see [`check_target`]; a GeoTIFF of a forecast without coordinates or of members alone.
    """
    path = check_target(path, overwrite)
    writers: dict[str, Callable[[Any, Path], None]] = {".nc": _netcdf, ".zarr": _zarr}
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        writers.get(path.suffix.lower(), _geotiff)(dataset, part)
        _put(part, path, overwrite)
    except FileExistsError:
        raise ValueError(f"`out`: {path} came into being meanwhile; `overwrite` replaces it.") from None
    except (OSError, RuntimeError) as reason:  # the NetCDF library's own errors are the latter
        words = getattr(reason, "strerror", None) or f"{reason}; is the disk full?"
        raise ValueError(f"`out`: {path} cannot be written: {words}.") from reason
    finally:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def _put(part: Path, path: Path, overwrite: bool) -> None:
    """Give a finished file or folder its name, at once; without `overwrite` only if nothing has it."""
    if not overwrite and part.is_file():
        os.link(part, path)  # fails where something is, unlike a renaming
    elif overwrite and path.is_dir():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
        part.rename(path)
        shutil.rmtree(old)
    elif not overwrite and os.path.lexists(path):
        raise FileExistsError
    else:
        part.replace(path)  # of a folder: fails where one with content is


def open_forecast(path: str | Path, start: str | None = None) -> "Dataset":
    """A forecast that was saved, read when it is needed.

    Args:
        path: `.nc` or `.zarr`.
        start: of an archive's forecasts, from when; the last one if omitted.

    Raises:
        ValueError: another file, or a start that the archive does not hold.
    """
    import xarray

    path = Path(path)
    options: dict[str, Any] = {"engine": "zarr", "consolidated": False} if path.suffix.lower() == ".zarr" else {}
    try:
        dataset = xarray.open_dataset(path, decode_timedelta=True, **options)
    except (OSError, ValueError, KeyError) as reason:
        known = "does not exist" if not path.exists() else f"is no forecast in .nc or .zarr: {reason}"
        raise ValueError(f"`path`: {path} {known}.") from None
    starts = dataset.coords.get("forecast_reference_time")
    if starts is None or not starts.ndim:
        if start is not None:
            raise ValueError(f"`start` is for an archive's forecasts, {path} holds one.")
        return dataset
    try:
        chosen = -1 if start is None else int(np.flatnonzero(starts.values == np.datetime64(start))[0])
    except (ValueError, IndexError):
        ends = f"{str(starts.values[0])[:16]} .. {str(starts.values[-1])[:16]}"
        raise ValueError(f"`start`: {path} holds forecasts from {ends}, got {start!r}.") from None
    return dataset.isel(forecast_reference_time=chosen)


def _netcdf(dataset: Any, path: Path) -> None:
    dataset.to_netcdf(path)


def _zarr(dataset: Any, path: Path) -> None:
    plain = dataset.copy()
    for name in plain.variables:
        plain[name].encoding = {key: value for key, value in plain[name].encoding.items() if key in ("units", "dtype")}
    with warnings.catch_warnings():  # of metadata in one place, which is no part of version 3 yet
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        plain.to_zarr(path, zarr_format=3, consolidated=True)


def _geotiff(dataset: Any, path: Path) -> None:
    try:
        import rioxarray  # noqa: F401
        from pyproj import CRS
    except ModuleNotFoundError:
        raise ValueError(
            "`out`: a GeoTIFF needs rioxarray; install it with pip install 'earthformer-hf[geo]'."
        ) from None
    names = ["exceedance_probability", *(name for name in dataset.data_vars if str(name).endswith("_mean"))]
    names += [name for name, array in dataset.data_vars.items() if array.ndim == 3 and name != "quality_flag"]
    found = next((name for name in names if name in dataset.data_vars), None)
    if found is None:
        raise ValueError("`out`: a GeoTIFF holds chances, a mean, or one forecast; ask for `thresholds` or `mean`.")
    array = dataset[found]
    y, x = array.dims[-2:]
    if "crs" not in dataset.coords:
        raise ValueError("`out`: a GeoTIFF needs a coordinate reference system; state it by `crs`.")
    labels = [" ".join([str(found), *place]) for place in _places(array)]
    bands = (
        array.stack(band=array.dims[:-2])
        .transpose("band", y, x)
        .drop_vars(["band", *array.dims[:-2]], errors="ignore")
    )
    bands.attrs, bands.encoding = {}, {}
    bands = bands.assign_coords(band=range(1, len(labels) + 1)).rio.set_spatial_dims(x, y)
    attributes = dataset["crs"].attrs
    stated = {"grid_mapping_name", "crs_wkt"} & set(attributes)
    bands = bands.rio.write_crs(CRS.from_cf(attributes) if stated else attributes["spatial_ref"])
    bands.attrs |= {"long_name": tuple(labels), "units": array.attrs["units"]}
    bands.rio.to_raster(path, driver="COG", compress="DEFLATE", tags=dataset.attrs)


def _places(array: Any) -> list[tuple[str, ...]]:
    """The coordinates of each band in words, such as "threshold 10" and "+20 min"."""
    sides = []
    for name in array.dims[:-2]:
        values = array[name].values
        if values.dtype.kind == "m":
            sides.append([f"+{value / np.timedelta64(1, 'm'):g} min" for value in values])
        else:
            sides.append([f"{name} {value:g}" for value in values])
    return list(itertools.product(*sides))


__all__ = ["ENDINGS", "check_target", "open_forecast", "save"]
