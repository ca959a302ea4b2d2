"""Which files of a folder are a user's data."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .file_checks import FORMATS_BY_ENDING, ZARR_MARKS, file_state


ENDINGS = {*FORMATS_BY_ENDING} - {".npz", ".zip", ".gz", ".tgz", ".tar"}


def find_files(
    folder: Path, pattern: str | Sequence[str] | None = None, follow_links: bool = False
) -> tuple[list[Path], list[str]]:
    """The data files and Zarr stores below a folder, sorted, and why links were passed over.

    Hidden files and folders (`.ipynb_checkpoints`, `._a.nc`) are skipped. A link is followed if it stays within the
    folder; a file that is reached twice is taken once. A link to nowhere is taken, for its reader to name.

    Args:
        folder: where to look; subfolders as well.
        pattern: of paths below the folder, such as "**/radar_*.nc", or several; all of a known ending if omitted.
        follow_links: also to places outside the folder.
    """
    if pattern is not None and not isinstance(pattern, str):
        parts = [find_files(folder, each, follow_links) for each in pattern]
        return sorted({path for paths, _ in parts for path in paths}), sorted(
            {why for _, passed in parts for why in passed}
        )
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


def list_files(
    paths: list[Path], describe: Callable[[Path], dict[str, Any]], cache: Path, description: str
) -> list[dict[str, Any]]:
    """What is known of each file, in parallel; of good files that have not changed, as it was found before.

    Args:
        describe: path -> what JSON can hold, with a `problem` if the file is bad; goes to other processes.
        cache: a JSON file that keeps what was found.
        description: of the progress bar, which is shown for 100 files or more.
    """
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    states = {path: _state(path) for path in paths}
    new = [path for path in paths if known.get(str(path), [None])[0] != states[path] or states[path] is None]
    workers = min(8, os.cpu_count() or 1) if len(new) >= 100 else 1
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        results = pool.map(describe, new, chunksize=16) if pool else map(describe, new)
        bar = logging.tqdm(results, total=len(new), desc=description, unit="file", disable=len(new) < 100)
        found = dict(zip(map(str, new), bar))
    entries = {str(path): found.get(str(path)) or known[str(path)][1] for path in paths}
    if new:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        good = {path: entry for path, entry in entries.items() if "problem" not in entry}
        part.write_text(json.dumps({path: [states[Path(path)], entry] for path, entry in good.items()}))
        part.replace(cache)
    return list(entries.values())


def _state(path: Path) -> list[Any] | None:
    """What an entry holds for; None of a file that cannot be read, which is asked each time."""
    try:
        return list(file_state(path)[1:])
    except OSError:
        return None


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
        if not os.path.isdir(entry.path):  # also of a ring of links, which is a link to nowhere
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


__all__ = ["ENDINGS", "find_files", "is_zarr_store", "list_files"]
