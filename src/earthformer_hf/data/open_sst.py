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

from .events import EventBuilder, EventConfig, Facts
from .guards import open_dataset


SPLITS = {"train": (1856, 1974), "val": (1977, 1990), "test": (1993, 2014)}
CROP = (0, 24, 19, 67)  # rows and columns: all latitudes, longitudes 95..330, as in ICAR-ENSO
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
    top, bottom, left, right = CROP
    with open_dataset(path) as dataset:
        if "ssta" not in dataset or dict(dataset.ssta.sizes) | {"time": 0} != {"time": 0, "lat": 24, "lon": 72}:
            found = dict(dataset.ssta.sizes) if "ssta" in dataset else list(dataset.data_vars)
            raise ValueError(f"`path`: {path} must hold `ssta` (time, lat 24, lon 72), found {found}.")
        grid = {"lat": np.arange(-55, 65, 5), "lon": np.arange(0, 360, 5)}
        for name, expected in grid.items():
            if not np.allclose(dataset[name], expected):
                raise ValueError(f"`path`: {name} of {path} must be {expected[0]}, {expected[1]} .. {expected[-1]}.")
        part = dataset.ssta.isel(lat=slice(top, bottom), lon=slice(left, right))
        part = part.sel(time=(part.time.dt.year >= first) & (part.time.dt.year <= last))
        if part.sizes["time"] == 0:
            raise ValueError(f"`split`: {path} holds no month of {first}..{last}.")
        values = part.values.astype("float32")
        return {
            "time": part.time.values.astype("datetime64[M]"),
            "values": values,
            "geo": {"lat": part.lat.values, "lon": part.lon.values},
            "series": {"nino34": nino34(values)},
        }


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
