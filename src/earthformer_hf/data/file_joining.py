"""Which frames of which files follow each other: the events of a folder.

A file is a dict: path, series, time (T,), shape, dtype and geo. A *part* is [path, first frame, end].
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .file_times import follows


logger = logging.get_logger(__name__)
# Folders that tell dates apart, not series: 2024, 07, 2024-07, 20240715, 2024-07-15T12, year=2024, ...
DATED_FOLDER = re.compile(
    r"(year=)?(18|19|20|21)\d\d([-_.]?[01]\d([-_.]?[0-3]\d([-_.T]?[0-2]\d([-_.]?[0-5]\d){0,2})?)?)?"
    r"|(month=|day=|hour=)?[0-3]?\d"
)
SAME_PLACE = 1e-6  # by what part of the spacing coordinates of one grid may differ
Frame = tuple[np.datetime64, int, int]  # time, number of the file in its group, number of the frame in the file


def series_of(path: Path, pattern: str | None) -> tuple[str, ...]:
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


def same_series_and_grid(files: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
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


def without_copies(
    group: list[dict[str, Any]], read: Callable[[dict[str, Any], int], np.ndarray]
) -> tuple[dict[str, str], list[Frame]]:
    """The frames of files in the order of time, one copy of each; and path -> problem of files that contradict."""
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
        if np.array_equal(read(group[other], other_frame), read(group[n], frame), equal_nan=True):
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
