"""Folders that are written beside what they replace, and take its place in one step.

A failed or killed export leaves the old folder, or the new one, and no draft. Where a folder cannot be swapped with
another (it is a mount point, the working directory, or the system is not Linux), its files are moved instead: a
failure undoes that, and after a kill in between they lie in a folder beside the draft, `.export-...-old`.
"""

import ctypes
import errno
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, see renameat2(2)

# Why a folder cannot be moved into another: it is another disk or a mount point, or may not be written.
STAYS = (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)

# Waits until the process that started it is gone, however that ends, and removes a folder.
REMOVE_AFTERWARDS = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


@contextmanager
def draft_for(folder: Path) -> Iterator[Path]:
    """An empty folder on the disk of `folder`, to be written and then published; what is left of it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=_place_of_draft(folder), ignore_cleanup_errors=True) as temporary:
        with _removed_after_a_kill(temporary):
            draft = Path(temporary) / "draft"
            draft.mkdir()
            yield draft


def publish(draft: Path, folder: Path, overwrite: bool):
    """Put a finished draft in the place of `folder`, which may not exist.

    Raises:
        ValueError: it holds something else, and must not be overwritten.
    """
    before = [path for path in folder.iterdir() if path != draft.parent] if folder.exists() else []
    if before and _same_files(draft, folder):
        return
    if before and not overwrite:
        raise ValueError(f"`folder`: {folder} holds something else; overwrite=True (--overwrite) replaces all of it.")
    if not folder.exists():
        draft.rename(folder)
        return
    shutil.copymode(folder, draft)
    if Path.cwd().is_relative_to(folder) or not _exchange(draft, folder):
        _move_files(draft, folder, before)


def _place_of_draft(folder: Path) -> Path:
    """The parent of a folder, or the folder itself if nothing can be moved from the one to the other."""
    if not folder.exists():
        return folder.parent
    try:
        with TemporaryDirectory(prefix=".export-", dir=folder.parent) as probe:
            moved = folder / Path(probe).name
            os.rename(probe, moved)
            os.rename(moved, probe)
    except OSError as reason:
        if reason.errno not in STAYS:
            raise
        return folder
    return folder.parent


@contextmanager
def _removed_after_a_kill(folder: str) -> Iterator[None]:
    """Let another process remove a folder once this one is gone: nothing else outlives a kill."""
    command = [sys.executable, "-I", "-S", "-c", REMOVE_AFTERWARDS, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield  # at its end, the pipe is closed, and so it is by a kill


def _exchange(draft: Path, folder: Path) -> bool:
    """Swap two folders in one step; False where that cannot be done."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return swap(AT_FDCWD, os.fsencode(draft), AT_FDCWD, os.fsencode(folder), RENAME_EXCHANGE) == 0


def _move_files(draft: Path, folder: Path, before: list[Path]):
    """Move what a folder holds out of it, and the files of a draft into it; undone if it fails."""
    old = draft.parent.with_name(f"{draft.parent.name}-old")
    old.mkdir()
    moves = [(path, old / path.name) for path in before] + [(path, folder / path.name) for path in draft.iterdir()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _same_files(draft: Path, folder: Path) -> bool:
    """Whether `folder` holds the files of the draft, which may lie in it, with the same bytes, and no others."""
    drafted = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    stored = [path for path in folder.rglob("*") if path.is_file() and draft.parent not in path.parents]
    return drafted == sorted(path.relative_to(folder) for path in stored) and all(
        filecmp.cmp(draft / name, folder / name, shallow=False) for name in drafted
    )


__all__ = ["draft_for", "publish"]
