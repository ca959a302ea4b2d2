"""Coastlines and borders of Natural Earth, where cartopy is installed and has them."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from xarray import Dataset

LINES = (("physical", "coastline"), ("cultural", "admin_0_boundary_lines_land"))


@lru_cache(maxsize=1)
def natural_earth() -> tuple[np.ndarray, ...]:
    """Lines of (n, 2) longitudes and latitudes; none without cartopy, or where it cannot fetch them."""
    try:
        from cartopy.io import shapereader

        found = []
        for category, name in LINES:
            for geometry in shapereader.Reader(shapereader.natural_earth("50m", category, name)).geometries():
                found += [np.array(line.coords)[:, :2] for line in getattr(geometry, "geoms", [geometry])]
        return tuple(found)
    except Exception:  # not installed, offline, or a damaged cache: the map is drawn without
        return ()


def coastlines(dataset: "Dataset", extent: tuple[float, float, float, float], unit: str) -> list[np.ndarray]:
    """Lines (n, 2) on a map's axes; empty where the map's place on Earth is unknown.

    Args:
        dataset: whose coordinate `crs` says the projection of a map in kilometres.
        extent, unit: of a [`~earthformer_hf.plotting.fields.Map`].
    """
    place = None
    if unit == "degrees":
        west = extent[0]

        def place(line: np.ndarray) -> np.ndarray:
            return np.stack([(line[:, 0] - west) % 360 + west, line[:, 1]], axis=1)

    elif unit == "km":
        place = _projection(dataset)
    if place is None:
        return []
    return [_broken(place(line), extent) for line in natural_earth()]


def _projection(dataset: "Dataset") -> Any:
    """From longitudes and latitudes to kilometres; None if the dataset does not say how."""
    attributes = dataset["crs"].attrs if "crs" in dataset.variables else {}
    text = attributes.get("crs_wkt") or attributes.get("spatial_ref")
    if not text:
        return None
    try:
        from pyproj import Transformer

        transformer = Transformer.from_crs("OGC:CRS84", text, always_xy=True)
    except Exception:  # not installed, or a text that it does not know
        return None
    return lambda line: np.stack(transformer.transform(line[:, 0], line[:, 1]), axis=1) / 1000


def _broken(line: np.ndarray, extent: tuple[float, float, float, float]) -> np.ndarray:
    """A line with gaps where it would jump across the map, as at the date line."""
    width = abs(extent[1] - extent[0])
    jumps = np.flatnonzero(~(np.abs(np.diff(line[:, 0])) < 0.5 * width)) + 1
    return np.insert(np.where(np.isfinite(line), line, np.nan), jumps, np.nan, axis=0)


__all__ = ["coastlines", "natural_earth"]
