"""The times of a file's frames: its dates, or what the options of a folder or the file's name say."""

import datetime
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .file_times import UNDECODED, parsed_step


if TYPE_CHECKING:
    from .gridded_file import GriddedFile

DIRECTIVES = {"Y": r"\d{4}", "j": r"\d{3}", "f": r"\d{1,6}"} | dict.fromkeys("ymdHMSI", r"\d\d")
DIRECTIVES |= dict.fromkeys("aAbBp", "[A-Za-z]+")
FORMATS = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}  # of so many digits


class Statements(Protocol):
    """What options of a folder say of times, see [`~earthformer_hf.data.folder.FolderConfig`]."""

    name_time: str | None
    start: str | None
    time_step: str | None


def times_of(grid: "GriddedFile", path: Path, config: Statements) -> tuple[np.ndarray, bool]:
    """The time of every frame, (T,) datetime64[s]; and whether they are counted from `start`.

    Raises:
        ValueError: names the file, and the frame.
    """
    what, dates = f"{path}, {grid.names[0]!r}", grid.dates()
    undecoded = None if dates is None else dates.attrs.get(UNDECODED)
    if config.name_time or dates is None or (undecoded and (config.start or config.time_step)):
        return _stated_times(grid.length, path, config), not config.name_time
    if undecoded:
        raise ValueError(f"{what}: its times cannot be decoded ({undecoded}); state `start` and `time_step`.")
    time = np.atleast_1d(dates.values).astype("datetime64[s]")
    if np.isnat(time).any():
        raise ValueError(f"{what}: the time of frame {np.flatnonzero(np.isnat(time))[0]} is missing.")
    falling = np.flatnonzero(np.diff(time) <= np.timedelta64(0, "s"))
    if len(falling):
        frame = falling[0]
        raise ValueError(f"{what}: time must rise, but frame {frame + 1} ({time[frame + 1]}) follows {time[frame]}.")
    return time, False


def _stated_times(length: int, path: Path, config: Statements) -> np.ndarray:
    """The times of a file without dates, by the options."""
    step = parsed_step(config.time_step)
    if length > 1 and step is None:
        raise ValueError(f"`time_step`: {path} has no dates along its {length} frames; state it.")
    if config.name_time:
        start = np.datetime64(_time_in_name(path, config.name_time), "s")
    elif config.start:
        start = np.datetime64(str(config.start), "s")
    else:
        raise ValueError(
            f"`start`: {path} has no dates; state it and `time_step`, or how its name tells the time by "
            f"`--option name_time={_format_of(path)}`."
        )
    return start.reshape(1) if step is None else _counted(start, step, 0, length, path)


def _counted(start: np.datetime64, step: np.timedelta64, first: int, length: int, path: Any) -> np.ndarray:
    """(length,) datetime64[s], from so many steps after the start on."""
    unit = np.datetime_data(step)[0]
    origin = start.astype(f"datetime64[{unit if unit in 'MY' else 's'}]")
    if origin != start:
        raise ValueError(f"`start`: of {path} must be the first of a month or year for steps of {step}, got {start}.")
    return (origin + step * np.arange(first, first + length)).astype("datetime64[s]")


def _time_in_name(path: Path, pattern: str) -> datetime.datetime:
    """The time in a file's name, the whole of which or a part is like the pattern.

    Raises:
        ValueError: no part of the name is, or several are that say different times.
    """
    with suppress(ValueError):
        return datetime.datetime.strptime(path.name, pattern)
    parts = re.split("%(.)", pattern)  # text and directives by turns
    words = "".join(DIRECTIVES.get(part, ".+?") if n % 2 else re.escape(part) for n, part in enumerate(parts))
    before, after = "" if parts[0] else r"(?<!\d)", "" if parts[-1] else r"(?!\d)"
    found = set()
    for match in re.finditer(before + words + after, path.name) if len(parts) > 1 else ():
        with suppress(ValueError):
            found.add(datetime.datetime.strptime(match[0], pattern))
    if len(found) != 1:
        times = " and ".join(sorted(map(str, found))) or "none"
        raise ValueError(
            f"`name_time`: {path}: one time like {pattern!r} must stand in the name, found {times}; write it such as "
            f"`--option name_time={_format_of(path)}`."
        )
    return found.pop()


def _format_of(path: Path) -> str:
    """What `name_time` may be: of a name with 8, 10, 12 or 14 digits, those as a date; else an example."""
    for digits in re.findall(r"\d+", path.stem):
        if len(digits) in FORMATS:
            return path.stem.replace(digits, FORMATS[len(digits)])
    return "rain_%Y%m%d%H%M"


def count_on(files: list[dict[str, Any]], config: Statements):
    """Let files of a series that are counted from `start` follow each other, in the order of their names.

    Numbers in names count as such: "r_9" is before "r_10".

    Raises:
        ValueError: several such files, and no `time_step`.
    """
    series: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        if file.get("counted"):
            series.setdefault(f"{file['series']} {file['shape']}", []).append(file)
    step = parsed_step(config.time_step)
    for group in series.values():
        if len(group) > 1 and step is None:
            raise ValueError(
                f"`time_step`: {group[0]['path']} and {len(group) - 1} more have no dates; state how far apart they "
                "are."
            )
        first = 0
        for file in sorted(group, key=lambda file: _natural(file["name"])):
            length = len(file["time"])
            if first and step is not None:
                file["time"] = _counted(np.datetime64(str(config.start), "s"), step, first, length, file["path"])
            first += length


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


__all__ = ["count_on", "times_of"]
