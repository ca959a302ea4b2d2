"""A user's own grids: a folder of files that xarray reads (NetCDF, HDF5, Zarr, GeoTIFF, GRIB) or of `.npy` arrays.

Every frame of every file is in exactly one event. An event is a stretch of frames at an equal time step: a gap ends
it, and so does a border between splits; a file that goes on where another one of the same grid ended continues it.

```
files    |------ a.nc ------|---- b.nc ----|   gap   |-------- c.nc --------|
events   |------------- a.nc:0 ------------|         |---- c.nc:0 ---|c.nc:17|
splits   |--------------------------- train -------------------------|- val -|
```
"""

import datetime
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .events import EventBuilder, EventConfig, Facts, load_dataset
from .file_checks import FORMATS_BY_ENDING
from .frames import LazyFrames
from .gridded_file import GriddedFile, check_values, dates_along, gridded_file


ENDINGS = {*FORMATS_BY_ENDING, ".zarr"} - {".npz", ".zip", ".gz", ".tgz", ".tar"}
ROLES = ("time", "y", "x", "channel")


@dataclass
class FolderConfig(EventConfig):
    """How a folder is read.

    Args:
        variable: to read; several become channels. May be left out where the files hold only one.
        pattern: of the files, such as "**/radar_*.nc"; by default all of a known ending, in subfolders as well.
        dims: names of dimensions, {"time": ..., "y": ..., "x": ..., "channel": ...}, where they are not found: time is
            the one with dates along it, y and x follow from their CF attributes or names or are the last two, and a
            channel dimension is always named here.
        select: the one value to take along a further dimension, such as {"level": 500}.
        time_step: in numpy's notation, "5m" or "1M". Where files have no dates it makes them, together with the start;
            elsewhere it decides what a gap is. By default, the most common step.
        start: of files without dates, such as "2020-01-01T12:00".
        name_time: the start as it stands in the files' names, for `datetime.strptime`: "radar_%Y%m%d%H%M.tif".
        fractions: of the frames for train, val and test, in the order of time.
        dates: or the first and last time of each split, {"train": ("2000", "2015"), "test": ("2016-01", "2016-06")};
            the last one is included to its end. Frames outside are not read.
    """

    variable: str | tuple[str, ...] | None = None
    pattern: str | None = None
    dims: dict[str, str] | None = None
    select: dict[str, Any] | None = None
    time_step: str | None = None
    start: str | None = None
    name_time: str | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    dates: dict[str, tuple[str, str]] | None = None

    @property
    def layout(self) -> dict[str, Any]:
        """What is needed to find the frames in a file again."""
        variable = [self.variable] if isinstance(self.variable, str) else list(self.variable or [])
        return {"variable": variable, "dims": self.dims or {}, "select": self.select or {}}


class Folder(EventBuilder):
    """Events of a split: `values` (T, H, W), or (T, H, W, C) of several variables or a channel dimension, as xarray
    decodes them: scaled, and NaN for the file's own missing value.

    `geo`: `file`, in which the event begins; `y` and `x`, the coordinates of rows and columns where they are
    one-dimensional, and their names `y_name` and `x_name`; `crs`, a string, or `grid_mapping`, the CF attributes,
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
            yield from self.bad
        first, end = self.intervals[split]
        for stretch in self.stretches:
            begin, stop = np.searchsorted(stretch["time"], [first, end])
            if begin == stop:
                continue
            parts = _parts_between(stretch["parts"], int(begin), int(stop))
            path, number, _ = parts[0]
            name = Path(path).relative_to(self.config.data_dir)
            stored = {"parts": parts, "shape": stretch["shape"], "dtype": stretch["dtype"]}
            yield {
                "id": f"{name}:{number}",
                "time": stretch["time"][begin:stop],
                "geo": {"file": str(name)} | stretch["geo"],
                "reference": self.config.layout | stored,
            }

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        parts = reference["parts"]
        length = sum(stop - first for _, first, stop in parts)
        layout = json.dumps({name: reference[name] for name in ("variable", "dims", "select")})

        def frames(numbers: range) -> np.ndarray:
            if numbers.step < 0:
                return frames(numbers[::-1])[::-1]
            pieces, before = [np.empty((0, *reference["shape"]), reference["dtype"])], 0
            for path, first, stop in parts:
                inside = [first + number - before for number in numbers if before <= number < before + stop - first]
                if inside:
                    where = slice(inside[0], inside[-1] + 1, numbers.step)
                    pieces.append(gridded_file(os.getpid(), path, os.stat(path).st_mtime_ns, layout).read(where))
                before += stop - first
            return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

        return {"values": LazyFrames((length, *reference["shape"]), reference["dtype"], frames)}

    # -- what the folder holds ------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """All files in the order of time: path, time (T,), shape, dtype and geo of its frames; or path and problem."""
        config, folder = self.config, Path(self.config.data_dir)
        if unknown := sorted(set(config.layout["dims"]) - set(ROLES)):
            raise ValueError(f"`dims` must name {ROLES}, got {unknown}.")
        if config.pattern:
            paths = sorted(folder.glob(config.pattern))
        else:
            paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        paths = [path for path in paths if not any(parent.suffix == ".zarr" for parent in path.parents)]  # chunks
        if not paths:
            raise ValueError(f"`data_dir`: {folder} holds no file {config.pattern or sorted(ENDINGS)}.")
        found: list[dict[str, Any]] = []
        for path in paths:
            try:
                grid = gridded_file(os.getpid(), str(path), os.stat(path).st_mtime_ns, json.dumps(config.layout))
                time = _times_of(grid, path, config)
                check_values(grid, path)
                known = {"shape": grid.shape, "dtype": grid.dtype, "geo": grid.geo}
                found.append({"path": str(path), "time": time} | known)
            except ValueError as problem:
                found.append({"path": str(path), "problem": str(problem)})
        return sorted(found, key=lambda file: file["time"][0] if "time" in file else np.datetime64(0, "s"))

    @property
    def bad(self) -> list[dict[str, Any]]:
        """Rows of the files that cannot be read."""
        files = [file for file in self.files if "problem" in file]
        names = [str(Path(file["path"]).relative_to(self.config.data_dir)) for file in files]
        return [{"id": name, "problem": file["problem"]} for name, file in zip(names, files)]

    @cached_property
    def stretches(self) -> list[dict[str, Any]]:
        """Frames at an equal time step on one grid: as `files`, and `parts`, [path, first frame, end] each."""
        good = [file for file in self.files if "time" in file]
        if not good:
            return []
        step = _parsed_step(self.config.time_step) or _most_common_step([file["time"] for file in good])
        stretches: list[dict[str, Any]] = []
        for file in good:
            time = file["time"]
            breaks = np.flatnonzero(~_follows(time[:-1], time[1:], step)) + 1
            for first, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(time)]):
                last = stretches[-1] if stretches else None
                same = last and all(last[name] == file[name] for name in ("shape", "dtype", "geo"))
                part = [file["path"], first, stop]
                if last and same and _follows(last["time"][-1:], time[first : first + 1], step).all():
                    last["time"] = np.concatenate([last["time"], time[first:stop]])
                    last["parts"].append(part)
                else:
                    stretches.append(file | {"time": time[first:stop], "parts": [part]})
        return stretches

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
        for number in np.rint(np.cumsum(fractions)[:2] * len(ordered)).astype(int):
            borders.append(ordered[number] if number < len(ordered) else np.datetime64("9999", "s"))
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
    path = Path(path)
    if path.exists() and path.suffix.lower() in ENDINGS:
        options["pattern"], path = glob.escape(path.name), path.parent
    return load_dataset("folder", path, split, variable=variable, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Times, and parts of files
# ---------------------------------------------------------------------------------------------------------------------


def _times_of(grid: GriddedFile, path: Path, config: FolderConfig) -> np.ndarray:
    """The time of every frame, (T,) datetime64[s]."""
    array, what = grid.arrays[0], f"{path}, {grid.names[0]!r}"
    dates = dates_along(array, (grid.order[0],))
    if dates is None and grid.length == 1:
        dates = dates_along(array, ())
    if config.name_time or dates is None:
        return _stated_times(grid.length, path, config)
    if dates.dtype.kind != "M":
        calendar = np.ravel(dates.values)[0].calendar
        raise ValueError(f"{what}: its times are of the calendar {calendar!r}, which has no dates of ours.")
    time = np.atleast_1d(dates.values).astype("datetime64[s]")
    if np.isnat(time).any():
        raise ValueError(f"{what}: the time of frame {np.flatnonzero(np.isnat(time))[0]} is missing.")
    falling = np.flatnonzero(np.diff(time) <= np.timedelta64(0, "s"))
    if len(falling):
        frame = falling[0]
        raise ValueError(f"{what}: time must rise, but frame {frame + 1} ({time[frame + 1]}) follows {time[frame]}.")
    return time


def _stated_times(length: int, path: Path, config: FolderConfig) -> np.ndarray:
    """The times of a file without dates, by the options."""
    step = _parsed_step(config.time_step)
    if length > 1 and step is None:
        raise ValueError(f"`time_step`: {path} has no dates along its {length} frames; state it.")
    if config.name_time:
        try:
            start = np.datetime64(datetime.datetime.strptime(path.name, config.name_time), "s")
        except ValueError as reason:
            raise ValueError(f"`name_time`: {path}: {reason}.") from None
    elif config.start:
        start = np.datetime64(str(config.start), "s")
    else:
        raise ValueError(f"`start`: {path} has no dates; state it, or `name_time`.")
    if step is None:
        return start.reshape(1)
    unit = np.datetime_data(step)[0]
    first = start.astype(f"datetime64[{unit if unit in 'MY' else 's'}]")
    if first != start:
        raise ValueError(f"`start`: of {path} must be the first of a month or year for steps of {step}, got {start}.")
    return (first + step * np.arange(length)).astype("datetime64[s]")


def _parsed_step(text: str | None) -> np.timedelta64 | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([smhDWMY])", text)
    if not match or not int(match[1]):
        raise ValueError(f"`time_step` must be such as '5m', '1h', '1D' or '1M', got {text!r}.")
    return np.timedelta64(int(match[1]), match[2])  # type: ignore[arg-type]


def _most_common_step(times: list[np.ndarray]) -> np.timedelta64:
    """Of frames within files, or between files if each holds one; months and years count as such."""
    steps = [np.diff(time) for time in times if len(time) > 1]
    if not steps:
        starts = np.unique([time[0] for time in times])
        steps = [np.diff(starts)] if len(starts) > 1 else [np.array([np.timedelta64(1, "s")])]
    values, counts = np.unique(np.concatenate(steps), return_counts=True)
    step = values[counts.argmax()]
    days = step / np.timedelta64(1, "D")
    for unit, longest in (("M", 31), ("Y", 366)):
        if 0.9 * longest <= days <= longest:
            calendar = np.timedelta64(1, unit)  # type: ignore[call-overload]
            if all(_follows(time[:-1], time[1:], calendar).mean() > 0.5 for time in times if len(time) > 1):
                return calendar
    return step


def _follows(before: np.ndarray, after: np.ndarray, step: np.timedelta64) -> np.ndarray:
    """Whether times are a step later than others, to a tenth of the step; months and years exactly."""
    unit = np.datetime_data(step)[0]
    if unit in "MY":
        return after.astype(f"datetime64[{unit}]") - before.astype(f"datetime64[{unit}]") == step
    return np.abs((after - before) / step - 1) <= 0.1


def _parts_between(parts: list[list], begin: int, stop: int) -> list[list]:
    """The parts of the frames from `begin` to `stop` of all."""
    result, before = [], 0
    for path, first, end in parts:
        low, high = max(begin - before, 0), min(stop - before, end - first)
        if low < high:
            result.append([path, first + low, first + high])
        before += end - first
    return result


__all__ = ["Folder", "FolderConfig", "from_folder"]
