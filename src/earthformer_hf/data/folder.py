"""A user's own grids: a folder of files that xarray reads (NetCDF, HDF5, Zarr, GeoTIFF, GRIB) or of `.npy` arrays.

Every frame of every file is in exactly one event. An event is a stretch of frames of one series, on one grid, at an
equal time step. Files are of one series if they lie in one subfolder (folders named by dates do not count), or if
`series` says so; a gap ends an event, and so does a border between splits; a file that goes on where another one of
the same series and grid ended continues it. Every cut is logged with its reason.

```
files    |------ a.nc ------|---- b.nc ----|   gap   |-------- c.nc --------|
events   |------------- a.nc:0 ------------|         |---- c.nc:0 ---|c.nc:17|
splits   |--------------------------- train -------------------------|- val -|
```
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..errors import one_line
from .coarsening import coarsened
from .events import EventBuilder, EventConfig, Facts, digest_of_code, load_dataset
from .file_joining import cut_at_gaps, parts_between, same_series_and_grid, series_of, without_copies
from .file_search import ENDINGS, find_files, is_zarr_store, list_files
from .file_times import most_common_step, parsed_step
from .frames import LazyFrames
from .gridded_file import IsForecast, check_values, gridded_file
from .references import signed, verified
from .stated_times import count_on, times_of
from .tiles import tile_corners


logger = logging.get_logger(__name__)
ROLES = ("time", "y", "x", "channel")


@dataclass
class FolderConfig(EventConfig):
    """How a folder is read.

    Args:
        variable: to read; several become channels. May be left out where the files hold only one. Within a group of an
            HDF5 or NetCDF file it is "group/name"; of a composite of ODIM it is the quantity, such as "RATE".
        pattern: of the files, such as "**/radar_*.nc", or several; by default all of a known ending, in subfolders as
            well.
        series: a regular expression for the files' paths below the folder, such as "radar_(.+?)_"; files with the same
            groups are of one series. By default, those of a subfolder.
        dims: names of dimensions, {"time": ..., "y": ..., "x": ..., "channel": ...}, where they are not found: time is
            the one with dates along it, y and x follow from their CF attributes or names or are the last two, and a
            channel dimension is always named here.
        select: the one value to take along a further dimension, such as {"level": 500}.
        grib_keys: which messages of a GRIB file to read, such as {"typeOfLevel": "surface"}.
        time_step: in numpy's notation, "5m" or "1M". Where files have no dates that can be decoded it makes them,
            together with the start; elsewhere it decides what a gap is. By default, the most common step.
        time_tolerance: by how much the time of a frame may be off an equal step, such as "45s"; by default two
            neighbours may be off by a tenth of the step.
        start: of files without dates that can be decoded, such as "2020-01-01T12:00". Several of a series follow each
            other from there on, in the order of their names.
        name_time: the start as it stands in the files' names, for `datetime.strptime`: "radar_%Y%m%d%H%M.tif", or a
            part of the name such as "%Y%m%d%H%M".
        missing_value: what stands for missing values, such as -999, where the files do not say it.
        forecasts: also read files of forecasts, whose times lie after a reference time; else they are left out.
        follow_links: also to files and folders outside the folder.
        allow_sparse: also read files that declare more than 1 GiB and a thousand times what they store.
        coarsen: average squares of so many pixels, of the observed ones if they are half of a square or more; dBZ in
            rain rates, by Z = 200 R^1.6 (Marshall and Palmer, 1948). Rows and columns that fill no square are cut.
        crop: first row, end row, first column and end column of the (coarsened) grid, to read no more of it.
        tile: height and width of tiles that cover what is left; each becomes an event of its own.
        stride: rows and columns from one tile to the next, `tile` if omitted; the last ones end where the grid ends.
        fractions: of the frames for train, val and test, in the order of time.
        dates: or the first and last time of each split, {"train": ("2000", "2015"), "test": ("2016-01", "2016-06")};
            the last one is included to its end. Frames outside are not read.
    """

    variable: str | tuple[str, ...] | None = None
    pattern: str | tuple[str, ...] | None = None
    series: str | None = None
    dims: dict[str, str] | None = None
    select: dict[str, Any] | None = None
    grib_keys: dict[str, Any] | None = None
    time_step: str | None = None
    time_tolerance: str | None = None
    start: str | None = None
    name_time: str | None = None
    missing_value: float | None = None
    forecasts: bool = True
    follow_links: bool = False
    allow_sparse: bool = False
    coarsen: int = 1
    crop: tuple[int, int, int, int] | None = None
    tile: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    dates: dict[str, tuple[str, str]] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.data_dir is not None and (Path(self.data_dir).is_file() or is_zarr_store(self.data_dir)):  # one file
            self.pattern, self.data_dir = glob.escape(Path(self.data_dir).name), str(Path(self.data_dir).parent)
        if not isinstance(self.coarsen, int) or self.coarsen < 1:
            raise ValueError(f"`coarsen` must be a whole number of at least 1, got {self.coarsen!r}.")
        for name, length in (("crop", 4), ("tile", 2), ("stride", 2)):
            value = getattr(self, name)
            if value is not None and not _are_whole(value, length):
                raise ValueError(f"`{name}` must be {length} whole numbers, got {value!r}.")
        try:
            np.datetime64(str(self.start or "NaT"), "s")
        except ValueError:
            raise ValueError(f"`start` must be a time such as 2020-01-01T12:00, got {self.start!r}.") from None
        if not isinstance(self.missing_value, int | float | None):
            raise ValueError(f"`missing_value` must be a number, got {self.missing_value!r}.")
        patterns = [self.pattern] if isinstance(self.pattern, str) else self.pattern or []
        if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
            raise ValueError(f"`pattern` must be text, got {self.pattern!r}.")
        try:
            re.compile(self.series or "")
        except (TypeError, re.error) as reason:
            raise ValueError(f"`series` must be a regular expression, got {self.series!r}: {reason}.") from None

    @property
    def layout(self) -> dict[str, Any]:
        """What is needed to find the frames in a file again."""
        return {
            "variable": [self.variable] if isinstance(self.variable, str) else list(self.variable or []),
            "dims": self.dims or {},
            "select": self.select or {},
            "grib_keys": self.grib_keys or {},
            "allow_sparse": self.allow_sparse,
            "coarsen": self.coarsen,
            "missing_value": self.missing_value,
        }

    def tiles(self, shape: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """First row, end row, first column and end column of every tile of a (coarsened) grid of this shape (H, W).

        Raises:
            ValueError: a crop or tile that does not fit the grid.
        """
        return tile_corners(shape, self.crop, self.tile, self.stride)


def _are_whole(value: Any, length: int) -> bool:
    return isinstance(value, Sequence) and len(value) == length and all(type(number) is int for number in value)


class Folder(EventBuilder):
    """Events of a split: `values` (T, H, W), or (T, H, W, C) of several variables or a channel dimension, as xarray
    decodes them: scaled, and NaN for the file's own missing value, flags and what is outside its valid range.

    `geo`: `file`, in which the event begins; `y` and `x`, the coordinates of rows and columns where they are
    one-dimensional, their names `y_name` and `x_name`, and their units `y_units` and `x_units`; `units` of the values,
    those of several variables with commas between them; `crs`, a string, or `grid_mapping`, the CF attributes,
    where the file states one.
    """

    NAME = "folder"
    BUILDER_CONFIG_CLASS = FolderConfig
    FACTS = Facts(
        variable="the user's",
        units="the files'",
        coding="as xarray decodes them",
        time_step="the files'",
        grid="the files'",
        licence="the user's",
        citation="the user's",
        splits="intervals of time: given dates, or the first 80 %, the next and the last 10 % of all frames; the "
        "frames on both sides of a border are neighbours",
        source="a folder",
    )

    @classmethod
    def watched_files(cls, data_dir: Path, options: Mapping[str, Any]) -> Iterator[str]:
        config = FolderConfig(data_dir=str(data_dir), **options)
        paths, _ = find_files(Path(config.data_dir), config.pattern, config.follow_links)
        for path in paths:
            if is_zarr_store(path):
                yield from (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
            else:
                yield str(path)

    def _split_generators(self, dl_manager: Any) -> list:
        """Those that have a frame; files that cannot be read are listed with the first."""
        times = np.concatenate([np.empty(0, "datetime64[s]"), *(stretch["time"] for stretch in self.stretches)])
        present = [name for name, (first, end) in self.intervals.items() if ((times >= first) & (times < end)).any()]
        parts = super()._split_generators(dl_manager)
        parts = [part for part in parts if part.name in present] or parts[:1]
        self.first = parts[0].name
        return parts

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        if split == self.first:
            if self.bad and not self.config.keep_bad:
                problem = self.bad[0]["problem"].removesuffix(".")
                raise ValueError(f"{problem} (event {self.bad[0]['id']!r}).")
            yield from self.bad
        first, end = self.intervals[split]
        for stretch in self.stretches:
            begin, stop = np.searchsorted(stretch["time"], [first, end])
            if begin == stop:
                continue
            parts = parts_between(stretch["parts"], int(begin), int(stop))
            path, frame, _ = parts[0]
            name = Path(path).relative_to(self.config.data_dir)
            tiles = self.config.tiles(stretch["shape"][:2])
            for tile in tiles:
                shape = [tile[1] - tile[0], tile[3] - tile[2], *stretch["shape"][2:]]
                stored = {"parts": parts, "shape": shape, "dtype": stretch["dtype"], "tile": tile}
                place = f":{tile[0]}:{tile[2]}" if len(tiles) > 1 else ""
                yield {
                    "id": f"{name}:{frame}{place}",
                    "time": stretch["time"][begin:stop],
                    "geo": {"file": str(name)} | _geo_of_tile(stretch["geo"], tile, self.config),
                    "reference": self.config.layout | stored,
                }

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        parts = reference["parts"]
        length = sum(stop - first for _, first, stop in parts)
        layout, tile = {name: reference.get(name) for name in FolderConfig().layout}, reference["tile"]

        def frames(numbers: range) -> np.ndarray:
            if numbers.step < 0:
                return frames(numbers[::-1])[::-1]
            pieces, before = [np.empty((0, *reference["shape"]), reference["dtype"])], 0
            for path, first, stop in parts:
                inside = [first + frame - before for frame in numbers if before <= frame < before + stop - first]
                if inside:
                    where = slice(inside[0], inside[-1] + 1, numbers.step)
                    values = _read(path, layout, where, tile)
                    pieces.append(values.astype(reference["dtype"], copy=False))
                before += stop - first
            return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

        return {"values": LazyFrames((length, *reference["shape"]), reference["dtype"], frames)}

    @classmethod
    def without_damage(cls, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """The stretches between files that cannot be read, each file read on its own."""
        reference, geo = verified(row["reference"]), json.loads(row["geo"])
        root = reference["parts"][0][0].removesuffix(geo["file"])
        tile = row["id"].removeprefix(geo["file"]).split(":", 2)[2:]  # behind the first frame's number
        problems: list[str] = []
        stretches: list[tuple[int, list]] = []  # first frame of the row, and parts
        before, goes_on = 0, False
        for part in reference["parts"]:
            try:
                cls.read(reference | {"parts": [part]})["values"][:]
            except ValueError as reason:
                problems.append(str(reason).removeprefix("frames: "))
                goes_on = False
            else:
                stretches = stretches if goes_on else [*stretches, (before, [])]
                stretches[-1][1].append(part)
                goes_on = True
            before += part[2] - part[1]
        rows = []
        for first, parts in stretches:
            name, length = parts[0][0].removeprefix(root), sum(end - begin for _, begin, end in parts)
            known = {"id": ":".join([name, str(parts[0][1]), *tile]), "length": length}
            known |= {"time": row["time"][first : first + length], "geo": json.dumps(geo | {"file": name})}
            rows.append(row | known | {"reference": signed(reference | {"parts": parts})})
        return rows, list(dict.fromkeys(problems))

    # -- what the folder holds ------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """All files in the order of time, as [`_listed`] describes them."""
        config, folder = self.config, Path(self.config.data_dir)
        if unknown := sorted(set(config.layout["dims"]) - set(ROLES)):
            raise ValueError(f"`dims` must name {ROLES}, got {unknown}.")
        parsed_step(config.time_step), parsed_step(config.time_tolerance, "time_tolerance")
        paths, passed = find_files(folder, config.pattern, config.follow_links)
        for reason in passed:
            logger.warning(reason)
        if not paths:
            raise ValueError(f"`data_dir`: {folder} holds no file {config.pattern or sorted(ENDINGS)}.")
        listed = list_files(paths, partial(_listed, config), self._listing_cache, f"list {folder}")
        found = [file for file in listed if "forecast" not in file]
        for file in listed:
            if "time" in file:
                file["time"] = np.array(file["time"], "datetime64[s]")
            if "forecast" in file and found:
                logger.warning(f"{file['forecast']}; it is left out.")
        if not found:
            raise ValueError(f"{listed[0]['forecast']}; give observations.")
        count_on(found, config)
        return sorted(found, key=lambda file: file["time"][0] if "time" in file else np.datetime64(0, "s"))

    @property
    def _listing_cache(self) -> Path:
        """Where the listing of this folder under these options is kept."""
        options = {name: value for name, value in vars(self.config).items() if name not in ("version", "data_files")}
        text = json.dumps(options, sort_keys=True, default=str) + digest_of_code()
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Path(self._cache_dir_root) / "earthformer_hf_listings" / f"{digest}.json"

    @property
    def bad(self) -> list[dict[str, Any]]:
        """Rows of the files that cannot be used."""
        problems = {file["path"]: file["problem"] for file in self.files if "problem" in file} | self.joined[1]
        names = {path: str(Path(path).relative_to(self.config.data_dir)) for path in problems}
        return [{"id": names[path], "problem": problem} for path, problem in problems.items()]

    @property
    def stretches(self) -> list[dict[str, Any]]:
        """Frames of one series and grid at an equal time step: time, shape, dtype, geo and `parts`, which are [path,
        first frame, end] each."""
        return self.joined[0]

    @cached_property
    def joined(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The stretches; and path -> problem of files that say other things of the same times."""
        good = [file for file in self.files if "time" in file]
        stated = parsed_step(self.config.time_step)
        tolerance = parsed_step(self.config.time_tolerance, "time_tolerance")
        differences: list[str] = []
        groups = same_series_and_grid(good, differences)
        stretches: list[dict[str, Any]] = []
        problems: dict[str, str] = {}
        cuts: list[str] = []
        for group in groups:
            conflicts, frames = without_copies(group, self._frame)
            problems |= conflicts
            step = stated or most_common_step([np.array([time for time, _, _ in frames], "datetime64[s]")], tolerance)
            stretches += cut_at_gaps(group, frames, step, tolerance, cuts)
        for lines, words in ((cuts, "events end early"), (differences, "files do not join others of their series")):
            for line in lines:
                logger.info(line)
            rest = f", and {len(lines) - 3} more (logged as info)" if len(lines) > 3 else ""
            if lines:
                logger.warning(f"{self.config.data_dir}: {len(lines)} {words}: {'; '.join(lines[:3])}{rest}.")
        return sorted(stretches, key=lambda stretch: stretch["time"][0]), problems

    def _frame(self, file: dict[str, Any], frame: int) -> np.ndarray:
        return _read(
            file["path"], self.config.layout, slice(frame, frame + 1), (0, file["shape"][0], 0, file["shape"][1])
        )

    @cached_property
    def intervals(self) -> dict[str, tuple[np.datetime64, np.datetime64]]:
        """First time of each split, and the time before which it ends."""
        config = self.config
        if config.dates is not None:
            if not config.dates or not set(config.dates) <= set(self.SPLITS):
                raise ValueError(f"`dates` must name splits of {self.SPLITS}, got {sorted(config.dates)}.")
            result = {}
            for split in (split for split in self.SPLITS if split in config.dates):
                first, last = (np.datetime64(str(date)) for date in config.dates[split])  # YAML reads numbers
                result[split] = first.astype("datetime64[s]"), (last + 1).astype("datetime64[s]")
            flat = [time for interval in sorted(result.values()) for time in interval]
            if any(np.diff(flat) < np.timedelta64(0, "s")):
                raise ValueError(f"`dates` must be intervals that do not overlap, got {config.dates}.")
            return result
        fractions = np.array(config.fractions)
        if fractions.shape != (3,) or (fractions < 0).any() or abs(fractions.sum() - 1) > 1e-6:
            raise ValueError(f"`fractions` must be three numbers that sum to 1, got {config.fractions}.")
        times = [np.empty(0, "datetime64[s]"), *(stretch["time"] for stretch in self.stretches)]
        ordered = np.sort(np.concatenate(times))
        borders = [np.datetime64("0001", "s")]
        for place in np.rint(np.cumsum(fractions)[:2] * len(ordered)).astype(int):
            borders.append(ordered[place] if place < len(ordered) else np.datetime64("9999", "s"))
        borders.append(np.datetime64("9999", "s"))
        return {
            split: (first, end)
            for split, first, end, fraction in zip(self.SPLITS, borders, borders[1:], fractions)
            if fraction > 0
        }


def from_folder(
    path: str | Path, variable: str | tuple[str, ...] | None = None, split: str | None = None, **options: Any
) -> Any:
    """The events of a folder of a user's own files, or of one file: for [`~earthformer_hf.data.windows.windows`].

    Args:
        path: of the folder, or of a file.
        variable: to read; several become channels. May be left out where the files hold only one.
        split: "train", "val" or "test"; all if omitted.
        options: of [`FolderConfig`], and of [`~earthformer_hf.data.events.load_dataset`].

    Returns:
        As `load_dataset`.

    Raises:
        ValueError: no such files; a file that is damaged, crafted or of another grid than asked for, or that has no
            such variable, times that do not rise, no numbers, or nothing but missing values; each with its name.
    """
    return load_dataset("folder", path, split, variable=variable, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Joining files
# ---------------------------------------------------------------------------------------------------------------------


def _changed(path: str | Path) -> str:
    state = os.stat(path)
    return f"{state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _listed(config: FolderConfig, path: Path) -> dict[str, Any]:
    """What is known of a file: path, name, series, variables, time (T,), shape, dtype and geo; or path and problem."""
    try:
        if not path.exists():
            raise ValueError(f"{path} is a link to nowhere.")
        layout = config.layout if config.forecasts else config.layout | {"forecasts": False}
        grid = gridded_file(os.getpid(), str(path), _changed(path), json.dumps(layout))
        time, counted = times_of(grid, path, config)
        check_values(grid, path)
        shape = [grid.shape[0] // config.coarsen, grid.shape[1] // config.coarsen, *grid.shape[2:]]
        config.tiles(shape[:2])
        known = {"shape": shape, "dtype": _coarse_dtype(grid.dtype, config.coarsen), "geo": grid.geo}
        name = path.relative_to(config.data_dir)
        known |= {"name": str(name), "series": list(series_of(name, config.series)), "variables": grid.names}
        return {"path": str(path), "time": time.astype(str).tolist(), "counted": counted} | known
    except IsForecast as reason:
        return {"path": str(path), "forecast": one_line(reason)}
    except Exception as reason:  # whatever a damaged file may cause
        text = one_line(reason)
        return {"path": str(path), "problem": text if str(path) in text else f"{path}: {text}"}


def _coarse_dtype(dtype: str, coarsen: int) -> str:
    return dtype if coarsen == 1 else str(np.result_type(dtype, "float32"))


def _read(path: str, layout: dict[str, Any], frames: slice, tile: Sequence[int]) -> np.ndarray:
    """Frames (n, H, W[, C]) of a tile of a file's (coarsened) grid.

    Raises:
        ValueError: the file cannot be read; names it and the frames.
    """
    factor = layout["coarsen"]
    top, bottom, left, right = (factor * border for border in tile)
    try:
        grid = gridded_file(os.getpid(), path, _changed(path), json.dumps(layout))
        values = grid.read(frames, slice(top, bottom), slice(left, right))
    except Exception as reason:  # whatever a damaged file may cause
        text = one_line(reason)
        words = f"{path}, frames {frames.start} to {frames.stop - 1}: {text}"
        raise ValueError(text if path in text else words) from reason
    return values if factor == 1 else coarsened(values, factor, grid.decibels)


def _geo_of_tile(geo: dict[str, Any], tile: Sequence[int], config: FolderConfig) -> dict[str, Any]:
    """Coordinates of the rows and columns of a tile; its first row and column where it is not the whole grid."""
    top, bottom, left, right = tile
    result = dict(geo)
    for name, first, end in (("y", top, bottom), ("x", left, right)):
        if name in geo:
            places = np.array(geo[name])[config.coarsen * first : config.coarsen * end]
            result[name] = (
                places.reshape(-1, config.coarsen).mean(1).tolist() if config.coarsen > 1 else places.tolist()
            )
    return result | ({"row": top, "column": left} if config.tile or config.crop else {})


__all__ = ["Folder", "FolderConfig", "from_folder"]
