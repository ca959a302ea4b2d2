"""Large maps from a model of one size: overlapping tiles, one field of noise, and no seams.

```
rows     |------- tile -------|
                       |------- tile -------|
                                |------- tile -------|     the last ends where the map ends
weights  ....::::|||||||||||||||||||||||||||||||||::::....
```
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..data.tiles import tile_corners


LEAST_WEIGHT = 1e-3  # of a pixel of which a tile has seen nothing
Place = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Cover:
    """The tiles that cover a map.

    Args:
        shape: rows and columns of the map.
        padded: of the map with what is missing at its lower and right edge for the tiles to fit.
        tile: rows and columns of a tile.
        corners: first row, end row, first column and end column of each tile.
        weights: (rows, columns) of a tile in the mean of overlapping ones, highest in its middle, never 0.
    """

    shape: tuple[int, int]
    padded: tuple[int, int]
    tile: tuple[int, int]
    corners: list[tuple[int, int, int, int]]
    weights: np.ndarray


def cover(shape: tuple[int, int], tile: tuple[int, int], overlap: int, multiple: int = 1) -> Cover:
    """The tiles of a map of this shape.

    Args:
        shape, tile: rows and columns.
        overlap: of neighbouring tiles at least, in pixels.
        multiple: of which the first row and column of each tile is one; the pixels of a latent.

    Raises:
        ValueError: an overlap that leaves no step from one tile to the next.
    """
    if not 0 <= overlap <= min(tile) - multiple:
        raise ValueError(f"`overlap` must be 0 to {min(tile) - multiple} pixels of tiles of {tile}, got {overlap}.")
    padded = tuple(max(side, -(-length // multiple) * multiple) for length, side in zip(shape, tile))
    stride = tuple(max(multiple, (side - overlap) // multiple * multiple) for side in tile)
    corners = tile_corners(padded, tile=tile, stride=stride)
    return Cover(shape, (padded[0], padded[1]), tile, corners, _weights(tile, overlap))


def _weights(tile: tuple[int, int], overlap: int) -> np.ndarray:
    """Half a cosine wave along each edge, as wide as the overlap."""
    sides = []
    for length in tile:
        distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
        part = np.clip(distance / max(overlap, 1), 0, 1)
        sides.append((1 - np.cos(np.pi * part)) / 2 + 1e-6)
    return np.outer(*sides).astype("float32")


def padded_to(past: torch.Tensor, cover: Cover, fill: float) -> torch.Tensor:
    """Context (M, T, H, W, C) with pixels of one value added at the lower and right edge, up to `cover.padded`."""
    rows, columns = (padded - length for padded, length in zip(cover.padded, cover.shape))
    return torch.nn.functional.pad(past, (0, 0, 0, columns, 0, rows), value=fill)


def blended(
    predict: Callable[[Place], torch.Tensor],
    cover: Cover,
    reach: Callable[[Place], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What a model forecasts of a map, tile by tile, as the weighted mean where tiles overlap.

    Args:
        predict: rows and columns of a tile in the padded map -> its forecast (N, T_out, rows, columns, C).
        cover: the tiles.
        reach: of such a tile, (T_out, rows, columns), 0..1: how much of what arrives in a pixel the tile has seen.
            Where the weather comes from beyond its edge, its neighbour knows better.

    Returns:
        (N, T_out, H, W, C) of the map without padding.
    """
    total, weight = torch.zeros(()), torch.zeros(())
    for number, (top, bottom, left, right) in enumerate(cover.corners):
        place = slice(top, bottom), slice(left, right)
        part = predict(place).float().cpu()
        weights = torch.from_numpy(cover.weights).expand(part.shape[1], -1, -1)  # (T_out, rows, columns)
        if reach is not None:
            weights = weights * reach(place).clamp(min=LEAST_WEIGHT)
        weights = weights[..., None]
        if number == 0:
            total = torch.zeros(*part.shape[:2], *cover.padded, part.shape[-1])
            weight = torch.zeros(part.shape[1], *cover.padded, 1)
        total[:, :, *place] += part * weights
        weight[:, *place] += weights
    total /= weight
    return total[:, :, : cover.shape[0], : cover.shape[1]]


__all__ = ["Cover", "blended", "cover", "padded_to"]
