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

import datetime
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .events import EventBuilder, EventConfig, Facts, load_dataset
from .file_search import ENDINGS, find_files, is_zarr_store
from .file_times import UNDECODED, follows, most_common_step, parsed_step
from .frames import LazyFrames
from .gridded_file import GriddedFile, check_values, gridded_file


logger = logging.get_logger(__name__)
ROLES = ("time", "y", "x", "channel")
DATED_FOLDER = re.compile(r"((year|month|day|hour)=)?[\d\-_.T]+")  # of no series of its own
SAME_PLACE = 1e-6  # by what part of the spacing coordinates of one grid may differ


@dataclass
class FolderConfig(EventConfig):
    """How a folder is read.

    Args:
        variable: to read; several become channels. May be left out where the files hold only one. Within a group of an
            HDF5 or NetCDF file it is "group/name"; of a composite of ODIM it is the quantity, such as "RATE".
        pattern: of the files, such as "**/radar_*.nc"; by default all of a known ending, in subfolders as well.
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
        start: of files without dates that can be decoded, such as "2020-01-01T12:00".
        name_time: the start as it stands in the files' names, for `datetime.strptime`: "radar_%Y%m%d%H%M.tif".
        follow_links: also to files and folders outside the folder.
        allow_sparse: also read files that declare more than 4 GiB and a thousand times what they store.
        fractions: of the frames for train, val and test, in the order of time.
        dates: or the first and last time of each split, {"train": ("2000", "2015"), "test": ("2016-01", "2016-06")};
            the last one is included to its end. Frames outside are not read.
    """

    variable: str | tuple[str, ...] | None = None
    pattern: str | None = None
    series: str | None = None
    dims: dict[str, str] | None = None
    select: dict[str, Any] | None = None
    grib_keys: dict[str, Any] | None = None
    time_step: str | None = None
    time_tolerance: str | None = None
    start: str | None = None
    name_time: str | None = None
    follow_links: bool = False
    allow_sparse: bool = False
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    dates: dict[str, tuple[str, str]] | None = None

    @property
    def layout(self) -> dict[str, Any]:
        """What is needed to find the frames in a file again."""
        return {
            "variable": [self.variable] if isinstance(self.variable, str) else list(self.variable or []),
            "dims": self.dims or {},
            "select": self.select or {},
            "grib_keys": self.grib_keys or {},
            "allow_sparse": self.allow_sparse,
        }


class Folder(EventBuilder):
    """Events of a split: `values` (T, H, W), or (T, H, W, C) of several variables or a channel dimension, as xarray
    decodes them: scaled, and NaN for the file's own missing value, flags and what is outside its valid range.

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

    @classmethod
    def watched_files(cls, data_dir: Path, options: Mapping[str, Any]) -> Iterator[str]:
        paths, _ = find_files(data_dir, options.get("pattern"), options.get("follow_links", False))
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
            yield from self.bad
        first, end = self.intervals[split]
        for stretch in self.stretches:
            begin, stop = np.searchsorted(stretch["time"], [first, end])
            if begin == stop:
                continue
            parts = _parts_between(stretch["parts"], int(begin), int(stop))
            path, frame, _ = parts[0]
            name = Path(path).relative_to(self.config.data_dir)
            stored = {"parts": parts, "shape": stretch["shape"], "dtype": stretch["dtype"]}
            yield {
                "id": f"{name}:{frame}",
                "time": stretch["time"][begin:stop],
                "geo": {"file": str(name)} | stretch["geo"],
                "reference": self.config.layout | stored,
            }

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        parts = reference["parts"]
        length = sum(stop - first for _, first, stop in parts)
        layout = json.dumps({name: reference[name] for name in FolderConfig().layout})

        def frames(numbers: range) -> np.ndarray:
            if numbers.step < 0:
                return frames(numbers[::-1])[::-1]
            pieces, before = [np.empty((0, *reference["shape"]), reference["dtype"])], 0
            for path, first, stop in parts:
                inside = [first + number - before for number in numbers if before <= number < before + stop - first]
                if inside:
                    where = slice(inside[0], inside[-1] + 1, numbers.step)
                    values = gridded_file(os.getpid(), path, os.stat(path).st_mtime_ns, layout).read(where)
                    pieces.append(values.astype(reference["dtype"], copy=False))
                before += stop - first
            return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

        return {"values": LazyFrames((length, *reference["shape"]), reference["dtype"], frames)}

    # -- what the folder holds ------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """All files in the order of time: path, series, time (T,), shape, dtype and geo; or path and problem."""
        config, folder = self.config, Path(self.config.data_dir)
        if unknown := sorted(set(config.layout["dims"]) - set(ROLES)):
            raise ValueError(f"`dims` must name {ROLES}, got {unknown}.")
        parsed_step(config.time_step), parsed_step(config.time_tolerance, "time_tolerance")
        paths, passed = find_files(folder, config.pattern, config.follow_links)
        for reason in passed:
            logger.warning(reason)
        if not paths:
            raise ValueError(f"`data_dir`: {folder} holds no file {config.pattern or sorted(ENDINGS)}.")
        bar = logging.tqdm(paths, desc=f"list {folder}", unit="file", disable=len(paths) < 100)
        found = [self._listed(path) for path in bar]
        return sorted(found, key=lambda file: file["time"][0] if "time" in file else np.datetime64(0, "s"))

    def _listed(self, path: Path) -> dict[str, Any]:
        config = self.config
        try:
            if not path.exists():
                raise ValueError(f"{path} is a link to nowhere.")
            grid = gridded_file(os.getpid(), str(path), _changed(path), json.dumps(config.layout))
            time = _times_of(grid, path, config)
            check_values(grid, path)
            series = _series_of(path.relative_to(config.data_dir), config.series)
            known = {"shape": grid.shape, "dtype": grid.dtype, "geo": grid.geo}
            return {"path": str(path), "series": series, "time": time} | known
        except Exception as reason:  # whatever a damaged file may cause
            text = " ".join(str(reason).split()) or type(reason).__name__
            return {"path": str(path), "problem": text if str(path) in text else f"{path}: {text}"}

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
        step = parsed_step(self.config.time_step)
        tolerance = parsed_step(self.config.time_tolerance, "time_tolerance")
        groups = _same_series_and_grid(good)
        step = step or most_common_step([np.sort(np.concatenate([f["time"] for f in g])) for g in groups], tolerance)
        stretches: list[dict[str, Any]] = []
        problems: dict[str, str] = {}
        cuts: list[str] = []
        for group in groups:
            conflicts, frames = _without_copies(group, self._frame)
            problems |= conflicts
            stretches += _cut_at_gaps(group, frames, step, tolerance, cuts)
        for cut in cuts:
            logger.info(cut)
        if cuts:
            rest = f", and {len(cuts) - 3} more (logged as info)" if len(cuts) > 3 else ""
            logger.warning(f"{self.config.data_dir}: {len(cuts)} events end early: {'; '.join(cuts[:3])}{rest}.")
        return sorted(stretches, key=lambda stretch: stretch["time"][0]), problems

    def _frame(self, file: dict[str, Any], frame: int) -> np.ndarray:
        grid = gridded_file(os.getpid(), file["path"], _changed(file["path"]), json.dumps(self.config.layout))
        return grid.read(slice(frame, frame + 1))

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
    if path.is_file() or is_zarr_store(path):
        options["pattern"], path = glob.escape(path.name), path.parent
    return load_dataset("folder", path, split, variable=variable, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Joining files
# ---------------------------------------------------------------------------------------------------------------------


def _changed(path: str | Path) -> int:
    return os.stat(path).st_mtime_ns


def _series_of(path: Path, pattern: str | None) -> tuple[str, ...]:
    """What files of one series have in common.

    Raises:
        ValueError: the pattern does not occur in the path.
    """
    if pattern is None:
        return tuple(part for part in path.parts[:-1] if not DATED_FOLDER.fullmatch(part))
    match = re.search(pattern, path.as_posix())
    if match is None:
        raise ValueError(f"`series`: {pattern!r} does not occur in {path}.")
    return tuple(group or "" for group in (match.groups() or (match[0],)))


def _same_series_and_grid(files: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = []
    for file in files:
        for group in groups:
            if group[0]["series"] == file["series"] and _same_grid(group[0], file):
                group.append(file)
                break
        else:
            groups.append([file])
    return groups


def _same_grid(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether frames are of one shape and place, coordinates to a millionth of their spacing."""
    first, second = one["geo"], other["geo"]
    if one["shape"] != other["shape"] or first.keys() != second.keys():
        return False
    for name, value in first.items():
        if name not in ("x", "y"):
            if value != second[name]:
                return False
            continue
        places, others = np.array(value), np.array(second[name])
        spacing = np.abs(np.diff(places)).min() if len(places) > 1 else 1.0
        if len(places) != len(others) or (np.abs(places - others) > SAME_PLACE * spacing).any():
            return False
    return True


Frame = tuple[np.datetime64, int, int]  # time, number of the file in its group, number of the frame in the file


def _without_copies(group: list[dict[str, Any]], read: Any) -> tuple[dict[str, str], list[Frame]]:
    """The frames of files in the order of time, one copy of each; and path -> problem of files that contradict."""
    frames = [(time, n, frame) for n, file in enumerate(group) for frame, time in enumerate(file["time"])]
    frames.sort(key=lambda entry: (entry[0], entry[1]))
    problems: dict[str, str] = {}
    kept: list[Frame] = []
    copies: dict[tuple[str, str], int] = {}
    for entry in frames:
        time, n, frame = entry
        if not kept or kept[-1][0] != time:
            kept.append(entry)
            continue
        _, other, other_frame = kept[-1]
        paths = group[other]["path"], group[n]["path"]
        if paths[0] in problems and paths[1] in problems:
            continue
        if np.array_equal(read(group[other], other_frame), read(group[n], frame), equal_nan=True):
            copies[paths] = copies.get(paths, 0) + 1
            continue
        for path, against in (paths, paths[::-1]):
            problems.setdefault(path, f"{path}: holds other values than {against} at the same time {time}")
    for (path, copy), number in copies.items():
        logger.warning(f"{copy}: {number} frames are copies of those in {path}, and are left out.")
    return problems, [entry for entry in kept if group[entry[1]]["path"] not in problems]


def _cut_at_gaps(
    group: list[dict[str, Any]], frames: list[Frame], step: np.timedelta64, tolerance: Any, cuts: list[str]
) -> list[dict[str, Any]]:
    """Stretches of frames at an equal step; each end of one but the last adds its reason to `cuts`."""
    if not frames:
        return []
    time = np.array([entry[0] for entry in frames], "datetime64[s]")
    ends = np.flatnonzero(~follows(time[:-1], time[1:], step, tolerance)) + 1
    for end in ends.tolist():
        reason = "a gap" if time[end] - time[end - 1] > step.astype("timedelta64[s]", casting="unsafe") else "a step"
        before, after = (Path(group[frames[n][1]]["path"]).name for n in (end - 1, end))
        cuts.append(f"{before} at {time[end - 1]}, then {after} at {time[end]}: {reason}, where the step is {step}")
    stretches = []
    for first, stop in zip([0, *ends.tolist()], [*ends.tolist(), len(frames)]):
        parts: list[list] = []
        for _, n, frame in frames[first:stop]:
            path = group[n]["path"]
            if parts and parts[-1][0] == path and parts[-1][2] == frame:
                parts[-1][2] += 1
            else:
                parts.append([path, frame, frame + 1])
        used = [group[n] for n in sorted({n for _, n, _ in frames[first:stop]})]
        begins = group[frames[first][1]]
        dtype = str(np.result_type(*(np.dtype(file["dtype"]) for file in used)))
        known = {"shape": begins["shape"], "geo": begins["geo"], "dtype": dtype}
        stretches.append({"time": time[first:stop], "parts": parts} | known)
    return stretches


def _times_of(grid: GriddedFile, path: Path, config: FolderConfig) -> np.ndarray:
    """The time of every frame, (T,) datetime64[s].

    Raises:
        ValueError: names the file, and the frame.
    """
    what, dates = f"{path}, {grid.names[0]!r}", grid.dates()
    undecoded = None if dates is None else dates.attrs.get(UNDECODED)
    if config.name_time or dates is None or (undecoded and (config.start or config.time_step)):
        return _stated_times(grid.length, path, config)
    if undecoded:
        raise ValueError(f"{what}: its times cannot be decoded ({undecoded}); state `start` and `time_step`.")
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
    step = parsed_step(config.time_step)
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
