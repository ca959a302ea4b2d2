"""What is wrong with the chunks of HDF5 files and Zarr stores: part of the checks of `file_checks.py`.

A chunk is a bomb if it decodes to far more than it stores. What the index says of a chunk (its stored size, the shape
it declares) is compared for all of them; where that leaves room for more, since what is packed may be longer than its
shape, chunks are decoded: all of a small file, and a sample of a large one that nobody can foresee.
"""

import json
import math
import os
import random
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


LARGE, RATIO = 2**30, 1000  # what declares more bytes than LARGE and than RATIO times its stored bytes is a bomb
LARGE_CHUNK, CHUNK_RATIO = 2**28, 100  # the same of what is decoded at once: a chunk, a map, an array of an archive
MOST_CHUNKS, SMALL_CHUNK = 2**24, 4096  # an array of more chunks, or of 1/64 of that if they are small, is refused
MOST_INNER = 1024  # chunks of a shard that are decoded, at most
SAMPLE, SAMPLE_SECONDS = 2**25, 10  # stored bytes of chunks that may be bombs of which so many are decoded, at most
EXPANSION = {1: 1032, 32000: 264}  # HDF5 filter -> how often its output is its input, at most: deflate, LZF
PLAIN_FILTERS = {2, 3}  # shuffle, checksum


def is_bomb(declared: int, stored: int) -> bool:
    """Whether so many stored bytes cannot honestly be so many."""
    return declared > LARGE and declared > RATIO * stored


def is_chunk_bomb(decoded: int, stored: int) -> bool:
    """The same of bytes that are decoded at once."""
    return decoded > LARGE_CHUNK and decoded > CHUNK_RATIO * stored


class Sample:
    """Some of the chunks whose metadata do not say how much they decode to, drawn without a rule."""

    def __init__(self):
        self.count, self.chunks = 0, []

    def add(self, stored: int, *chunk: Any) -> None:
        self.count += 1
        if len(self.chunks) < 2**16:
            self.chunks.append((stored, *chunk))
        elif (place := random.randrange(self.count)) < len(self.chunks):
            self.chunks[place] = (stored, *chunk)

    def __iter__(self) -> Iterator[tuple]:
        end, total = time.monotonic() + SAMPLE_SECONDS, 0
        random.shuffle(self.chunks)
        for stored, *chunk in self.chunks:
            if total > SAMPLE or time.monotonic() > end:
                return
            total += stored
            yield tuple(chunk)


def _cut_problem(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> str | None:
    """Whether an array is cut into more chunks than a reader can list."""
    size = math.prod(chunk) * itemsize
    count = math.prod(-(-length // max(part, 1)) for length, part in zip(shape, chunk))
    if count > (MOST_CHUNKS if size >= SMALL_CHUNK else MOST_CHUNKS // 64):
        return f"is cut into {count} chunks of {size} bytes; not read"
    return None


def hdf5_chunk_problem(item: Any, sample: Sample) -> str | None:
    """Whether a chunk decodes to more than it can honestly hold, by what the file's index says of it."""
    if item.chunks is None:
        return None
    if problem := _cut_problem(item.shape, item.chunks, item.dtype.itemsize):
        return problem
    decoded, creation = math.prod(item.chunks) * item.dtype.itemsize, item.id.get_create_plist()
    filters = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    packing = [number for number in filters if number not in PLAIN_FILTERS]
    most = EXPANSION.get(packing[0], math.inf) if len(packing) == 1 else math.inf
    bombs: list[Any] = []

    def look(chunk: Any) -> bool | None:
        if is_chunk_bomb(decoded, chunk.size):
            bombs.append(chunk)
            return True  # ends the loop
        if most * chunk.size > LARGE_CHUNK and chunk.size < LARGE_CHUNK:
            sample.add(chunk.size, item, chunk.chunk_offset, filters, decoded)
        return None

    if packing:
        item.id.chunk_iter(look)
    for chunk in bombs:
        return f"has a chunk at {chunk.chunk_offset} of {chunk.size} bytes that declares {decoded}; not read"
    return None


def hdf5_decoding_problem(item: Any, offset: tuple[int, ...], filters: list[int], decoded: int) -> str | None:
    """Whether a chunk of HDF5 decodes to more than its shape; what is damaged is left for its reader to find."""
    try:
        if [number for number in filters if number not in PLAIN_FILTERS] == [1]:  # in pieces, in little memory
            mask, content = item.id.read_direct_chunk(offset)
            skipped = mask >> filters.index(1) & 1  # a bit for each filter
            unpacker, found = zlib.decompressobj(), 0
            while content and not skipped and not unpacker.eof and found <= decoded + 4:  # and a checksum of 4 bytes
                found += len(unpacker.decompress(content, 2**20))
                content = unpacker.unconsumed_tail
            honest = found <= decoded + 4
        else:
            item[offset]
            honest = True
    except zlib.error:
        return None
    except (MemoryError, OSError):  # of which HDF5 does not tell which
        honest = False
    if honest:
        return None
    return f"{item.name!r} has a chunk at {offset} that decodes to more than the {decoded} bytes it declares; not read"


def hdf5_references_problem(item: Any, stored: int) -> str | None:
    """Whether texts or lists of any length, which lie elsewhere in a file and may be one for all, fit the memory."""
    if item.dtype.hasobject and item.size and stored < LARGE:
        try:
            item[()]
        except (MemoryError, OSError):
            return f"{item.name!r} takes more memory than a file of {stored} bytes can honestly hold; not read"
    return None


def zarr_problem(path: str) -> str | None:
    arrays: dict[str, list[dict[str, Any]]] = {}  # folder -> the array it belongs to, as each version describes it
    sample = Sample()
    for folder, folders, names in os.walk(path):
        found = []
        for name in folders + names:
            place = os.path.join(folder, name)
            if os.path.islink(place):
                return f"{place!r} is a link to elsewhere; not read"
            if name in (".zarray", ".zmetadata", "zarr.json"):
                described = json.loads(Path(place).read_text())
                if _names_pickle(described):
                    return f"{place!r} asks for pickled objects; not read"
                if name == ".zarray" or (name == "zarr.json" and described.get("node_type") == "array"):
                    found.append(_zarr_array(folder, described))
                    if problem := _cut_problem(*(found[-1][key] for key in ("shape", "chunk", "itemsize"))):
                        return f"{folder!r} {problem}"
        arrays[folder] = found or arrays.get(os.path.dirname(folder), [])  # of which this is a folder of chunks
        for array in arrays[folder]:
            for name in names:
                stored = os.path.getsize(os.path.join(folder, name))
                key = os.path.relpath(f"{folder}/{name}", array["folder"])
                chunk = re.fullmatch(r"c|(?:c[/.])?\d+(?:[/.]\d+)*", key)
                if chunk and is_chunk_bomb(array["decoded"], stored):
                    place = os.path.join(folder, name)
                    return f"{place!r} has {stored} bytes and declares {array['decoded']}; not read"
                if chunk and array["packed"]:
                    sample.add(stored, array, [int(number) for number in re.findall(r"\d+", key)])
    return next(filter(None, (_zarr_decoding_problem(*chunk) for chunk in sample)), None)


def _zarr_array(folder: str, described: dict[str, Any]) -> dict[str, Any]:
    """What the metadata of an array say, of version 2 or 3."""
    shape = described["shape"]
    if "codecs" in described:  # version 3
        version, codecs = 3, described["codecs"]
        chunk = described["chunk_grid"]["configuration"]["chunk_shape"]
        packed = {codec["name"] for codec in codecs} - {"bytes", "crc32c", "transpose"}
        inner = _inner_chunk(codecs, chunk)
    else:
        version, chunk = 2, described["chunks"]
        packed, inner = {"compressor", "filters"} & {name for name, value in described.items() if value}, chunk
    try:
        itemsize = np.dtype(described.get("dtype") or described.get("data_type")).itemsize
    except TypeError:  # text, or a type of an extension
        itemsize = 16
    known = {"folder": folder, "version": version, "shape": shape, "chunk": chunk, "inner": inner}
    return known | {"itemsize": itemsize, "decoded": math.prod(inner) * itemsize, "packed": bool(packed)}


def _inner_chunk(codecs: list[dict[str, Any]], chunk: list[int]) -> list[int]:
    """What is decoded at once: a chunk, or one of those that lie in a shard, which may be shards themselves."""
    for codec in codecs:
        if codec["name"] == "sharding_indexed":
            return _inner_chunk(codec["configuration"]["codecs"], codec["configuration"]["chunk_shape"])
    return chunk


def _zarr_decoding_problem(array: dict[str, Any], number: list[int]) -> str | None:
    """Whether a chunk, or one of those in a shard, decodes to more than the memory; what is damaged is left for its
    reader to find."""
    import zarr

    try:
        if "opened" not in array:
            array["opened"] = zarr.open_array(array["folder"], mode="r", zarr_format=array["version"])
        counts = [part // inner for part, inner in zip(array["chunk"], array["inner"])]
        places = random.sample(range(math.prod(counts)), min(math.prod(counts), MOST_INNER))
    except Exception:  # whatever a damaged file may cause
        return None
    for place in places:
        grid = np.unravel_index(place, counts) if counts else ()
        corner = (index * part for index, part in zip(number, array["chunk"]))
        try:
            array["opened"][tuple(at + int(n) * part for at, n, part in zip(corner, grid, array["inner"]))]
        except MemoryError:
            return f"{array['folder']!r} has a chunk {number} that decodes to more than it declares; not read"
        except Exception:  # the same, or it lies beyond the array's end
            continue
    return None


def _names_pickle(node: Any) -> bool:
    if isinstance(node, dict):
        return any(node.get(key) == "pickle" for key in ("id", "name")) or any(map(_names_pickle, node.values()))
    return isinstance(node, list) and any(map(_names_pickle, node))


__all__ = [
    "Sample",
    "hdf5_chunk_problem",
    "hdf5_decoding_problem",
    "hdf5_references_problem",
    "is_bomb",
    "is_chunk_bomb",
    "zarr_problem",
]
