"""Frames of an event: read as they are sliced along time, or compressed in a hosted table."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .chunk_checks import is_bomb, is_chunk_bomb


class LazyFrames:
    """Frames that are read when they are sliced along time, as an array would be.

    Args:
        shape: (T, H, W) or (T, H, W, C).
        dtype: of the values.
        read: range of frame numbers (start, stop, step) -> array (frames, H, W[, C]).

    What goes wrong when frames are read is a ValueError that begins with `place`, the words for where they are.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[range], np.ndarray]):
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read
        self.ndim = len(self.shape)
        self.place = "frames"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(first, slice):
            frames = self._read(range(len(self))[first])
            return frames[(slice(None), *rest)] if rest else frames
        frame = range(len(self))[first]  # an IndexError past the end, as of a list
        return self._read(range(frame, frame + 1))[(0, *rest)]

    def _read(self, numbers: range) -> np.ndarray:
        try:
            frames = self.read(numbers)
        except Exception as reason:  # whatever a damaged file may cause
            raise ValueError(f"{self.place}: {reason}") from reason
        expected = (len(numbers), *self.shape[1:])
        if frames.shape != expected or frames.dtype != self.dtype:
            raise ValueError(
                f"{self.place}: must be {self.dtype} {expected}, the file gave {frames.dtype} {frames.shape}."
            )
        return frames

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def compressed(frames: np.ndarray) -> dict[str, Any]:
    """Frames as a hosted table holds them: each compressed on its own (zstd), with their shape and dtype."""
    packed = [pa.compress(np.ascontiguousarray(frame).tobytes(), "zstd", asbytes=True) for frame in frames]
    return {"frames": packed, "shape": list(frames.shape[1:]), "dtype": str(frames.dtype)}


def decompressed(stored: dict[str, Any]) -> LazyFrames:
    """The inverse of [`compressed`], frame by frame as they are asked for.

    Raises:
        ValueError: a dtype that does not hold plain numbers, or, on reading, a frame of another size than stated.
    """
    dtype, shape = np.dtype(stored["dtype"]), tuple(stored["shape"])
    if dtype.kind not in "buif":
        raise ValueError(f"`dtype` of stored frames must be of plain numbers, got {dtype}.")
    size = dtype.itemsize * math.prod(shape)

    def read(numbers: range) -> np.ndarray:
        lengths = [len(stored["frames"][frame]) for frame in numbers]
        if is_bomb(len(numbers) * size, sum(lengths)) or any(is_chunk_bomb(size, length) for length in lengths):
            raise ValueError(f"{len(numbers)} stored frames declare {size} bytes each; not read.")
        frames = np.empty((len(numbers), *shape), dtype)
        for place, frame in enumerate(numbers):
            try:
                data = pa.decompress(stored["frames"][frame], size, "zstd")
                frames[place] = np.frombuffer(data, dtype).reshape(shape)
            except (OSError, ValueError) as reason:
                raise ValueError(f"frame {frame} does not hold {size} bytes of {dtype}: {reason}") from None
        return frames

    return LazyFrames((len(stored["frames"]), *shape), dtype, read)


__all__ = ["LazyFrames", "compressed", "decompressed"]
