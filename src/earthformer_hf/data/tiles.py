"""Tiles: events cut into smaller maps, for models of one size on data of another."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .events import ARRAYS, Events
from .frames import LazyFrames


def tile_corners(
    shape: Sequence[int],
    crop: Sequence[int] | None = None,
    tile: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
) -> list[tuple[int, int, int, int]]:
    """First row, end row, first column and end column of every tile of a grid of this shape (H, W).

    Args:
        crop: the same of the part that is covered; all if omitted.
        tile: height and width; one tile covers all if omitted.
        stride: rows and columns from one tile to the next, `tile` if omitted; the last ones end where the part ends.

    Raises:
        ValueError: a crop or tile that does not fit the grid.
    """
    height, width = shape
    top, bottom, left, right = crop or (0, height, 0, width)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"`crop` must lie within {height} rows and {width} columns, got {crop}.")
    if tile is None:
        return [(top, bottom, left, right)]
    (rows, columns), (down, across) = tile, stride or tile
    if not (1 <= rows <= bottom - top and 1 <= columns <= right - left and down >= 1 and across >= 1):
        raise ValueError(
            f"`tile` and `stride` must be at least 1 and fit {bottom - top} rows and {right - left} columns, got "
            f"{tile} and {stride}."
        )
    return [
        (row, row + rows, column, column + columns)
        for row in sorted({*range(top, bottom - rows + 1, down), bottom - rows})
        for column in sorted({*range(left, right - columns + 1, across), right - columns})
    ]


class Tiles(Sequence):
    """The tiles of events, each an event of its own, whose frames are read when they are asked for.

    Args:
        events: a list of events, or [`~earthformer_hf.data.events.Events`].
        size: height and width of a tile; the tiles cover each event, the last ones end where it ends.

    Raises:
        ValueError: a tile is larger than an event.
    """

    def __init__(self, events: Any, size: Sequence[int]):
        shapes = events.shapes if isinstance(events, Events) else [event["values"].shape for event in events]
        self.events, self.places, self.lengths, self.shapes = events, [], [], []
        for index, shape in enumerate(shapes):
            for corners in tile_corners(shape[1:3], tile=size):
                self.places.append((index, corners))
                self.lengths.append(shape[0])
                self.shapes.append((shape[0], *size, *shape[3:]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        number, (top, bottom, left, right) = self.places[index]
        event, part = self.events[number], (slice(top, bottom), slice(left, right))
        cut = {name: _cropped(event[name], part) for name in ARRAYS if name in event}
        geo = event.get("geo", {}) | {"row": top, "column": left}
        return event | cut | {"id": f"{event.get('id')}:{top}:{left}", "geo": geo}


def _cropped(frames: Any, part: tuple[slice, slice]) -> Any:
    """Frames (T, H, W, ...) of some rows and columns."""
    if not isinstance(frames, LazyFrames):
        return frames[:, *part]
    size = [side.stop - side.start for side in part]
    cropped = LazyFrames(
        (len(frames), *size, *frames.shape[3:]),
        frames.dtype,
        lambda numbers: np.asarray(frames.read(numbers)[:, *part]),
    )
    cropped.place = frames.place
    return cropped


__all__ = ["Tiles", "tile_corners"]
