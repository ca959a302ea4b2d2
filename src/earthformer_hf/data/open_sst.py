"""Open sea-surface-temperature anomalies (Kaplan, ERSSTv5) on the 5-degree grid of ICAR-ENSO.

File: `ssta` (time, lat 24 = -55..60, lon 72 = 0..355) in degrees Celsius, NaN on land and where the source has no
data. Splits are years, with gaps longer than a window between them: training to 1974, validation 1977-1990, test
1993-2014.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .events import EventBuilder, EventConfig, Facts
from .folder import FolderConfig
from .gridded_file import GriddedFile
from .sst_anomalies import LATITUDES, LONGITUDES


logger = logging.get_logger(__name__)

SPLITS = {"train": (1856, 1974), "val": (1977, 1990), "test": (1993, 2014)}
CROP = (0, 24, 19, 67)  # rows and columns: all latitudes, longitudes 95..330, as in ICAR-ENSO
HIGHEST = 12.0  # degrees Celsius; no node of 5 degrees was ever farther from its normal
HOW_TO_CONVERT = "Temperatures become such anomalies by: earthformer-hf data sst-anomalies IN OUT --base 1981-2010"
NINO34 = (slice(10, 13), slice(19, 30))  # rows and columns of the crop: latitude -5..5, longitude 190..240


@dataclass
class OpenSstConfig(EventConfig):
    """Options of the open record.

    Args:
        file: name of the NetCDF file in `data_dir`.
        years: first and last year of each split. ERSSTv5 (2010-2020), say, has only {"test": (2010, 2020)}.
    """

    file: str = "sst_kaplan_1856_2014.nc"
    years: dict[str, tuple[int, int]] = field(default_factory=lambda: dict(SPLITS))


class OpenSst(EventBuilder):
    """The months of a split as one event; `values` (T, 24, 48), series "nino34" (T,)."""

    NAME = "open-sst"
    BUILDER_CONFIG_CLASS = OpenSstConfig
    FACTS = Facts(
        variable="sea-surface temperature anomaly",
        units="degC",
        coding="NaN on land and outside the source",
        time_step="1M",
        grid="24 x 48 at 5 degrees: latitude -55..60, longitude 95..330",
        licence="no restrictions of use (NOAA PSL)",
        citation="Kaplan Extended SST v2 (Kaplan et al., 1998); NOAA ERSSTv5 (Huang et al., 2017)",
        splits="by year: train 1856-1974, val 1977-1990, test 1993-2014, gaps longer than a window between them",
        source="https://psl.noaa.gov/data/gridded/data.kaplan_sst.html",
        feature_extractor={"scale": 0.3, "fill_value": 0},
    )

    @classmethod
    def watched_files(cls, data_dir: Path, options: Mapping[str, Any]) -> Iterator[str]:
        path = data_dir / options.get("file", cls.BUILDER_CONFIG_CLASS.file)
        yield from [str(path)] if path.exists() else []

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name in self.SPLITS if name in self.config.years)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        path, (first, last) = Path(self.config.data_dir) / self.config.file, self.config.years[split]
        months = _months(path, first, last)
        yield {
            "id": f"{path.stem}:{split}",
            "time": months["time"],
            "geo": {name: places.tolist() for name, places in months["geo"].items()},
            "reference": {"path": str(path), "first": first, "last": last},
        }

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        path, first, last = (reference[name] for name in ("path", "first", "last"))
        months = _cached_months(path, first, last, os.stat(path).st_mtime_ns)
        return {name: months[name] for name in ("values", "series")}


def _months(path: str | Path, first: int, last: int) -> dict[str, Any]:
    """The event of the months of some years, without its id."""
    record = _record(Path(path))
    years = record["time"].astype("datetime64[Y]").astype(int) + 1970
    chosen = (years >= first) & (years <= last)
    if not chosen.any():
        raise ValueError(f"`split`: {path} holds no month of {first}..{last}.")
    values = record["values"][chosen]
    _check_anomalies(values, record["time"][chosen], path)
    series = {"nino34": nino34(values)}
    return {"time": record["time"][chosen], "values": values, "geo": record["geo"], "series": series}


def _record(path: Path) -> dict[str, Any]:
    """All months of a file: dimensions by their names, latitudes and longitudes in rising order from 95 to 330.

    Raises:
        ValueError: no such field, another grid, or months that do not follow each other.
    """
    try:
        grid = GriddedFile(str(path), FolderConfig(variable="ssta").layout)
    except ValueError as reason:
        raise ValueError(
            f"`path`: {path} must hold `ssta` (time, lat 24, lon 72): {reason} {HOW_TO_CONVERT}"
        ) from None
    if [name for name in grid.arrays[0].dims if name in grid.order] != grid.order:
        logger.warning(f"{path}: {grid.arrays[0].dims} of `ssta` is put in the order {tuple(grid.order)}, by name.")
    dates, values = grid.dates(), grid.read(slice(None)).astype("float32")
    if dates is None or dates.dtype.kind != "M":
        raise ValueError(f"`path`: {path} must have dates along {grid.order[0]!r} of `ssta`, it has none.")
    days = np.atleast_1d(dates.values).astype("datetime64[D]")
    time = days.astype("datetime64[M]")
    for index in np.flatnonzero(np.diff(time) != np.timedelta64(1, "M")).tolist():
        raise ValueError(
            f"`path`: months of {path} must follow each other, {days[index]} is followed by {days[index + 1]}."
        )
    places = {"lat": np.array(grid.geo.get("y", [])), "lon": np.array(grid.geo.get("x", [])) % 360}
    expected = {"lat": LATITUDES, "lon": LONGITUDES}
    orders = {name: np.argsort(found) for name, found in places.items()}
    for name, nodes in expected.items():
        found = places[name][orders[name]]
        if len(found) != len(nodes) or not np.allclose(found, nodes):
            held = f"{len(found)} from {found[0]:g} to {found[-1]:g}" if len(found) else "none"
            wanted = f"{nodes[0]:g}, {nodes[1]:g} .. {nodes[-1]:g}"
            raise ValueError(
                f"`path`: {path} must hold `ssta` (time, lat 24, lon 72); {name} of it must be {wanted}, got {held}. "
                f"{HOW_TO_CONVERT}"
            )
        if (np.diff(orders[name]) != 1).any():
            logger.warning(f"{path}: {name} is put in rising order from {nodes[0]:g} to {nodes[-1]:g}.")
    top, bottom, left, right = CROP
    values = values[:, orders["lat"][top:bottom]][:, :, orders["lon"][left:right]]
    geo = {"lat": expected["lat"][top:bottom], "lon": expected["lon"][left:right]}
    return {"time": time, "values": values, "geo": geo}


def _check_anomalies(values: np.ndarray, time: np.ndarray, path: str | Path):
    """Refuse what is no anomaly of the sea's temperature, and months without a value in the region of the index."""
    known = values[np.isfinite(values)]
    if len(known) and np.abs(known).max() > HIGHEST:
        raise ValueError(
            f"`path`: {path} must hold anomalies within {HIGHEST:g} degC of 0, it holds {known.min():g} to "
            f"{known.max():g}: a missing value that the file does not state, or temperatures. {HOW_TO_CONVERT}"
        )
    empty = np.flatnonzero(~np.isfinite(values[:, *NINO34]).any((1, 2)))
    if len(empty):
        raise ValueError(f"`path`: {path} holds no value of {time[empty[0]]} in the region of Nino3.4.")


@lru_cache(8)
def _cached_months(path: str, first: int, last: int, changed: int) -> dict[str, Any]:
    return _months(path, first, last)


def nino34(values: np.ndarray) -> np.ndarray:
    """The Nino3.4 index of maps (..., 24, 48): their plain mean over latitude -5..5, longitude 190..240."""
    return np.nanmean(values[(..., *NINO34)], axis=(-2, -1))


def three_month_means(index: np.ndarray) -> np.ndarray:
    """Moving means of months k, k+1, k+2 along the last axis: (..., T) -> (..., T - 2)."""
    return (index[..., :-2] + index[..., 1:-1] + index[..., 2:]) / 3


__all__ = ["OpenSst", "OpenSstConfig", "nino34", "three_month_means"]
