"""ICAR-ENSO: sea-surface temperature anomalies of climate models, whole simulations as one event each.

Published for the "AI Earth" challenge of Tianchi, 2021, by the Institute for Climate and Application Research (ICAR);
used as in Gao et al., "Earthformer", NeurIPS 2022, section 4.3.

```
<data_dir>/CMIP_train.nc   sst (year, month, lat, lon), degrees Celsius
<data_dir>/CMIP_label.nc   nino (year, month): the Nino3.4 index
```

A row holds 36 months of a model, and the next row begins 12 months later; rows of a model follow one another:

```
row 0  |--36 months--|                       the record is made of rows 0, 3, 6, .. and of what
row 1      |--36 months--|                   the last row holds beyond them
row 2          |--36 months--|
row 3                |--36 months--|
```
"""

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .events import EventBuilder, Facts
from .frames import LazyFrames
from .guards import open_dataset


FILES = {"sst": "CMIP_train.nc", "nino": "CMIP_label.nc"}  # by the variable they hold
ARCHIVES = (("CMIP6", 15, 151), ("CMIP5", 17, 140))  # models, and rows of each, in the order of the rows
MONTHS = 36  # of a row
WEST, EAST = 95, 330  # longitudes of the crop, both included
LOWEST, HIGHEST = -16.549121856689453, 10.198975563049316  # of both archives, degrees Celsius


class IcarEnso(EventBuilder):
    """Models of a split; `values` (T, 24, 48), series "nino34" (T,) from the file of labels.

    The last model is for testing, the one before it for validation, all others for training. The files name no
    calendar: `time` counts from the first month as January of the year 1.
    """

    NAME = "icar-enso"
    FACTS = Facts(
        variable="sea-surface temperature anomaly",
        units="degC",
        coding="float32, none missing",
        time_step="1M",
        grid="24 x 48 at 5 degrees: latitude -55..60, longitude 95..330",
        licence="not stated in the files; by registration with the challenge",
        citation="Institute for Climate and Application Research, AI Earth challenge, Tianchi 2021",
        splits="by model: train 15 of CMIP6 and 15 of CMIP5, val the 16th and test the 17th of CMIP5 (the released "
        "loader of Earthformer)",
        source="https://tianchi.aliyun.com/dataset/dataDetail?dataId=98942, enso_round1_train_20210201.zip",
        feature_extractor={"offset": LOWEST, "scale": 1 / (HIGHEST - LOWEST)},
    )

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        files = {name: str(Path(self.config.data_dir) / file) for name, file in FILES.items()}
        geo = _check(files)
        models, first = [], 0
        for archive, num_models, rows in ARCHIVES:
            for model in range(1, num_models + 1):
                models.append((f"{archive}:{model:02}", {"files": files, "first": first, "rows": rows}))
                first += rows
        parts = {"train": models[:-2], "val": models[-2:-1], "test": models[-1:]}
        for name, reference in parts[split]:
            problem = _missing(reference)
            if problem:
                yield {"id": name, "problem": problem}
                continue
            months = np.datetime64("0001-01", "M") + np.arange(_length(reference))
            yield {"id": name, "time": months, "geo": geo, "reference": reference}

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        values = LazyFrames((_length(reference), 24, 48), "float32", partial(_maps, reference))
        return {"values": values, "series": {"nino34": _record(reference, "nino")}}


def _length(reference: dict[str, Any]) -> int:
    return 12 * reference["rows"] + MONTHS - 12


def unfold(rows: np.ndarray) -> np.ndarray:
    """Rows (n, 36, ...) of a model, each 12 months after the one before -> its months (12 n + 24, ...)."""
    whole = rows[::3].reshape(-1, *rows.shape[2:])  # (months, ...)
    rest = 12 * ((len(rows) - 1) % 3)
    return np.concatenate([whole, rows[-1, MONTHS - rest :]])


def _check(files: dict[str, str]) -> dict[str, list[float]]:
    """Latitudes and longitudes of the crop.

    Raises:
        ValueError: a file that is missing or crafted, or that does not hold what is expected of it.
    """
    time = {"year": sum(num_models * rows for _, num_models, rows in ARCHIVES), "month": MONTHS}
    for name, sizes in {"nino": time, "sst": time | {"lat": 24, "lon": 48}}.items():
        with open_dataset(files[name]) as dataset:
            found = _variable(dataset, name)
            if found is None or dict(found.sizes) != sizes or list(found.dims) != list(sizes):
                raise ValueError(
                    f"{files[name]} must hold {name!r} of {sizes}, with longitudes in {WEST}..{EAST}, "
                    f"found {list(dataset.data_vars) if found is None else dict(found.sizes)}."
                )
    return {name: found[name].values.tolist() for name in ("lat", "lon")}


def _variable(dataset: Any, name: str) -> Any:
    """The maps, cropped, or the index; None if the file lacks what is needed."""
    if name not in dataset or (name == "sst" and not {"lat", "lon"} <= set(dataset.coords)):
        return None
    return dataset[name].sel(lon=(dataset.lon >= WEST) & (dataset.lon <= EAST)) if name == "sst" else dataset[name]


def _rows(reference: dict[str, Any], name: str) -> np.ndarray:
    """Rows of a model, maps (n, 36, 24, 48) or the index (n, 36), float32."""
    with open_dataset(reference["files"][name]) as dataset:
        rows = slice(reference["first"], reference["first"] + reference["rows"])
        return _variable(dataset, name).isel(year=rows).values.astype("float32")


def _missing(reference: dict[str, Any]) -> str | None:
    """Where a model lacks values, which none may."""
    for name, path in reference["files"].items():
        rows = _rows(reference, name)
        holes = np.isnan(rows).reshape(len(rows), -1).sum(1)  # of each row
        if holes.any():
            row = int(np.flatnonzero(holes)[0])
            return f"{path}, row {reference['first'] + row}: {holes[row]} of {rows[row].size} values are missing"
    return None


def _maps(reference: dict[str, Any], numbers: range) -> np.ndarray:
    return _record(reference, "sst")[numbers]


def _record(reference: dict[str, Any], name: str) -> np.ndarray:
    """The months of a model, maps (T, 24, 48) or the index (T,), float32; kept in memory, 270 MB for all models."""
    path = reference["files"][name]
    return _kept_record(path, name, reference["first"], reference["rows"], os.stat(path).st_mtime_ns)


@lru_cache(64)
def _kept_record(path: str, name: str, first: int, rows: int, changed: int) -> np.ndarray:
    return unfold(_rows({"files": {name: path}, "first": first, "rows": rows}, name))


__all__ = ["ARCHIVES", "IcarEnso", "unfold"]
