"""What is wrong with a file: the checks that run in a child process, see `guards.py`.

This file is run as a program of its own, and imports nothing of the package but `chunk_checks.py`.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import stat
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np


if __package__:
    from . import chunk_checks as chunks
else:  # in the child, which does not import the package
    sys.path.append(os.path.dirname(__file__))
    import chunk_checks as chunks  # type: ignore[no-redef]


MEMORY, SECONDS = 3 * 2**29, 120  # that a check may take
IDLE = 20  # seconds after which the checking process ends

# file format -> (offset, bytes) of which one must be there
MAGIC: dict[str, tuple[tuple[int, bytes], ...]] = {
    "hdf5": tuple((offset, b"\x89HDF\r\n\x1a\n") for offset in (0, 512, 1024, 2048)),
    "netcdf3": ((0, b"CDF\x01"), (0, b"CDF\x02"), (0, b"CDF\x05")),
    "npy": ((0, b"\x93NUMPY"),),
    "zip": ((0, b"PK\x03\x04"), (0, b"PK\x05\x06")),
    "gzip": ((0, b"\x1f\x8b"),),
    "tar": ((257, b"ustar"),),
    "tiff": ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
    "grib": ((0, b"GRIB"),),
}
FORMATS_BY_ENDING = {
    ".h5": ("hdf5",), ".hdf5": ("hdf5",), ".hdf": ("hdf5",), ".he5": ("hdf5",), ".nc": ("hdf5", "netcdf3"),
    ".nc4": ("hdf5", "netcdf3"), ".cdf": ("hdf5", "netcdf3"), ".npy": ("npy",),
    ".npz": ("zip",), ".zip": ("zip",), ".gz": ("gzip",), ".tgz": ("gzip",), ".tar": ("tar",), ".tif": ("tiff",),
    ".tiff": ("tiff",), ".grib": ("grib",), ".grib2": ("grib",), ".grb": ("grib",), ".grb2": ("grib",),
}  # fmt: skip
ZARR_MARKS = ("zarr.json", ".zgroup", ".zmetadata", ".zarray")
ENGINES = {"hdf5": "netcdf4", "netcdf3": "netcdf4", "tiff": "rasterio", "grib": "cfgrib", "zarr": "zarr"}


def format_of(path: str | Path) -> str:
    """The format of a file by its first bytes: a key of `MAGIC`, or "zarr" for the folder of a Zarr store.

    Raises:
        ValueError: it is no file, of no known format, or of another format than its name says.
    """
    path = Path(path)
    if path.is_dir() and any((path / name).is_file() for name in ZARR_MARKS):
        return "zarr"
    if not path.is_file():
        raise ValueError("is not a file" if path.exists() else "does not exist")
    with path.open("rb") as file:
        start = file.read(2056)
    found = [
        file_format for file_format, marks in MAGIC.items() if any(start.startswith(mark, at) for at, mark in marks)
    ]
    expected = FORMATS_BY_ENDING.get(path.suffix.lower(), tuple(MAGIC))
    if not found or found[0] not in expected:
        raise ValueError(f"is not {' or '.join(expected)}, it begins with {start[:8]!r}")
    return found[0]


def problem_of(path: str, allow_sparse: bool = False) -> str | None:
    """What is wrong with a file, None if nothing is; with `allow_sparse`, it may declare more than it stores."""
    file_format = format_of(path)
    if file_format == "hdf5":
        problem = _hdf5_problem(path, allow_sparse)
        return problem or (
            _xarray_problem(path, file_format, allow_sparse) if path.endswith((".nc", ".nc4", ".cdf")) else None
        )
    if file_format == "npy":
        with open(path, "rb") as file:
            return npy_problem(file, os.path.getsize(path))
    if file_format in ("zip", "tar", "gzip"):
        return archive_problem(path) or (npz_problem(path) if path.endswith(".npz") else None)
    first = {"zarr": chunks.zarr_problem, "netcdf3": _netcdf3_problem, "grib": _grib_problem, "tiff": _tiff_problem}
    return first.get(file_format, lambda path: None)(path) or _xarray_problem(path, file_format, allow_sparse)


def _hdf5_problem(path: str, allow_sparse: bool) -> str | None:
    import h5py

    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  further compressions, where they are installed
    size = os.path.getsize(path)
    sample = chunks.Sample()
    with h5py.File(path, "r") as file:
        waiting: list[Any] = [file]
        seen = {h5py.h5o.get_info(file.id).addr}
        while waiting:
            group = waiting.pop()
            for name in group:
                place = f"{group.name.rstrip('/')}/{name}"
                link = group.get(name, getlink=True)
                if isinstance(link, h5py.SoftLink):  # to a place in this file, which is checked where it is
                    continue
                if not isinstance(link, h5py.HardLink):
                    return f"{place!r} is a link to elsewhere; not read"
                item = group[name]
                address = h5py.h5o.get_info(item.id).addr
                if address in seen:  # hard links may form a ring
                    continue
                seen.add(address)
                if isinstance(item, h5py.Group):
                    waiting.append(item)
                elif isinstance(item, h5py.Dataset):
                    declared = math.prod(item.shape or ()) * item.dtype.itemsize
                    if item.is_virtual or item.external:
                        return f"{place!r} is stored elsewhere; not read"
                    stored = min(item.id.get_storage_size(), size)
                    if chunks.is_bomb(declared, stored) and not allow_sparse:
                        return f"{place!r} declares {declared} bytes and stores {stored}; not read"
                    if problem := chunks.hdf5_chunk_problem(item, sample):
                        return f"{place!r} {problem}"
                    if item.shape is not None and 0 not in item.shape:
                        item[(0,) * item.ndim]
                    if problem := chunks.hdf5_references_problem(item, size):
                        return problem
        return next(filter(None, (chunks.hdf5_decoding_problem(*chunk) for chunk in sample)), None)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array that begins here; the file is left at its first byte."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"is npy of version {version}, not (1, 0) or (2, 0)")
    shape, _, dtype = readers[version](file)
    return shape, dtype


def npy_problem(file: IO[bytes], size: int) -> str | None:
    """`size`: of the file from here on."""
    start = file.tell()
    shape, dtype = _npy_header(file)
    expected = file.tell() - start + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0:
        return f"declares the shape {shape}"
    if dtype.hasobject:
        return "holds pickled objects; not read"
    if not dtype.itemsize:
        return f"declares {dtype}, which holds nothing"
    if expected != size:
        return f"has {size} bytes, but {dtype} {shape} takes {expected}: truncated or crafted"
    return None


def npz_problem(path: str) -> str | None:
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if chunks.is_chunk_bomb(total, stored := os.path.getsize(path)):
            return f"unpacks {stored} bytes to {total}; not read"
        for member in archive.infolist():
            with archive.open(member) as file:
                problem = npy_problem(file, member.file_size)
            if problem:
                return f"{member.filename!r} {problem}"
    return None


def archive_problem(path: str) -> str | None:
    for _ in archive_members(Path(path), None):
        pass
    return None


def archive_members(archive: Path, limit_bytes: int | None) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of an archive's files, each checked before it is given.

    Args:
        limit_bytes: that all may hold; None: what a bomb holds is refused.
    """
    file_format, stored = format_of(archive), archive.stat().st_size
    total = 0

    def checked(name: str, size: int, plain: bool) -> str:
        nonlocal total
        path = PurePosixPath(name)
        drive = PureWindowsPath(name).drive or "\\" in name
        if path.is_absolute() or ".." in path.parts or drive or not path.parts:
            raise ValueError(f"holds the path {name!r}, which leads out of the folder")
        if not plain:
            raise ValueError(f"{name!r} is a link or a device")
        total += size
        if total > limit_bytes if limit_bytes is not None else chunks.is_bomb(total, stored):
            raise ValueError(f"unpacks to more than {limit_bytes or max(chunks.LARGE, chunks.RATIO * stored)} bytes")
        return name

    if file_format == "zip":
        with zipfile.ZipFile(archive) as members:
            for info in members.infolist():
                plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                name = checked(info.filename, info.file_size, plain)
                if not info.is_dir():
                    with members.open(info) as file:
                        yield name, file
    elif file_format == "tar" or archive.name.endswith((".tar.gz", ".tgz")):
        opened = _Unpacked(archive) if file_format == "gzip" else archive.open("rb")
        with opened as content, tarfile.open(fileobj=content, mode="r:") as tar:
            for member in tar:
                name = checked(member.name, member.size, member.isreg() or member.isdir())
                if member.isreg() and (member_file := tar.extractfile(member)):
                    yield name, member_file
    else:
        with _Unpacked(archive) as packed:
            while data := packed.read(2**20):
                checked(archive.stem, len(data), True)
            packed.seek(0)
            yield archive.stem, packed  # type: ignore[misc]


class _Unpacked(gzip.GzipFile):
    """A gzip file that is read in pieces: the headers of a tar archive within may claim any length."""

    def read(self, size=-1):
        if not 0 <= size <= 2**24:
            raise ValueError(f"has a header of {size} bytes")
        return super().read(size)


def _xarray_problem(path: str, file_format: str, allow_sparse: bool) -> str | None:
    """Opens a file as xarray will, and compares what it declares with what it stores."""
    stored = file_state(path)[1]
    try:
        opened = open_with_xarray(path, file_format, decode_times=False)
    except ValueError as reason:
        if file_format == "grib" and "filter_by_keys" in str(reason):  # messages of several kinds, which is no damage
            return None
        raise
    with opened as dataset:
        for name, variable in dataset.variables.items():
            if chunks.is_bomb(variable.nbytes, stored) and not allow_sparse:
                return (
                    f"{name!r} declares {variable.nbytes} bytes, the file has {stored}; not read, unless "
                    "`allow_sparse` says that so little was written"
                )
            one = math.prod(variable.shape[-2:]) * variable.dtype.itemsize
            if file_format in ("tiff", "grib") and chunks.is_chunk_bomb(one, stored):
                return f"{name!r} declares maps of {one} bytes, the file has {stored}; not read"
    return None


def _tiff_problem(path: str) -> str | None:
    """Whether a GeoTIFF declares tiles, which may be larger than its map, that decode to far more than it stores."""
    import rasterio

    stored = os.path.getsize(path)
    with rasterio.open(path) as file:
        bands = file.count if file.interleaving == rasterio.enums.Interleaving.pixel else 1
        for shape in file.block_shapes:
            if chunks.is_chunk_bomb(math.prod(shape) * bands, stored):
                return f"declares tiles of {shape[0]} x {shape[1]} pixels, the file has {stored} bytes; not read"
    return None


def _grib_problem(path: str) -> str | None:
    """Whether the last message of a GRIB file ends behind the file's end, which its reader would leave out.

    WMO Manual on Codes, FM 92 GRIB: "GRIB", the length (edition 1: bytes 5 to 7; edition 2: bytes 9 to 16), "7777".
    """
    size, messages = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while True:
            start = file.tell()
            head = file.read(16)
            if len(head) < 16 or head[:4] != b"GRIB":
                found = (head + file.read(2**16)).find(b"GRIB")  # padding, or the header of a bulletin
                if found < 0:
                    return None if messages else "holds no message"
                file.seek(start + found)
                if start + found + 16 > size:
                    return f"message {messages + 1} is truncated"
                continue
            length = int.from_bytes(head[8:16], "big") if head[7] == 2 else int.from_bytes(head[4:7], "big")
            messages += 1
            if length < 20 or start + length > size:
                return f"message {messages} has {length} bytes, of which the file holds {size - start}: truncated"
            file.seek(start + length)


def _netcdf3_problem(path: str) -> str | None:
    """Whether a file of the classic format ends before its data do, which the library reads as zeros.

    The header's grammar: https://docs.unidata.ucar.edu/netcdf-c/current/file_format_specifications.html
    """
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}  # bytes of each type
    with open(path, "rb") as file:
        version = file.read(4)[3]
        width = 8 if version == 5 else 4

        def read_integer(size: int = width) -> int:
            content = file.read(size)
            if len(content) < size:
                raise ValueError("its header is truncated")
            return int.from_bytes(content, "big")

        def skip_padded(size: int) -> None:
            file.seek(-size % 4 + size, os.SEEK_CUR)

        def entries() -> range:
            read_integer(4)  # the list's tag
            return range(read_integer())

        def skip_attributes() -> None:
            for _ in entries():
                skip_padded(read_integer())
                file_format = read_integer(4)
                skip_padded(read_integer() * sizes[file_format])

        records = read_integer()
        lengths = []
        for _ in entries():
            skip_padded(read_integer())
            lengths.append(read_integer())
        skip_attributes()
        end, ends, record = 0, [0], []  # of all plain variables; of variables in the first record, and their sizes
        for _ in entries():
            skip_padded(read_integer())
            shape = [lengths[read_integer()] for _ in range(read_integer())]
            skip_attributes()
            size = sizes[read_integer(4)]
            read_integer()  # its size, which is redundant, and too small for large variables
            begin = read_integer(4 if version == 1 else 8)
            if shape and shape[0] == 0:  # along the record dimension
                size *= math.prod(shape[1:])
                ends.append(begin + size)
                record.append(size)
            else:
                end = max(end, begin + math.prod(shape) * size)
        if records != 256**width - 1 and records:  # else they are to be counted from the file's size
            step = record[0] if len(record) == 1 else sum(-size % 4 + size for size in record)
            end = max(end, max(ends) + (records - 1) * step)
    stored = os.path.getsize(path)
    return f"must have {end} bytes, it has {stored}: truncated" if end > stored else None


def open_with_xarray(path: str, file_format: str, **options: Any) -> Any:
    import xarray

    own: dict[str, dict[str, Any]] = {"grib": {"indexpath": ""}, "zarr": {"consolidated": False}}
    options = {"engine": ENGINES[file_format]} | own.get(file_format, {}) | options
    return xarray.open_dataset(path, **options)


def file_state(path: str | Path) -> tuple[Any, ...]:
    """What a check holds for: path, size, times of change and of the entry, number, and a digest of the file's head,
    middle and tail; of a folder the sum and the latest of its files, and a digest of their states."""
    path = os.path.abspath(path)
    digest = hashlib.sha256()
    if os.path.isdir(path):
        states = []
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                place = os.path.join(folder, name)
                states.append(os.lstat(place))
                digest.update(f"{place}\n{_entry(states[-1])}\n".encode("utf-8", "surrogateescape"))
    else:
        with open(path, "rb") as file:
            states = [os.fstat(file.fileno())]
            for start in (0, states[0].st_size // 2, max(states[0].st_size - 4096, 0)):
                file.seek(start)
                digest.update(file.read(4096))
    total, latest = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
    changed = max((s.st_ctime_ns for s in states), default=0)
    return path, total, latest, changed, os.stat(path).st_ino, digest.hexdigest()


def _entry(state: os.stat_result) -> tuple[int, ...]:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


# ---------------------------------------------------------------------------------------------------------------------
# The child
# ---------------------------------------------------------------------------------------------------------------------


def _serve() -> None:
    """A path and `allow_sparse` on every line that comes, what is wrong with it on every line that goes."""
    with contextlib.suppress(ImportError, ValueError):  # not Windows; the system has a lower limit, or none
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY))  # in which address space is no memory yet
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        idle = threading.Timer(IDLE, os._exit, [0])
        idle.daemon = True
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:
            return
        try:
            problem = problem_of(*json.loads(line))
        except ValueError as reason:
            problem = str(reason)
        except Exception as reason:  # whatever a damaged file may cause
            problem = f"cannot be read: {type(reason).__name__}: {reason}"
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()
        if _peak() > MEMORY // 2:  # which the next file would lack, and be blamed for it
            os._exit(0)


def _peak() -> int:
    """Bytes of memory that this process held at most; 0 where the system does not say it.

    `getrusage` would count what its parent held when it was started, which may be many models.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


__all__ = [
    "ENGINES",
    "FORMATS_BY_ENDING",
    "SECONDS",
    "ZARR_MARKS",
    "archive_members",
    "archive_problem",
    "file_state",
    "format_of",
    "npy_problem",
    "npz_problem",
    "open_with_xarray",
]

if __name__ == "__main__":
    _serve()
