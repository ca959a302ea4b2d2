"""Files from outside are hostile until checked: what may be opened, and how.

HDF5 is not a safe format. A crafted file crashes the library, reads other files of the host through links, external
storage or virtual data sets (CVE-2026-1669), or declares shapes that no memory holds; so do crafted archives. A file
is therefore opened in a child process first, of bounded memory and time, which this process survives; what passes is
opened here. A chunk that decodes to more than it can honestly hold is found by the sizes that the file's index states;
where these do not tell, chunks are decoded in the child, all of a small file and a sample of a large one. A file that
has passed is checked again when its size, times, number in its file system, head, middle or tail differ.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import file_checks
from .file_checks import (
    ENGINES,
    SECONDS,
    archive_members,
    archive_problem,
    file_state,
    format_of,
    npy_problem,
    npz_problem,
    open_with_xarray,
)


def _end(process: Any, late: threading.Event) -> None:
    late.set()
    process.kill()


class _Child:
    """The checking process of this process, started when it is needed."""

    def __init__(self) -> None:
        self.owner, self.lock = 0, threading.Lock()
        self.process: Any = None

    def ask(self, path: str, allow_sparse: bool) -> str | None:
        """What is wrong with a file."""
        if self.owner != os.getpid():  # a fork's parent keeps its own
            self.__init__()  # type: ignore[misc]
            self.owner = os.getpid()
        with self.lock:
            while True:
                if self.process is None or self.process.poll() is not None:
                    self.process = self._start()
                process, late = self.process, threading.Event()
                timer = threading.Timer(SECONDS, _end, [process, late])
                timer.start()
                try:
                    process.stdin.write(json.dumps([path, allow_sparse]) + "\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                except BrokenPipeError:  # it was idle, and has ended
                    continue
                finally:
                    timer.cancel()
                if answer:
                    return json.loads(answer)
                code = process.wait()
                if late.is_set():
                    return f"could not be checked within {SECONDS} s"
                if code:
                    return f"crashed the process that checked it (exit status {code})"

    def _start(self) -> Any:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", file_checks.__file__]
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]


MAX_CHECKED = 2**16  # files that are remembered

_child = _Child()
_checked: dict[tuple, str | None] = {}  # state of a file, and whether it may be sparse -> what is wrong with it


def check_files(paths: Iterable[Any], allow_sparse: bool = False) -> dict[Any, str]:
    """What is wrong with files: path, as it was given, -> problem; without those that are fine.

    HDF5 and NetCDF, npy and npz, zip, tar and gzip, Zarr stores, GeoTIFF and GRIB, told apart by their first bytes.
    The files are opened in a child process.

    Args:
        allow_sparse: do not refuse files that declare far more than they store.
    """
    problems = {}
    for path in paths:
        if problem := _problem_and_state(path, allow_sparse)[0]:
            problems[path] = problem
    return problems


def _problem_and_state(path: Any, allow_sparse: bool) -> tuple[str | None, tuple]:
    try:
        state = file_state(path)
        key = (*state, allow_sparse)
        if key not in _checked:
            problem = _child.ask(state[0], allow_sparse)
            if file_state(path) != state:
                return "changed while it was checked", state
            if len(_checked) >= MAX_CHECKED:
                _checked.pop(next(iter(_checked)))  # the oldest; a service is sent files without end
            _checked[key] = problem
    except FileNotFoundError:
        return "does not exist", ()
    except OSError as reason:
        return f"cannot be read: {reason.strerror}", ()
    return _checked[key], state


def _require_sound(path: str | Path, allow_sparse: bool = False) -> tuple:
    problem, state = _problem_and_state(path, allow_sparse)
    if problem:
        raise ValueError(f"{path}: {problem}.")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Opening what has passed
# ---------------------------------------------------------------------------------------------------------------------


def open_hdf5(path: str | Path, allow_sparse: bool = False) -> Any:
    """An HDF5 file to read from, an `h5py.File`; it stays open for the next call, so it must not be closed.

    Raises:
        ValueError: the file is missing, not HDF5, damaged or crafted.
    """
    return _open_hdf5(os.getpid(), _require_sound(path, allow_sparse))


@functools.lru_cache(128)
def _open_hdf5(process: int, state: tuple) -> Any:
    """`process` keeps the handles of a fork's parent apart."""
    import h5py

    if problem := _wrong_format(state[0], "hdf5"):
        raise ValueError(problem)
    file = h5py.File(state[0], "r")
    if file_state(state[0]) != state:
        file.close()
        raise ValueError(f"{state[0]}: changed while it was opened.")
    return file


def _wrong_format(path: str | Path, *file_formats: str) -> str | None:
    try:
        file_format = format_of(path)
    except ValueError as reason:
        return f"{path}: {reason}."
    return None if file_format in file_formats else f"{path}: is {file_format}, not {' or '.join(file_formats)}."


def open_npy(path: str | Path) -> np.ndarray:
    """A .npy file as a read-only memory map.

    Raises:
        ValueError: the file is missing, not npy, truncated or holds objects.
    """
    if problem := _wrong_format(path, "npy"):
        raise ValueError(problem)
    with open(path, "rb") as file:
        try:
            problem = npy_problem(file, os.path.getsize(path))
        except Exception as reason:  # numpy parses a crafted header with Python's own parser
            problem = f"{type(reason).__name__}: {reason}"
    if problem:
        raise ValueError(f"{path}: {problem}.")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def load_npz(path: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, all or those named.

    Raises:
        ValueError: the file is missing, not npz, damaged or crafted, holds objects, or lacks a name.
    """
    if problem := _wrong_format(path, "zip"):
        raise ValueError(problem)
    try:
        problem = archive_problem(str(path)) or npz_problem(str(path))
        if problem:
            raise ValueError(problem)
        with np.load(path, allow_pickle=False) as arrays:
            missing = sorted(set(names or ()) - set(arrays.files))
            if missing:
                raise ValueError(f"holds {sorted(arrays.files)}, not {missing}")
            return {name: arrays[name] for name in (arrays.files if names is None else names)}
    except Exception as reason:  # whatever a damaged file may cause, such as `zlib.error`
        raise ValueError(f"{path}: {reason}.") from None


def open_dataset(path: str | Path, allow_sparse: bool = False, **options: Any) -> Any:
    """What xarray reads (NetCDF, HDF5, Zarr, GeoTIFF, GRIB) as an `xarray.Dataset`.

    Args:
        allow_sparse: see [`check_files`].
        options: of `xarray.open_dataset`; the engine follows from the file.

    Raises:
        ValueError: the file is missing, of no such kind, damaged or crafted.
    """
    if problem := _wrong_format(path, *ENGINES):
        raise ValueError(problem)
    state = _require_sound(path, allow_sparse)
    dataset = open_with_xarray(state[0], format_of(path), **options)
    if file_state(path) != state:
        dataset.close()
        raise ValueError(f"{path}: changed while it was opened.")
    return dataset


def extract(archive: str | Path, folder: str | Path, limit_bytes: int) -> Path:
    """Unpack a .zip, .tar, .tar.gz or .gz (into one file of its name) into a new folder, completely or not at all.

    Raises:
        ValueError: the folder exists; the archive is missing, damaged, holds a link, a device or a path that leads out
            of the folder, names a file twice, or unpacks to more than `limit_bytes`.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise ValueError(f"`folder` {folder} exists already.")
    if problem := _wrong_format(archive, "zip", "tar", "gzip"):
        raise ValueError(problem)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        for name, file in archive_members(archive, limit_bytes):
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as output:
                shutil.copyfileobj(file, output, 2**20)
        part.replace(folder)
    except Exception as reason:  # whatever a damaged file may cause, such as `zlib.error`
        shutil.rmtree(part)
        raise ValueError(f"{archive}: {reason}.") from None
    return folder


__all__ = ["check_files", "extract", "load_npz", "open_dataset", "open_hdf5", "open_npy"]
