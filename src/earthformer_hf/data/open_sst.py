"""Open sea-surface-temperature anomalies (Kaplan, ERSSTv5) on the 5-degree grid of ICAR-ENSO.

File: `ssta` (time, lat 24 = -55..60, lon 72 = 0..355) in degrees Celsius, NaN on land and where the source has no
data. Splits are years, with gaps longer than a window between them: training to 1974, validation 1977-1990, test
1993-2014.
"""

from pathlib import Path

import numpy as np


SPLITS = {"train": (1856, 1974), "val": (1977, 1990), "test": (1993, 2014)}
CROP = (0, 24, 19, 67)  # rows and columns: all latitudes, longitudes 95..330, as in ICAR-ENSO
NINO34 = (slice(10, 13), slice(19, 30))  # rows and columns of the crop: latitude -5..5, longitude 190..240


def load_events(path: str | Path, split: str | None = None) -> list[dict]:
    """One event, the months of a split or all: `values` (T, 24, 48) anomalies in degrees Celsius, NaN where missing.

    Raises:
        ValueError: an unknown split, no month of it in the file, or a file of another grid.
    """
    import xarray as xr

    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` must be one of {sorted(SPLITS)}, got {split!r}.")
    top, bottom, left, right = CROP
    with xr.open_dataset(path) as dataset:
        if "ssta" not in dataset or dict(dataset.ssta.sizes) | {"time": 0} != {"time": 0, "lat": 24, "lon": 72}:
            found = dict(dataset.ssta.sizes) if "ssta" in dataset else list(dataset.data_vars)
            raise ValueError(f"`path`: {path} must hold `ssta` (time, lat 24, lon 72), found {found}.")
        grid = {"lat": np.arange(-55, 65, 5), "lon": np.arange(0, 360, 5)}
        for name, expected in grid.items():
            if not np.allclose(dataset[name], expected):
                raise ValueError(f"`path`: {name} of {path} must be {expected[0]}, {expected[1]} .. {expected[-1]}.")
        part = dataset.ssta.isel(lat=slice(top, bottom), lon=slice(left, right))
        first, last = SPLITS.get(split or "", (-10_000, 10_000))
        part = part.sel(time=(part.time.dt.year >= first) & (part.time.dt.year <= last))
        if part.sizes["time"] == 0:
            raise ValueError(f"`split`: {path} holds no month of {first}..{last}.")
        return [
            {
                "id": f"{Path(path).stem}:{split or 'all'}",
                "time": part.time.values.astype("datetime64[M]"),
                "values": part.values.astype("float32"),
                "geo": {"lat": part.lat.values, "lon": part.lon.values},
            }
        ]


def nino34(values: np.ndarray) -> np.ndarray:
    """The Nino3.4 index of maps (..., 24, 48): their plain mean over latitude -5..5, longitude 190..240."""
    return np.nanmean(values[(..., *NINO34)], axis=(-2, -1))


def three_month_means(index: np.ndarray) -> np.ndarray:
    """Moving means of months k, k+1, k+2 along the last axis: (..., T) -> (..., T - 2)."""
    return (index[..., :-2] + index[..., 1:-1] + index[..., 2:]) / 3
