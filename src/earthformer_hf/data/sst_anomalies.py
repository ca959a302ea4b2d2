"""Sea-surface temperatures on their own grid -> monthly anomalies on the grid of the ocean models.

An anomaly is the difference from the mean of the same calendar month over a base period (WMO-No. 1203, "Guidelines on
the calculation of climate normals", 2017). The value of a node of the 5-degree grid is the mean of the source's cells
within 2.5 degrees of it, each weighed by the area that it shares with them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from .file_times import decode_times
from .guards import open_dataset


LATITUDES, LONGITUDES = np.arange(-55.0, 65, 5), np.arange(0.0, 360, 5)
NAMES = ("sst", "tos", "analysed_sst", "sea_surface_temperature", "thetao", "ssta")
LEAST_OBSERVED = 0.5  # share of a node's area that must be observed, else the node is missing


def sst_anomalies(source: str | Path, target: str | Path, base: tuple[int, int] = (1981, 2010)) -> int:
    """Write `ssta` (time, lat 24 = -55..60, lon 72 = 0..355), degrees Celsius, NaN on land, as NetCDF.

    Args:
        source: a file of monthly temperatures of the sea's surface: `sst`, `tos` or the one with that standard name,
            on any grid of latitudes and longitudes, in either order and direction, 0..360 or -180..180. Or of
            anomalies `ssta`, which become those of this grid and base period.
        target: of the anomalies.
        base: first and last year of the base period, each of whose months must be there at least 10 times, or in every
            year of a shorter period.

    Returns:
        how many of the nodes are sea.

    Raises:
        ValueError: a file without such a field or such months, temperatures that are none, or a base period that the
            file does not hold.
    """
    import xarray

    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"`target` must be another file than the source, got {target}.")
    with open_dataset(source, decode_times=False) as dataset:
        field = _temperature(decode_times(dataset), source)
        time = field["time"].values.astype("datetime64[M]")
        gaps = np.flatnonzero(np.diff(time) != np.timedelta64(1, "M"))
        if len(gaps):
            before, after = time[gaps[0]], time[gaps[0] + 1]
            raise ValueError(f"`source`: months of {source} must follow each other, {before} is followed by {after}.")
        values = _celsius(field, source)
        coarse = _on_nodes(values, field["lat"].values, field["lon"].values)
    years, months = time.astype("datetime64[Y]").astype(int) + 1970, time.astype(int) % 12
    within = (years >= base[0]) & (years <= base[1])
    least = min(10, base[1] - base[0] + 1)
    anomalies = np.empty_like(coarse)
    for month in range(12):
        chosen = within & (months == month)
        if chosen.sum() < least:
            raise ValueError(
                f"`base`: {source} holds {int(chosen.sum())} of the months {month + 1} of {base[0]}..{base[1]}, "
                f"{least} are needed; it has {years[0]}..{years[-1]}."
            )
        of_month = months == month
        normal = coarse[chosen].mean(0)  # NaN where a month of the base period is missing
        anomalies[of_month] = coarse[of_month] - normal
    observed = int(np.isfinite(anomalies).any(0).sum())
    attributes = {"units": "degC", "standard_name": "sea_surface_temperature_anomaly"}
    attributes["comment"] = f"anomalies from the monthly means of {base[0]}..{base[1]}, made of {Path(source).name}"
    coordinates = {"time": time.astype("datetime64[ns]"), "lat": LATITUDES, "lon": LONGITUDES}
    written = xarray.Dataset({"ssta": (("time", "lat", "lon"), anomalies.astype("float32"), attributes)}, coordinates)
    written.to_netcdf(target)
    return observed


def _temperature(dataset: Any, source: str | Path) -> Any:
    """The field as (time, lat, lon), whatever its names and order."""
    standard = [n for n, v in dataset.data_vars.items() if v.attrs.get("standard_name") == "sea_surface_temperature"]
    names = standard or [name for name in NAMES if name in dataset.data_vars]
    if not names:
        raise ValueError(
            f"`source`: {source} must hold one of {NAMES}, it holds {sorted(map(str, dataset.data_vars))}."
        )
    field = dataset[names[0]]
    roles = {}
    for role, words in {
        "time": ("time", "t"),
        "lat": ("lat", "latitude", "y"),
        "lon": ("lon", "longitude", "x"),
    }.items():
        found = [dim for dim in field.dims if str(dim).lower() in words]
        if not found:
            raise ValueError(f"`source`: {names[0]!r} of {source} must have time, lat and lon, got {field.dims}.")
        roles[found[0]] = role
    others = [dim for dim in field.dims if dim not in roles]
    if any(field.sizes[dim] > 1 for dim in others):
        raise ValueError(
            f"`source`: {names[0]!r} of {source} must have time, lat and lon alone, got {dict(field.sizes)}."
        )
    if min(field.sizes[dim] for dim, role in roles.items() if role != "time") < 2:
        raise ValueError(
            f"`source`: {names[0]!r} of {source} must have two latitudes and longitudes or more, got "
            f"{dict(field.sizes)}."
        )
    field = field.squeeze(others, drop=True).rename({dim: role for dim, role in roles.items() if dim != role})
    if field["time"].dtype.kind != "M":
        raise ValueError(f"`source`: the times of {source} must be dates, got {field['time'].dtype}.")
    return field.transpose("time", "lat", "lon").sortby(["lat", "lon"])


def _celsius(field: Any, source: str | Path) -> np.ndarray:
    values = field.values.astype("float64")
    units = str(field.attrs.get("units", "")).lower()
    if units in ("k", "kelvin", "degree_kelvin", "degrees_kelvin"):
        values = values - 273.15
    known = values[np.isfinite(values)]
    if not len(known):
        raise ValueError(f"`source`: {source} holds nothing but missing values.")
    if known.min() < (-12 if field.name == "ssta" else -5) or known.max() > 45:
        raise ValueError(
            f"`source`: {source} holds {known.min():g}..{known.max():g}, units {units!r}: no temperatures of the sea "
            "in degrees Celsius; state kelvin, or the missing value, in the file."
        )
    return values


def _on_nodes(values: np.ndarray, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """(T, H, W) on rising latitudes and longitudes -> (T, 24, 72), NaN where too little was observed."""
    rows = _overlaps(_edges(lat, -90, 90), LATITUDES, np.sin)
    turns = [_overlaps(_edges(lon) + turn, LONGITUDES, np.array) for turn in (-360, 0, 360)]
    columns = np.sum(turns, axis=0)
    known = np.isfinite(values)
    total = rows @ np.where(known, values, 0) @ columns.T
    weight = rows @ known.astype("float64") @ columns.T
    heights = np.sin(np.deg2rad(LATITUDES + 2.5)) - np.sin(np.deg2rad(LATITUDES - 2.5))
    whole = heights[:, None] * np.deg2rad(np.full(len(LONGITUDES), 5.0))  # of the nodes themselves
    return np.where(weight >= LEAST_OBSERVED * whole, total / np.maximum(weight, 1e-12), np.nan)


def _edges(centres: np.ndarray, lowest: float = -np.inf, highest: float = np.inf) -> np.ndarray:
    """Of cells around rising centres, in degrees."""
    inner = (centres[1:] + centres[:-1]) / 2
    edges = np.concatenate([[2 * centres[0] - inner[0]], inner, [2 * centres[-1] - inner[-1]]])
    return np.clip(edges, lowest, highest)


def _overlaps(edges: np.ndarray, nodes: np.ndarray, measure: Any) -> np.ndarray:
    """By how much each source cell lies within 2.5 degrees of each node, (nodes, cells)."""
    low = np.maximum(edges[None, :-1], nodes[:, None] - 2.5)
    high = np.minimum(edges[None, 1:], nodes[:, None] + 2.5)
    return np.where(high > low, measure(np.deg2rad(high)) - measure(np.deg2rad(low)), 0.0)


__all__ = ["LATITUDES", "LONGITUDES", "NAMES", "sst_anomalies"]
