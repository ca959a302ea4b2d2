"""What a forecast starts from: the last frames of an array, a dataset or files, and what is known about them."""

import datetime
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.events import Events, usable
from ..data.file_times import parsed_step
from ..data.folder import FolderConfig, from_folder
from ..data.gridded_file import GriddedFile
from ..data.guards import open_npy
from ..data.inputs import holds_ocean, ocean_input
from ..data.measures import UNKNOWN, DataFacts, alike, canonical_units, common_step, step_of
from .grids import Grid, Places, grid_of, with_units


@dataclass(frozen=True)
class Observations:
    """Frames that follow each other at an equal step.

    Args:
        source: where they are from, for a reader.
        name: of the variable.
        read: frames of a range -> values (n, H, W), NaN where missing.
        time: (T,) datetime64[s]; NaT where undated.
        facts: units, time step and grid spacing.
        grid: of the maps.
        later: times of the frames after these, for what is drawn beside a forecast.
    """

    source: str
    name: str
    read: Callable[[slice], np.ndarray]
    time: np.ndarray
    facts: DataFacts
    grid: Grid
    later: np.ndarray = field(default_factory=lambda: np.empty(0, "datetime64[s]"))

    @property
    def is_dated(self) -> bool:
        return not np.isnat(self.time).any()

    def until(self, time: str | np.datetime64) -> "Observations":
        """Those whose last frame is at or before a time, by less than a step.

        Raises:
            ValueError: there is no such frame, or the frames have no dates.
        """
        wanted = parsed_date(time, "until") if isinstance(time, str) else time.astype("datetime64[s]")
        if not self.is_dated or self.facts.step is None:
            raise ValueError(f"`until`: frames without dates and a time step have no order, got {wanted}.")
        count = int(np.searchsorted(self.time, wanted, side="right"))
        if not count or _steps_between(self.time[count - 1], wanted, self.facts.step) >= 1:
            after = f"the last frame before {wanted} is of {self.time[count - 1]}" if count else "none is that early"
            raise ValueError(f"`until`: no frame at {wanted}; {after}.")
        return replace(self, time=self.time[:count], later=np.concatenate([self.time[count:], self.later]))


def north_up(observations: Observations) -> tuple[Observations, dict[str, slice]]:
    """The observations with the north above and the west on the left, as far as their coordinates tell; and what
    brings a forecast back into their order, for `xarray.Dataset.isel`."""
    turns = observations.grid.reversed
    if not any(turns):
        return observations, {}
    sides = [slice(None, None, -1 if turn else 1) for turn in turns]
    grid, read = observations.grid.turned(*turns), observations.read
    turned = replace(observations, grid=grid, read=lambda frames: np.ascontiguousarray(read(frames)[:, *sides]))
    return turned, dict(zip(grid.names, sides))


def _steps_between(first: np.datetime64, last: np.datetime64, step: np.timedelta64) -> float:
    unit = np.datetime_data(step)[0]
    if unit in "MY":
        first, last = first.astype(f"datetime64[{unit}]"), last.astype(f"datetime64[{unit}]")
    return float((last - first) / step)


def observe(
    data: Any,
    variable: str | None = None,
    units: str | None = None,
    time_step: str | None = None,
    grid_spacing: str | None = None,
    crs: str | None = None,
    start: str | None = None,
    until: str | None = None,
    **options: Any,
) -> Observations:
    """The observations that end last, of whatever a user has.

    Args:
        data: an array (T, H, W); an `xarray.DataArray` or `Dataset`, whose frames are read when they are needed; or
            a path, a pattern such as "radar_*.nc", or a list of paths, of files that
            [`~earthformer_hf.data.from_folder`] reads; or `Observations`.
        variable: to take, where there are several.
        units, grid_spacing, crs: where the data do not say them.
        time_step, start: where the data have no dates.
        until: a time such as "2020-01-01T12:00": the last frame is at or before it, by less than a step.
        options: of [`~earthformer_hf.data.folder.FolderConfig`], for files.

    Raises:
        ValueError: data of another kind; a hole in time, or nothing but missing values; an argument that contradicts
            what the data say.
    """
    if isinstance(data, str | os.PathLike) and str(data).endswith(".npy") and start is None and not options:
        data = np.asarray(open_npy(Path(data)))  # an array has no dates, and needs none
    if isinstance(data, Observations):
        found = data
    elif are_paths(data):
        times, stretch = stretches(data, variable, units, time_step, grid_spacing, crs, start, **options)
        found = stretch(latest(times, None if until is None else parsed_date(until, "until")))
    else:
        if options:
            raise ValueError(f"`{next(iter(options))}` is for files, `data` is {type(data).__name__}.")
        found = _with_statements(_of_array(data, variable, time_step, start), units, time_step, grid_spacing, crs)
    if until is not None:
        found = found.until(until)
    _check_steps(found.time, found.facts)
    return found


def latest(times: Sequence[np.ndarray], until: np.datetime64 | None = None) -> int:
    """The number of the stretch that ends last; of frames up to a time, if one is given and there are any."""
    ends = []
    for time in times:
        count = len(time) if until is None else int(np.searchsorted(time, until, side="right"))
        ends.append(time[count - 1] if count else np.datetime64("0000", "s"))
    return int(np.argmax(np.array(ends, "datetime64[s]")))


def parsed_date(text: str, name: str) -> np.datetime64:
    """A time such as "2020-01-01T12:00", in UTC where it states no other zone.

    Raises:
        ValueError: another text; `name` is the argument's.
    """
    try:
        time = datetime.datetime.fromisoformat(text)
        return np.datetime64((time.astimezone(datetime.UTC) if time.tzinfo else time).replace(tzinfo=None), "s")
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a time such as '2020-01-01T12:00', got {text!r}.") from None


def are_paths(data: Any) -> bool:
    """Whether data are a path, a pattern, or a list of paths."""
    several = isinstance(data, list | tuple) and len(data) > 0
    return all(isinstance(each, str | os.PathLike) for each in (data if several else [data]))


def _with_statements(
    found: Observations, units: str | None, time_step: str | None, grid_spacing: str | None, crs: str | None
) -> Observations:
    """The observations with what a user says of them."""
    facts, geo = found.facts, dict(found.grid.geo)
    if units is not None:
        if facts.units not in (UNKNOWN, "") and canonical_units(facts.units) != canonical_units(units):
            raise ValueError(f"`units`: the data say {facts.units!r}, got {units!r}.")
        facts = replace(facts, units=units)
    if crs is not None:
        if "crs" in geo or "grid_mapping" in geo:
            raise ValueError(f"`crs`: the data say {geo.get('crs', geo.get('grid_mapping'))!r}, got {crs!r}.")
        geo["crs"] = crs
    grid = with_units(replace(found.grid, geo=geo))
    if grid_spacing is not None:
        stated = grid.spacing
        if stated != UNKNOWN and not alike("grid_spacing", stated, grid_spacing):
            raise ValueError(f"`grid_spacing`: the coordinates say {stated!r}, got {grid_spacing!r}.")
        if stated == UNKNOWN:
            grid = replace(grid, geo={**grid.geo, "grid_spacing": grid_spacing})
    facts = replace(facts, grid_spacing=grid.spacing)
    if time_step is not None and alike("time_step", facts.time_step, time_step) is False:
        raise ValueError(f"`time_step`: the times are {facts.time_step} apart, got {time_step!r}.")
    return replace(found, facts=replace(facts, time_step=time_step or facts.time_step), grid=grid)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def _of_array(data: Any, variable: str | None, time_step: str | None, start: str | None) -> Observations:
    import xarray

    if isinstance(data, np.ndarray):
        if data.ndim != 3 or data.dtype.kind not in "iuf":
            raise ValueError(f"`data` must be numbers (T, H, W), got {data.dtype} of shape {data.shape}.")
        data = xarray.DataArray(data, dims=("time", "y", "x"), name=variable or "values")
    if isinstance(data, xarray.DataArray):
        data = data.to_dataset(name=data.name or variable or "values")
    if not isinstance(data, xarray.Dataset):
        raise ValueError(
            f"`data` must be an array (T, H, W), an xarray.DataArray or Dataset, or a path, got {type(data).__name__}."
        )
    layout = FolderConfig().layout | {"variable": [variable] if variable else [], "forecasts": False}
    gridded = GriddedFile("`data`", layout, data)
    if len(gridded.shape) != 2:
        raise ValueError(
            f"`data` must be maps of one variable (T, H, W), got (T, {', '.join(map(str, gridded.shape))})."
        )
    time = _times(gridded, time_step, start)
    geo = gridded.geo
    facts = DataFacts(geo.get("units", UNKNOWN), step_of(time, geo) if len(time) > 1 else UNKNOWN)
    read = gridded.read
    grid = grid_of(geo, (gridded.shape[0], gridded.shape[1]), {} if "y" in geo else gridded.places())
    return Observations("an array", gridded.names[0], read, time, facts, grid)


def _times(gridded: GriddedFile, time_step: str | None, start: str | None) -> np.ndarray:
    """(T,) datetime64[s], from the data or from the start and the step that a user states."""
    dates = gridded.dates()
    if dates is not None and dates.dtype.kind == "M":
        if start is not None:
            raise ValueError(f"`start`: the data have dates, got {start!r}.")
        time = np.atleast_1d(np.asarray(dates.values)).astype("datetime64[s]")
        if np.isnat(time).any() or (np.diff(time) <= np.timedelta64(0, "s")).any():
            raise ValueError("`data`: times must rise, and none be missing.")
        return time
    if start is None or time_step is None:
        return np.full(gridded.length, np.datetime64("NaT", "s"))
    step = parsed_step(time_step)
    first = parsed_date(start, "start")
    unit = np.datetime_data(step)[0]
    return (first.astype(f"datetime64[{unit}]") + step * np.arange(gridded.length)).astype("datetime64[s]")


def _check_steps(time: np.ndarray, facts: DataFacts) -> None:
    """Refuse a hole among the times."""
    step = facts.step
    if step is None or np.isnat(time).any() or np.datetime_data(step)[0] in "MY":
        return
    off = np.abs(np.diff(time) - step) / step
    if (off > 0.5).any():
        place = int(np.flatnonzero(off > 0.5)[-1])
        raise ValueError(
            f"`data`: there is a hole in time, {time[place]} is followed by {time[place + 1]} where frames are "
            f"{facts.time_step} apart; `until={str(time[place])!r}` forecasts from before it, frames after it alone "
            "from after it."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def stretches(
    data: Any,
    variable: str | None = None,
    units: str | None = None,
    time_step: str | None = None,
    grid_spacing: str | None = None,
    crs: str | None = None,
    start: str | None = None,
    **options: Any,
) -> tuple[list[np.ndarray], Callable[[int], Observations]]:
    """The stretches of frames without a hole that files hold; arguments as of [`observe`].

    Returns:
        The times of each, (T,) datetime64[s]; and a function, the number of a stretch -> its observations.
    """
    given = options | {"time_step": time_step, "start": start}
    path, given = _folder_and_pattern(data, {name: value for name, value in given.items() if value is not None})
    label, name = str(path), variable
    if path.is_file() and variable is None and path.suffix not in (".npy", ".npz", ".h5") and holds_ocean(path):
        label, splits = ocean_input(path)
        events, name = splits["test"], "ssta"
    else:
        events = _events(path, variable, given)
    times = [np.asarray(events[number]["time"], "datetime64[s]") for number in range(len(events))]
    _check_stated(times, time_step)
    longest = max(times, key=len)  # tells the step to a stretch of one frame as well

    def stretch(number: int) -> Observations:
        found = _of_event(events[number], label, name, longest, _places(path, events[number]["geo"], variable, given))
        return _with_statements(found, units, time_step, grid_spacing, crs)

    return times, stretch


def _places(path: Path, geo: Mapping[str, Any], variable: str | None, options: dict[str, Any]) -> Places:
    """Latitudes and longitudes of the cells, of files of a whole curvilinear grid; see [`Grid`]."""
    if {"y", "lat"} & set(geo) or {"coarsen", "crop", "tile"} & set(options) or path.suffix.lower() == ".npy":
        return {}
    known = {name: value for name, value in options.items() if name in FolderConfig.__dataclass_fields__}
    config = FolderConfig(data_dir=str(path), variable=variable, **known)
    return GriddedFile(str(Path(str(config.data_dir)) / geo["file"]), config.layout).places()


def _check_stated(times: list[np.ndarray], time_step: str | None) -> None:
    """Refuse a step that is stated of times which are another one apart."""
    together = np.unique(np.concatenate(times))
    if time_step is None or len(together) < 2 or np.isnat(together).any():
        return
    own = step_of(together, {}, parsed_step(time_step))
    if alike("time_step", own, time_step) is False:
        raise ValueError(f"`time_step`: the times are {own} apart, got {time_step!r}.")


def _of_event(event: dict, label: str, name: str | None, longest: np.ndarray, places: Places) -> Observations:
    values, time, geo = event["values"], np.asarray(event["time"], "datetime64[s]"), event["geo"]
    if len(values.shape) != 3:
        raise ValueError(f"`data`: {label} must hold maps of one variable (T, H, W), got {values.shape}.")
    several = time if len(time) > 1 else longest
    step = step_of(several, geo, common_step([several])) if len(several) > 1 else UNKNOWN
    facts = DataFacts(geo.get("units", UNKNOWN), step)
    if time.dtype.kind == "M" and name == "ssta":
        facts = replace(facts, units="degC")
    grid = grid_of(geo, (values.shape[1], values.shape[2]), places)
    name = name or str(geo.get("variable", "values"))
    return Observations(label, name, lambda frames: np.asarray(values[frames]), time, facts, grid)


def _folder_and_pattern(data: Any, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A path; of several files, or a pattern, their common folder and which of its files are meant."""
    if not isinstance(data, list | tuple):
        path = Path(data)
        if path.exists() or not glob.has_magic(str(data)):
            return path, options
        data = sorted(glob.glob(str(data)))
        if not data:
            raise ValueError(f"`data`: no file is named like {path}.")
    if len(data) == 1:
        return Path(data[0]), options
    folder = Path(os.path.commonpath([Path(each).parent for each in data]))
    names = [glob.escape(str(Path(each).relative_to(folder))) for each in data]
    return folder, options | {"pattern": names}


def _events(path: Path, variable: str | None, options: Mapping[str, Any]) -> Sequence[dict]:
    if not path.exists():
        raise ValueError(f"`data`: {path} does not exist.")
    table = from_folder(path, variable, "train", **({"fractions": (1, 0, 0), "forecasts": False} | dict(options)))
    events = Events(usable(table, str(path)))
    if not events:
        raise ValueError(f"`data`: {path} holds no frames.")
    return events


__all__ = ["Observations", "are_paths", "latest", "north_up", "observe", "parsed_date", "stretches"]
