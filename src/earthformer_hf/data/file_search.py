"""Which files of a folder are a user's data."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .file_checks import FORMATS_BY_ENDING, ZARR_MARKS


ENDINGS = {*FORMATS_BY_ENDING} - {".npz", ".zip", ".gz", ".tgz", ".tar"}


def find_files(folder: Path, pattern: str | None = None, follow_links: bool = False) -> tuple[list[Path], list[str]]:
    """The data files and Zarr stores below a folder, sorted, and why links were passed over.

    Hidden files and folders (`.ipynb_checkpoints`, `._a.nc`) are skipped. A link is followed if it stays within the
    folder; a file that is reached twice is taken once. A link to nowhere is taken, for its reader to name.

    Args:
        folder: where to look; subfolders as well.
        pattern: of paths below the folder, such as "**/radar_*.nc"; all of a known ending if omitted.
        follow_links: also to places outside the folder.
    """
    if is_zarr_store(folder):
        return [folder], []
    if pattern is not None and not re.search(r"[*?\[]", pattern):  # one file: what lies beside it costs nothing
        single = folder / pattern
        return ([single] if os.path.lexists(single) else []), []
    if pattern is not None and re.fullmatch(r"(\[.\]|[^*?\[])+", pattern):  # an escaped name
        single = folder / re.sub(r"\[(.)\]", r"\1", pattern)
        return ([single] if os.path.lexists(single) else []), []
    wanted = None if pattern is None else _regular_expression(pattern)
    depth = None if pattern is None or "**" in pattern else pattern.count("/")
    root = os.path.realpath(folder)
    found: dict[str, str] = {}  # real path -> path
    passed: list[str] = []
    for path in _walk(str(folder), root, depth, follow_links, {root}, passed):
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        known = os.path.isdir(path) or os.path.splitext(path)[1].lower() in ENDINGS
        if wanted.fullmatch(name) if wanted else known:
            real = os.path.realpath(path)
            if real not in found or os.path.islink(found[real]):
                found[real] = path
    return sorted(map(Path, found.values())), passed


def is_zarr_store(path: str | Path) -> bool:
    """Whether a folder holds what a Zarr store begins with, whatever its name."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ZARR_MARKS)


def _walk(
    folder: str, root: str, depth: int | None, follow_links: bool, visited: set[str], passed: list[str]
) -> Iterator[str]:
    """Files and Zarr stores below a folder."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if os.path.commonpath([root, target]) != root and os.path.exists(target) and not follow_links:
                passed.append(f"{entry.path}: a link to {target}, outside the folder; `follow_links` takes it")
                continue
            if os.path.isdir(target) and target in visited:
                continue
        if not entry.is_dir():
            yield entry.path
        elif is_zarr_store(entry.path):
            yield entry.path
        elif depth is None or depth > 0:
            real = os.path.realpath(entry.path)
            if real in visited:
                continue
            visited.add(real)
            yield from _walk(entry.path, root, None if depth is None else depth - 1, follow_links, visited, passed)


def _regular_expression(pattern: str) -> re.Pattern:
    """A path's pattern as a regular expression: `**` is any number of folders, `*` stops at the end of a name."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    words = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(words.get(p, p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in parts)
    )


__all__ = ["ENDINGS", "find_files", "is_zarr_store"]
