"""Open radar mosaics (MRMS, FMI, KNMI, OPERA) in HDF5 files, cut into tiles.

File: one group per source with `code` (T, H, W) uint8, `time` (T,), empty where undated, and `tiles_train`,
`tiles_val`, `tiles_test` (n, 2) rows of tile origins (y, x); a data set `vil_lut` (256,).
`code`: 0 no echo; 64..254 reflectivity, dBZ = 0.5 * code - 32; 255 no coverage; rain rate from Z = 200 R^1.6.
`vil_lut` maps a code to a *proxy code* 0..254, coded like SEVIR's vertically integrated liquid but a monotone function
of surface rain: a proxy, not a measurement of it. Here 255 stays "no coverage" in the proxy code too.
Splits share no event and no region.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .events import EventBuilder, EventConfig, Facts
from .guards import open_hdf5
from .tiles import tile_corners


MISSING = 255


def rain_rate(code: np.ndarray) -> np.ndarray:
    """Rain rate in mm/h, float32, of the stored code (Z = 200 R^1.6); NaN where there is no coverage."""
    rain = (10 ** ((0.5 * code.astype("float32") - 32) / 10) / 200) ** (1 / 1.6)
    return np.where(code == 0, 0, np.where(code == MISSING, np.nan, rain)).astype("float32")


def stored_code(rain: np.ndarray) -> np.ndarray:
    """The stored code, uint8, of rain rates in mm/h: the inverse of `rain_rate`, to half a dB."""
    reflectivity = 10 * np.log10(np.maximum(200 * np.nan_to_num(rain).astype("float64") ** 1.6, 1e-9))
    code = np.clip(np.round(2 * (reflectivity + 32)), 0, 254)
    code = np.where(reflectivity < -1e-3, 0, code)  # a rain rate in float32 is as exact as that
    return np.where(np.isnan(rain), MISSING, code).astype("uint8")


def rain_table() -> list[list[float]]:
    """The proxy codes, and the rain rates in mm/h that they stand for: two rising rows.

    This is the one definition of the table that feature extractors and recipes for these data carry as numbers.

    A stored code's liquid water, 3.44e-6 Z^(4/7) kg/m3 throughout 7 km (Greene and Clark, "Vertically integrated
    liquid water", Monthly Weather Review 100, 1972), up to 60 dBZ, coded as SEVIR codes VIL. Several stored codes may
    share a proxy code, which stands for their mean rate.
    """
    code = np.arange(64, 185)  # 0 to 60 dBZ
    liquid = 7000 * 3.44e-6 * 10 ** (4 / 7 * (0.05 * code - 3.2))  # kg/m2
    proxy = np.where(liquid <= 0.18, 90.66 * liquid + 2, 38.9 * np.log(liquid) + 83.9).astype(int)
    code, proxy = code[proxy >= 5], proxy[proxy >= 5]  # less is coded as no rain
    rates = {int(value): float(rain_rate(code[proxy == value]).mean()) for value in np.unique(proxy)}
    return [[0, *rates], [0, *rates.values()]]


@dataclass
class OpenRadarConfig(EventConfig):
    """Options of the open radar mosaics.

    Args:
        file: name of the HDF5 file in `data_dir`: "radar_open_3km.h5", every 2 minutes; "radar_open_10min_3km.h5",
            storms every 10; "radar_open_5min_3km.h5", winter evenings every 5, whose sources are "knmi"; or another.
        sources: prefixes of the groups to read.
        every: further tiles at every so many pixels, wherever the four surrounding tiles belong to the split.
        tile: height and width of other tiles, which cover the whole mosaic; only of mosaics of a single split, in
            which the file lists a tile.
    """

    file: str = "radar_open_3km.h5"
    sources: tuple[str, ...] = ("mrms",)
    every: int | None = None
    tile: tuple[int, int] | None = None


class OpenRadar(EventBuilder):
    """Tiles of a split; `values` (T, tile, tile) are proxy codes, views of one mosaic in memory."""

    NAME = "open-radar"
    BUILDER_CONFIG_CLASS = OpenRadarConfig
    FACTS = Facts(
        variable="rain-derived proxy code (a monotone function of surface rain, coded like SEVIR's VIL)",
        units="1",
        coding="0..254, 255 no coverage",
        time_step="2m",
        grid="128 x 128 tiles at 3 km, or 384 x 384 at 1 km; a step is 2 or 10 minutes of MRMS, and 5 of the others",
        licence="US Government, public domain (MRMS); CC BY 4.0 (FMI, KNMI, OPERA)",
        citation="NOAA MRMS; Finnish Meteorological Institute; KNMI; EUMETNET OPERA",
        splits="by event and by region, regions of MRMS at least 190 km apart: the tiles listed in the file; of the "
        "10-minute file by storm (test: 0006 and 0007), of the 5-minute file by date (test: 6-10 February 2021)",
        source="https://github.com/pySTEPS/pysteps-data; the storms: https://github.com/Akashicf/ChaoXiNet and "
        "https://github.com/windsoryin/WAVE_NowcastNet; the evenings: "
        "https://github.com/yunhao-tech/precipitation-forecast",
        feature_extractor={
            "scale": 1 / 255,
            "grid_spacing": "3 km",
            "missing_value": MISSING,
            "fill_value": 0,
            "valid_range": (0, 254),
            "physical_units": "mm/h",
            "physical_table": rain_table(),
        },
    )

    @classmethod
    def watched_files(cls, data_dir: Path, options: Mapping[str, Any]) -> Iterator[str]:
        path = data_dir / options.get("file", cls.BUILDER_CONFIG_CLASS.file)
        yield from [str(path)] if path.exists() else []

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        config = self.config
        yield from tiles(Path(config.data_dir) / config.file, split, config.sources, config.every, config.tile)

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        return {"values": _tile(reference)}


def tiles(
    path: Path, split: str, sources: tuple[str, ...], every: int | None, tile: tuple[int, int] | None = None
) -> list[dict]:
    """The rows of a file, see [`~earthformer_hf.data.events.EventBuilder`]; the arguments are the options.

    Raises:
        ValueError: the file is crafted, or an option does not suit it.
    """
    if isinstance(sources, str):
        raise ValueError(f"`sources` must be a list of prefixes, got {sources!r}.")
    rows = []
    file = open_hdf5(path)
    for name, group in file.items():
        if not name.startswith(tuple(sources)) or f"tiles_{split}" not in group:
            continue
        if not {"code", "time"} <= set(group) or not {"tile_size", "dt_minutes"} <= set(group.attrs):
            raise ValueError(f"{path}, {name!r} must hold `code` and `time`, and state tile_size and dt_minutes.")
        try:
            time, origins, size, minutes = _checked_group(file, group, split)
            spacing = {} if "pixel" not in group.attrs else {"grid_spacing": _spacing(group.attrs["pixel"])}
        except Exception as reason:  # whatever a crafted file may hold
            raise ValueError(f"{path}, {name!r}: {reason}.") from reason
        shape = (size, size)
        if tile is not None and origins:
            if others := [other for other in group if other.startswith("tiles_") and other != f"tiles_{split}"]:
                raise ValueError(f"`tile` needs a mosaic of one split, {name!r} of {path} holds {others} as well.")
            shape = (tile[0], tile[1])
            origins = [(top, left) for top, _, left, _ in tile_corners(group["code"].shape[1:], tile=tile)]
        elif every is not None:
            origins = _add_origins_between(origins, size // 4, every)
        for y, x in origins:
            corner = {"row": y, "column": x}
            rows.append(
                {
                    "id": f"{name}:{y}:{x}",
                    "time": time,
                    "geo": {"source": name, **corner, "minutes": minutes} | spacing,
                    "reference": {"path": str(path), "group": name, "shape": shape, **corner},
                }
            )
    return rows


def _checked_group(file: Any, group: Any, split: str) -> tuple[np.ndarray, list[tuple[int, int]], int, int]:
    """The times (T,), the tiles' origins, their size and the minutes of a step of a source.

    Raises:
        ValueError: its parts do not fit each other.
    """
    code, times, tiles = group["code"], group["time"], group[f"tiles_{split}"]
    size, minutes = int(group.attrs["tile_size"]), int(group.attrs["dt_minutes"])
    if size < 1 or minutes < 1:
        raise ValueError(f"tile_size and dt_minutes must be at least 1, got {size} and {minutes}")
    if code.ndim != 3 or code.dtype != np.uint8 or times.shape != code.shape[:1]:
        raise ValueError(
            f"`code` must be uint8 (T, H, W) for the (T,) of `time`, got {code.dtype} {code.shape} and {times.shape}"
        )
    if "vil_lut" not in file or file["vil_lut"].shape != (256,) or file["vil_lut"].dtype != np.uint8:
        raise ValueError("needs the data set 'vil_lut' of the file, uint8 (256,)")
    if tiles.size and (tiles.ndim != 2 or tiles.shape[1] != 2):
        raise ValueError(f"{tiles.name!r} must be rows of y and x, got {tiles.shape}")
    origins = [(int(y), int(x)) for y, x in tiles[:]] if tiles.size else []
    height, width = code.shape[1:]
    for y, x in origins:
        if not (0 <= y <= height - size and 0 <= x <= width - size):
            raise ValueError(f"the tile at ({y}, {x}) of {size} pixels lies beyond the mosaic of {height} x {width}")
    time = np.array([text.decode().rstrip("Z") for text in times[:]], dtype="datetime64[s]")
    return time, origins, size, minutes


def _spacing(pixel: str) -> str:
    """Of "native" or "3 x native" pixels, which are of 1 km, or of 0.01 degrees, which is about that."""
    return f"{int(pixel.partition(' x ')[0]) if ' x ' in pixel else 1} km"


def _tile(reference: dict[str, Any]) -> np.ndarray:
    """The proxy codes (T, tile, tile) of one tile, a view of its mosaic."""
    path, y, x, (rows, columns) = (reference[name] for name in ("path", "row", "column", "shape"))
    return _mosaic(path, reference["group"], os.stat(path).st_mtime_ns)[:, y : y + rows, x : x + columns]


@lru_cache(8)
def _mosaic(path: str, group: str, changed: int) -> np.ndarray:
    """The proxy codes (T, H, W) of one source."""
    file = open_hdf5(path)
    table = file["vil_lut"][:]
    table[MISSING] = MISSING
    return table[file[group]["code"][:]]


def _add_origins_between(origins: list[tuple[int, int]], grid: int, every: int) -> list[tuple[int, int]]:
    """Tile origins every so many pixels inside squares of the tile grid whose corners are all origins."""
    known = set(origins)
    result = set(origins)
    for y, x in origins:
        if {(y + grid, x), (y, x + grid), (y + grid, x + grid)} <= known:
            result |= {(y + i, x + j) for i in range(0, grid, every) for j in range(0, grid, every)}
    return sorted(result)


__all__ = ["OpenRadar", "OpenRadarConfig", "rain_rate", "rain_table", "stored_code", "tiles"]
