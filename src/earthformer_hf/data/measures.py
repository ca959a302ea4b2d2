"""Units, time steps and grid spacings, as the events of a data set state them, and whether two are the same.

Texts are those of [`~earthformer_hf.EarthformerFeatureExtractor`]: "mm/h", "5m" (numpy's notation), "3 km".
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .file_times import most_common_step, parsed_step


UNKNOWN = "unknown"
SPACING_TOLERANCE = 0.1  # by what part two spacings may differ and still be one
KILOMETERS_PER_DEGREE = 111.2  # of latitude

# unit -> how else it is written, in small letters and without spaces
UNITS = {
    "mm/h": ("mmh-1", "mmh^-1", "mmhr-1", "mm/hr", "mm/hour", "mmhour-1"),
    "mm/s": ("mms-1", "kgm-2s-1", "kg/m2/s", "kg/m^2/s"),
    "m/s": ("ms-1",),
    "mm/day": ("mm/d", "mmday-1", "mmd-1"),
    "mm": ("kgm-2", "kg/m2", "kg/m^2", "millimeter", "millimetre"),
    "dBZ": ("dbz",),
    "degC": ("degc", "c", "celsius", "degreec", "degreescelsius", "degree_celsius", "degrees_celsius", "deg_c", "°c"),
    "K": ("k", "kelvin", "degk"),
    "1": ("1", "-", "", "dimensionless", "none"),
}
_CANONICAL = {spelling: unit for unit, spellings in UNITS.items() for spelling in (*spellings, unit.lower())}


AMOUNT = re.compile(r"mm/?\(?(\d*)(?:min|mins|minutes?)\)?(?:\^?-1)?")  # in so many minutes


def canonical_units(text: str) -> str:
    """One spelling of a unit: "mm hr-1" is "mm/h", "mm (5 min)-1" is "mm/5min"; an unknown one stays as it is."""
    spelling = "".join(text.lower().split())
    amount = AMOUNT.fullmatch(spelling)
    return f"mm/{amount[1] or 1}min" if amount else _CANONICAL.get(spelling, text.strip())


@dataclass(frozen=True)
class DataFacts:
    """What the scored numbers are; "unknown" where nothing says it.

    Args:
        units: of the stored values.
        time_step: between two frames of a window.
        grid_spacing: between two pixels.
    """

    units: str = UNKNOWN
    time_step: str = UNKNOWN
    grid_spacing: str = UNKNOWN

    @property
    def step(self) -> np.timedelta64 | None:
        """The time step; None if it is unknown."""
        return None if self.time_step == UNKNOWN else parsed_step(self.time_step)

    @property
    def minutes(self) -> float | None:
        """The time step in minutes; None if it is unknown or counts months."""
        step = self.step
        if step is None or np.datetime_data(step)[0] in "MY":
            return None
        return float(step / np.timedelta64(1, "m"))

    @property
    def kilometers(self) -> float | None:
        """The grid spacing in kilometres, of degrees those along a meridian; None if it is unknown."""
        amount, unit = parsed_spacing(self.grid_spacing)
        factor = {"km": 1.0, "degrees": KILOMETERS_PER_DEGREE}.get(unit)
        return None if factor is None else amount * factor


def common_step(times: Iterable[np.ndarray]) -> np.timedelta64 | None:
    """The step between the frames of events, (T,) each: the most common one, the mean where scan times jitter."""
    dated = [time for time in (np.asarray(time, "datetime64[s]") for time in times) if _is_dated(time)]
    if not dated:
        return None
    step = most_common_step(dated)
    if np.datetime_data(step)[0] == "s" and np.mean(np.concatenate([np.diff(time) for time in dated]) == step) < 0.5:
        step = most_common_step(dated, np.timedelta64(0, "s"))
    return step


def _is_dated(time: np.ndarray) -> bool:
    return len(time) > 1 and not np.isnat(time).any()


def step_of(
    time: np.ndarray, geo: Mapping[str, Any], common: np.timedelta64 | None = None, frame_stride: int = 1
) -> str:
    """The time step of every `frame_stride`th frame of an event.

    Args:
        time: (T,) of its frames; where it is undated, `geo["minutes"]` says the step.
        common: the step of all events, which is this one's if the median of its own is within a quarter of it.
    """
    time = np.asarray(time, "datetime64[s]")
    if not _is_dated(time):
        return _step_text(np.timedelta64(60 * geo["minutes"], "s") * frame_stride) if "minutes" in geo else UNKNOWN
    off = 1.0 if common is None else abs(_seconds(common) / float(np.median(np.diff(time).astype(int))) - 1)
    step = common if off < 0.25 else common_step([time])
    return UNKNOWN if step is None else _step_text(step * frame_stride)


def _seconds(step: np.timedelta64) -> float:
    """About how long a step is."""
    unit = np.datetime_data(step)[0]
    days = {"M": 365.2425 / 12, "Y": 365.2425}.get(unit)
    return float(step / np.timedelta64(1, "s")) if days is None else 86400 * days * int(step.astype(int))


def _step_text(step: np.timedelta64) -> str:
    unit = np.datetime_data(step)[0]
    if unit in "MY":
        return f"{step.astype(int)}{unit}"
    seconds = int(step / np.timedelta64(1, "s"))
    size, unit = next((size, unit) for size, unit in ((86400, "D"), (60, "m"), (1, "s")) if seconds % size == 0)
    return f"{seconds // size}{unit}"


def spacing_of(geo: Mapping[str, Any]) -> str:
    """The grid spacing that a `geo` states, or that follows from the coordinates of its rows and columns."""
    if "grid_spacing" in geo:
        return str(geo["grid_spacing"])
    names = ("lat", "lon") if "lat" in geo else ("y", "x")
    sides = [np.asarray(geo.get(name, ()), "float64") for name in names]
    if min(map(len, sides)) < 2:
        return UNKNOWN
    spacing = float(np.sqrt(np.prod([np.median(np.abs(np.diff(side))) for side in sides])))
    words = f"{geo.get('y_units', '')} {geo.get('y_name', '')}".lower()
    if "lat" in geo or "degree" in words or words.split()[-1:] in (["lat"], ["latitude"]):
        return f"{spacing:.6g} degrees"
    if geo.get("y_units", "").lower() in ("km", "kilometer", "kilometre", "kilometers", "kilometres"):
        return f"{spacing:.6g} km"
    if geo.get("y_units", "").lower() in ("m", "meter", "metre", "meters", "metres"):
        return f"{spacing / 1000:.6g} km" if spacing >= 1000 else f"{spacing:.6g} m"
    return UNKNOWN


def parsed_spacing(text: str) -> tuple[float, str]:
    """A grid spacing such as "3 km", "20 m" or "5 degrees" in "km" or "degrees"; 0 and "" of anything else."""
    match = re.fullmatch(r"([\d.]+(?:e-?\d+)?) ?(km|m|deg|degrees?)", text.strip(), re.IGNORECASE)
    if match is None:
        return 0.0, ""
    amount, unit = float(match[1]), match[2].lower()
    return (amount / 1000 if unit == "m" else amount), ("km" if unit in ("km", "m") else "degrees")


def alike(field: str, one: str, other: str) -> bool | None:
    """Whether two facts are the same; None if they cannot be compared."""
    if UNKNOWN in (one, other):
        return None
    if field == "units":
        return canonical_units(one) == canonical_units(other)
    if field == "time_step":
        steps = [DataFacts(time_step=text).step for text in (one, other)]
        calendar = {np.datetime_data(step)[0] in "MY" for step in steps if step is not None}
        return len(calendar) == 1 and bool(steps[0] == steps[1])
    (first, unit), (second, other_unit) = parsed_spacing(one), parsed_spacing(other)
    if unit != other_unit or not unit:
        return None
    return abs(first - second) <= SPACING_TOLERANCE * max(first, second)


__all__ = [
    "UNKNOWN",
    "DataFacts",
    "alike",
    "canonical_units",
    "common_step",
    "parsed_spacing",
    "spacing_of",
    "step_of",
]
