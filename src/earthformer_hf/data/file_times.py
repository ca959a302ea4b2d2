"""The times of a file's frames, by the CF conventions (https://cfconventions.org, section 4.4), and steps of time.

xarray refuses a whole file for one time that it cannot decode; here, a file is opened with its numbers, and each
coordinate of time is decoded on its own.
"""

import re
from typing import Any, overload

import numpy as np

from ..errors import one_line


FILL_VALUES = 9e36  # what the library writes where nothing was written is 9.97e36
CALENDAR_UNITS = {"month": "M", "months": "M", "year": "Y", "years": "Y", "common_year": "Y", "common_years": "Y"}
UNDECODED = "undecoded_time"  # attribute of a coordinate: why its times are not known


def decode_times(dataset: Any) -> Any:
    """A dataset opened with `decode_times=False`, whose coordinates of time are datetime64[s], rounded,
    and NaT where missing.

    A coordinate that cannot be decoded keeps its numbers, and says why in its attribute `undecoded_time`.
    """
    for name, variable in dataset.variables.items():
        if " since " not in str(variable.attrs.get("units", "")):
            continue
        try:
            decoded = (
                variable.dims,
                _decoded(variable),
                {"standard_name": variable.attrs.get("standard_name", "time")},
            )
        except Exception as reason:  # whatever units and calendars files may state
            decoded = (variable.dims, variable.values, variable.attrs | {UNDECODED: one_line(reason)})
        if name in dataset.dims or name in dataset.coords:
            dataset = dataset.assign_coords({name: decoded})
        else:
            dataset = dataset.assign({name: decoded})
    return dataset


def _decoded(variable: Any) -> np.ndarray:
    import xarray

    numbers = np.asarray(variable.values, dtype="float64")
    missing = ~np.isfinite(numbers) | (np.abs(numbers) > FILL_VALUES)
    for key in ("_FillValue", "missing_value"):
        if key in variable.attrs:
            missing |= numbers == variable.attrs[key]
    units, calendar = str(variable.attrs["units"]), str(variable.attrs.get("calendar", "standard"))
    unit, _, origin = units.partition(" since ")
    if unit.strip().lower() in CALENDAR_UNITS:
        times = _calendar_steps(np.where(missing, 0, numbers), CALENDAR_UNITS[unit.strip().lower()], origin)
    else:
        attributes = {"units": units, "calendar": calendar}
        plain = np.where(missing, numbers[~missing][0] if (~missing).any() else 0, numbers)
        decoded = xarray.decode_cf(xarray.Dataset({"times": (variable.dims, plain, attributes)})).times.values
        times = decoded if decoded.dtype.kind == "M" else _from_other_calendar(decoded, calendar)
    nearest = (times.astype("datetime64[ms]") + np.timedelta64(500, "ms")).astype("datetime64[s]")
    return np.where(missing, np.datetime64("NaT", "s"), nearest)


def _calendar_steps(numbers: np.ndarray, unit: str, origin: str) -> np.ndarray:
    """Whole months or years after the origin; a fraction is that part of the month or year that it falls into."""
    match = re.match(r"\s*(\d+)-(\d+)(?:-(\d+))?", origin)
    if not match:
        raise ValueError(f"the origin {origin!r} is no date")
    start = np.datetime64(f"{int(match[1]):04d}-{int(match[2]):02d}", "M")
    days = np.timedelta64(int(match[3] or 1) - 1, "D")
    whole = np.floor(numbers).astype(int)
    months = whole if unit == "M" else 12 * whole
    first = (start + months).astype("datetime64[s]")
    following = (start + months + (1 if unit == "M" else 12)).astype("datetime64[s]")
    seconds = np.rint((following - first).astype("int64") * (numbers - whole))
    return first + seconds.astype("timedelta64[s]") + days


def _from_other_calendar(dates: np.ndarray, calendar: str) -> np.ndarray:
    """Dates of a calendar such as noleap under the same name in ours.

    Raises:
        ValueError: a date that ours lacks, such as 30 February of 360_day.
    """
    times = np.empty(dates.shape, "datetime64[us]")
    for index, date in np.ndenumerate(dates):
        try:
            times[index] = np.datetime64(date.isoformat(), "us")
        except ValueError:
            raise ValueError(f"{date.isoformat()} of the calendar {calendar!r} is no date of ours") from None
    return times


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


@overload
def parsed_step(text: str, name: str = "time_step") -> np.timedelta64: ...


@overload
def parsed_step(text: None, name: str = "time_step") -> None: ...


@overload
def parsed_step(text: str | None, name: str = "time_step") -> np.timedelta64 | None: ...


def parsed_step(text: str | None, name: str = "time_step") -> np.timedelta64 | None:
    """A step in numpy's notation, such as "5m".

    Raises:
        ValueError: another text; `name` is the argument's.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([smhDWMY])", str(text))
    if not match or not int(match[1]):
        raise ValueError(f"`{name}` must be such as '5m', '1h', '1D' or '1M', got {text!r}.")
    return np.timedelta64(int(match[1]), match[2])  # type: ignore[arg-type]


def most_common_step(times: list[np.ndarray], tolerance: np.timedelta64 | None = None) -> np.timedelta64:
    """The step between most neighbours; months and years count as such.

    Args:
        times: (T,) rising, of each series of frames.
        tolerance: by how much a time may be off; the step is then the mean of those that are no gaps, in whole
            minutes if it is one or more.
    """
    steps = np.concatenate([np.empty(0, "timedelta64[s]"), *(np.diff(np.unique(time)) for time in times)])
    if not len(steps):
        return np.timedelta64(1, "s")
    if tolerance is not None:
        seconds = steps.astype("int64")
        typical = np.median(seconds)
        mean = seconds[(seconds >= 0.5 * typical) & (seconds <= 1.5 * typical)].mean()
        whole = 60 if mean >= 60 else 1
        return np.timedelta64(max(1, int(round(mean / whole))) * whole, "s")
    values, counts = np.unique(steps, return_counts=True)
    step = values[counts.argmax()]
    days = step / np.timedelta64(1, "D")
    for unit, longest in (("M", 31), ("Y", 366)):
        if 0.9 * longest <= days <= longest:
            calendar = np.timedelta64(1, unit)  # type: ignore[call-overload]
            if all(follows(time[:-1], time[1:], calendar).mean() > 0.5 for time in times if len(time) > 1):
                return calendar
    return step


def follows(
    before: np.ndarray, after: np.ndarray, step: np.timedelta64, tolerance: np.timedelta64 | None = None
) -> np.ndarray:
    """Whether times are a step later than others: months and years exactly, other steps to a tenth.

    Args:
        tolerance: by how much each time may be off its place; two neighbours may then be off by twice that.
    """
    unit = np.datetime_data(step)[0]
    if unit in "MY":
        return after.astype(f"datetime64[{unit}]") - before.astype(f"datetime64[{unit}]") == step
    off = np.abs((after - before) - step)
    return (off <= 2 * tolerance) if tolerance is not None else (off / step <= 0.1)


__all__ = ["UNDECODED", "decode_times", "follows", "most_common_step", "parsed_step"]
