"""Which frames of which files follow each other: the events of a folder.

A file is a dict: path, name (its path below the folder), series, variables (names), time (T,), shape, dtype and
geo. A *part* is [path, first frame, end].
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .file_times import follows
from .measures import canonical_units


logger = logging.get_logger(__name__)
# folders that tell dates apart, not series: 2020, 202001, 2020-01-31T12, 01, month=1; and the day of a year, 2020/366
YEAR, MONTH, DAY, HOUR = r"(year=)?(1[89]|2[01])\d\d", "(0[1-9]|1[0-2])", r"(0[1-9]|[12]\d|3[01])", r"([01]\d|2[0-3])"
NUMBER = r"((month|day|hour)=)?([0-2]?\d|3[01])"
DATED_FOLDER = re.compile(rf"{YEAR}([-_.]?{MONTH}([-_.]?{DAY}([-_.T]?{HOUR}([-_.]?[0-5]\d)*)?)?)?|{NUMBER}")
DAY_OF_YEAR = re.compile(rf"{YEAR}/(day=)?([0-2]\d\d|3[0-5]\d|36[0-6])")
SAME_PLACE = 1e-6  # by what part of the spacing coordinates of one grid may differ
Frame = tuple[np.datetime64, int, int]  # time, number of the file in its group, number of the frame in the file


def series_of(path: Path, pattern: str | None) -> tuple[str, ...]:
    """What files of one series have in common.

    Raises:
        ValueError: the pattern does not occur in the path.
    """
    if pattern is None:
        folders = path.parts[:-1]
        return tuple(
            folder
            for above, folder in zip(("", *folders), folders)
            if not (DATED_FOLDER.fullmatch(folder) or DAY_OF_YEAR.fullmatch(f"{above}/{folder}"))
        )
    match = re.search(pattern, path.as_posix())
    if match is None:
        raise ValueError(f"`series`: {pattern!r} does not occur in {path}.")
    return tuple(group or "" for group in (match.groups() or (match[0],)))


def same_series_and_grid(files: list[dict[str, Any]], differences: list[str]) -> list[list[dict[str, Any]]]:
    """Groups of files that may continue each other; why a file of a series begins a further one goes to the list."""
    groups: list[list[dict[str, Any]]] = []
    for file in files:
        difference = ""
        for group in groups:
            if group[0]["series"] == file["series"]:
                difference = difference_of(group[0], file)
                if not difference:
                    group.append(file)
                    break
                difference = f"{file['name']} and {group[0]['name']} differ in {difference}"
        else:
            groups.append([file])
            differences += [difference] if difference else []
    return groups


def difference_of(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what frames of two files of a series differ, "" if in nothing: their variables, units, shape or place.

    Units are compared by their meaning, and coordinates to a millionth of their spacing.
    """
    if one["variables"] != other["variables"]:
        return f"the variable, {other['variables']} and {one['variables']}"
    if one["shape"] != other["shape"]:
        return f"the shape, {other['shape']} and {one['shape']}"
    for name in sorted({*one["geo"], *other["geo"]}):
        first, second = one["geo"].get(name), other["geo"].get(name)
        if first is None or second is None:
            return f"{name}, which only one of them states"
        if name == "units":
            if [canonical_units(unit) for unit in first.split(",")] != [
                canonical_units(unit) for unit in second.split(",")
            ]:
                return f"the units, {second!r} and {first!r}"
        elif name in ("x", "y"):
            if not _same_places(first, second):
                return f"{name}, whose order is reversed" if _same_places(first, second[::-1]) else name
        elif first != second:
            return name
    return ""


def _same_places(one: list[float], other: list[float]) -> bool:
    places, others = np.array(one), np.array(other)
    spacing = np.abs(np.diff(places)).min() if len(places) > 1 else 1.0
    return len(places) == len(others) and bool((np.abs(places - others) <= SAME_PLACE * spacing).all())


def without_copies(
    group: list[dict[str, Any]], read: Callable[[dict[str, Any], int], np.ndarray]
) -> tuple[dict[str, str], list[Frame]]:
    """The frames of files in the order of time, one copy of each; and path -> problem of files that contradict, or
    that `read` cannot read (a ValueError)."""
    problems: dict[str, str] = {}
    while True:
        found, copies, kept = _one_pass(group, read, problems)
        if not found:
            break
        problems |= found  # without these files, others may no longer be copies of anything
    for (path, copy), count in copies.items():
        logger.warning(f"{copy}: {count} frames are copies of those in {path}, and are left out.")
    return problems, kept


def _one_pass(
    group: list[dict[str, Any]], read: Callable[[dict[str, Any], int], np.ndarray], refused: dict[str, str]
) -> tuple[dict[str, str], dict[tuple[str, str], int], list[Frame]]:
    """Problems, copies and kept frames of the files that are not refused."""
    frames = [
        (time, n, frame)
        for n, file in enumerate(group)
        if file["path"] not in refused
        for frame, time in enumerate(file["time"])
    ]
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
        values = []
        for number, place in ((other, other_frame), (n, frame)):
            try:
                values.append(read(group[number], place))
            except ValueError as reason:  # what others hold at its times is then no copy
                return {group[number]["path"]: str(reason)}, {}, []
        if np.array_equal(values[0], values[1], equal_nan=True):
            copies[paths] = copies.get(paths, 0) + 1
            continue
        for path, against in (paths, paths[::-1]):
            problems.setdefault(path, f"{path}: holds other values than {against} at the same time {time}")
    return problems, copies, kept


def cut_at_gaps(
    group: list[dict[str, Any]], frames: list[Frame], step: np.timedelta64, tolerance: Any, cuts: list[str]
) -> list[dict[str, Any]]:
    """Stretches of frames at an equal step; each end of one but the last adds its reason to `cuts`."""
    if not frames:
        return []
    time = np.array([entry[0] for entry in frames], "datetime64[s]")
    ends = np.flatnonzero(~follows(time[:-1], time[1:], step, tolerance)) + 1
    for end in ends.tolist():
        reason = "a gap" if time[end] - time[end - 1] > step.astype("timedelta64[s]", casting="unsafe") else "a step"
        before, after = (group[frames[n][1]]["name"] for n in (end - 1, end))
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


def parts_between(parts: list[list], begin: int, stop: int) -> list[list]:
    """The parts of the frames from `begin` to `stop` of all."""
    result, before = [], 0
    for path, first, end in parts:
        low, high = max(begin - before, 0), min(stop - before, end - first)
        if low < high:
            result.append([path, first + low, first + high])
        before += end - first
    return result


__all__ = ["cut_at_gaps", "parts_between", "same_series_and_grid", "series_of", "without_copies"]
